"""Run a graph of runs (pretraining, ground truth, labels, students and what they are compared with), then the report.

Every run is a directory of its own and is made once; what is done is skipped, so a sweep that was killed goes on. `config.executor`
says who makes them: this process, one after the other (compiled programs are shared between runs of equal shapes), the devices of
this node (`pool`), or SLURM (`slurm`).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from etils import epath

from w2s_jax import config as config_lib
from w2s_jax import distributed, experiment, pool, runlog, schedule, sizes, slurm, stages
from w2s_jax import graph as graph_lib
from w2s_jax.errors import UserError
from w2s_jax.files import is_object_store, write_json
from w2s_jax.progress import Progress, say


def run(config, workdir, *, rerun: bool = False, dry_run: bool = False, **_) -> dict:
    """Make every run of the sweep that is not there yet, then the report.

    Args:
      workdir: the sweep's root.
      rerun: redo the runs that are done.
      dry_run: print the graph (and what would be submitted) and stop.

    Returns:
      `{"runs": {name: state}, "pairs": [...]}`, and the report's results under `report`. With executor=slurm runs are `queued`.

    Raises:
      UserError: a config that does not fit together; runs that failed, after all others were made.
    """
    root = epath.Path(workdir).expanduser()
    if config.executor != "here" and distributed.processes() > 1:
        raise UserError(f"config.executor: {config.executor!r} starts processes itself, but this is one of {distributed.processes()}; "
                        "expected it to be started once, or executor=here")
    graph = experiment.build(config, root, stages.identity)
    for stage in dict.fromkeys(node.stage for node in graph.nodes.values()):
        stages.check_processes(stage)
    states = distributed.once(lambda: {name: runlog.state(root / name) for name in graph.nodes}, "states")
    todo = [name for name, state in states.items() if state != "done" or rerun]
    work = {name: sizes.work(graph, graph.nodes[name]) for name in todo}
    disk = sizes.disk(graph) / 1e6

    def record() -> None:
        made = config.copy_and_resolve_references()
        if made.logs and not is_object_store(made.logs):
            made.logs = str(schedule.folder(root, made.logs, ""))  # for those who ask from another folder
        runlog.make_folder(root, "--workdir")
        write_json(root / "sweep.json", {"config": made, "pairs": graph.pairs, "runs": list(graph.nodes)})

    if not dry_run:
        distributed.once(record, "sweep.json")
    say(f"{root}: {len(graph.nodes)} runs, {sum(s == 'done' for s in states.values())} of them done; "
        f"checkpoints will take about {disk:,.0f} MB{_free(root)}")
    if dry_run:
        distributed.once(lambda: print("\n".join(_table(graph, states))), "table")
        if config.executor == "slurm":
            slurm.submit(graph, todo, work, _need(graph, todo, slurm.memory(config.slurm)), config, stages.SEVERAL, dry_run=True)
        return {"runs": states, "pairs": graph.pairs}

    if todo and config.executor == "slurm":
        queued = slurm.submit(graph, todo, work, _need(graph, todo, slurm.memory(config.slurm)), config, stages.SEVERAL,
                              begin=lambda left: _clear(root, left, rerun))
        return {"runs": states | dict.fromkeys(queued, "queued"), "pairs": graph.pairs}
    if config.executor == "devices":
        failed = _on_devices(graph, root, todo, work, config, rerun)
    else:
        failed = _here(graph, root, todo, work, rerun)
    states = {name: "failed" if name in failed else "done" for name in states}
    results = {"runs": states, "pairs": graph.pairs}
    students = [pair["runs"].values() for pair in graph.pairs]
    if config.report and any(all(states[run_] == "done" for run_ in runs) for runs in students):
        report = config_lib.shipped("report")
        report.root = str(root)
        results["report"] = stages.run(report, str(root))
    if failed:
        first = next(iter(failed))
        raise UserError(f"{root}: {len(failed)} of {len(graph.nodes)} runs failed, the first {first}: {failed[first]}")
    return results


def _here(graph: graph_lib.Graph, root, todo, work: dict[str, float], rerun: bool) -> dict[str, str]:
    """Makes the runs in this process, one after the other; returns why each failed one did."""
    failed: dict[str, str] = {}
    with Progress(len(graph.nodes), label="sweep", unit="run", weights=[work.get(name, 0.0) for name in graph.nodes]) as progress:
        for name, node in graph.nodes.items():
            progress.update(0, run=name)
            if broken := [p for p in node.parents if p in failed]:
                failed[name] = f"needs {broken[0]}, which failed"
            elif name in work:
                try:
                    stages.run(node.config, str(root / name), rerun=rerun)
                except UserError as error:  # one run's failure leaves the others of a sweep their chance
                    failed[name] = str(error)
                    say(f"{name}: {error}")
            progress.update(1)
    return failed


def _on_devices(graph: graph_lib.Graph, root, todo, work: dict[str, float], config, rerun: bool) -> dict[str, str]:
    """Makes the runs on the devices of this node; returns why each failed one did."""
    if not todo:
        return {}
    devices, logs = pool.find(config.slots), schedule.folder(root, config.logs, pool.FOLDER)
    made = pool.Pool(graph, todo, work, _need(graph, todo, devices.memory), devices, logs)
    say(f"{len(todo)} runs on {len(devices.ids)} {devices.platform} {'slots' if devices.platform == 'cpu' else 'devices'}; logs: {logs}")
    _clear(root, todo, rerun)
    schedule.write_plans(graph, todo)
    return made.run()


def _need(graph: graph_lib.Graph, todo, limit: int) -> dict[str, int]:
    """Devices that each run takes, with `limit` bytes of memory each (0 = not known)."""
    fits = sizes.Fits(graph, limit)
    return {name: schedule.devices(graph, graph.nodes[name], fits) for name in todo}


def _clear(root, todo, rerun: bool) -> None:
    """Before runs are redone elsewhere: what they made goes now, so that a process that is stopped and started again goes on.
    UserError, and nothing is gone, where another process writes one of them."""
    todo = todo if rerun else ()
    if held := [name for name in todo if runlog.held(root / name)]:
        raise UserError(f"{root / held[0]}: another process writes it; expected it to be ended before it is redone")
    for name in todo:
        runlog.clear(root / name)


def _free(root) -> str:
    """What the disk has left, where that can be told."""
    if is_object_store(root):
        return ""
    path = Path(root).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    return f" of the {shutil.disk_usage(there).free / 1e6:,.0f} MB that are free"


def _table(graph: graph_lib.Graph, states: dict) -> list[str]:
    """One line a run: state, directory, and what it reads."""
    return [f"{states[name]:8} {name}" + (f"  <- {', '.join(node.parents)}" if node.parents else "") for name, node in graph.nodes.items()]
