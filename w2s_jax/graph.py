"""A sweep as a graph of runs: what each run is, what it needs, and the directory that its identity names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from etils import epath

from w2s_jax import config as config_lib
from w2s_jax import registry
from w2s_jax.errors import UserError

GROUND_TRUTH_LOSS = "xent"


@dataclasses.dataclass(frozen=True)
class Node:
    """One run: its directory (relative to the root), its config, the directories that it reads, and its place in the sweep."""

    name: str
    config: object
    parents: tuple[str, ...] = ()

    @property
    def stage(self) -> str:
        return self.config.stage


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run that a sweep will make: the hash of its identity, and its config."""

    identity: str
    config: object


@dataclasses.dataclass
class Graph:
    """Runs in an order in which every run follows what it needs, and the (weak, strong, loss) pairs that the report reads."""

    nodes: dict[str, Node] = dataclasses.field(default_factory=dict)
    pairs: list[dict] = dataclasses.field(default_factory=list)


def short(model: str) -> str:
    """A model's or task's name inside a directory's name: its last part (or the one before `model`), safe for every file system."""
    parts = [p for p in str(model).rstrip("/").split("/") if p]
    name = parts[-2] if len(parts) > 1 and parts[-1] == "model" else parts[-1]
    return re.sub(r"[^A-Za-z0-9._]+", "_", name)


def variant(base, **values):
    """A copy of a config with some keys changed, unlocked types included."""
    out = base.copy_and_resolve_references()
    with out.unlocked(), out.ignore_type():
        for key, value in values.items():
            if key == "loss":
                config_lib.choose_loss(out, value)
            else:
                out[key] = value
    return out.lock()


def build(config, root, identify: Callable[[object, dict], dict]) -> Graph:
    """The graph of a sweep.

    Args:
      config: as `configs/sweep.py` gives it.
      root: the sweep's directory.
      identify: `(config of a run, {path: Planned}) -> identity`; stages differ in what counts.

    Raises:
      UserError: a ladder, learning rates or pairs that do not fit together.
    """
    check(config)
    root = epath.Path(root)
    graph, planned = Graph(), {}

    def add(task: str, model: str, loss: str, seed: int, run_config, parents=()) -> str:
        identity = config_lib.identity_hash(identify(run_config, planned))
        label = "-".join(p for p in (run_config.stage, short(model), loss, f"s{seed}", identity[:10]) if p)
        name = f"{short(task)}/{label}"
        graph.nodes.setdefault(name, Node(name, run_config, tuple(parents)))
        planned[str(root / name)] = Planned(identity, run_config)
        return name

    def ladder() -> list[tuple[str, str, tuple[str, ...]]]:
        """`(name, model folder or id, parents)` of each rung, weakest first: one ladder for all seeds, as published checkpoints are."""
        if not config.rungs:
            return [(short(m), m, ()) for m in config.models]
        out = []
        for rung in config.rungs:
            made = config_lib.shipped("pretrain", rung)
            node = add("pretrain", rung, "", config.pretrain.seed, variant(config.pretrain, arch=made.arch))
            out.append((rung, str(root / node / "model"), (node,)))
        return out

    rungs = ladder()
    rates = config.learning_rates or (config.base.learning_rate,) * len(rungs)
    for task in config.tasks:
        for seed in config.seeds:
            base = [registry.fill(variant(config.base, seed=seed, task=task, model=path, learning_rate=rate))
                    for (_, path, _), rate in zip(rungs, rates)]
            weak, ceiling, labelled = {}, {}, {}
            pairs = [(w, s) for s in range(len(rungs)) for w in range(s) if config.pairs == "all" or w == s - 1]
            for w in sorted({w for w, _ in pairs}):
                weak[w] = add(task, rungs[w][0], f"{GROUND_TRUTH_LOSS}_a", seed,
                              variant(base[w], split="a", labels="", loss=GROUND_TRUTH_LOSS), rungs[w][2])
                label = config_lib.shipped("label")
                labelled[w] = add(task, rungs[w][0], "", seed, variant(label, run=str(root / weak[w]), split="b"), (weak[w],))
            for s in sorted({s for _, s in pairs}):
                ceiling[s] = add(task, rungs[s][0], f"{GROUND_TRUTH_LOSS}_b", seed,
                                 variant(base[s], split="b", labels="", loss=GROUND_TRUTH_LOSS), rungs[s][2])
            for w, s in pairs:
                for loss in config.losses:
                    student = add(task, f"{rungs[w][0]}_to_{rungs[s][0]}", loss, seed,
                                  variant(base[s], split="b", labels=str(root / labelled[w]), loss=loss), (labelled[w], *rungs[s][2]))
                    graph.pairs.append({"task": short(task), "weak": rungs[w][0], "strong": rungs[s][0], "method": loss, "seed": seed,
                                        "runs": {"weak": weak[w], "label": labelled[w], "ceiling": ceiling[s], "student": student}})
    return graph


def check(config) -> None:
    """UserError where the keys of a sweep do not fit together."""
    ladder = config.rungs or config.models
    key = "rungs" if config.rungs else "models"
    if len(ladder) < 2:
        raise UserError(f"config.{key}: {tuple(ladder)}, expected at least two models, weakest first")
    for name in (key, "tasks", "losses", "seeds"):
        values = tuple(config[name])
        if not values:
            raise UserError(f"config.{name}: is empty, expected at least one")
        if len(set(values)) < len(values):
            raise UserError(f"config.{name}: {values} names one twice, expected each once")
    for name in (key, "tasks"):
        names = [short(value) for value in config[name]]
        if len(set(names)) < len(names):
            raise UserError(f"config.{name}: {tuple(config[name])} end in the same name, expected names that can be told apart")
    if config.learning_rates and len(config.learning_rates) != len(ladder):
        raise UserError(f"config.learning_rates: {tuple(config.learning_rates)}, expected one for each of {len(ladder)} models, or none")
    if config.pairs not in ("all", "adjacent"):
        raise UserError(f"config.pairs: {config.pairs!r}, expected all or adjacent")
    if config.base.labels:
        raise UserError(f"config.base.labels: {config.base.labels!r}, expected it empty: a sweep makes its own labels")
