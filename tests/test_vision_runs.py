"""A finished run of vision_train as a model: supervisor, features, and where another run starts."""

import shutil

import numpy as np
import pytest

pytest.importorskip("torch")
import tinyvision

from w2s_jax import runlog, stages, vision
from w2s_jax.errors import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Runs: `new` (a transformer of its own), `resnet` (fine-tuned, of a kind that is kept as a checkpoint too), `bare` (no labels)."""
    root = tmp_path_factory.mktemp("runs")
    tinyvision.write_model(root / "base", "resnet")
    stages.run(tinyvision.train(), root / "new")
    stages.run(tinyvision.train(model=str(root / "base"), learning_rate=1e-2, head_init="normal"), root / "resnet")
    stages.run(tinyvision.train(objective="contrastive", split="both", n_weak=16, augment__shift=0.1), root / "bare")
    return root


def logits(run, ids):
    found = runlog.load(run).predictions("test").set_index("id")
    return np.stack(found.loc[ids, "logits"].to_numpy())


@pytest.mark.parametrize("name, kept", [("new", "model"), ("resnet", "model"), ("resnet", "checkpoint")])
def test_a_run_is_a_supervisor(made, tmp_path, name, kept):
    """Its labels are what it answered itself, also where transformers has no class for it, and there is a checkpoint alone."""
    run = tmp_path / name
    shutil.copytree(made / name, run)
    if kept == "checkpoint":
        shutil.rmtree(run / "model")
    config = tinyvision.vision(weak_model=str(run), strong_model=str(made / "bare"), n_weak=0, n_train=64, n_test=40)
    results = stages.run(config, tmp_path / "experiment")
    told = runlog.load(tmp_path / "experiment").predictions("weak-s0")
    np.testing.assert_allclose(np.stack(told["logits"].to_numpy()), logits(run, told["id"]), atol=1e-5)
    assert results["weak"]["accuracy"] == pytest.approx(runlog.load(run).results["accuracy"])
    assert runlog.load(tmp_path / "experiment").record["identity"]["weak_model"].startswith("run:")


def test_a_run_is_a_start(made, tmp_path):
    """Fine-tuned again it keeps its backbone and gets a head of its own; with its own head it gives what it gave."""
    config = tinyvision.train(model=str(made / "resnet"))
    whole, fresh = (vision.open_model(str(made / "resnet"), "main", config, head=head, classes=10) for head in ("own", "new"))
    assert not np.asarray(fresh.params["head"]["kernel"]).any() and np.asarray(whole.params["head"]["kernel"]).any()
    np.testing.assert_array_equal(fresh.params["backbone"]["stem"]["conv"]["kernel"], whole.params["backbone"]["stem"]["conv"]["kernel"])
    results = stages.run(config, tmp_path / "again")
    assert results["n_train"] == 64


def test_a_supervisor_that_starts_from_a_checkpoint(made, tmp_path):
    config = tinyvision.vision(weak_train__model=str(made / "base"), strong_model=str(made / "base"))
    stages.run(config, tmp_path / "experiment")
    [run] = (tmp_path / "experiment" / "runs").glob("vision_train-weak-*")
    assert runlog.load(run).config.model == str(made / "base")
    other = tinyvision.vision(weak_train__model=str(made / "resnet"), strong_model=str(made / "base"))
    with pytest.raises(UserError, match='weak_train.model: "sha256:.*" -> "run:'):
        stages.run(other, tmp_path / "experiment")


def test_what_is_no_supervisor(made, tmp_path):
    for name, said in (("bare", "has no classifier, the images have 10"), ("base", "has no classifier, the images have 10")):
        with pytest.raises(UserError, match=said):
            stages.run(tinyvision.vision(weak_model=str(made / name), strong_model=str(made / "base"), n_weak=0), tmp_path / name)
        assert not (tmp_path / name).exists()
