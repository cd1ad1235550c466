"""The report, on small sweep roots written by hand."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sweeps

from w2s_jax import comparison, metrics, predictions, tables
from w2s_jax import pairs as pairs_lib
from w2s_jax.errors import UserError
from w2s_jax.stages import report

TRIO = ("weak", "student", "ceiling")


def test_report_files_and_numbers(tmp_path, capsys):
    root = sweeps.make_root(tmp_path / "sweep")
    out = report.run(sweeps.report_config(), str(root))
    shown = capsys.readouterr().out
    folder = root / "report"
    names = {p.name for p in folder.iterdir()}
    assert names == {"report.md", *(f"{a}.csv" for a in tables.FRAMES),
                     *(f"{a}.{b}" for a in ("accuracy", "auroc", "pgr", "misfit", "reliability") for b in ("png", "svg"))}  # fmt: skip
    assert (folder / "accuracy.png").read_bytes()[:4] == b"\x89PNG" and b"<svg" in (folder / "pgr.svg").read_bytes()[:600]
    text = (folder / "report.md").read_text()
    assert "![pgr](pgr.png)" in text and "![" not in shown
    for heading in ("Median over pairs", "Accuracy", "AUROC", "Agreement with the supervisor", "By seed"):
        assert f"## {heading}\n" in text and f"## {heading}\n" in shown
    # the numbers are those of the runs
    row = next(r for r in out["rows"] if r["strong_model"] == "large" and r["method"] == "xent" and r["metric"] == "accuracy")
    entry = [p for p in json.loads((root / "sweep.json").read_text())["pairs"] if p["strong"] == "models/large" and p["method"] == "xent"]
    said = {role: [json.loads((root / p["runs"][role] / "results.json").read_text())["accuracy"] for p in entry] for role in TRIO}
    mean = {role: np.mean(values) for role, values in said.items()}
    for role in TRIO:
        assert row[role] == pytest.approx(mean[role])
    assert row["pgr"] == pytest.approx((mean["student"] - mean["weak"]) / (mean["ceiling"] - mean["weak"]))
    assert row["pgr_ci"][0] < row["pgr"] < row["pgr_ci"][1] and row["gap_clear"] and row["undefined"] == 0
    assert (row["n_test"], row["n_groups"], row["majority_baseline"], row["seeds"]) == (400, 200, 0.5, [0, 1, 2])
    assert len(out["rows"]) == 2 * 2 * 2 and len(out["by_seed"]) == 3 * len(out["rows"])
    assert out["missing"] == [] and out["notes"] == []


def test_reports_of_equal_runs_are_equal_bytes(tmp_path):
    root = sweeps.make_root(tmp_path / "sweep", seeds=(0,), methods=("xent",), pairs=(("small", "large"),), n=60)
    report.run(sweeps.report_config(), str(root))
    first = {p.name: p.read_bytes() for p in (root / "report").iterdir()}
    report.run(sweeps.report_config(), str(root))
    assert first == {p.name: p.read_bytes() for p in (root / "report").iterdir()}


def test_the_tables_go_into_a_text_file(tmp_path):
    root = sweeps.make_root(tmp_path / "sweep", seeds=(0, 1), methods=("xent",), n=60)
    page = tmp_path / "README.md"
    page.write_text("# Title\n<!-- report -->\nold\n<!-- end of report -->\nthe end\n")
    for _ in range(2):  # the second time replaces the first
        report.run(sweeps.report_config(into=str(page)), str(root))
    text = page.read_text()
    assert text.startswith("# Title\n<!-- report -->\n") and text.endswith("<!-- end of report -->\nthe end\n")
    assert "old" not in text and text.count("| weak -> strong") == 3 and text.count("By seed:") == 1
    page.write_text("no marks")
    with pytest.raises(UserError, match="<!-- report -->"):
        report.run(sweeps.report_config(into=str(page)), str(root))


def test_table_is_a_frame(tmp_path):
    root = sweeps.make_root(tmp_path / "sweep", seeds=(0, 1), methods=("xent",))
    frame = report.table(str(root), replicates=100)
    assert len(frame) == 2 * 2 and set(frame["metric"]) == {"accuracy", "auroc"} and set(frame["seeds"]) == {"0 1"}
    assert (frame["pgr_lo"] <= frame["pgr_hi"]).all() and {"gap_lo", "gain_hi", "undefined"} <= set(frame.columns)
    assert set(report.table(str(root), "by_seed", replicates=100)["seeds"]) == {"0", "1"}


def test_pgr_equals_pgr_bootstrap_on_the_same_logits(tmp_path):
    root = sweeps.make_root(tmp_path / "sweep", methods=("xent",), pairs=(("small", "large"),))
    pairs = pairs_lib.read_pairs(root)
    stacks = {role: np.stack([predictions.read_predictions(root / p["runs"][role]).logits for p in pairs]) for role in TRIO}
    first = predictions.read_predictions(root / pairs[0]["runs"]["weak"])
    row = comparison.compare(root, replicates=300).rows[0]
    direct = metrics.pgr_bootstrap(stacks["weak"], stacks["student"], stacks["ceiling"], first.labels, first.groups, replicates=300)
    for key in ("weak", "student", "ceiling", "gap", "gain", "pgr"):
        assert row[key] == pytest.approx(direct[key])
        assert row[f"{key}_ci"] == pytest.approx(direct[f"{key}_ci"], abs=0.05)  # the same up to the draws


def test_missing_runs_are_listed_and_other_seeds_still_reported(tmp_path, capsys):
    root = sweeps.make_root(tmp_path / "sweep", unfinished=("finetune-large-logconf-s1-small", "finetune-small-xent-s2-a"))
    out = report.run(sweeps.report_config(), str(root))
    runs = {m["run"]: m for m in out["missing"]}
    assert set(runs) == {"sciq/finetune-large-logconf-s1-small", "sciq/finetune-small-xent-s2-a"}
    assert runs["sciq/finetune-small-xent-s2-a"]["blocks"] == 4 and runs["sciq/finetune-small-xent-s2-a"]["state"] == "stopped"
    seeds = {(r["strong_model"], r["method"]): r["seeds"] for r in out["rows"]}
    assert seeds["large", "logconf"] == [0] and seeds["large", "xent"] == [0, 1]
    shown = capsys.readouterr().out
    assert "2 runs are not done" in shown and "sciq/finetune-large-logconf-s1-small" in shown


def test_a_median_counts_clear_pairs_only(tmp_path):
    root = sweeps.make_root(tmp_path / "sweep", skill={"small": 0.7, "medium": 0.7, "large": 0.95})
    found = comparison.compare(root, replicates=200)
    rows = {r["strong_model"]: r for r in found.rows if r["metric"] == "accuracy" and r["method"] == "xent"}
    assert rows["large"]["gap_clear"] and not rows["medium"]["gap_clear"]
    median = next(m for m in found.medians if m["metric"] == "accuracy" and m["method"] == "xent")
    assert (median["n_pairs"], median["left_out"]) == (1, 1)
    assert median["pgr"] == pytest.approx(rows["large"]["pgr"]) and median["pgr_ci"] == pytest.approx(rows["large"]["pgr_ci"])
    assert rows["medium"]["undefined"] > 0.05 and rows["medium"]["pgr_ci"] is None
    assert any("too small" in w or "no gap" in w for w in found.warnings)
    shown = tables.recovered(found.rows)
    assert "withheld" in shown or "undefined" in shown


def test_documents_that_a_run_lacks_are_counted_and_left_out_everywhere(tmp_path):
    lacking = {"finetune-large-xent-s0-b": 30}
    root = sweeps.make_root(tmp_path / "sweep", seeds=(0,), methods=("xent",), pairs=(("small", "large"),), drop=lacking)
    found = comparison.compare(root, replicates=50)
    assert {r["n_test"] for r in found.rows} == {370}
    assert len(found.notes) == 1 and "30 of 400 test documents" in found.notes[0]


def test_unknown_labels_are_left_out_with_a_note(tmp_path):
    root = sweeps.make_root(tmp_path / "sweep", seeds=(0,), methods=("xent",), pairs=(("small", "large"),))
    for run in {r for p in pairs_lib.read_pairs(root) for role, r in p["runs"].items() if role != "label"}:
        file = root / run / "predictions" / "test.parquet"
        frame = pyarrow.parquet.read_table(file).to_pandas()
        frame["label"] = frame["label"].astype("Int32")
        frame.loc[:9, "label"] = None
        pyarrow.parquet.write_table(pyarrow.Table.from_pandas(frame), file)
        known = frame["label"].notna().to_numpy()
        accuracy = np.mean(np.stack(frame["logits"])[known].argmax(1) == frame["label"][known].to_numpy(int))
        (root / run / "results.json").write_text(json.dumps({"accuracy": float(accuracy)}))
    found = comparison.compare(root, replicates=50)
    assert found.rows[0]["n_test"] == 390 and "10 of 400" in found.notes[0]


def test_agreement_is_split_by_the_supervisor_being_right(tmp_path):
    root = sweeps.make_root(tmp_path / "sweep", seeds=(0,), methods=("xent",), pairs=(("small", "large"),))
    runs = pairs_lib.read_pairs(root)[0]["runs"]
    student, weak, ceiling = (predictions.read_predictions(root / runs[r]) for r in ("student", "weak", "ceiling"))
    row = comparison.compare(root, replicates=100).agreement[0]
    for role, run in (("student", student), ("ceiling", ceiling)):
        direct = metrics.agreement(run.logits.argmax(1), weak.logits.argmax(1), weak.labels)
        for part in ("all", "right", "wrong"):
            assert row[f"{role}_{part}"] == pytest.approx(direct[part])
            assert row[f"{role}_{part}_ci"][0] <= direct[part] <= row[f"{role}_{part}_ci"][1]
    labels = predictions.read_predictions(root / runs["label"], "b")
    assert row["label_accuracy"] == pytest.approx(np.mean(labels.logits.argmax(1) == labels.labels))


def test_three_runs_without_a_sweep(tmp_path):
    root = sweeps.make_root(tmp_path / "sweep", seeds=(0,), methods=("xent",), pairs=(("small", "large"),))
    runs = pairs_lib.read_pairs(root)[0]["runs"]
    given = {role: str(root / runs[role]) for role in ("weak", "ceiling", "student")}
    out = report.run(sweeps.report_config(**given), str(tmp_path / "own"))
    assert (tmp_path / "own" / "report" / "report.md").exists()
    assert out["rows"][0]["pgr"] == pytest.approx(comparison.compare(root, replicates=200).rows[0]["pgr"])


def damage(root: Path, kind: str) -> None:
    """Spoils one file of a root that is well otherwise."""
    run = root / pairs_lib.read_pairs(root)[0]["runs"]["student"]
    file = run / "predictions" / "test.parquet"
    if kind == "no sweep.json":
        (root / "sweep.json").unlink()
    elif kind == "no pairs":
        (root / "sweep.json").write_text('{"pairs": []}')
    elif kind == "broken json":
        (root / "sweep.json").write_text("{")
    elif kind == "pair lacks a run":
        pairs = json.loads((root / "sweep.json").read_text())
        del pairs["pairs"][0]["runs"]["ceiling"]
        (root / "sweep.json").write_text(json.dumps(pairs))
    elif kind == "truncated parquet":
        file.write_bytes(file.read_bytes()[:200])
    elif kind == "no predictions":
        file.unlink()
    elif kind == "other results":
        (run / "results.json").write_text('{"accuracy": 0.123}')
    elif kind == "nothing done":
        for result in root.rglob("results.json"):
            result.unlink()
    else:
        frame = pyarrow.parquet.read_table(file).to_pandas()
        if kind == "other text":
            frame.loc[3, "text_sha"] = "0" * 16
        elif kind == "duplicated id":
            frame.loc[3, "id"] = frame.loc[2, "id"]
        elif kind == "nan logits":
            frame.at[3, "logits"] = np.array([np.nan, 0.0], np.float32)
        elif kind == "no column":
            frame = frame.drop(columns="logits")
        pyarrow.parquet.write_table(pyarrow.Table.from_pandas(frame), file)


@pytest.mark.parametrize(("kind", "says"), [
    ("no sweep.json", "sweep.json"), ("no pairs", "'pairs'"), ("broken json", "JSON"), ("pair lacks a run", "runs.ceiling"),
    ("truncated parquet", "test.parquet"), ("no predictions", "test.parquet"), ("other results", "0.123"), ("nothing done", "not done"),
    ("other text", "sciq/test/3/0"), ("duplicated id", "sciq/test/2/0"), ("nan logits", "sciq/test/3/0"), ("no column", "logits"),
])  # fmt: skip
def test_bad_roots_get_one_line(tmp_path, kind, says):
    root = sweeps.make_root(tmp_path / "sweep", n=20, seeds=(0,), methods=("xent",), pairs=(("small", "large"),))
    damage(root, kind)
    with pytest.raises(UserError) as error:
        report.run(sweeps.report_config(), str(root))
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not (root / "report").exists()


@pytest.mark.parametrize(("changes", "says"), [({"weak": "x"}, "ceiling"), ({"label": "x"}, "label=x"),
                                               ({"weak": "x", "ceiling": "y", "student": "z"}, "x"), ({"replicates": 0}, "replicates=0"),
                                               ({"seed": -1}, "seed=-1")])  # fmt: skip
def test_keys_are_checked(tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        report.run(sweeps.report_config(**changes), str(tmp_path))


@pytest.mark.parametrize(("value", "text"), [(0.7694, ".769"), (-0.09, "-.090"), (1.0, "1.000"), (-0.0001, ".000"), (None, "-"),
                                             (10.5, "10.500")])  # fmt: skip
def test_numbers_as_printed(value, text):
    assert tables.number(value) == text


def test_tasks_do_not_change_each_other(tmp_path):
    root = sweeps.make_root(tmp_path, tasks=("sciq", "boolq"), seeds=(0,), methods=("xent",))
    both = comparison.compare(root, replicates=100)
    alone = comparison.compare(root, [p for p in pairs_lib.read_pairs(root) if p["task"] == "sciq"], replicates=100)
    assert len(alone.rows) == 4 and [r for r in both.rows if r["task"] == "sciq"] == alone.rows
