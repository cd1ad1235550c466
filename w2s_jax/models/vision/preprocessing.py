"""preprocessor_config.json of Hugging Face's image processors: what is done to an image before the model sees it, both ways."""

import math
from pathlib import Path

from w2s_jax.errors import UserError
from w2s_jax.files import read_json
from w2s_jax.models.vision.config import VisionConfig

FILE = "preprocessor_config.json"
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def read(folder: Path) -> dict:
    """The fields of VisionConfig that `folder`/preprocessor_config.json decides; {} where there is none.

    Raises:
      UserError: a step or a value that is not done here.
    """
    file = folder / FILE
    if not file.exists():
        return {}
    raw = read_json(file)

    def error(key: str, expected: str) -> UserError:
        return UserError(f"{file}: {key}={raw.get(key)!r} is not supported; expected {expected}")

    def side(key: str, *names: str) -> int | None:
        """Pixels under `key`: a number, or an object with the equal values of `names`."""
        value = raw.get(key)
        found = {value} if isinstance(value, int) else {value.get(n) for n in names} if isinstance(value, dict) else {None}
        pixels = found.pop()
        if found or pixels is not None and (type(pixels) is not int or pixels <= 0):
            raise error(key, "a positive number of pixels, the same for both sides")
        return pixels

    fields: dict = {}
    if raw.get("do_resize", True):
        edge, square = side("size", "shortest_edge"), side("size", "height", "width")
        if edge is None and square is None:
            raise error("size", "pixels as a number, shortest_edge, or height and width")
        shortest = isinstance(raw["size"], dict) and edge is not None
        kind = str(raw.get("image_processor_type") or raw.get("feature_extractor_type") or "")
        if "crop_pct" in raw or kind.startswith("ConvNext"):  # resizes to a larger image, of which it keeps the centre
            share = raw.get("crop_pct") or 224 / 256
            if type(share) not in (int, float) or not 0 < share <= 1:
                raise error("crop_pct", "a share above 0 and at most 1")
            fields = {"resize": int(edge / share), "crop": edge} if edge < 384 else {"resize": edge, "crop": edge, "squeeze": True}
        elif shortest:
            fields = {"resize": edge}
        else:
            fields = {"resize": square or edge, "crop": square or edge, "squeeze": True}
        if raw.get("resample") not in RESAMPLE:
            raise error("resample", " or ".join(f"{n} ({name})" for n, name in RESAMPLE.items()))
        fields["interpolation"] = RESAMPLE[raw["resample"]]
    else:
        fields = {"resize": 0}
    if raw.get("do_center_crop", "crop_size" in raw):
        crop = side("crop_size", "height", "width")
        if crop is None:
            raise error("crop_size", "pixels as a number, or height and width")
        fields["crop"] = crop
    if "crop" not in fields:
        raise error("do_center_crop", "true, or a size of both sides: a batch has images of one size")
    if not raw.get("do_rescale", True) or not math.isclose(raw.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
        raise error("rescale_factor", "1/255")
    for key, field, plain in (("image_mean", "mean", 0.0), ("image_std", "std", 1.0)):
        value = raw.get(key) if raw.get("do_normalize", True) else [plain] * 3
        if not isinstance(value, list) or len(value) != 3 or not all(type(v) in (int, float) and math.isfinite(v) for v in value):
            raise error(key, "three numbers")
        fields[field] = tuple(float(v) for v in value)
    if not all(fields["std"]):
        raise error("image_std", "three numbers other than 0")
    return fields


def write(config: VisionConfig) -> dict:
    """preprocessor_config.json of a model."""
    both = lambda pixels: {"height": pixels, "width": pixels}  # noqa: E731
    raw = {"do_resize": config.resize > 0, "resample": {name: n for n, name in RESAMPLE.items()}[config.interpolation], "do_rescale": True,
           "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(config.mean), "image_std": list(config.std)}
    if config.squeeze:
        return raw | {"image_processor_type": "ViTImageProcessor", "size": both(config.resize)}
    return raw | {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": config.resize or config.crop},
                  "do_center_crop": True, "crop_size": both(config.crop)}
