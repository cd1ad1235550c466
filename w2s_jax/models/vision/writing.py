"""Vision models out, in Hugging Face's format: config.json, preprocessor_config.json and safetensors."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax.errors import UserError
from w2s_jax.models.vision import names as names_lib
from w2s_jax.models.vision import preprocessing
from w2s_jax.models.vision.config import ResNet, VisionConfig, ViT
from w2s_jax.models.weights import paths
from w2s_jax.models.writing import Entry, arranged, write

CLASSES = {"hf_vit": "ViT", "hf_dinov2": "Dinov2", "hf_dinov2_with_registers": "Dinov2WithRegisters", "hf_resnet": "ResNet"}


def save(folder, params: dict, model, class_names: tuple[str, ...] = ()) -> None:
    """Write a vision transformer or a ResNet so that transformers loads it, with its head as ...ForImageClassification.

    `model`: the VisionModel of `params`. `class_names`: of its outputs, () = not told. Atomic: see models.writing.write. The logits
    are those of transformers' class for images of the size that the model was trained at; at others DINO's and DINOv2's own files
    have their position embeddings resized a little differently (by 0.1 patches) than transformers does.

    Raises:
      UserError: a model that transformers has no class for (AlexNet, CIFAR ResNets, ResNets of other widths), class names that do not
        fit.
    """
    if class_names and len(class_names) != model.classes:
        raise UserError(f"{len(class_names)} names of classes for {model.classes} outputs; expected as many")
    config, raw = _config(model.config)
    flat = paths(params)
    if isinstance(config.architecture, ViT):
        flat, config = _split(flat, config)
    prefix = names_lib.FORMATS[config.format][0] if model.head != "none" else ""
    names = names_lib.names(config, flat, prefix, head=model.head != "none")
    entries = arranged(flat, names, names_lib.order)
    extra: dict[str, np.ndarray] = {}
    if isinstance(config.architecture, ResNet):
        extra = {name.replace("running_mean", "num_batches_tracked"): np.zeros((), np.int64) for name in names.values()
                 if name.endswith(".running_mean")}
    elif config.architecture.wide and model.head == "new":
        # The published class's head reads the mean of the patches beside the class token: ours has no weights for it.
        kernel = np.asarray(jax.device_get(flat["head/kernel"])).T
        extra = {"classifier.weight": np.ascontiguousarray(np.concatenate([kernel, np.zeros_like(kernel)], axis=1))}
    if config.architecture.__class__ is ViT and config.format == "hf_dinov2_with_registers":
        extra[f"{prefix}embeddings.mask_token"] = np.zeros((1, config.embed), np.float32)  # its class has one always, for pretraining
    entries |= {name: Entry(array.nbytes, lambda array=array: array) for name, array in extra.items()}

    kind = CLASSES[config.format]
    raw |= {"architectures": [f"{kind}{'Model' if model.head == 'none' else 'ForImageClassification'}"], "num_channels": 3,
            "dtype": str(np.dtype(model.param_dtype)), "model_type": config.format.removeprefix("hf_")}
    if model.head != "none":
        told = class_names or tuple(f"LABEL_{i}" for i in range(model.classes))
        raw |= {"id2label": {str(i): name for i, name in enumerate(told)}, "label2id": {name: i for i, name in enumerate(told)}}
    as_json = lambda value: json.dumps(value, indent=2, sort_keys=True) + "\n"  # noqa: E731
    write(folder, entries, {"config.json": as_json(raw), preprocessing.FILE: as_json(preprocessing.write(config))})


def check(config: VisionConfig) -> None:
    """UserError where transformers has no class for such a model."""
    _config(config)


def _config(config: VisionConfig) -> tuple[VisionConfig, dict]:
    """The config of the same model as transformers has it, and its config.json."""
    arch = config.architecture
    if isinstance(arch, ResNet):
        usual = all(inner == (width // 4 if arch.bottleneck else width) for inner, width in zip(arch.inner, arch.widths))
        if arch.small or not usual:
            raise UserError(f"transformers has no class for this ResNet ({'CIFAR' if arch.small else f'inner widths {arch.inner}'}); "
                            "expected one of He et al.'s for ImageNet")
        raw = {"embedding_size": arch.stem, "hidden_sizes": list(arch.widths), "depths": list(arch.depths),
               "layer_type": "bottleneck" if arch.bottleneck else "basic", "hidden_act": arch.activation,
               "downsample_in_first_stage": arch.stride_first, "downsample_in_bottleneck": arch.stride_in_first}
        return replace(config, format="hf_resnet"), raw
    if not isinstance(arch, ViT):
        raise UserError(f"transformers has no class for {config.family}; expected a vision transformer or a ResNet")
    stack = arch.stack
    raw = {"hidden_size": stack.embed, "num_hidden_layers": stack.layers, "num_attention_heads": stack.heads, "qkv_bias": stack.qkv_bias,
           "hidden_act": stack.activation, "layer_norm_eps": stack.norm_eps, "initializer_range": stack.init_std,
           "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "image_size": config.image, "patch_size": arch.patch}
    if stack.layer_scale is None:
        return replace(config, format="hf_vit"), raw | {"intermediate_size": stack.mlp}
    raw |= {"layerscale_value": stack.layer_scale, "use_swiglu_ffn": stack.mlp_kind == "fused", "mlp_ratio": _ratio(stack),
            "drop_path_rate": 0.0}
    if arch.registers:
        return replace(config, format="hf_dinov2_with_registers"), raw | {"num_register_tokens": arch.registers}
    return replace(config, format="hf_dinov2"), raw | {"use_mask_token": False}


def _ratio(stack) -> int:
    """mlp_ratio, an integer, of which transformers makes the MLP's width."""
    for ratio in range(1, 65):
        width = stack.embed * ratio
        if stack.mlp == ((int(width * 2 / 3) + 7) // 8 * 8 if stack.mlp_kind == "fused" else width):
            return ratio
    raise UserError(f"an MLP of {stack.mlp} features for a width of {stack.embed}: transformers' Dinov2 has whole multiples only")


def _split(flat: dict, config: VisionConfig) -> tuple[dict, VisionConfig]:
    """Params and config with the fused projection in three, as transformers has it; the head's reading as its class's."""
    arch = config.architecture
    if arch.stack.qkv == "fused":
        out = {}
        for path, leaf in flat.items():
            if "/attn/qkv/" in path:
                out |= {path.replace("qkv", name): part for name, part in zip("qkv", jnp.split(leaf, 3, axis=-1))}
            else:
                out[path] = leaf
        flat = out
    wide = config.format.startswith("hf_dinov2")
    stack = replace(arch.stack, qkv="split")
    return flat, replace(config, architecture=replace(arch, stack=stack, wide=wide))
