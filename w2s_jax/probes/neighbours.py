"""Exact nearest neighbours (Euclidean) of many points, in bounded memory.

The distances of a tile of points come from one matrix product, |a - b|^2 = |a|^2 + |b|^2 - 2ab, on centred features. In
float32 that loses digits where the distance is small beside the norms, so each is kept as a LOWER BOUND: the value less a bound
of its rounding error. The `width` smallest bounds of each point are kept; whatever is not among them is at least as far as the
last. Where these bounds leave it open which points are the k nearest, the distances in question are computed again from
the differences, in double; where even the list may be too short, it is made again, longer. So the neighbours are those of exact
arithmetic whatever the offset or the scale, and equal distances go to the lower index.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax.errors import UserError
from w2s_jax.probes.rows import Rows
from w2s_jax.progress import Progress

SLACK = 14  # candidates beyond those asked for: what the rounding errors leave open is mostly far fewer
LONG = 5e12  # floating-point operations from which on progress is shown (half a minute on a small CPU)
PAIR_BYTES = 2**26  # doubles of the differences held at once
TABLE = 2**22  # entries of a table [rows, candidates] worked on at once
LARGEST = 1e18  # squares of larger distances leave float32
UNIT = 2.0**-24  # unit roundoff of float32


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The nearest of an index to each query, by lower bounds.

    Attributes:
        low: float32 `[m, width]`, lower bounds of the squared distances, ascending; inf where there is no candidate.
        index: int32 `[m, width]`, rows of the index.
    """

    low: np.ndarray
    index: np.ndarray

    def __getitem__(self, rows) -> Candidates:
        return Candidates(self.low[rows], self.index[rows])


class Index:
    """Points `[n, d]` to look for neighbours among.

    Args:
        rows: held, not copied.
    """

    def __init__(self, rows: Rows):
        self.rows = rows
        self.mean = self.rows.mean()
        self.norms = self._norms(self.rows)

    def __len__(self) -> int:
        return self.rows.n

    def _norms(self, rows: Rows) -> np.ndarray:
        """Norms of the centred rows, float32 `[n]`."""
        out = np.empty(rows.n, np.float32)
        for where, block in rows.blocks():
            block = block - self.mean
            out[where] = np.sqrt(np.einsum("ij,ij->i", block, block, dtype=np.float64))
        if out.max() > LARGEST:
            raise UserError(f"{rows.name}: row {int(out.argmax())} is {out.max():.3g} away from the mean, expected at most {LARGEST:.0e}")
        return out

    @property
    def error(self) -> float:
        """E, where E * (|a| + |b|)^2 bounds the error of a squared distance from norms and a product.

        Rounding errors of a sum of d terms grow like sqrt(d) (Higham & Mary 2019, SIAM J. Sci. Comput. 41(5), theorem 2.4,
        lambda = 16) and never beyond d; 8 more units are for centring, norms and the three terms. Doubled for products in parts of
        bfloat16, which is what the highest precision means on a TPU.
        """
        return 2 * UNIT * (min(self.rows.d, 16 * self.rows.d**0.5) + 8)

    def within(self, width: int) -> Candidates:
        """Candidates for each of the index's own points, itself among them. Half of the work: a tile serves rows and columns."""
        size, n = self.rows.size, self.rows.n
        starts = range(0, n, size)
        width = min(width, n)
        best = [_empty(size, width) for _ in starts]
        todo = len(starts) * (len(starts) + 1) // 2
        with _progress(todo, n * n * self.rows.d, "neighbours") as progress:
            for i, start in enumerate(starts):
                a = self._load(self.rows, self.norms, start, size)
                for j in range(i, len(starts)):
                    if i == j:
                        best[i] = _one_way(best[i], a, a, self.mean, self.error, start, width)
                    else:
                        b = self._load(self.rows, self.norms, starts[j], size)
                        best[i], best[j] = _both_ways(best[i], best[j], a, b, self.mean, self.error, start, starts[j], width)
                    jax.block_until_ready(best[i])  # no more than one tile at a time
                    progress.update(1)
                best[i] = jax.device_get(best[i])
        return Candidates(*(np.concatenate(part)[:n] for part in zip(*best)))

    def of(self, queries: Rows, norms: np.ndarray, width: int) -> Candidates:
        """Candidates for other points."""
        width = min(width, len(self))
        room = max(1, TABLE * 4 // width)  # a very long list leaves room for fewer queries at a time
        size = min(queries.size, 1 << (room.bit_length() - 1))
        starts = range(0, queries.n, size)
        steps = range(0, len(self), self.rows.size)
        out = []
        with _progress(len(starts) * len(steps), 2 * queries.n * len(self) * self.rows.d, "neighbours") as progress:
            for start in starts:
                a = self._load(queries, norms, start, size)
                best = _empty(size, width)
                for step in steps:
                    b = self._load(self.rows, self.norms, step, self.rows.size)
                    best = jax.block_until_ready(_one_way(best, a, b, self.mean, self.error, step, width))
                    progress.update(1)
                out.append(jax.device_get(best))
        return Candidates(*(np.concatenate(part)[: queries.n] for part in zip(*out)))

    def _load(self, rows: Rows, norms: np.ndarray, start: int, size: int):
        """A block on the device: points, norms, how many are real."""
        part = norms[start : start + size]
        return jnp.asarray(rows.padded(start, size)), jnp.asarray(np.pad(part, (0, size - len(part)))), len(part)

    def neighbours(self, k: int, queries: Rows | None = None, candidates: Candidates | None = None, itself: bool = True,
                   among: np.ndarray | None = None) -> np.ndarray:
        """The k nearest of the index to each query: int32 `[m, k]`, each row ascending (a set, in no order of distance).

        Args:
            k: how many.
            queries: the points; None = the index's own.
            candidates: of those queries, from `within` or `of`, where they are already there.
            itself: with the index's own points, whether a point may be its own neighbour (at distance 0, exactly).
            among: bool `[n]`, the points of the index that count; None = all.

        Raises:
            UserError: fewer than k points to choose from, or features of another width.
        """
        own = queries is None
        there = len(self) if among is None else int(among.sum())
        if k > there - (own and not itself):
            raise UserError(f"probe_args.k={k}: expected at most {there - (own and not itself)}, the points to choose from")
        if own:
            queries, norms = self.rows, self.norms
        else:
            queries.check(self.rows.d)
            norms = self._norms(queries)
        width = (k if among is None else 2 * k) + SLACK
        if candidates is None:
            candidates = self.within(width) if own else self.of(queries, norms, width)
        result = np.empty((queries.n, k), np.int32)
        rows, width = np.arange(queries.n), candidates.low.shape[1]
        while True:
            open_ = []
            for start in range(0, len(rows), max(1, TABLE // width)):
                part = slice(start, start + max(1, TABLE // width))
                ids = rows[part]
                found, sure = self._resolve(candidates[part], queries, norms, ids, k, ids if own else None, itself, among)
                result[ids[sure]] = found[sure]
                open_.append(ids[~sure])
            rows = np.concatenate(open_)
            if not len(rows):
                return result
            width = min(4 * width, len(self))
            few = Rows(queries[rows])  # lists that were too short, made again
            candidates = self.of(few, norms[rows], width)

    def _resolve(self, candidates: Candidates, queries: Rows, norms, ids, k: int, own, itself: bool, among):
        """The k nearest `[m, k]` of the candidates, and whether they are sure to be the k nearest of all `[m]`."""
        low, index = candidates.low.astype(np.float64), candidates.index
        horizon = np.where(low.shape[1] < len(self), low[:, -1], np.inf)  # nothing beyond the list is nearer
        valid = np.isfinite(low)
        if among is not None:
            valid &= among[index]
        high = low + 2.02 * self.error * (norms[ids, None].astype(np.float64) + self.norms[index]) ** 2
        if own is not None:
            me = index == own[:, None]
            low, high = np.where(me, 0, low), np.where(me, 0, high)
            valid &= itself | ~me
        low, high = np.where(valid, low, np.inf), np.where(valid, high, np.inf)
        farthest = np.partition(high, k - 1, axis=1)[:, k - 1]  # the k-th distance is at most this
        sure = (farthest < horizon) & np.isfinite(farthest)
        first_out = np.minimum(np.partition(low, k, axis=1)[:, k], horizon) if low.shape[1] > k else horizon
        inside = valid & (high < first_out[:, None])  # at most k points, itself included, can be as near
        doubtful = valid & ~inside & (low <= farthest[:, None])
        key = np.where(inside, -1.0, np.where(doubtful, 0.0, np.inf))
        doubtful[~sure | (inside.sum(axis=1) + doubtful.sum(axis=1) == k)] = False
        i, j = np.nonzero(doubtful)
        key[i, j] = self._exact(queries, ids[i], index[i, j])
        # Equal distances go to the lower index: sorted by index first, then by distance, stably.
        place = np.argsort(index, axis=1, kind="stable")
        index, key = np.take_along_axis(index, place, 1), np.take_along_axis(key, place, 1)
        nearest = np.argsort(key, axis=1, kind="stable")[:, :k]
        return np.sort(np.take_along_axis(index, nearest, 1), axis=1), sure

    def _exact(self, queries: Rows, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Squared distances of the pairs (query i, point j), in double from the differences."""
        out = np.empty(len(i))
        size = max(1, PAIR_BYTES // (8 * self.rows.d))
        for start in range(0, len(i), size):
            part = slice(start, start + size)
            difference = queries[i[part]].astype(np.float64)
            difference -= self.rows[j[part]]
            out[part] = np.einsum("ij,ij->i", difference, difference)
        return out


def _empty(rows: int, width: int):
    return jnp.full((rows, width), jnp.inf, jnp.float32), jnp.zeros((rows, width), jnp.int32)


def _bounds(a, b, mean, error):
    """Lower bounds `[rows, columns]` of the squared distances of two blocks (points, norms, count); inf where one is empty."""
    (x, p, rows), (y, q, columns) = a, b
    product = jnp.matmul(x - mean, (y - mean).T, precision=jax.lax.Precision.HIGHEST)
    p, q = p[:, None], q[None, :]
    low = (p * p + q * q - 2 * product) - error * jnp.square(p + q)
    real = (jnp.arange(len(x)) < rows)[:, None] & (jnp.arange(len(y)) < columns)[None, :]
    return jnp.where(real, low, jnp.inf)


def _merge(best, low, offset, width: int):
    """The `width` smallest of a list and of a tile's rows."""
    value, place = jax.lax.top_k(-low, min(width, low.shape[1]))
    value = jnp.concatenate([best[0], -value], axis=1)
    place = jnp.concatenate([best[1], place.astype(jnp.int32) + offset], axis=1)
    value, chosen = jax.lax.top_k(-value, width)
    return -value, jnp.take_along_axis(place, chosen, axis=1)


@functools.partial(jax.jit, static_argnames="width")
def _one_way(best, a, b, mean, error, offset, width: int):
    return _merge(best, _bounds(a, b, mean, error), offset, width)


@functools.partial(jax.jit, static_argnames="width")
def _both_ways(best_a, best_b, a, b, mean, error, offset_a, offset_b, width: int):
    low = _bounds(a, b, mean, error)
    return _merge(best_a, low, offset_b, width), _merge(best_b, low.T, offset_a, width)


def _progress(total: int, operations: float, label: str):
    return Progress(total, label=label, unit="tile") if operations > LONG else contextlib.nullcontext(_Silent())


class _Silent:
    def update(self, n: int = 1) -> None: ...
