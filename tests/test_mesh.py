"""Meshes and the rules over parameter paths: where every parameter and every moment lies."""

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from w2s_jax import constraints, models, optimizers
from w2s_jax import mesh as mesh_lib
from w2s_jax.errors import UserError

BACKBONE = "backbone/"
LAYERS = "backbone/layers/"


def make_mesh(data=1, fsdp=1, model=1):
    return mesh_lib.make_mesh({"data": data, "fsdp": fsdp, "model": model}, jax.devices()[: data * fsdp * model])


@pytest.fixture(scope="module")
def abstract():
    """Parameters of a GPT-2 in small: vocabulary 151, 36 wide, 12 heads, 144 in the MLP."""
    return models.build(tiny.config(), head="classifier").abstract


# --------------------------------------------------------------------------- the mesh


@pytest.mark.parametrize("shape, expected", [
    ((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 1, 8), (1, 1, 8)), ((1, 1, 1), (1, 1, 1)), ((2, 2, 1), (2, 2, 1)),
])
def test_sizes_of_a_mesh(shape, expected):
    mesh = mesh_lib.make_mesh(dict(zip(mesh_lib.AXES, shape)))
    assert tuple(mesh.shape.values()) == expected and mesh.axis_names == ("data", "fsdp", "model")
    assert mesh_lib.cells(mesh) == expected[0] * expected[1]


@pytest.mark.parametrize("shape, message", [
    ((16, 1, 1), "does not fit the 8 devices"), ((3, -1, 1), "does not fit the 8 devices"), ((-1, -1, 1), "at most one -1"),
    ((0, 1, 1), "positive sizes"), ((-2, 1, 1), "positive sizes"), ((-1, 16, 1), "does not fit the 8 devices"),
])
def test_a_mesh_that_cannot_be_is_refused(shape, message):
    with pytest.raises(UserError, match=f"mesh: .*{message}"):
        mesh_lib.make_mesh(dict(zip(mesh_lib.AXES, shape)))


# --------------------------------------------------------------------------- the rules


@pytest.mark.parametrize("sizes, expected, fallen", [
    ({"fsdp": 2, "model": 2}, {
        "embed/tokens/embedding": P(None, ("fsdp", "model")),  # nothing divides a vocabulary of 151; all axes go to the width
        "embed/positions/embedding": P(None, "fsdp"),
        "layers/attn/qkv/kernel": P(None, "fsdp", "model"), "layers/attn/qkv/bias": P(None, "model"),
        "layers/attn/out/kernel": P(None, "model", "fsdp"), "layers/attn/out/bias": P(),
        "layers/mlp/up/kernel": P(None, "fsdp", "model"), "layers/mlp/up/bias": P(None, "model"),
        "layers/mlp/down/kernel": P(None, "model", "fsdp"), "layers/mlp/down/bias": P(),
        "layers/norm1/scale": P(), "layers/norm2/bias": P(), "norm/scale": P(), "head/kernel": P("fsdp", None),
    }, {"embed/tokens/embedding"}),
    ({"model": 8}, {  # 36 and 108 are no multiples of 8, 144 is
        "embed/tokens/embedding": P(None, "fsdp"), "layers/attn/qkv/kernel": P(None, "fsdp", None), "layers/attn/qkv/bias": P(),
        "layers/attn/out/kernel": P(None, None, "fsdp"), "layers/mlp/up/kernel": P(None, "fsdp", "model"),
        "layers/mlp/up/bias": P(None, "model"), "layers/mlp/down/kernel": P(None, "model", "fsdp"), "head/kernel": P("fsdp", None),
    }, {"embed/tokens/embedding", "layers/attn/qkv/kernel", "layers/attn/qkv/bias", "layers/attn/out/kernel"}),
    ({"fsdp": 8}, {
        "embed/tokens/embedding": P("model", None), "embed/positions/embedding": P(), "layers/attn/qkv/kernel": P(None, None, "model"),
        "layers/attn/out/kernel": P(None, "model", None), "layers/mlp/up/kernel": P(None, None, "model"),
        "layers/mlp/down/kernel": P(None, "model", None), "layers/attn/qkv/bias": P(None, "model"), "head/kernel": P(),
    }, {"embed/tokens/embedding", "embed/positions/embedding", "layers/attn/qkv/kernel", "layers/attn/out/kernel", "layers/mlp/up/kernel",
        "layers/mlp/down/kernel", "head/kernel"}),
    ({"data": 8}, {"layers/attn/qkv/kernel": P(None, "fsdp", "model"), "embed/tokens/embedding": P("model", "fsdp")}, set()),
], ids=tiny.stable)
def test_specs_of_parameters(abstract, sizes, expected, fallen):
    mesh = make_mesh(**sizes)
    shardings, lesser = mesh_lib.param_shardings(mesh, abstract)
    found = {path.removeprefix(BACKBONE): s.spec for path, s in mesh_lib.paths(shardings)}
    assert {path: found[path] for path in expected} == expected
    assert {path.removeprefix(BACKBONE) for path in lesser} == fallen
    if "model" not in sizes or "fsdp" not in sizes:
        return
    assert set(found) - set(expected) == {  # no parameter is left out above but the twins of those named
        "layers/norm1/bias", "layers/norm2/scale", "norm/bias"}


def test_gpt2s_own_sizes_on_a_mesh_of_8():
    """50257 words and 12 heads: what divides is split, the vocabulary is not."""
    sizes = tiny.config(vocab_size=50257, n_embd=768, n_layer=12, n_head=12, n_inner=3072, n_positions=1024)
    mesh = make_mesh(fsdp=2, model=4)
    shardings, fallen = mesh_lib.param_shardings(mesh, models.build(sizes, head="classifier").abstract)
    assert fallen == ["backbone/embed/tokens/embedding"]
    specs = {path: s.spec for path, s in mesh_lib.paths(shardings)}
    assert specs["backbone/embed/tokens/embedding"] == P(None, ("fsdp", "model"))
    assert specs[LAYERS + "attn/qkv/kernel"] == P(None, "fsdp", "model")


@pytest.mark.parametrize("sizes, expected", [
    ({"data": 8}, []), ({"model": 4, "data": 2}, ["backbone/embed/tokens/embedding"]),
    ({"model": 8}, ["attn/qkv/kernel", "heads (12 over model=8: every device has them all)"]),
])
def test_what_does_not_divide_is_named(sizes, expected):
    found = mesh_lib.lesser(models.build(tiny.config(), head="classifier"), make_mesh(**sizes))
    assert all(any(name in line for line in found) for name in expected) and bool(found) == bool(expected)
    assert mesh_lib.lesser(models.build(tiny.config(), head="classifier"), make_mesh()) == []


def test_a_parameter_that_no_rule_covers_is_a_defect():
    with pytest.raises(ValueError, match="no sharding rule covers the parameter backbone/new/thing"):
        mesh_lib.spec("backbone/new/thing", (4, 4), make_mesh())


# --------------------------------------------------------------------------- arrays


@pytest.mark.parametrize("name", ["adam", "adafactor_openai"])
def test_parameters_and_moments_lie_as_the_rules_say(abstract, tiny_model, name):
    mesh = make_mesh(fsdp=2, model=2, data=2)
    model = models.build(models.read_config(tiny_model), head="classifier")
    shardings, _ = mesh_lib.param_shardings(mesh, model.abstract)
    params = models.load(tiny_model, model, shardings)
    optimizer = optimizers.make(name)
    state = jax.jit(optimizer.init, out_shardings=optimizer.state_shardings(abstract, shardings))(params)

    def spec(tree, path):
        found = [leaf for key, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
                 if "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in key).endswith(path)]
        assert len(found) == 1, path
        return found[0].sharding.spec, found[0].addressable_shards[0].data.shape

    assert spec(params, "mlp/up/kernel") == (P(None, "fsdp", "model"), (2, 18, 72))
    assert spec(params, "embed/tokens/embedding") == (P(None, ("fsdp", "model")), (151, 9))
    assert spec(params, "layers/norm1/scale") == (P(), (2, 36))
    if name == "adam":
        for moment in ("mu", "nu"):
            for path, leaf in mesh_lib.paths(params):
                wanted = tuple(leaf.sharding.spec) + (None,) * (leaf.ndim - len(leaf.sharding.spec))
                assert spec(state, f"{moment}/{path}") == (P(*wanted), leaf.addressable_shards[0].data.shape), path
        assert spec(state, "count")[0] == P()
    else:  # a factored moment keeps the dimension that it kept: rows [embed], columns [mlp]
        assert spec(state, "mlp/up/kernel/v_row") == (P(None, "fsdp"), (2, 18))
        assert spec(state, "mlp/up/kernel/v_col") == (P(None, "model"), (2, 72))
        assert spec(state, "attn/out/kernel/v_row") == (P(None, "model"), (2, 18))  # square: the shapes alone do not tell
        assert spec(state, "attn/out/kernel/v_col") == (P(None, "fsdp"), (2, 18))


@pytest.mark.parametrize("sizes, parts", [({"data": 4}, 4), ({"data": 2, "fsdp": 2, "model": 2}, 4), ({"model": 8}, 1)], ids=str)
def test_cells_of_a_batch_are_spread_over_data_and_fsdp(sizes, parts):
    mesh = make_mesh(**sizes)
    array = jax.device_put(np.arange(3 * 8 * 5).reshape(3, 8, 5), mesh_lib.batch_sharding(mesh, axis=1))
    assert {s.data.shape for s in array.addressable_shards} == {(3, 8 // parts, 5)}
    assert {s.data.shape for s in jax.device_put(array, mesh_lib.replicated(mesh)).addressable_shards} == {(3, 8, 5)}


# --------------------------------------------------------------------------- inside a program

TOKENS = "backbone/embed/tokens/embedding"


@pytest.mark.parametrize("entries", [96, 97])  # those that devices divide, and those that they do not
@pytest.mark.parametrize("sizes", [{"model": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "model": 2}, {"data": 8}], ids=str)
def test_rows_of_a_table_that_stays_where_it_lies(sizes, entries):
    """Values, gradients and NaN for ids outside of the table, as without a mesh."""
    rng, mesh = np.random.default_rng(0), make_mesh(**sizes)
    table, ids = rng.normal(size=(entries, 16)).astype(np.float32), rng.integers(0, entries, (8, 5)).astype(np.int32)
    weights = rng.normal(size=(8, 5, 16)).astype(np.float32)
    fill = lambda table, ids: table.at[ids].get(mode="fill", fill_value=np.nan)  # noqa: E731
    placed = jax.device_put(table, jax.NamedSharding(mesh, mesh_lib.spec(TOKENS, table.shape, mesh)[0]))
    rows = jax.device_put(ids, mesh_lib.batch_sharding(mesh))
    take = jax.jit(lambda table, ids: constraints.take_rows(table, ids, TOKENS, fill))
    np.testing.assert_array_equal(take(placed, rows), table[ids])
    found, expected = (jax.jit(jax.grad(lambda table, ids, take=take: (take(table, ids) * weights).sum()))(table, ids)
                       for take, table, ids in ((take, placed, rows), (fill, table, ids)))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for bad in (entries, entries + 3, 2**30):
        wrong = jax.device_put(ids.copy(), mesh_lib.batch_sharding(mesh)).at[3, 2].set(bad)
        out = np.asarray(take(placed, jax.device_put(wrong, mesh_lib.batch_sharding(mesh))))
        assert np.isnan(out[3, 2]).all() and np.isnan(out).sum() == 16


def test_rows_and_heads_are_spread_where_they_divide():
    mesh = make_mesh(data=2, fsdp=2, model=2)
    x = jax.device_put(np.zeros((8, 3, 6, 5)), mesh_lib.batch_sharding(mesh))
    batch = ("data", "fsdp")
    for axis, expected in ((2, P(batch, None, "model")), (3, P(batch)), (None, P(batch))):  # 6 heads divide, 5 features do not
        found = jax.jit(lambda x, axis=axis: constraints.spread(x * 1.0, model=axis))(x)
        assert found.sharding.is_equivalent_to(jax.NamedSharding(mesh, expected), 4), axis
    assert constraints.axis_sizes(np.zeros((8, 3))) == {}  # no mesh is known
