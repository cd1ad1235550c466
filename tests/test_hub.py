"""Where a model is, what its content is, and how its tokenizer cuts text. No test uses the network."""

import base64
import json
import os
import shutil

import numpy as np
import pytest

from w2s_jax import hub
from w2s_jax.errors import UserError


def make(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(f"content of {name}")
    return folder


# --------------------------------------------------------------------------- resolve


@pytest.mark.parametrize("weights", ["model.safetensors", "model.safetensors.index.json"])
def test_a_local_folder(tmp_path, monkeypatch, weights):
    make(tmp_path / "some" / "model", "config.json", weights)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    absolute = str(tmp_path / "some" / "model")
    for name in ("some/model", "./some/model", absolute, "~/some/model"):
        folder = hub.resolve(name)
        assert folder == (absolute, "") and os.fspath(folder) == absolute


@pytest.mark.parametrize("files, model, expected", [
    ([], "./nowhere", "model=./nowhere: no such folder"),
    ([], "~/nowhere", "no such folder"),
    ([], "/nowhere/at all", "no such folder"),
    (["model.safetensors"], "m", "no config.json"),
    (["config.json"], "m", "model=m: has no model.safetensors or model.safetensors.index.json; convert"),
    (["config.json", "pytorch_model.bin"], "m", "pytorch_model.bin, a pickle.*save_pretrained"),
    ([], "runs/a/b", "neither a folder here nor the form of a hub id"),
    ([], "no spaces", "neither a folder here nor the form of a hub id"),
    ([], "someone/something", "no such folder here, and not to be had from the hub or its cache"),
])
def test_what_is_not_a_model(tmp_path, monkeypatch, files, model, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    if files:
        make(tmp_path / "m", *files)
    with pytest.raises(UserError, match=expected) as error:
        hub.resolve(model)
    assert "\n" not in str(error.value)


def test_a_hub_model_is_a_snapshot_with_its_commit(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = make(tmp_path / "snapshots" / commit, "config.json", "model.safetensors")
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **options: asked.update(options, repo=repo) or str(snapshot))
    assert hub.resolve("owner/name", "v1") == (str(snapshot), commit)
    assert (asked["repo"], asked["revision"]) == ("owner/name", "v1")

    from huggingface_hub.utils import filter_repo_objects
    there = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
             "merges.txt", "spiece.model", "pytorch_model.bin", "onnx/config.json", "consolidated.safetensors", "code.py", "README.md"]
    taken = filter_repo_objects(there, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"])
    assert list(taken) == there[:7]
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model=owner/name: has no model.safetensors"):
        hub.resolve("owner/name")


def hub_errors():
    from huggingface_hub import errors

    answer = type("Response", (), {"headers": {}, "request": None, "status_code": 404})()
    return [
        (errors.RepositoryNotFoundError("x", response=answer), "no such model on the hub"),
        (errors.GatedRepoError("x", response=answer), "gated"),
        (errors.RevisionNotFoundError("x", response=answer), "revision=v9: the hub's owner/name has no such"),
        (errors.HfHubHTTPError("x", response=answer), "not to be had from the hub or its cache .HfHubHTTPError: x"),
        (errors.OfflineModeIsEnabled("x"), "OfflineModeIsEnabled"),
        (ConnectionError("two\nlines"), "ConnectionError: two lines"),
        (OSError("No space left on device"), "No space left"),
    ]


@pytest.mark.parametrize("error, expected", hub_errors(), ids=lambda e: type(e).__name__ if isinstance(e, Exception) else "")
def test_the_hubs_errors_are_one_line(monkeypatch, error, expected):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match=expected):
        hub.resolve("owner/name", "v9")


# --------------------------------------------------------------------------- fingerprint


def test_a_fingerprint_is_of_the_content(tmp_path):
    names = ["config.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json", "tokenizer.json", "merges.txt"]
    one, two = make(tmp_path / "one", *names), make(tmp_path / "two", *names)
    first = hub.fingerprint(one)
    assert len(first) == 64 and first == hub.fingerprint(two) == hub.fingerprint(str(one))
    make(two, "README.md", "pytorch_model.bin", "training_args.json")  # of no influence
    assert hub.fingerprint(two) == first
    seen = {first}
    for name in names:
        before = (two / name).read_text()
        (two / name).write_text(before + "!")
        assert hub.fingerprint(two) not in seen, name
        seen.add(hub.fingerprint(two))
        (two / name).write_text(before)
    (two / "model-1.safetensors").rename(two / "swap")  # the same contents under each other's names
    (two / "model-2.safetensors").rename(two / "model-1.safetensors")
    (two / "swap").rename(two / "model-2.safetensors")
    assert hub.fingerprint(two) not in seen


# --------------------------------------------------------------------------- tokenize

TEXTS = ["Q: What is it? A: mésophyte 😀", "", "!", " leading and trailing ", "line\n\nbreak", "<|endoftext|> inside"]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "bert-base-uncased", "pythia"])
def test_tokens_are_those_of_transformers(shared, name, special):
    from transformers import AutoTokenizer

    folder = shared / "data" / "tokenizers" / name
    expected = AutoTokenizer.from_pretrained(folder)(TEXTS, add_special_tokens=special)["input_ids"]
    expected[1] = []  # an empty text is no document, whatever stands around it
    got = hub.tokenize(folder, TEXTS, special)
    assert [t.tolist() for t in got] == expected
    assert all(t.dtype == np.int32 for t in got)
    assert hub.closing_tokens(folder) == (name == "bert-base-uncased")


def test_qwens_first_tokenizer(shared, tmp_path):
    """GPT-2's vocabulary as a file of ranks: the same merges, so the same tokens where the patterns agree."""
    source = shared / "data" / "tokenizers" / "gpt2"
    raw = json.loads((source / "tokenizer.json").read_text())["model"]["vocab"]
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    to_byte = {c: b for b, c in bytes_to_unicode().items()}
    ranks = {bytes(to_byte[c] for c in token): rank for token, rank in raw.items() if rank < 50256}
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for token, rank in ranks.items()]
    (tmp_path / "qwen.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    texts = ["The quick brown fox jumps over the lazy dog, doesn't it?", " naïve café mésophyte", "😀 und Grüße"]
    assert [t.tolist() for t in hub.tokenize(tmp_path, texts, True)] == [t.tolist() for t in hub.tokenize(source, texts)]
    assert hub.tokenize(tmp_path, ["a<|endoftext|>12"])[0].tolist() == [64, 50256, 16, 17]  # the first special token; digits one by one
    composed, apart = hub.tokenize(tmp_path, ["caf\u00e9", "cafe\u0301"])  # NFC
    assert composed.tolist() == apart.tolist()
    assert hub.vocabulary_size(tmp_path) == 50256 + 208 and hub.closing_tokens(tmp_path) == 0
    for damaged, expected in ((lines[:9], "all 256 bytes"), ([b"!! 1"], "line 1"), (lines[:300] + lines[301:], "without a gap")):
        (tmp_path / "qwen.tiktoken").write_bytes(b"\n".join(damaged))
        hub._encoder.cache_clear()
        with pytest.raises(UserError, match=expected):
            hub.tokenize(tmp_path, ["text"])


def test_id_zero_is_a_token_and_long_input_keeps_its_order(shared, monkeypatch):
    folder = shared / "data" / "tokenizers" / "gpt2"
    assert [t.tolist() for t in hub.tokenize(folder, ["!", "!!"])] == [[0], [3228]]
    monkeypatch.setattr(hub, "TEXTS_AT_ONCE", 7)
    numbers = hub.tokenize(folder, (str(i) for i in range(30)))
    assert [t.tolist() for t in numbers] == [hub.tokenize(folder, [str(i)])[0].tolist() for i in range(30)]


def test_truncation_and_padding_of_the_file_are_not_applied(shared, tmp_path):
    source = shared / "data" / "tokenizers" / "gpt2"
    raw = json.loads((source / "tokenizer.json").read_text())
    raw["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    raw["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
                      "pad_token": "!"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    for a, b in zip(hub.tokenize(tmp_path, TEXTS), hub.tokenize(source, TEXTS)):
        np.testing.assert_array_equal(a, b)


def test_an_older_tokenizer_of_vocabulary_and_merges(shared, tmp_path):
    source = shared / "data" / "tokenizers" / "gpt2"
    raw = json.loads((source / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(raw["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in raw["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    for a, b in zip(hub.tokenize(tmp_path, TEXTS[:-1]), hub.tokenize(source, TEXTS[:-1])):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("files, expected", [([], "has no tokenizer"), (["tokenizer.json"], "tokenizer.json: not a tokenizer")])
def test_no_tokenizer(tmp_path, files, expected):
    with pytest.raises(UserError, match=expected):
        hub.tokenize(make(tmp_path / "m", "config.json", *files), ["text"])


def test_golden_model_folder(shared, tmp_path):
    source = shared / "golden" / "openai" / "model"
    shutil.copytree(source, tmp_path / "copy")
    assert hub.fingerprint(hub.resolve(str(source))) == hub.fingerprint(hub.resolve(str(tmp_path / "copy")))
