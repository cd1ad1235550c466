"""K-class linear probes: against the reference's loop in torch, alone and together, spread over devices, cut off and resumed."""

import jax
import ml_dtypes
import numpy as np
import pytest

from w2s_jax import checkpoint, losses
from w2s_jax import mesh as mesh_lib
from w2s_jax.errors import UserError
from w2s_jax.probes import descent, measure, softmax
from w2s_jax.probes.softmax import Lane, Training, train
from w2s_jax.probes.targets import Targets

torch = pytest.importorskip("torch")
XENT, TRUTH = (losses.make("xent", ground_truth=truth) for truth in (False, True))
N, D, K, M = 230, 12, 5, 40  # 230 rows in batches of 50: the last one is short


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    truth = rng.integers(K, size=N + M)
    features = (rng.normal(size=(N + M, D)) + 1.5 * rng.normal(size=(K, D))[truth]).astype(np.float32)
    weak = 2 * rng.normal(size=(N + M, K)) + 2 * np.eye(K)[truth]
    weak = (np.exp(weak) / np.exp(weak).sum(1, keepdims=True)).astype(np.float32)
    return {"features": features[:N], "targets": {"weak": weak[:N], "truth": truth[:N]}, "test": features[N:],
            "references": {"truth": truth[N:], "weak": weak[N:].argmax(1)}}


SETTINGS = {"epochs": 4, "batch_size": 50, "learning_rate": 0.02}


def run(data, lanes, **changes):
    return train(data["features"], data["targets"], lanes, test=data["test"], references=data["references"], **SETTINGS | changes)


def reference(data, lane, decay=0.0, schedule="cosine", epochs=4, criterion=None):
    """`train_logreg` once more, fed with the lane's first weights, order and labels."""
    training = Training(data["features"], data["targets"], [lane], **SETTINGS)
    first = training.state()["params"]
    hard, _ = training.targets.of(lane.labels, lane.noise, lane.seed)
    y = np.where(hard[:, None] >= 0, np.eye(K, dtype=np.float32)[hard], np.float32(data["targets"]["weak"]))
    x, y, test = (torch.tensor(a) for a in (data["features"], y, data["test"]))
    model = torch.nn.Linear(D, K)
    with torch.no_grad():
        model.weight.copy_(torch.tensor(first["weights"][0]))
        model.bias.copy_(torch.tensor(first["bias"][0]))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, weight_decay=decay)
    total = epochs * training.steps
    scheduler = (torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total) if schedule == "cosine" else
                 torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / total if schedule == "linear" else 1.0))
    soft = not (hard >= 0).all()
    predictions = []
    step = 0
    for epoch in range(epochs):
        order = torch.tensor(np.random.default_rng([lane.seed, softmax._ORDER, epoch]).permutation(N))
        for rows in order.split(50):
            optimizer.zero_grad()
            z = model(x[rows])
            if criterion:
                loss = criterion(z, y[rows], step / total)
            else:
                loss = torch.nn.functional.cross_entropy(z, y[rows] if soft else y[rows].argmax(1))
            loss.backward()
            optimizer.step()
            scheduler.step()
            step += 1
        predictions.append(model(test).argmax(1).numpy())
    return model, np.stack(predictions), model(test).detach().numpy()


def logconf(z, y, done):
    share = 0.5 * min(1.0, done / 0.2)
    hard = torch.nn.functional.one_hot(z.argmax(1), K).float()
    return torch.nn.functional.cross_entropy(z, (1 - share) * y + share * hard)


@pytest.mark.parametrize(("labels", "options"), [
    ("weak", {}), ("truth", {}), ("weak", {"weight_decay": 0.05}), ("truth", {"schedule": "linear"}), ("weak", {"schedule": "constant"}),
    ("truth", {"noise": 0.3}), ("weak", {"noise": 0.3}), ("weak", {"loss": "logconf"}),
])  # fmt: skip
def test_is_the_references_loop(data, labels, options):
    lane = Lane(labels, 3, losses.make(options.pop("loss", "xent"), ground_truth=False), options.pop("noise", 0.0))
    decay, schedule = options.get("weight_decay", 0.0), options.get("schedule", "cosine")
    model, predictions, logits = reference(data, lane, decay, schedule, criterion=logconf if lane.loss.name == "logconf" else None)
    trained = run(data, [lane], **options)
    np.testing.assert_allclose(trained.weights[0], model.weight.detach().numpy().T, atol=2e-5)
    np.testing.assert_allclose(trained.bias[0], model.bias.detach().numpy(), atol=2e-5)
    np.testing.assert_allclose(trained.logits[0], logits, atol=1e-4)
    np.testing.assert_array_equal(trained.predictions[0], predictions)
    assert trained.against["truth"].tolist() == [[np.mean(p == data["references"]["truth"]) for p in predictions]]
    np.testing.assert_array_equal(trained.logits.argmax(-1), trained.predictions[:, -1])


def many():
    return [Lane(labels, seed, XENT if labels == "weak" else TRUTH, noise)
            for labels in ("weak", "truth") for seed in (0, 1) for noise in (0.0, 0.2)]


def test_lanes_do_not_touch_each_other(data):
    """Together or alone, one by one or in groups that do not divide: the same, in one compiled program for each width of a group."""
    before = descent.epoch._cache_size()
    one = run(data, many(), at_once=1)
    assert descent.epoch._cache_size() - before <= 1  # eight lanes, soft and hard labels, four epochs
    three = run(data, many(), at_once=3)
    assert descent.epoch._cache_size() - before <= 2
    for i in (0, 5):
        alone = run(data, many()[i : i + 1])
        np.testing.assert_array_equal(alone.weights[0], one.weights[i])
    np.testing.assert_allclose(three.weights, one.weights, atol=1e-5)
    np.testing.assert_allclose(three.loss, one.loss, atol=1e-5)
    assert len({w.tobytes() for w in one.weights}) == 8
    assert (one.loss[:, -1] < one.loss[:, 0]).all() and one.against["truth"][4, -1] > 0.8


@pytest.mark.parametrize(("lanes", "spread"), [(8, "lanes"), (16, "lanes"), (3, "batch"), (1, "batch")])
def test_devices_do_not_matter(data, lanes, spread):
    lanes = (many() * 2)[:lanes]
    mesh = mesh_lib.make_mesh({"data": 4, "fsdp": 2, "model": 1})
    training = Training(data["features"], data["targets"], lanes, mesh=mesh, **SETTINGS)
    assert {group.spec.spread for group in training._groups} == {spread}
    spread, one = run(data, lanes, mesh=mesh), run(data, lanes)
    np.testing.assert_allclose(spread.weights, one.weights, atol=1e-5)
    np.testing.assert_allclose(spread.loss, one.loss, atol=1e-5)
    np.testing.assert_allclose(spread.train_accuracy, one.train_accuracy, atol=1e-6)
    np.testing.assert_allclose(spread.logits, one.logits, atol=1e-4)


def test_losses_side_by_side(data):
    lanes = [Lane("weak", seed, losses.make(name, ground_truth=False)) for seed in (0, 1) for name in ("xent", "adaptconf", "logconf")]
    before = descent.epoch._cache_size()
    together = run(data, lanes, epochs=2)
    assert descent.epoch._cache_size() - before <= 3
    for i, lane in enumerate(lanes):
        np.testing.assert_array_equal(run(data, [lane], epochs=2).weights[0], together.weights[i])
    mesh = mesh_lib.make_mesh({"data": 8, "fsdp": 1, "model": 1})
    np.testing.assert_allclose(run(data, lanes, epochs=2, mesh=mesh).weights, together.weights, atol=1e-5)


def test_cut_off_and_resumed(data, tmp_path):
    """From Orbax's files, in other groups: bit for bit; with a loss that carries something along, too."""
    two = {**data, "targets": {"weak": np.stack([1 - data["targets"]["weak"][:, 0], data["targets"]["weak"][:, 0]], 1)}, "references": {}}
    two["targets"]["truth"] = two["targets"]["weak"].argmax(1)
    buffered = losses.make("logconf_eleuther", {"warmup": 3}, ground_truth=False)
    lanes = [Lane("weak", 0, buffered), Lane("truth", 0, TRUTH), Lane("weak", 1, XENT), Lane("weak", 1, buffered)]
    whole = run(two, lanes)
    store = checkpoint.Checkpoints(tmp_path)

    class Killed(Exception): ...

    def save(training):
        if training.done == 2:
            state = training.state()
            store.save(2, params=state["params"], opt_state={k: state[k] for k in ("opt_state", "history")}, rng=np.zeros(1), meta={})
            raise Killed

    with pytest.raises(Killed):
        run(two, lanes, on_epoch=save)
    store.wait()
    form = Training(two["features"], two["targets"], lanes, test=two["test"], **SETTINGS).abstract()
    params, rest = store.restore(2, form["params"], {k: form[k] for k in ("opt_state", "history")})
    store.close()
    resumed = run(two, lanes, resume=(2, {"params": params, **rest}))
    for key in ("weights", "bias", "loss", "train_accuracy", "predictions", "logits"):
        np.testing.assert_array_equal(getattr(resumed, key), getattr(whole, key))
    with pytest.raises(UserError, match="state of the probes"):
        run(two, lanes[:2], resume=(2, {"params": params, **rest}))


def test_features_in_half_precision(data):
    """bfloat16 features stay so on the device, and are calculated with in float32."""
    half = {**data, "features": data["features"].astype(ml_dtypes.bfloat16)}
    assert Training(half["features"], half["targets"], many(), **SETTINGS)._x.dtype == "bfloat16"
    full = {**data, "features": half["features"].astype(np.float32)}
    np.testing.assert_allclose(run(half, many()[:1]).weights, run(full, many()[:1]).weights, atol=1e-6)


def test_classes_that_no_label_shows(data):
    trained = train(data["features"], {"truth": data["targets"]["truth"]}, many()[4:5], test=data["test"], classes=K + 2, **SETTINGS)
    assert trained.logits.shape == (1, M, K + 2) and trained.predictions[:, -1].max() < K


@pytest.mark.parametrize("reference", [True, False])
def test_measure_runs_both_in_turn(reference):
    made = measure.data(120, 8, 3)
    out = measure.measure(made["features"], made["targets"], batch_size=20, rounds=2, share=0.5, reference=reference)
    assert [row["labels"] for row in out["ours"]] == ["weak", "truth"] and out["gflop"] == pytest.approx(4e-9 * 20 * 8 * 3)
    assert ("reference" in out) == reference and all((row["ratio"] is not None) == reference for row in out["ours"])
    assert all(row["seconds"] > 0 and 0 < row["loss"] < 3 for row in out["ours"] + out.get("reference", []))


def test_noise_replaces_by_other_classes():
    truth = np.repeat(np.arange(10), 1000)
    targets = Targets({"truth": truth, "weak": 0.9 * np.eye(10)[truth] + 0.01}, 10_000, {"truth", "weak"})
    few, many = targets.of("truth", 0.2, 7)[0], targets.of("truth", 0.6, 7)[0]
    changed = few != truth
    assert abs(changed.mean() - 0.2) < 0.015 and abs((many != truth).mean() - 0.6) < 0.02
    np.testing.assert_array_equal(many[changed], few[changed])  # the lower noise is a part of the higher
    counts = np.bincount(((many - truth) % 10)[many != truth], minlength=10)
    assert counts[0] == 0 and (abs(counts[1:] / counts.sum() - 1 / 9) < 0.02).all()
    soft, _ = targets.of("weak", 0.2, 7)
    np.testing.assert_array_equal(soft, np.where(changed, few, -1))
    assert (targets.of("truth", 0.2, 8)[0] != few).any() and (targets.of("truth", 1.0, 7)[0] != truth).all()


def test_one_hot_labels_are_classes(data):
    one_hot = {**data, "targets": {"truth": np.eye(K)[data["targets"]["truth"]]}}
    np.testing.assert_array_equal(run(one_hot, many()[4:5]).weights, run({**data, "targets": {"truth": data["targets"]["truth"]}},
                                                                         many()[4:5]).weights)


@pytest.mark.parametrize(("changes", "message"), [
    ({"epochs": 0}, "epochs=0"), ({"batch_size": 0}, "batch_size=0"), ({"learning_rate": 0.0}, "learning_rate=0.0"),
    ({"weight_decay": -1.0}, "weight_decay=-1.0"), ({"schedule": "cosin"}, "schedule='cosin'"), ({"lanes": []}, "lanes=0"),
    ({"classes": 4}, "labels.weak: 5 classes, expected 4"),
    ({"lanes": [Lane("wek", 0, XENT)]}, "did you mean 'weak'"), ({"lanes": [Lane("weak", 0, XENT, 1.5)]}, "noise=1.5"),
    ({"targets": {"weak": np.full((N, K), 0.3)}}, "row 0 is no distribution"),
    ({"targets": {"weak": np.ones((N - 1, K))}}, r"labels.weak: \[229, 5\]"),
    ({"targets": {"weak": np.full((N, K), np.nan)}}, "row 0 is no distribution"),
    ({"targets": {"weak": np.full(N, -1)}}, "integers of at least 0"), ({"targets": {"weak": np.full(N, 0.5)}}, "float64"),
    ({"lanes": many(), "targets": {"weak": np.full((N, 2), 0.5), "truth": np.full(N, 2)}}, "class 2, expected one below 2"),
    ({"test": np.zeros((3, D + 1))}, f"expected {D} as in the fit"),
    ({"references": {"truth": np.zeros(3, int)}}, r"references.truth: int64 \[3\]"),
    ({"features": np.full((N, D), np.nan)}, "row 0 is not finite"), ({"learning_rate": 3e37}, "not finite in epoch"),
])  # fmt: skip
def test_bad_input(data, changes, message):
    arguments = {**data, "lanes": [Lane("weak", 0, XENT)], **SETTINGS, **changes}
    features, targets, lanes = (arguments.pop(key) for key in ("features", "targets", "lanes"))
    with pytest.raises(UserError, match=message):
        train(features, targets, lanes, **arguments)


def test_progress_shows_loss_and_steps(data, capfd):
    run(data, many()[:2], label="probe")
    said = capfd.readouterr().err
    assert "40/40" in said and "loss" in said and jax.device_count() == 8
