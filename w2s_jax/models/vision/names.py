"""Whose names the tensors have: path of a parameter -> name of its tensor, for each format of a checkpoint."""

import re

from w2s_jax.models.vision.config import ResNet, VisionConfig, ViT

_BOTH = (("kernel", "weight"), ("bias", "bias"))
_NORM = (("scale", "weight"), ("bias", "bias"))
_BATCH_NORM = (*_NORM, ("mean", "running_mean"), ("variance", "running_var"))

# Of the transformers. {i}: index of the layer, {p}: prefix of a checkpoint saved with a head. Kinds of leaf: see `transformer`.
_DINO = {
    "embed/patches": "patch_embed.proj", "embed/class_token": "cls_token", "embed/registers": "register_tokens",
    "embed/positions": "pos_embed", "layers/norm1": "blocks.{i}.norm1", "layers/norm2": "blocks.{i}.norm2",
    "layers/attn/qkv": "blocks.{i}.attn.qkv", "layers/attn/out": "blocks.{i}.attn.proj", "layers/mlp/up": "blocks.{i}.mlp.fc1",
    "layers/mlp/down": "blocks.{i}.mlp.fc2", "layers/mlp/gate_up": "blocks.{i}.mlp.w12", "layers/scale1": "blocks.{i}.ls1.gamma",
    "layers/scale2": "blocks.{i}.ls2.gamma", "norm": "norm", "head": "head",
}
_HF = {
    "embed/patches": "{p}embeddings.patch_embeddings.projection", "embed/class_token": "{p}embeddings.cls_token",
    "embed/registers": "{p}embeddings.register_tokens", "embed/positions": "{p}embeddings.position_embeddings",
    "layers/attn/q": "{p}encoder.layer.{i}.attention.attention.query", "layers/attn/k": "{p}encoder.layer.{i}.attention.attention.key",
    "layers/attn/v": "{p}encoder.layer.{i}.attention.attention.value", "layers/attn/out": "{p}encoder.layer.{i}.attention.output.dense",
    "norm": "{p}layernorm", "head": "classifier",
}
_HF_VIT = _HF | {
    "layers/norm1": "{p}encoder.layer.{i}.layernorm_before", "layers/norm2": "{p}encoder.layer.{i}.layernorm_after",
    "layers/mlp/up": "{p}encoder.layer.{i}.intermediate.dense", "layers/mlp/down": "{p}encoder.layer.{i}.output.dense",
}
_HF_DINOV2 = _HF | {
    "layers/norm1": "{p}encoder.layer.{i}.norm1", "layers/norm2": "{p}encoder.layer.{i}.norm2",
    "layers/mlp/up": "{p}encoder.layer.{i}.mlp.fc1", "layers/mlp/down": "{p}encoder.layer.{i}.mlp.fc2",
    "layers/mlp/gate_up": "{p}encoder.layer.{i}.mlp.weights_in", "layers/scale1": "{p}encoder.layer.{i}.layer_scale1.lambda1",
    "layers/scale2": "{p}encoder.layer.{i}.layer_scale2.lambda1",
}

# format -> (prefix with a head, tensors that are no parameters, module of the head)
FORMATS = {
    "alexnet": ("", r"(?!)", "classifier"),  # torchvision
    "resnet": ("", r".*\.num_batches_tracked", "fc"),  # torchvision, and DINO's without a head
    "cifar": ("", r".*\.num_batches_tracked", "linear"),  # akamaster/pytorch_resnet_cifar10
    "dino": ("", r"mask_token", "head"),  # facebookresearch/dino; with a head: facebookresearch/deit
    "dinov2": ("", r"mask_token", "head"),  # facebookresearch/dinov2
    "hf_vit": ("vit.", r"(vit\.)?(embeddings\.mask_token|pooler\..*)", "classifier"),
    "hf_dinov2": ("dinov2.", r"(dinov2\.)?embeddings\.mask_token", "classifier"),
    "hf_dinov2_with_registers": ("dinov2_with_registers.", r"(dinov2_with_registers\.)?embeddings\.mask_token", "classifier"),
    "hf_resnet": ("resnet.", r".*\.num_batches_tracked", "classifier"),
}


def order(path: str) -> tuple[int, ...] | None:
    """For each axis of a parameter (of one layer) that of torch's tensor: [out, in] and [out, in, height, width] there."""
    if not path.endswith("/kernel"):
        return None
    return (2, 3, 1, 0) if re.search(r"(conv\d?|patches)/kernel$", path) else (1, 0)


def names(config: VisionConfig, flat: dict, prefix: str, head: bool) -> dict[str, list[str] | str]:
    """Path -> name, or the list of the layers' names, of the parameters `flat` (path -> anything); the head's only where `head`."""
    if isinstance(config.architecture, ViT):
        table = _transformer(config, prefix)
    elif isinstance(config.architecture, ResNet):
        table = _hf_resnet(config.architecture, prefix) if config.format == "hf_resnet" else _resnet(config)
    else:
        table = _alexnet()
    found = {path: table[path] for path in flat if path in table and (head or not path.startswith("head/"))}
    if unknown := [path for path in flat if path not in table and not path.startswith("head/")]:
        raise ValueError(f"{config.format}: parameters without a name in the checkpoint: {sorted(unknown)}")
    return found


def _leaves(path: str, name: str, kinds=_BOTH) -> dict[str, str]:
    return {f"{path}/{kind}": f"{name}.{end}" for kind, end in kinds}


def _transformer(config: VisionConfig, prefix: str) -> dict:
    table = {"dino": _DINO, "dinov2": _DINO, "hf_vit": _HF_VIT}.get(config.format, _HF_DINOV2)
    stack, out = config.architecture.stack, {}
    if stack.mlp_kind == "fused":
        down = "blocks.{i}.mlp.w3" if table is _DINO else "{p}encoder.layer.{i}.mlp.weights_out"
        table = table | {"layers/mlp/down": down}
    for path, name in table.items():
        where = path if path == "head" else f"backbone/{path}"
        if path.rsplit("/", 1)[-1] in ("class_token", "registers", "positions"):
            leaves = {where: name}
        elif "scale" in path:
            leaves = {f"{where}/scale": name}
        else:
            leaves = _leaves(where, name, _NORM if "norm" in path else _BOTH)
        for leaf, tensor in leaves.items():
            stacked = "{i}" in tensor
            out[leaf] = [tensor.format(p=prefix, i=i) for i in range(stack.layers)] if stacked else tensor.format(p=prefix)
    return out


def _blocks(arch: ResNet):
    """(path of a block, its stage from 0, its number, its convolutions)."""
    for s, depth in enumerate(arch.depths):
        for b in range(depth):
            yield f"backbone/stage{s + 1}/block{b}", s, b, 3 if arch.bottleneck else 2


def _resnet(config: VisionConfig) -> dict[str, str]:
    out = {"backbone/stem/conv/kernel": "conv1.weight"} | _leaves("backbone/stem/norm", "bn1", _BATCH_NORM)
    for path, s, b, convolutions in _blocks(config.architecture):
        name = f"layer{s + 1}.{b}"
        for c in range(1, convolutions + 1):
            out |= {f"{path}/conv{c}/kernel": f"{name}.conv{c}.weight"} | _leaves(f"{path}/norm{c}", f"{name}.bn{c}", _BATCH_NORM)
        out |= {f"{path}/shortcut/conv/kernel": f"{name}.downsample.0.weight"}
        out |= _leaves(f"{path}/shortcut/norm", f"{name}.downsample.1", _BATCH_NORM)
    return out | _leaves("head", FORMATS[config.format][2])


def _hf_resnet(arch: ResNet, prefix: str) -> dict[str, str]:
    def layer(conv, norm, name):
        return {f"{conv}/kernel": f"{prefix}{name}.convolution.weight"} | _leaves(norm, f"{prefix}{name}.normalization", _BATCH_NORM)

    out = layer("backbone/stem/conv", "backbone/stem/norm", "embedder.embedder")
    for path, s, b, convolutions in _blocks(arch):
        name = f"encoder.stages.{s}.layers.{b}"
        for c in range(1, convolutions + 1):
            out |= layer(f"{path}/conv{c}", f"{path}/norm{c}", f"{name}.layer.{c - 1}")
        out |= layer(f"{path}/shortcut/conv", f"{path}/shortcut/norm", f"{name}.shortcut")
    return out | _leaves("head", "classifier.1")


def _alexnet() -> dict[str, str]:
    out = {}
    for i, place in enumerate((0, 3, 6, 8, 10), 1):
        out |= _leaves(f"backbone/conv{i}", f"features.{place}")
    for path, place in (("head/dense1", 1), ("head/dense2", 4), ("head", 6)):
        out |= _leaves(path, f"classifier.{place}")
    return out
