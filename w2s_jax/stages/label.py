"""Label documents with a trained run, fast: only parameters are restored, and documents are packed in any order.

Burns et al. 2023, section 3 (weak labels on held-out data); openai/weak-to-strong `train_simple.py` (weak_labels).
"""

from __future__ import annotations

import time

from etils import epath

from w2s_jax import registry, runlog, workload
from w2s_jax.data import splits
from w2s_jax.files import plain
from w2s_jax.progress import say
from w2s_jax.runlog import Run

INHERITED = ("task", "task_dir", "n_train", "n_test", "max_length", "overlong", "dtype")  # empty or unset = the run's


def resolve(config, trained):
    """The config with the run's own values where it leaves them open, and the run's data keys.

    Args:
      config: as `configs/label.py` gives it.
      trained: the resolved config of the run that labels.
    """
    full = trained.copy_and_resolve_references()
    with full.unlocked(), full.ignore_type():
        full.stage, full.labels = "label", ""
        for key in INHERITED:
            if config[key] not in (None, ""):
                full[key] = config[key]
        full.mesh, full.eval_batch_size, full.attention = config.mesh, config.eval_batch_size, config.attention
        # `split` says what is labelled; the part that the run trained on only decides which documents `val` means.
        full.label_split, full.file, full.run = config.split, config.file, config.run
    return registry.fill(full)


def identity(config, planned: dict | None = None, task: str | None = None) -> dict:
    """What the labelling is: the run that labels, and the documents. Arguments as in the finetune stage."""
    trained = planned[config.run].config if planned and config.run in planned else runlog.load(config.run).config
    full = resolve(config, trained)
    if task is None:
        task = splits.read_documents(full.file)[1] if full.file else workload.fingerprint_task(full, planned)
    keys = ("stage", "data_seed", "n_train", "n_val", "n_test", "test_fraction", "group", "balance", "split", "label_split", "shuffle",
            "max_length", "overlong", "dtype", "matmul_precision")
    return plain({k: full[k] for k in keys} | {"task": task, "run": workload.fingerprint_run(full.run, planned)})


def run(config, workdir, *, rerun: bool = False, **_) -> dict:
    """Write `predictions/<split>.parquet` and return the results.

    Raises:
      UserError: the run has no checkpoint, its base model changed, or there is nothing to label.
    """
    start = time.perf_counter()
    source = runlog.load_done(config.run, "finetune")
    full = resolve(config, source.config)
    if full.file:
        examples, task = splits.read_documents(full.file)
        notes, name = [], epath.Path(full.file).name.split(".")[0]
    else:
        prepared = splits.prepare(full, only=full.label_split)
        examples, task, notes, name = prepared.wanted, prepared.fingerprint, prepared.notes, full.label_split
    ident = identity(config, task=task)
    if (done := workload.finished(workdir, full, ident, rerun)) is not None:
        return done
    with workload.precision(full):
        return _run(full, workdir, source, examples, name, notes, ident, rerun, start)


def _run(full, workdir, source, examples, name: str, notes: list[str], ident: dict, rerun: bool, start: float) -> dict:
    stats: dict = {}
    loaded = workload.restore(source, full)
    limits = workload.Limits(full.max_length, loaded.model.config.max_positions, full.overlong)
    examples, counts = workload.tokenized(examples, loaded.folder, limits, loaded.model.config.vocab, name, notes)
    with Run.open(workdir, full, ident, rerun=rerun) as run_:
        run_.start({"mesh": dict(loaded.mesh.shape), "parents": [str(full.run)], "checkpoint": loaded.step})
        for note in notes:
            say(note)
        passed = time.perf_counter()
        logits = workload.predict(full, loaded.model, loaded.params, examples, loaded.mesh, label=f"label {name}", stats=stats)
        passed = time.perf_counter() - passed
        workload.write_predictions(run_, name, examples, logits)
        useful = sum(len(t) for t in examples.tokens)
        results = workload.evaluate(logits, examples) | {
            "n": len(examples), "n_dropped": counts, "tokens_per_second": useful / passed, "programs": len(stats.get("programs", ())),
            "compile_seconds": stats.get("compile_seconds", 0.0), "seconds": time.perf_counter() - start}
        run_.finish(results)
    say(f"{workload.shown(workdir)}: {name} labelled, {workload.summary(results)}")
    return results
