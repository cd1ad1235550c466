"""Qwen, version 1 (Bai et al. 2023): Qwen/Qwen-1_8B to -72B, the ladder of openai/weak-to-strong.

The hub has its code only as remote code, which is never run. Its arithmetic is Qwen2's: fused projections (c_attn), w2 the
gate and w1 the other half of the MLP, whose `intermediate_size` counts both halves. Beyond `seq_length` tokens, where it
would scale rotary base (dynamic NTK) and queries (log n) with the text, no document is taken.
"""

from w2s_jax.errors import UserError
from w2s_jax.models.architecture import Architecture, Kind
from w2s_jax.models.families.family import Family
from w2s_jax.models.families.reader import Fields

NAMES = {
    "backbone/embed/tokens/embedding": "{p}wte.weight",
    "backbone/layers/norm1/scale": "{p}h.{i}.ln_1.weight",
    "backbone/layers/attn/qkv/kernel": "{p}h.{i}.attn.c_attn.weight",
    "backbone/layers/attn/qkv/bias": "{p}h.{i}.attn.c_attn.bias",
    "backbone/layers/attn/out/kernel": "{p}h.{i}.attn.c_proj.weight",
    "backbone/layers/attn/out/bias": "{p}h.{i}.attn.c_proj.bias",
    "backbone/layers/norm2/scale": "{p}h.{i}.ln_2.weight",
    "backbone/layers/mlp/up/kernel": "{p}h.{i}.mlp.w1.weight",
    "backbone/layers/mlp/gate/kernel": "{p}h.{i}.mlp.w2.weight",
    "backbone/layers/mlp/down/kernel": "{p}h.{i}.mlp.c_proj.weight",
    "backbone/layers/mlp/up/bias": "{p}h.{i}.mlp.w1.bias",
    "backbone/layers/mlp/gate/bias": "{p}h.{i}.mlp.w2.bias",
    "backbone/layers/mlp/down/bias": "{p}h.{i}.mlp.c_proj.bias",
    "backbone/norm/scale": "{p}ln_f.weight",
    "lm_head/kernel": "lm_head.weight",
}


def read(f: Fields) -> Architecture:
    f.only(scale_attn_weights=True)
    embed, heads, head_dim = f.size("hidden_size"), f.size("num_attention_heads"), f.size("kv_channels")
    mlp, rest = divmod(f.size("intermediate_size"), 2)
    if rest:
        raise f.error("intermediate_size", "an even number (both halves of the MLP)")
    bias = not f.flag("no_bias", True)
    positions = min(f.size("seq_length"), f.size("max_position_embeddings", f.size("seq_length")))
    rope, positions = f.rope(head_dim, positions, theta_key="rotary_emb_base", share=f.number("rotary_pct", 1.0))
    return Architecture(
        family="qwen", vocab=f.size("vocab_size"), embed=embed, layers=f.size("num_hidden_layers"), heads=heads, kv_heads=heads,
        head_dim=head_dim, mlp=mlp, max_positions=positions, activation="silu", norm_eps=f.number("layer_norm_epsilon"),
        init_std=f.number("initializer_range", 0.02), attention_scale=head_dim**-0.5, tied=f.flag("tie_word_embeddings", False),
        norm="rms", norm_bias=False, qkv="fused", qkv_bias=True, out_bias=bias, mlp_kind="gated", mlp_bias=bias, kinds=(Kind(rope=rope),),
    )


FAMILY = Family("qwen", read, NAMES, ("transformer.",), r".*\.rotary_emb\.inv_freq|.*\.attn\.masked_bias|lm_head\.weight", ("", ""))


def as_qwen2(raw: dict, arch: Architecture, params: dict) -> tuple[dict, dict]:
    """config.json and params of the same model as a Qwen2, which transformers has a class for: the fused projection in three.

    UserError: a variant with biases that Qwen2 has no place for (no published checkpoint is one).
    """
    if arch.out_bias or arch.mlp_bias:
        raise UserError("no_bias=False: Qwen2, as which Qwen's first version is written, has no such biases; expected no_bias=True")
    layers = dict(params["backbone"]["layers"])
    width = arch.heads * arch.head_dim
    parts = {name: {kind: leaf[..., i * width : (i + 1) * width] for kind, leaf in layers["attn"]["qkv"].items()}
             for i, name in enumerate("qkv")}
    layers["attn"] = parts | {"out": layers["attn"]["out"]}
    raw = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in raw} | {
        "model_type": "qwen2", "vocab_size": arch.vocab, "hidden_size": arch.embed, "intermediate_size": arch.mlp,
        "num_hidden_layers": arch.layers, "num_attention_heads": arch.heads, "num_key_value_heads": arch.heads, "hidden_act": "silu",
        "max_position_embeddings": arch.max_positions, "rms_norm_eps": arch.norm_eps, "rope_theta": float(raw.get("rotary_emb_base", 1e4)),
        "initializer_range": arch.init_std, "tie_word_embeddings": arch.tied, "use_sliding_window": False,
    }
    return raw, params | {"backbone": params["backbone"] | {"layers": layers}}
