"""Devices, and where every array lives on them.

The models carry no sharding: ordered `(regex, specs)` rules over parameter paths do, first match wins
and every parameter must be covered (big_vision's `sharding.py` is the example). Axes: `data` holds
replicas, `fsdp` splits parameters and batch, `model` splits tensors. One device and a pod run the same code.
"""

from __future__ import annotations

import re

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from w2s_jax.errors import UserError

AXES = ("data", "fsdp", "model")
BATCH = ("data", "fsdp")  # the axes that the cells of a batch are spread over
HOST = "pinned_host"  # the kind of memory that offloaded arrays lie in

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
    used = devices[: int(np.prod(sizes))]
    if idle := {d.process_index for d in devices} - {d.process_index for d in used}:
        raise UserError(f"mesh: {asked} leaves process {min(idle)} of {jax.process_count()} without a device; expected all {len(devices)}")
    if used[0].platform == "tpu" and len(used) > 1:  # neighbours in the torus are neighbours along an axis
        grid = mesh_utils.create_device_mesh(sizes, used, allow_split_physical_axes=True)
    else:
        grid = np.asarray(used).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def cells(mesh: Mesh) -> int:
    """Parts that a batch is cut into: one for each place along data x fsdp."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Cells along dimension `axis` spread over data x fsdp, everything else whole."""
    return NamedSharding(mesh, P(*([None] * axis), BATCH))


def own_cells(mesh: Mesh) -> np.ndarray:
    """The cells of a batch that this process's devices hold, ascending, int `[own]`."""
    here = [d.process_index == jax.process_index() for d in mesh.devices.reshape(-1)]
    return np.flatnonzero(np.asarray(here).reshape(cells(mesh), -1).any(axis=1))


def put(value, sharding):
    """An array, or a tree of them, from the host onto devices; each process has the whole value and places its parts.

    `sharding`: one for all, or a tree of them.
    """
    if isinstance(sharding, jax.sharding.Sharding):
        one = sharding
        sharding = jax.tree.map(lambda _: one, value)

    def place(leaf, sharding):
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])
    return jax.tree.map(place, value, sharding)


def put_cells(array: np.ndarray, mesh: Mesh, axis: int) -> jax.Array:
    """A batch's array on the devices, of which this process has the cells `own_cells` along `axis`."""
    sharding = batch_sharding(mesh, axis)
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    count, own = cells(mesh), own_cells(mesh)

    def part(index):
        at = range(*index[axis].indices(count))
        return array[(*index[:axis], slice(int(np.searchsorted(own, at.start)), int(np.searchsorted(own, at.stop))), *index[axis + 1:])]
    return jax.make_array_from_callback((*array.shape[:axis], count, *array.shape[axis + 1:]), sharding, part)


def fetch(tree):
    """Arrays from the devices as a whole, in every process, numpy; all processes must ask together for what they share."""
    def get(leaf):
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)
    return jax.tree.map(get, tree)


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


def on_host(path: str, offload: str) -> bool:
    """Whether the parameter at `path` lies in the host's memory: of the layers the matrices, with offload="params"."""
    return offload == "params" and "/layers/" in path and path.endswith("/kernel")


def param_shardings(mesh: Mesh, abstract, offload: str = "none") -> tuple[dict, list[str]]:
    """Shardings for a nested dict of parameters, and the paths that fell back to a lesser rule."""
    fallen = [path for path, leaf in paths(abstract) if spec(path, leaf.shape, mesh)[1]]

    def place(path, leaf):
        found = NamedSharding(mesh, spec(path, leaf.shape, mesh)[0])
        return found.with_memory_kind(HOST) if on_host(path, offload) else found
    return map_paths(place, abstract), fallen


def lesser(model, mesh: Mesh) -> list[str]:
    """What does not divide over the mesh, and lies there in a lesser way, or whole: parameters, by their paths, and attention's heads."""
    if mesh.size == 1:
        return []
    split, found = mesh.shape["model"], param_shardings(mesh, model.abstract)[1]
    for name in ("heads", "kv_heads"):  # image networks have none to say
        count = getattr(model.config, name, split)
        if count % split:
            found.append(f"{name} ({count} over model={split}: every device has them all)")
    return found
