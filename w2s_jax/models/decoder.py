"""The decoder: token ids in, hidden states out. One stack of layers with fields; a family fills the fields in.

Parameters (path: shape), all in `param_dtype`:

    embed/tokens/embedding        [vocab, embed]
    embed/positions/embedding     [max_positions, embed]
    layers/norm1/{scale,bias}     [layers, embed]
    layers/attn/qkv/kernel, bias  [layers, embed, 3*embed], [layers, 3*embed]
    layers/attn/out/kernel, bias  [layers, embed, embed], [layers, embed]
    layers/norm2/{scale,bias}     [layers, embed]
    layers/mlp/up/kernel, bias    [layers, embed, mlp], [layers, mlp]
    layers/mlp/down/kernel, bias  [layers, mlp, embed], [layers, embed]
    norm/{scale,bias}             [embed]

The layers are built by one nnx.vmap and run by one jax.lax.scan: the program's size does not grow with the depth.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from w2s_jax.models.dropout import ATTENTION, EMBEDDING, MLP, dropout, token_keys

ACTIVATIONS = {
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}

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

ATTENTION_IMPLEMENTATIONS = {"auto": None, "xla": "xla"}


@dataclass(frozen=True)
class DecoderConfig:
    """The numbers of an architecture, read from a checkpoint's config.json; never defaults of a size."""

    family: str  # model_type in config.json
    vocab: int  # token ids are 0 .. vocab - 1
    embed: int
    layers: int
    heads: int
    mlp: int  # width of the MLP's hidden layer
    max_positions: int  # tokens in the longest document that the positions reach
    activation: str  # one of ACTIVATIONS
    norm_eps: float
    scale_attention: bool  # scores / sqrt(head width)
    scale_by_layer: bool  # scores / (index of the layer + 1) besides
    tied: bool  # the language model's head is the transposed token embedding
    init_std: float  # standard deviation of the published initialisation


@dataclass(frozen=True)
class Compute:
    """How the arithmetic is done; none of it changes what is computed, up to rounding (dropout apart)."""

    dtype: jnp.dtype
    param_dtype: jnp.dtype
    remat: str
    attention: str
    dropout: float


def _normal(std: float):
    return nnx.initializers.normal(std)


class Linear(nnx.Module):
    """x [..., inputs] @ kernel [inputs, outputs] + bias, in the compute type."""

    def __init__(self, inputs: int, outputs: int, std: float, compute: Compute, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(_normal(std)(rngs.params(), (inputs, outputs), compute.param_dtype))
        self.bias = nnx.Param(jnp.zeros((outputs,), compute.param_dtype))
        self.dtype = compute.dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        # Two dimensions: XLA's CPU backend would transpose a three-dimensional operand for the kernel's gradient.
        y = x.reshape(-1, x.shape[-1]) @ self.kernel[...].astype(self.dtype) + self.bias[...].astype(self.dtype)
        return checkpoint_name(y.reshape(*x.shape[:-1], -1), "linear")


class LayerNorm(nnx.Module):
    """Layer norm over the last axis; mean and variance in float32 whatever the compute type."""

    def __init__(self, width: int, eps: float, compute: Compute):
        self.scale = nnx.Param(jnp.ones((width,), compute.param_dtype))
        self.bias = nnx.Param(jnp.zeros((width,), compute.param_dtype))
        self.eps, self.dtype = eps, compute.dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(self.dtype)


class Embedding(nnx.Module):
    """Rows of a table. An id outside the table gives NaN, never a neighbour's row: the trainer stops on it."""

    def __init__(self, rows: int, width: int, std: float, compute: Compute, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(_normal(std)(rngs.params(), (rows, width), compute.param_dtype))
        self.dtype = compute.dtype

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embedding[...].at[ids].get(mode="fill", fill_value=jnp.nan).astype(self.dtype)


class Embed(nnx.Module):
    """Token embedding + learned position embedding."""

    def __init__(self, config: DecoderConfig, compute: Compute, *, rngs: nnx.Rngs):
        self.tokens = Embedding(config.vocab, config.embed, config.init_std, compute, rngs=rngs)
        self.positions = Embedding(config.max_positions, config.embed, config.init_std, compute, rngs=rngs)

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        return self.tokens(tokens) + self.positions(positions)


class Attention(nnx.Module):
    """Multi-head attention with one fused query-key-value matrix (Adafactor's statistics need the checkpoint's own tensor)."""

    def __init__(self, config: DecoderConfig, compute: Compute, *, rngs: nnx.Rngs):
        std = config.init_std
        self.qkv = Linear(config.embed, 3 * config.embed, std, compute, rngs=rngs)
        self.out = Linear(config.embed, config.embed, std / math.sqrt(2 * config.layers), compute, rngs=rngs)
        self.heads, self.implementation = config.heads, ATTENTION_IMPLEMENTATIONS[compute.attention]
        self.scale = (config.embed // config.heads) ** -0.5 if config.scale_attention else 1.0
        self.scale_by_layer = config.scale_by_layer

    def __call__(self, x: jax.Array, mask: jax.Array, layer: jax.Array) -> jax.Array:
        rows, time, embed = x.shape
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        q, k, v = (t.reshape(rows, time, self.heads, embed // self.heads) for t in (q, k, v))
        if self.scale_by_layer:
            q = q / (layer + 1).astype(q.dtype)
        y = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=self.scale, implementation=self.implementation)
        return self.out(checkpoint_name(y.reshape(rows, time, embed), "attention"))


class Mlp(nnx.Module):
    def __init__(self, config: DecoderConfig, compute: Compute, *, rngs: nnx.Rngs):
        std = config.init_std
        self.up = Linear(config.embed, config.mlp, std, compute, rngs=rngs)
        self.down = Linear(config.mlp, config.embed, std / math.sqrt(2 * config.layers), compute, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class Layer(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: DecoderConfig, compute: Compute, *, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(config.embed, config.norm_eps, compute)
        self.attn = Attention(config, compute, rngs=rngs)
        self.norm2 = LayerNorm(config.embed, config.norm_eps, compute)
        self.mlp = Mlp(config, compute, rngs=rngs)
        self.rate = compute.dropout

    def __call__(self, x: jax.Array, mask: jax.Array, layer: jax.Array, keys: jax.Array | None) -> jax.Array:
        x = x + dropout(self.attn(self.norm1(x), mask, layer), keys, self.rate, ATTENTION, layer)
        return x + dropout(self.mlp(self.norm2(x)), keys, self.rate, MLP, layer)


class Backbone(nnx.Module):
    """Embeddings, the stacked layers and the final norm."""

    def __init__(self, config: DecoderConfig, compute: Compute, *, rngs: nnx.Rngs):
        self.embed = Embed(config, compute, rngs=rngs)

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return Layer(config, compute, rngs=rngs)

        self.layers = stack(rngs)
        self.norm = LayerNorm(config.embed, config.norm_eps, compute)
        self.depth, self.remat, self.rate = config.layers, compute.remat, compute.dropout

    def __call__(self, tokens, segments, positions, dropout_key=None, all_layers: bool = False):
        """Hidden states BEFORE the final norm, [rows, time, embed] in the compute type.

        `tokens`, `segments`, `positions`: int32 [rows, time]; a token attends to itself and to earlier tokens of its own
        segment. Padding (segment 0) attends to padding: finite, and read by nobody. With `all_layers` also the input of
        each layer, [layers, rows, time, embed].
        """
        keys = token_keys(dropout_key, segments, positions) if dropout_key is not None and self.rate else None
        x = dropout(self.embed(tokens, positions), keys, self.rate, EMBEDDING, 0)
        time = tokens.shape[1]
        mask = (segments[:, :, None] == segments[:, None, :]) & jnp.tril(jnp.ones((time, time), bool))
        mask = mask[:, None]  # one for all heads

        def body(x, scanned):
            layer, index = scanned
            return layer(x, mask, index, keys), x if all_layers else None

        # Inside a scan the loop's own boundary already keeps XLA from merging the two computations.
        body = jax.checkpoint(body, policy=REMAT[self.remat], prevent_cse=False)
        x, inputs = jax.lax.scan(body, x, (self.layers, jnp.arange(self.depth)))
        return (x, inputs) if all_layers else x
