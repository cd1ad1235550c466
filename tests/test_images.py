"""Pixels as torchvision makes them, the decoding pool, and splits without copies on two sides."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
from pictures import classes, encoded, pixels, write_folder

from w2s_jax.data.images import BadImage, Loader, Transform, open_images, split
from w2s_jax.errors import UserError

RESIZES = [(256, 224, "bilinear"), (256, 224, "bicubic"), (20, 33, "bilinear"), (0, 15, "bicubic"), (9, 0, "bicubic"), (0, 0, "bilinear")]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def published(data: bytes, resize: int, crop: int, interpolation: str) -> np.ndarray:
    """Compose(Resize, CenterCrop) of torchvision 0.28 step by step on PIL images: its published arithmetic in Pillow's own calls."""
    image = PIL.Image.open(io.BytesIO(data)).convert("RGB")
    if resize:
        w, h = image.size
        short, long = (w, h) if w <= h else (h, w)
        new_short, new_long = resize, int(resize * long / short)
        new = (new_short, new_long) if w <= h else (new_long, new_short)
        image = image.resize(new, {"bilinear": PIL.Image.BILINEAR, "bicubic": PIL.Image.BICUBIC}[interpolation])
    if crop:
        w, h = image.size
        if crop > w or crop > h:
            left, top = (crop - w) // 2 if crop > w else 0, (crop - h) // 2 if crop > h else 0
            right, bottom = (crop - w + 1) // 2 if crop > w else 0, (crop - h + 1) // 2 if crop > h else 0
            padded = PIL.Image.new("RGB", (w + left + right, h + top + bottom))
            padded.paste(image, (left, top))
            image = padded
        w, h = image.size
        top, left = int(round((h - crop) / 2.0)), int(round((w - crop) / 2.0))
        image = image.crop((left, top, left + crop, top + crop))
    return np.asarray(image)


def torchvision_or_skip():
    try:
        from torchvision import transforms
    except (ImportError, RuntimeError) as error:  # its compiled part does not fit every build of torch
        pytest.skip(f"no torchvision that imports here ({error})")
    return transforms


@pytest.mark.parametrize("resize, crop, interpolation", RESIZES)
def test_pixels_follow_torchvisions_arithmetic(resize, crop, interpolation):
    for seed, (height, width) in enumerate([(300, 200), (201, 333), (40, 40), (7, 23), (256, 301), (16, 15)]):
        data = encoded(pixels(seed, height, width))
        got = Transform(resize, crop, interpolation)(data)
        assert got.dtype == np.uint8 and got.flags.c_contiguous and (not crop or got.shape == (crop, crop, 3))
        np.testing.assert_array_equal(got, published(data, resize, crop, interpolation))


@pytest.mark.parametrize("resize, crop, interpolation", RESIZES[:3])
def test_real_photographs_equal_torchvision(shared, resize, crop, interpolation):
    transforms = torchvision_or_skip()
    images = open_images(str(shared / "data/images/imagenet_sample.tar"))
    mode = transforms.InterpolationMode(interpolation)
    reference = transforms.Compose([transforms.Resize(resize, interpolation=mode), transforms.CenterCrop(crop), transforms.ToTensor()])
    for rows, got in Loader(images, Transform(resize, crop, interpolation)).stream(range(0, len(images), 4), 10):
        for row, image in zip(rows, got):
            want = reference(PIL.Image.open(io.BytesIO(images.encoded(row))).convert("RGB")).numpy()
            assert np.abs(image.transpose(2, 0, 1) / np.float32(255) - want).max() < 1 / 255


@pytest.mark.parametrize("resize, crop, interpolation", RESIZES[:2])
def test_real_photographs(shared, resize, crop, interpolation):
    images = open_images(str(shared / "data/images/imagenet_sample.tar"))
    rows = range(0, len(images), 8)
    got = Loader(images, Transform(resize, crop, interpolation)).pixels(rows)
    np.testing.assert_array_equal(got, [published(images.encoded(row), resize, crop, interpolation) for row in rows])


def test_every_kind_of_image_becomes_rgb():
    rgb, whole = pixels(3), Transform(0, 0)
    grey, alpha = rgb[..., 0], rgb[..., :1]
    grey3 = np.repeat(grey[..., None], 3, axis=2)
    np.testing.assert_array_equal(whole(encoded(rgb)), rgb)
    np.testing.assert_array_equal(whole(rgb), rgb)
    np.testing.assert_array_equal(whole(encoded(grey)), grey3)
    assert set(np.unique(whole(encoded(PIL.Image.fromarray(grey).convert("1"))))) == {0, 255}
    np.testing.assert_array_equal(whole(encoded(np.concatenate([rgb, alpha], 2))), rgb)  # alpha is dropped, not blended
    np.testing.assert_array_equal(whole(encoded(np.concatenate([grey[..., None], alpha], 2))), grey3)
    palette = PIL.Image.fromarray(rgb).quantize(5)
    np.testing.assert_array_equal(whole(encoded(palette)), np.asarray(palette.convert("RGB")))
    cmyk = PIL.Image.fromarray(rgb).convert("CMYK")
    np.testing.assert_array_equal(whole(encoded(cmyk, "TIFF")), rgb)
    assert np.abs(whole(encoded(cmyk, "JPEG", quality=100)).astype(int) - rgb).mean() < 30  # lossy, and not inverted
    deep = np.asarray([[0, 200, 1000, 65535]], np.uint16)
    for form in ("PNG", "TIFF"):
        assert whole(encoded(deep, form))[0, :, 0].tolist() == [0, 200, 255, 255]  # clipped, as Pillow and so torchvision clip
    frames = [PIL.Image.fromarray(pixels(seed)[..., 0]) for seed in (1, 2)]
    moving = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(whole(moving)[..., 0], pixels(1)[..., 0])
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert whole(encoded(rgb, "JPEG", exif=exif)).shape == rgb.shape


def bomb(width, height):
    """A PNG whose header declares a size that its few bytes can't fill."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


JPEG = encoded(pixels(0, 64, 64), "JPEG")
BAD = {"empty": (b"", "an empty file"), "text": (b"no picture\n" * 9, "no image"), "html": (b"<html>404</html>", "no image"),
       "cut": (JPEG[: len(JPEG) // 2], "truncated"), "cut_png": (encoded()[:120], "OSError|SyntaxError|truncated"),
       "bomb": (bomb(12_000, 9_000), "12000 x 9000 pixels"), "large_bomb": (bomb(60_000, 60_000), "DecompressionBomb"),
       "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image")}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_are_named(tmp_path, kind):
    data, reason = BAD[kind]
    with pytest.raises(BadImage, match=reason):
        Transform()(data)
    files = classes({"a": 3, "b": 3}) | {"b/000.jpeg": data}
    images = open_images(str(write_folder(tmp_path / "set", files)))
    row = images.ids.index("b/000.jpeg")
    with pytest.raises(UserError, match=f"b/000.jpeg: .*{reason}.*bad_images=skip"):
        Loader(images, Transform(8, 8)).pixels(range(len(images)))
    loader = Loader(images, Transform(8, 8), bad="skip")
    got = loader.pixels(range(len(images)))
    assert not got[row].any() and got[[r for r in range(7) if r != row]].any(axis=(1, 2, 3)).all()
    assert list(loader.bad) == [row] and loader.skipped == [("b/000.jpeg", loader.bad[row])]
    assert Loader(images, Transform(8, 8)).check() == [(row, loader.bad[row])]
    parts = split(images, n_train=4, n_test=0, data_seed=0).without(loader.bad)
    assert row not in {*parts.train, *parts.test} and len(parts.train) + len(parts.test) == 6


def test_a_long_thin_image_is_bad_once_resized():
    with pytest.raises(BadImage, match="would become 256 x"):
        Transform()(encoded(PIL.Image.new("L", (400_000, 1))))


def test_loader_streams_in_order_and_ends_early(tmp_path):
    images = open_images(str(write_folder(tmp_path / "set", classes({"a": 9, "b": 8}))))
    for workers, cache_bytes in ((1, 0), (3, 1 << 20), (0, 0)):
        loader = Loader(images, Transform(0, 10), workers=workers, cache_bytes=cache_bytes)
        whole = loader.pixels(range(17))
        np.testing.assert_array_equal(whole, [Transform(0, 10)(images.encoded(row)) for row in range(17)])
        rows = np.asarray([16, 3, 3, 0, *range(16)])
        got = list(loader.stream(rows, 6))
        assert [len(part) for part, _ in got] == [6, 6, 6, 2] and loader.size == (10, 10)
        np.testing.assert_array_equal(np.concatenate([part for part, _ in got]), rows)
        np.testing.assert_array_equal(np.concatenate([image for _, image in got]), whole[rows])
        for _ in loader.stream(rows, 2, ahead=4):
            break  # a consumer that stops leaves nothing running
        assert loader.pixels([]).shape == (0, 10, 10, 3) and list(loader.stream([], 4)) == []


def test_decoded_images_are_kept_where_they_fit(tmp_path):
    folder = write_folder(tmp_path / "set", classes({"a": 4, "b": 4}))
    images = open_images(str(folder))
    kept, read_again = Loader(images, Transform(0, 8)), Loader(images, Transform(0, 8), cache_bytes=8 * 8 * 8 * 3 - 1)
    first = kept.pixels(range(8))
    read_again.pixels(range(8))
    for path in folder.rglob("*.png"):
        path.unlink()
    np.testing.assert_array_equal(kept.pixels(range(8)), first)
    with pytest.raises(UserError, match="000.png: can't be read"):
        read_again.pixels(range(8))


def test_without_a_crop_sizes_must_agree(tmp_path):
    files = classes({"a": 2, "b": 2}) | {"b/odd.png": encoded(pixels(0, 9, 20))}
    images = open_images(str(write_folder(tmp_path / "set", files)))
    loader = Loader(images, Transform(0, 0))
    assert loader.size == (12, 10)
    with pytest.raises(UserError, match="b/odd.png: 20 x 9 pixels, another one has 10 x 12; expected one size, or crop=PIXELS"):
        loader.pixels(range(5))


@pytest.mark.parametrize("make, message", [
    (lambda images: Transform(resize=-1), "resize=-1: expected pixels"),
    (lambda images: Transform(crop=2.5), "crop=2.5: expected pixels"),
    (lambda images: Transform(interpolation="bicubik"), "did you mean 'bicubic'"),
    (lambda images: Loader(images, Transform(), bad="skp"), "expected error | skip; did you mean 'skip'"),
    (lambda images: Loader(images, Transform(), workers=-1), "workers=-1"),
])
def test_wrong_settings(make, message):
    with pytest.raises(UserError) as error:
        make(open_images("digits"))
    assert message in str(error.value)


def test_fingerprints_follow_what_decides():
    transforms = [Transform(), Transform(255), Transform(256, 225), Transform(256, 224, "bicubic")]
    assert len({t.fingerprint for t in transforms}) == 4 and Transform().fingerprint == Transform(256, 224, "bilinear").fingerprint


# ---------------------------------------------------------------- splits


def test_split_takes_the_references_order():
    images = open_images("digits")
    order = np.arange(len(images))
    np.random.default_rng(3).shuffle(order)  # vision/run_weak_strong.py
    plain = split(images, n_train=1000, n_test=0, data_seed=3)
    np.testing.assert_array_equal(plain.train, order[:1000])
    np.testing.assert_array_equal(plain.test, order[1000:])
    three = split(images, n_weak=300, n_train=500, n_test=600, data_seed=3)
    np.testing.assert_array_equal(np.concatenate([three.weak, three.train, three.test]), order[:1400])
    rest = split(images, n_weak=300, n_train=0, n_test=600, data_seed=3)
    assert [len(rest.weak), len(rest.train), len(rest.test)] == [300, 897, 600] and not rest.notes and not len(plain.weak)


def test_copies_stay_on_one_side(tmp_path):
    one, other = encoded(900), encoded(901)
    files = classes({"a": 20, "b": 20}) | {f"a/copy{i}.png": one for i in range(3)}
    files |= {"b/copy.png": one, "b/x.png": other, "b/y.png": other}
    images = open_images(str(write_folder(tmp_path / "set", files)))
    for seed in range(20):
        parts = split(images, n_weak=10, n_train=20, n_test=0, data_seed=seed)
        sides = [{images.shas[row] for row in rows} for rows in (parts.weak, parts.train, parts.test)]
        assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
        assert [len(parts.weak), len(parts.train), len(parts.test)] == [10, 20, 16] and parts.n_duplicates == 4
        assert "4 images are copies of others (1 of them with another label)" in parts.notes[0] or "3 of them" in parts.notes[0]


def test_missing_classes_are_said_and_unknown_labels_refused(tmp_path):
    images = open_images(str(write_folder(tmp_path / "set", classes({"a": 20, "b": 1}))))
    [note] = split(images, n_train=10, n_test=0, data_seed=0).notes
    assert note.startswith("1 of 2 classes have no") and "image (b)" in note
    unlabelled = open_images(str(write_folder(tmp_path / "flat", {f"{i}.png": encoded(i) for i in range(4)})), classes="a,b")
    with pytest.raises(UserError, match="2 train images have no label, the first '"):
        split(unlabelled, n_train=2, n_test=0, data_seed=0)


@pytest.mark.parametrize("numbers, message", [
    ({"n_train": 1798, "n_test": 0}, "n_train=1798, n_test=0: digits has 1,797 images"),
    ({"n_train": 1000, "n_test": 700, "n_weak": 98}, "1,797 images"),
    ({"n_train": 1797, "n_test": 0}, "none is left for the other side"),
    ({"n_train": 0, "n_test": 0}, "not both"),
    ({"n_train": -1, "n_test": 5}, "n_train=-1: expected a number of images"),
    ({"n_train": 5, "n_test": 5, "n_weak": 2.0}, "n_weak=2.0"),
])
def test_splits_that_do_not_fit(numbers, message):
    with pytest.raises(UserError) as error:
        split(open_images("digits"), data_seed=0, **numbers)
    assert message in str(error.value)
