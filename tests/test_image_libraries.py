"""Image sets of tensorflow-datasets (prepared and read without TensorFlow) and of Hugging Face's datasets."""

import io
import json
import sys

import numpy as np
import pyarrow.parquet
import pytest
from pictures import encoded, pixels, write_folder

from w2s_jax.data.images import Loader, Transform, image_sha, open_images
from w2s_jax.errors import UserError

NAMES = ("zebra", "ant", "bee")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def rows(n, first=0):
    """{image bytes: label} of n images."""
    return {encoded(seed): seed % 3 for seed in range(first, first + n)}


# ---------------------------------------------------------------- tensorflow-datasets


def prepare(data_dir, version="1.0.0", features=None, **splits):
    """A real set of tensorflow-datasets, written as array_record; gives its folder."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)

        @classmethod
        def get_metadata(cls):
            return None

        def _info(self):
            kinds = {"picture": tfds.features.Image(shape=(None, None, 3)), "kind": tfds.features.ClassLabel(names=NAMES),
                     "word": tfds.features.Text()}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({k: kinds[k] for k in features or kinds}))

        def _split_generators(self, downloads):
            return {name: self._generate_examples(images) for name, images in splits.items()}

        def _generate_examples(self, images):
            for i, (data, label) in enumerate(images.items()):
                row = {"picture": io.BytesIO(data), "kind": label, "word": str(i)}
                yield i, {name: row[name] for name in features or row}

    Tiny(data_dir=str(data_dir), file_format="array_record").download_and_prepare()
    return data_dir / "tiny" / version


def test_tfds(tmp_path, monkeypatch):
    train, test = rows(5), rows(4, 50)
    prepare(tmp_path, train=train, test=test)
    images = open_images("tfds:tiny", data_dir=str(tmp_path), split="train")
    assert images.ids == [f"train/{i}" for i in range(5)] and images.class_names == NAMES
    assert {images.encoded(row): label for row, label in enumerate(images.labels)} == train  # in the order that TFDS shuffled them to
    assert images.shas == [image_sha(images.encoded(row)) for row in range(5)] and "tensorflow" not in sys.modules
    assert Loader(images, Transform(0, 0)).pixels([3]).shape == (1, 12, 10, 3)
    monkeypatch.setattr("w2s_jax.data.images.libraries.image_sha", None)  # kept with the labels: nothing is read a second time
    again = open_images("tfds:tiny:1.0.0", data_dir=str(tmp_path), split="train")
    assert again.fingerprint == images.fingerprint and (again.labels == images.labels).all()
    with pytest.raises(UserError, match="split='': tfds:tiny has test, train; expected one of them"):
        open_images("tfds:tiny", data_dir=str(tmp_path))


def test_tfds_takes_the_newest_version(tmp_path):
    for version, n in (("1.9.0", 2), ("1.10.0", 3)):
        prepare(tmp_path, version, train=rows(n))
    assert len(open_images("tfds:tiny", data_dir=str(tmp_path))) == 3
    assert len(open_images("tfds:tiny:1.9.0", data_dir=str(tmp_path))) == 2
    with pytest.raises(UserError, match=r"holds 1.10.0, 1.9.0"):
        open_images("tfds:tiny:2.0.0", data_dir=str(tmp_path))


def as_tfrecord(folder, also=()):
    """Makes a prepared set say that it is TFRecord, and in which other formats it lies there too."""
    path = folder / "dataset_info.json"
    info = json.loads(path.read_text()) | {"fileFormat": "tfrecord", **({"alternativeFileFormats": list(also)} if also else {})}
    path.write_text(json.dumps(info))


def test_tfds_prepared_as_tfrecord(tmp_path):
    folder = prepare(tmp_path, train=rows(3))
    as_tfrecord(folder)
    command = f"tfds convert_format --dataset_version_dir={folder} --out_file_format=array_record"
    with pytest.raises(UserError, match=f"prepared as tfrecord.*{command}"):
        open_images("tfds:tiny", data_dir=str(tmp_path))
    as_tfrecord(folder, ["array_record"])  # what that command leaves behind
    assert len(open_images("tfds:tiny", data_dir=str(tmp_path))) == 3


@pytest.mark.parametrize("features, message", [
    (("kind", "word"), "0 features of type Image, expected one .features: kind: ClassLabel, word: Text"),
    (("picture", "word"), "0 features of type ClassLabel"),
])
def test_tfds_without_images_or_labels(tmp_path, features, message):
    prepare(tmp_path, features=features, train=rows(2))
    with pytest.raises(UserError, match=message):
        open_images("tfds:tiny", data_dir=str(tmp_path))


def test_tfds_that_is_not_there_or_damaged(tmp_path):
    folder = prepare(tmp_path, train=rows(3))
    for name, message in (("tini", "did you mean 'tiny'"), ("tiny/x", "no .*tiny/x"), ("a b", "expected tfds:NAME"), ("../tiny", "no ")):
        with pytest.raises(UserError, match=message):
            open_images(f"tfds:{name}", data_dir=str(tmp_path))
    [records] = folder.glob("*array_record*")
    whole = records.read_bytes()
    records.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="tiny.*can't be read"):
        open_images("tfds:tiny", data_dir=str(tmp_path))


# ---------------------------------------------------------------- Hugging Face


def dataset(images, **columns):
    import datasets

    data = {"img": [{"bytes": data, "path": None} for data in images], "fine": list(images.values()), "n": [0] * len(images)} | columns
    features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=list(NAMES)), "n": datasets.Value("int32")})
    return datasets.Dataset.from_dict(data, features=features)


@pytest.mark.parametrize("how", ["save_to_disk", "dict", "parquet"])
def test_huggingface(tmp_path, monkeypatch, how):
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    data, folder = rows(6), tmp_path / "set"
    if how == "save_to_disk":
        dataset(data).save_to_disk(folder)
    elif how == "dict":
        datasets.DatasetDict(train=dataset(data), test=dataset(rows(2, 20))).save_to_disk(folder)
    else:
        folder.mkdir()
        dataset(data).to_parquet(folder / "train-00000-of-00001.parquet")
        dataset(rows(2, 20)).to_parquet(folder / "test-00000-of-00001.parquet")
    split = "" if how == "save_to_disk" else "train"
    images = open_images(f"hf:{folder}", split=split)
    assert images.class_names == NAMES and [i.split("/")[1] for i in images.ids] == list("012345")
    assert {images.encoded(row): label for row, label in enumerate(images.labels)} == data
    loader = Loader(images, Transform(0, 0), workers=4)
    np.testing.assert_array_equal(loader.pixels(range(6)), [pixels(seed) for seed in range(6)])
    assert images.shas == [image_sha(image) for image in data]
    assert open_images(f"hf:{folder}", split=split).fingerprint == images.fingerprint
    if split:
        with pytest.raises(UserError, match="split='': hf:.* has test, train; expected one of them"):
            open_images(f"hf:{folder}")


def test_huggingface_paths_unknown_labels_and_empty_images(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "x.png").write_bytes(encoded(5))
    (tmp_path / "gone.png").write_bytes(encoded(6))
    values = [{"bytes": None, "path": str(tmp_path / "x.png")}, None, {"bytes": None, "path": str(tmp_path / "gone.png")}]
    (tmp_path / "set").mkdir()
    table = dataset(rows(3), img=values, fine=[1, None, 0]).data.table  # what datasets itself writes holds the files' bytes
    pyarrow.parquet.write_table(table, tmp_path / "set/train.parquet")
    (tmp_path / "gone.png").unlink()
    images = open_images(f"hf:{tmp_path / 'set'}")
    assert images.labels.tolist() == [1, -1, 0] and "1 of 3 images have no label" in images.notes[0]
    assert images.encoded(0) == encoded(5) and images.encoded(1) == b""
    with pytest.raises(UserError, match="row 2 names '.*gone.png', which is not on this machine"):
        images.encoded(2)


def test_huggingface_sets_that_do_not_fit(tmp_path):
    dataset(rows(3)).remove_columns("fine").save_to_disk(tmp_path / "set")
    write_folder(tmp_path / "files", {"cat/0.png": encoded()})
    write_folder(tmp_path / "damaged", {"train.parquet": b"PAR1 no"})
    for name, message in (("set", "0 features of type ClassLabel, expected one .features: img: Image, n: Value"),
                          ("gone", "no such folder"), ("files", f"a folder of image files is dataset={tmp_path}/files"),
                          ("damaged", "can't be loaded")):
        with pytest.raises(UserError, match=message):
            open_images(f"hf:{tmp_path / name}")
    with pytest.raises(UserError, match="hf:nobody/nothing: can't be loaded"):
        open_images("hf:nobody/nothing")
