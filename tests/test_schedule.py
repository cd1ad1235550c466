"""The runs of a sweep for others than its own process: what each needs, which wait for which, and the text that SLURM is given."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from w2s_jax import checks, main, schedule, sizes, slurm, stages, status
from w2s_jax import config as config_lib
from w2s_jax.config import shipped
from w2s_jax.errors import UserError
from w2s_jax.files import dumps
from w2s_jax.graph import Graph


def node(graph, name, stage, parents=(), **keys):
    """A run of a made-up identity."""
    config = tiny.set_keys(shipped(stage), seed=len(graph.nodes), **keys) if stage != "label" else shipped("label")
    return graph.add("t", name, config, parents)


@pytest.fixture
def graph(tmp_path):
    return make_graph(tmp_path / "root")


def make_graph(root, seeds=(0, 1)):
    """weak -> label -> student and a ceiling for each seed; the large model is laid over all devices."""
    ids = iter(range(100))
    graph = Graph(root, lambda config, planned: {"id": next(ids)})
    for seed in seeds:
        weak = node(graph, f"weak-s{seed}", "finetune", model="gpt2")
        label = node(graph, f"weak-s{seed}", "label", [weak])
        graph.nodes[label].config.run = graph.path(weak)
        node(graph, f"student-s{seed}", "finetune", [label], mesh__fsdp=-1)
        node(graph, f"ceiling-s{seed}", "finetune", mesh__fsdp=-1)
    return graph


def options(**keys):
    return tiny.set_keys(shipped("sweep"), **{f"slurm__{k}": v for k, v in keys.items()}).slurm


# --------------------------------------------------------------------------- what a run needs


@pytest.mark.parametrize("keys, count", [
    ({"model": "gpt2", "mesh__data": -1}, 1),  # replicas take what is there: one is enough
    ({"model": "gpt2"}, 1),
    ({"model": "gpt2", "mesh__data": 2, "mesh__fsdp": 4}, 8),
    ({"model": "gpt2", "mesh__data": -1, "mesh__model": 2}, 2),
    ({"model": "gpt2", "mesh__model": -1}, schedule.ALL),
    ({"model": "Qwen/Qwen-7B", "mesh__data": 1}, 1),
    ({"model": "Qwen/Qwen-7B", "mesh__fsdp": -1}, schedule.ALL),
], ids=str)
def test_devices_of_a_run(tmp_path, keys, count):
    graph = Graph(tmp_path, lambda config, planned: {"keys": keys})
    assert schedule.devices(graph, graph.nodes[node(graph, "x", "finetune", **keys)]) == count


@pytest.mark.parametrize("limit, keys, count", [
    (0, {}, 1),  # not known
    (2**30, {}, 1),
    (2**18, {}, schedule.ALL),
    (2**18, {"train": "head"}, 1),  # no moments, no gradients
    (2**18, {"mesh__data": 1}, 1),  # as the config says
], ids=str)
def test_runs_of_an_open_mesh_take_what_they_need(tmp_path, tiny_model, limit, keys, count):
    """With labels of the model, which need less, and an ensemble, which reads files only."""
    ids = iter(range(9))
    graph = Graph(tmp_path, lambda config, planned: {"id": next(ids)})
    trained = node(graph, "w", "finetune", model=str(tiny_model), max_length=8, **keys)
    label = node(graph, "l", "label", [trained])
    ensemble = graph.add("t", "e", shipped("ensemble"), [label])
    fits = sizes.Fits(graph, limit)
    assert [schedule.devices(graph, graph.nodes[name], fits) for name in (trained, label, ensemble)] == [count, 1, 0]


def test_arrays_wait_for_what_they_read_and_for_nothing_else(graph):
    work = {name: len(graph.nodes) - i for i, name in enumerate(graph.nodes)} | {n: 99 for n in graph.nodes if "ceiling-s1" in n}
    arrays = schedule.arrays(graph, list(graph.nodes), work, need(graph))
    got = [(a.stage, a.devices, [run.split("-")[1] + run.split("-")[2] for run in a.runs], a.after) for a in arrays]
    assert got == [
        ("finetune", 1, ["weaks0", "weaks1"], ()),
        ("finetune", schedule.ALL, ["ceilings1", "ceilings0"], ()),  # the longest first; nobody waits for them
        ("label", 1, ["weaks0", "weaks1"], ("00-finetune",)),
        ("finetune", schedule.ALL, ["students0", "students1"], ("02-label",)),
    ]


def test_arrays_of_what_is_left(graph):
    """A run whose parents are done waits for nothing."""
    left = [name for name in graph.nodes if "student" in name]
    assert [(a.runs, a.after) for a in schedule.arrays(graph, left, dict.fromkeys(left, 1.0), need(graph))] == [(tuple(left), ())]


def test_arrays_are_not_longer_than_slurm_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "MOST", 2)
    graph = make_graph(tmp_path, seeds=(0, 1, 2))
    arrays = schedule.arrays(graph, list(graph.nodes), dict.fromkeys(graph.nodes, 1.0), need(graph))
    assert [len(a.runs) for a in arrays] == [2, 1] * 4
    assert arrays[4].after == ("00-finetune",) and arrays[5].after == ("01-finetune",)


# --------------------------------------------------------------------------- a run from its file


@pytest.mark.parametrize("stage", ["finetune", "label", "ensemble", "probe", "prompt", "pretrain", "sweep", "vision"])
def test_a_recorded_config_is_the_config(stage, tmp_path):
    config = shipped(stage)
    (tmp_path / "c.json").write_text(dumps({"config": config}))
    got = config_lib.load(str(tmp_path / "c.json"))
    assert got.to_dict() == config.to_dict() and got.is_locked
    assert all(config_lib.key_type(got, key) == config_lib.key_type(config, key) for key in config_lib.flatten(config))


@pytest.mark.parametrize("content, message", [
    ("{", "cannot be read"), ("{}", "expected a config under the key 'config'"), ('{"config": {"stage": "x"}}', "expected a config under"),
    ('{"config": {"stage": "finetune", "batchsize": 3}}', "batchsize: is not a key of the stage finetune; did you mean 'batch_size'"),
    ('{"config": {"stage": "finetune", "batch_size": "3"}}', "config.batch_size: '3', expected an integer"),
])
def test_a_recorded_config_that_is_none(content, message, tmp_path, capsys):
    (tmp_path / "c.json").write_text(content)
    assert main.main([f"--config={tmp_path / 'c.json'}", f"--workdir={tmp_path / 'run'}"]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_planned_run_is_not_made_before_what_it_reads(graph, capsys):
    schedule.write_plans(graph, graph.nodes)
    names = list(graph.nodes)
    weak, label = (Path(graph.path(name)) for name in names[:2])
    command = schedule.command(graph.root, names[1])[3:]
    assert command[1] == f"--workdir={label}" and main.main(command) == 2
    assert f"needs the run {weak}, which is not made" in capsys.readouterr().err
    weak.mkdir(parents=True)
    (weak / "config.json").write_text('{"identity": {}}')
    (weak / "error.json").write_text('{"error": "UserError: loss: nan at step 0"}')
    assert main.main(command) == 2
    assert f"needs the run {weak}, which is failed: UserError: loss: nan at step 0" in capsys.readouterr().err
    assert not label.exists()


# --------------------------------------------------------------------------- what sbatch is asked


@pytest.mark.parametrize("count, keys, expected", [
    (0, {}, "--nodes=1 --ntasks-per-node=1"),
    (1, {}, "--nodes=1 --ntasks-per-node=1 --gres=gpu:1"),
    (1, {"gres": "gpu:a100", "cpus": 6, "mem": "60G"}, "--nodes=1 --ntasks-per-node=1 --gres=gpu:a100:1 --cpus-per-task=6 --mem=60G"),
    (schedule.ALL, {"devices": 4, "cpus": 6, "mem": "60G"}, "--nodes=1 --ntasks-per-node=1 --gres=gpu:4 --cpus-per-task=24 --mem=240G"),
    (4, {}, "--nodes=1 --ntasks-per-node=1 --gres=gpu:4"),
    (32, {"devices": 8}, "--nodes=4 --ntasks-per-node=1 --gres=gpu:8"),
    (1, {"gres": ""}, "--ntasks=1"),
    (2, {"gres": "", "cpus": 3, "mem": "5G"}, "--ntasks=2 --cpus-per-task=3 --mem=10G"),
], ids=str)
def test_resources(count, keys, expected):
    assert slurm.resources(count, options(**keys)) == expected.split()


@pytest.mark.parametrize("text, seconds", [("90", 5400), ("90:30", 5430), ("1:30:05", 5405), ("2-3", 183600), ("2-3:30", 185400)])
def test_times(text, seconds):
    assert slurm.seconds(text) == seconds


@pytest.mark.parametrize("keys, message", [
    ({"slurm__time": "2h"}, "slurm.time: '2h', expected minutes"),
    ({"slurm__time": "2"}, "slurm.grace: 120 seconds, expected fewer than config.slurm.time=2 has"),
    ({"slurm__mem": "lots"}, "slurm.mem: 'lots', expected a number with K, M, G or T"),
    ({"slurm__options": ("qos",)}, "slurm.options: 'qos', expected options of sbatch"),
    ({"slurm__gres": "gpu:1,shard"}, "slurm.gres: .* expected one resource"),
    ({"slurm__devices": 0}, "slurm.devices: 0, expected an integer at least 1|slurm.devices: 0, expected"),
    ({"executor": "cloud"}, "executor: 'cloud', expected one of here, devices, slurm"),
    ({"slots": -1}, "slots: -1, expected"),
], ids=str)
def test_keys_that_do_not_fit(keys, message):
    config = tiny.set_keys(shipped("sweep"), **keys)
    with pytest.raises(UserError, match=f"config.{message}"):
        checks.check(config)
        stages.prepare(config)


RECORDER = """#!{python}
import json, os, sys
from pathlib import Path
calls = Path(os.environ["CALLS"])
calls.write_text(calls.read_text() + json.dumps([Path(sys.argv[0]).name, *sys.argv[1:]]) + "\\n" if calls.exists() else
                 json.dumps([Path(sys.argv[0]).name, *sys.argv[1:]]) + "\\n")
if sys.argv[0].endswith("sbatch"):
    number = sum(line.startswith('["sbatch"') for line in calls.read_text().splitlines())
    if os.environ.get("REFUSE") == str(number):
        sys.exit("sbatch: error: invalid partition specified: nowhere")
    print(100 + number)
if sys.argv[0].endswith("squeue"):
    print(os.environ.get("QUEUE", ""))
"""


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    """Stand-ins for SLURM's programs that note how they are called: `calls()` gives the calls so far."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "squeue", "srun", "scancel"):
        (folder / name).write_text(RECORDER.format(python=sys.executable))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return lambda: [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


def submit(graph, **keys):
    config = tiny.set_keys(shipped("sweep"), **keys)
    return slurm.submit(graph, list(graph.nodes), dict.fromkeys(graph.nodes, 1.0), need(graph), config, stages.SEVERAL)


def need(graph):
    return {name: schedule.devices(graph, node) for name, node in graph.nodes.items()}


@pytest.mark.parametrize("folder", ["plain", "it's $HOME; \"50%a\" `x` & co"])
def test_a_sweep_is_submitted_as_it_is_meant(tmp_path, recorder, folder, capsys):
    """Every word arrives as it is, in sbatch and in the task that its script runs, whatever the folder is called."""
    graph = make_graph(tmp_path / folder)
    root = Path(graph.root)
    submit(graph, slurm__partition="gpu long", slurm__time="8:00:00", slurm__at_once=3, slurm__options=("--qos=a b",),
           slurm__setup="X=$((1+1))")
    calls = recorder()
    assert [call[0] for call in calls] == ["sbatch"] * 5
    weak, ceiling, label, student, report = (call[1:] for call in calls)
    for call in (weak, ceiling, label, student, report):
        assert {"--partition=gpu long", "--time=8:00:00", "--qos=a b", "--requeue", f"--chdir={Path.cwd()}"} <= set(call)
    assert {"--array=0-1%3", "--gres=gpu:1", "--signal=TERM@120"} <= set(weak) and {"--gres=gpu:8"} <= set(student)
    assert f"--output={root}/slurm/logs/1-00-finetune-".replace("%", "%%") + "%A_%a.out" in weak
    assert not any(word.startswith("--dependency") for word in (*weak, *ceiling))
    assert "--dependency=afterany:101" in label and "--dependency=afterany:103" in student
    assert "--dependency=afterany:101:102:103:104" in report
    jobs = json.loads((root / "slurm/jobs.json").read_text())["jobs"]
    assert [job["id"] for job in jobs] == ["101", "102", "103", "104", "105"] and jobs[0]["command"] == ["sbatch", *weak]
    assert "cancel all: scancel 101 102 103 104 105" in capsys.readouterr().err

    script, name = weak[-1], jobs[0]["runs"][1]
    assert "\nX=$((1+1))\n" in Path(script).read_text()
    environ = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_ID": "9", "SLURM_CPUS_PER_TASK": "4"}
    subprocess.run(["bash", script], env={**os.environ, **environ}, check=True)
    assert recorder()[-1] == ["srun", "--mpi=none", "--kill-on-bad-exit=0", "--cpus-per-task=4", sys.executable, "-m", "w2s_jax.main",
                              f"--config={root}/planned/{name}.json", f"--workdir={root}/{name}"]
    done = subprocess.run(["bash", report[-1]], capture_output=True, text=True)
    assert f"no runs under {root}" in done.stdout and f"error: {root}" in done.stderr  # there is no sweep.json here


def test_what_is_queued_is_not_submitted_again(graph, recorder, monkeypatch, capsys):
    submit(graph)
    # the second weak model and both labels are queued yet; 102 is another's job, whose number came around again
    queue = "101|1|RUNNING|w2s-root-finetune", "103|0|PENDING|w2s-root-label", "103|1|PENDING|w2s-root-label", "102|0|RUNNING|mine"
    monkeypatch.setenv("QUEUE", "\n".join(queue))
    queued = submit(graph)
    asked, cancelled, *calls = recorder()[5:]
    assert asked[0] == "squeue" and [call[0] for call in calls] == ["sbatch"] * 5
    assert cancelled == ["scancel", "103_0"]  # it would have started before the first weak model is made again
    weak, ceiling, label, student, report = (call[1:] for call in calls)
    assert "--array=0-0" in weak and "--array=0-0" in label and "--array=0-1" in ceiling and "--array=0-1" in student
    assert "--dependency=afterany:106" in label and "--dependency=afterany:108:103_1" in student
    assert set(queued) == set(graph.nodes) and queued[next(n for n in queued if "label-weak-s1" in n)] == "103_1"
    assert "in the queue already: 2 runs" in capsys.readouterr().err


def test_status_says_what_the_queue_has_and_where_a_run_failed(graph, recorder, monkeypatch):
    submit(graph)
    root = Path(graph.root)
    names = list(graph.nodes)
    (root / "sweep.json").write_text(dumps({"config": shipped("sweep"), "pairs": [], "runs": names}))
    jobs = json.loads((root / "slurm/jobs.json").read_text())["jobs"]
    monkeypatch.setenv("QUEUE", f"{jobs[2]['id']}|0|PENDING|{jobs[2]['title']}")
    log = Path(f"{jobs[0]['log']}_1.out")
    log.write_text("2026-01-01 ...\nerror: config.model: 'gpt2', no such folder\nsrun: error: node1: task 0: Exited with exit code 2\n")
    lines = status.lines(str(root))
    assert f"failed   {root / jobs[0]['runs'][1]}  config.model: 'gpt2', no such folder  log: {log}" in lines
    assert f"queued   {root / jobs[2]['runs'][0]}  job {jobs[2]['id']}_0 pending" in lines
    assert lines[-1] == "1 queued, 1 failed, 6 waiting"


def test_a_refusal_is_one_line_and_keeps_what_was_submitted(graph, recorder, monkeypatch):
    monkeypatch.setenv("REFUSE", "2")
    with pytest.raises(UserError, match="sbatch: sbatch: error: invalid partition specified: nowhere"):
        submit(graph)
    assert [job["id"] for job in json.loads((Path(graph.root) / "slurm/jobs.json").read_text())["jobs"]] == ["101"]


def test_a_run_that_no_cluster_takes(tmp_path, recorder):
    ids = iter(range(9))
    graph = Graph(tmp_path / "root", lambda config, planned: {"id": next(ids)})
    node(graph, "x", "finetune", model="gpt2", mesh__fsdp=12)
    with pytest.raises(UserError, match="config.slurm.devices: a run's mesh takes 12 devices, expected a multiple of the 8 of a node"):
        submit(graph)
    node(graph, "y", "probe", model="gpt2", mesh__fsdp=2)
    with pytest.raises(UserError, match="takes 2 processes, but the stage probe runs in one"):
        submit(graph, slurm__gres="")
    assert not (tmp_path / "calls").exists()


def test_a_machine_without_slurm(graph, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="config.executor: 'slurm', but there is no sbatch on PATH"):
        submit(graph)
    assert not Path(graph.root).exists()


def test_what_is_redone_goes_only_when_it_is_submitted(graph, recorder, monkeypatch):
    """A submission that fails takes nothing away."""
    begun = []
    config = tiny.set_keys(shipped("sweep"))
    again = lambda: slurm.submit(graph, list(graph.nodes), dict.fromkeys(graph.nodes, 1.0), need(graph), config,  # noqa: E731
                                 stages.SEVERAL, begin=begun.append)
    again()
    assert begun == [list(graph.nodes)]
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="no sbatch on PATH"):
        again()
    assert len(begun) == 1


def test_a_dry_run_submits_nothing(graph, capsys):
    config = shipped("sweep")
    slurm.submit(graph, list(graph.nodes), dict.fromkeys(graph.nodes, 1.0), need(graph), config, stages.SEVERAL, dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    assert [w[0] for w in words] == ["sbatch"] * 5 and "--dependency=afterany:<1-02-label>" in words[3]
    assert not Path(graph.root).exists()


def test_who_plans_holds_no_device(cli, tiny_model, tiny_task, tmp_path):
    """Planning a sweep imports jax and asks it for no device: on a login node there is none, and a pool leaves them to its runs."""
    other = tiny.write_model(tmp_path / "other", n_embd=24, n_inner=96)
    keys = {"models": f"{tiny_model},{other}", "tasks": tiny_task, "executor": "slurm", "slurm__chip": "h100"}
    done = cli("--config=sweep", *tiny.flags(**keys), f"--workdir={tmp_path / 'root'}", "--dry_run", JAX_PLATFORMS="nowhere")
    assert done.returncode == 0 and done.stdout.count("--gres=gpu:1 ") == 4, done.stderr


def test_logs_of_an_object_store_have_a_place(tmp_path):
    with pytest.raises(UserError, match="config.logs: '', expected a local folder"):
        schedule.folder("gs://bucket/sweep", "", "slurm")
    assert schedule.folder("gs://bucket/sweep", str(tmp_path), "slurm") == tmp_path
