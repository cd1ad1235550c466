"""What the vision stages share: image models on a mesh, what they read of images, fingerprints.

The counterpart of `workload` for images. A model is named by the name of a published checkpoint (`w2s_jax.published`), a file as its
authors published it, a folder or hub id in Hugging Face's format, or the directory of a finished run of `vision_train`.
"""

from __future__ import annotations

import dataclasses
import os

import jax
import numpy as np

from w2s_jax import checkpoint as ckpt
from w2s_jax import config as config_lib
from w2s_jax import hub, metrics, published, runlog, workload
from w2s_jax import mesh as mesh_lib
from w2s_jax.data import images as images_lib
from w2s_jax.data import packing
from w2s_jax.data.examples import Examples, one_hot
from w2s_jax.errors import UserError
from w2s_jax.models import vision as models
from w2s_jax.trainable import merge_params, split_params

SUPERVISED = ("loss", "loss_args", "train", "head_init", "labels")  # keys that say nothing of contrastive pretraining


# --------------------------------------------------------------------------- models


def resolve(model: str, revision: str = "main") -> hub.Folder:
    """Where a model's files are: a folder, or a single file. Downloads what is not here.

    Raises:
      UserError: no such name, file or folder.
    """
    if model in published.PUBLISHED:
        return hub.Folder(str(published.fetch(model)))
    if os.path.isfile(os.path.expanduser(model)):
        return hub.Folder(os.path.abspath(os.path.expanduser(model)))
    return hub.resolve(model, revision)


def trained_run(model: str) -> runlog.LoadedRun | None:
    """The finished run whose directory `model` is, None where it is something else. UserError: an unfinished run, or another stage's."""
    return runlog.load_done(model, "vision_train") if hub.is_local(model) and workload.run_identity(model) else None


def read_config(model: str, revision: str = "main") -> models.VisionConfig:
    """What a model is, without its parameters. UserError: as `resolve` and `models.read_config`."""
    source = trained_run(model)
    if source is None:
        return models.read_config(resolve(model, revision).path)
    if not source.config.model:
        return models.read_config(f"{source.path}/model")
    return read_config(source.config.model, source.record.get("revision") or source.config.revision)


def outputs(model: str, revision: str = "main") -> int:
    """Classes that a model's own head gives, 0 where it has none."""
    source = trained_run(model)
    if source is None:
        return read_config(model, revision).classes
    return source.record["classes"] if source.config.objective == "supervised" else 0


def fingerprint(model: str, revision: str, planned: dict | None = None) -> str:
    """What identifies a model's content; `planned`: see `workload.fingerprint_model`."""
    if (planned and str(model) in planned) or (hub.is_local(model) and workload.run_identity(model)):
        return workload.fingerprint_run(model, planned)
    if model in published.PUBLISHED or os.path.isfile(os.path.expanduser(model)):
        return f"sha256:{hub.fingerprint_file(resolve(model).path)}"
    return workload.fingerprint_model(model, revision, planned)


def place(model, mesh_shape, folder: hub.Folder, seed: int = 0) -> workload.Loaded:
    """A model of `models.vision` with the parameters of its checkpoint on a mesh; `seed` initialises a new head."""
    mesh = mesh_lib.make_mesh(mesh_shape)
    shardings, fallen = mesh_lib.param_shardings(mesh, model.abstract)
    params = models.load(folder.path, model, shardings, jax.random.key(seed))
    return workload.Loaded(model, params, mesh, folder, fallen if mesh.size > 1 else [])


def open_model(name: str, revision: str, config, *, head: str, classes: int = 2, seed: int = 0) -> workload.Loaded:
    """Build and load a model; `config` gives dtype, mesh, and where it trains param_dtype, remat, head_init and dropout.

    `head`: own | new | none, see `models.vision.build`; of a run, own is the head that was trained.
    """
    source = trained_run(name)
    if source is None:
        folder = resolve(name, revision)
        return place(_build(config, models.read_config(folder.path), head, classes), config.mesh, folder, seed)
    if source.config.objective == "contrastive":
        return open_model(f"{source.path}/model", "main", config, head=head, classes=classes, seed=seed)
    whole = restore(source, config)
    if head == "own":
        return whole
    model = _build(config, whole.model.config, head, classes)
    fresh = jax.device_put(model.init_new(jax.random.key(seed)), mesh_lib.replicated(whole.mesh))
    return dataclasses.replace(whole, model=model, params={k: v for k, v in whole.params.items() if k != "head"} | fresh)


def _build(config, own: models.VisionConfig, head: str, classes: int) -> models.VisionModel:
    return models.build(own, head=head, classes=classes, dtype=config.dtype, param_dtype=config.get("param_dtype", "float32"),
                        remat=config.get("remat", "none"), head_init=config.get("head_init", "zeros"),
                        dropout=float(config.get("dropout", 0.0)))


def transform(config, own: models.VisionConfig) -> images_lib.Transform:
    """The preprocessing of the model's own, but for what the config sets (-1 and "auto" = the model's)."""
    kept = config.resize < 0 and config.crop < 0
    return images_lib.Transform(
        own.resize if config.resize < 0 else config.resize, own.crop if config.crop < 0 else config.crop,
        own.interpolation if config.interpolation == "auto" else config.interpolation, squeeze=own.squeeze and kept)


def loader(config, images: images_lib.ImageSet, own: models.VisionConfig) -> images_lib.Loader:
    """The images as a model sees them. UserError: they are smaller than a patch of it."""
    found = images_lib.Loader(images, transform(config, own), workers=config.workers, bad=config.bad_images)
    patch = getattr(own.architecture, "patch", 1)
    if min(found.size) < patch:
        raise UserError(f"config.crop: {config.crop}, so that images have {found.size[1]} x {found.size[0]} pixels; expected at least one "
                        f"patch of {patch}")
    return found


# --------------------------------------------------------------------------- what a run of vision_train is


def new_vit(config, images: images_lib.ImageSet) -> tuple[models.VisionConfig, images_lib.Loader]:
    """The vision transformer of `config.arch`, and the images as it sees them.

    Raises:
      UserError: they are no squares, or smaller than a patch.
    """
    usual = "bilinear" if config.interpolation == "auto" else config.interpolation
    whole = images_lib.Transform(max(config.resize, 0), max(config.crop, 0), usual)
    seen = images_lib.Loader(images, whole, workers=config.workers, bad=config.bad_images)
    height, width = seen.size
    if height != width:
        raise UserError(f"config.crop: {config.crop}, but the images are {width} x {height} pixels; expected a crop: a new model sees "
                        "squares")
    if config.arch.patch > height:
        raise UserError(f"config.arch.patch: {config.arch.patch}, but the images are {width} x {height} pixels; expected at most {height}")
    sizes = {key: config.arch[key] for key in ("width", "layers", "heads", "mlp", "patch")}
    return models.new_vit(image=height, resize=whole.resize, interpolation=whole.interpolation, **sizes), seen


def orders(config, n: int) -> list[np.ndarray]:
    """The batches of a run over `n` images.

    Raises:
      UserError: there is none, or none is left after the warm-up.
    """
    found = packing.batch_stream(n, config.batch_size, config.epochs, config.shuffle, config.seed)
    if not found:
        raise UserError(f"batch_size={config.batch_size}: {n} training images x {config.epochs:g} epochs do not fill one batch; expected "
                        f"at most {int(n * config.epochs)}")
    if config.warmup_steps >= len(found):
        raise UserError(f"warmup_steps={config.warmup_steps}: expected fewer than the run's {len(found)} steps")
    return found


def identity(config, fingerprints: dict) -> dict:
    """What a run of vision_train is; keys that its objective has no use for are None."""
    unused = SUPERVISED if config.objective == "contrastive" else ("contrast",)
    return config_lib.identity(config, fingerprints | dict.fromkeys(unused))


# --------------------------------------------------------------------------- data and results


def fingerprint_data(config, planned: dict | None = None, prepared=None) -> str:
    """What identifies a data set's content; a graph of runs, which passes `planned`, reads it once."""
    if prepared is not None:
        return prepared.images.fingerprint
    key = ("images", config.dataset, config.data_dir, config.dataset_split, config.classes, config.data_seed)
    if planned is None:
        return images_lib.prepare(config).images.fingerprint
    if key not in planned:
        planned[key] = images_lib.prepare(config).images.fingerprint
    return planned[key]


def examples(images: images_lib.ImageSet, rows) -> Examples:
    """Images as labelled documents: what label files and predictions are made of. Copies of one image are a group."""
    chosen = images.select(rows)
    return Examples(chosen.ids, None, None, one_hot(chosen.labels, chosen.n_classes), list(chosen.shas), None, list(chosen.shas))


def evaluate(logits: np.ndarray, documents: Examples) -> dict:
    """As `outcomes.evaluate`, and with more than five classes `top5`, `top5_ci`."""
    results = workload.evaluate(logits, documents)
    known = np.flatnonzero(documents.labels >= 0)
    if logits.shape[1] > 5 and len(known):
        groups = [documents.groups[i] for i in known]
        boot = metrics.Bootstrap(groups)
        found = metrics.estimate(boot, "top5", logits[known], documents.labels[known], boot.codes(groups))
        results |= {"top5": found.value, "top5_ci": metrics.interval(found.replicates)}
    return results


def restore(source: runlog.LoadedRun, config=None) -> workload.Loaded:
    """The model of a finished `vision_train` run, from its newest checkpoint, on the mesh of `config` (default: the run's own config).

    Raises:
      UserError: a run without a classifier or without a checkpoint; its base model changed.
    """
    trained = source.config
    if trained.get("stage") != "vision_train" or trained.objective != "supervised":
        experiment = trained.get("stage") == "vision"
        what = "an experiment, whose networks are the runs in runs/" if experiment else "a pretrained backbone, in model/"
        raise UserError(f"run={source.path}: holds {what}; expected a supervised run of the stage vision_train")
    config = trained if config is None else config
    checkpoints = ckpt.Checkpoints(source.path, read_only=True)
    try:
        steps = checkpoints.steps()
        if not steps:
            raise UserError(f"run={source.path}: has no checkpoint (keep={trained.get('keep')!r}); expected one with keep=params or all")
        if not trained.model:
            loaded = open_model(f"{source.path}/model", "main", config, head="own")
            loaded.step = steps[0]
            return loaded
        revision = source.record.get("revision") or trained.revision  # the commit that it was trained from, wherever main is now
        loaded = open_model(trained.model, revision, config, head="new", classes=source.record["classes"], seed=trained.seed)
        now, then = fingerprint(trained.model, revision), source.record["identity"]["model"]
        if now != then:
            raise UserError(f"run={source.path}: its base model {trained.model} is {now}, expected {then}: the files changed since")
        shardings, _ = mesh_lib.param_shardings(loaded.mesh, loaded.model.abstract)
        wanted, _ = split_params(loaded.model.abstract, trained.train)
        params, _ = checkpoints.restore(steps[0], ckpt.abstract(wanted, split_params(shardings, trained.train)[0]))
        loaded.params = merge_params(params, split_params(loaded.params, trained.train)[1])
        loaded.step = steps[0]
        return loaded
    finally:
        checkpoints.close()
