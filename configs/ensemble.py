"""Combine the labels of several weak supervisors (seeds, families) into one label file.

    python -m w2s_jax.main --config=ensemble --config.runs=runs/weak-0-labels,runs/weak-1-labels --workdir=runs/ensemble
    python -m w2s_jax.main --config=finetune --config.labels=runs/ensemble --config.split=b ...

Each member is a label run. Writes `predictions/<split>.parquet`, a student's labels, and `predictions/test.parquet`, the
members' supervisors combined in the same way: for a report the run is the weak supervisor and the labels at once
(`--config.weak=runs/ensemble --config.label=runs/ensemble`). Reads files only: no model, no accelerator.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    c = ConfigDict()
    c.stage = "ensemble"  # which stage of w2s_jax runs this config
    c.runs = ("runs/weak-0-labels", "runs/weak-1-labels")  # label run directories, two or more; their order plays no part
    c.how = "mean"  # mean (of the probabilities) | vote (share of the members' hard labels) | disagreement (mean, weighted by agreement)
    c.split = "b"  # which of the members' predictions become labels: b | a | train | val

    if arg == "runlocal":
        c.runs = ("runs/runlocal-weak-0-labels", "runs/runlocal-weak-1-labels")
    elif arg:
        raise ValueError(f"configs/ensemble.py takes ':runlocal', got ':{arg}'")
    return c
