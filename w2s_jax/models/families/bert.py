"""BERT (Devlin et al. 2019), with Google's miniatures (Turc et al. 2019), and RoBERTa (Liu et al. 2019): encoders with norms
after the residual sums, learned positions, and a classifier that reads the first token through a tanh layer."""

from w2s_jax.models.architecture import Architecture
from w2s_jax.models.families.family import Family
from w2s_jax.models.families.reader import Fields


def _weights(path: str, name: str, ends=(("kernel", "weight"), ("bias", "bias"))) -> dict[str, str]:
    return {f"{path}/{kind}": f"{name}.{end}" for kind, end in ends}


_NORM = (("scale", "weight"), ("bias", "bias"))
NAMES = {
    "backbone/embed/tokens/embedding": "{p}embeddings.word_embeddings.weight",
    "backbone/embed/positions/embedding": "{p}embeddings.position_embeddings.weight",
    "backbone/embed/types/embedding": "{p}embeddings.token_type_embeddings.weight",
    **_weights("backbone/embed/norm", "{p}embeddings.LayerNorm", _NORM),
    **_weights("backbone/layers/attn/q", "{p}encoder.layer.{i}.attention.self.query"),
    **_weights("backbone/layers/attn/k", "{p}encoder.layer.{i}.attention.self.key"),
    **_weights("backbone/layers/attn/v", "{p}encoder.layer.{i}.attention.self.value"),
    **_weights("backbone/layers/attn/out", "{p}encoder.layer.{i}.attention.output.dense"),
    **_weights("backbone/layers/post1", "{p}encoder.layer.{i}.attention.output.LayerNorm", _NORM),
    **_weights("backbone/layers/mlp/up", "{p}encoder.layer.{i}.intermediate.dense"),
    **_weights("backbone/layers/mlp/down", "{p}encoder.layer.{i}.output.dense"),
    **_weights("backbone/layers/post2", "{p}encoder.layer.{i}.output.LayerNorm", _NORM),
}
POOLER = _weights("pooler/dense", "{p}pooler.dense")


def _read(f: Fields, family: str, offset: int, pooler: str) -> Architecture:
    f.only(position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    embed, positions = f.size("hidden_size"), f.size("max_position_embeddings")
    heads, _, head_dim = f.heads(embed)
    if positions <= offset:
        raise f.error("max_position_embeddings", f"more than {offset}")
    return Architecture(
        family=family, vocab=f.size("vocab_size"), embed=embed, layers=f.size("num_hidden_layers"), heads=heads, kv_heads=heads,
        head_dim=head_dim, mlp=f.size("intermediate_size"), max_positions=positions - offset,
        activation=f.activation("hidden_act", "gelu"), norm_eps=f.number("layer_norm_eps", 1e-12),
        init_std=f.number("initializer_range", 0.02), attention_scale=head_dim**-0.5, causal=False, residual="post", final_norm=False,
        learned_positions=positions, position_offset=offset, types=f.size("type_vocab_size"), embed_norm=True, readout="first",
        pooler=pooler,
    )


def read_bert(f: Fields) -> Architecture:
    return _read(f, "bert", 0, "loaded")


def read_roberta(f: Fields) -> Architecture:
    # Positions are counted from the row after the padding's; the classifier's tanh layer is not pretrained.
    return _read(f, "roberta", f.raw.get("pad_token_id", 1) + 1, "fresh")


_IGNORED = r"(.*\.)?embeddings\.position_ids|cls\..*|lm_head\..*|(.*\.)?pooler\..*"
FAMILIES = (
    Family("bert", read_bert, NAMES | POOLER, ("bert.",), _IGNORED, ("BertForSequenceClassification", "classifier.weight"),
           renamed=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))),
    Family("roberta", read_roberta, NAMES, ("roberta.",), _IGNORED, ("RobertaForSequenceClassification", "classifier.out_proj.weight"),
           renamed=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))),
)
