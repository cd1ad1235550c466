"""From encoded images to pixels, as torchvision's Compose(Resize, CenterCrop, ToTensor) gives them, before the division by 255.

Decoding is Pillow's, then `convert("RGB")`, as torchvision's default loader does it. So grey is repeated over the three channels; a
palette gives its colours; alpha is dropped, and what is hidden under it shows; CMYK is converted without a colour profile; of 16-bit
grey, and of 32-bit and float, values above 255 become 255 (Pillow clips; a 16-bit photograph turns white); of several frames the
first is read; EXIF's orientation is not applied. `Image.draft`, which decodes large JPEGs faster, changes pixels and is not used.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io

import numpy as np
import PIL

from w2s_jax.errors import UserError, nearest

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")  # formats whose decoders run no other program
MAX_PIXELS = 89_478_485  # Pillow's own limit (a quarter GiB of RGB), above which a small file may be meant to fill the memory
INTERPOLATIONS = ("bilinear", "bicubic")


@functools.cache
def _pillow():
    """PIL.Image with the decoders of FORMATS, imported once for all threads (Pillow itself imports every one that it has)."""
    from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, PpmImagePlugin, TiffImagePlugin, WebPImagePlugin

    del BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, PpmImagePlugin, TiffImagePlugin, WebPImagePlugin
    return Image


class BadImage(Exception):
    """An image that cannot be decoded; the text says why."""


@dataclasses.dataclass(frozen=True)
class Transform:
    """Resize of the shorter side (of both to a square under `squeeze`), then a crop from the centre.

    Attributes:
      resize: pixels of the shorter side, or of both; 0 leaves the size.
      crop: pixels of both sides, zeros around an image that is smaller; 0 keeps the whole image.
      interpolation: "bilinear" (torchvision's default) or "bicubic" (DINO); antialiased by Pillow.
      squeeze: whether the proportions are given up, as Hugging Face's ViT processors do.

    UserError: a negative size, an unknown interpolation.
    """

    resize: int = 256
    crop: int = 224
    interpolation: str = "bilinear"
    squeeze: bool = False

    def __post_init__(self):
        for key in ("resize", "crop"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
                raise UserError(f"{key}={value!r}: expected pixels, 0 for none")
        if self.interpolation not in INTERPOLATIONS:
            raise UserError(f"interpolation={self.interpolation!r}: expected {' | '.join(INTERPOLATIONS)}"
                            f"{nearest(self.interpolation, INTERPOLATIONS)}")

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over what decides the pixels."""
        said = f"torchvision resize={self.resize} crop={self.crop} {self.interpolation}{' squeeze' * self.squeeze}"
        return hashlib.sha256(said.encode()).hexdigest()

    def __call__(self, encoded: bytes | np.ndarray) -> np.ndarray:
        """An image's bytes, or its pixels uint8 `[height, width, 3]`, as uint8 `[crop, crop, 3]`. BadImage: it cannot be decoded."""
        image = decode(encoded)
        if self.resize:
            image = self._resized(image)
        return cropped(np.asarray(image), self.crop) if self.crop else np.array(image)

    def _resized(self, image):
        width, height = image.size
        short, long = min(width, height), max(width, height)
        other = int(self.resize * long / short)  # torchvision's: cut off, not rounded
        if self.resize * other > MAX_PIXELS:
            raise BadImage(f"{width} x {height} pixels would become {self.resize} x {other}, more than {MAX_PIXELS:,}")
        size = (self.resize, other) if width <= height else (other, self.resize)
        size = (self.resize, self.resize) if self.squeeze else size
        return image if size == image.size else image.resize(size, getattr(_pillow().Resampling, self.interpolation.upper()))


def decode(encoded: bytes | np.ndarray):
    """An encoded image, or pixels uint8 `[height, width, 3]`, as an RGB `PIL.Image`.

    BadImage: damaged, cut short, no image, or one that declares more than MAX_PIXELS.
    """
    Image = _pillow()
    if isinstance(encoded, np.ndarray):
        return Image.fromarray(encoded)
    if not encoded:
        raise BadImage("an empty file")
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        if image.width * image.height <= MAX_PIXELS:  # the header is read, the pixels are not
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError ...
        reason = "no image" if isinstance(error, PIL.UnidentifiedImageError) else " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise BadImage(reason) from error
    raise BadImage(f"declares {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")


def cropped(pixels: np.ndarray, crop: int) -> np.ndarray:
    """The centre `[crop, crop, 3]` of `[height, width, 3]`, zeros where the image is smaller: torchvision's CenterCrop."""
    height, width = pixels.shape[:2]
    if height < crop or width < crop:
        def padding(size):  # torchvision pads half rounded down before, half rounded up behind
            missing = max(crop - size, 0)
            return missing // 2, (missing + 1) // 2
        pixels = np.pad(pixels, (padding(height), padding(width), (0, 0)))
        height, width = pixels.shape[:2]
    top, left = int(round((height - crop) / 2.0)), int(round((width - crop) / 2.0))  # half to even, as Python rounds
    return np.ascontiguousarray(pixels[top : top + crop, left : left + crop])
