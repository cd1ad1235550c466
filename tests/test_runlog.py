"""The run directory: claim, identity, metrics that resume bit for bit, results last, and what the user sees meanwhile."""

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

import w2s_jax
from w2s_jax import claim, files, main, progress, runlog
from w2s_jax.errors import UserError
from w2s_jax.runlog import Progress, Run

ROOT = Path(__file__).resolve().parents[1]
IDENTITY = {"stage": "finetune", "seed": 0, "loss_args": {"alpha": 1.0}, "model": "abc"}
CONFIG = ConfigDict({"stage": "finetune", "seeds": (1, 2), "mesh": {"data": -1}})


@pytest.fixture(params=["local", "object store"])
def store(request, monkeypatch):
    """Every test of the directory runs as on a disk, and as on gs:// (whole objects, no appending, no locks)."""
    if request.param == "object store":
        for module in (claim, files, runlog):
            monkeypatch.setattr(module, "is_object_store", lambda path: True)
    return request.param


def start(path, identity=IDENTITY, **options) -> Run:
    run = Run.open(path, CONFIG, identity, **options)
    run.start({"shapes": [(4, 64)], "dataset": "sha"})
    return run


def other_process(code: str, path, **options) -> subprocess.Popen:
    """A process that opens the run at `path` and then runs `code`, which knows it as `run`."""
    head = f"from w2s_jax.runlog import Run\nimport time, os\nrun = Run.open({str(path)!r}, {{}}, {IDENTITY!r})\nrun.start()\n"
    command = [sys.executable, "-c", head + textwrap.dedent(code)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True, **options)


# ---------------------------------------------------------------- the life of a run


def test_a_run_from_start_to_results(tmp_path, store):
    path = tmp_path / "a" / "b"
    with start(path) as run:
        assert not run.done and runlog.state(path) == "running"
        for step in range(3):
            run.metrics({"step": step, "loss": np.float32(0.1), "lr": 1e-3})
        run.finish({"accuracy": np.float64(0.75), "auroc": float("nan"), "n_test": np.int64(8), "accuracy_ci": (0.5, 1.0)})
        assert run.done
    assert runlog.state(path) == "done" and not (path / ".owner").exists()

    loaded = w2s_jax.load(path)
    assert loaded.results == {"accuracy": 0.75, "auroc": None, "n_test": 8, "accuracy_ci": [0.5, 1.0]}
    assert [row["step"] for row in loaded.metrics] == [0, 1, 2] and loaded.metrics[0]["loss"] == float(np.float32(0.1))
    assert loaded.config.mesh.data == -1 and list(loaded.config.seeds) == [1, 2]
    assert loaded.record["identity"] == IDENTITY and loaded.record["shapes"] == [[4, 64]]
    assert loaded.record["versions"]["numpy"] == np.__version__ and len(loaded.record["starts"]) == 1
    with Run.open(path, CONFIG, IDENTITY) as again:
        assert again.done and again.results["n_test"] == 8


def test_rerun_removes_what_the_run_made_and_nothing_else(tmp_path):
    with start(tmp_path) as run:
        run.metrics({"step": 0})
        run.finish({"accuracy": 1.0})
    for name in ("predictions/test.parquet", "checkpoints/7/x", "slurm-1.out"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with Run.open(tmp_path, CONFIG, IDENTITY, rerun=True) as run:
        assert not run.done
        assert {p.name for p in tmp_path.iterdir()} == {"config.json", "slurm-1.out", ".lock", ".owner"}


def test_a_failure_is_recorded_and_the_next_start_forgets_it(tmp_path, store):
    with pytest.raises(RuntimeError), start(tmp_path) as run:
        run.metrics({"step": 0})
        raise RuntimeError("loss is nan at step 1")
    assert runlog.state(tmp_path) == "failed"
    error = json.loads((tmp_path / "error.json").read_text())
    assert error["error"] == "RuntimeError: loss is nan at step 1" and any("test_runlog" in line for line in error["traceback"])
    assert len(w2s_jax.load(tmp_path).metrics) == 1
    with start(tmp_path):
        assert not (tmp_path / "error.json").exists()
    assert runlog.state(tmp_path) == "stopped"


def test_an_interrupted_run_is_stopped_not_failed(tmp_path):
    with pytest.raises(KeyboardInterrupt), start(tmp_path):
        raise KeyboardInterrupt
    assert runlog.state(tmp_path) == "stopped"


def test_restarts_are_kept_in_config_json(tmp_path):
    start(tmp_path).close()
    with start(tmp_path) as run:
        assert run.previous["shapes"] == [[4, 64]]
    assert len(runlog.read_json(tmp_path / "config.json")["starts"]) == 2


@pytest.mark.parametrize("identity, expected", [
    ({**IDENTITY, "seed": 1}, "seed: 0 -> 1"),
    ({**IDENTITY, "loss_args": {"alpha": 2.0}}, "loss_args.alpha: 1.0 -> 2.0"),
    ({**IDENTITY, "loss_args": {}}, "loss_args.alpha: 1.0 -> null"),
    ({**IDENTITY, "extra": None}, "extra: null -> null"),
    ({k: v for k, v in IDENTITY.items() if k != "model"}, 'model: "abc" -> null'),
])  # fmt: skip
def test_another_identity_is_refused_with_the_keys(tmp_path, identity, expected):
    start(tmp_path).close()
    before = (tmp_path / "config.json").read_bytes()
    for rerun in (False, True):
        with pytest.raises(UserError, match="holds another run") as error:
            Run.open(tmp_path, CONFIG, identity, rerun=rerun)
        assert expected in str(error.value)
    assert (tmp_path / "config.json").read_bytes() == before
    start(tmp_path).close()  # the refused ones gave their claim back


@pytest.mark.parametrize("make, expected", [
    (lambda p: p.write_text("x"), "is a file"),
    (lambda p: (p.mkdir(), (p / "results.json").write_text("{}")), "holds results.json but no config.json"),
    (lambda p: (p.mkdir(), (p / "metrics.jsonl").touch()), "holds metrics.jsonl but no config.json"),
    (lambda p: (p.mkdir(), (p / "config.json").write_text('{"ident')), "expected a JSON object"),
    (lambda p: (p.mkdir(), (p / "config.json").write_text("[]")), "expected a JSON object, found list"),
])  # fmt: skip
def test_what_is_no_run_directory_is_left_alone(tmp_path, make, expected):
    path = tmp_path / "w"
    make(path)
    before = sorted((p.name, p.read_bytes()) for p in path.iterdir()) if path.is_dir() else path.read_text()
    with pytest.raises(UserError, match=expected):
        Run.open(path, CONFIG, IDENTITY)
    after = sorted((p.name, p.read_bytes()) for p in path.iterdir() if p.name != ".lock") if path.is_dir() else path.read_text()
    assert after == before


# ---------------------------------------------------------------- the claim


def test_a_second_starter_is_told_who_writes(tmp_path, store):
    with start(tmp_path), pytest.raises(UserError, match=f"is being written by host .*, pid {os.getpid()};"):
        Run.open(tmp_path, CONFIG, IDENTITY)
    Run.open(tmp_path, CONFIG, IDENTITY).close()


def test_the_claim_of_a_killed_process_is_free_and_of_a_living_one_is_not(tmp_path):
    process = other_process("print('ready', flush=True)\ntime.sleep(600)", tmp_path)
    try:
        assert process.stdout.readline() == "ready\n"
        assert runlog.state(tmp_path) == "running"
        with pytest.raises(UserError, match=f"pid {process.pid}"):
            Run.open(tmp_path, CONFIG, IDENTITY)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert runlog.state(tmp_path) == "stopped"
    with Run.open(tmp_path, CONFIG, IDENTITY) as run:
        assert not run.done


def test_a_starter_may_wait(tmp_path):
    process = other_process("print('ready', flush=True)\ntime.sleep(1)\nrun.finish({'from': 'first'})\nrun.close()", tmp_path)
    assert process.stdout.readline() == "ready\n"
    with Run.open(tmp_path, CONFIG, IDENTITY, wait=True) as run:
        assert run.results == {"from": "first"}
    assert process.wait() == 0


def test_an_abandoned_claim_on_an_object_store_expires(tmp_path, monkeypatch):
    for module in (claim, files, runlog):
        monkeypatch.setattr(module, "is_object_store", lambda path: True)
    (tmp_path / ".owner").write_text(json.dumps({"host": "elsewhere", "pid": 1, "time": time.time() - 4 * claim.HEARTBEAT_SECONDS}))
    with pytest.raises(UserError, match="host elsewhere, pid 1"):
        Run.open(tmp_path, CONFIG, IDENTITY)
    (tmp_path / ".owner").write_text(json.dumps({"host": "elsewhere", "pid": 1, "time": time.time() - 6 * claim.HEARTBEAT_SECONDS}))
    Run.open(tmp_path, CONFIG, IDENTITY).close()


def test_a_claim_on_an_object_store_is_renewed(tmp_path, monkeypatch):
    for module in (claim, files, runlog):
        monkeypatch.setattr(module, "is_object_store", lambda path: True)
    monkeypatch.setattr(claim, "HEARTBEAT_SECONDS", 0.05)
    with Run.open(tmp_path, CONFIG, IDENTITY):
        first = json.loads((tmp_path / ".owner").read_text())["time"]
        deadline = time.time() + 10
        while json.loads((tmp_path / ".owner").read_text())["time"] == first and time.time() < deadline:
            time.sleep(0.02)
        assert json.loads((tmp_path / ".owner").read_text())["time"] > first


# ---------------------------------------------------------------- metrics


def lines_of(path) -> str:
    single = path / "metrics.jsonl"
    return single.read_text() if single.exists() else "".join(p.read_text() for p in sorted((path / "metrics").iterdir()))


@pytest.mark.parametrize("killed_at, resumed_from", [(10, 0), (10, 6), (10, 10), (3, 2)])
def test_resumed_metrics_are_the_unkilled_ones(tmp_path, store, killed_at, resumed_from):
    rows = [{"step": s, "loss": np.float32(1 / (s + 3)), "note": "ä"} for s in range(12)]
    for name, cut in (("whole", None), ("killed", killed_at)):
        run = start(tmp_path / name)
        assert run.resume_metrics(0) == []
        for row in rows[:cut]:
            run.metrics(row)
            if row["step"] % 4 == 0:
                run.flush()
        run.close()
    with start(tmp_path / "killed") as run:
        kept = run.resume_metrics(resumed_from)
        assert [row["step"] for row in kept] == list(range(resumed_from))
        for row in rows[resumed_from:]:
            run.metrics(row)
    assert lines_of(tmp_path / "killed") == lines_of(tmp_path / "whole")


def test_a_torn_last_line_is_dropped_and_a_damaged_one_is_named(tmp_path):
    start(tmp_path).close()
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0}\n{"step": 1, "lo')
    with start(tmp_path) as run:
        assert run.resume_metrics(5) == [{"step": 0}]
        run.metrics({"step": 1})
    assert file.read_text() == '{"step": 0}\n{"step": 1}\n'
    file.write_text('{"step": 0}\nrubbish\n{"step": 2}\n')
    with pytest.raises(UserError, match="metrics.jsonl, line 2"):
        w2s_jax.load(tmp_path).metrics  # noqa: B018


def test_metrics_reach_the_disk_each_second(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: clock[0])
    with start(tmp_path) as run:
        run.metrics({"step": 0})
        clock[0] += 0.5
        run.metrics({"step": 1})
        assert not (tmp_path / "metrics.jsonl").exists()
        clock[0] += 0.6
        run.metrics({"step": 2})
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_metrics_of_a_killed_process_are_whole_lines(tmp_path):
    code = "print('ready', flush=True)\nfor s in range(10**7): run.metrics({'step': s, 'loss': 0.5})"
    process = other_process(code, tmp_path)
    assert process.stdout.readline() == "ready\n"
    file, deadline = tmp_path / "metrics.jsonl", time.time() + 60
    while (not file.exists() or file.stat().st_size < 10_000) and time.time() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    steps = [row["step"] for row in w2s_jax.load(tmp_path).metrics]
    assert steps == list(range(len(steps))) and len(steps) > 100


# ---------------------------------------------------------------- files


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    runlog.write_json(file, {"a": 1})

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError):
        runlog.write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("value, expected", [
    (np.arange(3), [0, 1, 2]), (np.float32(0.5), 0.5), (np.bool_(True), True), ((1, (2,)), [1, [2]]), (float("inf"), None),
    (np.float32("nan"), None), ({"a": Path("x/y")}, {"a": "x/y"}), ({2, 1}, [1, 2]),
    (ConfigDict({"a": {"b": (1,)}}), {"a": {"b": [1]}}), (True, True),
], ids=repr)  # fmt: skip
def test_plain(value, expected):
    assert files.plain(value) == expected
    assert json.loads(files.dumps(value)) == expected


def test_what_is_no_json_is_refused():
    with pytest.raises(TypeError, match="function"):
        files.plain({"a": print})


# ---------------------------------------------------------------- predictions and status


def test_predictions_are_a_table(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    start(tmp_path).close()
    (tmp_path / "predictions").mkdir()
    pq.write_table(pa.table({"id": ["t/test/0/0"], "p": [0.25]}), tmp_path / "predictions" / "test.parquet")
    table = w2s_jax.load(tmp_path).predictions("test")
    assert list(table["id"]) == ["t/test/0/0"] and table["p"][0] == 0.25
    with pytest.raises(UserError, match="this run has test"):
        w2s_jax.load(tmp_path).predictions("b")


@pytest.mark.parametrize("path", ["nowhere", "."])
def test_load_of_no_run(tmp_path, path):
    with pytest.raises(UserError, match="is not a run directory"):
        w2s_jax.load(tmp_path / path)


def test_status_lists_every_run_with_its_state(tmp_path, capfd):
    with start(tmp_path / "task" / "done") as run:
        run.finish({})
    start(tmp_path / "task" / "stopped").close()
    with pytest.raises(ValueError), start(tmp_path / "task" / "failed"):
        raise ValueError("two\nlines")
    (tmp_path / "task" / "done" / "checkpoints" / "1").mkdir(parents=True)
    pairs = [{"runs": {"weak": "task/done", "student": "task/next"}}, {"runs": {"weak": "task/done", "student": None}}]
    runlog.write_json(tmp_path / "sweep.json", {"pairs": pairs, "runs": ["task/done", "pretrain/small"]})
    with start(tmp_path / "task" / "running"):
        assert main.main(["status", str(tmp_path)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["waiting", "done", "failed", "waiting", "running", "stopped"]
    assert "ValueError: two lines" in lines[2] and lines[3].endswith("task/next")
    assert lines[-1] == "1 done, 1 running, 1 stopped, 1 failed, 2 waiting"


# ---------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_where_stderr_is_no_terminal(monkeypatch, capfd):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with Progress(100, label="train") as bar:
        for step in range(100):
            clock[0] += 5.0 if step == 0 else 1.0  # the first step compiles
            bar.update(1, loss=0.5, accuracy=None, tokens=250)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "train 6/100, loss 0.5, tokens/s 250, 1:34 left, 0:10 passed"
    assert 9 <= len(lines) <= 11 and lines[-1] == "train 100/100, loss 0.5, tokens/s 250, 1:44 passed"


@pytest.mark.parametrize("terminal", [False, True])
def test_time_left_follows_the_weights(monkeypatch, capfd, terminal):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    if terminal:
        monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress(3, label="sweep", unit="run", weights=[6.0, 0.0, 2.0]) as bar:
        bar.update(0, run="long")
        clock[0] = 60.0
        bar.update(1)
    text = sys.stderr.getvalue() if terminal else capfd.readouterr().err
    assert "1/3" in text and "0:20 left" in text and "run long" in text


def test_the_last_state_is_shown_when_it_ends_early(capfd):
    with pytest.raises(ValueError), Progress(100, start=40, label="train") as bar:
        bar.update(3, loss=0.25)
        raise ValueError
    assert capfd.readouterr().err.startswith("train 43/100, loss 0.25")


def test_a_bar_where_stderr_is_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(10, start=4, label="train") as bar:
        for _ in range(6):
            bar.update(1, loss=0.125, accuracy=0.75, tokens=100)
        runlog.say("a note")
    text = terminal.getvalue()
    assert "train" in text and "10/10" in text and "loss 0.125" in text and "acc 0.75" in text and "a note\n" in text
