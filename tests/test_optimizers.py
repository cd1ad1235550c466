"""Optimizers against torch, optax and transformers; stacked layers, sharding, decay and schedules."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from w2s_jax import config as config_lib
from w2s_jax import mesh as meshes
from w2s_jax import optimizers
from w2s_jax.errors import UserError

# Three layers; adafactor factors from 128 on, so one matrix is above that (and square, and one is not).
SHAPES = {
    "backbone/embed/tokens/embedding": (136, 8),
    "backbone/layers/attn/qkv/kernel": (3, 128, 144),
    "backbone/layers/attn/qkv/bias": (3, 144),
    "backbone/layers/mlp/up/kernel": (3, 16, 24),
    "backbone/layers/norm1/scale": (3, 8),
    "backbone/norm/scale": (8,),
    "head/kernel": (8, 2),
}
NAMES = [("adam", {}), ("adamw", {"b1": 0.9, "b2": 0.95}), ("adafactor", {}), ("sgd", {}), ("sgd", {"momentum": 0.9}), ("lion", {}),
         ("adafactor_openai", {})]


def nest(flat: dict) -> dict:
    out = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        node = out
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return out


def flatten(tree) -> dict:
    return dict(meshes.paths(tree))


def random_tree(seed, scale=0.1):
    rng = np.random.default_rng(seed)
    return nest({path: jnp.asarray(scale * rng.normal(size=shape), jnp.float32) for path, shape in SHAPES.items()})


def train(optimizer, params, rates, scale=0.02):
    """Updates with gradients that depend on the step only; sizes change, so that second moments matter."""
    state, step = optimizer.init(params), jax.jit(optimizer.update)
    for i, lr in enumerate(rates):
        params, state = step(random_tree(100 + i, scale * (1 + i % 3)), state, params, jnp.float32(lr))
    return params, state


def torch_twin(torch, params, build, rates, clip=0.0, scale=0.02):
    """The same updates by a torch optimizer over the layers' separate tensors; the stacked result, by path."""
    split = {}
    for path, leaf in flatten(params).items():
        pieces = list(np.asarray(leaf)) if optimizers.is_stacked(path) else [np.asarray(leaf)]
        split[path] = [torch.tensor(np.array(piece), requires_grad=True) for piece in pieces]
    optimizer = build(split)
    for i, lr in enumerate(rates):
        for path, leaf in flatten(random_tree(100 + i, scale * (1 + i % 3))).items():
            for j, tensor in enumerate(split[path]):
                tensor.grad = torch.tensor(np.array(leaf[j] if optimizers.is_stacked(path) else leaf))
        if clip:
            torch.nn.utils.clip_grad_norm_([t for tensors in split.values() for t in tensors], clip)
        for group in optimizer.param_groups:
            group["lr"] = float(lr)
        optimizer.step()
    joined = {path: [t.detach().numpy() for t in tensors] for path, tensors in split.items()}
    return {path: np.stack(tensors) if optimizers.is_stacked(path) else tensors[0] for path, tensors in joined.items()}


def close(tree, expected: dict, atol):
    assert set(flatten(tree)) == set(expected)
    for path, leaf in flatten(tree).items():
        np.testing.assert_allclose(leaf, expected[path], atol=atol, rtol=0, err_msg=path)


def everything(split):
    return [t for tensors in split.values() for t in tensors]


RATES = optimizers.learning_rates("cosine", 1e-2, 12, 3)


@pytest.mark.parametrize("name, args, decay, clip", [
    ("adam", {}, 0.0, 0.0), ("adamw", {}, 0.1, 0.0), ("adamw", {"b1": 0.9, "b2": 0.95}, 0.1, 1.0), ("sgd", {"momentum": 0.9}, 0.0, 0.5),
])
def test_equals_torch(name, args, decay, clip):
    torch = pytest.importorskip("torch")

    def build(split):
        if name == "sgd":
            return torch.optim.SGD(everything(split), lr=1.0, momentum=args["momentum"])
        betas = (args.get("b1", 0.9), args.get("b2", 0.999))
        if name == "adam":
            return torch.optim.Adam(everything(split), betas=betas, eps=1e-8)
        plain = [t for path, tensors in split.items() for t in tensors if t.ndim < 2]
        return torch.optim.AdamW([{"params": plain, "weight_decay": 0.0},
                                  {"params": [t for t in everything(split) if t.ndim >= 2], "weight_decay": decay}], betas=betas, eps=1e-8)

    params = random_tree(0)
    got, _ = train(optimizers.make(name, args, weight_decay=decay, grad_clip=clip), params, RATES)
    close(got, torch_twin(torch, params, build, RATES, clip), atol=5e-7)
    assert np.abs(got["head"]["kernel"] - params["head"]["kernel"]).max() > (1e-4 if clip else 1e-2)


def test_first_steps_of_adam_keep_their_digits():
    """The first update of Adam is lr * sign(g): a bias correction taken in float32 misses by 6e-6 of it."""
    optimizer = optimizers.make("adam", {"eps": 1e-20})
    params = {"head": {"kernel": jnp.zeros((4, 2))}}
    gradient = {"head": {"kernel": jnp.asarray([[1.0, -2.0], [3.0, 0.1], [1e-3, 5.0], [-1.0, 1.0]])}}
    after, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params, jnp.float32(1))
    np.testing.assert_allclose(after["head"]["kernel"], -np.sign(gradient["head"]["kernel"]), rtol=1e-6)


def test_adafactor_openai_equals_transformers():
    """transformers and torch_optimizer carry the same Adafactor (fairseq's); both clip, factor and scale by tensor."""
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("transformers.optimization").Adafactor
    params, rates = random_tree(0), np.full(8, 123.0)  # both ignore the rate
    expected = torch_twin(torch, params, lambda split: reference(everything(split), relative_step=True), rates)
    got, _ = train(optimizers.make("adafactor_openai"), params, rates)
    close(got, expected, atol=2e-7)


@pytest.mark.parametrize("name, args, reference, atol", [
    ("adafactor", {}, optax.adafactor, 3e-7), ("lion", {}, lambda lr: optax.lion(lr, weight_decay=0.0), 1e-7),
    ("sgd", {}, optax.sgd, 1e-7), ("sgd", {"momentum": 0.9}, lambda lr: optax.sgd(lr, momentum=0.9), 1e-7),
    ("adam", {}, optax.adam, 1e-6),  # optax's bias correction is taken in float32
])
def test_equals_optax_on_separate_tensors(name, args, reference, atol):
    params, tx = random_tree(0), reference(1e-2)
    got, _ = train(optimizers.make(name, args), params, [1e-2] * 4)

    @jax.jit
    def reference_steps(p, gradients):
        state = tx.init(p)
        for g in gradients:
            updates, state = tx.update(g, state, p)
            p = optax.apply_updates(p, updates)
        return p

    gradients = [flatten(random_tree(100 + i, 0.02 * (1 + i % 3))) for i in range(4)]
    for path, leaf in flatten(params).items():
        for j in range(len(leaf)) if optimizers.is_stacked(path) else [slice(None)]:
            expected = reference_steps(leaf[j], [g[path][j] for g in gradients])
            np.testing.assert_allclose(flatten(got)[path][j], expected, atol=atol, err_msg=path)


@pytest.mark.parametrize("name, args", NAMES)
def test_stacked_is_separate(name, args):
    """Layers in one array and layers in arrays of their own end in the same numbers."""
    decay = 0.0 if name == "adafactor_openai" else 0.1
    params = random_tree(0)
    got = flatten(train(optimizers.make(name, args, weight_decay=decay, grad_clip=1.0), params, [1e-2] * 3)[0])

    def apart(tree):
        out = {}
        for path, leaf in flatten(tree).items():
            rows = enumerate(leaf) if optimizers.is_stacked(path) else [(None, leaf)]
            out |= {path.replace("layers", f"layer{i}"): row for i, row in rows}
        return nest(out)

    optimizer = optimizers.make(name, args, weight_decay=decay, grad_clip=1.0)
    split = apart(params)
    state, step = optimizer.init(split), jax.jit(optimizer.update)
    for i in range(3):
        split, state = step(apart(random_tree(100 + i, 0.02 * (1 + i % 3))), state, split, jnp.float32(1e-2))
    for path, leaf in flatten(split).items():
        stacked = "/layer" in path
        whole = got["backbone/layers/" + path.split("/", 2)[2]] if stacked else got[path]
        np.testing.assert_allclose(leaf, whole[int(path.split("/")[1][5:])] if stacked else whole, atol=3e-7, err_msg=path)


@pytest.mark.parametrize("name, args", NAMES)
def test_sharded_is_unsharded(name, args):
    """On data 2 x fsdp 2 x model 2: moments lie as their parameters do, and the numbers stay."""
    mesh = meshes.make_mesh({"data": 2, "fsdp": 2, "model": 2}, jax.devices()[:8])
    params, optimizer = random_tree(0), optimizers.make(name, args, grad_clip=1.0)
    shardings, _ = meshes.param_shardings(mesh, params)
    state_shardings = optimizer.state_shardings(params, shardings)
    assert jax.tree.structure(state_shardings) == jax.tree.structure(jax.eval_shape(optimizer.init, params))
    sharded = jax.device_put(params, shardings)
    state = jax.jit(optimizer.init, out_shardings=state_shardings)(sharded)
    step = jax.jit(optimizer.update, out_shardings=(shardings, state_shardings), donate_argnums=1)
    for i in range(3):
        gradients = jax.device_put(random_tree(100 + i, 0.02 * (1 + i % 3)), shardings)
        sharded, state = step(gradients, state, sharded, jnp.float32(1e-2))
    close(sharded, flatten(train(optimizer, params, [1e-2] * 3)[0]), atol=1e-6)
    kernel = shardings["backbone"]["layers"]["attn"]["qkv"]["kernel"].spec
    assert kernel == P(None, "fsdp", "model")
    moments = {"/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in path): leaf.sharding.spec
               for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}
    mine = {path: spec for path, spec in moments.items() if "attn/qkv/kernel" in path}
    expected = {"adam": {"mu": kernel, "nu": kernel}, "lion": {"mu": kernel}, "sgd": {"trace": kernel} if args else {},
                "adafactor": {"v_row": P(None, "fsdp"), "v_col": P(None, "model")}}
    for moment, spec in expected[name.removesuffix("w").split("_")[0]].items():
        assert [s for path, s in mine.items() if moment in path.split("/")] == [spec], (moment, mine)


@pytest.mark.parametrize("shape, lost, last, expected", [
    ((16, 24), (16,), True, ("a",)), ((16, 24), (24,), False, ("b",)),
    ((16, 16), (16,), True, ("a",)), ((16, 16), (16,), False, ("b",)), ((16, 16), (1,), True, ()), ((16, 16), (16, 16), True, ("a", "b")),
])
def test_factored_moments_keep_their_dimension(shape, lost, last, expected):
    assert optimizers._kept(shape, lost, ("a", "b"), last) == expected


@pytest.mark.quick
def test_decay_mask():
    """Whatever has two or more dimensions in a layer is decayed, biases and norms are not; the rule itself reads only paths."""
    for path, shape in SHAPES.items():
        assert optimizers.decayed(path) is (len(shape) - optimizers.is_stacked(path) >= 2), path
    params = random_tree(0)
    zero = jax.tree.map(jnp.zeros_like, params)
    optimizer = optimizers.make("adamw", weight_decay=0.5)
    after, _ = jax.jit(optimizer.update)(zero, optimizer.init(params), params, jnp.float32(0.1))
    for path, leaf in flatten(after).items():
        np.testing.assert_allclose(leaf, flatten(params)[path] * (0.95 if optimizers.decayed(path) else 1.0), rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("clip, factor", [(0.0, 1.0), (10.0, 1.0), (2.5, 2.5 / (5 + 1e-6))])
def test_clip_is_one_global_norm(clip, factor):
    params = {"a": {"kernel": jnp.zeros((1, 1))}, "b": {"bias": jnp.zeros(1)}}
    gradients = {"a": {"kernel": jnp.full((1, 1), 3.0)}, "b": {"bias": jnp.full(1, 4.0)}}
    optimizer = optimizers.make("sgd", grad_clip=clip)
    after, _ = optimizer.update(gradients, optimizer.init(params), params, jnp.float32(1))
    np.testing.assert_allclose([after["a"]["kernel"][0, 0], after["b"]["bias"][0]], [-3 * factor, -4 * factor], rtol=1e-6)


@pytest.mark.parametrize("name, args", NAMES)
def test_the_rate_is_an_input(name, args):
    """One program for every rate; with rate 0 the moments move and the parameters stay."""
    optimizer, params, traces = optimizers.make(name, args), random_tree(0), []

    def update(*a):
        traces.append(1)
        return optimizer.update(*a)

    step = jax.jit(update)
    state = optimizer.init(params)
    still, state = step(random_tree(1), state, params, jnp.float32(0))
    moved = [not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(still), jax.tree.leaves(params), strict=True)]
    assert any(moved) is (name == "adafactor_openai")
    step(random_tree(2), state, still, jnp.float32(1e-3))
    assert len(traces) == 1
    assert ("not applied" in optimizer.notice) is (name == "adafactor_openai")


@pytest.mark.parametrize("name, args", NAMES)
def test_bfloat16_parameters_have_float32_moments(name, args):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), random_tree(0))
    optimizer = optimizers.make(name, args)
    after, state = jax.jit(optimizer.update)(params, optimizer.init(params), params, jnp.float32(1e-2))
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} <= {jnp.dtype("float32"), jnp.dtype("int32")}
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, optimizer.init(params))


@pytest.mark.quick
@pytest.mark.parametrize("schedule, peak, total, warmup, expected", [
    ("constant", 2.0, 3, 0, [2, 2, 2]),
    ("constant", 2.0, 4, 2, [0, 1, 2, 2]),
    ("linear", 1.0, 4, 0, [1, 0.75, 0.5, 0.25]),
    ("linear", 1.0, 6, 2, [0, 0.5, 1, 0.75, 0.5, 0.25]),
    ("cosine", 1.0, 4, 0, [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
    ("cosine", 1.0, 2, 5, [0, 0.2]),  # a run shorter than its warm-up
    # eleuther's golden recipe
    ("cosine", 0.005, 16, 4, [0, .00125, .0025, .00375, .005, .00491481, .00466506, .00426777, .00375, .00314705, .0025, .00185295,
                              .00125, .000732233, .000334936, .0000851854]),
    ("cosine", 1.0, 0, 0, []),
])
def test_schedules(schedule, peak, total, warmup, expected):
    rates = optimizers.learning_rates(schedule, peak, total, warmup)
    assert rates.dtype == np.float64 and rates.shape == (total,)
    np.testing.assert_allclose(rates, expected, atol=5e-9)


def test_schedules_of_the_golden_runs(shared):
    for case in json.loads((shared / "golden/openai/expected.json").read_text()):
        schedule = case["case"]["schedule"].removesuffix("_anneal")
        rates = optimizers.learning_rates(schedule, case["case"]["lr"], len(case["lr"]))
        np.testing.assert_allclose(rates, case["lr"], rtol=1e-12, err_msg=str(case["case"]))


@pytest.mark.quick
@pytest.mark.parametrize("name, args, options, message", [
    ("adm", {}, {}, "did you mean 'adam'"),
    ("adam", {"momentum": 0.9}, {}, "optimizer_args.momentum"),
    ("adam", {"b2": 1.0}, {}, "optimizer_args.b2=1.0"),
    ("adamw", {"eps": 0.0}, {}, "optimizer_args.eps=0.0"),
    ("sgd", {"momentum": float("nan")}, {}, "optimizer_args.momentum=nan"),
    ("adam", {}, {"grad_clip": -1.0}, "grad_clip=-1.0"),
    ("adafactor_openai", {}, {"weight_decay": 0.1}, "weight_decay=0.1"),
])
def test_make_refuses(name, args, options, message):
    with pytest.raises(UserError, match=message):
        optimizers.make(name, args, **options)


@pytest.mark.parametrize("schedule, warmup", [("cosin", 0), ("cosine", -1)])
def test_schedules_refuse(schedule, warmup):
    with pytest.raises(UserError, match="expected"):
        optimizers.learning_rates(schedule, 1.0, 10, warmup)


def test_equal_optimizers_share_one_program():
    one, two = (optimizers.make("adamw", {"b2": 0.95, "eps": None}, weight_decay=0.1) for _ in range(2))
    assert one == two and hash(one) == hash(two) and one != optimizers.make("adamw", weight_decay=0.1)


def test_unknown_shardings_are_refused():
    params = random_tree(0)
    everywhere = NamedSharding(meshes.make_mesh({"data": 1, "fsdp": 1, "model": 1}, jax.devices()[:1]), P())
    with pytest.raises(ValueError, match="head/kernel"):
        optimizers.make("adam").state_shardings(params, nest({p: everywhere for p in SHAPES if p != "head/kernel"}))


# --------------------------------------------------------------------------- first moments in bfloat16


def quadratic(name: str, steps: int = 200, **args) -> tuple[list[float], dict, dict]:
    """Losses, parameters and state of an optimizer on a noisy least-squares problem with stacked and plain parameters."""
    rng = np.random.default_rng(0)
    params = {"backbone": {"layers": {"kernel": jnp.asarray(rng.normal(size=(2, 16, 8)), jnp.float32)}, "scale": jnp.ones(8)}}
    inputs, target = rng.normal(size=(steps, 32, 16)).astype(np.float32), rng.normal(size=(16, 8)).astype(np.float32)
    optimizer = optimizers.make(name, args)

    def loss(params, x):
        y = x @ params["backbone"]["layers"]["kernel"].sum(0) * params["backbone"]["scale"]
        return jnp.mean(jnp.square(y - x @ target))

    @jax.jit
    def step(params, state, x):
        value, grads = jax.value_and_grad(loss)(params, x)
        return value, *optimizer.update(grads, state, params, jnp.float32(0.02))
    state, losses = optimizer.init(params), []
    for x in inputs:
        value, params, state = step(params, state, x)
        losses.append(float(value))
    return losses, params, state


@pytest.mark.parametrize("name, bytes_each", [("adam", 6), ("adamw", 6), ("lion", 2)])
def test_first_moments_in_bfloat16_are_smaller_and_train_alike(name, bytes_each):
    usual, _, wide = quadratic(name)
    losses, params, state = quadratic(name, mu_dtype="bfloat16")
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state.mu)} == {"bfloat16"}
    assert name == "lion" or {str(leaf.dtype) for leaf in jax.tree.leaves(state.nu)} == {"float32"}
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert sum(leaf.nbytes for leaf in moments) == bytes_each * size
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(wide) if leaf.ndim} == {"float32"}
    assert np.mean(losses[-20:]) < 0.05 * losses[0]
    np.testing.assert_allclose(np.mean(losses[-20:]), np.mean(usual[-20:]), rtol=0.1)  # measured: at most 3% apart
    assert losses != usual


@pytest.mark.parametrize("name, args, message", [
    ("adam", {"mu_dtype": "float16"}, "optimizer_args.mu_dtype='float16': expected one of float32, bfloat16"),
    ("adam", {"mu_dtype": "bfloat16", "b1": 0.999}, "optimizer_args.b1=0.999: expected at most 0.99"),
    ("lion", {"mu_dtype": "bfloat16", "b2": 0.995}, "optimizer_args.b2=0.995: expected at most 0.99"),
    ("sgd", {"mu_dtype": "bfloat16"}, "optimizer_args.mu_dtype: optimizer=sgd does not take it"),
])
def test_moments_that_cannot_be_kept_so_are_refused(name, args, message):
    with pytest.raises(UserError, match=re.escape(message)):
        optimizers.make(name, args)


def test_the_type_of_the_moments_is_part_of_a_run_unless_it_is_the_usual_one():
    usual, asked, other = (tiny_config(mu_dtype) for mu_dtype in (None, "float32", "bfloat16"))
    assert usual == asked and "mu_dtype" not in usual["optimizer_args"]
    assert other["optimizer_args"]["mu_dtype"] == "bfloat16"


def tiny_config(mu_dtype):
    c = config_lib.shipped("finetune")
    c.optimizer_args.mu_dtype = mu_dtype
    return config_lib.identity(c, {"model": "m", "task": "t"})
