"""What `w2s status ROOT` prints: the state of every run, its job in the queue, and why and where it failed."""

from __future__ import annotations

from pathlib import Path

from w2s_jax import pool, runlog, schedule, slurm
from w2s_jax.errors import UserError
from w2s_jax.files import is_object_store, read_json

STATES = ("done", "running", "queued", "stopped", "failed", "waiting")


def lines(root: str) -> list[str]:
    """A line a run under `root`, `STATE path  detail`, and the numbers of each state.

    `queued`: a job of SLURM's is to make it; `stopped`: it goes on from its checkpoint; `waiting`: the sweep has not begun it.
    UserError: there is no such directory.
    """
    found = dict(runlog.runs(root))
    for path in runlog.planned(root):
        found.setdefault(path, "waiting")
    notes: list[str] = []
    known = _elsewhere(root, notes)
    out = []
    for path, state in sorted(found.items(), key=lambda item: str(item[0])):
        where = known.get(str(path), {})
        error = runlog.read_json(path / "error.json").get("error", "") if state == "failed" else ""
        details = [" ".join(error.splitlines())]
        if state in ("waiting", "stopped", "failed") and where.get("state"):
            state, details = "queued", []
        elif state == "waiting" and (said := schedule.last_words(where.get("log", ""))):  # it ended before it began
            state, details = "failed", [said]
        if where.get("state"):
            details.append(f"job {where['job']} {where['state'].lower()}")
        if where.get("log") and state in ("failed", "stopped", "running"):
            details.append(f"log: {where['log']}")
        found[path] = state
        out.append("  ".join([f"{state:8} {path}", *filter(None, details)]))
    counts = {state: list(found.values()).count(state) for state in STATES}
    summary = ", ".join(f"{number} {state}" for state, number in counts.items() if number) or f"no runs under {root}"
    return [*out, *notes, summary]


def _elsewhere(root: str, notes: list[str]) -> dict[str, dict]:
    """By a run's path what a pool or SLURM knows of it: `log`, and `job` with its `state` in the queue."""
    file = runlog.epath.Path(root).expanduser() / "sweep.json"
    if not file.exists():
        return {}
    given = (read_json(file).get("config") or {}).get("logs", "")
    if is_object_store(root) and not given:
        return {}
    base = runlog.epath.Path(root).expanduser()
    logs, out = schedule.folder(base, given, pool.FOLDER), {}
    for path in runlog.planned(root):
        log = logs / f"{path.relative_to(base)}.log"
        if log.exists():
            out[str(path)] = {"log": str(log)}
    try:
        made = slurm.Jobs(Path(schedule.folder(base, given, slurm.FOLDER))).runs()
    except UserError as error:  # another machine than the cluster's
        notes.append(f"the queue is not known: {error}")
        made = {}
    return out | {str(base / run): where for run, where in made.items()}
