"""Probes on frozen features of a pretrained model: predict the test set, filter a student's training documents or relabel them;
or the features alone.

EleutherAI/w2s (probes on the strong model's middle layer; https://blog.eleuther.ai/weak-to-strong). There a filter or a
relabelling also touched the labels of the validation documents; here these are neither fitted nor changed.

Writes in the run directory: predict: predictions/test.parquet (and val.parquet), results.json as a finetune run's. filter:
predictions/<split>.parquet, the labels as they came with a column weight (1 = kept, 0 = left out), and <split>_random.parquet,
as many left out at random. relabel: predictions/<split>.parquet with the probe's predictions.
"""

from __future__ import annotations

import time

import numpy as np
from etils import epath

from w2s_jax import config as config_lib
from w2s_jax import features, hub, metrics, models, probes, registry, runlog, workload
from w2s_jax.data import labels as labels_lib
from w2s_jax.data import splits
from w2s_jax.errors import UserError
from w2s_jax.progress import say
from w2s_jax.runlog import Run


def resolve(config, trained=None):
    """The config with the model of the run that it names (`trained`: that run's config); as it is without one."""
    if trained is None:
        return config
    full = config.copy_and_resolve_references()
    with full.unlocked(), full.ignore_type():
        full.model, full.revision, full.param_dtype = trained.model, trained.revision, trained.param_dtype
    return full.lock()


def identity(config, planned: dict | None = None, task: str | None = None) -> dict:
    """What the run is: the model or run, the documents, the labels, the probe. Arguments as in the finetune stage."""
    fingerprints = {"run": "", "task": task or workload.fingerprint_task(config, planned),
                    "labels": workload.fingerprint_labels(config.labels, planned)}
    if config.run:
        trained = planned[config.run].config if planned and config.run in planned else runlog.load(config.run).config
        config = resolve(config, trained)
        fingerprints |= {"model": "", "run": workload.fingerprint_run(config.run, planned)}
    else:
        fingerprints["model"] = workload.fingerprint_model(config.model, config.revision, planned)
    if config.mode != "filter":
        fingerprints["contamination"] = None  # says nothing there
    if config.mode == "extract":
        fingerprints |= {"probe": None, "probe_args": None}
    return config_lib.identity(config, fingerprints)


def run(config, workdir, *, rerun: bool = False, prepared: splits.Prepared | None = None, labels: labels_lib.Labels | None = None,
        **_) -> dict:
    """Run the stage in `workdir` and return its results (those of results.json).

    Args:
      prepared, labels: the documents and the labels of `config`, where `stages.prepare` has read them already.

    Raises:
      UserError: bad input, found before anything is written; features that are not finite.
    """
    start = time.perf_counter()
    source = runlog.load_done(config.run, "finetune") if config.run else None
    prepared = prepared or splits.prepare(config)
    labels = labels or (labels_lib.read(config.labels) if config.labels else None)
    ident = identity(config, task=prepared.fingerprint)
    config = resolve(config, source and source.config)
    if (done := workload.finished(workdir, config, ident, rerun, summary)) is not None:
        return done
    with workload.precision(config):
        return _run(config, workdir, source, prepared, labels, ident, rerun, start)


def _run(config, workdir, source, prepared, labels, ident: dict, rerun: bool, start: float) -> dict:
    notes = list(prepared.notes)  # said once the input is known to be good
    if labels and labels.probs.shape[1] != 2:
        raise UserError(f"labels: {labels.path} has {labels.probs.shape[1]} classes, expected 2")
    opening = _opening(config, source)
    folder = hub.resolve(opening.model, opening.revision)
    arch = models.read_config(folder)
    layers = features.layer_numbers(config.layer, arch.layers)
    limits = workload.Limits(config.max_length, arch.max_positions, config.overlong)
    parts = workload.training_parts(prepared, labels, folder, limits, arch.vocab, notes)
    test, test_counts = workload.tokenized(prepared.test, folder, limits, arch.vocab, "test", notes)
    for name, part, labelled in (("train", parts.train, not labels), ("test", test, True)):  # the over-long are gone now
        splits.check_usable(part, name, config, labelled, f", max_length={config.max_length}")
    work = _Work(config, parts, test)

    store = features.Store(
        config.features or epath.Path(workdir) / "features", ident["run"] or ident["model"], workload.shown(config.run or config.model),
        pool=config.pool, dtype=opening.dtype, param_dtype=workload.param_dtype(opening, folder),
        matmul_precision=opening.matmul_precision)
    missing = store.missing(work.needed, layers)
    loaded = None
    if missing:  # a model that cannot be read is refused before anything is written
        loaded = workload.restore(source, opening) if source else workload.open_model(opening)
    stats: dict = {}
    with Run.open(workdir, config, ident, rerun=rerun) as run_:
        run_.start({
            "fingerprints": {"task": prepared.fingerprint}, "revision": folder.commit, "layers": layers, "feature_store": str(store.path),
            "mesh": dict(loaded.mesh.shape) if loaded else None, "lesser_sharding": loaded.replicated if loaded else [],
            "checkpoint": loaded.step if loaded and source else None, "parents": [p for p in (config.labels, config.run) if p]})
        for note in notes:
            say(note)
        what = "extract" if config.mode == "extract" else f"{config.mode} by {config.probe}, {len(work.fit)} documents to fit,"
        which = f"layers 0 to {arch.layers}" if len(layers) > 1 else f"layer {layers[0]} of {arch.layers}"
        say(f"{workload.shown(workdir)}: {what} on {which} of {workload.shown(config.run or config.model)}, {workload.shown(config.task)}, "
            f"{missing} of {len(work.needed)} documents without features yet")
        passed = time.perf_counter()
        if loaded:
            store.fill(config, loaded, work.needed, layers, stats=stats)
            loaded = None  # its memory is free for the probe
        passed, fitted = time.perf_counter() - passed, time.perf_counter()
        use = {"predict": work.predict, "filter": work.filter, "relabel": work.relabel, "extract": work.extract}[config.mode]
        results = use(run_, lambda part: store.get(part, layers[0]))
        results |= {
            "n_train": len(work.fit), "n_dropped": parts.dropped, "n_dropped_test": test_counts, "layers": list(layers),
            "n_features_computed": stats.get("documents", 0), "feature_batches": stats.get("batches", 0), "feature_seconds": passed,
            "probe_seconds": time.perf_counter() - fitted, "programs": len(stats.get("programs", ())),
            "compile_seconds": stats.get("compile_seconds", 0.0), "seconds": time.perf_counter() - start}
        run_.finish(results)
    say(f"{workload.shown(workdir)}: {summary(results)}" + (f", in {store.path}" if config.mode == "extract" else ""))
    if config.mode == "predict" and (warning := metrics.small_test_warning(results)):
        say(warning)
    return results


def _opening(config, source):
    """What the model is opened with: a run's own config with the types and devices of this one, or this one without a head to speak of."""
    if source is None:
        full = config.copy_and_resolve_references()
        changes = {"readout": "last", "head_init": "zeros", "remat": "none"}
    else:
        full = source.config.copy_and_resolve_references()
        changes = {key: config[key] for key in ("dtype", "matmul_precision", "attention", "eval_batch_size", "mesh")}
        changes["revision"] = source.record.get("revision") or full.revision
    with full.unlocked(), full.ignore_type():
        full.update(changes)
    return registry.fill(full)


class _Work:
    """The uses of a probe, and its features alone. `fit`: rows of the training documents whose labels count; `needed`: documents
    whose features do."""

    def __init__(self, config, parts: workload.Parts, test):
        self.config, self.parts, self.test = config, parts, test
        self.args = config_lib.probe_args(config)
        self.soft = parts.given.soft_labels[: len(parts.train), 1]
        weights = parts.given.weights
        self.fit = np.arange(len(parts.train)) if weights is None else np.flatnonzero(weights[: len(parts.train)] > 0)
        if not len(self.fit):
            raise UserError(f"labels: {config.labels} leaves no training document: all {len(parts.train)} have weight 0")
        if config.mode in ("filter", "relabel") and np.isnan(parts.given.soft_labels).any():
            bad = int(np.argmax(np.isnan(parts.given.soft_labels).any(1)))
            raise UserError(f"task={config.task!r}: validation document {parts.given.ids[bad]!r} has no label, expected one, or labels")
        wanted = [parts.train] if config.mode in ("filter", "relabel") else [parts.train, parts.val, test]
        self.needed = splits.concat(*(part for part in wanted if len(part)))

    def _data(self, read) -> tuple:
        """What a probe is fitted to: features [n, embed], soft labels [n]."""
        return read(self.parts.train.select(self.fit)), self.soft[self.fit]

    def _drawn(self) -> dict:
        return {"seed": self.config.seed, "groups": [self.parts.train.groups[row] for row in self.fit]}

    def extract(self, run_, read) -> dict:
        """Nothing further: the features are in the store."""
        return {"n_features": len(self.needed)}

    def predict(self, run_, read) -> dict:
        """Predictions of the test (and validation) documents."""
        fitted = probes.fit(self.config.probe, self.args, *self._data(read), **self._drawn())
        results = {"probe": fitted.info}
        for name, part in (("val", self.parts.val), ("test", self.test)):
            if len(part):
                logits = fitted.logits(read(part))
                workload.write_predictions(run_, name, part, logits)
                scores = workload.evaluate(logits, part)
                results |= scores if name == "test" else {f"{name}_{k}": v for k, v in scores.items()}
        return results

    def filter(self, run_, read) -> dict:
        """The labels with weights, once by the probe and once at random."""
        config, parts = self.config, self.parts
        chosen = probes.keep(config.probe, self.args, *self._data(read), config.contamination, **self._drawn())
        dropped = int((~chosen).sum())
        results = {"n": len(parts.given), "n_val": len(parts.val), "dropped": dropped, "dropped_fraction": dropped / len(self.fit)}
        results |= self._quality("", np.ones(len(self.fit), bool))
        for name, keep in (("", chosen), ("_random", probes.keep_random(len(self.fit), dropped, config.seed))):
            weights = np.ones(len(parts.given), np.float32) if parts.given.weights is None else parts.given.weights.copy()
            weights[self.fit[~keep]] = 0
            self._write(run_, config.split + name, probs=parts.given.soft_labels, weights=weights)
            results |= self._quality("_random" if name else "_filtered", keep)
        return results

    def relabel(self, run_, read) -> dict:
        """The probe's predictions for the training documents; those for validation keep their labels."""
        parts, n = self.parts, len(self.parts.train)
        fitted = probes.fit(self.config.probe, self.args, *self._data(read), **self._drawn())
        logits = fitted.logits(read(parts.train))
        probs = np.concatenate([labels_lib.softmax(logits), parts.given.soft_labels[n:]])
        logits = np.concatenate([logits, labels_lib.log(parts.given.soft_labels[n:])])
        self._write(run_, self.config.split, logits=logits, probs=probs, weights=parts.given.weights)
        before = parts.given.labels[:n]
        results = {"n": len(parts.given), "n_val": len(parts.val), "probe": fitted.info}
        results |= workload.evaluate(logits[:n], parts.train) | self._quality("", np.ones(len(self.fit), bool))
        return results | {"changed_fraction": float(np.mean(before != np.argmax(logits[:n], axis=1)))}

    def _write(self, run_, name: str, **columns) -> None:
        """Training and validation documents, with their truth."""
        documents = splits.concat(*(part for part in (self.parts.train, self.parts.val) if len(part)))
        workload.write_predictions(run_, name, documents, **columns)

    def _quality(self, name: str, keep: np.ndarray) -> dict:
        """Of the fitted documents whose truth is known: the accuracy of the kept labels; which of the left out and of the wrong."""
        truth = self.parts.train.labels[self.fit]
        known, wrong = truth >= 0, self.parts.given.labels[self.fit] != truth
        if not known.any():
            return {}
        out = {f"label_accuracy{name}": _mean(~wrong[known & keep])}
        if name:
            out |= {f"precision{name}": _mean(wrong[known & ~keep]), f"recall{name}": _mean(~keep[known & wrong])}
        return out


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def summary(results: dict) -> str:
    """The line that a finished run prints."""
    def shown(key):
        return "none" if results[key] is None else f"{results[key]:.3f}"

    if "dropped" in results:
        line = f"{results['dropped']} of {results['n_train']} documents left out ({results['dropped_fraction']:.1%})"
        if "label_accuracy" in results:
            line += (f", accuracy of the labels {shown('label_accuracy')} -> {shown('label_accuracy_filtered')} "
                     f"(at random {shown('label_accuracy_random')}), wrong among the left out {shown('precision_filtered')} "
                     f"(at random {shown('precision_random')})")
        return line
    if "n_features" in results:
        return f"features of {results['n_features']} documents at {len(results['layers'])} layer(s)"
    if "changed_fraction" in results:
        line = f"{results['n'] - results['n_val']} documents relabelled, {results['changed_fraction']:.1%} change class"
        if "label_accuracy" in results:
            line += f", accuracy of the labels {shown('label_accuracy')} -> {shown('accuracy')}"
        return line
    return workload.summary(results)
