"""The runs of a sweep as others than its own process make them: what each needs, in which order, by which command.

Pure but for the files of `write_plans`: a run is made anywhere by `w2s --config=ROOT/planned/NAME.json --workdir=ROOT/NAME`, from a
config that was fixed when the sweep was planned, whatever is edited while it waits in a queue.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path

from etils import epath

from w2s_jax import registry, runlog
from w2s_jax.errors import UserError
from w2s_jax.files import dumps, is_object_store, read_json, write_text
from w2s_jax.graph import Graph, Node, variant

ALL = -1  # devices of a run: all of its node's
MOST = 1000  # tasks of one array job (SLURM's default MaxArraySize is 1001)


# ---------------------------------------------------------------- what a run needs


def devices(graph: Graph, node: Node, fits: Callable[[Node], bool] = lambda node: True) -> int:
    """Devices that a run takes: 0 (it reads files only), a number, or ALL where one copy of its model is laid over all there are.

    A mesh whose replicas take what is there (`data=-1`) is content with one copy: what fits one device is run on one. Of a run whose
    mesh is left to the memory there is, `fits` says whether it is enough of one device.
    """
    if node.stage == "ensemble":
        return 0
    config = node.config
    if node.stage == "label" and not any(config.mesh.values()):  # the labelling run's own model decides (stages/label.py)
        config = variant(graph.nodes[node.parents[0]].config, mesh=config.mesh)
    mesh = registry.fill(config).mesh
    if not any(mesh.values()):
        return 1 if fits(node) else ALL
    if -1 in (mesh["fsdp"], mesh["model"]):
        return ALL
    return max(mesh["data"], 1) * mesh["fsdp"] * mesh["model"]


# ---------------------------------------------------------------- how it is made


def folder(root, given: str, name: str) -> Path:
    """Where logs and job scripts lie: `given`, else ROOT/<name>. UserError where that is an object store: schedulers write files."""
    if not given and is_object_store(root):
        raise UserError(f"config.logs: '', expected a local folder for logs and job scripts, since --workdir={os.fspath(root)} is none")
    return Path(given or Path(root) / name).expanduser().absolute()


def plan_file(root, name: str) -> epath.Path:
    """The config of a planned run."""
    return epath.Path(root) / "planned" / f"{name}.json"


def write_plans(graph: Graph, names) -> None:
    """Writes the configs of runs, and which runs must be done before each, for processes that do not know the graph."""
    for name in names:
        node, file = graph.nodes[name], plan_file(graph.root, name)
        text = dumps({"config": node.config, "needs": [graph.path(parent) for parent in node.parents]}, indent=1) + "\n"
        if not file.exists() or file.read_text() != text:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, text)


def check_needs(path: str) -> None:
    """UserError where a run that a planned one reads is not done; `path` is its file. Other recorded configs need nothing."""
    for needed in read_json(path).get("needs") or ():
        if (state := runlog.state(needed)) != "done":
            why = runlog.read_json(epath.Path(needed) / "error.json").get("error", "") if state == "failed" else ""
            raise UserError(f"{path}: needs the run {needed}, which is {'not made' if state == 'absent' else state}{': ' * bool(why)}{why}")


def command(root, name: str) -> list[str]:
    """The words of the command that makes one run."""
    return [*program(), f"--config={plan_file(root, name)}", f"--workdir={epath.Path(root) / name}"]


def program() -> list[str]:
    """The words that start this program, with this Python."""
    return [sys.executable, "-m", "w2s_jax.main"]


def python_path(environ=os.environ) -> str:
    """PYTHONPATH under which `program` is this code: a checkout's folder goes first."""
    here, given = Path(__file__).resolve().parents[1], environ.get("PYTHONPATH", "")
    parts = [part for part in given.split(os.pathsep) if part]
    if (here / "pyproject.toml").is_file() and str(here) not in parts:
        parts.insert(0, str(here))
    return os.pathsep.join(parts)


def last_words(log, offset: int = 0) -> str:
    """What a program said last in a log, after `offset` bytes: its line `error: ...` (without this), else the last line, which of a
    traceback is the exception; "" where there is nothing."""
    try:
        with open(log, "rb") as file:
            file.seek(max(offset, Path(log).stat().st_size - 20_000))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    errors = [line.removeprefix("error: ") for line in lines[-10:] if line.startswith("error: ")]
    return (errors or lines or [""])[-1]


# ---------------------------------------------------------------- array jobs


@dataclasses.dataclass(frozen=True)
class Array:
    """Runs that start together and need the same: one array job. `after`: the arrays (by name) that make what they read."""

    name: str
    stage: str
    devices: int
    runs: tuple[str, ...]
    after: tuple[str, ...]


def arrays(graph: Graph, todo, work: dict[str, float], need: dict[str, int], pending=()) -> list[Array]:
    """The runs `todo` as array jobs, each after those that it waits for, the longest run of each first (`work`, and `need`, the number
    of devices: by name).

    A group is a wave (how many runs that are not done, of `todo` or `pending` elsewhere, stand before it), a stage and a number of
    devices. Runs that nothing else reads, such as ceilings, have groups of their own: nobody waits for them.
    """
    todo, pending = set(todo), set(pending)
    read = {parent for name in todo | pending for parent in graph.nodes[name].parents}
    wave: dict[str, int] = {}
    groups: dict[tuple, list[str]] = {}
    for name, node in graph.nodes.items():
        if name in todo or name in pending:
            wave[name] = 1 + max((wave[parent] for parent in node.parents if parent in wave), default=-1)
        if name in todo:
            groups.setdefault((wave[name], name not in read, node.stage, need[name]), []).append(name)
    out: list[Array] = []
    place: dict[str, str] = {}
    for (_, _, stage, count), names in sorted(groups.items()):
        names.sort(key=lambda name: -work[name])
        for first in range(0, len(names), MOST):
            runs = tuple(names[first: first + MOST])
            after = dict.fromkeys(place[p] for name in runs for p in graph.nodes[name].parents if p in place)
            out.append(Array(f"{len(out):02d}-{stage}", stage, count, runs, tuple(after)))
            place |= dict.fromkeys(runs, out[-1].name)
    return out
