"""Vision models against PyTorch: published files against twins (vision_reference.py), Hugging Face's folders against transformers."""

import functools
import io
import re
import tarfile
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

pytest.importorskip("torch")
import torch
import transformers
import vision_reference as reference
from safetensors.torch import save_file

from w2s_jax import mesh as mesh_lib
from w2s_jax import optimizers, train
from w2s_jax.models import vision, weights
from w2s_jax.models.vision import names, reading, resizing

pytestmark = pytest.mark.slow  # minutes together

CELLS, SLOTS = 2, 2


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def close(a, b, tolerance=1e-5, what=""):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape and np.isfinite(a).all(), what
    assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-3), f"{what}: {np.abs(a - b).max()} of {np.abs(b).max()}"


def images(height, width, cells=CELLS, slots=SLOTS):
    """A batch of random images, each with a brightness of its own."""
    rng = np.random.default_rng(height * 1000 + width)
    pixels = rng.integers(0, 256, (cells, slots, height, width, 3)) * rng.uniform(0.4, 1, (cells, slots, 1, 1, 1))
    return {"images": pixels.astype(np.uint8), "documents": np.arange(cells * slots, dtype=np.int32).reshape(cells, slots)}


def as_torch(batch, config):
    x = batch["images"].reshape(-1, *batch["images"].shape[2:]) / 255
    return torch.tensor((x - np.array(config.mean)) / np.array(config.std), dtype=torch.float32).permute(0, 3, 1, 2)


def fast(function, *arguments):
    """Its result, compiled without XLA's optimizations: the same arithmetic up to rounding."""
    with jax.default_matmul_precision("highest"):
        return jax.jit(function).lower(*arguments).compile(tiny.FAST)(*arguments)


def both(model, params, batch):
    """Features, and logits where there is a head."""
    call = lambda p, b: (model.features(p, b), None if model.head == "none" else model.apply(p, b))  # noqa: E731
    return fast(call, params, batch)


def flat(outputs):
    return np.asarray(outputs).reshape(-1, outputs.shape[-1])


# --------------------------------------------------------------------------- published files

BASIC = {"stem": 8, "inner": (8, 8, 12, 16), "expansion": 1, "bottleneck": False}
BOTTLENECK = {"stem": 8, "inner": (4, 8, 12, 16)}
CIFAR = {"stem": 8, "inner": (8, 16, 32), "expansion": 1, "bottleneck": False, "small": True}
PUBLISHED = {  # case -> (module, other sizes of images than the one that it was made for)
    "alexnet": (lambda: reference.AlexNet((8, 12, 16, 12, 10), (20, 24), 7), [(224, 224), (192, 160), (63, 70)]),
    "bottleneck": (lambda: reference.ResNet((2, 1, 2, 1), classes=9, **BOTTLENECK), [(224, 224), (192, 192), (50, 71)]),
    "basic, no head": (lambda: reference.ResNet((1, 2, 1, 1), classes=0, **BASIC), [(64, 64)]),
    "cifar": (lambda: reference.ResNet((2, 1, 2), classes=10, **CIFAR), [(32, 32), (28, 36)]),
    "dino": (lambda: reference.Transformer(classes=0), [(32, 32), (40, 24), (35, 46), (24, 24)]),
    "dino at 224": (lambda: reference.Transformer(64, 1, 16, 14, 64), [(224, 224), (192, 192)]),
    "dinov2 at 518": (lambda: reference.Transformer(64, 1, 14, 37, 64, scaled=True), [(224, 224), (98, 98)]),
    "registers at 518": (lambda: reference.Transformer(64, 1, 14, 37, 64, scaled=True, registers=4, offset=0.0, antialias=True),
                         [(224, 224), (98, 98)]),
    "deit": (lambda: reference.Transformer(classes=5, bias=False), [(32, 32), (64, 48)]),
    "dinov2": (lambda: reference.Transformer(patch=14, scaled=True), [(56, 56), (98, 42)]),
    "dinov2 registers": (lambda: reference.Transformer(scaled=True, registers=3, offset=0.0, antialias=True), [(32, 32), (24, 64)]),
    "dinov2 giant": (lambda: reference.Transformer(scaled=True, swiglu=True), [(32, 32)]),
}
HEADLESS = PUBLISHED.keys() - {"alexnet", "bottleneck", "cifar", "deit"}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """`published(case)` -> (torch module, file of its tensors)."""
    folder = tmp_path_factory.mktemp("published")

    @functools.cache
    def make(case):
        module = reference.randomize(PUBLISHED[case][0]())
        file = folder / f"{case.replace(' ', '_')}.safetensors"
        save_file({k: v.contiguous() for k, v in module.state_dict().items()}, file)
        return module, file

    return make


def loaded(path, head=None, **options):
    """(model, params) from a checkpoint."""
    config = vision.read_config(path)
    model = vision.build(config, head=head or ("own" if config.classes else "none"), **options)
    return model, vision.load(path, model, key=jax.random.key(0))


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_files(published, case):
    module, file = published(case)
    model, params = loaded(file)
    for size in PUBLISHED[case][1]:
        batch = images(*size)
        features, logits = both(model, params, batch)
        with torch.no_grad():
            x = as_torch(batch, model.config)
            close(flat(features), module.embed(x), what=f"features at {size}")
            if case not in HEADLESS:
                close(flat(logits), module(x), what=f"logits at {size}")


def test_pixels_may_be_float(published):
    model, params = loaded(published("cifar")[1])
    batch = images(32, 32)
    close(*(fast(model.apply, params, batch | {"images": batch["images"].astype(kind)}) for kind in (np.float32, np.uint8)), 1e-6)


@pytest.mark.parametrize("case", PUBLISHED)
def test_files_of_torch(tmp_path, published, case):
    pytest.importorskip("w2s_jax.models.torchfile")
    module, file = published(case)
    torch.save({f"module.{k}": v for k, v in module.state_dict().items()}, tmp_path / "model.pth")
    model, params = loaded(file)
    again, same = loaded(tmp_path / "model.pth")
    assert again is model
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(same), strict=True))


@pytest.fixture(scope="module")
def cifar(shared):
    """2,000 real test images, uint8 [4, 1, 500, 32, 32, 3], and their classes."""
    image = pytest.importorskip("PIL.Image")
    pixels, labels = [], []
    with tarfile.open(shared / "data/images/cifar10_sample.tar") as archive:
        members = sorted((m for m in archive.getmembers() if "test/" in m.name and m.isfile()), key=lambda m: m.name)
        kinds = sorted({m.name.split("/")[-2] for m in members})  # CIFAR-10 numbers its classes in the alphabet's order
        for member in members:
            pixels.append(np.asarray(image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGB")))
            labels.append(kinds.index(member.name.split("/")[-2]))
    return np.stack(pixels).reshape(4, 1, 500, 32, 32, 3), np.array(labels)


@pytest.mark.parametrize(("file", "accuracy"), [("resnet20-12fca82f", 0.81), ("resnet32-d509ac18", 0.83)])
def test_real_cifar_networks(shared, cifar, file, accuracy):
    pytest.importorskip("w2s_jax.models.torchfile")
    model, params = loaded(shared / "data/weights/resnet_cifar10" / f"{file}.th")
    parts, labels = cifar
    apply = jax.jit(model.apply)
    right = np.concatenate([flat(apply(params, {"images": part})).argmax(-1) for part in parts]) == labels
    assert abs(right.mean() - accuracy) < 0.015


# --------------------------------------------------------------------------- Hugging Face's folders

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8, "num_labels": 5}
VIT = SIZES | {"intermediate_size": 44}
RESNET = {"embedding_size": 8, "hidden_sizes": [16, 24, 32], "depths": [1, 2, 1], "num_labels": 6}
HUGGING_FACE = {  # case -> (class, arguments of its config, further sizes)
    "vit": ("ViTForImageClassification", VIT, [(40, 24), (56, 56)]),
    "vit odd": ("ViTForImageClassification", VIT | {"qkv_bias": False, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3}, []),
    "vit, no head": ("ViTModel", VIT, [(24, 24)]),
    "dinov2": ("Dinov2ForImageClassification", SIZES | {"mlp_ratio": 2, "patch_size": 14, "image_size": 70}, [(98, 98), (56, 84)]),
    "dinov2, no head": ("Dinov2Model", SIZES, []),
    "dinov2 giant": ("Dinov2ForImageClassification", SIZES | {"use_swiglu_ffn": True}, []),
    "registers": ("Dinov2WithRegistersForImageClassification", SIZES | {"num_register_tokens": 3}, [(24, 56), (24, 24)]),
    "resnet": ("ResNetForImageClassification", RESNET, [(71, 50)]),
    "resnet basic": ("ResNetForImageClassification", RESNET | {"layer_type": "basic", "hidden_act": "gelu"}, []),
    "resnet strides": ("ResNetForImageClassification", RESNET | {"downsample_in_first_stage": True, "downsample_in_bottleneck": True}, []),
    "resnet, no head": ("ResNetModel", RESNET, []),
}


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """`hugging_face(case)` -> (transformers' model, its folder)."""
    @functools.cache
    def make(case):
        name, arguments, _ = HUGGING_FACE[case]
        config = getattr(transformers, re.sub("ForImageClassification|Model", "Config", name))(**arguments)
        module = reference.randomize(getattr(transformers, name)(config))
        folder = tmp_path_factory.mktemp("hf") / "model"
        module.save_pretrained(folder)
        return module, folder

    return make


def run(module, x):
    """transformers' features [images, embed] and logits (None without a head)."""
    options = {"interpolate_pos_encoding": True} if module.config.model_type == "vit" else {}
    with torch.no_grad():
        base = getattr(module, module.base_model_prefix, module)(pixel_values=x, **options)
        features = base.pooler_output.flatten(1) if module.config.model_type == "resnet" else base.last_hidden_state[:, 0]
        return features, module(pixel_values=x, **options).logits if hasattr(module, "classifier") else None


@pytest.mark.parametrize("case", HUGGING_FACE)
def test_hugging_face(hugging_face, case):
    module, folder = hugging_face(case)
    model, params = loaded(folder)
    assert bool(model.config.classes) == ("no head" not in case)
    side = HUGGING_FACE[case][1].get("image_size", 64)
    for size in [(side, side), *HUGGING_FACE[case][2]]:
        batch = images(*size)
        ours = both(model, params, batch)
        features, logits = run(module, as_torch(batch, model.config))
        close(flat(ours[0]), features, what=f"features at {size}")
        if logits is not None:
            close(flat(ours[1]), logits, what=f"logits at {size}")


# --------------------------------------------------------------------------- gradients, types, rematerialisation, devices


@pytest.mark.parametrize("case", ["alexnet", "bottleneck", "deit"])
def test_gradients(published, case):
    """Of every parameter but the statistics, which nothing trains."""
    module, file = published(case)
    model, params = loaded(file)
    batch = images(*PUBLISHED[case][1][-1])
    pull = np.random.default_rng(1).normal(size=(CELLS, SLOTS, model.classes)).astype(np.float32)
    trained, frozen = train.split_params(params, "full")
    grads = fast(jax.grad(lambda t: (model.apply(train.merge_params(t, frozen), batch) * pull).sum()), trained)
    module.zero_grad()
    (module(as_torch(batch, model.config)) * torch.tensor(flat(pull))).sum().backward()
    expected = {name: p.grad.numpy() for name, p in module.named_parameters()}
    found = weights.paths(grads)
    assert not any(path.endswith(("mean", "variance")) for path in found)
    for path, layer, name in weights.each(names.names(model.config, found, "", head=True)):
        turned, grad = names.order(path), np.asarray(found[path] if layer is None else found[path][layer])
        close(grad if turned is None else grad.transpose(np.argsort(turned)), expected.pop(name), 1e-4, name)
    assert not expected


def test_what_is_trained_and_decayed(published):
    model, _ = loaded(published("bottleneck")[1])
    trained = weights.paths(train.split_params(model.abstract, "full")[0])
    assert weights.paths(model.abstract).keys() - trained.keys() == {p for p in weights.paths(model.abstract) if re.search(
        r"/(mean|variance)$", p)}
    assert {path for path in trained if optimizers.decayed(path)} == {path for path in trained if path.endswith("/kernel")}
    assert set(weights.paths(train.split_params(model.abstract, "head")[0])) == {"head/kernel", "head/bias"}


@pytest.mark.parametrize("case", ["alexnet", "bottleneck", "dinov2 registers"])
def test_bfloat16_and_remat(published, case):
    file, batch = published(case)[1], images(64, 64)
    model, params = loaded(file, head="new", head_init="normal", classes=3)
    def grad(model, params):
        def loss(params):
            logits = model.apply(params, batch)
            return jnp.square(logits).sum(), logits
        return fast(jax.grad(loss, has_aux=True), params)

    grads, expected = grad(model, params)
    again = vision.build(model.config, head="new", head_init="normal", classes=3, remat="full")
    for a, b in zip(jax.tree.leaves(grad(again, params)[0]), jax.tree.leaves(grads), strict=True):
        close(a, b, 1e-4)
    half, rounded = loaded(file, head="new", head_init="normal", classes=3, dtype="bfloat16", param_dtype="bfloat16")
    kinds = {path: leaf.dtype.name for path, leaf in weights.paths(rounded).items()}
    assert {kinds[p] for p in kinds if not re.search(r"^head/|/(mean|variance)$", p)} == {"bfloat16"}
    assert {kinds[p] for p in kinds if re.search(r"^head/|/(mean|variance)$", p)} == {"float32"}
    close(fast(half.apply, rounded, batch), expected, 0.05)


@pytest.mark.parametrize("case", ["alexnet", "bottleneck", "cifar", "dinov2 registers"])
@pytest.mark.parametrize("at_once", [None, 16])
def test_eight_devices_give_what_one_gives(published, monkeypatch, case, at_once):
    """`at_once`: bytes that are read at once, so that small tensors too go the way of large ones."""
    file = published(case)[1]
    model, params = loaded(file, head="new", head_init="normal", classes=4)
    if at_once:
        monkeypatch.setattr(weights, "AT_ONCE", at_once)
    mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2, "model": 2})
    shardings, _ = mesh_lib.param_shardings(mesh, model.abstract)
    assert any(not s.is_fully_replicated for s in jax.tree.leaves(shardings["backbone"]))
    spread = vision.load(file, model, shardings, jax.random.key(0))
    for path, leaf in weights.paths(spread).items():
        assert np.array_equal(leaf, weights.paths(params)[path]), path
        assert leaf.sharding == weights.paths(shardings)[path]
    if at_once:
        return
    batch = images(64, 64, cells=4)
    on_mesh = {k: jax.device_put(v, mesh_lib.batch_sharding(mesh)) for k, v in batch.items()}


    def loss(params, batch):
        logits = model.apply(params, batch)
        return jnp.square(logits).sum(), (logits, model.features(params, batch))

    (grads, outputs), (expected, ones) = (fast(jax.grad(loss, has_aux=True), *x) for x in ((spread, on_mesh), (params, batch)))
    for ours, one in zip(outputs, ones, strict=True):
        close(ours, one)
    for path, leaf in weights.paths(grads).items():
        close(leaf, weights.paths(expected)[path], 1e-4, path)


def test_dropout_belongs_to_an_image(published):
    model, params = loaded(published("dino")[1], head="new", head_init="normal", dropout=0.2)
    batch, key = images(32, 32), jax.random.key(3)
    call = jax.jit(model.apply)
    noisy = np.asarray(call(params, batch, key))
    assert np.array_equal(noisy, call(params, batch, key))
    assert not np.allclose(noisy, call(params, batch), 1e-3) and not np.allclose(noisy, call(params, batch, jax.random.key(4)), 1e-3)
    turned = {name: array[::-1, ::-1] for name, array in batch.items()}
    close(call(params, turned, key), noisy[::-1, ::-1])


# --------------------------------------------------------------------------- initialisation and sizes


def test_initialisation(published):
    """The shares of torch's layers that the published code leaves as they are, and of its own."""
    init = lambda case: weights.paths(fast(loaded(published(case)[1])[0].init, jax.random.key(0)))  # noqa: E731
    alexnet = init("alexnet")
    for path, inputs in (("backbone/conv2/kernel", 8 * 25), ("backbone/conv2/bias", 8 * 25), ("head/dense1/bias", 360), ("head/bias", 24)):
        assert 0.5 * inputs**-0.5 < np.abs(alexnet[path]).max() <= inputs**-0.5, path
    resnet = init("bottleneck")
    assert np.std(resnet["backbone/stage4/block0/conv2/kernel"]) == pytest.approx((2 / (9 * 16)) ** 0.5, rel=0.1)
    assert (np.asarray(resnet["backbone/stem/norm/variance"]) == 1).all()
    vit = init("dinov2 registers")
    for path, std in (("layers/attn/out/kernel", 0.02), ("layers/mlp/down/kernel", 0.02), ("embed/positions", 0.0176),
                      ("embed/registers", 0.9e-6)):
        assert np.std(vit[f"backbone/{path}"]) == pytest.approx(std, rel=0.1), path


def test_new_head(published):
    file = published("cifar")[1]
    model, params = loaded(file, head="new", classes=3)
    assert not np.asarray(fast(model.apply, params, images(32, 32))).any()
    assert {k: v.shape for k, v in weights.paths(model.init_new(jax.random.key(0))).items()} == {"head/kernel": (32, 3), "head/bias": (3,)}
    assert loaded(file)[0].init_new(jax.random.key(0)) == {}
    assert vision.build(model.config, head="new", classes=3) is model


FULL = {  # the published numbers of parameters; DINOv2's count the mask token, which is for pretraining
    "AlexNet": (reference.AlexNet, 61_100_840),
    "ResNet-18": (lambda: reference.ResNet((2, 2, 2, 2), expansion=1, bottleneck=False), 11_689_512),
    "ResNet-50": (lambda: reference.ResNet((3, 4, 6, 3)), 25_557_032),
    "ResNet-50 of DINO": (lambda: reference.ResNet((3, 4, 6, 3), classes=0), 23_508_032),
    "ResNet-152": (lambda: reference.ResNet((3, 8, 36, 3)), 60_192_808),
    "ResNet-20 for CIFAR": (lambda: reference.ResNet((3, 3, 3), 16, (16, 32, 64), 1, 10, False, True), 269_722),
    "ViT-S/16 of DINO": (lambda: reference.Transformer(384, 12, 16, 14, 4 * 384), 21_665_664),
    "ViT-B/8 of DINO": (lambda: reference.Transformer(768, 12, 8, 28, 4 * 768), 85_807_872),
    "ViT-L/14 of DINOv2": (lambda: reference.Transformer(1024, 24, 14, 37, 4 * 1024, scaled=True), 304_368_640 - 1024),
}


@pytest.mark.parametrize("name", FULL)
def test_full_sizes(monkeypatch, name):
    make, count = FULL[name]
    with torch.device("meta"):
        shapes = {key: SimpleNamespace(shape=tuple(t.shape)) for key, t in make().state_dict().items()}
    monkeypatch.setattr(reading, "open_checkpoint", lambda path: SimpleNamespace(tensors=shapes))
    config = vision.read_config("model.pth")
    model = vision.build(config, head="own" if config.classes else "none")
    trained = weights.paths(train.split_params(model.abstract, "full")[0])
    assert sum(leaf.size for leaf in trained.values()) == count
    side = config.image if config.family != "vit" else 2 * config.architecture.patch
    batch = {"images": jax.ShapeDtypeStruct((1, 1, side, side, 3), np.uint8)}
    assert jax.eval_shape(model.features, model.abstract, batch).shape == (1, 1, config.embed)


@pytest.mark.parametrize(("size", "new", "ratio", "antialias"), [(14, 24, 24.1 / 14, False), (14, 9, 9.1 / 14, False), (37, 16, None, True),
                                                                (7, 16, None, True), (5, 5, None, False), (16, 3, None, False)])
def test_bicubic(size, new, ratio, antialias):
    options = {"scale_factor": (1.0, ratio)} if ratio else {"size": (1, new)}
    rows = torch.eye(size, dtype=torch.float64)[:, None, None]  # as many images of one row
    expected = torch.nn.functional.interpolate(rows, mode="bicubic", antialias=antialias, **options)[:, 0, 0].numpy()
    close(resizing.bicubic(size, new, ratio=ratio, antialias=antialias).T, expected, 1e-6)
