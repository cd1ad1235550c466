"""The one record type that flows from data sets to token batches."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np


def text_sha(text: str | Sequence[int] | np.ndarray) -> str:
    """First 16 hex digits of sha256 over a text (UTF-8) or over token ids (int32, little endian)."""
    if isinstance(text, str):
        raw = text.encode("utf-8", "surrogatepass")
    else:
        raw = np.asarray(text, dtype="<i4").tobytes()
    return hashlib.sha256(raw).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Examples:
    """Labelled documents, by column. Rows keep their order through every operation.

    Attributes:
      ids: `<task>/<source split>/<row>/<variant>`, unique; a user's own `id` column wins.
      texts: documents as text; None where the source gives token ids.
      tokens: documents as int32 arrays of token ids; None until tokenized.
      soft_labels: float32 `[n, classes]`, rows sum to 1; a row of NaN where unknown.
      groups: what must stay on one side of a split, one string a document.
      weights: float32 `[n]`, how much each document counts in training (0 = it is left out); None = all alike.
      shas: what is known by its content elsewhere (images, which have neither text nor tokens here); None for documents.
    """

    ids: list[str]
    texts: list[str] | None
    tokens: list[np.ndarray] | None
    soft_labels: np.ndarray
    groups: list[str]
    weights: np.ndarray | None = None
    shas: list[str] | None = None

    def __post_init__(self):
        n = len(self.ids)
        for name in ("texts", "tokens", "soft_labels", "groups", "weights", "shas"):
            column = getattr(self, name)
            if column is not None and len(column) != n:
                raise ValueError(f"column {name} has {len(column)} rows, ids has {n}")
        if self.texts is None and self.tokens is None and self.shas is None:
            raise ValueError("examples need texts, tokens or shas")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labels(self) -> np.ndarray:
        """int32 `[n]`: the likelier class (ties go to class 0, as in the references), -1 where unknown."""
        unknown = np.isnan(self.soft_labels).any(axis=1)
        hard = np.argmax(np.where(np.isnan(self.soft_labels), 0, self.soft_labels), axis=1)
        return np.where(unknown, -1, hard).astype(np.int32)

    @property
    def text_shas(self) -> list[str]:
        """One `text_sha` a document, over its text, or over its token ids where it has no text; an image's own hash."""
        if self.shas is not None:
            return self.shas
        return [text_sha(t) for t in (self.texts if self.texts is not None else self.tokens)]

    def select(self, rows) -> Examples:
        """The documents at `rows` (indices, in that order)."""
        rows = [int(r) for r in rows]
        pick = lambda column: None if column is None else [column[r] for r in rows]  # noqa: E731
        return Examples(pick(self.ids), pick(self.texts), pick(self.tokens),
                        self.soft_labels[np.asarray(rows, dtype=np.int64)], pick(self.groups),
                        None if self.weights is None else self.weights[np.asarray(rows, dtype=np.int64)], pick(self.shas))

    def replace(self, **columns) -> Examples:
        return dataclasses.replace(self, **columns)


def one_hot(labels: np.ndarray, classes: int = 2) -> np.ndarray:
    """Hard labels int `[n]` (-1 = unknown) as float32 `[n, classes]` distributions (NaN = unknown)."""
    labels = np.asarray(labels)
    out = np.full((len(labels), classes), np.nan, np.float32)
    known = labels >= 0
    out[known] = np.eye(classes, dtype=np.float32)[labels[known]]
    return out
