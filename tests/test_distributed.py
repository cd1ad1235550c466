"""Several real processes on this machine make the run that one makes, and end together."""

import json
import signal

import numpy as np
import pytest
import tiny
from processes import launch  # noqa: F401 (a fixture)

import w2s_jax

KEYS = {"batch_size": 8, "epochs": 2, "learning_rate": 3e-3, "split": "train", "checkpoint_every": 4, "steps_per_dispatch": 4}


def command(stage: str, workdir, **keys) -> list[str]:
    return [f"--config={stage}", f"--workdir={workdir}", *tiny.flags(**keys)]


@pytest.fixture(scope="module")
def finetune(tiny_model, tiny_task):
    def make(workdir, **keys):
        return command("finetune", workdir, model=tiny_model, task=tiny_task, **KEYS | keys)
    return make


def same(a, b, tolerance: float = 1e-5) -> None:
    """Losses and predictions of two runs."""
    one, two = w2s_jax.load(a), w2s_jax.load(b)
    assert [row["step"] for row in one.metrics] == [row["step"] for row in two.metrics]
    for key in ("loss", "lr"):
        np.testing.assert_allclose([row[key] for row in one.metrics], [row[key] for row in two.metrics], rtol=0, atol=tolerance)
    left, right = one.predictions(), two.predictions()
    assert list(left["id"]) == list(right["id"])
    np.testing.assert_allclose(np.stack(left["logits"]), np.stack(right["logits"]), rtol=0, atol=tolerance)


def test_dev(launch, finetune, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    job = launch(2, *finetune(run, epochs=20, keep="all"), devices=2)
    job.until(lambda: "train xent" in job.err())
    job.signal(1, signal.SIGTERM)
    print(job.wait(60), job.text())
    job = launch(4, *finetune(run, epochs=20, keep="all", mesh__model=2, mesh__fsdp=2, mesh__data=2), devices=2)
    job.until(lambda: "train xent 1" in job.err() or "train xent 2" in job.err())
    job.signal(0, signal.SIGTERM)
    print(job.wait(60), job.text())
    job = launch(2, *finetune(run, epochs=20, keep="all", mesh__fsdp=2, mesh__data=1), devices=1).done()
    print(job.text())
    job = launch(4, *command("label", tmp_path / "label", run=run, split="train"), devices=1).done()
    print(job.text())
    print(json.loads((run / "config.json").read_text())["starts"])
