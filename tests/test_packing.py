"""Packing: every document exactly once, a few planned shapes, little padding, the same plan each time."""

import dataclasses

import numpy as np
import pytest
import tiny

from w2s_jax.data import packing
from w2s_jax.data.packing import MAX_SHAPES, Shape, assemble, batch_stream, best_fit, deal, plan_forward, plan_training
from w2s_jax.feeding import dispatch_ranges

SEEDS = range(25)
LAYOUTS = [(1, 1), (3, 1), (1, 8), (5, 4)]  # (microbatches, cells)


def random_lengths(seed: int) -> list[int]:
    rng = np.random.default_rng(seed)
    longest = int(rng.integers(1, 200))
    kind = seed % 3  # uniform, mostly short, all alike
    short = np.clip(rng.gamma(1.5, longest / 10, 60).astype(int), 1, longest)
    draws = (rng.integers(1, longest + 1, 60), short, np.full(60, longest))[kind]
    return draws[: int(rng.integers(1, 61))].tolist()


# --------------------------------------------------------------------------- rows and cells


@pytest.mark.parametrize("seed", SEEDS)
def test_best_fit_holds_every_document_once_and_no_two_rows_could_be_one(seed):
    lengths = random_lengths(seed)
    time = max(lengths) + seed % 7
    rows = best_fit(lengths, time)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in row) for row in rows]
    assert max(loads) <= time
    assert all(a + b > time for i, a in enumerate(loads) for b in loads[:i])  # else the later row would not have been opened
    assert rows == best_fit(list(lengths), time)


@pytest.mark.parametrize("seed", SEEDS)
def test_best_fit_puts_each_document_where_it_leaves_the_least_room(seed):
    lengths = random_lengths(seed)
    time = max(lengths) + seed % 7
    loads = []
    for n in sorted(lengths, reverse=True):
        open_rows = [load for load in loads if load + n <= time]
        if open_rows:
            loads.remove(max(open_rows))
            loads.append(max(open_rows) + n)
        else:
            loads.append(n)
    assert sorted(sum(lengths[i] for i in row) for row in best_fit(lengths, time)) == sorted(loads)


def test_a_document_longer_than_the_row_is_a_defect_not_a_cut():
    with pytest.raises(ValueError, match="9 tokens does not fit into rows of 8"):
        best_fit([3, 9], 8)


@pytest.mark.parametrize("cells", [1, 3, 8, 70])
@pytest.mark.parametrize("seed", SEEDS[:9])
def test_cells_get_alike_many_documents_and_tokens(seed, cells):
    lengths = random_lengths(seed)
    dealt = deal(lengths, cells)
    assert sorted(i for cell in dealt for i in cell) == list(range(len(lengths)))
    counts = [len(cell) for cell in dealt]
    loads = [sum(lengths[i] for i in cell) for cell in dealt]
    assert len(dealt) == cells and max(counts) - min(counts) <= 1
    assert max(loads) - min(loads) <= max(lengths)
    assert all(cell == sorted(cell) for cell in dealt)


# --------------------------------------------------------------------------- the plan of a run


def make_plan(seed=0, microbatches=1, cells=1, group=1, batch_size=16, documents=100, **options):
    tokens = tiny.documents(documents, seed, longest=150)
    batches = batch_stream(documents, batch_size, 2, "epoch", seed)
    plan = plan_training(np.array([len(t) for t in tokens]), batches, dispatch_ranges(len(batches), group),
                         microbatches=microbatches, cells=cells, embed=64, **options)
    return tokens, plan


@pytest.mark.parametrize("group", [1, 5])
@pytest.mark.parametrize("microbatches, cells", LAYOUTS)
def test_every_document_of_every_step_stands_in_the_arrays_once(microbatches, cells, group):
    tokens, plan = make_plan(microbatches=microbatches, cells=cells, group=group)
    assert 1 <= len(plan.shapes) <= MAX_SHAPES and set(plan.shape_of) == set(range(len(plan.shapes)))
    assert [s for d in plan.dispatches for s in d] == list(range(len(plan.batches)))
    useful = computed = 0
    for dispatch, which in zip(plan.dispatches, plan.shape_of):
        shape = plan.shapes[which]
        for step in dispatch:
            chosen = plan.batches[step]
            a = assemble(chosen, tokens, plan, shape)
            assert a["tokens"].shape == (microbatches, cells, shape.rows, shape.time)
            assert a["documents"].shape == a["last"].shape == (microbatches, cells, plan.slots)
            assert all(v.dtype == np.int32 for v in a.values())
            used = a["segments"] > 0
            assert not a["tokens"][~used].any() and not a["positions"][~used].any()
            slots = a["documents"].reshape(-1)
            assert sorted(slots[slots >= 0]) == list(range(len(chosen)))
            for d, number in enumerate(chosen):
                m, c, row, at = (axis[0] for axis in np.nonzero(a["segments"] == d + 1))
                ids, place = tokens[number], (m, c, row, slice(at, at + len(tokens[number])))
                assert (a["segments"] == d + 1).sum() == len(ids)
                np.testing.assert_array_equal(a["tokens"][place], ids)
                np.testing.assert_array_equal(a["positions"][place], np.arange(len(ids)))
                slot = a["where"][d]
                assert slots[slot] == d and slot // plan.slots == m * cells + c  # read out in its own cell
                assert a["last"].reshape(-1)[slot] == row * shape.time + at + len(ids) - 1
            useful, computed = useful + used.sum(), computed + used.size
    assert (plan.useful, plan.computed) == (useful, computed)
    assert plan.padding_fraction == 1 - useful / computed


@pytest.mark.parametrize("microbatches, cells", LAYOUTS)
def test_the_plan_is_a_function_of_the_run(microbatches, cells):
    one, two = (make_plan(seed=3, microbatches=microbatches, cells=cells, group=4)[1] for _ in range(2))
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(two, field.name)
        assert all(np.array_equal(x, y) for x, y in zip(a, b)) if field.name == "batches" else a == b


@pytest.mark.parametrize("seed", SEEDS[:6])
def test_each_dispatch_gets_a_shape_that_holds_it(seed):
    tokens, plan = make_plan(seed=seed, batch_size=7, documents=200)
    assert len(plan.shapes) <= MAX_SHAPES
    for dispatch, which in zip(plan.dispatches, plan.shape_of):
        fitting = [i for i, s in enumerate(plan.shapes) if all(
            max(len(tokens[d]) for d in plan.batches[step]) <= s.time
            and len(best_fit([len(tokens[d]) for d in plan.batches[step]], s.time)) <= s.rows for step in dispatch)]
        assert which == min(fitting, key=lambda i: plan.shapes[i].cost(64))


def test_more_shapes_never_cost_more_and_one_is_enough():
    costs = []
    for most in (1, 3, 6):
        _, plan = make_plan(batch_size=4, documents=300, max_shapes=most)
        assert len(plan.shapes) <= most
        costs.append(sum(plan.shapes[which].cost(64) for which in plan.shape_of))
    assert costs[0] >= costs[1] >= costs[2] and costs[2] < costs[0]


@pytest.mark.parametrize("extreme", ["longest document", "most rows"])
def test_a_long_run_is_planned_from_a_sample_and_still_holds_everything(monkeypatch, extreme):
    """What is the run's longest document, or its fullest batch, must not be outside the plan because no sample saw it."""
    monkeypatch.setattr(packing, "_SAMPLE", 4)
    for odd in range(20):
        lengths = np.full(80, 6)
        lengths[4 * odd: 4 * odd + 4] = [100, 1, 1, 1] if extreme == "longest document" else [8, 8, 8, 8]
        batches = [np.arange(4) + 4 * i for i in range(20)]
        plan = plan_training(lengths, batches, [range(i, i + 1) for i in range(20)], embed=64)
        for batch, which in zip(plan.batches, plan.shape_of):
            assert len(best_fit(lengths[batch].tolist(), plan.shapes[which].time)) <= plan.shapes[which].rows


@pytest.fixture(scope="module")
def sciq_lengths(shared):
    """Token counts of SciQ's question-answer pairs under GPT-2's tokenizer, and how many of each step of 32 there are."""
    from w2s_jax import hub
    from w2s_jax.config import shipped
    from w2s_jax.data import splits

    c = tiny.set_keys(shipped("finetune"), task="sciq", task_dir=str(shared / "data/tasks"), split="train")
    texts = splits.prepare(c).train.texts
    return np.array([len(ids) for ids in hub.tokenize(str(shared / "data/tokenizers/gpt2"), texts)])


@pytest.mark.parametrize("shuffle", ["once", "epoch"])
def test_padding_on_sciq_is_below_a_tenth(sciq_lengths, shuffle):
    batches = batch_stream(len(sciq_lengths), 32, 2, shuffle, 0)
    plan = plan_training(sciq_lengths, batches, dispatch_ranges(len(batches), 1))
    longest = sum(len(b) * sciq_lengths[b].max() for b in batches)
    assert len(plan.shapes) <= MAX_SHAPES
    assert plan.useful == sum(sciq_lengths[b].sum() for b in batches) and plan.useful / len(batches) > 512
    assert plan.padding_fraction < 0.10
    assert 1 - plan.useful / longest > 0.40  # what padding to the longest would have cost


def test_padding_on_sciq_is_small_for_labelling(sciq_lengths):
    planned = plan_forward(sciq_lengths)
    places = sum(shape.rows * shape.time * len(batches) for shape, batches in planned)
    assert 1 - sciq_lengths.sum() / places < 0.03


# --------------------------------------------------------------------------- forward passes


@pytest.mark.parametrize("cells", [1, 8])
@pytest.mark.parametrize("seed", SEEDS[:8])
def test_a_forward_pass_covers_the_set_once_with_one_or_two_shapes(seed, cells):
    tokens = tiny.documents(1 + 37 * seed, seed, longest=90)
    budget = 256
    planned = plan_forward(np.array([len(t) for t in tokens]), cells=cells, embed=64, tokens_per_batch=budget)
    assert 1 <= len(planned) <= 2
    assert sorted(d for _, batches in planned for b in batches for cell in b for row in cell for d in row) == list(range(len(tokens)))
    for shape, batches in planned:
        assert shape.rows * shape.time * cells <= max(budget, shape.time * cells)  # one row a cell is the least
        for batch in batches:
            assert len(batch) == cells and all(len(cell) <= shape.rows for cell in batch)
            assert all(sum(len(tokens[d]) for d in row) <= shape.time for cell in batch for row in cell)
    for batch in packing.forward_batches(tokens, cells=cells, embed=64, tokens_per_batch=budget):
        a = batch.arrays
        for (c, s), number in np.ndenumerate(batch.documents):
            local = a["documents"][c, s]
            assert (local >= 0) == (number >= 0)
            if number >= 0:
                mine = a["segments"][c] == local + 1
                np.testing.assert_array_equal(a["tokens"][c][mine], tokens[number])
                np.testing.assert_array_equal(a["positions"][c][mine], np.arange(len(tokens[number])))
                assert np.flatnonzero(mine.reshape(-1))[-1] == a["last"][c, s]
        assert (a["segments"] > 0).sum() == sum(len(tokens[d]) for d in batch.documents[batch.documents >= 0])


def test_nothing_to_pack():
    assert packing.forward_batches([], cells=2, embed=8) == []


# --------------------------------------------------------------------------- order


@pytest.mark.parametrize("shuffle", ["none", "once", "epoch"])
def test_the_stream_is_epoch_after_epoch_cut_into_batches(shuffle):
    n, size, epochs = 10, 4, 3
    batches = batch_stream(n, size, epochs, shuffle, seed=5)
    assert [len(b) for b in batches] == [size] * (n * epochs // size)
    stream = np.concatenate(batches)
    passes = [stream[i * n:(i + 1) * n].tolist() for i in range(epochs)]
    assert all(sorted(p) == list(range(n)) for p in passes[:2])
    assert (passes[0] == list(range(n))) == (shuffle == "none")
    assert (passes[0] == passes[1]) == (shuffle != "epoch")
    again, other = (np.concatenate(batch_stream(n, size, epochs, shuffle, seed=s)) for s in (5, 6))
    assert np.array_equal(stream, again)
    assert np.array_equal(stream, other) == (shuffle == "none")


def test_a_shape_costs_its_tokens_and_more_where_rows_are_long():
    assert Shape(2, 64).cost(768) > Shape(4, 32).cost(768) > 128
    assert Shape(2, 64).cost(10**9) == pytest.approx(128)
