"""Heads: what is read off a backbone's hidden states. All outputs are float32 [cells, slots, ...].

A slot is a place for one document in a cell of the packed batch. Gathers run inside a cell (vmap over the cells), so
that none crosses devices when the cells are sharded.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from w2s_jax.models.architecture import Architecture
from w2s_jax.models.layers import ACTIVATIONS, Compute, Linear, Norm

# Standard deviations; small: EleutherAI/w2s, model.py; unembedding: filled after loading (models.unembedding), 0 until then.
HEAD_INITS = {"zeros": 0.0, "normal": 0.02, "small": 0.02 * 0.01, "unembedding": 0.0}
READOUTS = ("auto", "last", "mean", "first")

# Numbers of [tokens, vocabulary] logits held at once by the language model's loss (256 MB of float32).
LOGITS_AT_ONCE = 2**26


def _members(segments: jax.Array, documents: jax.Array) -> jax.Array:
    """float32 [cells, slots, rows, time]: 1 where the token belongs to the slot's document; empty slots have none."""
    return (segments[:, None] == documents[:, :, None, None] + 1).astype(jnp.float32) * (documents >= 0)[:, :, None, None]


def gather_last(x: jax.Array, last: jax.Array) -> jax.Array:
    """[cells, rows, time, embed] -> [cells, slots, embed], each document's last token."""
    cells, rows, time, embed = x.shape
    return jax.vmap(lambda cell, index: cell[index])(x.reshape(cells, rows * time, embed), last)


def gather_first(x: jax.Array, last: jax.Array, positions: jax.Array) -> jax.Array:
    """[cells, rows, time, embed] -> [cells, slots, embed], each document's first token; `positions` [cells, rows, time]."""
    cells = positions.shape[0]
    return gather_last(x, last - jnp.take_along_axis(positions.reshape(cells, -1), last, axis=1))


def mean_over_tokens(x: jax.Array, segments: jax.Array, documents: jax.Array) -> jax.Array:
    """[cells, rows, time, embed] -> float32 [cells, slots, embed], the mean over each document's tokens."""
    members = _members(segments, documents)
    total = jnp.einsum("csrt,crte->cse", members, x.astype(jnp.float32), precision="highest")
    return total / jnp.maximum(members.sum((2, 3)), 1.0)[..., None]


def tensor_names(head: dict, name: str) -> dict[str, str]:
    """Path inside the head -> name of the tensor in transformers' class for classification, whose linear layer's weight is `name`."""
    beside = name.split(".")[0]
    pooler = {f"pooler/dense/{kind}": f"{beside}.dense.{end}" for kind, end in (("kernel", "weight"), ("bias", "bias"))}
    return {"kernel": name} | (pooler if "pooler" in head else {})


def tensors(head: dict, name: str, classes: int) -> dict[str, np.ndarray]:
    """The head's arrays, on the host, by those names: contiguous [outputs, inputs]; the class's bias, which ours has not, is 0."""
    flat = {"kernel": head["kernel"]} | {f"pooler/dense/{k}": v for k, v in head.get("pooler", {}).get("dense", {}).items()}
    out = {tensor: np.ascontiguousarray(flat[path].T) for path, tensor in tensor_names(head, name).items()}
    return out if name == "score.weight" else out | {name.replace("weight", "bias"): np.zeros(classes, np.float32)}


class Pooler(nnx.Module):
    """What an encoder's own classifier puts between a document's hidden state and its linear head: dense, activation, norm."""

    def __init__(self, arch: Architecture, compute: Compute, *, rngs: nnx.Rngs):
        self.dense = Linear(arch.embed, arch.embed, arch.init_std, compute, bias=arch.pooler_bias, rngs=rngs)
        self.norm = Norm(arch.embed, arch.norm, arch.norm_eps, compute, bias=arch.norm_bias) if arch.pooler_norm else nnx.data(None)
        self.activation = arch.pooler_activation

    def __call__(self, x: jax.Array) -> jax.Array:
        x = ACTIVATIONS[self.activation](self.dense(x))
        return x if self.norm is None else self.norm(x)


class Classifier(nnx.Module):
    """Linear; weight, bias (none for documents), matmul and logits in float32 whatever the backbone's types. `pooler`: one that no
    checkpoint holds, and that is trained from scratch with the head (RoBERTa's). `init`: one of HEAD_INITS; "unembedding" is filled
    after loading (models.unembedding) and is 0 until then."""

    def __init__(self, embed: int, classes: int, init: str, *, pooler: Pooler | None = None, bias: bool = False, rngs: nnx.Rngs):
        kernel = HEAD_INITS[init] * jax.random.normal(rngs.params(), (embed, classes), jnp.float32)
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(jnp.zeros((classes,), jnp.float32)) if bias else nnx.data(None)
        self.pooler = nnx.data(None) if pooler is None else pooler

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x if self.pooler is None else self.pooler(x)
        logits = jnp.matmul(x.astype(jnp.float32), self.kernel[...], precision="highest")
        return logits if self.bias is None else logits + self.bias[...]


def vocabulary_logits(x: jax.Array, table: jax.Array, cap: float | None) -> jax.Array:
    """float32 [..., vocab] from hidden states after the final norm [..., embed] and `table` [vocab, embed]; capped at `cap`."""
    logits = jnp.einsum("...e,ve->...v", x, table, preferred_element_type=jnp.float32)
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def next_token_nll(x: jax.Array, table: jax.Array, batch: dict, cap: float | None = None) -> jax.Array:
    """Sum of each document's next-token negative log-likelihoods in nats, float32 [cells, slots, 1].

    `x`: hidden states after the final norm [cells, rows, time, embed]; `table`: [vocab, embed] in x's type. A document's
    first token is not predicted, and nothing is predicted across documents. Rows are taken a few at a time, and their
    logits computed again in the backward pass, where all logits together would be large.
    """
    tokens, segments = batch["tokens"], batch["segments"]
    cells, rows, time, _ = x.shape
    x, targets = x[:, :, :-1], tokens[:, :, 1:]
    predicted = (segments[:, :, 1:] == segments[:, :, :-1]) & (segments[:, :, 1:] > 0)

    def nll(x, targets):
        logits = vocabulary_logits(x, table, cap)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    at_once = max((r for r in range(1, rows + 1) if rows % r == 0 and cells * r * time * table.shape[0] <= LOGITS_AT_ONCE), default=1)
    if at_once == rows:
        losses = nll(x, targets)
    else:
        def split(a):  # [cells, rows, ...] -> [groups, cells, at_once, ...]: the cells stay where they are
            return jnp.moveaxis(a.reshape(cells, rows // at_once, at_once, *a.shape[2:]), 1, 0)

        losses = jax.lax.map(lambda xt: jax.checkpoint(nll, prevent_cse=False)(*xt), (split(x), split(targets)))
        losses = jnp.moveaxis(losses, 0, 1).reshape(cells, rows, time - 1)
    losses = jnp.where(predicted, losses, 0.0)
    return jnp.einsum("csrt,crt->cs", _members(segments[:, :, 1:], batch["documents"]), losses, precision="highest")[..., None]


def gather_ends(x: jax.Array, last: jax.Array, n: int) -> jax.Array:
    """[cells, rows, time, embed] -> [cells, slots, n, embed], each document's last `n` tokens in their order; of a document with fewer
    the first ones are another's."""
    cells, rows, time, embed = x.shape
    places = jnp.maximum(last[..., None] + jnp.arange(1 - n, 1), 0)
    return jax.vmap(lambda cell, index: cell[index])(x.reshape(cells, rows * time, embed), places)


def continuation_logp(x: jax.Array, table: jax.Array, targets: jax.Array, cap: float | None = None) -> jax.Array:
    """Sums of log-probabilities in nats of tokens that follow given places, float32 [cells, slots, alternatives].

    `x`: hidden states of the places after the final norm, [cells, slots, n, embed]; `table`: [vocab, embed] in x's type;
    `targets`: int32 [cells, slots, alternatives, n], the token after each place, -1 where none is asked for. Slots are taken a
    few at a time where all their logits together would be large.
    """
    cells, slots, n, _ = x.shape

    def logp(slot):
        x, targets = slot  # [cells, n, embed], [cells, alternatives, n]
        logits = vocabulary_logits(x, table, cap)
        asked = jnp.moveaxis(targets, 1, 2)  # [cells, n, alternatives]
        chosen = jnp.take_along_axis(logits, jnp.maximum(asked, 0), axis=-1) - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        return jnp.where(asked >= 0, chosen, 0.0).sum(axis=1)

    at_once = max(LOGITS_AT_ONCE // (cells * n * table.shape[0]), 1)
    over_slots = (jnp.moveaxis(x, 1, 0), jnp.moveaxis(targets, 1, 0))  # the cells stay where they are
    out = jax.vmap(logp)(over_slots) if at_once >= slots else jax.lax.map(logp, over_slots, batch_size=at_once)
    return jnp.moveaxis(out, 0, 1)
