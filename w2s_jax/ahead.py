"""Compiling a run's own program ahead of time for devices that are not here, in a process of its own.

    found = compile_point(point)        # a child process: no device of this process is touched, and a compiler that aborts kills no run

What is compiled is what runs use: `train.lower` over the shapes of a dispatch of the run's plan, or `forward.lower` over a labelling
batch. For a TPU slice the real compiler does it (libtpu, through `jax.experimental.topologies`). For GPUs XLA's CPU compiler
partitions the program over as many fake devices: its arithmetic and collectives are the program's, its memory is not a GPU's.

`python -m w2s_jax.ahead OUT < point.json` is the child.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from w2s_jax import chips
from w2s_jax.costs import Settings
from w2s_jax.errors import UserError

TIMEOUT = 3600  # seconds that a compilation may take
# What keeps libtpu from asking a metadata server where it runs, from taking the lock of a process that computes, and from logging.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_LOG_DIR": "disabled", "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3",
}  # fmt: skip
_FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # machine code that nobody will run
_SIZE = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def compile_point(point: dict) -> dict:
    """Compile one point in a child process.

    Args:
      point: JSON object: `config` (a plan's config, as a dict), `raw` (the model's config.json), `topology` (its name), `settings`
        (`Settings` as a dict).

    Returns:
      JSON object: `shape`, `cells`, `microbatches`, `group`, `steps`, `useful`, `computed` (the plan), `attention`,
      `lesser_sharding`, `parts` (bytes a device: parameters, optimizer_state), `host` (the same of what is offloaded), `seconds`
      (lower, compile, compile_cpu), and either `memory` (bytes a device) and `cost` (`hlo.Cost`), or `out_of_memory` (the compiler's
      sentence) with `needed` (bytes, where it says).

    Raises:
      UserError: the compiler knows no such topology.
      RuntimeError: the child failed otherwise; its last lines.
    """
    topology = chips.topology(point["topology"])
    root = str(Path(__file__).resolve().parents[1])
    environment = os.environ | _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={topology.devices}" if topology.chip.kind == "gpu" else ""
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # a program from a cache comes without its text
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        child = subprocess.run([sys.executable, "-m", "w2s_jax.ahead", str(out)], input=json.dumps(point), env=environment,
                               capture_output=True, text=True, timeout=TIMEOUT)
        if not out.is_file():
            raise RuntimeError(f"compiling ahead of time for {topology} failed (exit code {child.returncode}): {child.stderr[-3000:]}")
        found = json.loads(out.read_text())
    if "refused" in found:
        raise UserError(found["refused"])
    return found


# --------------------------------------------------------------------------- what runs in both processes


def build(config, raw: dict, remat: str):
    """The model of a plan. UserError: its config.json is not supported."""
    from w2s_jax import models, workload

    dtype = {"auto": raw.get("dtype") or raw.get("torch_dtype") or "float32"}.get(config.param_dtype, config.param_dtype)
    return models.build(models.parse(raw, f"{config.model}: config.json"), head="classifier", dtype=config.dtype,
                        param_dtype="bfloat16" if dtype == "bfloat16" else "float32", remat=remat, attention=config.attention,
                        lora=workload.lora(config))


def corpus(config, model):
    """Documents of zeros with the lengths that the plan is for, `feeding.Texts`."""
    import numpy as np

    from w2s_jax import feeding
    from w2s_jax.data.lengths import sciq_lengths

    if config.lengths == "sciq":
        lengths = np.minimum(sciq_lengths(config.n_train, config.seed), model.config.max_positions)
    else:
        lengths = np.full(config.n_train, int(config.lengths))
    tokens = [np.zeros(n, np.int32) for n in lengths]
    return feeding.Texts(tokens, np.full((len(tokens), 2), 0.5, np.float32), np.ones(len(tokens), np.float32), list(map(str, lengths)))


def training_plan(config, model, texts, settings: Settings, platform: str, steps: int | None = None):
    """The `packing.Plan` of the run, or of its first `steps`."""
    from w2s_jax import feeding
    from w2s_jax.data import packing

    batches = packing.batch_stream(len(texts.tokens), config.batch_size, config.epochs, "once", config.seed)
    keys = config.copy_and_resolve_references().unlock()
    keys.microbatch_size, keys.eval_every, keys.checkpoint_every = settings.microbatch_size, 0, 0
    return feeding.plan_cells(keys, model, texts, batches[:steps], cells=settings.data * settings.fsdp, platform=platform)


def program(config, model, mesh):
    """The `train.Program` of the run."""
    from w2s_jax import config as config_lib
    from w2s_jax import losses, optimizers, train

    loss = losses.make(config.loss, {}, ground_truth=False, label_stats={})
    optimizer = optimizers.make(config.optimizer, config_lib.optimizer_args(config))
    return train.Program(model, loss, optimizer, mesh, config.train, config.offload)


def labelling_batches(config, model, texts, settings: Settings, chip: chips.Chip) -> list:
    """The `packing.EvalBatch`es of labelling every document."""
    from w2s_jax import ladder, memory, workload
    from w2s_jax.data import packing

    cells, longest = settings.data * settings.fsdp, int(texts.sizes.max())
    tokens = workload.tokens_per_batch(config, texts.tokens, cells, chip.kind)
    if not config.eval_batch_size:
        tokens = cells * ladder.forward_tokens(model, memory.abstract_mesh(settings.mesh), tokens // cells, longest, size=chip.memory,
                                               offload=config.offload, platform=chip.kind)
    return packing.forward_batches(texts.tokens, cells=cells, embed=model.config.embed, tokens_per_batch=tokens)


# --------------------------------------------------------------------------- the child


def _devices(topology: chips.Topology) -> list:
    """Devices to compile for. UserError: the compiler knows no such slice."""
    import jax

    if topology.chip.kind == "gpu":
        return jax.devices("cpu")
    from jax.experimental import topologies

    options = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=str(topology), **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"config.topology: {str(topology)!r} is no slice that the TPU's compiler knows ({error})") from None
    assert len(found) == topology.devices, f"{topology} has {len(found)} devices"
    return list(found)


def _bytes(tree, host: bool = False) -> int:
    """Of the part of every array that lies on one device, in its own memory or in the host's."""
    import jax

    from w2s_jax import mesh as mesh_lib

    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree)
               if (a.sharding.memory_kind == mesh_lib.HOST) == host)


def _compile(point: dict) -> dict:
    import jax
    import numpy as np
    from ml_collections import ConfigDict

    from w2s_jax import forward, train, workload
    from w2s_jax import mesh as mesh_lib
    from w2s_jax.models import attention

    topology, settings = chips.topology(point["topology"]), Settings(**point["settings"])
    config = ConfigDict(point["config"])
    mesh = mesh_lib.make_mesh(settings.mesh, _devices(topology))
    platform = topology.chip.kind
    model = build(config, point["raw"], settings.remat)
    texts = corpus(config, model)
    out: dict = {"lesser_sharding": mesh_lib.lesser(model, mesh)}
    start = time.perf_counter()
    with workload.precision(config):
        if config.what == "train":
            plan = training_plan(config, model, texts, settings, platform)
            shape = max(plan.shapes, key=lambda s: (s.rows * s.time, s.time))
            steps, group = len(plan.batches), max(map(len, plan.dispatches))
            xs = train.dispatch_inputs(texts, plan, plan.shapes.index(shape))
            arguments = train.abstract_arguments(program(config, model, mesh), xs)
            held = [arguments[0], arguments[3]], arguments[1]
            lowered = train.lower(program(config, model, mesh), *arguments)
            out |= {"group": group, "microbatches": plan.microbatches, "useful": plan.useful, "computed": plan.computed,
                    "shapes": [[s.rows, s.time] for s in plan.shapes], "share": _share(plan, shape, model.config.embed)}
        else:
            batches = labelling_batches(config, model, texts, settings, topology.chip)
            largest = max(batches, key=lambda b: b.arrays["tokens"].size)
            shape_of = lambda b: b.arrays["tokens"].shape[1:]  # noqa: E731
            params = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), model.abstract,
                                  mesh_lib.param_shardings(mesh, model.abstract, config.offload)[0])
            arrays = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=mesh_lib.batch_sharding(mesh)) for k, v in largest.arrays.items()}
            held = params, []
            lowered = forward.lower(model.apply, params, arrays)
            sizes = [b.arrays["tokens"].size for b in batches]
            steps, shape = len(batches), largest.arrays["tokens"].shape[1:]
            out |= {"group": 1, "microbatches": 1, "useful": int(texts.sizes.sum()), "computed": int(sum(sizes)),
                    "shapes": sorted({shape_of(b) for b in batches}), "share": float(np.mean(sizes) / max(sizes))}
    lowering = time.perf_counter() - start
    rows, row = (shape.rows, shape.time) if config.what == "train" else shape
    c = model.config
    chosen = attention.choose(model.compute.attention, platform, c.kinds, c.causal, width=c.head_dim, dtype=model.compute.dtype,
                              cap=c.attention_cap, time=row)
    parts, host = ({"parameters": _bytes(held[0], where), "optimizer_state": _bytes(held[1], where)} for where in (False, True))
    out |= {"shape": [rows, row], "cells": settings.data * settings.fsdp, "steps": steps, "parts": parts, "host": host, "attention": chosen,
            "parameters": sum(math.prod(a.shape) for a in jax.tree.leaves(model.abstract))}
    start, worked = time.perf_counter(), time.process_time()
    out |= _cost(lowered, topology)
    return out | {"seconds": {"lower": lowering, "compile": time.perf_counter() - start, "compile_cpu": time.process_time() - worked}}


def _share(plan, shape, embed: int) -> float:
    """The mean cost of a step, relative to one of the largest shape."""
    costs = [plan.shapes[which].cost(embed) for dispatch, which in zip(plan.dispatches, plan.shape_of) for _ in dispatch]
    return sum(costs) / len(costs) / shape.cost(embed)


def _cost(lowered, topology: chips.Topology) -> dict:
    """Compile, and read what it costs: `memory` and `cost`, or `out_of_memory`."""
    import jax

    from w2s_jax import hlo

    with tempfile.TemporaryDirectory() as folder:
        # jax cannot always parse the TPU compiler's module back (`as_text`); the compiler itself can write it down.
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if topology.chip.kind == "tpu" else _FAST
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return out_of_memory(str(error))
        texts = sorted(Path(folder).glob("*after_optimizations.txt"), key=lambda f: f.stat().st_size)
        text = texts[-1].read_text() if texts else compiled.as_text()
    m = compiled.memory_analysis()
    memory = {"arguments": m.argument_size_in_bytes, "outputs": m.output_size_in_bytes, "aliased": m.alias_size_in_bytes,
              "temporaries": m.temp_size_in_bytes, "code": m.generated_code_size_in_bytes}
    memory["peak"] = memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporaries"] + memory["code"]
    return {"memory": memory, "cost": dataclasses.asdict(hlo.cost(text, topology.devices)),
            "compilers_flops": float((compiled.cost_analysis() or {}).get("flops", 0.0))}


def out_of_memory(message: str) -> dict:
    """`out_of_memory`, the compiler's sentence, and `needed`, the bytes that it names (None where it names none)."""
    line = next((part for part in re.split(r"\n|(?<=\.) ", message) if "emory" in part or "Used" in part), message)
    found = re.search(r"Used ([\d.]+)([KMGT]?) of|\(([\d.]+)([KMGT]?)B?\) exceeds|Total hbm usage >= ([\d.]+)([KMGT]?)", message)
    parts = [g for g in found.groups() if g is not None] if found else []
    needed = int(float(parts[0]) * _SIZE[parts[1] if len(parts) > 1 else ""]) if parts else None
    return {"out_of_memory": " ".join(line.split())[:400], "needed": needed}


if __name__ == "__main__":
    try:
        result = _compile(json.load(sys.stdin))
    except UserError as error:
        result = {"refused": str(error)}
    Path(sys.argv[1]).write_text(json.dumps(result))
