"""Ensembles of weak supervisors: their arithmetic, what they write, and what does not fit together."""

import shutil
import sys

import numpy as np
import pytest
import tiny

import w2s_jax
from w2s_jax import graph, main, models, runlog, stages, train
from w2s_jax.config import identity_hash, shipped
from w2s_jax.data import labels as labels_lib
from w2s_jax.errors import UserError
from w2s_jax.files import read_json, write_json
from w2s_jax.stages import ensemble


@pytest.fixture(autouse=True)
def fast(fast_compiles):
    pass


@pytest.fixture(scope="module")
def members(tiny_model, tiny_task, tmp_path_factory):
    """Three label runs of half B, of supervisors with other seeds (and their folder)."""
    root = tmp_path_factory.mktemp("members")
    with pytest.MonkeyPatch.context() as monkeypatch:
        tiny.fast_compiles(monkeypatch)
        for seed in range(3):
            config = tiny.finetune(tiny_model, tiny_task, split="a", head_init="normal", seed=seed, epochs=2, learning_rate=2e-2)
            stages.run(config, str(root / f"weak-{seed}"))
            stages.run(tiny.set_keys(shipped("label"), run=str(root / f"weak-{seed}"), mesh__data=1), str(root / f"labels-{seed}"))
    return [root / f"labels-{seed}" for seed in range(3)]


def config(runs, **keys):
    return tiny.set_keys(shipped("ensemble"), runs=tuple(map(str, runs)), **keys)


def column(frame, name="probs"):
    return np.stack(frame[name].to_list()).astype(np.float64)


# --------------------------------------------------------------------------- arithmetic


THREE = np.array([[[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]], [[0.7, 0.3], [0.4, 0.6], [1.0, 0.0]]])  # [members, documents, classes]


@pytest.mark.parametrize("how, expected", [
    ("mean", [[0.8, 0.2], [0.45, 0.55], [0.6, 0.4]]),
    ("disagreement", [[0.8, 0.2], [0.45, 0.55], [0.6, 0.4]]),
    ("vote", [[1, 0], [0.5, 0.5], [0.5, 0.5]]),  # a member's own tie goes to class 0
])
def test_how_members_are_combined(how, expected):
    np.testing.assert_allclose(ensemble.combine(THREE, how), expected, atol=1e-12)


def test_weights_fall_with_disagreement():
    def entropy(p):
        return -sum(x * np.log(x) for x in p if x > 0)

    def weights(*documents):  # each a list of the members' probability of class 1
        p = np.array(documents).T
        return ensemble.agreement_weights(np.stack([1 - p, p], axis=2))

    found = weights([0.9, 0.9], [0.5, 0.5], [0.1, 0.9], [0.0, 1.0], [0.3, 0.6])
    assert found.dtype == np.float32 and abs(found.mean() - 1) < 1e-6
    assert found[0] == found[1] > found[4] > found[2] > found[3] == 0  # unsure together is no disagreement
    by_hand = [1 - (entropy([1 - np.mean(m), np.mean(m)]) - np.mean([entropy([1 - x, x]) for x in m])) / np.log(2)
               for m in ([0.9, 0.9], [0.5, 0.5], [0.1, 0.9], [0.0, 1.0], [0.3, 0.6])]
    np.testing.assert_allclose(found, by_hand / np.mean(by_hand), rtol=1e-6)
    with pytest.raises(UserError, match="contradict each other with certainty on every document"):
        weights([0.0, 1.0], [1.0, 0.0])


def test_agreement_is_the_mean_over_pairs():
    hard = np.array([[0, 0, 1, 1], [0, 1, 1, 0], [0, 1, 0, 0]])
    pairs = [np.mean(hard[i] == hard[j]) for i in range(3) for j in range(i)]
    assert abs(ensemble.agreement(hard, 2) - np.mean(pairs)) < 1e-12


# --------------------------------------------------------------------------- the stage


@pytest.mark.parametrize("how", ["mean", "vote", "disagreement"])
def test_an_ensemble_writes_labels_and_test_predictions(members, tmp_path, how):
    results = stages.run(config(members, how=how), str(tmp_path))
    run = w2s_jax.load(tmp_path)
    for split, frames in (("b", [w2s_jax.load(m).predictions("b") for m in members]),
                          ("test", [w2s_jax.load(w2s_jax.load(m).config.run).predictions("test") for m in members])):
        found, probs = run.predictions(split), np.stack([column(f) for f in frames])
        assert np.ptp(probs, axis=0).max() > 0.01  # the members differ
        for name in ("id", "text_sha", "label", "group"):
            assert found[name].to_list() == frames[0][name].to_list()
        expected = np.eye(2)[probs.argmax(2)].mean(0) if how == "vote" else probs.mean(0)
        np.testing.assert_allclose(column(found), expected, atol=1e-6)
        np.testing.assert_allclose(found.p, expected[:, 1], atol=1e-6)
        assert np.isfinite(column(found, "logits")).all()
        accuracy = np.mean(expected.argmax(1) == found.label)
        assert results["accuracy" if split == "test" else "label_accuracy"] == accuracy
        for i, entry in enumerate(results["members"]):
            i = [str(m) for m in members].index(entry["run"])
            assert entry["accuracy" if split == "test" else "label_accuracy"] == np.mean(probs[i].argmax(1) == found.label)
            assert entry["seed"] == i
        hard = probs.argmax(2)
        pairs = [np.mean(hard[i] == hard[j]) for i in range(3) for j in range(i)]
        assert abs(results["agreement" if split == "b" else "test_agreement"] - np.mean(pairs)) < 1e-9
        if split == "test" or how != "disagreement":
            assert "weight" not in found
        else:
            np.testing.assert_allclose(found.weight, ensemble.agreement_weights(probs), rtol=1e-4)
            assert results["n_effective"] <= len(found) and results["weight_range"] == [found.weight.min(), found.weight.max()]
    assert (results["n"], results["n_test"], results["n_members"]) == (32, 24, 3)
    assert run.record["parents"] == [e["run"] for e in results["members"]] and set(run.record["parents"]) == {str(m) for m in members}


def test_votes_of_one_mind_are_certain(members, tmp_path):
    """A unanimous vote is probability 0 or 1, with finite logits."""
    stages.run(config(members[:2], how="vote"), str(tmp_path))
    found = w2s_jax.load(tmp_path).predictions("b")
    assert set(found.p) <= {0.0, 0.5, 1.0} and {0.0, 1.0} & set(found.p)
    labels = labels_lib.read(tmp_path)
    assert set(labels.probs[:, 1]) == set(found.p)


def test_the_order_of_the_members_plays_no_part(members, tmp_path):
    for name, runs in (("one", members), ("two", members[::-1])):
        stages.run(config(runs), str(tmp_path / name))
    one, two = (w2s_jax.load(tmp_path / name) for name in ("one", "two"))
    assert one.record["identity"] == two.record["identity"]
    assert all(one.predictions(split).equals(two.predictions(split)) for split in ("b", "test"))
    drop = {"seconds"}
    assert {k: v for k, v in one.results.items() if k not in drop} == {k: v for k, v in two.results.items() if k not in drop}


def test_a_sweep_can_plan_one(members):
    """Before its members exist; and it is then the run that they make."""
    planned = {str(m): graph.Planned(identity_hash(w2s_jax.load(m).record["identity"]), None) for m in members}
    elsewhere = {path.replace("labels", "planned"): value for path, value in planned.items()}
    expected = stages.identity(config(members))
    assert stages.identity(config(list(elsewhere)), elsewhere) == expected
    for change in ({"how": "vote"}, {"split": "a"}):
        assert stages.identity(config(members, **change)) != expected
    assert stages.identity(config(members[:2])) != expected


def test_students_and_a_report_take_it_for_supervisor_and_labels(members, tiny_model, tiny_task, tmp_path):
    """By the command line; documents of little weight count less."""
    base = ["--config=finetune", f"--config.model={tiny_model}", f"--config.task={tiny_task}", "--config.batch_size=8", "--config.split=b",
            "--config.max_length=64", "--config.epochs=1", "--config.mesh.data=1"]
    runs = ",".join(map(str, members))
    for argv in (
        ["--config=ensemble", f"--config.runs={runs}", "--config.how=disagreement", f"--workdir={tmp_path / 'ensemble'}"],
        [*base, f"--config.labels={tmp_path / 'ensemble'}", f"--workdir={tmp_path / 'student'}"],
        [*base, f"--workdir={tmp_path / 'ceiling'}"],
        ["--config=report", f"--config.weak={tmp_path / 'ensemble'}", f"--config.label={tmp_path / 'ensemble'}",
         f"--config.ceiling={tmp_path / 'ceiling'}", f"--config.student={tmp_path / 'student'}", f"--workdir={tmp_path / 'report'}"],
    ):
        assert main.main(argv) == 0, argv
    weights = labels_lib.read(tmp_path / "ensemble").weights
    assert np.ptp(weights) > 0 and abs(weights.mean() - 1) < 1e-5
    student = w2s_jax.load(tmp_path / "student")
    assert student.record["identity"]["labels"] == f"run:{identity_hash(stages.identity(config(members, how='disagreement')))}"
    assert (tmp_path / "report/report/report.md").is_file()


def test_done_is_done_and_nothing_heavy_is_loaded(members, tmp_path, cli, monkeypatch):
    runs = ",".join(map(str, members))
    argv = ["--config=ensemble", f"--config.runs={runs}", f"--workdir={tmp_path / 'run'}"]
    (tmp_path / "poison").mkdir()
    (tmp_path / "poison" / "jax.py").write_text("raise SystemExit('jax was imported')\n")
    done = cli(*argv, PYTHONPATH=f"{tmp_path / 'poison'}:{sys.path[0]}:{main.__file__.rsplit('/', 2)[0]}")
    assert done.returncode == 0, done.stderr
    assert w2s_jax.load(tmp_path / "run").record["devices"] is None and "3 supervisors (mean)" in done.stderr
    before = (tmp_path / "run/predictions/b.parquet").stat().st_mtime_ns
    monkeypatch.setattr(models, "load", None)
    monkeypatch.setattr(train, "train", None)
    assert main.main(argv) == 0
    assert (tmp_path / "run/predictions/b.parquet").stat().st_mtime_ns == before


# --------------------------------------------------------------------------- what does not fit


def copied(members, tmp_path):
    """Copies of the first two members, whose supervisors stay where they are."""
    return [shutil.copytree(m, tmp_path / m.name) for m in members[:2]]


def change_labels(run, change):
    """`change` spoils the table of a label run."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = run / "predictions" / "b.parquet"
    frame = change(w2s_jax.load(run).predictions("b"))
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), file)


def other_texts(frame):
    frame.loc[3:5, "text_sha"] = "0" * 16
    return frame


def other_truth(frame):
    frame.loc[3, "label"] = 1 - frame.loc[3, "label"]
    return frame


@pytest.mark.parametrize("change, message", [
    (lambda f: f.iloc[2:], r"do not fit those of .*: 2 documents of .* are absent|2 documents are not in"),
    (other_texts, "3 documents have another text, the first 'tiny/train/"),
    (other_truth, "1 documents have another label, the first 'tiny/train/"),
])
def test_members_of_other_documents_are_refused(members, tmp_path, change, message):
    one, two = copied(members, tmp_path)
    change_labels(two, change)
    with pytest.raises(UserError, match=message) as error:
        stages.run(config([one, two]), str(tmp_path / "run"))
    assert "predictions/b" in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "run").exists()


def without_results(run):
    (run / "results.json").unlink()


def another_supervisor(run):
    record = read_json(run / "config.json")
    record["identity"]["run"] = "run:" + "0" * 64
    write_json(run / "config.json", record)


def no_supervisor(run):
    record = read_json(run / "config.json")
    record["config"]["run"] = "runs/gone"
    write_json(run / "config.json", record)


def of_another_split(run):
    shutil.move(run / "predictions" / "b.parquet", run / "predictions" / "a.parquet")


@pytest.mark.parametrize("change, message", [
    (without_results, "run=.*: has no results.json yet, expected a finished run"),
    (another_supervisor, "was made with a run in .* that is another one now; label again"),
    (no_supervisor, "labels with the run runs/gone, which is not there"),
    (of_another_split, "b.parquet: no such predictions; this run has a"),
])
def test_a_run_that_is_no_member_says_why(members, tmp_path, change, message):
    one, two = copied(members, tmp_path)
    change(two)
    with pytest.raises(UserError, match=message):
        stages.run(config([one, two]), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("runs, message", [
    (lambda m, t: [m[0]], "config.runs: .*expected two or more different label run directories"),
    (lambda m, t: [m[0], m[0]], "config.runs: .*expected two or more different"),
    (lambda m, t: [m[0], shutil.copytree(m[0], t / "copy")], "are the same run, expected different ones"),
    (lambda m, t: [m[0], t / "nowhere"], "config.runs: '.*nowhere', no such file or folder"),
    (lambda m, t: [m[0], t], "config.runs: .* is not a run directory"),
    (lambda m, t: [m[0], m[1].parent / "weak-1"], "is a run of stage 'finetune', expected label"),
])
def test_wrong_lists_of_runs(members, tmp_path, runs, message):
    given = runs(members, tmp_path)
    with pytest.raises(UserError, match=message):
        stages.run(config(given), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_prepare_answers_before_jax(members):
    with pytest.raises(UserError, match="is a run of stage 'finetune', expected label"):
        stages.prepare(config([members[0], members[1].parent / "weak-1"]))
    assert stages.prepare(config(members)) == {}
    assert runlog.load(members[0]).config.stage == "label"
