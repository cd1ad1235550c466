"""The memory ladder: the fastest mesh, microbatch and rematerialisation that fit the devices here, and what to change where none does.

Where config.mesh, config.microbatch_size or config.remat is left open, the settings are tried from the fastest on. Fastest:
tensors are not split over `model`; the fewest forward passes a step (rematerialising everything costs one more, and so does
microbatching under a loss that sees the whole batch); the fewest replicas given up for `fsdp`; the largest microbatch; the cheapest
rematerialisation. The first that memory.estimate says fits is taken. Where that is close, the step is compiled and the compiler's
own figure decides, before any parameter is read. All of it follows from shapes and one number, the memory of a device: a resumed
run decides alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np

from w2s_jax import exhausted, feeding, memory, train
from w2s_jax import mesh as mesh_lib
from w2s_jax.data import packing
from w2s_jax.errors import UserError
from w2s_jax.memory import Memory, show
from w2s_jax.progress import say

ROOM = 0.9  # share of a device that an estimate may fill: the rest is for its error, fragmentation and other programs
SURE = 0.5  # share up to which an estimate is believed without asking the compiler: it was never twice as wrong
FAR_OFF = 1.5  # what an estimate must be of a device for the smallest setting to be refused without asking the compiler
COMPILED_ROOM = 0.97  # share that a compiled step may fill


# --------------------------------------------------------------------------- the rungs


@dataclasses.dataclass(frozen=True)
class Rung:
    """One setting. `mesh`: sizes of data, fsdp, model."""

    mesh: tuple[int, int, int]
    microbatches: int = 1
    remat: str = "none"

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip(mesh_lib.AXES, self.mesh))

    @property
    def cells(self) -> int:
        return self.mesh[0] * self.mesh[1]

    def microbatch_size(self, batch_size: int) -> int:
        return -(-batch_size // self.microbatches)


def is_open(mesh) -> bool:
    """Whether a config's mesh is left to the ladder: 0 everywhere."""
    return not any(mesh.values())


def _meshes(mesh, devices: int) -> list[tuple[int, int, int]]:
    """The meshes that config.mesh allows, from the fastest on: no tensor split over `model`, few replicas given up."""
    if not is_open(mesh):
        return [tuple(mesh_lib.make_mesh(mesh).shape.values())]
    out = [(devices // (f * m), f, m) for m in range(1, devices + 1) for f in range(1, devices + 1)
           if devices % (f * m) == 0 and not m & (m - 1)]
    return sorted(out, key=lambda sizes: (sizes[2], sizes[1]))


def rungs(config, devices: int, batch_size: int, per_document: bool, free: bool = False) -> list[Rung]:
    """The settings that a training config leaves open, from the fastest on; `free`: as if it left all three open."""
    mesh = dict.fromkeys(mesh_lib.AXES, 0) if free else config.mesh
    rematerialised = ("none", "full") if free or config.remat == "auto" else (config.remat,)
    out = []
    for sizes in _meshes(mesh, devices):
        if free or config.microbatch_size == "auto":
            powers = [2**k for k in range(32) if batch_size // 2**k >= max(sizes[0] * sizes[1], 1)] or [1]
        else:
            powers = [-(-batch_size // config.microbatch_size) if config.microbatch_size else 1]
        out += [Rung(sizes, n, remat) for n in powers for remat in rematerialised]

    def slowness(rung: Rung):
        repeated = (rung.remat != "none") + (rung.microbatches > 1 and not per_document)
        return rung.mesh[2], repeated, rung.mesh[1], rung.microbatches, rung.remat != "none"

    return sorted(out, key=slowness)


def applied(config, rung: Rung, batch_size: int):
    """The config with the rung's values."""
    out = config.copy_and_resolve_references()
    with out.unlocked(), out.ignore_type():
        out.mesh.update(rung.sizes)
        out.remat, out.microbatch_size = rung.remat, rung.microbatch_size(batch_size)
    return out.lock()


# --------------------------------------------------------------------------- a training run


@dataclasses.dataclass
class Fitted:
    """A training run's settings, resolved.

    `config`: with mesh, microbatch_size and remat as they are. `memory`: the estimate. `limit`: bytes of a device. `line`: what was
    decided, to be said; "" where nothing was left open.
    """

    config: object
    model: object
    mesh: jax.sharding.Mesh
    plan: packing.Plan
    program: train.Program
    rung: Rung
    memory: Memory
    limit: int
    line: str
    ladder: _Ladder

    @property
    def record(self) -> dict:
        """For config.json."""
        return {"device": self.limit, "estimate": self.memory.parts() | {"peak": self.memory.peak}, "auto": self.line}


class _Ladder:
    """What the rungs of a run are judged by."""

    def __init__(self, config, build: Callable, corpus: feeding.Corpus, batches, loss, make_optimizer: Callable, kind: str):
        self.config, self.build, self.corpus, self.batches, self.loss, self.kind = config, build, corpus, batches, loss, kind
        self.make_optimizer = make_optimizer
        self.optimizer, self.batch_size = make_optimizer(config), len(batches[0])
        documents = corpus.sizes
        sizes = np.array([int(documents[b].sum()) for b in batches])
        longest = int(np.argmax([int(documents[b].max()) for b in batches]))
        self.heaviest = [batches[i] for i in dict.fromkeys([*np.argsort(-sizes, kind="stable")[:4].tolist(), longest])]
        self.limit, self.devices = exhausted.device_memory(), len(jax.devices())
        self.choices = rungs(config, self.devices, self.batch_size, loss.per_document)
        self.model = self.variant(config)
        self.rough_plan = functools.cache(self._rough_plan)
        self.estimate = functools.cache(lambda rung: self.judge(rung, self.rough_plan(rung.microbatches, rung.cells)))

    def variant(self, config):
        """The model of a config whose remat may be open; estimates are told of it."""
        return self.build(applied(config, self.choices[0], self.batch_size))

    @functools.cached_property
    def smallest(self) -> Rung:
        return min(self.choices, key=lambda rung: self.estimate(rung).peak)

    def _rough_plan(self, microbatches: int, cells: int) -> packing.Plan:
        """The plan of the run's heaviest batches alone."""
        return self.corpus.plan(self.heaviest, [range(i, i + 1) for i in range(len(self.heaviest))], microbatches=microbatches, cells=cells,
                                embed=self.model.config.embed)

    def judge(self, rung: Rung, plan: packing.Plan, model=None, optimizer=None, kind: str | None = None, offload: str = "") -> Memory:
        """The estimate of the plan's fullest shape."""
        model = model or self.model
        found = [memory.estimate(model, rung.sizes, shape, slots=plan.slots, optimizer=optimizer or self.optimizer, train=kind or self.kind,
                                 microbatches=rung.microbatches, group=max(map(len, plan.dispatches)), remat=rung.remat,
                                 offload=offload or self.config.offload, platform=jax.default_backend()) for shape in plan.shapes]
        return max(found, key=lambda m: m.peak)

    def describe(self, rung: Rung) -> str:
        return (f"mesh {'x'.join(map(str, rung.mesh))}, microbatch {rung.microbatch_size(self.batch_size)} of {self.batch_size}, "
                f"remat {rung.remat}")

    def alternatives(self, rung: Rung) -> str:
        """What else would fit, with the figures: other things to train, other optimizers and types, more devices."""
        found = []
        for keys in ({"train": "lora"}, {"optimizer": "adafactor"}, {"param_dtype": "bfloat16", "dtype": "bfloat16"},
                     {"optimizer": "adafactor", "param_dtype": "bfloat16", "dtype": "bfloat16"},
                     *([{"offload": "optimizer"}, {"offload": "params"}] if has_host_memory() else [])):
            config = self.config.copy_and_resolve_references()
            if all(config.get(key, value) == value for key, value in keys.items()) or "train" in keys and "lora" not in config:
                continue
            with config.unlocked(), config.ignore_type():
                config.update(keys)
                if keys.get("train") == "lora":
                    from w2s_jax.config import LORA_ARGS

                    config.lora.update(LORA_ARGS)
                if "optimizer" in keys:
                    config.optimizer_args.update(dict.fromkeys(config.optimizer_args))
            with contextlib.suppress(UserError):
                plan = self.rough_plan(rung.microbatches, rung.cells)
                needs = self.judge(rung, plan, self.variant(config), self.make_optimizer(config), keys.get("train"), config.offload).peak
                if needs <= ROOM * self.limit:
                    found.append(f"{' '.join(f'{key}={value}' for key, value in keys.items())} ({show(needs)})")
        for factor in (2, 4, 8, 16, 32, 64):
            more = dataclasses.replace(rung, mesh=(rung.mesh[0], rung.mesh[1] * factor, rung.mesh[2]),
                                       microbatches=max(rung.microbatches // factor, 1))
            if (needs := self.estimate(more).peak) <= ROOM * self.limit:
                found.append(f"{self.devices * factor} devices ({show(needs)})")
                break
        return f"; would fit: {', or '.join(found)}" if found else "; nothing known to this project would fit: take a smaller model"

    def next_smaller(self, rung: Rung, needed: int) -> str:
        """The keys of the next rung that fits, or of the smallest one; what else would do where none needs clearly less than this one.

        `needed`: bytes that the backend asked for, 0 = not known: estimates are raised in proportion where it is more.
        """
        now = self.estimate(rung).peak
        scale = max(needed / now, 1.0)
        every = rungs(self.config, self.devices, self.batch_size, self.loss.per_document, free=True)
        sizes = {other: self.estimate(other).peak * scale for other in every}
        less = [other for other in every if sizes[other] <= 0.85 * now * scale]
        if not less:
            return f"; this is the smallest setting (about {show(now * scale)} a device){self.alternatives(rung)}"
        other = next((r for r in less if sizes[r] <= ROOM * self.limit), min(less, key=sizes.get))
        keys = {f"mesh.{axis}": n for axis, n, was in zip(mesh_lib.AXES, other.mesh, rung.mesh) if n != was}
        keys |= {"microbatch_size": other.microbatch_size(self.batch_size)} if other.microbatches != rung.microbatches else {}
        keys |= {"remat": other.remat} if other.remat != rung.remat else {}
        return (f"; expected {' '.join(f'--config.{key}={value}' for key, value in keys.items())} "
                f"(about {show(sizes[other])} instead of {show(now * scale)} a device)")


def fit(config, build: Callable, corpus: feeding.Corpus, batches: list[np.ndarray], loss, make_optimizer: Callable, *, kind: str = "full",
        stats: dict | None = None) -> Fitted:
    """Decide what a training run leaves open, and plan it.

    Args:
      config: the run's; mesh (0 everywhere), microbatch_size ("auto") and remat ("auto") may be open.
      build: resolved config -> `models.Model`.
      make_optimizer: config -> `optimizers.Optimizer`.
      kind: what is trained, a key of `trainable.TRAINED`.

    Raises:
      UserError: nothing fits; says what would.
    """
    if config.offload != "none" and not has_host_memory():
        raise UserError(f"config.offload: {config.offload!r}, but the devices here ({jax.devices()[0].device_kind}) have no pinned memory "
                        "of the host; expected none")
    ladder = _Ladder(config, build, corpus, batches, loss, make_optimizer, kind)
    open_keys = [key for key, open_ in (("mesh", is_open(config.mesh)), ("microbatch_size", config.microbatch_size == "auto"),
                                        ("remat", config.remat == "auto")) if open_]
    compiled_sizes: dict[Rung, int] = {}
    refused, low = math.inf, 1.0  # the least estimate of a rung that the compiler refused; how much too low its estimates were

    def too_much(rung: Rung, size: int) -> bool:
        """By an estimate, which may be too high: of the smallest rung only the compiler is believed, unless it is far off."""
        if not open_keys or size < refused and size * low <= ROOM * ladder.limit:
            return False
        return rung != ladder.smallest or size * low > FAR_OFF * ladder.limit

    for rung in ladder.choices:
        if too_much(rung, ladder.estimate(rung).peak):
            continue
        resolved = applied(config, rung, ladder.batch_size)
        model, mesh = build(resolved), mesh_lib.make_mesh(resolved.mesh)
        plan = feeding.make_plan(resolved, model, corpus, batches, mesh)
        program = train.Program(model, loss, ladder.optimizer, mesh, kind, config.offload)
        estimate = ladder.judge(rung, plan)
        if too_much(rung, estimate.peak):
            continue
        figure = f"{show(estimate.peak)} of {show(ladder.limit)} a device"
        if open_keys and estimate.peak * low > SURE * ladder.limit:
            needs = compiled_sizes[rung] = _compiled_size(program, corpus, plan, ladder, rung, {} if stats is None else stats)
            figure = f"{show(needs)} of {show(ladder.limit)} a device, as compiled"
            if needs > COMPILED_ROOM * ladder.limit:
                say(f"auto: {ladder.describe(rung)} needs {figure}: too much, next")
                refused, low = min(refused, estimate.peak), max(low, needs / estimate.peak)
                continue
        line = f"auto: {ladder.describe(rung)}: {figure}" if open_keys else ""
        return Fitted(resolved, model, mesh, plan, program, rung, estimate, ladder.limit, line, ladder)
    least = ladder.smallest
    needs = compiled_sizes.get(least) or ladder.estimate(least).peak
    fixed = [key for key in ("mesh", "microbatch_size", "remat") if key not in open_keys]
    raise UserError(f"memory: nothing fits the {show(ladder.limit)} of a device{f' with {chr(44).join(fixed)} as given' if fixed else ''}: "
                    f"{ladder.describe(least)} needs {show(needs)}{ladder.alternatives(least)}")


def has_host_memory() -> bool:
    """Whether arrays can be offloaded from the devices here."""
    return any(place.kind == mesh_lib.HOST for place in jax.local_devices()[0].addressable_memories())


def _compiled_size(program: train.Program, corpus, plan: packing.Plan, ladder: _Ladder, rung: Rung, stats: dict) -> int:
    """Bytes of the run's largest program by the compiler's own account; by the estimate where it gives none."""
    which = max(range(len(plan.shapes)), key=lambda i: plan.shapes[i].cost(program.model.config.embed))
    try:
        found = memory.of_program(train.compile_ahead(program, corpus, plan, which, stats))
    except (RuntimeError, MemoryError) as error:
        if not exhausted.is_exhausted(error):
            raise
        return max(exhausted.asked(error) or 0, int(ladder.limit * 1.01))
    return found or ladder.judge(rung, plan).peak


# --------------------------------------------------------------------------- forward passes


def place(model, mesh, *, tokens: int, offload: str = "none") -> dict[str, int]:
    """The mesh of a stage that only computes forward passes, of `tokens` on a device: config.mesh, or the fewest devices a replica
    that hold the model. UserError where none does."""
    if not is_open(mesh):
        return dict(mesh)
    limit, least = exhausted.device_memory(), None
    for sizes in _meshes(mesh, len(jax.devices())):
        shape = packing.Shape(max(tokens // 512, 1), min(512, model.config.max_positions))
        needs = memory.estimate(model, dict(zip(mesh_lib.AXES, sizes)), shape, slots=2, offload=offload,
                                platform=jax.default_backend()).peak
        if needs <= ROOM * limit:
            return dict(zip(mesh_lib.AXES, sizes))
        least = min(needs, least or needs)
    raise UserError(f"memory: nothing fits the {show(limit)} of a device: the model needs about {show(least)} on each of "
                    f"{len(jax.devices())}; expected more devices, or param_dtype=bfloat16")


def forward_tokens(model, mesh, wanted: int, longest: int, held: int = 0, *, offload: str = "none", size: int | None = None,
                   platform: str | None = None) -> int:
    """Tokens of a forward pass on one device: `wanted`, halved until the pass fits beside `held` bytes (of training), one document of
    `longest` tokens at least. `mesh`: anything with a `shape`. `size`, `platform`: of devices that are not here."""
    limit, platform = ROOM * (size or exhausted.device_memory()) - held, platform or jax.default_backend()
    while wanted > longest:
        shape = packing.Shape(max(wanted // longest, 1), longest)
        if memory.estimate(model, mesh.shape, shape, slots=2, offload=offload, platform=platform).peak <= limit:
            break
        wanted = max(wanted // 2, longest)
    return wanted


# --------------------------------------------------------------------------- out of memory


@contextlib.contextmanager
def answered(what: str, fitted: Fitted) -> Iterator[None]:
    """Turns an exhausted memory inside the block into one line that names the next setting."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not exhausted.is_exhausted(error):
            raise
        advised = fitted.ladder.next_smaller(fitted.rung, exhausted.asked(error) or 0)
        raise exhausted.answer(error, f"{what} ({fitted.ladder.describe(fitted.rung)})", advised) from error
