"""Every implementation of attention against a dense reference, and the proof that packed documents stay apart.

The kernels run in Pallas's interpreter, and XLA stands in for cuDNN. Where libtpu is found (`PYTHONPATH` with the wheel in it
will do), the real TPU compiler compiles splash and a whole model for a TPU v5e.
"""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from w2s_jax import mesh as mesh_lib
from w2s_jax import models
from w2s_jax.config import CHOICES
from w2s_jax.errors import UserError
from w2s_jax.models import attention, attention_kernels
from w2s_jax.models.architecture import Kind

KERNELS = ("splash", "pallas", "cudnn")


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def interpret(monkeypatch, fast_compiles):
    """Kernels run here, in programs that compile fast."""
    monkeypatch.setattr(attention_kernels, "INTERPRET", True)


def call(function, *arguments):
    return jax.jit(function).lower(*arguments).compile()(*arguments)


# Lengths of the documents of each row; the rest is padding. A row of nothing but padding occurs in every batch.
PACKED = ((20, 1, 33), (60,), (), (7, 52, 11))
ALONE = ((70,), (1,), (), (41,))  # what cudnn serves


def make_segments(layout, time):
    segments, number = np.zeros((len(layout), time), np.int32), 0
    for row, documents in enumerate(layout):
        at = 0
        for length in documents:
            number += 1
            segments[row, at : at + length] = number
            at += length
    return segments


def random_inputs(rows, time, heads, kv_heads, width, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(rows, time, n, width)).astype(np.float32) for n in (heads, kv_heads, kv_heads))


def reference(q, k, v, segments, window, causal, cap, scale):
    """Dense, in float32, one expression for each rule."""
    groups, places = q.shape[2] // k.shape[2], np.arange(q.shape[1])
    k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
    scores = scale * jnp.einsum("rqhd,rkhd->rhqk", q, k)
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    seen = segments[:, :, None] == segments[:, None, :]
    if causal:
        seen &= places[None, :, None] >= places[None, None, :]
    if window is not None:
        distance = np.abs(places[:, None] - places[None, :])
        seen &= (distance < window if causal else distance <= window)[None]
    weights = jnp.where(seen[:, None], jnp.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
    return jnp.einsum("rhqk,rkhd->rqhd", weights / weights.sum(axis=-1, keepdims=True), v)


def run(implementation, q, k, v, segments, kinds, kind, causal, cap, scale):
    plan = attention.prepare(jnp.asarray(segments), kinds, causal, width=q.shape[-1], dtype=q.dtype, cap=cap,
                             implementation=implementation)
    assert plan.implementation == implementation
    return attention.attend(q, k, v, plan, kinds, kind, scale=scale)


def with_gradients(function, inputs, segments):
    """Outputs, and gradients of a sum in which every output of a document has a weight of its own; nobody reads padding."""
    weight = np.random.default_rng(1).normal(size=inputs[0].shape).astype(np.float32) * (segments != 0)[..., None, None]

    def total(q, k, v):
        out = function(q, k, v)
        return jnp.sum(out.astype(jnp.float32) * weight), out

    (_, out), gradients = call(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True), *inputs)
    return [np.asarray(a, np.float32) for a in (out, *gradients)]


def close(found, wanted, segments, dtype):
    """Real tokens within rounding, padding finite."""
    tolerance, real = 2e-5 if dtype == jnp.float32 else 3e-2, (segments != 0)[..., None, None]
    for what, a, b in zip(("out", "dq", "dk", "dv"), found, wanted):
        assert np.isfinite(a).all(), what
        np.testing.assert_allclose(a * real, b * real, atol=tolerance * max(1, np.abs(b).max()), rtol=0, err_msg=what)


CASE = {"heads": 4, "kv_heads": 4, "width": 16, "time": 80, "causal": True, "window": None, "cap": None, "dtype": jnp.float32}
CASES = {  # what differs from it
    "causal": {},
    "grouped": {"kv_heads": 2, "width": 24},
    "whole block, one kv head": {"time": 128, "kv_heads": 1},
    "three blocks": {"time": 300},
    "encoder": {"causal": False},
    "window": {"window": 5},
    "window, encoder": {"window": 5, "causal": False},
    "window of one": {"window": 1},
    "cap": {"cap": 2.0},
    "cap, window, grouped": {"cap": 2.0, "window": 9, "kv_heads": 2},
    "bfloat16": {"dtype": jnp.bfloat16, "width": 64},
}


def refused(implementation, case):
    return (implementation == "pallas" and ("window" in case or "cap" in case)) or (
        implementation == "cudnn" and ("cap" in case or "dtype" in case or ("window" in case and not case.get("causal", True))))


@pytest.mark.parametrize("implementation, name", [(i, n) for i in ("xla", *KERNELS) for n in CASES if not refused(i, CASES[n])])
def test_forward_and_gradients_equal_the_dense_reference(implementation, name, interpret):
    case = CASE | CASES[name]
    if implementation == "cudnn":
        case["dtype"] = jnp.bfloat16
    segments = make_segments(ALONE if implementation == "cudnn" else PACKED, case["time"])
    inputs = random_inputs(len(segments), case["time"], case["heads"], case["kv_heads"], case["width"])
    inputs = [jnp.asarray(x, case["dtype"]) for x in inputs]
    arguments = (case["causal"], case["cap"], 0.3)
    kinds = (Kind(case["window"]),)
    found = with_gradients(lambda q, k, v: run(implementation, q, k, v, segments, kinds, 0, *arguments), inputs, segments)
    exact = [x.astype(jnp.float32) for x in inputs]
    wanted = with_gradients(lambda q, k, v: reference(q, k, v, segments, case["window"], *arguments), exact, segments)
    close(found, wanted, segments, case["dtype"])


@pytest.mark.parametrize("implementation", ["xla", "splash", "cudnn"])
def test_the_kind_of_a_layer_is_traced(implementation, interpret):
    """A scan over layers of three kinds, two of which share a window."""
    kinds, segments = (Kind(None), Kind(4), Kind(4), Kind(17)), make_segments(ALONE, 80)
    dtype = jnp.bfloat16 if implementation == "cudnn" else jnp.float32
    inputs = [jnp.asarray(x, dtype) for x in random_inputs(4, 80, 2, 1, 16)]

    def layers(one):
        def stack(q, k, v):
            body = jax.checkpoint(lambda x, kind: (x + one(x, k, v, kind), None))
            return jax.lax.scan(body, q, jnp.asarray([3, 1, 0, 2]))[0]
        return stack

    def dense(q, k, v, kind):
        outs = [reference(q, k, v, segments, each.window, True, None, 0.3) for each in kinds]
        return jnp.stack(outs)[kind].astype(q.dtype)

    one = lambda q, k, v, kind: run(implementation, q, k, v, segments, kinds, kind, True, None, 0.3)  # noqa: E731
    found = with_gradients(layers(one), inputs, segments)
    wanted = with_gradients(layers(dense), inputs, segments)
    close(found, wanted, segments, dtype)


# ---------------------------------------------------------------- documents stay apart


@pytest.mark.parametrize("causal", [True, False], ids=["decoder", "encoder"])
@pytest.mark.parametrize("implementation", ["xla", "splash", "pallas"])
def test_a_document_changes_nothing_of_the_others(implementation, causal, interpret):
    """Document by document: huge other values in it leave all others' outputs and gradients the same, bit for bit."""
    segments = make_segments(PACKED, 80)
    window = None if implementation == "pallas" else 30
    inputs = random_inputs(4, 80, 4, 2, 16)

    def outputs(inputs, read):
        def total(q, k, v):
            out = run(implementation, q, k, v, segments, (Kind(window),), 0, causal, None, 0.3)
            return jnp.sum(jnp.where(read[..., None, None], jnp.sin(out), 0)), out
        (_, out), gradients = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(*inputs)
        return out, *gradients

    outputs = jax.jit(outputs).lower(inputs, segments != 0).compile()
    for document in (0, 2, 5):  # 0 = padding
        others = segments != document
        before = outputs(inputs, others & (segments != 0))
        changed = tuple(np.where((segments == document)[..., None, None], 100 * np.roll(x, 1, axis=-1), x) for x in inputs)
        after = outputs(changed, others & (segments != 0))
        for a, b in zip(before, after):
            np.testing.assert_array_equal(np.asarray(a)[others], np.asarray(b)[others])
        assert not np.array_equal(np.asarray(before[0])[~others], np.asarray(after[0])[~others])


@pytest.mark.parametrize("window", [None, 3])
def test_cudnn_answers_nan_where_a_row_holds_more_than_one_document(window, interpret):
    segments = make_segments(((5,), (4, 3), (), (1, 1)), 12)
    segments = np.concatenate([segments, [[0] * 3 + [9] * 5 + [0] * 4, [7, 7, 0, 0, 7, 7] + [0] * 6]]).astype(np.int32)  # no start, a gap
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in random_inputs(len(segments), 12, 2, 2, 8)]
    out = np.asarray(run("cudnn", *inputs, segments, (Kind(window),), 0, True, None, 0.3), np.float32)
    assert np.isnan(out).all(axis=(1, 2, 3)).tolist() == [False, True, False, True, True, True]
    assert np.isfinite(out[[0, 2]]).all() and (out[0, 5:] == 0).all() and (out[2] == 0).all()


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize("implementation, shape, rows, heads, kv_heads", [
    ("splash", (4, 1, 2), 8, 4, 2), ("pallas", (2, 2, 2), 8, 4, 2), ("splash", (2, 2, 2), 8, 4, 1), ("pallas", (2, 4, 1), 6, 3, 3),
], ids=["splash, heads cut", "pallas, heads cut", "splash, one kv head", "pallas, rows do not divide"])
def test_kernels_on_several_devices(implementation, shape, rows, heads, kv_heads, interpret):
    """Each device its own rows, and heads where they divide; the result is the one device's, and so are the gradients."""
    mesh = mesh_lib.make_mesh(dict(zip(mesh_lib.AXES, shape)))
    segments = make_segments((PACKED * 2)[:rows], 80)
    inputs = random_inputs(rows, 80, heads, kv_heads, 16)
    cells = mesh_lib.batch_sharding(mesh) if rows % mesh_lib.cells(mesh) == 0 else mesh_lib.replicated(mesh)
    windows = (Kind(None), Kind(9)) if implementation == "splash" else (Kind(None),)

    def total(inputs, segments):
        out = run(implementation, *inputs, segments, windows, jnp.asarray(len(windows) - 1), True, None, 0.3)
        return jnp.sum(jnp.where((segments != 0)[..., None, None], jnp.sin(out), 0)), out

    step = jax.value_and_grad(total, has_aux=True)
    (_, out), gradients = call(step, inputs, segments)
    program = jax.jit(step).lower(*jax.device_put((inputs, segments), cells)).compile()
    (_, split_out), split_gradients = program(*jax.device_put((inputs, segments), cells))
    for a, b in zip(jax.tree.leaves((out, gradients)), jax.tree.leaves((split_out, split_gradients))):
        np.testing.assert_allclose(b, a, atol=1e-5)
    if cells != mesh_lib.replicated(mesh):
        assert "all-gather" not in program.as_text() or heads % shape[2] or kv_heads % shape[2]


# ---------------------------------------------------------------- whole models

GEMMA = {"model_type": "gemma2", "vocab_size": 53, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40, "max_position_embeddings": 64, "sliding_window": 9,
         "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 30.0,
         "rope_theta": 10000.0, "hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.3}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 53, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 40, "n_positions": 64,
        "initializer_range": 0.3}


def make_batch(layout, time, vocab, cells=4):
    """Rows dealt to cells in order, as the packer would."""
    rng, segments = np.random.default_rng(3), make_segments(layout, time).reshape(cells, -1, time)
    rows = segments.shape[1]
    documents, last = np.full((cells, 4 * rows), -1, np.int32), np.zeros((cells, 4 * rows), np.int32)
    positions = np.zeros_like(segments)
    for cell in range(cells):
        flat = segments[cell].reshape(-1)
        for slot, number in enumerate(sorted(set(flat.tolist()) - {0})):
            places = np.flatnonzero(flat == number)
            documents[cell, slot], last[cell, slot] = number - 1, places[-1]
            positions[cell].reshape(-1)[places] = np.arange(len(places))
    return {"tokens": rng.integers(0, vocab, segments.shape).astype(np.int32), "segments": segments, "positions": positions,
            "documents": documents, "last": last}


@pytest.mark.parametrize("raw, implementation", [(GEMMA, "splash"), (GPT2, "pallas")], ids=["gemma2 splash", "gpt2 pallas"])
def test_a_whole_model(raw, implementation, interpret):
    """Outputs and gradients on eight devices equal xla's on one."""
    batch = make_batch(PACKED, 72, 53)
    mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2, "model": 2})
    results = []
    for name, where in (("xla", None), (implementation, mesh)):
        model = models.build(models.parse(raw, "raw"), head="classifier", head_init="normal", attention=name)

        def total(params, batch, model=model):
            out = model.apply(params, batch)
            real = batch["documents"][..., None] >= 0
            return jnp.sum(jnp.where(real, jnp.sin(out), 0)), jnp.where(real, out, 0)

        params = model.init(jax.random.key(0))
        arguments = (params, batch)
        if where is not None:
            shardings, _ = mesh_lib.param_shardings(mesh, model.abstract)
            arguments = (jax.device_put(params, shardings), jax.device_put(batch, mesh_lib.batch_sharding(mesh)))
        results.append(call(jax.value_and_grad(total, has_aux=True), *arguments))
    for a, b in zip(*map(jax.tree.leaves, results)):
        np.testing.assert_allclose(b, a, atol=3e-5 * max(1, np.abs(a).max()))


# ---------------------------------------------------------------- the real TPU compiler

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu: pip install --target DIR "
                                  "'libtpu==0.0.42.*', and DIR on PYTHONPATH")  # the version that jax[tpu] asks for


@functools.cache
def tpu_mesh(data=1, model=1):
    """Cores of a TPU v5e that is not here: they compile, and run nothing."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    return mesh_lib.make_mesh({"data": data, "fsdp": 1, "model": model}, topology.devices[: data * model])


def tpu_compile(function, *arguments):
    """The compiled program, and how many kernels it calls."""
    program = jax.jit(function).lower(*arguments).compile()
    return program, program.as_text().count('custom_call_target="tpu_custom_call"')


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["default", "high", "highest"])
@pytest.mark.parametrize("dtype, width, windows, causal, cap", [
    (jnp.bfloat16, 64, (None,), True, None),
    (jnp.float32, 80, (None, 128), True, 50.0),
    (jnp.bfloat16, 256, (64,), False, None),
], ids=["gpt2", "two windows, cap, float32", "encoder, window"])
def test_splash_compiles_for_a_tpu(dtype, width, windows, causal, cap, precision):
    """Forward, dq, dkv; on four cores without a word between them; and far below the memory of the scores."""
    kinds, rows, time = tuple(map(Kind, windows)), 4, 1024

    def total(q, k, v, segments, kind):
        plan = attention.prepare(segments, kinds, causal, width=width, dtype=dtype, cap=cap, implementation="auto")
        assert plan.implementation == "splash"  # since the arrays live on a TPU, whatever runs the tests
        return attention.attend(q, k, v, plan, kinds, kind, scale=0.1).astype(jnp.float32).sum()

    for mesh in (tpu_mesh(), tpu_mesh(2, 2)):
        array = lambda *shape, of=dtype, on=mesh: jax.ShapeDtypeStruct(shape, of, sharding=mesh_lib.batch_sharding(on))  # noqa: E731
        kind = jax.ShapeDtypeStruct((), jnp.int32, sharding=mesh_lib.replicated(mesh))
        inputs = (*(array(rows, time, heads, width) for heads in (4, 2, 2)), array(rows, time, of=jnp.int32), kind)
        with jax.default_matmul_precision(precision):
            program, kernels = tpu_compile(jax.value_and_grad(total, (0, 1, 2)), *inputs)
        assert kernels >= 3 * len(windows)
        cores = mesh.size
        assert program.memory_analysis().temp_size_in_bytes < rows * 4 * time * time * 4 / cores / 2

@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1), (2, 2)], ids=["one core", "four cores"])
def test_a_whole_model_compiles_for_a_tpu(shape):
    """auto takes splash in the model's scan, with rematerialisation and the layer's kind traced."""
    raw = GEMMA | {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "sliding_window": 128, "max_position_embeddings": 512}
    model, mesh = models.build(models.parse(raw, "raw"), head="classifier", dtype="bfloat16"), tpu_mesh(*shape)
    shardings, _ = mesh_lib.param_shardings(mesh, model.abstract)
    params = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), model.abstract, shardings)
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=mesh_lib.batch_sharding(mesh))
             for k, v in make_batch(PACKED, 512, 53, cells=2).items()}
    program, kernels = tpu_compile(jax.grad(lambda p, b: jnp.sin(model.apply(p, b)).sum()), params, batch)
    assert kernels == 8  # forward, forward again, dq, dkv, of each window
    assert program.memory_analysis().temp_size_in_bytes < 200e6


# ---------------------------------------------------------------- selection and refusals

BASE = {"kinds": (Kind(),), "causal": True, "width": 64, "dtype": jnp.bfloat16, "cap": None, "time": 512}


@pytest.mark.parametrize("platform, changes, expected", [
    ("cpu", {}, "xla"),
    ("cpu", {"one_document": True}, "xla"),
    ("tpu", {}, "splash"),
    ("tpu", {"dtype": jnp.float32, "cap": 50.0, "kinds": (Kind(), Kind(9))}, "splash"),
    ("tpu", {"causal": False, "kinds": (Kind(9),)}, "splash"),
    ("tpu", {"time": 192}, "xla"),  # half of it would be padding
    ("tpu", {"time": 64}, "xla"),
    ("gpu", {}, "xla"),  # packed rows, until somebody measures
    ("gpu", {"one_document": True}, "cudnn"),
    ("gpu", {"one_document": True, "kinds": (Kind(), Kind(9))}, "cudnn"),
    ("gpu", {"one_document": True, "dtype": jnp.float32}, "xla"),
    ("gpu", {"one_document": True, "cap": 50.0}, "xla"),
    ("gpu", {"one_document": True, "width": 20}, "xla"),
    ("gpu", {"one_document": True, "kinds": (Kind(9),), "causal": False}, "xla"),
])  # fmt: skip
def test_what_auto_chooses(platform, changes, expected):
    assert attention.choose("auto", platform, **BASE | changes) == expected


@pytest.mark.parametrize("name, platform, changes, why", [
    ("splash", "cpu", {}, "needs a TPU, and jax runs on cpu here"),
    ("splash", "gpu", {}, "needs a TPU"),
    ("pallas", "cpu", {}, "needs a GPU, and jax runs on cpu here"),
    ("pallas", "gpu", {"kinds": (Kind(), Kind(9))}, "windows"),
    ("pallas", "gpu", {"cap": 50.0}, "soft cap"),
    ("cudnn", "tpu", {}, "needs a GPU"),
    ("cudnn", "gpu", {"cap": 50.0}, "soft cap of scores, and the model's is 50"),
    ("cudnn", "gpu", {"dtype": jnp.float32}, "dtype is float32"),
    ("cudnn", "gpu", {"width": 20}, "multiple of 8"),
    ("cudnn", "gpu", {"width": 512}, "at most 256"),
    ("cudnn", "gpu", {"kinds": (Kind(9),), "causal": False}, "encoder"),
])  # fmt: skip
def test_what_cannot_serve_is_refused_in_one_line(name, platform, changes, why):
    with pytest.raises(UserError, match=re.escape(why)) as caught:
        attention.choose(name, platform, **BASE | changes)
    assert f"attention={name!r}" in str(caught.value) and "expected auto or xla" in str(caught.value)


def test_a_model_is_refused_before_anything_is_computed():
    for name in KERNELS:
        with pytest.raises(UserError, match=f"attention='{name}' needs a"):
            models.build(models.parse(GPT2, "raw"), head="classifier", attention=name, classes=7)
    assert attention.IMPLEMENTATIONS == CHOICES["attention"]
