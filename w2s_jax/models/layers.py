"""The parts that every layer is made of: matrix products, norms, tables, activations."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from w2s_jax.constraints import axis_sizes, gathered, take_rows

Drop = Callable[[jax.Array, float, int], jax.Array]  # (x, rate, site) -> x
_tanh_gelu = lambda x: jax.nn.gelu(x, approximate=True)  # noqa: E731
_exact_gelu = lambda x: jax.nn.gelu(x, approximate=False)  # noqa: E731

ACTIVATIONS = {  # transformers' names
    "gelu": _exact_gelu, "gelu_python": _exact_gelu,
    "gelu_new": _tanh_gelu, "gelu_fast": _tanh_gelu, "gelu_pytorch_tanh": _tanh_gelu, "gelu_python_tanh": _tanh_gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu, "relu2": lambda x: jnp.square(jax.nn.relu(x)), "relu6": jax.nn.relu6,
    "silu": jax.nn.silu, "swish": jax.nn.silu, "sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh, "mish": jax.nn.mish,
}  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """A low-rank addition to a Linear (LoRA): `scale` * (x @ a) @ b; `site` tells its dropout from the other matrices'."""

    rank: int
    scale: float
    dropout: float
    site: int


@dataclass(frozen=True)
class Compute:
    """How the arithmetic is done; none of it changes what is computed, up to rounding (dropout apart).

    `adapters`: (name of a matrix inside a layer, "attn/q", its Adapter), see models.lora.
    """

    dtype: jnp.dtype
    param_dtype: jnp.dtype
    remat: str
    attention: str
    dropout: float
    adapters: tuple[tuple[str, Adapter], ...] = ()

    def adapter(self, name: str) -> Adapter | None:
        return dict(self.adapters).get(name)


@jax.custom_vjp
def _wide(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [rows, inputs] @ kernel, in float32, for a sum that is rounded to their type afterwards.

    Its cotangent has been of their type, so that it can be cast back without loss: then the backward products are those of a plain
    x @ kernel, and what devices that share the outputs add up of them is not twice as wide.
    """
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


def _wide_backward(operands, cotangent):
    x, kernel = operands
    cotangent = cotangent.astype(kernel.dtype)
    return cotangent @ kernel.T, x.T @ cotangent


_wide.defvjp(lambda x, kernel: (_wide(x, kernel), (x, kernel)), _wide_backward)


class Linear(nnx.Module):
    """x [..., inputs] @ kernel [inputs, outputs] (+ bias [outputs]), in the compute type.

    With an `adapter` also + scale * (drop(x) @ lora_a) @ lora_b, parameters float32 whatever the kernel's type, read in the
    compute type and summed in float32; PEFT's order of the products.
    """

    def __init__(self, inputs: int, outputs: int, std: float, compute: Compute, *, bias: bool = True,
                 adapter: Adapter | None = None, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.normal(std)(rngs.params(), (inputs, outputs), compute.param_dtype))
        self.bias = nnx.Param(jnp.zeros((outputs,), compute.param_dtype)) if bias else nnx.data(None)
        self.lora_a = self.lora_b = nnx.data(None)
        if adapter is not None:  # peft's kaiming_uniform(a=sqrt(5))
            bound = inputs**-0.5
            self.lora_a = nnx.Param(jax.random.uniform(rngs.lora(), (inputs, adapter.rank), jnp.float32, -bound, bound))
            self.lora_b = nnx.Param(jnp.zeros((adapter.rank, outputs), jnp.float32))
        self.dtype, self.adapter = compute.dtype, adapter

    def __call__(self, x: jax.Array, drop: Drop | None = None) -> jax.Array:
        """`drop(x, rate, site)`: dropout on the adapter's input."""
        return self._product(x, drop, lambda parameter: parameter)

    def parts(self, x: jax.Array, ends: tuple[int, ...], drop: Drop | None = None) -> list[jax.Array]:
        """The product in parts, outputs cut at `ends`.

        Where devices share the outputs, the matrix is cut in place of the product: a device's columns of a fused matrix are not those
        of its heads, and to move weights is less than to move every token's product with them.
        """
        if axis_sizes(x).get("model", 1) == 1:
            return jnp.split(self(x, drop), ends, axis=-1)
        places = zip((0, *ends), (*ends, self.kernel.shape[-1]))
        return [self._product(x, drop, lambda parameter, cut=slice(*place): gathered(parameter[..., cut], x, -1)) for place in places]

    def _product(self, x: jax.Array, drop: Drop | None, part: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """With `part` of the kernel, the bias and lora_b."""
        shape, whole = x.shape, x
        # Two dimensions: XLA's CPU backend would transpose a three-dimensional operand for the kernel's gradient.
        x, kernel = x.reshape(-1, shape[-1]), part(self.kernel[...]).astype(self.dtype)
        if self.bias is None and self.adapter is None:
            y = x @ kernel
        else:  # rounded once, after the sum
            y = _wide(x, kernel)
            if self.bias is not None:
                y = y + part(self.bias[...]).astype(jnp.float32)
        if self.adapter is not None:
            if drop is not None and self.adapter.dropout:
                x = drop(whole, self.adapter.dropout, self.adapter.site).reshape(x.shape)
            low = jnp.matmul(x, self.lora_a[...].astype(self.dtype), preferred_element_type=jnp.float32)
            y = y + self.adapter.scale * jnp.matmul(low, part(self.lora_b[...]))
        return checkpoint_name(y.astype(self.dtype).reshape(*shape[:-1], -1), "linear")


class Norm(nnx.Module):
    """Over the last axis, in float32 whatever the compute type. `kind`: one of architecture.NORMS.

    "layer": LayerNorm; "rms": RMSNorm; "rms_plus_one": RMSNorm times 1 + scale (Gemma, whose scale starts at 0).
    """

    def __init__(self, width: int, kind: str, eps: float, compute: Compute, *, bias: bool = False):
        start = jnp.zeros if kind == "rms_plus_one" else jnp.ones
        self.scale = nnx.Param(start((width,), compute.param_dtype))
        self.bias = nnx.Param(jnp.zeros((width,), compute.param_dtype)) if bias else nnx.data(None)
        self.kind, self.eps, self.dtype = kind, eps, compute.dtype

    def __call__(self, x: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
        """In the compute type, or in `dtype` where the next step is in float32 too."""
        x = x.astype(jnp.float32)
        if self.kind == "layer":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        x = x * (1.0 + scale if self.kind == "rms_plus_one" else scale)
        if self.bias is not None:
            x = x + self.bias[...].astype(jnp.float32)
        return x.astype(dtype or self.dtype)


class Embedding(nnx.Module):
    """Rows of a table. An id outside the table gives NaN, never a neighbour's row: the trainer stops on it."""

    def __init__(self, rows: int, width: int, std: float, compute: Compute, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(nnx.initializers.normal(std)(rngs.params(), (rows, width), compute.param_dtype))
        self.dtype = compute.dtype

    def __call__(self, ids: jax.Array, path: str | None = None) -> jax.Array:
        """[..., width]. `path`: of the parameter, where the table is large enough to stay split over devices (constraints.take_rows)."""
        rows = lambda table, ids: table.at[ids].get(mode="fill", fill_value=jnp.nan).astype(self.dtype)  # noqa: E731
        return rows(self.embedding[...], ids) if path is None else take_rows(self.embedding[...], ids, path, rows)
