"""The trainer: however a batch is laid out (packed, microbatched, sharded, grouped), the same losses and parameters come out."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import w2s_jax
from w2s_jax import feeding, forward, losses, models, optimizers, stages, train
from w2s_jax import mesh as mesh_lib
from w2s_jax.config import LOSS_ARGS
from w2s_jax.data import packing

pytestmark = [pytest.mark.usefixtures("fast_compiles"), pytest.mark.slow]

STEPS, BATCH = 3, 13
TOLERANCE = 1e-5
ARGS = {"product": {"alpha": 0.7, "beta": 1.3}, "logconf": {"warmup": 0.5}, "logconf_eleuther": {"warmup": 2, "buffer": 20, "chunk": 4},
        "entropy": {"warmup": 2}}
NAMES = {True: [n for n in LOSS_ARGS if losses.LOSSES[n].per_document], False: [n for n in LOSS_ARGS if not losses.LOSSES[n].per_document]}
MESHES = [dict(zip(mesh_lib.AXES, shape)) for shape in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(shape) in (1, 2, 4, 8)]


@dataclasses.dataclass(frozen=True)
class AnyOf:
    """Every loss of one kind in a single program: which one it is comes in with the state, so that none needs a compilation of its own."""

    per_document: bool
    name: str = dataclasses.field(compare=False)

    @property
    def members(self):
        return [losses.make(n, ARGS.get(n), ground_truth=False) for n in NAMES[self.per_document]]

    def init_state(self):
        which = jnp.asarray(NAMES[self.per_document].index(self.name), jnp.int32)
        return {"which": which, "states": [loss.init_state() for loss in self.members]}

    def coefficient(self, step, total):
        return self.members[NAMES[self.per_document].index(self.name)].coefficient(step, total)

    def __call__(self, logits, labels, context, state):
        def branch(i, loss):
            def call(states):
                value, mine = loss(logits, labels, context, states[i])
                return value, [*states[:i], mine, *states[i + 1:]]
            return call
        branches = [branch(i, loss) for i, loss in enumerate(self.members)]
        value, states = jax.lax.switch(state["which"], branches, state["states"])
        return value, {"which": state["which"], "states": states}


class Recorder:
    """Stands in for the run directory."""

    path = "."

    def __init__(self):
        self.rows = []

    def resume_metrics(self, step):
        assert step == 0

    def metrics(self, row):
        self.rows.append(row)

    def flush(self):
        pass


class NoCheckpoints:
    def __init__(self, path):
        pass

    def steps(self):
        return []

    def save(self, *_, **__):
        pass

    close = save


def make_mesh(**shape):
    shape = dict.fromkeys(mesh_lib.AXES, 1) | shape
    return mesh_lib.make_mesh(shape, jax.devices()[: int(np.prod(list(shape.values())))])


@functools.cache
def make_corpus(steps=STEPS):
    rng = np.random.default_rng(3)
    documents = tiny.documents(steps * BATCH, seed=3)
    p = rng.uniform(0.02, 0.98, len(documents)).astype(np.float32)
    return feeding.Texts(documents, np.stack([1 - p, p], -1), np.ones(len(documents), np.float32), [f"d{i}" for i in range(len(documents))])


@functools.cache
def make_model(**options):
    model = models.build(tiny.config(), head="classifier", **options)
    return model, tiny.random_params(model.abstract, seed=4)


def optimizer():
    return optimizers.make("adamw", {}, weight_decay=0.1, grad_clip=0.5)  # the clip needs one norm over everything


def rates(steps=STEPS):
    return optimizers.learning_rates("linear", 3e-3, steps)


def fit(loss, mesh=None, *, options=(), steps=STEPS, plan=None, trained="full", keys=(), stats=None, weights=None):
    """Train through the trainer. Returns the rows of the metrics, the parameters and the plan."""
    mesh = make_mesh() if mesh is None else mesh
    model, start = make_model(**dict(options))
    config = tiny.finetune("m", "t", **{"steps_per_dispatch": 2} | dict(keys))
    corpus = dataclasses.replace(make_corpus(steps), weights=weights)
    batches = [np.arange(BATCH) + i * BATCH for i in range(steps)]
    plan = plan or feeding.make_plan(config, model, corpus, batches, mesh)
    program = train.Program(model, loss, optimizer(), mesh, trained)
    params = jax.device_put(start, mesh_lib.param_shardings(mesh, model.abstract)[0])
    run = Recorder()
    params = train.train(config, program, params, corpus, plan, rates(steps), run, stats=stats)
    return run.rows, params, plan


@pytest.fixture(autouse=True)
def no_checkpoints(monkeypatch):
    monkeypatch.setattr(train.ckpt, "Checkpoints", NoCheckpoints)


# --------------------------------------------------------------------------- the reference: one document a row, nothing packed


def unpacked(documents, longest=None):
    """A batch of one cell with a row for each document."""
    longest = longest or max(map(len, documents))
    batch = {k: np.zeros((1, len(documents), longest), np.int32) for k in ("tokens", "segments", "positions")}
    for d, ids in enumerate(documents):
        batch["tokens"][0, d, : len(ids)], batch["segments"][0, d, : len(ids)] = ids, d + 1
        batch["positions"][0, d, : len(ids)] = np.arange(len(ids))
    ends = [d * longest + len(ids) - 1 for d, ids in enumerate(documents)]
    return batch | {"documents": np.arange(len(documents), dtype=np.int32)[None], "last": np.array([ends], np.int32)}


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=tiny.FAST)
def reference_step(model, loss, params, opt_state, loss_state, batch, labels, coefficient, lr, key):
    context = losses.Context(coefficient, jnp.ones(len(labels)), jnp.float32(len(labels)))

    def objective(params):
        logits = model.apply(params, batch, key)[0]
        value, state = loss(logits, labels, context, loss_state)
        return value, (state, (logits.argmax(-1) == labels.argmax(-1)).mean())
    (value, (loss_state, right)), grads = jax.value_and_grad(objective, has_aux=True)(params)
    params, opt_state = optimizer().update(grads, opt_state, params, lr)
    return params, opt_state, loss_state, value, right


@functools.cache
def reference(name, options=()):
    """Losses, train accuracies and final logits of all documents."""
    model, params = make_model(**dict(options))
    loss, corpus, lrs = AnyOf(losses.LOSSES[name].per_document, name), make_corpus(), rates()
    longest = max(map(len, corpus.tokens))
    opt_state, loss_state, values, accuracies = optimizer().init(params), loss.init_state(), [], []
    for s in range(STEPS):
        batch = unpacked(corpus.tokens[s * BATCH:(s + 1) * BATCH], longest)  # one width: one program for all steps
        key = jax.random.fold_in(jax.random.key_data(jax.random.key(0)), s) if dict(options).get("dropout") else None
        params, opt_state, loss_state, value, right = reference_step(
            model, loss, params, opt_state, loss_state, batch, corpus.labels[s * BATCH:(s + 1) * BATCH],
            np.float32(loss.coefficient(s, STEPS)), np.float32(lrs[s]), key)
        values.append(float(value))
        accuracies.append(float(right))
    return values, accuracies, logits_of(params, options)


@functools.partial(jax.jit, static_argnums=0, compiler_options=tiny.FAST)
def apply(model, params, batch):
    return model.apply(params, batch)


def logits_of(params, options=()):
    return np.asarray(apply(make_model(**dict(options))[0], jax.device_get(params), unpacked(make_corpus().tokens))[0])


def check(name, rows, params, options=()):
    values, accuracies, logits = reference(name, options)
    assert [row["step"] for row in rows] == list(range(STEPS))
    np.testing.assert_allclose([row["loss"] for row in rows], values, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose([row["train_accuracy"] for row in rows], accuracies, atol=1e-6)
    np.testing.assert_allclose(logits_of(params, options), logits, atol=TOLERANCE, rtol=0)


def test_the_reference_run_moves():
    """Else everything below would hold for a trainer that does nothing."""
    found = {name: reference(name) for name in LOSS_ARGS}
    before = logits_of(make_model()[1])
    for name, (values, _, logits) in found.items():
        assert np.abs(logits - before).max() > 0.05, name
        assert np.ptp(values) > 0.005, name
    assert len({round(values[-1], 4) for values, *_ in found.values()}) == len(found)  # and the losses differ


# --------------------------------------------------------------------------- packed, microbatched, sharded


@pytest.mark.parametrize("microbatch_size", [0, 1, 3, 8])
@pytest.mark.parametrize("name", LOSS_ARGS)
def test_packed_and_microbatched_equal_one_document_a_row(name, microbatch_size):
    loss = AnyOf(losses.LOSSES[name].per_document, name)
    rows, params, plan = fit(loss, keys={"microbatch_size": microbatch_size})
    assert plan.microbatches == (-(-BATCH // microbatch_size) if microbatch_size else 1)
    if not microbatch_size:  # it is packed indeed
        assert plan.computed < 0.5 * STEPS * BATCH * max(map(len, make_corpus().tokens))
    check(name, rows, params)


@pytest.mark.parametrize("name", ["xent", "logconf_openai"])  # one forward for all microbatches, and two
def test_weighted_documents_in_microbatches_and_on_a_mesh(name):
    weights = np.random.default_rng(5).uniform(0.2, 2, len(make_corpus().tokens)).astype(np.float32)
    loss = AnyOf(losses.LOSSES[name].per_document, name)
    whole, plain = fit(loss, weights=weights)[0], fit(loss)[0]
    assert abs(whole[0]["loss"] - plain[0]["loss"]) > 1e-3
    for mesh, size in ((None, 3), (make_mesh(data=2), 0)):
        rows = fit(loss, mesh, weights=weights, keys={"microbatch_size": size})[0]
        np.testing.assert_allclose([r["loss"] for r in rows], [r["loss"] for r in whole], atol=1e-5)


@pytest.mark.parametrize("index, shape", enumerate(MESHES), ids=["x".join(map(str, m.values())) for m in MESHES])
def test_sharded_equals_one_device(index, shape):
    """Every mesh with one kind of loss, the whole batch at once or in microbatches, so that each loss and each way meets several."""
    per_document, microbatch_size = bool(index % 2), (0, 5)[index // 2 % 2]
    names = NAMES[per_document]
    for name in {names[index % len(names)], names[(index + 3) % len(names)]}:
        rows, params, plan = fit(AnyOf(per_document, name), make_mesh(**shape), keys={"microbatch_size": microbatch_size})
        assert (plan.cells, plan.microbatches) == (shape["data"] * shape["fsdp"], 3 if microbatch_size else 1)
        check(name, rows, params)
        model = make_model()[0]
        for path, leaf in mesh_lib.paths(params):  # they still lie as the rules say
            assert leaf.sharding.spec == mesh_lib.spec(path, leaf.shape, make_mesh(**shape))[0], path
        assert jax.tree.structure(params) == jax.tree.structure(model.abstract)


@pytest.mark.parametrize("shape", [{}, {"data": 8}, {"fsdp": 4, "model": 2}, {"data": 2, "fsdp": 2, "model": 2}], ids=str)
def test_predictions_equal_one_document_a_row(shape):
    model, params = make_model()
    mesh = make_mesh(**shape)
    placed = jax.device_put(params, mesh_lib.param_shardings(mesh, model.abstract)[0])
    documents, stats = make_corpus().tokens, {}
    found = forward.predict(model, placed, documents, mesh, tokens_per_batch=200, stats=stats)
    np.testing.assert_allclose(found, logits_of(params), atol=TOLERANCE, rtol=0)
    assert 1 <= len(stats["programs"]) <= 2


# --------------------------------------------------------------------------- dropout, types, heads


@pytest.mark.parametrize("name, keys, shape", [
    ("logconf", {}, {}), ("xent", {"microbatch_size": 3}, {}), ("logconf", {"microbatch_size": 5}, {"data": 2, "fsdp": 2}),
], ids=str)
def test_dropout_depends_on_documents_not_on_their_places(name, keys, shape):
    options = (("dropout", 0.2),)
    rows, params, _ = fit(AnyOf(losses.LOSSES[name].per_document, name), make_mesh(**shape), options=options, keys=keys)
    check(name, rows, params, options)
    assert abs(rows[0]["loss"] - reference(name)[0][0]) > 1e-3  # and it is on


@pytest.mark.parametrize("options, microbatch_size", [
    ({"dtype": "bfloat16"}, 0), ({"dtype": "bfloat16", "param_dtype": "bfloat16"}, 5),
], ids=str)
def test_bfloat16_runs_and_stays_near_float32(options, microbatch_size):
    rows, params, _ = fit(AnyOf(True, "xent"), options=tuple(options.items()), keys={"microbatch_size": microbatch_size})
    np.testing.assert_allclose([row["loss"] for row in rows], reference("xent")[0], atol=0.06)
    assert abs(rows[0]["loss"] - reference("xent")[0][0]) > 1e-6
    types = {path.split("/")[0]: leaf.dtype for path, leaf in mesh_lib.paths(params)}
    assert types == {"backbone": jnp.dtype(options.get("param_dtype", "float32")), "head": jnp.float32}  # the head is float32 always


@pytest.mark.parametrize("name, microbatch_size", [("xent", 0), ("logconf_openai", 5)])
def test_head_only_training_leaves_the_backbone_alone(name, microbatch_size):
    before = make_model()[1]
    rows, params, _ = fit(AnyOf(losses.LOSSES[name].per_document, name), trained="head", keys={"microbatch_size": microbatch_size})
    jax.tree.map(np.testing.assert_array_equal, params["backbone"], before["backbone"])
    assert np.abs(params["head"]["kernel"] - before["head"]["kernel"]).max() > 1e-3
    assert abs(rows[0]["loss"] - reference(name)[0][0]) < TOLERANCE < abs(rows[-1]["loss"] - reference(name)[0][-1])


def test_parameters_split_and_merge():
    params = {"backbone": {"a": 1, "b": {"c": 2}}, "head": {"kernel": 3}}
    assert train.split_params(params, "full") == (params, {})
    assert train.split_params(params, "head") == ({"head": {"kernel": 3}}, {"backbone": params["backbone"]})
    assert train.merge_params(*train.split_params(params, "head")) == params


# --------------------------------------------------------------------------- dispatches and programs


def test_groups_of_steps_are_bit_identical_and_compile_one_program_each(fast_compiles, monkeypatch):
    monkeypatch.setattr(jax.stages.Lowered, "compile", fast_compiles)  # as in a run: without optimizations a loop rounds otherwise
    steps, found = 34, {}
    for group in (1, 4, 32):
        model = make_model()[0]
        batches = [np.arange(BATCH) + i * BATCH for i in range(steps)]
        ranges, lengths = feeding.dispatch_ranges(steps, group), np.array([len(t) for t in make_corpus(steps).tokens])
        plan = packing.plan_training(lengths, batches, feeding.dispatch_ranges(steps, 32), embed=model.config.embed, max_shapes=1)
        plan = dataclasses.replace(plan, dispatches=ranges, shape_of=[0] * len(ranges))  # the same shape, whatever the group
        stats = {}
        rows, params, _ = fit(AnyOf(False, "logconf_eleuther"), steps=steps, plan=plan, stats=stats)
        assert len(stats["programs"]) == 1  # the last, shorter group has none of its own
        found[group] = [row["loss"] for row in rows], jax.device_get(params)
    for group in (4, 32):
        assert found[group][0] == found[1][0]
        jax.tree.map(np.testing.assert_array_equal, found[group][1], found[1][1])


@pytest.mark.parametrize("total, group, cadences, expected", [
    (7, 3, (), [(0, 3), (3, 6), (6, 7)]),
    (7, 1, (0,), [(i, i + 1) for i in range(7)]),
    (10, 32, (4, 6), [(0, 4), (4, 6), (6, 8), (8, 10)]),
    (10, 3, (5, 0), [(0, 3), (3, 5), (5, 8), (8, 10)]),
    (4, 32, (4, 100), [(0, 4)]),
])
def test_dispatches_break_where_something_is_due(total, group, cadences, expected):
    assert [(r.start, r.stop) for r in feeding.dispatch_ranges(total, group, *cadences)] == expected


@pytest.mark.parametrize("tokens, steps", [(10, (32, 32)), (2000, (2, 31)), (10**6, (1, 1))])
def test_small_models_get_several_steps_a_dispatch(tokens, steps):
    config, model = tiny.finetune("m", "t"), make_model()[0]
    assert steps[0] <= feeding.steps_per_dispatch(config, model, tokens, "cpu") <= steps[1]
    assert feeding.steps_per_dispatch(tiny.set_keys(config, steps_per_dispatch=7), model, tokens, "cpu") == 7


@pytest.fixture
def compilations():
    """Names of the functions that XLA compiled while the test ran."""
    names, active = [], True

    def listen(event, seconds, fun_name="", **_):
        if active and event.endswith("backend_compile_duration"):
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    active = False


def test_a_run_compiles_what_was_planned_and_the_next_one_nothing(tmp_path, tiny_model, compilations):
    """Short and long documents in file order: dispatches of several shapes."""
    lengths = [4] * 32 + [60] * 16 + [9] * 32
    content = [{"input_ids": [7 + i % 90] * n, "label": i % 2} for i, n in enumerate(lengths)]
    tiny.write_rows(tmp_path / "task/train.jsonl", content)
    tiny.write_rows(tmp_path / "task/test.jsonl", tiny.rows(20))
    keys = {"shuffle": "none", "group": "none", "steps_per_dispatch": 2, "eval_every": 4, "epochs": 2}
    config = tiny.finetune(tiny_model, tmp_path / "task", **keys)
    config = tiny.set_keys(config, matmul_precision="high")  # programs of another precision are other programs: none is there yet
    results = stages.run(config, str(tmp_path / "one"))
    planned = len(w2s_jax.load(tmp_path / "one").record["shapes"])
    assert 2 <= planned <= packing.MAX_SHAPES
    assert compilations.count("jit(_dispatch)") == planned
    assert 1 <= compilations.count("jit(apply)") <= 2
    assert results["programs"] == planned + compilations.count("jit(apply)")
    compilations.clear()
    again = stages.run(tiny.set_keys(config, seed=1, learning_rate=1e-3, schedule="linear"), str(tmp_path / "two"))
    assert not compilations
    assert again["programs"] == results["programs"] and again["compile_seconds"] == 0
