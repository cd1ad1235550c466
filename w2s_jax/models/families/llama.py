"""Llama 1 to 3 (Touvron et al. 2023) and the families that keep its names: Mistral, Qwen1.5/2/2.5, Qwen3, OLMo 2, Phi-3."""

from w2s_jax.models.architecture import Architecture, Kind
from w2s_jax.models.families.family import Family
from w2s_jax.models.families.reader import FULL, SLIDING, Fields

NAMES = {
    "backbone/embed/tokens/embedding": "{p}embed_tokens.weight",
    "backbone/layers/norm1/scale": "{p}layers.{i}.input_layernorm.weight",
    "backbone/layers/norm2/scale": "{p}layers.{i}.post_attention_layernorm.weight",
    **{f"backbone/layers/attn/{x}/{kind}": f"{{p}}layers.{{i}}.self_attn.{name}_proj.{end}"
       for x, name in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o")) for kind, end in (("kernel", "weight"), ("bias", "bias"))},
    "backbone/layers/attn/q_norm/scale": "{p}layers.{i}.self_attn.q_norm.weight",
    "backbone/layers/attn/k_norm/scale": "{p}layers.{i}.self_attn.k_norm.weight",
    **{f"backbone/layers/mlp/{x}/{kind}": f"{{p}}layers.{{i}}.mlp.{x}_proj.{end}"
       for x in ("gate", "up", "down") for kind, end in (("kernel", "weight"), ("bias", "bias"))},
    "backbone/norm/scale": "{p}norm.weight",
    "lm_head/kernel": "lm_head.weight",
}
IGNORED = r".*\.rotary_emb\.inv_freq|lm_head\.weight"


def llama_like(f: Fields, family: str, *, kinds=None, kind_of=(), share: float = 1.0, **features) -> Architecture:
    """The architecture from the keys that all of these families share; `features` add to it or replace it."""
    embed, positions = f.size("hidden_size"), f.size("max_position_embeddings")
    heads, kv_heads, head_dim = f.heads(embed, grouped=True)
    if kinds is None:
        rope, positions = f.rope(head_dim, positions, share=share)
        kinds = (Kind(rope=rope),)
    return Architecture(**{
        "family": family, "vocab": f.size("vocab_size"), "embed": embed, "layers": f.size("num_hidden_layers"), "heads": heads,
        "kv_heads": kv_heads, "head_dim": head_dim, "mlp": f.size("intermediate_size"), "max_positions": positions,
        "activation": f.activation("hidden_act"), "norm_eps": f.number("rms_norm_eps"), "init_std": f.number("initializer_range", 0.02),
        "attention_scale": head_dim**-0.5, "tied": f.flag("tie_word_embeddings", False), "norm": "rms", "norm_bias": False,
        "qkv_bias": False, "out_bias": False, "mlp_kind": "gated", "mlp_bias": False, "kinds": kinds, "kind_of": tuple(kind_of),
    } | features)


def windows(f: Fields, types: list[str], window: int | None, share: float = 1.0):
    """`kinds`, `kind_of` and `max_positions` of layers that attend to everything or through one window, with one rotary embedding."""
    _, _, head_dim = f.heads(f.size("hidden_size"), grouped=True)
    rope, positions = f.rope(head_dim, f.size("max_position_embeddings"), share=share)
    if window is None or SLIDING not in types:
        return {"kinds": (Kind(rope=rope),), "max_positions": positions}
    if FULL not in types:
        return {"kinds": (Kind(window, rope),), "max_positions": positions}
    return {"kinds": (Kind(None, rope), Kind(window, rope)), "kind_of": [int(t == SLIDING) for t in types], "max_positions": positions}


def read_llama(f: Fields) -> Architecture:
    bias = f.flag("attention_bias", False)
    return llama_like(f, "llama", qkv_bias=bias, out_bias=bias, mlp_bias=f.flag("mlp_bias", False))


def read_mistral(f: Fields) -> Architecture:
    return llama_like(f, "mistral", **windows(f, [SLIDING], f.size("sliding_window", None)))


def _qwen_windows(f: Fields) -> dict:
    window = f.size("sliding_window", None) if f.flag("use_sliding_window", False) else None
    after = f.raw.get("max_window_layers", 28)
    types = f.layer_types(f.size("num_hidden_layers"), lambda i: window is not None and i >= after)
    return windows(f, types, window)


def read_qwen2(f: Fields) -> Architecture:
    return llama_like(f, "qwen2", qkv_bias=True, **_qwen_windows(f))


def read_qwen3(f: Fields) -> Architecture:
    bias = f.flag("attention_bias", False)
    return llama_like(f, "qwen3", qkv_bias=bias, out_bias=bias, qk_norm="head", **_qwen_windows(f))


def read_olmo2(f: Fields) -> Architecture:
    bias = f.flag("attention_bias", False)
    return llama_like(f, "olmo2", residual="branch", qk_norm="whole", qkv_bias=bias, out_bias=bias)


def read_phi3(f: Fields) -> Architecture:
    share = f.number("partial_rotary_factor", 1.0)
    return llama_like(f, "phi3", qkv="fused", mlp_kind="fused", **windows(f, [SLIDING], f.size("sliding_window", None), share))


OLMO2_NAMES = {k: v for k, v in NAMES.items() if "/norm1/" not in k and "/norm2/" not in k} | {
    "backbone/layers/post1/scale": "{p}layers.{i}.post_attention_layernorm.weight",
    "backbone/layers/post2/scale": "{p}layers.{i}.post_feedforward_layernorm.weight",
}
PHI3_NAMES = NAMES | {
    "backbone/layers/attn/qkv/kernel": "{p}layers.{i}.self_attn.qkv_proj.weight",
    "backbone/layers/mlp/gate_up/kernel": "{p}layers.{i}.mlp.gate_up_proj.weight",
}


def _family(model_type: str, read, transformers_name: str, names=NAMES) -> Family:
    return Family(model_type, read, names, ("model.",), IGNORED, (f"{transformers_name}ForSequenceClassification", "score.weight"))


FAMILIES = (
    _family("llama", read_llama, "Llama"), _family("mistral", read_mistral, "Mistral"), _family("qwen2", read_qwen2, "Qwen2"),
    _family("qwen3", read_qwen3, "Qwen3"), _family("olmo2", read_olmo2, "Olmo2", OLMO2_NAMES),
    _family("phi3", read_phi3, "Phi3", PHI3_NAMES),
)
