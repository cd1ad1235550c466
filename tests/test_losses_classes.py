"""The losses with more than two classes: against torch in double, and what they refuse."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import context, labels_of, retarget, value_and_gradient

from w2s_jax import losses
from w2s_jax.errors import UserError

CLASSES = 7


def many_classes(seed, n=12, hard=False):
    rng = np.random.default_rng(seed)
    labels = np.eye(CLASSES)[rng.integers(CLASSES, size=n)] if hard else rng.dirichlet(np.full(CLASSES, 0.5), n)
    return jnp.asarray(2 * rng.normal(size=(n, CLASSES)), jnp.float32), jnp.asarray(labels, jnp.float32)


def expected_of_many_classes(torch, name, z, y, c):
    """The losses once more in torch, in double, for any number of classes; those with a hardened prediction take the arg max."""
    F = torch.nn.functional
    p, hard = torch.softmax(z, -1).detach(), F.one_hot(z.argmax(-1), z.shape[-1]).double()
    clipped = torch.log(y.clamp(1e-6, 1 - 1e-6))
    if name == "adaptconf":  # the authors' formula, their distillation term without its constant
        own, label = (F.cross_entropy(z, t, reduction="none") for t in (z.argmax(-1), y.argmax(-1)))
        a = (torch.exp(own / 0.5) / (torch.exp(own / 0.5) + torch.exp(label / 0.5))).detach()
        distilled = F.kl_div(F.log_softmax(z, -1), y, reduction="none").sum(1) - torch.special.xlogy(y, y).sum(1)
        return ((1 - a) * distilled).mean() + (a * F.cross_entropy(z, z.argmax(-1), reduction="none")).mean()
    if name == "window":
        return (F.cross_entropy(z, y, reduction="none") * (p.max(-1).values < 0.65)).mean()
    if name == "kl":
        return F.kl_div(F.log_softmax(z, -1), y, reduction="batchmean")
    if name.startswith("reverse"):
        q = torch.softmax(z, -1)
        return (q * ((torch.log(q) if name == "reverse_kl" else 0) - clipped)).sum(-1).mean()
    targets = {"xent": y, "product": p * y / (p * y).sum(-1, keepdim=True), "entropy": (1 - c) * y + c * p}
    return F.cross_entropy(z, targets.get(name, (1 - c) * y + c * hard))


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("name", [name for name in losses.LOSSES if name != "logconf_eleuther"])
def test_many_classes_against_torch(name, hard):
    torch = pytest.importorskip("torch")
    logits, labels = many_classes(8, hard=hard)
    z = torch.tensor(np.array(logits, np.float64), requires_grad=True)
    expected = expected_of_many_classes(torch, name, z, torch.tensor(np.array(labels, np.float64)), 0.3)
    expected.backward()
    value, gradient, _ = value_and_gradient(losses.make(name, ground_truth=False), logits, labels, context(12, 0.3), slots=15)
    assert value == pytest.approx(expected.item(), abs=2e-6)
    np.testing.assert_allclose(gradient, z.grad.numpy(), atol=2e-7)


@pytest.mark.parametrize("temperature", [0.01, 0.5, 4.0])
def test_adaptconf_weights(temperature):
    """One half where student and label agree; below where not, and finite at logits where the published quotient is inf / inf."""
    loss = losses.make("adaptconf", {"temperature": temperature}, ground_truth=False)
    logits = jnp.asarray([[3.0, 0.0, 0.0], [3.0, 0.0, 0.0], [900.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    targets, _ = retarget(loss, logits, jnp.eye(3)[jnp.array([0, 1, 1, 1])], context(4), {})
    share = 1 / (1 + math.exp(min(3 / temperature, 700)))
    np.testing.assert_allclose(targets, [[1, 0, 0], [share, 1 - share, 0], [0, 1, 0], [0.5, 0.5, 0]], atol=1e-6)


def test_midweak_of_many_classes():
    soft = np.array([[0.2, 0.3, 0.5], [0.1, 0.8, 0.1], [0.4, 0.35, 0.25], [0.05, 0.05, 0.9]])
    assert losses.label_statistics(soft)["midweak"] == pytest.approx(0.0)  # -.1, 0, .3, .4
    assert losses.label_statistics(soft[[0, 2]])["midweak"] == pytest.approx(-0.1)
    two = np.asarray(labels_of([0.9, 0.4, 0.55, 0.75]))
    assert losses.label_statistics(two)["midweak"] == pytest.approx(
        losses.label_statistics(np.pad(two, ((0, 0), (0, 1))))["midweak"], abs=1e-7)


@pytest.mark.parametrize("name", ["logconf_eleuther"])
def test_three_classes_refused_by_thresholds(name):
    loss = losses.make(name, ground_truth=False)
    with pytest.raises(UserError, match="3 classes"):
        loss(jnp.zeros((4, 3)), jnp.full((4, 3), 1 / 3), context(4), loss.init_state())
