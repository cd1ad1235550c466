"""What a checkpoint is: Hugging Face's config.json, or the names and shapes of the tensors of a single file."""

import math
import re
from pathlib import Path

from w2s_jax.errors import UserError
from w2s_jax.models.architecture import Architecture
from w2s_jax.models.families import read_raw
from w2s_jax.models.families.reader import Fields
from w2s_jax.models.vision import preprocessing
from w2s_jax.models.vision.config import AlexNet, ResNet, VisionConfig, ViT
from w2s_jax.models.vision.names import FORMATS
from w2s_jax.models.weights import Checkpoint

MODEL_TYPES = ("vit", "resnet", "dinov2", "dinov2_with_registers")
HEAD_DIM = 64  # of DINO's and DINOv2's published models, whose files do not say how many heads there are


def open_checkpoint(path):
    """The tensors under `path`: a folder of safetensors, one such file, or a .pth file (models.torchfile)."""
    path = Path(path)
    if path.is_dir() or path.suffix == ".safetensors":
        return Checkpoint(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    from w2s_jax.models.torchfile import TorchFile

    return TorchFile(path)


def read_config(path) -> VisionConfig:
    """The model under `path`: a folder in Hugging Face's format, or a file as its authors published it, told by its tensors.

    Files (.pth, or the same tensors as .safetensors): torchvision's AlexNet and ResNets, DINO's ResNet-50 and ViTs, DeiT's, DINOv2's,
    CIFAR ResNets.

    Raises:
      UserError: not readable, not recognised, or a model with something that is not written here.
    """
    path = Path(path)
    if path.is_dir():
        return _from_folder(path)
    shapes = {name: tensor.shape for name, tensor in open_checkpoint(path).tensors.items()}
    for key, reader in (("features.0.weight", _alexnet), ("layer1.0.conv1.weight", _resnet), ("patch_embed.proj.weight", _transformer)):
        if key in shapes:
            try:
                return reader(shapes)
            except (KeyError, IndexError) as error:
                raise UserError(f"{path}: has {key!r} but not {error}: not a published AlexNet, ResNet or vision transformer") from None
            except _Refused as error:
                raise UserError(f"{path}: {error}") from None
    first = ", ".join(list(shapes)[:4])
    raise UserError(f"{path}: not a model that is known ({len(shapes)} tensors: {first}, ...); expected torchvision's AlexNet or a ResNet, "
                    "a vision transformer of DINO or DINOv2, or a CIFAR ResNet")


def new_vit(*, image: int, patch: int, width: int, layers: int, heads: int, mlp: int, resize: int = 0,
            interpolation: str = "bilinear") -> VisionConfig:
    """A vision transformer of these sizes (ViT's of Dosovitskiy et al. 2021), to be trained from the start; `image` pixels a side.

    Raises:
      UserError: heads do not divide the width, or a patch is larger than the image.
    """
    raw = {"model_type": "vit", "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": mlp,
           "image_size": image, "patch_size": patch}
    arch, _ = _hf_transformer(Fields(raw, "config.arch"))
    return VisionConfig("vit", "hf_vit", width, 0, (), image, arch, resize=resize, crop=image, interpolation=interpolation)


class _Refused(Exception):
    pass


def _last(shapes: dict, pattern: str) -> int:
    """The largest number that `pattern` finds at the start of a tensor's name, -1 where it finds none."""
    return max((int(found[1]) for name in shapes if (found := re.match(pattern, name))), default=-1)


# --------------------------------------------------------------------------- published files


def _alexnet(shapes: dict) -> VisionConfig:
    widths = tuple(shapes[f"features.{i}.weight"][0] for i in (0, 3, 6, 8, 10))
    dense = tuple(shapes[f"classifier.{i}.weight"][0] for i in (1, 4))
    return VisionConfig("alexnet", "alexnet", 36 * widths[-1], shapes["classifier.6.weight"][0], (), 224, AlexNet(widths, dense))


def _resnet(shapes: dict) -> VisionConfig:
    stages = 1 + _last(shapes, r"layer(\d+)\.")
    depths = tuple(1 + _last(shapes, rf"layer{s}\.(\d+)\.") for s in range(1, stages))
    last = 3 if "layer1.0.conv3.weight" in shapes else 2
    widths = tuple(shapes[f"layer{s}.0.conv{last}.weight"][0] for s in range(1, stages))
    inner = tuple(shapes[f"layer{s}.0.conv2.weight"][0] for s in range(1, stages))
    stem = shapes["conv1.weight"]
    small = stem[-1] == 3
    padded = small and not any(".downsample." in n or ".shortcut." in n for n in shapes)
    if stem[-1] not in (3, 7) or small and not (padded and "linear.weight" in shapes and last == 2):
        raise _Refused(f"conv1.weight is {list(stem)}; expected 7x7 pixels, or a CIFAR ResNet (3x3, shortcuts of option A, head 'linear')")
    if padded and any(b not in (a, 2 * a) for a, b in zip((stem[0], *widths), widths)):
        raise _Refused(f"stages of {', '.join(map(str, (stem[0], *widths)))} channels; expected each to have as many as the one before, "
                       "or twice")
    arch = ResNet(stem[0], widths, inner, depths, last == 3, small=small, padded=padded)
    if small:
        # 32 pixels are left as they are; other images are brought to what the model knows.
        return VisionConfig("resnet", "cifar", widths[-1], shapes["linear.weight"][0], (), 32, arch, resize=32, crop=32)
    classes = shapes["fc.weight"][0] if "fc.weight" in shapes else 0
    # torchvision's are evaluated with bilinear resizing; DINO's, which alone has no fc, with bicubic (its eval_linear.py).
    return VisionConfig("resnet", "resnet", widths[-1], classes, (), 224, arch, interpolation="bilinear" if classes else "bicubic")


def _transformer(shapes: dict) -> VisionConfig:
    embed, patch = shapes["cls_token"][-1], shapes["patch_embed.proj.weight"][-1]
    grid = math.isqrt(shapes["pos_embed"][1] - 1)
    if embed % HEAD_DIM:
        raise _Refused(f"cls_token has {embed} features; expected a multiple of {HEAD_DIM}, the width of a head")
    if grid**2 != shapes["pos_embed"][1] - 1:
        raise _Refused(f"pos_embed is {list(shapes['pos_embed'])}; expected one row for the class token and a square of patches")
    scaled = "blocks.0.ls1.gamma" in shapes
    swiglu = "blocks.0.mlp.w12.weight" in shapes
    registers = shapes["register_tokens"][1] if "register_tokens" in shapes else 0
    layers = 1 + _last(shapes, r"blocks\.(\d+)\.norm1\.")
    stack = _stack("dinov2" if scaled else "dino", embed, layers, embed // HEAD_DIM, (grid**2 + 1 + registers),
                   mlp=shapes["blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc1.weight"][1 if swiglu else 0],
                   activation="silu" if swiglu else "gelu", eps=1e-6, std=0.02, qkv="fused",
                   qkv_bias="blocks.0.attn.qkv.bias" in shapes, mlp_kind="fused" if swiglu else "plain",
                   layer_scale=1.0 if scaled else None)
    # DINOv2's models with registers came with a resizing of their own (facebookresearch/dinov2, hub/backbones.py).
    own = {"antialias": True} if registers else {"offset": 0.1}
    arch = ViT(stack, patch, grid, registers, **own, token_std=1e-6 if scaled else None)
    classes = shapes["head.weight"][0] if "head.weight" in shapes else 0
    image = grid * patch
    resize, crop = (256, 224) if scaled else (round(image * 256 / 224), image)  # DINOv2's are for 518 pixels and evaluated at 224
    return VisionConfig("vit", "dinov2" if scaled else "dino", embed, classes, (), image, arch, resize, crop, "bicubic")


def _stack(family: str, embed: int, layers: int, heads: int, tokens: int, *, mlp: int, activation: str, eps: float, std: float,
           **features) -> Architecture:
    return Architecture(family=family, vocab=0, embed=embed, layers=layers, heads=heads, kv_heads=heads, head_dim=embed // heads, mlp=mlp,
                        max_positions=tokens, activation=activation, norm_eps=eps, init_std=std, scaled_init=False,
                        attention_scale=(embed // heads) ** -0.5, causal=False, tied=False, **features)


# --------------------------------------------------------------------------- Hugging Face's folders


def _from_folder(folder: Path) -> VisionConfig:
    raw, file = read_raw(folder), str(folder / "config.json")
    f = Fields(raw, file)
    if raw["model_type"] not in MODEL_TYPES:
        raise f.error("model_type", f"one of {', '.join(MODEL_TYPES)}")
    f.only(num_channels=3)
    shapes = {name: tensor.shape for name, tensor in open_checkpoint(folder).tensors.items()}
    format = f"hf_{raw['model_type']}"
    weight = next((s for n, s in shapes.items() if re.fullmatch(rf"{FORMATS[format][2]}(\.1)?\.weight", n)), None)
    classes = weight[0] if weight else 0
    names = raw.get("id2label") or {}
    if classes and names and set(names) != {str(i) for i in range(classes)}:
        raise UserError(f"{file}: id2label names {len(names)} classes; expected {classes}, as the classifier has outputs, numbered from 0")
    told = tuple(str(names[str(i)]) for i in range(classes)) if classes and names else ()
    told = () if told == tuple(f"LABEL_{i}" for i in range(classes)) else told
    read = preprocessing.read(folder)
    if raw["model_type"] == "resnet":
        arch = _hf_resnet(f)
        return VisionConfig("resnet", format, arch.widths[-1], classes, told, 224, arch, **read)
    arch, image = _hf_transformer(f)
    usual = {} if arch.wide else {"resize": round(image * 256 / 224), "crop": image}
    return VisionConfig("vit", format, arch.stack.embed, classes, told, image, arch, **(usual | read))


def _sizes(f: Fields, key: str, at_least: int) -> tuple[int, ...]:
    value = f.raw.get(key)
    if not isinstance(value, list) or len(value) < at_least or not all(type(v) is int and v > 0 for v in value):
        raise f.error(key, "a list of positive ints")
    return tuple(value)


def _hf_resnet(f: Fields) -> ResNet:
    widths, depths = _sizes(f, "hidden_sizes", 1), _sizes(f, "depths", 1)
    if len(widths) != len(depths):
        raise f.error("depths", f"as many as hidden_sizes, {len(widths)}")
    kind = f.raw.get("layer_type", "bottleneck")
    if kind not in ("basic", "bottleneck"):
        raise f.error("layer_type", "basic or bottleneck")
    inner = tuple(w // 4 for w in widths) if kind == "bottleneck" else widths
    return ResNet(f.size("embedding_size"), widths, inner, depths, kind == "bottleneck",
                  stride_first=f.flag("downsample_in_first_stage", False), stride_in_first=f.flag("downsample_in_bottleneck", False),
                  activation=f.activation("hidden_act", "relu"))


def _hf_transformer(f: Fields) -> tuple[ViT, int]:
    """The architecture, and pixels a side."""
    def side(key: str) -> int:
        value = f.raw.get(key)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if type(value) is not int or value <= 0:
            raise f.error(key, "pixels, the same for both sides")
        return value

    kind = f.raw["model_type"]
    embed, image, patch = f.size("hidden_size"), side("image_size"), side("patch_size")
    heads, _, _ = f.heads(embed)
    wide = kind != "vit"
    swiglu = wide and f.flag("use_swiglu_ffn", False)
    activation, eps = f.activation("hidden_act", "gelu"), f.number("layer_norm_eps", 1e-6 if wide else 1e-12)
    mlp = int(embed * f.number("mlp_ratio", 4)) if wide else f.size("intermediate_size")
    if swiglu:
        mlp = (int(mlp * 2 / 3) + 7) // 8 * 8
    registers = f.size("num_register_tokens", 4) if kind == "dinov2_with_registers" else 0
    grid = image // patch
    if not grid:
        raise f.error("patch_size", f"at most image_size={image}")
    stack = _stack(kind, embed, f.size("num_hidden_layers"), heads, grid**2 + 1 + registers, mlp=mlp,
                   activation="silu" if swiglu else activation, eps=eps, std=f.number("initializer_range", 0.02), qkv="split",
                   qkv_bias=f.flag("qkv_bias", True), mlp_kind="fused" if swiglu else "plain",
                   layer_scale=f.number("layerscale_value", 1.0) if wide else None)
    return ViT(stack, patch, grid, registers, antialias=kind == "dinov2_with_registers", wide=wide), image
