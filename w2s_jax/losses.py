"""The losses: each re-targets the student, and one cross-entropy does the rest.

A loss sees a whole batch of logits at once, `loss(logits, labels, context, state) -> (scalar, state)`, so that
a quantile or a mean over the batch is right however the forward pass was cut into microbatches. Nearly all of
them are a rule `(student's probabilities, labels, context, state) -> (targets, weights, state)`; targets and
weights are detached, and the scalar is the sum of the weighted cross-entropies over the number of real documents.
`kl` adds a constant to that, and `reverse_xent`, `reverse_kl` and `next_token` are no cross-entropy against a
detached target at all.

Any number of classes will do, but for logconf_eleuther, whose buffer is of probabilities of class 0. With two, `logconf` and
`logconf_openai` harden the student's prediction at a quantile of the batch; with more there is no one threshold, and the hardened
prediction is the arg max.

Sources: openai/weak-to-strong (xent, product, logconf_openai), EleutherAI/w2s (logconf_eleuther, entropy, window),
Burns et al. 2023, arXiv 2312.09390 (logconf), arXiv 2502.11107 (reverse_xent, reverse_kl), Guo et al. 2024, arXiv 2402.03749
(adaptconf).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax.config import LOSS_ARGS
from w2s_jax.errors import UserError, nearest

CLIP = 1e-6  # reverse_*: the nearest that a label may come to 0 or 1
EVERYTHING = 0.51  # window: a radius that lets every document of two classes through


class Context(NamedTuple):
    """What a loss knows of the step beside logits and labels. Every field is an array, so it may enter a jitted function.

    Attributes:
      coefficient: float32 scalar, `Loss.coefficient(step, total_steps)` worked out on the host in double.
      weights: `[batch]`, the weight of each document's term: 1 unless the label file weighs them, 0 for an empty slot.
      denominator: float32 scalar, the number of real documents in the WHOLE batch (`next_token`: of predicted tokens),
        also where only a microbatch of it is given.
    """

    coefficient: jax.Array
    weights: jax.Array
    denominator: jax.Array


# ---------------------------------------------------------------------------------------------------------------------
# Pieces


def quantile(values: jax.Array, level: jax.Array, valid: jax.Array) -> jax.Array:
    """The quantile of the valid ones among `values [n]` at `level` in [0, 1], linear interpolation as torch.quantile.

    Equal neighbours interpolate to exactly themselves, so that `value >= quantile` holds for a batch of equal values.
    Where nothing is valid the result is +inf.
    """
    ordered = jnp.sort(jnp.where(valid, values, jnp.inf))
    rank = level * jnp.maximum(jnp.sum(valid) - 1, 0)
    below = jnp.floor(rank).astype(jnp.int32)
    above = jnp.ceil(rank).astype(jnp.int32)
    low, high = ordered[below], ordered[above]
    return jnp.where(low == high, low, low + (rank - below) * (high - low))


def _harden(p0: jax.Array, threshold: jax.Array) -> jax.Array:
    """One-hot `[n, 2]`: class 0 where its probability reaches the threshold."""
    first = p0 >= threshold
    return jnp.stack([first, ~first], axis=-1).astype(p0.dtype)


def _hard(p: jax.Array) -> jax.Array:
    """One-hot `[n, classes]` of the likeliest class, the first of equal ones."""
    return jax.nn.one_hot(jnp.argmax(p, axis=-1), p.shape[-1], dtype=p.dtype)


def _cross_entropy(targets: jax.Array, logits: jax.Array) -> jax.Array:
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)


def _mean(values: jax.Array, real: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(real, values, 0)) / jnp.maximum(jnp.sum(real), 1)


def _two_classes(name: str, labels: jax.Array) -> None:
    if labels.shape[-1] != 2:
        raise UserError(f"loss={name}: got {labels.shape[-1]} classes, expected 2 (its threshold is on the probability of class 0)")


# ---------------------------------------------------------------------------------------------------------------------
# Rules: (loss, logits, p, y, context, real, state) -> (targets, weights, state). p is detached.


def _xent(loss, logits, p, y, context, real, state):
    return y, 1.0, state


def _product(loss, logits, p, y, context, real, state):
    # In logarithms: p^beta * y^alpha may underflow in both classes, and 0/0 is no target.
    log_target = loss["beta"] * jax.nn.log_softmax(logits)
    if loss["alpha"] != 0:
        log_target = log_target + loss["alpha"] * jnp.log(y)
    return jax.nn.softmax(log_target), 1.0, state


def _logconf(loss, logits, p, y, context, real, state):
    hard = _hard(p) if p.shape[-1] > 2 else _harden(p[:, 0], quantile(p[:, 0], jnp.float32(0.5), real))
    return (1 - context.coefficient) * y + context.coefficient * hard, 1.0, state


def _logconf_openai(loss, logits, p, y, context, real, state):
    hard = _hard(p) if p.shape[-1] > 2 else _harden(p[:, 0], quantile(p[:, 0], _mean(y[:, 1], real), real))
    return (1 - context.coefficient) * y + context.coefficient * hard, 1.0, state


def _logconf_eleuther(loss, logits, p, y, context, real, state):
    """Thresholds on the last `buffer` predictions, one chunk of documents after the other.

    The buffer is kept right-aligned: its newest entry is the last. Appending k entries to the right and cutting the
    first k off leaves the last `buffer` of the whole list.
    """
    _two_classes(loss.name, y)
    size, chunk = loss["buffer"], loss["chunk"] or len(y)
    padded = -(-len(y) // chunk) * chunk
    # Real documents first, in their order: an empty slot in the middle must not shift the chunks.
    place = jnp.where(real, jnp.cumsum(real) - 1, jnp.sum(real) + jnp.cumsum(~real) - 1)

    def cut(x):
        return jnp.zeros(padded, x.dtype).at[place].set(x).reshape(-1, chunk)

    def back(x):
        return x.reshape(-1, 2)[place]

    def body(state, part):
        p0, s, here = part
        count = jnp.sum(here)
        if loss["balance_batch"]:
            log_odds = jnp.log(s + 1e-7) - jnp.log(1 - s + 1e-7)
            s = jax.nn.sigmoid(log_odds - _mean(log_odds, here))
            level = jnp.float32(0.5)
        else:
            level = jnp.where(count > 1, _mean(s, here), 0.5)
        buffer = jax.lax.dynamic_slice(jnp.concatenate([state["buffer"], p0]), (count,), (size,))
        filled = jnp.minimum(state["count"] + count, size).astype(jnp.int32)  # capped: a long run can't overflow it
        hard = _harden(p0, quantile(buffer, level, jnp.arange(size) >= size - filled))
        return {"buffer": buffer, "count": filled}, (jnp.stack([1 - s, s], axis=-1) if loss["balance_batch"] else None, hard)

    state, (balanced, hard) = jax.lax.scan(body, state, (cut(p[:, 0]), cut(y[:, 1]), cut(real)))
    y = back(balanced) if loss["balance_batch"] else y
    return (1 - context.coefficient) * y + context.coefficient * back(hard), 1.0, state


def _entropy(loss, logits, p, y, context, real, state):
    return (1 - context.coefficient) * y + context.coefficient * p, 1.0, state


def _adaptconf(loss, logits, p, y, context, real, state):
    """The weight of the student's hardened prediction is each document's own: one half where it is the label's likeliest class,
    else the less the student believes in that class, the smaller. The authors' exp(a) / (exp(a) + exp(b)) is sigmoid(a - b), which
    does not overflow; their term on ground truth is left out, their distillation is at temperature 1, which is their default."""
    log_p, hard = jax.nn.log_softmax(logits), _hard(p)
    own, supervisor = -jnp.sum(hard * log_p, axis=-1), -jnp.sum(_hard(y) * log_p, axis=-1)
    share = jax.nn.sigmoid((own - supervisor) / loss["temperature"])[:, None]
    return (1 - share) * y + share * hard, 1.0, state


def _window(loss, logits, p, y, context, real, state):
    return y, (jnp.max(p, axis=-1) < 0.5 + loss["radius"]).astype(p.dtype), state


# ---------------------------------------------------------------------------------------------------------------------
# Values: (logits, y) -> [batch], differentiated as they stand.


def _kl(logits, y):
    return _cross_entropy(y, logits) + jnp.sum(jax.scipy.special.xlogy(y, y), axis=-1)


def _reverse_xent(logits, y):
    return -jnp.sum(jax.nn.softmax(logits) * jnp.log(jnp.clip(y, CLIP, 1 - CLIP)), axis=-1)


def _reverse_kl(logits, y):
    return _reverse_xent(logits, y) + jnp.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits), axis=-1)


def _next_token(nll, counts):
    return nll[:, 0]


def _contrastive(loss, logits, real):
    """NT-Xent (Chen et al. 2020, equation 1): each view has to find the other one of its image among all views of the batch."""
    n = len(logits)
    z = logits.reshape(n, 2, -1)
    z = jnp.moveaxis(z * jax.lax.rsqrt(jnp.sum(z * z, axis=-1, keepdims=True) + 1e-12), 1, 0).reshape(2 * n, -1)
    there = jnp.tile(real, 2)[None] & ~jnp.eye(2 * n, dtype=bool)
    similar = jnp.where(there, z @ z.T / loss["temperature"], -jnp.inf)
    other = jnp.roll(jnp.arange(2 * n), n)
    found = similar[jnp.arange(2 * n), other] - jax.nn.logsumexp(similar, axis=-1, where=there)
    return -jnp.mean(jnp.where(real, found.reshape(2, n), 0), axis=0)


# ---------------------------------------------------------------------------------------------------------------------
# Coefficients: (loss, step, total steps) -> the weight of the student's own prediction, before that step's update.


def _no_coefficient(loss, step, total_steps):
    return 0.0


def _ramp(loss, done):
    return loss["aux_coef"] * (min(1.0, done / loss["warmup"]) if loss["warmup"] > 0 else 1.0)


def _ramp_by_fraction(loss, step, total_steps):
    return _ramp(loss, step / total_steps)


def _ramp_by_updates(loss, step, total_steps):
    return 0.0 if loss.ground_truth else _ramp(loss, step)


def _jump_by_fraction(loss, step, total_steps):
    # Not a ramp to aux_coef: the published code climbs to warmup * aux_coef only, then jumps.
    t = step / total_steps
    return loss["aux_coef"] * (1.0 if t > loss["warmup"] else t)


class _Kind(NamedTuple):
    """A registry entry: `rule` (a re-targeting), `value`, or `whole` (a value that a batch's documents decide together) is given."""

    rule: Callable | None = None
    value: Callable | None = None
    whole: Callable | None = None
    coefficient: Callable = _no_coefficient
    per_document: bool = True
    notice: str = ""


_CLIPPED = f"labels are clipped to [{CLIP:g}, 1 - {CLIP:g}], since this loss is infinite on hard labels"
LOSSES: dict[str, _Kind] = {
    "xent": _Kind(_xent),
    "product": _Kind(_product),
    "logconf": _Kind(_logconf, coefficient=_ramp_by_fraction, per_document=False),
    "logconf_openai": _Kind(_logconf_openai, coefficient=_jump_by_fraction, per_document=False),
    "logconf_eleuther": _Kind(_logconf_eleuther, coefficient=_ramp_by_updates, per_document=False),
    "entropy": _Kind(_entropy, coefficient=_ramp_by_updates),
    "window": _Kind(_window),
    "adaptconf": _Kind(_adaptconf),
    "kl": _Kind(value=_kl),
    "reverse_xent": _Kind(value=_reverse_xent, notice=_CLIPPED),
    "reverse_kl": _Kind(value=_reverse_kl, notice=_CLIPPED),
}
if set(LOSSES) != set(LOSS_ARGS):
    raise AssertionError(f"losses.LOSSES and config.LOSS_ARGS differ in {sorted(set(LOSSES) ^ set(LOSS_ARGS))}")
_INTERNAL = {"next_token": _Kind(value=_next_token), "contrastive": _Kind(whole=_contrastive, per_document=False)}  # of pretraining
_INTERNAL_ARGS = {"contrastive": {"temperature": 0.2}}


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss with its arguments. Equal ones hash alike: use it as a static argument of jit or a key of a cache.

    Attributes:
      name: a key of `LOSSES`, "next_token" or "contrastive".
      args: the resolved arguments, `((name, value), ...)` in order of name; `loss["radius"]` reads one.
      ground_truth: whether the labels are ground truth.
    """

    name: str
    args: tuple[tuple[str, Any], ...]
    ground_truth: bool

    def __getitem__(self, key: str) -> Any:
        return dict(self.args)[key]

    @property
    def _kind(self) -> _Kind:
        return LOSSES[self.name] if self.name in LOSSES else _INTERNAL[self.name]

    @property
    def per_document(self) -> bool:
        """Whether the scalar is a sum over documents of independent terms over `context.denominator`.

        If so, a microbatch may be evaluated alone, with its own weights and the whole batch's denominator.
        """
        return self._kind.per_document

    @property
    def notice(self) -> str:
        """A line that the caller prints before training, or the empty string."""
        return f"loss={self.name}: {self._kind.notice}" if self._kind.notice else ""

    def init_state(self) -> dict[str, jax.Array]:
        """What the loss carries from step to step: the newest predictions (logconf_eleuther), else nothing."""
        if self.name != "logconf_eleuther":
            return {}
        return {"buffer": jnp.zeros(self["buffer"], jnp.float32), "count": jnp.zeros((), jnp.int32)}

    def coefficient(self, step: int, total_steps: int) -> float:
        """The weight of the student's own prediction at `step` (from 0, before its update) of `total_steps`, in double."""
        return float(self._kind.coefficient(self, step, total_steps))

    def __call__(self, logits: jax.Array, labels: jax.Array, context: Context, state: dict) -> tuple[jax.Array, dict]:
        """The loss of a batch and the next state.

        Args:
          logits: float32 `[batch, classes]`; for "next_token" each document's summed negative log-likelihood `[batch, 1]`; for
            "contrastive" the projections of an image's two views, one after the other.
          labels: float32 `[batch, classes]`, each row a distribution; for "next_token" the counts of predicted tokens `[batch, 1]`.
          context: see `Context`. Rows where its weights are 0 have no influence, whatever stands in them.
          state: what `init_state` or the last call gave.

        Raises:
          UserError: logconf_eleuther was given other than two classes.
        """
        real = context.weights > 0
        # Cleaned on the way in, not only weighted by 0: NaN * 0 is NaN, in the gradient too.
        logits = jnp.where(real[:, None], logits.astype(jnp.float32), 0)
        labels = jnp.where(real[:, None], labels.astype(jnp.float32), 1 / labels.shape[-1])
        kind = self._kind
        if kind.value is not None:
            values = kind.value(logits, labels)
        elif kind.whole is not None:
            values = kind.whole(self, logits, real)
        else:
            # The barrier makes the values that are sorted and those that are compared with their quantile the same bits.
            p = jax.lax.optimization_barrier(jax.nn.softmax(jax.lax.stop_gradient(logits)))
            targets, weights, state = kind.rule(self, jax.lax.stop_gradient(logits), p, labels, context, real, state)
            values = jax.lax.stop_gradient(weights) * _cross_entropy(jax.lax.stop_gradient(targets), logits)
        return jnp.sum(jnp.where(real, values * context.weights, 0)) / context.denominator, state


def make(name: str, args: dict | None = None, *, ground_truth: bool, label_stats: dict | None = None) -> Loss:
    """The loss called `name`.

    Args:
      name: a key of `config.LOSS_ARGS`, or "next_token" and "contrastive" (pretraining).
      args: its arguments; absent or None ones take the default of `config.LOSS_ARGS`.
      ground_truth: whether the labels are ground truth: eleuther's losses then train without their own prediction or window.
      label_stats: `label_statistics` of the training labels; needed for `radius="midweak"`.

    Raises:
      UserError: unknown name or argument, a value out of range.
    """
    if name in _INTERNAL:
        defaults = _INTERNAL_ARGS.get(name, {})
    elif name in LOSSES:
        defaults = LOSS_ARGS[name]
    else:
        raise UserError(f"loss={name!r}: expected one of {', '.join(LOSSES)}{nearest(name, LOSSES)}")
    given = {k: v for k, v in dict(args or {}).items() if v is not None}
    for key in given:
        if key not in defaults:
            takes = ", ".join(defaults) or "none"
            raise UserError(f"loss_args.{key}: loss={name} does not take it, its arguments: {takes}{nearest(key, defaults)}")
    values = {**defaults, **given}
    for key in ("alpha", "beta", "aux_coef", "warmup", "chunk"):
        if key in values and not values[key] >= 0:
            raise UserError(f"loss_args.{key}={values[key]!r}: expected 0 or more")
    if "aux_coef" in values and values["aux_coef"] > 1:
        raise UserError(f"loss_args.aux_coef={values['aux_coef']!r}: expected at most 1")
    if "temperature" in values and not 0 < values["temperature"] < np.inf:
        raise UserError(f"loss_args.temperature={values['temperature']!r}: expected a number above 0")
    if "buffer" in values and values["buffer"] < 1:
        raise UserError(f"loss_args.buffer={values['buffer']!r}: expected 1 or more")
    if name == "window":
        values["radius"] = _radius(values["radius"], ground_truth, label_stats or {})
    return Loss(name, tuple(sorted(values.items())), bool(ground_truth))


def _radius(radius, ground_truth: bool, label_stats: dict) -> float:
    if radius == "midweak" and not ground_truth:
        if "midweak" not in label_stats:
            raise UserError("loss_args.radius='midweak': the label statistics hold no 'midweak', expected those of the weak labels")
        radius = label_stats["midweak"]
    elif radius != "midweak" and (isinstance(radius, (str, bool)) or not radius > 0):
        raise UserError(f"loss_args.radius={radius!r}: expected a number above 0 or 'midweak'")
    return EVERYTHING if ground_truth else float(radius)


def label_statistics(soft_labels: np.ndarray) -> dict[str, float]:
    """Statistics of a label set `[n, classes]` that a loss may ask for.

    Returns:
      "midweak": the lower median (as torch.median takes it) of max(y) - 0.5, how far a label's likeliest class is above one half;
        with two classes |s - 0.5|, s the probability of class 1. With more it may be below 0; `window` takes it as it is.

    Raises:
      ValueError: no labels, or unknown (NaN) ones among them.
    """
    soft_labels = np.asarray(soft_labels, np.float32)
    if soft_labels.shape[1] == 2:
        distance = np.sort(np.abs(soft_labels[:, 1] - np.float32(0.5)))
    else:
        distance = np.sort(soft_labels.max(axis=1, initial=-np.inf) - np.float32(0.5))  # a row with a NaN gives NaN, sorted last
    if not len(distance) or np.isnan(distance[-1]):
        raise ValueError("label statistics need labels, none of them NaN")
    return {"midweak": float(distance[(len(distance) - 1) // 2])}
