"""Pretrain a small language model, or go on pretraining one, and save it in Hugging Face's format.

    python -m w2s_jax.main --config=configs/pretrain.py:large --workdir=runs/large
    python -m w2s_jax.main --config=configs/finetune.py --config.model=runs/large/model --config.task=world --workdir=runs/ceiling

The argument is a rung of the embedded world's ladder (`small`, `medium`, `large`; the default is the
middle one) or `runlocal`, a smoke run. Keys that `configs/finetune.py` has too mean the same here.
The model is trained on next-token prediction by the same trainer as everything else.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(arg: str = "") -> ConfigDict:
    c = ConfigDict()
    c.stage = "pretrain"  # which stage of w2s_jax runs this config
    c.seed = 0  # initialisation, the world's corpus, order of the documents and dropout
    c.data_seed = 0  # which documents of a corpus of files are held out (of the world's: freshly drawn sentences)

    # Model
    c.model = ""  # go on from this checkpoint: a hub id, or a local folder in Hugging Face's format; empty = random initialisation by arch
    c.revision = ""  # branch, tag or commit of a hub model or tokenizer (empty = main); recorded as a commit hash
    c.arch = ConfigDict()  # sizes of a new model, GPT-2's architecture with tied embeddings (not used where model is set)
    c.arch.width = 32  # of the hidden states
    c.arch.layers = 2  # blocks
    c.arch.heads = 2  # attention heads; they divide the width
    c.arch.context = 32  # positions; max_length may not exceed it
    c.tokenizer = ""  # a local folder or a hub id; empty = the model's own, or the world's
    c.dtype = "float32"  # compute: float32 | bfloat16
    c.param_dtype = "float32"  # parameters: float32 | bfloat16
    c.matmul_precision = "default"  # default | high | highest (default may mean TF32 or bfloat16 passes on an accelerator)
    c.attention = "auto"  # auto | xla | splash (TPU) | pallas, cudnn (GPU; cudnn: one document a row)
    c.remat = "auto"  # rematerialisation: auto (what fits) | none | full | dots | dots_no_batch | nothing_saveable | everything_saveable
    c.offload = "none"  # to the host's memory: optimizer (its state, between updates) | params (that, and the layers' matrices) | none

    # Data
    c.corpus = "world"  # world, or a file or a folder (with its subfolders) of .txt (a document a file) or .jsonl (column text), .gz or not
    c.max_length = 32  # tokens; a longer document is cut into pieces of at most this many, which overlap by one token
    c.n_heldout = 512  # pieces held out for the loss that is reported: the last ones once the documents are shuffled by data_seed
    c.shuffle = "epoch"  # order of the pieces: none (as they come) | once | epoch

    # Optimisation
    c.batch_size = 64  # pieces a step
    c.microbatch_size = placeholder(object)  # pieces over all devices held in memory at once; 0 = the whole batch | auto (what fits)
    c.microbatch_size = "auto"
    c.steps = 6000  # updates; passes over the corpus follow from it
    c.learning_rate = 5e-3  # peak
    c.final_lr_fraction = 0.02  # the schedule ends at this share of the peak
    c.schedule = "cosine"  # constant | cosine | linear
    c.warmup_steps = 300  # linear warm-up from 0
    c.optimizer = "adamw"  # adam adamw adafactor sgd lion adafactor_openai
    c.optimizer_args = ConfigDict()  # arguments of the optimizers; unset = the optimizer's own default
    c.optimizer_args.b1 = placeholder(float)  # adam, adamw, lion (0.9)
    c.optimizer_args.b2 = placeholder(float)  # adam, adamw (0.999), lion (0.99)
    c.optimizer_args.eps = placeholder(float)  # adam, adamw (1e-8)
    c.optimizer_args.momentum = placeholder(float)  # sgd (0)
    c.optimizer_args.mu_dtype = placeholder(str)  # adam, adamw, lion: first moments kept in float32 (the default) | bfloat16
    c.optimizer_args.b2 = 0.99
    c.grad_clip = 1.0  # clip the global norm of the gradients; 0 = off
    c.weight_decay = 0.0  # decoupled; not on biases and norms
    c.dropout = 0.0  # on embeddings and residual branches

    # Running
    c.log_every = 1  # steps between lines of metrics.jsonl
    c.eval_every = 0  # steps between evaluations of the held-out loss; 0 = at the end only
    c.eval_batch_size = 0  # documents a forward pass; 0 = by tokens
    c.checkpoint_every = 1000  # steps; 0 = at the end only
    c.keep = "none"  # checkpoints after the run: params | all (optimizer state too) | none (model/ is kept always)
    c.steps_per_dispatch = 0  # steps in one call of the device; 0 = by the size of the model
    c.mesh = ConfigDict()  # devices along each axis; -1 = all that are left; 0 everywhere = auto (what fits). Also: mesh=auto, mesh=1x8x1
    c.mesh.data = 0  # replicas
    c.mesh.fsdp = 0  # parameters and batch split
    c.mesh.model = 0  # tensors split
    c.logger = "none"  # none | tensorboard | wandb

    if arg == "runlocal":
        c.arch.width, c.steps, c.warmup_steps, c.n_heldout = 16, 40, 2, 64
    elif arg:
        from w2s_jax.data.world import RUNGS
        if arg not in RUNGS:
            raise ValueError(f"configs/pretrain.py takes ':runlocal' or a rung ({', '.join(RUNGS)}), got ':{arg}'")
        c.arch.update(RUNGS[arg])
    return c
