"""The backbone: token ids in, hidden states out. One stack of layers with fields; a family fills the fields in.

Parameters (path: shape), all in `param_dtype`; which of them a model has, its Architecture says:

    embed/tokens/embedding                          [vocab, embed]
    embed/{positions,types}/embedding               [learned_positions | types, embed]
    embed/norm/{scale,bias}                         [embed]
    layers/{norm1,norm2,post1,post2}/{scale,bias}   [layers, embed]
    layers/attn/qkv/{kernel,bias}                   [layers, embed, (heads + 2*kv_heads)*head_dim], [layers, ...]
    layers/attn/{q,k,v}/{kernel,bias}               [layers, embed, heads*head_dim | kv_heads*head_dim], [layers, ...]
    layers/attn/{q_norm,k_norm}/scale               [layers, head_dim | all heads' features]
    layers/{scale1,scale2}/scale                    [layers, embed]
    layers/attn/out/{kernel,bias}                   [layers, heads*head_dim, embed], [layers, embed]
    layers/mlp/{up,gate}/{kernel,bias}              [layers, embed, mlp], [layers, mlp]
    layers/mlp/gate_up/{kernel,bias}                [layers, embed, 2*mlp], [layers, 2*mlp]
    layers/mlp/down/{kernel,bias}                   [layers, mlp, embed], [layers, embed]
    norm/{scale,bias}                               [embed]

and beside the kernel of a matrix with an adapter (models.lora), in float32: lora_a [layers, inputs, rank], lora_b [layers, rank, outputs].

The layers are built by one nnx.vmap and run by one jax.lax.scan: the program's size does not grow with the depth.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from w2s_jax.constraints import fetched, spread
from w2s_jax.models.architecture import Architecture
from w2s_jax.models.attention import angles, attend, check, prepare, rotate
from w2s_jax.models.dropout import ADAPTERS, ATTENTION, EMBEDDING, MLP, dropout, token_keys
from w2s_jax.models.layers import ACTIVATIONS, Compute, Embedding, Linear, Norm

# What a layer keeps for the backward pass; the rest is computed again. "none" keeps the result of every matrix product with
# weights and of the attention as a whole, so that only elementwise work and the attention's scores are repeated: faster than
# keeping everything (measured: -15% of a GPT-2-sized step on CPU, with less than half the memory), which is everything_saveable.
REMAT = {
    "none": jax.checkpoint_policies.save_only_these_names("linear", "attention"),
    "full": jax.checkpoint_policies.nothing_saveable,
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "everything_saveable": jax.checkpoint_policies.everything_saveable,
}


def _norm(arch: Architecture, compute: Compute, width: int | None = None, bias: bool | None = None) -> Norm:
    return Norm(arch.embed if width is None else width, arch.norm, arch.norm_eps, compute, bias=arch.norm_bias if bias is None else bias)


def _out_std(arch: Architecture) -> float:
    return arch.init_std / math.sqrt(2 * arch.layers) if arch.scaled_init else arch.init_std


class Embed(nnx.Module):
    """Token embedding (scaled) + learned positions + token type 0, then a norm: as many of these as the family has."""

    def __init__(self, arch: Architecture, compute: Compute, *, rngs: nnx.Rngs):
        table = lambda rows, std=arch.init_std: Embedding(rows, arch.embed, std, compute, rngs=rngs)  # noqa: E731
        self.tokens = table(arch.vocab, arch.embed_std or arch.init_std)
        self.positions = table(arch.learned_positions) if arch.learned_positions else nnx.data(None)
        self.types = table(arch.types) if arch.types else nnx.data(None)
        self.norm = _norm(arch, compute) if arch.embed_norm else nnx.data(None)
        self.offset, self.scale = arch.position_offset, arch.embed_scale

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        x = self.tokens(tokens, "backbone/embed/tokens/embedding")
        if self.scale != 1.0:
            x = x * jnp.asarray(self.scale, x.dtype)
        if self.types is not None:
            x = x + self.types(jnp.zeros_like(tokens), "backbone/embed/types/embedding")
        if self.positions is not None:
            x = x + self.positions(positions + self.offset if self.offset else positions, "backbone/embed/positions/embedding")
        return x if self.norm is None else self.norm(x)


class Attention(nnx.Module):
    """Multi-head attention. The matrices are the checkpoint's own, fused where it fuses them (Adafactor's statistics need that)."""

    def __init__(self, arch: Architecture, compute: Compute, *, rngs: nnx.Rngs):
        sizes = (arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim, arch.kv_heads * arch.head_dim)
        linear = lambda name, width: Linear(arch.embed, width, arch.init_std, compute, bias=arch.qkv_bias,  # noqa: E731
                                            adapter=compute.adapter(f"attn/{name}"), rngs=rngs)
        if arch.qkv == "split":
            self.q, self.k, self.v = (linear(name, size) for name, size in zip("qkv", sizes))
        else:
            self.qkv = linear("qkv", sum(sizes))
        if arch.qk_norm:
            whole = arch.qk_norm == "whole"
            self.q_norm = _norm(arch, compute, sizes[0] if whole else arch.head_dim, bias=False)
            self.k_norm = _norm(arch, compute, sizes[1] if whole else arch.head_dim, bias=False)
        self.out = Linear(sizes[0], arch.embed, _out_std(arch), compute, bias=arch.out_bias,
                          adapter=compute.adapter("attn/out"), rngs=rngs)
        self.arch = arch

    def _projections(self, x: jax.Array, drop) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [rows, time, heads, head_dim], keys and values [rows, time, kv_heads, head_dim]."""
        arch, (rows, time, _) = self.arch, x.shape
        if arch.qkv == "interleaved":
            qkv = spread(self.qkv(x, drop).reshape(rows, time, arch.heads, 3 * arch.head_dim), model=2)
            return tuple(jnp.split(qkv, 3, axis=-1))
        if arch.qkv == "fused":
            ends = (arch.heads * arch.head_dim, (arch.heads + arch.kv_heads) * arch.head_dim)
            q, k, v = self.qkv.parts(x, ends, drop)
        else:
            q, k, v = self.q(x, drop), self.k(x, drop), self.v(x, drop)
        if arch.qk_norm == "whole":
            q, k = self.q_norm(q, jnp.float32), self.k_norm(k, jnp.float32)
        q, k, v = (spread(t.reshape(rows, time, -1, arch.head_dim), model=2) for t in (q, k, v))
        if arch.qk_norm == "head":
            q, k = self.q_norm(q, jnp.float32), self.k_norm(k, jnp.float32)
        return q, k, v

    def __call__(self, x: jax.Array, plan, turns, layer: jax.Array, kind: jax.Array, drop) -> jax.Array:
        arch, (rows, time, _) = self.arch, x.shape
        q, k, v = self._projections(x, drop)
        if turns is not None:
            cos, sin = (a[0] if len(arch.kinds) == 1 else a[kind] for a in turns)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if arch.scale_by_layer:
            q = q / (layer + 1).astype(q.dtype)
        q, k = q.astype(x.dtype), k.astype(x.dtype)
        y = spread(attend(q, k, v, plan, arch.kinds, kind, scale=arch.attention_scale), model=2)
        return self.out(checkpoint_name(y.reshape(rows, time, -1), "attention"), drop)


class Mlp(nnx.Module):
    def __init__(self, arch: Architecture, compute: Compute, *, rngs: nnx.Rngs):
        linear = lambda name, width: Linear(arch.embed, width, arch.init_std, compute, bias=arch.mlp_bias,  # noqa: E731
                                            adapter=compute.adapter(f"mlp/{name}"), rngs=rngs)
        if arch.mlp_kind == "fused":
            self.gate_up = linear("gate_up", 2 * arch.mlp)
        else:
            self.up = linear("up", arch.mlp)
            if arch.mlp_kind == "gated":
                self.gate = linear("gate", arch.mlp)
        self.down = Linear(arch.mlp, arch.embed, _out_std(arch), compute, bias=arch.mlp_bias,
                           adapter=compute.adapter("mlp/down"), rngs=rngs)
        self.kind, self.activation, self.width = arch.mlp_kind, arch.activation, arch.mlp

    def __call__(self, x: jax.Array, drop) -> jax.Array:
        def act(y):  # in float32: one rounding at the end, and no cost, since it is fused
            return ACTIVATIONS[self.activation](y.astype(jnp.float32))

        if self.kind == "plain":
            return self.down(act(self.up(x, drop)).astype(x.dtype), drop)
        gate, up = self.gate_up.parts(x, (self.width,), drop) if self.kind == "fused" else (self.gate(x, drop), self.up(x, drop))
        return self.down((act(gate) * up.astype(jnp.float32)).astype(x.dtype), drop)


class Scale(nnx.Module):
    """One learned factor a feature (LayerScale, Touvron et al. 2021)."""

    def __init__(self, width: int, start: float, compute: Compute):
        self.scale = nnx.Param(jnp.full((width,), start, compute.param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        return (x.astype(jnp.float32) * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Layer(nnx.Module):
    """One transformer layer; where its norms stand, architecture.RESIDUAL says."""

    def __init__(self, arch: Architecture, compute: Compute, *, rngs: nnx.Rngs):
        if arch.residual in ("pre", "parallel", "sandwich"):
            self.norm1, self.norm2 = _norm(arch, compute), _norm(arch, compute)
        if arch.residual in ("branch", "sandwich", "post"):
            self.post1, self.post2 = _norm(arch, compute), _norm(arch, compute)
        self.attn = Attention(arch, compute, rngs=rngs)
        self.mlp = Mlp(arch, compute, rngs=rngs)
        scale = lambda: nnx.data(None) if arch.layer_scale is None else Scale(arch.embed, arch.layer_scale, compute)  # noqa: E731
        self.scale1, self.scale2 = scale(), scale()
        self.arch, self.rate = arch, compute.dropout

    def __call__(self, x: jax.Array, plan, turns, layer: jax.Array, kind: jax.Array, keys: jax.Array | None) -> jax.Array:
        residual = self.arch.residual
        drop = lambda y, site: dropout(y, keys, self.rate, site, layer)  # noqa: E731
        inner = lambda y, rate, site: dropout(y, keys, rate, ADAPTERS + site, layer)  # noqa: E731
        scaled = lambda scale, y: y if scale is None else scale(y)  # noqa: E731
        attn = lambda y: drop(scaled(self.scale1, self.attn(y, plan, turns, layer, kind, inner)), ATTENTION)  # noqa: E731
        mlp = lambda y: drop(scaled(self.scale2, self.mlp(y, inner)), MLP)  # noqa: E731
        add = lambda norm, y: (x.astype(jnp.float32) + norm(y, jnp.float32)).astype(x.dtype)  # noqa: E731
        if residual == "post":
            x = self.post1(x + attn(x))
            return self.post2(x + mlp(x))
        if residual == "branch":
            x = add(self.post1, attn(x))
            return add(self.post2, mlp(x))
        first = self.norm1(x)
        if not self.arch.first_norm:
            first = jnp.where(layer == 0, x, first)
        if residual == "parallel":
            return x + attn(first) + mlp(self.norm2(x))
        if residual == "sandwich":
            x = add(self.post1, attn(first))
            return add(self.post2, mlp(self.norm2(x)))
        x = x + attn(first)
        return x + mlp(self.norm2(x))


class Backbone(nnx.Module):
    """Embeddings, the stacked layers and the final norm."""

    def __init__(self, arch: Architecture, compute: Compute, *, rngs: nnx.Rngs):
        self.attention, self.dtype = compute.attention, compute.dtype
        check(self.attention, arch.kinds, arch.causal, width=arch.head_dim, dtype=self.dtype, cap=arch.attention_cap)
        self.embed = Embed(arch, compute, rngs=rngs)

        @nnx.split_rngs(splits=arch.layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return Layer(arch, compute, rngs=rngs)

        self.layers = stack(rngs)
        self.norm = _norm(arch, compute) if arch.final_norm else nnx.data(None)
        self.arch, self.remat, self.rate = arch, compute.remat, compute.dropout
        self.noisy = bool(compute.dropout or any(adapter.dropout for _, adapter in compute.adapters))

    def final_norm(self, x: jax.Array) -> jax.Array:
        """Per token: only those that are read need it."""
        return x if self.norm is None else self.norm(x)

    def __call__(self, tokens, segments, positions, dropout_key=None, one_document: bool = False):
        """Hidden states BEFORE the final norm, [rows, time, embed] in the compute type.

        `tokens`, `segments`, `positions`: int32 [rows, time]; see attention.prepare for who attends to whom, and for
        `one_document`.
        """
        x, body, kinds = self._start(tokens, segments, positions, dropout_key, one_document)

        def step(x, scanned):
            return body(x, *scanned), None

        # Inside a scan the loop's own boundary already keeps XLA from merging the two computations.
        step = jax.checkpoint(step, policy=REMAT[self.remat], prevent_cse=False)
        return jax.lax.scan(step, x, (self.layers, jnp.arange(self.arch.layers), kinds))[0]

    def read(self, tokens, segments, positions, states: tuple[int, ...], pick: Callable, one_document: bool = False):
        """`pick(x)` of some hidden states x [rows, time, embed], stacked in their order: [states, ...]. Not made for gradients.

        `states`: ascending numbers as in transformers' hidden_states: 0 = the embeddings, i = the output of layer i, the last
        one's after the final norm. What comes behind the last of them is not computed, and no other state is kept whole.
        """
        x, body, kinds = self._start(tokens, segments, positions, None, one_document)
        low, high = states[0], states[-1]

        def step(x, index):
            # The stack is indexed, not sliced: a slice would be a copy of its layers.
            layer = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), self.layers)
            return body(x, layer, index, kinds[index])

        x = jax.lax.scan(lambda x, index: (step(x, index), None), x, jnp.arange(low))[0]
        x, picked = jax.lax.scan(lambda x, index: (step(x, index), pick(x)), x, jnp.arange(low, high))
        end = pick(self.final_norm(x) if high == self.arch.layers else x)[None]
        return jnp.concatenate([picked[jnp.array([i - low for i in states[:-1]])], end]) if len(states) > 1 else end

    def _start(self, tokens, segments, positions, dropout_key, one_document: bool):
        """The embeddings [rows, time, embed], `body(x, layer's parameters, its number, its kind)`, and each layer's kind."""
        arch = self.arch
        keys = token_keys(dropout_key, segments, positions) if dropout_key is not None and self.noisy else None
        x = spread(dropout(self.embed(tokens, positions), keys, self.rate, EMBEDDING, 0))
        plan = prepare(segments, arch.kinds, arch.causal, width=arch.head_dim, dtype=self.dtype, cap=arch.attention_cap,
                       implementation=self.attention, one_document=one_document)
        turns = angles(positions, arch.kinds)

        def body(x, layer, index, kind):
            return spread(fetched(layer)(x, plan, turns, index, kind, keys))

        return x, body, jnp.asarray(arch.kind_of or (0,) * arch.layers)
