"""What a step costs by arithmetic, how long it takes on a chip, and which settings are worth compiling. No device, no compiler.

The arithmetic counts what the compiled program was seen to do: a layer's matrices are gathered over `fsdp` in the compute type for
every pass that needs them, gradients are reduced where the parameters lie, activations are summed over `model` twice a layer and pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from w2s_jax import chips
from w2s_jax import mesh as mesh_lib
from w2s_jax.data.packing import Shape
from w2s_jax.hlo import Collective
from w2s_jax.trainable import split_params

BANDWIDTH = 0.8  # share of the published bandwidths, of memory and links, that is reached
HOP = 1e-6  # seconds from a chip to the next one, which no collective is faster than
ROOM = 0.92  # share of a chip's memory that the arithmetic may fill before a compilation is spent on it
NARROW = 1.1  # splitting tensors must save this factor: narrower products reach less of the peak, and programs take longer to compile
LADDER = ("none", "full")  # policies that are tried, from the fastest to the smallest


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a plan chooses: sizes of the mesh's axes, the rematerialisation policy, documents of a microbatch (0 = the whole batch)."""

    data: int
    fsdp: int
    model: int
    remat: str
    microbatch_size: int

    @property
    def mesh(self) -> dict[str, int]:
        return {"data": self.data, "fsdp": self.fsdp, "model": self.model}

    def __str__(self) -> str:
        return f"mesh {self.data}x{self.fsdp}x{self.model}, remat {self.remat}, microbatch {self.microbatch_size or 'whole'}"


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one device and step: FLOPs of matrix products, bytes to and from memory, and collectives."""

    flops: float
    bytes: float
    collectives: tuple[Collective, ...]

    @property
    def sent(self) -> float:
        return sum(c.bytes for c in self.collectives)


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a step on the arithmetic units, for the memory, and on the links."""

    compute: float
    memory: float
    interconnect: float

    @property
    def step(self) -> float:
        """As long as the longest: the three overlap."""
        return max(self.compute, self.memory, self.interconnect)

    @property
    def serial(self) -> float:
        """If the links and the rest did not overlap at all."""
        return max(self.compute, self.memory) + self.interconnect

    @property
    def bound(self) -> str:
        return max(("compute", self.compute), ("memory", self.memory), ("interconnect", self.interconnect), key=lambda t: t[1])[0]


def times(work: Work, topology: chips.Topology, mesh: dict[str, int], utilisation: float, dtype: str, precision: str) -> Times:
    """How long the work takes: FLOPs at `utilisation` of the peak, bytes at BANDWIDTH of what is published."""
    chip = topology.chip
    links = sum(c.bytes / (link_bandwidth(topology, mesh, c.group) * BANDWIDTH) + c.count * HOP * max(c.group // 2, 1)
                for c in work.collectives)
    return Times(work.flops / (chip.peak(dtype, precision) * utilisation), work.bytes / (chip.bandwidth * BANDWIDTH), links)


def link_bandwidth(topology: chips.Topology, mesh: dict[str, int], group: int) -> float:
    """Bytes/s that a device sends to the others of a group.

    On a torus a group is a ring along one axis, in both directions: two links of a chip, however many axes the group spans. GPUs of one
    node reach each other at full speed; groups across nodes share the adapters of the GPUs that they have in a node.
    """
    chip = topology.chip
    if chip.axes:
        return chip.link * 2
    if topology.devices <= chip.node:
        return chip.link
    stride = 1  # between neighbours in the group: the mesh's last axis lies within a node
    for axis in reversed(mesh_lib.AXES):
        if mesh[axis] == group > 1:
            break
        stride *= mesh[axis]
    if stride * group <= chip.node:
        return chip.link
    return min(chip.link, chip.network * max(chip.node // stride, 1))


def work(model, settings: Settings, shape: Shape, *, microbatches: int, train: str | None, per_document: bool) -> Work:
    """The arithmetic of one step (`train`: what is trained) or of one forward pass (None).

    Args:
      shape: of a cell of one microbatch.
      per_document: the loss needs one forward pass however many microbatches there are.
    """
    mesh, c, size = settings.mesh, model.config, model.compute.dtype.itemsize
    layers = [leaf for path, leaf in mesh_lib.paths(model.abstract) if path.startswith("backbone/layers/") and path.endswith("kernel")]
    weights = sum(math.prod(leaf.shape) for leaf in layers)
    trained = sum(math.prod(leaf.shape) for _, leaf in mesh_lib.paths(split_params(model.abstract, train)[0])) if train else 0
    tokens, split = shape.rows * shape.time * microbatches, mesh["model"]
    through = train in ("full", "lora")  # gradients go through the layers
    again = 1 if through and settings.remat in ("full", "nothing_saveable") else 0
    forwards = _forwards(train, microbatches, per_document) + again
    passes = forwards + (2 if train == "full" else 1 if through else 0)
    scores = 2.0 * tokens * shape.time * c.heads * c.head_dim * c.layers  # one of attention's products, or its share of a backward pass
    attended = forwards + (2 if through else 0) + (1 if through and not again else 0)  # scores are never kept
    heads = split if c.heads % split == 0 and c.kv_heads % split == 0 else 1  # else every device has them all
    flops = 2.0 * weights * tokens * passes / split + 2 * scores * attended / heads
    collectives = []

    def add(kind, group, count, sent):
        if group > 1 and sent:
            collectives.append(Collective(kind, group, round(count), sent))

    def share(group):
        return (group - 1) / group

    rounds = _rounds(train, microbatches, per_document)
    fsdp, data = mesh["fsdp"], mesh["data"]
    add("all-gather", fsdp, rounds * len(layers) * c.layers, rounds * weights / split * size * share(fsdp))
    per_device = trained / split
    if train == "full":
        add("reduce-scatter", fsdp, microbatches * len(layers) * c.layers, microbatches * per_device * size * share(fsdp))
    add("all-reduce", data, microbatches * len(layers), microbatches * 2 * per_device / fsdp * 4 * share(data))
    summed = 2 * (forwards + (1 if through else 0)) * c.layers
    add("all-reduce", split, summed * microbatches, summed * 2 * tokens * c.embed * size * share(split))
    state = trained / (split * fsdp) * 28  # parameter, two moments and gradient, read and written
    moved = state + rounds * 2 * weights / split * size + tokens * passes * c.layers * size * (8 * c.embed + 4 * c.mlp / split)
    return Work(flops, moved, tuple(collectives))


def _forwards(train: str | None, microbatches: int, per_document: bool) -> int:
    """Forward passes of a microbatch, those of rematerialisation aside."""
    return 2 if train and microbatches > 1 and not per_document else 1


def _rounds(train: str | None, microbatches: int, per_document: bool) -> int:
    """How often a layer's matrices are needed anew in a step: in every forward pass, and once for what comes back."""
    return microbatches * (_forwards(train, microbatches, per_document) + (train in ("full", "lora")))


def host_traffic(host: dict, *, microbatches: int, train: str | None, per_document: bool) -> int:
    """Bytes a step between a device and its host's memory, where `host` bytes of `parameters` and `optimizer_state` lie: the layers'
    matrices come in with every pass, their gradients go out and come back, and the update reads and writes all."""
    moved = host["parameters"] * _rounds(train, microbatches, per_document) + 2 * host["optimizer_state"]
    return moved + (host["parameters"] * (2 * microbatches + 2) if train == "full" else 0)


def meshes(devices: int, model, most: int, given: Mapping[str, int]) -> list[dict[str, int]]:
    """Meshes over all devices: with at most `most` cells (a batch has no more documents), axes as they are `given` (0 = open), tensors
    split as heads of both kinds and MLP divide. Only where there is no such mesh are they split as they do not: attention whose heads
    do not divide is computed whole on every device."""
    c, out = model.config, []
    for sizes in ((c.heads, c.kv_heads, c.mlp), (c.mlp,), ()):
        for split in (s for s in range(1, devices + 1) if devices % s == 0 and devices // s <= most and not any(n % s for n in sizes)):
            cells = devices // split
            out += [{"data": cells // fsdp, "fsdp": fsdp, "model": split} for fsdp in range(1, cells + 1) if cells % fsdp == 0]
        if out := [mesh for mesh in out if all(given[axis] in (0, mesh[axis]) for axis in mesh_lib.AXES)]:
            break
    return out


def candidates(config, model, devices: int) -> list[Settings]:
    """Every setting that a plan may choose, `config` saying what is given: mesh axes above 0, a remat policy, a microbatch size.

    A microbatch of 0 is not fixed: smaller ones are tried where the whole batch does not fit.
    """
    batch = config.batch_size
    policies = LADDER if config.remat == "auto" else (config.remat,)
    if config.what == "label":
        policies = ("none",) if config.remat == "auto" else policies
    out = []
    for mesh in meshes(devices, model, batch if config.what == "train" else devices, config.mesh):
        sizes = [config.microbatch_size]
        if config.what == "train" and not config.microbatch_size:
            sizes += [batch // n for n in (2, 4, 8, 16, 32) if batch % n == 0 and batch // n >= mesh["data"] * mesh["fsdp"]]
        out += [Settings(**mesh, remat=remat, microbatch_size=size) for remat in policies for size in sizes]
    return out
