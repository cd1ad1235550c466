"""A sweep as a graph of runs: what each run is, what it needs, and the directory that its identity names.

`experiment.build` makes one from a sweep's config.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from etils import epath

from w2s_jax import config as config_lib
from w2s_jax.errors import UserError


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


class Graph:
    """Runs in an order in which every run follows what it needs (`nodes`, by name), and the rows that the report reads (`pairs`).

    Args:
      root: the sweep's directory.
      identify: `(config of a run, {path: Planned}) -> identity`; stages differ in what counts.
    """

    def __init__(self, root, identify: Callable[[object, dict], dict]):
        self.root, self._identify = epath.Path(root), identify
        self.nodes: dict[str, Node] = {}
        self.pairs: list[dict] = []
        self._planned: dict[str, Planned] = {}

    def add(self, folder: str, name: str, run_config, parents=()) -> str:
        """Adds a run unless it is there, and returns its directory: `<folder>/<stage>-<name>-<10 hex of the identity>`."""
        identity = config_lib.identity_hash(self._identify(run_config, self._planned))
        node = f"{folder}/{run_config.stage}-{name}-{identity[:10]}"
        self.nodes.setdefault(node, Node(node, run_config, tuple(dict.fromkeys(parents))))
        self._planned[self.path(node)] = Planned(identity, run_config)
        return node

    def path(self, node: str) -> str:
        """Where a run will lie."""
        return str(self.root / node)


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


LISTS = ("tasks", "losses", "seeds", "probes", "filters", "relabels", "ensembles", "floors")


def check(config) -> None:
    """UserError where the keys of a sweep do not fit together."""
    ladder = config.rungs or config.models
    key = "rungs" if config.rungs else "models"
    if len(ladder) < 2:
        raise UserError(f"config.{key}: {tuple(ladder)}, expected at least two models, weakest first")
    for name in (key, *LISTS):
        values = tuple(config[name])
        if not values and name in ("tasks", "losses", "seeds"):
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
    if config.bootstrap and len(ladder) < 3:
        raise UserError(f"config.bootstrap: True, but {tuple(ladder)} has no model between the ends, expected three models or more")
    if config.bootstrap and config.pairs == "adjacent":
        raise UserError("config.bootstrap: True, but pairs=adjacent leaves no model between a supervisor and its student; expected all")
    if config.ensembles and config.members == "seeds" and len(config.seeds) < 2:
        raise UserError(f"config.ensembles: {tuple(config.ensembles)} over one seed, expected two seeds or more, or members=models")
    if config.ensembles and config.members == "models" and len(ladder) < 3:
        raise UserError(f"config.ensembles: {tuple(config.ensembles)} over one supervisor, expected three models or more, or members=seeds")
    if config.base.labels:
        raise UserError(f"config.base.labels: {config.base.labels!r}, expected it empty: a sweep makes its own labels")
