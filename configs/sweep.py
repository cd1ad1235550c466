"""The whole experiment over a ladder: models x tasks x losses x seeds as one graph of runs.

    python -m w2s_jax.main --config=configs/sweep.py --config.models=gpt2,gpt2-medium --config.tasks=sciq --workdir=runs/sweep
    python -m w2s_jax.main --config=configs/sweep.py --workdir=runs/sweep --dry_run

For every task and seed: each model on ground truth (half A for a supervisor, half B for a ceiling), the labels of each
supervisor on half B, and a student for every pair and loss; on request also what EleutherAI and Burns et al. compare these with
(strong-to-strong, bootstrapping, probes, filters, ensembles, prompting). Each run is made once, ground truth is shared; killed and
started again, the sweep goes on where it was. Ends with a report. `:quickstart` is the experiment of `launch/quickstart.sh`.

    ... --config.executor=devices                               # one run a GPU, all GPUs of this node at once
    ... --config.executor=slurm --config.slurm.time=8:00:00     # array jobs; `w2s status runs/sweep` says how far they are
"""

from ml_collections import ConfigDict

from w2s_jax.config import shipped


def get_config(arg: str = "") -> ConfigDict:
    c = ConfigDict()
    c.stage = "sweep"  # which stage of w2s_jax runs this config
    c.models = ("gpt2", "gpt2-medium")  # the ladder, weakest first: hub ids or local folders
    c.rungs = ()  # pretrain these first, in the ladder's place: rungs of configs/pretrain.py (small, medium, large), with pretrain.seed
    c.learning_rates = ()  # one a model of the ladder; empty = base.learning_rate for all, or where that is unset each model's own
    c.tasks = ("sciq",)  # registered tasks or folders
    c.losses = ("xent", "logconf")  # of the students; ground truth is trained on with xent
    c.seeds = (0,)  # each repeats every run on the task; data_seed stays, so that seeds share their documents
    c.pairs = "all"  # which supervisors a model has: all (every weaker one) | adjacent (the next weaker one)
    c.s2s_rounds = 0  # strong-to-strong: so often a fresh student learns the last student's labels
    c.s2s_losses = ()  # losses with such rounds; empty = all of them
    c.bootstrap = False  # also teach along the ladder: weak -> the next -> ... -> strong (three models or more)
    c.probes = ()  # probes on the pretrained strong model's features in the student's place: knn logistic linear mean_difference topofilter
    c.filters = ()  # probes that filter the first loss's training set, each beside a random filter of the same size
    c.relabels = ()  # probes whose predictions replace the first loss's labels
    c.ensembles = ()  # supervisors combined: mean vote disagreement
    c.members = "seeds"  # of an ensemble: seeds (of each supervisor) | models (all weaker ones)
    c.floors = ()  # the pretrained strong model prompted: zero_shot few_shot
    c.shots = 5  # of few_shot
    c.report = True  # end with the report

    # Who makes the runs
    c.executor = "here"  # here: this process, one after the other | devices: of this node, a process a run | slurm: array jobs
    c.slots = 0  # executor=devices: devices used, of a CPU runs at once; 0 = all, of a CPU one run for every four cores
    c.logs = ""  # folder of logs and job scripts; empty = logs/ (devices) or slurm/ (slurm) under the workdir; not an object store
    c.slurm = ConfigDict()
    c.slurm.partition = ""  # empty = the cluster's default; so for account and time
    c.slurm.account = ""  # what is charged
    c.slurm.time = ""  # limit of one run: minutes, hours:minutes:seconds or days-hours:minutes:seconds
    c.slurm.gres = "gpu"  # what a device is called: gpu, gpu:a100; empty = a cluster of CPUs
    c.slurm.chip = ""  # kind of device (w2s_jax/chips.py: a100-80g, h100 ...): runs of an open mesh that don't fit one take a node's
    c.slurm.devices = 8  # of a node; runs with mesh.fsdp=-1 or mesh.model=-1 take all of one, larger meshes several nodes
    c.slurm.cpus = 0  # for each device; 0 = the cluster's default
    c.slurm.mem = ""  # main memory for each device (64G); empty = the cluster's default
    c.slurm.options = ()  # more of sbatch's: --qos=long,--exclude=node7
    c.slurm.setup = ""  # line of shell before each run: module load cuda && source venv/bin/activate
    c.slurm.at_once = 0  # tasks of an array at once; 0 = as many as there is room for
    c.slurm.grace = 120  # seconds before the time limit at which a run saves its state, ends and queues again
    c.slurm.restarts = 50  # so often at most

    # What the runs start from
    c.base = shipped("finetune")  # what every finetune run starts from
    c.pretrain = shipped("pretrain")  # what every pretrain run starts from
    c.probe = shipped("probe")  # what every probe run starts from; documents and arithmetic are those of base
    c.prompt = shipped("prompt")  # what every prompt run starts from; documents and arithmetic are those of base

    if arg in ("quickstart", "runlocal"):
        c.rungs = ("small", "medium", "large")
        c.models = ()
        c.tasks = ("world",)
        c.seeds = (0, 1, 2)
        c.base.learning_rate = 1e-3
        c.base.max_length = 32
        c.base.n_train = 9000
        c.base.n_test = 3000
        c.base.checkpoint_every = 0
        if arg == "runlocal":
            c.rungs, c.seeds, c.losses = ("small", "medium"), (0,), ("xent",)
            c.pretrain.steps, c.pretrain.warmup_steps, c.pretrain.n_heldout = 40, 2, 64
            c.base.n_train, c.base.n_test = 512, 256
    elif arg:
        raise ValueError(f"configs/sweep.py takes ':quickstart' or ':runlocal', got ':{arg}'")
    return c
