"""PEFT's adapter_config.json: the LoRA settings that it holds, and how they are written.

The tensors beside it (adapter_model.safetensors) are read and written by `w2s_jax.models.lora`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from w2s_jax.errors import UserError
from w2s_jax.files import read_json

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# Keys that change nothing here, whatever they hold.
NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "fan_in_fan_out", "inference_mode", "init_lora_weights", "lora_alpha",
    "lora_dropout", "loftq_config", "megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size",
    "r", "revision", "runtime_config", "target_modules", "task_type", "use_rslora", "corda_config", "lora_ga_config", "ensure_weight_tying",
}  # fmt: skip


def read_config(folder) -> dict:
    """`rank, alpha, dropout, targets, rslora` of a PEFT folder, and `modules_to_save`, a tuple.

    `targets` is a regex over whole module names, or comma-separated ends of them, or "all-linear", as PEFT's target_modules.

    Raises:
      UserError: no such file, another kind of adapter than plain LoRA, or a setting that plain LoRA does not have.
    """
    file = Path(folder).expanduser() / CONFIG
    if not file.is_file():
        raise UserError(f"lora.init={str(folder)!r}: has no {CONFIG}; expected a folder in PEFT's format")
    raw = read_json(file)
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type={raw.get('peft_type')!r}, expected LORA")
    for key, value in raw.items():
        if key not in NEUTRAL and value not in (None, False, "none", "") and value != {} and value != []:
            raise UserError(f"{file}: {key}={value!r} is not supported: plain LoRA, the same in every layer, is")
    targets = raw.get("target_modules")
    if isinstance(targets, list) and targets and all(isinstance(t, str) and t for t in targets):
        targets = ",".join(sorted(targets))
    rank, alpha, dropout = raw.get("r"), raw.get("lora_alpha"), raw.get("lora_dropout", 0.0)
    known = (("r", type(rank) is int and rank > 0), ("lora_alpha", type(alpha) in (int, float) and alpha > 0),
             ("lora_dropout", type(dropout) in (int, float) and 0 <= dropout < 1), ("target_modules", isinstance(targets, str) and targets))
    for key, fits in known:
        if not fits:
            raise UserError(f"{file}: {key}={raw.get(key)!r} is not what PEFT writes there")
    return {"rank": rank, "alpha": float(alpha), "dropout": float(dropout), "targets": targets, "rslora": bool(raw.get("use_rslora")),
            "modules_to_save": tuple(raw.get("modules_to_save") or ())}


def config_json(lora: dict, base: str, revision: str, module: str, stored_inputs_first: bool) -> dict:
    """What stands in adapter_config.json.

    Args:
      lora: rank, alpha, dropout, targets, rslora; targets as PEFT has them: a list of names, or a regex.
      base: the model that the adapter was trained on.
      module: name of the classification head's module, saved whole.
      stored_inputs_first: whether the base's matrices are [inputs, outputs] (GPT-2's Conv1D).
    """
    return {
        "peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": base, "revision": revision or None, "r": lora["rank"],
        "lora_alpha": lora["alpha"], "lora_dropout": lora["dropout"], "target_modules": lora["targets"], "use_rslora": lora["rslora"],
        "bias": "none", "modules_to_save": [module], "fan_in_fan_out": stored_inputs_first, "inference_mode": True,
        "init_lora_weights": True, "layers_to_transform": None, "layers_pattern": None, "rank_pattern": {}, "alpha_pattern": {},
    }


def fingerprint(folder) -> str:
    """sha256 (hex) of an adapter's two files."""
    digest = hashlib.sha256()
    for name in (CONFIG, TENSORS):
        file = Path(folder).expanduser() / name
        if not file.is_file():
            raise UserError(f"lora.init={str(folder)!r}: has no {name}; expected a folder in PEFT's format")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
