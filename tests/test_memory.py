"""The arithmetic of memory against the compiler's own account of the training step."""

import jax
import numpy as np
import pytest
import tiny

from w2s_jax import feeding, losses, memory, models, optimizers, train
from w2s_jax import mesh as mesh_lib
from w2s_jax.data.packing import Plan, Shape
from w2s_jax.models.heads import LOGITS_AT_ONCE

pytestmark = pytest.mark.slow  # minutes together

GPT2 = {"vocab_size": 1000, "n_embd": 128, "n_inner": 512, "n_layer": 4, "n_head": 8, "n_positions": 512}
LLAMA = {
    "model_type": "llama", "vocab_size": 1000, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "intermediate_size": 384, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": False, "rope_theta": 1e4, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
LORA = models.Lora(8, 8.0, 0.0, "all-linear", False)
BF16 = {"dtype": "bfloat16", "param_dtype": "bfloat16"}


def build(raw=None, head="classifier", train="full", **options):
    config = models.parse(raw, "test") if raw else tiny.config(**GPT2)
    return models.build(config, head=head, lora=LORA if train == "lora" else None, **options)


def compiled(model, optimizer, shape: Shape, *, slots, train_="full", sizes=(1, 1, 1), microbatches=1):
    """The compiler's bytes of the real training step, by `train.compile_ahead`: all of them, and those of its arguments."""
    mesh = mesh_lib.make_mesh(dict(zip(mesh_lib.AXES, sizes)), jax.devices()[: int(np.prod(sizes))])
    loss = losses.make("next_token", ground_truth=True) if model.head == "lm" else losses.make(
        "xent", {}, ground_truth=False, label_stats={})
    cells = mesh_lib.cells(mesh)
    n = microbatches * cells * slots
    each = shape.rows * shape.time // slots
    classes = model.classes
    names = [str(i) for i in range(n)]
    corpus = feeding.Texts([np.ones(each, np.int32)] * n, np.ones((n, classes), np.float32), np.ones(n, np.float32), names)
    plan = Plan([np.arange(n)], [range(1)], [0], [shape], microbatches, cells, slots, n, n * each, n * each)
    program = train.Program(model, loss, optimizer, mesh, train_)
    made = train.compile_ahead(program, corpus, plan, 0, {})
    return memory.of_program(made), made.memory_analysis().argument_size_in_bytes


# What differs from: GPT-2 in small, full training with Adam, 8 rows of 128 tokens on one device, remat none.
CASES = {
    "usual": {}, "full remat": {"remat": "full"}, "products": {"remat": "dots"}, "long rows": {"shape": Shape(2, 512)},
    "head": {"train": "head"}, "lora": {"train": "lora"}, "microbatches and adafactor": {"microbatches": 2, "optimizer": "adafactor"},
    "sharded": {"sizes": (1, 4, 2)}, "llama in bfloat16": {"raw": LLAMA, "sizes": (2, 4, 1), "remat": "full", **BF16},
    "language model": {"raw": LLAMA, "head": "lm"},
}


@pytest.mark.parametrize("name", CASES)
def test_estimates_are_the_compilers_figures(name, fast_compiles):
    """Measured on this grid: 1.03 to 1.15 times the compiler's figure, 1.40 for Llama in bfloat16 under full rematerialisation; the
    parts that lie there from step to step to 1%."""
    case = dict(CASES[name])
    shape, sizes, microbatches = case.pop("shape", Shape(8, 128)), case.pop("sizes", (1, 1, 1)), case.pop("microbatches", 1)
    optimizer, train_ = optimizers.make(case.pop("optimizer", "adam"), {}), case.get("train", "full")
    model = build(**case)
    found = memory.estimate(model, dict(zip(mesh_lib.AXES, sizes)), shape, slots=8, optimizer=optimizer, train=train_,
                            microbatches=microbatches)
    whole, arguments = compiled(model, optimizer, shape, slots=8, train_=train_, sizes=sizes, microbatches=microbatches)
    assert found.resident == pytest.approx(arguments, rel=0.01, abs=65536)
    assert 0.9 <= found.peak / whole <= 1.5, (found.parts(), whole)


# --------------------------------------------------------------------------- what follows from shapes alone


def peak(**changes):
    keys = {"mesh": {"data": 1, "fsdp": 1, "model": 1}, "shape": Shape(8, 128), "slots": 8, "optimizer": optimizers.make("adam", {}),
            "model": build()} | changes
    return memory.estimate(keys.pop("model"), keys.pop("mesh"), keys.pop("shape"), **keys)


def test_everything_that_saves_memory_saves_it():
    usual = peak()
    parameters = sum(leaf.size * 4 for leaf in jax.tree.leaves(build().abstract))
    assert (usual.parameters, usual.gradients, usual.optimizer_state) == (parameters, parameters, 2 * parameters + 4)
    assert peak(remat="full").activations < peak(remat="dots_no_batch").activations < usual.activations < peak(remat="dots").activations
    assert peak(remat="everything_saveable").activations > peak(remat="dots").activations
    assert peak(optimizer=optimizers.make("adafactor", {})).optimizer_state < 0.1 * usual.optimizer_state
    halved = peak(optimizer=optimizers.make("adam", {"mu_dtype": "bfloat16"}))
    assert halved.optimizer_state == pytest.approx(0.75 * usual.optimizer_state, rel=1e-3)
    lora = peak(model=build(train="lora"), train="lora")
    assert lora.optimizer_state < 0.3 * usual.optimizer_state and lora.activations == usual.activations
    head = peak(train="head")
    assert head.activations == 0 and head.gradients == 128 * 2 * 4
    away = peak(offload="optimizer")
    assert away.optimizer_state == 0 and away.update == usual.optimizer_state and away.peak < usual.peak
    assert peak(offload="params").parameters < 0.5 * usual.parameters and peak(offload="params").peak <= usual.peak
    adapters = peak(model=build(train="lora"), train="lora", offload="params")
    assert adapters.parameters < 0.5 * lora.parameters and adapters.peak < lora.peak
    assert peak(shape=Shape(2, 128), slots=2, microbatches=4).activations == usual.activations // 4
    assert peak(optimizer=None).peak < usual.peak and peak(optimizer=None).gradients == 0


@pytest.mark.parametrize("sizes", [(1, 4, 1), (1, 1, 4), (1, 2, 2), (4, 1, 1)])
def test_splits_divide_what_they_split(sizes):
    usual, split = peak(), peak(mesh=dict(zip(mesh_lib.AXES, sizes)))
    parts = sizes[1] * sizes[2]
    for part in ("parameters", "gradients", "optimizer_state"):
        assert 1 <= getattr(split, part) / (getattr(usual, part) / parts) <= 1.3, part  # norms, biases and positions stay whole
    assert split.activations <= usual.activations


def test_attention_that_stores_no_scores_needs_none():
    model = build(raw=LLAMA | {"head_dim": 128}, **BF16)
    long = {"model": model, "shape": Shape(2, 512), "slots": 4}
    assert peak(**long, platform="tpu").layer < peak(**long, platform="gpu").layer  # splash there, xla here


def test_logits_of_a_large_vocabulary_are_taken_in_parts():
    model = build(raw=LLAMA | {"vocab_size": 50000}, head="lm")
    some, more = (peak(model=model, shape=Shape(rows, 128), slots=rows) for rows in (16, 64))
    assert 2 * 4 * LOGITS_AT_ONCE >= some.head - 16 * 128 * 128 * 4 * 3
    assert more.head < 2 * some.head


@pytest.mark.parametrize("size, text", [(3, "3 B"), (2048, "2.0 KiB"), (5 * 2**20, "5.0 MiB"), (61.25 * 2**30, "61.2 GiB"),
                                        (3 * 2**42, "12288.0 GiB")])
def test_sizes_in_words(size, text):
    assert memory.show(size) == text
