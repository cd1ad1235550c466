"""openai/weak-to-strong's own figures, through the command line: every step's loss and the logits after training.

`golden/openai/expected.json` was measured by running the reference in float32 on a tiny GPT-2. Against itself in float64 or with
another minibatch it differs by 1e-7 in the losses and 6e-7 in the logits (Adafactor: 3e-6, 3e-5); a larger difference than the
tolerances below is a change of arithmetic, not of rounding.
"""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from w2s_jax import main

CASES = 11
LOSSES = {"logconf": "logconf_openai"}
OPTIMIZERS = {"adafactor": "adafactor_openai"}


def flags(case: dict, golden, folder) -> list[str]:
    """The command line of a case: a folder with its file as train.jsonl, read in file order."""
    task = folder / "task"
    task.mkdir()
    shutil.copy(golden / f"{case['train']}.jsonl", task / "train.jsonl")
    shutil.copy(golden / "test.jsonl", task / "test.jsonl")
    keys = {
        "model": golden / "model", "task": task, "split": "train", "shuffle": "none", "loss": LOSSES.get(case["loss"], case["loss"]),
        "optimizer": OPTIMIZERS.get(case["optimizer"], case["optimizer"]), "schedule": case["schedule"].removesuffix("_anneal"),
        "epochs": case["epochs"], "batch_size": case["batch_size"], "microbatch_size": case["minibatch_size"],
        "learning_rate": case["lr"], "train": "head" if case["linear_probe"] else "full",
        "mesh.data": 1,
    }  # fmt: skip
    return ["--config=openai", *(f"--config.{k}={v}" for k, v in keys.items()), f"--workdir={folder / 'run'}"]


def compare(run, expected: dict) -> None:
    loss, logits = (2e-5, 2e-4) if expected["case"]["optimizer"] == "adafactor" else (5e-6, 2e-5)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(expected["loss"])))
    np.testing.assert_allclose([line["loss"] for line in lines], expected["loss"], rtol=0, atol=loss)
    np.testing.assert_allclose([line["lr"] for line in lines], expected["lr"], rtol=1e-12)
    np.testing.assert_allclose([line["train_accuracy"] for line in lines], expected["train_accuracy"], rtol=0, atol=1e-6)
    found = np.array(pq.read_table(run / "predictions" / "test.parquet")["logits"].to_pylist())
    np.testing.assert_allclose(found, expected["test_logits"], rtol=0, atol=logits)
    assert json.loads((run / "results.json").read_text())["accuracy"] == pytest.approx(expected["test_accuracy"])


@pytest.mark.parametrize("number", range(CASES))
def test_golden_case(number, shared, tmp_path):
    golden = shared / "golden" / "openai"
    expected = json.loads((golden / "expected.json").read_text())
    assert len(expected) == CASES
    assert main.main(flags(expected[number]["case"], golden, tmp_path)) == 0
    compare(tmp_path / "run", expected[number])


def test_golden_case_in_a_process_of_its_own(shared, tmp_path, cli):
    golden = shared / "golden" / "openai"
    expected = json.loads((golden / "expected.json").read_text())[4]  # logconf on soft labels
    done = cli(*flags(expected["case"], golden, tmp_path))
    assert done.returncode == 0, done.stderr
    compare(tmp_path / "run", expected)
