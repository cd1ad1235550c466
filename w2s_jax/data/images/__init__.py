"""Images: where they come from, their pixels as torchvision makes them, and how a set is split.

    images = open_images("imagenet", data_dir="/data/imagenet")
    loader = Loader(images, Transform(resize=256, crop=224))
    for rows, pixels in loader.stream(range(len(images)), batch=128): ...
"""

from __future__ import annotations

from w2s_jax.data.images.decoding import BadImage, Transform
from w2s_jax.data.images.imageset import ImageSet, image_sha
from w2s_jax.data.images.loader import Loader
from w2s_jax.data.images.prepared import Prepared, prepare
from w2s_jax.data.images.splitting import Split, split
from w2s_jax.errors import UserError

__all__ = ["BadImage", "ImageSet", "Loader", "Prepared", "Split", "Transform", "image_sha", "open_images", "prepare", "split"]


def open_images(dataset: str, *, data_dir: str = "", split: str = "", classes: str = "") -> ImageSet:
    """The images of `dataset`, with labels; nothing is decoded.

    Args:
      dataset: "digits"; a folder or plain tar of images (see `folders`; ./imagenet, where its name is one of these); "imagenet", the
        validation tar and its kit in `data_dir`; "tfds:NAME[/CONFIG][:VERSION]" under `data_dir`; "hf:ID[/CONFIG]" or "hf:/folder".
      data_dir: for imagenet and tfds.
      split: for folders with split folders, tfds and hf; "" = the only one.
      classes: for folders: a file or a comma list of class names, in the order of the labels.

    UserError: it can't be read; a key that this kind of data set does not use; see the functions called.
    """
    kind = dataset.partition(":")[0] if dataset.startswith(("tfds:", "hf:")) else dataset if dataset in ("digits", "imagenet") else "folder"
    used = {"digits": (), "imagenet": ("data_dir",), "tfds": ("data_dir", "split"), "hf": ("split",), "folder": ("split", "classes")}[kind]
    for key, value in (("data_dir", data_dir), ("split", split), ("classes", classes)):
        if value and key not in used:
            raise UserError(f"{key}={value!r}: dataset={dataset!r} does not use it; expected ''")
    if kind == "folder":
        from w2s_jax.data.images.folders import open_folder

        return open_folder(dataset, split=split, classes=classes)
    if kind == "imagenet":
        from w2s_jax.data.images.imagenet import open_imagenet

        return open_imagenet(data_dir)
    from w2s_jax.data.images import libraries

    if kind == "digits":
        return libraries.open_digits()
    name = dataset.partition(":")[2]
    return libraries.open_tfds(name, data_dir=data_dir, split=split) if kind == "tfds" else libraries.open_huggingface(name, split=split)
