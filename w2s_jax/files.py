"""JSON and parquet as this project reads and writes them, and files that are replaced as a whole."""

from __future__ import annotations

import json
import math
import os
import threading
from pathlib import Path

from etils import epath

from w2s_jax.errors import UserError


def is_object_store(path) -> bool:
    """True for gs:// and s3:// paths: single objects are written atomically there, and cannot be appended to."""
    return "://" in os.fspath(path)


def plain(value):
    """`value` as JSON has it: numpy and jax numbers as Python's, tuples as lists, paths as text, NaN and infinities as null."""
    if hasattr(value, "to_dict"):  # ConfigDict
        value = value.to_dict()
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if hasattr(value, "tolist"):  # arrays and scalars of numpy and jax
        return plain(value.tolist())
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} does not go into JSON: {value!r}")


def dumps(value, **options) -> str:
    """`value` as JSON text (see `plain`)."""
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False, **options)


def write_bytes(path, content: bytes) -> None:
    """Writes a file so that a reader, or a process killed in between, sees the old content or the new, never a part."""
    path = epath.Path(path)
    if is_object_store(path):
        path.write_bytes(content)
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path, value) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_text(path, dumps(value, indent=1) + "\n")


def read_json(path) -> dict:
    """The object in a JSON file. UserError where it is missing, unreadable or no JSON object."""
    path = epath.Path(path)
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a JSON object, but it cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def parquet_table(raw: bytes, columns: tuple[str, ...] | None = None):
    """The `pyarrow.Table` of a parquet file's content, of those of `columns` that it has (None: of all).

    On this thread alone (`pyarrow.parquet.read_table` starts others whatever it is asked): a pool thread of Arrow that still
    holds a Python object when the interpreter ends aborts the process, whatever its exit code would have been
    (apache/arrow#34314, #50482; seen in one of ten short processes on busy cores).
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(pa.BufferReader(raw), pre_buffer=False)
    wanted = None if columns is None else [name for name in file.schema_arrow.names if name in columns]
    return file.read(wanted, use_threads=False)
