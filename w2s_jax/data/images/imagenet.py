"""ImageNet's 50,000 validation images as they are distributed: one tar, with the labels in the development kit (ILSVRC 2012).

Labels as torchvision.datasets.ImageNet makes them: line i of the ground truth is the number of the synset of the i-th image by name;
a class is the place of its wnid among the 1000 sorted wnids. Images are read from the tar in place; nothing is unpacked.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path, PurePosixPath

import numpy as np

from w2s_jax.data.images.archive import TarSource
from w2s_jax.data.images.imageset import SUFFIXES, ImageSet
from w2s_jax.errors import UserError

IMAGES, DEVKIT = "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
TRUTH, SYNSETS = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
LARGEST = 1 << 26  # bytes of a file of the kit


def open_imagenet(data_dir: str) -> ImageSet:
    """The validation set out of `data_dir`'s two archives, in torchvision's order: by class, then by file name.

    UserError: an archive is missing or damaged; as many labels as images were expected; a label that is no leaf of the synsets.
    """
    folder = Path(data_dir or ".").expanduser()
    for name in (IMAGES, DEVKIT):
        if not (folder / name).is_file():
            raise UserError(f"data_dir={data_dir!r}: no {name} in it; dataset=imagenet reads {IMAGES} and {DEVKIT} "
                            "(image-net.org, after signing in), as they were downloaded")
    kit = _kit(folder / DEVKIT)
    wnids, words = _synsets(kit[SYNSETS], folder / DEVKIT)
    names = tuple(sorted(words))
    place = {wnid: i for i, wnid in enumerate(names)}
    source = TarSource(folder / IMAGES)
    found = sorted((path, key) for path, key in source.files if path.lower().endswith(SUFFIXES))
    truth = kit[TRUTH].decode("ascii", "replace").split()
    if len(truth) != len(found):
        raise UserError(f"{folder / IMAGES}: {len(found):,} images, but {len(truth):,} labels in {DEVKIT}'s {TRUTH}")
    labels = []
    for line, text in enumerate(truth, 1):
        wnid = wnids.get(int(text)) if text.isdecimal() else None
        if wnid is None:
            raise UserError(f"{folder / DEVKIT}: {TRUTH}, line {line}: {text!r} is the number of none of the {len(wnids):,} classes")
        labels.append(place[wnid])
    order = sorted(range(len(found)), key=lambda row: (labels[row], found[row][0]))
    left_out = len(source.files) - len(found)
    notes = (f"{IMAGES}: {left_out} files are no images by their names and are left out",) if left_out else ()
    return ImageSet("imagenet (validation)", [found[row][0] for row in order], np.asarray([labels[row] for row in order], np.int32), names,
                    source, [found[row][1] for row in order], notes, tuple(words[wnid] for wnid in names))


def _kit(path: Path) -> dict[str, bytes]:
    """The two files of the kit that labels need, by name."""
    kit = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                inside = "/".join(PurePosixPath(member.name).parts[-2:])
                if inside in (TRUTH, SYNSETS) and member.isreg() and member.size <= LARGEST:
                    kit[inside] = archive.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path}: truncated or damaged archive ({error})") from None
    if missing := {TRUTH, SYNSETS} - set(kit):
        raise UserError(f"{path}: no {' and no '.join(sorted(missing))} in it")
    return kit


def _synsets(raw: bytes, path: Path) -> tuple[dict[int, str], dict[str, str]]:
    """(wnid by ILSVRC's number, words by wnid) of the synsets that have no children."""
    from scipy.io import loadmat  # reads matrices, runs nothing

    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(raw), squeeze_me=True)["synsets"])
        rows = [(int(row["ILSVRC2012_ID"]), str(row["WNID"]), str(row["words"])) for row in synsets if not int(row["num_children"])]
    except Exception as error:  # scipy's reader and foreign layouts: OSError, ValueError, KeyError, TypeError, IndexError ...
        raise UserError(f"{path}: {SYNSETS} is not the table of synsets that it should be ({type(error).__name__}: {error})") from None
    if not rows or len({wnid for _, wnid, _ in rows}) < len(rows):
        raise UserError(f"{path}: {SYNSETS} has {len(rows)} classes, expected distinct wnids")
    return {number: wnid for number, wnid, _ in rows}, {wnid: words for _, wnid, words in rows}
