"""The pool of a node's devices: who gets what and when, what a failure and a signal do, and a sweep made by real processes."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import sweeps
import tiny

from w2s_jax import interrupts, pool, runlog, schedule, status
from w2s_jax.config import shipped
from w2s_jax.errors import UserError
from w2s_jax.graph import Graph

pytestmark = pytest.mark.slow  # minutes together

ROOT = Path(__file__).resolve().parents[1]
BEGAN = "JAX_NUM_CPU_DEVICES"  # says in a process how many slots it holds


@pytest.fixture(autouse=True)
def same_cores():
    """A pool leaves this process its cores."""
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    yield
    assert before is None or os.sched_getaffinity(0) == before


class Runs:
    """A graph of runs that a few lines of Python stand in for: `add(name, needs, parents, code)`. Each notes when it begins and ends."""

    def __init__(self, root: Path, monkeypatch):
        self.root, self.code, self.work = root, {}, {}
        self.graph = Graph(root, lambda config, planned: {"id": len(self.graph.nodes)})
        monkeypatch.setattr(schedule, "command", self._command)

    def add(self, name, devices=1, parents=(), code="", work=1.0, mesh=None):
        config = tiny.set_keys(shipped("finetune"), mesh={"data": devices, "fsdp": 1, "model": 1} | (mesh or {}))
        made = self.graph.add("t", name, config, parents)
        self.code[made], self.work[made] = code, work
        return made

    def _command(self, root, name):
        path, note = Path(root) / name, Path(root) / "notes"
        code = f"""
import os, signal, sys, time
from pathlib import Path
def note(what):
    with open({str(note)!r}, "a") as file:
        file.write(f"{{what}} {name} {{os.environ['{BEGAN}']}}\\n")
note("begin")
{self.code[name]}
path = Path({str(path)!r})
path.mkdir(parents=True, exist_ok=True)
note("end")
(path / "results.json").write_text('{{"n_test": 1}}')
"""
        return [sys.executable, "-c", code]

    def pool(self, slots=2):
        self.root.mkdir(parents=True, exist_ok=True)
        need = {name: schedule.devices(self.graph, node) for name, node in self.graph.nodes.items()}
        devices = pool.Devices("cpu", tuple(map(str, range(slots))))
        return pool.Pool(self.graph, list(self.graph.nodes), self.work, need, devices, self.root / "logs")

    def notes(self) -> list[tuple[str, str]]:
        lines = [line.split() for line in (self.root / "notes").read_text().splitlines()]
        return [(what, re.sub(r"^t/\w+-(\w+)-\w+$", r"\1", name) + (f" x{held}" if held != "1" else "")) for what, name, held in lines]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    return Runs(tmp_path / "root", monkeypatch)


def test_the_longest_begins_first_and_nothing_before_what_it_reads(runs):
    runs.add("short", work=1)
    long = runs.add("long", work=9)
    runs.add("child", parents=[long], work=99)
    assert runs.pool(slots=1).run() == {}
    assert [name for what, name in runs.notes() if what == "begin"] == ["long", "child", "short"]


def test_no_more_at_once_than_there_are_devices_and_a_wide_run_waits_for_all(runs):
    sleep = "time.sleep(0.3)"
    runs.add("wide", devices=3, code=sleep, work=99)
    for name in "abcd":
        runs.add(name, code=sleep)
    runs.add("whole", mesh={"fsdp": -1}, work=1, code=sleep)
    assert runs.pool(slots=3).run() == {}
    held = 0
    for what, name in runs.notes():
        size = 3 if name in ("wide x3", "whole x3") else 1
        held += size if what == "begin" else -size
        assert 0 <= held <= 3
    assert runs.notes()[0] == ("begin", "wide x3") and ("end", "whole x3") in runs.notes()


def test_a_run_that_does_not_fit_is_refused_before_anything_begins(runs):
    runs.add("small")
    runs.add("huge", devices=4)
    with pytest.raises(UserError, match="huge.*: its mesh takes 4 devices, but there are 2 here"):
        runs.pool()
    assert not (runs.root / "notes").exists()


def test_a_failure_leaves_the_others_their_chance(runs, capsys):
    bad = runs.add("bad", code="print('error: loss: nan at step 0'); print('more'); sys.exit(2)")
    child = runs.add("child", parents=[bad])
    grandchild = runs.add("grandchild", parents=[child])
    killed = runs.add("killed", code="os.kill(os.getpid(), signal.SIGKILL)")
    crash = runs.add("crash", code="raise RuntimeError('a defect')")
    good = runs.add("good")
    failed = runs.pool().run()
    assert failed == {
        bad: f"loss: nan at step 0; log: {runs.root}/logs/{bad}.log",
        child: f"needs {bad}, which failed", grandchild: f"needs {child}, which failed",
        killed: f"killed by SIGKILL (out of memory?); log: {runs.root}/logs/{killed}.log",
        crash: f"RuntimeError: a defect; log: {runs.root}/logs/{crash}.log"}
    assert runlog.state(runs.root / good) == "done" and f"failed   {bad}" in capsys.readouterr().err


def test_a_run_that_was_stopped_goes_on_but_not_for_ever(runs):
    stopped = f"sys.exit({interrupts.RESTARTABLE})"
    runs.add("once", code=f"if not (mark := Path({str(runs.root / 'mark')!r})).exists(): mark.write_text(''); {stopped}")
    ever = runs.add("ever", code=stopped)
    failed = runs.pool().run()
    assert list(failed) == [ever] and "exit code 75" in failed[ever]
    begun = [name for what, name in runs.notes() if what == "begin"]
    assert begun.count("once") == 2 and begun.count("ever") == pool.TRIES


@pytest.mark.parametrize("number, error", [(signal.SIGTERM, interrupts.Stopped), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_stops_every_process_and_lets_it_save(runs, number, error):
    save = "def save(*_):\n    note('saved')\n    sys.exit(75)\nsignal.signal(signal.SIGTERM, save)\nnote('ready')\ntime.sleep(60)"
    for name in "ab":
        runs.add(name, code=save)
    runs.add("c")
    made, handler = runs.pool(), signal.getsignal(number)

    def tell():
        while not (runs.root / "notes").exists() or not {("ready", "a"), ("ready", "b")} <= set(runs.notes()):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=tell)
    thread.start()
    with pytest.raises(error):
        made.run()
    thread.join()
    assert {("saved", "a"), ("saved", "b")} <= set(runs.notes()) and ("begin", "c") not in runs.notes()
    assert not made.running and signal.getsignal(number) == handler


def test_a_signal_while_runs_are_started_starts_no_more_and_reaches_those_that_are(runs, monkeypatch):
    save = "def save(*_):\n    note('saved')\n    sys.exit(75)\nsignal.signal(signal.SIGTERM, save)\nnote('ready')\ntime.sleep(60)"
    for name in "ab":
        runs.add(name, code=save)
    real = pool.subprocess.Popen

    def popen(*args, **kwargs):
        process = real(*args, **kwargs)
        while not (runs.root / "notes").exists() or ("ready", "a") not in runs.notes():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(pool.subprocess, "Popen", popen)
    with pytest.raises(interrupts.Stopped):
        runs.pool().run()
    assert runs.notes() == [("begin", "a"), ("ready", "a"), ("saved", "a")]


# --------------------------------------------------------------------------- what a process sees


@pytest.mark.parametrize("platform, ids, held, expected", [
    ("cuda", ("0", "1", "2"), ("1",), {"CUDA_VISIBLE_DEVICES": "1"}),
    ("cuda", ("GPU-a", "GPU-b"), ("GPU-a", "GPU-b"), {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}),
    ("rocm", ("4", "5"), ("5",), {"HIP_VISIBLE_DEVICES": "5"}),
    ("cpu", ("0", "1"), ("1",), {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_other=2"}),
    ("cpu", ("0", "1"), ("0", "1"), {"JAX_NUM_CPU_DEVICES": "2"}),
    ("cuda", ("0",), (), {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": None}),
    ("tpu", ("0", "1", "2", "3"), ("2",), {"TPU_VISIBLE_CHIPS": "2", "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_PORT": "8473"}),
    ("tpu", ("0", "1", "2", "3"), ("0", "1", "2", "3"), {"TPU_VISIBLE_CHIPS": None}),
], ids=str)
def test_the_environment_of_a_process(platform, ids, held, expected):
    given = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_other=2", "SLURM_NTASKS": "4", "SLURM_PROCID": "1",
             "OMPI_COMM_WORLD_SIZE": "4", "HOME": "/home/me"}
    got = pool.environment(pool.Devices(platform, ids), held, given)
    assert {key: got.get(key) for key in expected} == expected
    assert got["HOME"] == "/home/me" and not any(key.startswith(("SLURM", "OMPI")) for key in got)  # it is no cluster's process
    assert str(ROOT) in got["PYTHONPATH"].split(os.pathsep)


def test_chips_of_a_tpu_go_in_rectangles(runs):
    runs.add("a")
    made = runs.pool()
    made.devices = pool.Devices("tpu", tuple("01234567"))

    def free(count, *held):
        made.running = {str(h): types.SimpleNamespace(held=h) for h in held}
        return made._free(count)

    assert free(1, ("0",)) == ("1",) and free(2, ("0",)) == ("2", "3") and free(4, ("1",)) == tuple("4567")
    assert free(4, ("1",), ("6",)) is None and free(8, ("1",)) is None and free(8) == tuple("01234567")
    made.running = {}


def test_the_devices_here():
    found, stated = pool.find(3), pool.find(2, environ={**os.environ, "W2S_DEVICE_MEMORY": "3GiB"})
    assert found.ids == ("0", "1", "2") and stated == pool.Devices("cpu", ("0", "1"), 3 * 2**30)
    assert pool.environment(found, ("1",), {})["W2S_DEVICE_MEMORY"] == str(found.memory)  # runs share what there is
    with pytest.raises(UserError, match="config.executor: 'devices', but jax finds none here: .*nowhere"):
        pool.find(environ={**os.environ, "JAX_PLATFORMS": "nowhere"})


# --------------------------------------------------------------------------- a sweep


@pytest.mark.slow
def test_a_sweep_that_is_stopped_and_goes_on_is_the_one_of_one_process(swept, tmp_path):
    """SIGTERM while two runs train: both save, the pool ends with 75 and leaves no process; the same command makes the rest."""
    root = tmp_path / "root"
    environ = {**os.environ, **swept.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "w2s_jax.main", *swept.flags, "--config.executor=devices", "--config.slots=2", f"--workdir={root}"]
    first = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    end = time.monotonic() + 200
    while not list(root.glob("task/finetune*/config.json")):
        assert time.monotonic() < end and first.poll() is None, first.stderr.read()
        time.sleep(0.05)
    children = {int(json["pid"]) for file in root.glob("task/*/.owner") if (json := runlog.read_json(file))}
    first.send_signal(signal.SIGTERM)
    err = first.communicate(timeout=200)[1]
    assert first.returncode == interrupts.RESTARTABLE and "stopped by SIGTERM" in err, err
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    assert status.lines(str(root))[-1] != "4 done"
    again = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert again.returncode == 0, again.stderr
    sweeps.assert_same(root, swept.root, swept.runs)
    assert status.lines(str(root))[-1] == "4 done"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells a process that its parent died")
def test_a_process_whose_pool_was_killed_ends(tmp_path):
    """The run of a pool that got SIGKILL gets SIGTERM."""
    child = (f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\nfrom w2s_jax import interrupts\n"
             "interrupts.follow_parent(); print('ready', flush=True); time.sleep(60)")
    parent = (f"import os, subprocess, sys, time\nprocess = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE, "
              "env=os.environ | {'W2S_PARENT': str(os.getpid())}, start_new_session=True)\nprocess.stdout.readline()\n"
              "print(process.pid, flush=True)\ntime.sleep(60)")
    pool_ = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    pid = int(pool_.stdout.readline())
    pool_.kill()
    pool_.wait()
    for _ in range(200):
        if not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} lives on")
