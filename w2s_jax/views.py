"""A vision model as the trainer sees it: on changed images, or on two changed views of each for pretraining without labels.

SimCLR (Chen et al. 2020, arXiv 2002.05709). The trainer pulls d loss / d outputs of the whole batch back through each microbatch, so
that the contrastive loss sees every image of a batch, whatever a microbatch holds (as Gao et al. 2021's GradCache does).
"""

from __future__ import annotations

import dataclasses
from functools import cached_property

import jax
import jax.numpy as jnp

from w2s_jax.augment import Augment


def _keys(key: jax.Array, batch: dict) -> jax.Array:
    """One key an image, [cells * slots]: of the step and the image's number in the batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, batch["documents"].reshape(-1))


def _flat(images: jax.Array) -> jax.Array:
    return images.reshape(-1, *images.shape[2:])


@dataclasses.dataclass(frozen=True)
class Augmented:
    """`model` on changed images where a step's key is given, as it is elsewhere."""

    model: object
    augment: Augment

    @property
    def config(self):
        return self.model.config

    @property
    def classes(self) -> int:
        return self.model.classes

    @property
    def abstract(self) -> dict:
        return self.model.abstract

    def apply(self, params: dict, batch: dict, key: jax.Array | None = None) -> jax.Array:
        """float32 [cells, slots, classes]."""
        if key is not None and self.augment:
            images = batch["images"]
            batch = batch | {"images": self.augment(_flat(images), _keys(key, batch)).reshape(images.shape)}
        return self.model.apply(params, batch, key)


@dataclasses.dataclass(frozen=True)
class Contrastive:
    """Two views of each image through a backbone (`model`, without a head) and a projector of one hidden layer.

    `width`, `outputs`: of the projector; its parameters are `projector/{up,down}/{kernel,bias}`.
    """

    model: object
    augment: Augment
    width: int
    outputs: int

    @property
    def config(self):
        return self.model.config

    @cached_property
    def abstract(self) -> dict:
        return self.model.abstract | jax.eval_shape(self.init_new, jax.random.key(0))

    def init_new(self, key: jax.Array) -> dict:
        """The projector's parameters: He et al. 2015's normal initialisation, biases 0."""
        sizes = {"up": (self.model.config.embed, self.width), "down": (self.width, self.outputs)}
        return {"projector": {
            name: {"kernel": jnp.sqrt(2 / shape[0]) * jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32),
                   "bias": jnp.zeros(shape[1], jnp.float32)} for i, (name, shape) in enumerate(sizes.items())}}

    def apply(self, params: dict, batch: dict, key: jax.Array) -> jax.Array:
        """The views' projections, one after the other, float32 [cells, slots, 2 * outputs]."""
        images, (cells, slots) = batch["images"], batch["documents"].shape
        keys = _keys(key, batch)
        views = [self.augment(_flat(images), jax.vmap(jax.random.fold_in, (0, None))(keys, 2 + i)).reshape(images.shape) for i in range(2)]
        both = {"images": jnp.concatenate(views, axis=1), "documents": jnp.concatenate([batch["documents"]] * 2, axis=1)}
        x = self.model.features({k: params[k] for k in self.model.abstract}, both)
        projector = params["projector"]
        x = jax.nn.relu(x @ projector["up"]["kernel"] + projector["up"]["bias"])
        x = x @ projector["down"]["kernel"] + projector["down"]["bias"]
        return x.reshape(cells, 2, slots, -1).transpose(0, 2, 1, 3).reshape(cells, slots, -1).astype(jnp.float32)
