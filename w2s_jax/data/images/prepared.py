"""The images of a run: the set that a config names, split, and what of it cannot be decoded."""

from __future__ import annotations

import dataclasses

import numpy as np

from w2s_jax.data.images.imageset import ImageSet
from w2s_jax.data.images.loader import Loader
from w2s_jax.data.images.splitting import Split, split

SHOWN = 20  # images that cannot be decoded and are named in results.json


@dataclasses.dataclass(frozen=True)
class Prepared:
    """`images`, `split` (rows of them), `notes` to print, and `bad`: the reason by row of what turned out not to be decodable."""

    images: ImageSet
    split: Split
    notes: tuple[str, ...] = ()
    bad: dict[int, str] = dataclasses.field(default_factory=dict)

    def part(self, name: str) -> np.ndarray:
        """Rows of `weak`, `train`, `test`, or of `both` weak and train."""
        return np.concatenate([self.split.weak, self.split.train]) if name == "both" else getattr(self.split, name)

    @property
    def rows(self) -> np.ndarray:
        """All rows that are used."""
        return np.concatenate([self.split.weak, self.split.train, self.split.test])

    def without(self, loader: Loader, notes: list[str]) -> Prepared:
        """Less the images that `loader` has found bad so far (under "skip"), which join `bad` and make a line of `notes`."""
        new = {row: reason for row, reason in loader.bad.items() if row not in self.bad}
        if not new:
            return self
        row, reason = next(iter(sorted(new.items())))
        notes.append(f"{self.images.name}: {len(new)} of {len(self.rows)} images cannot be decoded and are left out, the first "
                     f"{self.images.ids[row]!r} ({reason})")
        return dataclasses.replace(self, split=self.split.without(new), bad=self.bad | new)

    def decoded(self, loader: Loader, notes: list[str]) -> Prepared:
        """`without` what cannot be decoded: under "skip" every image is decoded for it, once."""
        if loader.on_bad == "skip":
            loader.check(self.rows)
        return self.without(loader, notes)

    def named_bad(self) -> list[list[str]]:
        """(id, reason) of the first images that could not be decoded."""
        return [[self.images.ids[row], reason] for row, reason in sorted(self.bad.items())][:SHOWN]


def prepare(config, images: ImageSet | None = None) -> Prepared:
    """The images of a config: keys dataset, data_dir, dataset_split, classes, n_weak, n_train, n_test, data_seed.

    Raises:
      UserError: they cannot be read, or are too few.
    """
    from w2s_jax.data.images import open_images

    images = images or open_images(config.dataset, data_dir=config.data_dir, split=config.dataset_split, classes=config.classes)
    cut = split(images, n_train=config.n_train, n_test=config.n_test, data_seed=config.data_seed, n_weak=config.n_weak)
    return Prepared(images, cut, (*images.notes, *cut.notes))
