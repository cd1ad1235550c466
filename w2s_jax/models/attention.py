"""Attention inside documents, behind one function: `prepare` once for a batch, `attend` in every layer.

Every implementation keeps packed documents apart; tests hold each against the others.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from w2s_jax.models.architecture import Kind

IMPLEMENTATIONS = ("auto", "xla")


class Plan(NamedTuple):
    """What all layers share. `masks`: bool [rows, 1, time, time], one for each window that occurs."""

    masks: tuple[jax.Array, ...]
    windows: tuple[int | None, ...]


def prepare(segments: jax.Array, kinds: tuple[Kind, ...], causal: bool) -> Plan:
    """The plan of a batch. `segments`: int32 [rows, time], 0 = padding, else one number for each document of a row.

    A token attends to tokens of its own segment, earlier ones only if `causal`, within the window of the layer's kind.
    Padding attends to padding: finite, and read by nobody. Documents lie in one piece, so that places in a row are as far
    apart as positions in the document.
    """
    windows = tuple(dict.fromkeys(kind.window for kind in kinds))
    time = segments.shape[1]
    same = segments[:, :, None] == segments[:, None, :]
    behind = jnp.arange(time)[:, None] - jnp.arange(time)[None, :]  # how far the key lies behind the query

    def mask(window):
        near = behind >= 0 if causal else None
        if window is not None:
            near = (behind >= 0) & (behind < window) if causal else jnp.abs(behind) <= window
        return (same if near is None else same & near)[:, None]

    return Plan(tuple(mask(w) for w in windows), windows)


def attend(q, k, v, plan: Plan, kinds: tuple[Kind, ...], kind, *, scale: float, cap: float | None, implementation: str) -> jax.Array:
    """[rows, time, heads, width], from queries `q` of that shape and `k`, `v` [rows, time, kv_heads, width].

    `kind`: index into `kinds` of this layer (traced); `scale` multiplies the scores; `cap`: then cap * tanh(score / cap).
    """
    masks = plan.masks
    if len(masks) == 1:
        mask = masks[0]
    else:
        which = jnp.asarray([plan.windows.index(k.window) for k in kinds])[kind]
        mask = jax.lax.select_n(which, *masks) if len(masks) == 2 else jnp.stack(masks)[which]
    if cap is None:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="xla")
    return _capped(q, k, v, mask, scale, cap)


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
