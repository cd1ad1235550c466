"""Frozen features: the right numbers, in one pass, once, and never half of them."""

import functools
import json
import os
import threading

import jax
import numpy as np
import pytest
import reference
import test_families
import tiny

from w2s_jax import claim, features, forward, models, runlog, store, workload
from w2s_jax import mesh as mesh_lib
from w2s_jax.config import shipped
from w2s_jax.data.examples import Examples, one_hot
from w2s_jax.errors import UserError

LAYERS = 3  # of the stores' model


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def read(model, params, batch, layers, pool):
    return model.features(params, batch, layers, pool)


# --------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("case", ["gpt2 odd", "llama", "gemma3", "bert"])
@pytest.mark.parametrize("pool", models.POOLS)
def test_features_are_transformers_hidden_states(tmp_path, case, pool):
    torch = pytest.importorskip("torch")
    encoder = reference.is_encoder(case)
    net = reference.save(case, "classifier" if encoder else "lm", tmp_path)
    model = models.build(models.read_config(tmp_path), head="classifier", readout="last")
    params = models.load(tmp_path, model, key=jax.random.key(0))
    depth = model.config.layers
    assert test_families.batch()["tokens"].shape[0] > 1  # cells
    for layers in (tuple(range(depth + 1)), (1,)) if pool == "last" else ((0, depth),):
        got = read(model, params, test_families.batch(), layers, pool)
        assert got.dtype == np.float32
        for d, ids in enumerate(test_families.documents()):
            with torch.no_grad():
                states = test_families.ask(net, ids).hidden_states
            for row, layer in zip(got, layers):
                expected = states[layer][0, -1] if pool == "last" else states[layer][0].mean(0)
                test_families.close(test_families.by_document(row)[d], expected, 1e-5, f"{layers}, layer {layer}, document {d}")


def tiny_model(**options):
    model = models.build(tiny.config(n_layer=LAYERS), head="classifier", **options)
    return model, tiny.random_params(model.abstract)


def test_layers_above_are_not_computed_and_none_is_kept_whole():
    model, params = tiny_model()
    batch = test_families.batch()
    whole = read(model, params, batch, tuple(range(LAYERS + 1)), "last")
    spoilt = jax.tree_util.tree_map_with_path(
        lambda path, a: np.concatenate([a[:2], np.full_like(a[2:], np.nan)]) if "layers" in jax.tree_util.keystr(path) else a, params)
    np.testing.assert_allclose(read(model, spoilt, batch, (1, 2), "last"), whole[1:3], atol=1e-6)
    assert np.isnan(read(model, spoilt, batch, (3,), "last")).any()
    program = jax.make_jaxpr(lambda p: model.features(p, batch, (0, 2, 3), "last"))(params)
    states = batch["tokens"].size * model.config.embed
    scanned = [v.aval.shape for e in program.eqns if e.primitive.name == "scan" for v in e.outvars[1:]]
    assert scanned and max(map(np.prod, scanned)) < states  # less than one layer's


def test_bfloat16_is_exact_in_float32():
    model, params = tiny_model(dtype="bfloat16")
    got = np.asarray(read(model, params, test_families.batch(), (1, 3), "last"))
    assert got.dtype == np.float32 and np.array_equal(got, got.astype(jax.numpy.bfloat16).astype(np.float32))


@pytest.mark.parametrize("layers", [(), (2, 1), (1, 1), (LAYERS + 1,), (-1,)])
def test_layers_that_cannot_be(layers):
    model, params = tiny_model()
    with pytest.raises(ValueError, match="expected ascending numbers from 0 to 3"):
        model.features(params, test_families.batch(), layers)


@pytest.mark.parametrize("layer, number", [("middle", 6), ("last", 13), ("0", 0), ("13", 13)])
def test_names_of_layers(layer, number):
    assert features.layer_number(layer, 13) == number


@pytest.mark.parametrize("layer", ["14", "-1", "first", "1.5"])
def test_layers_that_the_model_has_not(layer):
    with pytest.raises(UserError, match=f"config.layer: '{layer}', expected middle, last or a number from 0 .* to 13"):
        features.layer_number(layer, 13)


# --------------------------------------------------------------------------- the store


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model") / "deep", n_layer=LAYERS)


@pytest.fixture(autouse=True)
def fast(fast_compiles):
    pass


def examples(n=60, seed=0):
    ids = [f"d{seed}-{i}" for i in range(n)]
    return Examples(ids, None, tiny.documents(n, seed), one_hot(np.arange(n) % 2), ids)


class Bench:
    """A store, its model, and what was computed."""

    def __init__(self, folder, path, monkeypatch, **keys):
        mesh = {f"mesh__{axis}": keys.pop(axis, 1) for axis in mesh_lib.AXES}
        self.config = tiny.set_keys(shipped("probe"), model=str(folder), revision="main", **mesh, **keys)
        with self.config.unlocked():
            self.config.update({"readout": "last", "head_init": "zeros", "remat": "none"})
        self.path = path
        self.loaded = workload.open_model(self.config)
        self.computed, self.stop_at = [], None
        whole = forward.passes

        def passes(name, *arguments, **options):
            for batch, outputs in whole(name, *arguments, **options):
                if len(self.computed) == self.stop_at:
                    raise KeyboardInterrupt
                self.computed.append((name[2], int((batch.documents >= 0).sum())))
                yield batch, outputs

        monkeypatch.setattr(forward, "passes", passes)

    def store(self, pool="last", **about):
        return features.Store(self.path, **{"model": "sha256:x", "name": "some/deep", "pool": pool, "dtype": "float32",
                                            "param_dtype": "float32", "matmul_precision": "default"} | about)

    def fill(self, documents, *layers, **about):
        """Documents computed."""
        before = sum(n for _, n in self.computed)
        self.store(**about).fill(self.config, self.loaded, documents, layers)
        return sum(n for _, n in self.computed) - before

    def expected(self, documents, layer, pool="last"):
        """One document a row."""
        from test_train import unpacked

        got = read(self.loaded.model, jax.device_get(self.loaded.params), unpacked(documents.tokens), (layer,), pool)
        return np.asarray(got)[0, 0]


@pytest.fixture
def bench(folder, tmp_path, monkeypatch):
    return lambda **keys: Bench(folder, tmp_path / "store", monkeypatch, **{"eval_batch_size": 10} | keys)


@pytest.mark.parametrize("keys", [{}, {"data": 2, "fsdp": 2, "model": 2}, {"fsdp": 8}], ids=str)
@pytest.mark.parametrize("pool", models.POOLS)
def test_what_is_kept_is_what_the_model_computes(bench, keys, pool):
    made, documents = bench(**keys), examples()
    made.fill(documents, 0, 2, 3, pool=pool)
    for layer in (0, 2, 3):
        np.testing.assert_allclose(made.store(pool).get(documents, layer), made.expected(documents, layer, pool), atol=1e-5)


def test_one_pass_and_only_what_is_new(bench):
    made, documents = bench(), examples()
    assert made.store().missing(documents, (2,)) == 60
    assert made.fill(documents, 2) == 60 and len(made.computed) > 3  # several batches, each document in one of them
    assert made.store().missing(documents, (2,)) == 0
    before = made.store().get(documents, 2)
    assert made.fill(documents, 2) == 0
    order = np.random.default_rng(0).permutation(60)[:31]
    assert made.fill(documents.select(order), 2) == 0  # another order of some of them
    np.testing.assert_array_equal(made.store().get(documents.select(order), 2), before[order])
    assert made.fill(documents, 2, 3) == 60 and made.computed[-1][0] == (3,)  # another layer: that layer alone
    more = examples(70)
    more = more.replace(tokens=documents.tokens + tiny.documents(10, seed=9))
    assert made.fill(more, 2, 3) == 10 and made.computed[-1][0] == (2, 3)
    np.testing.assert_array_equal(made.store().get(more, 2)[:60], before)
    for other in ({"pool": "mean"}, {"model": "sha256:y"}, {"dtype": "bfloat16"}):
        assert made.fill(documents, 2, **other) == 60


def test_a_text_that_stands_twice_is_computed_once(bench):
    made, documents = bench(), examples(20)
    twice = examples(40).replace(tokens=documents.tokens * 2)
    assert made.fill(twice, 1) == 20
    found = made.store().get(twice, 1)
    np.testing.assert_array_equal(found[:20], found[20:])


def test_the_files_are_read_without_this_package(bench):
    made, documents = bench(), examples()
    made.fill(documents, 1, 2)
    [index] = made.path.glob("*/*/index.json")
    said = json.loads(index.read_text())
    assert said["layers"] == [1, 2] and said["pool"] == "last" and said["model"] == "sha256:x" and said["dtype"] == "float32"
    assert sorted(said["ids"]) == sorted(documents.ids) and index.parent.parent.name.startswith("some_deep-last-")
    array = np.load(index.parent / "layer-002.npy", mmap_mode="r", allow_pickle=False)
    assert array.dtype == np.float32 and array.shape == (60, 36)
    rows = [said["ids"].index(i) for i in documents.ids]
    np.testing.assert_array_equal(array[rows], made.store().get(documents, 2))
    assert [said["text_shas"][row] for row in rows] == documents.text_shas == [said["token_shas"][row] for row in rows]
    assert sorted(f.name for f in index.parent.iterdir()) == ["index.json", "layer-001.npy", "layer-002.npy"]


@pytest.mark.parametrize("seconds", [0.0, 1e9], ids=["goes on", "starts over"])
def test_a_pass_that_was_killed(bench, folder, tmp_path, monkeypatch, seconds):
    documents = examples()
    whole = bench()
    whole.path = tmp_path / "whole"
    whole.fill(documents, 1, 2)
    batches = len(whole.computed)
    monkeypatch.setattr(store, "SECONDS", seconds)
    made = Bench(folder, tmp_path / "store", monkeypatch, eval_batch_size=10)
    made.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        made.fill(documents, 1, 2)
    assert made.store().missing(documents, (1,)) == 60  # nothing of it is served
    with pytest.raises(KeyError):
        made.store().get(documents, 1)
    made.stop_at = None
    for torn in made.path.glob("*/*/layer-*.npy"):  # what a kill may leave behind the last note
        with open(torn, "ab") as file:
            file.write(b"torn")
    made.fill(documents, 1, 2)
    assert len(made.computed) == (batches if seconds == 0 else batches + 2)
    for name in ("layer-001.npy", "layer-002.npy"):
        [a], [b] = (list(path.glob(f"*/*/{name}")) for path in (whole.path, made.path))
        assert a.read_bytes() == b.read_bytes() and a.parent.name == b.parent.name
    assert not list(made.path.glob("*/*/progress.json"))


def test_two_that_want_the_same_at_once(bench, monkeypatch):
    """The second waits for the first, and finds what it wanted."""
    made, documents = bench(), examples()
    inside, whole, waiting = threading.Event(), forward.passes, threading.Event()

    def passes(*arguments, **options):
        inside.set()
        waiting.wait(5)
        yield from whole(*arguments, **options)

    monkeypatch.setattr(forward, "passes", passes)
    one = threading.Thread(target=made.fill, args=(documents, 1))
    one.start()
    inside.wait(60)
    monkeypatch.setattr(claim, "say", lambda text: waiting.set())  # ": waiting for host ..."
    made.fill(documents, 1)
    one.join()
    assert waiting.is_set() and sum(n for _, n in made.computed) == 60
    assert runlog.runs(made.path) == []  # a store is no run directory


def test_a_finished_pass_that_was_damaged_or_lost_a_layer(bench):
    made, documents = bench(), examples()
    made.fill(documents, 1, 2)
    [one] = made.path.glob("*/*/layer-001.npy")
    one.unlink()
    assert made.fill(documents, 1, 2) == 60 and made.computed[-1][0] == (1,)
    [two] = made.path.glob("*/*/layer-002.npy")
    os.truncate(two, two.stat().st_size - 4)
    with pytest.raises(UserError, match=r"layer-002.npy: is damaged .*; delete .* and run again"):
        made.store().get(documents, 2)
    two.unlink()
    assert made.fill(documents, 2) == 60


def test_no_room_and_not_finite(bench, monkeypatch):
    made, documents = bench(), examples()
    usage = store.shutil.disk_usage(made.path.parent)
    with monkeypatch.context() as m:
        m.setattr(store.shutil, "disk_usage", lambda _: usage._replace(free=100))
        with pytest.raises(UserError, match=r"config.features: .* has room for 1e-07 GB, expected 8.64e-06 GB for 60 documents x 1 layers"):
            made.fill(documents, 1)
    made.loaded.params = jax.tree.map(lambda a: a * np.float32(np.nan), made.loaded.params)
    with pytest.raises(UserError, match="hidden states are not finite, first for document 'd0-"):
        made.fill(documents, 1)
    assert made.store().missing(documents, (1,)) == 60


def test_an_object_store(bench, monkeypatch):
    """As on gs://: nothing is appended or mapped there."""
    made, documents = bench(), examples()
    monkeypatch.setattr(store, "is_object_store", lambda path: True)
    assert made.fill(documents, 1, 2) == 60 and made.fill(documents, 1, 2) == 0
    np.testing.assert_allclose(made.store().get(documents, 2), made.expected(documents, 2), atol=1e-5)
