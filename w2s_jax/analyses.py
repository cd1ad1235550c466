"""What a student took over from its supervisor: agreement, inherited errors, misfit and the gain that it predicts, calibration.

Every function takes one seed's runs of a pair on the same test documents, in the same order, and gives Estimates that share
the draws of one Bootstrap; `summary` then makes the mean over seeds and its interval of each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from w2s_jax import metrics
from w2s_jax.metrics import Estimate
from w2s_jax.predictions import Predictions


@dataclasses.dataclass(frozen=True)
class Trio:
    """One seed's weak supervisor, student and ceiling on common, labelled test documents."""

    weak: Predictions
    student: Predictions
    ceiling: Predictions


def agreement(boot: metrics.Bootstrap, trio: Trio) -> dict[str, Estimate]:
    """Agreement with the supervisor and inherited errors (Burns et al. 2023, section 5.1.3 on imitation: student-supervisor
    agreement, split by the supervisor being right).

    For run = student and run = ceiling (which never saw the weak labels, so that it shows what a model of that size does anyway):

      <run>_all, <run>_right, <run>_wrong: the share of documents on which the run gives the supervisor's answer, of all
        documents and of those on which the supervisor is right, or wrong. `<run>_wrong` is thus the share of the supervisor's
        errors that the run repeats (the same wrong class; with two classes every error on such a document).
      <run>_shared: of the run's own errors, the share that the supervisor makes too.
      inherited: student_wrong - ceiling_wrong, the share of the supervisor's errors that the student repeats beyond those
        that a model of its size makes anyway.

    NaN where there is no such document.
    """
    weak, parts = trio.weak, {}
    for name, run in (("student", trio.student), ("ceiling", trio.ceiling)):
        same = run.predicted == weak.predicted
        parts[f"{name}_all"] = same, np.ones_like(same)
        parts[f"{name}_right"] = same & weak.right, weak.right
        parts[f"{name}_wrong"] = same & ~weak.right, ~weak.right
        parts[f"{name}_shared"] = same & ~run.right, ~run.right
    out = ratios(boot, parts, weak.groups)
    out["inherited"] = difference(out["student_wrong"], out["ceiling_wrong"])
    return out


def misfit(boot: metrics.Bootstrap, trio: Trio) -> dict[str, Estimate]:
    """The student's misfit to its supervisor, and its gain over it, in the same loss.

    With y the true label (one-hot), w and s the probabilities of supervisor and student, means over test documents:

      misfit_squared = mean |s - w|^2, gain_squared = mean |w - y|^2 - mean |s - y|^2 (the Brier scores `weak_squared` and
        `student_squared`; sums over classes). Charikar, Pabbaraju and Shiragur 2024 (arXiv 2405.15116, theorem 1): where the
        student is the projection of the supervisor onto a convex class that can represent the truth, gain >= misfit, and the
        two are near each other in their experiments.
      misfit_kl = mean KL(s || w), gain_xent = mean log s[y] - mean log w[y] (of the losses `weak_xent` and `student_xent`,
        nats). Mulgund and Pabbaraju 2025 (arXiv 2501.19105) carry the theorem to Bregman divergences: with cross-entropy the
        misfit is the KL divergence with the student in the first place, the reverse of the usual training loss.
      misfit_xent = mean -sum w log s: the cross-entropy that training on the weak labels brings down (no prediction of a gain;
        the supervisor's own entropy is part of it).

    The predicted gain is the misfit itself. The expectation over y makes the gains the same as those against the true
    probabilities, so that hard labels do no harm.
    """
    weak, student = trio.weak, trio.student
    ones = np.ones(len(weak.ids))
    values = {
        "weak_squared": weak.brier, "student_squared": student.brier,
        "misfit_squared": np.square(student.probs - weak.probs).sum(axis=1),
        "weak_xent": weak.cross_entropy, "student_xent": student.cross_entropy,
        "misfit_kl": (student.probs * (student.log_probs - weak.log_probs)).sum(axis=1),
        "misfit_xent": -(weak.probs * student.log_probs).sum(axis=1),
    }  # fmt: skip
    out = ratios(boot, {name: (value, ones) for name, value in values.items()}, weak.groups)
    for loss in ("squared", "xent"):
        out[f"gain_{loss}"] = difference(out[f"weak_{loss}"], out[f"student_{loss}"])
    return out


def calibration(boot: metrics.Bootstrap, run: Predictions) -> dict[str, Estimate]:
    """How far a run's confidence can be trusted (labels known).

      ece: the expected calibration error (`metrics.ece`, 15 bins; Guo et al. 2017, arXiv 1706.04599). Its replicates are NaN:
        an absolute value only grows by resampling, so that a percentile interval would lie above the value.
      overconfidence: mean confidence - accuracy; above 0 the run claims more than it knows.
    """
    ones = np.ones(len(run.ids))
    out = ratios(boot, {"overconfidence": (run.confidence - run.right, ones)}, run.groups)
    return {"ece": Estimate(metrics.ece(run.logits, run.labels), np.full(boot.replicates, np.nan))} | out


def ratios(boot: metrics.Bootstrap, parts: dict[str, tuple[np.ndarray, np.ndarray]], groups: Sequence[str]) -> dict[str, Estimate]:
    """Estimates of sum(numerator) / sum(denominator) over documents, all in one pass over the draws; NaN where 0 / 0."""
    tops, bottoms = (np.stack([np.asarray(part[side], np.float64) for part in parts.values()], axis=1) for side in (0, 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        values = tops.sum(axis=0) / bottoms.sum(axis=0)
    if len(boot.names) < 2:  # nothing to draw: no error bar, rather than one of width 0
        draws = np.full((boot.replicates, len(parts)), np.nan)
    else:
        draws = boot.ratios(tops, bottoms, boot.codes(groups))
    return {name: Estimate(float(value), column) for name, value, column in zip(parts, values, draws.T, strict=True)}


def difference(a: Estimate, b: Estimate) -> Estimate:
    """a - b, of the same draws."""
    return Estimate(a.value - b.value, a.replicates - b.replicates)


def summary(seeds: Sequence[dict[str, Estimate]], seed: int) -> dict:
    """`name` and `name_ci` of every name: the mean over the seeds where the quantity exists (None where it does in none).

    `seeds`: the estimates of one function above, one dict a seed. `seed`: of the draw of seeds.
    """
    out = {}
    for name in dict.fromkeys(n for estimates in seeds for n in estimates):
        found = [e[name] for e in seeds if name in e and not np.isnan(e[name].value)]
        mean = metrics.mean_over_seeds(found, seed) if found else None
        out[name] = mean.value if mean else None
        out[f"{name}_ci"] = metrics.interval(mean.replicates) if mean else None
    return out
