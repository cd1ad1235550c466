"""Which parameters a run trains, by their paths."""

from __future__ import annotations

import re

# What `config.train` trains: paths where this is found. A batch normalisation's running statistics are never trained.
TRAINED = {"full": r"^(?!.*/(mean|variance)$)", "head": r"^head/", "lora": r"^head/|/lora_[ab]$"}


def split_params(params: dict, train: str) -> tuple[dict, dict]:
    """`(trainable, frozen)` nested dicts; empty branches are dropped."""
    def keep(tree, prefix, wanted):
        out = {}
        for key, value in tree.items():
            path = f"{prefix}{key}"
            if isinstance(value, dict):
                if inner := keep(value, path + "/", wanted):
                    out[key] = inner
            elif bool(re.search(TRAINED[train], path)) == wanted:
                out[key] = value
        return out
    return keep(params, "", True), keep(params, "", False)


def merge_params(a: dict, b: dict) -> dict:
    """One nested dict from two that share no leaf."""
    out = dict(a)
    for key, value in b.items():
        out[key] = merge_params(out[key], value) if key in out else value
    return out
