"""Small sweep roots written by hand: what the tests of the report share."""

import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

import w2s_jax
from w2s_jax.data.examples import Examples, one_hot
from w2s_jax.data.labels import write_predictions

SKILL = {"small": 0.70, "medium": 0.80, "large": 0.95}


def documents(n: int, split: str = "test", task: str = "sciq"):
    """Two documents a group; label = parity."""
    ids = [f"{task}/{split}/{i}/0" for i in range(n)]
    return ids, [f"What is {i}?" for i in ids], np.arange(n) % 2, [f"q{i // 2}" for i in range(n)]


def logits(labels, right, margin=1.0) -> np.ndarray:
    """Float32 logits that predict the label where `right`, the other class elsewhere."""
    sign = np.where(np.asarray(right, bool) == (labels == 1), 1.0, -1.0)
    score = sign * margin
    return np.stack([-score / 2, score / 2], 1).astype(np.float32)


def write_run(folder: Path, config: dict, split: str, ids, texts, labels, groups, values, done=True) -> None:
    (folder / "predictions").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": config, "identity": config, "parents": {}}))
    write_predictions(folder / "predictions" / f"{split}.parquet", Examples(ids, texts, None, one_hot(labels), groups), values)
    if done:
        (folder / "results.json").write_text(json.dumps({"accuracy": float(np.mean(values.argmax(1) == labels))}))


def make_root(root: Path, *, n=400, seeds=(0, 1, 2), methods=("xent", "logconf"), pairs=(("small", "large"), ("small", "medium")),
              tasks=("sciq",), unfinished=(), skill=SKILL, drop=None) -> Path:
    """A sweep root in the documented form. `unfinished`: run folders without results.json; `drop`: {run: documents it lacks}."""
    rng = np.random.default_rng(0)
    entries = []

    def run(task, name, config, accuracy, split="test", base=None):
        rel = f"{task}/{name}"
        if not (root / rel).exists():
            ids, texts, labels, groups = documents(n, split, task)
            right = rng.random(n) < accuracy
            if base is not None:  # the student repeats a part of its supervisor's errors
                right &= (rng.random(n) < 0.6) | base
            values = logits(labels, right, rng.uniform(0.5, 2, n))
            keep = np.arange(n - (drop or {}).get(name, 0))
            write_run(root / rel, config, split, [ids[i] for i in keep], [texts[i] for i in keep], labels[keep],
                      [groups[i] for i in keep], values[keep], done=name not in unfinished)
            made[rel] = right
        return rel

    made: dict = {}
    for task in tasks:
        for weak, strong in pairs:
            for method in methods:
                for seed in seeds:
                    small, big = ({"task": task, "seed": seed, "model": m, "loss": "xent"} for m in (weak, strong))
                    runs = {"weak": run(task, f"finetune-{weak}-xent-s{seed}-a", small, skill[weak]),
                            "label": run(task, f"label-{weak}-s{seed}", small, skill[weak], "b"),
                            "ceiling": run(task, f"finetune-{strong}-xent-s{seed}-b", big, skill[strong])}
                    runs["student"] = run(task, f"finetune-{strong}-{method}-s{seed}-{weak}", {**big, "loss": method}, skill[strong],
                                          base=made[runs["weak"]])
                    entries.append({"task": task, "weak": f"models/{weak}", "strong": f"models/{strong}", "method": method, "seed": seed,
                                    "runs": runs})
    (root / "sweep.json").write_text(json.dumps({"pairs": entries}))
    return root


def assert_same(root, reference, runs) -> None:
    """Both roots have the same runs with the same bits: predictions, metrics and results but for times."""
    for name in runs:
        one, two = (w2s_jax.load(folder / name) for folder in (root, reference))
        assert one.record["identity"] == two.record["identity"]
        split = "b" if "/label-" in name else "test"
        np.testing.assert_array_equal(np.stack(one.predictions(split).logits), np.stack(two.predictions(split).logits))
        assert [(m["step"], m["loss"]) for m in one.metrics] == [(m["step"], m["loss"]) for m in two.metrics]
        assert one.results["accuracy"] == two.results["accuracy"]
    one, two = ((folder / "report/table.csv").read_text() for folder in (root, reference))
    assert one == two


def report_config(**changes) -> ConfigDict:
    """The config of a report with few replicates."""
    c = ConfigDict({"stage": "report", "seed": 0, "root": "", "weak": "", "ceiling": "", "student": "", "label": "", "replicates": 200,
                    "into": ""})
    c.update(changes)
    return c
