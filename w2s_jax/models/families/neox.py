"""GPT-NeoX (Black et al. 2022), of which Pythia (Biderman et al. 2023) is: EleutherAI/pythia-70m to -12b, any training
step of theirs as `revision` (step0 to step143000)."""

from w2s_jax.models.architecture import Architecture, Kind
from w2s_jax.models.families.family import Family
from w2s_jax.models.families.reader import Fields

NAMES = {
    "backbone/embed/tokens/embedding": "{p}embed_in.weight",
    "backbone/layers/norm1/scale": "{p}layers.{i}.input_layernorm.weight",
    "backbone/layers/norm1/bias": "{p}layers.{i}.input_layernorm.bias",
    "backbone/layers/attn/qkv/kernel": "{p}layers.{i}.attention.query_key_value.weight",
    "backbone/layers/attn/qkv/bias": "{p}layers.{i}.attention.query_key_value.bias",
    "backbone/layers/attn/out/kernel": "{p}layers.{i}.attention.dense.weight",
    "backbone/layers/attn/out/bias": "{p}layers.{i}.attention.dense.bias",
    "backbone/layers/norm2/scale": "{p}layers.{i}.post_attention_layernorm.weight",
    "backbone/layers/norm2/bias": "{p}layers.{i}.post_attention_layernorm.bias",
    "backbone/layers/mlp/up/kernel": "{p}layers.{i}.mlp.dense_h_to_4h.weight",
    "backbone/layers/mlp/up/bias": "{p}layers.{i}.mlp.dense_h_to_4h.bias",
    "backbone/layers/mlp/down/kernel": "{p}layers.{i}.mlp.dense_4h_to_h.weight",
    "backbone/layers/mlp/down/bias": "{p}layers.{i}.mlp.dense_4h_to_h.bias",
    "backbone/norm/scale": "{p}final_layer_norm.weight",
    "backbone/norm/bias": "{p}final_layer_norm.bias",
    "lm_head/kernel": "embed_out.weight",
}


def read(f: Fields) -> Architecture:
    embed, positions = f.size("hidden_size"), f.size("max_position_embeddings")
    heads, _, head_dim = f.heads(embed)
    rope, positions = f.rope(head_dim, positions, theta_key="rotary_emb_base", share=f.number("rotary_pct", 0.25))
    bias = f.flag("attention_bias", True)
    return Architecture(
        family="gpt_neox", vocab=f.size("vocab_size"), embed=embed, layers=f.size("num_hidden_layers"), heads=heads, kv_heads=heads,
        head_dim=head_dim, mlp=f.size("intermediate_size"), max_positions=positions, activation=f.activation("hidden_act", "gelu"),
        norm_eps=f.number("layer_norm_eps", 1e-5), init_std=f.number("initializer_range", 0.02), attention_scale=head_dim**-0.5,
        tied=f.flag("tie_word_embeddings", False), residual="parallel" if f.flag("use_parallel_residual", True) else "pre",
        qkv="interleaved", qkv_bias=bias, out_bias=bias, kinds=(Kind(rope=rope),),
    )


FAMILY = Family("gpt_neox", read, NAMES, ("gpt_neox.",), r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)|embed_out\.weight",
                ("GPTNeoXForSequenceClassification", "score.weight"))
