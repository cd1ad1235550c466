"""Random changes of training images, on the device: each image's belong to (step, image), however a batch is cut.

In this order: rotation, zoom and shift in one bilinear sampling (a pixel of the result reads the place to which its own, seen from
the centre, is rotated, divided by the zoom and shifted: `scipy.ndimage.affine_transform` with order=1, mode="nearest"), flip, contrast,
brightness, noise; then values are cut to [0, 255].
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates


@dataclasses.dataclass(frozen=True)
class Augment:
    """How far an image is changed; 0 everywhere = not at all. Each amount is drawn uniformly from [-x, x].

    Attributes:
      shift: of both axes, as a share of the side.
      zoom: of each axis, as a share; what comes from outside repeats the border.
      rotate: degrees.
      flip: left and right are exchanged with probability 1/2.
      brightness: added, as a share of 255.
      contrast: around the image's mean, as a share.
      noise: standard deviation of what is added to each value, as a share of 255.
    """

    shift: float = 0.0
    zoom: float = 0.0
    rotate: float = 0.0
    flip: bool = False
    brightness: float = 0.0
    contrast: float = 0.0
    noise: float = 0.0

    def __bool__(self) -> bool:
        return any(dataclasses.astuple(self))

    def __call__(self, images: jax.Array, keys: jax.Array) -> jax.Array:
        """float32 [n, height, width, 3] (0 to 255) from uint8 or float32 of that shape and one key an image, [n]."""
        return jax.vmap(self._one)(images.astype(jnp.float32), keys)

    def _one(self, image: jax.Array, key: jax.Array) -> jax.Array:
        height, width, _ = image.shape
        draw = jax.random.uniform(key, (8,), minval=-1.0, maxval=1.0)
        if self.shift or self.zoom or self.rotate:
            angle = jnp.deg2rad(self.rotate) * draw[0]
            zoom = 1 + self.zoom * draw[1:3]
            rows, columns = jnp.meshgrid(jnp.arange(height) - (height - 1) / 2, jnp.arange(width) - (width - 1) / 2, indexing="ij")
            cosine, sine = jnp.cos(angle), jnp.sin(angle)
            y = (cosine * rows - sine * columns) / zoom[0] + (height - 1) / 2 + self.shift * height * draw[3]
            x = (sine * rows + cosine * columns) / zoom[1] + (width - 1) / 2 + self.shift * width * draw[4]
            sample = lambda channel: map_coordinates(channel, [y, x], order=1, mode="nearest")  # noqa: E731
            image = jax.vmap(sample, in_axes=2, out_axes=2)(image)
        if self.flip:
            image = jnp.where(draw[5] > 0, image[:, ::-1], image)
        if self.contrast:
            mean = image.mean()
            image = mean + (1 + self.contrast * draw[6]) * (image - mean)
        if self.brightness:
            image = image + 255 * self.brightness * draw[7]
        if self.noise:
            image = image + 255 * self.noise * jax.random.normal(jax.random.fold_in(key, 1), image.shape)
        return jnp.clip(image, 0, 255)
