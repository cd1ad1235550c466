"""Multinomial regression to convergence: against scikit-learn, scipy in double, and its own folds one by one."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax
from sklearn.linear_model import LogisticRegression

from w2s_jax.errors import UserError
from w2s_jax.probes import glm, path

K = 4


def sample(n=300, d=9, seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    truth = rng.integers(K, size=n)
    features = rng.normal(size=(n, d)) * np.logspace(0, -spread, d) + 0.8 * rng.normal(size=(K, d))[truth] + 3
    soft = np.exp(rng.normal(size=(n, K)) + 2 * np.eye(K)[truth])
    return features.astype(np.float32), truth, (soft / soft.sum(1, keepdims=True)).astype(np.float32)


def optimum(features, soft, l2):
    """The minimum in double by scipy: weights `[d, K]`, bias `[K]`, objective."""
    x, y = features.astype(np.float64), soft.astype(np.float64)
    d = x.shape[1]

    def objective(theta):
        w, b = theta[:-K].reshape(d, K), theta[-K:]
        z = x @ w + b
        log_p = z - logsumexp(z, axis=1, keepdims=True)
        r = (np.exp(log_p) * y.sum(1, keepdims=True) - y) / len(x)
        return -(y * log_p).sum() / len(x) + l2 * (w**2).sum(), np.append((x.T @ r + 2 * l2 * w).ravel(), r.sum(0))

    found = minimize(objective, np.zeros((d + 1) * K), jac=True, method="L-BFGS-B", options={"maxiter": 20_000, "maxfun": 50_000,
                                                                                          "ftol": 1e-16, "gtol": 1e-10, "maxcor": 50})
    return found.x[:-K].reshape(d, K), found.x[-K:], found.fun


def centred(bias):
    return bias - bias.mean()  # a constant on all scores changes nothing


@pytest.mark.parametrize("block", [2**22, 64])  # all rows in one block, and 5 of them with the last filled up
@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_is_scikit_learns(l2, block, monkeypatch):
    if block == 64:
        monkeypatch.setattr(path.Rows, "size", property(lambda rows: 64))
    features, truth, _ = sample()
    fit = path.fit_path(features, truth, [l2])[0]
    theirs = LogisticRegression(C=1 / (2 * l2 * len(truth)), tol=1e-10, max_iter=20_000).fit(features.astype(np.float64), truth)
    assert fit.converged
    np.testing.assert_allclose(fit.weights.T, theirs.coef_, atol=1e-4)
    np.testing.assert_allclose(centred(fit.bias), centred(theirs.intercept_), atol=5e-4)  # weights times the mean row are in it
    np.testing.assert_allclose(softmax(fit.logits(features), axis=1), theirs.predict_proba(features), atol=1e-4)


@pytest.mark.parametrize(("n", "d"), [(300, 9), (60, 100)])  # the second: fewer rows than features
def test_path_on_soft_labels_is_the_optimum_in_double(n, d):
    features, _, soft = sample(n, d, spread=2.0)
    fits = path.fit_path(features, soft, [1e-3, 1e-1, 1e-2])
    assert [fit.l2 for fit in fits] == [1e-1, 1e-2, 1e-3]
    for fit in fits:
        weights, bias, value = optimum(features, soft, fit.l2)
        assert fit.converged and fit.objective == pytest.approx(value, abs=1e-6)
        np.testing.assert_allclose(fit.weights, weights, atol=1e-4)
        np.testing.assert_allclose(fit.logits(features), features @ weights + centred(bias) + (fit.bias - centred(fit.bias)), atol=5e-4)
    alone = path.fit_path(features, soft, [1e-3])[0]
    np.testing.assert_allclose(alone.weights, fits[-1].weights, atol=1e-4)  # the warm start changes the way, not the end
    assert fits[0].loss > fits[1].loss > fits[2].loss


def cross_entropy(fit, features, soft):
    z = fit.logits(features).astype(np.float64)
    return -(soft * (z - logsumexp(z, axis=1, keepdims=True))).sum(1)


def test_the_penalty_is_chosen_by_held_out_labels():
    features, truth, soft = sample(120, 30)
    noisy = np.where(np.random.default_rng(1).random(120) < 0.3, (truth + 1) % K, truth)
    l2s = [1.0, 1e-1, 1e-2, 1e-3, 1e-5]
    fits = path.fit_path(features[:60], noisy[:60], l2s, heldout=(features[60:], noisy[60:]))
    for fit in fits:
        assert fit.heldout_loss == pytest.approx(cross_entropy(fit, features[60:], np.eye(K)[noisy[60:]]).mean(), abs=1e-4)
    best = path.choose(fits)
    assert 0 < best < 4 and fits[best].heldout_loss == min(fit.heldout_loss for fit in fits)
    mixed = path.fit_path(features[:60], noisy[:60], [1e-2], heldout=(features[60:], soft[60:]))
    assert mixed[0].heldout_loss == pytest.approx(cross_entropy(mixed[0], features[60:], soft[60:]).mean(), abs=1e-4)


def test_folds_are_fits_without_them():
    features, _, soft = sample(90, 6)
    groups = [f"g{i // 2}" for i in range(90)]
    fits = path.fit_path(features, soft, [1e-1, 1e-3], folds=3, seed=4, groups=groups)
    parts = glm.fold_of(90, 3, 4, groups)
    for i, l2 in enumerate((1e-1, 1e-3)):
        losses = [cross_entropy(path.fit_path(features[parts != f], soft[parts != f], [l2])[0], features[parts == f], soft[parts == f])
                  for f in range(3)]
        assert fits[i].heldout_loss == pytest.approx(np.concatenate(losses).mean(), abs=1e-4)
        np.testing.assert_allclose(fits[i].weights, path.fit_path(features, soft, [l2])[0].weights, atol=1e-4)


def test_classes_without_a_row():
    """Their bias has no lower limit: the fit ends where they have next to no probability, and says that it has converged."""
    features, truth, _ = sample()
    fit = path.fit_path(features, truth, [1e-2], classes=K + 2)[0]
    p = softmax(fit.logits(features), axis=1)
    assert fit.converged and p.shape == (300, K + 2) and p[:, K:].max() < 1e-3
    np.testing.assert_allclose(p[:, :K], softmax(path.fit_path(features, truth, [1e-2])[0].logits(features), axis=1), atol=1e-3)


def test_limit_of_iterations_is_said(capfd):
    features, truth, _ = sample()
    fit = path.fit_path(features, truth, [1e-5], iterations=5)[0]
    assert not fit.converged and fit.iterations == 5 and fit.gradient_norm > path.TOLERANCE
    assert "not converged after 5 evaluations at l2=1e-05" in capfd.readouterr().err


FEATURES, TRUTH, SOFT = sample(40, 3)


@pytest.mark.parametrize(("arguments", "options", "message"), [
    ((FEATURES, TRUTH, []), {}, r"l2=\[\]"), ((FEATURES, TRUTH, [0.0]), {}, r"l2=\[0.0\]"), ((FEATURES, TRUTH[:-1], [1.0]), {}, r"\[39\]"),
    ((FEATURES, 0 * TRUTH, [1.0]), {}, "1 class, expected 2"), ((FEATURES, TRUTH, [1.0]), {"classes": 3}, "class 3, expected one below 3"),
    ((FEATURES, SOFT, [1.0]), {"classes": 7}, "4 classes, expected 7"), ((FEATURES, SOFT * 2, [1.0]), {}, "no distribution"),
    ((FEATURES, SOFT, [1.0]), {"folds": 41}, "folds=41"), ((FEATURES, SOFT, [1.0]), {"folds": 2, "heldout": (FEATURES, SOFT)}, "not both"),
    ((FEATURES, SOFT, [1.0]), {"heldout": (FEATURES[:, :2], SOFT)}, "expected 3 as in the fit"),
    ((FEATURES, SOFT, [1.0]), {"heldout": (FEATURES, TRUTH + 1)}, "class 4, expected one below 4"),
])  # fmt: skip
def test_bad_input(arguments, options, message):
    with pytest.raises(UserError, match=message):
        path.fit_path(*arguments, **options)


def test_nothing_held_out_nothing_to_choose():
    with pytest.raises(UserError, match="held out"):
        path.choose(path.fit_path(FEATURES, SOFT, [1.0]))
