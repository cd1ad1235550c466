"""Devices, and where every array lives on them.

The models carry no sharding: ordered `(regex, specs)` rules over parameter paths do, first match wins
and every parameter must be covered (big_vision's `sharding.py` is the example). Axes: `data` holds
replicas, `fsdp` splits parameters and batch, `model` splits tensors. One device and a pod run the same code.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from w2s_jax.errors import UserError

AXES = ("data", "fsdp", "model")
BATCH = ("data", "fsdp")  # the axes that the cells of a batch are spread over

# Path regex -> specs of one layer's tensor, tried in order until one divides; none dividing = replicated.
# Stacked layers get a leading unsharded axis. Kernels are [in, out].
RULES: tuple[tuple[str, tuple[P, ...]], ...] = (
    (r"embed/tokens/embedding$", (P("model", "fsdp"), P(None, ("fsdp", "model")), P(None, "fsdp"), P("model", None))),
    (r"embed/(positions|types)/embedding$", (P(None, "fsdp"),)),
    (r"attn/(qkv|q|k|v)/kernel$", (P("fsdp", "model"), P("fsdp", None), P(None, "model"))),
    (r"mlp/(up|gate|gate_up)/kernel$", (P("fsdp", "model"), P("fsdp", None), P(None, "model"))),
    (r"(attn/out|mlp/down)/kernel$", (P("model", "fsdp"), P(None, "fsdp"), P("model", None))),
    (r"(qkv|q|k|v|up|gate|gate_up)/bias$", (P("model"),)),
    (r"(attn/out|mlp/down)/lora_a$", (P("model", None),)),
    (r"(attn/out|mlp/down)/lora_b$", (P(None, "fsdp"),)),
    (r"lora_a$", (P("fsdp", None),)),
    (r"lora_b$", (P(None, "model"),)),
    (r"lm_head/kernel$", (P("fsdp", "model"), P("fsdp", None), P(None, "model"))),
    (r"pooler/dense/kernel$", (P("fsdp", None),)),
    (r"head/dense\d/kernel$", (P("fsdp", "model"), P("fsdp", None), P(None, "model"))),
    (r"projector/(up|down)/kernel$", (P("fsdp", None),)),
    (r"head/kernel$", (P("fsdp", None),)),
    (r"embed/(class_token|registers|positions)$", (P(None, None, "fsdp"),)),
    (r"(conv\d?|patches)/kernel$", (P(None, None, None, "fsdp"),)),  # [height, width, in, out]
    (r"(scale|bias|mean|variance)$", (P(),)),
)


def make_mesh(shape, devices=None) -> Mesh:
    """A mesh with the axes `data`, `fsdp`, `model`.

    Args:
      shape: a mapping with those keys; -1 (at most once) takes the devices that the others leave.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [int(shape[a]) for a in AXES]
    asked = dict(zip(AXES, sizes))
    free = [i for i, s in enumerate(sizes) if s == -1]
    known = int(np.prod([s for s in sizes if s != -1]))
    if len(free) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise UserError(f"mesh: {asked} is not a shape; expected positive sizes and at most one -1")
    if free:
        sizes[free[0]] = max(len(devices) // known, 1)
    if int(np.prod(sizes)) > len(devices) or (free and len(devices) % known):
        raise UserError(f"mesh: {asked} does not fit the {len(devices)} devices here")
    used = np.asarray(devices[: int(np.prod(sizes))]).reshape(sizes)
    return Mesh(used, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def cells(mesh: Mesh) -> int:
    """Parts that a batch is cut into: one for each place along data x fsdp."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Cells along dimension `axis` spread over data x fsdp, everything else whole."""
    return NamedSharding(mesh, P(*([None] * axis), BATCH))


def axis_sizes(x: jax.Array) -> dict[str, int]:
    """Sizes of the mesh's axes where `x` [rows, ...] lies on several devices that rows divide over, else {}: inside a program that
    knows no mesh, or on one device, there is nothing to say."""
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty or mesh.size == 1 or not mesh.are_all_axes_auto or not set(AXES) <= set(mesh.shape):
        return {}
    return {} if x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) else dict(mesh.shape)


def spread(x: jax.Array, model: int | None = None) -> jax.Array:
    """`x` [rows, ...] inside a program: rows over data x fsdp as the batch lies, dimension `model` over that axis where it divides,
    everything else whole.

    Told nothing, the compiler takes the axis of `fsdp` for one of features as soon as it meets a parameter that is split over it: it
    gathers the rows and adds up partial products, tensor parallelism over every device.
    """
    sizes = axis_sizes(x)
    if not sizes:
        return x
    spec = [BATCH] + [None] * (x.ndim - 1)
    if model is not None and x.shape[model] % sizes["model"] == 0:
        spec[model] = "model"
    return jax.lax.with_sharding_constraint(x, NamedSharding(jax.typeof(x).sharding.mesh, P(*spec)))


def gathered(parameter: jax.Array, rows: jax.Array, model: int) -> jax.Array:
    """A parameter inside a program, whole but for dimension `model`, which lies over that axis where it divides. `rows`: an array of
    the batch, which knows the mesh."""
    sizes = axis_sizes(rows)
    if not sizes:
        return parameter
    spec: list[str | None] = [None] * parameter.ndim
    if parameter.shape[model] % sizes["model"] == 0:
        spec[model] = "model"
    return jax.lax.with_sharding_constraint(parameter, NamedSharding(jax.typeof(rows).sharding.mesh, P(*spec)))


def take_rows(table: jax.Array, ids: jax.Array, path: str, fill: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """`fill(table, ids)`, rows of a `table` [entries, embed] whose parameter has this `path`: [rows, time, embed] of ids [rows, time].

    On a mesh the table stays where it lies: the ids of an fsdp group come together (integers, cheap), every device reads its own
    columns of its own entries, and columns are exchanged for rows. Left to itself the compiler gathers the table.
    `fill` gives NaN for an id outside of the table that it is shown.
    """
    sizes = axis_sizes(ids)
    if not sizes:
        return fill(table, ids)
    mesh = jax.typeof(ids).sharding.mesh
    used = lambda axes: tuple(a for a in (axes if isinstance(axes, tuple) else (axes,)) if a and sizes[a] > 1)  # noqa: E731
    entries, split = (used(axes) for axes in (*spec(path, table.shape, mesh)[0], None, None)[:2])

    def local(table, ids):
        if "fsdp" in split:
            ids = jax.lax.all_gather(ids, "fsdp", tiled=True)
        if "model" in entries:
            own = ids - jax.lax.axis_index("model") * table.shape[0]
            known = (ids >= 0) & (ids < table.shape[0] * sizes["model"])
            mine = (own >= 0) & (own < table.shape[0]) | ~known
            x = fill(table, jnp.where(known, jnp.clip(own, 0, table.shape[0] - 1), table.shape[0]))
            x = jax.lax.psum(jnp.where(mine[..., None], x, 0), "model")
        else:
            x = fill(table, ids)
        if "model" in split:
            x = jax.lax.all_gather(x, "model", axis=2, tiled=True)
        if "fsdp" in split:
            x = jax.lax.all_to_all(x, "fsdp", split_axis=0, concat_axis=2, tiled=True)
        return x

    # What is gathered over an axis is the same along it, which the check cannot know.
    return jax.shard_map(local, mesh=mesh, in_specs=(P(entries, split), P(BATCH)), out_specs=P(BATCH),
                         check_vma="model" not in split)(table, ids)


def paths(tree) -> list[tuple[str, object]]:
    """`(path, leaf)` of a nested dict, path = keys joined by `/`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [("/".join(str(k.key) for k in path), leaf) for path, leaf in flat]


def map_paths(function, tree, *rest):
    """`function(path, leaf, ...)` over a nested dict."""
    return jax.tree_util.tree_map_with_path(lambda p, *x: function("/".join(str(k.key) for k in p), *x), tree, *rest)


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> tuple[P, bool]:
    """The spec of a parameter, and whether a preferred one was passed over because a dimension does not divide.

    Raises:
      ValueError: no rule covers the path (a defect of the model's port, not of the user's input).
    """
    stacked = "/layers/" in f"/{path}"
    inner = shape[1:] if stacked else shape
    for pattern, candidates in RULES:
        if re.search(pattern, path):
            for rank, candidate in enumerate(candidates):
                if _divides(candidate, inner, mesh):
                    return (P(None, *candidate) if stacked and len(candidate) else candidate), rank > 0
            return P(), True
    raise ValueError(f"no sharding rule covers the parameter {path}")


def _divides(candidate: P, shape: tuple[int, ...], mesh: Mesh) -> bool:
    if len(candidate) > len(shape):
        return False
    for size, axes in zip(shape, candidate):
        axes = (axes,) if isinstance(axes, str) else (axes or ())
        if size % int(np.prod([mesh.shape[a] for a in axes])):
            return False
    return True


def param_shardings(mesh: Mesh, abstract) -> tuple[dict, list[str]]:
    """Shardings for a nested dict of parameters, and the paths that fell back to a lesser rule."""
    fallen = [path for path, leaf in paths(abstract) if spec(path, leaf.shape, mesh)[1]]
    return map_paths(lambda path, leaf: NamedSharding(mesh, spec(path, leaf.shape, mesh)[0]), abstract), fallen
