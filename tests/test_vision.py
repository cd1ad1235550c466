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
from test_resume import Stopped, attempt, finish, kill, start, stop_after, timeless  # noqa: F401 (start is a fixture)
from tinyvision import keys_of, published_checkpoints  # noqa: F401 (the fixture `published`)

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


@pytest.mark.slow
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


def test_status_lists_the_experiment_and_its_runs(whole, capfd):
    assert entry.main(["status", str(whole)]) == 0
    *lines, total = capfd.readouterr().out.splitlines()
    names = [Path(line.split()[1]).name for line in lines]
    assert total == "6 done" and names[0] == whole.name and len(names) == 6 and all(n.startswith("vision_train-") for n in names[1:])
    with pytest.raises(UserError, match="holds an experiment, whose networks are the runs in runs/"):
        w2s_jax.load(whole).model()
