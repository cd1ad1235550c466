"""Probes: predictors on frozen features, and what each of them would drop from a training set.

    fitted = probes.fit("logistic", {"l2": 1e-3}, features, soft)
    fitted.predict(other_features)                    # probability of class 1
    kept = fitted.keep(0.1)                           # the points to train on, without the 10% it disagrees with most

Sources: EleutherAI/w2s, `probe.py`, `topo.py`, `logistic.py` (knn, topofilter, logistic); Marks & Tegmark 2023, arXiv 2310.06824
(mean_difference). Features may be numpy, jax or mapped from a file; they are read in blocks of at most 64 MiB, but for logistic
and linear, which hold one copy of them on the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from w2s_jax.config import PROBE_ARGS
from w2s_jax.errors import UserError, nearest
from w2s_jax.probes import glm
from w2s_jax.probes.neighbours import SLACK, Index
from w2s_jax.probes.rows import Rows
from w2s_jax.probes.topofilter import components

NEAREST = 1e-7  # how near to 0 and 1 a probability comes in `Fitted.logits`


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A probe after its fit.

    Attributes:
        name: a key of `config.PROBE_ARGS`.
        args: its arguments, the defaults filled in.
        info: plain numbers, texts and lists for results.json.
    """

    name: str
    args: dict
    info: dict
    _probability: Callable[[Rows], np.ndarray]
    _keep: Callable[[float], np.ndarray]
    _log_odds: Callable[[Rows], np.ndarray] | None = None

    def predict(self, features) -> np.ndarray:
        """Probability of class 1, float32 `[m]`, of features `[m, d]`.

        Raises:
            UserError: another number of features than in the fit, or values that are not finite.
        """
        return self._probability(Rows(features))

    def logits(self, features) -> np.ndarray:
        """Logits float32 `[m, 2]` whose softmax is `predict`; finite: 0 and 1 are taken as 1e-7 and 1 - 1e-7."""
        rows = Rows(features)
        if self._log_odds is not None:
            z = self._log_odds(rows).astype(np.float64)
        else:
            p = np.clip(self._probability(rows).astype(np.float64), NEAREST, 1 - NEAREST)
            z = np.log(p) - np.log1p(-p)
        return np.stack([-z / 2, z / 2], axis=1).astype(np.float32)

    def keep(self, contamination: float) -> np.ndarray:
        """Which of the points of the fit to leave in the training set, bool `[n]`.

        topofilter keeps its components, less the points farthest from their neighbours' mean label, so that
        `round(contamination * n)` are dropped in all; the components alone may leave out more. Every other probe drops the
        `int(contamination * n)` points whose labels its predictions differ from most. Of equal ones the first are dropped.

        Args:
            contamination: the share to drop, in [0, 1).
        """
        if not 0 <= contamination < 1:
            raise UserError(f"contamination={contamination!r}: expected a share in [0, 1)")
        return self._keep(contamination)


def fit(name: str, args: dict | None, features, soft, seed: int = 0, groups: Sequence | None = None) -> Fitted:
    """Fits the probe called `name`.

    Args:
        name: a key of `config.PROBE_ARGS`.
        args: its arguments; absent or None ones take the default. An `l2` of None is chosen by cross-validation.
        features: `[n, d]`, finite; read as float32.
        soft: `[n]`, the labels' probability of class 1.
        seed: of the folds of the cross-validation; nothing else is drawn.
        groups: a name a row; rows of one name share a fold. None = each row alone.

    Raises:
        UserError: unknown name or argument, a value out of range, features or labels that do not fit together.
    """
    args = _resolve(name, args)
    rows, soft = Rows(features), _labels(soft)
    if len(rows) != len(soft):
        raise UserError(f"labels: {len(soft)}, expected {len(rows)}, one a row of the features")
    return FITS[name](args, rows, soft, seed, groups)


def keep(name: str, args: dict | None, features, soft, contamination: float, seed: int = 0, groups: Sequence | None = None) -> np.ndarray:
    """`Fitted.keep` of a fit made for it alone: which points to leave in the training set, bool `[n]`."""
    if not 0 <= contamination < 1:  # before the work of a fit
        raise UserError(f"contamination={contamination!r}: expected a share in [0, 1)")
    return fit(name, args, features, soft, seed, groups).keep(contamination)


def keep_random(n: int, dropped: int, seed: int = 0) -> np.ndarray:
    """The control of a filter: all but `dropped` random ones of n points, bool `[n]`."""
    if not 0 <= dropped <= n:
        raise UserError(f"dropped={dropped}: expected 0 to {n}, the number of points")
    kept = np.ones(n, bool)
    kept[np.random.default_rng([seed, 0xD207]).permutation(n)[:dropped]] = False
    return kept


def _without_farthest(distance: np.ndarray, count: int) -> np.ndarray:
    """All but the `count` largest, the first of equal ones dropped first."""
    kept = np.ones(len(distance), bool)
    kept[np.argsort(-distance, kind="stable")[:count]] = False
    return kept


def _resolve(name: str, args: dict | None) -> dict:
    if name not in PROBE_ARGS:
        raise UserError(f"probe={name!r}: expected one of {', '.join(PROBE_ARGS)}{nearest(name, PROBE_ARGS)}")
    defaults, given = PROBE_ARGS[name], {key: value for key, value in dict(args or {}).items() if value is not None}
    for key, value in given.items():
        if key not in defaults:
            takes = ", ".join(defaults) or "none"
            raise UserError(f"probe_args.{key}: probe={name} does not take it, its arguments: {takes}{nearest(key, defaults)}")
        low = {"k": 1, "folds": 2, "l2": np.finfo(np.float32).tiny}[key]
        number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
        if not (number and low <= value < np.inf and (key == "l2" or value == int(value))):
            what = "a number above 0" if key == "l2" else f"an integer, {low} or more"
            raise UserError(f"probe_args.{key}={value!r}: expected {what}")
        given[key] = float(value) if key == "l2" else int(value)
    return {**defaults, **given}


def _labels(soft) -> np.ndarray:
    soft = np.asarray(soft, np.float32)
    if soft.ndim != 1 or not ((soft >= 0) & (soft <= 1)).all():
        raise UserError(f"labels: {list(soft.shape)}, expected one probability of class 1 a row, all in [0, 1]")
    return soft


# ---------------------------------------------------------------- neighbours


def _mean_label(soft: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """Mean label of each row of neighbours `[m, k]`, summed in double, so that their order does not matter."""
    out = np.empty(len(neighbours), np.float32)
    for start in range(0, len(out), 2**16):
        out[start : start + 2**16] = soft[neighbours[start : start + 2**16]].mean(axis=1, dtype=np.float64)
    return out


def _farthest_dropped(predicted: np.ndarray, soft: np.ndarray, contamination: float) -> np.ndarray:
    """The rule of every filter but topofilter."""
    return _without_farthest(np.abs(predicted - soft), int(contamination * len(soft)))


def _fit_knn(args, rows, soft, seed, groups) -> Fitted:
    index, k = Index(rows), args["k"]
    if k > len(index):
        raise UserError(f"probe_args.k={k}: expected at most {len(index)}, the points to choose from")
    return Fitted("knn", args, {"k": k, "n": len(index)},
                  lambda queries: _mean_label(soft, index.neighbours(k, queries)),
                  lambda contamination: _farthest_dropped(_mean_label(soft, index.neighbours(k)), soft, contamination))


def _fit_topofilter(args, rows, soft, seed, groups) -> Fitted:
    """Predicts by the k nearest members of the components (`topolabel` in the reference)."""
    index, k = Index(rows), args["k"]
    if k >= len(index):
        raise UserError(f"probe_args.k={k}: expected at most {len(index) - 1}, the other points")
    candidates = index.within(2 * k + SLACK)  # long enough to hold most points' neighbours among the members, too
    member = components(index.neighbours(k, candidates=candidates, itself=False), soft > 0.5)
    left = int(member.sum())
    if left <= k:
        raise UserError(f"probe_args.k={k}: only {left} points are in the largest components, expected more than k")

    def keep_(contamination: float) -> np.ndarray:
        among = index.neighbours(k, candidates=candidates, itself=False, among=member)
        ids = np.flatnonzero(member)
        distance = np.abs(soft - _mean_label(soft, among))[ids]
        kept = np.zeros(len(soft), bool)
        kept[ids[_without_farthest(distance, max(round(contamination * len(soft)) - (len(soft) - left), 0))]] = True
        return kept

    return Fitted("topofilter", args, {"k": k, "n": len(index), "in_components": left},
                  lambda queries: _mean_label(soft, index.neighbours(k, queries, among=member)), keep_)


# ---------------------------------------------------------------- linear scores


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return (0.5 * (1 + np.tanh(z.astype(np.float64) / 2))).astype(np.float32)


def _by_score(name: str, args, info, rows, soft, score) -> Fitted:
    """A probe whose score is the log odds."""
    return Fitted(name, args, info, lambda queries: _sigmoid(score(queries)),
                  lambda contamination: _farthest_dropped(_sigmoid(score(rows)), soft, contamination), score)


def _fit_logistic(args, rows, soft, seed, groups) -> Fitted:
    score, info = glm.fit("logistic", rows, soft, args["l2"], args["folds"], seed, groups)
    return _by_score("logistic", args, info, rows, soft, score)


def _fit_linear(args, rows, soft, seed, groups) -> Fitted:
    """Ridge regression on the labels; a prediction beyond 0 or 1 is cut off."""
    score, info = glm.fit("linear", rows, soft, args["l2"], args["folds"], seed, groups)
    return Fitted("linear", args, info, lambda queries: np.clip(score(queries), 0, 1),
                  lambda contamination: _farthest_dropped(np.clip(score(rows), 0, 1), soft, contamination))


def _fit_mean_difference(args, rows, soft, seed, groups) -> Fitted:
    """The direction from the mean of class 0 to that of class 1, each row counted by its label's probability of the class.

    Along it both classes are taken as normal, of one variance: the log odds are linear in the projection.
    """
    share = float(soft.mean(dtype=np.float64))
    if not 0 < share < 1:
        raise UserError(f"labels: every one is {soft[0]:g}; probe=mean_difference expected both classes")
    mean = rows.mean()
    weighted = np.zeros(rows.d)
    centred = soft.astype(np.float64) - share
    for where, block in rows.blocks():
        weighted += np.float32(centred[where]) @ (block - mean)
    # mean_1 - mean_0 = cov(soft, x) / (share * (1 - share))
    direction = weighted / rows.n / (share * (1 - share))
    length = float(np.linalg.norm(direction))
    unit = (direction / length if length > 0 else direction).astype(np.float32)
    along = glm.Linear(mean, unit, 0.0)(rows).astype(np.float64)
    low, high = (float(np.average(along, weights=weight.astype(np.float64))) for weight in (1 - soft, soft))
    spread = float(np.mean(soft * (along - high) ** 2 + (1 - soft) * (along - low) ** 2))
    # Without a spread the classes lie apart altogether: a slope that reaches the largest log odds half-way is as good as any.
    slope = (high - low) / max(spread, (high - low) ** 2 / 32, np.finfo(np.float64).tiny)
    score = glm.Linear(mean, np.float32(slope * unit), float(np.log(share / (1 - share)) - slope * (high + low) / 2))
    info = {"distance": length, "standard_deviation": spread**0.5, "share": share}
    return _by_score("mean_difference", args, info, rows, soft, score)


FITS: dict[str, Callable] = {
    "knn": _fit_knn, "logistic": _fit_logistic, "linear": _fit_linear, "mean_difference": _fit_mean_difference,
    "topofilter": _fit_topofilter,
}  # fmt: skip
if set(FITS) != set(PROBE_ARGS):
    raise AssertionError(f"probes.FITS and config.PROBE_ARGS differ in {sorted(set(FITS) ^ set(PROBE_ARGS))}")
