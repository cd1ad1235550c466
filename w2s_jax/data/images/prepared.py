"""The images of a run: the set that a config names, split, and what of it cannot be decoded."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np

from w2s_jax.data.images.imageset import ImageSet
from w2s_jax.data.images.loader import Loader
from w2s_jax.data.images.splitting import Split, split
from w2s_jax.errors import UserError
from w2s_jax.progress import Progress

MANY = 5_000  # images above which decoding all of them shows how far it is
SHOWN = 20  # images that cannot be decoded and are named in results.json


@dataclasses.dataclass(frozen=True)
class Prepared:
    """`images`, `split` (rows of them), `notes` to print, `bad`: the reason by row of what turned out not to be decodable, and whether
    all images were decoded to know that (`checked`)."""

    images: ImageSet
    split: Split
    notes: tuple[str, ...] = ()
    bad: dict[int, str] = dataclasses.field(default_factory=dict)
    checked: bool = False

    def part(self, name: str) -> np.ndarray:
        """Rows of `weak`, `train`, `test`, or of `both` weak and train. UserError: there are none."""
        rows = np.concatenate([self.split.weak, self.split.train]) if name == "both" else getattr(self.split, name)
        if not len(rows):
            raise UserError(f"split={name}: has no images; expected config.n_{name} above 0")
        return rows

    @property
    def rows(self) -> np.ndarray:
        """All rows that are used."""
        return np.concatenate([self.split.weak, self.split.train, self.split.test])

    def without(self, loader: Loader, notes: list[str]) -> Prepared:
        """Less the images that `loader` has found bad so far (under "skip"), which join `bad` and make a line of `notes`."""
        shas = self.images.shas
        reasons = {shas[row]: reason for row, reason in loader.bad.items()}  # of copies one alone may have been decoded
        new = {row: reasons[shas[row]] for row in self.rows.tolist() if shas[row] in reasons} if reasons else {}
        if not new:
            return self
        row, reason = next(iter(sorted(new.items())))
        notes.append(f"{self.images.name}: {len(new)} of {len(self.rows)} images cannot be decoded and are left out, the first "
                     f"{self.images.ids[row]!r} ({reason})")
        return dataclasses.replace(self, split=self.split.without(new), bad=self.bad | new)

    def decoded(self, loader: Loader, notes: list[str]) -> Prepared:
        """`without` what cannot be decoded: every image is decoded for it, once.

        UserError: one cannot be decoded (under "error"), or has another size than the others.
        """
        if self.checked:
            return self
        shown = Progress(len(self.rows), label=f"checking {self.images.name}", unit="image") if len(self.rows) > MANY else None
        with shown or contextlib.nullcontext() as bar:
            for rows, _ in loader.stream(self.rows, 16 * loader.workers):
                if bar:
                    bar.update(len(rows))
        return dataclasses.replace(self.without(loader, notes), checked=True)

    def named_bad(self) -> list[list[str]]:
        """(id, reason) of the first images that could not be decoded."""
        return [[self.images.ids[row], reason] for row, reason in sorted(self.bad.items())][:SHOWN]


def prepare(config, images: ImageSet | None = None) -> Prepared:
    """The images of a config: keys dataset, data_dir, dataset_split, classes, n_weak, n_train, n_test, data_seed.

    Raises:
      UserError: they cannot be read, or are too few; a loss that they have too many classes for.
    """
    from w2s_jax.data.images import open_images

    images = images or open_images(config.dataset, data_dir=config.data_dir, split=config.dataset_split, classes=config.classes)
    cut = split(images, n_train=config.n_train, n_test=config.n_test, data_seed=config.data_seed, n_weak=config.n_weak)
    for key in ("losses", "loss"):
        chosen = config.get(key) or ()
        if "logconf_eleuther" in ((chosen,) if isinstance(chosen, str) else chosen) and images.n_classes != 2:
            raise UserError(f"config.{key}: 'logconf_eleuther' is for two classes (its threshold is on the probability of one), "
                            f"{images.name} has {images.n_classes}; expected another loss, such as logconf")
    return Prepared(images, cut, (*images.notes, *cut.notes))
