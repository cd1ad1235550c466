"""The stage probe: a probe on frozen features predicts the test set, filters a student's training documents, relabels them."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from test_label import corpus, label  # noqa: F401 (corpus is a fixture)

import w2s_jax
from w2s_jax import config as configs
from w2s_jax import forward, main, models, probes, stages
from w2s_jax.config import shipped
from w2s_jax.data import splits
from w2s_jax.errors import UserError
from w2s_jax.stages import probe as stage

ROOT = Path(__file__).resolve().parents[1]
LAYERS, N, VAL = 3, 96, 8  # layers of the strong model; training documents in both halves; of half B held out
TIMING = {"seconds", "compile_seconds", "feature_seconds", "probe_seconds", "programs", "n_features_computed", "feature_batches"}


@pytest.fixture(autouse=True)
def fast(fast_compiles):
    pass


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """Folders: task, strong (a deeper model), weak (a finished run on half A), labels (its label run of half B)."""
    root = tmp_path_factory.mktemp("probe")
    task = tiny.write_task(root / "tiny", n_train=N, n_test=30)
    with pytest.MonkeyPatch.context() as monkeypatch:
        tiny.fast_compiles(monkeypatch)
        stages.run(tiny.finetune(tiny_model, task, split="a", epochs=2, learning_rate=5e-3), str(root / "weak"))
        stages.run(label(root / "weak"), str(root / "labels"))
    return {"task": task, "weak": root / "weak", "labels": root / "labels", "store": root / "store",
            "strong": tiny.write_model(root / "strong", seed=3, n_layer=LAYERS)}


@pytest.fixture
def probe(made):
    """`probe(**keys)` -> config of a run on half B with the weak labels, in a store that this file shares."""
    def make(**keys):
        small = {"model": str(made["strong"]), "task": str(made["task"]), "labels": str(made["labels"]), "n_val": VAL,
                 "features": str(made["store"]), "probe": "knn", "probe_args__k": 5, "mesh__data": 1}
        return tiny.set_keys(shipped("probe"), **small | keys)
    return make


@pytest.fixture
def counted(monkeypatch):
    """The documents of every batch that a model read for its features."""
    found, whole = [], forward.passes

    def passes(name, *arguments, **options):
        for batch, outputs in whole(name, *arguments, **options):
            if name[1] == "features":
                found.append(int((batch.documents >= 0).sum()))
            yield batch, outputs

    monkeypatch.setattr(forward, "passes", passes)
    return found


def by_hand(model_folder, examples, layer, pool="last"):
    """Features [documents, embed], one document a row."""
    from test_train import unpacked

    model = models.build(models.read_config(model_folder), head="classifier", readout="last")
    params = models.load(model_folder, model)
    return np.asarray(jax.jit(functools.partial(model.features, layers=(layer,), pool=pool))(params, unpacked(examples.tokens)))[0, 0]


def given_labels(made, ids):
    frame = w2s_jax.load(made["labels"]).predictions("b").set_index("id")
    return np.stack(frame.probs[ids].to_list())


def probs(frame):
    return np.stack(frame.probs.to_list())


def timeless(results):
    return {k: v for k, v in results.items() if k not in TIMING}


# --------------------------------------------------------------------------- the three uses


@pytest.mark.parametrize("keys", [
    {}, {"pool": "mean", "layer": "last", "probe": "logistic", "probe_args__k": None}, {"layer": "0", "probe": "mean_difference",
    "probe_args__k": None}, {"labels": ""}, {"mesh__fsdp": 4, "mesh__data": 2, "features": "own", "eval_batch_size": 20},
], ids=str)  # fmt: skip
def test_predict(made, probe, tmp_path, keys):
    keys = keys | ({"features": str(tmp_path / "own")} if "features" in keys else {})
    config = probe(**keys)
    results = stages.run(config, str(tmp_path / "run"))
    run, data = w2s_jax.load(tmp_path / "run"), splits.prepare(config)
    layer = {"middle": 1, "last": LAYERS, "0": 0}[config.layer]
    soft = given_labels(made, data.train.ids) if config.labels else data.train.soft_labels
    x, y = (by_hand(made["strong"], part, layer, config.pool) for part in (data.train, data.test))
    expected = probes.fit(config.probe, configs.probe_args(config), x, soft[:, 1], groups=data.train.groups).predict(y)
    frame = run.predictions("test")
    assert frame.id.to_list() == data.test.ids and frame.label.to_list() == data.test.labels.tolist()
    np.testing.assert_allclose(frame.p, expected, atol=1e-4 if config.probe == "logistic" else 1e-5)
    assert results["accuracy"] == np.mean((frame.p > 0.5) == frame.label) and results["n_test"] == 30
    assert results["n_train"] == N // 2 - VAL and results["layers"] == [layer] and results["val_accuracy"] is not None
    assert len(run.predictions("val")) == VAL and results["probe"]
    assert run.record["identity"]["run"] == "" and run.record["parents"] == ([str(made["labels"])] if config.labels else [])


@pytest.mark.parametrize("name", configs.PROBE_ARGS)
def test_filter_and_its_control(made, probe, corpus, tmp_path, name):  # noqa: F811
    keys = {"probe": name, "probe_args__k": 5 if name in ("knn", "topofilter") else None, "contamination": 0.25}
    config = probe(mode="filter", **keys)
    results = stages.run(config, str(tmp_path / "run"))
    run, data = w2s_jax.load(tmp_path / "run"), splits.prepare(config)
    n, frames = N // 2 - VAL, {split: run.predictions(split) for split in ("b", "b_random")}
    kept = probes.keep(name, configs.probe_args(config), by_hand(made["strong"], data.train, 1),
                       given_labels(made, data.train.ids)[:, 1], 0.25, groups=data.train.groups)
    dropped = int((~kept).sum())
    assert dropped == n // 4 or name == "topofilter"
    truth = data.train.labels
    wrong = given_labels(made, data.train.ids).argmax(1) != truth
    for split, frame in frames.items():
        assert frame.id.to_list() == data.train.ids + data.val.ids and frame.label.to_list() == [*truth, *data.val.labels]
        np.testing.assert_array_equal(probs(frame), given_labels(made, frame.id))  # as they came, to the last bit
        assert set(frame.weight) <= {0.0, 1.0} and (frame.weight[n:] == 1).all() and (frame.weight == 0).sum() == dropped
        suffix = "filtered" if split == "b" else "random"
        left = frame.weight.to_numpy()[:n] > 0
        assert results[f"label_accuracy_{suffix}"] == (~wrong)[left].mean()
        assert results[f"precision_{suffix}"] == (wrong[~left].mean() if dropped else None)
        assert results[f"recall_{suffix}"] == (~left)[wrong].mean()
    assert (frames["b"].weight[:n] > 0).to_list() == kept.tolist()
    assert (results["n"], results["n_train"], results["dropped"]) == (N // 2, n, dropped)
    assert results["label_accuracy"] == (~wrong).mean()
    for labels in (tmp_path / "run", tmp_path / "run/predictions/b_random.parquet"):  # and a student leaves them out
        frame = frames["b_random" if labels.suffix else "b"]
        student = tiny.finetune(made["strong"], made["task"], split="b", n_val=VAL, labels=str(labels))
        assert set(corpus(student)[0].ids) == set(frame.id[:n][frame.weight[:n] > 0])


def test_relabel(made, probe, corpus, tmp_path):  # noqa: F811
    config = probe(mode="relabel")
    results = stages.run(config, str(tmp_path / "run"))
    data, frame = splits.prepare(config), w2s_jax.load(tmp_path / "run").predictions("b")
    n, x, soft = len(data.train), by_hand(made["strong"], data.train, 1), given_labels(made, data.train.ids)
    expected = probes.fit("knn", {"k": 5}, x, soft[:, 1]).predict(x)
    np.testing.assert_allclose(frame.p[:n], expected, atol=1e-5)
    np.testing.assert_array_equal(probs(frame)[n:], given_labels(made, data.val.ids))  # validation documents keep their labels
    assert frame.id.to_list() == data.train.ids + data.val.ids and "weight" not in frame
    assert results["changed_fraction"] == np.mean((frame.p[:n] > 0.5) != (soft[:, 1] > 0.5)) > 0
    assert results["accuracy"] == np.mean((frame.p[:n] > 0.5) == data.train.labels)
    assert results["label_accuracy"] == np.mean(soft.argmax(1) == data.train.labels)
    student = tiny.finetune(made["strong"], made["task"], split="b", n_val=VAL, labels=str(tmp_path / "run"))
    found = corpus(student)[0]
    np.testing.assert_array_equal(found.labels, probs(frame.set_index("id").loc[found.ids]))


def test_a_filter_of_a_filter(made, probe, tmp_path):
    """Labels of weight 0 are neither fitted nor kept again; both filters leave out the same number of the rest."""
    stages.run(probe(mode="filter", contamination=0.25), str(tmp_path / "one"))
    one = w2s_jax.load(tmp_path / "one").predictions("b")
    another = probe(mode="filter", labels=str(tmp_path / "one"), probe="mean_difference", probe_args__k=None)
    results = stages.run(another, str(tmp_path / "two"))
    for split in ("b", "b_random"):
        two = w2s_jax.load(tmp_path / "two").predictions(split)
        assert (two.weight[one.weight == 0] == 0).all() and (two.weight == 0).sum() == (one.weight == 0).sum() + results["dropped"]
    assert results["n_train"] == 30 and results["dropped"] == 3
    relabelled = stages.run(probe(mode="relabel", labels=str(tmp_path / "one")), str(tmp_path / "three"))
    three = w2s_jax.load(tmp_path / "three").predictions("b")
    assert three.weight.to_list() == one.weight.to_list() and relabelled["n_train"] == 30


def test_overlong_documents_are_dropped_and_counted(made, probe, tmp_path):
    data = splits.prepare(probe())
    short = [i for i, t in zip(data.train.ids, data.train.tokens) if len(t) < 12]
    results = stages.run(probe(mode="filter", max_length=12), str(tmp_path / "run"))
    frame = w2s_jax.load(tmp_path / "run").predictions("b")
    assert frame.id.to_list()[: len(short)] == short and 0 < len(short) < len(data.train) and results["n_dropped"]["overlong"]


def test_extract_all_layers_in_one_pass_and_probe_them_later(made, probe, tmp_path, counted):
    """Every layer of every document of the split and of the test set; what follows reads."""
    store = str(tmp_path / "store")
    config = probe(mode="extract", layer="all", labels="", features=store)
    results = stages.run(config, str(tmp_path / "run"))
    assert results["layers"] == list(range(LAYERS + 1)) and results["n_features"] == N // 2 + 30 == sum(counted)
    index = json.loads(next(Path(store).glob("*/*/index.json")).read_text())
    data = splits.prepare(config)
    for layer in range(LAYERS + 1):
        array = np.load(next(Path(store).glob(f"*/*/layer-{layer:03d}.npy")), mmap_mode="r")
        rows = [index["ids"].index(i) for i in data.test.ids]
        np.testing.assert_allclose(array[rows], by_hand(made["strong"], data.test, layer, "last"), atol=1e-5)
    for layer in ("0", "last"):
        assert stages.run(probe(layer=layer, features=store), str(tmp_path / layer))["n_features_computed"] == 0
    assert sum(counted) == N // 2 + 30


@pytest.mark.parametrize("keys, message", [
    ({"layer": "all"}, "config.layer: 'all', expected middle, last or a number .*; all with mode=extract"),
    ({"mode": "extract"}, "config.labels: .*mode=extract has no use for labels"),
])
def test_extract_and_nothing_else(probe, tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        stages.run(probe(**keys), str(tmp_path / "run"))


def test_the_features_of_a_run(made, probe, tmp_path, counted):
    """Those of the trained model, not of the one that it came from."""
    keys = {"model": "not/read", "run": str(made["weak"])}
    one = stages.run(probe(**keys), str(tmp_path / "one"))
    run = w2s_jax.load(tmp_path / "one")
    assert run.record["identity"]["run"].startswith("run:") and run.record["identity"]["model"] == "" and run.config.model != "not/read"
    assert sum(counted) == N // 2 + 30 and one["layers"] == [1]  # of 2
    assert str(made["weak"]) in run.record["parents"]
    stages.run(probe(model=str(made["strong"])), str(tmp_path / "two"))
    assert run.record["feature_store"] != w2s_jax.load(tmp_path / "two").record["feature_store"]
    loaded, data = w2s_jax.load(made["weak"]).model(), splits.prepare(probe())
    from test_train import unpacked

    read = jax.jit(lambda batch: loaded.model.features(loaded.params, batch, (1,)))
    x, y = (np.asarray(read(unpacked(part.tokens)))[0, 0] for part in (data.train, data.test))
    expected = probes.fit("knn", {"k": 5}, x, given_labels(made, data.train.ids)[:, 1]).predict(y)
    np.testing.assert_allclose(run.predictions("test").p, expected, atol=1e-5)


# --------------------------------------------------------------------------- computed once


def test_one_pass_for_all_runs_on_a_model(probe, tmp_path, counted, monkeypatch):
    keys = {"features": str(tmp_path / "store"), "eval_batch_size": 10}
    first = stages.run(probe(**keys), str(tmp_path / "predict"))
    data = splits.prepare(probe())
    distinct = len({t.tobytes() for part in (data.train, data.val, data.test) for t in part.tokens})
    assert sum(counted) == distinct == first["n_features_computed"] and first["feature_batches"] == len(counted) > 3
    monkeypatch.setattr(models, "load", None)  # from now on no model is loaded
    for number, more in enumerate([{"mode": "filter"}, {"mode": "relabel"}, {"probe": "mean_difference", "probe_args__k": None},
                                   {"labels": ""}, {"n_val": 3}, {"seed": 4}]):
        results = stages.run(probe(**keys | more), str(tmp_path / str(number)))
        assert results["n_features_computed"] == 0
    before = (tmp_path / "predict/results.json").stat().st_mtime_ns
    assert timeless(stages.run(probe(**keys), str(tmp_path / "predict"))) == timeless(first)
    assert (tmp_path / "predict/results.json").stat().st_mtime_ns == before and sum(counted) == distinct


def test_the_checkpoints_own_type_is_a_type(probe, tmp_path, counted):
    """param_dtype=auto reads the features that its type has made."""
    stages.run(probe(features=str(tmp_path / "store")), str(tmp_path / "one"))
    computed = sum(counted)
    stages.run(probe(features=str(tmp_path / "store"), param_dtype="auto"), str(tmp_path / "two"))
    assert sum(counted) == computed


def test_half_a_adds_its_own_documents(probe, tmp_path, counted):
    stages.run(probe(features=str(tmp_path / "store")), str(tmp_path / "b"))
    both = sum(counted)
    results = stages.run(probe(features=str(tmp_path / "store"), split="a", labels=""), str(tmp_path / "a"))
    assert 0 < sum(counted) - both <= N // 2 and results["n_features_computed"] == sum(counted) - both


def test_where_features_lie_is_no_part_of_the_run(probe, tmp_path):
    config = probe(features="")
    stages.run(config, str(tmp_path / "run"))
    assert list((tmp_path / "run/features").glob("*strong-last-*/*/layer-001.npy"))
    record = w2s_jax.load(tmp_path / "run").record
    assert stages.identity(probe(features=str(tmp_path / "x"), eval_batch_size=3, mesh__fsdp=2)) == record["identity"]
    assert "features" not in record["identity"] and record["identity"]["contamination"] is None
    assert stages.identity(probe(contamination=0.2)) == record["identity"]  # says nothing outside of a filter
    for keys in ({"layer": "2"}, {"pool": "mean"}, {"probe_args__k": 6}, {"mode": "filter"}, {"labels": ""}, {"seed": 1}):
        assert stages.identity(probe(**keys)) != record["identity"]


def test_killed_in_the_pass_and_started_again(made, probe, tmp_path):
    """SIGKILL while features are computed; the same command then ends as if nothing had happened."""
    flags = tiny.flags(model=made["strong"], task=made["task"], labels=made["labels"], n_val=VAL, mode="filter", eval_batch_size=4,
                       mesh__data=1, probe="knn", probe_args__k=5)
    code = ("import sys, time; from w2s_jax import forward, main, store; store.SECONDS = 0.0; whole = forward.passes\n"
            "def passes(*a, **k):\n"
            "    for i, x in enumerate(whole(*a, **k)):\n"
            "        if i == 4: print('here', flush=True); time.sleep(600)\n"
            "        yield x\n"
            "forward.passes = passes; main.main(sys.argv[1:])")
    argv = ["--config=probe", *flags, f"--workdir={tmp_path / 'run'}"]
    child = subprocess.Popen([sys.executable, "-c", code, *argv], stdout=subprocess.PIPE, cwd=ROOT,
                             env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""})
    assert child.stdout.readline() == b"here\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "run/results.json").exists() and not list((tmp_path / "run/features").glob("*/*/index.json"))
    config = probe(mode="filter", eval_batch_size=4, features="")
    results = stages.run(config, str(tmp_path / "run"))
    whole = stages.run(config, str(tmp_path / "whole"))
    assert 0 < results["feature_batches"] == whole["feature_batches"] - 4
    assert timeless(results) == timeless(whole)
    for split in ("b", "b_random"):
        assert w2s_jax.load(tmp_path / "run").predictions(split).equals(w2s_jax.load(tmp_path / "whole").predictions(split))


# --------------------------------------------------------------------------- what cannot be


def other_text(made, folder):
    file = made["labels"] / "predictions/b.parquet"
    import pandas as pd

    frame = pd.read_parquet(file)
    frame.loc[0, "text_sha"] = "0" * 16
    frame.to_parquet(folder / "labels.parquet")
    return {"labels": str(folder / "labels.parquet")}


def three_classes(made, folder):
    ids = w2s_jax.load(made["labels"]).predictions("b").id
    rows = [{"id": i, "probs": [0.2, 0.3, 0.5]} for i in ids]
    return {"labels": str(tiny.write_rows(folder / "labels.jsonl", rows))}


def nothing_left(made, folder):
    data = splits.prepare(tiny.set_keys(shipped("probe"), task=str(made["task"]), n_val=VAL))
    rows = [{"id": i, "p": 0.5, "weight": 0} for i in data.train.ids] + [{"id": i, "p": 0.5, "weight": 1} for i in data.val.ids]
    return {"labels": str(tiny.write_rows(folder / "labels.jsonl", rows))}


@pytest.mark.parametrize("keys, message", [
    ({"layer": "4"}, "config.layer: '4', expected middle, last or a number from 0 .* to 3"),
    ({"layer": "first"}, "config.layer: 'first', expected middle, last or a number"),
    ({"contamination": 0.0}, "config.contamination: 0.0, expected a number above 0"),
    ({"contamination": 1.0}, "config.contamination: 1.0, expected a number above 0 and below 1"),
    ({"probe": "logistik"}, "config.probe: 'logistik', .*did you mean 'logistic'"),
    ({"probe": "mean_difference"}, "config.probe_args.k: 5 is set, but probe 'mean_difference' takes no arguments"),
    ({"probe_args__k": 1000}, "probe_args.k=1000: expected at most 40"),
    ({"mode": "filtr"}, "config.mode: 'filtr', .*'filter'"),
    ({"pool": "max"}, "config.pool: 'max', expected one of last, mean"),
    ({"run": "/nowhere"}, "config.run: '/nowhere', no such file or folder"),
    ({"model": "/nowhere"}, "config.model: '/nowhere', no such folder"),
    ({"data_seed": 1}, "labels: .* does not fit the data: .* documents have no label"),
    (other_text, "1 labels were made for another text"),
    (three_classes, "labels.jsonl has 3 classes, expected 2"),
    (nothing_left, "labels.jsonl leaves no training document: all 40 have weight 0"),
    ({"max_length": 1}, "max_length=1: none of the 40 training documents fits"),
    ({"overlong": "error", "max_length": 12}, "overlong=error: document .* has .* tokens"),
], ids=tiny.stable)
def test_bad_input_is_one_line_and_leaves_nothing(made, probe, tmp_path, keys, message):
    keys = keys(made, tmp_path) if callable(keys) else keys
    with pytest.raises(UserError, match=message) as caught:
        stages.run(probe(**keys), str(tmp_path / "run"))
    assert "\n" not in str(caught.value)
    if "k=1000" not in message:  # known when the features are
        assert not (tmp_path / "run").exists()


def test_a_run_that_is_no_finetuning(made, probe, tmp_path):
    with pytest.raises(UserError, match="is a run of stage 'label', expected finetune"):
        stages.prepare(probe(run=str(made["labels"])))
    with pytest.raises(UserError, match="config.features: .* is a file"):
        stages.run(probe(features=__file__), str(tmp_path / "run"))


def test_summaries():
    assert stage.summary({"dropped": 2, "n_train": 10, "dropped_fraction": 0.2}) == "2 of 10 documents left out (20.0%)"
    assert stage.summary({"changed_fraction": 0.5, "n": 12, "n_val": 2}) == "10 documents relabelled, 50.0% change class"


def test_by_the_command_line(made, tmp_path, capsys):
    flags = tiny.flags(model=made["strong"], task=made["task"], labels=made["labels"], features=made["store"], mesh__data=1)
    assert main.main(["--config=probe", *flags, f"--workdir={tmp_path / 'run'}"]) == 0
    assert json.loads((tmp_path / "run/results.json").read_text())["n_test"] == 30
    capsys.readouterr()
    assert main.main(["--config=probe", *flags, f"--workdir={tmp_path / 'run'}"]) == 0
    assert "done already" in capsys.readouterr().err
    assert main.main(["--config=probe", "--config.layer=nine", *flags, f"--workdir={tmp_path / 'new'}"]) == 2
    assert not (tmp_path / "new").exists()
