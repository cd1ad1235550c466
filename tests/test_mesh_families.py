"""Every family, whole and with adapters, on meshes of 8 devices: the losses and the labels of one device.

The tests take two meshes for each family, so that every mesh meets three; with W2S_EVERY_MESH=1 they take all of them.
"""

import functools
import os

import jax
import numpy as np
import pytest
import reference
import test_train
import tiny

from w2s_jax import feeding, forward, losses, models, optimizers, train
from w2s_jax import mesh as mesh_lib

pytestmark = [pytest.mark.usefixtures("fast_compiles"), pytest.mark.slow]
no_checkpoints = test_train.no_checkpoints  # a fixture

QWEN = {"model_type": "qwen", "hidden_size": 32, "num_attention_heads": 4, "kv_channels": 8, "intermediate_size": 88,
        "num_hidden_layers": 3, "seq_length": reference.POSITIONS, "layer_norm_epsilon": 1e-3, "vocab_size": reference.VOCAB,
        "rotary_emb_base": 700}
CASES = ("gpt2 odd", "gpt_neox", "llama", "mistral", "qwen", "qwen2 windows", "qwen3", "gemma", "gemma2", "gemma3", "olmo2", "phi3", "bert",
         "roberta", "modernbert")
SHAPES = [(d, f, 8 // d // f) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if 8 % (d * f) == 0]
EVERY = os.environ.get("W2S_EVERY_MESH") == "1"
LORA = models.Lora(3, 1.0, 0.0, "all-linear", False)  # scaled by a third: larger adapters of random weights would sharpen attention
STEPS, BATCH = 2, 11
# Adam's first step is the gradient's sign: with its usual eps, an element whose gradient is rounding and nothing else would go
# either way, and another order of sums would show in the fourth digit of a logit.
EPS = 1e-3


@pytest.fixture(autouse=True)
def room_for_many_programs():
    """300 cases would leave more programs in a process than it may map."""
    yield
    forward.make_room()


def raw(case):
    """config.json; of every second family with a vocabulary that devices divide, of the others with one that they do not."""
    found = QWEN if case == "qwen" else reference.config(case).to_dict()
    return found | {"vocab_size": reference.VOCAB - CASES.index(case) % 2}


@functools.cache
def corpus():
    rng = np.random.default_rng(0)
    tokens = [rng.integers(4, reference.VOCAB - 1, n).astype(np.int32) for n in rng.integers(1, reference.POSITIONS, STEPS * BATCH)]
    p = rng.uniform(0.02, 0.98, len(tokens)).astype(np.float32)
    return feeding.Texts(tokens, np.stack([1 - p, p], -1), np.ones(len(tokens), np.float32), [str(i) for i in range(len(tokens))])


@functools.cache
def model_and_params(case, trained):
    model = models.build(models.parse(raw(case), case), head="classifier", lora=LORA if trained == "lora" else None)
    return model, tiny.random_params(model.abstract, seed=1)


def fit(case, trained, shape):
    """Losses of the steps, and logits of all documents after them."""
    model, start = model_and_params(case, trained)
    mesh = test_train.make_mesh(**dict(zip(mesh_lib.AXES, shape)))
    batches = [np.arange(BATCH) + i * BATCH for i in range(STEPS)]
    plan = feeding.make_plan(tiny.finetune("m", "t", steps_per_dispatch=1), model, corpus(), batches, mesh)
    optimizer = optimizers.make("adamw", {"eps": EPS}, weight_decay=0.1, grad_clip=0.5)  # the clip needs one norm over everything
    program = train.Program(model, losses.make("logconf", {}, ground_truth=False), optimizer, mesh, trained)
    shardings = mesh_lib.param_shardings(mesh, model.abstract)[0]
    run = test_train.Recorder()
    params = train.train(tiny.finetune("m", "t"), program, jax.device_put(start, shardings), corpus(), plan, [1e-2] * STEPS, run)
    for (path, leaf), wanted in zip(mesh_lib.paths(params), jax.tree.leaves(shardings)):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), path
    logits = forward.predict(model, params, corpus().tokens, mesh, tokens_per_batch=10_000)
    return np.array([row["loss"] for row in run.rows]), logits


one_device = functools.cache(lambda case, trained: fit(case, trained, (1, 1, 1)))


def some():
    """(case, what is trained, mesh): a mesh for a family that is trained whole, another with adapters."""
    for i, case in enumerate(CASES):
        for j, trained in enumerate(("full", "lora")):
            chosen = (3 * i + 5 * j) % len(SHAPES)
            yield from ((case, trained, shape) for k, shape in enumerate(SHAPES) if EVERY or k == chosen)


@pytest.mark.parametrize("case, trained, shape", some(), ids=lambda x: "x".join(map(str, x)) if isinstance(x, tuple) else x)
def test_losses_and_labels_are_those_of_one_device(case, trained, shape):
    found, logits = fit(case, trained, shape)
    values, expected = one_device(case, trained)
    assert np.ptp(expected, axis=0).min() > 1e-3  # else everything would be equal
    np.testing.assert_allclose(found, values, atol=1e-5)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * max(1, np.abs(expected).max()))


def test_every_mesh_and_family_is_met():
    assert {case for case, *_ in some()} == set(CASES) and {shape for *_, shape in some()} == set(SHAPES)
    assert {raw(case)["model_type"] for case in CASES} == set(models.FAMILIES) - {"gemma3"}  # gemma3_text is its text half
