"""GPT-2: reader and writer of config.json, and the names of the tensors in a checkpoint."""

import re

from w2s_jax.errors import UserError, nearest
from w2s_jax.models.decoder import ACTIVATIONS, DecoderConfig

MODEL_TYPE = "gpt2"

# Path of a parameter under "backbone/" -> name of the tensor; {} = index of the layer. Both sides keep [inputs, outputs].
NAMES = {
    "embed/tokens/embedding": "wte.weight",
    "embed/positions/embedding": "wpe.weight",
    "layers/norm1/scale": "h.{}.ln_1.weight",
    "layers/norm1/bias": "h.{}.ln_1.bias",
    "layers/attn/qkv/kernel": "h.{}.attn.c_attn.weight",
    "layers/attn/qkv/bias": "h.{}.attn.c_attn.bias",
    "layers/attn/out/kernel": "h.{}.attn.c_proj.weight",
    "layers/attn/out/bias": "h.{}.attn.c_proj.bias",
    "layers/norm2/scale": "h.{}.ln_2.weight",
    "layers/norm2/bias": "h.{}.ln_2.bias",
    "layers/mlp/up/kernel": "h.{}.mlp.c_fc.weight",
    "layers/mlp/up/bias": "h.{}.mlp.c_fc.bias",
    "layers/mlp/down/kernel": "h.{}.mlp.c_proj.weight",
    "layers/mlp/down/bias": "h.{}.mlp.c_proj.bias",
    "norm/scale": "ln_f.weight",
    "norm/bias": "ln_f.bias",
}
PREFIX = "transformer."  # of every name in a checkpoint saved with a head; absent in the bare model's
# Tensors that are no parameters: the causal masks of older checkpoints, and the copy of wte that a tied head is.
NOT_PARAMETERS = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)|lm_head\.weight")


def read(raw: dict, file: str) -> DecoderConfig:
    """`raw`: the parsed config.json, `file` names it in errors. UserError on what is absent or not supported."""

    def get(key: str, kind):
        if key not in raw:
            raise UserError(f"{file}: key {key!r} is missing; GPT-2 needs it")
        value = raw[key]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (kind is not bool and kind is not str and not value > 0):
            raise UserError(f"{file}: {key}={raw[key]!r} is not a {'positive ' * (kind in (int, float))}{kind.__name__}")
        return value

    # GPT2Config leaves these out where they have these values, in checkpoints older than the key.
    raw = {"n_inner": None, "activation_function": "gelu_new", "scale_attn_weights": True,
           "scale_attn_by_inverse_layer_idx": False, "initializer_range": 0.02, "layer_norm_epsilon": 1e-5} | raw
    for key, only in (("add_cross_attention", False), ("tie_word_embeddings", True)):
        if raw.get(key, only) != only:
            raise UserError(f"{file}: {key}={raw[key]!r} is not supported; expected {only}")
    embed, heads = get("n_embd", int), get("n_head", int)
    if embed % heads:
        raise UserError(f"{file}: n_embd={embed} is not a multiple of n_head={heads}")
    activation = get("activation_function", str)
    if activation not in ACTIVATIONS:
        raise UserError(f"{file}: activation_function={activation!r} is not supported{nearest(activation, ACTIVATIONS)}; "
                        f"expected one of {', '.join(ACTIVATIONS)}")
    return DecoderConfig(
        family=MODEL_TYPE, vocab=get("vocab_size", int), embed=embed, layers=get("n_layer", int), heads=heads,
        mlp=4 * embed if raw["n_inner"] is None else get("n_inner", int), max_positions=get("n_positions", int),
        activation=activation, norm_eps=get("layer_norm_epsilon", float), scale_attention=get("scale_attn_weights", bool),
        scale_by_layer=get("scale_attn_by_inverse_layer_idx", bool), tied=True, init_std=get("initializer_range", float),
    )


def write(config: DecoderConfig) -> dict:
    """The config.json that `read` turns into `config`, and that transformers reads."""
    return {
        "model_type": MODEL_TYPE, "architectures": ["GPT2LMHeadModel"], "vocab_size": config.vocab, "n_embd": config.embed,
        "n_layer": config.layers, "n_head": config.heads, "n_inner": config.mlp, "n_positions": config.max_positions,
        "activation_function": config.activation, "layer_norm_epsilon": config.norm_eps,
        "scale_attn_weights": config.scale_attention, "scale_attn_by_inverse_layer_idx": config.scale_by_layer,
        "tie_word_embeddings": config.tied, "initializer_range": config.init_std,
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None,
    }
