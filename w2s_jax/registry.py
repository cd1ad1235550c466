"""Defaults per model: what a config leaves open, LoRA's settings among it. Any other hub id and any folder works too, with the
last rule's values."""

from __future__ import annotations

import re

from ml_collections import ConfigDict

from w2s_jax import peft
from w2s_jax.config import LORA_ARGS
from w2s_jax.errors import UserError

# Stages whose mesh, microbatches and rematerialisation, where they are left open, follow from the memory there is (ladder.py).
BY_MEMORY = ("finetune", "pretrain", "label", "probe", "prompt", "export")

# Regex over a hub id -> defaults: the first rule that matches, and what it leaves out from the last one. Learning rates are for
# full fine-tuning with Adam at batch size 32: openai/weak-to-strong `train_simple.py` for its own models, else this project's
# choice in the range that the models' papers fine-tune with. lora_learning_rate is for train=lora: EleutherAI/w2s for its models.
RULES: tuple[tuple[str, dict], ...] = (
    # openai/weak-to-strong's ladder
    (r"(openai-community/)?gpt2(-medium)?", {"learning_rate": 5e-5}),
    (r"(openai-community/)?gpt2-(large|xl)|Qwen/Qwen-(1_8|7|14|72)B", {"learning_rate": 1e-5}),
    # EleutherAI/w2s: Qwen1.5-0.5B -> Meta-Llama-3-8B
    (r"Qwen/Qwen1\.5-0\.5B.*", {"learning_rate": 2e-5, "lora_learning_rate": 5e-4}),
    (r"meta-llama/(Meta-)?Llama-3.*-8B.*", {"learning_rate": 1e-5, "lora_learning_rate": 8e-5}),
    # the usual ladders
    (r"EleutherAI/pythia-(14m|31m|70m|160m|410m)(-deduped)?", {"learning_rate": 5e-5}),
    (r"EleutherAI/pythia-(1b|1\.4b|2\.8b|6\.9b|12b)(-deduped)?", {"learning_rate": 1e-5}),
    (r"Qwen/Qwen(1\.5|2|2\.5|3)-(0\.5|0\.6)B.*", {"learning_rate": 2e-5}),
    (r"Qwen/Qwen(1\.5|2|2\.5|3)-.*B.*|meta-llama/.*|mistralai/.*7B.*|allenai/OLMo-2-.*|google/gemma-.*|microsoft/[Pp]hi-.*",
     {"learning_rate": 1e-5}),
    # BERT and Google's miniatures (Turc et al. 2019 fine-tune with 3e-5 to 3e-4, the smaller with the larger)
    (r"(google/bert_uncased_L-\d+_H-128_A-2|prajjwal1/bert-tiny)", {"learning_rate": 3e-4}),
    (r"(google/bert_uncased_L-\d+_H-256_A-4|prajjwal1/bert-mini)", {"learning_rate": 2e-4}),
    (r"(google/bert_uncased_L-\d+_H-512_A-8|prajjwal1/bert-(small|medium))", {"learning_rate": 1e-4}),
    (r".*MiniLM.*", {"learning_rate": 1e-4}),
    (r"(google-bert/)?bert-large.*|(FacebookAI/)?roberta-large|answerdotai/ModernBERT-large", {"learning_rate": 1e-5}),
    (r"(google-bert/)?bert-base.*|google/bert_uncased.*|(FacebookAI/)?roberta-.*|answerdotai/ModernBERT-.*", {"learning_rate": 3e-5}),
    # everything else
    (r".*", {"learning_rate": 5e-5, "lora_learning_rate": 2e-4, "revision": "main"}),
)


def defaults(model: str) -> dict:
    """`learning_rate`, `lora_learning_rate` and `revision` for a hub id; a local folder, whatever its name, has those of the last
    rule."""
    return RULES[-1][1] | next(values for pattern, values in RULES if re.fullmatch(pattern, model))


def fill(config: ConfigDict) -> ConfigDict:
    """A copy of a stage's config in which what was left to the model is set; the config itself if nothing was, or it names no model.

    Left open are: learning_rate unset, revision "", mesh axes 0, and LoRA's settings under train=lora, which are then those of the
    adapter that it starts from (UserError where that cannot be read), or LORA_ARGS. Of a mesh that is partly set the other axes take
    what is left: `data` all devices (1 where another axis is -1), the others 1. A mesh of zeros and remat "auto" wait for the devices
    where they follow from memory; elsewhere they are one replica a device and none. A probe of a run waits for the run's model. A
    plan chooses mesh and remat itself.
    """
    if config.get("stage") == "probe" and config.get("run"):
        return config
    own, planned = defaults(config.get("model") or ""), config.get("stage") == "plan"
    if config.get("train") == "lora":
        own["learning_rate"] = own["lora_learning_rate"]
    changes: dict = {key: own[key] for key, open_ in (("learning_rate", None), ("revision", ""))
                     if key in config and config[key] == open_}
    mesh = dict(config.mesh) if "mesh" in config and "model" in config and not planned else {}
    by_memory = config.get("stage") in BY_MEMORY
    if config.get("remat") == "auto" and not by_memory and not planned:
        changes["remat"] = "none"
    if 0 in mesh.values() and not (by_memory and not any(mesh.values())):
        rest = {"data": 1 if -1 in mesh.values() else -1, "fsdp": 1, "model": 1}
        changes["mesh"] = {axis: size or rest[axis] for axis, size in mesh.items()}
    if config.get("train") == "lora" and None in config.lora.values():
        changes["lora"] = _lora(config.lora)
    if not changes:
        return config
    out = config.copy_and_resolve_references()
    with out.unlocked(), out.ignore_type():
        for key, value in changes.items():
            if key in ("mesh", "lora"):
                out[key].update(value)
            else:
                out[key] = value
    return out.lock()


def _lora(given: ConfigDict) -> dict:
    """All of LoRA's settings. UserError where the adapter that it starts from has another rank or other targets."""
    start = peft.read_config(given.init) if given.init else {}
    for key in ("rank", "targets"):
        if start and given[key] is not None and given[key] != start[key]:
            raise UserError(f"config.lora.{key}: {given[key]!r}, but the adapter in {given.init} has {start[key]!r}; leave it unset")
    return {key: start.get(key, default) if given[key] is None else given[key] for key, default in LORA_ARGS.items()}
