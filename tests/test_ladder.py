"""The memory ladder: what is left open follows from the memory of a device, and a memory that runs out is answered."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

import w2s_jax
from w2s_jax import exhausted, feeding, ladder, losses, models, optimizers, stages, train
from w2s_jax import mesh as mesh_lib
from w2s_jax.config import shipped
from w2s_jax.errors import UserError

pytestmark = pytest.mark.slow  # minutes together

ROOT = Path(__file__).resolve().parents[1]
GIB, MIB = 2**30, 2**20


# --------------------------------------------------------------------------- the memory of a device


@pytest.mark.parametrize("text, size", [
    ("16GiB", 16 * GIB), ("16G", 16 * GIB), (" 500 mb", 500 * MIB), ("1.5k", 1536), ("4096", 4096), ("2e9", 2 * 10**9), ("3B", 3),
])
def test_sizes(text, size):
    assert exhausted.parse_size(text) == size


@pytest.mark.parametrize("text", ["much", "0", "-3G", "16 apples", "1.2.3G"])
def test_a_size_that_is_none_is_refused(text, monkeypatch):
    monkeypatch.setenv(exhausted.VARIABLE, text)
    with pytest.raises(UserError, match=f"{exhausted.VARIABLE}='{text}'"):
        exhausted.device_memory()


def test_memory_of_a_cpu_is_its_share_of_the_hosts(monkeypatch):
    monkeypatch.delenv(exhausted.VARIABLE, raising=False)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < exhausted.device_memory() <= total // jax.local_device_count()


# --------------------------------------------------------------------------- the order of the rungs


def config(**keys):
    return tiny.set_keys(shipped("finetune"), **keys)


def test_the_first_rung_gives_up_nothing_and_the_last_everything():
    found = ladder.rungs(config(), 8, 32, per_document=True)
    assert found[0] == ladder.Rung((8, 1, 1), 1, "none")
    assert found[-1].mesh[2] == 8 and found[-1].remat == "full"
    assert len(set(found)) == len(found)
    assert {r.mesh[0] * r.mesh[1] * r.mesh[2] for r in found} == {8}
    assert all(32 / r.microbatches >= r.cells for r in found)  # no cell of a microbatch lies empty
    models_ = [r.mesh[2] for r in found]
    assert models_ == sorted(models_)  # tensors are split last


@pytest.mark.parametrize("per_document, microbatched", [(True, 3), (False, 4)])
def test_fewer_passes_over_the_model_come_first(per_document, microbatched):
    """A loss that sees the whole batch pays a forward pass for microbatches, every loss one for rematerialising everything."""
    passes = [3 + (r.remat == "full") + (microbatched - 3) * (r.microbatches > 1)
              for r in ladder.rungs(config(), 8, 32, per_document) if r.mesh[2] == 1]
    assert passes == sorted(passes) and passes[0] == 3


@pytest.mark.parametrize("keys, expected", [
    ({"mesh__data": 2, "mesh__fsdp": 4, "mesh__model": 1, "microbatch_size": 0, "remat": "dots"}, {((2, 4, 1), 1, "dots")}),
    ({"mesh__data": 1, "mesh__fsdp": -1, "mesh__model": 1, "microbatch_size": 8}, {((1, 8, 1), 4, "none"), ((1, 8, 1), 4, "full")}),
    ({"mesh__data": 1, "mesh__fsdp": 1, "mesh__model": 1, "remat": "none"}, {((1, 1, 1), 2**k, "none") for k in range(6)}),
])
def test_what_is_given_stays(keys, expected):
    found = ladder.rungs(config(**keys), 8, 32, per_document=True)
    assert {(r.mesh, r.microbatches, r.remat) for r in found} == expected


# --------------------------------------------------------------------------- decisions


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose weights weigh more than its activations."""
    return tiny.write_model(tmp_path_factory.mktemp("models") / "wide", n_embd=96, n_inner=384, n_layer=3)


def decided(wide, monkeypatch, size, loss="xent", **keys):
    """What `fit` decides for 8 devices of `size`, by estimates alone."""
    monkeypatch.setenv(exhausted.VARIABLE, str(size))
    monkeypatch.setattr(ladder, "_compiled_size", lambda program, corpus, plan, steps, rung, stats: steps.judge(rung, plan).peak)
    c = tiny.set_keys(shipped("finetune"), model=str(wide), batch_size=32, learning_rate=1e-3, steps_per_dispatch=1, **keys)
    documents = tiny.documents(64)
    p = np.linspace(0.1, 0.9, len(documents)).astype(np.float32)
    corpus = feeding.Texts(documents, np.stack([1 - p, p], -1), np.ones(len(documents), np.float32), [str(i) for i in range(64)])
    batches = [np.arange(32), np.arange(32, 64)]
    from w2s_jax import hub, workload

    folder = hub.resolve(c.model, "main")
    loss = losses.make(loss, {}, ground_truth=False, label_stats={})
    return ladder.fit(c, lambda c: workload.build(c, folder), corpus, batches, loss, optimizers.of)


def test_less_memory_never_decides_for_more(wide, monkeypatch):
    """From plenty to little: what is decided fits, needs less and less, and starts with what gives up nothing."""
    sizes = [64 * MIB, 12 * MIB, 8 * MIB, 6 * MIB, 5 * MIB]
    found = [decided(wide, monkeypatch, size) for size in sizes]
    peaks = [f.memory.peak for f in found]
    assert found[0].rung == ladder.Rung((8, 1, 1), 1, "none")
    assert all(peak <= size for peak, size in zip(peaks, sizes)) and peaks == sorted(peaks, reverse=True)
    assert len({f.rung for f in found}) >= 3
    for f in found:
        c = f.config
        assert (tuple(c.mesh.values()), c.remat, c.microbatch_size) == (f.rung.mesh, f.rung.remat, -(-32 // f.rung.microbatches))
        assert tuple(f.mesh.shape.values()) == f.rung.mesh and f.plan.microbatches == f.rung.microbatches
        assert f.model.compute.remat == f.rung.remat and "auto: mesh" in f.line
        assert decided(wide, monkeypatch, f.limit).rung == f.rung  # and alike the next time


def test_what_was_given_is_not_judged(wide, monkeypatch):
    found = decided(wide, monkeypatch, MIB, mesh__data=1, mesh__fsdp=1, mesh__model=1, microbatch_size=0, remat="none")
    assert found.rung == ladder.Rung((1, 1, 1), 1, "none") and found.line == ""


def test_nothing_fits(wide, monkeypatch):
    with pytest.raises(UserError, match=r"nothing fits the 1.0 MiB of a device: mesh .* needs .*; would fit: .*\d+ devices") as error:
        decided(wide, monkeypatch, MIB)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"nothing fits .* with mesh as given"):
        decided(wide, monkeypatch, MIB, mesh__data=8, mesh__fsdp=1, mesh__model=1)


def test_a_compiled_step_that_does_not_fit_is_stepped_over(wide, monkeypatch, capsys):
    """The compiler's word is asked where an estimate is close, and the next rung is tried where it says no."""
    first = decided(wide, monkeypatch, 12 * MIB)
    monkeypatch.setattr(ladder, "COMPILED_ROOM", -1.0)
    second = decided(wide, monkeypatch, 12 * MIB)
    refused = [line for line in capsys.readouterr().err.splitlines() if "too much, next" in line]
    assert refused[0].startswith(f"auto: {first.ladder.describe(first.rung)} needs 7.")
    assert second.memory.peak < first.memory.peak and second.memory.peak <= ladder.SURE * second.limit  # that is not asked about
    assert second.line.endswith("a device")


# --------------------------------------------------------------------------- runs


def finetune(folder, model, task, **keys):
    c = tiny.finetune(model, task, mesh__data=0, checkpoint_every=2, keep="all", **keys)
    stages.run(c, folder)
    return w2s_jax.load(folder)


def test_a_squeezed_run_is_the_same_run(tmp_path, tiny_task, wide, monkeypatch, fast_compiles, capsys):
    monkeypatch.delenv(exhausted.VARIABLE, raising=False)
    plenty = finetune(tmp_path / "plenty", wide, tiny_task)
    assert (tuple(plenty.config.mesh.values()), plenty.config.microbatch_size, plenty.config.remat) == ((8, 1, 1), 8, "none")
    monkeypatch.setenv(exhausted.VARIABLE, str(5 * MIB))
    little = finetune(tmp_path / "little", wide, tiny_task)
    assert "a device, as compiled" in capsys.readouterr().err
    record = little.record["memory"]
    assert record["device"] == 5 * MIB and record["auto"].startswith("auto: mesh") and record["estimate"]["peak"] > 0
    assert little.record["identity"] == plenty.record["identity"]
    assert tuple(little.config.mesh.values()) != (8, 1, 1)
    np.testing.assert_allclose([r["loss"] for r in little.metrics], [r["loss"] for r in plenty.metrics], rtol=2e-4)


def test_forward_passes_take_fewer_tokens_or_split_the_model(wide, monkeypatch):
    model = models.build(models.read_config(wide), head="classifier")
    sizes = {axis: 0 for axis in mesh_lib.AXES}
    monkeypatch.setenv(exhausted.VARIABLE, str(GIB))
    assert ladder.place(model, sizes, tokens=64) == {"data": 8, "fsdp": 1, "model": 1}
    assert ladder.place(model, {"data": 1, "fsdp": -1, "model": 1}, tokens=64) == {"data": 1, "fsdp": -1, "model": 1}
    mesh = mesh_lib.make_mesh({"data": 1, "fsdp": 1, "model": 1}, jax.devices()[:1])
    assert ladder.forward_tokens(model, mesh, 8192, 40) == 8192
    monkeypatch.setenv(exhausted.VARIABLE, str(3 * MIB))
    assert 40 <= ladder.forward_tokens(model, mesh, 8192, 40) < 8192
    assert ladder.forward_tokens(model, mesh, 8192, 40, held=3 * MIB) == 40
    monkeypatch.setenv(exhausted.VARIABLE, str(3 * MIB // 2))
    assert ladder.place(model, sizes, tokens=64)["fsdp"] > 1
    monkeypatch.setenv(exhausted.VARIABLE, str(MIB // 8))
    with pytest.raises(UserError, match="nothing fits the 128.0 KiB of a device: the model needs about"):
        ladder.place(model, sizes, tokens=64)


# --------------------------------------------------------------------------- offload


@pytest.mark.parametrize("offload, trained", [("optimizer", "full"), ("params", "full"), ("params", "lora")])
def test_what_is_offloaded_lies_on_the_host_and_changes_nothing(tmp_path, tiny_task, tiny_model, monkeypatch, fast_compiles, offload,
                                                                trained):
    keys = {"train": trained, "microbatch_size": 4 if trained == "full" else 0}
    plain = finetune(tmp_path / "plain", tiny_model, tiny_task, epochs=1, **keys)
    state, matrices, real, left = set(), set(), train._run_dispatch, [3]

    def call(program, stats, trainable, opt_state, loss_state, frozen, *rest):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        out = real(program, stats, trainable, opt_state, loss_state, frozen, *rest)
        state.update((leaf.ndim > 0, leaf.sharding.memory_kind) for tree in (opt_state, out[1]) for leaf in jax.tree.leaves(tree))
        matrices.update(("/layers/" in path and path.endswith("kernel"), leaf.sharding.memory_kind)
                        for tree in (trainable, out[0], frozen) for path, leaf in mesh_lib.paths(tree))
        return out

    keys |= {"offload": offload, "steps_per_dispatch": 2, "eval_every": 4}
    monkeypatch.setattr(train, "_run_dispatch", call)
    with pytest.raises(KeyboardInterrupt):
        finetune(tmp_path / "host", tiny_model, tiny_task, **keys)
    left[0] = 100
    host = finetune(tmp_path / "host", tiny_model, tiny_task, **keys)  # from a checkpoint of offloaded state
    assert state == {(True, mesh_lib.HOST), (False, "device")}
    assert matrices == {(True, mesh_lib.HOST if offload == "params" else "device"), (False, "device")}
    assert [r["loss"] for r in host.metrics] == [r["loss"] for r in plain.metrics]
    jax.tree.map(np.testing.assert_array_equal, host.model().params, plain.model().params)
    assert host.record["identity"] == plain.record["identity"]
    needs, usual = (run.record["memory"]["estimate"] for run in (host, plain))
    assert needs["optimizer_state"] == 0 < usual["optimizer_state"]
    assert (needs["parameters"] < 0.5 * usual["parameters"]) == (offload == "params")


def test_offload_without_such_memory_is_refused(wide, monkeypatch):
    monkeypatch.setattr(ladder, "has_host_memory", lambda: False)
    with pytest.raises(UserError, match=r"config.offload: 'optimizer', but the devices here \(cpu\) have no pinned memory"):
        decided(wide, monkeypatch, GIB, offload="optimizer")


# --------------------------------------------------------------------------- out of memory


@pytest.mark.parametrize("text, size", [
    ("RESOURCE_EXHAUSTED: Out of memory allocating 1099511627776 bytes.", 2**40),
    ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2147483648 bytes.", 2**31),
    ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2.50GiB.", 5 * GIB // 2),
    ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded "
     "hbm capacity by 4.75G.", 41 * GIB // 2),
    ("RESOURCE_EXHAUSTED: something else", None),
])
def test_what_was_asked_for_is_read_from_the_message(text, size):
    error = jax.errors.JaxRuntimeError(text)
    assert exhausted.is_exhausted(error) and exhausted.asked(error) == size


@pytest.mark.parametrize("error", [RuntimeError("INVALID_ARGUMENT: a shape"), ValueError("out of memory"), UserError("out of memory")])
def test_other_errors_are_no_exhausted_memory(error):
    assert not exhausted.is_exhausted(error)


def limited(workdir, *flags) -> subprocess.CompletedProcess:
    """A real run whose address space ends at 64 GiB, so that more is refused on any machine."""
    command = ["bash", "-c", 'ulimit -v 67108864; exec "$@"', "-", sys.executable, "-m", "w2s_jax.main", *flags, f"--workdir={workdir}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    env.pop(exhausted.VARIABLE, None)
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def test_a_memory_that_really_runs_out_is_answered(tmp_path):
    """Attention's scores of 48 documents of 4000 tokens: 39 GB a copy."""
    model = tiny.write_model(tmp_path / "model", n_positions=4096)
    rng = np.random.default_rng(0)
    for name, n in (("train", 48), ("test", 4)):
        tiny.write_rows(tmp_path / "task" / f"{name}.jsonl",
                        [{"input_ids": rng.integers(0, tiny.VOCAB, 4000).tolist(), "label": i % 2} for i in range(n)])
    keys = {"model": model, "task": tmp_path / "task", "split": "train", "batch_size": 48, "epochs": 1, "max_length": 4096,
            "mesh": "1x1x1", "microbatch_size": 0, "remat": "none"}
    done = limited(tmp_path / "run", "--config=finetune", *tiny.flags(**keys))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2, done.stderr
    assert last.startswith("error: memory: training (mesh 1x1x1, microbatch 48 of 48, remat none) ran out of it, asking for ")
    assert "; expected --config.microbatch_size=" in last and "Traceback" not in done.stderr
    assert json.loads((tmp_path / "run" / "error.json").read_text())["error"].endswith(last.removeprefix("error: "))


def test_a_memory_that_runs_out_in_any_stage_is_answered(tmp_path, tiny_task, tiny_model, monkeypatch):
    """XLA's own refusal, of an array that no machine has, where the run computes its labels."""
    from w2s_jax import workload

    finetune(tmp_path / "run", tiny_model, tiny_task)
    monkeypatch.setattr(workload, "predict", lambda *_, **__: jax.numpy.zeros(2**50).block_until_ready())
    label = tiny.set_keys(shipped("label"), run=str(tmp_path / "run"), split="test")
    with pytest.raises(UserError, match=r"memory: the stage label ran out of it, asking for \S+ GiB .*expected .*eval_batch_size"):
        stages.run(label, tmp_path / "label")
