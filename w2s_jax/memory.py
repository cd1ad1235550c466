"""What a run needs of a device's memory, by arithmetic: bytes from shapes alone, no device touched.

    memory = estimate(model, {"data": 1, "fsdp": 8, "model": 1}, shape, slots=4, optimizer=optimizer, train="full")
    memory.peak                     # bytes on one device
    memory.parts()                  # of what

Parameters, gradients and the optimizer's state are exact: their shapes come from `jax.eval_shape` and their shardings from
mesh.py's rules, so that what does not divide, adapters, a head alone and factored moments count as what they are. Activations
follow backbone.py's REMAT: what a layer keeps for the backward pass. What a program holds besides (one layer's intermediates,
its gathered weights, logits) is counted as the compiler was seen to need it: tests/test_memory.py holds the sum against
`compiled.memory_analysis()`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AbstractMesh

from w2s_jax import mesh as mesh_lib
from w2s_jax.data.packing import Shape
from w2s_jax.models import attention
from w2s_jax.models.heads import LOGITS_AT_ONCE
from w2s_jax.optimizers import OPTIMIZERS
from w2s_jax.trainable import split_params

_LAYERS = "backbone/layers/"
_FLOAT = 4  # bytes of a float32


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on the device that holds most.

    `parameters`, `optimizer_state`, `inputs` lie there during the whole step. `gradients`: of the trained parameters; with several
    microbatches the float32 sums besides. `activations`: what all layers keep for the backward pass of one microbatch. `layer`: one
    layer at work: its intermediates, attention's scores where the implementation stores them, its weights gathered over `fsdp`.
    `head`: the same of what reads the last states: a language model's logits and table. `update`: of the optimizer.
    """

    parameters: int
    optimizer_state: int
    inputs: int
    gradients: int = 0
    activations: int = 0
    layer: int = 0
    head: int = 0
    update: int = 0

    @property
    def resident(self) -> int:
        """Bytes that lie there from step to step."""
        return self.parameters + self.optimizer_state + self.inputs

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment: in a backward pass, or in the update."""
        return self.resident + self.gradients + max(self.activations + max(self.layer, self.head), self.update)

    def parts(self) -> dict[str, int]:
        """Bytes by part."""
        return dataclasses.asdict(self)


def show(size: float) -> str:
    """`61.2 GiB`, `3.4 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.1f} {unit}" if unit != "B" else f"{int(size)} B"
        size /= 1024
    raise AssertionError


def abstract_mesh(shape: Mapping[str, int]) -> AbstractMesh:
    """A mesh of these sizes without devices, for shardings and their arithmetic."""
    return AbstractMesh(tuple(int(shape[a]) for a in mesh_lib.AXES), mesh_lib.AXES)


def _shard_sizes(abstract, shardings) -> list[int]:
    """Bytes of each leaf's part on one device."""
    return [int(np.prod(s.shard_shape(leaf.shape))) * leaf.dtype.itemsize
            for leaf, s in zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings), strict=True)]


def estimate(model, mesh: Mapping[str, int], shape: Shape, *, slots: int, optimizer=None, train: str = "full", microbatches: int = 1,
             group: int = 1, remat: str | None = None, offload: str = "none", platform: str = "cpu") -> Memory:
    """What a training step (or, without an `optimizer`, a forward pass) needs on one device.

    Args:
      model: a `models.Model`; its parameters are not asked for.
      mesh: sizes of `data`, `fsdp` and `model`, a mapping (`Mesh.shape` is one).
      shape: rows and row length of a cell of one microbatch: what one place along data x fsdp computes at once.
      slots: documents that a cell has room for.
      optimizer: an `optimizers.Optimizer`.
      train: what is trained, a key of `trainable.TRAINED`.
      microbatches: of a step.
      group: steps in one call of the device; their inputs lie there together.
      remat: a key of `models.backbone.REMAT`; None = the model's own.
      offload: "optimizer": the optimizer's state is on the device during the update alone; "params": so are the layers' matrices, but
        for those of the layer at work and of the next.
      platform: decides attention's implementation where the model leaves it open. On a CPU, XLA holds what is computed in bfloat16
        (activations and gradients, not what lies there between steps) as float32.
    """
    grid = abstract_mesh(mesh)
    shardings, _ = mesh_lib.param_shardings(grid, model.abstract)
    lies = _shard_sizes(model.abstract, shardings)
    away = sum(n for n, (path, _) in zip(lies, mesh_lib.paths(model.abstract)) if mesh_lib.on_host(path, offload))
    parameters = sum(lies) - away
    inputs = group * microbatches * _FLOAT * (3 * shape.rows * shape.time + 2 * slots)  # tokens, segments, positions; documents, last
    size = _FLOAT if platform == "cpu" else model.compute.dtype.itemsize  # of a number of an activation
    layer = _Layer(model, grid, shape, slots, remat or model.compute.remat, platform, size)
    passed = optimizer is not None and train != "head"  # whether gradients go through the layers
    weights = max(_gathered(model, grid, shardings, size) * (2 if passed else 1), 2 * away // model.config.layers)
    work, head = layer.backward if passed else layer.forward, _head(model, grid, shape, size, backward=optimizer is not None)
    if optimizer is None:
        return Memory(parameters, 0, inputs, layer=work + weights, head=head)
    trained, _ = split_params(model.abstract, train)
    places, _ = split_params(shardings, train)
    state = sum(_shard_sizes(jax.eval_shape(optimizer.init, trained), optimizer.state_shardings(trained, places)))
    sizes = _shard_sizes(trained, places)
    whole = [size * _FLOAT // leaf.dtype.itemsize for size, leaf in zip(sizes, jax.tree.leaves(trained))]  # in float32
    gradients = sum(whole if platform == "cpu" else sizes) + (sum(whole) if microbatches > 1 else 0)
    kept = layer.kept * model.config.layers if passed else 0
    # Rules of elements work in place; rules of whole tensors hold float32 copies of the largest one.
    update = 3 * max(whole) if OPTIMIZERS[optimizer.name].per_tensor else 0
    if offload != "none":  # all that is updated is there for it
        state, update = 0, update + state + (away if train == "full" else 0)
    return Memory(parameters, state, inputs, gradients, kept, work + weights, head, update)


class _Layer:
    """Bytes of one layer's activations on a device.

    `kept`: for the backward pass. `forward`, `backward`: at work, the larger of the attention's and the MLP's moment, or their sum.
    """

    def __init__(self, model, grid, shape: Shape, slots: int, remat: str, platform: str, size: int):
        c, compute, tokens = model.config, model.compute, shape.rows * shape.time

        def split(n: int) -> float:  # features on a device: split over `model` where that divides them
            return n / grid.shape["model"] if n % grid.shape["model"] == 0 else n

        entry, out = tokens * c.embed, tokens * c.embed
        attended, qkv = tokens * split(c.heads) * c.head_dim, tokens * split((c.heads + 2 * c.kv_heads) * c.head_dim)
        up = tokens * split(c.mlp) * (1 if c.mlp_kind == "plain" else 2)
        if c.residual not in ("pre", "parallel"):
            out *= 2  # a norm behind the MLP reads its result too
        chosen = attention.choose(compute.attention, platform, c.kinds, c.causal, width=c.head_dim, dtype=compute.dtype,
                                  cap=c.attention_cap, time=shape.time, one_document=slots == 1)
        scores = split(c.heads) * shape.rows * shape.time**2 if chosen == "xla" else 0  # the others never store them
        products = qkv + up + out
        # Products are summed in float32 where something is added to them, and the policies of products keep the sums.
        sums = _FLOAT if c.qkv_bias or c.mlp_bias or compute.adapters else size
        self.kept = int({
            "full": size * entry, "nothing_saveable": size * entry, "none": size * (entry + products + attended),
            "dots_no_batch": size * entry + sums * products,
            "dots": size * (entry + attended) + sums * products + _FLOAT * scores,
            "everything_saveable": size * entry + _FLOAT * (2 * products + 2 * up + 3 * entry + attended + 3 * scores),
        }[remat])
        again = 0 if remat in ("none", "dots", "dots_no_batch", "everything_saveable") else products + attended
        copies = 4 if platform == "cpu" else 3  # of the scores, forward and backward; others fuse more of what is done to them
        self.backward = int(size * (again + products + attended) + _FLOAT * (2 * up + 2 * entry + copies * scores))
        self.forward = int(max(size * (qkv + attended + 2 * entry) + (copies - 1) * _FLOAT * scores, size * (2 * up + 2 * entry)))


def _gathered(model, grid, shardings, size: int) -> int:
    """Bytes of one layer's matrices as they are multiplied: gathered over `fsdp`, in the compute type; 0 where they lie there so."""
    if grid.shape["fsdp"] == 1 and size >= model.param_dtype.itemsize:
        return 0
    total = 0
    for (path, leaf), place in zip(mesh_lib.paths(model.abstract), jax.tree.leaves(shardings), strict=True):
        if path.startswith(_LAYERS) and path.endswith("kernel"):
            parts = grid.shape["model"] if "model" in place.spec else 1
            total += int(np.prod(leaf.shape[1:])) * size // parts
    return total


def _head(model, grid, shape: Shape, size: int, backward: bool) -> int:
    """Bytes of the output at work: final states, and of a language model the logits of some rows and the vocabulary's whole table."""
    c, copies = model.config, 3 if backward else 2
    states = shape.rows * shape.time * c.embed * size * copies
    if model.head != "lm":
        return states
    cells, rows = grid.shape["data"] * grid.shape["fsdp"], shape.rows
    at_once = max((r for r in range(1, rows + 1) if rows % r == 0 and cells * r * shape.time * c.vocab <= LOGITS_AT_ONCE), default=1)
    table = c.vocab * c.embed * size if grid.size > 1 or size < model.param_dtype.itemsize else 0
    return states + 2 * at_once * shape.time * c.vocab * _FLOAT + table * (copies - 1)


def of_program(compiled) -> int | None:
    """Bytes that a compiled program holds on a device at once, by the compiler's account; None where the backend gives none."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    return (found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes + found.temp_size_in_bytes
            + found.generated_code_size_in_bytes)
