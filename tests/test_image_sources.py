"""Where images come from: each kind of source, for real, and what is refused."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
from pictures import classes, encoded, write_folder, write_tar

from w2s_jax.data.images import Loader, Transform, open_images
from w2s_jax.data.images import imageset as records
from w2s_jax.errors import UserError

THREE = {"cat": 3, "dog": 2, "eel": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def store(tmp_path, kind, files):
    return str(write_tar(tmp_path / "set.tar", files) if kind == "tar" else write_folder(tmp_path / "set", files))


def labelled(images):
    return {i: images.class_names[label] if label >= 0 else None for i, label in zip(images.ids, images.labels)}


def by_folder(files):
    return {path: path.split("/")[-2] for path in files}


def test_digits():
    from sklearn.datasets import load_digits

    images, data = open_images("digits"), load_digits()
    got = Loader(images, Transform(0, 0)).pixels(range(len(images)))
    assert got.shape == (1797, 8, 8, 3) and got.max() == 255 and images.class_names == tuple("0123456789")
    np.testing.assert_array_equal(images.labels, data.target)
    assert (got == got[..., :1]).all() and np.abs(got[..., 0] - data.images * 255 / 16).max() <= 0.5
    assert got[..., 0][data.images == 8].min() == 128  # 127.5 is rounded up
    assert images.fingerprint == open_images("digits").fingerprint != images.select(range(1796)).fingerprint


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("prefix", ["", "top/", "top/val/", "val/", "./"])
def test_class_folders(tmp_path, kind, prefix):
    files = classes(THREE, prefix, "jpg")
    if kind == "folder" and prefix == "./":
        files = classes(THREE, "", "jpg")
    images = open_images(store(tmp_path, kind, files))
    clean = {path.removeprefix("./"): data for path, data in files.items()}
    assert images.ids == sorted(clean) and labelled(images) == by_folder(clean) and images.class_names == tuple(THREE)
    assert [images.encoded(row) for row in range(6)] == [clean[i] for i in images.ids] and not images.notes
    chosen = images.select([4, 1])
    assert chosen.ids == [images.ids[4], images.ids[1]] and chosen.encoded(0) == images.encoded(4) and chosen.shas[1] == images.shas[1]


def test_a_tar_and_its_folder_have_one_fingerprint(tmp_path):
    files = classes(THREE)
    one, other = (open_images(store(tmp_path, kind, files)) for kind in ("tar", "folder"))
    assert one.fingerprint == other.fingerprint and one.shas == other.shas and len(set(one.shas)) == 6
    changed = open_images(str(write_folder(tmp_path / "changed", files | {"eel/000.png": encoded(77)})))
    assert changed.fingerprint != one.fingerprint


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_split_folders(tmp_path, kind):
    path = store(tmp_path, kind, classes(THREE, "train/") | classes({"cat": 1, "eel": 2}, "test/"))
    test = open_images(path, split="test")
    assert test.class_names == tuple(THREE) and test.labels.tolist() == [0, 2, 2]  # the dog keeps its number where there is none
    assert len(open_images(path, split="train")) == 6
    with pytest.raises(UserError, match="has the split folders train, test; expected one of them"):
        open_images(path)
    with pytest.raises(UserError, match="no such folder .there are train, test.; did you mean 'test'"):
        open_images(path, split="tst")


@pytest.mark.parametrize("given", ["file", "list"])
def test_given_classes_fix_names_and_order(tmp_path, given):
    names = ["eel", "ape", "dog", "cat"]
    text = str(write_folder(tmp_path, {"names.txt": "\n".join(names) + "\n\n"}) / "names.txt") if given == "file" else ", ".join(names)
    folder = str(write_folder(tmp_path / "set", classes(THREE)))
    images = open_images(folder, classes=text)
    assert images.class_names == tuple(names) and sorted(set(images.labels.tolist())) == [0, 2, 3] and images.ids[0] == "eel/000.png"
    one = open_images(str(write_folder(tmp_path / "one", classes({"dog": 2}, "top/"))), classes=text)
    assert one.labels.tolist() == [2, 2]
    with pytest.raises(UserError, match="class folder 'dog' .2 images. is not among the 2 classes of classes="):
        open_images(folder, classes="eel,cat")


def test_other_files_are_counted_and_named(tmp_path):
    files = classes(THREE) | {"cat/notes.txt": "", "README": "", ".DS_Store": "", "dog/._000.png": b"fork"}
    images = open_images(str(write_folder(tmp_path / "set", files)))
    [note] = images.notes
    assert len(images) == 6 and "4 files are no images by their names" in note and "cat/notes.txt" in note


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_tiny_imagenets_layout(tmp_path, kind):
    wnids = ["n02", "n01", "n03"]
    rows = {f"val_{i}.JPEG": wnids[i % 2] for i in range(6)}
    files = {f"tiny/val/images/{name}": encoded(i, "JPEG") for i, name in enumerate(rows)}
    files |= {"tiny/val/val_annotations.txt": "".join(f"{name}\t{wnid}\t0\t0\t62\t57\n" for name, wnid in rows.items()),
              "tiny/wnids.txt": "\n".join(wnids), **{f"tiny/train/{w}/images/{w}_0.JPEG": encoded(50, "JPEG") for w in wnids},
              "tiny/test/images/test_0.JPEG": encoded(60, "JPEG")}
    path = store(tmp_path, kind, files)
    val, train, test = (open_images(path, split=name) for name in ("val", "train", "test"))
    assert val.class_names == train.class_names == test.class_names == ("n01", "n02", "n03")
    assert labelled(val) == {f"tiny/val/images/{name}": wnid for name, wnid in rows.items()} and train.labels.tolist() == [0, 1, 2]
    assert test.labels.tolist() == [-1] and "1 of 1 images have no label" in test.notes[0]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
@pytest.mark.parametrize("labels, names", [(["b", "a", "b"], ("a", "b")), ([2, 0, 2], ("0", "1", "2"))])
def test_metadata_beside_the_images(tmp_path, form, labels, names):
    rows = [{"file_name": f"in/{i}.png", "label": label} for i, label in enumerate(labels)]
    text = "\n".join(json.dumps(row) for row in rows) if form == "jsonl" else "\n".join(["file_name,label", *(
        f"{row['file_name']},{row['label']}" for row in rows)])
    files = {f"train/in/{i}.png": encoded(i) for i in range(3)} | {f"train/metadata.{form}": text}
    images = open_images(str(write_folder(tmp_path / "set", files)))
    assert labelled(images) == {f"train/in/{i}.png": str(label) for i, label in enumerate(labels)} and images.class_names == names
    if labels[0] == 2:
        assert open_images(str(tmp_path / "set"), classes="x,y,z").class_names == ("x", "y", "z")


@pytest.mark.parametrize("top", ["", "top/"])
def test_flat_images(tmp_path, top):
    named = {f"{top}n0000000{i}_thing.JPEG": encoded(i, "JPEG") for i in (2, 1)}
    assert open_images(str(write_folder(tmp_path / "a", named))).class_names == ("n00000001", "n00000002")
    beside = {f"{top}{i}.png": encoded(i) for i in range(2)} | {f"{top}metadata.csv": "file_name,label\n0.png,x\n1.png,y\n"}
    assert open_images(str(write_folder(tmp_path / "c", beside))).class_names == ("x", "y")
    bare = open_images(str(write_folder(tmp_path / "b", {"x.png": encoded()})))
    assert bare.labels.tolist() == [-1] and "no label" in bare.notes[0]


def link(name="cat/000.png", kind=tarfile.SYMTYPE, target="/etc/passwd"):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize("extra, message", [
    ({"../cat/9.png": encoded(9)}, "leads out of the archive"),
    ({"/cat/9.png": encoded(9)}, "leads out of the archive"),
    ({"x": link()}, "is a link, a device or sparse"),
    ({"x": link(kind=tarfile.LNKTYPE, target="dog/000.png")}, "is a link, a device or sparse"),
    ({"./cat/000.png": encoded(9)}, "member 'cat/000.png' occurs more than once"),
])
def test_members_that_a_tar_must_not_have(tmp_path, extra, message):
    with pytest.raises(UserError, match=message):
        open_images(str(write_tar(tmp_path / "set.tar", classes(THREE) | extra)))


def test_damaged_archives(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", classes(THREE)).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        third = archive.getmembers()[2]
    damaged = bytearray(whole)
    damaged[third.offset : third.offset + 20] = bytes(range(1, 21))  # tarfile would take that for the end
    end = whole.rstrip(b"\0")
    for name, content in {"damaged.tar": bytes(damaged), "cut.tar": whole[: third.offset + 700], "text.tar": b"hello" * 400,
                          "end.tar": end + bytes(-len(end) % 512)}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: .*(cut short|damaged)"):
            open_images(str(tmp_path / name))
    write_tar(tmp_path / "packed.tar.gz", classes(THREE), "w:gz")
    with pytest.raises(UserError, match="packed; .* gunzip -k .*packed.tar.gz"):
        open_images(str(tmp_path / "packed.tar.gz"))


JPG = {f"{i}.png": encoded(i) for i in range(2)}


@pytest.mark.parametrize("files, arguments, message", [
    ({"a.txt": "x"}, {}, "no images among 1 files"),
    (classes(THREE) | classes(THREE, "train/"), {}, "cat, dog, eel beside the split folders train"),
    (classes(THREE), {"split": "test"}, "the images are not in split folders"),
    (classes(THREE), {"data_dir": "x"}, "data_dir='x': dataset="),
    (classes(THREE), {"classes": "nowhere.txt"}, "classes='nowhere.txt': no such file"),
    (classes(THREE), {"classes": "cat,dog,cat"}, "'cat' stands there more than once"),
    (JPG | {"metadata.csv": "file_name,text\n0.png,x\n1.png,y\n"}, {}, "metadata.csv, row 1: no column 'label'"),
    (JPG | {"metadata.csv": "file_name,label\n0.png,x\n"}, {}, "1 of 2 images under .* have no row: 1.png"),
    (JPG | {"metadata.csv": "file_name,label\n0.png,x\n1.png,y\n2.png,y\n"}, {}, "1 of 3 files are not there: 2.png"),
    (JPG | {"metadata.csv": "file_name,label\n0.png,x\n0.png,y\n1.png,y\n"}, {}, "'0.png' has two labels, 'x' and 'y'"),
    (JPG | {"metadata.csv": "file_name,label\n0.png,0\n1.png,7\n"}, {"classes": "x,y"}, "label 7, expected 0 to 1"),
    (JPG | {"metadata.csv": "file_name,label\n0.png,0\n1.png,123456789\n"}, {}, "label 123456789, expected 0 to 99999"),
    ({os.fsdecode(b"\xff.png"): encoded()}, {}, "file name '.udcff.png' is not UTF-8"),
    (JPG | {"metadata.csv": "a,b\n", "metadata.jsonl": "{}"}, {}, "metadata.csv and metadata.jsonl are both there"),
    (JPG | {"val_annotations.txt": "0.png n01\n"}, {}, "val_annotations.txt, row 1: '0.png n01', expected file TAB wnid"),
    (JPG | {"val_annotations.txt": "0.png\tn01\n1.png\tn02", "wnids.txt": "n01\nn03"}, {},
     "class 'n02' .1 images. is not among the 2 classes"),
])
def test_folders_that_do_not_fit(tmp_path, files, arguments, message):
    with pytest.raises(UserError, match=message):
        open_images(str(write_folder(tmp_path / "set", files)), **arguments)


def test_no_such_dataset():
    for name, message in (("digitz", "did you mean 'digits'"), ("/no/where", "there is no such folder"), ("x.tar", "x.tar: can't be read")):
        with pytest.raises(UserError, match=message):
            open_images(name)


def test_links_in_folders_are_followed_and_circles_refused(tmp_path):
    write_folder(tmp_path / "blobs", {"1": encoded(1), "2": encoded(2)})
    write_folder(tmp_path / "elsewhere", {"0.png": encoded(3)})
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
    os.symlink(tmp_path / "blobs/1", tmp_path / "set/cat/0.png")
    os.symlink(tmp_path / "blobs/2", tmp_path / "set/dog/0.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "set/eel")
    assert open_images(str(tmp_path / "set")).ids == ["cat/0.png", "dog/0.png", "eel/0.png"]
    os.symlink(tmp_path / "set", tmp_path / "elsewhere/back")
    with pytest.raises(UserError, match="a link to a folder above it"):
        open_images(str(tmp_path / "set"))


def test_hashes_are_kept_until_a_file_changes(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "set", classes(THREE))
    first = open_images(str(folder))
    assert first.shas and len(list((tmp_path / "cache/w2s_jax/images").iterdir())) == 1
    hashed = []
    monkeypatch.setattr(records, "image_sha", lambda data, real=records.image_sha: hashed.append(1) or real(data))
    assert open_images(str(folder)).fingerprint == first.fingerprint and not hashed
    (folder / "dog/000.png").write_bytes(encoded(50))
    assert open_images(str(folder)).fingerprint != first.fingerprint and len(hashed) == 1
    [kept] = (tmp_path / "cache/w2s_jax/images").iterdir()
    kept.write_text("{")
    assert open_images(str(folder)).shas and len(hashed) == 7
    os.symlink(tmp_path / "gone", folder / "cat/broken.png")
    with pytest.raises(UserError, match="broken.png: can't be read"):
        _ = open_images(str(folder)).shas


# ---------------------------------------------------------------- ImageNet


WORDS = {"n09": "tench, Tinca tinca", "n03": "goldfish", "n07": "shark", "n01": "fish"}


def write_imagenet(folder, truth=(2, 1, 3, 1), inner=4, images=4, member="ILSVRC2012_devkit_t12/data/"):
    """Both archives with the real ones' names and layouts: 3 classes and the synset above them."""
    from scipy.io import savemat

    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O"), ("children", "O"),
            ("wordnet_height", "O"), ("num_train_images", "O")]
    synsets = np.empty((len(WORDS), 1), kind)
    for row, (wnid, words) in enumerate(WORDS.items()):
        above = row + 1 == inner
        synsets[row, 0] = (row + 1.0, wnid, words, "gloss", 3.0 * above, np.asarray([1.0, 2, 3])[: 3 * above], 1.0, 1300.0)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    kit = {member + "meta.mat": meta.getvalue(), member + "ILSVRC2012_validation_ground_truth.txt": "".join(f"{i}\n" for i in truth),
           "ILSVRC2012_devkit_t12/readme.txt": "x"}
    write_tar(folder / "ILSVRC2012_devkit_t12.tar.gz", kit, "w:gz")
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, images + 1)]
    write_tar(folder / "ILSVRC2012_img_val.tar", {name: encoded(i, "JPEG") for i, name in reversed(list(enumerate(names)))})
    return folder


def test_imagenets_archives(tmp_path):
    images = open_images("imagenet", data_dir=str(write_imagenet(tmp_path)))
    assert images.class_names == ("n03", "n07", "n09") and images.titles == ("goldfish", "shark", "tench, Tinca tinca")
    # Numbers 2, 1, 3, 1 are n03, n09, n07, n09; torchvision moves the files into class folders, and so sorts by class, then by name.
    assert [i[-6:-5] for i in images.ids] == ["1", "3", "2", "4"] and images.labels.tolist() == [0, 1, 2, 2]
    assert [images.encoded(row) for row in range(4)] == [encoded(i, "JPEG") for i in (0, 2, 1, 3)]


@pytest.mark.parametrize("changes, message", [
    ({"images": 3}, "3 images, but 4 labels"),
    ({"truth": (2, 1, 4, 1)}, "line 3: '4' is the number of none of the 3 classes"),
    ({"truth": ("2", "1", "x", "1")}, "line 3: 'x' is the number of none"),
    ({"member": "elsewhere/"}, "no data/ILSVRC2012_validation_ground_truth.txt and no data/meta.mat"),
])
def test_imagenets_archives_that_do_not_fit(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        open_images("imagenet", data_dir=str(write_imagenet(tmp_path, **changes)))


def test_imagenet_without_its_archives(tmp_path):
    with pytest.raises(UserError, match="no ILSVRC2012_img_val.tar in it"):
        open_images("imagenet", data_dir=str(tmp_path))
    write_imagenet(tmp_path)
    kit = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    kit.write_bytes(kit.read_bytes()[:300])
    with pytest.raises(UserError, match="truncated or damaged archive"):
        open_images("imagenet", data_dir=str(tmp_path))
