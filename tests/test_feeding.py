"""Images as a training run is fed them: the plan of the cells, and the places of images in it."""

import numpy as np
import pytest

from w2s_jax import feeding


def corpus(n=11, size=(4, 6)):
    pixels = np.arange(n, dtype=np.uint8)[:, None, None, None] + np.zeros((n, *size, 3), np.uint8)
    return feeding.Images(lambda rows: pixels[rows], size, np.eye(n, dtype=np.float32), [f"i{i}" for i in range(n)])


@pytest.mark.parametrize("microbatches, cells", [(1, 1), (3, 1), (1, 4), (2, 2), (1, 8), (5, 3)])
def test_every_image_of_a_batch_is_at_its_place_once(microbatches, cells):
    images = corpus()
    batches = [np.array([3, 1, 7, 0, 9]), np.array([2, 4, 10])]  # the last one is short
    plan = images.plan(batches, [range(2)], microbatches=microbatches, cells=cells, embed=1)
    assert plan.batch_size == 5 and plan.slots * microbatches * cells >= 5 and (plan.slots - 1) * microbatches * cells < 5
    for batch in batches:
        arrays, where = images.assemble(batch, plan, plan.shapes[0])
        assert arrays["images"].shape == (microbatches, cells, plan.slots, 4, 6, 3) and arrays["images"].dtype == np.uint8
        assert arrays["documents"].shape == (microbatches, cells, plan.slots) and where.shape == (5,)
        slots = arrays["documents"].reshape(-1)
        assert slots[where[: len(batch)]].tolist() == list(range(len(batch))) and (np.delete(slots, where[: len(batch)]) == -1).all()
        seen = arrays["images"].reshape(-1, 4, 6, 3)[where[: len(batch)]]
        np.testing.assert_array_equal(seen, images.pixels(batch))
        assert not arrays["images"].reshape(-1, 4, 6, 3)[slots < 0].any()


def test_sizes_count_images_and_places_count_patches():
    small, large = corpus(), corpus(size=(64, 32))
    assert small.sizes.tolist() == [1] * 11 and small.counts.sum() == 11 and small.unit == small.things == "images"
    assert (small.places == 1).all() and (large.places == 32).all()


def test_the_last_batch_of_a_pass_is_filled_up_with_empty_slots():
    arrays = feeding.image_batch(np.full((3, 2, 2, 3), 9, np.uint8), 5)
    assert arrays["documents"].tolist() == [0, 1, 2, -1, -1] and not arrays["images"][3:].any() and arrays["images"][:3].all()


def test_sizes_are_counted_once():
    """They are asked for of every batch: counted each time, planning a run would take the square of its documents."""
    tokens = [np.arange(n, dtype=np.int32) for n in (3, 1, 4)]
    texts = feeding.Texts(tokens, np.eye(2, dtype=np.float32)[[0, 1, 0]], np.ones(3, np.float32), list("abc"))
    assert texts.sizes.tolist() == [3, 1, 4] and texts.sizes is texts.sizes
