"""Which images train a weak model, train the probes and test them: seeded, and identical images on one side only."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np

from w2s_jax.data import splits
from w2s_jax.data.images.imageset import ImageSet
from w2s_jax.errors import UserError

NAMES = ("weak", "train", "test")


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows of an image set, int64, in seeded order; no row, and no two identical images, are on two sides.

    Attributes:
      weak: on which a weak model of one's own may be trained; may be empty.
      train: for the students' probes, with weak labels and with the true ones.
      test: for all accuracies.
      n_duplicates: images, of those used, that are identical (by `ImageSet.shas`) with another of their side.
      notes: lines to print.
    """

    weak: np.ndarray
    train: np.ndarray
    test: np.ndarray
    n_duplicates: int = 0
    notes: tuple[str, ...] = ()

    def without(self, rows) -> Split:
        """This split less `rows` (images that cannot be decoded). UserError: nothing is left of train or test."""
        gone = np.asarray(list(rows), np.int64)
        left = {name: getattr(self, name)[~np.isin(getattr(self, name), gone)] for name in NAMES}
        for name, rest in left.items():
            if not len(rest) and len(getattr(self, name)):
                raise UserError(f"none of the {len(getattr(self, name))} {name} images can be decoded")
        return dataclasses.replace(self, **left)


def split(images: ImageSet, *, n_train: int, n_test: int, data_seed: int, n_weak: int = 0) -> Split:
    """Cuts a set into weak, train and test, in this order, out of one shuffled order.

    The order is `numpy.random.default_rng(data_seed).shuffle` of the rows, of which openai/weak-to-strong (vision/run_weak_strong.py)
    takes the first n_train to train and the rest to test: the same images here with n_weak=0, n_test=0, as long as no image occurs
    twice. Copies stay together on the side that the first of them comes to, if they fit there, else on a later side.

    Args:
      n_weak: 0 = none.
      n_train, n_test: one of them may be 0 = all that are left by the others.
      data_seed: governs the order.

    UserError: negative numbers, more images asked than there are, an empty side, both n_train and n_test 0, an unknown label among
    the images used. A class that no train or test image is of is said in `notes`.
    """
    wanted = {"n_weak": n_weak, "n_train": n_train, "n_test": n_test}
    for key, value in wanted.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
            raise UserError(f"{key}={value!r}: expected a number of images, 0 for {'none' if key == 'n_weak' else 'all that are left'}")
    text = ", ".join(f"{key}={value}" for key, value in wanted.items())
    n, asked = len(images), sum(wanted.values())
    if not n_train and not n_test:
        raise UserError(f"{text}: one of n_train and n_test may be 0 (all that are left), not both")
    if asked > n or (asked == n and not (n_train and n_test)):
        raise UserError(f"{text}: {images.name} has {n:,} images{'' if asked > n else ', none is left for the other side'}")
    order = np.arange(n)
    np.random.default_rng(data_seed).shuffle(order)

    shas = images.shas
    weak, rest = splits.fill(order, shas, n_weak)
    train, rest = splits.fill(rest, shas, n_train or n - n_weak - n_test)
    test, _ = splits.fill(rest, shas, n_test or len(rest))
    parts = dict(zip(NAMES, (weak, train, test)))
    if empty := next((name for name in ("train", "test") if not len(parts[name])), None):
        raise UserError(f"{text}: no {empty} image is left of the {n:,} of {images.name}, since copies of one image stay on one side")
    notes, copies = _copies(images, parts)
    for name, wished in (("weak", n_weak), ("train", n_train), ("test", n_test)):
        if len(parts[name]) < wished:
            notes.append(f"n_{name}={wished}: {len(parts[name])} images, since copies of one image stay on one side")
    return Split(**parts, n_duplicates=copies, notes=tuple(notes + _classes(images, parts)))


def _copies(images: ImageSet, parts: dict[str, np.ndarray]) -> tuple[list[str], int]:
    """(lines, number of images) on images that occur more than once."""
    first: dict[str, int] = {}
    owner: dict[str, str] = {}
    copies = other = 0
    for name, rows in parts.items():
        for row in rows.tolist():
            sha = images.shas[row]
            if owner.setdefault(sha, name) != name:
                raise AssertionError(f"{images.ids[row]} is in {owner[sha]} and in {name}")
            earlier = first.setdefault(sha, row)
            copies += earlier != row
            other += images.labels[earlier] != images.labels[row]
    labelled = f" ({other} of them with another label)" if other else ""
    return ([f"{images.name}: {copies} images are copies of others{labelled}; copies stay on one side"] if copies else []), copies


def _classes(images: ImageSet, parts: dict[str, np.ndarray]) -> list[str]:
    """Lines on classes without images. UserError: an unknown label."""
    notes = []
    for name, rows in parts.items():
        counts = collections.Counter(images.labels[rows].tolist())
        if counts[-1]:
            row = next(row for row in rows.tolist() if images.labels[row] < 0)
            raise UserError(f"{images.name}: {counts[-1]} {name} images have no label, the first {images.ids[row]!r}")
        bare = [images.class_names[label] for label in range(images.n_classes) if not counts[label]]
        if bare and len(rows):
            shown = ", ".join(bare[:5]) + (" ..." if len(bare) > 5 else "")
            notes.append(f"{len(bare)} of {images.n_classes} classes have no {name} image ({shown})")
    return notes
