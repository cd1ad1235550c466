"""Label documents with a trained run: its predictions become a student's `labels`.

    python -m w2s_jax.main --config=configs/label.py --config.run=runs/weak --workdir=runs/weak-labels
    python -m w2s_jax.main --config=configs/finetune.py --config.labels=runs/weak-labels --config.split=b ...

Writes `predictions/<split>.parquet` (or `predictions/<stem of the file>.parquet`) in the workdir. Everything that is
not set here (task, sampling, seeds, model) is the run's own.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(arg: str = "") -> ConfigDict:
    c = ConfigDict()
    c.stage = "label"  # which stage of w2s_jax runs this config
    c.run = "runs/weak"  # the run directory whose newest checkpoint labels

    # Documents
    c.split = "b"  # what is labelled: a | b | train | val | test
    c.task = ""  # another task than the run's: a registered one, or a folder
    c.task_dir = ""  # read a registered task's splits from this folder; empty = as the run did
    c.file = ""  # label this file (jsonl, csv, parquet, .gz) instead of a split
    c.n_train = placeholder(int)  # documents in both halves together; unset = as the run
    c.n_test = placeholder(int)  # test documents; unset = as the run
    c.max_length = placeholder(int)  # tokens; unset = as the run
    c.overlong = placeholder(str)  # drop | truncate | error; unset = as the run

    # Running
    c.dtype = placeholder(str)  # compute: float32 | bfloat16; unset = as the run
    c.attention = "auto"  # auto | xla | splash (TPU) | pallas, cudnn (GPU; cudnn: one document a row)
    c.eval_batch_size = 0  # documents a forward pass; 0 = by tokens
    c.mesh = ConfigDict()  # devices along each axis; -1 = all that are left; 0 everywhere = auto (what fits). Also: mesh=auto, mesh=1x8x1
    c.mesh.data = 0  # replicas
    c.mesh.fsdp = 0  # parameters and batch split
    c.mesh.model = 0  # tensors split

    if arg == "runlocal":
        c.run = "runs/runlocal-weak"
    elif arg:
        raise ValueError(f"configs/label.py takes ':runlocal', got ':{arg}'")
    return c
