"""Predictions on disk, and the labels that a student takes from them.

A predictions file is parquet with the columns id, text_sha, label (the truth, null if unknown),
logits, probs (list<float32>), p (probability of class 1, where there are two) and group. A label file may have
a column weight: how much a document counts in a student's training, 0 where it is left out (filters, ensembles).
"""

from __future__ import annotations

import dataclasses
import hashlib
import uuid

import numpy as np

from w2s_jax.data import sources
from w2s_jax.data.examples import Examples, one_hot
from w2s_jax.data.tasks import Row
from w2s_jax.errors import UserError

COLUMNS = ("id", "text_sha", "probs", "p", "label", "weight")  # what is read of a label file
SUM = 1e-3  # how far from 1 the sum of a row's probabilities may be
BLOCK = 4096  # rows checked at once


def write_predictions(path, examples: Examples, logits: np.ndarray | None = None, weights: np.ndarray | None = None,
                      probs: np.ndarray | None = None) -> None:
    """Writes a predictions file, atomically.

    Args:
      path: the parquet file, local or gs://; its folder is made.
      examples: the documents, with whatever labels are known of them.
      logits: float32 `[n, classes]`, one row a document; None = `log` of `probs`.
      weights: float32 `[n]`, 0 or more, for the column weight; None = no such column.
      probs: float32 `[n, classes]`, written as they are (labels that are passed on); None = softmax of the logits.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from etils import epath

    if logits is None:
        logits = log(probs)
    logits = np.asarray(logits, np.float32)
    if logits.ndim != 2 or len(logits) != len(examples):
        raise ValueError(f"logits {logits.shape} for {len(examples)} documents")
    if weights is not None and (np.shape(weights) != (len(examples),) or not np.isfinite(weights).all() or np.min(weights) < 0):
        raise ValueError(f"weights {np.shape(weights)} for {len(examples)} documents: expected finite ones, 0 or more")
    probs = softmax(logits) if probs is None else np.asarray(probs, np.float32)
    table = {
        "id": pa.array(examples.ids, pa.string()),
        "text_sha": pa.array(examples.text_shas, pa.string()),
        "label": pa.array([None if label < 0 else int(label) for label in examples.labels], pa.int64()),
        "logits": _lists(logits),
        "probs": _lists(probs),
    }
    if logits.shape[1] == 2:
        table["p"] = pa.array(probs[:, 1], pa.float32())
    table["group"] = pa.array(examples.groups, pa.string())
    if weights is not None:
        table["weight"] = pa.array(np.asarray(weights, np.float32), pa.float32())
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(table), sink)
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
    part.write_bytes(sink.getvalue().to_pybytes())
    part.replace(path)


def _lists(values: np.ndarray):
    """A float32 array `[n, classes]` as a column of lists, without a Python object a row."""
    import pyarrow as pa

    rows, classes = values.shape
    if rows * classes >= 2**31:
        raise UserError(f"predictions: {rows} rows of {classes} classes, expected fewer than 2^31 numbers in a file")
    return pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32) * classes, np.ascontiguousarray(values, np.float32).reshape(-1))


def log(probs: np.ndarray) -> np.ndarray:
    """float32 logits of probabilities; 0 counts as the smallest float32."""
    return np.log(np.maximum(np.asarray(probs, np.float32), np.finfo(np.float32).tiny))


def softmax(logits: np.ndarray) -> np.ndarray:
    """float32 probabilities `[n, classes]`, computed in double."""
    logits = np.asarray(logits)
    out = np.empty(logits.shape, np.float32)
    for start in range(0, len(out), 256):  # a block's doubles stay in the cache
        exp = logits[start : start + 256].astype(np.float64)
        exp = np.exp(exp - exp.max(axis=1, keepdims=True))
        out[start : start + 256] = exp / exp.sum(axis=1, keepdims=True)
    return out


@dataclasses.dataclass(frozen=True)
class Labels:
    """A label file: `ids`, `text_shas` (None where the file has none), `probs` float32 `[n, classes]` and `weights` float32 `[n]`
    (None where the file has none)."""

    path: str
    ids: list[str]
    text_shas: list[str] | None
    probs: np.ndarray
    weights: np.ndarray | None = None

    @property
    def fingerprint(self) -> str:
        """Hex digest over the content, whatever the order of the rows and the kind of file."""
        shas = self.text_shas or [""] * len(self.ids)
        rows = sorted(zip(self.ids, shas, (p.tobytes() for p in self.probs.astype("<f4"))))
        if self.weights is not None:
            rows += sorted(zip(self.ids, (w.tobytes() for w in self.weights.astype("<f4"))))
        digest = hashlib.sha256()
        for row in rows:
            digest.update(repr(row).encode())
        return digest.hexdigest()


def find(path) -> str:
    """The label file that `path` means: a file as it is, a run directory's `predictions/b.parquet`."""
    from etils import epath

    path = epath.Path(path)
    if path.is_dir():
        file = path / "predictions" / "b.parquet"
        if not file.exists():
            there = sorted(p.name for p in file.parent.iterdir()) if file.parent.is_dir() else []
            raise UserError(f"labels={str(path)!r}: no predictions/b.parquet in it (predictions: {', '.join(there) or 'none'}); "
                            "run the label stage (--config=label) on that run and name its run directory")
        return str(file)
    if not path.exists():
        raise UserError(f"labels={str(path)!r}: no such file or run directory")
    return str(path)


def read(path) -> Labels:
    """Reads a label file, or a run directory's.

    The file (parquet, jsonl or csv) has a column `id` and the first of these that is there: `probs` (one
    probability a class), `p` (that of class 1), `label` (0 or 1); `text_sha` is checked where there is one, and
    `weight` (0 or more) says how much a document counts.
    Raises UserError for repeated ids, for what is not a probability and for weights that are none, or all 0.
    """
    file = find(path)
    table = sources.read_table(file, COLUMNS)
    if table is not None and (found := _columns(file, table)) is not None:
        ids, probs, shas, weights = found
    else:
        ids, probs, shas, weights = _rows(file)
    if weights is not None and not weights.any():
        raise UserError(f"labels: {file}: every row has weight 0, expected some that are trained on")
    return Labels(file, ids, shas, probs, weights)


def _distinct(ids: list[str], file: str) -> None:
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = [i for i in ids if i in seen or seen.add(i)]
        raise UserError(f"labels: {file}: {len(twice)} ids occur more than once, the first {twice[0]!r}")


def _rows(file: str):
    """ids, probs, text_shas and weights of a label file, row by row: whatever holds values of any kind."""
    source = sources.read_file(file)
    names = set(source.rows[0])
    kind = next((k for k in ("probs", "p", "label") if k in names), None)
    if kind is None or "id" not in names:
        raise UserError(f"labels: {source.name}: expected the columns id and probs (or p, or label), found {', '.join(sorted(names))}")
    rows = [Row(values, f"labels: {source.name}, row {n}") for n, values in zip(source.numbers, source.rows)]
    ids = [str(row.get("id")) for row in rows]
    _distinct(ids, source.name)
    if kind == "label":
        probs = one_hot(np.asarray([row.index("label", 2) for row in rows], np.int32))
    else:
        probs = np.stack([_probabilities(row, kind) for row in rows]) if len({len(_values(r, kind)) for r in rows}) == 1 else None
        if probs is None:
            raise UserError(f"labels: {source.name}: rows of 'probs' differ in length")
    shas = [row.text("text_sha") for row in rows] if "text_sha" in names else None
    weights = np.asarray([_weight(row) for row in rows], np.float32) if "weight" in names else None
    return ids, probs.astype(np.float32), shas, weights


def _columns(file: str, table):
    """As `_rows` of a parquet table with a column `probs`, without a Python object a number; None where a column is not of the usual type.

    A row that is refused is refused by the checks of `_rows`, so with their message.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    def usual(name, fits) -> bool:
        return table.schema.field(name).type.id in fits and not table.column(name).null_count

    names, text, floating = set(table.column_names), (pa.lib.Type_STRING, pa.lib.Type_LARGE_STRING), (pa.lib.Type_FLOAT, pa.lib.Type_DOUBLE)
    lists = (pa.lib.Type_LIST, pa.lib.Type_LARGE_LIST, pa.lib.Type_FIXED_SIZE_LIST)
    wanted = {"id": text, "probs": lists}
    wanted |= {name: fits for name, fits in (("text_sha", text), ("weight", floating)) if name in names}
    if not len(table) or not wanted.keys() <= names or not all(usual(name, fits) for name, fits in wanted.items()):
        return None
    if table.schema.field("probs").type.value_type.id not in floating:
        return None
    ids = table.column("id").to_pylist()
    _distinct(ids, file)
    parts, width = [], None
    for chunk in table.column("probs").chunks:
        flat = chunk.flatten()
        width = (len(flat) // len(chunk) if len(chunk) else 0) if width is None else width
        if flat.null_count or not (pc.list_value_length(chunk).to_numpy(zero_copy_only=False) == width).all():
            return None
        parts.append(flat.to_numpy(zero_copy_only=False).astype(np.float32, copy=False).reshape(len(chunk), width))
    probs = parts[0] if len(parts) == 1 else np.concatenate(parts)

    def check(bad: np.ndarray, refuse) -> None:
        for row in np.flatnonzero(bad):
            refuse(Row(table.slice(int(row), 1).to_pylist()[0], f"labels: {file}, row {row}"))

    for start in range(0, len(probs), BLOCK):  # NaN passes neither comparison
        block = probs[start : start + BLOCK]
        good = (block.min(axis=1, initial=1) >= 0) & (block.max(axis=1, initial=0) <= 1) & (np.abs(block.sum(axis=1) - 1) <= SUM)
        check(np.pad(~(good & (width >= 2)), (start, 0)), lambda row: _probabilities(row, "probs"))
    shas = table.column("text_sha").to_pylist() if "text_sha" in names else None
    weights = table.column("weight").to_numpy().astype(np.float32) if "weight" in names else None
    if weights is not None:
        check(~((weights >= 0) & (weights < np.inf)), _weight)
    return ids, probs, shas, weights


def _weight(row: Row) -> float:
    value = row.get("weight")
    try:  # a csv file holds texts
        weight = -1.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        weight = -1.0
    if not 0 <= weight < float("inf"):
        raise UserError(f"{row.where}: column 'weight' is {value!r}, expected a number of 0 or more")
    return weight


def _values(row: Row, kind: str) -> list:
    return row.items(kind) if kind == "probs" else [row.get(kind)]


def _probabilities(row: Row, kind: str) -> np.ndarray:
    values = _values(row, kind)
    try:
        p = np.asarray(values, np.float32)
        p = np.asarray([1 - p[0], p[0]], np.float32) if kind == "p" else p
    except (TypeError, ValueError):
        p = np.empty(0, np.float32)
    if p.ndim != 1 or len(p) < 2 or not np.isfinite(p).all() or (p < 0).any() or (p > 1).any() or abs(p.sum() - 1) > SUM:
        expected = "a probability" if kind == "p" else "probabilities that sum to 1"
        raise UserError(f"{row.where}: column {kind!r} is {values if kind == 'probs' else values[0]!r}, expected {expected}")
    return p


WHY = ("task, data_seed, n_train, split and group must be those of the labelled run; a document that was over-long for it has no label, "
       "unless overlong=truncate")


def attach(examples: Examples, path, dropped: frozenset[str] = frozenset(), *, things: str = "documents", why: str = WHY) -> Examples:
    """The same documents with the soft labels (and weights, if there are) of `path` (or of `Labels`), matched by id and text.

    Raises UserError, with the count and the first example, where documents have no label, labels have no
    document (those of the `dropped` ids excepted, which the run itself left out and counted), or a label was made
    for another text. `things` and `why` are words of this message: what the examples are, and what the reason may be.
    """
    thing = things.removesuffix("s")
    given = path if isinstance(path, Labels) else read(path)
    at = {i: row for row, i in enumerate(given.ids)}
    wanted = set(examples.ids)
    absent = [i for i in examples.ids if i not in at]
    surplus = [i for i in given.ids if i not in wanted and i not in dropped]
    problems = []
    if absent:
        problems.append(f"{len(absent)} of {len(examples)} {things} have no label, the first {absent[0]!r}")
    if surplus:
        problems.append(f"{len(surplus)} of {len(at)} labels have no {thing}, the first {surplus[0]!r}")
    if given.text_shas is not None:
        other = [i for i, sha in zip(examples.ids, examples.text_shas) if i in at and given.text_shas[at[i]] != sha]
        if other:
            problems.append(f"{len(other)} labels were made for another {'text' if thing == 'document' else thing}, the first {other[0]!r}")
    if problems:
        raise UserError(f"labels: {given.path} does not fit the data: {'; '.join(problems)} ({why})")
    rows = [at[i] for i in examples.ids]
    return examples.replace(soft_labels=given.probs[rows], weights=None if given.weights is None else given.weights[rows])
