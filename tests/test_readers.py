"""Readers of config.json: published models, transformers' old and new keys, and what is refused."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
import reference
from published import PUBLISHED

from w2s_jax import models
from w2s_jax.errors import UserError


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_number_of_parameters(name):
    """Sizes, ties and biases are right if the total is; ModernBERT's first norm is a row that no layer reads."""
    raw, expected = PUBLISHED[name]
    arch = models.parse(raw, name)
    model = models.build(arch, head="lm" if arch.causal else "classifier")
    total = sum(math.prod(leaf.shape) for path, leaf in models.paths(model.abstract).items() if path != "head/kernel")
    if not arch.first_norm:
        total -= arch.embed
    if arch.pooler == "fresh":
        total -= arch.embed * (arch.embed + 1)
    assert total == expected


@pytest.mark.parametrize("name", [n for n, (raw, _) in PUBLISHED.items() if raw["model_type"] != "qwen"])
def test_old_keys_mean_what_transformers_makes_of_them(name):
    """config.json as the hub has it, and as transformers 5 writes it again (rope_parameters, layer_types), are one architecture."""
    transformers = pytest.importorskip("transformers")
    raw, _ = PUBLISHED[name]
    arch = models.parse(raw, name)
    config = transformers.AutoConfig.for_model(**raw)
    again = models.parse(json.loads(config.to_json_string(use_diff=False)), name)
    assert arch == again
    for kind in arch.kinds if arch.kinds[0].rope else ():
        assert np.isclose(kind.rope.frequencies[0], 1.0) or "scaling" in str(raw)
        assert 2 * len(kind.rope.frequencies) == arch.head_dim * raw.get("rotary_pct", 1.0)


@pytest.mark.parametrize("name, changes", [
    ("meta-llama/Llama-3.1-8B", {}), ("meta-llama/Llama-3.2-1B", {}),
    ("meta-llama/Llama-3.1-8B", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    ("Qwen/Qwen2.5-0.5B", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}),
    ("microsoft/Phi-3-mini-4k-instruct", {"max_position_embeddings": 131072, "rope_scaling": {
        "type": "longrope", "short_factor": [1.0 + i / 50 for i in range(48)], "long_factor": [2.0 + i for i in range(48)]}}),
])
def test_rotary_scaling_equals_transformers(name, changes):
    torch = pytest.importorskip("torch")
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    raw = PUBLISHED[name][0] | changes
    rotary = Phi3RotaryEmbedding if raw["model_type"] == "phi3" else LlamaRotaryEmbedding
    with torch.no_grad():
        reference_ = rotary(transformers.AutoConfig.for_model(**raw))
    arch = models.parse(raw, name)
    np.testing.assert_allclose(arch.kinds[0].rope.frequencies, reference_.inv_freq.numpy(), rtol=2e-6)
    assert math.isclose(arch.kinds[0].rope.scale, reference_.attention_scaling, rel_tol=1e-9)
    if raw["model_type"] == "phi3":
        assert arch.max_positions == 4096  # where the short factors end


LLAMA = {"model_type": "llama", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 44, "max_position_embeddings": 24, "hidden_act": "silu", "rms_norm_eps": 1e-5}
BERT = {"model_type": "bert", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 44, "max_position_embeddings": 24, "type_vocab_size": 2}


@pytest.mark.parametrize("raw, change, expected", [
    (LLAMA, {"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
    (LLAMA, {"hidden_act": "gelu_newer"}, "hidden_act='gelu_newer'.*gelu_new"),
    (LLAMA, {"rms_norm_eps": None}, "key 'rms_norm_eps' is missing; llama needs it"),
    (LLAMA, {"rope_scaling": {"rope_type": "ntk"}}, "rope_scaling: rope_type='ntk' is not supported"),
    (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling: key 'low_freq_factor' is missing"),
    (LLAMA, {"rope_parameters": {"rope_type": "linear", "factor": 0}}, "rope_parameters: factor=0 is not a positive float"),
    (LLAMA, {"rope_parameters": "linear"}, "rope_parameters='linear'"),
    (LLAMA, {"rope_parameters": {"full_attention": {"rope_theta": 3.0}}}, "by layer type .full_attention.; expected one set for all"),
    (LLAMA | {"model_type": "gemma3_text", "sliding_window": 4}, {"rope_parameters": {"full_attention": {"rope_theta": 3.0}}},
     "rope_parameters has no 'sliding_attention'"),
    (LLAMA, {"head_dim": 9}, "1.0 of a head's width 9 is 9; expected an even number"),
    (LLAMA | {"model_type": "qwen3"}, {"layer_types": ["full_attention"]}, "layer_types=.*expected 3 of full_attention"),
    (LLAMA | {"model_type": "phi3"}, {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "short_factor=.*4 positive numbers"),
    (LLAMA | {"model_type": "gemma3"}, {}, "text_config=None"),
    (BERT, {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'.*absolute"),
    (BERT, {"is_decoder": True}, "is_decoder=True"),
    (BERT | {"model_type": "roberta", "pad_token_id": 30}, {}, "max_position_embeddings=24.*more than 31"),
    (BERT | {"model_type": "modernbert"}, {"classifier_pooling": "max"}, "classifier_pooling='max'.*cls or mean"),
    (LLAMA | {"model_type": "mamba"}, {}, "model_type='mamba' is not supported.*gpt2, gpt_neox, llama"),
])
def test_what_is_not_supported_is_named(tmp_path, raw, change, expected):
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(UserError, match=f"config.json:? .*{expected}|config.json: {expected}"):
        models.read_config(tmp_path)


def test_longer_documents_than_dynamic_scaling_serves_are_not_taken():
    arch = models.parse(LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "raw")
    assert arch.max_positions == 24 and arch.kinds == models.parse(LLAMA, "raw").kinds


@pytest.mark.parametrize("head, readout, expected", [
    ("lm", "auto", "encoder"), ("classifier", "last", None), ("classifier", "first", None)])
def test_what_an_encoder_can_do(head, readout, expected):
    build = lambda: models.build(models.parse(BERT, "raw"), head=head, readout=readout)  # noqa: E731
    if expected:
        with pytest.raises(UserError, match=expected):
            build()
    else:
        assert "pooler" not in build().abstract and build().readout == readout
    with pytest.raises(UserError, match="readout='first'"):
        models.build(models.parse(LLAMA, "raw"), head="classifier", readout="first")


def test_the_text_half_of_a_gemma_that_sees_images(tmp_path):
    """Its tensors lie deeper, and beside those of the vision tower; config.json nests the text's."""
    pytest.importorskip("torch")
    from safetensors.numpy import load_file, save_file

    reference.save("gemma3", "lm", tmp_path)
    raw = models.read_raw(tmp_path)
    alone = models.load(tmp_path, models.build(models.parse(raw, "text"), head="lm"))
    tensors = {f"language_model.{k}": v for k, v in load_file(tmp_path / "model.safetensors").items()}
    tensors |= {"vision_tower.patch.weight": np.zeros(3, np.float32), "multi_modal_projector.norm.weight": np.zeros(3, np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "vision_config": {}, "text_config": raw}))
    arch = models.read_config(tmp_path)
    assert arch == dataclasses.replace(models.parse(raw, "text"), family="gemma3")
    nested = models.load(tmp_path, models.build(arch, head="lm"))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), nested, alone))


def test_names_of_older_checkpoints(tmp_path):
    """BERT's norms were gamma and beta, and its language-model heads and position buffers are no parameters here."""
    from safetensors.numpy import save_file

    (tmp_path / "config.json").write_text(json.dumps(BERT))
    model = models.build(models.read_config(tmp_path), head="classifier")
    params = {k: v for k, v in jax.jit(model.init)(jax.random.key(0)).items() if k != "head"}
    tensors = {name: entry.get() for name, entry in models.writing.entries(params, model.config, models.FAMILIES["bert"]).items()}
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v for k, v in tensors.items()}
    assert old.keys() != tensors.keys()
    old |= {"cls.predictions.bias": np.zeros(97, np.float32), "bert.embeddings.position_ids": np.arange(24)[None]}
    save_file(old, tmp_path / "model.safetensors")
    again = models.load(tmp_path, model)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), {k: again[k] for k in params}, params))
    with pytest.raises(UserError, match="2 missing .bert.pooler.dense.weight, bert.pooler.dense.bias"):
        save_file({k: v for k, v in old.items() if "pooler" not in k}, tmp_path / "model.safetensors")
        models.load(tmp_path, model)
