"""Fine-tune a pretrained model on ground truth or on labels: weak supervisor, strong ceiling, strong student.

Burns et al. 2023, section 3; openai/weak-to-strong `train_simple.py`. Writes the run directory that
DESIGN.md describes: config.json, metrics.jsonl, checkpoints/, predictions/test.parquet, results.json.
"""

from __future__ import annotations

import time

import numpy as np

from w2s_jax import config as config_lib
from w2s_jax import feeding, forward, hub, ladder, losses, metrics, optimizers, peft, selection, train, workload
from w2s_jax.data import labels as labels_lib
from w2s_jax.data import packing, splits
from w2s_jax.data.examples import Examples
from w2s_jax.errors import UserError
from w2s_jax.progress import say
from w2s_jax.runlog import Run


def identity(config, planned: dict | None = None, task: str | None = None) -> dict:
    """What the run is; `planned` = the runs that a sweep will make, `task` = its fingerprint where it is known."""
    ident = config_lib.identity(config, {
        "model": workload.fingerprint_model(config.model, config.revision, planned),
        "task": task or workload.fingerprint_task(config, planned),
        "labels": workload.fingerprint_labels(config.labels, planned),
        "stats_labels": workload.fingerprint_labels(config.stats_labels, planned)})
    if ident["lora"]:
        ident["lora"]["init"] = f"sha256:{peft.fingerprint(config.lora.init)}" if config.lora.init else ""
    return ident


def _training_examples(prepared, labels, folder, limits, vocab, notes) -> tuple[Examples, Examples | None, np.ndarray, dict]:
    """Training documents with the labels that are trained on (those that these weigh 0 are left out), validation documents with
    their truth (None without), the labels that would be trained on of these, `[documents, classes]`, and what was dropped."""
    parts = workload.training_parts(prepared, labels, folder, limits, vocab, notes)
    fit, dropped = parts.given.select(range(len(parts.train))), parts.dropped
    if fit.weights is not None:
        kept = np.flatnonzero(fit.weights > 0)
        dropped["filtered"] = len(fit) - len(kept)
        notes.append(f"training: {dropped['filtered']} of {len(fit)} documents have labels of weight 0 and are left out")
        if not len(kept):
            raise UserError(f"labels: {labels.path} leaves no training document: all {len(fit)} have weight 0")
        fit = fit.select(kept)
    return fit, parts.val if len(parts.val) else None, parts.given.soft_labels[len(parts.train):], dropped


def run(config, workdir, *, rerun: bool = False, prepared: splits.Prepared | None = None, labels: labels_lib.Labels | None = None,
        **_) -> dict:
    """Run the stage in `workdir` and return its results (those of results.json).

    Args:
      prepared, labels: the documents and the labels of `config`, where `stages.prepare` has read them already.

    Raises:
      UserError: bad input, found before anything is written; a non-finite loss.
    """
    start = time.perf_counter()
    prepared = prepared or splits.prepare(config)
    labels = labels or (labels_lib.read(config.labels) if config.labels else None)
    ident = identity(config, task=prepared.fingerprint)
    if (done := workload.finished(workdir, config, ident, rerun)) is not None:
        return done
    with workload.precision(config):
        return _run(config, workdir, prepared, labels, ident, rerun, start)


def _run(config, workdir, prepared, labels, ident: dict, rerun: bool, start: float) -> dict:
    notes = list(prepared.notes)  # said once the input is known to be good
    folder = hub.resolve(config.model, config.revision)
    model = workload.build(config, folder)  # its sizes; what mesh, microbatch and remat it gets depends on the documents
    if labels and labels.probs.shape[1] != model.classes:
        raise UserError(f"labels: {labels.path} has {labels.probs.shape[1]} classes, expected {model.classes}")
    limits = workload.Limits(config.max_length, model.config.max_positions, config.overlong)
    fit, val, given, dropped = _training_examples(prepared, labels, folder, limits, model.config.vocab, notes)
    test, test_counts = workload.tokenized(prepared.test, folder, limits, model.config.vocab, "test", notes)
    for name, part, labelled in (("train", fit, not labels), ("test", test, True)):  # the over-long are gone now
        splits.check_usable(part, name, config, labelled, f", max_length={config.max_length}")

    batches = packing.batch_stream(len(fit), config.batch_size, config.epochs, config.shuffle, config.seed)
    if not batches:
        raise UserError(f"batch_size={config.batch_size}: {len(fit)} training documents x {config.epochs} epochs do not fill one batch; "
                        f"expected at most {int(len(fit) * config.epochs)}")
    if config.warmup_steps >= len(batches):
        raise UserError(f"warmup_steps={config.warmup_steps}: expected fewer than the run's {len(batches)} steps")
    truth = not config.labels
    loss = losses.make(config.loss, config_lib.loss_args(config), ground_truth=truth, label_stats=_statistics(config, fit))
    rates = optimizers.learning_rates(config.schedule, config.learning_rate, len(batches), config.warmup_steps)
    weights = None if fit.weights is None or len(np.unique(fit.weights)) == 1 else fit.weights / fit.weights.mean()
    corpus = feeding.Texts(fit.tokens, fit.soft_labels, np.ones(len(fit), np.float32), fit.ids, weights)
    stats: dict = {}
    fitted = ladder.fit(config, lambda c: workload.build(c, folder), corpus, batches, loss, optimizers.of, kind=config.train, stats=stats)
    config, plan, program = fitted.config, fitted.plan, fitted.program
    with ladder.answered("loading", fitted):
        loaded = workload.open_model(config, seed=config.seed)
    model, mesh = loaded.model, loaded.mesh
    notes += [notice for notice in (loss.notice, program.optimizer.notice, fitted.line) if notice]

    with Run.open(workdir, config, ident, rerun=rerun) as run_, ladder.answered("training", fitted):
        run_.start({
            "fingerprints": {"task": prepared.fingerprint}, "revision": loaded.folder.commit, "mesh": dict(mesh.shape),
            "shapes": [[s.rows, s.time] for s in plan.shapes], "cells": plan.cells, "microbatches": plan.microbatches,
            "steps": len(batches), "lesser_sharding": loaded.replicated, "memory": fitted.record,
            "parents": [config.labels] if config.labels else [],
        })
        for note in notes:
            say(note)
        say(f"{workload.shown(workdir)}: {workload.shown(config.model)} on {workload.shown(config.task)}, loss {config.loss}, "
            f"{len(fit)} documents, {len(batches)} steps of {config.batch_size}, "
            f"shapes {', '.join(f'{s.rows}x{s.time}' for s in plan.shapes)}, padding {plan.padding_fraction:.1%}")
        evaluator = _Evaluator(config, model, mesh, {"val": val, "test": test}, given, stats, held=fitted.memory.optimizer_state)
        params = train.train(config, program, loaded.params, corpus, plan, rates, run_, on_eval=evaluator,
                             label=f"train {config.loss}", stats=stats)
        results = evaluator.final(params, run_)
        results |= {
            "n_train": len(fit), "n_unused": int(len(fit) * config.epochs) - sum(len(b) for b in batches), "steps": len(batches),
            "selected": {"select": config.select, "oracle": config.select == "oracle"} | stats.get("selected", {"step": len(batches)}),
            "n_dropped": dropped, "n_dropped_test": test_counts, "padding_fraction": plan.padding_fraction,
            "programs": len(stats.get("programs", ())), "compile_seconds": stats.get("compile_seconds", 0.0),
            "seconds": time.perf_counter() - start,
        }
        train.finish_checkpoints(config, run_)
        run_.finish(results)
    say(f"{workload.shown(workdir)}: {workload.summary(results)}")
    if warning := metrics.small_test_warning(results):
        say(warning)
    return results


def _statistics(config, fit: Examples) -> dict:
    """What the loss may ask of a label set: of the labels trained on, or of those of the same documents in `config.stats_labels`."""
    if not config.stats_labels:
        return losses.label_statistics(fit.soft_labels)
    given = labels_lib.read(config.stats_labels)
    at = {i: row for row, i in enumerate(given.ids)}
    if absent := [i for i in fit.ids if i not in at]:
        raise UserError(f"stats_labels: {given.path} has no label for {len(absent)} of {len(fit)} documents, the first {absent[0]!r}")
    return losses.label_statistics(given.probs[[at[i] for i in fit.ids]])


class _Evaluator:
    """Evaluations of the validation and test documents; each set is packed once. `given`: the validation documents' labels as they
    would be trained on. `held`: bytes of a device that training keeps meanwhile."""

    def __init__(self, config, model, mesh, sets: dict, given: np.ndarray, stats: dict, held: int):
        self.config, self.model, self.mesh, self.given, self.stats, self.held = config, model, mesh, given, stats, held
        self.sets = {k: v for k, v in sets.items() if v is not None and len(v)}
        self.packed: dict = {}

    def _logits(self, name: str, params) -> np.ndarray:
        examples = self.sets[name]
        if name not in self.packed:
            self.packed[name] = forward.pack(
                examples.tokens, self.mesh, embed=self.model.config.embed,
                tokens_per_batch=workload.forward_tokens(self.config, examples.tokens, self.mesh, self.model, self.held))
        return forward.forward(self.model, params, self.packed[name], len(examples), self.mesh, stats=self.stats)

    def __call__(self, params) -> dict:
        """Accuracy and AUROC of each set, for metrics.jsonl; where a step is selected, of the validation documents alone, and its score."""
        row, selects = {}, self.config.select != "last"
        for name, examples in self.sets.items():
            if selects and name == "test":  # it is often the larger set, and must not play a part
                continue
            logits = self._logits(name, params)
            result = workload.evaluate(logits, examples)
            row |= {f"{name}_{k}": result.get(k) for k in ("accuracy", "auroc")}
            if selects:
                row["select_score"] = selection.score(self.config.select, logits, self.given, examples.labels)
        say(", ".join(f"{k} {v:.4g}" for k, v in row.items() if v is not None))
        return row

    def final(self, params, run_) -> dict:
        """Predictions of every set on disk, and the results on the test documents."""
        results = {}
        for name, examples in self.sets.items():
            logits = self._logits(name, params)
            workload.write_predictions(run_, name, examples, logits)
            scores = workload.evaluate(logits, examples)
            results |= scores if name == "test" else {f"{name}_{k}": v for k, v in scores.items()}
        return results
