"""Metrics against scikit-learn, hand-computed values and brute force."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, top_k_accuracy_score

from w2s_jax import metrics


def sample(n=200, ties=False, seed=0, skill=1.0, classes=2):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes)) + skill * np.eye(classes)[labels]
    return (np.round(logits) if ties else logits).astype(np.float32), labels


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_auroc_is_scikit_learns(ties, seed):
    logits, labels = sample(ties=ties, seed=seed)
    assert metrics.auroc(metrics.scores(logits), labels) == pytest.approx(roc_auc_score(labels, metrics.scores(logits)), abs=1e-12)


@pytest.mark.parametrize(("score", "labels", "value"), [
    ([0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1], 1.0), ([0.4, 0.3, 0.2, 0.1], [0, 0, 1, 1], 0.0), ([1.0, 1.0, 1.0], [0, 1, 1], 0.5),
    ([0.0, 1.0, 1.0, 2.0], [0, 0, 1, 1], 0.875),
    ([1.0, 1.0 + 1e-9], [0, 1], 0.5),  # equal as float32: a tie
])  # fmt: skip
def test_auroc_by_hand(score, labels, value):
    assert metrics.auroc(np.array(score), np.array(labels)) == value


def test_ties_go_to_class_0():
    assert metrics.accuracy(np.zeros((4, 2)), np.array([0, 0, 0, 1])) == 0.75


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [1, 2, 5, 6, 9])
def test_top_k_is_the_first_k_of_a_stable_sort(k, ties, monkeypatch):
    """scikit-learn's top_k_accuracy_score agrees where nothing is equal; among equal logits the lower class comes first."""
    monkeypatch.setattr(metrics, "_BLOCK", 100)  # several blocks
    logits, labels = sample(ties=ties, classes=6)
    logits = logits / 2 if not ties else logits
    first = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    right = metrics.top_k(logits, labels, k)
    np.testing.assert_array_equal(right, (first == labels[:, None]).any(axis=1))
    if k == 1:
        assert right.mean() == metrics.accuracy(logits, labels)
    if not ties and k < 6:
        assert right.mean() == pytest.approx(top_k_accuracy_score(labels, logits, k=k), abs=1e-12)


def test_top_k_refuses_no_classes():
    with pytest.raises(ValueError, match="k=0"):
        metrics.top_k(*sample(), 0)


def test_top5_intervals_of_many_classes():
    logits, labels = sample(n=400, classes=40, skill=2.0)
    boot = metrics.Bootstrap([str(i) for i in range(400)], replicates=500)
    codes = boot.codes(boot.names)
    logits, labels = logits[codes], labels[codes]
    top1, top5 = (metrics.estimate(boot, metric, logits, labels, codes) for metric in ("accuracy", "top5"))
    assert top5.value == metrics.top_k(logits, labels, 5).mean() and (top5.replicates >= top1.replicates).all()
    np.testing.assert_array_equal(top5.replicates, boot.ratio(metrics.top_k(logits, labels, 5), np.ones(400), codes))


def test_ece_by_hand():
    probability = np.array([0.9, 0.9, 0.9, 0.9, 0.6, 0.6])  # of class 1: bins (.866, .933] and (.533, .6]
    logits = np.stack([np.zeros(6), np.log(probability / (1 - probability))], 1)
    labels = np.array([1, 1, 1, 0, 1, 0])
    expected = (4 * abs(0.75 - 0.9) + 2 * abs(0.5 - 0.6)) / 6
    assert metrics.ece(logits, labels) == pytest.approx(expected, abs=1e-6)


def test_evaluate_has_the_keys_of_results_json():
    logits, labels = sample()
    out = metrics.evaluate(logits, labels, replicates=200)
    assert set(out) == {"accuracy", "accuracy_ci", "auroc", "auroc_ci", "n_test", "majority_baseline"}
    assert out["accuracy_ci"][0] < out["accuracy"] < out["accuracy_ci"][1] and out["auroc_ci"][0] < out["auroc"] < out["auroc_ci"][1]
    assert out["n_test"] == 200 and out["majority_baseline"] == max(labels.mean(), 1 - labels.mean())
    assert out == metrics.evaluate(logits, labels, replicates=200)
    assert all(type(x) in (float, int) for v in out.values() for x in (v if isinstance(v, list) else [v]))


def test_one_class_has_no_auroc():
    logits, _ = sample(20)
    out = metrics.evaluate(logits, np.ones(20, int), replicates=50)
    assert out["auroc"] is None and out["auroc_ci"] is None and out["accuracy_ci"] is not None and out["majority_baseline"] == 1.0


def test_more_classes_have_no_auroc():
    logits, labels = sample(60, classes=3)
    out = metrics.evaluate(logits, labels, replicates=50)
    assert out["auroc"] is None and 0 < out["accuracy"] < 1


def test_one_group_has_no_interval():
    logits, labels = sample(20)
    out = metrics.evaluate(logits, labels, ["same"] * 20, replicates=50)
    assert out["accuracy_ci"] is None and out["auroc_ci"] is None and out["auroc"] is not None


@pytest.mark.parametrize(("logits", "labels"), [
    (np.zeros((2, 2)), np.array([0, -1])), (np.zeros((2, 2)), np.array([0, 2])), (np.zeros((2, 2)), np.array([0.0, 1.0])),
    (np.array([[0, np.nan], [0, 1]]), np.array([0, 1])), (np.zeros((0, 2)), np.zeros(0, int)), (np.zeros((3, 2)), np.array([0, 1])),
])  # fmt: skip
def test_what_would_hide_in_a_mean_is_refused(logits, labels):
    with pytest.raises(ValueError, match=r"labels|logits"):
        metrics.evaluate(logits, labels)


@pytest.mark.parametrize("ties", [False, True])
def test_replicates_equal_the_metric_on_the_drawn_documents(ties):
    """Each replicate, computed from weights, is the plain metric on the documents written out as often as they were drawn."""
    logits, labels = sample(40, ties)
    groups = [f"g{i // 3}" for i in range(40)]
    boot = metrics.Bootstrap(groups, seed=3, replicates=100)
    codes = boot.codes(groups)
    accuracy, auroc = boot.accuracy(logits, labels, codes), boot.auroc(logits, labels, codes)
    weights = np.concatenate(list(boot.counts()))
    assert weights.shape == (100, 14) and (weights.sum(1) == 14).all()
    for replicate in range(100):
        rows = np.repeat(np.arange(40), weights[replicate, codes].astype(int))
        assert accuracy[replicate] == pytest.approx(metrics.accuracy(logits[rows], labels[rows]))
        assert auroc[replicate] == pytest.approx(metrics.auroc(metrics.scores(logits[rows]), labels[rows]))


def test_draws_are_the_same_whether_remembered_or_not(monkeypatch):
    kept = metrics.Bootstrap([str(i) for i in range(30)], seed=1, replicates=150)
    first, second = (np.concatenate(list(kept.counts())) for _ in range(2))
    monkeypatch.setattr(metrics, "_KEEP", 0)
    fresh = metrics.Bootstrap([str(i) for i in range(30)], seed=1, replicates=150)
    assert (first == second).all() and (first == np.concatenate(list(fresh.counts()))).all() and not fresh._kept
    assert len(np.unique(first, axis=0)) == 150  # the chunks do not repeat each other


def width(ci):
    return ci[1] - ci[0]


def test_groups_widen_the_interval():
    """Four copies of a document are no new evidence: the interval is that of the distinct documents, twice as wide."""
    logits, labels = sample(100)
    single = metrics.evaluate(logits, labels)
    copies = metrics.evaluate(np.repeat(logits, 4, 0), np.repeat(labels, 4), [str(i // 4) for i in range(400)])
    naive = metrics.evaluate(np.repeat(logits, 4, 0), np.repeat(labels, 4))
    assert width(copies["accuracy_ci"]) == pytest.approx(width(single["accuracy_ci"]), rel=0.1)
    assert width(naive["accuracy_ci"]) == pytest.approx(width(single["accuracy_ci"]) / 2, rel=0.15)


def test_intervals_cover():
    """About 95% of the intervals hold the true accuracy."""
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        right = rng.random(150) < 0.8
        logits = np.stack([np.zeros(150), np.where(right, 1.0, -1.0)], 1)
        low, high = metrics.evaluate(logits, np.ones(150, int), seed=trial, replicates=300)["accuracy_ci"]
        hits += low <= 0.8 <= high
    assert 0.89 <= hits / 200 <= 0.99


@pytest.mark.parametrize(("n", "warns"), [(50, True), (5000, False)])
def test_small_test_sets_are_named(n, warns):
    logits, labels = sample(n)
    line = metrics.small_test_warning(metrics.evaluate(logits, labels, replicates=300))
    assert bool(line) == warns and (not warns or "50 documents" in line)


def roles(n=300, seeds=2, weak=0.7, student=0.8, ceiling=0.95):
    """Logits [seeds, n, 2] of the three roles, with accuracies near the given ones."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, n)

    def draw(accuracy):
        return np.where((rng.random((seeds, n)) < accuracy) == (labels == 1), 1.0, -1.0) * rng.uniform(0.5, 2, (seeds, n))

    return [np.stack([-s, s], -1).astype(np.float32) for s in (draw(weak), draw(student), draw(ceiling))], labels


@pytest.mark.parametrize("metric", ["accuracy", "auroc", "top5"])
def test_pgr_by_hand(metric):
    (weak, student, ceiling), labels = roles()
    if metric == "top5":  # four classes at 0, between the two others: among the five likeliest is who is right of the two
        weak, student, ceiling = (np.pad(role, ((0, 0), (0, 0), (0, 4))) for role in (weak, student, ceiling))
    out = metrics.pgr_bootstrap(weak, student, ceiling, labels, metric=metric, replicates=300)
    value = metrics.accuracy if metric != "auroc" else lambda x, y: metrics.auroc(metrics.scores(x), y)
    w, s, c = (np.mean([value(run, labels) for run in role]) for role in (weak, student, ceiling))
    assert (out["weak"], out["student"], out["ceiling"]) == pytest.approx((w, s, c))
    assert (out["gap"], out["gain"], out["pgr"]) == pytest.approx((c - w, s - w, (s - w) / (c - w)))
    assert out["pgr_ci"][0] < out["pgr"] < out["pgr_ci"][1] and out["undefined"] == 0 and out["gap_clear"] and out["n_seeds"] == 2


@pytest.mark.parametrize(("which", "value"), [(0, 0.0), (2, 1.0)])
def test_shared_draws_make_a_copy_exact(which, value):
    """A student that equals its supervisor (or ceiling) has PGR 0 (or 1) in every replicate: weak, student, ceiling share indices."""
    trio, labels = roles(seeds=3)
    trio[1] = trio[which]
    out = metrics.pgr_bootstrap(*trio, labels, replicates=200)
    assert out["pgr"] == value and out["pgr_ci"] == [value, value]


def test_pgr_replicates_by_brute_force():
    (weak, student, ceiling), labels = roles(60, seeds=3)
    groups = [f"g{i // 2}" for i in range(60)]
    boot = metrics.Bootstrap(groups, 5, 80)
    codes = boot.codes(groups)
    estimates = [[metrics.estimate(boot, "accuracy", run, labels, codes) for run in role] for role in (weak, student, ceiling)]
    out, ratios = metrics.pgr_and_replicates(*estimates, seed=5)
    weights, seeds = np.concatenate(list(boot.counts())), metrics._drawn_seeds(5, 3, 80)
    assert len(np.unique(seeds)) == 3
    expected = np.full(80, np.nan)
    for r in range(80):
        rows = np.repeat(np.arange(60), weights[r, codes].astype(int))
        w, s, c = (np.mean([metrics.accuracy(role[seed][rows], labels[rows]) for seed in seeds[:, r]]) for role in (weak, student, ceiling))
        if c > w:
            expected[r] = (s - w) / (c - w)
    np.testing.assert_allclose(ratios, expected)
    assert out["undefined"] == np.isnan(expected).mean()


def test_no_gap_no_pgr():
    (weak, student, ceiling), labels = roles()
    out = metrics.pgr_bootstrap(ceiling, student, weak, labels, replicates=100)
    assert out["gap"] < 0 and out["pgr"] is None and out["pgr_ci"] is None and out["undefined"] == 1 and not out["gap_clear"]


def test_an_unsure_gap_withholds_the_interval():
    labels = np.arange(100) % 2

    def wrong(rows):
        score = np.where(np.isin(np.arange(100), rows) == (labels == 1), -1.0, 1.0)
        return np.stack([-score, score], -1)

    out = metrics.pgr_bootstrap(wrong(range(12)), wrong(range(11)), wrong(range(12, 22)), labels, replicates=500)
    assert out["gap"] == pytest.approx(0.02) and out["pgr"] == pytest.approx(0.5)
    assert out["undefined"] > 0.05 and out["pgr_ci"] is None and not out["gap_clear"] and out["gap_ci"][0] < 0 < out["gap_ci"][1]


@pytest.mark.parametrize(("share", "given"), [(0.0, True), (0.05, True), (0.06, False), (1.0, False)])
def test_intervals_stop_at_five_percent_undefined(share, given):
    values = np.linspace(0, 1, 1000)
    values[: int(share * 1000)] = np.nan
    assert (metrics.interval(values) is not None) == given


def test_seeds_widen_the_interval():
    """Seeds that differ a lot are seen in the interval of their mean; with one seed only the documents are."""
    (weak, student, ceiling), labels = roles(n=400, seeds=1)
    worse = np.where(np.arange(400)[None, :, None] % 3 == 0, -student, student)  # a third of the answers turned around
    one = metrics.pgr_bootstrap(weak, student, ceiling, labels, replicates=300)
    two = metrics.pgr_bootstrap(np.repeat(weak, 2, 0), np.concatenate([student, worse]), np.repeat(ceiling, 2, 0), labels, replicates=300)
    assert width(two["student_ci"]) > 1.5 * width(one["student_ci"])


def test_unequal_numbers_of_seeds_are_refused():
    estimate = metrics.Estimate(0.5, np.zeros(10))
    with pytest.raises(ValueError, match="seeds differ"):
        metrics.pgr([estimate], [estimate, estimate], [estimate])


def test_agreement_by_hand():
    out = metrics.agreement(student=[1, 1, 0, 0, 1], supervisor=[1, 0, 0, 1, 1], labels=[1, 1, 0, 0, 0])
    assert out == {"all": 0.6, "right": 1.0, "wrong": pytest.approx(1 / 3), "n_right": 2, "n_wrong": 3}
    assert metrics.agreement([1], [1], [1])["wrong"] is None


def test_metrics_import_nothing_heavy():
    import subprocess
    import sys

    code = "import sys, w2s_jax.metrics; print([m for m in ('jax', 'scipy', 'pandas', 'sklearn', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
