"""Which images there are, with labels and identities: records alone, nothing decoded."""

from __future__ import annotations

import abc
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import threading
from pathlib import Path

import numpy as np

from w2s_jax import files
from w2s_jax.errors import UserError
from w2s_jax.progress import Progress, say

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's IMG_EXTENSIONS
MANY = 20_000  # images above which hashing shows how far it is
AT_ONCE = 256  # images hashed between two steps of the progress bar


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder() -> Path:
    """Where the hashes of large sets are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "w2s_jax" / "images"


def image_sha(encoded: bytes | np.ndarray) -> str:
    """First 16 hex digits of sha256 over an image's encoded bytes, or over its shape and pixels (uint8) where it is an array."""
    if isinstance(encoded, bytes):
        return hashlib.sha256(encoded).hexdigest()[:16]
    digest = hashlib.sha256(f"uint8{list(encoded.shape)}".encode())
    digest.update(np.ascontiguousarray(encoded).tobytes())
    return digest.hexdigest()[:16]


class Source(abc.ABC):
    """Where the images of a set lie; shared by all selections from it.

    Attributes:
      home: names the place and its state (path, size, time of change), "" where hashes are not worth keeping.
    """

    home = ""

    def __init__(self):
        self._known: dict[str, str] | None = None
        self._lock = threading.Lock()

    @abc.abstractmethod
    def read(self, key) -> bytes | np.ndarray:
        """The encoded bytes, or the pixels uint8 `[height, width, 3]`, of one image; called from several threads at once."""

    @abc.abstractmethod
    def stamp(self, key) -> str:
        """Names an image and its state within `home`, without reading it: what its hash is kept by."""

    def facts(self, key) -> str:
        """What reading the image says, as kept between runs: its `image_sha`."""
        return image_sha(self.read(key))

    def all_facts(self, keys, label: str) -> list[str]:
        """`facts` of each key: those that are not kept from an earlier run are read, in parallel, and kept. UserError: unreadable."""
        try:
            return self._all_facts(keys, label)
        except OSError as error:
            raise UserError(f"{label}: {error.filename or self.home}: can't be read ({error.strerror or error})") from error

    def _all_facts(self, keys, label: str) -> list[str]:
        with self._lock:
            if self._known is None:
                self._known = self._load()
            stamps = [self.stamp(key) for key in keys]
            missing = [i for i, stamp in enumerate(stamps) if stamp not in self._known]
            if missing:
                shown = len(missing) > MANY
                with concurrent.futures.ThreadPoolExecutor(cores()) as pool, contextlib.ExitStack() as stack:
                    bar = stack.enter_context(Progress(len(missing), label=label, unit="image")) if shown else None
                    for start in range(0, len(missing), AT_ONCE):
                        part = missing[start : start + AT_ONCE]
                        found = pool.map(self.facts, [keys[i] for i in part])
                        self._known.update(zip([stamps[i] for i in part], found))
                        if bar:
                            bar.update(len(part))
                self._save()
            return [self._known[stamp] for stamp in stamps]

    def _kept_at(self) -> Path:
        return cache_folder() / f"{hashlib.sha256(self.home.encode()).hexdigest()[:32]}.json"

    def _load(self) -> dict[str, str]:
        try:
            kept = json.loads(self._kept_at().read_text()) if self.home else {}
            return kept["images"] if kept.get("home") == self.home else {}
        except (OSError, ValueError, KeyError, AttributeError):  # none yet, or not readable: the images are read again
            return {}

    def _save(self) -> None:
        if not self.home:
            return
        try:
            self._kept_at().parent.mkdir(parents=True, exist_ok=True)
            files.write_text(self._kept_at(), files.dumps({"home": self.home, "images": self._known}) + "\n")
        except OSError as error:
            say(f"hashes of images are not kept: {self._kept_at()}: {error.strerror}")


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images that have not been read. Rows keep their order.

    Attributes:
      name: for lines of output.
      ids: unique: the path inside the folder or tar, or `<split>/<row>`.
      labels: int32 `[images]`, -1 where unknown.
      class_names: in the order of the labels; for ImageNet the 1000 sorted wnids, torchvision's order.
      source, keys: where the images lie, and one key of it an image.
      notes: lines that a reader of results must see (files left out, unknown labels).
      titles: the classes in words, where `class_names` are identifiers; as many as these.
    """

    name: str
    ids: list[str]
    labels: np.ndarray
    class_names: tuple[str, ...]
    source: Source
    keys: list
    notes: tuple[str, ...] = ()
    titles: tuple[str, ...] = ()

    def __post_init__(self):
        n = len(self.ids)
        if not n:
            raise UserError(f"{self.name}: no images")
        if len(self.labels) != n or len(self.keys) != n or len(set(self.ids)) != n:
            raise ValueError(f"{self.name}: {n} ids, {len(set(self.ids))} distinct, {len(self.labels)} labels, {len(self.keys)} keys")
        if not -1 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.class_names):
            raise UserError(f"{self.name}: labels from {self.labels.min()} to {self.labels.max()}, expected 0 to "
                            f"{len(self.class_names) - 1} for {len(self.class_names)} classes, or -1 where unknown")
        if not self.titles:
            object.__setattr__(self, "titles", self.class_names)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_classes(self) -> int:
        return len(self.class_names)

    @functools.cached_property
    def shas(self) -> list[str]:
        """One `image_sha` an image: what identifies it. All images are read, once; kept in the user's cache directory."""
        return [facts.split(" ")[0] for facts in self.source.all_facts(self.keys, f"hashing {self.name}")]

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over (id, sha, label) of every image, in order, and the class names; where they lie plays no part."""
        digest = hashlib.sha256(json.dumps(list(self.class_names)).encode())
        for row in zip(self.ids, self.shas, self.labels.tolist()):
            digest.update(json.dumps(row).encode() + b"\n")
        return digest.hexdigest()

    def encoded(self, row: int) -> bytes | np.ndarray:
        """The encoded bytes of an image, or its pixels uint8 `[height, width, 3]`. Thread-safe. UserError: it cannot be read."""
        try:
            return self.source.read(self.keys[row])
        except OSError as error:
            raise UserError(f"{self.name}: {self.ids[row]}: can't be read ({error.strerror or error})") from error

    def select(self, rows) -> ImageSet:
        """The images at `rows` (indices, in that order)."""
        rows = [int(row) for row in rows]
        chosen = ImageSet(self.name, [self.ids[r] for r in rows], self.labels[np.asarray(rows, np.int64)], self.class_names, self.source,
                          [self.keys[r] for r in rows], self.notes, self.titles)
        if "shas" in self.__dict__:  # dataclasses' `frozen` does not reach cached properties
            chosen.__dict__["shas"] = [self.shas[r] for r in rows]
        return chosen


def read_classes(classes: str) -> tuple[str, ...]:
    """The names of `classes`: a file with one a line, or a comma list. UserError: no such file, a name twice, none, or one alone."""
    text = str(classes)
    path = Path(text).expanduser()
    if "," not in text and not path.is_file():
        raise UserError(f"classes={text!r}: no such file; expected a file with one class name a line, or names with commas between")
    if path.is_file():
        from w2s_jax.data.sources import decode

        names = [line.strip() for line in decode(path.read_bytes(), str(path)).splitlines()]
    else:
        names = [name.strip() for name in text.split(",")]
    names = [name for name in names if name]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise UserError(f"classes={text!r}: {twice!r} stands there more than once")
    if len(names) < 2:
        raise UserError(f"classes={text!r}: {len(names)} names, expected two or more")
    return tuple(names)
