"""Safetensors: strict both ways, read slice by slice onto any devices, and written so that transformers reads them."""

import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from w2s_jax import models
from w2s_jax.errors import UserError
from w2s_jax.models import weights, writing

RAW = {"model_type": "gpt2", "vocab_size": 96, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_inner": 80, "n_positions": 24,
       "initializer_range": 0.3}
CONFIG = models.parse(RAW, "raw")


def lm(**options):
    return models.build(CONFIG, head="lm", **options)


def equal(a, b):
    a, b = models.paths(a), models.paths(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(np.asarray(a[path], np.float32), np.asarray(b[path], np.float32), err_msg=path)


@pytest.fixture(scope="module")
def params():
    return lm().init(jax.random.key(0))


@pytest.fixture
def folder(tmp_path, params):
    models.save(tmp_path / "model", params, RAW)
    return tmp_path / "model"


def rewrite(folder, change):
    """Apply `change` to the dict of tensors in the folder's file."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors")


def split(folder, shards=3):
    """The folder's one file as a sharded checkpoint with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    where = {t: names[i % shards] for i, t in enumerate(sorted(tensors))}
    for name in names:
        save_file({t: tensors[t] for t in tensors if where[t] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return names


# --------------------------------------------------------------------------- reading


def unprefixed(tensors):
    return {k.removeprefix("transformer."): v for k, v in tensors.items()}


def with_old_masks(tensors):
    masks = {f"transformer.h.{i}.attn.{n}": np.ones((1, 1, 24, 24), np.float32) for i in range(4) for n in ("bias", "masked_bias")}
    return {**tensors, **masks, "lm_head.weight": tensors["transformer.wte.weight"]}


@pytest.mark.parametrize("change", [lambda t: t, unprefixed, with_old_masks], ids=["as saved", "no prefix", "masks and tied head"])
def test_a_checkpoint_in_each_form(folder, params, change):
    rewrite(folder, change)
    equal(models.load(folder, lm()), params)


def test_a_sharded_checkpoint(folder, params):
    split(folder)
    equal(models.load(folder, lm()), params)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_types(folder, params, stored, param_dtype):
    rewrite(folder, lambda t: {k: v.astype(stored) for k, v in t.items()})
    loaded = models.load(folder, lm(param_dtype=param_dtype))
    assert {str(v.dtype) for v in jax.tree.leaves(loaded)} == {param_dtype}
    equal(loaded, jax.tree.map(lambda p: np.asarray(p).astype(stored).astype(param_dtype), params))


@pytest.mark.parametrize("head_init", ["zeros", "normal"])
def test_the_head_is_initialised_as_by_init(folder, head_init):
    model = models.build(CONFIG, head="classifier", head_init=head_init)
    loaded = models.load(folder, model, key=jax.random.key(7))
    assert jax.tree.structure(loaded) == jax.tree.structure(model.abstract)
    np.testing.assert_allclose(loaded["head"]["kernel"], model.init(jax.random.key(7))["head"]["kernel"], rtol=1e-5)
    assert np.asarray(loaded["head"]["kernel"]).any() == (head_init == "normal")
    if head_init == "normal":
        with pytest.raises(ValueError, match="key"):
            models.load(folder, model)


@pytest.mark.parametrize("at_once", [2**26, 2**14, 0], ids=["whole", "in groups", "one layer at a time"])
@pytest.mark.parametrize("shape, rules", [
    ((8,), [(r"layers/.*(kernel|scale)", P(None, "a")), (r"embedding", P("a"))]),
    ((2, 4), [(r"layers/.*kernel", P("a", None, "b")), (r"tokens", P(None, "b")), (r"layers/.*bias", P(None, "b"))]),
    ((2, 2, 2), [(r"(qkv|up)/kernel", P("a", "b", "c")), (r"down|out/kernel", P(None, "c", "b")), (r"embedding", P(("a", "b")))]),
])
def test_each_device_reads_its_slice(folder, params, shape, rules, monkeypatch, at_once):
    monkeypatch.setattr(weights, "AT_ONCE", at_once)
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    mesh = jax.make_mesh(shape, ("a", "b", "c")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape), devices=jax.devices()[:8])
    model = models.build(CONFIG, head="classifier", head_init="normal")
    abstract = models.paths(model.abstract)
    specs = {path: next((spec for rule, spec in rules if re.search(rule, path) and len(spec) <= leaf.ndim), P())
             for path, leaf in abstract.items()}
    shardings = models.nest({path: NamedSharding(mesh, spec) for path, spec in specs.items()})
    read = []
    original = weights.Checkpoint.read
    monkeypatch.setattr(weights.Checkpoint, "read", lambda self, name, index=(): read.append(a := original(self, name, index)) or a)
    loaded = models.load(folder, model, shardings, jax.random.key(1))
    equal({"backbone": loaded["backbone"]}, params)
    for path, leaf in models.paths(loaded).items():
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, specs[path]), leaf.ndim), path
    assert sum(a.size for a in read) == sum(leaf.size for leaf in jax.tree.leaves(params))  # nothing read twice, no tensor whole


# --------------------------------------------------------------------------- refusing


def fp8(tensors):
    tensors["transformer.h.1.mlp.c_fc.weight"] = tensors["transformer.h.1.mlp.c_fc.weight"].astype(ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize("change, expected", [
    (lambda t: {k: v for k, v in t.items() if k != "transformer.h.2.ln_1.bias"}, r"1 missing \(transformer.h.2.ln_1.bias\)"),
    (lambda t: t.update({"scores.weight": np.zeros((2, 32), np.float32)}), r"1 that nothing takes \(scores.weight\)"),
    (lambda t: t.update({"transformer.h.4.ln_1.bias": np.zeros(32, np.float32)}), r"nothing takes \(transformer.h.4.ln_1.bias\)"),
    (lambda t: t.update({"transformer.wpe.weight": np.zeros((23, 32), np.float32)}),
     r"1 of another shape \(transformer.wpe.weight \[23, 32\] where config.json says \[24, 32\]\)"),
    (lambda t: t.update({"transformer.extra": t.pop("transformer.ln_f.bias")}), r"1 missing .*ln_f.bias.*1 that nothing takes .*extra"),
    (lambda t: {"a": np.zeros(1, np.float32)}, r"52 missing \(wte.weight, wpe.weight, .*, \.\.\.\); 1 that nothing takes \(a\)"),
    (fp8, r"model.safetensors: tensor 'transformer.h.1.mlp.c_fc.weight' is F8_E4M3; expected one of BF16, F16, F32"),
    (lambda t: t.update({"transformer.ln_f.bias": np.zeros(32, np.float64)}), "'transformer.ln_f.bias' is F64"),
])
def test_tensors_that_do_not_fit(folder, change, expected):
    rewrite(folder, change)
    with pytest.raises(UserError, match=expected):
        models.load(folder, lm())


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def cut_in_the_header(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:50])


def lose_a_shard(folder):
    (folder / split(folder)[1]).unlink()


def name_another_folder(folder):
    split(folder)
    file = folder / "model.safetensors.index.json"
    file.write_text(file.read_text().replace("model-00001-of", "../model-00001-of"))


@pytest.mark.parametrize("damage, expected", [
    (truncate, r"model\.safetensors: truncated or not a safetensors file"),
    (cut_in_the_header, r"model\.safetensors: truncated or not a safetensors file"),
    (lambda f: (f / "model.safetensors").write_bytes(b""), r"model\.safetensors: truncated or not a safetensors file"),
    (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    (lose_a_shard, r"model-00002-of-00003.safetensors: no such file"),
    (name_another_folder, r"expected a file of the same folder"),
    (lambda f: split(f) and (f / "model.safetensors.index.json").write_text("{}"), "not an index"),
])
def test_damaged_files_are_named(folder, damage, expected):
    damage(folder)
    with pytest.raises(UserError, match=expected):
        models.load(folder, lm())


# --------------------------------------------------------------------------- writing


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_transformers_reads_what_is_saved(tmp_path, param_dtype):
    torch = pytest.importorskip("torch")
    import transformers

    raw = RAW | {"scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 1e-3, "activation_function": "relu"}
    config = models.parse(raw, "raw")
    model = models.build(config, head="lm", param_dtype=param_dtype)
    params = model.init(jax.random.key(3))
    models.save(tmp_path / "m", params, raw)
    net, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "m", output_loading_info=True, dtype=torch.float32)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ids = np.random.default_rng(0).integers(0, 96, (1, 1, 20)).astype(np.int32)
    batch = {"tokens": ids, "segments": np.ones_like(ids), "positions": np.arange(20, dtype=np.int32)[None, None],
             "documents": np.zeros((1, 1), np.int32), "last": np.full((1, 1), 19, np.int32)}
    with jax.default_matmul_precision("highest"), torch.no_grad():
        expected = net.eval()(torch.tensor(ids[0].astype(np.int64))).logits.numpy()
        np.testing.assert_allclose(model.logits(params, batch)[0], expected, atol=1e-5 * np.abs(expected).max())
    assert models.read_config(tmp_path / "m") == config
    equal(models.load(tmp_path / "m", model), params)


def test_saving_replaces_the_folder_whole_and_copies_the_tokenizer(folder, params):
    tokenizer = folder.parent / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors", "config.json"):
        (tokenizer / name).write_text("from the tokenizer's folder")
    (folder / "left-over").write_text("")
    doubled = jax.tree.map(lambda p: 2 * p, params)
    models.save(folder, doubled, RAW, tokenizer_files_from=tokenizer)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(p.name for p in folder.parent.iterdir()) == ["model", "tokenizer"]
    equal(models.load(folder, lm()), doubled)


def test_a_failed_save_leaves_the_old_folder(folder, params, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(writing, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        models.save(folder, jax.tree.map(jnp.zeros_like, params), RAW)
    assert [p.name for p in folder.parent.iterdir()] == ["model"]
    equal(models.load(folder, lm()), params)


def test_what_the_format_has_no_place_for_is_refused(tmp_path, params):
    for wrong in ({**params, "head": {"kernel": np.zeros((32, 2))}},
                  {"backbone": {**params["backbone"], "lora": np.zeros(3, np.float32)}}):
        with pytest.raises(ValueError, match="head|lora"):
            models.save(tmp_path / "m", wrong, RAW)
    assert not list(tmp_path.iterdir())
