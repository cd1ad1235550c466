"""A tiny random GPT-2 and a tiny task on disk: what the tests of the trainer and of the stages share.

The sizes are GPT-2's in small: a vocabulary that nothing divides and 12 heads that 8 devices do not divide.
"""

import json
from pathlib import Path

import jax
import numpy as np

from w2s_jax import mesh as mesh_lib
from w2s_jax import models
from w2s_jax.config import shipped

FAST = {  # XLA's options for fast_compiles
    "xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True, "xla_cpu_use_fusion_emitters": False,
}  # fmt: skip
FAST_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in FAST.items())  # the same for a process of its own
VOCAB = 151
RAW = {
    "model_type": "gpt2", "vocab_size": VOCAB, "n_embd": 36, "n_layer": 2, "n_head": 12, "n_inner": 144, "n_positions": 64,
    "initializer_range": 0.2,
}  # fmt: skip


def fast_compiles(monkeypatch):
    """XLA without its optimizations until the end of `monkeypatch`; returns `compile` as it was."""
    compile_ = jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self, compiler_options=None, **more: compile_(
        self, FAST | (compiler_options or {}), **more))
    return compile_


def stable(value) -> str:
    """An id of a test's case that is the same in every process: workers that share the tests compare them."""
    return str(sorted(value)) if isinstance(value, (set, frozenset)) else getattr(value, "__name__", str(value))


def config(**changes) -> models.Architecture:
    """The architecture; `changes` are keys of config.json."""
    return models.parse(RAW | changes, "tiny")


def random_params(abstract, seed: int = 0) -> dict:
    """Parameters for a tree of shapes: norms near 1, biases that are not 0, a small head."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        mean, spread = {"scale": (1, 0.1), "bias": (0, 0.1)}.get(path.split("/")[-1], (0, 0.02 if path.startswith("head") else 0.2))
        return (mean + spread * rng.normal(size=leaf.shape)).astype(leaf.dtype)
    return mesh_lib.map_paths(fill, abstract)


def write_model(folder, seed: int = 0, **changes) -> Path:
    """A random language model in Hugging Face's format."""
    models.save(folder, random_params(models.build(config(**changes), head="lm").abstract, seed), RAW | changes)
    return Path(folder)


def documents(n: int, seed: int = 0, longest: int = 40) -> list[np.ndarray]:
    """Token ids of `n` documents, most of them short; id 0 and documents of one token occur."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.gamma(2.0, longest / 8, n).astype(int), 1, longest)
    lengths[: min(n, 2)] = (1, longest)[: min(n, 2)]
    return [rng.integers(0, VOCAB, size).astype(np.int32) for size in rng.permutation(lengths)]


def rows(n: int, seed: int = 0, soft: bool = False, **options) -> list[dict]:
    """Rows of a task that can be learned: the label says whether the last token is of the vocabulary's upper half."""
    rng = np.random.default_rng([seed, 1])
    out = []
    for ids in documents(n, seed, **options):
        label = int(ids[-1] > VOCAB // 2)
        value = {"soft_label": float(np.round(np.clip(label + rng.normal(0, 0.3), 0.02, 0.98), 3))} if soft else {"label": label}
        out.append({"input_ids": ids.tolist(), **value})
    return out


def write_rows(file, content: list[dict]) -> Path:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in content))
    return Path(file)


def write_task(folder, n_train: int = 64, n_test: int = 24, seed: int = 0, **options) -> Path:
    """A user's folder of train.jsonl and test.jsonl."""
    write_rows(Path(folder) / "train.jsonl", rows(n_train, 2 * seed, **options))
    write_rows(Path(folder) / "test.jsonl", rows(n_test, 2 * seed + 1, **options))
    return Path(folder)


def set_keys(c, **keys):
    """`c` with dotted keys set; a double underscore stands for the dot."""
    with c.unlocked(), c.ignore_type():
        for key, value in keys.items():
            *parents, last = key.split("__")
            node = c
            for parent in parents:
                node = node[parent]
            node[last] = value
    return c


def finetune(model, task, **keys):
    """The config of a small run on one device."""
    small = {"model": str(model), "task": str(task), "split": "train", "batch_size": 8, "epochs": 1, "learning_rate": 3e-3, "mesh__data": 1}
    return set_keys(shipped("finetune"), **small | keys)


def flags(**keys) -> list[str]:
    """Command-line flags of dotted keys."""
    return [f"--config.{key.replace('__', '.')}={value}" for key, value in keys.items()]


def write_tokenizer(folder, opening: str = "") -> Path:
    """A tokenizer of single characters and of a few merges (ids below VOCAB), with an `opening` special token before a text if named."""
    from tokenizers import Tokenizer, models, processors

    characters = [chr(c) for c in range(32, 127)] + ["\n"]
    merges = [("Y", "e"), ("Ye", "s"), (" ", "Yes"), (":", " "), ("t", "h"), ("th", "e"), (" ", "the")]
    words = ["<unk>", "<s>", *characters, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    if opening:
        tokenizer.post_processor = processors.TemplateProcessing(f"{opening} $A", None, [(opening, words.index(opening))])
    Path(folder).mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
    return Path(folder)


def write_texts(folder, n_train: int = 40, n_test: int = 16) -> Path:
    """A user's folder of texts of several lengths with both labels."""
    colours = ("red", "blue", "green", "the deep purple")
    for name, n, first in (("train", n_train, 0), ("test", n_test, n_train)):
        rows = [{"text": f"the box {i} is {colours[i % 4]}{' indeed' * (i % 3)}", "label": int(i % 3 == 0)}
                for i in range(first, first + n)]
        write_rows(Path(folder) / f"{name}.jsonl", rows)
    return Path(folder)
