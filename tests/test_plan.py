"""Plans: shapes of published models, chips and topologies, the arithmetic, compilations ahead of time, the stage and what it refuses."""

import dataclasses
import importlib.util
import json
import math

import pytest
import tiny

from w2s_jax import ahead, checks, chips, costs, hub, models, stages
from w2s_jax import config as configs
from w2s_jax import main as entry
from w2s_jax.data.packing import Shape
from w2s_jax.errors import UserError
from w2s_jax.hlo import Collective
from w2s_jax.stages import plan as plan_lib

pytestmark = pytest.mark.slow  # minutes together

TPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU's compiler: pip install libtpu")
PARAMETERS = {  # of the language models, as their authors publish them
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    "Qwen/Qwen-1_8B": 1_836_828_672, "Qwen/Qwen-7B": 7_721_324_544, "Qwen/Qwen-14B": 14_167_290_880, "Qwen/Qwen-72B": 72_287_920_128,
    "Qwen/Qwen1.5-0.5B": 463_987_712, "meta-llama/Meta-Llama-3-8B": 8_030_261_248, "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    """A folder with nothing but a config.json."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(tiny.RAW | {"n_embd": 64, "n_inner": 256, "n_head": 4, "vocab_size": 512}))
    return str(tmp_path / "model")


def config(model, **keys):
    small = {"model": model, "n_train": 64, "batch_size": 16, "epochs": 1, "lengths": "32"}
    return tiny.set_keys(configs.shipped("plan"), **small | keys)


# --------------------------------------------------------------------------- shapes and chips


def test_every_shipped_shape_is_listed():
    assert {str(f.relative_to(hub.shapes()).with_suffix("")) for f in hub.shapes().rglob("*.json")} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_shipped_shape_has_the_published_number_of_parameters(name):
    raw, source = hub.config_json(name)
    assert source == "configs/shapes"
    model = models.build(models.parse(raw, name), head="lm")
    assert sum(math.prod(leaf.shape) for leaf in models.paths(model.abstract).values()) == PARAMETERS[name]


def test_shipped_shapes_are_those_that_the_readers_are_tested_with():
    from published import PUBLISHED

    for name in set(PARAMETERS) & set(PUBLISHED):
        assert models.parse(hub.config_json(name)[0], name) == models.parse(PUBLISHED[name][0], name)


def test_a_local_folder_wins(model):
    assert hub.config_json(model) == (json.loads(open(f"{model}/config.json").read()), "folder")
    assert hub.config_json("openai-community/gpt2")[0] == hub.config_json("gpt2")[0]


@pytest.mark.parametrize("kind, name", [
    ("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"), ("cpu", None),
    ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-40GB", "a100-40g"), ("NVIDIA A100-SXM4-80GB", "a100-80g"),
    ("NVIDIA L40S", "l40s"), ("NVIDIA L4", "l4"),
])
def test_chips_by_what_jax_calls_them(kind, name):
    found = chips.of_device(kind)
    assert (found and found.name) == name


def test_a_chips_figures_are_in_order():
    for chip in chips.CHIPS.values():
        assert chip.peak("bfloat16") >= chip.peak("float32") >= chip.peak("float32", "high") > 0
        assert chip.peak("float32", "high") >= chip.peak("float32", "highest") or chip.kind == "gpu"
        assert 1e10 < chip.link < chip.bandwidth < 1e13 and chip.memory > 14 * chips.GIB


@pytest.mark.parametrize("text, devices", [("v5p:4x4x8", 128), ("v5e:16x16", 256), ("h100:8", 8), ("a100-80g:16", 16)])
def test_topologies(text, devices):
    found = chips.topology(text)
    assert found.devices == devices and str(found) == text


@pytest.mark.parametrize("mesh, group, topology, expected", [
    ({"data": 1, "fsdp": 4, "model": 2}, 4, "v5p:2x2x2", 200e9),  # two links of a torus
    ({"data": 1, "fsdp": 4, "model": 2}, 4, "h100:8", 450e9),
    ({"data": 2, "fsdp": 8, "model": 1}, 8, "h100:16", 450e9),  # the inner axis stays in a node
    ({"data": 2, "fsdp": 8, "model": 1}, 2, "h100:16", 50e9),  # the outer one has an adapter for each GPU
    ({"data": 1, "fsdp": 16, "model": 1}, 16, "h100:16", 400e9),  # a whole node shares its eight
])
def test_which_links_a_group_uses(mesh, group, topology, expected):
    assert costs.link_bandwidth(chips.topology(topology), mesh, group) == expected


# --------------------------------------------------------------------------- arithmetic


def test_times_are_work_over_rates():
    topology, mesh = chips.topology("v5e:2x2"), {"data": 1, "fsdp": 4, "model": 1}
    work = costs.Work(197e12 * 0.4, 0.8 * 8.19e11 * 2, (Collective("all-gather", 4, 10, 0.8 * 100e9 * 3),))
    found = costs.times(work, topology, mesh, 0.4, "bfloat16", "default")
    assert (found.compute, found.memory) == pytest.approx((1, 2))
    assert found.interconnect == pytest.approx(3 + 10 * 2 * costs.HOP)
    assert found.step == found.interconnect and found.bound == "interconnect" and found.serial == pytest.approx(5, rel=1e-4)


@pytest.mark.parametrize("train, remat, passes", [
    ("full", "none", 3), ("full", "full", 4), ("lora", "none", 2), ("head", "none", 1), (None, "none", 1),
])
def test_flops_by_what_is_trained(train, remat, passes):
    lora = models.Lora(4, 4.0, 0.0, "all-linear", False) if train == "lora" else None
    model = models.build(tiny.config(n_layer=3), head="classifier", remat=remat, lora=lora)
    found = costs.work(model, costs.Settings(1, 2, 1, remat, 0), Shape(4, 8), microbatches=1, train=train, per_document=True)
    weights = 3 * 12 * 36**2
    assert found.flops == pytest.approx(2 * weights * 32 * passes, rel=0.2)
    whole = costs.work(model, costs.Settings(1, 2, 1, remat, 8), Shape(4, 8), microbatches=4, train=train, per_document=False)
    assert whole.flops / 4 == pytest.approx(found.flops * (passes + 1) / passes if train else found.flops, rel=0.1)


def test_candidates_keep_to_what_is_given(model):
    network = ahead.build(config(model), json.loads(open(f"{model}/config.json").read()), "none")
    free = costs.candidates(config(model), network, 8)
    assert {s.remat for s in free} == set(costs.LADDER) and {s.data * s.fsdp * s.model for s in free} == {8}
    assert {s.model for s in free} == {1, 2, 4}  # four heads
    given = costs.candidates(config(model, mesh__fsdp=4, remat="dots", microbatch_size=8), network, 8)
    assert {(s.fsdp, s.remat, s.microbatch_size) for s in given} == {(4, "dots", 8)}
    assert not costs.candidates(config(model, batch_size=2, n_train=2, mesh__data=8), network, 8)  # more places than documents
    assert {s.model for s in costs.candidates(config(model, mesh__model=8), network, 8)} == {8}  # asked for, though heads do not divide
    assert {s.model for s in costs.candidates(config(model, batch_size=1, n_train=1), network, 8)} == {8}  # nothing else is left


# --------------------------------------------------------------------------- compiling ahead of time


@pytest.mark.parametrize("message, needed", [
    ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries (29.87G) "
     "exceeds available HBM (15.75G). HLO module: jit.", 29.87 * 2**30),
    ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm", 20.5 * 2**30),
    ("RESOURCE_EXHAUSTED: something else", None),
])
def test_what_an_out_of_memory_error_says(message, needed):
    found = ahead.out_of_memory(message)
    assert found["needed"] == (needed if needed is None else int(needed)) and found["out_of_memory"]


def point(model, topology, settings, **keys):
    return {"config": json.loads(config(model, **keys).to_json_best_effort()), "raw": json.loads(open(f"{model}/config.json").read()),
            "topology": topology, "settings": dataclasses.asdict(settings)}


@TPU
def test_the_tpus_compiler_compiles_a_runs_step(model):
    """A real slice of four chips: the parts are the shards' bytes, weights are gathered in every layer, gradients scattered."""
    found = ahead.compile_point(point(model, "v5e:2x2", costs.Settings(1, 4, 1, "full", 0), lengths="128", steps_per_dispatch=1))
    memory, cost = found["memory"], found["cost"]
    assert found["shape"] == [4, 128] and found["attention"] == "splash" and found["group"] == 1
    assert found["parts"]["optimizer_state"] == pytest.approx(2 * found["parts"]["parameters"], rel=0.01)
    assert memory["arguments"] > found["parts"]["parameters"] * 3 * 0.99 and memory["peak"] < 1e9
    weights, tokens = 2 * 12 * 64**2, 4 * 128
    assert cost["loops"] == [2, 2] and cost["flops"] == pytest.approx(7.5 * weights * tokens, rel=0.1)
    assert cost["once"] == pytest.approx(found["compilers_flops"], rel=0.2)  # which counts a loop's body once, and elementwise work
    assert cost["attention_flops"] == (2 + 2 + 3 + 4) * 2 * 2.0 * 4 * 4 * 128 * 128 * 16  # forward twice, two backward kernels; two layers
    assert cost["collectives"] and all(c["group"] in (2, 4) for c in cost["collectives"])


@TPU
def test_the_tpus_compiler_leaves_what_is_offloaded_to_the_host(model):
    here, away = (ahead.compile_point(point(model, "v5e:2x2", costs.Settings(1, 4, 1, "full", 0), lengths="128", offload=offload))
                  for offload in ("none", "params"))
    assert sum(here["host"].values()) == 0 and away["host"]["parameters"] > 0.5 * here["parts"]["parameters"]
    assert sum(away["host"].values()) + sum(away["parts"].values()) == sum(here["parts"].values())
    assert away["memory"]["arguments"] < here["memory"]["arguments"] - 0.9 * sum(away["host"].values())


@TPU
def test_what_does_not_fit_a_chip_is_told_by_its_compiler():
    large = configs.shipped("plan")
    large.update({"lengths": "512", "n_train": 32, "epochs": 1})
    found = ahead.compile_point({"config": json.loads(large.to_json_best_effort()), "raw": hub.config_json("gpt2-xl")[0],
                                 "topology": "v5e:1x1", "settings": dataclasses.asdict(costs.Settings(1, 1, 1, "full", 0))})
    assert "memory" not in found and found["needed"] > 16 * 2**30 and "exceeds available HBM" in found["out_of_memory"]


@TPU
def test_a_slice_that_cannot_be_is_refused(model):
    with pytest.raises(UserError, match="'v5e:3x5' is no slice that the TPU's compiler knows"):
        ahead.compile_point(point(model, "v5e:3x5", costs.Settings(1, 15, 1, "full", 0)))


# --------------------------------------------------------------------------- the stage


@pytest.mark.parametrize("keys", [{}, {"train": "lora", "remat": "full", "offload": "params"}, {"what": "label", "eval_batch_size": 16}])
def test_a_plan_for_gpus(tmp_path, model, capsys, monkeypatch, keys):
    """The whole stage: settings chosen, the step partitioned, the page; asked again nothing is compiled, a table goes on."""
    asked = config(model, topology="h100:4", **keys)
    results = stages.run(asked, tmp_path / "plan")
    (found,) = results["points"]
    assert (found["compiled"]["parts"]["optimizer_state"] == 0) == ("what" in keys)
    assert found["compiled"]["parts"]["optimizer_state"] < found["compiled"]["parts"]["parameters"] * (0.5 if keys else 2.5)
    # Forward, and backward with what is computed again there: the matrices come in twice; the adapters' moments go both ways.
    host = found["compiled"]["host"]
    assert found["host_traffic"] == 2 * host["parameters"] + 2 * host["optimizer_state"]
    assert (host["parameters"] > 0) == (found["host_traffic"] > 0) == ("offload" in keys)
    assert found["fits"] and found["compiler"] == "estimate" and found["chips"] == 4 and found["source"] == "folder"
    assert found["tokens_per_second"] == pytest.approx(64 * 32 / found["run_seconds"]) and found["epoch_seconds"] == found["run_seconds"]
    assert math.prod(found["settings"][axis] for axis in ("data", "fsdp", "model")) == 4
    page = (tmp_path / "plan" / "plan.md").read_text()
    assert page in capsys.readouterr().out and "an ESTIMATE" in page and "| parameters |" in page
    assert (f"--config.remat={found['settings']['remat']}" in page) == ("what" not in keys)  # a run's own, for labels
    assert found["step_seconds"] == max(found["times"][part] for part in ("compute", "memory", "interconnect"))
    assert ("from and to the host a step" in page) == ("--config.offload=params" in page) == ("offload" in keys)
    monkeypatch.setattr(ahead, "compile_point", lambda point: pytest.fail("compiled again"))
    assert stages.run(asked, tmp_path / "plan") == results
    (tmp_path / "plan" / "results.json").unlink()
    assert stages.run(asked, tmp_path / "plan")["points"] == results["points"]


def test_labelling_plans_take_the_mesh_that_labels_most_a_second(model):
    """A pass is as large as the mesh's places, so that seconds a pass would rank the mesh of fewest places first."""
    asked = config(model, topology="h100:4", what="label", lengths="32", n_train=4096)
    found = plan_lib._Point(asked, json.loads(open(f"{model}/config.json").read()), chips.topology("h100:4"))
    found._compile = lambda settings, estimate: {"fits": True, "needed": 1}
    settings, _ = found._first(found.options, 2**40, 1)
    assert settings.mesh == {"data": 4, "fsdp": 1, "model": 1}
    assert len(found.plans) == len({tuple(s.mesh.values()) for s in found.options})


def with_memory(monkeypatch, size: float):
    """H100s of `size` MiB: what does not fit there is small enough to be compiled here."""
    monkeypatch.setitem(chips.CHIPS, "h100", dataclasses.replace(chips.CHIPS["h100"], memory=int(size * 2**20)))


def test_where_what_is_asked_for_does_not_fit_the_nearest_that_does_is_found(tmp_path, model, monkeypatch):
    asked = config(model, topology="h100:2", mesh__data=2, mesh__fsdp=1, mesh__model=1, remat="everything_saveable", lengths="64",
                   microbatch_size=16)
    network = plan_lib._Point(asked, json.loads(open(f"{model}/config.json").read()), chips.topology("h100:2"))
    needs = [network.estimate(costs.Settings(2, 1, 1, remat, 16))["needed"] for remat in ("everything_saveable", "full")]
    with_memory(monkeypatch, (sum(needs) / 2) / 2**20)
    (found,) = stages.run(asked, tmp_path / "plan")["points"]
    assert [t["fits"] for t in found["tried"]] == [False, True]
    assert found["fits"] and found["changed"] == ["remat"] and found["settings"] == found["tried"][1]["settings"]
    assert "the nearest that does changes remat" in (tmp_path / "plan" / "plan.md").read_text()


def test_where_nothing_fits_a_larger_machine_is_named(tmp_path, model, monkeypatch):
    asked = config(model, topology="h100:1", what="label", eval_batch_size=8)
    one = plan_lib._Point(asked, json.loads(open(f"{model}/config.json").read()), chips.topology("h100:1"))
    with_memory(monkeypatch, 0.9 * min(one.estimate(s)["needed"] for s in one.options) / 2**20)
    (found,) = stages.run(asked, tmp_path / "plan")["points"]
    page = (tmp_path / "plan" / "plan.md").read_text()
    assert not found["fits"] and found["tried"] and not any(t["fits"] for t in found["tried"])
    assert "**Does not fit**" in page and found["larger"] in ("h100:2", "h100:4") and f"it fits {found['larger']}" in page


@pytest.mark.parametrize("keys, expected", [
    ({"topology": "v9:2x2"}, r"config.topology: 'v9:2x2' names no chip that is known; expected one of v4:4x4x4, v5e:4x4, .*h100:8"),
    ({"topology": "v5p:4x4"}, r"config.topology: 'v5p:4x4', expected 3 axes of its torus behind the colon, as in v5p:4x4x4"),
    ({"topology": "h100:2x4"}, r"config.topology: 'h100:2x4', expected a number of GPUs"),
    ({"topologies": ("v5e:4x4", "v5e:0x4")}, r"config.topologies: 'v5e:0x4'"),
    ({"topologies": ("v5e:4x4", "v5e:4x4")}, r"config.topologies: .* names one twice"),
    ({"models": ("gpt2", "not/a/model")}, r"config.models: 'not/a/model', no such folder"),
    ({"lengths": "long"}, r"config.lengths: 'long', expected sciq or a number of tokens"),
    ({"batch_size": 100}, r"config.batch_size: 100, expected at most config.n_train \(64\)"),
    ({"mesh__fsdp": -1}, r"config.mesh: .*, expected sizes, or 0 for axes that are chosen"),
    ({"attention": "splash"}, r"config.attention: 'splash', expected one of auto, xla"),
    ({"what": "pretrain"}, r"config.what: 'pretrain', expected one of train, label"),
])
def test_keys_that_are_refused(model, keys, expected):
    with pytest.raises(UserError, match=expected):
        checks.check(config(model, **keys).lock())


@pytest.mark.parametrize("keys, expected", [
    ({"topology": "h100:2", "lengths": "65"}, r"config.lengths: 65, but .* has 64 positions"),
    ({"topology": "h100:2", "mesh__data": 3}, r"config.mesh: .* is no mesh over the 2 chips of h100:2"),
    ({"topology": "h100:2", "model": "some/model-that-is-nowhere"}, r"model=some/model-that-is-nowhere: .*shapes has only Qwen/Qwen-14B"),
])
def test_what_does_not_fit_together_is_refused_before_anything_is_compiled(tmp_path, model, monkeypatch, keys, expected):
    monkeypatch.setattr(ahead, "compile_point", lambda point: pytest.fail("compiled"))
    with pytest.raises(UserError, match=expected):
        stages.run(config(**{"model": model} | keys), tmp_path / "plan")
    assert not (tmp_path / "plan").exists()


def test_without_the_tpus_compiler_one_line_says_what_to_install(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else real(name, *rest))
    with pytest.raises(UserError, match=r"config.topology: 'v5e:2x2' needs libtpu, .*pip install libtpu"):
        stages.run(config("gpt2", topology="v5e:2x2"), tmp_path / "plan")
    assert not (tmp_path / "plan").exists()


@pytest.mark.parametrize("arg, expected", [
    ("model=gpt2-xl,topology=h100:8,train=lora", {"model": "gpt2-xl", "topology": "h100:8", "train": "lora"}),
    ("mesh.fsdp=4,utilisation=0.5,lora.rank=4", {"mesh.fsdp": 4, "utilisation": 0.5, "lora.rank": 4}),
])
def test_keys_behind_the_colon(arg, expected):
    found = configs.flatten(configs.load("plan", arg))
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("arg, expected", [
    ("modle=gpt2", "'modle=gpt2' is none; did you mean 'model'"), ("batch_size=many", "batch_size=many: expected an integer"),
    ("models=gpt2", "lists are set by --config.models"), ("gpt2", "'gpt2' is none"),
])
def test_what_may_not_stand_behind_the_colon(arg, expected, capsys):
    assert entry.main([f"--config=plan:{arg}", "--workdir=nowhere"]) == 2
    assert expected in capsys.readouterr().err
