"""From documents to packed token batches of a few planned shapes.

A *batch* is the reference's: which documents, in which order. Inside a batch the documents are dealt
to `microbatches x cells` (cells = devices along data x fsdp), balanced by tokens, and every cell is
packed into `[rows, time]`. All cells of a dispatch share one shape, and a run uses at most
`MAX_SHAPES`, planned from its lengths before the first step, so that it compiles a known, small
number of programs (DESIGN.md, idea 4).
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np

MAX_SHAPES = 6
# Row lengths that a shape may have: finer steps where rows are short, multiples of 256 beyond the last one.
TIMES = (*range(8, 128, 8), *range(128, 256, 16), *range(256, 512, 32), *range(512, 1025, 128))
_TRIED = 14  # row lengths tried a run
_SAMPLE = 2000  # dispatches that the choice of shapes looks at; all of them are then checked against it


@dataclasses.dataclass(frozen=True, order=True)
class Shape:
    """One cell's rows and row length, in tokens."""

    rows: int
    time: int

    def cost(self, embed: int) -> float:
        """Relative time: one unit a token, plus attention's share, which grows with the row length.

        A block costs about 24 embed^2 FLOPs a token in matmuls and 4 time embed in attention; attention
        runs at about half the matmuls' efficiency.
        """
        return self.rows * self.time * (1 + self.time / (3.0 * embed))


def best_fit(lengths: Sequence[int], time: int) -> list[list[int]]:
    """Best-fit decreasing: the rows (lists of positions in `lengths`) that hold every document once.

    Raises ValueError where a document is longer than `time`.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    room: list[int] = []  # free tokens of the open rows, ascending
    which: list[int] = []  # the row that each entry of `room` speaks of
    rows: list[list[int]] = []
    for i in order:
        n = lengths[i]
        if n > time:
            raise ValueError(f"a document of {n} tokens does not fit into rows of {time}")
        at = bisect.bisect_left(room, n)
        if at == len(room):
            rows.append([i])
            left, row = time - n, len(rows) - 1
        else:
            left, row = room.pop(at) - n, which.pop(at)
            rows[row].append(i)
        at = bisect.bisect_left(room, left)
        room.insert(at, left)
        which.insert(at, row)
    return rows


def deal(lengths: Sequence[int], cells: int) -> list[list[int]]:
    """Deal documents to cells: counts differ by at most one, tokens as even as that allows.

    The longest `cells` documents go first, each to the cell with the fewest tokens, then the next.
    """
    out: list[list[int]] = [[] for _ in range(cells)]
    load = [0] * cells
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), cells):
        free = sorted(range(cells), key=lambda c: (load[c], c))
        for cell, i in zip(free, order[start:start + cells]):
            out[cell].append(i)
            load[cell] += lengths[i]
    return [sorted(c) for c in out]


def candidate_times(lengths: np.ndarray) -> list[int]:
    """Row lengths worth trying: from about the mean document to a little over twice the longest one."""
    longest, mean = int(lengths.max()), float(lengths.mean())
    grid = list(TIMES) + list(range(1280, 4 * longest + 1, 256))
    fits = [t for t in grid if t >= longest]
    times = [t for t in grid if mean <= t < longest] + [t for t in fits if t <= max(2.5 * longest, fits[0])]
    keep = np.unique(np.linspace(0, len(times) - 1, _TRIED).round().astype(int)) if len(times) > _TRIED else range(len(times))
    return sorted({times[i] for i in keep} | {fits[0]})


def choose_shapes(needs: dict[int, np.ndarray], embed: int, max_shapes: int = MAX_SHAPES, compile_cost: float = 0.5) -> list[Shape]:
    """The shapes that hold every dispatch at the least cost.

    Args:
      needs: row length -> rows needed by each dispatch, int `[dispatches]`; 0 = it does not fit that length.
      embed: model width, for attention's share of the cost.
      compile_cost: what a further program costs, in dispatches.
    """
    n = len(next(iter(needs.values())))
    shapes, costs = [], []
    for time, rows in needs.items():
        for r in np.unique(rows[rows > 0]):
            shape = Shape(int(r), time)
            shapes.append(shape)
            costs.append(np.where((rows > 0) & (rows <= r), shape.cost(embed), np.inf))
    costs = np.stack(costs)
    covers = [i for i in range(len(shapes)) if np.isfinite(costs[i]).all()]
    chosen = [min(covers, key=lambda i: costs[i][0])]
    while len(chosen) < min(max_shapes, len(shapes)):
        current = costs[chosen].min(axis=0)
        gains = np.maximum(current - costs, 0).sum(axis=1)
        best = int(np.argmax(gains))
        # A further program must save 1% of the run, and in a short run its compilation.
        if gains[best] < current.sum() * max(0.01, compile_cost / n):
            break
        chosen.append(best)
        for k in range(len(chosen) - 1):  # what was chosen early may be better placed now
            others = chosen[:k] + chosen[k + 1:]
            totals = np.minimum(costs[others].min(axis=0), costs).sum(axis=1)
            chosen[k] = int(np.argmin(totals))
    return sorted({shapes[i] for i in chosen}, key=lambda s: (s.cost(embed), s))


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a run's batches become arrays. Deterministic in (lengths, batches, layout), so that a resumed run packs alike.

    Attributes:
      batches: document numbers of each step, in the reference's order.
      dispatches: the steps of each call of the device, consecutive.
      shape_of: for each dispatch its index in `shapes`.
      microbatches, cells, slots: slots = documents a cell can hold.
      useful, computed: real tokens and all token places over the run.
    """

    batches: list[np.ndarray]
    dispatches: list[range]
    shape_of: list[int]
    shapes: list[Shape]
    microbatches: int
    cells: int
    slots: int
    batch_size: int
    useful: int
    computed: int

    @property
    def padding_fraction(self) -> float:
        return 1.0 - self.useful / max(self.computed, 1)


def plan_training(lengths: np.ndarray, batches: list[np.ndarray], dispatches: list[range], *, microbatches: int = 1,
                  cells: int = 1, embed: int = 768, max_shapes: int = MAX_SHAPES) -> Plan:
    """Plan the shapes of a training run.

    Args:
      lengths: tokens of each document, int `[documents]`, all positive.
      batches: document numbers of each step, `[batch]` each.
      dispatches: steps that share one call of the device and so one shape.
    """
    dealt = [deal(lengths[b].tolist(), microbatches * cells) for b in batches]
    cell_lengths = [[[int(lengths[b[i]]) for i in cell] for cell in cells_] for b, cells_ in zip(batches, dealt)]
    times = candidate_times(lengths[np.concatenate(batches)])

    def need(dispatch: range, time: int) -> int:
        cells_ = [c for step in dispatch for c in cell_lengths[step]]
        if max(max(c, default=0) for c in cells_) > time:
            return 0
        return max(max(len(best_fit(c, time)) for c in cells_), 1)

    sample = dispatches[:: max(1, -(-len(dispatches) // _SAMPLE))]
    longest = max(dispatches, key=lambda d: max(int(lengths[batches[step]].max()) for step in d))
    if longest not in sample:  # some shape must be long enough for it
        sample = [*sample, longest]
    needs = {t: np.array([need(d, t) for d in sample]) for t in times}
    needs = {t: rows for t, rows in needs.items() if (rows > 0).any()}
    # Several steps share a dispatch where the model is small: it is then over in milliseconds, and compiling takes seconds.
    grouped = max(len(d) for d in dispatches) > 1
    shapes = choose_shapes(needs, embed, max_shapes, compile_cost=4.0 if grouped else 0.5)
    shape_of, grown = _assign(dispatches, shapes, need, embed)
    useful = int(sum(int(lengths[b].sum()) for b in batches))
    places = microbatches * cells
    computed = sum(len(d) * places * grown[s].rows * grown[s].time for d, s in zip(dispatches, shape_of))
    slots = max(len(c) for cells_ in dealt for c in cells_)
    return Plan(batches, dispatches, shape_of, grown, microbatches, cells, slots,
                max(len(b) for b in batches), useful, computed)


def _assign(dispatches, shapes, need, embed) -> tuple[list[int], list[Shape]]:
    """The cheapest shape of each dispatch; the largest shape grows where one outside the sample needs more."""
    largest = max(shapes, key=lambda s: (s.time, s.rows))
    rows_of = {t: [need(d, t) for d in dispatches] for t in {s.time for s in shapes}}
    worst = max((r for k, r in enumerate(rows_of[largest.time])
                 if not any(0 < rows_of[s.time][k] <= s.rows for s in shapes)), default=0)
    if worst:
        shapes = sorted([s for s in shapes if s != largest] + [Shape(worst, largest.time)], key=lambda s: (s.cost(embed), s))
    out = []
    for k in range(len(dispatches)):
        out.append(next(i for i, s in enumerate(shapes) if 0 < rows_of[s.time][k] <= s.rows))
    return out, shapes


def assemble(documents: np.ndarray, tokens: Sequence[np.ndarray], plan: Plan, shape: Shape,
             own: Sequence[int] | None = None) -> dict[str, np.ndarray]:
    """One step's arrays. `own`: the cells that are wanted (those of this process's devices), ascending; None = all.

    Returns int32 arrays: `tokens`, `segments`, `positions` `[microbatches, own, rows, time]` (segment 0 = padding,
    else 1 + index of the document in the batch), `documents` `[microbatches, own, slots]` (index in the batch,
    -1 = empty), `last` (row * time + position of the last token, local to the cell), and `where` `[batch_size]`,
    each document's place in the flattened slots of all cells.
    """
    lengths = [len(tokens[d]) for d in documents]
    dealt = deal(lengths, plan.microbatches * plan.cells)
    where = np.zeros(plan.batch_size, np.int32)
    for number, cell in enumerate(dealt):
        where[cell] = number * plan.slots + np.arange(len(cell))
    own = range(plan.cells) if own is None else own
    wanted = [dealt[m * plan.cells + c] for m in range(plan.microbatches) for c in own]
    packed = [[[cell[i] for i in row] for row in best_fit([lengths[d] for d in cell], shape.time)] for cell in wanted]
    batch = _fill(packed, [tokens[d] for d in documents], shape, plan.slots, sort_slots=True)
    lead = (plan.microbatches, len(own))
    return {k: v.reshape(lead + v.shape[1:]) for k, v in batch.items()} | {"where": where}


def _fill(packed, tokens, shape: Shape, slots: int, sort_slots: bool = False) -> dict[str, np.ndarray]:
    """Write packed cells (lists of rows of document numbers) into arrays with a leading axis of cells."""
    n = len(packed)
    out = {k: np.zeros((n, shape.rows, shape.time), np.int32) for k in ("tokens", "segments", "positions")}
    documents = np.full((n, slots), -1, np.int32)
    last = np.zeros((n, slots), np.int32)
    for c, rows in enumerate(packed):
        ends = []
        for r, row in enumerate(rows):
            at = 0
            for d in row:
                ids = tokens[d]
                stop = at + len(ids)
                out["tokens"][c, r, at:stop] = ids
                out["segments"][c, r, at:stop] = d + 1
                out["positions"][c, r, at:stop] = np.arange(len(ids))
                ends.append((d, r * shape.time + stop - 1))
                at = stop
        if sort_slots:
            ends.sort()
        for s, (d, end) in enumerate(ends):
            documents[c, s], last[c, s] = d, end
    return out | {"documents": documents, "last": last}


@dataclasses.dataclass(frozen=True)
class EvalBatch:
    """A batch for a forward pass, of packed documents (or of images): `arrays` as in `assemble` without the microbatch axis (as
    `models.vision` takes them); `documents` global numbers; `useful` tokens in all its cells (0 of images)."""

    arrays: dict[str, np.ndarray]
    documents: np.ndarray  # [cells, slots] document numbers over the whole set, -1 = empty
    useful: int = 0


def plan_forward(lengths: np.ndarray, *, cells: int = 1, embed: int = 768, tokens_per_batch: int = 8192) -> list[tuple[Shape, list]]:
    """Pack a whole set for forward passes, where the order is free: one or two row lengths, rows filled by best fit.

    Returns `(shape of a cell, batches)` for each row length; a batch is a list of `cells` lists of rows, a row a
    list of document numbers.
    """
    lengths = np.asarray(lengths)

    def pack(low: int, time: int, lengths: np.ndarray) -> list[list[int]]:
        chosen = np.flatnonzero((lengths > low) & (lengths <= time))
        return [[int(chosen[i]) for i in row] for row in best_fit(lengths[chosen].tolist(), time)]

    some = np.sort(lengths)[:: max(1, len(lengths) // 500)]  # row lengths are chosen on a sample of the documents
    times = candidate_times(lengths)
    options = []
    for long in [t for t in times if t >= lengths.max()]:
        options.append((Shape(len(pack(0, long, some)), long).cost(embed), [(0, long)]))
        for short in [t for t in times if t < long]:
            few, many = len(pack(0, short, some)), len(pack(short, long, some))
            if few and many:
                cost = Shape(few, short).cost(embed) + Shape(many, long).cost(embed)
                options.append((cost * 1.03, [(0, short), (short, long)]))  # a second program must pay for itself
    out = []
    for low, time in min(options, key=lambda o: o[0])[1]:
        rows = pack(low, time, lengths)
        fit = max(1, tokens_per_batch // (time * cells)) * cells  # rows of a batch, over all cells
        batches = -(-len(rows) // fit)
        per_cell = -(-len(rows) // (batches * cells))
        size = per_cell * cells
        cut = [rows[i * size:(i + 1) * size] for i in range(batches)]
        out.append((Shape(per_cell, time), [[b[c * per_cell:(c + 1) * per_cell] for c in range(cells)] for b in cut if b]))
    return out


def forward_batches(tokens: Sequence[np.ndarray], own: Sequence[int] | None = None, **layout) -> list[EvalBatch]:
    """Every document of a set in packed batches for forward passes; see `plan_forward` for the arguments, `assemble` for `own`.

    Segment ids are local to a batch (1 + rank of the document in it), as in training.
    """
    if not len(tokens):
        return []
    out = []
    for shape, batches in plan_forward(np.array([len(t) for t in tokens]), **layout):
        slots = max(sum(len(row) for row in cell) for batch in batches for cell in batch)
        for batch in batches:
            number = [d for cell in batch for row in cell for d in row]
            rank = {d: i for i, d in enumerate(number)}
            numbers = np.full((len(batch), slots), -1)
            for c, cell in enumerate(batch):
                inside = [d for row in cell for d in row]
                numbers[c, : len(inside)] = inside
            local = [[[rank[d] for d in row] for row in batch[c]] for c in (range(len(batch)) if own is None else own)]
            out.append(EvalBatch(_fill(local, [tokens[d] for d in number], shape, slots), numbers, sum(len(tokens[d]) for d in number)))
    return out


def batch_stream(documents: int, batch_size: int, epochs: int, shuffle: str, seed: int) -> list[np.ndarray]:
    """The documents of every step: epochs one after the other, cut into batches that may cross them.

    As in openai/weak-to-strong `train.py`, there are `documents * epochs // batch_size` steps.

    Args:
      shuffle: `none` (file order), `once` (one seeded order for all epochs), `epoch` (a fresh one each).
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0x0DDE]))
    order = np.arange(documents)
    if shuffle == "once":
        order = rng.permutation(documents)
    whole = epochs if float(epochs).is_integer() else epochs
    stream = np.concatenate([rng.permutation(documents) if shuffle == "epoch" else order for _ in range(int(np.ceil(whole)))])
    steps = int(documents * epochs) // batch_size
    return [stream[i * batch_size:(i + 1) * batch_size] for i in range(steps)]
