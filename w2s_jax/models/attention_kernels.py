"""Fused attention kernels, all of them public API: splash on TPU, Pallas's Triton kernel and cuDNN on GPU.

Splash (`jax.experimental.pallas.ops.tpu.splash_attention`) takes segment ids, windows on either side, soft caps and grouped
queries; scores are masked block by block and never stored, so that memory grows with the row, not with its square.

Pallas's GPU kernel is `jax.experimental.pallas.ops.gpu.attention.mha`: segment ids in linear memory, forward and backward, an
interpreter to test it with, and it comes with jax. It has no windows, no soft caps, and grouped queries repeat keys and
values. tokamax 0.0.12, the other candidate, has all three, but its public `dot_product_attention` takes no segment ids:
packed rows would need a dense boolean mask, quadratic memory, which is what a kernel is there to avoid; and it brings
pydantic, qwix, jaxtyping, tensorboardX and an exact `typeguard==2.13.3`. So mha it is, where somebody asks for it.

cuDNN, through `jax.nn.dot_product_attention`, has no segment ids in public API (a mask becomes a dense bias), only lengths:
it serves rows that hold one document, and `cudnn` below answers NaN for any other.

Kernels are imported where they are used: most machines run none, or another one.

XLA cannot partition a kernel: `split` runs it on each device's own rows and heads. (cuDNN brings its own partitioning.)
"""

import re

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from w2s_jax.mesh import BATCH

INTERPRET = False  # tests set it: the kernels run in Pallas's interpreter, XLA stands in for cuDNN, and no backend is refused

LANES = 128  # splash's rows of queries and keys come in multiples of it
PLATFORM = {"splash": "tpu", "pallas": "gpu", "cudnn": "gpu"}


def refusal(implementation: str, platform: str, windows, causal: bool, width: int, dtype, cap: float | None) -> str | None:
    """Why a kernel cannot serve a model on a platform (None = it can). Row lengths are never a reason: rows are padded."""
    if PLATFORM[implementation] != platform and not INTERPRET:
        return f"needs a {PLATFORM[implementation].upper()}, and jax runs on {platform} here"
    windowed = any(window is not None for window in windows)
    if implementation == "splash":
        return None
    if cap is not None:
        return f"has no soft cap of scores, and the model's is {cap:g}"
    if implementation == "pallas":
        return "has no windows, and some of the model's layers attend within one" if windowed else None
    if windowed and not causal:
        return "has windows for decoders only, and the model is an encoder with windows"
    if dtype != jnp.bfloat16:
        return f"computes in bfloat16 only, and dtype is {dtype.name}"
    capability = _capability()
    if capability < (8, 0):
        return f"needs a GPU of compute capability 8.0, and this one's is {capability[0]}.{capability[1]}"
    widest = 256 if capability >= (9, 0) else 128
    if width % 8 or width > widest:
        return f"needs heads of a multiple of 8 and at most {widest} features, and the model's have {width}"
    return None


def _capability() -> tuple[int, int]:
    """Compute capability of the GPU here: (9, 0) where the GPU meant is not here, (0, 0) where it is not NVIDIA's."""
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(jax.local_devices()[0], "compute_capability", "9.0")))
    return (int(found[1]), int(found[2])) if found else (0, 0)


# ---------------------------------------------------------------- devices


def split(function, mesh, shape: tuple[int, ...], kv_heads: int):
    """`function(q, k, v, segments, *rest)` of one device as a function of the whole arrays; `rest` is the same everywhere.

    Rows are cut over data x fsdp as the batch is, heads over `model` where both kinds of head divide; what does not divide
    is computed on every device. `mesh`: where the arrays live, as the trace knows it; `shape`: the queries' [rows, time,
    heads, width].
    """
    if mesh.size == 1 or not mesh.are_all_axes_auto:
        return function
    axes = tuple(a for a in BATCH if a in mesh.shape)
    parts = 1
    for axis in axes:
        parts *= mesh.shape[axis]
    rows = axes if axes and shape[0] % parts == 0 else None
    model = mesh.shape.get("model", 1)
    heads = "model" if model > 1 and shape[2] % model == 0 and kv_heads % model == 0 else None
    wide = P(rows, None, heads, None)

    def whole(q, k, v, segments, *rest):
        # A kernel's outputs say nothing of the axes they vary over, so that this cannot be checked.
        mapped = jax.shard_map(function, mesh=mesh, in_specs=(wide, wide, wide, P(rows), *[P()] * len(rest)), out_specs=wide,
                               check_vma=False)
        return mapped(q, k, v, segments, *rest)

    return whole


def _pad(size: int, *arrays) -> list[jax.Array]:
    """Zeros behind axis 1 up to `size`: keys of segment 0 that no document sees, queries that are cut off again."""
    return [a if a.shape[1] == size else jnp.pad(a, [(0, 0), (0, size - a.shape[1])] + [(0, 0)] * (a.ndim - 2)) for a in arrays]


# ---------------------------------------------------------------- splash


def splash_kernels(time: int, windows, causal: bool, cap: float | None) -> tuple:
    """A kernel for each window, for rows of `time` padded to LANES. A tuple of pytrees of small integer arrays."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash_lib

    size = -(-time // LANES) * LANES
    block = next(b for b in (512, 256, LANES) if size % b == 0)
    blocks = splash_lib.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip

    def mask(window):
        if window is None:
            return splash_lib.CausalMask((size, size)) if causal else splash_lib.FullMask((size, size))
        return splash_lib.LocalMask((size, size), (window - 1, 0) if causal else (window, window), offset=0)

    # One mask in place of one a head: splash reads a single one for however many heads a device has.
    return tuple(splash_lib.make_splash_mha_single_device(
        splash_lib.MultiHeadMask([mask(window)]), block_sizes=blocks, attn_logits_soft_cap=cap, interpret=INTERPRET,
    ) for window in windows)  # fmt: skip


def splash(q, k, v, segments, which, kernels, *, scale: float) -> jax.Array:
    """[rows, time, heads, width] on one TPU core. `segments`: int32 [rows, time]; `which`: index into `kernels`, traced."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash_lib

    time = q.shape[1]
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    q, k, v, segments = _pad(-(-time // LANES) * LANES, q, k, v, segments)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))

    def run(kernel):
        def row(q, k, v, segments):
            return kernel(q, k, v, segment_ids=splash_lib.SegmentIds(q=segments, kv=segments))
        return jax.vmap(row)

    def layer(q, k, v, segments, which, kernels):
        branches = [run(kernel) for kernel in kernels]
        return branches[0](q, k, v, segments) if len(branches) == 1 else jax.lax.switch(which, branches, q, k, v, segments)

    out = _at_precision(layer, _mosaic_precision(q.dtype))(q, k, v, segments, which, kernels)
    return jnp.swapaxes(out, 1, 2)[:, :time]


def _mosaic_precision(dtype) -> str:
    """The matmul precision that is set, as far as the TPU's kernel compiler has it: it knows no `high`, and fails on `highest`
    with bfloat16, whose products are exact in float32 at any precision."""
    asked = jax.config.jax_default_matmul_precision
    return "default" if dtype == jnp.bfloat16 or asked in (None, "default", "bfloat16") else "highest"


def _at_precision(function, precision: str):
    """`function` with its forward and its backward pass at one matmul precision. A context manager around the call would not
    do: the backward pass is traced later, outside of it."""
    def forward(*x):
        with jax.default_matmul_precision(precision):
            return jax.vjp(function, *x)

    def backward(pull, cotangent):
        with jax.default_matmul_precision(precision):
            return pull(cotangent)

    @jax.custom_vjp
    def call(*x):
        with jax.default_matmul_precision(precision):
            return function(*x)

    call.defvjp(forward, backward)
    return call


# ---------------------------------------------------------------- Pallas on GPU


def pallas(q, k, v, segments, *, scale: float, causal: bool) -> jax.Array:
    """[rows, time, heads, width] on one GPU; see `splash`. Blocks are powers of two, so that rows are padded to whole ones."""
    from jax.experimental.pallas.ops.gpu import attention as gpu_lib

    time, groups = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (x if groups == 1 else jnp.repeat(x, groups, axis=2) for x in (k, v))
    size = -(-time // 128) * 128 if time > 64 else (64 if time > 32 else 32)
    q, k, v, segments = _pad(size, q, k, v, segments)
    return gpu_lib.mha(q, k, v, segments, sm_scale=scale, causal=causal, interpret=INTERPRET)[:, :time]


# ---------------------------------------------------------------- cuDNN


def lengths(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens of each row's document, int32 [rows], and whether the row holds that one document from its start, bool [rows]."""
    count = jnp.sum(segments != 0, axis=1, dtype=jnp.int32)
    inside = jnp.arange(segments.shape[1]) < count[:, None]
    return count, jnp.all(segments == jnp.where(inside, segments[:, :1], 0), axis=1)


def cudnn(q, k, v, segments, *, scale: float, causal: bool, window: int | None) -> jax.Array:
    """[rows, time, heads, width] for rows that hold one document, or none; NaN in every other row.

    NaN and no error, since what a row holds is known only when the program runs: the trainer stops on it, and so does
    labelling. Padding gives zeros.
    """
    count, alone = lengths(segments)
    count = jnp.maximum(count, 1)  # a softmax over nothing is not finite
    # With a window the lengths are left out (jax's own tests have windows without them only): a decoder's document never
    # sees the padding behind it.
    limits = {"local_window_size": (window - 1, 0)} if window is not None else {"query_seq_lengths": count, "key_value_seq_lengths": count}
    out = jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=causal, implementation="xla" if INTERPRET else "cudnn", **limits)
    good = (segments != 0) & alone[:, None]
    rest = jnp.where(alone, 0, jnp.nan).astype(out.dtype)
    return jnp.where(good[:, :, None, None], out, rest[:, None, None, None])
