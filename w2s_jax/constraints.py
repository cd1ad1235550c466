"""Where the arrays inside a program lie: rows as the batch does, heads over `model`, tables where their parameters are.

The compiler carries the parameters' shardings (mesh.py's rules) through a program by itself, but not always to where they should go;
what stands here says it in the few places that decide the rest. Nothing here changes a number, and in a program that knows no mesh, or
on one device, nothing is said.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from w2s_jax.mesh import AXES, BATCH, spec


def axis_sizes(x: jax.Array) -> dict[str, int]:
    """Sizes of the mesh's axes where `x` [rows, ...] lies on several devices that rows divide over, else {}."""
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
    axes = [BATCH] + [None] * (x.ndim - 1)
    if model is not None and x.shape[model] % sizes["model"] == 0:
        axes[model] = "model"
    return jax.lax.with_sharding_constraint(x, NamedSharding(jax.typeof(x).sharding.mesh, P(*axes)))


def fetched(tree):
    """A tree of arrays of any shape inside a program, those that lie in the host's memory brought to the device, where they keep their
    sharding; their gradients go the way back."""
    def bring(x):
        return jax.device_put(x, jax.memory.Space.Device) if jax.typeof(x).memory_space == jax.memory.Space.Host else x
    return jax.tree.map(bring, tree)


def gathered(parameter: jax.Array, rows: jax.Array, model: int) -> jax.Array:
    """A parameter inside a program, whole but for dimension `model`, which lies over that axis where it divides. `rows`: an array of
    the batch, which knows the mesh."""
    sizes = axis_sizes(rows)
    if not sizes:
        return parameter
    axes: list[str | None] = [None] * parameter.ndim
    if parameter.shape[model] % sizes["model"] == 0:
        axes[model] = "model"
    return jax.lax.with_sharding_constraint(parameter, NamedSharding(jax.typeof(rows).sharding.mesh, P(*axes)))


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
