"""Every family against transformers' PyTorch models: tiny, random in every parameter, with odd settings (tests/reference.py)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import CASES, POSITIONS, VOCAB, is_encoder
from safetensors.numpy import load_file

from w2s_jax import models
from w2s_jax.models import weights

pytestmark = pytest.mark.slow  # minutes together

LENGTHS = (9, 1, POSITIONS, 5, 2)  # one of maximal length, longer than every window
TIME = POSITIONS + 4
# cell -> row -> (place in the row, document): padding on both sides, two or more documents in a row, an empty cell.
LAYOUT = (((3, 0), (12, 3), (17, 4)), ((2, 2),)), ((), ()), (((27, 1),), ())


@pytest.fixture(autouse=True)
def exact(fast_compiles):
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def documents():
    """Token ids; id 0 occurs, and in the last place; the id that encoders take for padding (3) does not."""
    rng = np.random.default_rng(0)
    out = [rng.integers(4, VOCAB, n).astype(np.int32) for n in LENGTHS]
    for ids in out:
        ids[rng.integers(len(ids))] = ids[-1] = 0
    return out


@functools.cache
def batch():
    """The documents in LAYOUT; what lies in the padding is garbage."""
    rng, docs = np.random.default_rng(9), documents()
    shape, slots = (3, 2, TIME), 4
    out = {"tokens": rng.integers(0, VOCAB, shape), "segments": np.zeros(shape), "positions": rng.integers(0, POSITIONS, shape),
           "documents": np.full((3, slots), -1), "last": np.zeros((3, slots))}
    for c, cell in enumerate(LAYOUT):
        slot = 0
        for r, row in enumerate(cell):
            for at, d in row:
                span = slice(at, at + len(docs[d]))
                out["tokens"][c, r, span], out["segments"][c, r, span], out["positions"][c, r, span] = docs[d], d + 1, range(len(docs[d]))
                out["documents"][c, slot], out["last"][c, slot] = d, r * TIME + span.stop - 1
                slot += 1
    return {k: v.astype(np.int32) for k, v in out.items()}


def places():
    """(document, index of its tokens in [cells, rows, time])."""
    for c, cell in enumerate(LAYOUT):
        for r, row in enumerate(cell):
            for at, d in row:
                yield d, (c, r, slice(at, at + LENGTHS[d]))


def by_document(outputs):
    where = {int(d): (c, s) for (c, s), d in np.ndenumerate(batch()["documents"]) if d >= 0}
    return np.stack([np.asarray(outputs)[where[d]] for d in range(len(LENGTHS))])


def close(a, b, tolerance, what=""):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    scale = max(1.0, np.abs(b).max())
    assert a.shape == b.shape and np.isfinite(a).all(), what
    assert np.abs(a - b).max() <= tolerance * scale, f"{what}: {np.abs(a - b).max()} of {scale}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """case -> (folder, PyTorch model with the head that `kind` says)."""
    pytest.importorskip("torch")

    @functools.cache
    def make(case, kind=None):
        kind = kind or ("classifier" if is_encoder(case) else "lm")
        folder = tmp_path_factory.mktemp(case.replace(" ", "-"))
        return folder, reference.save(case, kind, folder)

    return make


def ask(net, ids):
    """The PyTorch model on one document alone, every layer's hidden state included."""
    import torch

    ids = torch.tensor(ids[None].astype(np.int64))
    return net(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)


@functools.partial(jax.jit, static_argnums=0)
def everything(model, params):
    """Hidden states of every layer, and logits of every token for a language model."""
    return model.hidden(params, batch(), all_layers=True), model.logits(params, batch()) if model.head == "lm" else None


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_logits_and_files(saved, case, tmp_path):
    torch = pytest.importorskip("torch")
    folder, net = saved(case)
    model = models.build(models.read_config(folder), head="classifier" if is_encoder(case) else "lm")
    params = models.load(folder, model, key=jax.random.key(0))
    states, logits = everything(model, params)
    for d, where in places():
        with torch.no_grad():
            out = ask(net, documents()[d])
        assert len(out.hidden_states) == len(states)
        for i, state in enumerate(out.hidden_states):
            close(states[i][where], state[0], 1e-5, f"document {d}, state {i}")
        if logits is not None:
            close(logits[where], out.logits[0], 1e-5, f"document {d}")
    if model.head == "lm":  # written back, every tensor is what it was
        models.save(tmp_path / "again", params, models.read_raw(folder))
        before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
        assert after.keys() == before.keys()
        assert all(np.array_equal(after[name], before[name]) for name in before)
        assert models.read_config(tmp_path / "again") == model.config


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(model, params):
    def objective(params):
        logits = model.apply(params, batch())
        weight = jnp.cos(batch()["documents"][..., None] * 7.0 + jnp.arange(2))
        return jnp.where(batch()["documents"][..., None] >= 0, logits * weight, 0).sum(), logits
    (_, logits), grads = jax.value_and_grad(objective, has_aux=True)(params)
    return logits, grads


@pytest.mark.parametrize("case", CASES)
def test_classifier_and_gradients(saved, case):
    """The family's own readout: logits, and gradients of all parameters. A decoder's PyTorch head is a matrix beside the backbone."""
    torch = pytest.importorskip("torch")
    folder, net = saved(case)
    model = models.build(models.read_config(folder), head="classifier", head_init="normal")
    params = models.load(folder, model, key=jax.random.key(5))
    net.zero_grad()
    if is_encoder(case):
        linear = dict(net.named_parameters())[models.FAMILIES[model.config.family].classifier[1]]
        params["head"]["kernel"] = jnp.asarray(linear.detach().numpy().T)
        if model.config.pooler == "fresh":
            dense = net.classifier.dense
            params["head"]["pooler"]["dense"] = {"kernel": jnp.asarray(dense.weight.detach().numpy().T),
                                                 "bias": jnp.asarray(dense.bias.detach().numpy())}
        expected = torch.cat([ask(net, ids).logits for ids in documents()])
    else:
        head = torch.tensor(np.asarray(params["head"]["kernel"]), requires_grad=True)
        expected = torch.stack([ask(net, ids).hidden_states[-1][0, -1] for ids in documents()]) @ head
    (expected * torch.cos(torch.arange(5.0)[:, None] * 7.0 + torch.arange(2.0))).sum().backward()
    logits, grads = value_and_gradients(model, params)
    close(by_document(logits), expected.detach(), 1e-5)

    family, flat = models.FAMILIES[model.config.family], models.paths(grads)
    close(flat["head/kernel"], linear.grad.T if is_encoder(case) else head.grad, 1e-5, "head")
    named = {name: p.grad.numpy() for name, p in net.named_parameters() if p.grad is not None}
    if case == "qwen1":
        named = {name.removeprefix("model."): g for name, g in named.items()}
        close(flat["backbone/layers/mlp/gate/kernel"][1], named["layers.1.mlp.gate_proj.weight"].T, 1e-5)
        close(flat["backbone/layers/attn/qkv/kernel"][2],
              np.concatenate([named[f"layers.2.self_attn.{x}_proj.weight"] for x in "qkv"]).T, 1e-5)
        return
    checked = 0
    for path, layer, name in weights.each(weights.names_of(flat, model.config, family, family.prefixes[0])):
        got = np.asarray(flat[path] if layer is None else flat[path][layer])
        close(got.T if weights.transposed(path, family) else got, named[name], 2e-5, name)
        checked += 1
    assert checked == sum(len(v) - v.count(None) if isinstance(v, list) else 1
                          for v in weights.names_of(flat, model.config, family, "").values())


@pytest.mark.parametrize("case", [c for c in CASES if " " not in c and c != "qwen1"])
def test_bfloat16_is_as_near_as_pytorchs(saved, case, tmp_path):
    """All in bfloat16: the distance to float32 is no larger than PyTorch's bfloat16's (root mean square over documents and networks)."""
    torch = pytest.importorskip("torch")
    import copy

    folder, net = saved(case)
    kind = "classifier" if is_encoder(case) else "lm"
    model = models.build(models.read_config(folder), head=kind, dtype="bfloat16", param_dtype="bfloat16")
    ours, theirs = [], []
    for seed in range(4):
        rough = reference.shake(copy.deepcopy(net), seed).bfloat16()
        exact_net = copy.deepcopy(rough).float()  # computes with the same rounded parameters
        reference.save(case, kind, tmp_path / str(seed), rough)
        states, _ = everything(model, models.load(tmp_path / str(seed), model, key=jax.random.key(0)))
        for d, where in places():
            with torch.no_grad():
                a, b = (ask(n, documents()[d]).hidden_states[-1][0].float().numpy() for n in (exact_net, rough))
            ours.append(np.asarray(states[-1][where], np.float32) - a)
            theirs.append(b - a)
    rms = [np.sqrt(np.mean(np.concatenate(e) ** 2)) for e in (ours, theirs)]
    assert 0 < rms[0] <= rms[1], rms


@pytest.mark.parametrize("case", ["llama", "gpt_neox", "modernbert"])
def test_large_tensors_are_loaded_a_few_layers_at_a_time(saved, case, monkeypatch):
    """As a small checkpoint, and onto devices that hold parts of every matrix."""
    from w2s_jax import mesh as mesh_lib

    folder, _ = saved(case)
    model = models.build(models.read_config(folder), head="classifier")
    expected = models.load(folder, model)
    monkeypatch.setattr(weights, "AT_ONCE", 3000)
    for shape in ({"data": 1, "fsdp": 1, "model": 1}, {"data": 2, "fsdp": 2, "model": 2}):
        shardings, _ = mesh_lib.param_shardings(mesh_lib.make_mesh(shape, jax.devices()[: np.prod(list(shape.values()))]), model.abstract)
        loaded = models.paths(models.load(folder, model, shardings))
        for path, leaf in models.paths(expected).items():
            np.testing.assert_array_equal(loaded[path], leaf, err_msg=path)
            assert loaded[path].sharding.is_equivalent_to(models.paths(shardings)[path], leaf.ndim), path


@pytest.mark.parametrize("case", ["llama", "gemma3", "gpt_neox", "phi3", "roberta", "modernbert"])
def test_sharded_over_every_axis_it_computes_the_same(saved, case):
    """Parameters and batch over data x fsdp x model, where 2 key-value heads and odd widths divide or do not."""
    from w2s_jax import mesh as mesh_lib

    folder, _ = saved(case)
    model = models.build(models.read_config(folder), head="classifier", head_init="normal")
    logits, grads = value_and_gradients(model, models.load(folder, model, key=jax.random.key(5)))
    mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2, "model": 2})
    shardings, _ = mesh_lib.param_shardings(mesh, model.abstract)
    split = models.load(folder, model, shardings, jax.random.key(5))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(split["backbone"]["layers"]))
    again, again_grads = value_and_gradients(model, split)
    close(again, logits, 1e-5)
    for (path, a), b in zip(models.paths(again_grads).items(), models.paths(grads).values()):
        close(a, b, 1e-5, path)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_has_a_sharding_rule(case, saved):
    from w2s_jax import mesh as mesh_lib

    arch, mesh = models.read_config(saved(case)[0]), mesh_lib.make_mesh({"data": 1, "fsdp": 2, "model": 1}, jax.devices()[:2])
    for head in ("classifier",) if is_encoder(case) else ("classifier", "lm"):
        abstract = models.build(arch, head=head).abstract
        shardings = models.paths(mesh_lib.param_shardings(mesh, abstract)[0])  # an uncovered path raises
        for path, leaf in models.paths(abstract).items():
            assert (not shardings[path].is_fully_replicated) == ("kernel" in path or "embedding" in path) or leaf.shape[-1] % 2, path


def test_activations_equal_transformers():
    torch = pytest.importorskip("torch")
    from transformers.activations import ACT2FN

    from w2s_jax.models.layers import ACTIVATIONS

    x = np.linspace(-8, 8, 401, dtype=np.float32)
    for name, function in ACTIVATIONS.items():
        close(function(jnp.asarray(x)), ACT2FN[name](torch.tensor(x)), 1e-6, name)
