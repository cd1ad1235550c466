"""Paired tests between methods, over tasks and pairs of models: is a method better than its baseline, a filter than its control?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MEASURES = ("accuracy", "auroc", "pgr_accuracy", "pgr_auroc")
FEWEST = 6  # below that, Wilcoxon's test cannot reach 5%: its smallest two-sided p-value of n differences is 2 / 2^n


def paired_tests(rows: Sequence[dict], by_seed: Sequence[dict], opponents: dict[tuple, dict[str, str]]) -> list[dict]:
    """Every method against its baseline and its control, as EleutherAI's blog compares losses over its 21 data sets.

    One observation is a task and a pair of models: the difference between the two students' values, each a mean over the seeds
    that both have. PGR (of those means) counts where the gap is clear (`gap_clear`) for both, as in the medians: a ratio whose
    denominator may be 0 would drown the others.

    Args:
      rows, by_seed: of a Comparison.
      opponents: (task, weak_model, strong_model, method) -> {"baseline" | "control": method} (`pairs.opponents`).
    Returns:
      One row a method, kind, opponent and measure: method, kind (baseline | control), against, measure (accuracy | auroc |
      pgr_accuracy | pgr_auroc), n, n_tasks, left_out (without a clear gap, so without PGR), mean_difference (method - against),
      wins, ties, losses, t, t_p (paired t-test), wilcoxon_p (signed-rank test; differences of 0 are dropped, as Wilcoxon did),
      wilcoxon_n (differences that are not 0). All p-values are two-sided; None where a test is not defined.
    """
    values: dict[tuple, dict] = {}  # (unit, method, metric) -> seed -> row
    for r in by_seed:
        values.setdefault((_unit(r), r["method"], r["metric"]), {})[r["seeds"][0]] = r
    clear = {(_unit(r), r["method"], r["metric"]): r["gap_clear"] for r in rows}
    wanted: dict[tuple, list[tuple]] = {}  # (method, kind, against) -> units
    for r in rows:
        for kind, against in opponents.get((*_unit(r), r["method"]), {}).items():
            units = wanted.setdefault((r["method"], kind, against), [])
            if _unit(r) not in units:
                units.append(_unit(r))
    out = []
    for (method, kind, against), units in wanted.items():
        for measure in MEASURES:
            metric = measure.removeprefix("pgr_")
            differences, tasks, left_out = [], set(), 0
            for unit in units:
                mine, theirs = (values.get((unit, m, metric), {}) for m in (method, against))
                if not (seeds := [s for s in mine if s in theirs]):
                    continue
                if measure != metric and not (clear[unit, method, metric] and clear[unit, against, metric]):
                    left_out += 1
                    continue
                a, b = (_value([found[s] for s in seeds], measure != metric) for found in (mine, theirs))
                if a is None or b is None:  # no gap over the seeds that both have
                    left_out += 1
                    continue
                differences.append(a - b)
                tasks.add(unit[0])
            if differences or left_out:
                out.append({"method": method, "kind": kind, "against": against, "measure": measure, "n": len(differences),
                            "n_tasks": len(tasks), "left_out": left_out, **_tests(np.array(differences))})
    return out


def _unit(row: dict) -> tuple[str, str, str]:
    return row["task"], row["weak_model"], row["strong_model"]


def _value(rows: Sequence[dict], ratio: bool) -> float | None:
    """The student's mean over seeds, or its PGR (of the means, as `metrics.pgr`); None where that does not exist."""
    weak, student, ceiling = (np.mean([np.nan if r[k] is None else r[k] for r in rows]) for k in ("weak", "student", "ceiling"))
    if not ratio:
        return None if np.isnan(student) else float(student)
    return float((student - weak) / (ceiling - weak)) if ceiling > weak else None


def _tests(differences: np.ndarray) -> dict:
    """Mean, wins, ties, losses and both tests of `[n]` differences. Differences below 1e-12 are ties (rounding)."""
    from scipy import stats

    differences = np.where(np.abs(differences) < 1e-12, 0.0, differences)
    nonzero = differences[differences != 0]
    out = {"mean_difference": float(differences.mean()) if len(differences) else None, "wins": int((differences > 0).sum()),
           "ties": int((differences == 0).sum()), "losses": int((differences < 0).sum()),
           "t": None, "t_p": None, "wilcoxon_n": len(nonzero), "wilcoxon_p": None}
    if len(differences) > 1 and np.ptp(differences) > 1e-12:
        test = stats.ttest_1samp(differences, 0.0)
        out |= {"t": float(test.statistic), "t_p": float(test.pvalue)}
    if len(nonzero):
        tied = len(np.unique(np.abs(nonzero).round(12))) < len(nonzero)
        # Exact as far as that goes: all changes of sign where ranks are tied and few, else Wilcoxon's table, else the normal one.
        few = len(nonzero) <= (13 if tied else 50)
        method = "asymptotic" if not few else stats.PermutationMethod() if tied else "exact"
        out["wilcoxon_p"] = float(stats.wilcoxon(nonzero.round(12), method=method).pvalue)
    return out
