"""Vision transformers: images in, the class token after the final norm out. The layers are the language models' (models.backbone).

Parameters (path: shape), all in `param_dtype`:

    embed/patches/{kernel,bias}       [patch, patch, 3, embed], [embed]
    embed/class_token                 [1, 1, embed]
    embed/registers                   [1, registers, embed]
    embed/positions                   [1, 1 + grid * grid, embed]
    layers/...                        as in models.backbone
    norm/{scale,bias}                 [embed]
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from w2s_jax.constraints import spread
from w2s_jax.errors import UserError
from w2s_jax.models.attention import check, prepare
from w2s_jax.models.backbone import REMAT, Layer
from w2s_jax.models.dropout import EMBEDDING, dropout, token_keys
from w2s_jax.models.layers import Compute, Norm
from w2s_jax.models.vision import resizing
from w2s_jax.models.vision.config import ViT


class _Patches(nnx.Module):
    """A convolution whose stride is its size: one product for all patches; what is left over at the right and below is not seen."""

    def __init__(self, patch: int, embed: int, std: float, compute: Compute, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.normal(std)(rngs.params(), (patch, patch, 3, embed), compute.param_dtype))
        self.bias = nnx.Param(jnp.zeros((embed,), compute.param_dtype))
        self.patch, self.dtype = patch, compute.dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """float32 [images, patches, embed]."""
        p, (images, height, width, _) = self.patch, x.shape
        rows, columns = height // p, width // p
        x = x[:, : rows * p, : columns * p].reshape(images, rows, p, columns, p, 3).transpose(0, 1, 3, 2, 4, 5)
        kernel = self.kernel[...].astype(self.dtype).reshape(p * p * 3, -1)
        x = jnp.matmul(x.reshape(images * rows * columns, -1).astype(self.dtype), kernel, preferred_element_type=jnp.float32)
        return (x + self.bias[...].astype(jnp.float32)).reshape(images, rows * columns, -1)


class _Embed(nnx.Module):
    def __init__(self, arch: ViT, compute: Compute, *, rngs: nnx.Rngs):
        std, embed = arch.stack.init_std, arch.stack.embed

        def tokens(n, std):
            return nnx.Param(std * jax.random.truncated_normal(rngs.params(), -2, 2, (1, n, embed), compute.param_dtype))

        self.patches = _Patches(arch.patch, embed, std, compute, rngs=rngs)
        token_std = std if arch.token_std is None else arch.token_std
        self.class_token = tokens(1, token_std)
        self.registers = tokens(arch.registers, token_std) if arch.registers else nnx.data(None)
        self.positions = tokens(1 + arch.grid**2, std)
        self.arch, self.dtype = arch, compute.dtype

    def _positions(self, height: int, width: int) -> jax.Array:
        """float32 [1, 1 + patches, embed]: resized, in the reference's own way, where the image is not of the size that they are for."""
        arch, table = self.arch, self.positions[...].astype(jnp.float32)
        sides = (height // arch.patch, width // arch.patch)
        # The condition is the references'; the offset makes even the same number of patches another one (224 x 225 pixels).
        if math.prod(sides) == arch.grid**2 and height == width:
            return table
        matrices = []
        for side in sides:
            ratio = (side + arch.offset) / arch.grid if arch.offset else None
            matrices.append(jnp.asarray(resizing.bicubic(arch.grid, side, ratio=ratio, antialias=arch.antialias), jnp.float32))
        grid = table[0, 1:].reshape(arch.grid, arch.grid, -1)
        patches = jnp.einsum("ih,jw,hwe->ije", *matrices, grid, precision="highest").reshape(1, math.prod(sides), -1)
        return jnp.concatenate([table[:, :1], patches], axis=1)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[images, tokens, embed] in the compute type: the class token, the registers, the patches row by row."""
        images, height, width, _ = x.shape
        if min(height, width) < self.arch.patch:
            raise UserError(f"images of {height} x {width} pixels: expected at least one patch of {self.arch.patch}")
        positions = self._positions(height, width)
        whole = lambda token: jnp.broadcast_to(token.astype(jnp.float32), (images, *token.shape[1:]))  # noqa: E731
        parts = [whole(self.class_token[...] + positions[:, :1]), self.patches(x) + positions[:, 1:]]
        if self.registers is not None:
            parts.insert(1, whole(self.registers[...]))
        return jnp.concatenate(parts, axis=1).astype(self.dtype)


class ViTBackbone(nnx.Module):
    """Features: the class token after the final norm, [images, embed]."""

    def __init__(self, arch: ViT, compute: Compute, *, rngs: nnx.Rngs):
        stack = arch.stack
        check(compute.attention, stack.kinds, stack.causal, width=stack.head_dim, dtype=compute.dtype, cap=None)
        self.embed = _Embed(arch, compute, rngs=rngs)

        @nnx.split_rngs(splits=stack.layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def layers(rngs):
            return Layer(stack, compute, rngs=rngs)

        self.layers = layers(rngs)
        self.norm = Norm(stack.embed, stack.norm, stack.norm_eps, compute, bias=True)
        self.arch, self.compute = arch, compute

    def __call__(self, x: jax.Array, keys: tuple[jax.Array, jax.Array] | None = None, wide: bool = False) -> jax.Array:
        """float32 [images, embed] from float32 [images, height, width, 3], normalised.

        `keys`: this step's key and each image's number, for dropout whose masks belong to (image, token); None = none. `wide`:
        [images, 2 * embed], the mean of the patches' states beside the class token's.
        """
        stack, compute = self.arch.stack, self.compute
        x = spread(self.embed(x))
        segments = jnp.ones(x.shape[:2], jnp.int32)
        if keys is not None:
            key, numbers = keys
            keys = token_keys(key, jnp.broadcast_to(numbers[:, None] + 1, x.shape[:2]),
                              jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]))
            x = dropout(x, keys, compute.dropout, EMBEDDING, 0)
        plan = prepare(segments, stack.kinds, stack.causal, width=stack.head_dim, dtype=compute.dtype, cap=None,
                       implementation=compute.attention, one_document=True, whole=True)

        def step(x, scanned):
            layer, index = scanned
            return spread(layer(x, plan, None, index, jnp.zeros((), jnp.int32), keys)), None

        step = jax.checkpoint(step, policy=REMAT[compute.remat], prevent_cse=False)
        x = jax.lax.scan(step, x, (self.layers, jnp.arange(stack.layers)))[0]
        if not wide:
            return self.norm(x[:, 0], jnp.float32)
        x = self.norm(x, jnp.float32)
        return jnp.concatenate([x[:, 0], x[:, 1 + self.arch.registers :].mean(axis=1)], axis=-1)
