"""Accuracy, AUROC, calibration, and their bootstrap intervals. numpy only, nothing heavy.

One resampling scheme everywhere (DESIGN.md, idea 9): documents are drawn with
replacement by group, so that examples made from one question move together, and the
statistics that are compared share their draws. A difference or a ratio of two runs is
therefore paired: it is much sharper than two separate error bars suggest.

Every interval is a 95% percentile interval, `[lo, hi]`, or None where it cannot be given.
Every function that draws is a pure function of its arguments (`seed` included).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np

REPLICATES = 2000  # bootstrap replicates: the 2.5% percentile then rests on 50 of them
UNDEFINED_LIMIT = 0.05  # above this share of undefined replicates an interval is withheld
_CHUNK = 64  # replicates drawn at once: bounds memory at [64, documents] doubles
_BLOCK = 2**21  # draws that are weighed at once: 16 MiB of doubles, or _CHUNK replicates if that is more
_KEEP = 2**25  # draws (replicates x groups) that an object remembers, 2 bytes each, instead of drawing them again (a quarter: as doubles)


def predictions(logits: np.ndarray) -> np.ndarray:
    """The likelier class of each row of `[n, classes]` logits; ties go to the lower class, as in the references."""
    return np.argmax(np.asarray(logits), axis=-1)


def scores(logits: np.ndarray) -> np.ndarray:
    """What AUROC ranks by: the logit of class 1 minus that of class 0, float32 `[n]`."""
    logits = np.asarray(logits, np.float32)
    return logits[..., 1] - logits[..., 0]


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of the `[n]` integer labels that the `[n, classes]` logits predict."""
    logits, labels = _checked(logits, labels)
    return float(np.mean(predictions(logits) == labels))


def top_k(logits: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Whether each label is among the k likeliest classes, bool `[n]`; of equal logits the lower class comes first.

    Args:
      logits: `[n, classes]`, finite. labels: int `[n]`. k: 1 or more; from `classes` on every row is True.
    """
    logits, labels = _checked(logits, labels)
    if k < 1:
        raise ValueError(f"k={k}: expected 1 or more")
    out = np.empty(len(labels), bool)
    size = max(1, _BLOCK // logits.shape[1])
    for start in range(0, len(labels), size):
        block, label = logits[start : start + size], labels[start : start + size, None]
        own = np.take_along_axis(block, label, axis=1)
        ahead = (block > own) | ((block == own) & (np.arange(logits.shape[1]) < label))
        out[start : start + size] = ahead.sum(axis=1) < k
    return out


def auroc(score: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve by mid-ranks (a tie counts one half); NaN where only one class occurs.

    Args:
      score: float `[n]`, higher = class 1; ranked as float32. `scores(logits)` makes it.
      labels: `[n]`, 0 or 1.
    """
    score, labels = np.asarray(score, np.float32), np.asarray(labels)
    positive = labels == 1
    n1, n0 = int(positive.sum()), int((~positive).sum())
    if n1 == 0 or n0 == 0:
        return float("nan")
    _, place, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # from 1; equal scores share their mean rank
    return float((ranks[positive].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities in nats of `[n, classes]` logits, float64."""
    z = np.asarray(logits, np.float64)
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def reliability(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> np.ndarray:
    """What a reliability diagram shows, float64 `[3, bins]`: documents, sum of their confidences, and how many are right.

    The bins are equal, `(i / bins, (i + 1) / bins]`, of the confidence: the probability of the predicted class (Guo et al.
    2017, arXiv 1706.04599). Sums of several runs may be added.
    """
    logits, labels = _checked(logits, labels)
    confidence, right = np.exp(log_softmax(logits).max(axis=1)), predictions(logits) == labels
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return np.stack([np.bincount(index, weights=w, minlength=bins) for w in (np.ones(len(labels)), confidence, right)])


def ece(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: the mean of |accuracy - confidence| over the bins of `reliability`, weighted by their
    documents (Guo et al. 2017, arXiv 1706.04599)."""
    documents, confidence, right = reliability(logits, labels, bins)
    return float(np.abs(right - confidence).sum() / documents.sum())


def majority_baseline(labels: np.ndarray) -> float:
    """Accuracy of always answering the commonest label."""
    return float(np.unique(np.asarray(labels), return_counts=True)[1].max() / len(labels))


class Bootstrap:
    """Draws of whole groups with replacement, the same ones for everything that is computed with one object.

    Args:
      groups: a name a document; documents of one name are drawn together.
      seed: of the draws. Equal seeds and equal sets of names give equal draws.
      replicates: number of draws.
    """

    def __init__(self, groups: Sequence[str], seed: int = 0, replicates: int = REPLICATES):
        self.names = sorted(set(groups))
        self.seed, self.replicates = seed, replicates
        self._index = {name: i for i, name in enumerate(self.names)}
        self._kept: dict[int, np.ndarray] = {}
        self._doubles: list[np.ndarray] | None = None

    def codes(self, groups: Sequence[str]) -> np.ndarray:
        """Index of each document's group, int `[n]`; KeyError for a name that the draws do not cover."""
        return np.array([self._index[g] for g in groups], np.int64)

    def counts(self) -> Iterator[np.ndarray]:
        """Yields integers `[<= 64, groups]`: how often each group was drawn, a row a replicate."""
        size = len(self.names)
        for start in range(0, self.replicates, _CHUNK):
            if start in self._kept:
                yield self._kept[start]
                continue
            rows = min(_CHUNK, self.replicates - start)
            draws = np.random.default_rng([self.seed, start]).integers(size, size=(rows, size))
            draws += np.arange(rows)[:, None] * size
            counts = np.bincount(draws.ravel(), minlength=rows * size).reshape(rows, size)
            if size < 2**16:
                counts = counts.astype(np.uint16)
                if self.replicates * size <= _KEEP:
                    self._kept[start] = counts
            yield counts

    def ratios(self, numerators: np.ndarray, denominators: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Replicates `[replicates, m]` of sum(numerator) / sum(denominator) over documents, NaN where 0 / 0.

        `numerators` and `denominators` are `[n, m]`: m ratios in one pass over the draws.
        """
        size, m = len(self.names), np.shape(numerators)[1]
        columns = np.concatenate([np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)], axis=1)
        sums = [np.bincount(codes, weights=column, minlength=size) for column in columns.T]
        once = {column.tobytes(): column for column in sums}  # denominators repeat
        place = {key: i for i, key in enumerate(once)}
        table = np.stack(list(once.values()), axis=1)
        out = np.concatenate([w @ table for w in self._blocks()])[:, [place[column.tobytes()] for column in sums]]
        with np.errstate(invalid="ignore", divide="ignore"):
            return out[:, :m] / out[:, m:]

    def _blocks(self) -> list[np.ndarray] | Iterator[np.ndarray]:
        """`counts` as float64 in larger blocks, for few calls of BLAS, whose threads wait for each other in every one."""
        if self._doubles is None and self.replicates * len(self.names) <= _KEEP // 4:
            self._doubles = list(self._convert())
        return self._convert() if self._doubles is None else self._doubles

    def _convert(self) -> Iterator[np.ndarray]:
        rows = []
        for w in self.counts():
            rows.append(w)
            if (len(rows) + 1) * w.size > _BLOCK:
                yield np.concatenate(rows).astype(np.float64)
                rows = []
        if rows:
            yield np.concatenate(rows).astype(np.float64)

    def ratio(self, numerator: np.ndarray, denominator: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """`ratios` of one numerator and one denominator, both `[n]`: replicates `[replicates]`."""
        return self.ratios(np.asarray(numerator)[:, None], np.asarray(denominator)[:, None], codes)[:, 0]

    def accuracy(self, logits: np.ndarray, labels: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Replicates `[replicates]` of the accuracy."""
        return self.ratio(predictions(logits) == labels, np.ones(len(labels)), codes)

    def top5(self, logits: np.ndarray, labels: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Replicates `[replicates]` of the share of labels among the five likeliest classes (`top_k`)."""
        return self.ratio(top_k(logits, labels, 5), np.ones(len(labels)), codes)

    def auroc(self, logits: np.ndarray, labels: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Replicates `[replicates]` of the AUROC by mid-ranks; NaN where a draw holds one class only."""
        score, positive = scores(logits), np.asarray(labels) == 1
        up, down = (np.flatnonzero(rows)[np.argsort(score[rows])] for rows in (positive, ~positive))  # by score
        below, upto = (np.searchsorted(score[down], score[up], side) for side in ("left", "right"))  # of class 0, for each of class 1
        out = []
        for w in self.counts():
            total = np.zeros((len(w), len(down) + 1), np.int64 if len(self.names) >= 2**16 else np.int32)
            np.cumsum(w[:, codes[down]], axis=1, out=total[:, 1:])
            ups = w[:, codes[up]].astype(np.float64)
            wins = total[:, below] + total[:, upto]  # twice: a tie counts one half
            with np.errstate(invalid="ignore", divide="ignore"):
                out.append(np.einsum("ij,ij->i", ups, wins) / (2.0 * ups.sum(axis=1) * total[:, -1]))
        return np.concatenate(out)


def interval(replicates: np.ndarray) -> list[float] | None:
    """95% percentile interval `[lo, hi]` of the defined replicates; None where over 5% are NaN."""
    replicates = np.asarray(replicates, np.float64)
    defined = replicates[np.isfinite(replicates)]
    if len(defined) < max(1, (1 - UNDEFINED_LIMIT) * len(replicates)):
        return None
    return [float(x) for x in np.percentile(defined, [2.5, 97.5])]


def evaluate(logits: np.ndarray, labels: np.ndarray, groups: Sequence[str] | None = None, seed: int = 0,
             replicates: int = REPLICATES) -> dict:
    """The quality of a run's test predictions, under the names of results.json.

    Args:
      logits: `[n, classes]`, finite.
      labels: int `[n]`, all known (no -1).
      groups: what is resampled together, a name a document; None = each document alone.
      seed: of the bootstrap.
    Returns:
      accuracy, accuracy_ci `[lo, hi]`, auroc, auroc_ci, n_test, majority_baseline. auroc and its interval are
      None for more than two classes or where only one occurs. An interval is None with fewer than two groups.
    """
    logits, labels = _checked(logits, labels)
    names = _names(groups, len(labels))
    boot = Bootstrap(names, seed, replicates)
    codes = boot.codes(names)
    right = estimate(boot, "accuracy", logits, labels, codes)
    binary = logits.shape[1] == 2 and len(np.unique(labels)) == 2
    area = estimate(boot, "auroc", logits, labels, codes) if binary else None
    return {
        "accuracy": right.value,
        "accuracy_ci": interval(right.replicates),
        "auroc": area.value if area else None,
        "auroc_ci": interval(area.replicates) if area else None,
        "n_test": len(labels),
        "majority_baseline": majority_baseline(labels),
    }


def small_test_warning(results: dict, limit: float = 0.05, things: str = "documents") -> str:
    """One line where the accuracy's interval is wider than +-`limit`, else "". `results` as `evaluate` gives it; `things`: tested on."""
    n, ci = results["n_test"], results["accuracy_ci"]
    if ci is None:
        return f"the test set ({n} {things}, one group) is too small for an error bar"
    half = (ci[1] - ci[0]) / 2
    if half <= limit:
        return ""
    needed = int(np.ceil(n * (half / limit) ** 2))  # the half-width falls with the root of n
    return (f"the test set is small: {n} {things} leave the accuracy at {results['accuracy']:.3f} +- {half:.3f}; "
            f"about {needed} would give +- {limit:g}")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A statistic of one run: its value, and its replicates `[replicates]` under the shared draws."""

    value: float
    replicates: np.ndarray


def estimate(boot: Bootstrap, metric: str, logits: np.ndarray, labels: np.ndarray, codes: np.ndarray) -> Estimate:
    """`metric` (accuracy | auroc | top5) of one run's test predictions, to be combined by `pgr`."""
    logits, labels = _checked(logits, labels)
    if metric not in ("accuracy", "auroc", "top5"):
        raise ValueError(f"metric {metric!r}: accuracy | auroc | top5")
    if metric == "auroc":
        value = auroc(scores(logits), labels)
    else:
        value = accuracy(logits, labels) if metric == "accuracy" else float(top_k(logits, labels, 5).mean())
    if len(boot.names) < 2:  # nothing to draw: no error bar, rather than one of width 0
        return Estimate(value, np.full(boot.replicates, np.nan))
    return Estimate(value, getattr(boot, metric)(logits, labels, codes))


def mean_over_seeds(estimates: Sequence[Estimate], seed: int = 0) -> Estimate:
    """Mean over seeds (runs with equal settings); each replicate draws the seeds again, with replacement.

    The drawn seeds depend on `seed` and the number of runs only, so that roles of equal length share them.
    """
    table = np.stack([e.replicates for e in estimates])  # [seeds, replicates]
    picked = _drawn_seeds(seed, *table.shape)
    return Estimate(float(np.mean([e.value for e in estimates])), np.take_along_axis(table, picked, axis=0).mean(axis=0))


def pgr(weak: Sequence[Estimate], student: Sequence[Estimate], ceiling: Sequence[Estimate], seed: int = 0) -> dict:
    """Performance gap recovered, (student - weak) / (ceiling - weak), and all that it must be read with.

    Args:
      weak, student, ceiling: one Estimate a seed, in the same order of seeds, all from one Bootstrap.
      seed: of the draw of seeds.
    Returns:
      weak, student, ceiling, gap (ceiling - weak), gain (student - weak), pgr, each with `<name>_ci`; `n_seeds`;
      `undefined`: the share of replicates whose gap is not positive (or not defined: one class drawn);
      `gap_clear`: the gap's interval lies above 0. pgr is None where the gap is not positive, its interval None where
      that is so or over 5% of the replicates are undefined. Seeds are resampled with the documents; with one seed the
      intervals cover the test documents only.
    """
    return pgr_and_replicates(weak, student, ceiling, seed)[0]


def pgr_and_replicates(weak: Sequence[Estimate], student: Sequence[Estimate], ceiling: Sequence[Estimate],
                       seed: int = 0) -> tuple[dict, np.ndarray]:
    """`pgr`, and its replicates `[replicates]` (NaN where undefined), from which a median over pairs gets its interval."""
    if not len(weak) == len(student) == len(ceiling) or not weak:
        raise ValueError(f"seeds differ: {len(weak)} weak, {len(student)} student, {len(ceiling)} ceiling")
    w, s, c = (mean_over_seeds(e, seed) for e in (weak, student, ceiling))
    gaps = c.replicates - w.replicates
    defined = gaps > 0  # False for NaN
    ratios = np.full(len(gaps), np.nan)
    ratios[defined] = (s.replicates - w.replicates)[defined] / gaps[defined]
    gap_value = c.value - w.value
    out = {}
    for name, value, draws in (("weak", w.value, w.replicates), ("student", s.value, s.replicates),
                               ("ceiling", c.value, c.replicates), ("gap", gap_value, gaps),
                               ("gain", s.value - w.value, s.replicates - w.replicates)):
        out[name] = None if np.isnan(value) else float(value)
        out[f"{name}_ci"] = None if np.isnan(value) else interval(draws)
    positive = bool(gap_value > 0)
    out["pgr"] = float((s.value - w.value) / gap_value) if positive else None
    out["pgr_ci"] = interval(ratios) if positive else None
    out["undefined"] = float(1 - defined.mean())
    out["gap_clear"] = bool(positive and out["gap_ci"] is not None and out["gap_ci"][0] > 0)
    out["n_seeds"] = len(weak)
    return out, ratios


def pgr_bootstrap(weak: np.ndarray, student: np.ndarray, ceiling: np.ndarray, labels: np.ndarray,
                  groups: Sequence[str] | None = None, metric: str = "accuracy", seed: int = 0,
                  replicates: int = REPLICATES) -> dict:
    """`pgr` from logits `[seeds, n, classes]` (or `[n, classes]`: one seed) on one test set of `[n]` labels."""
    labels = np.asarray(labels)
    names = _names(groups, len(labels))
    boot = Bootstrap(names, seed, replicates)
    codes = boot.codes(names)
    roles = [[estimate(boot, metric, run, labels, codes) for run in np.asarray(role).reshape(-1, *np.shape(role)[-2:])]
             for role in (weak, student, ceiling)]
    return pgr(*roles, seed=seed)


def agreement(student: np.ndarray, supervisor: np.ndarray, labels: np.ndarray) -> dict:
    """How often two predictions `[n]` (classes) agree, over all documents and split by the supervisor being right.

    Returns `all`, `right`, `wrong` (None where no such document) and the counts `n_right`, `n_wrong`. A student that
    only imitates has `wrong` near `right`; one that knows better has a low `wrong`.
    """
    student, supervisor, labels = (np.asarray(x) for x in (student, supervisor, labels))
    same, right = student == supervisor, supervisor == labels

    def share(rows):
        return float(same[rows].mean()) if rows.any() else None

    return {"all": share(np.ones_like(right)), "right": share(right), "wrong": share(~right),
            "n_right": int(right.sum()), "n_wrong": int((~right).sum())}


@functools.lru_cache(maxsize=64)
def _drawn_seeds(seed: int, seeds: int, replicates: int) -> np.ndarray:
    """Indices `[seeds, replicates]`, uniform with replacement; a stream apart from the documents'."""
    return np.random.default_rng([seed, 0x5EED, seeds]).integers(seeds, size=(seeds, replicates))


def _names(groups: Sequence[str] | None, n: int) -> Sequence[str]:
    names = [str(i) for i in range(n)] if groups is None else list(groups)
    if len(names) != n:
        raise ValueError(f"{len(names)} groups for {n} documents")
    return names


def _checked(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 logits `[n, classes]` and integer labels `[n]`; ValueError for anything that would hide in a mean."""
    logits, labels = np.asarray(logits, np.float32), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(f"logits {logits.shape} and labels {labels.shape}: expected [n, classes] and [n], n > 0")
    if not np.isfinite(logits).all():
        raise ValueError(f"{int((~np.isfinite(logits)).any(axis=1).sum())} of {len(labels)} documents have logits that are not finite")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels must be integers in [0, {logits.shape[1]}), found {labels.min()} to {labels.max()} ({labels.dtype})")
    return logits, labels
