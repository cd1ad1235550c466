"""What an image experiment concludes: methods, seeds, label noise and penalties, as rows of results.json.

Weak, student and ceiling of a seed are compared on the same draws of test images, as everywhere (DESIGN.md, idea 9).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from w2s_jax import metrics

TOP5_FROM = 6  # classes from which on a top-5 accuracy says something


@dataclasses.dataclass(frozen=True)
class Trio:
    """One seed's test logits, each float32 `[images, classes]`, and the ceiling's and the student's accuracy and agreement by epoch."""

    seed: int
    weak: np.ndarray
    student: np.ndarray
    ceiling: np.ndarray
    epochs: dict[str, list[float]] | None = None


class Comparison:
    """Estimates on one test set. `labels` int `[images]`; `groups`: copies of one image share a name."""

    def __init__(self, labels: np.ndarray, groups: Sequence[str], classes: int):
        self.labels, self.classes = np.asarray(labels), classes
        self.boot = metrics.Bootstrap(groups)
        self.codes = self.boot.codes(groups)
        self._known: dict[tuple, tuple] = {}

    def estimate(self, logits: np.ndarray, metric: str = "accuracy") -> metrics.Estimate:
        """Of one network; asked for again, it is not computed again."""
        key = (id(logits), metric)
        if key not in self._known:
            self._known[key] = (logits, metrics.estimate(self.boot, metric, logits, self.labels, self.codes))  # keeps the id taken
        return self._known[key][1]

    def accuracy(self, logits: Sequence[np.ndarray], metric: str = "accuracy") -> tuple[float, list[float] | None]:
        """Mean over seeds, and its interval."""
        found = metrics.mean_over_seeds([self.estimate(one, metric) for one in logits])
        return found.value, metrics.interval(found.replicates)

    def _pgr(self, trios: Sequence[Trio], metric: str) -> dict:
        return metrics.pgr(*([self.estimate(getattr(trio, role), metric) for trio in trios] for role in ("weak", "student", "ceiling")))

    def weak(self, name: str, logits: Sequence[np.ndarray]) -> dict:
        """The supervisor: name, accuracy, top5 (from six classes on), intervals."""
        out: dict = {"name": name}
        for metric in ("accuracy", *(("top5",) if self.classes >= TOP5_FROM else ())):
            out[metric], out[f"{metric}_ci"] = self.accuracy(logits, metric)
        return out

    def method(self, name: str, trios: Sequence[Trio]) -> dict:
        """A row of the report: PGR over all seeds and by seed, by accuracy and top-5 accuracy, and agreement with the supervisor."""
        predictions = [np.concatenate([metrics.predictions(getattr(trio, role)) for trio in trios]) for role in ("student", "weak")]
        epochs = None
        if all(trio.epochs for trio in trios):
            epochs = {key: [list(trio.epochs[key]) for trio in trios] for key in trios[0].epochs}
        return {"method": name, **self._pgr(trios, "accuracy"),
                "top5": self._pgr(trios, "top5") if self.classes >= TOP5_FROM else None,
                "agreement": metrics.agreement(*predictions, np.tile(self.labels, len(trios))),
                "by_seed": [{"seed": trio.seed, **self._pgr([trio], "accuracy")} for trio in trios], "epochs": epochs}


def summary(results: dict) -> str:
    """The line that a finished experiment prints."""
    weak = results["weak"]
    parts = [f"weak {weak['accuracy']:.3f}"]
    for row in results["methods"]:
        pgr = "none" if row["pgr"] is None else f"{row['pgr']:.2f}"
        interval = f" [{row['pgr_ci'][0]:.2f}, {row['pgr_ci'][1]:.2f}]" if row["pgr_ci"] else ""
        parts.append(f"{row['method']} {row['student']:.3f} of {row['ceiling']:.3f}, PGR {pgr}{interval}")
    return "; ".join(parts)
