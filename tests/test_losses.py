"""Losses: values by hand, the references' figures, and independence of empty slots and of the cut into microbatches."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax import losses
from w2s_jax.errors import UserError

LN2 = math.log(2)


def context(n, coefficient=0.0, mask=None, denominator=None):
    mask = np.ones(n) if mask is None else np.asarray(mask)
    denominator = mask.sum() if denominator is None else denominator
    return losses.Context(jnp.float32(coefficient), jnp.asarray(mask, jnp.float32), jnp.float32(denominator))


def logits_of(p0):
    """Logits whose softmax gives class 0 the probabilities `p0`, shifted to check that only differences count."""
    p0 = np.asarray(p0, np.float64)
    return jnp.asarray(np.stack([np.log(p0), np.log1p(-p0)], -1) + 3.0, jnp.float32)


def labels_of(s):
    s = np.asarray(s, np.float64)
    return jnp.asarray(np.stack([1 - s, s], -1), jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def differentiate(loss, logits, labels, ctx, state):
    return jax.value_and_grad(lambda z: loss(z, labels, ctx, state), has_aux=True)(logits)


@functools.partial(jax.jit, static_argnums=0)
def retarget(loss, logits, labels, ctx, state):
    real = ctx.weights > 0
    targets, weights, _ = losses.LOSSES[loss.name].rule(loss, logits, jax.nn.softmax(logits), labels, ctx, real, state)
    return targets, jnp.broadcast_to(weights, real.shape)


def value_and_gradient(loss, logits, labels, ctx, state=None, slots=12):
    """Of a batch of `slots`, the last ones empty, so that most tests share a program (and none could do with a plain mean)."""
    n, extra = len(logits), max(slots - len(logits), 0)
    logits, labels = (jnp.pad(x, ((0, extra), (0, 0))) for x in (logits, labels))
    ctx = ctx._replace(weights=jnp.pad(ctx.weights, (0, extra)))
    (value, state), gradient = differentiate(loss, logits, labels, ctx, loss.init_state() if state is None else state)
    return float(value), np.asarray(gradient)[:n], state


def random_batch(rng, n, hard=False):
    s = rng.random(n)
    return jnp.asarray(2 * rng.normal(size=(n, 2)), jnp.float32), labels_of(s.round() if hard else s)


# Two documents; p0 = class 0's probability, s = the label's probability of class 1, c = the coefficient.
BY_HAND = {
    # -(log .5 + .75 log .8 + .25 log .2) / 2
    "xent": ("xent", {}, 0.0, [0.5, 0.8], [1.0, 0.25], (LN2 + 0.75 * math.log(5 / 4) + 0.25 * math.log(5)) / 2),
    # the target of (.8, .2) * (.2, .8) is (.5, .5); a hard label stays itself
    "product": ("product", {}, 0.0, [0.8, 0.25], [0.8, 1.0], (0.5 * (math.log(5 / 4) + math.log(5)) + math.log(4 / 3)) / 2),
    # beta = 0 is xent; alpha = 0 is the student's own entropy, hard labels too
    "product_beta0": ("product", {"beta": 0.0}, 0.0, [0.8, 0.5], [0.25, 1.0], (LN2 + 0.75 * math.log(5 / 4) + 0.25 * math.log(5)) / 2),
    "product_alpha0": ("product", {"alpha": 0.0}, 0.0, [0.5, 0.8], [0.0, 1.0], (LN2 + 0.8 * math.log(5 / 4) + 0.2 * math.log(5)) / 2),
    # median .65: the second document hardens to class 0, the first to class 1; labels say the opposite
    "logconf": ("logconf", {}, 0.25, [0.5, 0.8], [0.0, 1.0], (LN2 + 0.25 * math.log(5 / 4) + 0.75 * math.log(5)) / 2),
    # equal predictions: each reaches the quantile, all harden to class 0
    "logconf_ties": ("logconf", {}, 0.5, [0.2, 0.2], [1.0, 1.0], 0.5 * math.log(5) + 0.5 * math.log(5 / 4)),
    # level = mean label = 1: q = the largest prediction, and only it hardens to class 0
    "openai_level1": ("logconf_openai", {}, 0.5, [0.5, 0.8], [1.0, 1.0], (LN2 + 0.5 * (math.log(5 / 4) + math.log(5))) / 2),
    # level 0: q = the smallest, everything hardens to class 0
    "openai_level0": ("logconf_openai", {}, 0.5, [0.5, 0.8], [0.0, 0.0], (LN2 + math.log(5 / 4)) / 2),
    # level .9 of (.5, .8): q = .77
    "eleuther": ("logconf_eleuther", {}, 0.5, [0.5, 0.8], [1.0, 0.8], (LN2 + 0.6 * math.log(5 / 4) + 0.4 * math.log(5)) / 2),
    # one by one: the first is its own quantile and hardens to class 0, then q = .65 over both and the second to class 1
    "eleuther_chunk1": ("logconf_eleuther", {"chunk": 1}, 0.5, [0.8, 0.5], [1.0, 0.0], (LN2 + 0.5 * math.log(4) - math.log(0.8)) / 2),
    # log-odds log 4 and 0 centre to +-log 2, labels to 2/3 and 1/3; level .5 of (.5, .8)
    "eleuther_balanced": ("logconf_eleuther", {"balance_batch": True}, 0.0, [0.8, 0.5], [0.8, 0.5],
                          (2 / 3 * math.log(5) + 1 / 3 * math.log(5 / 4) + LN2) / 2),
    # target .75 (0, 1) + .25 (.8, .2)
    "entropy": ("entropy", {}, 0.25, [0.5, 0.8], [1.0, 1.0], (LN2 + 0.2 * math.log(5 / 4) + 0.8 * math.log(5)) / 2),
    # .8 is outside of .5 + .15, and still counts in the divisor
    "window": ("window", {}, 0.0, [0.5, 0.8], [1.0, 1.0], LN2 / 2),
    "window_wide": ("window", {"radius": 0.31}, 0.0, [0.5, 0.8], [1.0, 1.0], (LN2 + math.log(5)) / 2),
    "kl": ("kl", {}, 0.0, [0.5, 0.8], [0.5, 1.0], math.log(5) / 2),
    "kl_self": ("kl", {}, 0.0, [0.3, 0.9], [0.7, 0.1], 0.0),
    "reverse_xent": ("reverse_xent", {}, 0.0, [0.5, 0.8], [0.5, 0.2], (LN2 + 0.8 * math.log(5 / 4) + 0.2 * math.log(5)) / 2),
    "reverse_xent_hard": ("reverse_xent", {}, 0.0, [0.8, 0.8], [1.0, 1.0], 0.8 * 6 * math.log(10) + 0.2 * 1e-6),
    "reverse_kl": ("reverse_kl", {}, 0.0, [0.5, 0.8], [0.2, 0.2], 0.5 * (math.log(5 / 4) + math.log(5)) / 2 - LN2 / 2),
}


@pytest.mark.quick
@pytest.mark.parametrize("case", BY_HAND)
def test_by_hand(case):
    name, args, coefficient, p0, s, expected = BY_HAND[case]
    loss = losses.make(name, args, ground_truth=False)
    value, _, _ = value_and_gradient(loss, logits_of(p0), labels_of(s), context(2, coefficient))
    assert value == pytest.approx(expected, abs=3e-6 if case == "reverse_xent_hard" else 1e-6)


@pytest.mark.parametrize("key, name, args", [
    ("xent", "xent", {}), ("kl", "kl", {}), ("entropy", "entropy", {}), ("logconf", "logconf_eleuther", {}),
    ("logconf_balanced", "logconf_eleuther", {"balance_batch": True}),
    *[(f"window_{r}", "window", {"radius": r}) for r in (0.05, 0.15, 0.4)],
])
def test_golden_eleuther(shared, key, name, args):
    golden = json.loads((shared / "golden/eleuther/losses.json").read_text())
    loss = losses.make(name, args, ground_truth=False)
    state = loss.init_state()
    for i, (z, s) in enumerate(zip(golden["logits"], golden["labels"], strict=True)):
        ctx = context(16, loss.coefficient(40 * i, 10_000))
        value, gradient, state = value_and_gradient(loss, jnp.asarray(z, jnp.float32), labels_of(s), ctx, state)
        assert value == pytest.approx(golden["loss"][key][i], abs=5e-7)
        if f"{key}_grad" in golden["loss"]:
            np.testing.assert_allclose(gradient, golden["loss"][f"{key}_grad"][i], atol=5e-8)


@pytest.mark.quick
@pytest.mark.parametrize("name, args, ground_truth, total, expected", [
    # strictly above .1 it jumps; 2/20 and 5/50 are exactly the double .1
    ("logconf_openai", {}, False, 20, {0: 0.0, 1: 0.025, 2: 0.05, 3: 0.5, 19: 0.5}),
    ("logconf_openai", {}, True, 50, {5: 0.05, 6: 0.5}),
    ("logconf", {}, False, 100, {0: 0.0, 10: 0.25, 20: 0.5, 21: 0.5, 99: 0.5}),
    ("logconf", {"aux_coef": 0.75, "warmup": 0.0}, False, 100, {0: 0.75}),
    ("logconf_eleuther", {}, False, 30, {0: 0.0, 25: 0.125, 29: 0.145}),
    ("logconf_eleuther", {"warmup": 10}, False, 100, {5: 0.25, 10: 0.5, 99: 0.5}),
    ("logconf_eleuther", {}, True, 1000, {0: 0.0, 500: 0.0}),
    ("entropy", {"warmup": 0}, False, 1000, {0: 0.5}),
    ("entropy", {}, True, 1000, {500: 0.0}),
    ("xent", {}, False, 10, {5: 0.0}),
])
def test_coefficients(name, args, ground_truth, total, expected):
    loss = losses.make(name, args, ground_truth=ground_truth)
    assert {step: loss.coefficient(step, total) for step in expected} == expected


VARIANTS = [(name, {}) for name in losses.LOSSES] + [
    ("product", {"alpha": 2.0, "beta": 0.5}),
    ("logconf_eleuther", {"chunk": 3, "buffer": 5}),
    ("logconf_eleuther", {"chunk": 1, "balance_batch": True}),
    ("logconf_eleuther", {"chunk": 4, "buffer": 2, "balance_batch": True}),
]


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("name, args", VARIANTS)
def test_masked_is_compacted(name, args, hard):
    """Empty slots, whatever stands in them and wherever they are, change no bit of value, gradient or state."""
    rng = np.random.default_rng(1)
    loss = losses.make(name, args, ground_truth=False)
    real = np.array([1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0], bool)
    states = [loss.init_state(), loss.init_state()]
    for _ in range(3):
        logits, labels = random_batch(rng, real.sum(), hard)
        wide_logits, wide_labels = np.full((12, 2), np.nan, np.float32), np.full((12, 2), np.inf, np.float32)
        wide_logits[real], wide_labels[real] = logits, labels
        compact = value_and_gradient(loss, logits, labels, context(real.sum(), 0.3), states[0], slots=0)
        masked = value_and_gradient(loss, jnp.asarray(wide_logits), jnp.asarray(wide_labels), context(12, 0.3, real), states[1])
        assert masked[0] == pytest.approx(compact[0], abs=1e-6)
        np.testing.assert_allclose(masked[1][real], compact[1], atol=1e-7)
        assert not masked[1][~real].any()
        states = [compact[2], masked[2]]
        jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.parametrize("name, args", [v for v in VARIANTS if losses.LOSSES[v[0]].per_document])
def test_per_document_losses_add_up(name, args):
    rng = np.random.default_rng(2)
    loss = losses.make(name, args, ground_truth=False)
    assert loss.per_document
    logits, labels = random_batch(rng, 12)
    mask = np.array([1] * 9 + [0] * 3)
    whole = value_and_gradient(loss, logits, labels, context(12, 0.3, mask))
    parts = [value_and_gradient(loss, logits[i:i + 4], labels[i:i + 4], context(4, 0.3, mask[i:i + 4], denominator=9), slots=4)
             for i in (0, 4, 8)]
    assert sum(p[0] for p in parts) == pytest.approx(whole[0], abs=1e-6)
    np.testing.assert_allclose(np.concatenate([p[1] for p in parts]), whole[1], atol=1e-7)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_weights_multiply_a_documents_term(name):
    """Its gradient too; what a loss takes from the whole batch (a quantile, a mean) does not depend on them."""
    loss = losses.make(name, ground_truth=False)
    logits, labels = random_batch(np.random.default_rng(6), 8)
    plain, weighted = context(8, 0.3), context(8, 0.3)._replace(weights=jnp.float32([2, 0.5, 1, 0.25, 3, 1, 1, 0.5]))
    value, gradient, _ = value_and_gradient(loss, logits, labels, plain)
    _, scaled, _ = value_and_gradient(loss, logits, labels, weighted)
    np.testing.assert_allclose(scaled, gradient * np.asarray(weighted.weights)[:, None], rtol=1e-5, atol=1e-8)
    double, _, _ = value_and_gradient(loss, logits, labels, plain._replace(weights=jnp.full(8, 2.0)))
    np.testing.assert_allclose(double, 2 * value, rtol=1e-6)


def test_threshold_losses_need_the_whole_batch():
    assert {name for name in losses.LOSSES if not losses.make(name, ground_truth=False).per_document} == {
        "logconf", "logconf_openai", "logconf_eleuther"}


@pytest.mark.parametrize("chunk, buffer, balance", [(1, 32, False), (4, 32, False), (0, 32, False), (3, 4, False), (8, 5, False),
                                                    (1, 32, True), (4, 6, True)])
def test_eleuther_against_a_growing_list(chunk, buffer, balance):
    """The reference keeps every prediction in a list and reads its end, one micro-batch after the other."""
    rng = np.random.default_rng(3)
    loss = losses.make("logconf_eleuther", {"chunk": chunk, "buffer": buffer, "balance_batch": balance}, ground_truth=False)
    state, seen, n = loss.init_state(), [], 8
    for step in range(6):
        logits, labels = random_batch(rng, n)
        c = loss.coefficient(60 * step, 1000)
        value, _, state = value_and_gradient(loss, logits, labels, context(n, c), state)
        p0 = 1 / (1 + np.exp(np.asarray(logits[:, 1], np.float64) - np.asarray(logits[:, 0], np.float64)))
        expected, width = [], chunk or n
        for start in range(0, n, width):
            s = np.asarray(labels[start:start + width, 1], np.float64)
            level = s.mean() if len(s) > 1 else 0.5
            if balance:
                odds = np.log(s + 1e-7) - np.log(1 - s + 1e-7)
                s, level = 1 / (1 + np.exp(odds.mean() - odds)), 0.5
            p = p0[start:start + width]
            seen += list(p)
            hard = p >= np.quantile(seen[-buffer:], level) - 1e-9  # float32 against float64 where a prediction is the quantile
            expected += list(-((1 - c) * (1 - s) + c * hard) * np.log(p) - ((1 - c) * s + c * ~hard) * np.log1p(-p))
        assert value == pytest.approx(np.mean(expected), abs=2e-6)


@pytest.mark.parametrize("name, args", [v for v in VARIANTS if losses.LOSSES[v[0]].rule])
def test_targets_are_detached(name, args):
    """The gradient is that of a cross-entropy against constants, weight * (p - target) / n: nothing flows through the target."""
    loss = losses.make(name, args, ground_truth=False)
    logits, labels = random_batch(np.random.default_rng(4), 12)
    targets, weights = retarget(loss, logits, labels, context(12, 0.4), loss.init_state())
    _, gradient, _ = value_and_gradient(loss, logits, labels, context(12, 0.4))
    np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(gradient, weights[:, None] * (jax.nn.softmax(logits) - targets) / 12, atol=1e-7)


@pytest.mark.parametrize("name", ["kl", "reverse_xent", "reverse_kl"])
def test_gradients_of_the_others(name):
    rng = np.random.default_rng(5)
    logits, labels = random_batch(rng, 6)
    p, y = np.asarray(jax.nn.softmax(logits), np.float64), np.asarray(labels, np.float64)
    if name == "kl":
        expected = (p - y) / 6
    else:
        slope = -np.log(y) + (np.log(p) if name == "reverse_kl" else 0)
        expected = p * (slope - (p * slope).sum(-1, keepdims=True)) / 6
    _, gradient, _ = value_and_gradient(losses.make(name, ground_truth=False), logits, labels, context(6))
    np.testing.assert_allclose(gradient, expected, atol=2e-7)


@pytest.mark.parametrize("name, args", VARIANTS)
def test_extreme_logits_stay_finite(name, args):
    """Saturated students on hard labels of the other class: large, not NaN."""
    loss = losses.make(name, args, ground_truth=False)
    value, gradient, _ = value_and_gradient(loss, jnp.asarray([[200.0, -200.0], [-200.0, 200.0]]), labels_of([1.0, 0.0]), context(2, 0.5))
    assert math.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("level", [0.0, 0.3, 0.5, 28 / 31, 1.0])
@pytest.mark.parametrize("n", [1, 2, 7, 32])
def test_quantile(n, level):
    rng = np.random.default_rng(n)
    values, valid = rng.random(40).astype(np.float32), np.zeros(40, bool)
    valid[rng.permutation(40)[:n]] = True
    got = losses.quantile(jnp.asarray(values), jnp.float32(level), jnp.asarray(valid))
    assert float(got) == pytest.approx(np.quantile(values[valid], level), abs=1e-7)
    assert float(losses.quantile(jnp.full(40, 0.1, jnp.float32), jnp.float32(level), jnp.asarray(valid))) == np.float32(0.1)


def test_openai_against_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(6)
    loss = losses.make("logconf_openai", ground_truth=False)
    for hard in [False, True] * 5:
        logits, labels = random_batch(rng, 32, hard)
        z, y = torch.tensor(np.array(logits), requires_grad=True), torch.tensor(np.array(labels))
        p = torch.softmax(z, -1)
        first = (p[:, 0] >= torch.quantile(p[:, 0], y.mean(0)[1]))[:, None]
        expected = torch.nn.functional.cross_entropy(z, (0.7 * y + 0.3 * torch.cat([first, ~first], 1)).detach())
        expected.backward()
        value, gradient, _ = value_and_gradient(loss, logits, labels, context(32, 0.3))
        assert value == pytest.approx(expected.item(), abs=5e-7)
        np.testing.assert_allclose(gradient, z.grad.numpy(), atol=2e-8)


def test_window_follows_the_weak_labels():
    stats = losses.label_statistics(np.asarray(labels_of([0.9, 0.4, 0.55, 0.75])))
    assert stats["midweak"] == pytest.approx(0.1)  # |s - .5| = .05 .1 .25 .4: the lower of the two in the middle
    assert losses.make("window", {"radius": "midweak"}, ground_truth=False, label_stats=stats)["radius"] == stats["midweak"]
    everything = losses.make("window", {"radius": "midweak"}, ground_truth=True, label_stats={})
    logits, labels = logits_of([0.999, 0.5, 1e-6]), labels_of([0.0, 1.0, 1.0])
    assert value_and_gradient(everything, logits, labels, context(3))[0] == pytest.approx(
        value_and_gradient(losses.make("xent", ground_truth=True), logits, labels, context(3))[0], abs=1e-7)


@pytest.mark.parametrize("soft_labels", [np.zeros((0, 2)), np.array([[0.5, 0.5], [np.nan, np.nan]]), np.zeros((0, 3)),
                                         np.array([[0.5, 0.3, 0.2], [np.nan, 0.1, 0.9]])])
def test_label_statistics_refuse(soft_labels):
    with pytest.raises(ValueError, match="NaN"):
        losses.label_statistics(soft_labels)


def test_next_token():
    """Documents of 3, 1 and 0 predicted tokens, the last one an empty slot: nats per predicted token of the whole batch."""
    loss = losses.make("next_token", ground_truth=True)
    ctx = context(3, mask=[1, 1, 0], denominator=4)
    value, gradient, _ = value_and_gradient(loss, jnp.asarray([[6.0], [1.0], [9.0]]), jnp.asarray([[3.0], [1.0], [0.0]]), ctx)
    assert value == pytest.approx(7 / 4) and loss.per_document
    np.testing.assert_allclose(gradient, [[0.25], [0.25], [0.0]])


def test_equal_losses_share_one_program():
    traces = []

    def step(loss, logits, labels, ctx, state):
        traces.append(loss.name)
        return loss(logits, labels, ctx, state)

    jitted = jax.jit(step, static_argnums=0)
    logits, labels = random_batch(np.random.default_rng(7), 8)
    for coefficient in (0.0, 0.1, 0.5):
        loss = losses.make("logconf_eleuther", {"buffer": 16, "chunk": None}, ground_truth=False)
        value, state = jitted(loss, logits, labels, context(8, coefficient), loss.init_state())
        assert float(value) == pytest.approx(value_and_gradient(loss, logits, labels, context(8, coefficient))[0], abs=1e-6)
    assert len(traces) == 1 and state["count"] == 8


@pytest.mark.quick
@pytest.mark.parametrize("name, args, stats, message", [
    ("xnet", {}, {}, "did you mean 'xent'"),
    ("xent", {"alpha": 1.0}, {}, "does not take it"),
    ("logconf", {"aux_coef": 1.5}, {}, "loss_args.aux_coef=1.5"),
    ("entropy", {"warmup": -1}, {}, "loss_args.warmup=-1"),
    ("logconf_eleuther", {"buffer": 0}, {}, "loss_args.buffer=0"),
    ("product", {"alpha": float("nan")}, {}, "loss_args.alpha=nan"),
    ("adaptconf", {"temperature": 0.0}, {}, "loss_args.temperature=0.0"),
    ("adaptconf", {"temperature": float("nan")}, {}, "loss_args.temperature=nan"),
    ("window", {"radius": "midwek"}, {}, "'midweak'"),
    ("window", {"radius": "midweak"}, {}, "label statistics"),
])
def test_make_refuses(name, args, stats, message):
    with pytest.raises(UserError, match=message):
        losses.make(name, args, ground_truth=False, label_stats=stats)


@pytest.mark.parametrize("name, said", [("reverse_kl", True), ("reverse_xent", True), ("kl", False)])
def test_clipping_is_said(name, said):
    assert ("clipped" in losses.make(name, ground_truth=False).notice) is said
