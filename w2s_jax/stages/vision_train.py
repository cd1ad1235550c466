"""Train an image model: on ground truth, on labels, or on two changed views of each image without labels.

Sources: openai/weak-to-strong `vision/` (probes on frozen features: stage vision); Chen et al. 2020 (contrastive pretraining). Writes
the run directory that DESIGN.md describes: config.json, metrics.jsonl, checkpoints/, predictions/test.parquet, results.json; and, where
transformers has a class for it, model/ in Hugging Face's format: the classifier, or the backbone that was pretrained.
"""

from __future__ import annotations

import time

import jax
import numpy as np
from etils import epath

from w2s_jax import config as config_lib
from w2s_jax import feeding, forward, losses, metrics, optimizers, readings, train, views, vision, workload
from w2s_jax import mesh as mesh_lib
from w2s_jax.augment import Augment
from w2s_jax.data import images as images_lib
from w2s_jax.data import labels as labels_lib
from w2s_jax.errors import UserError
from w2s_jax.models import vision as models
from w2s_jax.progress import Progress, say
from w2s_jax.runlog import Run

HARDENED = ("logconf", "logconf_openai", "adaptconf")  # losses whose targets hold the student's own arg max


def identity(config, planned: dict | None = None, prepared=None, labels: labels_lib.Labels | None = None) -> dict:
    """What the run is; `planned` = the runs that a graph of runs will make, `prepared`, `labels` = its images and labels where they are
    read."""
    given = workload.fingerprint_labels(config.labels, planned, labels)
    return vision.identity(config, {
        "dataset": vision.fingerprint_data(config, planned, prepared), "data_dir": None, "dataset_split": None, "classes": None,
        "model": vision.fingerprint(config.model, config.revision, planned) if config.model else None, "labels": given})


def run(config, workdir, *, rerun: bool = False, prepared: images_lib.Prepared | None = None,
        labels: labels_lib.Labels | None = None, **_) -> dict:
    """Run the stage in `workdir` and return its results (those of results.json).

    Args:
      prepared, labels: the images and the labels of `config`, where `stages.prepare` has read them already.

    Raises:
      UserError: bad input, found before anything is written; a non-finite loss.
    """
    start = time.perf_counter()
    prepared = prepared or images_lib.prepare(config)
    labels = labels or (labels_lib.read(config.labels) if config.labels else None)
    ident = identity(config, prepared=prepared, labels=labels)
    if (done := workload.finished(workdir, config, ident, rerun, summary)) is not None:
        return done
    with workload.precision(config):
        return _run(config, workdir, prepared, labels, ident, rerun, start)


def _open(config, prepared: images_lib.Prepared) -> tuple[workload.Loaded, images_lib.Loader]:
    """The model (a new one where none is named) on its mesh, and the images as it sees them."""
    head = "none" if config.objective == "contrastive" else "new"
    classes = prepared.images.n_classes
    if config.model:
        loaded = vision.open_model(config.model, config.revision, config, head=head, classes=classes, seed=config.seed)
        return loaded, vision.loader(config, prepared.images, loaded.model.config)
    sizes, images = vision.new_vit(config, prepared.images)
    model = models.build(sizes, head=head, classes=classes, dtype=config.dtype, param_dtype=config.param_dtype, remat=config.remat,
                         head_init=config.head_init, dropout=float(config.dropout))
    mesh = mesh_lib.make_mesh(config.mesh)
    shardings, _ = mesh_lib.param_shardings(mesh, model.abstract)
    params = _drawn((model, mesh, "init"), model.init, shardings, config.seed)
    return workload.Loaded(model, params, mesh, None, mesh_lib.lesser(model, mesh)), images


def _drawn(name, init, shardings: dict, seed: int) -> dict:
    """Parameters by `init(key)`, in place; compiled once in a process, since an experiment asks for as many as there are seeds."""
    key = jax.random.key(seed)
    return forward.compiled(name, lambda: jax.jit(init, out_shardings=shardings).lower(key).compile())(key)


def _given(config, prepared, labels, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, int]:
    """Rows trained on, their labels `[rows, classes]` and weights, and how many rows labels of weight 0 leave out."""
    documents = vision.examples(prepared.images, rows)
    if labels is None:
        return rows, documents.soft_labels, None, 0
    if labels.probs.shape[1] != prepared.images.n_classes:
        raise UserError(f"labels: {labels.path} has {labels.probs.shape[1]} classes, expected {prepared.images.n_classes}")
    # An image that cannot be decoded is left out here: its label may stand in the file.
    skipped = frozenset(prepared.images.ids[r] for r in prepared.bad)
    given = labels_lib.attach(documents, labels, skipped, things="images",
                              why="dataset, data_seed, split, n_weak and n_train must be those of the run that labelled")
    if given.weights is None:
        return rows, given.soft_labels, None, 0
    kept = np.flatnonzero(given.weights > 0)
    if not len(kept):
        raise UserError(f"labels: {labels.path} leaves no training image: all {len(rows)} have weight 0")
    weights = given.weights[kept]
    return rows[kept], given.soft_labels[kept], None if len(np.unique(weights)) == 1 else weights / weights.mean(), len(rows) - len(kept)


def _program(config, loaded: workload.Loaded, soft_labels: np.ndarray) -> train.Program:
    augment = Augment(**{key: config.augment[key] for key in config.augment})
    optimizer = optimizers.make(config.optimizer, config_lib.optimizer_args(config), weight_decay=config.weight_decay,
                                grad_clip=config.grad_clip)
    if config.objective == "contrastive":
        model = views.Contrastive(loaded.model, augment, config.contrast.width, config.contrast.outputs)
        loss = losses.make("contrastive", {"temperature": config.contrast.temperature}, ground_truth=True)
        return train.Program(model, loss, optimizer, loaded.mesh)
    loss = losses.make(config.loss, config_lib.loss_args(config), ground_truth=not config.labels,
                       label_stats=losses.label_statistics(soft_labels))
    return train.Program(views.Augmented(loaded.model, augment), loss, optimizer, loaded.mesh, config.train)


def _run(config, workdir, prepared, labels, ident: dict, rerun: bool, start: float) -> dict:
    notes = list(prepared.notes)  # said once the input is known to be good
    loaded, images = _open(config, prepared)
    if config.objective == "contrastive":
        try:
            models.check_save(loaded.model.config)
        except UserError as error:
            raise UserError(f"config.model: {config.model!r} cannot be pretrained: what is kept of it is its model/, but {error}") from None
    prepared = prepared.decoded(images, notes)
    supervised, classes = config.objective == "supervised", prepared.images.n_classes
    rows, test = prepared.part(config.split), prepared.split.test
    rows, soft, weights, filtered = _given(config, prepared, labels, rows) if supervised else (rows, np.zeros((len(rows), 1)), None, 0)
    batches = vision.orders(config, len(rows))
    program = _program(config, loaded, soft)
    notes += [notice for notice in (program.loss.notice, program.optimizer.notice) if notice]
    if supervised and config.head_init == "zeros" and config.loss in HARDENED and classes > 2:
        notes.append(f"loss={config.loss}: with head_init=zeros every image's hardened answer begins as class 0, and may stay so; "
                     "head_init=normal begins without that")
    ids = [prepared.images.ids[r] for r in rows]
    corpus = feeding.Images(lambda documents: images.pixels(rows[documents]), images.size, soft.astype(np.float32), ids, weights)
    plan = feeding.make_plan(config, program.model, corpus, batches, loaded.mesh)
    rates = optimizers.learning_rates(config.schedule, config.learning_rate, len(batches), config.warmup_steps)
    if not supervised:
        new, _ = mesh_lib.param_shardings(loaded.mesh, program.model.abstract)
        drawn = _drawn((program.model, loaded.mesh, "init"), program.model.init_new, {"projector": new["projector"]}, config.seed)
        loaded.params |= drawn
    stats: dict = {}

    with Run.open(workdir, config, ident, rerun=rerun) as run_:
        run_.start({
            "fingerprints": {"dataset": prepared.images.fingerprint}, "revision": loaded.folder.commit if loaded.folder else "",
            "mesh": dict(loaded.mesh.shape), "classes": classes, "class_names": list(prepared.images.class_names),
            "pixels": list(images.size), "images_a_cell": plan.slots, "microbatches": plan.microbatches, "steps": len(batches),
            "lesser_sharding": loaded.replicated,
            "parents": [config.labels] if config.labels else []})
        for note in notes:
            say(note)
        what = f"loss {config.loss}" if supervised else "contrastive, without labels"
        name = workload.shown(config.model) if config.model else "a new vision transformer"
        say(f"{workload.shown(workdir)}: {name} on {workload.shown(prepared.images.name)}, {what}, {len(rows)} images of "
            f"{images.size[1]} x {images.size[0]}, {len(batches)} steps of {config.batch_size}")
        documents = vision.examples(prepared.images, test)

        def predicted(params, progress=None) -> np.ndarray:
            return readings.predict(config, loaded.model, params, images, test, loaded.mesh, stats=stats, progress=progress)

        def evaluated(params) -> dict:
            found = vision.evaluate(predicted(params), documents)
            return {f"test_{key}": found[key] for key in ("accuracy", "top5") if key in found}

        params = train.train(config, program, loaded.params, corpus, plan, rates, run_, on_eval=evaluated if supervised else None,
                             label=f"train {config.loss if supervised else 'contrastive'}", stats=stats)
        results: dict = {}
        if supervised:
            with Progress(len(test), label="test", unit="img") as progress:
                logits = predicted(params, progress)
            workload.write_predictions(run_, "test", documents, logits)
            results = vision.evaluate(logits, documents)
        results |= {
            "n_train": len(rows), "n_unused": int(len(rows) * config.epochs) - sum(len(b) for b in batches), "steps": len(batches),
            "n_dropped": {"undecodable": len(prepared.bad), "filtered": filtered}, "undecodable": prepared.named_bad(),
            "saved": _save(run_, params, loaded.model, prepared.images), "programs": len(stats.get("programs", ())),
            "compile_seconds": stats.get("compile_seconds", 0.0), "seconds": time.perf_counter() - start}
        train.finish_checkpoints(config, run_)
        run_.finish(results)
    say(f"{workload.shown(workdir)}: {summary(results)}")
    if supervised and (warning := metrics.small_test_warning(results, things="images")):
        say(warning)
    return results


def _save(run_, params: dict, model, images) -> str:
    """Write model/ where transformers has a class for it; returns the folder's name, or why there is none."""
    try:
        models.save(epath.Path(run_.path) / "model", {k: params[k] for k in model.abstract}, model,
                    images.class_names if model.head != "none" else ())
    except UserError as error:
        return f"not written: {error}"
    return "model"


def summary(results: dict) -> str:
    """The line that a finished run prints."""
    if "accuracy" not in results:
        return f"pretrained on {results['n_train']} images, {results['steps']} steps"
    return workload.summary(results, "images") + (f", top-5 {results['top5']:.3f}" if "top5" in results else "")
