"""Gemma 1, 2 and 3 (Gemma Team 2024, 2025), text: embeddings scaled by sqrt(width), norms that multiply by 1 + weight, one
embedding for input and output; from 2 on norms after the branches too, alternating windows and soft caps."""

import math
from dataclasses import replace

from w2s_jax.models.architecture import Architecture, Kind
from w2s_jax.models.families.family import Family
from w2s_jax.models.families.llama import IGNORED, NAMES, llama_like, windows
from w2s_jax.models.families.reader import FULL, SLIDING, Fields

SANDWICH_NAMES = NAMES | {
    "backbone/layers/post1/scale": "{p}layers.{i}.post_attention_layernorm.weight",
    "backbone/layers/norm2/scale": "{p}layers.{i}.pre_feedforward_layernorm.weight",
    "backbone/layers/post2/scale": "{p}layers.{i}.post_feedforward_layernorm.weight",
}


def _common(f: Fields) -> dict:
    bias = f.flag("attention_bias", False)
    f.only(use_bidirectional_attention=False)
    return {"norm": "rms_plus_one", "tied": f.flag("tie_word_embeddings", True), "embed_scale": math.sqrt(f.size("hidden_size")),
            "qkv_bias": bias, "out_bias": bias}


def read_gemma(f: Fields) -> Architecture:
    # `hidden_act` of the first checkpoints says "gelu" and means the tanh form; `hidden_activation` said so for a while.
    given = f.raw.get("hidden_activation") or f.raw.get("hidden_act") or "gelu"
    f.raw = f.raw | {"hidden_act": "gelu_pytorch_tanh" if given == "gelu" else given}
    return llama_like(f, "gemma", **_common(f))


def read_gemma2(f: Fields) -> Architecture:
    f.raw = f.raw | {"hidden_act": f.activation("hidden_activation", "gelu_pytorch_tanh")}
    types = f.layer_types(f.size("num_hidden_layers"), lambda i: i % 2 == 0)
    return llama_like(f, "gemma2", **_common(f), **windows(f, types, f.size("sliding_window", None)), residual="sandwich",
                      attention_scale=f.number("query_pre_attn_scalar") ** -0.5, attention_cap=f.number("attn_logit_softcapping", None),
                      logit_cap=f.number("final_logit_softcapping", None))


def read_gemma3(f: Fields) -> Architecture:
    f.raw = f.raw | {"hidden_act": f.activation("hidden_activation", "gelu_pytorch_tanh")}
    pattern = f.size("sliding_window_pattern", 6)
    types = f.layer_types(f.size("num_hidden_layers"), lambda i: (i + 1) % pattern != 0)
    _, _, head_dim = f.heads(f.size("hidden_size"), grouped=True)
    positions = f.size("max_position_embeddings")
    # The windows' base is their own, and only the far-reaching layers' positions are scaled.
    far, positions = f.rope(head_dim, positions, theta=1_000_000.0, layer_type=FULL)
    near, _ = f.rope(head_dim, positions, theta_key="rope_local_base_freq", layer_type=SLIDING, scaled=False)
    return llama_like(
        f, "gemma3_text", **_common(f), kinds=(Kind(None, far), Kind(f.size("sliding_window"), near)),
        kind_of=[int(t == SLIDING) for t in types], max_positions=positions, residual="sandwich", qk_norm="head",
        attention_scale=f.number("query_pre_attn_scalar", 256.0) ** -0.5, attention_cap=f.number("attn_logit_softcapping", None),
        logit_cap=f.number("final_logit_softcapping", None))


def read_gemma3_with_vision(f: Fields) -> Architecture:
    """The text half of a checkpoint that sees images too; its text_config leaves out what Gemma3TextConfig has as default."""
    text = f.raw.get("text_config")
    if not isinstance(text, dict):
        raise f.error("text_config", "an object")
    defaults = {"vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "rms_norm_eps": 1e-6,
                "max_position_embeddings": 131_072, "sliding_window": 4096}
    return replace(read_gemma3(Fields({"model_type": "gemma3"} | defaults | text, f.file + ": text_config")), family="gemma3")


def _family(model_type: str, read, classifier: str, names, prefixes=("model.",), ignored=IGNORED) -> Family:
    return Family(model_type, read, names, prefixes, ignored, (classifier, "score.weight" if classifier else ""))


FAMILIES = (
    _family("gemma", read_gemma, "GemmaForSequenceClassification", NAMES),
    _family("gemma2", read_gemma2, "Gemma2ForSequenceClassification", SANDWICH_NAMES),
    _family("gemma3_text", read_gemma3, "Gemma3TextForSequenceClassification", SANDWICH_NAMES),
    _family("gemma3", read_gemma3_with_vision, "", SANDWICH_NAMES, ("language_model.model.", "model.language_model."),
            IGNORED + r"|(language_model\.)lm_head\.weight|(model\.)?(vision_tower|multi_modal_projector)\..*"),
)
