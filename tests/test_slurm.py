"""SLURM for real: a cluster of one node on this machine, runs that are preempted, cancelled and stopped."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cluster as cluster_lib
import numpy as np
import pytest
import sweeps
import tiny

import w2s_jax

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if missing := cluster_lib.missing():
        pytest.skip(f"SLURM is not installed (no {missing[0]}): apt-get install slurm-wlm munge")
    made = cluster_lib.Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        made.__enter__()
    except RuntimeError as error:
        if os.environ.get("W2S_SLURM") == "1":
            raise
        pytest.skip(f"SLURM is installed but does not start here: {error}")
    yield made
    made.__exit__()


def environ(cluster, swept) -> dict:
    return cluster.environ | swept.environ | {"VIRTUAL_ENV": sys.prefix, "W2S_INSTALL": "0"}


@pytest.mark.slow
def test_a_sweep_comes_out_as_it_does_here(cluster, swept, cli, tmp_path):
    root = tmp_path / "it's 100%a"  # SLURM replaces %a in names of logs
    flags = [*swept.flags, "--config.executor=slurm", "--config.slurm.gres=", "--config.slurm.time=30", f"--workdir={root}"]
    cluster.call("scontrol", "update", "partitionname=usual", "state=DOWN")  # it queues, and starts nothing before all is asked
    first = cli(*flags, **environ(cluster, swept))
    assert first.returncode == 0, first.stderr
    jobs = json.loads((root / "slurm/jobs.json").read_text())["jobs"]
    assert [len(job["runs"]) for job in jobs] == [1, 1, 1, 1, 0] and sorted(sum((job["runs"] for job in jobs), [])) == sorted(swept.runs)
    assert f"scancel {' '.join(job['id'] for job in jobs)}" in first.stderr
    again = cli(*flags, **environ(cluster, swept))
    assert again.returncode == 0 and "in the queue already: 4 runs" in again.stderr
    assert json.loads((root / "slurm/jobs.json").read_text())["jobs"] == jobs
    shown = cli("status", root, **environ(cluster, swept)).stdout
    assert re.search(r"^queued .*finetune-tiny_to_small\S*  job \d+_0 pending$", shown, re.MULTILINE), shown
    cluster.call("scontrol", "update", "partitionname=usual", "state=UP")
    cluster.wait(400)
    logs = "\n".join(log.read_text() for log in (root / "slurm/logs").iterdir())
    shown = cli("status", root, **environ(cluster, swept)).stdout
    assert shown.endswith("4 done\n"), shown + logs
    sweeps.assert_same(root, swept.root, swept.runs)


@pytest.mark.slow
def test_two_processes_give_way_and_come_back(cluster, swept, cli, tmp_path):
    """An urgent job takes the node; the two processes save, queue again, go on, and end where one process ends."""
    flags = ["--config=finetune", *tiny.flags(model=swept.models[1], task=swept.task, batch_size=8, epochs=100, learning_rate=1e-4,
                                              checkpoint_every=0, steps_per_dispatch=1, mesh__data=2)]
    script, run = ROOT / "launch/slurm/run.sh", tmp_path / "run"
    submitted = subprocess.run(["bash", script, "--ntasks=2", "--", *flags, f"--workdir={run}"], env=environ(cluster, swept),
                               capture_output=True, text=True, cwd=tmp_path)
    assert submitted.returncode == 0, submitted.stderr
    log = Path(re.search(r"log: (\S+);", submitted.stdout)[1])
    cluster.wait(200, (run / "config.json").exists)  # training begins
    cluster.call("sbatch", "--partition=urgent", f"--ntasks={cluster_lib.CPUS}", "--wrap=true", cwd=tmp_path)
    cluster.wait(300)
    text = log.read_text()
    found = w2s_jax.load(run)
    assert found.results is not None, text
    assert re.search(r"stopped by SIGTERM; the same command goes on at step [1-9]", text) and len(found.record["starts"]) == 2, text
    assert [row["step"] for row in found.metrics] == list(range(400)) and found.record["devices"]["processes"] == 2
    alone = cli(*flags, "--config.mesh.data=1", f"--workdir={tmp_path / 'alone'}", **swept.environ)
    assert alone.returncode == 0, alone.stderr
    one, two = found.predictions("test"), w2s_jax.load(tmp_path / "alone").predictions("test")
    np.testing.assert_allclose(np.stack(one.logits), np.stack(two.logits), atol=1e-3)


JOB = """#!/bin/bash
source {job}
w2s_job {restarts} {python} -c '
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("begins", os.environ["SLURM_JOB_ID"] == os.environ.get("SLURM_ARRAY_JOB_ID"), flush=True)
time.sleep(100)'
"""


def test_restarts_have_an_end_and_a_cancelled_job_stays_so(cluster, tmp_path):
    def submit(name, *options):
        (tmp_path / f"{name}.sh").write_text(JOB.format(job=ROOT / "w2s_jax/job.sh", restarts=1, python=sys.executable))
        return cluster.call("sbatch", "--parsable", "--requeue", "--open-mode=append", *options, f"{tmp_path / name}.sh").strip()

    def begun(log: Path) -> int:
        return log.read_text().count("begins") if log.exists() else 0

    array = submit("array", "--array=0-1", f"--output={tmp_path}/array_%a.out")
    cancelled = submit("cancelled", f"--output={tmp_path}/cancelled.out")
    tasks, log = [tmp_path / f"array_{i}.out" for i in (0, 1)], tmp_path / "cancelled.out"
    cluster.wait(90, lambda: all(map(begun, [*tasks, log])))
    cluster.call("scancel", cancelled)
    first = next(i for i in (0, 1) if "begins True" in tasks[i].read_text())  # the task that has the array's number
    for times in (1, 2):  # as SLURM does before the time limit: the tasks are told, the job's script is not
        cluster.wait(90, lambda times=times: begun(tasks[first]) == times)
        cluster.call("scancel", "--signal=TERM", f"{array}_{first}")
    cluster.wait(90, lambda: "error: stopped after 1 restarts" in tasks[first].read_text())
    assert "stopped, and queued again: restart 1 of at most 1" in tasks[first].read_text()
    assert begun(tasks[1 - first]) == 1  # the other one was left alone
    cluster.call("scancel", array)
    cluster.wait(90)
    assert begun(log) == begun(tasks[1 - first]) == 1 and "queued again" not in log.read_text()
    assert "CANCELLED" in cluster.call("scontrol", "show", "job", cancelled)
