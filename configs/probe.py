"""Probes on frozen features of the pretrained strong model: predict the test set, filter or relabel a student's training documents.

    python -m w2s_jax.main --config=configs/probe.py --config.model=gpt2-xl --config.task=sciq --config.labels=runs/weak-labels \\
        --config.mode=filter --config.probe=topofilter --workdir=runs/filtered
    python -m w2s_jax.main --config=configs/finetune.py --config.labels=runs/filtered --config.split=b ...

EleutherAI's three uses of a probe. `predict` writes predictions/test.parquet as a student does. `filter` writes the labels of
the split's documents with a column weight (0 = left out), and beside them, in <split>_random.parquet, a random filter that
leaves out as many. `relabel` writes the probe's predictions for the split's own documents. Validation documents (n_val) are
neither fitted nor filtered and keep their labels.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(arg: str = "") -> ConfigDict:
    c = ConfigDict()
    c.stage = "probe"  # which stage of w2s_jax runs this config
    c.seed = 0  # folds of the probe's cross-validation, and the random filter
    c.data_seed = 0  # coin, sampling, halves, test; that of the labelled run

    # Probe
    c.mode = "predict"  # predict (the test set) | filter (the split's labels) | relabel (the split's documents) | extract (features alone)
    c.probe = "logistic"  # knn logistic linear mean_difference topofilter
    c.probe_args = ConfigDict()  # arguments of the probes; unset = the chosen probe's own default
    c.probe_args.k = placeholder(int)  # knn, topofilter: neighbours (50)
    c.probe_args.l2 = placeholder(float)  # logistic, linear: penalty on the squared weights; unset = by cross-validation
    c.probe_args.folds = placeholder(int)  # logistic, linear: folds of the cross-validation (5)
    c.contamination = 0.1  # filter: share of the training documents that is left out
    c.labels = ""  # labels to fit on: a label run's folder, or a parquet file; empty = ground truth (the probe's ceiling)

    # Features
    c.model = "gpt2"  # hub id, or a local folder in Hugging Face's format
    c.revision = ""  # branch, tag or commit of a hub model (empty = main); recorded as a commit hash
    c.run = ""  # features of this finetune run's model instead of the pretrained `model`
    c.layer = "middle"  # middle (layers // 2) | last | a number: 0 = embeddings, i = output of layer i | all (mode=extract)
    c.pool = "last"  # a document's feature: last (its last token) | mean (over its tokens)
    c.features = ""  # folder where features are kept, for any number of runs; empty = <workdir>/features
    c.dtype = "float32"  # compute: float32 | bfloat16
    c.param_dtype = "float32"  # parameters: float32 | bfloat16 | auto (the checkpoint's); with `run` the run's
    c.matmul_precision = "default"  # default | high | highest (default may mean TF32 or bfloat16 passes on an accelerator)
    c.attention = "auto"  # auto | xla | splash (TPU) | pallas, cudnn (GPU; cudnn: one document a row)

    # Data
    c.task = "sciq"  # a registered task, or a folder with train.* and test.* (jsonl, csv, parquet, .gz)
    c.task_dir = ""  # read a registered task's splits from this folder instead of the hub
    c.task_revision = ""  # revision of the hub data set; empty = the registry's
    c.split = "b"  # the part whose labels are fitted: a | b (the two halves) | train (everything)
    c.n_train = 20000  # documents in both halves together, at most
    c.n_val = 0  # documents of the split held out for validation (whole groups)
    c.n_test = 10000  # test documents, at most
    c.test_fraction = 0.0  # carve this share of the training rows (by group) where the task has no test split
    c.group = "auto"  # auto = the task's groups stay on one side of every split | none = as the references
    c.balance = False  # undersample to 50/50
    c.max_length = 1024  # tokens; a document of max_length tokens or more is over-long
    c.overlong = "drop"  # over-long documents: drop | truncate | error
    c.shuffle = "once"  # order of the training documents: none (file order) | once | epoch; none with split=train: the file as it is

    # Running
    c.eval_batch_size = 0  # documents a forward pass; 0 = by tokens
    c.mesh = ConfigDict()  # devices along each axis; -1 = all that are left; 0 everywhere = auto (what fits). Also: mesh=auto, mesh=1x8x1
    c.mesh.data = 0  # replicas
    c.mesh.fsdp = 0  # parameters and batch split
    c.mesh.model = 0  # tensors split

    if arg == "runlocal":
        from w2s_jax.config import runlocal
        c = runlocal(c)
    elif arg:
        raise ValueError(f"configs/probe.py takes ':runlocal', got ':{arg}'")
    return c
