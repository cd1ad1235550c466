"""Malformed input, from the command line to the answer: exit code 2, one line that names key or file and value, no traces left.

A case is a function that makes its files under `b.root` (b: `spoilt.Bench`) and returns the command line, followed by what the
line must say. The cases of EARLY must be answered before jax is imported. What a command saw must be the same afterwards,
byte by byte, and its run directory not made.
"""

import gzip
import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import spoilt
from spoilt import Bench, Made, data_file, documents, jsonl, setting, sst2, write_data

from w2s_jax import config as configs
from w2s_jax import main as entry
from w2s_jax.checks import RANGES

ROOT = Path(__file__).resolve().parents[1]
SST2 = [{"idx": i, "sentence": f"sentence {i}", "label": i % 2} for i in range(8)]
STAGE = "from ml_collections import ConfigDict\ndef get_config(arg=''):\n    return ConfigDict({'stage': 'finetun'})\n"
LONG = [1] * 20  # more tokens than the model has positions

EARLY = {  # answered before jax is imported
    # keys and flags
    "wrong key": (lambda b: b.finetune("--config.batchsize=3"), "config.batchsize", "'batch_size'"),
    "wrong type": (lambda b: b.finetune("--config.batch_size=many"), "config.batch_size=many", "an integer"),
    "missing config file": (lambda b: ["--config=nowhere/mine.py", f"--workdir={b.workdir}"], "nowhere/mine.py", "no such file"),
    "syntax error in a config": (spoilt.config_file("x = 1\ndef f(:\n"), "mine.py", "line 2", "SyntaxError"),
    "config that ends Python": (spoilt.config_file("import sys\nsys.exit(3)\n"), "mine.py", "line 2", "SystemExit"),
    "config that is a folder": (lambda b: [f"--config={b.root}", f"--workdir={b.workdir}"], "no such file"),
    "config given twice": (lambda b: b.finetune("--config=label"), "--config", "2 times", "finetune, label"),
    "no workdir": (lambda b: ["--config=finetune"], "--workdir"),
    "positional argument": (lambda b: b.finetune("extra"), "'extra'", "positional"),
    "unknown flag": (lambda b: b.finetune("--wrkdir=x"), "--wrkdir", "'workdir'"),
    "unknown stage": (spoilt.config_file(STAGE), "config.stage", "'finetun'", "'finetune'"),
    "unknown loss": (lambda b: b.finetune("--config.loss=logcnf"), "config.loss", "'logcnf'", "'logconf'"),
    "unknown optimizer": (lambda b: b.finetune("--config.optimizer=adm"), "config.optimizer", "'adm'", "'adam'"),
    "unknown task": (lambda b: b.finetune(task="scq"), "config.task", "'scq'", "'sciq'"),
    "argument of another loss": (lambda b: b.finetune("--config.loss_args.alpha=2"), "config.loss_args.alpha", "2.0", "'xent'"),
    "range": (lambda b: b.finetune("--config.epochs=0"), "config.epochs", "0", "at least 1"),
    "benchmark of no rounds": (lambda b: b.stage("benchmark", "--config.repeats=0"), "config.repeats", "0", "at least 1"),
    "benchmark of less than a batch": (
        lambda b: b.stage("benchmark", "--config.n_train=8"), "config.batch_size", "32", "config.n_train (8)"),
    "workdir that is a file": (lambda b: b.finetune(f"--workdir={b.file('afile', 'x')}"), "--workdir", "afile: is a file"),
    "workdir below a file": (lambda b: b.finetune(f"--workdir={b.file('afile', 'x')}/run"), "--workdir", "afile is a file"),
    "workdir on an unknown store": (lambda b: b.finetune("--workdir=ftp://host/run"), "--workdir", "ftp://host/run", "gs://"),
    "status of a missing folder": (lambda b: ["status", str(b.root / "nowhere")], "nowhere", "no such directory"),
    # models, from outside
    "missing model folder": (lambda b: b.finetune(model=b.root / "nowhere"), "config.model", "nowhere", "no such folder"),
    "model without config.json": (lambda b: b.model(lambda f: (f / "config.json").unlink()), "config.model", "config.json"),
    # data
    "empty train file": (lambda b: b.task(b""), "train.jsonl", "empty file"),
    "no file at all": (lambda b: b.task(False, False), "data", "train.*"),
    "truncated gz": (data_file("train.jsonl.gz", gzip.compress(jsonl(documents(24)))[:-20], train=False), "train.jsonl.gz", "gzip"),
    "bad JSON line": (lambda b: b.task(jsonl(documents(3)) + b'{"label": 1\n'), "train.jsonl, line 4", "not JSON"),
    "JSON line that is no object": (lambda b: b.task(jsonl(documents(3)) + b"[1, 2]\n"), "train.jsonl, line 4", "[1, 2]"),
    "JSON line too deep to read": (lambda b: b.task(b"[" * 100_000), "train.jsonl, line 1", "not JSON"),
    "not UTF-8": (lambda b: b.task(jsonl(documents(2)) + b"\xff\xfe\n"), "train.jsonl, line 3", "UTF-8"),
    "train file that is a folder": (
        lambda b: (b.root / "data/train.jsonl").mkdir(parents=True) or b.task(False), "train.jsonl", "directory"),
    "two train files": (data_file("train.csv", "text,label\n"), "train.csv", "train.jsonl"),
    "csv with a short row": (data_file("train.csv", "text,label\nx\n", train=False), "train.csv, line 2", "1 fields"),
    "csv with an open quote": (data_file("train.csv", 'text,label\n"x,1\n', train=False), "train.csv", "not csv"),
    "damaged parquet": (data_file("train.parquet", b"PAR1 no", train=False), "train.parquet", "parquet"),
    "no column of text": (lambda b: b.task(documents(24, input_ids=None)), "train.jsonl", "'input_ids'"),
    "null text": (lambda b: b.task([{"text": None, "label": 0}] * 4, [{"text": "x", "label": 0}] * 4), "train.jsonl, row 0", "'text'"),
    "half a surrogate pair": (spoilt.text_rows("text \ud800 {}"), "train.jsonl, row 0", "'text'", r"'\ud800'"),
    "NaN label": (
        lambda b: b.task(documents(24, label=lambda i: float("nan") if i == 7 else i % 2)), "train.jsonl, row 7", "'label'", "NaN"),
    "label out of range": (lambda b: b.task(documents(24, label=lambda i: i)), "train.jsonl, row 2", "'label'", "2", "0 or 1"),
    "label that is a text": (lambda b: b.task(documents(24, label="yes")), "train.jsonl, row 0", "'yes'", "0 or 1"),
    "row without a label": (lambda b: b.task(documents(24, label=lambda i: None if i == 5 else i % 2)), "train.jsonl, row 5", "'label'"),
    "no labels at all": (lambda b: b.task(documents(24, label=None)), "data", "24 train documents have no label"),
    "soft labels that do not sum to 1": (
        lambda b: b.task(documents(24, label=None, soft_label=[0.5, 0.6])), "train.jsonl, row 0", "'soft_label'", "[0.5, 0.6]", "sum to 1"),
    "NaN soft label": (lambda b: b.task(documents(24, label=None, soft_label=float("nan"))), "train.jsonl, row 0", "'soft_label'", "NaN"),
    "label and soft label": (lambda b: b.task(documents(24, soft_label=0.5)), "train.jsonl", "'label' and 'soft_label'"),
    "one class in train": (lambda b: b.task(documents(24, label=1)), "24 train documents", "class 1"),
    "one class in test": (lambda b: b.task(None, documents(12, 100, label=0)), "12 test documents", "class 0"),
    "negative token id": (lambda b: b.task(documents(24, input_ids=lambda i: [1, -1])), "train.jsonl, row 0", "[1, -1]"),
    "huge token id": (lambda b: b.task(documents(24, input_ids=[2**40])), "train.jsonl, row 0", str(2**40)),
    "document without tokens": (lambda b: b.task(documents(24, input_ids=lambda i: [])), "train.jsonl, row 0", "'input_ids'"),
    "token ids that are texts": (lambda b: b.task(documents(24, input_ids=["a"])), "train.jsonl, row 0", "['a']"),
    "missing test split": (lambda b: b.task(None, False), "test.*", "test_fraction"),
    "test share of nothing": (
        lambda b: b.task(None, False, "--config.test_fraction=0.001"), "data", "no test documents", "test_fraction=0.001"),
    "duplicate ids": (lambda b: b.task(documents(24, id=lambda i: f"d{i % 23}")), "train.jsonl", "'id'", "'d0'"),
    "texts in train, token ids in test": (
        lambda b: b.task([{"text": f"t{i}", "label": i % 2} for i in range(24)]), "data", "token ids only"),
    "all held out": (lambda b: b.task(None, None, "--config.n_val=24"), "data", "no train documents", "n_val=24"),
    "registered task without a column": (sst2([{"text": "x"}], SST2), "train.jsonl, row 0", "'label'"),
    "registered task with hidden labels": (sst2(SST2, [{**r, "label": -1} for r in SST2]), "validation.jsonl, row 0", "-1"),
    "registered task without its test split": (sst2(SST2), "validation.*", "test_fraction"),
    # labels, from outside
    "missing labels": (lambda b: b.student(labels=b.root / "nowhere"), "config.labels", "nowhere"),
    "labels of a run that was not labelled": (lambda b: b.student(labels=b.made.run), "labels", "predictions/b.parquet", "label stage"),
    "labels of a folder that is no run": (lambda b: b.student(labels=b.made.task), "labels", "task", "predictions/b.parquet"),
    "labels with duplicate ids": (lambda b: b.student(lambda rows: rows + rows[:2]), "labels.parquet", "2 ids", "'task/train/"),
    "labels without ids": (lambda b: b.student(lambda rows: [{"p": r["p"]} for r in rows]), "labels.parquet", "columns id"),
    "NaN labels": (lambda b: b.student(setting(3, probs=[float("nan"), 0.5])), "labels.parquet, row 3", "'probs'", "nan"),
    "labels that do not sum to 1": (lambda b: b.student(setting(3, probs=[0.5, 0.4])), "labels.parquet, row 3", "'probs'", "0.4"),
    "damaged label file": (lambda b: b.student(labels=b.file("labels.parquet", b"PAR1")), "labels.parquet", "parquet"),
    # labelling
    "run to label without config.json": (lambda b: b.label(run=b.made.task), "config.run", "config.json"),
    "run to label that is unfinished": (spoilt.unfinished, "run=", "results.json"),
    "run to label that only pretrained": (lambda b: b.label(run=b.made.pretrained), "run=", "'pretrain'", "finetune"),
    "run to export that only pretrained": (
        lambda b: b.stage("export", f"--config.run={b.made.pretrained}"), "run=", "'pretrain'", "finetune"),
    "run to export that is a labelling": (lambda b: b.stage("export", f"--config.run={b.made.labels}"), "run=", "'label'", "finetune"),
    # probes
    "probe of no layer": (lambda b: b.stage("probe", "--config.layer=first"), "config.layer", "'first'", "middle, last or a number"),
    "argument of another probe": (lambda b: b.stage("probe", "--config.probe_args.k=3"), "config.probe_args.k", "3", "'logistic'"),
    "filter of everything": (lambda b: b.stage("probe", "--config.contamination=1"), "config.contamination", "1.0", "below 1"),
    "probe of a labelling": (
        lambda b: b.stage("probe", f"--config.run={b.made.labels}", f"--config.task={b.made.task}"), "run=", "'label'", "finetune"),
    # sweeps
    "sweep of one model": (lambda b: b.stage("sweep", f"--config.models={b.made.model},"), "config.models", "at least two"),
    "sweep with too few learning rates": (
        lambda b: b.sweep("--config.learning_rates=1e-3,"), "config.learning_rates", "0.001", "2 models"),
    "sweep with duplicate seeds": (lambda b: b.sweep("--config.seeds=1,1"), "config.seeds", "(1, 1)"),
    "sweep without tasks": (lambda b: b.sweep("--config.tasks=()"), "config.tasks", "empty"),
    "sweep of models of one name": (
        lambda b: b.sweep(*(f"--config.models={b.model_at(name)}" for name in ("a/same", "b/same"))), "config.models", "same name"),
    "sweep with labels": (lambda b: b.sweep(f"--config.base.labels={b.made.labels}"), "config.base.labels", "labels"),
    "sweep of unknown pairs": (lambda b: b.sweep("--config.pairs=some"), "config.pairs", "'some'", "adjacent"),
    "sweep with an unknown loss": (
        lambda b: b.sweep("--config.losses=xent,reverse_k"), "config.losses", "'reverse_k'", "'reverse_kl'"),
    # reports
    "report on a missing folder": (lambda b: b.stage("report"), "workdir", "sweep.json"),
    "report on an empty folder": (lambda b: b.workdir.mkdir() or b.stage("report"), "sweep.json", "no such file"),
    "report on a sweep of nothing": (spoilt.report_of(), "sweep.json", "pair 0 lacks task"),
    "report on a sweep of numbers": (
        spoilt.report_of(task=1, weak="w", strong="s", loss="xent", seed=0, runs=dict.fromkeys(("weak", "ceiling", "student"), "a")),
        "sweep.json", "pair 0: task is 1"),
    "report on a sweep that has not begun": (
        spoilt.report_of(task="t", weak="w", strong="s", loss="xent", seed=0, runs={"weak": "a", "ceiling": "b", "student": "c"}),
        "3 runs are not done", "a (absent)"),
    "report on a student alone": (lambda b: b.stage("report", f"--config.student={b.made.run}"), "weak", "student"),
    "report with few draws": (lambda b: b.stage("report", "--config.replicates=2"), "replicates", "2", "at least 40"),
}  # fmt: skip

LATE = {
    # models, from inside
    "model without weights": (lambda b: b.model(lambda f: (f / "model.safetensors").unlink()), "model", "model.safetensors"),
    "only pytorch_model.bin": (lambda b: b.model(spoilt.pickled), "pytorch_model.bin", "convert"),
    "config.json of a model that is not JSON": (lambda b: b.model(spoilt.replacing("config.json", b"{")), "config.json", "JSON"),
    "unsupported model_type": (lambda b: b.model_config(model_type="mamba"), "config.json", "model_type='mamba'", "gpt2"),
    "unsupported activation": (lambda b: b.model_config(activation_function="swish7"), "config.json", "activation_function='swish7'"),
    "config.json without a size": (lambda b: b.model_config(n_head=None), "config.json", "n_head"),
    "size that is a text": (lambda b: b.model_config(n_embd="wide"), "config.json", "n_embd='wide'"),
    "heads that do not divide": (lambda b: b.model_config(n_head=3), "config.json", "n_head=3"),
    "truncated safetensors": (lambda b: b.model(spoilt.truncating("model.safetensors", 99)), "model.safetensors", "truncated"),
    "empty safetensors": (lambda b: b.model(spoilt.replacing("model.safetensors", b"")), "model.safetensors", "truncated"),
    "missing shard": (lambda b: b.model(spoilt.sharded), "model-00001-of-00002.safetensors", "no such file"),
    "missing tensor": (lambda b: b.tensors(spoilt.dropping("transformer.h.1.mlp.c_fc.bias")), "1 missing", "h.1.mlp.c_fc.bias"),
    "surplus tensor": (lambda b: b.tensors(spoilt.adding("transformer.h.2.ln_1.bias")), "that nothing takes", "h.2.ln_1.bias"),
    "mis-shaped tensor": (lambda b: b.tensors(spoilt.reshaping("transformer.wpe.weight")), "wpe.weight [15, 8]", "[16, 8]"),
    "fp8": (lambda b: b.model(spoilt.fp8), "model.safetensors", "F8_E4M3", "BF16"),
    "no tokenizer for texts": (spoilt.texts(None), "model", "tokenizer"),
    "damaged tokenizer": (spoilt.texts(b"{"), "tokenizer.json", "not a tokenizer"),
    "hub id that cannot be had": (lambda b: b.finetune(model="no-such-owner/no-such-model"), "no-such-owner/no-such-model", "hub"),
    # documents against the model
    "token id outside the vocabulary": (
        lambda b: b.task(documents(24, input_ids=lambda i: [1, 50 + i])), "data/train/", "token id", "0 to 49"),
    "token id outside the vocabulary in test": (
        lambda b: b.task(None, documents(12, input_ids=lambda i: [9, 99 + i])), "data/test/0/0", "99", "0 to 49"),
    "all documents over-long": (
        lambda b: b.task(documents(24, input_ids=lambda i: [*LONG, i])), "max_length=16", "24 training documents"),
    "all test documents over-long": (lambda b: b.task(None, documents(12, input_ids=lambda i: [*LONG, i])), "max_length=16", "12 test"),
    "over-long document under error": (
        lambda b: b.task(documents(24, input_ids=lambda i: LONG if i == 5 else [i]), None, "--config.overlong=error"),
        "overlong=error", "data/train/5/0", "20 tokens"),
    "one class in train once the over-long are dropped": (
        lambda b: b.task(documents(24, input_ids=lambda i: [*LONG, i] if i % 2 else [i])),
        "12 train documents", "class 0", "max_length=16"),
    "batch larger than the data": (lambda b: b.task(None, None, "--config.batch_size=25"), "batch_size=25", "24 training documents"),
    "warm-up longer than the run": (lambda b: b.task(None, None, "--config.warmup_steps=6"), "warmup_steps=6", "6 steps"),
    # labels against the documents
    "labels of another task": (
        lambda b: b.student(None, b.made.labels, f"--config.task={write_data(b.root / 'other')}"), "labels",
        "12 of 12 documents have no label", "12 of 12 labels have no document", "'other/train/"),
    "labels of three classes": (
        lambda b: b.student(lambda rows: [r | {"probs": [0.2, 0.3, 0.5]} for r in rows]), "labels.parquet has 3 classes, expected 2"),
    "labels that lack a document": (lambda b: b.student(lambda rows: rows[1:]), "labels.parquet", "1 of 12 documents have no label"),
    "labels with a surplus document": (
        lambda b: b.student(lambda rows: rows + [rows[0] | {"id": "x"}]), "labels.parquet", "1 of 13 labels have no document", "'x'"),
    "labels of another text": (lambda b: b.student(setting(0, text_sha="0" * 16)), "labels.parquet", "1 labels were made for another text"),
    "labels of another data_seed": (lambda b: b.student(None, b.made.labels, "--config.data_seed=1"), "labels", "have no label"),
    # labelling
    "run to label without a checkpoint": (spoilt.no_checkpoint, "run=", "no checkpoint"),
    "run to label with a damaged checkpoint": (spoilt.damaged_checkpoint, "checkpoints", "cannot be read"),
    "file to label that is empty": (lambda b: b.label(f"--config.file={b.file('more.jsonl', '')}"), "more.jsonl", "empty"),
    "file to label without a text": (lambda b: b.label(f"--config.file={b.file('more.jsonl', '{}')}"), "more.jsonl", "'input_ids'"),
    "file to label of another vocabulary": (
        lambda b: b.label(f"--config.file={b.file('more.jsonl', jsonl([{'input_ids': [77]}]))}"), "more/more/0/0", "77", "0 to 49"),
    "probe of a layer that the model has not": (
        lambda b: b.stage("probe", f"--config.model={b.made.model}", f"--config.task={b.made.task}", "--config.layer=3"),
        "config.layer", "'3'", "to 2"),
    "part to label that is empty": (lambda b: b.label("--config.split=val"), "'val'", "n_val=0"),
    "workdir of an export that holds somebody's model": (
        lambda b: b.model_at("workdir/model") and b.stage("export", f"--config.run={b.made.run}"), "--workdir", "holds model/"),
    # devices and run directories
    "mesh larger than the devices": (lambda b: b.finetune("--config.mesh.fsdp=16"), "mesh", "'fsdp': 16", "8 devices"),
    "mesh that does not divide the devices": (
        lambda b: b.finetune("--config.mesh.data=-1", "--config.mesh.model=3"), "mesh", "'data': -1", "'model': 3", "8 devices"),
    "workdir of another run": (
        lambda b: b.here("run", "--config.seed=1", "--config.learning_rate=1e-4"),
        "--workdir", "learning_rate: 5e-05 -> 0.0001; seed: 0 -> 1"),
    "workdir of another unfinished run": (lambda b: b.here("run", "--config.seed=1", results=None), "--workdir", "seed: 0 -> 1"),
    "workdir of another run, done again": (lambda b: b.here("run", "--config.seed=1", "--rerun"), "--workdir", "seed: 0 -> 1"),
    "workdir of another stage": (lambda b: b.here("pretrained"), "--workdir", 'stage: "pretrain" -> "finetune"'),
    "workdir without its config.json": (lambda b: b.here("run", config=None), "--workdir", "results.json but no config.json"),
    "workdir with a damaged config.json": (lambda b: b.here("run", config=b"{"), "config.json", "JSON"),
    "workdir with damaged results": (lambda b: b.here("run", results=b"[]"), "results.json", "JSON object"),
    "workdir that is a model": (lambda b: b.here("model"), "--workdir", "config.json", "no run"),
    "workdir that cannot be made": (lambda b: b.finetune("--workdir=/proc/nowhere/run"), "--workdir=/proc/nowhere/run", "cannot be made"),
    "workdir claimed by another process": (spoilt.claimed, "--workdir", f"host {socket.gethostname()}", "pid {pid}"),
    # pretraining
    "empty corpus": (spoilt.pretrain_on("corpus.txt", b""), "corpus.txt", "empty"),
    "corpus of single words": (spoilt.pretrain_on("corpus.txt", b"so"), "corpus", "two tokens"),
    "corpus row without a text": (spoilt.pretrain_on("corpus.jsonl", b'{"txt": "x"}'), "corpus.jsonl", "text"),
    "more held out than there is": (spoilt.pretrain_on("corpus.txt", b"the cat is so", "--config.n_heldout=9"), "n_heldout=9"),
    "context shorter than max_length": (
        lambda b: b.stage("pretrain:runlocal", f"--config.model={b.made.pretrained}/model", "--config.max_length=64"),
        "max_length=64", "32 positions"),
    "tokenizer of a larger vocabulary": (
        lambda b: b.stage("pretrain:runlocal", f"--config.model={b.made.model}", "--config.max_length=16",
                          f"--config.tokenizer={b.made.pretrained}/model"), "tokenizer", "0 to 49"),
}  # fmt: skip
CASES = {**EARLY, **LATE}


def test_every_number_in_the_configs_has_a_range():
    for name in configs.names():
        config = configs.shipped(name)
        for key in configs.flatten(config):
            nested = r"^(base|pretrain|probe|prompt|(weak|strong|student)_train)\."
            inner = re.sub(nested, "", key) if name in ("sweep", "vision") else key
            if configs.key_type(config, key) in (int, float) and not inner.startswith("mesh."):
                assert inner in RANGES, f"configs/{name}.py: {key} takes any number, also one that ends in a traceback"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))  # main() leaves jax's own alone then
        yield Made(tmp_path_factory.mktemp("made"))


@pytest.fixture
def hold():
    """`hold(folder)` lets another process claim a run directory, and returns its pid."""
    started = []

    def claim(folder: Path) -> int:
        code = f"import time; from etils import epath; from w2s_jax.claim import Claim\n" \
               f"claim = Claim(epath.Path({str(folder)!r}), False); print('held', flush=True); time.sleep(60)"
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
        started.append(process)
        assert process.stdout.readline() == b"held\n"
        return process.pid

    yield claim
    for process in started:
        process.kill()
        process.wait()


def tree(*folders: Path) -> dict[str, str]:
    """Every file and folder below, with a digest of its content."""
    paths = [path for folder in folders for path in folder.rglob("*")]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder" for path in paths}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_one_line_and_leaves_nothing(name, made, hold, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case, *expected = CASES[name]
    bench = Bench(tmp_path, made)
    argv = case(bench)
    pid = hold(bench.hold) if bench.hold else None
    devices, setup = [], entry.setup_devices
    monkeypatch.setattr(entry, "setup_devices", lambda *args: devices.append(1) or setup(*args))
    before = tree(tmp_path, made.task.parent)
    capfd.readouterr()
    code = entry.main([str(word) for word in argv])
    out, err = capfd.readouterr()
    print(f"{name}: {err}", end="")
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    for part in expected:
        assert part.format(pid=pid) in err
    assert tree(tmp_path, made.task.parent) == before, "files were left behind or changed"
    assert not devices or name in LATE, "jax was set up before the answer"


@pytest.mark.parametrize("name, limit", [("wrong key", 2), ("unknown task", 2), ("truncated gz", 60), ("labels with duplicate ids", 60)])
def test_the_answer_comes_soon_and_without_jax(name, limit, made, cli, tmp_path):
    """In a process of its own, where importing jax, or anything as heavy, ends it with another code."""
    for module in ("jax", "jaxlib", "flax", "transformers", "datasets", "torch"):
        (tmp_path / "poison" / f"{module}.py").parent.mkdir(exist_ok=True)
        (tmp_path / "poison" / f"{module}.py").write_text(f"import os\nprint('{module} was imported', flush=True)\nos._exit(1)\n")
    case, *expected = CASES[name]
    argv = case(Bench(tmp_path, made))
    seconds = []
    while not seconds or (min(seconds) >= limit and len(seconds) < 5):  # the machine may be busy with something else
        start = time.perf_counter()
        done = cli(*argv, PYTHONPATH=f"{tmp_path / 'poison'}{os.pathsep}{ROOT}")
        seconds.append(time.perf_counter() - start)
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
        assert all(part in done.stderr for part in ("error: ", *expected))
    assert min(seconds) < limit


def test_a_loss_that_is_not_finite_names_the_step_and_the_documents(made, tmp_path, capfd):
    bench = Bench(tmp_path, made)
    argv = bench.tensors(lambda tensors: tensors["transformer.ln_f.weight"].fill(float("nan")))
    assert entry.main([str(word) for word in argv]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("error: loss: nan at step 0") and "(4): task/train/" in line
    left = {path.name for path in bench.workdir.iterdir()}
    assert "error.json" in left and not left & {"results.json", "predictions"}
    assert not list((bench.workdir / "checkpoints").glob("*")), "a state behind such a loss is not saved"
    assert entry.main(["status", str(bench.workdir)]) == 0
    assert capfd.readouterr().out.startswith("failed")


def test_ctrl_c_ends_a_run_with_one_line(made, tmp_path, capfd):
    """SIGINT, as the terminal sends it, in the middle of training."""
    bench = Bench(tmp_path, made)
    workdir = bench.workdir
    more = ("--config.epochs=20000", "--config.checkpoint_every=20", "--config.steps_per_dispatch=1")
    command = [sys.executable, "-m", "w2s_jax.main", *map(str, bench.finetune(*more))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        patience = time.monotonic() + 120
        while not list(workdir.glob("checkpoints/*/params")) and time.monotonic() < patience and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and out == "", err
    assert "Traceback" not in err and err.splitlines()[-1].startswith("interrupted; ")
    assert not {"results.json", "error.json", ".owner"} & {path.name for path in workdir.iterdir()}
    assert entry.main(["status", str(workdir)]) == 0
    assert capfd.readouterr().out.startswith("stopped")
