"""ModernBERT (Warner et al. 2024): an encoder with rotary positions, gated MLPs and windows in two layers of three."""

from w2s_jax.models.architecture import Architecture, Kind
from w2s_jax.models.families.family import Family
from w2s_jax.models.families.reader import FULL, SLIDING, Fields

_LAYER = {"norm1/scale": "attn_norm.weight", "norm1/bias": "attn_norm.bias", "attn/qkv/kernel": "attn.Wqkv.weight",
          "attn/qkv/bias": "attn.Wqkv.bias", "attn/out/kernel": "attn.Wo.weight", "attn/out/bias": "attn.Wo.bias",
          "norm2/scale": "mlp_norm.weight", "norm2/bias": "mlp_norm.bias", "mlp/gate_up/kernel": "mlp.Wi.weight",
          "mlp/gate_up/bias": "mlp.Wi.bias", "mlp/down/kernel": "mlp.Wo.weight", "mlp/down/bias": "mlp.Wo.bias"}
NAMES = {
    "backbone/embed/tokens/embedding": "{p}embeddings.tok_embeddings.weight",
    "backbone/embed/norm/scale": "{p}embeddings.norm.weight",
    "backbone/embed/norm/bias": "{p}embeddings.norm.bias",
    **{f"backbone/layers/{path}": f"{{p}}layers.{{i}}.{name}" for path, name in _LAYER.items()},
    "backbone/norm/scale": "{p}final_norm.weight",
    "backbone/norm/bias": "{p}final_norm.bias",
    "pooler/dense/kernel": "head.dense.weight",
    "pooler/dense/bias": "head.dense.bias",
    "pooler/norm/scale": "head.norm.weight",
    "pooler/norm/bias": "head.norm.bias",
}


def read(f: Fields) -> Architecture:
    embed, layers, positions = f.size("hidden_size"), f.size("num_hidden_layers"), f.size("max_position_embeddings")
    heads, _, head_dim = f.heads(embed)
    every = f.size("global_attn_every_n_layers", 3)
    types = f.layer_types(layers, lambda i: i % every != 0)
    far, positions = f.rope(head_dim, positions, theta_key="global_rope_theta", theta=160_000.0, layer_type=FULL)
    near, _ = f.rope(head_dim, positions, theta_key="local_rope_theta", layer_type=SLIDING)
    pooling = f.raw.get("classifier_pooling", "cls")
    if pooling not in ("cls", "mean"):
        raise f.error("classifier_pooling", "cls or mean")
    bias = f.flag("attention_bias", False)
    return Architecture(
        family="modernbert", vocab=f.size("vocab_size"), embed=embed, layers=layers, heads=heads, kv_heads=heads, head_dim=head_dim,
        mlp=f.size("intermediate_size"), max_positions=positions, activation=f.activation("hidden_activation", "gelu"),
        norm_eps=f.number("norm_eps", 1e-5), init_std=f.number("initializer_range", 0.02), attention_scale=head_dim**-0.5, causal=False,
        norm_bias=f.flag("norm_bias", False), first_norm=False, qkv="fused", qkv_bias=bias, out_bias=bias, mlp_kind="fused",
        mlp_bias=f.flag("mlp_bias", False), embed_norm=True, kinds=(Kind(None, far), Kind(f.size("local_attention", 128) // 2, near)),
        kind_of=tuple(int(t == SLIDING) for t in types), readout="first" if pooling == "cls" else "mean", pooler="loaded",
        pooler_activation=f.activation("classifier_activation", "gelu"), pooler_bias=f.flag("classifier_bias", False), pooler_norm=True,
    )


# decoder.*: the masked language model's output. Layer 0 has no attn_norm.
FAMILY = Family("modernbert", read, NAMES, ("model.",), r"decoder\.(weight|bias)|head\..*",
                ("ModernBertForSequenceClassification", "classifier.weight"))
