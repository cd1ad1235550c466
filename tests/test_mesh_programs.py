"""The compiled training step moves what the mesh's rules ask it to move, and nothing else: read from the HLO of 8 devices."""

import math

import jax
import numpy as np
import pytest
import test_train

from w2s_jax import costs, feeding, hlo, hlo_text, losses, models, optimizers, train
from w2s_jax import mesh as mesh_lib
from w2s_jax.data.packing import Plan, Shape

pytestmark = [pytest.mark.usefixtures("fast_compiles"), pytest.mark.slow]

# Every size is told from the others by its number: 3 layers, rows of 40 tokens, 5 rows a cell.
LAYERS, ROWS, TIME, SLOTS = 3, 5, 40, 7
SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": 8,
         "vocab_size": 256, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False}
RAW = {
    "llama": SIZES | {"model_type": "llama"},
    "biased": SIZES | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "gpt2": {"model_type": "gpt2", "vocab_size": 256, "n_embd": 64, "n_layer": LAYERS, "n_head": 8, "n_inner": 192, "n_positions": 64},
    "phi3": SIZES | {"model_type": "phi3", "pad_token_id": 0},
}
MESHES = [(8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2), (1, 1, 8)]
LORA = models.Lora(8, 8.0, 0.0, "all-linear", False)


def compiled(name, shape, trained="full", loss="xent", microbatches=1):
    """The text of the optimized module, the model and the mesh."""
    model = models.build(models.parse(RAW[name], name), head="classifier", lora=LORA if trained == "lora" else None)
    mesh = test_train.make_mesh(**dict(zip(mesh_lib.AXES, shape)))
    cells = mesh_lib.cells(mesh)
    documents = microbatches * cells * SLOTS
    corpus = feeding.Texts([np.ones(20, np.int32)] * documents, np.full((documents, 2), 0.5, np.float32), np.ones(documents, np.float32),
                           [str(i) for i in range(documents)])
    plan = Plan([np.arange(documents)], [range(1)], [0], [Shape(ROWS, TIME)], microbatches, cells, SLOTS, documents, 20 * documents,
                microbatches * cells * ROWS * TIME)
    program = train.Program(model, losses.make(loss, {}, ground_truth=False), optimizers.make("adam", {}), mesh, trained)
    arguments = train.abstract_arguments(program, train.dispatch_inputs(corpus, plan, 0))
    return train.lower(program, *arguments).compile().as_text(), model, mesh


def moved(text):
    """(kind, dimensions) of what every collective gives, of floating numbers."""
    computations, _ = hlo_text.read(text)
    for instructions in computations.values():
        for i in instructions.values():
            kind = i.opcode.removesuffix("-start")
            if kind in hlo.COLLECTIVES and "replica_groups={{0}," not in i.rest:  # over an axis of one device nothing moves
                yield from ((kind, a.dims) for a in i.arrays if "f" in a.type)


def largest(model, mesh):
    """Numbers of the largest parameter of one layer, as it is multiplied: whole but for `model`."""
    parts = [(math.prod(leaf.shape[1:]), mesh_lib.spec(path, leaf.shape, mesh)[0]) for path, leaf in mesh_lib.paths(model.abstract)
             if path.startswith("backbone/layers/")]
    return max(size // (mesh.shape["model"] if "model" in spec else 1) for size, spec in parts)


@pytest.mark.parametrize("shape", MESHES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("name, trained", [("llama", "full"), ("biased", "lora"), ("gpt2", "full"), ("phi3", "head")])
def test_nothing_is_gathered_that_should_stay_split(name, trained, shape):
    """No activations (rows of all cells, tokens of one), no stack of layers, no table of the vocabulary; weights a layer at a time."""
    text, model, mesh = compiled(name, shape, trained)
    for kind, dims in moved(text):
        if kind == "all-gather":
            assert not {ROWS * TIME, ROWS * TIME * mesh_lib.cells(mesh)} & set(dims) and TIME not in dims, (kind, dims)
            assert LAYERS not in dims[:1] and math.prod(dims) <= largest(model, mesh), (kind, dims)
        if kind == "all-to-all":  # the embeddings' columns for rows, or parts of a fused matrix
            assert math.prod(dims) <= ROWS * TIME * SIZES["hidden_size"], (kind, dims)
        if SIZES["vocab_size"] in dims:  # the table's own gradient, where devices share its columns only
            assert kind == "all-reduce" and mesh.shape["model"] == 1 and mesh.shape["data"] > 1, (kind, dims)


@pytest.mark.parametrize("shape", MESHES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("trained, loss, microbatches", [("full", "xent", 1), ("lora", "xent", 1), ("full", "logconf", 2)])
def test_the_collectives_are_those_of_the_plan(trained, loss, microbatches, shape):
    """Bytes of gathers over fsdp and of sums over model, as costs.work counts them (head and embeddings, small here, apart)."""
    text, model, mesh = compiled("llama", shape, trained, loss, microbatches)
    settings = costs.Settings(*shape, "none", 0)
    planned = costs.work(model, settings, Shape(ROWS, TIME), microbatches=microbatches, train=trained, per_document=loss == "xent")
    found = hlo.cost(text, mesh.size).collectives

    def total(collectives, kind, group):
        return sum(c.bytes for c in collectives if (c.kind, c.group) == (kind, group))

    fsdp, model_axis = mesh.shape["fsdp"], mesh.shape["model"]
    small = 2e4 * microbatches  # the head's kernel and norms
    more = 1.35 if trained == "lora" else 1.02  # adapters are gathered too
    if fsdp > 1:
        expected = total(planned.collectives, "all-gather", fsdp)
        assert expected <= total(found, "all-gather", fsdp) <= more * expected + small
    else:
        assert total(found, "all-gather", 8) <= small
    if model_axis > 1 and trained == "full" and model_axis not in (fsdp, mesh.shape["data"]):
        # XLA for CPUs adds up the parts of q, k, v and of gate, up one by one: five sums a layer in a backward pass, not two.
        tokens = ROWS * TIME * SIZES["hidden_size"] * 4 * 2 * (model_axis - 1) / model_axis
        forwards = 1 if loss == "xent" or microbatches == 1 else 2
        sums = (2 * forwards + 5) * LAYERS * microbatches * tokens
        assert sums <= total(found, "all-reduce", model_axis) <= 1.1 * sums + 4 * tokens * microbatches + small


def test_moments_lie_where_their_parameters_do_in_the_program():
    """What the program is given and gives back: no parameter or moment has another layout than the rules'."""
    model = models.build(models.parse(RAW["llama"], "llama"), head="classifier")
    mesh = test_train.make_mesh(fsdp=4, model=2)
    program = train.Program(model, losses.make("xent", {}, ground_truth=False), optimizers.make("adam", {}), mesh)
    s = program.shardings()
    for moments in (s["opt_state"].mu, s["opt_state"].nu):
        for (path, moment), parameter in zip(mesh_lib.paths(moments), jax.tree.leaves(s["trainable"])):
            shape = dict(mesh_lib.paths(model.abstract))[path].shape
            assert moment.is_equivalent_to(parameter, len(shape)), path
