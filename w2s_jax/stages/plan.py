"""Plan a run before paying for a machine: what its compiled step needs of every chip, how long it takes, and what would fit.

For each model and topology: the settings that are left open are chosen by arithmetic (`costs`, `memory`), the run's own program is
compiled for them (`ahead`), and what the compiler says decides; where it does not fit, the next settings are tried.

    results.json   a point for each model and topology: settings, bytes, FLOPs, collectives, times, what was tried
    plan.md        the same for reading, also printed
    points/        every point that is finished, so that a table goes on where it was stopped
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time

from etils import epath

from w2s_jax import ahead, chips, costs, hub, memory, plan_report
from w2s_jax import config as config_lib
from w2s_jax import mesh as mesh_lib
from w2s_jax.data import packing
from w2s_jax.errors import UserError
from w2s_jax.files import plain, read_json, write_json, write_text
from w2s_jax.hlo import Collective
from w2s_jax.outcomes import finished, shown
from w2s_jax.progress import say
from w2s_jax.runlog import Run

_SAMPLE = 64  # steps that the arithmetic plans; a compilation plans all of them
_LARGEST = 1024  # chips of the largest slice that is proposed


def identity(config, planned: dict | None = None) -> dict:
    """Every key: a plan is about how a run is executed."""
    return config_lib.plain_identity(json.loads(config.to_json_best_effort()))


def run(config, workdir, *, rerun: bool = False, sources: dict | None = None, **_) -> dict:
    """Plan every point, write results.json and plan.md, print the latter.

    Args:
      sources: of the models, where `stages.prepare` has read them already (`hub.config_jsons`).

    Raises:
      UserError: a model without a config.json, documents longer than it takes, a topology that no compiler knows, no libtpu.
    """
    topologies = [chips.topology(name) for name in config.topologies or (config.topology,)]
    for topology in topologies:
        chips.check_compiler(topology)
    sources = sources or hub.config_jsons(config)
    points = {(name, str(topology)): _Point(_one(config, name, topology), raw, topology)  # checked before anything is written
              for name, (raw, _) in sources.items() for topology in topologies}
    ident = identity(config)
    if (done := finished(workdir, config, ident, rerun, summary=lambda results: f"{len(results['points'])} points")) is not None:
        print((epath.Path(workdir) / "plan.md").read_text())
        return done
    start = time.perf_counter()
    with Run.open(workdir, config, ident, rerun=rerun) as run_:
        run_.start({"parents": []})
        folder = epath.Path(run_.path) / "points"
        folder.mkdir(parents=True, exist_ok=True)
        found = []
        for (name, _), point in points.items():
            found.append(_kept(folder, point, sources[name][1]))
            write_text(epath.Path(run_.path) / "plan.md", plan_report.text(found, config))
        results = plain({"points": found, "seconds": time.perf_counter() - start})
        text = plan_report.text(results["points"], config)
        write_text(epath.Path(run_.path) / "plan.md", text)
        run_.finish(results)
    print(text)
    return results


def _one(config, name: str, topology: chips.Topology):
    """The config of one point of a table."""
    one = config.copy_and_resolve_references().unlock()
    one.model, one.topology, one.models, one.topologies = name, str(topology), (), ()
    return one


def _kept(folder, point: _Point, source: str) -> dict:
    """What a point comes to, from an earlier attempt where it is there."""
    keys = [identity(point.config), point.raw]
    file = folder / f"{hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:16]}.json"
    if not file.exists():
        write_json(file, point.plan() | {"source": source})
    return read_json(file)


class _Point:
    """One model on one topology."""

    def __init__(self, config, raw: dict, topology: chips.Topology):
        self.config, self.raw, self.topology, self.platform = config, raw, topology, topology.chip.kind
        self.model = ahead.build(self.config, raw, "full" if config.remat == "auto" else config.remat)
        longest = self.model.config.max_positions
        if config.lengths != "sciq" and int(config.lengths) > longest:
            raise UserError(f"config.lengths: {config.lengths}, but {config.model} has {longest} positions; expected at most that many")
        self.options = costs.candidates(config, self.model, topology.devices)
        if not self.options:
            raise UserError(f"config.mesh: {dict(config.mesh)} is no mesh over the {topology.devices} chips of {topology} for batches of "
                            f"{config.batch_size}; expected data x fsdp of at most the batch, and all three together the number of chips")
        self.texts = ahead.corpus(self.config, self.model)
        self.program = ahead.program(self.config, self.model, None) if config.what == "train" else None
        self.plans: dict = {}
        self.tried: list[dict] = []

    # ------------------------------------------------------------------ arithmetic

    def _layout(self, settings: costs.Settings) -> dict:
        """`shape`, `slots`, `microbatches`, `group` of the largest cell."""
        key = (*settings.mesh.values(), settings.microbatch_size)
        if key not in self.plans:
            if self.program:
                plan = ahead.training_plan(self.config, self.model, self.texts, settings, self.platform, _SAMPLE)
                shape = max(plan.shapes, key=lambda s: (s.rows * s.time, s.time))
                group = max(map(len, plan.dispatches))
                self.plans[key] = {"shape": shape, "slots": plan.slots, "microbatches": plan.microbatches, "group": group}
            else:
                batch = max(ahead.labelling_batches(self.config, self.model, self.texts, settings, self.topology.chip),
                            key=lambda b: b.arrays["tokens"].size)
                shape, slots = packing.Shape(*batch.arrays["tokens"].shape[1:]), batch.arrays["documents"].shape[1]
                self.plans[key] = {"shape": shape, "slots": slots, "microbatches": 1, "group": 1}
        return self.plans[key]

    def estimate(self, settings: costs.Settings) -> dict:
        """By arithmetic: `needed` bytes, and the `times` of a step."""
        at, train = self._layout(settings), self.config.train if self.program else None
        found = memory.estimate(self.model, settings.mesh, at["shape"], slots=at["slots"], train=self.config.train, group=at["group"],
                                optimizer=self.program.optimizer if self.program else None, microbatches=at["microbatches"],
                                remat=settings.remat, offload=self.config.offload, platform=self.platform)
        work = costs.work(self.model, settings, at["shape"], microbatches=at["microbatches"], train=train,
                          per_document=self.program.loss.per_document if self.program else True)
        return {"needed": found.peak, "parts": found.parts(), "times": self._times(work, settings), "work": work}

    def _times(self, work: costs.Work, settings: costs.Settings) -> costs.Times:
        c = self.config
        return costs.times(work, self.topology, settings.mesh, c.utilisation, c.dtype, c.matmul_precision)

    # ------------------------------------------------------------------ the search

    def plan(self) -> dict:
        """The first setting that fits, of those that keep to what is given; else of all."""
        c, limit, options = self.config, self.topology.chip.memory, self.options
        found = self._first(options, limit, c.compiles)
        changed = []
        if found is None and (free := self._open(options)):
            asked = options[0]
            free.sort(key=lambda s: self._distance(asked, s))
            found = self._first(free, limit, c.compiles, nearest=asked)
            changed = self._changes(asked, found[0]) if found else []
        if found is None:
            return self._refused(limit)
        settings, compiled = found
        return self._result(settings, compiled, changed)

    def _first(self, options, limit: int, compiles: int, nearest: costs.Settings | None = None):
        """`(settings, compiled)` of the first that the compiler says fits, or None. The fastest are tried first (`nearest`: the
        nearest), as far as the arithmetic, corrected by what compilations needed, lets them fit."""
        estimates = {s: self.estimate(s) for s in options}
        def seconds(s, time: float) -> float:  # of as many tokens: passes over labels are as large as the mesh lets them be
            shape = self._layout(s)["shape"]
            return time if self.program else time / (s.data * s.fsdp * shape.rows * shape.time)

        rank = (lambda s: (self._distance(nearest, s), seconds(s, estimates[s]["times"].step))) if nearest else (
            lambda s: (seconds(s, estimates[s]["times"].serial) * (costs.NARROW if s.model > 1 else 1), s.microbatch_size > 0, s.model,
                       -s.data))
        left, factor = sorted(options, key=rank), 1.0
        for number in range(compiles):
            fitting = [s for s in left if estimates[s]["needed"] * factor <= costs.ROOM * limit]
            if not fitting and number:
                return None
            settings = fitting[0] if fitting else min(left, key=lambda s: estimates[s]["needed"])
            left.remove(settings)
            compiled = self._compile(settings, estimates[settings])
            if compiled["fits"]:
                return settings, compiled
            if compiled["needed"]:
                factor = max(factor, compiled["needed"] / estimates[settings]["needed"])
            if not left:
                return None
        return None

    def _open(self, options) -> list[costs.Settings]:
        """The settings there are if what was given is given up."""
        free = self.config.copy_and_resolve_references().unlock()
        free.mesh.update(dict.fromkeys(mesh_lib.AXES, 0))
        free.remat, free.microbatch_size = "auto", 0
        return [s for s in costs.candidates(free, self.model, self.topology.devices) if s not in options]

    def _changes(self, asked: costs.Settings, s: costs.Settings) -> list[str]:
        different = {"remat": asked.remat != s.remat, "mesh": asked.mesh != s.mesh,
                     "microbatch_size": (asked.microbatch_size or self.config.batch_size) != (s.microbatch_size or self.config.batch_size)}
        return [name for name, changed in different.items() if changed]

    def _distance(self, asked: costs.Settings, s: costs.Settings) -> int:
        """How much is changed: a policy or a microbatch is less than a mesh."""
        return sum({"remat": 2, "microbatch_size": 3, "mesh": 4}[name] for name in self._changes(asked, s))

    def _compile(self, settings: costs.Settings, estimate: dict) -> dict:
        name = f"{shown(self.config.model)} on {self.topology}"
        has = memory.show(self.topology.chip.memory)
        say(f"{name}: {settings}, about {memory.show(estimate['needed'])} of {has} a chip; compiling ...")
        found = ahead.compile_point({"config": plain(self.config), "raw": self.raw, "topology": str(self.topology),
                                     "settings": dataclasses.asdict(settings)})
        if "memory" in found and self.platform == "gpu":  # what XLA's CPU compiler allocates is not what a GPU needs
            found["memory"] = {"peak": estimate["needed"], "arguments": found["parts"]["parameters"] + found["parts"]["optimizer_state"]}
            found["memory"]["temporaries"] = found["memory"]["peak"] - found["memory"]["arguments"]
        found["needed"] = found["memory"]["peak"] if "memory" in found else found["needed"]
        found["fits"] = "memory" in found and found["needed"] <= self.topology.chip.memory
        self.tried.append({"settings": dataclasses.asdict(settings), "estimate": estimate["needed"], "needed": found["needed"],
                           "fits": found["fits"], "compile_seconds": found["seconds"]["compile"]})
        say(f"{name}: {'fits' if found['fits'] else 'does not fit'}, "
            f"{memory.show(found['needed']) if found['needed'] else 'more than there is'} a chip, {found['seconds']['compile']:.0f} s")
        return found

    # ------------------------------------------------------------------ what is said

    def _common(self) -> dict:
        c = self.config
        return {"model": c.model, "topology": str(self.topology), "chips": self.topology.devices, "what": c.what, "train": c.train,
                "compiler": "TPU" if self.platform == "tpu" else "estimate", "memory_of_chip": self.topology.chip.memory,
                "parameters": sum(leaf.size for _, leaf in mesh_lib.paths(self.model.abstract)), "tried": self.tried}

    def _result(self, settings: costs.Settings, compiled: dict, changed: list[str]) -> dict:
        cost = compiled["cost"]
        work = costs.Work(cost["flops"] + cost["attention_flops"], cost["bytes"], tuple(Collective(**x) for x in cost["collectives"]))
        times = self._times(work, settings)
        # Of the mean step: smaller shapes have fewer tokens, but the same parameters to move.
        times = dataclasses.replace(times, compute=times.compute * compiled["share"])
        step = times.step
        steps, epochs = compiled["steps"], self.config.epochs if self.program else 1
        return self._common() | {
            "fits": True, "settings": dataclasses.asdict(settings), "changed": changed, "compiled": compiled,
            "estimate": self.estimate(settings)["needed"], "host_traffic": self._host_traffic(compiled),
            "times": dataclasses.asdict(times) | {"bound": times.bound}, "step_seconds": step, "step_seconds_serial": times.serial,
            "tokens_per_second": compiled["useful"] / (steps * step), "run_seconds": steps * step, "epoch_seconds": steps * step / epochs,
            "utilisation": 0.0 if not step else times.compute * self.config.utilisation / step}

    def _host_traffic(self, compiled: dict) -> int:
        train, per_document = (self.config.train, self.program.loss.per_document) if self.program else (None, True)
        return costs.host_traffic(compiled["host"], microbatches=compiled["microbatches"], train=train, per_document=per_document)

    def _refused(self, limit: int) -> dict:
        """Nothing fits: what the smallest setting needs, and the smallest larger slice that has a setting by arithmetic."""
        least = min(self.tried, key=lambda t: t["needed"] or float("inf"))
        proposal, larger = None, self.topology
        factor = max([t["needed"] / t["estimate"] for t in self.tried if t["needed"]], default=1.0)
        while larger.devices < _LARGEST and proposal is None:
            axes = list(larger.axes)
            axes[axes.index(min(axes))] *= 2
            larger = chips.Topology(larger.chip, tuple(sorted(axes)))
            free = self.config.copy_and_resolve_references().unlock()
            free.mesh.update(dict.fromkeys(mesh_lib.AXES, 0))
            free.remat, free.microbatch_size = "auto", 0
            if any(self.estimate(s)["needed"] * factor <= costs.ROOM * limit for s in costs.candidates(free, self.model, larger.devices)):
                proposal = str(larger)
        return self._common() | {"fits": False, "settings": least["settings"], "needed": least["needed"], "larger": proposal}
