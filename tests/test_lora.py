"""LoRA: PEFT's arithmetic and PEFT's files, both ways; only adapters and head are trained and kept; any layout, the same run."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import test_export
import test_train
import tiny
from safetensors.numpy import load_file, save_file

import w2s_jax
from w2s_jax import feeding, forward, losses, main, models, registry, stages, train, workload
from w2s_jax import mesh as mesh_lib
from w2s_jax.config import shipped
from w2s_jax.errors import UserError
from w2s_jax.models import FAMILIES, Lora
from w2s_jax.models import lora as lora_lib

pytestmark = pytest.mark.slow  # minutes together

task = test_export.task  # a fixture
LORA = Lora(4, 8.0, 0.0, "all-linear", False)
KEYS = {"train": "lora", "lora__rank": 4, "lora__alpha": 8.0}


@pytest.fixture(autouse=True)
def fast(fast_compiles):
    pass


# --------------------------------------------------------------------------- PEFT

PEFT_CASES = {  # case -> target_modules and other settings of the adapter that PEFT makes
    "llama": (["q_proj", "v_proj"], {"use_rslora": True}),
    "llama biased": (["gate_proj", "up_proj", "down_proj"], {}),
    "gpt2": (["c_attn", "c_proj", "c_fc"], {"fan_in_fan_out": True}),
    "gpt_neox": (r"gpt_neox\.layers\.\d+\.(attention\.query_key_value|mlp\.dense_4h_to_h)", {}),
    "gemma2": (["o_proj", "up_proj"], {"lora_alpha": 3}),
    "phi3": (["qkv_proj", "gate_up_proj"], {}),
    "bert": (r".*attention.*(query|output\.dense)", {}),
    "roberta": (["query", "value"], {}),
    "modernbert": (r"model\.layers\.\d+\.(attn\.(Wqkv|Wo)|mlp\.W[io])", {}),
}


def logits(config, task):
    """Of the model that a run would begin with, on the test documents; and the model."""
    config = registry.fill(config)
    with workload.precision(config):
        loaded = workload.open_model(config)
        documents = [np.int32(json.loads(line)["input_ids"]) for line in (task / "test.jsonl").read_text().splitlines()]
        return forward.predict(loaded.model, loaded.params, documents, loaded.mesh, tokens_per_batch=64), loaded, documents


@pytest.mark.parametrize("case", PEFT_CASES)
def test_an_adapter_that_peft_made(case, task, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    targets, settings = PEFT_CASES[case]
    net = reference.network(case, "classifier")
    reference.save(case, "classifier", tmp_path / "base")
    made = peft.get_peft_model(
        test_export.transformers.AutoModelForSequenceClassification.from_config(net.config, attn_implementation="eager"),
        peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=targets, **{"lora_alpha": 6} | settings))
    made.base_model.model.load_state_dict({**made.base_model.model.state_dict(), **{
        k.replace(".weight", ".base_layer.weight") if f"{k[:-7]}.base_layer.weight" in made.base_model.model.state_dict() else
        k.replace(".bias", ".base_layer.bias") if f"{k[:-5]}.base_layer.bias" in made.base_model.model.state_dict() else k: v
        for k, v in net.state_dict().items() if not k.startswith(("score", "classifier"))}})
    with torch.no_grad():
        torch.manual_seed(1)
        for name, p in made.named_parameters():
            if "lora_B" in name or re.search(r"modules_to_save.*weight|modules_to_save.*dense", name):
                p.copy_(0.3 * torch.randn(p.shape))
            elif "modules_to_save" in name:
                p.zero_()
    made.eval().save_pretrained(tmp_path / "adapter")
    config = tiny.finetune(tmp_path / "base", task, train="lora", lora__init=str(tmp_path / "adapter"), matmul_precision="highest")
    found, loaded, documents = logits(config, task)
    pad = net.config.pad_token_id or 0
    made.config.pad_token_id = made.base_model.model.config.pad_token_id = pad
    ids, mask = test_export.padded(documents, pad)
    with torch.no_grad():
        expected = made(input_ids=ids, attention_mask=mask).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
    assert np.ptp(expected) > 0.1
    # And back: the same tensors under the same names.
    settings, content = models.adapter_files(loaded.params, loaded.model, workload.lora(registry.fill(config)), "base", "")
    (tmp_path / "ours.safetensors").write_bytes(content)
    ours, theirs = load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    theirs = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert {k: settings[k] for k in ("r", "lora_alpha", "use_rslora", "bias")} == {
        k: theirs[k] for k in ("r", "lora_alpha", "use_rslora", "bias")}
    assert theirs["modules_to_save"] is None or settings["modules_to_save"][0] in theirs["modules_to_save"]


@pytest.mark.parametrize("case, targets, dtype", [
    ("llama", "all-linear", "bfloat16"), ("gpt2", "all-linear", "float32"), ("bert", "all-linear", "float32"),
    ("bert", "intermediate.dense", "float32"), ("roberta", "output.dense", "float32"), ("gemma2", "q_proj,down_proj", "float32"),
    ("modernbert", "all-linear", "float32"),
])
def test_a_run_in_pefts_format(case, targets, dtype, task, tmp_path, monkeypatch, capsys):
    """README.md's lines give the run's logits with PEFT, and a further run starts where this one ended."""
    pytest.importorskip("peft")
    base = test_export.base_model(case, tmp_path / "base")
    keys = KEYS | {"lora__targets": targets, "learning_rate": 6e-2, "param_dtype": "auto"}
    if dtype == "bfloat16":
        tensors = load_file(base / "model.safetensors")
        save_file({k: v.astype(jnp.bfloat16) for k, v in tensors.items()}, base / "model.safetensors")
    if case.split()[0] == "roberta":
        keys |= {"readout": "auto"}
    run = test_export.train(base, task, tmp_path / "run", **keys)
    results, folder = test_export.export(run, tmp_path / "export", merge=False)
    assert results["kind"] == "adapter" and sorted(p.name for p in folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors"]
    documents, ours = test_export.the_runs(run, task)
    config = json.loads((base / "config.json").read_text())
    function = test_export.the_readme(folder, monkeypatch, capsys)
    pad = int(re.search(r"pad_token_id = (\d+)", (folder / "README.md").read_text()).group(1)) if config.get("is_decoder", True) else 0
    test_export.close(ours, function(*test_export.padded(documents, pad)))
    again = registry.fill(tiny.finetune(base, task, train="lora", lora__init=str(folder), seed=5))
    assert again.lora.rank == 4 and again.lora.alpha == 8.0
    trained = w2s_jax.load(run).model().params
    jax.tree.map(np.testing.assert_array_equal, models.paths(workload.open_model(again).params), models.paths(trained))


# --------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("rslora, scale", [(False, 2.0), (True, 4.0)])
def test_scale(rslora, scale):
    assert dataclasses.replace(LORA, rslora=rslora).scale == scale


def random_lora(**options):
    """A model with adapters and random parameters, adapters among them."""
    model = models.build(tiny.config(), head="classifier", lora=dataclasses.replace(LORA, **options))
    return model, tiny.random_params(model.abstract, seed=4)


def test_merged_is_the_same_model():
    model, params = random_lora()
    documents, mesh = tiny.documents(12, seed=3), test_train.make_mesh()
    found = forward.predict(model, params, documents, mesh, tokens_per_batch=100)
    plain = models.build(tiny.config(), head="classifier")
    merged = models.merge(params, LORA)
    assert jax.tree.structure(merged) == jax.tree.structure(plain.abstract)
    np.testing.assert_allclose(forward.predict(plain, merged, documents, mesh, tokens_per_batch=100), found, atol=2e-5)
    without = forward.predict(plain, models.merge(params, dataclasses.replace(LORA, alpha=0.0)), documents, mesh, tokens_per_batch=100)
    assert np.abs(without - found).max() > 1e-2


def test_a_new_adapter_changes_nothing_and_is_drawn_as_pefts():
    model = models.build(tiny.config(), head="classifier", lora=LORA)
    new = models.paths(model.init_new(jax.random.key(3)))
    whole = models.paths(model.init(jax.random.key(3)))
    assert {p for p in whole if p.startswith("head/") or "/lora_" in p} == new.keys()
    for path, leaf in new.items():
        np.testing.assert_array_equal(leaf, whole[path])
        if path.endswith("lora_a"):
            bound = leaf.shape[1] ** -0.5
            assert 0.95 * bound < np.abs(leaf).max() <= bound and abs(float(leaf.mean())) < 0.2 * bound
            assert np.abs(np.asarray(leaf[0]) - np.asarray(leaf[1])).max() > 0.1 * bound  # layers differ
        elif path.endswith("lora_b"):
            assert not np.asarray(leaf).any()
    plain = models.build(tiny.config(), head="classifier")
    base = models.paths(plain.init(jax.random.key(3)))
    for path, leaf in base.items():  # adapters leave the other random numbers as they were
        np.testing.assert_array_equal(leaf, whole[path])


def fit(mesh=None, *, keys=(), name="xent", **options):
    """As test_train.fit, of a model with adapters; the metrics' losses, the parameters before and after."""
    mesh = test_train.make_mesh() if mesh is None else mesh
    model_options = {k: v for k, v in options.items() if k not in ("dropout",)}
    lora = dataclasses.replace(LORA, dropout=options.get("dropout", 0.0))
    model = models.build(tiny.config(), head="classifier", lora=lora, **model_options)
    start = tiny.random_params(model.abstract, seed=4)
    config, corpus, steps = tiny.finetune("m", "t", **{"steps_per_dispatch": 2} | dict(keys)), test_train.make_corpus(), test_train.STEPS
    batches = [np.arange(test_train.BATCH) + i * test_train.BATCH for i in range(steps)]
    plan = feeding.make_plan(config, model, corpus, batches, mesh)
    program = train.Program(model, losses.make(name, ground_truth=False), test_train.optimizer(), mesh, "lora")
    shardings = program.shardings()
    assert jax.tree.structure(shardings["trainable"]) == jax.tree.structure(train.split_params(start, "lora")[0])
    params = jax.device_put(start, mesh_lib.param_shardings(mesh, model.abstract)[0])
    run = test_train.Recorder()
    params = train.train(config, program, params, corpus, plan, test_train.rates(steps), run)
    return [row["loss"] for row in run.rows], start, params, program


@pytest.fixture
def nothing_saved(monkeypatch):
    monkeypatch.setattr(train.ckpt, "Checkpoints", test_train.NoCheckpoints)


@pytest.mark.parametrize("options, keys, shape", [
    ({}, {"microbatch_size": 3}, {}), ({"remat": "full"}, {}, {}), ({}, {}, {"data": 2, "fsdp": 2, "model": 2}),
    ({"dropout": 0.3}, {"microbatch_size": 3}, {"data": 2, "fsdp": 2}), ({"dropout": 0.3, "remat": "full"}, {"steps_per_dispatch": 1}, {}),
], ids=str)
@pytest.mark.parametrize("name", ["xent", "logconf"])
def test_any_layout_is_the_same_run(options, keys, shape, name, nothing_saved):
    found, start, params, program = fit(test_train.make_mesh(**shape), keys=keys, name=name, **options)
    expected, *_ = fit(name=name, **{k: v for k, v in options.items() if k == "dropout"})
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for path, leaf in models.paths(params).items():
        before = models.paths(start)[path]
        if "/lora_" in path or path.startswith("head/"):
            assert np.abs(np.asarray(leaf) - before).max() > 1e-4, path
        else:
            np.testing.assert_array_equal(np.asarray(leaf), before, err_msg=path)
    state = {p for p, _ in mesh_lib.paths(program.shardings()["trainable"])}
    assert all("/lora_" in p or p.startswith("head/") for p in state)


def test_dropout_is_on_in_training_only(nothing_saved):
    assert abs(fit(dropout=0.3)[0][0] - fit()[0][0]) > 1e-3
    model, params = random_lora(dropout=0.3)
    plain, _ = random_lora()
    args = (params, tiny.documents(5, seed=1), test_train.make_mesh())
    np.testing.assert_array_equal(*(forward.predict(m, *args, tokens_per_batch=100) for m in (model, plain)))


# --------------------------------------------------------------------------- runs


def test_a_run_keeps_its_adapters_alone(tmp_path, tiny_task):
    base = tiny.write_model(tmp_path / "base", seed=2)
    keys = KEYS | {"split": "b", "n_train": 64, "keep": "all", "param_dtype": "auto", "loss": "logconf", "checkpoint_every": 2}
    results = stages.run(tiny.finetune(base, tiny_task, **keys), str(tmp_path / "run"))
    run = w2s_jax.load(tmp_path / "run")
    assert run.config.lora.targets == "all-linear" and run.record["identity"]["lora"]["rank"] == 4
    saved = sum(f.stat().st_size for f in (tmp_path / "run" / "checkpoints").rglob("*") if f.is_file())
    loaded = run.model()
    adapters = sum(leaf.nbytes for leaf in models.paths(train.split_params(loaded.params, "lora")[0]).values())
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.params))
    assert adapters < saved < 3.3 * adapters + 60_000 and adapters < 0.35 * whole  # parameters, two moments, and Orbax's own
    stages.run(tiny.set_keys(shipped("label"), run=str(tmp_path / "run"), split="test", mesh__data=1), str(tmp_path / "labels"))
    again = np.stack(w2s_jax.load(tmp_path / "labels").predictions("test").logits)
    np.testing.assert_allclose(again, np.stack(run.predictions("test").logits), atol=1e-6)
    assert results["steps"] == 4


def test_the_base_keeps_its_type_and_adapters_are_float32(tmp_path):
    folder = tiny.write_model(tmp_path / "base", seed=2)
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v.astype(jnp.bfloat16) for k, v in tensors.items()}, folder / "model.safetensors")
    config = registry.fill(tiny.finetune(folder, "t", param_dtype="auto", dtype="bfloat16", **KEYS))
    loaded = workload.open_model(config)
    types = {p: leaf.dtype for p, leaf in models.paths(loaded.params).items()}
    assert {str(t) for p, t in types.items() if "/lora_" in p or p.startswith("head/")} == {"float32"}
    assert {str(t) for p, t in types.items() if "/lora_" not in p and not p.startswith("head/")} == {"bfloat16"}
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")
    assert models.stored_dtype(folder) == "float32"


# --------------------------------------------------------------------------- refusing


@pytest.mark.parametrize("targets, message", [
    ("q_proj", r"lora.targets: 'q_proj' names no matrix of this model; expected all-linear, ends .* such as c_attn, .*transformer.h.0"),
    ("c_attn,mlp.up", "lora.targets: 'mlp.up' names no matrix"), ("(", r"lora.targets: '\(' is no regex"),
    (r"transformer\.h\.0\.attn\.c_attn", r"names c_attn in 1 of \d layers, expected all layers or none"),
])
def test_targets_that_do_not_fit(targets, message):
    with pytest.raises(UserError, match=message):
        models.build(tiny.config(), head="classifier", lora=dataclasses.replace(LORA, targets=targets))


@pytest.mark.parametrize("targets, chosen", [
    ("all-linear", ["attn/out", "attn/qkv", "mlp/down", "mlp/up"]), ("c_proj", ["attn/out", "mlp/down"]), ("attn.c_proj", ["attn/out"]),
    (r".*\.c_(attn|fc)", ["attn/qkv", "mlp/up"]),
])
def test_targets(targets, chosen):
    config = tiny.config()
    plain = models.build(config, head="classifier")
    found = lora_lib.modules({"backbone": plain.abstract["backbone"]}, config, FAMILIES["gpt2"])
    assert sorted(path for path, _ in lora_lib.adapters(dataclasses.replace(LORA, targets=targets), found)) == chosen


def adapter(folder, change=lambda tensors: None, **settings):
    """A PEFT folder for the tiny GPT-2."""
    model, params = random_lora()
    raw, content = models.adapter_files(params, model, LORA, "base", "")
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(raw | settings))
    (folder / "adapter_model.safetensors").write_bytes(content)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


FIRST = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"


@pytest.mark.parametrize("change, settings, keys, message", [
    (lambda t: t.pop(FIRST), {}, {}, "does not fit the model and adapter_config.json: base_model.*c_attn.lora_A.weight is missing"),
    (lambda t: t.update(extra=np.zeros(2)), {}, {}, "extra has no place"),
    (lambda t: t.update({FIRST: np.zeros((3, 3), np.float32)}), {}, {}, r"is \[3, 3\], expected \[4, 36\]"),
    (lambda t: None, {"use_dora": True}, {}, "use_dora=True is not supported"),
    (lambda t: None, {"rank_pattern": {"a": 2}}, {}, "rank_pattern="),
    (lambda t: None, {"peft_type": "IA3"}, {}, "peft_type='IA3', expected LORA"), (lambda t: None, {"r": 0}, {}, "r=0 is not what PEFT"),
    (lambda t: None, {}, {"lora__rank": 5}, "config.lora.rank: 5, but the adapter in .* has 4; leave it unset"),
    (lambda t: None, {}, {"train": "full"}, "config.lora.init: .* is set, but train=full trains no adapters"),
])
def test_adapters_that_do_not_fit(change, settings, keys, message, tmp_path, tiny_task, tiny_model, capsys):
    folder = adapter(tmp_path / "adapter", change, **settings)
    flags = tiny.flags(**{"model": tiny_model, "task": tiny_task, "split": "train", "train": "lora", "lora__init": folder} | keys)
    assert main.main(["--config=finetune", *flags, f"--workdir={tmp_path / 'run'}"]) == 2
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "run").exists()


def test_merge_false_is_for_adapters(tmp_path, tiny_task, tiny_model):
    stages.run(tiny.finetune(tiny_model, tiny_task), str(tmp_path / "run"))
    with pytest.raises(UserError, match="merge=False: .* trained train=full, expected a run with adapters"):
        test_export.export(tmp_path / "run", tmp_path / "export", merge=False)
