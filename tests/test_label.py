"""Labelling: a run's predictions on any documents, and how they become another run's labels."""

import shutil

import jax
import numpy as np
import pytest
import tiny

import w2s_jax
from w2s_jax import main, models, stages, train
from w2s_jax.config import shipped
from w2s_jax.data import labels as labels_lib
from w2s_jax.data import splits
from w2s_jax.errors import UserError


@pytest.fixture(autouse=True)
def fast(fast_compiles):
    pass


@pytest.fixture(scope="module")
def weak(tiny_model, tiny_task, tmp_path_factory):
    """A finished run on half A."""
    folder = tmp_path_factory.mktemp("weak") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        tiny.fast_compiles(monkeypatch)
        stages.run(tiny.finetune(tiny_model, tiny_task, split="a", epochs=2, learning_rate=5e-3), str(folder))
    return folder


@pytest.fixture
def other_task(tmp_path):
    return tiny.write_task(tmp_path / "other", seed=5)


def label(run, **keys):
    return tiny.set_keys(shipped("label"), **{"run": str(run), "mesh__data": 1} | keys)


def logits(frame):
    return np.stack(frame.logits.to_list())


def by_hand(run, examples):
    """Logits of a run's model, one document a row."""
    from test_train import unpacked

    loaded = w2s_jax.load(run).model()
    params = jax.device_get(loaded.params)
    return np.asarray(jax.jit(loaded.model.apply)(params, unpacked(examples.tokens))[0])


# --------------------------------------------------------------------------- what is labelled


def test_half_b_is_labelled_by_the_run(weak, tmp_path):
    results = stages.run(label(weak), str(tmp_path / "labels"))
    wanted = splits.prepare(w2s_jax.load(weak).config, only="b").wanted
    frame = w2s_jax.load(tmp_path / "labels").predictions("b")
    assert frame.id.to_list() == wanted.ids and len(wanted) == 32 == results["n"]
    assert frame.text_sha.to_list() == wanted.text_shas and frame.label.to_list() == wanted.labels.tolist()
    np.testing.assert_allclose(logits(frame), by_hand(weak, wanted), atol=1e-5)
    assert np.ptp(logits(frame)) > 0.1  # it is a trained model
    exp = np.exp(logits(frame).astype(np.float64))
    np.testing.assert_allclose(np.stack(frame.probs.to_list()), exp / exp.sum(1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(frame.p, (exp / exp.sum(1, keepdims=True))[:, 1], atol=1e-6)
    assert results["accuracy"] == np.mean(logits(frame).argmax(1) == wanted.labels)
    assert not set(wanted.ids) & set(splits.prepare(w2s_jax.load(weak).config, only="a").wanted.ids)


@pytest.mark.parametrize("keys", [
    {}, {"mesh__fsdp": 4, "mesh__data": 2}, {"mesh__model": 2}, {"eval_batch_size": 5}, {"dtype": "bfloat16"},
], ids=str)
def test_the_test_set_comes_out_as_in_the_run_itself(weak, tmp_path, keys):
    stages.run(label(weak, split="test", **keys), str(tmp_path / "labels"))
    one, two = (w2s_jax.load(run).predictions("test") for run in (weak, tmp_path / "labels"))
    assert one.id.to_list() == two.id.to_list() and one.label.to_list() == two.label.to_list()
    np.testing.assert_allclose(logits(one), logits(two), atol=0.05 if "dtype" in keys else 1e-5)
    assert ("dtype" in keys) == (np.abs(logits(one) - logits(two)).max() > 1e-5)


@pytest.mark.parametrize("split", ["a", "train"])
def test_other_parts(weak, tmp_path, split):
    results = stages.run(label(weak, split=split), str(tmp_path))
    frame = w2s_jax.load(tmp_path).predictions(split)
    assert frame.id.to_list() == splits.prepare(w2s_jax.load(weak).config, only=split).wanted.ids
    assert len(frame) == results["n"] == {"a": 32, "train": 64}[split]


def test_a_file_without_labels(weak, tmp_path):
    rows = [{"input_ids": row["input_ids"], "id": f"mine-{i}"} for i, row in enumerate(tiny.rows(9, seed=8))]
    file = tiny.write_rows(tmp_path / "new.jsonl", rows)
    results = stages.run(label(weak, file=str(file)), str(tmp_path / "labels"))
    frame = w2s_jax.load(tmp_path / "labels").predictions("new")
    assert frame.id.to_list() == [f"mine-{i}" for i in range(9)] and frame.label.isna().all()
    assert results["n"] == 9 and "accuracy" not in results
    np.testing.assert_allclose(logits(frame), by_hand(weak, splits.read_documents(file)[0]), atol=1e-5)


def test_another_task(weak, other_task, tmp_path):
    results = stages.run(label(weak, task=str(other_task), n_train=40), str(tmp_path / "labels"))
    frame = w2s_jax.load(tmp_path / "labels").predictions("b")
    assert results["n"] == 20 and all(i.startswith("other/train/") for i in frame.id)


def test_overlong_documents_are_dropped_or_cut_as_asked(weak, tmp_path):
    wanted = splits.prepare(w2s_jax.load(weak).config, only="b").wanted
    long = sum(len(ids) >= 12 for ids in wanted.tokens)
    assert 0 < long < len(wanted)
    dropped = stages.run(label(weak, max_length=12), str(tmp_path / "dropped"))
    cut = stages.run(label(weak, max_length=12, overlong="truncate"), str(tmp_path / "cut"))
    assert (dropped["n"], dropped["n_dropped"]["overlong"]) == (len(wanted) - long, long)
    assert (cut["n"], cut["n_dropped"]["overlong"]) == (len(wanted), 0)
    frame = w2s_jax.load(tmp_path / "cut").predictions("b")
    np.testing.assert_allclose(logits(frame), by_hand(weak, wanted.replace(tokens=[t[:12] for t in wanted.tokens])), atol=1e-5)


def test_by_the_command_line_and_only_once(weak, tmp_path, monkeypatch):
    argv = ["--config=label", f"--config.run={weak}", "--config.mesh.data=1", f"--workdir={tmp_path / 'labels'}"]
    assert main.main(argv) == 0
    before = (tmp_path / "labels/predictions/b.parquet").stat().st_mtime_ns
    monkeypatch.setattr(models, "load", None)  # nothing is loaded for what is done
    assert main.main(argv) == 0
    assert (tmp_path / "labels/predictions/b.parquet").stat().st_mtime_ns == before


def test_the_whole_experiment_run_by_run_in_relative_directories(tiny_model, tiny_task, tmp_path, monkeypatch):
    """README's commands, as a user types them."""
    monkeypatch.chdir(tmp_path)
    finetune = ["--config=finetune", f"--config.model={tiny_model}", f"--config.task={tiny_task}", "--config.batch_size=8",
                "--config.max_length=64", "--config.epochs=1", "--config.checkpoint_every=3", "--config.mesh.data=1"]
    for argv in (
        [*finetune, "--config.split=a", "--workdir=runs/weak"],
        ["--config=label", "--config.run=runs/weak", "--config.mesh.data=1", "--workdir=runs/weak-labels"],
        [*finetune, "--config.split=b", "--config.labels=runs/weak-labels", "--config.loss=logconf", "--workdir=runs/student"],
        [*finetune, "--config.split=b", "--workdir=runs/ceiling"],
        ["--config=report", "--config.weak=runs/weak", "--config.ceiling=runs/ceiling", "--config.student=runs/student",
         "--config.label=runs/weak-labels", "--workdir=runs/report"],
    ):
        assert main.main(argv) == 0, argv
    assert (tmp_path / "runs/report/report/report.md").is_file()


# --------------------------------------------------------------------------- what cannot label


def test_a_head_only_run_needs_its_base_model_as_it_was(tiny_task, tmp_path):
    base = tiny.write_model(tmp_path / "base")
    runs = {}
    for trained in ("head", "full"):
        runs[trained] = tmp_path / trained
        stages.run(tiny.finetune(base, tiny_task, split="a", train=trained), str(runs[trained]))
    stages.run(label(runs["head"]), str(tmp_path / "before"))
    tiny.write_model(base, seed=1)
    with pytest.raises(UserError, match=r"its base model .*base is sha256:\w+, expected sha256:\w+: the files changed since"):
        stages.run(label(runs["head"]), str(tmp_path / "after"))
    stages.run(label(runs["full"]), str(tmp_path / "labels"))  # it holds everything itself
    np.testing.assert_allclose(logits(w2s_jax.load(tmp_path / "labels").predictions("b")),
                               by_hand(runs["full"], splits.prepare(w2s_jax.load(runs["full"]).config, only="b").wanted), atol=1e-5)


def unfinished(run):
    (run / "results.json").unlink()


def without_checkpoint(run):
    shutil.rmtree(run / "checkpoints")


def a_labelling(run):
    stages.run(label(run), str(run.parent / "labelled"))
    shutil.rmtree(run)
    shutil.move(run.parent / "labelled", run)


@pytest.mark.parametrize("change, message", [
    (unfinished, "has no results.json yet, expected a finished run"),
    (without_checkpoint, "has no checkpoint"),
    (a_labelling, "is a run of stage 'label', expected finetune"),
])
def test_a_run_that_cannot_label_says_why(weak, tmp_path, change, message):
    run = tmp_path / "run"
    shutil.copytree(weak, run)
    change(run)
    with pytest.raises(UserError, match=f"run={run}.*{message}"):
        stages.run(label(run), str(tmp_path / "new"))
    assert not (tmp_path / "new" / "predictions").exists()


# --------------------------------------------------------------------------- labels in use


class Captured(Exception):
    pass


@pytest.fixture
def corpus(tmp_path_factory):
    """`corpus(config)` -> the corpus and the program that a run would train with."""
    def get(config):
        def catch(config, program, params, corpus, *_, **__):
            raise Captured(corpus, program)
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(train, "train", catch)
            with pytest.raises(Captured) as caught:
                stages.run(config, str(tmp_path_factory.mktemp("caught")))
        return caught.value.args
    return get


@pytest.fixture
def student(tiny_task, tmp_path):
    """Config of a student on half B."""
    return tiny.finetune(tiny.write_model(tmp_path / "student", seed=7), tiny_task, split="b", loss="logconf_eleuther")


@pytest.fixture
def labels(weak, tmp_path):
    stages.run(label(weak), str(tmp_path / "labels"))
    return tmp_path / "labels"


@pytest.mark.parametrize("n_val", [0, 6])
@pytest.mark.parametrize("as_file", [False, True])
def test_a_student_trains_on_the_labels_of_its_documents(student, labels, corpus, n_val, as_file):
    given = w2s_jax.load(labels).predictions("b").set_index("id")
    where = labels / "predictions/b.parquet" if as_file else labels
    found, program = corpus(tiny.set_keys(student, labels=str(where), n_val=n_val))
    assert len(found.ids) == 32 - n_val and set(found.ids) <= set(given.index)
    np.testing.assert_array_equal(found.labels, np.stack(given.probs[found.ids].to_list()))
    assert not program.loss.ground_truth
    truth, program = corpus(tiny.set_keys(student, labels="", n_val=n_val, seed=1))
    assert truth.ids == found.ids and set(np.unique(truth.labels)) == {0.0, 1.0}
    assert program.loss.ground_truth


def test_documents_of_weight_0_are_left_out_and_the_others_weigh(student, labels, corpus, tmp_path):
    table = w2s_jax.load(labels).predictions("b")
    kept = table.id[4:].to_list()
    for name, weight in (("filtered", [0.0] * 4 + [2.0] * 28), ("weighed", [0.0] * 4 + [1.0] * 14 + [3.0] * 14)):
        table.assign(weight=weight).to_parquet(tmp_path / f"{name}.parquet")
        found, _ = corpus(tiny.set_keys(student, labels=str(tmp_path / f"{name}.parquet")))
        assert set(found.ids) == set(kept)
        if name == "filtered":  # all alike: the run is the one without weights
            assert found.weights is None
        else:
            assert dict(zip(found.ids, found.weights.tolist())) == dict(zip(kept, [0.5] * 14 + [1.5] * 14))
    results = stages.run(tiny.set_keys(student, labels=str(tmp_path / "weighed.parquet")), str(tmp_path / "run"))
    assert results["n_dropped"]["filtered"] == 4 and results["n_train"] == 28


def test_a_student_runs_and_its_truth_stays_out_of_training(student, labels, tmp_path):
    results = stages.run(tiny.set_keys(student, labels=str(labels), n_val=6), str(tmp_path / "student-run"))
    run = w2s_jax.load(tmp_path / "student-run")
    assert run.record["parents"] == [str(labels)]
    assert run.record["identity"]["labels"].startswith("run:")
    assert results["n_test"] == 24 and results["val_accuracy"] is not None
    truth = splits.prepare(run.config).val
    assert run.predictions("val").label.to_list() == truth.labels.tolist()  # evaluated against the truth


@pytest.mark.parametrize("keys, message", [
    ({"data_seed": 1}, r"documents have no label, the first '.*'; \d+ of 32 labels have no document"),
    ({"split": "a"}, "32 of 32 documents have no label"),
    ({"n_train": 40}, r"\d+ of 20 documents have no label.*\d+ of 32 labels have no document"),
])
def test_labels_of_other_documents_are_refused(student, labels, tmp_path, keys, message):
    with pytest.raises(UserError, match=f"labels: .*does not fit the data: .*{message}"):
        stages.run(tiny.set_keys(student, labels=str(labels), **keys), str(tmp_path / "run"))
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_labels_of_another_task_are_refused(student, weak, other_task, tmp_path):
    stages.run(label(weak, task=str(other_task)), str(tmp_path / "labels"))
    message = "32 of 32 documents have no label, the first 'tiny/train/.*32 labels have no document.*'other/train"
    with pytest.raises(UserError, match=message):
        stages.run(tiny.set_keys(student, labels=str(tmp_path / "labels")), str(tmp_path / "run"))


def test_labels_made_for_another_text_are_refused(student, labels, tmp_path):
    """The same ids, but the documents changed since."""
    task = tiny.write_task(tmp_path / "tiny", seed=9)
    with pytest.raises(UserError, match=r"\d+ labels were made for another text, the first 'tiny/train/"):
        stages.run(tiny.set_keys(student, labels=str(labels), task=str(task)), str(tmp_path / "run"))


def test_documents_that_the_run_leaves_out_need_no_label_but_those_it_keeps_do(student, weak, labels, corpus, tmp_path):
    short, _ = corpus(tiny.set_keys(student, labels=str(labels), max_length=12))  # more labels than documents: counted as over-long
    assert 0 < len(short.ids) < 32
    stages.run(label(weak, max_length=12), str(tmp_path / "short-labels"))
    with pytest.raises(UserError, match=r"\d+ of 32 documents have no label"):
        stages.run(tiny.set_keys(student, labels=str(tmp_path / "short-labels"), max_length=1024), str(tmp_path / "run"))


def test_a_run_folder_without_labels_says_what_to_do(student, weak, tmp_path):
    with pytest.raises(UserError, match=r"no predictions/b.parquet in it \(predictions: test.parquet\).*run the label stage"):
        stages.run(tiny.set_keys(student, labels=str(weak)), str(tmp_path / "run"))


def test_other_labels_are_another_run(student, weak, labels, tmp_path):
    """The identity follows what the labels are, not where they lie."""
    examples = splits.prepare(w2s_jax.load(weak).config, only="b").wanted
    stages.run(tiny.set_keys(student, labels=str(labels)), str(tmp_path / "run"))
    shutil.copytree(labels, tmp_path / "moved")
    again = tiny.set_keys(student.copy_and_resolve_references(), labels=str(tmp_path / "moved"))
    assert stages.identity(again) == w2s_jax.load(tmp_path / "run").record["identity"]
    labels_lib.write_predictions(tmp_path / "other.parquet", examples, np.zeros((32, 2)))
    with pytest.raises(UserError, match="holds another run, which differs in labels"):
        stages.run(tiny.set_keys(student.copy_and_resolve_references(), labels=str(tmp_path / "other.parquet")), str(tmp_path / "run"))
