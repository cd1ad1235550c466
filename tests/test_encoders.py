"""Texts through the stages with an encoder: its tokenizer's special tokens, its own classifier's readout, labels from its checkpoint."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny

import w2s_jax
from w2s_jax import hub, models, stages, workload
from w2s_jax.config import shipped
from w2s_jax.data.examples import Examples
from w2s_jax.errors import UserError

WORDS = "good bad fine poor lovely dreadful film story acting plot music ending".split()


@pytest.fixture(scope="module")
def encoder(shared, tmp_path_factory):
    """Folder of a tiny random BERT with the real tokenizer."""
    folder = tmp_path_factory.mktemp("encoder") / "bert"
    raw = {"model_type": "bert", "vocab_size": 30522, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
           "intermediate_size": 32, "max_position_embeddings": 32, "type_vocab_size": 2, "initializer_range": 0.3}
    model = models.build(models.parse(raw, "raw"), head="classifier")
    params = {k: v for k, v in jax.jit(model.init)(jax.random.key(0)).items() if k != "head"}
    tensors = models.writing.entries(params, model.config, models.FAMILIES["bert"])
    models.writing.write(folder, tensors, {"config.json": json.dumps(raw)}, shared / "data" / "tokenizers" / "bert-base-uncased")
    return folder


def examples(texts):
    n = len(texts)
    return Examples([f"t/{i}" for i in range(n)], texts, None, np.tile(np.float32([0, 1]), (n, 1)), [str(i) for i in range(n)])


def test_a_text_that_is_cut_keeps_its_last_special_token(encoder):
    long = examples(["good film", "", " ".join(WORDS)])
    cut, counts = workload.tokenized(long, encoder, workload.Limits(6, 32, "truncate"), 30522, "test", [])
    ids = [t.tolist() for t in cut.tokens]
    assert counts == {"overlong": 0, "truncated": 1, "empty": 1}
    assert [(t[0], t[-1], len(t)) for t in ids] == [(101, 102, 4), (101, 102, 6)]
    assert ids[1][1:-1] == hub.tokenize(encoder, [" ".join(WORDS)])[0].tolist()[:4]
    given = long.replace(tokens=[np.arange(9, dtype=np.int32)] * 3)  # token ids are cut as they are
    plain, _ = workload.tokenized(given, encoder, workload.Limits(6, 32, "truncate"), 30522, "test", [])
    assert plain.tokens[0].tolist() == list(range(6))
    with pytest.raises(UserError, match="max_length=1: the tokenizer alone puts 1 tokens behind a text"):
        workload.tokenized(long, encoder, workload.Limits(1, 32, "truncate"), 30522, "test", [])


@pytest.mark.parametrize("readout", ["auto", "mean"])
def test_an_encoder_learns_and_labels(encoder, readout, tmp_path, fast_compiles):
    rng = np.random.default_rng(0)
    rows = [{"text": " ".join(rng.choice(WORDS, rng.integers(1, 9))) + (" good" if i % 2 else " bad"), "label": i % 2} for i in range(96)]
    tiny.write_rows(tmp_path / "task/train.jsonl", rows[:64])
    tiny.write_rows(tmp_path / "task/test.jsonl", rows[64:])
    run = tmp_path / "run"
    stages.run(tiny.finetune(encoder, tmp_path / "task", readout=readout, learning_rate=1e-2, epochs=4, max_length=32), str(run))
    losses = [row["loss"] for row in w2s_jax.load(run).metrics]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    config = tiny.set_keys(shipped("label"), run=str(run), split="test", mesh__data=1)
    stages.run(config, str(tmp_path / "labels"))
    trained, labelled = w2s_jax.load(run).predictions("test"), w2s_jax.load(tmp_path / "labels").predictions("test")
    np.testing.assert_allclose(np.stack(labelled["logits"]), np.stack(trained["logits"]), atol=1e-5)


def test_a_base_model_that_changed_since_is_refused(encoder, tmp_path, fast_compiles):
    """Head-only: the checkpoint holds the head, the rest is read again."""
    folder = shutil.copytree(encoder, tmp_path / "bert")
    rows = [{"text": f"{WORDS[i % 12]} {WORDS[(5 * i) % 12]}", "label": i % 2} for i in range(24)]
    tiny.write_rows(tmp_path / "task/train.jsonl", rows)
    tiny.write_rows(tmp_path / "task/test.jsonl", rows[:8])
    stages.run(tiny.finetune(folder, tmp_path / "task", train="head", max_length=32, group="none"), str(tmp_path / "run"))
    assert set(w2s_jax.load(tmp_path / "run").model().params) == {"backbone", "pooler", "head"}
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"gelu"', '"relu"') + "\n")
    with pytest.raises(UserError, match="its base model .* the files changed since"):
        w2s_jax.load(tmp_path / "run").model()
