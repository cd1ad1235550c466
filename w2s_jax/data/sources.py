"""Rows of a split: from the hub, from local files in its place, from a folder of the user's, or generated."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import hashlib
import io
import json
import re
import zlib

import numpy as np

from w2s_jax import files
from w2s_jax.data import tasks
from w2s_jax.errors import UserError

FORMATS = (".jsonl", ".csv", ".parquet")
POOL = 300_000  # rows of one hub split that are read at most, where no coin needs them all


@dataclasses.dataclass(frozen=True)
class Source:
    """The rows of one split.

    Attributes:
      name: the file, or the hub id and split, for messages.
      split: name of the source split, as it stands in document ids.
      rows: one dict a row.
      numbers: row numbers in the source, from 0.
      fingerprint: hex digest of the content.
      note: what a reader of the results must know, or "".
    """

    name: str
    split: str
    rows: list[dict]
    numbers: list[int]
    fingerprint: str
    note: str = ""


def load(task: str, role: str, *, task_dir: str = "", revision: str = "", seed: int = 0) -> Source | None:
    """One split of a task (a registered name or a user's folder).

    Args:
      task: as in the config.
      role: "train" or "test"; a registered task says which source split that is.
      task_dir: folder that stands in for the hub.
      revision: revision of the hub data set; empty = the registry's.
      seed: governs which rows are read of a split of more than `POOL` rows, and generated rows.

    Returns None where a folder has no such split. UserError for unreadable files and hub failures.
    """
    known = tasks.find(task)
    if known is None:
        path = find_split(task, role)
        return None if path is None else read_file(path, role)
    split = known.splits[("train", "test").index(role)]
    if task_dir:
        from etils import epath

        folder = epath.Path(task_dir)
        if not folder.is_dir():
            raise UserError(f"task_dir={task_dir!r}: no such folder; expected {task}/{split}.* or {split}.* in it")
        path = find_split(folder / task if (folder / task).is_dir() else folder, split)
        return None if path is None else read_file(path, split)
    if known.rows:
        rows = known.rows(split, seed)
        digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
        return Source(f"task {task}, generated split {split}", split, rows, list(range(len(rows))), digest)
    return load_hub(task, known, split, revision or known.revision, seed)


def find_split(folder, split: str):
    """The one file `<split>.jsonl|csv|parquet[.gz]` of a folder, or None. UserError where several stand there."""
    from etils import epath

    names = {split + form + gz for form in FORMATS for gz in ("", ".gz")}
    found = sorted(path.name for path in epath.Path(folder).iterdir() if path.name in names)
    if len(found) > 1:
        raise UserError(f"{folder}: {' and '.join(found)} are both there; expected one file of split {split!r}")
    return epath.Path(folder) / found[0] if found else None


def read_file(path, split: str | None = None) -> Source:
    """All rows of a jsonl, csv or parquet file, gzipped or not. `split` defaults to the file's stem."""
    path, stem, form = _named(path)
    raw, digest = _content(path)
    parse = {".jsonl": parse_jsonl, ".csv": parse_csv, ".parquet": parse_parquet}[form]
    rows = parse(raw, str(path)) if raw.strip() else []
    if not rows:
        raise UserError(f"{path}: empty file, expected one document a row")
    return Source(str(path), split or stem, rows, list(range(len(rows))), digest)


def read_table(path, columns: tuple[str, ...]):
    """The `pyarrow.Table` of a parquet file, gzipped or not, with those of `columns` that it has; None for a file of another form, or
    an empty one."""
    path, _, form = _named(path)
    raw = _content(path)[0] if form == ".parquet" else b""
    return _table(raw, str(path), columns) if raw.strip() else None


def _named(path):
    """The path, its stem and its form, one of FORMATS."""
    from etils import epath

    path = epath.Path(path)
    stem = re.fullmatch(r"(.+?)(\.jsonl|\.csv|\.parquet)(\.gz)?", path.name)
    if stem is None:
        raise UserError(f"{path}: expected a file that ends in {', '.join(FORMATS)}, or one of these and .gz")
    return path, stem[1], stem[2]


def _content(path) -> tuple[bytes, str]:
    """A file's bytes, unpacked, and the hash of the file."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error})") from error
    digest = hashlib.sha256(raw).hexdigest()
    if path.name.endswith(".gz"):
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: truncated or damaged gzip file ({error})") from error
    return raw, digest


def decode(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{name}, line {line}: not UTF-8 text") from error


def parse_jsonl(raw: bytes, name: str) -> list[dict]:
    rows = []
    for number, line in enumerate(decode(raw, name).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{name}, line {number}: {line[:40]!r} is not a JSON object")
        rows.append(row)
    return rows


def parse_csv(raw: bytes, name: str) -> list[dict]:
    rows = []
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(decode(raw, name), newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                given = sum(v is not None for k, v in row.items() if k is not None) + len(row.get(None) or ())
                raise UserError(f"{name}, line {reader.line_num}: {given} fields, expected {len(reader.fieldnames)}")
            rows.append(row)
    except csv.Error as error:
        raise UserError(f"{name}, after line {reader.line_num}: not csv ({error})") from error
    return rows


def parse_parquet(raw: bytes, name: str) -> list[dict]:
    return _table(raw, name).to_pylist()


def _table(raw: bytes, name: str, columns: tuple[str, ...] | None = None):
    import pyarrow as pa

    try:
        return files.parquet_table(raw, columns)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name}: truncated or damaged parquet file ({error})") from error


def load_hub(name: str, task: tasks.Task, split: str, revision: str | None, seed: int) -> Source:
    """A split of a hub data set through `datasets`; never runs a data set's code."""
    import datasets

    title = f"{task.hub}{f' ({task.config})' if task.config else ''}, split {split}"
    # On the parquet branch the configurations are folders and there is no card that lists them.
    exported = (revision or "").startswith("refs/convert/")
    config = {"data_dir": task.config} if exported else {"name": task.config}
    try:
        data = datasets.load_dataset(task.hub, **config, split=split, revision=revision)
    except Exception as error:  # whatever the hub or the network comes up with: the user can only go elsewhere
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"task={name!r}: {title} can't be loaded from the hub ({type(error).__name__}: {reason}); "
                        "task_dir=DIR reads local files instead") from error
    numbers, note = np.arange(len(data)), ""
    if len(data) > POOL and not task.answers:  # a coin is drawn for every row, so a task with coins is read whole
        numbers = np.sort(np.random.default_rng([seed, len(data)]).choice(len(data), POOL, replace=False))
        note = f"{title}: a random {POOL} of {len(data)} rows are used"
        data = data.select(numbers)
    rows = [row for batch in data.with_format("arrow").iter(10_000) for row in batch.to_pylist()]
    # The resolved commit stands in the addresses of the downloaded files; elsewhere datasets' own fingerprint serves.
    addresses = " ".join(map(str, getattr(data.info, "download_checksums", None) or ()))
    commit = re.search(r"@([0-9a-f]{40})/", addresses)
    content = [task.hub, task.config, split, revision, commit[1] if commit else data._fingerprint, seed if note else None]
    return Source(title, split, rows, numbers.tolist(), hashlib.sha256(json.dumps(content).encode()).hexdigest(), note)
