"""Image sets that another library keeps: scikit-learn's digits, tensorflow-datasets (without TensorFlow), Hugging Face's datasets."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from w2s_jax.data.images.imageset import ImageSet, Source, image_sha
from w2s_jax.errors import UserError, nearest

ARRAY_RECORD = "array_record"
CONVERTER = "tensorflow, apache-beam and mlcroissant"  # what the command `tfds` of tensorflow-datasets 4.9.10 imports


# ---------------------------------------------------------------- digits


class _Digits(Source):
    def __init__(self, pixels: np.ndarray):
        super().__init__()
        self.pixels = pixels

    def read(self, key) -> np.ndarray:
        return np.repeat(self.pixels[key][:, :, None], 3, axis=2)

    def stamp(self, key) -> str:
        return str(key)


def open_digits() -> ImageSet:
    """scikit-learn's digits: 1,797 grey images of 8 x 8, as RGB; their 0..16 are 0..255 here, halves rounded up."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.floor(data.images * (255 / 16) + 0.5).astype(np.uint8)
    return ImageSet("digits", [f"all/{row}" for row in range(len(pixels))], data.target.astype(np.int32), tuple(map(str, range(10))),
                    _Digits(pixels), list(range(len(pixels))))


# ---------------------------------------------------------------- tensorflow-datasets


class _Tfds(Source):
    """Records of a split prepared as array_record. Keys are row numbers."""

    def __init__(self, records, image: str, label: str, home: str):
        super().__init__()
        self.records, self.image, self.label, self.home = records, image, label, home

    def _record(self, key) -> dict:
        try:
            record = self.records[key]
        except Exception as error:  # the reader's own errors, of a damaged file
            raise OSError(f"row {key}: {' '.join(str(error).split())[:200]}") from error
        if record.get(self.image) is None or record.get(self.label) is None:  # of a file cut short
            raise OSError(f"row {key} is empty; the files are damaged")
        return record

    def read(self, key) -> bytes:
        return bytes(self._record(key)[self.image])

    def stamp(self, key) -> str:
        return str(key)

    def facts(self, key) -> str:
        """sha and label: a record is read as a whole, so a pass over the set finds both."""
        record = self._record(key)
        return f"{image_sha(bytes(record[self.image]))} {int(record[self.label])}"


def open_tfds(text: str, *, data_dir: str = "", split: str = "") -> ImageSet:
    """`NAME[/CONFIG][:VERSION]` of tensorflow-datasets, prepared as array_record under `data_dir`; nothing is downloaded.

    Args:
      data_dir: default $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      split: one of the set's; may be "" where there is one.

    UserError: it is not there, prepared as TFRecord (names the command that converts it), has no split of that name, or not one
    feature Image and one ClassLabel.
    """
    dataset = f"tfds:{text}"
    folder = _prepared(dataset, text, Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser())
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder)
        known = {form.value for form in (builder.info.file_format, *builder.info.alternative_file_formats) if form}
        if ARRAY_RECORD not in known:
            raise UserError(f"dataset={dataset}: {folder} is prepared as {', '.join(sorted(known))}, which only TensorFlow reads; add "
                            f"{ARRAY_RECORD} to it, where tensorflow-datasets, {CONVERTER} are installed: "
                            f"tfds convert_format --dataset_version_dir={folder} --out_file_format={ARRAY_RECORD}")
        split = one_of(split, builder.info.splits, dataset)
        features = dict(sorted(builder.info.features.items()))  # their own order differs from run to run
        image = only([n for n, f in features.items() if type(f) is tfds.features.Image], "Image", dataset, features)
        label = only([n for n, f in features.items() if isinstance(f, tfds.features.ClassLabel)], "ClassLabel", dataset, features)
        names = tuple(features[label].names)
        records = builder.as_data_source(split=split, decoders={image: tfds.decode.SkipDecoding()}, file_format=ARRAY_RECORD)
        paths = [Path(path) for path in builder.info.splits[split].filepaths]  # of that format, once the line above has chosen it
        home = "\n".join(f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths)
        source = _Tfds(records, image, label, home)
        rows = list(range(len(records)))
    except UserError:
        raise
    except Exception as error:  # whatever a foreign library makes of a damaged folder
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"dataset={dataset}: {folder} can't be read ({reason})") from error
    facts = source.all_facts(rows, f"reading {dataset}")
    labels = np.maximum(np.asarray([int(fact.split(" ")[1]) for fact in facts], np.int32), -1)
    ids = [f"{split}/{row}" for row in rows]
    return ImageSet(f"{dataset} ({split})", ids, labels, names, source, rows, unknown_labels(dataset, labels))


def _prepared(dataset: str, text: str, root: Path) -> Path:
    """The folder NAME[/CONFIG]/VERSION under `root`; the newest version where none is asked for."""
    match = re.fullmatch(r"([\w\-.]+)(?:/([\w\-.+]+))?(?::(\d+\.\d+\.\d+))?", text)
    if match is None:
        raise UserError(f"dataset={dataset}: expected tfds:NAME[/CONFIG][:VERSION], VERSION like 5.1.0")
    name, config, version = match.groups()
    folder = root / name / (config or "")
    if not folder.is_dir():
        there = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
        raise UserError(f"dataset={dataset}: no {folder}; data_dir is the folder of the prepared sets{nearest(name, there)}")
    prepared = {path.parent.name: path.parent for path in folder.glob("*/dataset_info.json")}
    if not prepared:
        configs = sorted({path.parent.parent.name for path in folder.glob("*/*/dataset_info.json")})
        raise UserError(f"dataset={dataset}: {folder} holds no prepared version" +
                        (f"; expected tfds:{name}/CONFIG, CONFIG one of {', '.join(configs)}" if configs else ""))
    if version and version not in prepared:
        raise UserError(f"dataset={dataset}: {folder} holds {', '.join(sorted(prepared))}")
    return prepared[version or max(prepared, key=lambda v: [int(n) if n.isdecimal() else -1 for n in v.split(".")])]


# ---------------------------------------------------------------- Hugging Face's datasets


class _HuggingFace(Source):
    """Rows of a datasets.Dataset whose image column is not decoded. Keys are row numbers."""

    def __init__(self, data, column: str, name: str):
        super().__init__()
        self.data, self.column, self.name = data, column, name
        stats = [(str(Path(f["filename"]).resolve()), os.stat(f["filename"])) for f in data.cache_files]
        # Without files there is nothing to know the content again by. A fingerprint changes with every selection.
        self.home = "\n".join([data._fingerprint, *(f"{path} {s.st_size} {s.st_mtime_ns}" for path, s in stats)]) if stats else ""

    def read(self, key) -> bytes:
        value = self.data[key][self.column]
        if value is None or (value["bytes"] is None and not value["path"]):
            return b""
        if value["bytes"] is not None:
            return value["bytes"]
        if not os.path.isfile(value["path"]):
            raise OSError(f"row {key} names {value['path']!r}, which is not on this machine")
        return Path(value["path"]).read_bytes()

    def stamp(self, key) -> str:
        return str(key)


def open_huggingface(text: str, *, split: str = "") -> ImageSet:
    """`ID[/CONFIG]` of the hub, or a folder: one that `save_to_disk` wrote, or one of parquet files. Never runs a data set's code.

    UserError: it can't be loaded; no split of that name; not one column of type Image and one ClassLabel.
    """
    import datasets

    dataset = f"hf:{text}"
    path = Path(text).expanduser()
    try:
        if path.is_dir() or text.startswith(("/", ".", "~")):
            if not path.is_dir():
                raise UserError(f"dataset={dataset}: no such folder")
            if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
                found = datasets.load_from_disk(str(path))
            elif next(path.rglob("*.parquet"), None):
                found = datasets.load_dataset("parquet", data_dir=str(path))
            else:
                raise UserError(f"dataset={dataset}: neither parquet files nor what save_to_disk writes; a folder of image files is "
                                f"dataset={text}")
        else:
            owner, _, rest = text.partition("/")
            name, _, config = rest.partition("/")
            found = datasets.load_dataset(f"{owner}/{name}" if name else owner, config or None)
    except UserError:
        raise
    except Exception as error:  # whatever the hub, the network or a file comes up with
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"dataset={dataset}: can't be loaded ({reason})") from error
    if isinstance(found, datasets.Dataset):
        found = {str(found.split or "all"): found}
    split = one_of(split, found, dataset)
    data = found[split]
    image = only([n for n, f in data.features.items() if isinstance(f, datasets.Image)], "Image", dataset, data.features)
    label = only([n for n, f in data.features.items() if isinstance(f, datasets.ClassLabel)], "ClassLabel", dataset, data.features)
    numbers = data.select_columns([label]).with_format("arrow")[:][label].to_pylist()
    labels = np.asarray([-1 if number is None else number for number in numbers], np.int32)
    source = _HuggingFace(data.select_columns([image]).cast_column(image, datasets.Image(decode=False)), image, dataset)
    rows = list(range(len(data)))
    return ImageSet(f"{dataset} ({split})", [f"{split}/{row}" for row in rows], labels, tuple(data.features[label].names), source, rows,
                    unknown_labels(dataset, labels))


# ---------------------------------------------------------------- what both need


def one_of(split: str, known, dataset: str) -> str:
    """The split to read: the one asked for, or the only one."""
    names = sorted(map(str, known))
    if split in names or (not split and len(names) == 1):
        return split or names[0]
    raise UserError(f"split={split!r}: {dataset} has {', '.join(names) or 'no splits'}; expected one of them{nearest(split, names)}")


def only(found: list[str], kind: str, dataset: str, features) -> str:
    """The one feature of a kind."""
    if len(found) != 1:
        listed = ", ".join(f"{name}: {type(feature).__name__}" for name, feature in features.items())
        raise UserError(f"dataset={dataset}: {len(found)} features of type {kind}, expected one (features: {listed})")
    return found[0]


def unknown_labels(dataset: str, labels: np.ndarray) -> tuple[str, ...]:
    unknown = int((labels < 0).sum())
    return (f"{dataset}: {unknown:,} of {len(labels):,} images have no label",) if unknown else ()
