"""Logistic and ridge regression on soft labels: L-BFGS on one copy of the features for all penalties and folds at once.

The objective is mean(loss) + l2 * sum(w^2), without penalty on the bias: loss = cross-entropy of the soft label for "logistic"
(EleutherAI/w2s, `logistic.py`), squared error for "linear". It is minimised in coordinates z, w = M z, in which it is nearly
round: M comes from the eigenvectors of the features' covariance. M is invertible, so the minimum is that of the stated objective;
only the way there is shorter. Each problem is one lane of a batch, and all lanes read the features in the same two products.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import math

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax.errors import UserError
from w2s_jax.probes import lbfgs
from w2s_jax.probes.rows import Rows
from w2s_jax.progress import say

FLATTEST = 1e-6  # mean curvature below which the coordinates are not chosen again
GRID = tuple(10.0**e for e in range(-5, 3))  # penalties tried, in units of the features' mean variance
TOLERANCE = 1e-5  # norm of the gradient in z at which a fit has converged; the curvature there is at most about 1
AIM = 2e-6  # where it stops trying; float32 may show no way from TOLERANCE down to this
ROUGH = 1e-3  # the same for cross-validation: the held-out loss is then right to about 1e-6 / curvature
ITERATIONS = 1000
CV_ITERATIONS = 200
SAMPLE = 4  # times the number of features: rows that the covariance is taken from
LONG = 1e8  # numbers in the features from which on it says what it is doing
TINY = np.finfo(np.float32).tiny
HIGHEST = jax.lax.Precision.HIGHEST
CURVATURE = {"logistic": 0.25, "linear": 2.0}  # the loss's second derivative in the score, at most


@dataclasses.dataclass(frozen=True)
class Linear:
    """score(x) = (x - mean) . weights + bias."""

    mean: np.ndarray
    weights: np.ndarray
    bias: float

    def __call__(self, rows: Rows) -> np.ndarray:
        """Scores, float32 `[m]`."""
        rows.check(len(self.mean))
        out = np.empty(rows.n, np.float32)
        for where, block in rows.blocks():
            out[where] = (block - self.mean) @ self.weights + np.float32(self.bias)
        return out


def fit(kind: str, rows: Rows, soft: np.ndarray, l2: float | None, folds: int, seed: int, groups=None) -> tuple[Linear, dict]:
    """Fits `kind` (logistic | linear).

    Args:
        rows: features `[n, d]`. One float32 copy of them is made on the device.
        soft: float32 `[n]`, probability of class 1.
        l2: the penalty; None = that of `GRID` (times the features' mean variance) with the least held-out loss in cross-validation.
        folds: of the cross-validation; `groups` (a name a row) are never divided.
        seed: of the folds.

    Returns:
        The fit, and {l2, iterations, converged, gradient_norm, objective}; with cross-validation also
        `cross_validation` = {l2: [...], loss: [...], standard_error: [...]}, folds, and whether l2 is at the edge of the grid.
    """
    if kind == "logistic" and not 0 < soft.mean(dtype=np.float64) < 1:
        raise UserError(f"labels: every one is {soft[0]:g}; probe=logistic expected both classes, since its bias has no limit else")
    parts = None if l2 is not None else fold_of(rows.n, folds, seed, groups)
    mean = rows.mean()
    if rows.n * rows.d > LONG:
        say(f"probe={kind}: the features' covariance [{rows.d}, {rows.d}], then the fit to {rows.n} rows")
    basis, spectrum, whole, variance = basis_of(rows, mean)
    x, targets = jax.device_put(rows.aligned(mean), may_alias=True), jnp.asarray(soft)
    solve = functools.partial(_solve, kind, whole, x, targets, jnp.asarray(basis), jnp.asarray(spectrum))
    start, info = np.zeros((1, rows.d + 1), np.float32), {}
    if parts is not None:
        grid = [float(f"{variance * value:.6g}") for value in reversed(GRID)]  # equal losses go to the larger penalty
        lanes = [(value, fold) for value in grid for fold in range(folds)]
        penalty, held = (jnp.asarray(column) for column in (np.array([a for a, _ in lanes], np.float32), np.array([b for _, b in lanes])))
        if rows.n * rows.d > LONG:
            say(f"probe={kind}: {len(lanes)} fits of the cross-validation at once")
        out = solve(jnp.asarray(parts), penalty, held, jnp.zeros((len(lanes), rows.d + 1)), ROUGH, CV_ITERATIONS)
        sums = np.asarray(out.held_out, np.float64).reshape(len(grid), folds)
        counts = np.bincount(parts, minlength=folds)
        loss = sums.sum(axis=1) / counts.sum()
        spread = (sums / counts).std(axis=1, ddof=1) / math.sqrt(folds)
        best = int(loss.argmin())
        l2 = grid[best]
        start = np.asarray(out.theta).reshape(len(grid), folds, -1)[best].mean(axis=0, keepdims=True)
        info = {"cross_validation": {"l2": grid, "loss": loss.tolist(), "standard_error": spread.tolist()}, "folds": folds,
                "l2_at_edge": best in (0, len(grid) - 1), "cross_validation_converged": bool(np.all(out.norm <= ROUGH))}
    out = solve(jnp.zeros(rows.n, jnp.int32), jnp.full(1, l2, jnp.float32), jnp.full(1, -1), jnp.asarray(start), AIM, ITERATIONS)
    theta, norm = np.asarray(out.theta[0]), float(out.norm[0])
    info = {"l2": float(l2), "iterations": int(out.iterations[0]), "converged": norm <= TOLERANCE, "gradient_norm": norm,
            "objective": float(out.value[0])} | info
    if not info["converged"]:
        say(f"probe={kind}: not converged after {info['iterations']} iterations at l2={l2:g}: the gradient is {norm:.2g}, "
            f"expected at most {TOLERANCE:g}")
    return Linear(mean, theta[:-1], float(theta[-1])), info


def fold_of(n: int, folds: int, seed: int, groups=None) -> np.ndarray:
    """The fold of each row, int32 `[n]`: no group in two folds, no fold empty, their sizes as equal as the groups allow.

    Raises:
        UserError: fewer groups than folds.
    """
    codes = np.arange(n) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
    if len(codes) != n:
        raise UserError(f"groups: {len(codes)} names, expected {n}, one a document")
    sizes = np.bincount(codes)
    if not 2 <= folds <= len(sizes):
        raise UserError(f"probe_args.folds={folds}: expected 2 to {len(sizes)}, the number of {'rows' if groups is None else 'groups'}")
    order = np.random.default_rng(seed).permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]  # the largest first, each to the fold with the fewest rows
    filled = [(0, fold) for fold in range(folds)]
    of_group = np.empty(len(sizes), np.int32)
    for group in order:
        rows, fold = filled[0]
        of_group[group] = fold
        heapq.heapreplace(filled, (rows + int(sizes[group]), fold))
    return of_group[codes]


# ---------------------------------------------------------------- what makes the problem round


def basis_of(rows: Rows, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool, float]:
    """Eigenvectors `[d, r]` of the covariance, its eigenvalues `[r]`, whether all rows lie within them, the mean variance of a feature.

    From at most SAMPLE * d rows, evenly spread: an estimate only makes the way to the minimum longer. With fewer rows than features
    they come from the rows' products with each other.
    """
    if rows.n < rows.d:
        # In double, so that what is not exactly 0 is found: the weights are a combination of the rows, whatever the penalty.
        centred = rows[:].astype(np.float64) - mean
        gram = centred @ centred.T / rows.n
        values, vectors = np.linalg.eigh(gram)
        good = values > 1e-12 * max(values[-1], TINY)
        values, vectors = values[good], centred.T @ vectors[:, good] / np.sqrt(values[good] * rows.n)
        return vectors.astype(np.float32), values.astype(np.float32), True, float(np.trace(gram)) / rows.d or 1.0
    picked = np.arange(0, rows.n, max(1, rows.n // (SAMPLE * rows.d)))
    gram = np.zeros((rows.d, rows.d), np.float32)
    for start in range(0, len(picked), rows.size):
        block = rows[picked[start : start + rows.size]] - mean
        gram += np.asarray(_product(block.T, block))
    gram /= len(picked)
    values, vectors = (np.asarray(part) for part in jnp.linalg.eigh(gram))
    good = values > 1e-6 * max(values[-1], TINY)  # below that float32 gives noise
    return vectors[:, good], values[good], False, float(np.trace(gram, dtype=np.float64)) / rows.d or 1.0


@jax.jit
def _product(a, b):
    return jnp.matmul(a, b, precision=HIGHEST)


# ---------------------------------------------------------------- the minimiser


@functools.partial(jax.tree_util.register_dataclass, data_fields=("theta", "value", "norm", "iterations", "held_out"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Solution:
    """Of each lane: weights and bias `[lanes, d + 1]`, objective, norm of the gradient in z, updates, summed held-out loss."""

    theta: jax.Array
    value: jax.Array
    norm: jax.Array
    iterations: jax.Array
    held_out: jax.Array


def _loss(kind: str, score, target):
    if kind == "linear":
        return jnp.square(score - target)
    # Not softplus(score) - target * score: the difference of two large numbers would hide the loss of a well fitted row.
    return target * jax.nn.softplus(-score) + (1 - target) * jax.nn.softplus(score)


@functools.partial(jax.jit, static_argnames=("kind", "whole", "iterations"))
def _solve(kind: str, whole: bool, x, targets, basis, spectrum, parts, penalty, held, start, tolerance, iterations: int) -> Solution:
    """Minimises every lane's objective from `start`.

    Args:
        x: `[n, d]`, centred. targets: `[n]`. basis: `[d, r]`, spectrum: `[r]`, see `basis_of`.
        parts: int `[n]`, the fold of each row. penalty, held: `[lanes]`, l2 and the fold that is left out (-1: none).
        start: `[lanes, d + 1]`. tolerance: of the gradient's norm in z.
    """
    d = x.shape[1]

    def lane(penalty, held, start):
        train = (parts != held).astype(jnp.float32)
        count = jnp.sum(train)
        def score_of(theta):
            return jnp.matmul(x, theta[:d], precision=HIGHEST) + theta[d]

        def stretch(z, curvature, back=False):
            """M z, or the inverse of M; the last entry is the bias."""
            scale = jax.lax.rsqrt(curvature * spectrum + 2 * penalty)
            rest = 0.0 if whole else jax.lax.rsqrt(2 * penalty)  # of the directions outside of the basis
            if back:
                scale, rest = 1 / scale, 0.0 if whole else 1 / rest
            part = jnp.matmul(z[:d], basis, precision=HIGHEST)
            inner = rest * z[:d] + jnp.matmul(basis, (scale - rest) * part, precision=HIGHEST)
            return jnp.append(inner, z[d] * (jnp.sqrt(curvature) if back else jax.lax.rsqrt(curvature)))

        def descend(theta, curvature, left):
            """L-BFGS in the coordinates of one curvature."""

            def objective(z):
                theta = stretch(z, curvature)
                losses = _loss(kind, score_of(theta), targets)
                return jnp.sum(train * losses) / count + penalty * jnp.sum(jnp.square(theta[:d]))

            z, norm, taken = lbfgs.minimise(objective, stretch(theta, curvature, back=True), tolerance, left)
            return stretch(z, curvature), taken, norm

        def another(carry):
            _, curvature, actual, step, _ = carry
            return (actual < curvature / 2) & (step < iterations)

        def round_(carry):
            theta, _, curvature, step, _ = carry
            theta, taken, norm = descend(theta, curvature, iterations - step)
            actual = curvature
            if kind == "logistic":  # well fitted rows hardly bend the loss: then the coordinates are chosen again
                p = jax.nn.sigmoid(score_of(theta))
                actual = jnp.maximum(jnp.sum(train * p * (1 - p)) / count, FLATTEST)
            return theta, curvature, actual, step + taken, norm

        most = jnp.float32(CURVATURE[kind])
        theta, _, _, step, norm = jax.lax.while_loop(another, round_, (start, 4 * most, most, 0, jnp.inf))
        losses = _loss(kind, score_of(theta), targets)
        value = jnp.sum(train * losses) / count + penalty * jnp.sum(jnp.square(theta[:d]))
        return Solution(theta, value, norm, step, jnp.sum((1 - train) * losses))

    return jax.vmap(lane)(penalty, held, start)
