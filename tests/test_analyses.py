"""The report's analyses: inherited errors, misfit, calibration, paired tests, and whom methods are compared with."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import scipy.special
import scipy.stats
import sweeps

from w2s_jax import analyses, comparison, metrics, plots, significance, tables
from w2s_jax import pairs as pairs_lib
from w2s_jax.errors import UserError
from w2s_jax.predictions import Predictions, read_predictions
from w2s_jax.stages import report

FILTER = ("xent", "logconf", "xent filter knn", "xent filter knn random")


def trio(classes: int, n: int = 300, seed: int = 0) -> analyses.Trio:
    """Three runs that err together now and then, on documents in groups of two."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    ids = [str(i) for i in range(n)]
    common = rng.normal(size=(n, classes))
    runs = [Predictions(ids, ids, labels, (common + rng.normal(size=(n, classes)) + skill * np.eye(classes)[labels]).astype(np.float32),
                        [str(i // 2) for i in range(n)]) for skill in (1.0, 1.5, 2.5)]  # fmt: skip
    return analyses.Trio(*runs)


def edit(root: Path, **changes) -> None:
    """Sets keys of the pairs of ROOT/sweep.json: `key={method: value}`."""
    record = json.loads((root / "sweep.json").read_text())
    for pair in record["pairs"]:
        pair.update({key: values[pair["method"]] for key, values in changes.items() if pair["method"] in values})
    (root / "sweep.json").write_text(json.dumps(record))


@pytest.mark.parametrize("classes", [2, 3])
def test_inherited_errors_by_hand(classes):
    t = trio(classes)
    boot = metrics.Bootstrap(t.weak.groups, 0, 200)
    found = analyses.agreement(boot, t)
    weak, label = t.weak.logits.argmax(1), t.weak.labels
    for name, run in (("student", t.student), ("ceiling", t.ceiling)):
        own = run.logits.argmax(1)
        repeated = [own[i] == weak[i] for i in range(len(own)) if weak[i] != label[i]]
        shared = [own[i] == weak[i] for i in range(len(own)) if own[i] != label[i]]
        assert found[f"{name}_wrong"].value == pytest.approx(np.mean(repeated))
        assert found[f"{name}_shared"].value == pytest.approx(np.mean(shared))
        direct = metrics.agreement(own, weak, label)
        assert [found[f"{name}_{part}"].value for part in ("all", "right", "wrong")] == \
            pytest.approx([direct[part] for part in ("all", "right", "wrong")])
    assert found["inherited"].value == pytest.approx(found["student_wrong"].value - found["ceiling_wrong"].value)
    # Replicates: the same numbers on the drawn documents.
    drawn = next(boot.counts())[3][boot.codes(t.weak.groups)]
    wrong = weak != label
    for name, run in (("student_wrong", t.student), ("ceiling_wrong", t.ceiling)):
        same = run.logits.argmax(1) == weak
        assert found[name].replicates[3] == pytest.approx((drawn * (same & wrong)).sum() / (drawn * wrong).sum())


@pytest.mark.parametrize("classes", [2, 3])
def test_misfit_by_scipy(classes):
    t = trio(classes)
    found = analyses.misfit(metrics.Bootstrap(t.weak.groups, 0, 100), t)
    w, s = (scipy.special.softmax(run.logits.astype(np.float64), axis=1) for run in (t.weak, t.student))
    y = np.eye(classes)[t.weak.labels]
    want = {
        "misfit_squared": ((s - w) ** 2).sum(1).mean(), "misfit_kl": scipy.special.rel_entr(s, w).sum(1).mean(),
        "misfit_xent": -(w * np.log(s)).sum(1).mean(), "gain_squared": ((w - y) ** 2).sum(1).mean() - ((s - y) ** 2).sum(1).mean(),
        "gain_xent": -(y * np.log(w)).sum(1).mean() + (y * np.log(s)).sum(1).mean(),
    }  # fmt: skip
    assert {name: found[name].value for name in want} == pytest.approx(want, rel=1e-9)
    assert np.nanmin(found["misfit_kl"].replicates) > 0 and found["gain_xent"].replicates.std() > 0


@pytest.mark.parametrize(("loss", "misfit"), [("squared", "misfit_squared"), ("xent", "misfit_kl")])
def test_the_gain_is_the_misfit_for_a_projection(loss, misfit):
    """The theorems where their conditions hold: the class is all constants, the truth is one of them, .3 whatever the weak model says."""
    weak = np.random.default_rng(0).normal(0.2, 1.5, 200).repeat(10)  # log-odds
    labels = np.tile(np.arange(10) < 3, 200).astype(int)
    closest = {"squared": scipy.special.logit(scipy.special.expit(weak).mean()), "xent": weak.mean()}[loss]  # KL: the geometric mean
    ids = [str(i) for i in range(len(weak))]
    runs = [Predictions(ids, ids, labels, np.stack([-z / 2, z / 2], 1).astype(np.float32), ids) for z in (weak, 0 * weak + closest)]
    found = analyses.misfit(metrics.Bootstrap(ids, 0, 40), analyses.Trio(*runs, runs[0]))
    assert found[f"gain_{loss}"].value == pytest.approx(found[misfit].value, rel=1e-5) and found[misfit].value > 0.1


def test_calibration_and_reliability_agree():
    run = trio(2).student
    found = analyses.calibration(metrics.Bootstrap(run.groups, 0, 100), run)
    n, confidence, right = metrics.reliability(run.logits, run.labels)
    assert n.sum() == len(run.ids) and right.sum() / n.sum() == pytest.approx(metrics.accuracy(run.logits, run.labels))
    assert found["overconfidence"].value == pytest.approx((confidence.sum() - right.sum()) / n.sum())
    assert found["ece"].value == pytest.approx(metrics.ece(run.logits, run.labels))
    assert found["ece"].value >= abs(found["overconfidence"].value) and metrics.interval(found["ece"].replicates) is None


def test_many_ratios_in_one_pass_equal_each_alone():
    rng = np.random.default_rng(0)
    boot = metrics.Bootstrap([str(i % 70) for i in range(200)], 1, 150)
    codes = boot.codes([str(i % 70) for i in range(200)])
    tops, bottoms = rng.normal(size=(200, 4)), np.stack([np.ones(200), np.ones(200), rng.random(200), np.zeros(200)], 1)
    together = boot.ratios(tops, bottoms, codes)
    weights = np.concatenate(list(boot.counts()))[:, codes]
    np.testing.assert_allclose(together[:, :3], (weights @ tops[:, :3]) / (weights @ bottoms[:, :3]), rtol=1e-9)
    np.testing.assert_allclose(boot.ratio(tops[:, 0], bottoms[:, 0], codes), together[:, 0], rtol=1e-9)
    assert not np.isfinite(together[:, 3]).any()


def by_seed(values: dict, gap_clear=True) -> tuple[list[dict], list[dict]]:
    """Rows as in a Comparison from {(task, method): [student by seed]}; weak .5 and ceiling .9."""
    rows, seeds = [], []
    for (task, method), students in values.items():
        base = {"task": task, "weak_model": "w", "strong_model": "s", "method": method, "metric": "accuracy", "weak": 0.5, "ceiling": 0.9}
        rows.append({**base, "gap_clear": gap_clear if isinstance(gap_clear, bool) else gap_clear[task]})
        seeds += [{**base, "student": value, "seeds": [i]} for i, value in enumerate(students) if value is not None]
    return rows, seeds


def against(tasks, method="new", opponent="xent", kind="baseline") -> dict:
    return {(task, "w", "s", method): {kind: opponent} for task in tasks}


def test_paired_tests_are_scipys():
    rng = np.random.default_rng(0)
    tasks = [f"t{i}" for i in range(21)]
    old, new = rng.normal(0.7, 0.05, (21, 3)), rng.normal(0.72, 0.05, (21, 3))
    values = {(t, m): list(v[i]) for i, t in enumerate(tasks) for m, v in (("xent", old), ("new", new))}
    found = {r["measure"]: r for r in significance.paired_tests(*by_seed(values), against(tasks))}
    assert set(found) == {"accuracy", "pgr_accuracy"}
    a, b = new.mean(1), old.mean(1)  # seeds are averaged first
    for row, x, y in ((found["accuracy"], a, b), (found["pgr_accuracy"], (a - 0.5) / 0.4, (b - 0.5) / 0.4)):
        assert (row["n"], row["n_tasks"], row["left_out"], row["wins"], row["losses"]) == (21, 21, 0, (a > b).sum(), (a < b).sum())
        t = scipy.stats.ttest_rel(x, y)
        assert (row["t"], row["t_p"]) == pytest.approx((t.statistic, t.pvalue))
        assert row["wilcoxon_p"] == pytest.approx(scipy.stats.wilcoxon(x, y, method="exact").pvalue)
        assert row["mean_difference"] == pytest.approx((x - y).mean())


@pytest.mark.parametrize(("differences", "want"), [
    ([0.1], {"n": 1, "t_p": None, "wilcoxon_p": 1.0, "wins": 1}),
    ([0.1, 0.2, 0.3, 0.4, 0.5], {"n": 5, "wilcoxon_p": 0.0625, "wilcoxon_n": 5}),  # as low as 5 can go
    ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], {"n": 6, "wilcoxon_p": 0.03125}),
    ([0.1] * 5, {"t_p": None, "wilcoxon_p": 0.0625}),  # tied ranks: still exact
    ([0.0, 0.0], {"n": 2, "ties": 2, "t_p": None, "wilcoxon_p": None, "wilcoxon_n": 0}),
    ([0.0, -0.1, 0.2], {"ties": 1, "wins": 1, "losses": 1, "wilcoxon_n": 2}),
])  # fmt: skip
def test_small_paired_tests(differences, want):
    tasks = [f"t{i}" for i in range(len(differences))]
    values = {(t, m): [0.3 + (d if m == "new" else 0)] for t, d in zip(tasks, differences, strict=True) for m in ("xent", "new")}
    row = next(r for r in significance.paired_tests(*by_seed(values), against(tasks)) if r["measure"] == "accuracy")
    assert {k: row[k] for k in want} == pytest.approx(want)
    text = tables.tests([row])
    assert ("(n < 6)" in text) == (0 < row["wilcoxon_n"] < 6)


def test_pgr_tests_leave_unclear_gaps_out_and_seeds_are_matched():
    values = {("a", "xent"): [0.6, 0.7], ("a", "new"): [None, 0.8], ("b", "xent"): [0.6], ("b", "new"): [0.7]}
    found = {r["measure"]: r for r in significance.paired_tests(*by_seed(values, {"a": True, "b": False}), against("ab"))}
    assert found["accuracy"]["n"] == 2 and found["accuracy"]["mean_difference"] == pytest.approx(0.1)  # seed 1 of a, seed 0 of b
    assert (found["pgr_accuracy"]["n"], found["pgr_accuracy"]["left_out"]) == (1, 1)
    assert found["pgr_accuracy"]["mean_difference"] == pytest.approx(0.25)


def test_methods_are_compared_with_baseline_and_control(tmp_path):
    root = sweeps.make_root(tmp_path / "sweep", seeds=(0, 1), methods=FILTER, n=100, tasks=("sciq", "boolq"))
    edit(root, control={"xent filter knn": "xent filter knn random", "logconf": "nothing"})
    found = comparison.compare(root, replicates=50)
    rows = {(r["method"], r["kind"], r["against"]): r["n"] for r in found.tests if r["measure"] == "accuracy"}
    assert rows == {("logconf", "baseline", "xent"): 4, ("xent filter knn", "baseline", "xent"): 4,
                    ("xent filter knn", "control", "xent filter knn random"): 4, ("xent filter knn random", "baseline", "xent"): 4}
    assert found.notes == ["logconf: its control nothing is not there (yet), and they are not compared (8 students)"]
    # by task, pair and method, each in the order of sweep.json
    order = [(r["task"], r["strong_model"], r["method"]) for r in found.rows if r["metric"] == "accuracy"]
    assert order == [(t, s, m) for t in ("sciq", "boolq") for s in ("large", "medium") for m in FILTER]


def test_a_run_may_serve_seeds_of_other_documents(tmp_path):
    """An ensemble, or zero-shot prompting, stands beside the runs of every seed; these may lack documents of their own."""
    root = sweeps.make_root(tmp_path / "sweep", seeds=(0, 1), pairs=(("small", "large"),), n=100, drop={"finetune-large-xent-s0-b": 30})
    shared = pairs_lib.read_pairs(root)[0]["runs"]["weak"]
    record = json.loads((root / "sweep.json").read_text())
    for pair in record["pairs"]:
        pair["runs"]["weak"] = shared
    (root / "sweep.json").write_text(json.dumps(record))
    right = read_predictions(root / shared).right
    found = [r for r in comparison.compare(root, replicates=50).by_seed if r["metric"] == "accuracy" and r["method"] == "xent"]
    assert [(r["n_test"], r["weak"]) for r in found] == [(70, pytest.approx(right[:70].mean())), (100, pytest.approx(right.mean()))]


def test_a_sweep_without_xent_compares_with_the_method_s_loss():
    base = {"task": "t", "weak": "w", "strong": "s", "runs": {}, "oracle": False}
    found = pairs_lib.opponents([{**base, "method": m} for m in ("logconf", "logconf s2s 1", "probe knn")])
    assert found == {("t", "w", "s", "logconf s2s 1"): {"baseline": "logconf"}}


def test_labels_that_a_filter_left_out_do_not_count(tmp_path):
    """The student of the random control reads b_random.parquet of the filter's run."""
    root = sweeps.make_root(tmp_path / "sweep", seeds=(0,), methods=FILTER, pairs=(("small", "large"),), n=100)
    pair = {p["method"]: p for p in pairs_lib.read_pairs(root)}
    labels = root / pair["xent"]["runs"]["label"] / "predictions" / "b.parquet"
    plain = read_predictions(labels.parent.parent, "b")
    frame = pyarrow.parquet.read_table(labels).to_pandas()
    frame["weight"] = plain.right.astype(np.float32) * 2
    pyarrow.parquet.write_table(pyarrow.Table.from_pandas(frame), labels)
    frame["weight"] = (np.arange(100) < 50).astype(np.float32)
    pyarrow.parquet.write_table(pyarrow.Table.from_pandas(frame), labels.with_name("b_random.parquet"))
    run = root / pair["xent filter knn random"]["runs"]["student"] / "config.json"
    record = json.loads(run.read_text())
    record["config"]["labels"] = str(labels.with_name("b_random.parquet"))
    run.write_text(json.dumps(record))
    found = comparison.compare(root, replicates=50)
    accuracy = {r["method"]: r["label_accuracy"] for r in found.agreement}
    assert accuracy == pytest.approx({m: 1.0 for m in FILTER[:3]} | {FILTER[3]: plain.right[:50].mean()})


@pytest.mark.parametrize("how", ["sweep.json", "config.json"])
def test_an_oracle_is_marked_everywhere(tmp_path, capsys, how):
    root = sweeps.make_root(tmp_path / "sweep", seeds=(0,), pairs=(("small", "large"),), n=60)
    if how == "sweep.json":
        edit(root, oracle={"logconf": True})
    else:
        file = root / next(p for p in pairs_lib.read_pairs(root) if p["method"] == "logconf")["runs"]["student"] / "config.json"
        file.write_text(json.dumps({"config": json.loads(file.read_text())["config"] | {"select": "oracle"}}))
    report.run(sweeps.report_config(), str(root))
    shown = capsys.readouterr().out
    assert "logconf (oracle)" in shown and "| logconf |" not in shown and 'marked "(oracle)"' in shown
    assert set(report.table(str(root), replicates=50)["method"]) == {"xent", "logconf (oracle)"}
    tests = report.table(str(root), "tests", replicates=50)
    assert set(zip(tests["method"], tests["against"], strict=True)) == {("logconf (oracle)", "xent")}


def test_an_oracle_is_compared_with_the_oracles_baseline():
    base = {"task": "t", "weak": "w", "strong": "s", "runs": {}}
    methods = (("xent", False), ("xent (oracle)", True), ("logconf", False), ("logconf (oracle)", True))
    found = pairs_lib.opponents([{**base, "method": m, "oracle": oracle} for m, oracle in methods])
    assert {key[3]: value["baseline"] for key, value in found.items()} == {
        "xent (oracle)": "xent", "logconf": "xent", "logconf (oracle)": "xent (oracle)"}  # fmt: skip


def test_older_sweeps_call_the_method_loss(tmp_path):
    root = sweeps.make_root(tmp_path / "sweep", seeds=(0,), n=60)
    new = pairs_lib.read_pairs(root)
    (root / "sweep.json").write_text((root / "sweep.json").read_text().replace('"method":', '"loss":'))
    assert pairs_lib.read_pairs(root) == new and {p["method"] for p in new} == {"xent", "logconf"}


@pytest.mark.parametrize(("changes", "says"), [
    ({"control": {"xent": 3}}, "control is 3"), ({"oracle": {"xent": "yes"}}, "oracle is 'yes'"),
    ({"method": {"xent": None}}, "method is None"), ({"method": {"logconf": "xent"}}, "repeats"),
])  # fmt: skip
def test_wrong_pairs_get_one_line(tmp_path, changes, says):
    root = sweeps.make_root(tmp_path / "sweep", seeds=(0,), n=20)
    edit(root, **changes)
    with pytest.raises(UserError, match=says):
        pairs_lib.read_pairs(root)


@pytest.mark.parametrize(("config", "method"), [
    ({"loss": "product"}, "product"), ({"stage": "probe", "probe": "knn"}, "probe knn"), ({"stage": "prompt", "shots": 0}, "zero-shot"),
    ({"stage": "prompt", "shots": 4}, "few-shot"), ({"stage": "pretrain"}, None),
])  # fmt: skip
def test_three_runs_of_any_stage(tmp_path, config, method):
    runs = {}
    for role, extra in (("weak", {"stage": "ensemble", "how": "mean", "model": "w"}), ("ceiling", {"loss": "xent"}), ("student", config)):
        runs[role] = str(tmp_path / role)
        (tmp_path / role).mkdir()
        (tmp_path / role / "config.json").write_text(json.dumps({"config": {"task": "sciq", "model": "m", "seed": 0, **extra}}))
    if method is None:
        with pytest.raises(UserError, match="expected a run of stage"):
            pairs_lib.pair_of_runs(**runs)
    else:
        pair, = pairs_lib.pair_of_runs(**runs)
        assert (pair["method"], pair["weak"], pair["strong"]) == (method, "w mean", "m")


def test_every_table_is_a_frame_and_a_file(tmp_path):
    root = sweeps.make_root(tmp_path / "sweep", seeds=(0, 1), n=60, pairs=(("small", "large"),))
    found = comparison.compare(root, replicates=50)
    report.write(found, tmp_path / "report", title="x", replicates=50)
    for name in tables.FRAMES:
        frame = tables.frame(found, name)
        assert len(frame) and list(frame.columns) == (tmp_path / "report" / f"{name}.csv").read_text().splitlines()[0].split(","), name
        assert all(f"{c[:-3]}_hi" in frame.columns for c in frame.columns if c.endswith("_lo")), name
        assert not any(frame[c].map(type).eq(list).any() for c in frame.columns), name


def test_an_unknown_table_is_named(tmp_path):
    with pytest.raises(UserError, match="calibration"):
        report.table(str(tmp_path), "nothing")


def test_a_method_keeps_its_colour_and_marker():
    many = ["xent", "logconf", "xent s2s 1", "xent s2s 2", "xent bootstrap", "probe logistic", "probe knn", "xent filter knn",
            "xent filter knn random", "xent relabel topofilter", "zero-shot", "few-shot", "logconf (oracle)", "my own method"]
    styles = plots.styles_of(many)
    assert len(set(styles.values())) == len(many)
    assert all(plots.styles_of([m])[m] == styles[m] for m in many) and plots.styles_of(many[::-1]) == styles
