"""Dropout whose mask belongs to a token of a document, not to a place in a row.

The mask of a token is drawn from (key, site, layer, document, position in the document), so that packing,
microbatching and sharding leave the masks, and with them the losses, as they are.
"""

import jax
import jax.numpy as jnp

EMBEDDING, ATTENTION, MLP, ADAPTERS = range(4)  # sites; the matrices of a layer that have adapters count on from the last
SITES = 16


def token_keys(key: jax.Array, segments: jax.Array, positions: jax.Array) -> jax.Array:
    """One key for each token.

    `key` is this step's random key; `segments` (1 + index of the document in the batch) and `positions` are int32
    [rows, time]. Returns typed keys [rows, time]. Threefry whatever jax_default_prng_impl says: others ("rbg") give
    vmapped calls bits that depend on the place in the array.
    """
    seed = jax.random.bits(key, (2,), jnp.uint32)
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")

    def one(segment, position):
        return jax.random.fold_in(jax.random.fold_in(key, segment), position)

    return jax.vmap(jax.vmap(one))(segments, positions)


def dropout(x: jax.Array, keys: jax.Array | None, rate: float, site: int, layer: jax.Array | int) -> jax.Array:
    """Zero a share `rate` of `x` [rows, time, embed] and scale the rest by 1 / (1 - rate); the identity without keys.

    The rate is rounded to 1/65536 (16 random bits a number), the scale fits the rounded rate.
    """
    if keys is None or rate == 0.0:
        return x
    kept = round((1.0 - rate) * 65536)
    salt = SITES * layer + site

    @jax.vmap
    @jax.vmap
    def mask(key):
        return jax.random.bits(jax.random.fold_in(key, salt), x.shape[-1:], jnp.uint16) < kept

    return jnp.where(mask(keys), x * jnp.asarray(65536 / kept, x.dtype), jnp.zeros((), x.dtype))
