"""Small good things (a model, a task, runs) and the ways in which tests/test_bad_input.py spoils them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file, save_file

from w2s_jax import config as configs
from w2s_jax import main as entry
from w2s_jax import stages
from w2s_jax.data import world
from w2s_jax.runlog import Run

VOCAB, POSITIONS = 50, 16


def documents(n: int, first: int = 0, **columns) -> list[dict]:
    """`n` different documents of token ids with both labels; `columns` are added to each, or replace one where they are callable."""
    rows = []
    for i in range(first, first + n):
        row = {"input_ids": [1 + i % 40, 2 + i // 40, 3 + i % 7, 4], "label": i % 2}
        row |= {k: v(i - first) if callable(v) else v for k, v in columns.items()}
        rows.append({k: v for k, v in row.items() if v is not None})
    return rows


def jsonl(rows) -> bytes:
    return rows if isinstance(rows, bytes) else "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_data(folder: Path, train=None, test=None) -> Path:
    """A task folder; a part is rows, bytes, or False for none."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows, default in (("train", train, documents(24)), ("test", test, documents(12, 100))):
        if rows is not False:
            (folder / f"{name}.jsonl").write_bytes(jsonl(default if rows is None else rows))
    return folder


def finetune(model, task, workdir, *more) -> list[str]:
    return ["--config=finetune", f"--config.model={model}", f"--config.task={task}", "--config.batch_size=4", "--config.epochs=1",
            f"--config.max_length={POSITIONS}", "--config.mesh.data=1", f"--workdir={workdir}", *more]


def write_model(folder: Path, vocab: int = VOCAB, positions: int = POSITIONS, width: int = 8, layers: int = 2) -> Path:
    """A random GPT-2, written without compiling anything."""
    rng = np.random.default_rng(0)
    shapes = {"wte.weight": (vocab, width), "wpe.weight": (positions, width), "ln_f.weight": (width,), "ln_f.bias": (width,)}
    for layer in (f"h.{i}." for i in range(layers)):
        shapes |= {f"{layer}{norm}.{part}": (width,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
        for name, out in (("attn.c_attn", 3 * width), ("attn.c_proj", width), ("mlp.c_fc", 4 * width)):
            shapes |= {f"{layer}{name}.weight": (width, out), f"{layer}{name}.bias": (out,)}
        shapes |= {f"{layer}mlp.c_proj.weight": (4 * width, width), f"{layer}mlp.c_proj.bias": (width,)}
    folder.mkdir(parents=True)
    save_file({f"transformer.{k}": rng.normal(0, 0.2, v).astype(np.float32) for k, v in shapes.items()}, folder / "model.safetensors")
    sizes = {"vocab_size": vocab, "n_embd": width, "n_layer": layers, "n_head": 2, "n_positions": positions}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    return folder


class Made:
    """Good things, made once: a model, a task, a trained run, its labels of half B, and a run that is said to have pretrained."""

    def __init__(self, root: Path):
        self.model, self.task = write_model(root / "model"), write_data(root / "task")
        self.run, self.labels, self.pretrained = root / "run", root / "labels", root / "pretrained"
        assert entry.main(finetune(self.model, self.task, self.run, "--config.split=a")) == 0
        assert entry.main(["--config=label", f"--config.run={self.run}", "--config.mesh.data=1", f"--workdir={self.labels}"]) == 0
        config = configs.shipped("pretrain")
        with Run.open(self.pretrained, config, stages.identity(config)) as run:
            run.start()
            run.finish({})
        write_model(self.pretrained / "model", vocab=len(world.vocabulary()), positions=32)
        for name, content in world.tokenizer_files().items():
            (self.pretrained / "model" / name).write_text(content)


class Bench:
    """What a case works with: its own folder `root`, the good things `made`, and the run directory that is asked for."""

    def __init__(self, root: Path, made: Made):
        self.root, self.made, self.workdir, self.hold = root, made, root / "workdir", None  # hold: a directory that another process claims

    def file(self, name: str, content) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def copy(self, name: str) -> Path:
        """One of the good things, to be spoilt."""
        return Path(shutil.copytree(getattr(self.made, name), self.root / name))

    def finetune(self, *more, model=None, task=None) -> list[str]:
        return finetune(model or self.made.model, task or self.made.task, self.workdir, *more)

    def task(self, train=None, test=None, *more) -> list[str]:
        return self.finetune("--config.split=train", *more, task=write_data(self.root / "data", train, test))

    def model(self, change) -> list[str]:
        """`change(folder)` spoils a copy of the model."""
        folder = self.copy("model")
        change(folder)
        return self.finetune(model=folder)

    def model_config(self, **keys) -> list[str]:
        def change(folder):
            file = folder / "config.json"
            merged = json.loads(file.read_text()) | keys
            file.write_text(json.dumps({k: v for k, v in merged.items() if v is not None}))
        return self.model(change)

    def tensors(self, change) -> list[str]:
        """`change(tensors)` spoils the dict of the model's tensors."""
        def spoil(folder):
            tensors = load_file(folder / "model.safetensors")
            change(tensors)
            save_file(tensors, folder / "model.safetensors")
        return self.model(spoil)

    def student(self, change=None, labels=None, *more) -> list[str]:
        """A student of the labels in `labels`, or of the label run's rows after `change(rows)`."""
        if labels is None:
            rows = pq.read_table(self.made.labels / "predictions" / "b.parquet").to_pylist()
            rows = change(rows) or rows
            labels = self.root / "labels.parquet"
            pq.write_table(pa.Table.from_pylist(rows), labels)
        return self.finetune("--config.split=b", f"--config.labels={labels}", *more)

    def label(self, *more, run=None) -> list[str]:
        return ["--config=label", f"--config.run={run or self.made.run}", "--config.mesh.data=1", f"--workdir={self.workdir}", *more]

    def stage(self, name: str, *more) -> list[str]:
        return [f"--config={name}", f"--workdir={self.workdir}", *more]

    def model_at(self, path: str) -> Path:
        return Path(shutil.copytree(self.made.model, self.root / path))

    def sweep(self, *more) -> list[str]:
        """A sweep of two models; a key of `more` replaces the one here (several of one tuple would be joined)."""
        argv = [f"--config.models={self.made.model},{self.model_at('larger')}", f"--config.tasks={self.made.task}"]
        keys = [word.split("=")[0] for word in more]
        return self.stage("sweep", *(word for word in argv if word.split("=")[0] not in keys), *more)

    def here(self, name: str, *more: str, **files) -> list[str]:
        """A finetune run whose directory is a copy of a good thing; `files` (without .json) get another content, or go (None)."""
        self.workdir = self.copy(name)
        for file, content in files.items():
            path = self.workdir / f"{file}.json"
            path.unlink() if content is None else path.write_bytes(content)
        return self.finetune("--config.split=a", *more)


def dropping(name):
    return lambda tensors: tensors.pop(name)


def adding(name):
    return lambda tensors: tensors.update({name: np.zeros(3, np.float32)})


def reshaping(name):
    return lambda tensors: tensors.update({name: np.ascontiguousarray(tensors[name][1:])})


def truncating(name, by):
    def change(folder):
        file = folder / name
        file.write_bytes(file.read_bytes()[:-by])
    return change


def replacing(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def fp8(folder):
    """The header alone says the type; the numbers play no part."""
    file = folder / "model.safetensors"
    size = int.from_bytes(file.read_bytes()[:8], "little")
    header, rest = json.loads(file.read_bytes()[8:8 + size]), file.read_bytes()[8 + size:]
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    name, last = max(tensors.items(), key=lambda item: item[1]["data_offsets"][1])
    start, stop = last["data_offsets"]
    last |= {"dtype": "F8_E4M3", "data_offsets": [start, start + (stop - start) // 4]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + rest[: len(rest) - (stop - start) * 3 // 4])


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def sharded(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"wte.weight": "model-00001-of-00002.safetensors"}}')


def setting(row, **values):
    def change(rows):
        rows[row] |= values
    return change


def texts(tokenizer: bytes | None):
    """A task of texts for a model with this tokenizer.json, or none."""
    def case(b):
        folder = b.copy("model")
        if tokenizer is not None:
            (folder / "tokenizer.json").write_bytes(tokenizer)
        return [*text_rows("text {}")(b), f"--config.model={folder}"]
    return case


def without(key):
    return lambda b: b.task(documents(24, **{key: lambda i: None if i == 5 else i % 2}))


def pretrain_on(name, content, *more):
    """A pretraining run on a corpus file."""
    def case(b):
        tokenizer = f"--config.tokenizer={b.made.pretrained}/model"
        return b.stage("pretrain:runlocal", f"--config.corpus={b.file(name, content)}", tokenizer, *more)
    return case


def data_file(name, content, **parts):
    """A task folder with a file of this content beside the usual ones (`train=False` leaves one out)."""
    def case(b):
        b.file(f"data/{name}", content)
        return b.task(parts.get("train"), parts.get("test"))
    return case


def config_file(text):
    return lambda b: [f"--config={b.file('mine.py', text)}", f"--workdir={b.workdir}"]


def text_rows(text):
    """A task of texts, for a model with a tokenizer."""
    return lambda b: b.task(*([{"text": text.format(i + f), "label": i % 2} for i in range(n)] for n, f in ((24, 0), (12, 100))),
                            f"--config.model={b.made.pretrained}/model")


def unfinished(b):
    run = b.copy("run")
    (run / "results.json").unlink()
    return b.label(run=run)


def no_checkpoint(b):
    run = b.copy("run")
    shutil.rmtree(run / "checkpoints")
    return b.label(run=run)


def damaged_checkpoint(b):
    run = b.copy("run")
    for file in (run / "checkpoints").rglob("*"):
        if file.is_file() and "params" in file.parts and file.stat().st_size:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return b.label(run=run)


def claimed(b):
    b.workdir.mkdir()
    b.hold = b.workdir
    return b.finetune()


def report_of(**keys):
    def case(b):
        b.file("workdir/sweep.json", json.dumps({"pairs": [keys]}))
        return b.stage("report")
    return case


def sst2(train, validation=None):
    """The registered task sst2 whose files stand in a folder."""
    def case(b):
        for name, rows in (("train", train), ("validation", validation)):
            if rows:
                b.file(f"local/{name}.jsonl", jsonl(rows))
        return b.finetune(f"--config.task_dir={b.root}/local", task="sst2")
    return case
