"""The compiled programs of `softmax`: an epoch of Adam for a group of linear probes, and their logits on a block of test rows.

Weights lie as `[lanes, classes, features]`, as in torch.nn.Linear: both products of a step then run at the speed of the CPU's
products (2.1 and 2.0 ms on 2 cores at 100 x 2,048 x 1,000; with `[features, classes]` 2.7 and 2.6). One update reads and writes
weights and moments once, in one fused pass each.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from w2s_jax import losses
from w2s_jax.mesh import BATCH

B1, B2, EPS = 0.9, 0.999, 1e-8  # torch.optim.Adam's defaults


@dataclasses.dataclass(frozen=True)
class Spec:
    """What decides the code of an epoch.

    Attributes:
      loss: of every lane of the group; its coefficients are inputs.
      mesh: the devices.
      spread: "lanes" (each device has its own), "batch" (each has a part of every batch), or "" (one device).
      decays: whether there is a weight decay at all.
    """

    loss: losses.Loss
    mesh: Mesh
    spread: str
    decays: bool


def specs(spread: str) -> tuple[P, P]:
    """How arrays with a leading axis of lanes lie, and how orders `[lanes, steps, batch]` do."""
    of_lane = P(BATCH) if spread == "lanes" else P()
    return of_lane, P(None, None, BATCH) if spread == "batch" else of_lane


def initial(params: dict, loss: losses.Loss) -> dict:
    """What an epoch carries, from `{weights [lanes, classes, features], bias [lanes, classes]}`: zero moments and the loss's state."""
    lanes = params["bias"].shape[0]
    state = jax.tree.map(lambda a: jnp.broadcast_to(a, (lanes, *a.shape)), loss.init_state())
    return {"params": params, "m": jax.tree.map(jnp.zeros_like, params), "v": jax.tree.map(jnp.zeros_like, params), "loss": state}


def _is_largest(logits, label):
    """argmax(logits) == label, bool `[batch]`; on a CPU an arg max over a thousand classes takes a tenth of a step."""
    own = jnp.take_along_axis(logits, label[:, None], axis=1)
    first = jnp.arange(logits.shape[1]) < label[:, None]
    return ~jnp.any((logits > own) | ((logits == own) & first), axis=1)


def _adam(p, m, v, g, rate, scale):
    """`rate`: learning rate / (1 - b1^t); `scale`: 1 / sqrt(1 - b2^t)."""
    m = B1 * m + (1 - B1) * g
    v = B2 * v + (1 - B2) * g * g
    return p - rate * m / (jnp.sqrt(v) * scale + EPS), m, v


def _lane(spec: Spec, x, soft, likeliest, decay, rates, scales, carry, lane):
    """An epoch of one lane: the next carry, and summed loss (times documents), right answers, documents."""
    split, classes = spec.spread == "batch", carry["params"]["bias"].shape[0]

    def step(i, carry):
        carry, totals = carry
        params = carry["params"]
        own = lane["order"][i]
        xb = x[jnp.maximum(own, 0)].astype(jnp.float32)
        z = jnp.einsum("bd,kd->bk", xb, params["weights"]) + params["bias"]
        # The loss sees the whole batch on every device: it may need a quantile of it.
        order, logits = (jax.lax.all_gather(a, BATCH, tiled=True) for a in (own, z)) if split else (own, z)
        real = order >= 0
        row = jnp.maximum(order, 0)
        label = lane["hard"][row]
        inside = jnp.minimum(row, soft.shape[1] - 1)
        y = jnp.where(label[:, None] >= 0, jax.nn.one_hot(label, classes, dtype=jnp.float32), soft[lane["set"], inside])
        label = jnp.where(label >= 0, label, likeliest[lane["set"], inside])
        count = jnp.sum(real).astype(jnp.float32)
        context = losses.Context(lane["coefficients"][i], real.astype(jnp.float32), count)
        (value, state), residual = jax.value_and_grad(
            lambda z: spec.loss(z, y, context, carry["loss"]), has_aux=True)(logits)
        right = jnp.sum(_is_largest(logits, label) & real)
        totals += jnp.stack([value * count, right.astype(jnp.float32), count])
        if split:
            residual = jax.lax.dynamic_slice_in_dim(residual, jax.lax.axis_index(BATCH) * len(own), len(own))
        grads = {"weights": jnp.einsum("bk,bd->kd", residual, xb), "bias": jnp.sum(residual, axis=0)}
        if split:
            grads = jax.lax.psum(grads, BATCH)
        if spec.decays:
            grads = jax.tree.map(lambda g, p: g + decay * p, grads, params)
        new = {key: _adam(p, carry["m"][key], carry["v"][key], grads[key], rates[i], scales[i]) for key, p in params.items()}
        params, m, v = ({key: new[key][j] for key in new} for j in range(3))
        return {"params": params, "m": m, "v": v, "loss": state}, totals

    return jax.lax.fori_loop(0, len(rates), step, (carry, jnp.zeros(3)))


@functools.partial(jax.jit, static_argnames="spec", donate_argnames="carry")
def epoch(spec: Spec, x, soft, likeliest, decay, rates, scales, carry, lanes):
    """One epoch of a group of lanes.

    Args:
      x: features `[n, d]`, whole on every device.
      soft: label sets float32 `[sets, rows, classes]`, whole on every device. likeliest: their likeliest classes, int32 `[sets, rows]`.
      decay: torch's weight_decay, `decay * parameter` added to the gradient. rates, scales: `[steps]`, see `_adam`.
      carry: as `initial` gives it. Its memory is reused.
      lanes: of each lane `order` int32 `[lanes, steps, batch]` (rows; -1 an empty slot), `hard` int32 `[lanes, n]` (a class, or -1 for
        the soft label), `set` int32 `[lanes]` (which soft set), `coefficients` float32 `[lanes, steps]`.

    Returns:
      The next carry, and float32 `[lanes, 3]`: loss summed over documents, right answers, documents.
    """
    of_lane, of_order = specs(spec.spread)

    def group(x, soft, likeliest, decay, rates, scales, carry, lanes):
        call = functools.partial(_lane, spec, x, soft, likeliest, decay, rates, scales)
        if lanes["set"].shape[0] > 1:
            return jax.vmap(call)(carry, lanes)
        out = call(*jax.tree.map(lambda a: a[0], (carry, lanes)))  # a product with a batch of one is slower on a CPU
        return jax.tree.map(lambda a: a[None], out)

    if spec.spread:
        places = {key: of_order if key == "order" else of_lane for key in lanes}
        whole = (P(),) * 6
        group = jax.shard_map(group, mesh=spec.mesh, in_specs=(*whole, of_lane, places), out_specs=of_lane, check_vma=False)
    return group(x, soft, likeliest, decay, rates, scales, carry, lanes)


@jax.jit
def scores(params, x):
    """Logits `[lanes, m, classes]` of a block of rows `[m, d]`, and the likeliest classes, int32 `[lanes, m]`, the first of equal ones."""
    z = jnp.einsum("md,lkd->lmk", x.astype(jnp.float32), params["weights"]) + params["bias"][:, None]
    return z, jnp.argmax(z, axis=-1).astype(jnp.int32)
