"""Tiny random PyTorch models of every family, with deliberately odd settings, as transformers saves them."""

import functools
import json

import numpy as np

VOCAB, POSITIONS = 97, 24
LLAMA = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 44, "max_position_embeddings": POSITIONS, "head_dim": 12, "rms_norm_eps": 1e-3, "pad_token_id": None,
         "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": POSITIONS, "bos_token_id": 0, "eos_token_id": 0}
NEOX = {k: v for k, v in LLAMA.items() if k not in ("head_dim", "num_key_value_heads", "rms_norm_eps")} | {"layer_norm_eps": 1e-3}
BERT = {k: v for k, v in NEOX.items() if k not in ("bos_token_id", "eos_token_id")} | {"pad_token_id": 3}
ROPE = {"rope_theta": 700.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 12}
YARN = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 8, "beta_fast": 20.0, "beta_slow": 1.5}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.3, 2.0, 2.5], "long_factor": [4.0] * 4, "original_max_position_embeddings": 24}
GEMMA3_ROPE = {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 900.0},
               "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}

# case -> (prefix of transformers' classes, arguments of its config)
CASES = {
    "gpt2": ("GPT2", GPT2),
    "gpt2 odd": ("GPT2", GPT2 | {"n_inner": 40, "scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu",
                                 "layer_norm_epsilon": 1e-3}),
    "gpt2 unscaled": ("GPT2", GPT2 | {"scale_attn_weights": False, "activation_function": "relu", "n_inner": 100}),
    "gpt_neox": ("GPTNeoX", NEOX | {"rope_parameters": ROPE | {"partial_rotary_factor": 0.25}}),
    "gpt_neox sequential": ("GPTNeoX", NEOX | {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_new",
                                               "tie_word_embeddings": True, "rope_parameters": {"partial_rotary_factor": 1.0}}),
    "llama": ("Llama", LLAMA | {"rope_parameters": ROPE}),
    "llama biased": ("Llama", LLAMA | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4, "hidden_act": "quick_gelu"}),
    "llama llama3": ("Llama", LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 1, "rope_parameters": ROPE | LLAMA3}),
    "llama linear": ("Llama", LLAMA | {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.5}}),
    "llama yarn": ("Llama", LLAMA | {"rope_parameters": ROPE | YARN}),
    "llama dynamic": ("Llama", LLAMA | {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}}),
    "mistral": ("Mistral", LLAMA | {"sliding_window": 5}),
    "mistral full": ("Mistral", LLAMA | {"sliding_window": None, "rope_parameters": ROPE}),
    "qwen2": ("Qwen2", {k: v for k, v in LLAMA.items() if k != "head_dim"} | {"rope_parameters": ROPE}),
    "qwen2 windows": ("Qwen2", {k: v for k, v in LLAMA.items() if k != "head_dim"} | {
        "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", LLAMA | {"rope_parameters": ROPE, "tie_word_embeddings": True}),
    "qwen3 biased": ("Qwen3", LLAMA | {"attention_bias": True, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}),
    "gemma": ("Gemma", LLAMA | {"rope_parameters": ROPE}),
    "gemma biased": ("Gemma", LLAMA | {"hidden_act": "quick_gelu", "attention_bias": True, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2", LLAMA | {"sliding_window": 6, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0,
                                  "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3Text", LLAMA | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                                      "query_pre_attn_scalar": 10, "rope_parameters": GEMMA3_ROPE}),
    "olmo2": ("Olmo2", {k: v for k, v in LLAMA.items() if k != "head_dim"} | {"rope_parameters": ROPE}),
    "olmo2 biased": ("Olmo2", {k: v for k, v in LLAMA.items() if k != "head_dim"} | {"attention_bias": True, "tie_word_embeddings": True}),
    "phi3": ("Phi3", LLAMA | {"sliding_window": 5, "rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}),
    "phi3 longrope": ("Phi3", {k: v for k, v in LLAMA.items() if k != "head_dim"} | {
        "max_position_embeddings": 48, "original_max_position_embeddings": 24, "rope_parameters": ROPE | LONGROPE}),
    "bert": ("Bert", BERT | {"hidden_act": "gelu", "type_vocab_size": 2}),
    "bert relu": ("Bert", BERT | {"hidden_act": "relu", "type_vocab_size": 1, "num_hidden_layers": 2}),
    "roberta": ("Roberta", BERT | {"max_position_embeddings": POSITIONS + 4, "type_vocab_size": 1}),
    "modernbert": ("ModernBert", {k: v for k, v in BERT.items() if k != "layer_norm_eps"} | {
        "num_hidden_layers": 4, "local_attention": 8, "global_attn_every_n_layers": 2, "norm_eps": 1e-3}),
    "modernbert mean": ("ModernBert", {k: v for k, v in BERT.items() if k != "layer_norm_eps"} | {
        "local_attention": 4, "norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True,
        "classifier_pooling": "mean", "classifier_activation": "relu", "hidden_activation": "silu"}),
    "qwen1": ("Qwen2", {k: v for k, v in LLAMA.items() if k not in ("head_dim",)} | {"num_key_value_heads": 4, "rope_parameters": ROPE}),
}
ENCODERS = ("bert", "roberta", "modernbert")


def is_encoder(case: str) -> bool:
    return case.split()[0] in ENCODERS


def config(case: str):
    """transformers' config of a case."""
    import transformers

    prefix, arguments = CASES[case]
    made = getattr(transformers, f"{prefix}Config")(**arguments)
    made._attn_implementation = "eager"
    return made


def shake(net, seed: int = 0, by: float = 0.15):
    """Every parameter random, biases and norms too."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(by * torch.randn(p.shape))
    return net.eval()


@functools.cache
def network(case: str, kind: str):
    """The PyTorch model of a case: kind = lm (causal language model) | classifier (sequence classification, 2 labels)."""
    import torch
    import transformers

    torch.manual_seed(0)
    made, prefix = config(case), CASES[case][0]
    if kind == "lm":
        names = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}
        return shake(getattr(transformers, names.get(prefix, f"{prefix}ForCausalLM"))(made))
    made.num_labels = 2
    net = shake(getattr(transformers, f"{prefix}ForSequenceClassification")(made))
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name in ("classifier.bias", "classifier.out_proj.bias"):  # ours has none
                p.zero_()
    return net


def to_qwen1(folder) -> None:
    """Turn a saved Qwen2 into Qwen's first version: its config.json, its names, its fused projections."""
    from safetensors.numpy import load_file, save_file

    raw, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    layers, out = raw["num_hidden_layers"], {}
    for i in range(layers):
        a, b = f"model.layers.{i}.", f"transformer.h.{i}."
        for end in ("weight", "bias"):
            out[f"{b}attn.c_attn.{end}"] = np.concatenate([tensors[f"{a}self_attn.{x}_proj.{end}"] for x in "qkv"])
        for new, old in (("attn.c_proj", "self_attn.o_proj"), ("mlp.w1", "mlp.up_proj"), ("mlp.w2", "mlp.gate_proj"),
                         ("mlp.c_proj", "mlp.down_proj"), ("ln_1", "input_layernorm"), ("ln_2", "post_attention_layernorm")):
            out[f"{b}{new}.weight"] = tensors[f"{a}{old}.weight"]
    out |= {"transformer.wte.weight": tensors["model.embed_tokens.weight"], "transformer.ln_f.weight": tensors["model.norm.weight"],
            "lm_head.weight": tensors["lm_head.weight"]}
    save_file(out, folder / "model.safetensors")
    heads = raw["num_attention_heads"]
    (folder / "config.json").write_text(json.dumps({  # the keys of Qwen/Qwen-1_8B's
        "architectures": ["QWenLMHeadModel"], "attn_dropout_prob": 0.0, "bf16": False, "emb_dropout_prob": 0.0, "eos_token_id": 2,
        "fp16": False, "fp32": False,
        "hidden_size": raw["hidden_size"], "intermediate_size": 2 * raw["intermediate_size"], "initializer_range": 0.02,
        "kv_channels": raw["hidden_size"] // heads, "layer_norm_epsilon": raw["rms_norm_eps"],
        "max_position_embeddings": raw["max_position_embeddings"], "model_type": "qwen", "no_bias": True, "num_attention_heads": heads,
        "num_hidden_layers": layers, "onnx_safe": None, "rotary_emb_base": 700, "rotary_pct": 1.0, "scale_attn_weights": True,
        "seq_length": raw["max_position_embeddings"], "tie_word_embeddings": False, "use_cache": True, "use_dynamic_ntk": True,
        "use_flash_attn": "auto", "use_logn_attn": True, "vocab_size": raw["vocab_size"]}))


def save(case: str, kind: str, folder, net=None):
    """`network` (or `net`) in Hugging Face's format under `folder`; the tensors of the classification head are taken out."""
    from safetensors.numpy import load_file, save_file

    net = network(case, kind) if net is None else net
    net.save_pretrained(folder)
    if kind == "classifier":
        file = folder / "model.safetensors"
        tensors = load_file(file)
        save_file({k: v for k, v in tensors.items() if not k.startswith(("score.", "classifier."))}, file)
    if case == "qwen1":
        to_qwen1(folder)
    return net
