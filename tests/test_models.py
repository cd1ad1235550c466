"""The decoder against transformers' PyTorch GPT-2, and against itself under packing, rematerialisation, types and sharding."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from w2s_jax import models
from w2s_jax.errors import UserError
from w2s_jax.models import heads
from w2s_jax.models.backbone import REMAT

pytestmark = pytest.mark.slow  # minutes together

RAW = {"model_type": "gpt2", "vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 80, "n_positions": 24,
       "initializer_range": 0.3}
LENGTHS = (9, 1, 24, 5, 2)


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def documents(seed=0, lengths=LENGTHS):
    """Token ids; every document holds id 0, the ids that the references take for padding."""
    rng = np.random.default_rng(seed)
    out = [rng.integers(0, RAW["vocab_size"], n).astype(np.int32) for n in lengths]
    for ids in out:
        ids[rng.integers(len(ids))] = ids[-1] = 0
    return out


def pack(docs, layout, time=26, slots=6, rows=5):
    """`layout[cell][row]` = the documents in it -> a batch; what lies in the padding is garbage."""
    rng = np.random.default_rng(9)
    shape = (len(layout), rows, time)
    batch = {"tokens": rng.integers(0, RAW["vocab_size"], shape), "segments": np.zeros(shape), "positions": rng.integers(0, 24, shape),
             "documents": np.full((len(layout), slots), -1), "last": np.zeros((len(layout), slots))}
    for c, cell in enumerate(layout):
        slot = 0
        for r, row in enumerate(cell):
            at = 0
            for d in row:
                span = slice(at, at + len(docs[d]))
                batch["tokens"][c, r, span], batch["segments"][c, r, span] = docs[d], d + 1
                batch["positions"][c, r, span] = np.arange(len(docs[d]))
                at = span.stop
                batch["documents"][c, slot], batch["last"][c, slot] = d, r * time + at - 1
                slot += 1
    return {k: v.astype(np.int32) for k, v in batch.items()}


LAYOUTS = {  # all are packed into 3 cells of 5 rows of 26, so that one program serves them
    "a row each": [[[0], [1], [2], [3], [4]], [], []],
    "packed": [[[0, 3, 1, 4], [2]], [], []],
    "another order": [[[1, 2], []], [[], [4]], [[], [3, 0]]],
    "first cell empty": [[], [[2]], [[4, 0, 3, 1]]],
}


def by_document(outputs, batch):
    """[cells, slots, ...] -> [documents, ...]."""
    found = {int(d): outputs[c, s] for (c, s), d in np.ndenumerate(batch["documents"]) if d >= 0}
    return np.stack([found[d] for d in sorted(found)])


def close(a, b, tolerance, what=""):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    scale = max(1.0, np.abs(b).max())
    assert np.isfinite(a).all(), what
    assert np.abs(a - b).max() <= tolerance * scale, f"{what}: {np.abs(a - b).max()} of {scale}"


@functools.cache
def tiny(head="classifier", **options):
    """A model without torch, every parameter random."""
    model = models.build(models.parse(RAW, "raw"), head=head, classes=3, head_init="normal", **options)
    return model, model.init(jax.random.key(1))


# --------------------------------------------------------------------------- packing, dropout, rematerialisation, types


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, batch, key=None):
    return model.apply(params, batch, key)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(model, params, batch, key=None):
    """A sum in which every document's outputs have weights of their own."""
    def total(params):
        out = model.apply(params, batch, key)
        weight = jnp.cos(batch["documents"][..., None] * 7.0 + jnp.arange(out.shape[-1]))
        return jnp.where(batch["documents"][..., None] >= 0, out * weight, 0).sum(), out
    return jax.value_and_grad(total, has_aux=True)(params)


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
@pytest.mark.parametrize("options", [{}, {"readout": "mean"}, {"head": "lm"}, {"dropout": 0.3}], ids=str)
def test_packing_changes_nothing(options, layout):
    model, params = tiny(**options)
    key = jax.random.key(4) if "dropout" in options else None
    docs, results = documents(), []
    for name in ("a row each", layout):
        batch = pack(docs, LAYOUTS[name])
        (_, outputs), grads = loss_and_gradients(model, params, batch, key)
        results.append((by_document(outputs, batch), grads))
    (plain, plain_grads), (packed, packed_grads) = results
    close(packed, plain, 1e-5)
    assert np.abs(plain).max() > 0.1
    expected = models.paths(plain_grads)
    for path, gradient in models.paths(packed_grads).items():
        close(gradient, expected[path], 1e-5, path)


def test_mean_readout_is_the_mean():
    model, params = tiny(readout="mean")
    batch = pack(documents(), LAYOUTS["packed"])
    states = np.asarray(model.hidden(params, batch))
    expected = [states[batch["segments"] == d + 1].mean(0) @ params["head"]["kernel"] for d in range(5)]
    close(by_document(apply(model, params, batch), batch), expected, 1e-5)


def test_dropout_is_seeded_and_drops_its_share():
    model, params = tiny(dropout=0.3)
    batch = pack(documents(), LAYOUTS["packed"])
    off = apply(model, params, batch)
    one, again, two = (np.asarray(apply(model, params, batch, jax.random.key(k))) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - two).max() > 1e-2 and np.abs(one - off).max() > 1e-2
    np.testing.assert_array_equal(off, apply(tiny()[0], params, batch))  # no key, no dropout

    from w2s_jax.models import dropout
    segments, positions = np.arange(40).reshape(4, 10), np.arange(40).reshape(4, 10)
    keys = dropout.token_keys(jax.random.key(0), segments, positions)
    masks = [np.asarray(dropout.dropout(jnp.ones((4, 10, 500)), keys, 0.3, site, layer)) for site in range(3) for layer in (0, 1)]
    assert abs(np.mean([m == 0 for m in masks]) - 0.3) < 0.005 and abs(np.mean(masks) - 1) < 0.01
    tokens = np.concatenate([m.reshape(40, 500) for m in masks])  # every (token, site, layer) has a mask of its own
    assert len(np.unique(tokens, axis=0)) == len(tokens)


@pytest.mark.parametrize("remat", [r for r in REMAT if r not in ("none", "full")])  # full is nothing_saveable
def test_rematerialisation_changes_nothing(remat, dropout=0.3):
    batch, key = pack(documents(), LAYOUTS["packed"]), jax.random.key(2)
    model, params = tiny(dropout=dropout)
    (expected, _), expected_grads = loss_and_gradients(model, params, batch, key)
    (loss, _), grads = loss_and_gradients(tiny(dropout=dropout, remat=remat)[0], params, batch, key)
    close(loss, expected, 1e-6)
    jax.tree.map(lambda a, b: close(a, b, 1e-6), grads, expected_grads)


@pytest.mark.parametrize("rows_at_once", [1, 3])
def test_language_model_loss_in_groups_of_rows(monkeypatch, rows_at_once):
    model, params = tiny("lm")
    batch = pack(documents(), LAYOUTS["another order"], rows=6)
    (expected, _), expected_grads = loss_and_gradients(model, params, batch)
    monkeypatch.setattr(heads, "LOGITS_AT_ONCE", 3 * rows_at_once * 26 * 97)
    (loss, _), grads = loss_and_gradients.__wrapped__(model, params, batch)
    close(loss, expected, 1e-6)
    jax.tree.map(lambda a, b: close(a, b, 1e-6), grads, expected_grads)


@pytest.mark.parametrize("dtype, param_dtype", [("bfloat16", "float32"), ("bfloat16", "bfloat16")])
def test_bfloat16(dtype, param_dtype):
    model, params = tiny(dtype=dtype, param_dtype=param_dtype)
    assert {k: str(v.dtype) for k, v in models.paths(params).items()} == {
        k: "float32" if k == "head/kernel" else param_dtype for k in models.paths(params)}
    batch = pack(documents(), LAYOUTS["packed"])
    exact = apply(tiny()[0], jax.tree.map(lambda p: p.astype(jnp.float32), params), batch)
    got = apply(model, params, batch)
    assert got.dtype == jnp.float32 and model.hidden(params, batch).dtype == jnp.bfloat16
    close(by_document(got, batch), by_document(exact, batch), 0.05)
    assert np.abs(np.asarray(got - exact)).max() > 1e-6  # it did compute in bfloat16


@pytest.mark.parametrize("key, value", [("positions", 24), ("tokens", 97)])
def test_an_id_outside_the_table_is_not_clamped(key, value):
    model, params = tiny()
    batch = pack(documents(), LAYOUTS["a row each"])
    batch[key][0, 3, 1] = value
    finite = np.isfinite(by_document(apply(model, params, batch), batch)).all(1)
    assert finite.tolist() == [True, True, True, False, True]


def test_the_program_does_not_grow_with_depth():
    def equations(layers):
        config = models.parse(RAW | {"n_layer": layers}, "raw")
        model = models.build(config, head="classifier")
        return len(str(jax.make_jaxpr(model.apply)(model.abstract, pack(documents(), LAYOUTS["packed"]))).splitlines())

    assert equations(2) == equations(7)


def test_forward_of_sharded_cells_needs_no_communication():
    devices = jax.devices()
    if len(devices) < 8:
        pytest.skip("needs 8 devices")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:8])
    docs = documents(lengths=[5, 9, 3, 7] * 4)
    batch = pack(docs, [[[2 * c], [2 * c + 1]] for c in range(8)], rows=2, slots=2)
    placed = jax.device_put(batch, NamedSharding(mesh, P("data")))
    for options in ({}, {"readout": "mean"}, {"head": "lm"}, {"dropout": 0.3}):
        model, params = tiny(**options)
        key = jax.random.key(0)
        expected = apply(model, params, batch, key)
        params, key = jax.device_put((params, key), NamedSharding(mesh, P()))
        compiled = jax.jit(model.apply).lower(params, placed, key).compile()
        close(compiled(params, placed, key), expected, 1e-5)
        for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
            assert f" {collective}(" not in compiled.as_text(), (options, collective)


# --------------------------------------------------------------------------- building and config.json


def test_build_gives_the_same_object_and_refuses_unknown_choices():
    config = tiny()[0].config
    copy = models.Architecture(**vars(config))
    assert models.build(config, head="lm") is models.build(copy, head="lm")
    wrong = {"dtype": "float16", "remat": "dot", "attention": "flash", "readout": "middle", "head_init": "zero", "dropout": 1.0}
    for key, value in wrong.items():
        with pytest.raises(UserError, match=f"{key}='?{value}"):
            models.build(config, **{"head": "classifier", key: value})
    model, params = tiny()
    with pytest.raises(ValueError, match="backbone/norm/bias"):
        model.apply({**params, "backbone": {**params["backbone"], "norm": {"scale": params["backbone"]["norm"]["scale"]}}}, {})


def test_initialisation_is_the_published_one():
    config = models.parse(RAW | {"n_embd": 128, "n_inner": 512, "initializer_range": 0.02, "n_layer": 2}, "raw")
    zero, normal = (models.build(config, head="classifier", head_init=h) for h in ("zeros", "normal"))
    params = jax.jit(normal.init)(jax.random.key(0))
    assert jax.tree.map(lambda p: (p.shape, p.dtype), params) == jax.tree.map(lambda p: (p.shape, p.dtype), normal.abstract)
    for path, value in models.paths(params).items():
        std = {"scale": None, "bias": None}.get(path.split("/")[-1], 0.02 / (2 if "/out/" in path or "/down/" in path else 1))
        if std is None:
            assert np.ptp(value) == 0 and value.ravel()[0] == ("scale" in path), path
        else:
            assert abs(np.std(value) / std - 1) < 0.2, path
    first, second = params["backbone"]["layers"]["attn"]["qkv"]["kernel"]
    assert np.abs(first - second).max() > 0.01  # layers differ
    np.testing.assert_array_equal(normal.init_new(jax.random.key(0))["head"]["kernel"], params["head"]["kernel"])
    assert not np.asarray(zero.init_new(jax.random.key(0))["head"]["kernel"]).any()
    assert models.build(config, head="lm").init_new(jax.random.key(0)) == {}


@pytest.mark.parametrize("change, expected", [
    ({"model_type": "gpt3"}, "model_type='gpt3' is not supported; did you mean 'gpt2'"),
    ({"activation_function": "gelu_newer"}, "activation_function='gelu_newer'.*gelu_new"),
    ({"add_cross_attention": True}, "add_cross_attention=True"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
    ({"n_head": 5}, "n_head=5 does not divide the width 32"),
    ({"n_layer": "3"}, "n_layer='3' is not a positive int"),
    ({"n_positions": 0}, "n_positions=0 is not a positive int"),
    ({"vocab_size": None}, "key 'vocab_size' is missing"),
    ({"scale_attn_weights": 1}, "scale_attn_weights=1 is not a bool"),
])
def test_a_config_that_is_not_supported_is_named(tmp_path, change, expected):
    good = RAW | {"scale_attn_weights": True}
    (tmp_path / "config.json").write_text(json.dumps(good))
    assert models.read_config(tmp_path) == tiny()[0].config
    (tmp_path / "config.json").write_text(json.dumps({**good, **change}))
    with pytest.raises(UserError, match=f"config.json: .*{expected}"):
        models.read_config(tmp_path)


@pytest.mark.parametrize("content, expected", [(None, "no such file"), ("{", "cannot be read"), ("[]", "expected a JSON object"),
                                               ("{}", "model_type"), ('{"model_type": "gpt2"}', "n_embd")])
def test_a_damaged_config_is_named(tmp_path, content, expected):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=expected):
        models.read_config(tmp_path)


def test_sizes_of_the_golden_model(shared):
    config = models.read_config(shared / "golden" / "openai" / "model")
    assert (config.vocab, config.embed, config.layers, config.mlp, config.max_positions) == (400, 48, 3, 192, 128)
    assert math.isclose(config.init_std, 0.15)
