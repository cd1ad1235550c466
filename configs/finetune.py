"""Fine-tune a pretrained model on ground truth or on another run's labels.

    python -m w2s_jax.main --config=configs/finetune.py --config.model=gpt2 --config.task=sciq --workdir=runs/gpt2

One config serves the weak supervisor (`split=a`), the strong ceiling (`split=b`) and the strong
student (`split=b`, `labels=<a label run>`). `:runlocal` makes it a smoke run on the embedded world.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(arg: str = "") -> ConfigDict:
    c = ConfigDict()
    c.stage = "finetune"  # which stage of w2s_jax runs this config
    c.seed = 0  # initialisation, order of the documents and dropout
    c.data_seed = 0  # coin, sampling, halves, test; keep it fixed within an experiment

    # Model
    c.model = "gpt2"  # hub id, or a local folder in Hugging Face's format
    c.revision = ""  # branch, tag or commit of a hub model (empty = main); recorded as a commit hash
    c.dtype = "float32"  # compute: float32 | bfloat16
    c.param_dtype = "float32"  # parameters: float32 | bfloat16 | auto (the checkpoint's own: bfloat16 if all of it is)
    c.matmul_precision = "default"  # default | high | highest (default may mean TF32 or bfloat16 passes on an accelerator)
    c.attention = "auto"  # auto | xla | splash (TPU) | pallas, cudnn (GPU; cudnn: one document a row)
    c.remat = "auto"  # rematerialisation: auto (what fits) | none | full | dots | dots_no_batch | nothing_saveable | everything_saveable
    c.offload = "none"  # to the host's memory: optimizer (its state, between updates) | params (that, and the layers' matrices) | none
    c.train = "full"  # what is trained: full | head | lora (low-rank adapters and the head; these are float32)
    c.lora = ConfigDict()  # settings of train=lora; unset = the default, or that of the adapter named by init
    c.lora.rank = placeholder(int)  # of the adapters (8)
    c.lora.alpha = placeholder(float)  # the adapters' product is scaled by alpha/rank (8)
    c.lora.dropout = placeholder(float)  # on the adapters' input (0)
    c.lora.targets = placeholder(str)  # all-linear, ends of names as in the checkpoint (q_proj,v_proj), or a regex over whole names
    c.lora.rslora = placeholder(bool)  # scale by alpha/sqrt(rank) instead (False)
    c.lora.init = placeholder(str)  # start from this adapter: a folder in PEFT's format
    c.head_init = "zeros"  # zeros | normal (0.02) | small (0.0002, EleutherAI/w2s) | unembedding (of the two answers; Burns et al. 2023)
    c.answers = ("0", "1")  # head_init=unembedding: the single tokens that stand for class 0 and class 1 (of a decoder)
    c.readout = "auto"  # what the head reads: auto (a decoder's last token; as an encoder's own classifier) | last | mean | first

    # Data
    c.task = "sciq"  # a registered task, or a folder with train.* and test.* (jsonl, csv, parquet, .gz)
    c.task_dir = ""  # read a registered task's splits from this folder instead of the hub
    c.task_revision = ""  # revision of the hub data set; empty = the registry's
    c.split = "a"  # the part trained on: a | b (the two halves) | train (everything)
    c.n_train = 20000  # documents in both halves together, at most
    c.n_val = 0  # documents of the training part held out for validation (whole groups)
    c.n_test = 10000  # test documents, at most
    c.test_fraction = 0.0  # carve this share of the training rows (by group) where the task has no test split
    c.group = "auto"  # auto = the task's groups stay on one side of every split | none = as the references
    c.balance = False  # undersample to 50/50
    c.max_length = 1024  # tokens; a document of max_length tokens or more is over-long
    c.overlong = "drop"  # over-long documents: drop | truncate | error
    c.shuffle = "once"  # order of the training documents: none (file order) | once | epoch
    c.labels = ""  # train on these labels: a label run's folder, or a parquet file; empty = ground truth
    c.stats_labels = ""  # labels whose statistics the loss takes (window's radius "midweak"); empty = those that are trained on

    # Loss
    c.loss = "xent"  # xent product logconf logconf_openai logconf_eleuther entropy window adaptconf kl reverse_xent reverse_kl
    c.loss_args = ConfigDict()  # arguments of the losses; unset = the chosen loss's own default
    c.loss_args.alpha = placeholder(float)  # product: exponent of the label (1)
    c.loss_args.beta = placeholder(float)  # product: exponent of the student's prediction (1)
    c.loss_args.aux_coef = placeholder(float)  # logconf*, entropy: the largest weight of the student's own prediction (0.5)
    c.loss_args.warmup = placeholder(float)  # logconf (0.2), logconf_openai (0.1): share of a run; logconf_eleuther, entropy (100): steps
    c.loss_args.buffer = placeholder(int)  # logconf_eleuther: predictions kept for the threshold (32)
    c.loss_args.chunk = placeholder(int)  # logconf_eleuther: documents per threshold, the reference's micro-batch (0 = the whole batch)
    c.loss_args.balance_batch = placeholder(bool)  # logconf_eleuther: centre the labels' log-odds (False)
    c.loss_args.radius = placeholder(object)  # window: a float (0.15) or "midweak"
    c.loss_args.temperature = placeholder(float)  # adaptconf: low ones give the student's own prediction less weight (0.5)

    # Optimisation
    c.batch_size = 32  # documents a step
    c.microbatch_size = placeholder(object)  # documents over all devices held in memory at once; 0 = the whole batch | auto (what fits)
    c.microbatch_size = "auto"
    c.epochs = 2  # passes over the training documents; steps = documents * epochs // batch_size
    c.learning_rate = placeholder(float)  # peak; unset = the model's own (w2s_jax/registry.py)
    c.schedule = "cosine"  # constant | cosine | linear (both to 0)
    c.warmup_steps = 0  # linear warm-up from 0
    c.optimizer = "adam"  # adam adamw adafactor sgd lion adafactor_openai
    c.optimizer_args = ConfigDict()  # arguments of the optimizers; unset = the optimizer's own default
    c.optimizer_args.b1 = placeholder(float)  # adam, adamw, lion (0.9)
    c.optimizer_args.b2 = placeholder(float)  # adam, adamw (0.999), lion (0.99)
    c.optimizer_args.eps = placeholder(float)  # adam, adamw (1e-8)
    c.optimizer_args.momentum = placeholder(float)  # sgd (0)
    c.optimizer_args.mu_dtype = placeholder(str)  # adam, adamw, lion: first moments kept in float32 (the default) | bfloat16
    c.grad_clip = 0.0  # clip the global norm of the gradients; 0 = off
    c.weight_decay = 0.0  # decoupled; not on biases and norms
    c.dropout = 0.0  # on embeddings and residual branches; 0 = off, as in the references

    # Running
    c.log_every = 1  # steps between lines of metrics.jsonl
    c.eval_every = 0  # steps between evaluations on validation (and, under select=last, test) documents; 0 = at the end only
    c.eval_batch_size = 0  # documents a forward pass; 0 = by tokens
    c.select = "last"  # step that is kept: last | val_labels (AUROC against the labels trained on) | agreement (with them) | oracle
    c.patience = 0  # evaluations without a better score after which training stops; 0 = never
    c.checkpoint_every = 500  # steps; 0 = at the end only
    c.keep = "params"  # after the run: params | all (optimizer state too) | none
    c.steps_per_dispatch = 0  # steps in one call of the device; 0 = by the size of the model
    c.mesh = ConfigDict()  # devices along each axis; -1 = all that are left; 0 everywhere = auto (what fits). Also: mesh=auto, mesh=1x8x1
    c.mesh.data = 0  # replicas
    c.mesh.fsdp = 0  # parameters and batch split
    c.mesh.model = 0  # tensors split
    c.logger = "none"  # none | tensorboard | wandb

    if arg == "runlocal":
        from w2s_jax.config import runlocal
        c = runlocal(c)
    elif arg:
        raise ValueError(f"configs/finetune.py takes ':runlocal', got ':{arg}'")
    return c
