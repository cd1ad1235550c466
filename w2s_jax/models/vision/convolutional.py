"""AlexNet and the ResNets: images in, features out.

Parameters (path: shape), in `param_dtype` but for the statistics, which are float32:

    AlexNet     conv{1..5}/{kernel,bias}                                     [height, width, in, out], [out]
    ResNet      stem/conv/kernel, stem/norm/{scale,bias,mean,variance}       [height, width, in, out], [out]
                stage{s}/block{b}/conv{c}/kernel, .../norm{c}/...            c = 1, 2 (and 3 in a bottleneck)
                stage{s}/block{b}/shortcut/conv/kernel, .../norm/...         where sizes change (option B)

Batch normalisation uses the statistics of the checkpoint always: they are parameters that nothing trains.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from w2s_jax.constraints import spread
from w2s_jax.errors import UserError
from w2s_jax.models.backbone import REMAT
from w2s_jax.models.layers import ACTIVATIONS, Compute
from w2s_jax.models.vision import resizing
from w2s_jax.models.vision.config import AlexNet, ResNet

# torchvision's: kaiming_normal_(mode="fan_out"); akamaster's: kaiming_normal_; torch.nn.Conv2d's own, uniform within fan_in**-0.5.
FAN_OUT = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
FAN_IN = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
TORCH = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Conv(nnx.Module):
    """x [images, height, width, inputs] -> [..., outputs], in the compute type; zeros outside the image."""

    def __init__(self, inputs: int, outputs: int, size: int, compute: Compute, *, stride: int = 1, padding: int | None = None,
                 bias: bool = False, init, rngs: nnx.Rngs):
        self.kernel = nnx.Param(init(rngs.params(), (size, size, inputs, outputs), compute.param_dtype))
        self.bias = nnx.data(None)
        if bias:
            bound = (size * size * inputs) ** -0.5
            self.bias = nnx.Param(jax.random.uniform(rngs.params(), (outputs,), compute.param_dtype, -bound, bound))
        self.stride, self.padding, self.dtype = stride, size // 2 if padding is None else padding, compute.dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.lax.conv_general_dilated(x.astype(self.dtype), self.kernel[...].astype(self.dtype), (self.stride,) * 2,
                                         ((self.padding,) * 2,) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        if self.bias is not None:
            x = (x.astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(self.dtype)
        return checkpoint_name(spread(x), "linear")


class FrozenNorm(nnx.Module):
    """Batch normalisation (Ioffe and Szegedy 2015) by the running statistics, in float32."""

    def __init__(self, width: int, eps: float, compute: Compute):
        self.scale = nnx.Param(jnp.ones((width,), compute.param_dtype))
        self.bias = nnx.Param(jnp.zeros((width,), compute.param_dtype))
        self.mean = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.variance = nnx.Param(jnp.ones((width,), jnp.float32))
        self.eps, self.dtype = eps, compute.dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        factor = self.scale[...].astype(jnp.float32) * jax.lax.rsqrt(self.variance[...] + self.eps)
        shift = self.bias[...].astype(jnp.float32) - self.mean[...] * factor
        return (x.astype(jnp.float32) * factor + shift).astype(self.dtype)


def max_pool(x: jax.Array, padding: int) -> jax.Array:
    """Over 3x3 places, every second of them."""
    around = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), around)


def _normed(conv: Conv, norm: FrozenNorm, x: jax.Array, activation: str = "") -> jax.Array:
    x = norm(conv(x))
    return x if not activation else ACTIVATIONS[activation](x)


class AlexNetBackbone(nnx.Module):
    """Features: the last pooling's 6x6 places, [images, channels * 36], in torch's order (channel by channel)."""

    # size, stride, padding, and whether a pooling follows
    CONVOLUTIONS = ((11, 4, 2, True), (5, 1, 2, True), (3, 1, 1, False), (3, 1, 1, False), (3, 1, 1, True))
    PLACES, SMALLEST = 6, 63  # pixels that leave one place behind the last pooling

    def __init__(self, arch: AlexNet, compute: Compute, *, rngs: nnx.Rngs):
        for i, (size, stride, padding, _) in enumerate(self.CONVOLUTIONS):
            inputs = arch.widths[i - 1] if i else 3
            setattr(self, f"conv{i + 1}", Conv(inputs, arch.widths[i], size, compute, stride=stride, padding=padding, bias=True,
                                               init=TORCH, rngs=rngs))
        self.dtype = compute.dtype

    def __call__(self, x: jax.Array, keys=None) -> jax.Array:
        """`x`: float32 [images, height, width, 3], normalised."""
        if min(x.shape[1:3]) < self.SMALLEST:
            raise UserError(f"images of {x.shape[1]} x {x.shape[2]} pixels: expected at least {self.SMALLEST} a side for AlexNet")
        for i, (*_, pooled) in enumerate(self.CONVOLUTIONS):
            x = jax.nn.relu(getattr(self, f"conv{i + 1}")(x))
            x = max_pool(x, 0) if pooled else x
        if x.shape[1:3] != (self.PLACES, self.PLACES):
            rows, columns = (jnp.asarray(resizing.adaptive_mean(n, self.PLACES), jnp.float32) for n in x.shape[1:3])
            x = jnp.einsum("ih,jw,nhwc->nijc", rows, columns, x.astype(jnp.float32), precision="highest")
        return x.transpose(0, 3, 1, 2).reshape(len(x), -1).astype(jnp.float32)


class _Projection(nnx.Module):
    """A 1x1 convolution and its norm, or the 7x7 (3x3) one of the stem."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, arch: ResNet, compute: Compute, *, rngs: nnx.Rngs):
        self.conv = Conv(inputs, outputs, size, compute, stride=stride, init=FAN_IN if arch.small else FAN_OUT, rngs=rngs)
        self.norm = FrozenNorm(outputs, arch.norm_eps, compute)

    def __call__(self, x: jax.Array, activation: str = "") -> jax.Array:
        return _normed(self.conv, self.norm, x, activation)


class _Block(nnx.Module):
    """activation(block(x) + shortcut(x))."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int, arch: ResNet, compute: Compute, *, rngs: nnx.Rngs):
        conv = lambda a, b, size, stride=1: Conv(a, b, size, compute, stride=stride,  # noqa: E731
                                                 init=FAN_IN if arch.small else FAN_OUT, rngs=rngs)
        norm = lambda width: FrozenNorm(width, arch.norm_eps, compute)  # noqa: E731
        if arch.bottleneck:
            first, second = (stride, 1) if arch.stride_in_first else (1, stride)
            self.conv1, self.norm1 = conv(inputs, inner, 1, first), norm(inner)
            self.conv2, self.norm2 = conv(inner, inner, 3, second), norm(inner)
            self.conv3, self.norm3 = conv(inner, outputs, 1), norm(outputs)
        else:
            self.conv1, self.norm1 = conv(inputs, outputs, 3, stride), norm(outputs)
            self.conv2, self.norm2 = conv(outputs, outputs, 3), norm(outputs)
        self.shortcut = nnx.data(None)
        self.stride, self.added = stride, outputs - inputs
        if not arch.padded and (stride != 1 or self.added):
            self.shortcut = _Projection(inputs, outputs, 1, stride, arch, compute, rngs=rngs)
        self.arch = arch

    def __call__(self, x: jax.Array) -> jax.Array:
        y = _normed(self.conv1, self.norm1, x, "relu")
        if self.arch.bottleneck:
            y = _normed(self.conv2, self.norm2, y, "relu")
            y = _normed(self.conv3, self.norm3, y)
        else:
            y = _normed(self.conv2, self.norm2, y)
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.stride != 1 or self.added:
            x = jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), (self.added // 2,) * 2))
        return ACTIVATIONS[self.arch.activation](x + y)


class ResNetBackbone(nnx.Module):
    """Features: the mean over the last stage's places, [images, channels]."""

    def __init__(self, arch: ResNet, compute: Compute, *, rngs: nnx.Rngs):
        self.stem = _Projection(3, arch.stem, *((3, 1) if arch.small else (7, 2)), arch, compute, rngs=rngs)
        inputs = arch.stem
        for s, (inner, outputs, depth) in enumerate(zip(arch.inner, arch.widths, arch.depths), 1):
            stage = nnx.Module()
            for b in range(depth):
                stride = 2 if b == 0 and (s > 1 or arch.stride_first) else 1
                setattr(stage, f"block{b}", _Block(inputs, inner, outputs, stride, arch, compute, rngs=rngs))
                inputs = outputs
            setattr(self, f"stage{s}", stage)
        self.arch, self.remat = arch, compute.remat

    def __call__(self, x: jax.Array, keys=None) -> jax.Array:
        """`x`: float32 [images, height, width, 3], normalised."""
        run = jax.checkpoint(lambda block, x: block(x), policy=REMAT[self.remat])
        x = self.stem(x, self.arch.activation)
        if not self.arch.small:
            x = max_pool(x, 1)
        for s, depth in enumerate(self.arch.depths, 1):
            for b in range(depth):
                x = run(getattr(getattr(self, f"stage{s}"), f"block{b}"), x)
        return x.astype(jnp.float32).mean(axis=(1, 2))
