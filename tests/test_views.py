"""Augmentation and the two views of contrastive pretraining, against SciPy and a plain SimCLR in PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from scipy import ndimage
from torch.nn import functional as F

from tests.tiny import fast_compiles, random_params
from w2s_jax import feeding, losses, optimizers, train, views
from w2s_jax import mesh as mesh_lib
from w2s_jax.augment import Augment
from w2s_jax.models import vision as models

EVERYTHING = {"shift": 0.2, "zoom": 0.3, "rotate": 30.0, "flip": True, "brightness": 0.1, "contrast": 0.4, "noise": 0.05}
DRAW = jax.jit(lambda key: jax.random.uniform(key, (8,), minval=-1.0, maxval=1.0))
BATCH = 11  # images a batch; nothing divides it


def pictures(n: int, height: int = 8, width: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), np.uint8)


# --------------------------------------------------------------------------- augmentation


def test_amounts_of_zero_change_nothing():
    images = pictures(5)
    assert not Augment() and all(Augment(**{key: value}) for key, value in EVERYTHING.items())
    np.testing.assert_array_equal(Augment()(images, jax.random.split(jax.random.key(0), 5)), images.astype(np.float32))


@pytest.mark.parametrize("keys", [("shift",), ("zoom",), ("rotate",), ("shift", "zoom", "rotate")])
@pytest.mark.parametrize("size", [(8, 8), (23, 17)])
def test_geometry_is_that_of_scipy(keys, size):
    """Every output pixel reads a place of the input: rotated, then zoomed, about the centre, then shifted; borders repeat."""
    augment = Augment(**{key: EVERYTHING[key] for key in keys})
    images, drawn = pictures(4, *size), jax.random.split(jax.random.key(3), 4)
    changed = jax.jit(augment)(images, drawn)
    centre = (np.array(size) - 1) / 2
    for image, key, got in zip(images, drawn, changed):
        draw = np.asarray(DRAW(key), np.float64)
        angle = np.deg2rad(augment.rotate) * draw[0]
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / (1 + augment.zoom * draw[1:3, None])
        offset = centre - turn @ centre + augment.shift * np.array(size) * draw[3:5]
        want = [ndimage.affine_transform(image[..., c].astype(np.float64), turn, offset, order=1, mode="nearest") for c in range(3)]
        assert np.abs(np.stack(want, -1) - image).max() > 20  # the image did change
        np.testing.assert_allclose(got, np.stack(want, -1), atol=0.02)  # of 255: places are float32 here


def test_values_change_by_at_most_what_was_asked():
    images = np.clip(pictures(64), 80, 170)  # far from 0 and 255, where they would be cut
    keys = jax.random.split(jax.random.key(1), 64)
    x = images.astype(np.float32)
    flipped = np.asarray(jax.jit(Augment(flip=True))(images, keys))
    turned = (flipped == x[:, :, ::-1]).all(axis=(1, 2, 3))
    assert ((flipped == x).all(axis=(1, 2, 3)) ^ turned).all() and 16 < turned.sum() < 48
    added = np.asarray(jax.jit(Augment(brightness=0.1))(images, keys)) - x
    assert np.ptp(added, axis=(1, 2, 3)).max() < 1e-3 and 20 < np.abs(added).max() <= 25.5 and added.min() < 0 < added.max()
    centred = x - x.mean(axis=(1, 2, 3), keepdims=True)
    changed = np.asarray(jax.jit(Augment(contrast=0.4))(images, keys)) - x
    factor = (changed * centred).sum(axis=(1, 2, 3), keepdims=True) / (centred**2).sum(axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(changed, factor * centred, atol=1e-3)
    assert np.abs(factor).max() <= 0.4 + 1e-4 and np.ptp(factor) > 0.5
    noise = np.asarray(jax.jit(Augment(noise=0.05))(images, keys)) - x
    assert abs(noise.std() / (255 * 0.05) - 1) < 0.05 and abs(noise.mean()) < 1
    cut = np.asarray(jax.jit(Augment(brightness=5))(images, keys))
    assert cut.min() == 0 and cut.max() == 255


# --------------------------------------------------------------------------- views


def network(head: str) -> models.VisionModel:
    return models.build(models.new_vit(image=8, patch=4, width=16, layers=2, heads=2, mlp=32), head=head, classes=10)


def model_of(objective: str, augment: Augment):
    if objective == "contrastive":
        return views.Contrastive(network("none"), augment, 24, 8), losses.make("contrastive", ground_truth=True)
    return views.Augmented(network("new"), augment), losses.make(objective, ground_truth=False)


def one_step(objective: str, microbatches: int, mesh_shape: tuple[tuple[str, int], ...], augment: Augment = Augment(**EVERYTHING)):  # noqa: B008
    """A plain SGD step at rate 1: the parameters before less those after are the gradients. Returns loss and gradients."""
    shape = {"data": 1, "fsdp": 1, "model": 1} | dict(mesh_shape)
    mesh = mesh_lib.make_mesh(shape, jax.devices()[: int(np.prod(list(shape.values())))])
    model, loss = model_of(objective, augment)
    program = train.Program(model, loss, optimizers.make("sgd", {}, weight_decay=0.0, grad_clip=0.0), mesh)
    images = pictures(BATCH)
    labels = np.random.default_rng(1).dirichlet(np.ones(10), BATCH).astype(np.float32)
    corpus = feeding.Images(lambda rows: images[rows], (8, 8), labels, [str(i) for i in range(BATCH)])
    plan = corpus.plan([np.arange(BATCH)], [range(1)], microbatches=microbatches, cells=mesh_lib.cells(mesh), embed=16)
    xs = train._inputs(plan, range(1), plan.shapes[0], 1, corpus, [1.0], [0.3], mesh)
    start = random_params(model.abstract)
    params = jax.device_put(start, program.shardings()["trainable"])
    arguments = (params, program.optimizer.init(params), loss.init_state(), {}, jax.random.key(5), np.int32(1), xs)
    after, _, _, metrics = jax.jit(functools.partial(train._dispatch, program)).lower(*arguments).compile()(*arguments)
    return float(metrics[0, 0]), jax.tree.map(lambda a, b: a - np.asarray(b), start, jax.device_get(after))


@pytest.mark.parametrize("objective", ["contrastive", "xent"])  # a loss of the whole batch, and one by image
def test_a_step_is_the_same_however_the_batch_is_cut(objective, monkeypatch):
    """Augmented images, batch-wide losses and gradients: one device and one batch against microbatches and fake devices."""
    fast_compiles(monkeypatch)
    value, gradients = one_step(objective, 1, ())
    assert max(np.abs(g).max() for g in jax.tree.leaves(gradients)) > 1e-3
    if objective == "xent":
        assert abs(value - one_step(objective, 1, (), Augment())[0]) > 1e-3  # the augmentation is seen
    for microbatches, mesh_shape in ((3, ()), (2, (("data", 2), ("fsdp", 4)))):
        other, theirs = one_step(objective, microbatches, mesh_shape)
        assert abs(other - value) < 1e-5, (microbatches, mesh_shape)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), theirs, gradients)


def test_augmentation_is_for_training_alone():
    augmented, model = views.Augmented(network("new"), Augment(**EVERYTHING)), network("new")
    params = random_params(model.abstract)
    batch = {"images": pictures(4)[None], "documents": np.arange(4, dtype=np.int32)[None]}
    plain = jax.jit(model.apply)(params, batch)
    np.testing.assert_array_equal(jax.jit(augmented.apply)(params, batch), plain)
    assert np.abs(jax.jit(augmented.apply)(params, batch, jax.random.key(0)) - plain).max() > 1e-3


# --------------------------------------------------------------------------- the contrastive loss


def torch_nt_xent(z: torch.Tensor, temperature: float) -> torch.Tensor:
    """NT-Xent as SimCLR's authors write it: cross-entropy over the 2n - 1 other views; `z` [2n, outputs], views n apart."""
    z = F.normalize(z, dim=-1)
    similar = (z @ z.T / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool), float("-inf"))
    n = len(z) // 2
    return F.cross_entropy(similar, torch.cat([torch.arange(n, 2 * n), torch.arange(n)]))


@functools.partial(jax.jit, static_argnums=2)
def ours(z: np.ndarray, weights: np.ndarray, temperature: float):
    loss = losses.make("contrastive", {"temperature": temperature}, ground_truth=True)
    context = losses.Context(jnp.float32(0), weights, weights.sum())
    return jax.value_and_grad(lambda z: loss(z, jnp.zeros((len(weights), 1)), context, {})[0])(z)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize("n", [33])
def test_contrastive_loss_is_simclrs(n, temperature):
    z = np.random.default_rng(n).normal(size=(n, 2, 12)).astype(np.float32)
    value, gradient = ours(z.reshape(n, -1), np.ones(n, np.float32), temperature)
    theirs = torch.tensor(z, requires_grad=True)
    expected = torch_nt_xent(theirs.transpose(0, 1).reshape(2 * n, -1), temperature)
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(gradient, theirs.grad.reshape(n, -1), atol=1e-5)


@pytest.mark.parametrize("rubbish", [1e4, np.nan])
def test_empty_slots_have_no_influence(rubbish):
    z = np.random.default_rng(0).normal(size=(9, 24)).astype(np.float32)
    real = np.array([1, 1, 0, 1, 0, 1, 1, 1, 0], np.float32)
    value, gradient = ours(z[real > 0], np.ones(6, np.float32), 0.2)
    spoilt = np.where(real[:, None] > 0, z, np.float32(rubbish))
    other, theirs = ours(spoilt, real, 0.2)
    np.testing.assert_allclose(other, value, atol=1e-6)
    np.testing.assert_allclose(theirs[real > 0], gradient, atol=1e-6)
    assert (np.asarray(theirs)[real == 0] == 0).all()


def test_views_are_two_and_differ():
    """The projections of a batch are those of its views, each made by the image's own key, through backbone and projector."""
    model, _ = model_of("contrastive", Augment(**EVERYTHING))
    params, key = random_params(model.abstract), jax.random.key(2)
    batch = {"images": pictures(6).reshape(2, 3, 8, 8, 3), "documents": np.array([[0, 1, 2], [3, 4, -1]], np.int32)}
    got = np.asarray(jax.jit(model.apply)(params, batch, key)).reshape(6, 2, 8)
    backbone = {k: params[k] for k in model.model.abstract}
    changed = jax.jit(model.augment)
    features = jax.jit(lambda image: model.model.features(backbone, {"images": image[None], "documents": np.zeros((1, 1), np.int32)})[0, 0])
    for i, document in enumerate(batch["documents"].reshape(-1)[:5]):
        for view in range(2):
            own = jax.random.fold_in(jax.random.fold_in(key, document), 2 + view)
            h = np.asarray(features(changed(batch["images"].reshape(6, 8, 8, 3)[i : i + 1], own[None])))
            up, down = params["projector"]["up"], params["projector"]["down"]
            want = np.maximum(h @ up["kernel"] + up["bias"], 0) @ down["kernel"] + down["bias"]
            np.testing.assert_allclose(got[i, view], want, atol=1e-5)
    assert np.abs(got[:, 0] - got[:, 1]).max() > 1e-2
