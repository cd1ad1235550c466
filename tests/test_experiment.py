"""What a sweep makes besides weak, ceiling and student: strong-to-strong, bootstrapping, probes, filters, ensembles and floors."""

import json

import numpy as np
import pytest
import tiny
from test_sweep import build, ladder, sweep  # noqa: F401

import w2s_jax
from w2s_jax import main, stages
from w2s_jax.config import load
from w2s_jax.errors import UserError

ROOT = "/nowhere/"


@pytest.fixture(autouse=True)
def fast(fast_compiles):
    pass


def rows(found, **wanted):
    return [p for p in found.pairs if all(p[k] == v for k, v in wanted.items())]


def taught_by(found, run):
    """The run that a student's labels lead back to, through the run that made them."""
    labels = found.nodes[run].config.labels.removeprefix(ROOT)
    return labels, found.nodes[labels].config.run.removeprefix(ROOT)


def test_strong_to_strong(ladder, tiny_task):  # noqa: F811
    found = build(sweep(ladder[:2], [tiny_task], s2s_rounds=2, losses=("xent", "window"), base__loss_args__radius="midweak"))
    for loss in ("xent", "window"):
        (first,), (one,), (two,) = (rows(found, method=m) for m in (loss, f"{loss} s2s 1", f"{loss} s2s 2"))
        assert taught_by(found, first["runs"]["student"])[1] == first["runs"]["weak"]
        for row, teacher in ((one, first), (two, one)):
            labels, run = taught_by(found, row["runs"]["student"])
            assert run == teacher["runs"]["student"] and labels == row["runs"]["label"]
            student = found.nodes[row["runs"]["student"]].config
            assert (student.model, student.loss, student.split) == (ladder[1], loss, "b")  # a fresh copy, on the same documents
            assert row["runs"]["weak"] == first["runs"]["weak"] and row["runs"]["ceiling"] == first["runs"]["ceiling"]
            assert student.stats_labels == (ROOT + first["runs"]["label"] if loss == "window" else "")
    assert len(found.nodes) == 4 + 1 + 2 * 4  # two of ground truth, labels, two students; and for each loss two rounds of two runs


def test_rounds_of_some_losses(ladder, tiny_task):  # noqa: F811
    found = build(sweep(ladder[:2], [tiny_task], s2s_rounds=1, losses=("xent", "kl"), s2s_losses=("kl",)))
    assert [p["method"] for p in found.pairs] == ["xent", "kl", "kl s2s 1"]


def test_bootstrapping_climbs_the_ladder(ladder, tiny_task):  # noqa: F811
    found = build(sweep(ladder, [tiny_task], bootstrap=True))
    (row,) = rows(found, method="xent bootstrap")
    assert (row["weak"], row["strong"]) == ("tiny", "large")
    _, between = taught_by(found, row["runs"]["student"])
    assert between == rows(found, weak="tiny", strong="small", method="xent")[0]["runs"]["student"]  # it is made once
    assert taught_by(found, between)[1] == row["runs"]["weak"]


def test_longer_ladders_have_longer_chains(ladder, tiny_task, tmp_path):  # noqa: F811
    four = [*ladder, str(tiny.write_model(tmp_path / "huge", seed=5, n_layer=3))]
    found = build(sweep(four, [tiny_task], bootstrap=True))
    assert [(p["weak"], p["strong"]) for p in found.pairs if p["method"] == "xent bootstrap"] == [
        ("tiny", "large"), ("tiny", "huge"), ("small", "huge")]
    run, chain = rows(found, weak="tiny", strong="huge", method="xent bootstrap")[0]["runs"]["student"], []
    while found.nodes[run].config.labels:
        run = taught_by(found, run)[1]
        chain.append(found.nodes[run].config.model)
    assert chain == [four[2], four[1], four[0]]


def test_probes_filters_and_labels_made_anew(ladder, tiny_task):  # noqa: F811
    found = build(sweep(ladder[:2], [tiny_task], probes=("knn", "logistic"), filters=("topofilter",), relabels=("logistic",),
                        losses=("logconf", "xent"), probe__probe_args__k=7, base__n_val=4))
    (plain,) = rows(found, method="logconf")
    for name in ("knn", "logistic"):
        (row,) = rows(found, method=f"probe {name}")
        probe = found.nodes[row["runs"]["student"]].config
        assert (probe.stage, probe.mode, probe.probe, probe.model, probe.split) == ("probe", "predict", name, ladder[1], "b")
        assert (probe.labels, probe.features, probe.n_val) == (ROOT + plain["runs"]["label"], ROOT + "features", 4)
        assert probe.probe_args.k == (7 if name == "knn" else None)
    (kept,), (control,) = rows(found, method="logconf filter topofilter"), rows(found, method="logconf filter topofilter random")
    assert kept["control"] == control["method"] and "control" not in plain
    run = kept["runs"]["label"]
    assert found.nodes[run].config.mode == "filter" and control["runs"]["label"] == run
    labels = [found.nodes[row["runs"]["student"]].config.labels for row in (kept, control)]
    assert labels == [ROOT + run, f"{ROOT}{run}/predictions/b_random.parquet"]
    (anew,) = rows(found, method="logconf relabel logistic")
    assert found.nodes[anew["runs"]["label"]].config.mode == "relabel"
    assert {found.nodes[row["runs"]["student"]].config.loss for row in (kept, control, anew)} == {"logconf"}


@pytest.mark.parametrize("members, seeds, models, expected", [
    ("seeds", (0, 1, 2), 2, [("tiny", "large", 3)] * 3), ("models", (0,), 3, [("small", "large", 2)]),
])
def test_ensembles(members, seeds, models, expected, ladder, tiny_task):  # noqa: F811
    rungs = [ladder[0], ladder[2]] if models == 2 else ladder
    found = build(sweep(rungs, [tiny_task], ensembles=("mean", "vote"), members=members, seeds=seeds))
    here = rows(found, method="xent ensemble vote")
    assert [(p["weak"], p["strong"], len(found.nodes[p["runs"]["label"]].config.runs)) for p in here] == expected
    for row in here:
        node = found.nodes[row["runs"]["label"]]
        assert node.config.how == "vote" and set(node.parents) == {r.removeprefix(ROOT) for r in node.config.runs}
        (plain,) = rows(found, method="xent", weak=row["weak"], strong=row["strong"], seed=row["seed"])
        assert row["runs"]["weak"] == plain["runs"]["weak"] and plain["runs"]["label"] in node.parents
    assert len({row["runs"]["label"] for row in here}) == 1  # one ensemble for the students of all seeds


def test_floors_and_oracles(ladder, tiny_task):  # noqa: F811
    found = build(sweep(ladder[:2], [tiny_task], floors=("zero_shot", "few_shot"), shots=3, seeds=(0, 1),
                        base__select="oracle", base__n_val=4, base__eval_every=2))
    zero, few = rows(found, method="zero-shot"), rows(found, method="few-shot")
    assert len({p["runs"]["student"] for p in zero}) == 1 and len({p["runs"]["student"] for p in few}) == 2
    assert [found.nodes[p["runs"]["student"]].config.shots for p in (zero[0], few[0])] == [0, 3]
    assert found.nodes[zero[0]["runs"]["student"]].config.model == ladder[1]
    assert rows(found, method="xent")[0]["oracle"] is True and "oracle" not in zero[0]


@pytest.mark.parametrize("keys, message", [
    ({"bootstrap": True}, "config.bootstrap: True, but .* has no model between the ends"),
    ({"models": 3, "bootstrap": True, "pairs": "adjacent"}, "pairs=adjacent leaves no model between"),
    ({"ensembles": ("mean",)}, "over one seed, expected two seeds or more, or members=models"),
    ({"ensembles": ("mean",), "members": "models"}, "over one supervisor, expected three models or more"),
    ({"probes": ("knn", "knn")}, "config.probes: .*names one twice"),
    ({"s2s_losses": ("kl",)}, "config.s2s_losses: 'kl' is none of config.losses"),
])
def test_keys_that_do_not_fit_together(keys, message, ladder, tiny_task):  # noqa: F811
    keys = dict(keys)
    models = ladder[: keys.pop("models", 2)]
    with pytest.raises(UserError, match=message):
        build(sweep(models, [tiny_task], **keys))


@pytest.mark.parametrize("flag, message", [
    ("--config.probes=svm", "config.probes: 'svm', expected one of knn, logistic"),
    ("--config.floors=zero-shot", "config.floors: 'zero-shot', expected one of zero_shot, few_shot"),
    ("--config.members=tasks", "config.members: 'tasks', expected one of seeds, models"),
    ("--config.s2s_rounds=-1", "config.s2s_rounds: -1, expected a number at least 0"),
    ("--config.floors=few_shot --config.shots=0", "config.shots: 0"),
])
def test_values_that_are_none(flag, message, tmp_path, capsys):
    assert main.main(["--config=sweep:runlocal", *flag.split(), f"--workdir={tmp_path / 'root'}"]) == 2
    assert message.split(",")[0] in capsys.readouterr().err and not (tmp_path / "root").exists()


def test_all_of_it_runs(tmp_path):
    """On the embedded world: every run is made, filters and their controls are of one size, features are computed once."""
    config = tiny.set_keys(
        load("sweep", "runlocal"), rungs=("small", "medium", "large"), seeds=(0, 1), s2s_rounds=1, bootstrap=True,
        ensembles=("disagreement",),
        probes=("logistic",), filters=("knn",), relabels=("mean_difference",), floors=("zero_shot", "few_shot"), shots=2,
        base__n_train=128, base__n_test=64, base__batch_size=16, base__epochs=1, pretrain__steps=8, probe__probe_args__k=5)
    results = stages.run(config, str(tmp_path / "root"))
    root = tmp_path / "root"
    assert set(results["runs"].values()) == {"done"}
    stores = sorted(p.name for p in (root / "features").iterdir())
    assert len(stores) == 2, stores  # medium's and large's, for all probes, seeds and supervisors
    runs = {pair["method"]: pair["runs"]["student"] for pair in results["pairs"]}
    kept, control = (w2s_jax.load(root / runs[m]).results for m in ("xent filter knn", "xent filter knn random"))
    assert kept["n_train"] == control["n_train"] == 64 - 6 and kept["n_dropped"]["filtered"] == control["n_dropped"]["filtered"] == 6
    filtered, random = (w2s_jax.load(root / runs[m]).record["identity"]["labels"] for m in ("xent filter knn", "xent filter knn random"))
    assert random == f"{filtered}/b_random.parquet"
    text = (root / "report" / "report.md").read_text()
    for method in runs:
        assert f"| {method} " in text, method
    again = stages.run(config, str(root))
    assert again["runs"] == results["runs"]
    labels = w2s_jax.load(root / next(n for n in results["runs"] if "/ensemble-" in n)).predictions("b")
    assert np.isclose(labels.weight.mean(), 1, atol=1e-5)
    assert json.loads((root / "sweep.json").read_text())["pairs"] == results["pairs"]
