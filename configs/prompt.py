"""Prompt a pretrained model, zero-shot or few-shot: which of two answers does its language-model head find likelier?

    python -m w2s_jax.main --config=prompt --config.model=gpt2 --config.task=sciq --workdir=runs/zero-shot
    python -m w2s_jax.main --config=prompt --config.model=gpt2 --config.task=sciq --config.shots=5 --workdir=runs/five-shot

A floor of Burns et al. 2023 (section 5.2.1): what a student knows before it is trained. A prompt is the shots and the document, each in
the template; the log-likelihoods of the two answers after it are the logits. Nothing is trained.
`split=b` labels half B (`--config.labels=<this run>` of a student); `labels=<label run>` takes the shots' answers from weak labels.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    c = ConfigDict()
    c.stage = "prompt"  # which stage of w2s_jax runs this config
    c.seed = 0  # which documents are the shots, and in which order
    c.data_seed = 0  # coin, sampling, halves, test; as in the runs that it is compared with

    # Model
    c.model = "gpt2"  # hub id, or a local folder in Hugging Face's format; a decoder
    c.revision = ""  # branch, tag or commit of a hub model (empty = main); recorded as a commit hash
    c.dtype = "float32"  # compute: float32 | bfloat16
    c.param_dtype = "float32"  # parameters: float32 | bfloat16
    c.matmul_precision = "default"  # default | high | highest (default may mean TF32 or bfloat16 passes on an accelerator)
    c.attention = "auto"  # auto | xla | splash (TPU) | pallas, cudnn (GPU; cudnn: one document a row)

    # Prompt
    c.template = ""  # {text} somewhere, {answer} at the end; \n = new line; empty = the task's own (w2s_jax/data/prompts.py)
    c.answers = ()  # of class 0 and of class 1, of one token or several; empty = the task's own (mostly No,Yes)
    c.shots = 0  # training documents with their answers put before the document, the classes in turn
    c.labels = ""  # answers of the shots: a label run's folder, or a parquet file (the shots are of half B then); empty = ground truth
    c.calibrate = "none"  # none | content_free (Zhao et al. 2021) | prior (mean over the documents: Zhou et al. 2023)

    # Data
    c.task = "sciq"  # a registered task, or a folder with train.* and test.* (jsonl, csv, parquet, .gz)
    c.task_dir = ""  # read a registered task's splits from this folder instead of the hub
    c.task_revision = ""  # revision of the hub data set; empty = the registry's
    c.split = "test"  # the documents that are asked about: test | b | a; the shots are of half A (split=a: of half B)
    c.n_train = 20000  # documents in both halves together, at most
    c.n_test = 10000  # test documents, at most
    c.test_fraction = 0.0  # carve this share of the training rows (by group) where the task has no test split
    c.group = "auto"  # auto = the task's groups stay on one side of every split | none = as the references
    c.balance = False  # undersample to 50/50
    c.max_length = 2048  # tokens of a prompt with its answer; shots are left out where it has as many or more
    c.overlong = "drop"  # prompts that are too long without shots: drop | truncate (the end of the text) | error

    # Running
    c.eval_batch_size = 0  # prompts a forward pass; 0 = by tokens
    c.mesh = ConfigDict()  # devices along each axis; -1 = all that are left; 0 everywhere = auto (what fits). Also: mesh=auto, mesh=1x8x1
    c.mesh.data = 0  # replicas
    c.mesh.fsdp = 0  # parameters split
    c.mesh.model = 0  # tensors split

    if arg == "runlocal":
        from w2s_jax.config import runlocal
        c = runlocal(c)
    elif arg:
        raise ValueError(f"configs/prompt.py takes ':runlocal', got ':{arg}'")
    return c
