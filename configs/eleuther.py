"""EleutherAI/w2s's recipe (commit a929af0; "Experiments in weak-to-strong generalization", 2024-06-14): LoRA and selection on weak labels.

    python -m w2s_jax.main --config=configs/eleuther.py --config.model=Qwen/Qwen1.5-0.5B --config.task=sciq --workdir=runs/weak
    python -m w2s_jax.main --config=configs/label.py --config.run=runs/weak --workdir=runs/weak-labels
    python -m w2s_jax.main --config=configs/eleuther.py:logconf --config.model=meta-llama/Meta-Llama-3-8B --config.task=sciq \\
        --config.split=b --config.labels=runs/weak-labels --workdir=runs/student

Adapters of rank 8 (alpha 8) on every matrix of the layers, and the head (normal, 0.02 * 0.01); AdamW (0.9, 0.95), decay 0.1 on all
of these, clip 1; 3 epochs of batches of 32, reshuffled; cosine after 40 steps of warm-up; balanced classes; texts cut, not dropped.
Every 25 steps the AUROC against the validation labels that the run is trained on; the best step is kept (ours looks at the last
step too). Learning rates (5e-4 for Qwen1.5-0.5B, 8e-5 for Meta-Llama-3-8B) stand in w2s_jax/registry.py. The base stays in the
checkpoint's type. `:logconf` is its confidence loss, which thresholds one document at a time; `entropy` and `window` go by
`--config.loss`. Measured figures of the reference (a run of 16 steps in float32): every step's loss is met within 1e-5, the logits
afterwards within 2e-5.
"""

from w2s_jax.config import shipped


def get_config(arg: str = ""):
    if arg not in ("", "logconf", "runlocal", "logconf,runlocal"):
        raise ValueError(f"configs/eleuther.py takes ':logconf', ':runlocal' or ':logconf,runlocal', got ':{arg}'")
    name, _, rest = arg.partition(",") if arg.startswith("logconf") else ("", "", arg)
    c = shipped("finetune", rest)
    c.dtype = "bfloat16"
    c.param_dtype = "auto"
    c.matmul_precision = "highest"  # of what is float32: head and adapters
    c.train = "lora"
    c.lora.rank = 8
    c.lora.alpha = 8.0
    c.head_init = "small"
    c.readout = "last"
    c.group = "none"  # the reference splits by document
    c.balance = True
    c.overlong = "truncate"
    c.shuffle = "epoch"
    c.batch_size = 32
    c.schedule = "cosine"
    c.optimizer = "adamw"
    c.optimizer_args.b1 = 0.9
    c.optimizer_args.b2 = 0.95
    c.weight_decay = 0.1
    c.grad_clip = 1.0
    c.select = "val_labels"
    if rest == "runlocal":
        c.dtype, c.n_val, c.eval_every = "float32", 32, 4
    else:
        c.n_train = 12000  # 5,000 documents in each half to train on, and 1,000 to validate with
        c.n_val = 1000
        c.n_test = 5000
        c.epochs = 3
        c.warmup_steps = 40
        c.eval_every = 25
    if name:
        c.loss = "logconf_eleuther"
        c.loss_args.chunk = 1  # the published micro-batch of one document: its threshold is the median of the buffer
    return c
