"""Training image models: against PyTorch, on any devices, killed and resumed, with labels of others."""

import json
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import tinyvision
from test_resume import finish, kill, moments, same_run, start, stopped_at, timeless  # noqa: F401 (start is a fixture)

import w2s_jax
from w2s_jax import main as entry
from w2s_jax import mesh as mesh_lib
from w2s_jax import optimizers, runlog, stages
from w2s_jax import vision as vision_lib
from w2s_jax.data import images as images_lib
from w2s_jax.data import packing
from w2s_jax.errors import UserError
from w2s_jax.models.vision.config import MEAN, STD

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.usefixtures("fast_compiles"), pytest.mark.slow]
STEPS = 8


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    root = tmp_path_factory.mktemp("backbones")
    return {kind: tinyvision.write_model(root / kind, kind) for kind in ("vit", "resnet")}


SGD = {"optimizer": "sgd", "optimizer_args__momentum": 0.9, "learning_rate": 0.05}  # Adam makes much of gradients that are next to 0


def run(folder, **keys) -> runlog.LoadedRun:
    stages.run(tinyvision.train(**keys), str(folder))
    return w2s_jax.load(folder)


def logits(found, split="test") -> np.ndarray:
    return np.stack(found.predictions(split).logits.to_list())


def pixels(config, rows) -> np.ndarray:
    """float32 [images, 3, height, width], normalised, as torch takes them."""
    prepared = images_lib.prepare(config)
    seen = images_lib.Loader(prepared.images, images_lib.Transform(0, 0, "bilinear")).pixels(rows) / np.float32(255)
    return ((seen - np.float32(MEAN)) / np.float32(STD)).transpose(0, 3, 1, 2)


def in_torch(config, kind: str, model: Path, head_only: bool = False, soft: np.ndarray | None = None):
    """A plain fine-tuning loop from the same weights in the same order: losses by step, test logits."""
    network = tinyvision.hf_model(kind, classes=10)
    inner = getattr(network, kind)
    inner.load_state_dict(tinyvision.hf_model(kind).state_dict())
    head = network.classifier if kind == "vit" else network.classifier[-1]
    for part in head.parameters():
        torch.nn.init.zeros_(part)
    network.eval()  # running statistics stay
    prepared = images_lib.prepare(config)
    rows, test = prepared.split.train, prepared.split.test
    x, y = torch.tensor(pixels(config, rows)), torch.tensor(prepared.images.labels[rows]).long() if soft is None else torch.tensor(soft)
    batches = packing.batch_stream(len(rows), config.batch_size, config.epochs, config.shuffle, config.seed)
    rates = optimizers.learning_rates(config.schedule, config.learning_rate, len(batches), config.warmup_steps)
    adam, losses = torch.optim.Adam(head.parameters() if head_only else network.parameters()), []
    for batch, rate in zip(batches, rates):
        adam.param_groups[0]["lr"] = rate
        loss = torch.nn.functional.cross_entropy(network(x[batch]).logits, y[batch])
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    with torch.no_grad():
        return losses, network(torch.tensor(pixels(config, test))).logits.numpy()


# --------------------------------------------------------------------------- against PyTorch


@pytest.mark.parametrize("kind, train", [("vit", "full"), ("resnet", "full"), ("resnet", "head")])
def test_fine_tuning_is_pytorchs(kind, train, backbones, tmp_path):
    config = tinyvision.train(model=str(backbones[kind]), train=train, learning_rate=3e-3, warmup_steps=2)
    stages.run(config, str(tmp_path / "run"))
    found = w2s_jax.load(tmp_path / "run")
    losses, wanted = in_torch(config, kind, backbones[kind], train == "head")
    assert len(losses) == STEPS and max(losses) - min(losses) > 1e-2
    np.testing.assert_allclose([row["loss"] for row in found.metrics], losses, atol=1e-4)
    np.testing.assert_allclose(logits(found), wanted, atol=1e-4)
    assert [row["step"] for row in found.metrics] == list(range(STEPS)) and "images_per_second" in found.metrics[0]

    loaded = found.model()  # what the run says of itself, by way of its checkpoint, and of the folder that it wrote
    rows = images_lib.prepare(config).split.test
    batch = {"images": (pixels_of(config, rows))[None], "documents": np.arange(len(rows), dtype=np.int32)[None]}
    np.testing.assert_allclose(np.asarray(loaded.model.apply(loaded.params, batch))[0], logits(found), atol=1e-5)
    assert loaded.step == STEPS
    if kind == "vit":
        from transformers import AutoModelForImageClassification

        again = AutoModelForImageClassification.from_pretrained(tmp_path / "run/model").eval()
        with torch.no_grad():
            np.testing.assert_allclose(again(torch.tensor(pixels(config, rows))).logits.numpy(), logits(found), atol=1e-4)
        assert again.config.id2label == {i: str(i) for i in range(10)} and found.results["saved"] == "model"


def pixels_of(config, rows) -> np.ndarray:
    return images_lib.Loader(images_lib.prepare(config).images, images_lib.Transform(0, 0, "bilinear")).pixels(rows)


@pytest.mark.parametrize("train", ["full", "head"])
def test_what_is_trained_of_a_resnet(train, backbones, tmp_path):
    """Running statistics stay bit for bit; scales and biases move, or the head alone."""
    config = tinyvision.train(model=str(backbones["resnet"]), train=train, epochs=1.0, learning_rate=1e-2)
    before = vision_lib.open_model(config.model, "main", config, head="new", classes=10).params
    stages.run(config, str(tmp_path / "run"))
    after = w2s_jax.load(tmp_path / "run").model().params
    moved = {}
    for path, leaf in mesh_lib.paths(before):
        node = after
        for part in path.split("/"):
            node = node[part]
        moved[path] = not np.array_equal(leaf, node)
    assert not any(moved[path] for path in moved if path.endswith(("/mean", "/variance")))
    assert sum(path.endswith(("/mean", "/variance")) for path in moved) >= 10
    others = [path for path in moved if not path.endswith(("/mean", "/variance"))]
    assert all(moved[path] == (train == "full" or path.startswith("head/")) for path in others), moved
    if train == "head":
        saved = tmp_path / "run/checkpoints" / str(STEPS) / "params"
        assert sum(f.stat().st_size for f in saved.rglob("*") if f.is_file()) < 20_000, "the backbone was saved, too"


# --------------------------------------------------------------------------- devices


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        tiny.fast_compiles(monkeypatch)
        return run(tmp_path_factory.mktemp("one") / "run", **AUGMENTED)


AUGMENTED = {"loss": "logconf", "augment__shift": 0.2, "augment__rotate": 10.0, "augment__noise": 0.05, "batch_size": 10, "epochs": 1.0,
             "dropout": 0.1, "steps_per_dispatch": 2} | SGD


@pytest.mark.parametrize("keys", [
    {"mesh__data": 2, "mesh__fsdp": 2, "mesh__model": 2}, {"mesh__data": 8}, {"microbatch_size": 3}, {"steps_per_dispatch": 6},
    {"mesh__data": 2, "mesh__fsdp": 4, "microbatch_size": 4, "eval_batch_size": 16, "eval_every": 2, "workers": 2},
], ids=str)
def test_execution_does_not_change_the_results(keys, one_device, tmp_path):
    """With a loss of the whole batch, augmentation and dropout, and a batch that no number of cells divides."""
    found = run(tmp_path, **AUGMENTED | keys)
    assert found.record["identity"] == one_device.record["identity"]
    for key in ("loss", "train_accuracy", "lr"):
        np.testing.assert_allclose([row[key] for row in found.metrics], [row[key] for row in one_device.metrics], atol=1e-5)
    np.testing.assert_allclose(logits(found), logits(one_device), atol=1e-5)
    assert ("test_accuracy" in found.metrics[2]) == ("eval_every" in keys)


# --------------------------------------------------------------------------- labels of others


def write_labels(path, config, weights=None, classes: int = 10) -> Path:
    """A label file of the train part; its rows in another order than the images'."""
    prepared = images_lib.prepare(config)
    rows = prepared.split.train
    probs = np.random.default_rng(0).dirichlet(np.full(classes, 0.3), len(rows)).astype(np.float32)
    table = {"id": [prepared.images.ids[r] for r in rows], "probs": list(probs)}
    if weights is not None:
        table["weight"] = np.asarray(weights, np.float32)
    table = pa.table(table)
    pq.write_table(table.take(np.arange(len(rows))[::-1]), path)
    return path


def test_soft_labels_are_trained_on(backbones, tmp_path):
    config = tinyvision.train(model=str(backbones["vit"]), learning_rate=3e-3)
    labels = write_labels(tmp_path / "soft.parquet", config)
    config = tiny.set_keys(config, labels=str(labels))
    stages.run(config, str(tmp_path / "run"))
    soft = np.stack(pq.read_table(labels)["probs"].to_pylist()[::-1]).astype(np.float32)
    losses, wanted = in_torch(config, "vit", backbones["vit"], soft=soft)
    found = w2s_jax.load(tmp_path / "run")
    np.testing.assert_allclose([row["loss"] for row in found.metrics], losses, atol=1e-4)
    np.testing.assert_allclose(logits(found), wanted, atol=1e-4)
    truth = images_lib.prepare(config)
    assert found.predictions("test").label.tolist() == truth.images.labels[truth.split.test].tolist()


def test_weights_of_labels_count(tmp_path):
    """Equal weights are none; an image of weight 0 is not there; others weigh its gradient."""
    keys = {"shuffle": "none", "batch_size": 32, "epochs": 1.0}
    given = {"none": None, "equal": [2.5] * 64, "some": [0, 1] * 32, "uneven": [1, 3] * 32}
    found = {name: run(tmp_path / name, labels=str(write_labels(tmp_path / f"{name}.parquet", tinyvision.train(), weights)), **keys)
             for name, weights in given.items()}
    np.testing.assert_array_equal(logits(found["none"]), logits(found["equal"]))
    assert found["some"].results["n_train"] == 32 and found["some"].results["n_dropped"]["filtered"] == 32
    assert found["none"].results["steps"] == 2 and found["some"].results["steps"] == 1
    assert np.abs(logits(found["uneven"]) - logits(found["none"])).max() > 1e-5
    assert found["uneven"].metrics[0]["loss"] == pytest.approx(np.log(10), abs=1e-5)  # weights are divided by their mean


@pytest.mark.parametrize("change, message", [
    ({"classes": 9}, r"soft.parquet has 9 classes, expected 10"),
    ({"n_train": 63}, r"1 of 64 images have no label, the first .*\(dataset, data_seed, split, n_weak and n_train must be those"),
    ({"weights": [0.0] * 64}, "every row has weight 0"),
])
def test_labels_that_do_not_fit(change, message, tmp_path):
    made = tinyvision.train(**{k: v for k, v in change.items() if k == "n_train"})
    labels = write_labels(tmp_path / "soft.parquet", made, change.get("weights"), change.get("classes", 10))
    with pytest.raises(UserError, match=message) as error:
        run(tmp_path / "run", labels=str(labels))
    assert "document" not in str(error.value) and not (tmp_path / "run").exists()


# --------------------------------------------------------------------------- pretraining without labels


def test_pretrained_without_labels_then_fine_tuned(tmp_path):
    keys = {"objective": "contrastive", "augment__noise": 0.2, "contrast__width": 8, "contrast__outputs": 4, "learning_rate": 1e-2}
    first = run(tmp_path / "first", **keys)
    prepared = images_lib.prepare(tinyvision.train(**keys))
    prepared.images.labels[:] = 0  # they do not matter
    stages.run(tinyvision.train(**keys), str(tmp_path / "second"), prepared=prepared)
    assert [row["loss"] for row in first.metrics] == [row["loss"] for row in w2s_jax.load(tmp_path / "second").metrics]
    assert first.metrics[-1]["loss"] < first.metrics[0]["loss"] and "train_accuracy" not in first.metrics[0]
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "first/model" / name).read_bytes() == (tmp_path / "second/model" / name).read_bytes()
    assert not (tmp_path / "first/predictions").exists() and "accuracy" not in first.results
    with pytest.raises(UserError, match="a pretrained backbone, in model/; expected a supervised run"):
        first.model()

    from transformers import AutoModel

    tuned = tinyvision.train(model=str(tmp_path / "first/model"), resize=-1, crop=-1)
    stages.run(tuned, str(tmp_path / "tuned"))
    found = w2s_jax.load(tmp_path / "tuned")
    assert found.record["identity"]["model"].startswith("run:") and found.record["identity"]["model"].endswith("/model")
    assert found.record["pixels"] == [8, 8] and found.results["accuracy"] > 0
    AutoModel.from_pretrained(tmp_path / "first/model")
    assert np.isfinite(logits(found)).all() and len(found.model().params["head"]["kernel"]) == 8


def test_the_contrastive_loss_sees_the_whole_batch(tmp_path):
    keys = {"objective": "contrastive", "augment__noise": 0.2, "contrast__width": 8, "contrast__outputs": 4} | SGD
    whole = run(tmp_path / "whole", **keys)
    other = run(tmp_path / "cells", **keys | {"microbatch_size": 4, "mesh__data": 2, "mesh__model": 2, "mesh__fsdp": 2})
    np.testing.assert_allclose([r["loss"] for r in other.metrics], [r["loss"] for r in whole.metrics], atol=1e-5)


# --------------------------------------------------------------------------- images that are not what they should be


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_that_cannot_be_decoded(split, tmp_path, capfd):
    data = tinyvision.write_images(tmp_path / "data")
    keys = {"dataset": str(data), "n_train": 24, "n_test": 12, "batch_size": 4}
    prepared = images_lib.prepare(tinyvision.train(**keys))
    name = prepared.images.ids[getattr(prepared.split, split)[-1]]
    file = data / name
    file.write_bytes(file.read_bytes()[:70])
    copy = prepared.images.ids[prepared.split.train[0]]
    (data / copy).write_bytes(file.read_bytes())  # a copy of what cannot be decoded cannot be decoded either
    with pytest.raises(UserError, match=r"\.png: .*bad_images=skip leaves such images out"):
        run(tmp_path / "run", **keys)
    assert not (tmp_path / "run").exists()
    capfd.readouterr()
    found = run(tmp_path / "run", **keys, bad_images="skip")
    said = capfd.readouterr().err
    assert "2 of 36 images cannot be decoded and are left out, the first" in said and "document" not in said
    assert found.results["n_dropped"]["undecodable"] == 2 and {row[0] for row in found.results["undecodable"]} == {name, copy}
    assert found.results["n_test"] + found.results["n_train"] == 34
    capfd.readouterr()
    again = stages.run(tinyvision.train(**keys, bad_images="skip"), str(tmp_path / "run"))
    assert again == found.results and "done already" in capfd.readouterr().err


def test_grey_and_cmyk_images_are_read(tmp_path):
    from pictures import encoded
    from PIL import Image

    side = Image.fromarray(np.random.default_rng(1).integers(0, 255, (12, 10, 3), dtype=np.uint8))
    more = {"red/grey.png": encoded(side.convert("L")), "red/cmyk.jpg": encoded(side.convert("CMYK"), "JPEG")}
    data = tinyvision.write_images(tmp_path / "data", **more)
    found = run(tmp_path / "run", dataset=str(data), n_train=0, n_test=10, resize=8, crop=8, batch_size=4)
    assert found.results["n_train"] + found.results["n_test"] == 38 and not found.results["undecodable"]


# --------------------------------------------------------------------------- killed, done, another


KILLED = {"checkpoint_every": 4, "steps_per_dispatch": 2, "epochs": 3.0, "dropout": 0.125, "augment__shift": 0.1, "eval_every": 6}


def test_killed_at_every_turn(start, tmp_path):  # noqa: F811
    argv = ["--config=vision_train", *tiny.flags(**tinyvision.DATA | tinyvision.NETWORK | KILLED)]
    finish(start, [*argv, f"--workdir={tmp_path / 'whole'}"], tmp_path / "log")
    at, kills = tmp_path / "run", []
    turns = {name: now for name, now in moments(at).items() if name in ("first metrics", "saved", "trained", "predicted")}
    for name, now in turns.items():
        if kill(start, [*argv, f"--workdir={at}"], tmp_path / "log", now):
            kills.append(name)
            assert not (at / "results.json").exists()
    assert len(kills) >= 3, kills
    finish(start, [*argv, f"--workdir={at}"], tmp_path / "log")
    assert "resumed at step" in (tmp_path / "log").read_text()
    same_run(tmp_path / "whole", at)


def test_stopped_and_resumed_under_other_execution_keys(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", **KILLED | SGD)
    stopped_at(tinyvision.train(**KILLED | SGD), tmp_path / "run", monkeypatch, 6)
    found = run(tmp_path / "run", **KILLED | SGD | {"mesh__data": 4, "mesh__fsdp": 2, "checkpoint_every": 0, "steps_per_dispatch": 4})
    np.testing.assert_allclose([r["loss"] for r in found.metrics], [r["loss"] for r in whole.metrics], atol=1e-5)
    np.testing.assert_allclose(logits(found), logits(whole), atol=1e-5)


def test_done_again_and_another(tmp_path, capfd):
    found = run(tmp_path, keep="none")
    capfd.readouterr()
    assert stages.run(tinyvision.train(workers=3, bad_images="skip", logger="none", eval_every=2), str(tmp_path)) == found.results
    assert "done already (accuracy" in capfd.readouterr().err
    for key, value in {"seed": 1, "resize": 7, "learning_rate": 2e-3, "augment__flip": True, "arch__width": 16, "n_test": 41}.items():
        with pytest.raises(UserError, match=rf"holds another run, which differs in .*{key.replace('__', '.')}: "):
            run(tmp_path, **{key: value})
    with pytest.raises(UserError, match=r"has no checkpoint \(keep='none'\)"):
        found.model()
    again = stages.run(tinyvision.train(), str(tmp_path), rerun=True)
    assert timeless(again) == timeless(found.results) and json.loads((tmp_path / "results.json").read_text()) == again
    assert w2s_jax.load(tmp_path).model().step == STEPS


def test_a_loss_that_is_not_finite_names_images(tmp_path, capfd):
    argv = ["--config=vision_train", *tiny.flags(**tinyvision.DATA | tinyvision.NETWORK | {"optimizer": "sgd", "learning_rate": 1e6,
                                                                                           "epochs": 30.0, "head_init": "normal"})]
    assert entry.main([*argv, f"--workdir={tmp_path / 'run'}"]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("error: loss: ") and "images of the batch (8): all/" in line
    assert entry.main(["status", str(tmp_path)]) == 0 and capfd.readouterr().out.startswith("failed")


def test_runlocal(tmp_path, capfd):
    assert entry.main(["--config=vision_train:runlocal", f"--workdir={tmp_path / 'run'}", "--config.mesh.data=1"]) == 0
    said = capfd.readouterr().err
    assert "images of 8 x 8" in said and "on 128 images" in said and "document" not in said and "train xent 16/16" in said
    assert jax.device_count() == 8
