"""The references' own figures, through the command line: every step's loss and the logits after training.

`golden/openai/expected.json` was measured by running the reference in float32 on a tiny GPT-2. Against itself in float64 or with
another minibatch it differs by 1e-7 in the losses and 6e-7 in the logits (Adafactor: 3e-6, 3e-5); a larger difference than the
tolerances below is a change of arithmetic, not of rounding.
"""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from w2s_jax import main

pytestmark = pytest.mark.slow  # minutes together

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


# --------------------------------------------------------------------------- EleutherAI/w2s


def eleuther_flags(golden, folder, recipe: dict) -> list[str]:
    """The reference's LoRA fine-tune: its files as a task, its initial adapters and head as a folder in PEFT's format."""
    (folder / "task").mkdir()
    (folder / "adapter").mkdir()
    for split in ("train", "test"):
        rows = [json.loads(line) for line in (golden / f"{split}.jsonl").read_text().splitlines()]
        rows = [{"input_ids": row["input_ids"], "soft_label": row["labels"]} for row in rows]
        (folder / "task" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    saved = load_file(golden / "trainable_init.safetensors")  # a state dict: PEFT's files leave out the adapter's name
    saved = {name.replace(".modules_to_save.default", "").replace(".default", ""): tensor for name, tensor in saved.items()}
    save_file(saved, folder / "adapter" / "adapter_model.safetensors")
    lora = recipe["lora"]
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": lora["r"], "lora_alpha": lora["alpha"], "lora_dropout": lora["dropout"],
        "target_modules": lora["modules"], "modules_to_save": ["score"], "task_type": "SEQ_CLS"}))
    keys = {
        "model": golden / "model", "task": folder / "task", "split": "train", "shuffle": "none", "balance": False, "n_val": 0,
        "dtype": "float32", "lora.init": folder / "adapter", "select": "last", "eval_every": 0,
        "loss": "logconf_eleuther", "loss_args.chunk": 0, "loss_args.warmup": recipe["logconf_warmup_steps"],
        "loss_args.aux_coef": recipe["logconf_weight"], "loss_args.buffer": recipe["buffer_size"], "labels": folder / "labels.jsonl",
        "epochs": recipe["epochs"], "batch_size": recipe["batch_size"], "learning_rate": recipe["lr"],
        "warmup_steps": recipe["warmup_steps"], "mesh.data": 1,
    }  # fmt: skip
    # Labels that are not the ground truth: training on truth has no confidence term.
    rows = [json.loads(line) for line in (golden / "train.jsonl").read_text().splitlines()]
    (folder / "labels.jsonl").write_text("".join(
        json.dumps({"id": f"task/train/{i}/0", "p": row["labels"]}) + "\n" for i, row in enumerate(rows)))
    return ["--config=eleuther:logconf", *(f"--config.{k}={v}" for k, v in keys.items()), f"--workdir={folder / 'run'}"]


@pytest.mark.parametrize("more", [[], ["--config.microbatch_size=8", "--config.mesh.fsdp=2", "--config.remat=full"]],
                         ids=["", "sharded microbatches"])
def test_eleuthers_lora(shared, tmp_path, more):
    golden = shared / "golden" / "eleuther"
    expected = json.loads((golden / "lora_expected.json").read_text())
    assert main.main([*eleuther_flags(golden, tmp_path, expected["recipe"]), *more]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([line["loss"] for line in lines], expected["loss"], rtol=0, atol=1e-5)
    np.testing.assert_allclose([line["lr"] for line in lines][-2:], [0.000334936, 0.0000851854], rtol=1e-5)
    found = np.array(pq.read_table(tmp_path / "run" / "predictions" / "test.parquet")["logits"].to_pylist())
    np.testing.assert_allclose(found, expected["test_logits"], rtol=0, atol=2e-5)
