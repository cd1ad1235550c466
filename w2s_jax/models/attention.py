"""Attention inside documents, behind one function: `prepare` once for a batch, `attend` in every layer.

    xla      everywhere: masks, scores stored
    splash   TPU: segment ids, scores never stored
    pallas   GPU: segment ids, scores never stored; no windows, no soft caps
    cudnn    GPU: rows that hold one document each, NaN in every other row
    auto     what `choose` says

attention_kernels.py holds the last three. Every implementation keeps packed documents apart; tests hold each against a dense
reference, and change one document to see that the others' outputs stay the same bit for bit.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from w2s_jax.errors import UserError
from w2s_jax.models import attention_kernels as kernels_lib
from w2s_jax.models.architecture import Kind

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash", "pallas")


@dataclass(frozen=True)
class Plan:
    """What all layers share. `masks`: bool [rows, 1, time, time], one for each window that occurs, for xla (None = everybody sees
    everybody); `segments` for the others; `kernels`: splash's, one for each window. `mesh`: where the batch lives (empty = one
    device, or not known)."""

    implementation: str
    windows: tuple[int | None, ...]
    causal: bool
    cap: float | None
    mesh: jax.sharding.AbstractMesh
    segments: jax.Array
    masks: tuple[jax.Array | None, ...] = ()
    kernels: tuple = ()


def _windows(kinds: tuple[Kind, ...]) -> tuple[int | None, ...]:
    return tuple(dict.fromkeys(kind.window for kind in kinds))


def choose(implementation: str, platform: str, kinds: tuple[Kind, ...], causal: bool, *, width: int, dtype, cap: float | None,
           time: int = 0, one_document: bool = False) -> str:
    """The implementation that serves a model (`width`: features of a head) on rows of `time` tokens on a platform.

    auto on a TPU: splash where rows are multiples of its lanes, else xla: padding 64 tokens to 128 would quadruple the work.
    auto on a GPU: cudnn where the shapes say that a row holds one document; packed rows go to xla, NOT because it was found
    faster than pallas: nobody has measured that yet, and `--config.attention=pallas` with the benchmark would.
    auto elsewhere: xla.

    Raises:
      UserError: one was asked for by name that cannot serve this model or this platform.
    """
    can = lambda name: kernels_lib.refusal(name, platform, _windows(kinds), causal, width, jnp.dtype(dtype), cap)  # noqa: E731
    if implementation == "auto":
        if platform == "tpu" and time and time % kernels_lib.LANES == 0 and can("splash") is None:
            return "splash"
        return "cudnn" if platform == "gpu" and one_document and can("cudnn") is None else "xla"
    if implementation != "xla" and (why := can(implementation)) is not None:
        raise UserError(f"attention={implementation!r} {why}; expected auto or xla")
    return implementation


def check(implementation: str, kinds: tuple[Kind, ...], causal: bool, **model) -> None:
    """UserError where this process's backend or the model refuses the implementation, before anything is computed."""
    if implementation not in ("auto", "xla"):  # these serve every model, and no device need be asked
        choose(implementation, jax.default_backend(), kinds, causal, **model)


def prepare(segments: jax.Array, kinds: tuple[Kind, ...], causal: bool, *, width: int, dtype, cap: float | None,
            implementation: str, one_document: bool = False, whole: bool = False) -> Plan:
    """The plan of a batch. `segments`: int32 [rows, time], 0 = padding, else one number for each document of a row.

    A token attends to tokens of its own segment, earlier ones only if `causal`, within the window of the layer's kind.
    Padding attends to padding: finite, and read by nobody. Documents lie in one piece, so that places in a row are as far
    apart as positions in the document. `cap`: scores become cap * tanh(score / cap). `one_document`: the caller knows from
    the batch's shapes that no row holds two; `whole`: that one fills every row (images), so that nothing is masked but by windows.
    """
    windows, time = _windows(kinds), segments.shape[1]
    mesh = jax.typeof(segments).sharding.mesh
    platform = jax.default_backend() if mesh.empty or mesh.abstract_device is None else mesh.abstract_device.platform
    chosen = choose(implementation, platform, kinds, causal, width=width, dtype=dtype, cap=cap, time=time, one_document=one_document)
    plan = (chosen, windows, causal, cap, mesh, segments)
    if chosen == "splash":
        return Plan(*plan, kernels=kernels_lib.splash_kernels(time, windows, causal, cap))
    if chosen != "xla":
        return Plan(*plan)
    same = segments[:, :, None] == segments[:, None, :]
    behind = jnp.arange(time)[:, None] - jnp.arange(time)[None, :]  # how far the key lies behind the query

    def mask(window):
        near = behind >= 0 if causal else None
        if window is not None:
            near = (behind >= 0) & (behind < window) if causal else jnp.abs(behind) <= window
        if whole:
            return None if near is None else near[None, None]
        return (same if near is None else same & near)[:, None]

    return Plan(*plan, masks=tuple(mask(w) for w in windows))


def attend(q, k, v, plan: Plan, kinds: tuple[Kind, ...], kind, *, scale: float) -> jax.Array:
    """[rows, time, heads, width], from queries `q` of that shape and `k`, `v` [rows, time, kv_heads, width].

    `kind`: index into `kinds` of this layer (traced); `scale` multiplies the scores.
    """
    windows, chosen = plan.windows, plan.implementation
    which = 0 if len(windows) == 1 else jnp.asarray([windows.index(k.window) for k in kinds])[kind]
    if chosen == "xla":
        return _xla(q, k, v, plan, which, scale)
    if chosen == "cudnn":
        run = lambda window: lambda *x: kernels_lib.cudnn(*x, scale=scale, causal=plan.causal, window=window)  # noqa: E731
        branches = [run(window) for window in windows]
        operands = (q, k, v, plan.segments)
        return branches[0](*operands) if len(windows) == 1 else jax.lax.switch(which, branches, *operands)
    if chosen == "splash":
        function = lambda *x: kernels_lib.splash(*x, scale=scale)  # noqa: E731
        rest = (jnp.asarray(which), plan.kernels)
    else:
        function, rest = lambda *x: kernels_lib.pallas(*x, scale=scale, causal=plan.causal), ()
    return kernels_lib.split(function, plan.mesh, q.shape, k.shape[2])(q, k, v, plan.segments, *rest)


def _xla(q, k, v, plan: Plan, which, scale: float) -> jax.Array:
    masks = plan.masks
    if len(masks) == 1:
        mask = masks[0]
    else:
        mask = jax.lax.select_n(which, *masks) if len(masks) == 2 else jnp.stack(masks)[which]
    if plan.cap is None:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="xla")
    return _capped(q, k, v, mask, scale, plan.cap)


def _capped(q, k, v, mask, scale: float, cap: float) -> jax.Array:
    """Attention with soft-capped scores (Gemma 2), which jax.nn.dot_product_attention does not have."""
    rows, time, heads, width = q.shape
    groups = heads // k.shape[2]
    q = q.reshape(rows, time, k.shape[2], groups, width)
    scores = jnp.einsum("rtkgd,rskd->rkgts", q, k, preferred_element_type=jnp.float32)
    scores = cap * jnp.tanh(scores * (scale / cap))
    weights = jax.nn.softmax(jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min), axis=-1).astype(v.dtype)
    return jnp.einsum("rkgts,rskd->rtkgd", weights, v).reshape(rows, time, heads, width)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the first features of `x` [rows, time, heads, width] by `cos`, `sin` [rows, time, pairs]; float32 inside."""
    pairs = cos.shape[-1]
    turned, rest = x[..., : 2 * pairs].astype(jnp.float32), x[..., 2 * pairs :]
    a, b = turned[..., :pairs], turned[..., pairs:]
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def angles(positions: jax.Array, kinds: tuple[Kind, ...]) -> tuple[jax.Array, jax.Array] | None:
    """Cosines and sines, float32 [kinds, rows, time, pairs], for `positions` int32 [rows, time]; None without rotary embedding."""
    if kinds[0].rope is None:
        return None
    turns = [positions[..., None].astype(jnp.float32) * jnp.asarray(kind.rope.frequencies, jnp.float32) for kind in kinds]
    return (jnp.stack([jnp.cos(t) * kind.rope.scale for t, kind in zip(turns, kinds)]),
            jnp.stack([jnp.sin(t) * kind.rope.scale for t, kind in zip(turns, kinds)]))
