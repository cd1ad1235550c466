"""Arrays that models compute of documents or images, one row each, computed once and kept on disk.

A store is a folder; any number of runs share it, one at a time writes. It holds, for each model and way to read it,

    <name>-<12 hex>/                            12 hex of sha256 over what makes the numbers: see `Store`
        <12 hex>/                               one forward pass
            layer-016.npy                       float32 [documents, width]: the reading that is called 16
            index.json                          written last: a pass without it is unfinished, and is never read

index.json: `layers` that lie beside it, `embed` (the width), what the source says of each row (its id and its key among it), what
makes the numbers, `devices`, `versions`. A document is known by its key, so that another split, another order or a later task that
shares documents computes only what is new; so does another reading. A pass that was killed goes on after its last 10 seconds on a
local disk, and starts over on an object store. Any finished pass may be deleted.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from etils import epath

from w2s_jax import runlog
from w2s_jax.claim import Claim
from w2s_jax.errors import UserError
from w2s_jax.files import is_object_store, read_json, write_json
from w2s_jax.progress import Progress

INDEX, PROGRESS = "index.json", "progress.json"
SECONDS = 10.0  # between two notes of how far a pass is


class Source(abc.ABC):
    """Documents or images, and the forward pass that reads them.

    Attributes:
      ids: names for messages.
      keys: by which each is known in the store; "" = not to be kept (an image that turned out to be broken).
      width: numbers of a row.
      label, unit: of progress bars. things, what: what is read, and what is read of it, in messages.
      key_column: name of the keys in index.json.
    """

    ids: list[str]
    keys: list[str]
    width: int
    label: str = "features"
    unit: str = "doc"
    things: str = "documents"
    what: str = "hidden states"
    key_column: str = "keys"

    @abc.abstractmethod
    def select(self, rows) -> Source:
        """Some of them."""

    @abc.abstractmethod
    def orders(self) -> list[np.ndarray]:
        """The documents of each batch of a pass over all of them."""

    @abc.abstractmethod
    def outputs(self, layers: tuple[int, ...], start: int, stats: dict, progress: Progress) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of each batch from number `start` on: the documents `[cells, slots]` (-1 = an empty slot), and float32
        `[layers, cells, slots, width]`."""

    def columns(self, order: np.ndarray) -> dict[str, list]:
        """What index.json says of the rows; `ids` and `keys` under whatever names."""
        return {"ids": [self.ids[d] for d in order], self.key_column: [self.keys[d] for d in order]}

    def noted(self) -> dict:
        """What a pass that goes on after this one was killed must know: JSON, for `recall`."""
        return {}

    def recall(self, noted: dict) -> None:  # noqa: B027 (nothing to do for most)
        """Takes over what `noted` gave."""


class Store:
    """`folder`: local or gs://. `about`: what makes the numbers, the model's fingerprint first. `name`: for the folder's name only."""

    key_column = "keys"

    def __init__(self, folder, name: str, about: dict):
        self.about = about
        key = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:12]
        self.path = epath.Path(folder).expanduser() / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}-{key}"

    def missing_keys(self, keys: list[str], layers: tuple[int, ...]) -> int:
        """How many different keys lack one of the readings."""
        known = [set(self._rows(layer)) for layer in layers]
        return len({key for key in keys if not all(key in rows for rows in known)})

    def rows_of(self, keys: list[str], layer: int) -> np.ndarray:
        """float32 `[keys, width]` of one reading, in the keys' order. KeyError for one that was not computed."""
        rows = self._rows(layer)
        found = [rows[key] for key in keys]
        arrays: dict = {}
        out = None
        for part in dict.fromkeys(part for part, _ in found):
            arrays[part] = self._load(part, layer)
            if out is None:
                out = np.empty((len(found), arrays[part].shape[1]), np.float32)
            here = [i for i, (p, _) in enumerate(found) if p == part]
            out[here] = arrays[part][[found[i][1] for i in here]]
        return out

    def compute(self, source: Source, layers: tuple[int, ...], stats: dict | None = None) -> None:
        """Compute what is missing of a source's readings `layers`: one forward pass, none if nothing is missing.

        Waits while another process fills the store, and computes then what that one did not. `stats`: as for `forward.forward`; counts
        "documents" and "batches" that were computed, too.

        Raises:
          UserError: numbers that are not finite; no room on the disk.
        """
        place = self.path / ".claim"  # a folder of its own: a store is no run directory
        place.mkdir(parents=True, exist_ok=True)
        claim = Claim(place, wait=True)
        try:
            for needed, rows in self._needed(source.keys, tuple(sorted(set(layers)))).items():
                _Pass(self, source.select(rows), needed, stats if stats is not None else {}).run()
        finally:
            claim.release()

    def _needed(self, keys: list[str], layers: tuple[int, ...]) -> dict[tuple[int, ...], list[int]]:
        """The readings that documents lack -> the rows of those documents, each key once, in the order of the keys."""
        known = {layer: self._rows(layer) for layer in layers}
        needed: dict = {}
        for key, row in sorted({key: i for i, key in reversed(list(enumerate(keys)))}.items()):
            if lacks := tuple(layer for layer in layers if key not in known[layer]):
                needed.setdefault(lacks, []).append(row)
        return needed

    def _rows(self, layer: int) -> dict[str, tuple[epath.Path, int]]:
        """Key -> (the pass that computed this reading of it, row)."""
        rows: dict = {}
        for file in sorted(self.path.glob(f"*/{INDEX}")) if self.path.is_dir() else ():
            index = read_json(file)
            if layer in index["layers"] and (file.parent / layer_file(layer)).exists():
                rows |= {key: (file.parent, row) for row, key in enumerate(index[self.key_column]) if key}
        return rows

    def _load(self, part: epath.Path, layer: int) -> np.ndarray:
        """The array of a finished pass, mapped into memory where it is a local file."""
        file, index = part / layer_file(layer), read_json(part / INDEX)
        try:
            if is_object_store(file):
                array = np.load(io.BytesIO(file.read_bytes()), allow_pickle=False)
            else:
                array = np.load(os.fspath(file), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{file}: is damaged ({error}); delete {part} and run again") from None
        if array.dtype != np.float32 or array.shape != (len(index[self.key_column]), index["embed"]):
            raise UserError(f"{file}: is {array.dtype} {list(array.shape)}, expected float32 "
                            f"{[len(index[self.key_column]), index['embed']]}; delete {part} and run again")
        return array


def layer_file(layer: int) -> str:
    return f"layer-{layer:03d}.npy"


@dataclasses.dataclass
class _Pass:
    """One forward pass over documents that streams into a folder of the store; rows are in the order of the pass."""

    store: Store
    source: Source
    layers: tuple[int, ...]
    stats: dict

    def run(self) -> None:
        orders = self.source.orders()
        order = np.concatenate(orders)
        ends = np.cumsum([len(o) for o in orders])
        # The name says what is computed in which batches, so that a pass of this name that was killed can be continued.
        name = hashlib.sha256(json.dumps([self.layers, [self.source.keys[d] for d in order], ends.tolist()]).encode()).hexdigest()[:12]
        self.width, self.documents = self.source.width, len(order)
        with contextlib.ExitStack() as stack:
            part = self.store.path / name
            target = Path(stack.enter_context(tempfile.TemporaryDirectory()) if is_object_store(part) else part)
            (part / INDEX).unlink(missing_ok=True)  # of a finished pass that has lost a layer
            self._check_room(target)
            done = self._done(target, ends)
            rows = int(ends[done - 1]) if done else 0
            files = [stack.enter_context(self._open(target / layer_file(layer), rows)) for layer in self.layers]
            self._compute(done, rows, files, target)
            for file in files:
                _sync(file)
            if target != Path(part):
                part.mkdir(parents=True, exist_ok=True)
                for layer in self.layers:
                    with (target / layer_file(layer)).open("rb") as source, (part / layer_file(layer)).open("wb") as sink:
                        shutil.copyfileobj(source, sink)
            write_json(part / INDEX, self.store.about | {
                "layers": self.layers, "embed": self.width, "devices": runlog.devices(), "versions": runlog.versions(),
                **self.source.columns(order)})
            (target / PROGRESS).unlink(missing_ok=True)

    def _compute(self, done: int, rows: int, files: list, target: Path) -> None:
        saved = time.monotonic()
        with Progress(self.documents, start=rows, label=self.source.label, unit=self.source.unit) as progress:
            for number, (documents, found) in enumerate(self.source.outputs(self.layers, done, self.stats, progress), done + 1):
                found = np.asarray(found[:, documents >= 0], "<f4")
                if not np.isfinite(found).all():
                    bad = self.source.ids[documents[documents >= 0][np.argmin(np.isfinite(found).all((0, 2)))]]
                    thing = self.source.things.removesuffix("s")
                    raise UserError(f"the model's {self.source.what} are not finite, first for {thing} {bad!r}")
                for file, layer in zip(files, found):
                    file.write(np.ascontiguousarray(layer).data)
                self.stats["batches"] = self.stats.get("batches", 0) + 1
                self.stats["documents"] = self.stats.get("documents", 0) + found.shape[1]
                if time.monotonic() - saved >= SECONDS:
                    for file in files:
                        _sync(file)
                    write_json(target / PROGRESS, {"batches": number, "noted": self.source.noted()})
                    saved = time.monotonic()

    def _header(self) -> bytes:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (self.documents, self.width)})
        return header.getvalue()

    def _done(self, target: Path, ends: np.ndarray) -> int:
        """The batches of this pass that lie there from an attempt that was killed."""
        try:
            said = read_json(target / PROGRESS)
            done = said["batches"]
            sizes = [(target / layer_file(layer)).stat().st_size for layer in self.layers]
        except (UserError, OSError, KeyError):
            return 0
        known = isinstance(done, int) and 0 < done <= len(ends)
        if not known or min(sizes) < len(self._header()) + int(ends[done - 1]) * self.width * 4:
            return 0
        self.source.recall(said.get("noted") or {})
        return done

    @contextlib.contextmanager
    def _open(self, file: Path, rows: int):
        """The file of a layer, to be written on after `rows` rows."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "r+b" if rows else "w+b") as opened:
            header = self._header()
            opened.write(header)
            opened.seek(len(header) + rows * self.width * 4)
            opened.truncate()
            yield opened

    def _check_room(self, target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        needed, free = len(self.layers) * self.documents * self.width * 4, shutil.disk_usage(target).free
        if needed > free + sum(f.stat().st_size for f in target.glob("*.npy")):
            raise UserError(f"config.features: {target} has room for {free / 1e9:.3g} GB, expected {needed / 1e9:.3g} GB for "
                            f"{self.documents} {self.source.things} x {len(self.layers)} layers x {self.width} features")


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())
