"""Killed at any moment and started again, a run and a sweep end as if nothing had happened, bit for bit."""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from safetensors.numpy import load_file
from test_checkpoint import DAMAGES

import w2s_jax
from w2s_jax import stages, train
from w2s_jax.errors import UserError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
TIMING = {"seconds", "compile_seconds", "tokens_per_second", "images_per_second", "feature_seconds", "probe_seconds"}
STEPS = 24
KEYS = {"epochs": 3, "shuffle": "epoch", "checkpoint_every": 4, "steps_per_dispatch": 2, "learning_rate": 2e-3}
RUNS = {
    "everything": {"loss": "logconf_eleuther", "loss_args__warmup": 5, "loss_args__chunk": 4, "dropout": 0.125, "microbatch_size": 5,
                   "eval_every": 6, "n_val": 8, "keep": "all", "optimizer": "adamw", "weight_decay": 0.1, "split": "b", "n_train": 48,
                   "batch_size": 2, "schedule": "linear", "warmup_steps": 3},
    "head": {"train": "head", "loss": "xent", "keep": "params"},
    "selected": {"train": "lora", "select": "val_labels", "eval_every": 3, "n_val": 8, "split": "b", "n_train": 48, "batch_size": 2},
}  # fmt: skip


def timeless(record: dict) -> dict:
    return {k: v for k, v in record.items() if k not in TIMING}


def same_run(a: Path, b: Path) -> None:
    """Results, metrics, predictions and parameters are the same, timing aside."""
    one, two = w2s_jax.load(a), w2s_jax.load(b)
    assert one.results is not None
    assert timeless(one.results) == timeless(two.results)
    assert [timeless(row) for row in one.metrics] == [timeless(row) for row in two.metrics]
    files = [sorted(str(f.relative_to(r)) for f in r.rglob("predictions/*")) for r in (a, b)]
    assert files[0] == files[1]
    for name in files[0]:
        assert pq.read_table(a / name).equals(pq.read_table(b / name)), name
    steps = [sorted(p.name for p in r.glob("checkpoints/*")) for r in (a, b)]
    assert steps[0] == steps[1]
    if steps[0]:
        jax.tree.map(np.testing.assert_array_equal, one.model().params, two.model().params)
    for file in a.glob("model/*"):
        assert file.read_bytes() == (b / "model" / file.name).read_bytes(), file


# --------------------------------------------------------------------------- SIGKILL, in processes of their own


def attempt(argv: list[str], log: str) -> None:
    """A process's whole life: the command line `argv`, stderr to a file."""
    with open(log, "a") as stream:
        os.dup2(stream.fileno(), 2)
        os.dup2(stream.fileno(), 1)
    from w2s_jax import main

    sys.exit(main.main(argv))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """`start(argv, log)` -> a process that runs the command line, forked from one that has the imports behind it."""
    cache = tmp_path_factory.mktemp("cache")
    environment = {"JAX_COMPILATION_CACHE_DIR": str(cache), "XLA_FLAGS": "", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    before = {key: os.environ.get(key) for key in environment}
    os.environ.update(environment)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["w2s_jax.stages.finetune", "w2s_jax.stages.sweep", "w2s_jax.stages.pretrain", "test_resume"])

    def start(argv, log, target=attempt):
        process = context.Process(target=target, args=([str(a) for a in argv], str(log)))
        process.start()
        return process

    yield start
    for key, value in before.items():
        os.environ.pop(key) if value is None else os.environ.__setitem__(key, value)


def finish(start, argv, log) -> float:
    """Let the command run to its end; returns its seconds."""
    begin = time.monotonic()
    process = start(argv, log)
    process.join(600)
    assert process.exitcode == 0, Path(log).read_text()[-3000:]
    return time.monotonic() - begin


def kill(start, argv, log, moment) -> bool:
    """Start the command and kill it as soon as `moment()`; False if it came to its end before that."""
    process = start(argv, log)
    while process.is_alive() and not moment():
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL), Path(log).read_text()[-3000:]
    return process.exitcode != 0


def moments(run: Path) -> dict:
    """Moments in the life of a run that has not been stopped before, in their order."""
    def steps():
        return [int(p.name) for p in run.glob("checkpoints/*") if p.name.isdigit()]
    return {
        "claimed": (run / ".owner").exists,
        "started": (run / "config.json").exists,
        "first metrics": lambda: (run / "metrics.jsonl").exists(),
        "saving": lambda: any(not p.name.isdigit() for p in run.glob("checkpoints/*")),
        "saved": lambda: max(steps(), default=0) >= 8,
        "last save": lambda: max(steps(), default=0) >= STEPS - 4 and any(not p.name.isdigit() for p in run.glob("checkpoints/*")),
        "trained": lambda: max(steps(), default=0) == STEPS,
        "predicted": (run / "predictions/test.parquet").exists,
    }


@pytest.fixture(scope="module")
def unkilled(start, tiny_model, tiny_task, tmp_path_factory):
    """name -> (flags, directory of an undisturbed run, seconds that such a run takes with compiled programs at hand)."""
    found = {}

    def get(name):
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            keys = {"model": tiny_model, "task": tiny_task, "split": "train", "batch_size": 8} | KEYS | RUNS[name]
            argv = ["--config=finetune", *tiny.flags(**keys)]
            finish(start, [*argv, f"--workdir={folder / 'cold'}"], folder / "log")
            seconds = finish(start, [*argv, f"--workdir={folder / 'run'}"], folder / "log")
            same_run(folder / "cold", folder / "run")
            found[name] = argv, folder / "run", seconds
        return found[name]

    return get


@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_at_every_turn_ends_as_if_it_was_not(name, start, unkilled, tmp_path):
    argv, reference, _ = unkilled(name)
    run, kills = tmp_path / "run", []
    for moment, is_now in moments(run).items():
        if kill(start, [*argv, f"--workdir={run}"], tmp_path / "log", is_now):
            kills.append(moment)
            assert not (run / "results.json").exists()
        else:
            break
    assert len(kills) >= 6, kills
    finish(start, [*argv, f"--workdir={run}"], tmp_path / "log")
    assert "resumed at step" in (tmp_path / "log").read_text()
    same_run(reference, run)
    assert len(w2s_jax.load(run).metrics) == STEPS


@pytest.mark.parametrize("seed", range(2))
def test_a_run_killed_at_random_moments_ends_as_if_it_was_not(seed, start, unkilled, tmp_path):
    argv, reference, seconds = unkilled("everything")
    rng, kills = np.random.default_rng(seed), 0
    for share in rng.uniform(0.3, 1, 4):
        until = time.monotonic() + share * seconds
        kills += kill(start, [*argv, f"--workdir={tmp_path / 'run'}"], tmp_path / "log", lambda until=until: time.monotonic() >= until)
    assert kills
    finish(start, [*argv, f"--workdir={tmp_path / 'run'}"], tmp_path / "log")
    same_run(reference, tmp_path / "run")


SWEEP = {"pretrain__steps": 20, "pretrain__n_heldout": 16, "pretrain__checkpoint_every": 5, "base__n_train": 64, "base__n_test": 48,
         "base__batch_size": 8, "base__epochs": 1, "base__checkpoint_every": 2, "base__keep": "all"}


def test_a_sweep_killed_at_random_moments_ends_as_if_it_was_not(start, tmp_path):
    argv = ["--config=sweep:runlocal", *tiny.flags(**SWEEP)]
    reference, root = tmp_path / "reference", tmp_path / "killed"
    finish(start, [*argv, f"--workdir={tmp_path / 'cold'}"], tmp_path / "log")
    seconds = finish(start, [*argv, f"--workdir={reference}"], tmp_path / "log")
    rng, kills = np.random.default_rng(0), 0
    for share in rng.uniform(0.2, 0.8, 5):
        until = time.monotonic() + share * seconds
        kills += kill(start, [*argv, f"--workdir={root}"], tmp_path / "log", lambda until=until: time.monotonic() >= until)
    assert kills
    finish(start, [*argv, f"--workdir={root}"], tmp_path / "log")
    runs = [sorted(str(f.parent.relative_to(r)) for f in r.glob("*/*/results.json")) for r in (reference, root)]
    assert runs[0] == runs[1] and len(runs[0]) == 6  # two models, weak, labels, ceiling, student
    for name in runs[0]:
        same_run(reference / name, root / name)
    tables = [sorted(f.name for f in (r / "report").iterdir()) for r in (reference, root)]
    assert tables[0] == tables[1]
    for name in (n for n in tables[0] if n.endswith(".csv")):
        assert (reference / "report" / name).read_text() == (root / "report" / name).read_text()
    begin = time.monotonic()
    finish(start, [*argv, f"--workdir={root}"], tmp_path / "log")  # all is done: only the report is made again
    assert time.monotonic() - begin < seconds


# --------------------------------------------------------------------------- stopped in this process


class Stopped(BaseException):
    """What a kill is to the code that it hits."""


def stop_after(monkeypatch, dispatches: int) -> None:
    """The next run is stopped when it has been given to the device `dispatches` times."""
    real, left = train._run_dispatch, [dispatches]

    def call(*args):
        if not left[0]:
            monkeypatch.setattr(train, "_run_dispatch", real)
            raise Stopped
        left[0] -= 1
        return real(*args)

    monkeypatch.setattr(train, "_run_dispatch", call)


def stopped_at(config, run, monkeypatch, dispatches) -> None:
    stop_after(monkeypatch, dispatches)
    with pytest.raises(Stopped):
        stages.run(config, str(run))
    assert not (run / "results.json").exists()


@pytest.fixture
def config(tiny_model, tiny_task, fast_compiles):
    """A run of 8 steps with checkpoints every other one."""
    return tiny.finetune(tiny_model, tiny_task, checkpoint_every=2, steps_per_dispatch=1)


@pytest.fixture(scope="module")
def undisturbed(tiny_model, tiny_task, tmp_path_factory):
    """Directory of that run, never stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as monkeypatch:
        tiny.fast_compiles(monkeypatch)
        stages.run(tiny.finetune(tiny_model, tiny_task, checkpoint_every=2, steps_per_dispatch=1), str(folder))
    return folder


def near(a, b, tolerance=1e-5):
    for key in ("loss", "train_accuracy", "lr"):
        np.testing.assert_allclose([r[key] for r in a.metrics], [r[key] for r in b.metrics], atol=tolerance, rtol=0)
    assert [r["step"] for r in a.metrics] == [r["step"] for r in b.metrics] == list(range(8))
    logits = [np.stack(r.predictions("test").logits.to_list()) for r in (a, b)]
    np.testing.assert_allclose(*logits, atol=tolerance, rtol=0)


@pytest.mark.parametrize("first, then", [
    ({}, {"mesh__fsdp": 2, "mesh__model": 2}),
    ({"mesh__data": 2, "mesh__fsdp": 2, "mesh__model": 2}, {"mesh__data": 1}),
    ({"mesh__fsdp": 8, "mesh__data": 1}, {"mesh__data": 4, "microbatch_size": 3}),
    ({"steps_per_dispatch": 1, "checkpoint_every": 3}, {"steps_per_dispatch": 8, "checkpoint_every": 0}),
    ({"steps_per_dispatch": 1, "checkpoint_every": 1}, {"steps_per_dispatch": 4, "checkpoint_every": 4, "eval_every": 6}),
], ids=str)
def test_a_run_goes_on_under_other_execution_keys(config, undisturbed, first, then, tmp_path, monkeypatch):
    stopped_at(tiny.set_keys(config.copy_and_resolve_references(), **first), tmp_path / "run", monkeypatch, 5)
    stages.run(tiny.set_keys(config.copy_and_resolve_references(), **then), str(tmp_path / "run"))
    near(w2s_jax.load(undisturbed), w2s_jax.load(tmp_path / "run"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(config, undisturbed, damage, tmp_path, monkeypatch, capfd):
    stopped_at(config, tmp_path / "run", monkeypatch, 7)
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["4", "6"]
    damage(tmp_path / "run/checkpoints/6")
    capfd.readouterr()
    stages.run(config, str(tmp_path / "run"))
    said = capfd.readouterr().err
    assert "resumed at step 4 of 8" in said
    assert damage.__name__ == "hollow" or "checkpoints/6 cannot be read" in said
    same_run(undisturbed, tmp_path / "run")


def test_without_a_readable_checkpoint_a_run_starts_again(config, undisturbed, tmp_path, monkeypatch, capfd):
    stopped_at(config, tmp_path / "run", monkeypatch, 7)
    for step in ("4", "6"):
        DAMAGES[0](tmp_path / "run/checkpoints" / step)
    stages.run(config, str(tmp_path / "run"))
    assert capfd.readouterr().err.count("cannot be read") == 2
    same_run(undisturbed, tmp_path / "run")


def test_a_torn_line_of_metrics_is_written_again(config, undisturbed, tmp_path, monkeypatch):
    stopped_at(config, tmp_path / "run", monkeypatch, 7)
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    stages.run(config, str(tmp_path / "run"))
    same_run(undisturbed, tmp_path / "run")


def test_another_run_is_refused_and_this_one_goes_on(config, undisturbed, tmp_path, monkeypatch):
    stopped_at(config, tmp_path / "run", monkeypatch, 5)
    other = tiny.set_keys(config.copy_and_resolve_references(), learning_rate=1e-4, seed=3)
    with pytest.raises(UserError, match=r"holds another run, which differs in learning_rate: 0.003 -> 0.0001; seed: 0 -> 3"):
        stages.run(other, str(tmp_path / "run"))
    stages.run(config, str(tmp_path / "run"))
    same_run(undisturbed, tmp_path / "run")


@pytest.mark.parametrize("keep, files", [("params", {"params", "meta"}), ("all", {"params", "opt_state", "rng", "meta"}), ("none", None)])
def test_what_a_finished_run_keeps(config, keep, files, tmp_path):
    stages.run(tiny.set_keys(config, keep=keep), str(tmp_path))
    steps = list(tmp_path.glob("checkpoints/*"))
    if files is None:
        assert not steps
    else:
        assert [s.name for s in steps] == ["8"] and {p.name for p in steps[0].iterdir() if p.is_dir()} == files
    results = json.loads((tmp_path / "results.json").read_text())
    before = (tmp_path / "results.json").stat().st_mtime_ns
    assert stages.run(config, str(tmp_path)) == results  # done: nothing is run again
    assert (tmp_path / "results.json").stat().st_mtime_ns == before
    again = stages.run(config, str(tmp_path), rerun=True)
    assert timeless(again) == timeless(results) and (tmp_path / "results.json").stat().st_mtime_ns > before


def test_head_only_runs_keep_the_head_only(config, tmp_path):
    stages.run(tiny.set_keys(config, train="head"), str(tmp_path / "head"))
    stages.run(tiny.set_keys(config, train="full"), str(tmp_path / "full"))
    size = {name: sum(f.stat().st_size for f in (tmp_path / name / "checkpoints/8/params").rglob("*") if f.is_file())
            for name in ("head", "full")}
    assert size["head"] < size["full"] / 5
    base = load_file(Path(config.model) / "model.safetensors")["transformer.ln_f.weight"]
    kept = {name: w2s_jax.load(tmp_path / name).model().params["backbone"]["norm"]["scale"] for name in size}
    assert np.array_equal(kept["head"], base) and not np.array_equal(kept["full"], base)


@pytest.mark.parametrize("group, every", [(1, 1), (4, 4)])
def test_a_non_finite_loss_leaves_no_checkpoint_behind_it(config, group, every, tmp_path):
    tiny.set_keys(config, optimizer="sgd", learning_rate=1e6, schedule="constant", steps_per_dispatch=group, checkpoint_every=every)
    message = r"loss: (?:nan|inf) at step ([1-7]), expected a finite number; documents of the batch \(8\): tiny/train/"
    with pytest.raises(UserError, match=message) as caught:
        stages.run(config, str(tmp_path / "run"))
    step = int(re.match(message, str(caught.value))[1])
    run = w2s_jax.load(tmp_path / "run")
    assert run.results is None and "expected a finite number" in json.loads((run.path / "error.json").read_text())["error"]
    assert [row["step"] for row in run.metrics] == list(range(step))
    assert all(int(p.name) <= step for p in tmp_path.glob("run/checkpoints/*"))
