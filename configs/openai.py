"""openai/weak-to-strong's recipe (commit 6b450f2, `train_simple.py`), quirks included.

    python -m w2s_jax.main --config=configs/openai.py --config.model=gpt2 --config.task=sciq --workdir=runs/openai-gpt2

Adam without decay or clipping, batch 32, 2 epochs in one fixed order, cosine to 0 without warm-up, no dropout, the
last step is kept, documents of 1024 tokens or more are dropped, splits by document (not by question). Its losses are
`xent`, `product` and `logconf_openai`; its learning rates (5e-5 for gpt2 and gpt2-medium, 1e-5 above) stand in
w2s_jax/registry.py; its linear probe is `train="head"`; its Adafactor, which ignores learning rate and schedule, is `adafactor_openai`.

A golden run (which documents, in which order, is then the file's): `--config.task=<folder of train.jsonl and test.jsonl>
--config.split=train --config.shuffle=none`. Measured figures of the reference: every step's loss is met within 5e-6.
"""

from w2s_jax.config import shipped


def get_config(arg: str = ""):
    c = shipped("finetune", arg)
    c.matmul_precision = "highest"  # full float32 products on every backend, as on the reference's GPUs without TF32
    c.group = "none"  # the reference splits by document
    c.shuffle = "once"  # the same order every epoch
    c.batch_size = 32
    c.epochs = 2
    c.schedule = "cosine"
    c.optimizer = "adam"
    return c
