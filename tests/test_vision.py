"""The image experiment: against the reference's steps in PyTorch, stopped anywhere and resumed, refused in one line."""

import functools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import tinyvision
import torchfiles
from pictures import encoded, pixels
from test_resume import Stopped, attempt, finish, kill, start, stop_after, timeless  # noqa: F401 (start is a fixture)

import w2s_jax
from w2s_jax import main as entry
from w2s_jax import stages, store, vision_report
from w2s_jax import vision as vision_lib
from w2s_jax.data import images as images_lib
from w2s_jax.data import labels as labels_lib
from w2s_jax.errors import UserError
from w2s_jax.models.vision.config import MEAN, STD
from w2s_jax.probes import softmax
from w2s_jax.stages import vision

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("fast_compiles")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """What a user of published checkpoints has: class folders, a .pth file with a classifier, one without; and the networks in torch."""
    from vision_reference import ResNet, randomize

    root = tmp_path_factory.mktemp("published")
    weak = randomize(ResNet((1, 1), stem=8, inner=(8, 16), expansion=1, classes=3, bottleneck=False, small=True), 1)
    strong = randomize(ResNet((1, 1), stem=8, inner=(8, 8), expansion=2, classes=0), 2)
    torchfiles.save({"state_dict": {f"module.{k}": v for k, v in weak.state_dict().items()}}, root / "weak.pth", torchfiles.ZIP)
    torchfiles.save(strong.state_dict(), root / "strong.pth", torchfiles.ZIP)
    tinyvision.write_images(root / "data", per_class=20)
    return {"root": root, "weak": weak, "strong": strong}


def keys_of(published, **keys) -> dict:
    root = published["root"]
    return {"weak_model": str(root / "weak.pth"), "strong_model": str(root / "strong.pth"), "dataset": str(root / "data"), "n_train": 40,
            "n_test": 0, "n_weak": 0, "epochs": 3, "batch_size": 16, "seeds": (0, 3), "learning_rate": 0.02, "data_seed": 5} | keys


def run(folder, **keys):
    stages.run(tinyvision.vision(**keys), str(folder))
    return w2s_jax.load(folder)


def as_torch_sees(published, network, rows) -> np.ndarray:
    images = images_lib.open_images(str(published["root"] / "data"))
    x = images_lib.Loader(images, images_lib.Transform(0, 0, "bilinear")).pixels(rows) / np.float32(255)
    x = torch.tensor(((x - np.float32(MEAN)) / np.float32(STD)).transpose(0, 3, 1, 2))
    with torch.no_grad():
        return (network(x) if network is published["weak"] else network.embed(x)).numpy()


def in_torch(x, y, x_test, seed: int, classes: int, epochs: int, batch: int, rate: float):
    """The reference's train_logreg, from our first weights in our order: predictions of the test rows after every epoch."""
    lane = softmax.Lane("y", seed, softmax.losses.make("xent", ground_truth=False))
    first = softmax.Training(x, {"y": y}, [lane], epochs=epochs, batch_size=batch).state()["params"]
    x, x_test, y = torch.tensor(x), torch.tensor(x_test), torch.tensor(y)
    model = torch.nn.Linear(x.shape[1], classes)
    with torch.no_grad():
        model.weight.copy_(torch.tensor(first["weights"][0]))
        model.bias.copy_(torch.tensor(first["bias"][0]))
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * -(-len(x) // batch))
    found = []
    for epoch in range(epochs):
        order = torch.tensor(np.random.default_rng([seed, softmax._ORDER, epoch]).permutation(len(x)))
        for rows in order.split(batch):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
        found.append(model(x_test).detach().numpy())
    return np.stack(found)


def test_the_references_experiment(published, tmp_path):
    """Labels, features, split and probes, each computed once more in PyTorch, with one pass for each model."""
    passes = []
    with pytest.MonkeyPatch.context() as patch:
        real = store._Pass.run
        patch.setattr(store._Pass, "run", lambda self: passes.append((self.source.reading, len(self.source.rows))) or real(self))
        opened, really = [], vision_lib.open_model
        patch.setattr(vision_lib, "open_model", lambda *args, **more: opened.append(args[0]) or really(*args, **more))
        found = run(tmp_path / "run", **keys_of(published, features=str(tmp_path / "shared")))
        assert passes == [("logits", 60), ("features", 60)] and len(opened) == 2
        # Another experiment on the same features: no pass, no model.
        other = run(tmp_path / "other", **keys_of(published, features=str(tmp_path / "shared"), n_train=30, n_test=20, noise=(0.5,)))
        assert len(passes) == 2 and len(opened) == 2 and other.results["n_test"] == 20

    images = images_lib.open_images(str(published["root"] / "data"))
    order = np.arange(60)
    np.random.default_rng(5).shuffle(order)
    train, test = order[:40], order[40:]
    logits, logits_test = (as_torch_sees(published, published["weak"], rows) for rows in (train, test))
    x, x_test = (as_torch_sees(published, published["strong"], rows) for rows in (train, test))
    file = labels_lib.read(tmp_path / "run/labels/weak-s0.parquet")
    assert file.ids == [images.ids[r] for r in train]
    probs = torch.softmax(torch.tensor(logits), -1).numpy()
    np.testing.assert_allclose(file.probs, probs, atol=1e-4)

    y, y_test, weak_test = images.labels[train].astype(np.int64), images.labels[test], logits_test.argmax(1)
    results = found.results
    assert results["weak"]["accuracy"] == np.mean(weak_test == y_test) and results["n_train"] == 40 and results["n_test"] == 20
    assert results["weak_train_accuracy"] == pytest.approx(np.mean(logits.argmax(1) == y))
    method, = results["methods"]
    for place, seed in enumerate((0, 3)):
        settings = {"seed": seed, "classes": 3, "epochs": 3, "batch": 16, "rate": 0.02}
        student, ceiling = in_torch(x, probs, x_test, **settings), in_torch(x, y, x_test, **settings)
        for name, wanted in (("probe_xent", student), ("probe_truth", ceiling)):
            table = found.predictions(f"{name}-s{seed}")
            assert table["id"].tolist() == [images.ids[r] for r in test] and table["label"].tolist() == y_test.tolist()
            np.testing.assert_allclose(np.stack(table["logits"].to_list()), wanted[-1], atol=2e-3)
        curves = {"accuracy": (student.argmax(-1), y_test), "ceiling": (ceiling.argmax(-1), y_test),
                  "agreement": (student.argmax(-1), weak_test)}
        for key, (predicted, wanted) in curves.items():
            assert method["epochs"][key][place] == pytest.approx([np.mean(p == wanted) for p in predicted])
        assert method["by_seed"][place]["student"] == pytest.approx(np.mean(student[-1].argmax(-1) == y_test))
        assert method["by_seed"][place]["ceiling"] == pytest.approx(np.mean(ceiling[-1].argmax(-1) == y_test))
    assert other.results["noise"][0]["level"] == 0.5 and 0.3 < other.results["noise"][0]["label_accuracy"] < 0.7


def test_a_damaged_store_is_named(published, tmp_path):
    keys = keys_of(published, features=str(tmp_path / "shared"), pictures=0, epochs=1)
    run(tmp_path / "run", **keys)
    file, = tmp_path.glob("shared/*features*/*/layer-000.npy")
    np.save(file, np.zeros((3, 16), np.float32))
    with pytest.raises(UserError, match=r"layer-000.npy: is float32 \[3, 16\], expected float32 \[60, 16\]; delete .* and run again"):
        run(tmp_path / "other", **keys | {"seeds": (1,)})
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="layer-000.npy: is damaged"):
        run(tmp_path / "other", **keys | {"seeds": (1,)})


def test_labels_are_for_any_run_of_vision_train(published, tmp_path):
    run(tmp_path / "run", **keys_of(published, pictures=0, predictions=False))
    assert not (tmp_path / "run/predictions").exists() and not list(tmp_path.glob("run/report/images*"))
    student = tinyvision.train(dataset=str(published["root"] / "data"), n_train=40, n_test=0, data_seed=5,
                               labels=str(tmp_path / "run/labels/weak-s0.parquet"))
    assert stages.run(student, str(tmp_path / "student"))["n_train"] == 40


# --------------------------------------------------------------------------- stopped, resumed, redone, refused

SMALL = {"losses": ("xent", "logconf"), "noise": (0.3,), "l2": (1e-1, 1e-2), "finetune": True, "weak_train__checkpoint_every": 1,
         "strong_train__checkpoint_every": 2, "student_train__checkpoint_every": 3, "weak_train__steps_per_dispatch": 1,
         "strong_train__steps_per_dispatch": 2, "student_train__steps_per_dispatch": 3, "eval_batch_size": 16}


def same_experiment(a: Path, b: Path) -> None:
    one, two = (timeless(json.loads((root / "results.json").read_text())) for root in (a, b))
    assert one == two
    names = [{name for f in root.rglob("*") if f.is_file() and not re.search(r"checkpoints|/\.|^\.", name := str(f.relative_to(root)))}
             for root in (a, b)]
    assert names[0] == names[1]
    for name in names[0]:
        if name.endswith(".parquet"):
            assert pq.read_table(a / name).equals(pq.read_table(b / name)), name
        elif name.endswith("results.json"):
            assert timeless(json.loads((a / name).read_text())) == timeless(json.loads((b / name).read_text())), name
        elif name.endswith((".csv", ".md", ".npy", ".safetensors")):
            assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Directory of the experiment SMALL, never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        tiny.fast_compiles(monkeypatch)
        run(folder, **SMALL)
    return folder


def stop_at_batch(monkeypatch, batch: int) -> None:
    """The next pass over the images is stopped when it has noted that so many batches are done."""
    real = store.write_json

    def call(path, value):
        real(path, value)
        if path.name == store.PROGRESS and value["batches"] == batch:
            raise Stopped
    monkeypatch.setattr(store, "SECONDS", 0.0)
    monkeypatch.setattr(store, "write_json", call)


def stop_at_epoch(monkeypatch, epoch: int) -> None:
    real = softmax.Training.run_epoch

    def call(self, bar=None):
        if self.done == epoch:
            raise Stopped
        return real(self, bar)
    monkeypatch.setattr(vision, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(softmax.Training, "run_epoch", call)


def stop_before(monkeypatch, place, name) -> None:
    def call(*args, **more):
        raise Stopped
    monkeypatch.setattr(place, name, call)


TURNS = {  # in the order of a run; what the next attempt says
    "weak network": (lambda m: stop_after(m, 2), ""),
    "strong network": (lambda m: stop_after(m, 4), "train xent: resumed at step 2 of 3"),
    "labels' pass": (lambda m: stop_at_batch(m, 2), "train contrastive: resumed at step"),
    "features' pass": (lambda m: stop_at_batch(m, 5), ""),
    "probes": (lambda m: stop_at_epoch(m, 2), ""),
    "students": (lambda m: stop_after(m, 5), "probes: resumed after 2 of 3 epochs"),
    "report": (lambda m: stop_before(m, vision_report, "write"), "resumed at step"),
}  # fmt: skip


def test_stopped_at_every_turn(whole, tmp_path, monkeypatch, capfd):
    for turn, (stop, _) in TURNS.items():
        with monkeypatch.context() as patch:
            stop(patch)
            with pytest.raises(Stopped):
                run(tmp_path / "run", **SMALL)
        assert not (tmp_path / "run/results.json").exists(), turn
    run(tmp_path / "run", **SMALL)
    said = capfd.readouterr().err
    for turn, (_, line) in TURNS.items():
        assert line in said, turn
    same_experiment(whole, tmp_path / "run")
    assert not list((tmp_path / "run/checkpoints").glob("*"))


@pytest.mark.slow
def test_killed_at_every_turn(start, tmp_path):  # noqa: F811
    """SIGKILL, in processes of their own."""
    less = {"losses": ("xent",), "noise": (), "l2": (), "pictures": 0}
    small = {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in tinyvision.vision_keys(**SMALL | less).items()}
    argv, at = ["--config=vision", *tiny.flags(**small)], tmp_path / "run"
    hurried = functools.partial(start, target=attempt_in_haste)
    finish(hurried, [*argv, f"--workdir={tmp_path / 'whole'}"], tmp_path / "log")
    found = lambda pattern: lambda: any(at.glob(pattern))  # noqa: E731
    kills = []
    for pattern in ("runs/*weak*/checkpoints/1", "features/*features*/*/*.npy", "checkpoints/1", "runs/*student*/checkpoints/3"):
        if kill(hurried, [*argv, f"--workdir={at}"], tmp_path / "log", found(pattern)):
            kills.append(pattern)
    assert len(kills) >= 3, kills
    finish(hurried, [*argv, f"--workdir={at}"], tmp_path / "log")
    same_experiment(tmp_path / "whole", at)


def attempt_in_haste(argv, log) -> None:
    """A process's life in which everything is saved at once."""
    vision.SAVE_SECONDS, store.SECONDS = -1.0, 0.0
    attempt(argv, log)


def test_done_redone_and_another(whole, tmp_path, capfd):
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    before = json.loads((folder / "results.json").read_text())
    capfd.readouterr()
    execution = {"mesh__fsdp": 2, "eval_batch_size": 7, "workers": 1, "features": str(tmp_path / "elsewhere"), "pictures": 9,
                 "predictions": False, "bad_images": "skip", "weak_train__log_every": 5, "student_train__keep": "none"}
    assert stages.run(tinyvision.vision(**SMALL | execution), str(folder)) == before
    assert capfd.readouterr().err.startswith(f"{tmp_path.name}/run: done already (weak 0.")
    assert not (tmp_path / "elsewhere").exists()
    for key, value in {"resize": 6, "crop": 6, "seeds": (0, 1), "losses": ("xent",), "loss_args__aux_coef": 0.25, "noise": (0.4,),
                       "l2": (1e-1,), "epochs": 4, "weak_train__epochs": 2.0, "student_train__learning_rate": 1e-3, "n_test": 39,
                       "strong_train__contrast__temperature": 0.3, "matmul_precision": "highest"}.items():
        name = {"loss_args__aux_coef": "loss_args.logconf.aux_coef"}.get(key, key.replace("__", "."))
        with pytest.raises(UserError, match=rf"holds another run, which differs in .*{re.escape(name)}: "):
            run(folder, **SMALL | {key: value})
    same = {"loss_args__radius": 0.4, "losses": ("xent", "logconf", "window")}  # an argument that no loss of before takes
    with pytest.raises(UserError, match=r"differs in loss_args.window: null -> \{\"radius\": 0.4\}; losses: "):
        run(folder, **SMALL | same)
    # Redone: all that lies in the directory, with the networks.
    times = {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.name in ("results.json", "index.json", "weak-s0.parquet", "report.md")}
    assert len(times) == 6 + 2 + 2 + 1  # results of the experiment and of five runs, two passes, labels and predictions, the report
    stages.run(tinyvision.vision(**SMALL), str(folder), rerun=True)
    assert all(f.stat().st_mtime_ns > then for f, then in times.items()), [f for f, t in times.items() if f.stat().st_mtime_ns == t]
    same_experiment(whole, folder)


def test_keys_of_networks_that_are_not_trained_do_not_count(published):
    one, two = (stages.identity(tinyvision.vision(**keys_of(published, **more))) for more in
                ({}, {"weak_train__epochs": 9.0, "strong_train__seed": 4, "student_train__learning_rate": 1.0, "loss_args__radius": 0.3}))
    assert one == two and one["weak_train"] is None and one["loss_args"] == {"xent": {}}
    assert stages.identity(tinyvision.vision(**keys_of(published, finetune=True))) != one


# --------------------------------------------------------------------------- images that cannot be decoded


@pytest.mark.parametrize("stopped", [0, 3])
def test_images_that_cannot_be_decoded(stopped, published, tmp_path, monkeypatch, capfd):
    """Left out, counted and named, with their copies; also where the pass that met them was killed and goes on."""
    data = Path(shutil.copytree(published["root"] / "data", tmp_path / "data"))
    keys = keys_of(published, dataset=str(data), eval_batch_size=8, seeds=(0,))
    prepared = images_lib.prepare(tinyvision.vision(**keys))
    bad = [prepared.images.ids[r] for r in (prepared.split.train[1], prepared.split.train[20], prepared.split.test[2])]
    content = (data / bad[0]).read_bytes()[:80]
    for name in bad:
        (data / name).write_bytes(content)
    with pytest.raises(UserError, match=r"data: .*\.png: .*bad_images=skip leaves such images out"):
        run(tmp_path / "run", **keys)
    assert w2s_jax.runlog.state(tmp_path / "run") == "failed"
    if stopped:
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stop_at_batch(patch, stopped)
            run(tmp_path / "run", **keys, bad_images="skip")
    capfd.readouterr()
    found = run(tmp_path / "run", **keys, bad_images="skip")
    assert found.results["undecodable"] == 3 and {name for name, _ in found.results["undecodable_named"]} == set(bad)
    assert (found.results["n_train"] + found.results["n_test"]) == 57
    said = capfd.readouterr().err
    assert "3 of 60 images cannot be decoded and are left out, the first" in said and "document" not in said
    assert not set(bad) & set(found.predictions("weak-s0")["id"])
    assert not set(bad) & set(labels_lib.read(tmp_path / "run/labels/weak-s0.parquet").ids)


def test_networks_are_trained_on_what_can_be_decoded(tmp_path):
    data = tinyvision.write_images(tmp_path / "data", **{"red/none.png": b"nothing"})
    keys = {"dataset": str(data), "n_weak": 12, "n_train": 15, "n_test": 10, "pictures": 0}
    with pytest.raises(UserError, match="red/none.png: no image; bad_images=skip"):
        run(tmp_path / "run", **keys)
    assert not (tmp_path / "run").exists(), "it was known before anything was written"
    found = run(tmp_path / "run", **keys, bad_images="skip")
    assert found.results["undecodable_named"] == [["red/none.png", "no image"]]
    assert sum(found.results[f"n_{part}"] for part in ("weak", "train", "test")) == 36
    assert stages.run(tinyvision.vision(**keys, bad_images="skip"), str(tmp_path / "run")) == found.results


# --------------------------------------------------------------------------- the command line


def unexpected(root) -> str:
    torchfiles.save({"features.0.weight": torch.zeros(4, 3, 11, 11), "other": torch.zeros(2)}, root / "odd.pth", torchfiles.ZIP)
    return str(root / "odd.pth")


def surplus(root) -> str:
    from vision_reference import ResNet, randomize

    state = randomize(ResNet((1, 1), stem=8, inner=(8, 8), expansion=2, classes=0), 2).state_dict()
    torchfiles.save(dict(state) | {"layer1.0.extra": torch.zeros(2)}, root / "surplus.pth", torchfiles.ZIP)
    return str(root / "surplus.pth")


NEW = {"weak_model": "", "n_weak": 12, "n_train": 30}
WRONG = {  # keys beside those of `published`; parts of the line. A callable makes a file in the case's folder.
    "unknown loss": ({"losses": "xent,logcnf"}, "config.losses: 'logcnf'", "did you mean 'logconf'"),
    "loss of two classes": ({"losses": "logconf_eleuther"}, "config.losses: 'logconf_eleuther'", "data has 3"),
    "loss twice": ({"losses": "xent,xent"}, "config.losses", "names one twice"),
    "penalties that rise": ({"l2": "1e-3,1e-2"}, "config.l2: (0.001, 0.01)", "largest to the smallest"),
    "noise of 1": ({"noise": "0.2,1.0"}, "config.noise: 1.0", "above 0 and below 1"),
    "no seeds": ({"seeds": "()"}, "config.seeds: is empty"),
    "misspelt published name": ({"strong_model": "dino_resnet5"}, "config.strong_model", "did you mean 'dino_resnet50'"),
    "no such file": ({"strong_model": "/nowhere/strong.pth"}, "config.strong_model: '/nowhere/strong.pth', no such folder"),
    "hub id that cannot be had": ({"weak_model": "facebok/vit"}, "facebok/vit", "hub"),
    "unknown data set": ({"dataset": "imagnet"}, "imagnet"),
    "missing data_dir": ({"dataset": "imagenet"}, "data_dir=''", "ILSVRC2012_img_val.tar"),
    "data_dir without its files": ({"dataset": "imagenet", "data_dir": "/nowhere"}, "data_dir='/nowhere'"),
    "too many images": ({"n_train": 61}, "n_train=61", "has 60 images"),
    "both sides open": ({"n_train": 0}, "one of n_train and n_test may be 0"),
    "wrong class": ({"classes": "blue,green,rot"}, "classes", "red"),
    "classes that the model does not know": (
        {"classes": "blue,green,red,white"}, "config.weak_model", "gives 3 classes, the images have 4"),
    "supervisor without a classifier": (lambda root, own: {"weak_model": own["strong_model"]}, "config.weak_model", "has no classifier"),
    "strong file of something else": (lambda root, own: {"strong_model": unexpected(root)}, "odd.pth", "not a published"),
    "strong file with a surplus tensor": (lambda root, own: {"strong_model": surplus(root)}, "surplus.pth", "1 that nothing takes"),
    "images set apart for nobody": ({"weak_model": ""}, "config.n_weak: 0", "weak_train"),
    "model of a network": ({**NEW, "weak_train.model": "x"}, "config.weak_train.model: 'x'", "expected one of alexnet"),
    "model of a student": ({"finetune": True, "student_train.model": "x"}, "config.student_train.model: 'x' is set", "the experiment sets"),
    "data of a network": ({**NEW, "weak_train.n_train": 5}, "config.weak_train.n_train: 5 is set", "config.n_train of the experiment"),
    "loss of a student": ({"finetune": True, "student_train.loss": "logconf"}, "config.student_train.loss: 'logconf'"),
    "part of a student": ({"finetune": True, "student_train.split": "both"}, "config.student_train.split: 'both'", "expected train"),
    "supervisor without labels": ({**NEW, "weak_train.objective": "contrastive"}, "config.weak_train.objective", "supervised"),
    "wrong key of a network": ({**NEW, "weak_train.dropout": 2}, "config.weak_train.dropout: 2.0", "below 1"),
    "patch larger than the image": (
        {**NEW, "weak_train.batch_size": 8, "weak_train.arch.patch": 9}, "config.weak_train.arch.patch: 9", "8 x 8 pixels"),
    "batch larger than the part": ({**NEW, "weak_train.batch_size": 64}, "config.weak_train.batch_size=64", "12 training images"),
    "warm-up longer than the run": (
        {"strong_model": "", "strong_train.warmup_steps": 900}, "config.strong_train.warmup_steps=900", "fewer than the run's"),
    "dropout where there is none": ({"finetune": True, "student_train.dropout": 0.1}, "dropout=0.1", "have none"),
    "mesh that does not fit": ({"mesh.data": 3, "mesh.fsdp": 5}, "mesh", "'fsdp': 5", "8 devices"),
    "features that are a file": (lambda root, own: {"features": own["weak_model"]}, "config.features", "is a file"),
}  # fmt: skip
LATE = re.compile("hub|classifier|strong file|model does not|patch|batch|warm-up|where there|mesh")  # those need a model, or devices


def tree(folder: Path) -> dict:
    return {str(path): path.read_bytes() if path.is_file() else "" for path in folder.rglob("*")}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_gets_one_line_and_leaves_nothing(name, published, tmp_path, capfd, monkeypatch):
    change, *expected = WRONG[name]
    own = keys_of(published, seeds="0", **{"resize": 0, "crop": 0})
    change = change(tmp_path, own) if callable(change) else change
    argv = ["--config=vision", *(f"--config.{key}={value}" for key, value in {**own, **change}.items()), f"--workdir={tmp_path / 'run'}"]
    devices, setup = [], entry.setup_devices
    monkeypatch.setattr(entry, "setup_devices", lambda *args: devices.append(1) or setup(*args))
    before = tree(tmp_path)
    capfd.readouterr()
    assert entry.main(argv) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    assert all(part in err for part in expected), err
    assert "document" not in err and tree(tmp_path) == before
    assert not devices or LATE.search(name), "jax was set up before the answer"


TRAIN = {
    "unknown loss": ({"loss": "logcnf"}, "config.loss: 'logcnf'"),
    "loss of two classes": ({"loss": "logconf_eleuther"}, "config.loss: 'logconf_eleuther'", "digits has 10"),
    "part that is empty": ({"split": "weak"}, "split=weak: has no images", "config.n_weak"),
    "labels without use": ({"objective": "contrastive", "labels": "/nowhere.parquet"}, "config.labels"),
    "labels that are not there": ({"labels": "/nowhere.parquet"}, "config.labels: '/nowhere.parquet', no such file"),
    "head without use": ({"objective": "contrastive", "train": "head"}, "config.train: 'head'", "expected 'full'"),
    "dropout without use": ({"objective": "contrastive", "dropout": 0.1}, "config.dropout: 0.1"),
    "nothing to tell apart": ({"objective": "contrastive", "batch_size": 1}, "config.batch_size: 1"),
    "adapters": ({"train": "lora"}, "config.train: 'lora'", "full, head"),
    "patch larger than the image": ({"arch.patch": 16}, "config.arch.patch: 16", "at most 8"),
    "heads that do not divide": ({"arch.heads": 3}, "config.arch.heads: 3"),
    "batch larger than the part": ({"batch_size": 999}, "batch_size=999", "64 training images"),
    "mesh that does not fit": ({"mesh.data": 3, "mesh.fsdp": 5}, "mesh", "'fsdp': 5", "8 devices"),
    "images of another shape": (lambda root: odd(root, "blue/!.png"), "config.crop: 0", "12 x 8 pixels", "squares"),
    "one image of another shape": (lambda root: odd(root, "red/~.png"), "red/~.png: 12 x 8 pixels", "8 x 8", "crop=PIXELS"),
    "image smaller than the model's patch": (
        lambda root: {"model": str(tinyvision.write_model(root / "model")), "crop": 2, "resize": 2}, "2 x 2 pixels", "patch of 4"),
}  # fmt: skip


def odd(root, name: str) -> dict:
    """Images of which one is no square."""
    content = encoded(pixels(1, height=8, width=12))
    return {"dataset": str(tinyvision.write_images(root / "data", **{name: content})), "n_train": 20, "n_test": 0}


@pytest.mark.parametrize("name", TRAIN)
def test_what_is_wrong_with_a_training(name, tmp_path, capfd):
    change, *expected = TRAIN[name]
    change = change(tmp_path) if callable(change) else change
    keys = {key.replace("__", "."): value for key, value in (tinyvision.DATA | tinyvision.NETWORK).items()}
    argv = ["--config=vision_train", *(f"--config.{k}={v}" for k, v in {**keys, **change}.items()), f"--workdir={tmp_path / 'run'}"]
    before = tree(tmp_path)
    capfd.readouterr()
    assert entry.main(argv) == 2
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if "classification head" not in line]
    assert out == "" and len(lines) == 1 and lines[0].startswith("error: ") and all(part in err for part in expected), err
    assert "document" not in err and tree(tmp_path) == before


def test_the_answer_comes_before_jax(cli, tmp_path):
    for module in ("jax", "jaxlib", "flax", "transformers", "datasets", "torch"):
        (tmp_path / "poison" / f"{module}.py").parent.mkdir(exist_ok=True)
        (tmp_path / "poison" / f"{module}.py").write_text(f"import os\nprint('{module} was imported', flush=True)\nos._exit(1)\n")
    root = Path(__file__).resolve().parents[1]
    for argv, part in ((["vision", "--config.losses=xnt"], "'xnt'"), (["vision_train", "--config.n_train=2000"], "n_train=2000"),
                       (["vision:quick", "--config.weak_train.arch.heads=3"], "config.weak_train.arch.heads: 3")):
        argv = ["--config", *argv]
        done = cli(*argv, f"--workdir={tmp_path / 'run'}", PYTHONPATH=f"{tmp_path / 'poison'}:{root}")
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1 and part in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def test_status_lists_the_experiment_and_its_runs(whole, capfd):
    assert entry.main(["status", str(whole)]) == 0
    *lines, total = capfd.readouterr().out.splitlines()
    names = [Path(line.split()[1]).name for line in lines]
    assert total == "6 done" and names[0] == whole.name and len(names) == 6 and all(n.startswith("vision_train-") for n in names[1:])
    with pytest.raises(UserError, match="holds an experiment, whose networks are the runs in runs/"):
        w2s_jax.load(whole).model()


def test_help(capfd):
    assert entry.main(["--config=vision", "--help"]) == 0
    said = capfd.readouterr().out
    assert re.search(r"--config.losses=xent +of students, by name", said) and "\n  weak_train: Optimisation\n" in said
    assert "--config.weak_train.epochs=" in said and "--config.weak_train.dataset" not in said and "--config.student_train.arch" not in said
    for network in ("weak_train", "strong_train", "student_train"):
        first, *others = re.findall(rf"\n  ({network}(?:: \w+)?)\n", said)
        assert first in (network, f"{network}: Model") and f"{network}: Optimisation" in others
    assert entry.main(["--config=vision_train", "--help"]) == 0
    assert "--config.arch.width=64" in capfd.readouterr().out


def test_runlocal(tmp_path, capfd):
    assert entry.main(["--config=vision:runlocal", f"--workdir={tmp_path / 'run'}", "--config.mesh.data=1"]) == 0
    said = capfd.readouterr().err
    assert "document" not in said and "128 to test on" in said and "logits 384/384" in said and "features 384/384" in said
    assert said.splitlines()[-1].startswith("the test set is small: 128 images") or "report in" in said.splitlines()[-1]
    assert "document" not in (tmp_path / "run/report/report.md").read_text()
