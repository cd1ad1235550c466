"""Prompt a pretrained decoder: the log-likelihoods of two answers after each document, zero-shot or few-shot.

Burns et al. 2023, section 5.2.1 (prompting as a baseline, with ground truth and with weak labels); likelihoods as in
EleutherAI/lm-evaluation-harness. Writes config.json, predictions/<split>.parquet and results.json, as finetune and label do.
"""

from __future__ import annotations

import collections
import dataclasses
import time

import jax
import numpy as np

from w2s_jax import config as config_lib
from w2s_jax import forward, metrics, models, workload
from w2s_jax.data import prompts
from w2s_jax.errors import UserError
from w2s_jax.progress import Progress, say
from w2s_jax.runlog import Run


def identity(config, planned: dict | None = None, task: str | None = None) -> dict:
    """What the run is. Arguments as in the finetune stage."""
    return config_lib.identity(prompts.resolve(config), {
        "model": workload.fingerprint_model(config.model, config.revision, planned),
        "task": task or workload.fingerprint_task(config, planned),
        "labels": workload.fingerprint_labels(config.labels, planned)})


@dataclasses.dataclass(frozen=True)
class _Continuations:
    """Log-likelihoods of the targets, in the place of a head: `apply` gives float32 `[cells, slots, 2]`."""

    model: models.Model

    @property
    def config(self):
        return self.model.config

    def apply(self, params, batch) -> jax.Array:
        return self.model.continuations(params, batch)


# --------------------------------------------------------------------------- likelihoods and calibration


def answer_logp(model, params, asked: list[prompts.Prompt], mesh, config, stats: dict, label: str = "prompt") -> np.ndarray:
    """Log-likelihood in nats of each prompt's two answers given its context, the sum over their tokens; float32 `[prompts, 2]`.

    A forward pass takes inputs: a prompt and an answer without its last token. Answers of one token share their input.
    """
    inputs, targets, place = [], [], np.zeros((len(asked), 2), int)
    longest = max(len(ids) - prompt.context for prompt in asked for ids in prompt.sequences)
    for row, prompt in enumerate(asked):
        for which, ids in enumerate(prompt.sequences):
            if which == 0 or not np.array_equal(ids[:-1], inputs[-1]):
                inputs.append(ids[:-1])
                targets.append(np.full((2, longest), -1, np.int32))
            targets[-1][which, longest - len(ids) + prompt.context :] = ids[prompt.context :]
            place[row, which] = len(inputs) - 1
    with Progress(len(inputs), label=label, unit="prompt") as progress:
        found = forward.predict(_Continuations(model), params, inputs, mesh, stats=stats, progress=progress,
                                tokens_per_batch=workload.forward_tokens(config, inputs, mesh, model), extra={"targets": np.stack(targets)})
    return np.stack([found[place[:, which], which] for which in range(2)], axis=1)


def log_prior(logp: np.ndarray) -> np.ndarray:
    """What is subtracted to calibrate: the log of the mean of the answers' probabilities (which sum to 1) over rows `[n, 2]`, float64 [2].

    Rows of content-free documents: contextual calibration (Zhao et al. 2021, arXiv 2102.09690: W = diag(p)^-1, b = 0). The rows
    that are predicted themselves: batch calibration (Zhou et al. 2023, arXiv 2309.17249), which sees no label, but all documents.
    """
    z = logp.astype(np.float64)
    return np.log(np.mean(np.exp(z - np.logaddexp(z[:, 0], z[:, 1])[:, None]), axis=0))


def _calibrated(config, logp: np.ndarray, used: np.ndarray, free: dict[int, np.ndarray]) -> tuple[np.ndarray, dict]:
    """Logits, float32 `[n, 2]`, and what the results say of the calibration.

    `used`: how many shots each document has; `free`: by number of shots, the likelihoods of the content-free documents.
    """
    if config.calibrate == "none":
        return logp, {}
    prior = {shots: log_prior(rows) for shots, rows in free.items()} if config.calibrate == "content_free" else {
        shots: log_prior(logp) for shots in np.unique(used)}
    logits = logp - np.stack([prior[shots] for shots in used])
    return logits.astype(np.float32), {"prior": {str(shots): np.exp(p) for shots, p in sorted(prior.items())}}


# --------------------------------------------------------------------------- the run


def _fitting(config, prepared: prompts.Prepared, folder, limits: workload.Limits, notes: list[str]) -> tuple:
    """`(documents, their prompts, shots in each, counts)`: shots are left out, the farthest first, until a prompt fits; then `overlong`."""
    how, documents = prompts.style(config), prepared.documents
    counts = {"overlong": 0, "truncated": 0}
    made: dict[int, prompts.Prompt] = {}
    used = np.zeros(len(documents), int)
    waiting = list(range(len(documents)))
    for shots in range(config.shots, -1, -1):
        shown = prepared.shots.select(range(config.shots - shots, config.shots))
        encoded = prompts.encode(folder, how, shown, [documents.texts[i] for i in waiting])
        for i, prompt in zip(waiting, encoded):
            made[i], used[i] = prompt, shots
        waiting = [i for i in waiting if not limits.fits(made[i].length)]
        if not waiting:
            break
    if waiting and limits.overlong == "error":
        i = waiting[0]
        raise UserError(f"overlong=error: the prompt of document {documents.ids[i]} has {made[i].length} tokens without shots; "
                        f"max_length={limits.max_length}, the model has {limits.positions} positions; expected shorter documents, or "
                        "overlong=drop or truncate")
    if limits.overlong == "truncate":
        for i in waiting:
            made[i] = prompts.shorten(folder, how, documents.texts[i], made[i], limits.cut)
        counts["truncated"] = len(waiting)
    else:
        counts["overlong"] = len(waiting)
    gone = set(waiting) if limits.overlong == "drop" else set()
    keep = [i for i in range(len(documents)) if i not in gone]
    if not keep:
        raise UserError(f"max_length={limits.max_length}: none of the {len(documents)} prompts fits; expected a larger max_length")
    used = used[keep]
    said = [f"{n} {k}" for k, n in counts.items() if n]
    if fewer := int((used < config.shots).sum()):
        said.append(f"{fewer} with fewer than {config.shots} shots (mean {used.mean():.2f})")
    if said:
        notes.append(f"{config.split}: of {len(documents)} prompts {', '.join(said)} "
                     f"(max_length {limits.max_length}, positions {limits.positions}, overlong={limits.overlong})")
    return documents.select(keep), [made[i] for i in keep], used, counts


def _content_free(config, prepared: prompts.Prepared, folder, used: np.ndarray, limits: workload.Limits) -> dict[int, list]:
    """By number of shots, the prompts of documents that say nothing."""
    out = {}
    for shots in np.unique(used):
        shown = prepared.shots.select(range(config.shots - shots, config.shots))
        encoded = prompts.encode(folder, prompts.style(config), shown, list(prompts.CONTENT_FREE))
        out[int(shots)] = [p for p in encoded if p.context and limits.fits(p.length)]
        if not out[int(shots)]:
            raise UserError(f"calibrate='content_free': no content-free prompt with {shots} shots fits max_length={limits.max_length}; "
                            "expected a larger max_length")
    return out


def run(config, workdir, *, rerun: bool = False, prepared: prompts.Prepared | None = None, **_) -> dict:
    """Write `predictions/<split>.parquet` and return the results (those of results.json).

    Args:
      prepared: the documents and shots of `config`, where `stages.prepare` has read them already.

    Raises:
      UserError: bad input, found before anything is written; an encoder, which predicts no next token.
    """
    start = time.perf_counter()
    full = prompts.resolve(config)
    prepared = prepared or prompts.prepare(full)
    ident = identity(full, task=prepared.fingerprint)
    if (done := workload.finished(workdir, full, ident, rerun)) is not None:
        return done
    with workload.precision(full):
        return _run(full, workdir, prepared, ident, rerun, start)


def _opened(config) -> workload.Loaded:
    """The language model, built for forward passes."""
    full = config.copy_and_resolve_references()
    with full.unlocked(), full.ignore_type():
        full.remat, full.readout, full.head_init = "none", "auto", "zeros"
    return workload.open_model(full, head="lm")


def _run(config, workdir, prepared: prompts.Prepared, ident: dict, rerun: bool, start: float) -> dict:
    notes, stats = list(prepared.notes), {}
    loaded = _opened(config)
    model, folder = loaded.model, loaded.folder
    limits = workload.Limits(config.max_length, model.config.max_positions, config.overlong)
    documents, asked, used, counts = _fitting(config, prepared, folder, limits, notes)
    free = _content_free(config, prepared, folder, used, limits) if config.calibrate == "content_free" else {}
    every = asked + [prompt for rows in free.values() for prompt in rows]
    largest = max(int(ids.max()) for prompt in every for ids in prompt.sequences)
    if largest >= model.config.vocab:
        raise UserError(f"model={config.model}: its tokenizer gives token id {largest}, expected ids from 0 to {model.config.vocab - 1}")
    shown = prepared.shots
    with Run.open(workdir, config, ident, rerun=rerun) as run_:
        run_.start({
            "fingerprints": {"task": prepared.fingerprint}, "revision": folder.commit, "mesh": dict(loaded.mesh.shape),
            "lesser_sharding": loaded.replicated, "parents": [config.labels] if config.labels else [],
            "shots": [{"id": i, "answer": config.answers[label]} for i, label in zip(shown.ids, shown.labels)],
        })
        for note in notes:
            say(note)
        lengths = sorted({tuple(len(ids) - p.context for ids in p.sequences) for p in asked})
        say(f"{workload.shown(workdir)}: {workload.shown(config.model)} on {workload.shown(config.task)}, {config.shots} shots, "
            f"{len(asked)} prompts of {np.mean([p.length for p in asked]):.1f} tokens, answers {', '.join(map(repr, config.answers))} "
            f"of {' or '.join(f'{a} and {b}' for a, b in lengths)} tokens")
        passed = time.perf_counter()
        logp = answer_logp(model, loaded.params, every, loaded.mesh, config, stats, label=f"prompt {config.split}")
        passed = time.perf_counter() - passed
        ends = np.cumsum([len(asked), *map(len, free.values())])
        free_logp = {shots: logp[a:b] for shots, a, b in zip(free, ends, ends[1:])}
        logp = logp[: len(asked)]
        logits, calibration = _calibrated(config, logp, used, free_logp)
        workload.write_predictions(run_, config.split, documents, logits)
        results = workload.evaluate(logits, documents) | calibration | {
            "n": len(documents), "n_dropped": prepared.n_dropped | counts,
            "n_with_shots": {str(k): n for k, n in sorted(collections.Counter(used.tolist()).items())},
            "answer_probability": float(np.exp(logp.astype(np.float64)).sum(axis=1).mean()), "answer_tokens": lengths,
            "predicted_class_1": float(np.mean(metrics.predictions(logits))),
            "tokens_per_second": sum(p.length for p in every) / passed, "programs": len(stats.get("programs", ())),
            "compile_seconds": stats.get("compile_seconds", 0.0), "seconds": time.perf_counter() - start}
        run_.finish(results)
    say(f"{workload.shown(workdir)}: {config.split} prompted, {workload.summary(results)}")
    if config.split == "test" and (warning := metrics.small_test_warning(results)):
        say(warning)
    return results
