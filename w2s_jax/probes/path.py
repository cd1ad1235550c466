"""Multinomial logistic regression on soft labels, to convergence, along a path of penalties.

The objective is mean(cross-entropy) + l2 * sum(w^2), without penalty on the bias, as in `glm` for two classes, and it is minimised
by the same L-BFGS in the same nearly round coordinates. Each penalty starts from the weights of the one before, which is larger.
Value and gradient are summed over blocks of rows in one pass, so that no `[n, classes]` array stands in memory but the labels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax.errors import UserError
from w2s_jax.probes import glm, lbfgs
from w2s_jax.probes.rows import Rows
from w2s_jax.probes.targets import Targets
from w2s_jax.progress import Progress, say

TOLERANCE = 1e-5  # norm of the gradient, in coordinates where the curvature is about 1, at which a fit has converged
AIM = 2e-6  # where it stops trying; float32 may show no way from TOLERANCE down to this
ITERATIONS = 1000
CHUNK = 100  # evaluations in one dispatch; between two of them the coordinates follow the curvature
BLOCK = 2**22  # numbers in the scores of one block of rows, at most: 16 MiB
LEAST = 1e-6  # mean curvature below which they do not
HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Fit:
    """The minimum at one penalty.

    Attributes:
      l2: the penalty.
      weights: float32 `[d, classes]`. bias: float32 `[classes]`; the score of a row x is x @ weights + bias.
      objective: its value there. loss: the mean cross-entropy in it.
      heldout_loss: mean cross-entropy of the held-out rows, or over all folds; None without either.
      iterations: evaluations of value and gradient. gradient_norm: in the coordinates of the fit.
      converged: whether that is at most `TOLERANCE`.
    """

    l2: float
    weights: np.ndarray
    bias: np.ndarray
    objective: float
    loss: float
    heldout_loss: float | None
    iterations: int
    gradient_norm: float
    converged: bool

    def logits(self, features) -> np.ndarray:
        """Scores of rows `[m, d]`, float32 `[m, classes]`."""
        rows = Rows(features)
        rows.check(len(self.weights))
        out = np.empty((rows.n, len(self.bias)), np.float32)
        for where, block in rows.blocks():
            np.matmul(block, self.weights, out=out[where])
        return out + self.bias


def choose(fits: Sequence[Fit]) -> int:
    """Which fit has the least held-out loss; of equal ones the first, whose penalty is the largest.

    Raises:
      UserError: nothing was held out.
    """
    if any(fit.heldout_loss is None for fit in fits):
        raise UserError("heldout: nothing was held out, expected held-out rows or folds to choose the penalty by")
    return int(np.argmin([fit.heldout_loss for fit in fits]))


def fit_path(features, targets, l2s: Sequence[float], *, heldout: tuple | None = None, folds: int = 0, seed: int = 0, groups=None,
             tolerance: float = AIM, iterations: int = ITERATIONS, classes: int = 0, label: str = "") -> list[Fit]:
    """Fits along the path, the largest penalty first.

    Args:
        features: `[n, d]`, finite. One float32 copy of them is made on the device.
        targets: the labels that are trained on: classes int `[n]`, or distributions `[n, classes]`.
        l2s: penalties above 0.
        heldout: features `[m, d]` and labels of the same kind, which the penalty is chosen by (`choose`): labels of the supervisor
            where the fit is to the supervisor's, never the truth.
        folds: instead, every row is held out once; `groups` (a name a row) are never divided. The fits returned are to all rows.
        seed: of the folds.
        tolerance: of the gradient's norm, in coordinates where the curvature is about 1.
        iterations: evaluations a penalty, at most.
        classes: their number, where `targets` are classes and the highest may be missing; 0 = as found.
        label: of the progress bar; "" = none.

    Raises:
        UserError: what does not fit together, or a value out of range.
    """
    l2s = sorted((float(l2) for l2 in l2s), reverse=True)
    if not l2s or not all(0 < l2 < np.inf for l2 in l2s):
        raise UserError(f"l2={l2s}: expected at least one penalty, all above 0")
    if heldout is not None and folds:
        raise UserError(f"folds={folds}: expected held-out rows or folds, not both")
    rows = Rows(features)
    parts = glm.fold_of(rows.n, folds, seed, groups) if folds else None
    data = _Data(rows, targets, classes)
    other = None
    if heldout is not None:
        other_rows = Rows(heldout[0], "held-out features")
        other_rows.check(rows.d)
        other = _Data(other_rows, heldout[1], data.classes, data.mean)
    bar = Progress(len(l2s) * (folds + 1), label=label, unit="fit") if label else None
    try:
        losses = _over_folds(data, parts, folds, l2s, tolerance, iterations, bar) if folds else [None] * len(l2s)
        fits = []
        for l2, (theta, info), loss in zip(l2s, _descend(data, data.here, l2s, tolerance, iterations, bar), losses):
            if other is not None:
                loss = float(other.loss(theta, other.here)[0])
            weights = np.asarray(theta[0])
            bias = np.asarray(theta[1], np.float64) - weights.astype(np.float64) @ data.mean
            fits.append(Fit(l2=l2, weights=np.ascontiguousarray(weights.T), bias=bias.astype(np.float32), heldout_loss=loss, **info))
        return fits
    finally:
        if bar is not None:
            bar.close()


class _Data:
    """Rows and labels in blocks on the device: `x [blocks, size, d]` centred, `y` `[blocks, size, classes]` or classes
    `[blocks, size]`, `here [blocks, size]`: 1 for a row, 0 for what fills the last block up."""

    def __init__(self, rows: Rows, targets, classes: int = 0, mean: np.ndarray | None = None):
        self.rows = rows
        self.mean = rows.mean() if mean is None else mean
        labels = Targets({"targets": targets}, rows.n, {"targets"}, classes)
        self.classes = labels.classes
        if self.classes < 2:
            raise UserError(f"labels: {self.classes} class, expected 2 or more")
        hard, _ = labels.of("targets")
        size = min(rows.size, max(BLOCK // self.classes, 64))
        self.shape = -(-rows.n // size), size
        self.x = jax.device_put(rows.aligned(self.mean, self.shape[0] * size).reshape(*self.shape, rows.d), may_alias=True)
        self.y = self._cut(hard if (hard >= 0).all() else labels.soft[0])
        self.here = self.only(np.ones(rows.n))

    def _cut(self, rows: np.ndarray) -> jax.Array:
        """Rows `[n, ...]` in blocks; zeros fill the last one up."""
        room = ((0, self.shape[0] * self.shape[1] - len(rows)),) + ((0, 0),) * (rows.ndim - 1)
        return jnp.asarray(np.pad(rows, room).reshape(*self.shape, *rows.shape[1:]))

    def only(self, rows: np.ndarray) -> jax.Array:
        """Weights of the blocks' rows: 1 where `rows` (`[n]`), else 0."""
        return self._cut(rows.astype(np.float32))

    @functools.cached_property
    def basis(self) -> tuple[jax.Array, jax.Array, bool]:
        """What makes the problem round, see `glm.basis_of`."""
        basis, spectrum, whole, _ = glm.basis_of(self.rows, self.mean)
        return jnp.asarray(basis), jnp.asarray(spectrum), whole

    def loss(self, theta, here) -> tuple[jax.Array, jax.Array]:
        """Mean cross-entropy, and mean curvature of a score, of the rows that weigh 1."""
        return _loss_and_curvature(self.x, self.y, here, *theta)


def _over_folds(data: _Data, parts, folds: int, l2s, tolerance, iterations, bar) -> list[float]:
    """Held-out loss of every penalty, the mean over all rows."""
    summed = np.zeros(len(l2s))
    for fold in range(folds):
        held = parts == fold
        for i, (theta, _) in enumerate(_descend(data, data.only(~held), l2s, tolerance, iterations, bar)):
            summed[i] += float(data.loss(theta, data.only(held))[0]) * held.sum()
    return (summed / len(parts)).tolist()


def _descend(data: _Data, here, l2s, tolerance: float, iterations: int, bar):
    """Yields (theta, facts for `Fit`) of every penalty; theta = weights `[classes, d]`, bias `[classes]`, for centred rows."""
    basis, spectrum, whole = data.basis
    theta = (jnp.zeros((data.classes, data.rows.d)), jnp.zeros(data.classes))
    loss, curvature = (float(a) for a in data.loss(theta, here))
    for l2 in l2s:
        taken, norm, used = 0, np.inf, 0.0
        while taken < iterations:
            if norm <= tolerance and curvature > used / 2:
                break
            used = max(curvature, LEAST)
            most = min(CHUNK, iterations - taken)
            theta, norm, some = _chunk(whole, most, data.x, data.y, here, basis, spectrum, l2, used, theta, tolerance)
            norm, taken = float(norm), taken + int(some)
            loss, curvature = (float(a) for a in data.loss(theta, here))
            if norm > tolerance and int(some) < most and curvature > used / 2:
                break  # float32 shows no way further down
        objective = loss + l2 * float(jnp.vdot(theta[0], theta[0], precision=HIGHEST))
        if bar is not None:
            bar.update(1, loss=loss, l2=l2, evaluations=taken)
        if norm > TOLERANCE:
            say(f"multinomial regression: not converged after {taken} evaluations at l2={l2:g}: the gradient is {norm:.2g}, "
                f"expected at most {TOLERANCE:g}")
        yield theta, {"objective": objective, "loss": loss, "iterations": taken, "gradient_norm": norm, "converged": norm <= TOLERANCE}


@functools.partial(jax.jit, static_argnames=("whole", "most"))
def _chunk(whole: bool, most: int, x, y, here, basis, spectrum, l2, curvature, theta, tolerance):
    """At most `most` evaluations of L-BFGS from theta: the next theta, the gradient's norm, evaluations."""
    scale = jax.lax.rsqrt(curvature * spectrum + 2 * l2)
    rest = 0.0 if whole else jax.lax.rsqrt(2 * l2)  # of the directions outside of the basis
    root = jnp.sqrt(curvature)
    shape = theta[0].shape

    def stretch(z, scale, rest):
        part = jnp.matmul(z, basis, precision=HIGHEST) * (scale - rest)
        return rest * z + jnp.matmul(part, basis.T, precision=HIGHEST)

    def theta_of(z):
        return stretch(z[: -shape[0]].reshape(shape), scale, rest), z[-shape[0] :] / root

    def objective(z):
        weights, bias = theta_of(z)
        value, (by_weights, by_bias) = _value_and_gradient(x, y, here, weights, bias)
        by_weights += 2 * l2 * weights
        value += l2 * jnp.vdot(weights, weights, precision=HIGHEST)
        return value, jnp.append(stretch(by_weights, scale, rest).ravel(), by_bias / root)

    back = stretch(theta[0], 1 / scale, 0.0 if whole else 1 / rest)
    z, norm, taken = lbfgs.minimise(objective, jnp.append(back.ravel(), theta[1] * root), tolerance, most, with_gradient=True)
    return theta_of(z), norm, taken


def _block(x, y, weights, bias):
    """Of a block of rows: cross-entropies, probabilities and label distributions (classes stay classes)."""
    z = jnp.einsum("bd,kd->bk", x, weights, precision=HIGHEST) + bias
    log_p = jax.nn.log_softmax(z)
    if y.ndim == 1:
        return -jnp.take_along_axis(log_p, y[:, None], axis=1)[:, 0], jnp.exp(log_p), jax.nn.one_hot(y, z.shape[1])
    return -jnp.sum(y * log_p, axis=1), jnp.exp(log_p), y


def _value_and_gradient(x, y, here, weights, bias):
    """Mean cross-entropy of the rows that weigh 1, and its gradient: one pass over the blocks."""
    count = jnp.sum(here)

    def add(total, block):
        x, y, here = block
        losses, p, target = _block(x, y, weights, bias)
        residual = (p * jnp.sum(target, axis=1, keepdims=True) - target) * here[:, None]
        value, by_weights, by_bias = total
        by_weights += jnp.einsum("bk,bd->kd", residual, x, precision=HIGHEST)
        return (value + jnp.sum(here * losses), by_weights, by_bias + jnp.sum(residual, axis=0)), None

    start = jnp.float32(0), jnp.zeros_like(weights), jnp.zeros_like(bias)
    (value, by_weights, by_bias), _ = jax.lax.scan(add, start, (x, y, here))
    return value / count, (by_weights / count, by_bias / count)


@jax.jit
def _loss_and_curvature(x, y, here, weights, bias):
    def add(total, block):
        x, y, here = block
        losses, p, _ = _block(x, y, weights, bias)
        return total + jnp.stack([jnp.sum(here * losses), jnp.sum(here * jnp.mean(p * (1 - p), axis=1))]), None

    total, _ = jax.lax.scan(add, jnp.zeros(2), (x, y, here))
    return total[0] / jnp.sum(here), total[1] / jnp.sum(here)
