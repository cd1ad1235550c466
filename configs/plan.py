"""Before paying for a machine: compile a run's real step for it, and say what it needs and how long it takes.

    python -m w2s_jax.main --config=configs/plan.py:model=Qwen/Qwen-72B,topology=v5p:4x4x8 --workdir=runs/plan-72b
    python -m w2s_jax.main --config=configs/plan.py:table --workdir=runs/plan-table

For a slice of TPUs the TPU's own compiler does it, on a machine that has none (`pip install libtpu`); for GPUs (`topology=h100:8`)
the figures are an estimate. Only a model's config.json is needed, never its weights: from a folder, the hub or its cache, else from
configs/shapes/. What is left open (mesh axes 0, remat auto) is chosen: the fastest setting that fits; where the settings given do not
fit, the nearest that do are compiled too. Writes results.json and plan.md, and prints it. `:table` is the table of the README, made
point by point: started again it goes on. `:runlocal` is a small model on a small slice. After the colon stand any keys, as key=value.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(arg: str = "") -> ConfigDict:
    c = ConfigDict()
    c.stage = "plan"  # which stage of w2s_jax runs this config
    c.seed = 0  # lengths of the documents and their order

    # Machine and model
    c.topology = "v5e:2x4"  # v4 v5e v5p v6e with the axes of the slice in chips (v5p:4x4x8), or GPUs (h100:8, a100-80g:16, ...)
    c.model = "gpt2"  # hub id, or a local folder that holds a config.json
    c.revision = ""  # branch, tag or commit of a hub model (empty = main)
    c.topologies = ()  # a table: every one of these ...
    c.models = ()  # ... with every one of these; empty = the one above

    # The run
    c.what = "train"  # train | label
    c.train = "full"  # what is trained: full | head | lora
    c.lora = ConfigDict()  # settings of train=lora; unset = the default
    c.lora.rank = placeholder(int)  # of the adapters (8)
    c.lora.alpha = placeholder(float)  # the adapters' product is scaled by alpha/rank (8)
    c.lora.dropout = placeholder(float)  # on the adapters' input (0)
    c.lora.targets = placeholder(str)  # all-linear, ends of names as in the checkpoint (q_proj,v_proj), or a regex over whole names
    c.lora.rslora = placeholder(bool)  # scale by alpha/sqrt(rank) instead (False)
    c.lora.init = placeholder(str)  # start from this adapter: a folder in PEFT's format
    c.loss = "xent"  # as in finetune; some see the whole batch, which costs a second forward pass where there are microbatches
    c.optimizer = "adam"  # adam adamw adafactor sgd lion adafactor_openai
    c.optimizer_args = ConfigDict()  # arguments of the optimizers that change what is held; unset = the optimizer's own default
    c.optimizer_args.momentum = placeholder(float)  # sgd (0)
    c.optimizer_args.mu_dtype = placeholder(str)  # first moments of adam, adamw, lion: float32 | bfloat16 (float32)
    c.dtype = "bfloat16"  # compute: float32 | bfloat16
    c.param_dtype = "float32"  # parameters: float32 | bfloat16 | auto (the type that config.json names)
    c.matmul_precision = "default"  # default | high | highest
    c.attention = "auto"  # auto | xla
    c.lengths = "sciq"  # tokens of a document: sciq (drawn from SciQ's questions), or a number
    c.n_train = 20000  # documents of an epoch, or to be labelled
    c.epochs = 2  # passes over them; steps = documents * epochs // batch_size
    c.batch_size = 32  # documents a step
    c.eval_batch_size = 0  # what=label: documents a forward pass; 0 = by tokens
    c.steps_per_dispatch = 0  # steps in one call of the device; 0 = by the size of the model

    # Settings; what is left open is chosen
    c.mesh = ConfigDict()  # devices along each axis; 0 everywhere = chosen
    c.mesh.data = 0  # replicas
    c.mesh.fsdp = 0  # parameters and batch split
    c.mesh.model = 0  # tensors split
    c.remat = "auto"  # rematerialisation: auto (chosen) | none | full | dots | dots_no_batch | nothing_saveable | everything_saveable
    c.offload = "none"  # to the host's memory: optimizer (its state, between updates) | params (that, and the layers' matrices) | none
    c.microbatch_size = 0  # documents over all devices held in memory at once; 0 = the whole batch, smaller where it does not fit

    # Prediction
    c.utilisation = 0.4  # share of the peak FLOP/s that matrix products reach
    c.compiles = 3  # compilations until something fits: of what is given, and again of what is near to it

    if arg == "runlocal":
        c.topology, c.n_train, c.epochs, c.batch_size, c.model = "v5e:2x2", 256, 1, 16, "runs/runlocal/model"
    elif arg == "table":
        c.models = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "Qwen/Qwen1.5-0.5B", "Qwen/Qwen-1_8B", "Qwen/Qwen-7B",
                    "meta-llama/Meta-Llama-3-8B", "Qwen/Qwen-14B", "meta-llama/Meta-Llama-3-70B", "Qwen/Qwen-72B")
        c.topologies, c.lengths = ("v5e:4x4", "v6e:4x4", "v5p:4x4x4"), "512"
    elif arg:
        from w2s_jax.config import set_words

        set_words(c, arg, "plan")
    return c
