"""What a training run is fed: documents or images, their labels, and the plan by which batches of them become arrays."""

from __future__ import annotations

import abc
import dataclasses
import functools
import re
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from w2s_jax import mesh as mesh_lib
from w2s_jax.data import packing
from w2s_jax.trainable import TRAINED

PACKED = ("tokens", "segments", "positions", "documents", "last")


class Corpus(abc.ABC):
    """What is trained on, by document.

    Attributes:
      labels: float32 `[documents, classes]` (predicted-token counts `[documents, 1]` for a language model).
      counts: each document's share of the loss's denominator: ones, or its predicted tokens.
      ids: names for messages.
      weights: of each document's term of the loss, above 0, float32 `[documents]`; None = all 1.
      unit: what a document's size counts, in metrics and progress bars. things: what its documents are, in messages.
    """

    labels: np.ndarray
    counts: np.ndarray
    ids: list[str]
    weights: np.ndarray | None
    unit: ClassVar[str]
    things: ClassVar[str] = "documents"

    @property
    @abc.abstractmethod
    def sizes(self) -> np.ndarray:
        """Of each document, in units, int `[documents]`."""

    @property
    def places(self) -> np.ndarray:
        """How often a document meets each weight of a model, about: int `[documents]`."""
        return self.sizes

    @abc.abstractmethod
    def plan(self, batches: list[np.ndarray], dispatches: list[range], *, microbatches: int, cells: int, embed: int) -> packing.Plan:
        """How the run's batches become arrays."""

    @abc.abstractmethod
    def assemble(self, documents: np.ndarray, plan: packing.Plan, shape: packing.Shape, own=None) -> tuple[dict, np.ndarray]:
        """One step's arrays for the model, `[microbatches, own, ...]` each, `documents` `[.., slots]` among them, and each
        document's place in the flattened slots of all cells, `[batch_size]`. `own`: the cells that are wanted; None = all."""


@dataclasses.dataclass
class Texts(Corpus):
    """Documents as token ids, packed."""

    tokens: list[np.ndarray]
    labels: np.ndarray
    counts: np.ndarray
    ids: list[str]
    weights: np.ndarray | None = None
    unit: ClassVar[str] = "tokens"

    @functools.cached_property  # asked for of every batch
    def sizes(self) -> np.ndarray:
        return np.array([len(t) for t in self.tokens])

    def plan(self, batches, dispatches, **layout) -> packing.Plan:
        return packing.plan_training(self.sizes, batches, dispatches, **layout)

    def assemble(self, documents, plan, shape, own=None) -> tuple[dict, np.ndarray]:
        packed = packing.assemble(documents, self.tokens, plan, shape, own)
        return {k: packed[k] for k in PACKED}, packed["where"]


@dataclasses.dataclass
class Images(Corpus):
    """Images of one size: `pixels(rows)` gives them, uint8 `[rows, height, width, 3]`; `size` = (height, width)."""

    pixels: Callable[[np.ndarray], np.ndarray]
    size: tuple[int, int]
    labels: np.ndarray
    ids: list[str]
    weights: np.ndarray | None = None
    unit: ClassVar[str] = "images"
    things: ClassVar[str] = "images"

    @property
    def counts(self) -> np.ndarray:
        return np.ones(len(self.ids), np.float32)

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        return np.ones(len(self.ids), np.int64)

    @property
    def places(self) -> np.ndarray:
        return self.sizes * max(self.size[0] * self.size[1] // 64, 1)  # patches of 8 pixels a side; a convolution's early layers have more

    def plan(self, batches, dispatches, *, microbatches, cells, embed) -> packing.Plan:
        size, places = max(len(b) for b in batches), microbatches * cells
        slots = -(-size // places)
        return packing.Plan(batches, dispatches, [0] * len(dispatches), [packing.Shape(slots, 1)], microbatches, cells, slots, size,
                            sum(len(b) for b in batches), len(batches) * places * slots)

    def assemble(self, documents, plan, shape, own=None) -> tuple[dict, np.ndarray]:
        slots = np.arange(plan.microbatches * plan.cells * plan.slots).reshape(plan.microbatches, plan.cells, plan.slots)
        slots = slots if own is None else slots[:, own]
        real = slots < len(documents)
        images = np.zeros((*slots.shape, *self.size, 3), np.uint8)
        if real.any():
            images[real] = self.pixels(documents[slots[real]])
        batch = {"images": images, "documents": np.where(real, slots, -1).astype(np.int32)}
        return batch, np.arange(plan.batch_size, dtype=np.int32)


def image_batch(pixels: np.ndarray, slots: int) -> dict[str, np.ndarray]:
    """`images` uint8 `[slots, height, width, 3]` and `documents` int32 `[slots]` (number of the image, -1 = an empty slot)."""
    images = np.zeros((slots, *pixels.shape[1:]), np.uint8)
    images[: len(pixels)] = pixels
    documents = np.full(slots, -1, np.int32)
    documents[: len(pixels)] = np.arange(len(pixels))
    return {"images": images, "documents": documents}


def steps_per_dispatch(config, model, tokens_per_step: float, platform: str) -> int:
    """`config.steps_per_dispatch`, or as many steps as make a call of a device of the platform worth its overhead."""
    if config.steps_per_dispatch:
        return config.steps_per_dispatch
    sizes = {path: int(np.prod(leaf.shape)) for path, leaf in mesh_lib.paths(model.abstract)}
    weights = sum(size for path, size in sizes.items() if "embedding" not in path)
    # What is worth a call, and what the update of one parameter costs (28 bytes to and from memory), both in FLOPs of matrix products.
    worth, update = (1e9, 500.0) if platform == "cpu" else (2e12, 2000.0)
    trained = TRAINED[config.get("train", "full")]  # a pretrain config has no such key
    flops = 6.0 * weights * tokens_per_step + update * sum(size for path, size in sizes.items() if re.search(trained, path))
    return int(np.clip(worth // flops, 1, 32))


def dispatch_ranges(total: int, group: int, *cadences: int) -> list[range]:
    """Consecutive steps that share a call: at most `group`, broken where a cadence (0 = none) falls due."""
    stops = {total} | {s for c in cadences if c for s in range(c, total, c)}
    out, start = [], 0
    for stop in sorted(stops):
        out += [range(s, min(s + group, stop)) for s in range(start, stop, group)]
        start = stop
    return out


def make_plan(config, model, corpus: Corpus, batches: list[np.ndarray], mesh) -> packing.Plan:
    """The plan of a run; execution keys change it, never its results beyond rounding. microbatch_size "auto": the whole batch."""
    return plan_cells(config, model, corpus, batches, cells=mesh_lib.cells(mesh), platform=mesh.devices.flat[0].platform)


def plan_cells(config, model, corpus: Corpus, batches: list[np.ndarray], *, cells: int, platform: str) -> packing.Plan:
    """`make_plan` for `cells` places along data x fsdp of a platform (cpu | gpu | tpu), which need not be here."""
    size = len(batches[0])
    group = steps_per_dispatch(config, model, float(corpus.places.mean() * size), platform)
    ranges = dispatch_ranges(len(batches), group, config.eval_every, config.checkpoint_every)
    microbatches = -(-size // config.microbatch_size) if config.microbatch_size not in (0, "auto") else 1
    return corpus.plan(batches, ranges, microbatches=microbatches, cells=cells, embed=model.config.embed)
