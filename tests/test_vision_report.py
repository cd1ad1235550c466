"""The vision report: its tables, plots and sheet of images, on numbers from the real statistics of made-up predictions."""

import io
import tarfile

import numpy as np
import pandas
import pytest
from PIL import Image

from w2s_jax import gallery, metrics, vision_report
from w2s_jax.gallery import Picture

CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def logits(rng, labels, accuracy: float, classes: int, like: np.ndarray | None = None) -> np.ndarray:
    """Of a model that is right so often, float32 `[n, classes]`; where it is wrong it likes what the logits `like` say."""
    out = rng.normal(size=(len(labels), classes)) if like is None else like + rng.normal(size=like.shape)
    out = (out + 6 * (rng.random(len(labels)) < accuracy)[:, None] * np.eye(classes)[labels]).astype(np.float32)
    return out


def made(methods=("probe xent", "probe adaptconf", "finetune xent"), seeds=(0, 1, 2), n=800, classes=10, strong=0.85,
         replicates=200) -> dict:
    """The dict that `write` takes, as the stage makes it, from predictions of about these qualities."""
    rng = np.random.default_rng(0)
    labels = rng.integers(classes, size=n)
    weak = logits(rng, labels, 0.55, classes)
    metric = {"replicates": replicates}
    rows = []
    for i, method in enumerate(methods):
        students = np.stack([logits(rng, labels, 0.66 + 0.05 * i, classes, weak) for _ in seeds])
        ceilings = np.stack([logits(rng, labels, strong, classes) for _ in seeds])
        weaks = np.stack([weak] * len(seeds))
        rise = 1 - np.exp(-np.arange(1, 21) / 4)
        epochs = {"accuracy": [(0.7 * rise + 0.02 * rng.normal(size=20)).tolist() for _ in seeds],
                  "agreement": [(0.5 + 0.3 * rise + 0.01 * rng.normal(size=20)).tolist() for _ in seeds],
                  "ceiling": [(0.85 * rise).tolist() for _ in seeds]}
        by_seed = [{"seed": s, **metrics.pgr_bootstrap(weak, students[j], ceilings[j], labels, **metric)} for j, s in enumerate(seeds)]
        rows.append({"method": method, "by_seed": by_seed, **metrics.pgr_bootstrap(weaks, students, ceilings, labels, **metric),
                     "top5": None, "epochs": epochs if method.startswith("probe") else None,
                     "agreement": metrics.agreement(students[0].argmax(1), weak.argmax(1), labels)})
        if classes > 5:
            top = [np.argsort(np.argsort(-x, -1), -1)[..., :] for x in (weaks, students, ceilings)]
            hits = [np.stack([1.0 * (ranks[..., labels[k]] >= 5) for k, ranks in enumerate(np.moveaxis(t, 1, 0))], -1) for t in top]
            two = [np.stack([1 - h, h], -1).astype(np.float32) for h in hits]  # class 0 is predicted where the true class is a hit
            rows[-1]["top5"] = metrics.pgr_bootstrap(*two, np.zeros(n, int), **metric)
    first = rows[0]
    noise = []
    for level in (0.0, 0.2, 0.4, 0.6, 0.8):
        accuracy = [0.86 - 0.12 * level**3 - 0.005 * s for s in range(len(seeds))]
        noise.append({"level": level, "label_accuracy": 1 - level, "accuracy": accuracy,
                      "accuracy_ci": [min(accuracy) - 0.02, max(accuracy) + 0.02]})  # fmt: skip
    paths = {}
    for name, shift in (("weak labels", 0.4), ("ground truth", 0.0)):
        penalties = [10.0**e for e in range(-1, -7, -1)]
        loss = [0.4 + shift + 0.08 * (np.log10(p) + 3.3 + shift) ** 2 for p in penalties]
        paths[name] = [{"l2": p, "heldout_loss": v, "accuracy": 0.9 - 0.3 * (v - 0.4), "agreement": 0.6 + shift / 2 - 0.1 * (v - 0.4),
                        "chosen": v == min(loss)} for p, v in zip(penalties, loss)]  # fmt: skip
    return {"weak": {"name": "resnet20", "accuracy": first["weak"], "accuracy_ci": first["weak_ci"], "top5": 0.95, "top5_ci": [0.93, 0.97]},
            "strong": "resnet32", "dataset": "cifar10_sample", "n_train": 6000, "n_test": n, "n_classes": classes, "seeds": list(seeds),
            "replicates": replicates, "methods": rows, "noise": noise, "l2": paths}  # fmt: skip


def drawn(n: int, side: int = 32, names=CIFAR) -> list[Picture]:
    rng = np.random.default_rng(0)
    out = []
    for i in range(n):
        true, weak, student = rng.integers(len(names), size=3)
        image = rng.integers(256, size=(side, side + 3 * (i % 3), 3), dtype=np.uint8)
        out.append(Picture(image, names[true], names[weak if i % 2 else true], 0.31, names[student if i % 3 == 0 else true], 0.97))
    return out


def test_what_is_written(tmp_path):
    results = made() | {"n_weak": 1200}
    files = vision_report.write(tmp_path, results, drawn(7))
    assert {p.name for p in files} == {p.name for p in tmp_path.iterdir()} == {
        "report.md", "images.png", *(f"{f}.csv" for f in vision_report.FRAMES),
        *(f"{p}.{kind}" for p in vision_report.PLOTS for kind in ("png", "svg"))}  # fmt: skip
    text = (tmp_path / "report.md").read_text()
    for heading in ("Accuracy", "Top-5 accuracy", "Agreement with the supervisor", "By epoch", "Label noise", "L2 penalty", "Images",
                    "By seed"):
        assert f"\n## {heading}\n" in text
    for line in text.split("\n"):
        if line.startswith("!["):
            assert (tmp_path / line.split("(")[1][:-1]).read_bytes()[:4] == b"\x89PNG"
    assert "6,000 images for training, 800 for the test, 10 classes, 1,200 images apart" in text and "so few seeds" in text
    assert "the weak labels are those of seed 0" in text and "its student (probe xent, seed 0)" in text
    # the numbers are those that were given
    row = results["methods"][1]
    shown = next(line for line in text.split("\n") if line.startswith("| probe adaptconf") and "%" in line)
    assert f"{row['pgr']:.2f}"[1:] in shown and f"{row['pgr_ci'][0]:.2f}"[1:] in shown and "%" in shown
    table = pandas.read_csv(tmp_path / "table.csv")
    assert len(table) == 6 and table.loc[1, "pgr"] == row["pgr"] and table.loc[1, "pgr_lo"] == row["pgr_ci"][0]
    assert list(table.loc[table.metric == "top5", "pgr"]) == [m["top5"]["pgr"] for m in results["methods"]]
    seeds = pandas.read_csv(tmp_path / "by_seed.csv")
    assert len(seeds) == 9 and list(seeds.loc[:2, "student"]) == [r["student"] for r in results["methods"][0]["by_seed"]]
    epochs = pandas.read_csv(tmp_path / "epochs.csv")
    assert len(epochs) == 2 * 3 * 20 and epochs.iloc[-1]["accuracy"] == results["methods"][1]["epochs"]["accuracy"][2][19]
    assert len(pandas.read_csv(tmp_path / "noise.csv")) == 15 and len(pandas.read_csv(tmp_path / "l2.csv")) == 12
    assert list(pandas.read_csv(tmp_path / "images.csv")["student_p"]) == [0.97] * 7


def test_what_is_absent_is_left_out_and_an_older_reports_files_go(tmp_path):
    vision_report.write(tmp_path, made(methods=("probe xent",), n=100), drawn(2))
    results = made(methods=("probe xent",), seeds=(3,), n=100, classes=5)
    results["methods"][0] |= {"epochs": None, "agreement": None}
    for key in ("noise", "l2", "replicates"):
        del results[key]
    files = vision_report.write(tmp_path, results)
    assert {p.name for p in files} == {p.name for p in tmp_path.iterdir()} == {"report.md", "accuracy.png", "accuracy.svg", "table.csv",
                                                                              "by_seed.csv"}  # fmt: skip
    text = (tmp_path / "report.md").read_text()
    assert text.count("![") == 1 and "## By seed" not in text and "Top-5" not in text and "one seed: its luck" in text and "2000" in text


@pytest.mark.parametrize("strong, says", [(0.3, "undefined"), (0.56, "withheld|undefined")])
def test_pgr_without_a_clear_gap_is_not_quoted(strong, says, tmp_path):
    results = made(methods=("probe xent",), strong=strong, n=300)
    row = results["methods"][0]
    assert not row["gap_clear"] and row["pgr_ci"] is None
    vision_report.write(tmp_path, results)
    text = (tmp_path / "report.md").read_text()
    assert "## Read with care" in text and "probe xent, accuracy: " in text
    shown = next(line for line in text.split("\n") if line.startswith("| probe xent") and "%" in line)
    assert any(word in shown for word in says.split("|"))


def test_the_same_bytes_every_time(tmp_path):
    results = made(methods=("probe xent",), n=100)
    first = {p.name: p.read_bytes() for p in vision_report.write(tmp_path / "a", results, drawn(3))}
    assert first == {p.name: p.read_bytes() for p in vision_report.write(tmp_path / "b", results, drawn(3))}


@pytest.mark.parametrize("shape, size", [((8, 8), 192), ((28, 28), 196), ((32, 32), 192), ((64, 64), 192), ((200, 100), 200),
                                         ((224, 224), 224)])
def test_small_images_are_scaled_up_by_whole_numbers(shape, size):
    image = np.random.default_rng(0).integers(256, size=(*shape, 3), dtype=np.uint8)
    sheet = np.asarray(Image.open(io.BytesIO(gallery.draw([Picture(image, "a", "a", 1.0, "b", 0.5)]))).convert("RGB"))
    times = size // max(shape)
    block = sheet[gallery.MARGIN:gallery.MARGIN + shape[0] * times, gallery.MARGIN:gallery.MARGIN + shape[1] * times]
    assert np.array_equal(block, image.repeat(times, 0).repeat(times, 1))


@pytest.mark.parametrize("name, suffix, lines", [
    ("cat", ".91", ["cat .91"]),
    ("German short-haired pointer", ".91", ["German", "short-haired", "pointer"]),
    ("Donaudampfschifffahrt", "", ["Donaudampfsc", "hifffahrt"]),
    ("a\n b", ".50", ["a b .50"]),
])  # fmt: skip
def test_long_names_are_wrapped_and_cut_visibly(name, suffix, lines):
    found = gallery.fit(name, suffix, lambda text: len(text) <= 12)
    assert len(found) <= gallery.LINES and all(len(line) <= 12 for line in found)
    whole = " ".join(found) if " " in name.strip() or suffix else "".join(found)
    assert found == lines if len(lines) <= gallery.LINES else gallery.CUT in whole
    assert found[-1].endswith(suffix)


def test_pictures_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="25 pictures; expected 1 to 24"):
        gallery.draw(drawn(25, 8))
    with pytest.raises(ValueError, match=r"float64 \(3, 3, 3\), expected uint8"):
        gallery.draw([Picture(np.zeros((3, 3, 3)), "a", "a", 1.0, "b", 0.5)])


def real(shared) -> list[Picture]:
    """Real images with long and short names and answers."""
    rng, out = np.random.default_rng(1), []
    with tarfile.open(shared / "data" / "images" / "cifar10_sample.tar") as tar:
        members = [m for m in tar.getmembers() if m.isfile() and "/test/" in f"/{m.name}"]
        for i in rng.choice(len(members), 24, replace=False):
            image = np.asarray(Image.open(tar.extractfile(members[i])).convert("RGB"))
            true = members[i].name.split("/")[-2]
            weak, student = (true if rng.random() < p else str(rng.choice(CIFAR)) for p in (0.6, 0.8))
            out.append(Picture(image, true, weak, float(rng.random()), student, float(rng.random())))
    return out


def test_real_images(shared, tmp_path):
    pictures = real(shared)
    files = vision_report.write(tmp_path, made(n=200), pictures)
    sheet = Image.open(next(p for p in files if p.name == "images.png"))
    assert sheet.width == 2 * gallery.MARGIN + 6 * 192 + 5 * gallery.GAP and sheet.height > 4 * 192
