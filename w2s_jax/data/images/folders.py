"""Images in folders: class folders as torchvision's ImageFolder reads them, or with their labels in a file beside them.

A folder, or a plain tar, of

    [top/][train|val|test/]<class>/.../<file>          class folders
    [top/][val/]images/<file>, val_annotations.txt     Tiny-ImageNet: file TAB wnid TAB ...; wnids.txt names the classes
    [top/][train/]<file>, metadata.csv | .jsonl        Hugging Face's imagefolder: file_name, label
    <wnid>_<anything>.JPEG                             ImageNet's own file names
    <file>                                             no labels
"""

from __future__ import annotations

import collections
import os
import re
from pathlib import Path, PurePosixPath

import numpy as np

from w2s_jax.data import sources
from w2s_jax.data.images.archive import PACKED, FolderSource, TarSource
from w2s_jax.data.images.imageset import SUFFIXES, ImageSet, read_classes
from w2s_jax.errors import UserError, nearest

SPLITS = ("train", "val", "valid", "validation", "test")
METADATA = ("metadata.csv", "metadata.jsonl")
ANNOTATIONS, WNIDS = "val_annotations.txt", "wnids.txt"
WNID = re.compile(r"n\d{8}(?=_)")
MOST = 100_000  # classes that are known by number only
SHOWN = 5  # names in a message


def open_folder(path: str, *, split: str = "", classes: str = "") -> ImageSet:
    """The images of a folder or tar (see this module's text), sorted by class, then by path, as torchvision orders them.

    Args:
      path: folder, or plain tar.
      split: one of the split folders, where there are any; may be "" where there is one.
      classes: file with a class name a line, or a comma list: names and order, where the folder may hold only some of them; "" = the
        sorted names of all class folders, of all splits that have some (or of wnids.txt, or of the metadata's labels).

    UserError: see `archive`; no images; a split that is not there; a class that is not in `classes`; labels and files that do not match.
    """
    place = Path(path).expanduser()
    if not place.is_dir() and not place.name.lower().endswith((".tar", *PACKED)):
        raise UserError(f"dataset={path!r}: expected a folder or a .tar of images, digits, imagenet, tfds:NAME or hf:ID"
                        f"{nearest(path, ('digits', 'imagenet'))}" + ("" if place.exists() else " (there is no such folder)"))
    source = FolderSource(place) if place.is_dir() else TarSource(place)
    return _Layout(str(path), source, classes).image_set(split)


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def listed(names) -> str:
    """The first few of some names, for a message."""
    names = sorted(names)
    return ", ".join(map(str, names[:SHOWN])) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


class _Layout:
    """Finds out what the files of a source are."""

    def __init__(self, name: str, source, classes: str):
        self.name, self.source, self.classes = name, source, classes
        self.given = read_classes(classes) if classes else None
        self.keys = dict(source.files)
        hidden = {path for path in self.keys if any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(path).parts)}
        seen = sorted(set(self.keys) - hidden)
        self.images = [path for path in seen if path.lower().endswith(SUFFIXES)]
        if not self.images:
            raise UserError(f"{name}: no images among {len(self.keys)} files; expected files that end in {', '.join(SUFFIXES)}")
        if odd := next((path for path in seen if not _is_text(path)), None):
            raise UserError(f"{name}: the file name {ascii(odd)} is not UTF-8")
        self.aside = {path for path in seen if PurePosixPath(path).name in (*METADATA, ANNOTATIONS, WNIDS)}
        self.root = self._root()
        self.others = [path for path in self.keys if path in hidden or not (path in self.aside or path.lower().endswith(SUFFIXES))]

    def image_set(self, split: str) -> ImageSet:
        chosen, folder = self._split(split)
        labels, names = self._labels(chosen, folder)
        notes = []
        if self.others:
            endings = collections.Counter(PurePosixPath(path).suffix.lower() or "no ending" for path in self.others)
            notes.append(f"{self.name}: {len(self.others):,} files are no images by their names and are left out "
                         f"({', '.join(f'{n} {ending}' for ending, n in endings.most_common(SHOWN))}): {listed(self.others)}")
        if unknown := sum(label is None for label in labels):
            notes.append(f"{self.name}: {unknown:,} of {len(chosen):,} images have no label")
        place = {name: i for i, name in enumerate(names)}
        numbers = [-1 if label is None else place[label] for label in labels]
        order = sorted(range(len(chosen)), key=lambda row: (numbers[row], chosen[row]))
        return ImageSet(f"{self.name}{f' ({split})' if split else ''}", [chosen[row] for row in order],
                        np.asarray([numbers[row] for row in order], np.int32), tuple(names), self.source,
                        [self.keys[chosen[row]] for row in order], tuple(notes))

    # ------------------------------------------------------------ splits

    def _root(self) -> str:
        """The folder, with a slash at its end, that all images share and that is neither a split's nor a class's."""
        first = {path.split("/")[0] for path in self.images}
        top = next(iter(first))
        if len(first) > 1 or top in (*SPLITS, "images", *(self.given or ())) or any("/" not in path for path in self.images):
            return ""
        inner = {path.split("/")[1] for path in self.images}
        if all(path.count("/") == 1 for path in self.images):  # the top folder is a class, unless labels come from elsewhere
            strip = any(path.startswith(f"{top}/") for path in self.aside) or all(WNID.match(name) for name in inner)
        else:
            strip = len(inner) > 1 or inner & {*SPLITS, *(self.given or ())}
        return f"{top}/" if strip else ""

    def _below(self, folder: str) -> list[str]:
        return [path for path in self.images if path.startswith(folder)]

    def _split(self, split: str) -> tuple[list[str], str]:
        """(the images of a split, the folder that they stand in, with a slash at its end)."""
        first = {path.removeprefix(self.root).split("/")[0] for path in self.images if "/" in path.removeprefix(self.root)}
        flat = any("/" not in path.removeprefix(self.root) for path in self.images)
        self.splits = sorted(first & set(SPLITS), key=SPLITS.index)
        if self.splits and (first - set(self.splits) or flat):
            beside = listed(first - set(self.splits)) or "images"
            raise UserError(f"{self.name}: {beside} beside the split folders {', '.join(self.splits)}; expected split folders or "
                            "class folders, not both")
        if split and split not in self.splits:
            there = f"there are {', '.join(self.splits)}" if self.splits else "the images are not in split folders"
            raise UserError(f"split={split!r}: {self.name} has no such folder ({there}){nearest(split, self.splits)}")
        if len(self.splits) > 1 and not split:
            raise UserError(f"split='': {self.name} has the split folders {', '.join(self.splits)}; expected one of them")
        folder = self.root + f"{split or self.splits[0]}/" if self.splits else self.root
        return self._below(folder), folder

    # ------------------------------------------------------------ labels

    def _labels(self, chosen: list[str], folder: str) -> tuple[list[str | None], tuple[str, ...]]:
        """(the class name of each image, None where unknown; all class names in order)."""
        for names, read in ((METADATA, self._metadata), ((ANNOTATIONS,), self._annotations)):
            places = dict.fromkeys((folder, self.root, ""))  # the split's own file before one for all of them
            found = next(([at + name for name in names if at + name in self.aside] for at in places
                          if any(at + name in self.aside for name in names)), [])
            if len(found) > 1:
                raise UserError(f"{self.name}: {' and '.join(found)} are both there; expected one of them")
            if found:
                labels = read(found[0], chosen)
                return self._checked(labels, chosen, found[0])
        return self._checked([self._class(path, folder) for path in chosen], chosen, "")

    def _checked(self, labels, chosen, file: str):
        """Labels, and the names of the classes in order; every label is one of these."""
        names, origin = self._names(labels, file)
        known = set(names)
        if not file and known and all(label == "images" for label in labels) and "images" not in known:
            return [None] * len(labels), names  # Tiny-ImageNet's test set: one folder `images`, no labels
        stray = {label for label in labels if label is not None and label not in known}
        if stray:
            counts = collections.Counter(labels)
            what = f"{file}: class" if file else f"{self.name}: class folder"
            examples = listed(f"{name!r} ({counts[name]} images)" for name in stray)
            raise UserError(f"{what} {examples} is not among the {len(names):,} classes of {origin}{nearest(sorted(stray)[0], names)}")
        return labels, names

    def _names(self, labels, file: str) -> tuple[tuple[str, ...], str]:
        if self.given:
            return self.given, f"classes={self.classes!r}"
        listing = next((at + WNIDS for at in dict.fromkeys((self.root, "")) if at + WNIDS in self.aside), None)
        if listing:
            return tuple(sorted(set(self._lines(listing)))), listing
        found = {label for label in labels if label is not None}
        if file and found and all(label.isascii() and label.isdecimal() for label in found):
            return tuple(map(str, range(max(map(int, found)) + 1))), file
        if not file:  # a class that one split lacks keeps its number in all of them
            for split in self.splits:
                below = self.root + f"{split}/"
                if not any(at in self.aside for at in (below + ANNOTATIONS, below + METADATA[0], below + METADATA[1])):
                    others = {self._class(path, below) for path in self._below(below)} - {None}
                    found |= others if others != {"images"} else set()
        return tuple(sorted(found)), file or self.name

    def _class(self, path: str, folder: str) -> str | None:
        inside = path.removeprefix(folder)
        if "/" in inside:
            return inside.split("/")[0]
        match = WNID.match(inside)
        return match[0] if match else None

    # ------------------------------------------------------------ files with labels

    def _read(self, path: str) -> bytes:
        try:
            return self.source.read(self.keys[path])
        except OSError as error:
            raise UserError(f"{self.name}: {path}: can't be read ({error.strerror or error})") from None

    def _lines(self, path: str) -> list[str]:
        return [line for line in sources.decode(self._read(path), path).splitlines() if line.strip()]

    def _annotations(self, path: str, chosen) -> list[str]:
        """Tiny-ImageNet's `file TAB wnid TAB box`; the files stand in `images/` beside it, or beside it."""
        here = path.removesuffix(ANNOTATIONS)
        rows = {}
        for number, line in enumerate(self._lines(path), 1):
            fields = line.split("\t")
            if len(fields) < 2 or not fields[0] or not fields[1].strip():
                raise UserError(f"{path}, row {number}: {line[:60]!r}, expected file TAB wnid")
            inner = f"{here}images/{fields[0]}"
            rows[inner if inner in self.keys else here + fields[0]] = fields[1].strip()
        return self._match(path, rows, chosen)

    def _metadata(self, path: str, chosen) -> list[str]:
        """Hugging Face's imagefolder: columns file_name (relative to the file) and label."""
        parse = sources.parse_csv if path.endswith(".csv") else sources.parse_jsonl
        here = path.removesuffix(PurePosixPath(path).name)
        rows = {}
        for number, row in enumerate(parse(self._read(path), path), 1):
            for column in ("file_name", "label"):
                if column not in row:
                    raise UserError(f"{path}, row {number}: no column {column!r} (columns: {listed(row)}); expected file_name and label")
            label, file = row["label"], str(row["file_name"])
            if isinstance(label, bool) or not isinstance(label, (str, int)) or label == "":
                raise UserError(f"{path}, row {number}: column 'label' is {label!r}, expected a class name or number")
            if isinstance(label, int) or str(label).isdecimal():
                label = self._numbered(int(label), path, number)
            target = here + str(PurePosixPath(file))
            if rows.setdefault(target, str(label)) != str(label):
                raise UserError(f"{path}, row {number}: {file!r} has two labels, {rows[target]!r} and {label!r}")
        return self._match(path, rows, chosen)

    def _numbered(self, label: int, path: str, number: int) -> str:
        """A numeric label as a class name: `classes` gives it one, unless numbers are the names."""
        if self.given and str(label) in self.given:
            return str(label)
        if not 0 <= label < (len(self.given) if self.given else MOST):
            last = f"{len(self.given) - 1} (classes={self.classes!r})" if self.given else MOST - 1
            raise UserError(f"{path}, row {number}: label {label}, expected 0 to {last}")
        return self.given[label] if self.given else str(label)

    def _match(self, path: str, rows: dict[str, str], chosen) -> list[str]:
        folder = os.path.commonprefix([path, *chosen]).rpartition("/")[0]
        known = set(chosen)
        absent = [target for target in rows if target not in self.keys]
        if absent:
            raise UserError(f"{path}: {len(absent)} of {len(rows)} files are not there: {listed(absent)}")
        bare = [file for file in chosen if file not in rows]
        if bare:
            raise UserError(f"{path}: {len(bare)} of {len(known)} images under {folder or self.name} have no row: {listed(bare)}")
        return [rows[file] for file in chosen]
