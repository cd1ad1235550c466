"""Several weak supervisors as one: their labels for a student, and their test predictions, combined.

Lakshminarayanan et al. 2017 (arXiv 1612.01474): the mean of the members' probabilities. Documents on which the members
disagree can weigh less in the student's training. No model is loaded: the members' predictions are read from their runs.
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np
from etils import epath

from w2s_jax import graph, outcomes, runlog
from w2s_jax.comparison import Predictions, read_predictions
from w2s_jax.errors import UserError
from w2s_jax.files import plain
from w2s_jax.progress import say
from w2s_jax.runlog import Run

FLOOR = np.exp(-200.0)  # a probability of 0 as a finite logit: softmax gives 0 again in float32


def identity(config, planned: dict | None = None) -> dict:
    """What the ensemble is: its members, in whatever order, and how they are combined. `planned` = the runs that a sweep will make."""
    members = sorted(outcomes.fingerprint_run(path, planned) for path in config.runs)
    return plain({"stage": "ensemble", "how": config.how, "split": config.split, "runs": members})


# --------------------------------------------------------------------------- arithmetic


def combine(probs: np.ndarray, how: str) -> np.ndarray:
    """Probabilities of an ensemble, float64 `[n, classes]`.

    Args:
      probs: the members' probabilities, float64 `[members, n, classes]`.
      how: "vote": the share of members whose likelier class it is (ties of a member go to the lower class, as in the references);
        else the mean.
    """
    if how == "vote":
        return np.eye(probs.shape[2])[probs.argmax(axis=2)].mean(axis=0)
    return probs.mean(axis=0)


def agreement_weights(probs: np.ndarray) -> np.ndarray:
    """Weight of each document in training, float32 `[n]`, mean 1: the less the members disagree, the more.

    In proportion to 1 - I / log(classes), where I is the mutual information between the label and the choice of a member,
    the entropy of the mean less the mean entropy (the generalised Jensen-Shannon divergence of the members; Houlsby et al.
    2011, arXiv 1112.5745; Smith and Gal 2018, arXiv 1803.08533). I is 0 where all members say the same, however unsure they are,
    and log(classes) where they are certain of different classes in equal shares: such a document has weight 0.

    Args:
      probs: the members' probabilities, float64 `[members, n, classes]`.

    Raises:
      UserError: the members contradict each other on every document.
    """
    information = np.maximum(_entropy(probs.mean(axis=0)) - _entropy(probs).mean(axis=0), 0.0)
    weights = np.maximum(1.0 - information / np.log(probs.shape[2]), 0.0)
    weights[weights < 1e-12] = 0.0  # rounding of a document that counts for nothing
    if not weights.any():
        raise UserError("how='disagreement': the members contradict each other with certainty on every document; expected some agreement")
    return (weights / weights.mean()).astype(np.float32)


def _entropy(probs: np.ndarray) -> np.ndarray:
    """In nats, over the last axis; 0 log 0 = 0."""
    return -np.sum(probs * np.log(np.maximum(probs, 1e-300)), axis=-1)


def agreement(hard: np.ndarray, classes: int) -> float:
    """Share of documents on which two members say the same, the mean over all pairs of members; `hard`: int `[members, n]`."""
    members = len(hard)
    counts = np.eye(classes)[hard].sum(axis=0)
    return float(np.mean((counts * (counts - 1)).sum(axis=1) / (members * (members - 1))))


# --------------------------------------------------------------------------- members


@dataclasses.dataclass(frozen=True)
class Member:
    """A label run, and the run that it labels with."""

    path: str
    fingerprint: str
    supervisor: runlog.LoadedRun


@dataclasses.dataclass(frozen=True)
class _Set:
    """Documents without their texts, and what each member says of them: `probs` float64 `[members, documents, classes]`."""

    ids: list[str]
    text_shas: list[str]
    labels: np.ndarray
    groups: list[str]
    probs: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def members(config) -> list[Member]:
    """The members in an order of their own.

    Raises:
      UserError: a run is not a finished label run, one is named twice, or the run that it labels with is not there or another now.
    """
    found = []
    for path in config.runs:
        source = runlog.load_done(path, "label")
        supervisor = str(source.config.run)
        if not (epath.Path(supervisor).expanduser() / "config.json").exists():
            raise UserError(f"runs: {path} labels with the run {supervisor}, which is not there; its test predictions are needed "
                            "(a relative path is looked up from the current directory)")
        if outcomes.fingerprint_run(supervisor) != source.record["identity"]["run"]:
            raise UserError(f"runs: {path} was made with a run in {supervisor} that is another one now; label again")
        found.append(Member(str(path), outcomes.fingerprint_run(path), runlog.load_done(supervisor, "finetune")))
    found.sort(key=lambda member: member.fingerprint)
    for one, two in zip(found, found[1:]):
        if one.fingerprint == two.fingerprint:
            raise UserError(f"runs: {one.path} and {two.path} are the same run, expected different ones")
    return found


def _together(predictions: list[Predictions], names: list[str], what: str) -> _Set:
    """The members' predictions, document by document, in the first one's order. UserError where they are not of the same documents."""
    first = predictions[0]
    at = {i: row for row, i in enumerate(first.ids)}
    probs = []
    for name, p in zip(names, predictions):
        row = {i: n for n, i in enumerate(p.ids)}
        problems = []
        for title, bad in (
            (f"documents of {names[0]} are absent", [i for i in first.ids if i not in row]),
            (f"documents are not in {names[0]}", [i for i in p.ids if i not in at]),
            ("documents have another text", [i for i in p.ids if i in at and p.shas[row[i]] != first.shas[at[i]]]),
            ("documents have another label", [i for i in p.ids if i in at and p.labels[row[i]] != first.labels[at[i]]]),
        ):
            if bad:
                problems.append(f"{len(bad)} {title}, the first {bad[0]!r}")
        if problems:
            raise UserError(f"runs: {what} of {name} do not fit those of {names[0]}: {'; '.join(problems)} (task, data_seed, n_train, "
                            "n_test, max_length and overlong must be the same)")
        if p.logits.shape[1] != first.logits.shape[1]:
            raise UserError(f"runs: {what} of {name} have {p.logits.shape[1]} classes, those of {names[0]} {first.logits.shape[1]}")
        logits = p.logits[[row[i] for i in first.ids]].astype(np.float64)
        exp = np.exp(logits - logits.max(axis=1, keepdims=True))
        probs.append(exp / exp.sum(axis=1, keepdims=True))
    return _Set(first.ids, first.shas, first.labels, first.groups, np.stack(probs))


# --------------------------------------------------------------------------- the run


def _recorded(config, found: list[Member]):
    """The config as config.json keeps it: also what a report asks of a supervisor (task, model, loss, seed)."""
    full = config.copy_and_resolve_references()
    models = list(dict.fromkeys(m.supervisor.config.model for m in found))
    seeds = [m.supervisor.config.seed for m in found]
    with full.unlocked(), full.ignore_type():
        full.task, full.loss = found[0].supervisor.config.task, f"ensemble_{config.how}"
        full.model = models[0] if len(models) == 1 else "+".join(graph.short(m) for m in models)
        full.seed, full.seeds = min(seeds), tuple(seeds)
    return full


def run(config, workdir, *, rerun: bool = False, **_) -> dict:
    """Write `predictions/<split>.parquet` and `predictions/test.parquet` and return the results.

    The results are those of the ensemble on the test documents (as a finetune run's), `label_...` on the labelled ones (as a label
    run's), `agreement` and `test_agreement` (mean pairwise), and `members`.

    Raises:
      UserError: members that do not fit together, found before anything is written.
    """
    start = time.perf_counter()
    ident = identity(config)
    if (done := outcomes.finished(workdir, config, ident, rerun)) is not None:
        return done
    found = members(config)
    labels = _together([read_predictions(m.path, config.split) for m in found], [m.path for m in found], f"predictions/{config.split}")
    paths = [str(m.supervisor.path) for m in found]
    test = _together([read_predictions(path) for path in paths], paths, "predictions/test")
    weights = agreement_weights(labels.probs) if config.how == "disagreement" else None
    logits = {name: np.log(np.maximum(combine(part.probs, config.how), FLOOR)).astype(np.float32)
              for name, part in ((config.split, labels), ("test", test))}

    with Run.open(workdir, _recorded(config, found), ident, rerun=rerun) as run_:
        run_.start({"parents": [m.path for m in found]})
        outcomes.write_predictions(run_, config.split, labels, logits[config.split], weights=weights)
        outcomes.write_predictions(run_, "test", test, logits["test"])
        results = outcomes.evaluate(logits["test"], test)
        results |= {f"label_{k}": v for k, v in outcomes.evaluate(logits[config.split], labels).items() if k != "n_test"}
        hard, test_hard = labels.probs.argmax(axis=2), test.probs.argmax(axis=2)
        results |= {
            "n": len(labels), "n_members": len(found), "agreement": agreement(hard, labels.probs.shape[2]),
            "test_agreement": agreement(test_hard, test.probs.shape[2]),
            "members": [{"run": m.path, "supervisor": str(m.supervisor.path), "model": m.supervisor.config.model,
                         "seed": m.supervisor.config.seed, "accuracy": _accuracy(test_hard[i], test.labels),
                         "label_accuracy": _accuracy(hard[i], labels.labels)} for i, m in enumerate(found)],
        }
        if weights is not None:
            w = weights.astype(np.float64)
            results |= {"weight_range": [w.min(), w.max()], "n_filtered": int((w == 0).sum()),
                        "n_effective": float(w.sum() ** 2 / np.square(w).sum())}  # Kish's effective size of a weighted sample
        results["seconds"] = time.perf_counter() - start
        run_.finish(results)
    say(f"{outcomes.shown(workdir)}: {len(found)} supervisors ({config.how}), agreement {results['agreement']:.3f}, "
        f"{outcomes.summary(results)}")
    return results


def _accuracy(hard: np.ndarray, labels: np.ndarray) -> float | None:
    """Of hard predictions int `[n]` where the label is known; None where none is."""
    known = labels >= 0
    return float(np.mean(hard[known] == labels[known])) if known.any() else None
