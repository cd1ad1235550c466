"""Qwen, version 1 (Bai et al. 2023): Qwen/Qwen-1_8B to -72B, the ladder of openai/weak-to-strong.

The hub has its code only as remote code, which is never run. Its arithmetic is Qwen2's: fused projections (c_attn), w2 the
gate and w1 the other half of the MLP, whose `intermediate_size` counts both halves. Beyond `seq_length` tokens, where it
would scale rotary base (dynamic NTK) and queries (log n) with the text, no document is taken.
"""

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


# transformers has no class of its own for version 1: an export is a backbone beside its score.
FAMILY = Family("qwen", read, NAMES, ("transformer.",), r".*\.rotary_emb\.inv_freq|.*\.attn\.masked_bias|lm_head\.weight", ("", ""))
