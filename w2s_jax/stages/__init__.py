"""The stages of an experiment, looked up by `config.stage` and imported when they run."""

from __future__ import annotations

import importlib
import sys

from w2s_jax import distributed, registry
from w2s_jax.config import CHOICES
from w2s_jax.errors import UserError, nearest

STAGES = {name: f"w2s_jax.stages.{name}" for name in CHOICES["stage"]}
FILES_ONLY = ("report", "ensemble")  # need no devices: of several processes, process 0 runs them
SEVERAL = ("finetune", "label", "prompt", "pretrain", "export", "sweep", *FILES_ONLY)  # run in several processes


def run(config, workdir, **options) -> dict:
    """Runs the stage that `config.stage` names and returns its results (what results.json holds).

    Args:
        config: a `ConfigDict` as `configs/<stage>.py` gives it.
        workdir: the run's directory (a sweep's and a report's root), local or gs://.
        **options: handed to the stage: `rerun` (redo a finished run), and what the stage takes besides (`dry_run` of a sweep).

    Raises:
        UserError: the config is wrong (see `w2s_jax.checks.check`), or what it names does not fit; the stage runs in one process only.
    """
    from w2s_jax.checks import check

    name = config.get("stage")
    if name not in STAGES:
        raise UserError(f"config.stage: {name!r} is not a stage: expected one of {', '.join(STAGES)}{nearest(name, STAGES)}")
    check(config)
    if "jax" in sys.modules:  # an earlier run of this process may have left its programs
        from w2s_jax import forward

        forward.make_room()

    def call() -> dict:
        try:
            return importlib.import_module(STAGES[name]).run(registry.fill(config), workdir, **options)
        except (RuntimeError, MemoryError) as error:
            from w2s_jax import exhausted

            if not exhausted.is_exhausted(error):
                raise
            raise exhausted.answer(error, f"the stage {name}", exhausted.advice(config)) from error

    try:
        check_processes(name)
        if name not in FILES_ONLY:
            return call()
        results: dict = {}  # they need not be JSON, and nobody but process 0 has a use for them
        distributed.once(lambda: results.update(call()), name)
        return results
    except UserError as error:
        distributed.confirm(error)
        raise


def check_processes(stage: str) -> None:
    """UserError where this is one of several processes and the stage does not run in several."""
    if distributed.processes() > 1 and stage not in SEVERAL:
        raise UserError(f"config.stage: {stage!r} runs in one process, but this job has {distributed.processes()}; of the stages, "
                        f"{', '.join(SEVERAL)} run in several")


def prepare(config) -> dict:
    """Options for `run`: what can be read and checked of a stage's input before jax is imported (see `main.py`).

    Raises:
        UserError: documents, labels, a run to label, probe, export or combine, the lists of a sweep, or the
            models and the compiler of a plan are not what the stage needs.
    """
    if config.stage in ("finetune", "probe"):
        from w2s_jax import runlog
        from w2s_jax.data import labels, splits

        if config.get("run"):
            runlog.load_done(config.run, "finetune")
        prepared = splits.prepare(config)
        return {"prepared": prepared, "labels": labels.read(config.labels) if config.labels else None}
    if config.stage in ("vision", "vision_train"):
        from w2s_jax.data import images, labels

        given = {"labels": labels.read(config.labels)} if config.get("labels") else {}
        return {"prepared": images.prepare(config), **given}
    if config.stage in ("label", "export"):
        from w2s_jax import runlog

        runlog.load_done(config.run, "finetune")
    elif config.stage == "ensemble":
        from w2s_jax import runlog

        for path in config.runs:
            runlog.load_done(path, "label")
    elif config.stage == "plan":
        from w2s_jax import chips, hub

        for name in config.topologies or (config.topology,):
            chips.check_compiler(chips.topology(name))
        return {"sources": hub.config_jsons(config)}
    elif config.stage == "prompt":
        from w2s_jax.data import prompts

        return {"prepared": prompts.prepare(prompts.resolve(config))}
    elif config.stage == "sweep":
        from w2s_jax import graph, slurm

        graph.check(config)
        slurm.check(config.slurm)
    return {}


def identity(config, planned: dict | None = None) -> dict:
    """What a run of `config` would be (`config.identity`); `planned` = the runs that a sweep will make, by path."""
    return importlib.import_module(STAGES[config.stage]).identity(registry.fill(config), planned)
