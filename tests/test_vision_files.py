"""Vision models' files: written for transformers, preprocessing both ways, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
import transformers
import vision_reference as reference
from safetensors.torch import save_file
from test_vision_models import BASIC, BOTTLENECK, PUBLISHED, SIZES, as_torch, close, fast, flat, images, loaded

from w2s_jax.errors import UserError
from w2s_jax.models import vision
from w2s_jax.models.vision import preprocessing
from w2s_jax.models.vision.config import MEAN, STD


def publish(folder, module):
    save_file({k: v.contiguous() for k, v in reference.randomize(module).state_dict().items()}, folder / "model.safetensors")
    return folder / "model.safetensors"


# --------------------------------------------------------------------------- written

WRITTEN = {
    "dino": PUBLISHED["dino"][0], "deit": PUBLISHED["deit"][0],
    "dinov2": lambda: reference.Transformer(patch=14, scaled=True, hidden=256),  # transformers has whole multiples of the width
    "dinov2 giant": lambda: reference.Transformer(128, scaled=True, swiglu=True, hidden=(int(512 * 2 / 3) + 7) // 8 * 8),
    "registers": lambda: reference.Transformer(scaled=True, registers=3, hidden=384),
    "resnet": lambda: reference.ResNet((2, 1, 2, 1), classes=9, **BOTTLENECK),
    "resnet basic": lambda: reference.ResNet((1, 2, 1, 1), classes=0, **BASIC),
}


@pytest.mark.parametrize(("case", "head"), [(case, "new") for case in WRITTEN] + [("deit", "own"), ("resnet", "own"), ("dinov2", "none"),
                                                                                   ("resnet", "none")])
def test_transformers_reads_what_is_written(tmp_path, case, head):
    options = {"classes": 3, "head_init": "normal"} if head == "new" else {}
    model, params = loaded(publish(tmp_path, WRITTEN[case]()), head=head, **options)
    if head == "new":
        params["head"]["bias"] = params["head"]["bias"] + np.arange(3, dtype=np.float32)
    vision.save(tmp_path / "written", params, model, ("cat", "dog", "ibis") if head == "new" else ())
    kind = transformers.AutoModel if head == "none" else transformers.AutoModelForImageClassification
    there, report = kind.from_pretrained(tmp_path / "written", output_loading_info=True)
    assert not [n for n in report["missing_keys"] if "pooler" not in n] and not report["unexpected_keys"] and not report["mismatched_keys"]
    side = model.config.image if model.config.family == "vit" else 64
    batch = images(side, side)
    with torch.no_grad():
        outputs = there.eval()(pixel_values=as_torch(batch, model.config))
    if head == "none":
        expected = outputs.pooler_output.flatten(1) if case == "resnet" else outputs.last_hidden_state[:, 0]
        close(flat(fast(model.features, params, batch)), expected)
        return
    close(flat(fast(model.apply, params, batch)), outputs.logits)
    again, same = loaded(tmp_path / "written")
    assert again.config.class_names == (("cat", "dog", "ibis") if head == "new" else ())
    assert (again.config.resize, again.config.crop, again.config.interpolation) == (
        model.config.resize, model.config.crop, model.config.interpolation)
    close(fast(again.apply, same, batch), fast(model.apply, params, batch))


def test_written_in_bfloat16(tmp_path):
    """The backbone keeps its digits, the head its own."""
    file = publish(tmp_path, reference.Transformer())
    model, params = loaded(file, head="new", head_init="normal", dtype="bfloat16", param_dtype="bfloat16")
    vision.save(tmp_path / "written", params, model)
    assert json.loads((tmp_path / "written/config.json").read_text())["dtype"] == "bfloat16"
    again = vision.build(vision.read_config(tmp_path / "written"), head="own", param_dtype="bfloat16")
    same = vision.load(tmp_path / "written", again)
    assert np.array_equal(same["head"]["kernel"], params["head"]["kernel"])
    assert np.array_equal(same["backbone"]["layers"]["mlp"]["up"]["kernel"], params["backbone"]["layers"]["mlp"]["up"]["kernel"])


@pytest.mark.parametrize(("case", "message"), [("alexnet", "no class for alexnet"), ("cifar", "no class for this ResNet .CIFAR")])
def test_what_transformers_cannot_hold(tmp_path, case, message):
    model, params = loaded(publish(tmp_path, PUBLISHED[case][0]()))
    with pytest.raises(UserError, match=message):
        vision.save(tmp_path / "written", params, model)
    assert not (tmp_path / "written").exists()


# --------------------------------------------------------------------------- preprocessing

BIT = {"image_processor_type": "BitImageProcessor", "do_resize": True, "size": {"shortest_edge": 256}, "resample": 3,
       "do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "do_rescale": True,
       "rescale_factor": 0.00392156862745098, "do_normalize": True, "image_mean": [0.485, 0.456, 0.406],
       "image_std": [0.229, 0.224, 0.225]}  # facebook/dinov2-base
VIT = {"do_normalize": True, "do_resize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "size": 224, "resample": 2}
CONVNEXT = {"crop_pct": 0.875, "do_normalize": True, "do_resize": True, "feature_extractor_type": "ConvNextFeatureExtractor",
            "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3, "size": 224}  # microsoft/resnet-50


@pytest.mark.parametrize(("raw", "fields"), [
    (BIT, {"resize": 256, "crop": 224, "interpolation": "bicubic", "mean": MEAN, "std": STD}),
    (VIT, {"resize": 224, "crop": 224, "squeeze": True, "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.5,) * 3}),
    (CONVNEXT, {"resize": 256, "crop": 224, "interpolation": "bicubic", "mean": MEAN, "std": STD}),
    (CONVNEXT | {"size": {"shortest_edge": 384}}, {"resize": 384, "crop": 384, "squeeze": True, "interpolation": "bicubic", "mean": MEAN,
                                                    "std": STD}),
    (BIT | {"do_normalize": False, "do_resize": False}, {"resize": 0, "crop": 224, "mean": (0.0,) * 3, "std": (1.0,) * 3}),
])
def test_preprocessing(tmp_path, raw, fields):
    (tmp_path / preprocessing.FILE).write_text(json.dumps(raw))
    assert preprocessing.read(tmp_path) == fields
    config = replace(vision.read_config(publish(tmp_path, reference.Transformer(layers=1))), **({"interpolation": "bilinear"} | fields))
    (tmp_path / preprocessing.FILE).write_text(json.dumps(preprocessing.write(config)))
    assert replace(config, **preprocessing.read(tmp_path)) == config


@pytest.mark.parametrize(("raw", "message"), [
    (BIT | {"resample": 1}, r"resample=1 is not supported; expected 2 \(bilinear\) or 3"),
    (BIT | {"size": {"height": 224, "width": 200}}, "size=.* both sides"), (BIT | {"do_center_crop": False}, "do_center_crop=False"),
    (BIT | {"rescale_factor": 0.5}, "rescale_factor=0.5"), (BIT | {"image_std": [0, 1, 1]}, "image_std"),
    (BIT | {"image_mean": 0.5}, "image_mean"),
    (BIT | {"size": None}, "size=None"), (CONVNEXT | {"crop_pct": 2}, "crop_pct=2"), (BIT | {"crop_size": None}, "crop_size"),
])
def test_preprocessing_that_is_not_done_here(tmp_path, raw, message):
    (tmp_path / preprocessing.FILE).write_text(json.dumps(raw))
    with pytest.raises(UserError, match=message):
        preprocessing.read(tmp_path)


# --------------------------------------------------------------------------- refused


def spoil(state, rename=None, drop=None, add=None, cut=None):
    state = {k: v.contiguous() for k, v in state.items() if k != drop}
    if rename:
        state[rename[1]] = state.pop(rename[0])
    if add:
        state[add] = torch.zeros(3)
    if cut:
        state[cut] = state[cut][..., :-1].contiguous()
    return state


def narrow():
    """A transformer whose heads are not 64 wide."""
    module = reference.Transformer()
    module.cls_token.data = module.cls_token.data[..., :96].contiguous()
    return module


@pytest.mark.parametrize(("case", "changes", "message"), [
    ("alexnet", {"drop": "features.3.bias"}, r"do not fit a AlexNet of these sizes: 1 missing \(features.3.bias\)"),
    ("alexnet", {"drop": "classifier.4.weight"}, "has 'features.0.weight' but not 'classifier.4.weight'"),
    ("bottleneck", {"add": "layer1.0.se.weight"}, r"1 that nothing takes \(layer1.0.se.weight\)"),
    ("bottleneck", {"rename": ("layer2.0.conv2.weight", "x")}, "but not 'layer2.0.conv2.weight'"),
    ("bottleneck", {"cut": "layer1.0.bn2.running_var"}, r"1 of another shape \(layer1.0.bn2.running_var \[3\] where a ResNet .* \[4\]\)"),
    ("cifar", {"rename": ("linear.weight", "fc.weight")}, r"conv1.weight is \[8, 3, 3, 3\]; expected 7x7 pixels, or a CIFAR ResNet"),
    ("dino", {"drop": "norm.bias"}, r"1 missing \(norm.bias\)"), ("dino", {"drop": "blocks.1.attn.proj.bias"}, "blocks.1.attn.proj.bias"),
    ("dino", {"rename": ("blocks.0.norm1.weight", "blocks.0.0.norm1.weight")}, r"missing \(blocks.0.norm1.weight\)"),
    ("dino", {"rename": ("patch_embed.proj.weight", "conv.weight")}, "not a model that is known .* expected torchvision's AlexNet"),
    ("narrow", {}, "96 features; expected a multiple of 64"),
    ("dino", {"drop": "pos_embed"}, "but not 'pos_embed'"), ("deit", {"drop": "head.bias"}, r"missing \(head.bias\)"),
])
def test_spoilt_files(tmp_path, case, changes, message):
    module = narrow() if case == "narrow" else PUBLISHED[case][0]()
    save_file(spoil(module.state_dict(), **changes), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        loaded(tmp_path / "model.safetensors")


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, intermediate_size=44)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "convnext"}, "config.json: model_type='convnext' is not supported; expected one of vit, resnet"),
    ({"num_channels": 1}, "num_channels=1"), ({"image_size": [32, 48]}, "image_size"), ({"hidden_act": "gellu"}, "hidden_act='gellu'"),
    ({"num_attention_heads": 5}, "num_attention_heads=5"), ({"intermediate_size": 48}, "of another shape"),
    ({"qkv_bias": False}, "nothing takes"),
    ({"id2label": {"0": "a", "1": "b"}}, "id2label names 2 classes; expected 5"), ({"num_hidden_layers": 4}, "missing"),
    ({"patch_size": 64}, "patch_size=64"), ({"hidden_size": None}, "'hidden_size' is missing"),
])
def test_spoilt_configs(tmp_path, vit_folder, changes, message):
    raw = json.loads((vit_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | changes))
    (tmp_path / "model.safetensors").symlink_to(vit_folder / "model.safetensors")
    with pytest.raises(UserError, match=message):
        loaded(tmp_path)


@pytest.mark.parametrize(("options", "message"), [
    ({"head": "own"}, "head='own': the checkpoint has no classifier"), ({"head": "classifier"}, "head='classifier' is not known"),
    ({"head": "new", "head_init": "unembedding"}, "head_init='unembedding' is not known"), ({"head": "new", "dtype": "float16"}, "dtype"),
    ({"head": "new", "dropout": 1.0}, "dropout=1.0: expected a rate"),
    ({"head": "new", "dropout": 0.1}, "dropout=0.1: the features of resnet"),
])
def test_arguments(tmp_path, options, message):
    config = vision.read_config(publish(tmp_path, PUBLISHED["basic, no head"][0]()))
    with pytest.raises(UserError, match=message):
        vision.build(config, **options)


def test_stored_dtype(tmp_path):
    file = publish(tmp_path, PUBLISHED["cifar"][0]())  # with its counters, which are integers
    assert vision.stored_dtype(file) == "float32"
    model, params = loaded(publish(tmp_path, PUBLISHED["dino"][0]()), param_dtype="bfloat16")
    vision.save(tmp_path / "half", params, model)
    assert vision.stored_dtype(tmp_path / "half") == "bfloat16"


def test_other_refusals(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        vision.read_config(tmp_path / "model.pth")
    model, params = loaded(publish(tmp_path, PUBLISHED["alexnet"][0]()))
    with pytest.raises(UserError, match="images of 62 x 90 pixels: expected at least 63 a side"):
        model.apply(params, images(62, 90))
    with pytest.raises(UserError, match="2 names of classes for 7 outputs"):
        vision.save(tmp_path / "out", params, model, ("a", "b"))
    with pytest.raises(ValueError, match="other keys"):
        model.apply({"backbone": params["backbone"]}, images(64, 64))
