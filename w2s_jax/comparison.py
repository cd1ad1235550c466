"""From the runs of a sweep to the numbers of a report.

All numbers are computed again from the runs' `predictions/test.parquet`, and must agree with their `results.json`.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterable

import numpy as np
from etils import epath

from w2s_jax import analyses, metrics, runlog
from w2s_jax.errors import UserError
from w2s_jax.pairs import ORACLE, arrange, key_of, opponents, read_pairs
from w2s_jax.predictions import Predictions, check_results, read_predictions
from w2s_jax.significance import paired_tests

METRICS = ("accuracy", "auroc")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The numbers of a report. Every list holds flat dicts; `<name>_ci` is `[lo, hi]` or None.

    Rows stand by task, pair of models and method, each in the order of sweep.json. A method whose checkpoint ground truth
    selected ends in "(oracle)".

    Attributes:
      rows: one a task, pair of models, method and metric, over all seeds that are done: task, weak_model, strong_model, method,
        metric, seeds (list), n_test, n_groups, majority_baseline, and all of `metrics.pgr`.
      by_seed: the same, one seed a row (intervals: test documents only).
      agreement, misfit: one a task, pair and method: `analyses.agreement`, with `label_accuracy` (how good the labels were that
        the student saw), and `analyses.misfit`.
      calibration: one a task, pair and method: `<role>_<name>` of `analyses.calibration`, role = weak, label, student, ceiling.
      reliability: the bins of a reliability diagram, one a task, series ("weak", "weak labels", "ceiling" or a student's method)
        and bin that is not empty: low, high (of the confidence), n, confidence, accuracy; pairs and seeds of a task together.
      tests: `significance.paired_tests`.
      medians: one a metric and method: pgr, pgr_ci, n_pairs (counted), left_out (the gap's interval includes 0), n_undefined (of
        those, without a gap).
      missing: runs that are not done: run, role, state, task, blocks (how many students cannot be reported for it).
      warnings, notes: lines for the reader.
    """

    rows: list[dict]
    by_seed: list[dict]
    agreement: list[dict]
    misfit: list[dict]
    calibration: list[dict]
    reliability: list[dict]
    tests: list[dict]
    medians: list[dict]
    missing: list[dict]
    warnings: list[str]
    notes: list[str]


def compare(root, pairs: list[dict] | None = None, *, seed: int = 0, replicates: int = metrics.REPLICATES,
            progress: Callable[[], None] = lambda: None) -> Comparison:
    """Compares the runs of a sweep.

    Args:
      root: the sweep's root.
      pairs: as in sweep.json; None = read it.
      seed, replicates: of the bootstrap. Tasks draw independently, everything within a task shares its draws.
      progress: called after each task.
    Raises:
      UserError: nothing is done yet, or the runs do not fit together.
    """
    root = epath.Path(root)
    pairs = read_pairs(root) if pairs is None else pairs
    states = {rel: runlog.state(root / rel) for pair in pairs for rel in pair["runs"].values()}
    missing = _missing(pairs, states)
    done = [p for p in pairs if all(states[rel] == "done" for rel in p["runs"].values())]
    if not done:
        first = missing[0]
        raise UserError(f"{root}: none of its {len(pairs)} students can be reported yet: {len(missing)} runs are not done, "
                        f"the first {first['run']} ({first['state']})")
    out = Comparison([], [], [], [], [], [], [], [], missing, [], [])
    draws: dict[tuple, np.ndarray] = {}
    done = arrange(root, done)
    tasks = list(dict.fromkeys(p["task"] for p in done))
    for task in tasks:
        here = _Task(root, task, [p for p in done if p["task"] == task], seed, replicates)
        here.add_to(out, draws)
        progress()
    out.medians.extend(_medians(out.rows, draws))
    against = opponents(done)
    out.tests.extend(paired_tests(out.rows, out.by_seed, against))
    out.notes.extend(_unopposed(done, against))
    return out


class _Task:
    """The runs of one task: their predictions on common documents, the shared draws, and each run's replicates, made once."""

    def __init__(self, root, task: str, pairs: list[dict], seed: int, replicates: int):
        self.root, self.task, self.pairs, self.seed, self.replicates = root, task, pairs, seed, replicates
        self.notes: list[str] = []
        self.test: dict[str, Predictions] = {}
        seeds = list(dict.fromkeys(p["seed"] for p in pairs))
        for s in seeds:
            self._load(s, dict.fromkeys(p["runs"][role] for p in pairs if p["seed"] == s for role in ("weak", "ceiling", "student")))
        # One seed of the draws a task, so that tasks are independent while a task's numbers do not depend on its neighbours.
        self.draw_seed = seed * 2**32 + zlib.crc32(task.encode())
        self.boot = metrics.Bootstrap([g for p in self.test.values() for g in p.groups], self.draw_seed, replicates)
        self._estimates: dict[tuple, metrics.Estimate] = {}
        self._analysed: dict[tuple, dict[str, metrics.Estimate]] = {}
        self._labels: dict[tuple, Predictions | None] = {}

    def _load(self, seed, runs: Iterable[str]) -> None:
        """Reads the test predictions of the runs of one seed and keeps the documents that all of them have."""
        found = {}
        for rel in runs:
            found[rel] = p = read_predictions(self.root / rel)
            check_results(self.root / rel, p)
        first_rel, first = next(iter(found.items()))
        known = {i: (sha, label) for i, sha, label in zip(first.ids, first.shas, first.labels, strict=True)}
        common = [i for i in first.ids if known[i][1] >= 0]
        for rel, p in found.items():
            for i, sha, label in zip(p.ids, p.shas, p.labels, strict=True):
                if known.get(i, (sha, label)) != (sha, label):
                    raise UserError(f"{rel} and {first_rel}: test document {i!r} has another text or label; the runs cannot be compared")
            if p.logits.shape[1] != first.logits.shape[1]:
                raise UserError(f"{rel} and {first_rel}: {p.logits.shape[1]} and {first.logits.shape[1]} classes cannot be compared")
            has = set(p.ids)
            common = [i for i in common if i in has]
        if not common:
            raise UserError(f"{self.task}: the runs of seed {seed} have no labelled test document in common")
        total = len(set().union(*(p.ids for p in found.values())))
        if len(common) < total:
            self.notes.append(f"{self.task}, seed {seed}: {total - len(common)} of {total} test documents have no label or were not "
                              "predicted by every run (over-long for one tokenizer, say) and are left out of the comparison")
        for rel, p in found.items():
            row = {i: n for n, i in enumerate(p.ids)}
            self.test[rel] = p.select(np.array([row[i] for i in common]))

    def estimate(self, rel: str, metric: str) -> metrics.Estimate:
        if (rel, metric) not in self._estimates:
            p = self.test[rel]
            self._estimates[rel, metric] = metrics.estimate(self.boot, metric, p.logits, p.labels, self.boot.codes(p.groups))
        return self._estimates[rel, metric]

    def add_to(self, out: Comparison, draws: dict) -> None:
        for key in dict.fromkeys(key_of(p) for p in self.pairs):
            pairs = [p for p in self.pairs if key_of(p) == key]
            for metric in self.metric_names():
                row, ratios = self.row(key, pairs, metric)
                out.rows.append(row)
                draws[key + (metric,)] = ratios
                out.by_seed.extend(self.row(key, [p], metric)[0] for p in pairs)
            named = {**_named(key), "seeds": [p["seed"] for p in pairs]}
            trios = [analyses.Trio(*(self.test[p["runs"][role]] for role in ("weak", "student", "ceiling"))) for p in pairs]
            seeds = [analyses.agreement(self.boot, trio) | self.label_accuracy(p) for trio, p in zip(trios, pairs, strict=True)]
            out.agreement.append(named | {"label_accuracy": None, "label_accuracy_ci": None} | analyses.summary(seeds, self.seed))
            out.misfit.append(named | analyses.summary([analyses.misfit(self.boot, trio) for trio in trios], self.seed))
            calibrated = analyses.summary([self.calibration(p) for p in pairs], self.seed)
            out.calibration.append(named | {k: v for k, v in calibrated.items() if not k.endswith("ece_ci")})  # which are no intervals
        out.reliability.extend(self.reliability())
        out.warnings.extend(dict.fromkeys(line for row in out.rows if row["task"] == self.task for line in _warnings(row)))
        out.notes.extend(self.notes)

    def metric_names(self) -> tuple[str, ...]:
        """AUROC needs two classes in the logits and both among the labels of every seed."""
        binary = all(p.logits.shape[1] == 2 and len(np.unique(p.labels)) == 2 for p in self.test.values())
        if not binary:
            note = f"{self.task}: no AUROC, since it needs two classes"
            self.notes += [note] if note not in self.notes else []
        return METRICS if binary else METRICS[:1]

    def row(self, key: tuple, pairs: list[dict], metric: str) -> tuple[dict, np.ndarray]:
        roles = [[self.estimate(p["runs"][role], metric) for p in pairs] for role in ("weak", "student", "ceiling")]
        numbers, ratios = metrics.pgr_and_replicates(*roles, seed=self.seed)
        tests = [self.test[p["runs"]["student"]] for p in pairs]
        return {**_named(key), "metric": metric, "seeds": [p["seed"] for p in pairs], "n_test": min(len(t.ids) for t in tests),
                "n_groups": min(len(set(t.groups)) for t in tests),
                "majority_baseline": float(np.mean([metrics.majority_baseline(t.labels) for t in tests])), **numbers}, ratios

    def labels(self, pair: dict) -> Predictions | None:
        """The labels that the student was trained on, where the truth is known; None where it is nowhere or there is no such run."""
        rel = pair["runs"].get("label")
        if rel is None:
            return None
        split = pair["label_file"] if (self.root / rel / "predictions" / f"{pair['label_file']}.parquet").exists() else "b"
        if (rel, split) not in self._labels:
            p = read_predictions(self.root / rel, split)
            seen = (p.labels >= 0) & (True if p.weights is None else p.weights > 0)  # a filter leaves documents out by weight 0
            self._labels[rel, split] = p.select(np.flatnonzero(seen)) if seen.any() else None
        return self._labels[rel, split]

    def label_accuracy(self, pair: dict) -> dict[str, metrics.Estimate]:
        """Accuracy of the labels that the student was trained on, each once, whatever its weight."""
        p = self.labels(pair)
        return {} if p is None else self._of_labels(p, "accuracy")

    def calibration(self, pair: dict) -> dict[str, metrics.Estimate]:
        """`analyses.calibration` of the pair's runs on the test set, and of its labels on their own documents; each run's once."""
        out = {}
        for role in ("weak", "student", "ceiling"):
            rel = pair["runs"][role]
            if ("calibration", rel) not in self._analysed:
                self._analysed["calibration", rel] = analyses.calibration(self.boot, self.test[rel])
            out |= {f"{role}_{name}": e for name, e in self._analysed["calibration", rel].items()}
        if (p := self.labels(pair)) is not None:
            out |= self._of_labels(p, "calibration")
        return out

    def _of_labels(self, p: Predictions, what: str) -> dict[str, metrics.Estimate]:
        """`label_<name>` of the accuracy or the calibration of labels, with draws of their own documents."""
        if (what, id(p)) not in self._analysed:
            boot = metrics.Bootstrap(p.groups, self.draw_seed, self.replicates)
            found = (analyses.calibration(boot, p) if what == "calibration" else
                     analyses.ratios(boot, {"accuracy": (p.right, np.ones(len(p.ids)))}, p.groups))
            self._analysed[what, id(p)] = {f"label_{name}": e for name, e in found.items()}
        return self._analysed[what, id(p)]

    def reliability(self) -> list[dict]:
        """The rows of `Comparison.reliability`: every run counts once, however many pairs it is in."""
        series: dict[str, dict] = {"weak": {}, "weak labels": {}}
        for p in self.pairs:
            series["weak"][p["runs"]["weak"]] = self.test[p["runs"]["weak"]]
            if (labels := self.labels(p)) is not None:
                series["weak labels"][id(labels)] = labels
            series.setdefault(p["method"], {})[p["runs"]["student"]] = self.test[p["runs"]["student"]]
        series["ceiling"] = {p["runs"]["ceiling"]: self.test[p["runs"]["ceiling"]] for p in self.pairs}
        out = []
        for name, runs in series.items():
            if not runs:
                continue
            counts = sum(metrics.reliability(r.logits, r.labels) for r in runs.values())
            for i, (n, confidence, right) in enumerate(counts.T):
                if n:
                    out.append({"task": self.task, "series": name, "low": i / counts.shape[1], "high": (i + 1) / counts.shape[1],
                                "n": int(n), "confidence": float(confidence / n), "accuracy": float(right / n)})
        return out


def _named(key: tuple) -> dict:
    return dict(zip(("task", "weak_model", "strong_model", "method"), key, strict=True))


def _unopposed(pairs: list[dict], against: dict[tuple, dict[str, str]]) -> list[str]:
    """A line for every baseline or control that a pair names and that cannot be found."""
    lines = {}
    for p in pairs:
        for kind in ("baseline", "control"):
            if p.get(kind) and p[kind] != p["method"].removesuffix(ORACLE) and kind not in against.get(key_of(p), {}):
                line = f"{p['method']}: its {kind} {p[kind]} is not there (yet), and they are not compared"
                lines.setdefault(line, []).append(p)
    return [f"{line} ({len(found)} students)" for line, found in lines.items()]


def _missing(pairs: list[dict], states: dict[str, str]) -> list[dict]:
    rows: dict[str, dict] = {}
    for pair in pairs:
        for role, rel in pair["runs"].items():
            if states[rel] != "done":
                row = rows.setdefault(rel, {"run": rel, "role": role, "state": states[rel], "task": pair["task"], "blocks": 0})
                row["blocks"] += 1
    return list(rows.values())


def _medians(rows: list[dict], draws: dict[tuple, np.ndarray]) -> list[dict]:
    """Median PGR over the pairs whose gap is clear, by metric and method; its interval from the pairs' shared replicates."""
    out = []
    for metric in METRICS:
        for method in dict.fromkeys(r["method"] for r in rows):
            here = [r for r in rows if r["metric"] == metric and r["method"] == method]
            clear = [r for r in here if r["gap_clear"]]
            if not here:
                continue
            row = {"metric": metric, "method": method, "pgr": None, "pgr_ci": None, "n_pairs": len(clear),
                   "left_out": len(here) - len(clear), "n_undefined": sum(r["pgr"] is None for r in here)}
            if clear:
                table = np.stack([draws[r["task"], r["weak_model"], r["strong_model"], method, metric] for r in clear])
                some = np.isfinite(table).any(axis=0)
                medians = np.full(table.shape[1], np.nan)
                medians[some] = np.nanmedian(table[:, some], axis=0)
                row |= {"pgr": float(np.median([r["pgr"] for r in clear])), "pgr_ci": metrics.interval(medians)}
            out.append(row)
    return out


def _warnings(row: dict) -> list[str]:
    """What a reader must know before quoting the row."""
    if row["metric"] != "accuracy":
        return []
    lines, where = [], f"{row['task']}, {row['weak_model']} -> {row['strong_model']}"
    ci, gap = row["gap_ci"], row["gap"]
    if ci is None:
        lines.append(f"{where}: {row['n_test']} test documents in {row['n_groups']} group(s) give no error bar")
    elif gap <= 0:
        lines.append(f"{where}: no gap to recover (ceiling - weak = {gap:.3f}); PGR is undefined")
    elif (half := (ci[1] - ci[0]) / 2) > gap / 2:
        lines.append(f"{where}: the test set ({row['n_test']} documents, {row['n_seeds']} seeds) is too small for its error bar: "
                     f"gap {gap:.3f} +- {half:.3f}")
    ci = row["weak_ci"]
    if ci is not None and ci[0] <= row["majority_baseline"]:
        lines.append(f"{where}: the supervisor ({row['weak']:.3f}) is not clearly better than always answering the commonest label "
                     f"({row['majority_baseline']:.3f})")
    return lines
