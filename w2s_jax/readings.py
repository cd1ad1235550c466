"""What image networks read of images: passes over sets of them, whose results are kept (see `store`)."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from w2s_jax import feeding, forward, store, vision, workload
from w2s_jax import mesh as mesh_lib
from w2s_jax.data import images as images_lib
from w2s_jax.data.packing import EvalBatch
from w2s_jax.errors import UserError
from w2s_jax.progress import say

FORMAT = 1
FORWARD_PIXELS = {"cpu": 3_000_000}  # of the images of a forward pass on one device; others take _FORWARD_PIXELS
_FORWARD_PIXELS = 25_000_000
MAX_BATCH = 512  # images of a forward pass, however small


def batch_size(config, size: tuple[int, int], mesh) -> int:
    """Images of a forward pass over all devices: `config.eval_batch_size`, else by their size and the kind of device."""
    cells = mesh_lib.cells(mesh)
    wanted = config.eval_batch_size
    if not wanted:
        pixels = FORWARD_PIXELS.get(jax.default_backend(), _FORWARD_PIXELS)
        wanted = min(max(pixels // (size[0] * size[1]), 1), MAX_BATCH) * cells
    return -(-wanted // cells) * cells


def batches(loader_: images_lib.Loader, rows: np.ndarray, size: int, cells: int, start: int = 0):
    """Batches of `size` images, from number `start` on; the next ones are decoded while one is used. The last is filled up."""
    at = start * size
    for part, pixels in loader_.stream(rows[at:], size):
        arrays = feeding.image_batch(pixels, size)
        arrays = {k: v.reshape(cells, size // cells, *v.shape[1:]) for k, v in arrays.items()}
        yield EvalBatch(arrays, np.where(arrays["documents"] >= 0, arrays["documents"] + at, -1))
        at += len(part)


def predict(config, model, params, loader_: images_lib.Loader, rows: np.ndarray, mesh, *, stats: dict, progress=None) -> np.ndarray:
    """Logits of the images at `rows`, float32 `[rows, classes]`.

    Raises:
      UserError: they are not finite.
    """
    made = batches(loader_, rows, batch_size(config, loader_.size, mesh), mesh_lib.cells(mesh))
    return forward.forward(model, params, made, len(rows), mesh, stats=stats, progress=progress)


class Images(store.Source):
    """Images as a model reads them: `reading` = logits | features."""

    unit, things = "img", "images"
    key_column = "image_shas"

    def __init__(self, config, loaded: workload.Loaded, loader_: images_lib.Loader, rows, reading: str):
        self.config, self.loaded, self.loader, self.rows, self.reading = config, loaded, loader_, np.asarray(rows), reading
        images, model = loader_.images, loaded.model
        self.ids, self.keys = [images.ids[r] for r in self.rows], [images.shas[r] for r in self.rows]
        self.width = model.classes if reading == "logits" else model.config.embed
        self.what = self.label = reading

    def select(self, rows) -> Images:
        return Images(self.config, self.loaded, self.loader, self.rows[np.asarray(rows)], self.reading)

    def orders(self) -> list[np.ndarray]:
        size = batch_size(self.config, self.loader.size, self.loaded.mesh)
        return [np.arange(start, min(start + size, len(self.rows))) for start in range(0, len(self.rows), size)]

    def outputs(self, layers, start, stats, progress):
        model, mesh = self.loaded.model, self.loaded.mesh
        size = batch_size(self.config, self.loader.size, mesh)
        made = batches(self.loader, self.rows, size, mesh_lib.cells(mesh), start)
        read = model.apply if self.reading == "logits" else model.features
        for batch, values in forward.passes((model, self.reading), read, self.loaded.params, made, mesh, stats=stats, progress=progress):
            yield batch.documents, values[None]

    def noted(self) -> dict:
        """The images that could not be decoded so far."""
        return {"bad": {self.keys[place]: self.loader.bad[int(row)] for place, row in enumerate(self.rows) if int(row) in self.loader.bad}}

    def recall(self, noted: dict) -> None:
        for place, row in enumerate(self.rows):
            if reason := noted.get("bad", {}).get(self.keys[place]):
                self.loader.found_bad(int(row), reason)

    def columns(self, order) -> dict[str, list]:
        """An image that could not be decoded is not kept: another run tries it again."""
        for place, row in enumerate(self.rows):
            if int(row) in self.loader.bad:
                self.keys[place] = ""
        return super().columns(order)


class Store(store.Store):
    """What one model reads of images, one way: `model` is its fingerprint, `name` is for the folder's name only."""

    key_column = Images.key_column

    def __init__(self, folder, model: str, name: str, *, reading: str, pixels: str, dtype: str, matmul_precision: str):
        short = name.split("/")[-2] if name.endswith("/model") and "/" in name.removesuffix("/model") else Path(name).stem
        super().__init__(folder, f"{short}-{reading}", {"format": FORMAT, "model": model, "reading": reading, "pixels": pixels,
                                                        "dtype": dtype, "matmul_precision": matmul_precision})
        self.reading = reading

    def missing(self, images: images_lib.ImageSet, rows) -> int:
        """How many of the images at `rows` are not there."""
        return self.missing_keys([images.shas[r] for r in rows], (0,))

    def get(self, images: images_lib.ImageSet, rows) -> np.ndarray:
        """float32 `[rows, width]`. KeyError for an image that was not computed."""
        return self.rows_of([images.shas[r] for r in rows], 0)


class Reading:
    """What one model reads of the images of an experiment: the `weak` one's logits, the `strong` one's features, kept in `place`.
    Nothing is written before `compute`.

    Raises:
      UserError: a weak model without a classifier of the images' classes; no such model, or one that is not known.
    """

    def __init__(self, key: str, name: str, revision: str, config, images: images_lib.ImageSet, place):
        self.key, self.name, self.config, self.images, self.revision = key, name, config, images, revision
        self.reading, self.head = ("logits", "own") if key == "weak" else ("features", "none")
        self.commit = "" if vision.trained_run(name) else vision.resolve(name, revision).commit
        self.own, classes = vision.read_config(name, revision), vision.outputs(name, revision)
        if key == "weak" and classes != images.n_classes:
            has = f"gives {classes} classes" if classes else "has no classifier"
            raise UserError(f"config.weak_model: {name!r} {has}, the images have {images.n_classes}; expected as many (config.classes "
                            "names all classes that a model knows, where a folder holds some of them)")
        self.loader = vision.loader(config, images, self.own)
        self.store = Store(place, vision.fingerprint(name, revision), name, reading=self.reading, pixels=self.loader.transform.fingerprint,
                           dtype=config.dtype, matmul_precision=config.matmul_precision)
        self.loaded: workload.Loaded | None = None

    def open(self) -> None:
        """Loads the model: what does not fit it is refused now."""
        self.loaded = vision.open_model(self.name, self.revision, self.config, head=self.head)

    def compute(self, rows: np.ndarray, stats: dict) -> None:
        """One pass over the images at `rows` that are not read yet."""
        if missing := self.store.missing(self.images, rows):
            say(f"{self.reading} of {workload.shown(self.name)}: {missing} of {len(rows)} images to pass")
            if self.loaded is None:
                self.open()
            self.store.compute(Images(self.config, self.loaded, self.loader, rows, self.reading), (0,), stats)
        self.loaded = None

    def get(self, rows: np.ndarray) -> np.ndarray:
        """float32 `[rows, classes]` or `[rows, width]`."""
        return self.store.get(self.images, rows)
