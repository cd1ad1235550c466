"""Feature matrices in blocks of rows, whatever holds them: numpy, jax or a file that is mapped into memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from w2s_jax.errors import UserError

BLOCK_BYTES = 2**26  # a block of rows in float32: 64 MiB
BLOCK_ROWS = 4096


class Rows:
    """Features `[n, d]`, read as float32 blocks; nothing but the block at hand is copied.

    Raises:
        UserError: not a matrix of numbers, or empty.
    """

    def __init__(self, features, name: str = "features"):
        array = features if isinstance(features, np.ndarray) else np.asarray(features)
        # jax's bfloat16 is of kind V for numpy
        if array.ndim != 2 or 0 in array.shape or not (array.dtype.kind in "fiu" or array.dtype.name == "bfloat16"):
            raise UserError(f"{name}: {array.dtype} {list(array.shape)}, expected numbers [documents, features], none of the two 0")
        self.array, self.name = array, name
        self.n, self.d = array.shape

    def __len__(self) -> int:
        return self.n

    @property
    def size(self) -> int:
        """Rows in a block, within `BLOCK_BYTES` and `BLOCK_ROWS`: blocks of one size that fill the matrix with little padding."""
        most = max(min(BLOCK_BYTES // (4 * self.d), BLOCK_ROWS), 8)
        if self.n <= most:
            return min(1 << (self.n - 1).bit_length(), most)  # powers of two: few shapes to compile
        even = -(-self.n // -(-self.n // most))
        return min(-(-even // 64) * 64, most)

    def __getitem__(self, rows) -> np.ndarray:
        """Some rows in float32: a slice, or indices."""
        return np.asarray(self.array[rows], np.float32)

    def padded(self, start: int, size: int) -> np.ndarray:
        """Rows `start` to `start + size`; zeros stand where there are none."""
        block = self[start : start + size]
        return block if len(block) == size else np.pad(block, ((0, size - len(block)), (0, 0)))

    def aligned(self, less: np.ndarray | None = None, count: int = 0) -> np.ndarray:
        """All rows in float32, less a row `[d]`, and zeros after them where `count` is more than there are.

        A CPU's device takes over the very array, since it is aligned as XLA wants it.
        """
        count = max(count, self.n)
        raw = np.empty(4 * count * self.d + 64, np.uint8)
        begin = -raw.ctypes.data % 64
        out = raw[begin : begin + 4 * count * self.d].view(np.float32).reshape(count, self.d)
        out[self.n :] = 0
        for where, block in self.blocks():
            np.subtract(block, np.float32(0) if less is None else less, out=out[where])
        return out

    def blocks(self, size: int = 0) -> Iterator[tuple[slice, np.ndarray]]:
        """Yields (where, float32 rows)."""
        size = size or self.size
        for start in range(0, self.n, size):
            where = slice(start, min(start + size, self.n))
            yield where, self[where]

    def mean(self) -> np.ndarray:
        """Mean row, float32 `[d]`, summed in double. Checks all rows on the way.

        Raises:
            UserError: a value is not finite.
        """
        total = np.zeros(self.d)
        for where, block in self.blocks():
            sums = block.sum(axis=0, dtype=np.float64)
            if not np.isfinite(sums).all():
                bad = ~np.isfinite(block).all(axis=1)
                if bad.any():
                    raise UserError(f"{self.name}: row {where.start + int(bad.argmax())} is not finite, expected finite numbers")
            total += sums
        return (total / self.n).astype(np.float32)

    def check(self, width: int) -> None:
        """UserError where rows are not as wide as those of the fit, or not finite."""
        if self.d != width:
            raise UserError(f"{self.name}: {self.d} features, expected {width} as in the fit")
        self.mean()
