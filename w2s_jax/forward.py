"""Forward passes over whole sets of documents, and the process's store of compiled programs."""

from __future__ import annotations

import collections
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from w2s_jax import distributed
from w2s_jax import mesh as mesh_lib
from w2s_jax.data import packing
from w2s_jax.errors import UserError

# XLA gives a CPU's matrix products to YNNPACK, whose forward ones took 25% longer than Eigen's (148 and 187 GFLOP/s on 2 AVX-512
# cores, GPT-2's shapes); training gained nothing from the change, since Eigen is as much slower on the transposed ones.
_OPTIONS = {"cpu": {"xla_cpu_experimental_ynn_fusion_type": ""}}

_compiled: dict = {}


def compiled(key, make: Callable, stats: dict | None = None):
    """The compiled program of `key`, made at its first use in this process.

    `stats["programs"]` collects the keys that a run used, `stats["compile_seconds"]` the time that it waited.
    """
    key = (key, jax.config.jax_default_matmul_precision)
    if key not in _compiled:
        start = time.perf_counter()
        _compiled[key] = make()
        if stats is not None:
            stats["compile_seconds"] = stats.get("compile_seconds", 0.0) + time.perf_counter() - start
    if stats is not None:
        stats.setdefault("programs", set()).add(key)
    return _compiled[key]


def make_room(maps: int | None = None) -> bool:
    """Forget this process's compiled programs once they are many: to be called between runs. Says whether it did.

    On a CPU a program holds ten memory maps and more, of which Linux gives a process 65530 (vm.max_map_count); LLVM aborts at
    the next one. `maps`: how many are many; None = a quarter of what the kernel gives. Elsewhere than on Linux nothing is known
    of them, and nothing is done.
    """
    there, limit = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
    if not there.exists() or not limit.exists():
        return False
    many = int(limit.read_text()) // 4 if maps is None else maps
    if not any(distributed.everywhere("make_room", there.read_bytes().count(b"\n") > many)):  # all compile again, or none
        return False
    _compiled.clear()
    jax.clear_caches()
    gc.collect()
    return True


def lower(function: Callable, params, arrays, **place) -> jax.stages.Lowered:
    """The program of a forward pass, ready to be compiled; arrays, or their shapes with shardings."""
    return jax.jit(function, **place).lower(params, arrays)


def _compile(lowered):
    """Compile a forward pass with the backend's `_OPTIONS`, or without where this version of jax does not know them."""
    options = _OPTIONS.get(jax.default_backend())
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError:
        if not options:
            raise
        return lowered.compile()


def predict(model, params, tokens: Sequence[np.ndarray], mesh, *, tokens_per_batch: int, stats: dict | None = None,
            progress=None, extra: dict[str, np.ndarray] | None = None) -> np.ndarray:
    """Outputs for every document, float32 `[documents, classes]`, in the documents' order.

    Documents are packed once for speed, in any order; a pass compiles one or two programs. `extra`: further arrays
    `[documents, ...]` that `model.apply` asks for; its batch holds them as `[cells, slots, ...]`.
    """
    batches = pack(tokens, mesh, embed=model.config.embed, tokens_per_batch=tokens_per_batch)
    own = mesh_lib.own_cells(mesh)
    for batch in batches:  # an empty slot holds anything
        batch.arrays.update({k: v[np.maximum(batch.documents[own], 0)] for k, v in (extra or {}).items()})
    return forward(model, params, batches, len(tokens), mesh, stats=stats, progress=progress)


def pack(tokens: Sequence[np.ndarray], mesh, **layout) -> list[packing.EvalBatch]:
    """The batches of a set of documents, filled where this process's devices need them; see `packing.forward_batches`."""
    return packing.forward_batches(tokens, mesh_lib.own_cells(mesh), cells=mesh_lib.cells(mesh), **layout)


def passes(name, function: Callable, params, batches: Iterable, mesh, *, stats=None,
           progress=None) -> Iterator[tuple[packing.EvalBatch, np.ndarray]]:
    """`function(params, arrays)` of each batch in order, on the host, while the device works on the next ones.

    `name`: hashable, what the function is (its model included); equal names share compiled programs. `batches`: as
    `packing.EvalBatch`; they may be made as they are asked for.
    """
    # Each of several processes gets all of what comes out.
    place = {} if distributed.processes() == 1 else {"out_shardings": mesh_lib.replicated(mesh)}
    offloaded = any(leaf.sharding.memory_kind == mesh_lib.HOST for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array))
    waiting = collections.deque()

    def collect(keep: int):
        while len(waiting) > keep:
            batch, outputs = waiting.popleft()
            yield batch, np.asarray(outputs)
            if progress is not None:
                progress.update(int((batch.documents >= 0).sum()), tokens=batch.useful)

    for batch in batches:
        arrays = {k: mesh_lib.put_cells(v, mesh, 0) for k, v in batch.arrays.items()}
        shapes = tuple((k, a.shape) for k, a in sorted(batch.arrays.items()) if k not in ("segments", "positions"))
        call = compiled((name, mesh, shapes, offloaded), lambda arrays=arrays: _compile(lower(function, params, arrays, **place)), stats)
        waiting.append((batch, call(params, arrays)))
        yield from collect(keep=2)
    yield from collect(keep=0)


def forward(model, params, batches: Iterable, documents: int, mesh, *, stats=None, progress=None) -> np.ndarray:
    """`predict` over batches that are made already (evaluations every N steps pack once), or as they are asked for; see `passes`."""
    out = None
    for batch, logits in passes((model, "forward"), model.apply, params, batches, mesh, stats=stats, progress=progress):
        if out is None:
            out = np.full((documents, logits.shape[-1]), np.nan, np.float32)
        real = batch.documents >= 0
        out[batch.documents[real]] = logits[real]
    if out is None or np.isnan(out).any():
        raise UserError("the model's outputs are not finite" if out is not None else "no document to label")
    return out
