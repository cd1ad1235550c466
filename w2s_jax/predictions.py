"""What a finished run predicted: read from its run directory, checked, with the quantities per document that reports are made of."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from etils import epath

from w2s_jax import metrics, runlog
from w2s_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A run's predictions on one set of documents, by column.

    What is computed from the labels (`right`, `cross_entropy`, `brier`) asks for known ones.
    """

    ids: list[str]
    shas: list[str]
    labels: np.ndarray  # int [n], -1 = unknown
    logits: np.ndarray  # float32 [n, classes]
    groups: list[str]
    weights: np.ndarray | None = None  # float [n], of a label file: 0 = the student does not see the document; None = all 1

    def select(self, rows: np.ndarray) -> Predictions:
        """The documents at `rows` (indices), in that order."""
        ids, shas, groups = ([column[r] for r in rows] for column in (self.ids, self.shas, self.groups))
        return Predictions(ids, shas, self.labels[rows], self.logits[rows], groups, None if self.weights is None else self.weights[rows])

    @functools.cached_property
    def predicted(self) -> np.ndarray:
        """The likelier class, int `[n]`."""
        return metrics.predictions(self.logits)

    @functools.cached_property
    def right(self) -> np.ndarray:
        """Where the likelier class is the label, bool `[n]`."""
        return self.predicted == self.labels

    @functools.cached_property
    def log_probs(self) -> np.ndarray:
        """Log-probabilities in nats, float64 `[n, classes]`."""
        return metrics.log_softmax(self.logits)

    @functools.cached_property
    def probs(self) -> np.ndarray:
        """Probabilities, float64 `[n, classes]`."""
        return np.exp(self.log_probs)

    @functools.cached_property
    def confidence(self) -> np.ndarray:
        """Probability of the predicted class, float64 `[n]`."""
        return self.probs.max(axis=1)

    @functools.cached_property
    def cross_entropy(self) -> np.ndarray:
        """Minus the log-probability of the label in nats, float64 `[n]`."""
        return -self.log_probs[np.arange(len(self.labels)), self.labels]

    @functools.cached_property
    def brier(self) -> np.ndarray:
        """Squared difference to the label, summed over the classes (0 to 2), float64 `[n]` (Brier 1950)."""
        return np.square(self.probs - np.eye(self.probs.shape[1])[self.labels]).sum(axis=1)


def read_predictions(run_dir, split: str = "test") -> Predictions:
    """A run's `predictions/<split>.parquet`. UserError for an unreadable file, duplicate ids or logits that are not finite."""
    file = epath.Path(run_dir) / "predictions" / f"{split}.parquet"
    try:
        table = runlog.load(run_dir).predictions(split)
    except (OSError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError
        raise UserError(f"{file}: cannot be read as parquet: {error}") from error
    if lacks := [c for c in ("id", "text_sha", "label", "logits") if c not in table.columns]:
        raise UserError(f"{file}: has no column {lacks[0]}; expected id, text_sha, label, logits")
    if not len(table):
        raise UserError(f"{file}: is empty")
    ids = list(map(str, table["id"].to_numpy(object)))
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise UserError(f"{file}: {len(ids) - len(set(ids))} duplicated ids, the first {twice!r}")
    widths = {len(row) for row in table["logits"]}
    if len(widths) > 1:
        raise UserError(f"{file}: logits of {sorted(widths)} classes in one file")
    logits = np.stack([np.asarray(row, np.float32) for row in table["logits"]])
    if not np.isfinite(logits).all():
        raise UserError(f"{file}: logits of document {ids[int(np.argmin(np.isfinite(logits).all(axis=1)))]!r} are not finite")
    labels = table["label"].fillna(-1).astype(np.int64).to_numpy()
    if labels.min() < -1 or labels.max() >= logits.shape[1]:
        raise UserError(f"{file}: labels from {labels.min()} to {labels.max()} for {logits.shape[1]} classes")
    groups = ids  # without a group a document stands for itself
    if "group" in table.columns:
        groups = [i if null else str(g) for i, g, null in
                  zip(ids, table["group"].to_numpy(object), table["group"].isna().to_numpy(), strict=True)]
    weights = table["weight"].to_numpy(np.float64) if "weight" in table.columns else None
    return Predictions(ids, list(map(str, table["text_sha"].to_numpy(object))), labels, logits, groups, weights)


def check_results(run_dir, p: Predictions) -> None:
    """results.json and the test predictions must be of one run: a number is never printed for another."""
    said = runlog.read_json(run_dir / "results.json").get("accuracy")
    known = p.labels >= 0
    if said is None or not known.any():
        return
    found = float(np.mean(p.right[known]))
    if abs(found - said) > 1e-6:
        raise UserError(f"{run_dir}: results.json says accuracy {said}, predictions/test.parquet gives {found}; they are not of one run")
