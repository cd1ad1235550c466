"""Checkpoints: what was saved comes back bit for bit, on any mesh; what cannot be read says so."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from w2s_jax import checkpoint, optimizers
from w2s_jax import mesh as mesh_lib
from w2s_jax.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax leaves coroutines where a read fails

MESHES = {"one": {}, "fsdp": {"fsdp": 8}, "mixed": {"data": 2, "fsdp": 2, "model": 2}}


def make_mesh(name):
    sizes = dict.fromkeys(mesh_lib.AXES, 1) | MESHES[name]
    return mesh_lib.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


def shardings(tree, mesh):
    return jax.tree.map(lambda x: NamedSharding(mesh, P("fsdp", "model") if x.ndim == 2 else P()), tree)


def make_state(mesh, seed=0):
    """Parameters of two types, and an optimizer's state as the trainer saves it."""
    rng = np.random.default_rng(seed)
    params = {"a": {"kernel": rng.normal(size=(64, 256)).astype(np.float32)}, "b": jnp.asarray(rng.normal(size=(6,)), jnp.bfloat16)}
    params = jax.device_put(params, shardings(params, mesh))
    opt = optimizers.make("adam")
    moments = jax.tree.map(lambda x: x + 1, opt.init(params))
    return params, {"optimizer": moments, "loss": {"buffer": jnp.arange(4.0), "count": jnp.int32(3)}}


def abstract(tree, mesh):
    return checkpoint.abstract(tree, shardings(tree, mesh))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype and x.shape == y.shape
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture
def saved(tmp_path):
    """A run directory with the steps 4 and 6, and what was saved at each."""
    checkpoints, states = checkpoint.Checkpoints(tmp_path), {}
    for step in (2, 4, 6):
        states[step] = make_state(make_mesh("mixed"), seed=step)
        checkpoints.save(step, params=states[step][0], opt_state=states[step][1], rng=jax.random.key_data(jax.random.key(1)),
                         meta={"step": step})
    checkpoints.close()
    return tmp_path, states


@pytest.mark.parametrize("mesh", MESHES)
def test_restored_bit_for_bit_on_any_mesh(saved, mesh):
    folder, states = saved
    mesh = make_mesh(mesh)
    checkpoints = checkpoint.Checkpoints(folder)
    assert checkpoints.steps() == [6, 4]  # newest first; two are kept
    for step in checkpoints.steps():
        params, opt_state = states[step]
        got_params, got_state = checkpoints.restore(step, abstract(params, mesh), abstract(opt_state, mesh))
        same(got_params, params)
        same(got_state, opt_state)
        assert got_params["a"]["kernel"].sharding.mesh.shape == mesh.shape
        assert got_params["a"]["kernel"].sharding.spec == P("fsdp", "model")
        assert got_state["optimizer"].mu["a"]["kernel"].sharding.spec == P("fsdp", "model")
        assert checkpoints.meta(step) == {"step": step}
    params_only, nothing = checkpoints.restore(6, abstract(states[6][0], mesh))
    same(params_only, states[6][0])
    assert nothing is None
    checkpoints.close()


def test_a_step_saved_again_replaces_the_old_one(saved):
    folder, states = saved
    checkpoints = checkpoint.Checkpoints(folder)
    checkpoints.save(6, params=states[2][0], meta={"step": 6})
    checkpoints.wait()
    mesh = make_mesh("one")
    same(checkpoints.restore(6, abstract(states[2][0], mesh))[0], states[2][0])
    with pytest.raises(UserError, match="checkpoints/6 cannot be read"):  # the new one has no optimizer's state
        checkpoints.restore(6, abstract(states[2][0], mesh), abstract(states[2][1], mesh))
    checkpoints.close()


def wrong_shape(params):
    return params | {"b": jnp.zeros((7,), jnp.bfloat16)}


def wrong_type(params):
    return params | {"b": jnp.zeros((6,), jnp.float32)}


def surplus(params):
    return params | {"c": jnp.zeros(2)}


def missing(params):
    return {"a": params["a"]}


@pytest.mark.parametrize("change", [wrong_shape, wrong_type, surplus, missing])
def test_another_model_is_refused(saved, change):
    folder, states = saved
    checkpoints = checkpoint.Checkpoints(folder)
    with pytest.raises(UserError, match=r"checkpoint .*checkpoints/6"):
        checkpoints.restore(6, abstract(change(states[6][0]), make_mesh("one")))
    checkpoints.close()


def truncated(step):
    """The largest file of the parameters, cut in half."""
    file = max((f for f in (step / "params").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(step):
    for file in [f for f in (step / "params").rglob("*") if f.is_file()]:
        file.write_bytes(b"")


def lost_params(step):
    shutil.rmtree(step / "params")


def lost_state(step):
    shutil.rmtree(step / "opt_state")


def hollow(step):
    shutil.rmtree(step)
    step.mkdir()


DAMAGES = [truncated, emptied, lost_params, lost_state, hollow]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_an_error_that_names_it_and_leaves_the_others(saved, damage):
    folder, states = saved
    damage(folder / "checkpoints/6")
    checkpoints = checkpoint.Checkpoints(folder)
    mesh = make_mesh("one")
    if 6 in checkpoints.steps():
        with pytest.raises(UserError, match=r"checkpoints/6 cannot be read: .+") as caught:
            checkpoints.restore(6, abstract(states[6][0], mesh), abstract(states[6][1], mesh))
        assert "\n" not in str(caught.value)
    assert 4 in checkpoints.steps()
    same(checkpoints.restore(4, abstract(states[4][0], mesh))[0], states[4][0])
    checkpoints.save(6, params=states[6][0], opt_state=states[6][1], rng=jnp.zeros(2, jnp.uint32), meta={"step": 6})  # in its place
    checkpoints.wait()
    same(checkpoints.restore(6, abstract(states[6][0], mesh), abstract(states[6][1], mesh))[1], states[6][1])
    checkpoints.close()


@pytest.mark.parametrize("read_only", [True, False])
def test_a_save_that_was_killed_is_not_a_step(saved, read_only):
    """Its remains go with the next save; who only reads leaves them, for the run may be saving this moment."""
    folder, states = saved
    (folder / "checkpoints/8.orbax-checkpoint-tmp/params").mkdir(parents=True)
    checkpoints = checkpoint.Checkpoints(folder, read_only=read_only)
    assert checkpoints.steps() == [6, 4]
    same(checkpoints.restore(6, abstract(states[6][0], make_mesh("one")))[0], states[6][0])
    if not read_only:
        checkpoints.save(8, params=states[6][0], meta={"step": 8})
    checkpoints.close()
    found = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert found == (["4", "6", "8.orbax-checkpoint-tmp"] if read_only else ["6", "8"])


def test_what_is_kept(saved, tmp_path_factory):
    folder, _ = saved
    checkpoints = checkpoint.Checkpoints(folder)
    checkpoints.keep_only({6})
    assert checkpoints.steps() == [6]
    checkpoints.close()
    assert checkpoint.Checkpoints(folder).steps() == [6]
    checkpoints.clear()
    assert not (folder / "checkpoints").exists() and checkpoint.Checkpoints(folder).steps() == []
    empty = tmp_path_factory.mktemp("empty")
    assert checkpoint.Checkpoints(empty).steps() == [] and not list(empty.iterdir())  # looking makes no folder
