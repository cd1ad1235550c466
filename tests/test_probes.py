"""Probes: the references' figures, exact neighbours whatever the scale, and the stated minimum of every regression."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import NearestNeighbors

from w2s_jax import metrics, probes
from w2s_jax.config import PROBE_ARGS, probe_args, shipped
from w2s_jax.errors import UserError
from w2s_jax.probes import glm, lbfgs, neighbours, rows
from w2s_jax.probes.neighbours import Index
from w2s_jax.probes.rows import Rows
from w2s_jax.probes.topofilter import components

# probe and tolerance of the probabilities: the reference's logistic fits stop short of their minimum
CASES = {"knn_5": 1e-6, "knn_50": 1e-6, "logreg_0.001": 5e-4, "logreg_0.01": 2e-4, "logreg_0.1": 1e-5, "topo_5": 1e-6, "topo_20": 1e-6}


def case_of(name):
    kind, value = name.split("_")
    return {"knn": ("knn", {"k": int(float(value))}), "logreg": ("logistic", {"l2": float(value)}),
            "topo": ("topofilter", {"k": int(float(value))})}[kind]


@pytest.fixture(scope="module")
def golden(shared):
    content = json.loads((shared / "golden" / "eleuther" / "probes.json").read_text())
    return {k: v if k == "out" else np.array(v, np.float32) for k, v in content.items()}


@pytest.mark.parametrize("name", CASES)
def test_as_the_reference(golden, name):
    expected = golden["out"][name]
    fitted = probes.fit(*case_of(name), golden["train_acts"], golden["weak"])
    p = fitted.predict(golden["test_acts"])
    np.testing.assert_allclose(p, expected["label" if "topo" in name else "pred"], atol=CASES[name], rtol=0)
    assert np.flatnonzero(fitted.keep(0.1)).tolist() == sorted(expected["kept"])
    if "auc" in expected:
        for score in (p, metrics.scores(fitted.logits(golden["test_acts"]))):
            assert metrics.auroc(score, golden["test_gt"]) == pytest.approx(expected["auc"], abs=1e-7)
    if "cc" in expected:
        nearest = Index(Rows(golden["train_acts"])).neighbours(case_of(name)[1]["k"], itself=False)
        assert components(nearest, golden["weak"] > 0.5).tolist() == expected["cc"]
    if "logreg" in name:
        assert fitted.info["converged"]


# ---------------------------------------------------------------- neighbours


def points(kind, n=300, d=20, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    if kind == "offset":
        x += 1e4
    elif kind == "duplicates":
        x = x[rng.integers(n // 6, size=n)]
    elif kind == "equal":
        x[:] = x[0]
    elif kind == "far clusters":  # distances within a cluster are lost in the rounding of the norms
        x = 0.01 * x + 1e4 * rng.integers(2, size=(n, 1))
    elif kind == "scales":
        x *= np.logspace(4, -4, d)
    return x.astype(np.float32)


KINDS = ("plain", "offset", "duplicates", "equal", "far clusters", "scales")


def brute(queries, x, k, forbidden=None):
    """The k nearest in double, equal distances by index; each row ascending."""
    distance = np.stack([np.square(q - x.astype(np.float64)).sum(axis=1) for q in queries.astype(np.float64)])
    if forbidden is not None:
        distance = np.where(forbidden, np.inf, distance)
    return np.sort(np.argsort(distance, axis=1, kind="stable")[:, :k], axis=1)


@pytest.mark.parametrize("block", [32, 4096])
@pytest.mark.parametrize("kind", KINDS)
def test_exact_neighbours(kind, block, monkeypatch):
    monkeypatch.setattr(rows, "BLOCK_ROWS", block)
    x, k = points(kind), 7
    index, queries = Index(Rows(x)), points(kind, 41, seed=3)
    queries[:5] = x[:5]
    diagonal, members = np.eye(len(x), dtype=bool), np.arange(len(x)) % 3 != 0
    np.testing.assert_array_equal(index.neighbours(k, Rows(queries)), brute(queries, x, k))
    np.testing.assert_array_equal(index.neighbours(k), brute(x, x, k))
    np.testing.assert_array_equal(index.neighbours(k, itself=False), brute(x, x, k, diagonal))
    long = index.within(2 * k + neighbours.SLACK)
    np.testing.assert_array_equal(index.neighbours(k, candidates=long, itself=False, among=members), brute(x, x, k, diagonal | ~members))
    np.testing.assert_array_equal(index.neighbours(k, Rows(queries), among=members), brute(queries, x, k, ~members[None]))


@pytest.mark.parametrize("kind", ["plain", "offset", "scales"])
def test_neighbours_as_scikit_learn(kind):
    x, queries = points(kind, 500, 64), points(kind, 30, 64, seed=1)
    found = NearestNeighbors(n_neighbors=9, algorithm="brute").fit(x.astype(np.float64) - x[0]).kneighbors(
        queries.astype(np.float64) - x[0], return_distance=False)
    np.testing.assert_array_equal(Index(Rows(x)).neighbours(9, Rows(queries)), np.sort(found, axis=1))


def test_lists_too_short_are_made_again(monkeypatch):
    monkeypatch.setattr(neighbours, "SLACK", 0)
    x = points("far clusters")
    np.testing.assert_array_equal(Index(Rows(x)).neighbours(4), brute(x, x, 4))


def test_components():
    # 0 -> 1 -> 2 -> 0 is a cycle of class 1; 3 only points into it; 4 <-> 5 of class 0; 6 is linked both ways to the other class.
    nearest = np.array([[1, 6], [2, 6], [0, 3], [0, 1], [5, 6], [4, 0], [0, 1]])
    positive = np.array([1, 1, 1, 1, 0, 0, 0], bool)
    assert np.flatnonzero(components(nearest, positive)).tolist() == [0, 1, 2, 3, 4, 5]
    nearest[2] = [0, 6]  # now nothing points to 3
    assert np.flatnonzero(components(nearest, positive)).tolist() == [0, 1, 2, 4, 5]
    assert np.flatnonzero(components(nearest, np.ones(7, bool))).tolist() == [0, 1, 2, 6]  # without a class 0


# ---------------------------------------------------------------- regressions


def problem(n, d, kind="soft", seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    score = 3 * x @ rng.normal(size=d) / np.sqrt(d)
    soft = (score > 0) if kind == "separable" else 1 / (1 + np.exp(-score - rng.normal(size=n)))
    if kind == "scales":
        x *= np.logspace(1.5, -2, d)
    elif kind == "offset":
        x += 1e3
    elif kind == "dependent":
        x[:, d // 2 :] = x[:, : d - d // 2]
    return x.astype(np.float32), soft.astype(np.float32)


def exact(kind, x, soft, l2):
    """scikit-learn's minimum of the same objective, in double: (weights, bias)."""
    x, soft = x.astype(np.float64), soft.astype(np.float64)
    mean = x.mean(axis=0)
    if kind == "linear":
        found = Ridge(alpha=l2 * len(x), solver="svd").fit(x - mean, soft)
        return found.coef_, found.intercept_ - found.coef_ @ mean
    twice = LogisticRegression(C=1 / (2 * l2 * len(x)), tol=1e-10, max_iter=1000, solver="newton-cholesky")
    twice.fit(np.concatenate([x, x]) - mean, np.repeat([1, 0], len(x)), sample_weight=np.concatenate([soft, 1 - soft]))
    return twice.coef_[0], twice.intercept_[0] - twice.coef_[0] @ mean


@pytest.mark.parametrize("kind", ["logistic", "linear"])
@pytest.mark.parametrize("n, d, data, l2", [(200, 10, "soft", 1e-3), (200, 10, "offset", 1e-2), (200, 10, "separable", 1e-3),
                                            (60, 200, "separable", 1e-3), (60, 200, "soft", 10.0), (1000, 32, "scales", 1e-3),
                                            (1000, 32, "dependent", 1e-4)])
def test_minimum_as_scikit_learn(kind, n, d, data, l2):
    x, soft = problem(n, d, data)
    unseen, _ = problem(100, d, data, seed=1)
    fitted = probes.fit(kind, {"l2": l2}, x, soft)
    weights, bias = exact(kind, x, soft, l2)
    for at in (x, unseen):
        score = at.astype(np.float64) @ weights + bias
        expected = 1 / (1 + np.exp(-score)) if kind == "logistic" else np.clip(score, 0, 1)
        np.testing.assert_allclose(fitted.predict(at), expected, atol=1e-4, rtol=0)
    assert fitted.info["converged"] and fitted.info["l2"] == l2
    losses = np.logaddexp(0, x @ weights + bias) - soft * (x @ weights + bias) if kind == "logistic" else (x @ weights + bias - soft) ** 2
    assert fitted.info["objective"] == pytest.approx(losses.mean() + l2 * weights @ weights, abs=1e-5)


@pytest.mark.parametrize("kind", ["logistic", "linear"])
def test_penalty_by_cross_validation(kind):
    x, soft = problem(200, 10)
    soft = np.random.default_rng(5).permutation(soft) * 0.5 + soft * 0.5
    fitted = probes.fit(kind, {"folds": 4}, x, soft, seed=3)
    table, fold = fitted.info["cross_validation"], glm.fold_of(200, 4, 3)
    assert fitted.info["l2"] == table["l2"][int(np.argmin(table["loss"]))]
    for i in (0, 3, 5, 7):
        total = 0.0
        for held in range(4):
            weights, bias = exact(kind, x[fold != held], soft[fold != held], table["l2"][i])
            score, y = x[fold == held] @ weights + bias, soft[fold == held]
            total += np.sum(np.logaddexp(0, score) - y * score if kind == "logistic" else (score - y) ** 2)
        assert table["loss"][i] == pytest.approx(total / 200, abs=1e-4)
    given = probes.fit(kind, {"l2": fitted.info["l2"]}, x, soft)
    np.testing.assert_allclose(fitted.predict(x), given.predict(x), atol=1e-4)
    json.dumps(fitted.info, allow_nan=False)
    np.testing.assert_array_equal(probes.fit(kind, {"folds": 4}, x, soft, seed=3).predict(x), fitted.predict(x))


def test_folds_keep_groups_together():
    groups = np.random.default_rng(0).integers(40, size=300).astype(str)
    fold = glm.fold_of(300, 5, 1, groups)
    assert all(len(set(fold[groups == name])) == 1 for name in set(groups))
    assert np.bincount(fold, minlength=5).min() >= 58
    assert sorted(np.bincount(glm.fold_of(12, 3, 0, [*"aaaaaaaaaabc"]))) == [1, 1, 10]
    assert sorted(np.bincount(glm.fold_of(103, 5, 0))) == [20, 20, 21, 21, 21]
    assert (glm.fold_of(300, 5, 2, groups) != fold).any()


def test_one_program_for_all_penalties_and_labels():
    x, soft = problem(90, 6)
    probes.fit("logistic", {"l2": 1e-3}, x, soft)
    before = glm._solve._cache_size()
    probes.fit("logistic", {"l2": 1e-1}, x, soft[::-1])
    assert glm._solve._cache_size() == before
    probes.fit("logistic", {}, x, soft)
    assert glm._solve._cache_size() == before + 1  # all penalties and folds at once; the last fit has its program already


def test_says_where_it_did_not_converge(monkeypatch, capsys):
    monkeypatch.setattr(glm, "ITERATIONS", 3)
    x, soft = problem(90, 6, "separable")
    info = probes.fit("logistic", {"l2": 1e-5}, x, soft).info
    assert not info["converged"] and info["iterations"] == 3
    assert "probe=logistic: not converged" in capsys.readouterr().err
def test_ends_where_rounding_hides_the_way():
    """A tolerance of 0 cannot be reached."""
    def function(z):
        return jnp.sum(jnp.log(jnp.cosh(z - 1))) + 5

    point, norm, evaluations = lbfgs.minimise(function, jnp.full(4, 9.0), 0.0, 10_000)
    np.testing.assert_allclose(point, 1, atol=2e-3)
    assert 5 < evaluations < 500 and norm < 1e-3


# ---------------------------------------------------------------- difference of means


def test_mean_difference_is_the_discriminant_along_it():
    rng = np.random.default_rng(0)
    label = rng.random(4000) < 0.3
    x = (rng.normal(size=(4000, 3)) + np.outer(label, [2, 0, 0]) + 500).astype(np.float32)
    fitted = probes.fit("mean_difference", {}, x, label.astype(np.float32))
    difference = x[label].mean(axis=0, dtype=np.float64) - x[~label].mean(axis=0, dtype=np.float64)
    assert fitted.info["distance"] == pytest.approx(np.linalg.norm(difference), rel=1e-5)
    z = np.diff(fitted.logits(x), axis=1)[:, 0]
    truth = 2 * (x[:, 0] - 501) + np.log(0.3 / 0.7)  # Bayes' rule for two normals of variance 1
    assert np.abs(z - truth).mean() < 0.2
    along = (x.astype(np.float64) - 500) @ difference
    assert np.corrcoef(along, z)[0, 1] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("x, expected", [(np.ones((8, 2)), 0.25), (np.repeat([[0.0], [1.0]], [6, 2], axis=0), [0] * 6 + [1] * 2)])
def test_mean_difference_without_a_spread(x, expected):
    fitted = probes.fit("mean_difference", {}, x, np.repeat([0.0, 1.0], [6, 2]))
    np.testing.assert_allclose(fitted.predict(x), np.broadcast_to(expected, 8), atol=1e-3)
    assert np.isfinite(fitted.logits(x)).all()


# ---------------------------------------------------------------- the interface


@pytest.fixture(scope="module")
def small():
    x, soft = problem(150, 8)
    return x, soft, problem(40, 8, seed=1)[0]


ARGS = {"knn": {"k": 5}, "logistic": {"l2": 1e-2}, "linear": {"l2": 1e-2}, "mean_difference": {}, "topofilter": {"k": 12}}


@pytest.mark.parametrize("name", PROBE_ARGS)
def test_every_probe(name, small, tmp_path):
    x, soft, unseen = small
    fitted = probes.fit(name, ARGS[name], x, soft)
    p = fitted.predict(unseen)
    assert p.dtype == np.float32 and p.shape == (40,) and (p >= 0).all() and (p <= 1).all()
    logits = fitted.logits(unseen)
    assert logits.dtype == np.float32 and logits.shape == (40, 2) and np.isfinite(logits).all()
    np.testing.assert_allclose(1 / (1 + np.exp(logits[:, 0] - logits[:, 1])), p, atol=2e-7)
    json.dumps(fitted.info, allow_nan=False)
    kept = fitted.keep(0.11)
    assert kept.dtype == bool and kept.sum() == (150 - round(0.11 * 150) if name == "topofilter" else 150 - int(0.11 * 150))
    np.testing.assert_array_equal(probes.keep(name, ARGS[name], x, soft, 0.11), kept)
    if name != "topofilter":
        distance = np.abs(fitted.predict(x) - soft)
        assert distance[~kept].min() >= distance[kept].max()
    # The same from a file that is mapped into memory, and from the device.
    mapped = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, x.shape)
    mapped[:] = x
    for other in (mapped, jnp.asarray(x)):
        again = probes.fit(name, ARGS[name], other, jnp.asarray(soft))
        np.testing.assert_array_equal(again.predict(jnp.asarray(unseen)), p)
        np.testing.assert_array_equal(again.keep(0.11), kept)


@pytest.mark.parametrize("name", PROBE_ARGS)
def test_blocks_change_nothing(name, small, monkeypatch):
    x, soft, unseen = small
    whole = probes.fit(name, ARGS[name], x, soft)
    monkeypatch.setattr(rows, "BLOCK_ROWS", 32)
    cut = probes.fit(name, ARGS[name], x, soft)
    np.testing.assert_allclose(cut.predict(unseen), whole.predict(unseen), atol=1e-5)
    np.testing.assert_array_equal(cut.keep(0.2), whole.keep(0.2))


def test_of_equal_points_the_first_is_dropped():
    x, soft = np.zeros((10, 2)), np.array([1.0, 0.0] * 5)
    assert np.flatnonzero(~probes.keep("knn", {"k": 10}, x, soft, 0.3)).tolist() == [0, 1, 2]


def test_random_control():
    kept = probes.keep_random(50, 7, seed=1)
    assert kept.sum() == 43 and (kept == probes.keep_random(50, 7, seed=1)).all() and (kept != probes.keep_random(50, 7, seed=2)).any()
    with pytest.raises(UserError, match="dropped=51: expected 0 to 50"):
        probes.keep_random(50, 51)


def test_arguments_of_a_config():
    c = shipped("finetune")
    c.update({"probe": "logistic", "probe_args": {"l2": None, "folds": 3}})
    assert probe_args(c) == {"l2": None, "folds": 3}
    c.probe = "knn"
    assert probe_args(c) == {"k": 50} and isinstance(probe_args(c)["k"], int)


X, S = np.zeros((6, 2), np.float32), np.array([0, 1, 0, 1, 0, 1], np.float32)
BAD = [
    ("kn", {}, X, S, r"probe='kn': expected one of knn, .*did you mean 'knn'"),
    ("knn", {"q": 1}, X, S, r"probe_args.q: probe=knn does not take it, its arguments: k"),
    ("knn", {"k": 0}, X, S, r"probe_args.k=0: expected an integer, 1 or more"),
    ("knn", {"k": 2.5}, X, S, r"probe_args.k=2.5: expected an integer"),
    ("knn", {"k": 7}, X, S, r"probe_args.k=7: expected at most 6"),
    ("topofilter", {"k": 6}, X, S, r"probe_args.k=6: expected at most 5"),
    ("topofilter", {"k": 2}, np.array([[0], [1], [10], [11], [20], [21]]), S, r"probe_args.k=2: only 2 points are in the largest"),
    ("logistic", {"l2": 0}, X, S, r"probe_args.l2=0: expected a number above 0"),
    ("logistic", {"folds": 7}, X, S, r"probe_args.folds=7: expected 2 to 6, the number of rows"),
    ("logistic", {"l2": 1}, X, 0 * S, r"labels: every one is 0; probe=logistic expected both classes"),
    ("mean_difference", {}, X, 0 * S + 1, r"labels: every one is 1; probe=mean_difference"),
    ("linear", {"l2": 1}, X, S[:5], r"labels: 5, expected 6"),
    ("linear", {"l2": 1}, X, S * 2, r"labels: .*all in \[0, 1\]"),
    ("linear", {"l2": 1}, X[0], S, r"features: float32 \[2\], expected numbers \[documents, features\]"),
    ("linear", {"l2": 1}, np.where(np.arange(12).reshape(6, 2) == 7, np.nan, X), S, r"features: row 3 is not finite"),
    ("knn", {"k": 1}, X + np.arange(6)[:, None] * 1e19, S, r"features: row 0 is .* away from the mean"),
]


@pytest.mark.parametrize("name, args, x, soft, message", BAD)
def test_bad_input(name, args, x, soft, message):
    with pytest.raises(UserError, match=message):
        probes.fit(name, args, x, soft)


def test_bad_queries():
    fitted = probes.fit("knn", {"k": 1}, X, S)
    with pytest.raises(UserError, match="features: 3 features, expected 2 as in the fit"):
        fitted.predict(np.zeros((4, 3)))
    with pytest.raises(UserError, match="row 1 is not finite"):
        fitted.predict(np.array([[0, 0], [np.inf, 0]]))
    with pytest.raises(UserError, match=r"contamination=1: expected a share in \[0, 1\)"):
        probes.keep("knn", {"k": 1}, X, S, 1)
    with pytest.raises(UserError, match="groups: 2 names, expected 6"):
        probes.fit("linear", {}, X, S, groups=["a", "b"])
    with pytest.raises(UserError, match="folds=3: expected 2 to 2, the number of groups"):
        probes.fit("linear", {"folds": 3}, X, S, groups=[*"aaaaab"])
