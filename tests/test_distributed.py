"""Several real processes on this machine make the run that one makes, and end together."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import tiny
from conftest import DEVICES, ROOT
from processes import FAST, launch, port  # noqa: F401 (launch is a fixture)

import w2s_jax

pytestmark = pytest.mark.slow  # minutes together

KEYS = {"batch_size": 8, "epochs": 2, "learning_rate": 1e-3, "split": "train", "checkpoint_every": 0, "steps_per_dispatch": 4,
        "mesh__data": 1, "mesh__fsdp": 4}  # fmt: skip


def command(stage: str, workdir, **keys) -> list[str]:
    return [f"--config={stage}", f"--workdir={workdir}", *tiny.flags(**keys)]


@pytest.fixture(scope="module")
def finetune(tiny_model, tiny_task):
    def make(workdir, **keys):
        return command("finetune", workdir, model=tiny_model, task=tiny_task, **KEYS | keys)
    return make


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(launch, finetune, root):  # noqa: F811
    """The run of one process with four devices; its Job."""
    return launch(1, *finetune(root / "alone"), devices=4, COUNTS=str(root / "alone.json")).done()


@pytest.fixture(scope="module")
def two(launch, finetune, root):  # noqa: F811
    """The run of two processes with two devices each; its Job."""
    return launch(2, *finetune(root / "two"), devices=2, COUNTS=str(root / "two{i}.json")).done()


def same(a, b, split: str = "test", tolerance: float = 1e-5) -> None:
    """Losses and predictions of two runs."""
    one, two_ = w2s_jax.load(a), w2s_jax.load(b)
    assert one.results is not None and two_.results is not None
    assert [row["step"] for row in one.metrics] == [row["step"] for row in two_.metrics]
    for key in ("loss", "lr"):
        np.testing.assert_allclose([row.get(key, 0) for row in one.metrics], [row.get(key, 0) for row in two_.metrics], rtol=0,
                                   atol=tolerance)
    left, right = one.predictions(split), two_.predictions(split)
    assert list(left["id"]) == list(right["id"])
    np.testing.assert_allclose(np.stack(left["logits"]), np.stack(right["logits"]), rtol=0, atol=tolerance)


# --------------------------------------------------------------------------- one run


def test_two_processes_make_the_run_of_one(alone, two, root):
    same(root / "alone", root / "two")
    assert w2s_jax.load(root / "two").record["starts"][0]["devices"] == {"platform": "cpu", "kind": "cpu", "count": 4, "processes": 2}


def test_process_0_alone_prints_and_writes(alone, two, root):
    assert [two.out(0), two.out(1), two.err(1)] == ["", "", ""]

    def lines(job):  # of the two runs the same, names and figures of time aside
        lines_ = [line for line in job.err().splitlines() if "passed" not in line and "_test" not in line]
        return [re.sub(r"[\d.]+ GiB a device", "a device", line) for line in lines_]  # of a CPU its share of the process's memory
    assert [line.replace("alone", "two") for line in lines(alone)] == lines(two)
    assert sorted(p.name for p in (root / "two").iterdir()) == sorted(p.name for p in (root / "alone").iterdir())
    steps = [row["step"] for row in w2s_jax.load(root / "two").metrics]
    assert steps == list(range(16))


def test_each_process_reads_its_share(alone, two, root, tiny_model):
    """Of the weights its slices and what is replicated, of the batches its cells."""
    whole = json.loads((root / "alone.json").read_text())
    parts = [json.loads((root / f"two{i}.json").read_text()) for i in range(2)]
    assert [part["tokens"] for part in parts] == [whole["tokens"] // 2] * 2
    replicated = 36 * 4 * (2 * (4 + 3 + 1 + 4 + 1) + 2)  # biases and norms; in float32
    assert whole["weights"] >= (tiny_model / "model.safetensors").stat().st_size * 0.9
    for part in parts:
        assert part["weights"] <= (whole["weights"] - replicated) // 2 + replicated
    assert sum(part["weights"] for part in parts) >= whole["weights"]
    assert [bool(part["fingerprints"]) for part in parts] == [True, False]


def test_labels_of_four_processes_are_those_of_one(launch, two, root):  # noqa: F811
    keys = {"run": root / "two", "split": "train"}
    launch(1, *command("label", root / "labels1", **keys), devices=2).done()
    launch(4, *command("label", root / "labels4", **keys)).done()
    same(root / "labels1", root / "labels4", "train")


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="Open MPI is not installed")
def test_open_mpi_starts_two_processes(two, finetune, root):
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "XLA_FLAGS": f"{DEVICES}=2 {FAST}"}
    command_ = ["mpirun", "-n", "2", "--oversubscribe", sys.executable, "-m", "w2s_jax.main", *finetune(root / "mpi")]
    ended = subprocess.run(command_, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "" and ended.stderr.count("accuracy") == 2, ended.stderr  # the last line of a run, and of what it is worth
    same(root / "two", root / "mpi", tolerance=0)


def rows(run) -> int:
    """Lines of its metrics so far."""
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def test_stopped_and_gone_on_by_other_numbers_of_processes(launch, alone, two, finetune, root):  # noqa: F811
    """SIGTERM to one process, to one of two, to one of four on another mesh: each time all save and exit; one process ends the run."""
    keys = {"epochs": 24, "learning_rate": 3e-5}
    launch(1, *finetune(root / "straight", **keys), devices=4).done()
    run = root / "stopped"
    mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__model": 2}
    for n, devices, which, changes in ((1, 4, 0, {}), (2, 2, 1, {}), (4, 2, 0, mesh)):
        before = rows(run)
        job = launch(n, *finetune(run, **keys | changes), devices=devices)
        job.until(lambda before=before: rows(run) > before)
        assert job.signal(which, signal.SIGTERM).wait(100) == [75] * n, job.text()
        assert job.err().splitlines()[-1] == f"stopped by SIGTERM; the same command goes on at step {rows(run)} of 192", job.text()
        assert not (run / "error.json").exists() and not (run / ".owner").exists()
        assert all(job.err(number) == "" for number in range(1, n))
    launch(1, *finetune(run, **keys), devices=4).done()
    starts = w2s_jax.load(run).record["starts"]
    assert [start["devices"]["processes"] for start in starts] == [1, 2, 4, 1]
    same(root / "straight", run)


# --------------------------------------------------------------------------- ends


@pytest.mark.parametrize("victim", [1, 0])
def test_a_lost_process_ends_the_job(victim, launch, finetune, root):  # noqa: F811
    run = root / f"lost{victim}"
    job = launch(2, *finetune(run, epochs=200), devices=2)
    job.until(lambda: rows(run) > 0)
    assert job.signal(victim).wait(20)[1 - victim] == 3, job.text()
    line = job.err(1 - victim).splitlines()[-1]
    pid = job.processes[victim].pid
    assert line == f"error: process {victim} of 2 (host {socket.gethostname()}, pid {pid}) is gone; this run stops, and the same command " \
                   "goes on from its last checkpoint"
    assert "***" not in job.text() and "Traceback" not in job.text(), job.text()


def test_an_error_that_process_0_alone_can_see_is_everybodys(launch, two, finetune, root):  # noqa: F811
    job = launch(2, *finetune(root / "two", seed=3), devices=2)
    assert job.wait() == [2, 2], job.text()
    assert "holds another run, which differs in seed: 0 -> 3" in job.err(0) and job.err(0).count("\n") == 1
    assert job.err(1) == ""


def test_every_process_has_a_part_of_the_mesh(launch, finetune, tmp_path):  # noqa: F811
    job = launch(2, *finetune(tmp_path / "run", mesh__fsdp=1))
    assert job.wait() == [2, 2], job.text()
    assert "leaves process 1 of 2 without a device; expected all 2" in job.err(0) and job.err(0).count("\n") == 1, job.text()
    assert job.err(1) == "" and not (tmp_path / "run").exists()


# what the processes are started with -> what process 0 says
REFUSED = {
    "of all": (["--config.loss=xnt"], "config.loss: 'xnt', expected one of"),
    "other flags": (["--config.seed={i}"], "process 1 of 2 (host"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_error_of_the_users_is_said_once(name, launch, finetune, tmp_path):  # noqa: F811
    more, said = REFUSED[name]
    job = launch(2, *finetune(tmp_path / "run"), *more)
    assert job.wait(60) == [2, 2], job.text()
    lines = job.err(0).splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), job.text()
    assert said in lines[0]
    assert not (tmp_path / "run").exists()


def test_an_error_of_one_process_is_told_by_process_0(launch, finetune, tmp_path):  # noqa: F811
    """Here of a file that is missing on its host."""
    for home in ("0", "1"):
        (tmp_path / home).mkdir()
    (tmp_path / "0" / "labels.parquet").touch()
    job = launch(2, *finetune(tmp_path / "run"), "--config.stats_labels=~/labels.parquet", HOME=f"{tmp_path}/{{i}}")
    assert job.wait(60) == [2, 2], job.text()
    last = job.err(0).splitlines()[-1]
    assert last.startswith("error: process 1 of 2 (host "), job.text()
    assert last.endswith("config.stats_labels: '~/labels.parquet', no such file or folder")
    assert job.err(1) == ""


def test_a_stage_for_one_process_says_which_run_in_several(launch, tiny_model, tiny_task, tmp_path):  # noqa: F811
    job = launch(2, *command("probe", tmp_path / "run", model=tiny_model, task=tiny_task))
    assert job.wait(60) == [2, 2], job.text()
    assert "config.stage: 'probe' runs in one process, but this job has 2; of the stages, finetune, label," in job.err(0)
    assert job.err(1) == ""


@pytest.mark.parametrize("there, say", [
    ((0, 1), {0: "processes 2 and 3 of 4 (flags) did not come to process 0 at 127.0.0.1:", 1: "processes 2 and 3 of 4 (flags) did not"}),
    ((2,), {2: "process 2 of 4 (flags): process 0 did not answer at 127.0.0.1:"}),
])  # fmt: skip
def test_a_process_that_never_comes_is_named(there, say, launch, finetune, tmp_path):  # noqa: F811
    job = launch(4, *finetune(tmp_path / "run"), "--join_seconds=2", only=there)
    assert job.wait(60) == [2] * len(there), job.text()
    for place, number in enumerate(there):
        assert say[number] in job.err(place) and "within 2 s" in job.err(place) and job.err(place).count("\n") == 1, job.text()
    assert not (tmp_path / "run").exists()


@contextlib.contextmanager
def foreigner(at: int, answer: bytes):
    """Another program on a port, which answers something or nothing."""
    import threading

    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", at))
        sock.listen()
        kept = []

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    kept.append(sock.accept()[0])
                    kept[-1].sendall(answer)
        threading.Thread(target=serve, daemon=True).start()
        yield


def test_foreign_programs_on_our_ports_are_passed_by(launch, finetune, tmp_path):  # noqa: F811
    """Two of the ports are taken, by one that talks and one that does not; the job meets on the third, here to say that it is refused."""
    at = port()
    flags = ["--num_processes=2", "--process_id={i}", f"--coordinator=127.0.0.1:{at}", "--config.loss=xnt"]
    with foreigner(at, b"HTTP/1.0 400 Bad Request\r\n\r\n"), foreigner(at + 1, b""):
        job = launch(2, *finetune(tmp_path / "run"), *flags, flags=False)
        assert job.wait(60) == [2, 2], job.text()
    assert "config.loss" in job.err(0) and job.err(1) == ""


# --------------------------------------------------------------------------- the other stages


def test_pretraining_and_export(launch, two, root):  # noqa: F811
    """Each of one process and of two: the same files."""
    keys = {"arch__width": 32, "arch__layers": 2, "arch__heads": 4, "steps": 8, "batch_size": 16, "n_heldout": 16, "checkpoint_every": 0,
            "learning_rate": 1e-3, "warmup_steps": 0}  # fmt: skip
    for n in (1, 2):
        launch(n, *command("pretrain", root / f"pretrained{n}", **keys), devices=2 // n).done()
        launch(n, *command("export", root / f"exported{n}", run=root / "two"), devices=2 // n).done()
    from safetensors.numpy import load_file

    for name, tolerance in (("pretrained", 1e-4), ("exported", 0)):
        one, several = (load_file(root / f"{name}{n}" / "model" / "model.safetensors") for n in (1, 2))
        assert one.keys() == several.keys()
        for key, value in one.items():
            np.testing.assert_allclose(value, several[key], rtol=0, atol=tolerance, err_msg=key)


def test_prompts(launch, tmp_path):  # noqa: F811
    model = tiny.write_tokenizer(tiny.write_model(tmp_path / "model", n_positions=128))
    task = tiny.write_texts(tmp_path / "task")
    for n in (1, 2):
        launch(n, *command("prompt", tmp_path / f"prompt{n}", model=model, task=task, shots=2, answers=" Yes,the"), devices=2 // n).done()
    same(tmp_path / "prompt1", tmp_path / "prompt2")


SWEEP = {"base__batch_size": 8, "base__epochs": 1, "base__learning_rate": 3e-3, "base__mesh__data": 2, "base__mesh__fsdp": 1,
         "base__steps_per_dispatch": 4, "losses": "logconf_eleuther"}  # fmt: skip


@pytest.fixture(scope="module")
def ladder(tmp_path_factory, tiny_model):
    return [tiny.write_model(tmp_path_factory.mktemp("ladder") / "small", seed=1, n_embd=24, n_inner=96), tiny_model]


@pytest.mark.slow  # a minute: five runs with four kinds of program, twice
def test_a_sweep_and_its_report(launch, ladder, tiny_task, root):  # noqa: F811
    """Adapters, a step that is selected, a loss with a state: each run of two processes is that of one."""
    keys = SWEEP | {"models": ",".join(map(str, ladder)), "tasks": tiny_task, "base__train": "lora", "base__n_val": 8,
                    "base__select": "val_labels", "base__eval_every": 2, "base__keep": "all"}  # fmt: skip
    jobs = [launch(n, *command("sweep", root / f"sweep{n}", **keys), devices=2 // n).done(500) for n in (1, 2)]
    found = [json.loads((root / f"sweep{n}" / "sweep.json").read_text()) for n in (1, 2)]
    assert found[0]["runs"] == found[1]["runs"] and len(found[0]["runs"]) == 4
    for name in found[0]["runs"]:
        same(root / "sweep1" / name, root / "sweep2" / name, "b" if "/label-" in name else "test", 1e-4)
    assert (root / "sweep2" / "report" / "report.md").exists()
    assert "weak" in jobs[1].out(0) and jobs[1].out(1) == jobs[1].err(1) == ""


def test_runs_of_a_sweep_fail_in_all_processes(launch, ladder, tiny_task, root):  # noqa: F811
    """Each run refuses its documents, and the sweep goes on to the next, in both processes."""
    keys = SWEEP | {"models": ",".join(map(str, ladder)), "tasks": tiny_task, "base__overlong": "error", "base__max_length": 20}
    job = launch(2, *command("sweep", root / "failed", **keys))
    assert job.wait(100) == [2, 2], job.text()
    assert "4 of 4 runs failed" in job.err(0).splitlines()[-1] and "needs " not in job.err(0).splitlines()[-1], job.text()
    assert job.err(1) == ""
