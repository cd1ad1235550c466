"""GPT-2 (Radford et al. 2019): gpt2, -medium, -large, -xl."""

from w2s_jax.models.architecture import Architecture
from w2s_jax.models.families.family import Family
from w2s_jax.models.families.reader import Fields

NAMES = {
    "backbone/embed/tokens/embedding": "{p}wte.weight",
    "backbone/embed/positions/embedding": "{p}wpe.weight",
    "backbone/layers/norm1/scale": "{p}h.{i}.ln_1.weight",
    "backbone/layers/norm1/bias": "{p}h.{i}.ln_1.bias",
    "backbone/layers/attn/qkv/kernel": "{p}h.{i}.attn.c_attn.weight",
    "backbone/layers/attn/qkv/bias": "{p}h.{i}.attn.c_attn.bias",
    "backbone/layers/attn/out/kernel": "{p}h.{i}.attn.c_proj.weight",
    "backbone/layers/attn/out/bias": "{p}h.{i}.attn.c_proj.bias",
    "backbone/layers/norm2/scale": "{p}h.{i}.ln_2.weight",
    "backbone/layers/norm2/bias": "{p}h.{i}.ln_2.bias",
    "backbone/layers/mlp/up/kernel": "{p}h.{i}.mlp.c_fc.weight",
    "backbone/layers/mlp/up/bias": "{p}h.{i}.mlp.c_fc.bias",
    "backbone/layers/mlp/down/kernel": "{p}h.{i}.mlp.c_proj.weight",
    "backbone/layers/mlp/down/bias": "{p}h.{i}.mlp.c_proj.bias",
    "backbone/norm/scale": "{p}ln_f.weight",
    "backbone/norm/bias": "{p}ln_f.bias",
}


def read(f: Fields) -> Architecture:
    f.only(add_cross_attention=False, tie_word_embeddings=True)
    embed, positions = f.size("n_embd"), f.size("n_positions")
    heads, _, head_dim = f.heads(embed, "n_head")
    return Architecture(
        family="gpt2", vocab=f.size("vocab_size"), embed=embed, layers=f.size("n_layer"), heads=heads, kv_heads=heads, head_dim=head_dim,
        mlp=f.size("n_inner", 4 * embed), max_positions=positions, activation=f.activation("activation_function", "gelu_new"),
        norm_eps=f.number("layer_norm_epsilon", 1e-5), init_std=f.number("initializer_range", 0.02),
        attention_scale=head_dim**-0.5 if f.flag("scale_attn_weights", True) else 1.0,
        scale_by_layer=f.flag("scale_attn_by_inverse_layer_idx", False), qkv="fused", learned_positions=positions,
    )


# Tensors that are no parameters: the causal masks of older checkpoints, and the copy of wte that a tied head is.
FAMILY = Family("gpt2", read, NAMES, ("transformer.",), r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)|lm_head\.weight",
                ("GPT2ForSequenceClassification", "score.weight"), transposed=False)
