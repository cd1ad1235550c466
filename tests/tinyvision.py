"""Tiny image models, image folders and configs of the image stages: what their tests share."""

from pathlib import Path

import numpy as np
import pytest
import tiny
from pictures import encoded, write_folder

from w2s_jax.config import shipped

torch = pytest.importorskip("torch")
CLASSES = ("blue", "green", "red")
DATA = {"dataset": "digits", "n_train": 64, "n_test": 40, "resize": 0, "crop": 0, "mesh__data": 1}
NETWORK = {"arch__width": 8, "arch__layers": 1, "arch__heads": 2, "arch__mlp": 16, "arch__patch": 4, "batch_size": 8, "epochs": 1.0}


def hf_model(kind: str, seed: int = 0, classes: int = 0, image: int = 8):
    """A random model of transformers, in float32, without dropout: vit | resnet; with a classifier where `classes` says so."""
    import transformers
    from vision_reference import randomize

    torch.manual_seed(seed)
    sizes = {
        "vit": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": image,
                "patch_size": 4},
        "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    }[kind]  # fmt: skip
    name = {"vit": "ViT", "resnet": "ResNet"}[kind]
    config = getattr(transformers, f"{name}Config")(**sizes, num_labels=classes or 2)
    if classes:
        return randomize(getattr(transformers, f"{name}ForImageClassification")(config), seed)
    return randomize(transformers.ViTModel(config, add_pooling_layer=False) if kind == "vit" else transformers.ResNetModel(config), seed)


def write_model(folder, kind: str = "vit", seed: int = 0, classes: int = 0, image: int = 8) -> Path:
    hf_model(kind, seed, classes, image).save_pretrained(folder)
    return Path(folder)


def write_images(folder, per_class: int = 12, side: int = 8, **more) -> Path:
    """Class folders of PNGs whose colour is their class; `more`: further files by path."""

    rng = np.random.default_rng(0)
    files = {}
    for which, name in enumerate(CLASSES):
        for i in range(per_class):
            pixels = rng.integers(0, 90, (side, side, 3), dtype=np.uint8)
            pixels[..., 2 - which] += 120
            files[f"{name}/{i:03d}.png"] = encoded(pixels)
    return write_folder(Path(folder), files | more)


def train(**keys):
    """The config of a small run of vision_train."""
    return tiny.set_keys(shipped("vision_train"), **DATA | NETWORK | keys)


def vision_keys(**keys) -> dict:
    """The keys of a small experiment on digits whose networks are all trained here."""
    networks = {f"{name}__{key}": value for name in ("weak_train", "strong_train", "student_train") for key, value in NETWORK.items()
                if not (name == "student_train" and key.startswith("arch"))}
    small = {"weak_model": "", "strong_model": "", "n_weak": 24, "epochs": 3, "batch_size": 16, "seeds": (0,), "pictures": 4}
    return DATA | small | networks | keys


def vision(**keys):
    """The config of such an experiment."""
    return tiny.set_keys(shipped("vision"), **vision_keys(**keys))


@pytest.fixture(scope="module", name="published")
def published_checkpoints(tmp_path_factory):
    """What a user of published checkpoints has: class folders, a .pth file with a classifier, one without; and the networks in torch."""
    import torchfiles
    from vision_reference import ResNet, randomize

    root = tmp_path_factory.mktemp("published")
    weak = randomize(ResNet((1, 1), stem=8, inner=(8, 16), expansion=1, classes=3, bottleneck=False, small=True), 1)
    strong = randomize(ResNet((1, 1), stem=8, inner=(8, 8), expansion=2, classes=0), 2)
    torchfiles.save({"state_dict": {f"module.{k}": v for k, v in weak.state_dict().items()}}, root / "weak.pth", torchfiles.ZIP)
    torchfiles.save(strong.state_dict(), root / "strong.pth", torchfiles.ZIP)
    write_images(root / "data", per_class=20)
    return {"root": root, "weak": weak, "strong": strong}


def keys_of(published, **keys) -> dict:
    root = published["root"]
    return {"weak_model": str(root / "weak.pth"), "strong_model": str(root / "strong.pth"), "dataset": str(root / "data"), "n_train": 40,
            "n_test": 0, "n_weak": 0, "epochs": 3, "batch_size": 16, "seeds": (0, 3), "learning_rate": 0.02, "data_seed": 5} | keys
