"""Measure linear probes and passes of vision networks against PyTorch, in one process and in turns.

The probe's contender is openai/weak-to-strong's `train_logreg` (`vision/run_weak_strong.py`); the networks' are transformers' classes.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from etils import epath

from w2s_jax import config as config_lib
from w2s_jax import files, runlog, workload
from w2s_jax.errors import UserError, nearest
from w2s_jax.models import vision as models
from w2s_jax.probes import measure
from w2s_jax.progress import Progress, say
from w2s_jax.runlog import Run

VIT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "patch_size": 16, "image_size": 224}
NETWORKS = {  # transformers' config class and what differs from its defaults (ResNet-50, ViT-B/16)
    "resnet50": ("ResNet", {"downsample_in_bottleneck": False}),
    "vits16": ("ViT", VIT | {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}),
    "vitb16": ("ViT", VIT),
}


def identity(config, planned: dict | None = None) -> dict:
    """Every key: a measurement depends on how it is executed."""
    return config_lib.plain_identity(json.loads(config.to_json_best_effort()))


def run(config, workdir, *, rerun: bool = False, **_) -> dict:
    """Measure, write results.json and benchmark.md, print the table.

    Raises:
      UserError: an unknown network; torch is asked for and not installed.
    """
    if unknown := [name for name in config.networks if name not in NETWORKS]:
        raise UserError(f"config.networks: {unknown[0]!r}, expected some of {', '.join(NETWORKS)}{nearest(unknown[0], NETWORKS)}")
    if config.torch and importlib.util.find_spec("torch") is None:
        raise UserError("config.torch: True, but torch is not installed (pip install torch==2.13.0); expected False without it")
    with workload.precision(config), Run.open(workdir, config, identity(config), rerun=rerun) as run_:
        file = epath.Path(run_.path) / "benchmark.md"
        if run_.results is None:
            run_.start()
            say(f"the probe: {config.n_train} x {config.embed} features, {config.n_classes} classes")
            made = measure.data(config.n_train, config.embed, config.n_classes, config.seed)
            results = {"devices": runlog.devices(), "probe": measure.measure(
                **made, batch_size=config.batch_size, rounds=config.repeats, reference=config.torch)}
            del made
            results["steps"] = -(-config.n_train // config.batch_size) * config.epochs
            results["networks"] = {name: _network(config, name) for name in config.networks}
            files.write_text(file, table(config, results))
            run_.finish(results)
        print(file.read_text())
        return run_.results


def _network(config, name: str) -> dict:
    """Seconds of a pass of each side, and how far their features lie apart. Without torch: ours, by its published initialisation."""
    if config.torch:
        sides, difference = _both(config, name)
    else:
        kind, changes = NETWORKS[name]
        if kind != "ViT":
            raise UserError(f"config.networks: {name!r} needs torch, whose class makes its weights; expected vits16 or vitb16")
        model = models.build(models.new_vit(
            image=224, patch=16, width=changes.get("hidden_size", 768), layers=12, heads=changes.get("num_attention_heads", 12),
            mlp=changes.get("intermediate_size", 3072)), head="none", dtype=config.dtype)
        sides, difference = {"ours": _ours(model, jax.jit(model.init)(jax.random.key(config.seed)), _images(config))}, None
    seconds: dict[str, list] = {side: [] for side in sides}
    with Progress(config.repeats, label=name, unit="round") as progress:
        for turn in range(config.repeats + 1):
            for side, call in sides.items():
                start = time.perf_counter()
                call()
                seconds[side].append(time.perf_counter() - start)
            progress.update(int(turn > 0))
    timed = {side: values[1:] for side, values in seconds.items()}  # the first one compiles
    out = {"seconds": {side: statistics.median(values) for side, values in timed.items()}, "images": config.images,
           "first_seconds": seconds["ours"][0], "largest_difference": difference}
    if "torch" in timed:
        out["ratios"] = [b / a for a, b in zip(timed["ours"], timed["torch"])]
    return out


def _images(config) -> np.ndarray:
    return np.random.default_rng(config.seed).integers(0, 256, (config.images, config.pixels, config.pixels, 3)).astype(np.uint8)


def _ours(model, params, images: np.ndarray):
    read = jax.jit(model.features)
    batch = {"images": images[None], "documents": np.arange(len(images), dtype=np.int32)[None]}
    return lambda: np.asarray(read(params, batch))[0]


def _both(config, name: str) -> tuple[dict, float]:
    """The passes of both sides with one set of random weights, as functions; the largest difference of their features."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()

    kind, changes = NETWORKS[name]
    torch.manual_seed(config.seed)
    theirs = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**changes), **(
        {"add_pooling_layer": False} if kind == "ViT" else {})).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model = models.build(models.read_config(Path(folder)), head="none", dtype=config.dtype)
        params = models.load(folder, model)
    images = _images(config)
    ours = _ours(model, params, images)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.config.mean, model.config.std))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind_of = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    theirs = theirs.to(device, kind_of)
    more = {"interpolate_pos_encoding": True} if kind == "ViT" and config.pixels != 224 else {}

    @torch.inference_mode()
    def call() -> np.ndarray:
        x = ((torch.from_numpy(images).to(device).permute(0, 3, 1, 2) / 255 - mean.to(device)) / std.to(device)).to(kind_of)
        out = theirs(x, **more)
        found = out.pooler_output.flatten(1) if kind == "ResNet" else out.last_hidden_state[:, 0]
        return found.float().cpu().numpy()

    return {"ours": ours, "torch": call}, float(np.abs(ours() - call()).max())


def table(config, results: dict) -> str:
    """results.json as markdown."""
    probe, steps = results["probe"], results["steps"]
    lines = [f"{probe['devices']}; the products of a step: {probe['gflop']:.2f} GFLOP", "",
             f"| a step of the probe ({config.batch_size} x {config.embed}, {config.n_classes} classes) | ms | "
             f"{config.epochs} epochs of {config.n_train}, min | ours is faster by |", "| --- | ---: | ---: | ---: |"]
    for side, title in (("reference", "the reference's loop"), ("ours", "w2s_jax")):
        for row in probe.get(side, ()):
            ratio = f"{row['ratio']:.1f}x" if row.get("ratio") else ""
            lines.append(f"| {title}, {row['labels']} labels | {1e3 * row['median']:.1f} | {row['median'] * steps / 60:.1f} | {ratio} |")
    if results["networks"]:
        lines += ["", f"| a pass of {config.images} images, {config.pixels} x {config.pixels}, {config.dtype} | w2s_jax, images/s | "
                  "torch | ours is faster by | lowest - highest | largest difference |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for name, row in results["networks"].items():
        rate = {side: row["images"] / value for side, value in row["seconds"].items()}
        if "ratios" in row:
            ratios = sorted(row["ratios"])
            rest = (f"{rate['torch']:.1f} | {statistics.median(ratios):.2f}x | {ratios[0]:.2f} - {ratios[-1]:.2f} | "
                    f"{row['largest_difference']:.1e}")
        else:
            rest = "not timed | | | "
        lines.append(f"| {name} | {rate['ours']:.1f} | {rest} |")
    return "\n".join(lines) + "\n"
