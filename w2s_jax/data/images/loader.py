"""Pixels of an image set, decoded by a pool of threads (Pillow lets go of the interpreter's lock) while the model computes."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import weakref
from collections.abc import Iterator

import numpy as np

from w2s_jax.data.images.decoding import BadImage, Transform
from w2s_jax.data.images.imageset import ImageSet, cores
from w2s_jax.errors import UserError, nearest
from w2s_jax.progress import Progress

BAD = ("error", "skip")
CACHE = 1 << 30  # bytes of decoded images that are kept in memory
PIECES = 4  # a batch is cut into this many pieces a thread: small images are not decoded one task each


class Loader:
    """Decodes images of a set: uint8 `[images, height, width, 3]`.

    Args:
      images: which.
      transform: what happens to each.
      workers: threads; 0 = the cores of this process.
      bad: what a truncated file, no image, or one of absurd size does: "error" raises UserError, naming it; "skip" gives zeros, and
        `bad` and `skipped` name it.
      cache_bytes: where the pixels of the whole set take no more, they are kept once they are decoded.

    Attributes:
      bad: reason by row of every image that was found bad so far (under "skip").

    UserError: `bad` is something else; without a crop, an image of another size than the first.
    """

    def __init__(self, images: ImageSet, transform: Transform, *, workers: int = 0, bad: str = "error", cache_bytes: int = CACHE):
        if bad not in BAD:
            raise UserError(f"bad={bad!r}: expected {' | '.join(BAD)}{nearest(bad, BAD)}")
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
            raise UserError(f"workers={workers!r}: expected a number of threads, 0 for one a core")
        self.images, self.transform, self.on_bad = images, transform, bad
        self.workers = workers or cores()
        self.bad: dict[int, str] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(self.workers, thread_name_prefix="images")
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        self.size = (transform.crop, transform.crop) if transform.crop else self._first_size()
        shape = (len(images), *self.size, 3)
        self._kept = np.empty(shape, np.uint8) if np.prod(shape) <= cache_bytes else None
        self._is_kept = np.zeros(len(images), bool)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(id, reason) of the images that were found bad so far, in the set's order."""
        return [(self.images.ids[row], self.bad[row]) for row in sorted(self.bad)]

    def pixels(self, rows) -> np.ndarray:
        """The images at `rows` (indices), uint8 `[rows, height, width, 3]`; zeros where one is bad, under "skip"."""
        with contextlib.closing(self._start(np.asarray(rows, np.int64).reshape(-1))) as batch:
            return batch.result()

    def stream(self, rows, batch: int, *, ahead: int = 2) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(rows int64 `[n]`, their pixels) for `batch` rows after the other, the last batch possibly smaller.

        The `ahead` next batches are decoded while the consumer computes; memory holds no more than `ahead` + 1 of them.
        """
        rows = np.asarray(rows, np.int64).reshape(-1)
        parts = (rows[start : start + batch] for start in range(0, len(rows), batch))
        waiting: collections.deque[_Batch] = collections.deque()
        try:
            while True:
                while len(waiting) <= ahead and (part := next(parts, None)) is not None:
                    waiting.append(self._start(part))
                if not waiting:
                    return
                pixels = waiting[0].result()
                yield waiting.popleft().rows, pixels
        finally:
            for begun in waiting:
                begun.close()

    def check(self, rows=None) -> list[tuple[int, str]]:
        """(row, reason) of the bad images among `rows` (default: all). Every image is decoded, with a progress bar.

        That takes as long as a first pass over the set, which finds the same: see `bad`. Never raises for a bad image.
        """
        rows = np.arange(len(self.images)) if rows is None else np.asarray(rows, np.int64).reshape(-1)
        found: list[tuple[int, str]] = []
        with Progress(len(rows), label=f"checking {self.images.name}", unit="image") as bar:
            for start in range(0, len(rows), 64 * self.workers):
                part = rows[start : start + 64 * self.workers].tolist()
                found += [(row, reason) for row, reason in zip(part, self._pool.map(self._reason, part)) if reason]
                bar.update(len(part))
        if self.on_bad == "skip":
            self.bad.update(found)
        return found

    # ------------------------------------------------------------ decoding

    def _start(self, rows: np.ndarray) -> _Batch:
        if self._kept is not None and self._is_kept[rows].all():
            return _Batch(rows, self._kept[rows], [])
        out = np.empty((len(rows), *self.size, 3), np.uint8)
        step = max(1, -(-len(rows) // (PIECES * self.workers)))
        pieces = [slice(start, start + step) for start in range(0, len(rows), step)]
        return _Batch(rows, out, [self._pool.submit(self._fill, out[piece], rows[piece].tolist()) for piece in pieces])

    def _fill(self, out: np.ndarray, rows: list[int]) -> None:
        for place, row in enumerate(rows):
            if self._is_kept[row]:
                out[place] = self._kept[row]
                continue
            try:
                out[place] = self._decoded(row)
            except BadImage as error:
                self.found_bad(row, str(error))
                out[place] = 0
            if self._kept is not None:
                self._kept[row] = out[place]
                self._is_kept[row] = True  # last: another thread may look

    def found_bad(self, row: int, reason: str) -> None:
        """Leaves an image out. UserError under "error", naming it."""
        if self.on_bad == "error":
            raise UserError(f"{self.images.name}: {self.images.ids[row]}: {reason}; bad_images=skip leaves such images out")
        self.bad[row] = reason

    def _decoded(self, row: int) -> np.ndarray:
        pixels = self.transform(self.images.encoded(row))
        if pixels.shape[:2] != self.size:
            height, width = pixels.shape[:2]
            raise UserError(f"{self.images.name}: {self.images.ids[row]}: {width} x {height} pixels, another one has {self.size[1]} x "
                            f"{self.size[0]}; expected one size, or crop=PIXELS")
        return pixels

    def _reason(self, row: int) -> str:
        try:
            self._decoded(row)
        except BadImage as error:
            return str(error)
        return ""

    def _first_size(self) -> tuple[int, int]:
        """(height, width) of the first image that can be decoded, which all of them must have."""
        for row in range(len(self.images)):
            try:
                return self.transform(self.images.encoded(row)).shape[:2]
            except BadImage as error:
                self.found_bad(row, str(error))
        raise UserError(f"{self.images.name}: none of {len(self.images):,} images can be decoded")


class _Batch:
    """Pixels that are being decoded."""

    def __init__(self, rows: np.ndarray, out: np.ndarray, futures: list[concurrent.futures.Future]):
        self.rows, self.out, self.futures = rows, out, futures

    def result(self) -> np.ndarray:
        for future in self.futures:
            future.result()
        return self.out

    def close(self) -> None:
        """Gives up what has not begun."""
        for future in self.futures:
            future.cancel()
