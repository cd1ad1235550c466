"""From the runs of a sweep to the numbers of a report: who is compared with whom, on which documents.

A sweep root holds `sweep.json`: {"pairs": [{"task", "weak", "strong", "loss", "seed", "runs": {"weak": dir, "label": dir,
"ceiling": dir, "student": dir}}]}, directories relative to the root. All numbers are computed again from the runs'
`predictions/test.parquet`, and must agree with their `results.json`.
"""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Callable, Iterable

import numpy as np
from etils import epath

from w2s_jax import metrics, runlog
from w2s_jax.errors import UserError

ROLES = ("weak", "label", "ceiling", "student")
METRICS = ("accuracy", "auroc")


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A run's predictions on one set of documents, by column."""

    ids: list[str]
    shas: list[str]
    labels: np.ndarray  # int [n], -1 = unknown
    logits: np.ndarray  # float32 [n, classes]
    groups: list[str]

    def select(self, rows: np.ndarray) -> Predictions:
        """The documents at `rows`, in that order."""
        ids, shas, groups = ([column[r] for r in rows] for column in (self.ids, self.shas, self.groups))
        return Predictions(ids, shas, self.labels[rows], self.logits[rows], groups)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The numbers of a report. Every list holds flat dicts; `<name>_ci` is `[lo, hi]` or None.

    Attributes:
      rows: one a task, pair of models, loss and metric, over all seeds that are done: task, weak_model, strong_model, loss,
        metric, seeds (list), n_test, n_groups, majority_baseline, and all of `metrics.pgr`.
      by_seed: the same, one seed a row (intervals: test documents only).
      agreement: student and ceiling against the supervisor's test predictions, split by the supervisor being right, and
        `label_accuracy`: how good the labels were that the student saw.
      medians: one a metric and loss: pgr, pgr_ci, n_pairs (counted), left_out (the gap's interval includes 0), n_undefined (of
        those, without a gap).
      missing: runs that are not done: run, role, state, task, blocks (how many students cannot be reported for it).
      warnings, notes: lines for the reader.
    """

    rows: list[dict]
    by_seed: list[dict]
    agreement: list[dict]
    medians: list[dict]
    missing: list[dict]
    warnings: list[str]
    notes: list[str]


def read_pairs(root) -> list[dict]:
    """The pairs of ROOT/sweep.json. UserError where it is absent or not what the sweep writes."""
    file = epath.Path(root) / "sweep.json"
    if not file.exists():
        raise UserError(f"{file}: no such file; a report needs the root of a sweep, or the keys weak, ceiling and student")
    pairs = runlog.read_json(file).get("pairs")
    if not isinstance(pairs, list) or not pairs:
        raise UserError(f"{file}: expected a list 'pairs' that is not empty, found {type(pairs).__name__}")
    seen = set()
    for number, pair in enumerate(pairs):
        runs = pair.get("runs") if isinstance(pair, dict) else None
        lacks = [k for k in ("task", "weak", "strong", "loss", "seed", "runs") if k not in (pair if isinstance(pair, dict) else {})]
        lacks += [f"runs.{role}" for role in ROLES if isinstance(runs, dict) and role != "label" and role not in runs]
        if lacks or not isinstance(runs, dict):
            raise UserError(f"{file}: pair {number} lacks {', '.join(lacks) or 'runs'}")
        names = [(k, pair[k]) for k in ("task", "weak", "strong", "loss")] + [(f"runs.{role}", name) for role, name in runs.items()]
        if wrong := [f"{key} is {value!r}" for key, value in names if not isinstance(value, str)]:
            raise UserError(f"{file}: pair {number}: {wrong[0]}, expected a text")
        key = _key(pair) + (pair["seed"],)
        if key in seen:
            raise UserError(f"{file}: pair {number} repeats task, weak, strong, loss, seed = {key}")
        seen.add(key)
    return pairs


def pair_of_runs(weak: str, ceiling: str, student: str, label: str = "") -> list[dict]:
    """The pairs (one) of three runs that no sweep made; task, models, loss and seed come from their config.json."""
    configs = {}
    for role, folder in (("weak", weak), ("ceiling", ceiling), ("student", student)):
        configs[role] = runlog.load(folder).record.get("config", {})
        if lacks := [k for k in ("task", "model", "loss", "seed") if k not in configs[role]]:
            raise UserError(f"{role}={folder}: config.json has no {lacks[0]}; expected a finetune run")
    for role in ("weak", "ceiling"):
        if configs[role]["task"] != configs["student"]["task"]:
            raise UserError(f"{role}: was trained on task {configs[role]['task']!r}, the student on {configs['student']['task']!r}")
    if configs["ceiling"]["model"] != configs["student"]["model"]:
        raise UserError(f"ceiling: is model {configs['ceiling']['model']!r}, the student is {configs['student']['model']!r}")
    runs = {"weak": weak, "ceiling": ceiling, "student": student} | ({"label": label} if label else {})
    student_config = configs["student"]
    return [{"task": student_config["task"], "weak": configs["weak"]["model"], "strong": student_config["model"],
             "loss": student_config["loss"], "seed": student_config["seed"],
             "runs": {role: os.path.abspath(r) if "://" not in r else r for role, r in runs.items()}}]


def read_predictions(run_dir, split: str = "test") -> Predictions:
    """A run's `predictions/<split>.parquet`. UserError for an unreadable file, duplicate ids or logits that are not finite."""
    file = epath.Path(run_dir) / "predictions" / f"{split}.parquet"
    try:
        table = runlog.load(run_dir).predictions(split)
    except (OSError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError
        raise UserError(f"{file}: cannot be read as parquet: {error}") from error
    if lacks := [c for c in ("id", "text_sha", "label", "logits") if c not in table.columns]:
        raise UserError(f"{file}: has no column {lacks[0]}; expected id, text_sha, label, logits")
    if not len(table):
        raise UserError(f"{file}: is empty")
    ids = [str(i) for i in table["id"]]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise UserError(f"{file}: {len(ids) - len(set(ids))} duplicated ids, the first {twice!r}")
    widths = {len(row) for row in table["logits"]}
    if len(widths) > 1:
        raise UserError(f"{file}: logits of {sorted(widths)} classes in one file")
    logits = np.stack([np.asarray(row, np.float32) for row in table["logits"]])
    if not np.isfinite(logits).all():
        raise UserError(f"{file}: logits of document {ids[int(np.argmin(np.isfinite(logits).all(axis=1)))]!r} are not finite")
    labels = table["label"].fillna(-1).astype(np.int64).to_numpy()
    if labels.min() < -1 or labels.max() >= logits.shape[1]:
        raise UserError(f"{file}: labels from {labels.min()} to {labels.max()} for {logits.shape[1]} classes")
    groups = ids  # without a group a document stands for itself
    if "group" in table.columns:
        groups = [i if null else str(g) for i, g, null in zip(ids, table["group"], table["group"].isna(), strict=True)]
    return Predictions(ids, [str(s) for s in table["text_sha"]], labels, logits, groups)


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
    out = Comparison([], [], [], [], missing, [], [])
    draws: dict[tuple, np.ndarray] = {}
    done = _short_names(done)
    tasks = list(dict.fromkeys(p["task"] for p in done))
    for task in tasks:
        here = _Task(root, task, [p for p in done if p["task"] == task], seed, replicates)
        here.add_to(out, draws)
        progress()
    out.medians.extend(_medians(out.rows, draws))
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

    def _load(self, seed, runs: Iterable[str]) -> None:
        """Reads the test predictions of the runs of one seed and keeps the documents that all of them have."""
        found = {}
        for rel in runs:
            found[rel] = p = read_predictions(self.root / rel)
            _check_results(self.root / rel, p)
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
        keys = list(dict.fromkeys(_key(p) for p in self.pairs))
        for key in keys:
            pairs = [p for p in self.pairs if _key(p) == key]
            for metric in self.metric_names():
                row, ratios = self.row(key, pairs, metric)
                out.rows.append(row)
                draws[key + (metric,)] = ratios
                out.by_seed.extend(self.row(key, [p], metric)[0] for p in pairs)
            out.agreement.append(self.agreement(key, pairs))
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

    def agreement(self, key: tuple, pairs: list[dict]) -> dict:
        row = {**_named(key), "seeds": [p["seed"] for p in pairs]}
        for role in ("student", "ceiling"):
            parts: dict[str, list] = {"all": [], "right": [], "wrong": []}
            for p in pairs:
                run, weak = self.test[p["runs"][role]], self.test[p["runs"]["weak"]]
                same = metrics.predictions(run.logits) == metrics.predictions(weak.logits)
                right = metrics.predictions(weak.logits) == weak.labels
                for part, rows in (("all", np.ones_like(right)), ("right", right), ("wrong", ~right)):
                    parts[part].append(_ratio(self.boot, same & rows, rows, weak.groups))
            for part, estimates in parts.items():
                row |= _summary(f"{role}_{part}", estimates, self.seed)
        row |= _summary("label_accuracy", [e for p in pairs if (e := self._label_accuracy(p)) is not None], self.seed)
        return row

    def _label_accuracy(self, pair: dict) -> metrics.Estimate | None:
        """Accuracy of the labels that the student was trained on, where the truth is known."""
        rel = pair["runs"].get("label")
        if rel is None:
            return None
        if (rel, "label") not in self._estimates:
            p = read_predictions(self.root / rel, "b")
            known = p.labels >= 0
            if not known.any():
                return None
            boot = metrics.Bootstrap(p.groups, self.draw_seed, self.replicates)
            self._estimates[rel, "label"] = _ratio(boot, known & (metrics.predictions(p.logits) == p.labels), known, p.groups)
        return self._estimates[rel, "label"]


def _ratio(boot: metrics.Bootstrap, top: np.ndarray, bottom: np.ndarray, groups: list[str]) -> metrics.Estimate:
    value = float(top.sum() / bottom.sum()) if bottom.any() else float("nan")
    if len(boot.names) < 2:
        return metrics.Estimate(value, np.full(boot.replicates, np.nan))
    return metrics.Estimate(value, boot.ratio(top, bottom, boot.codes(groups)))


def _summary(name: str, estimates: list[metrics.Estimate], seed: int) -> dict:
    """`name` and `name_ci`: the mean over the seeds where the quantity exists."""
    estimates = [e for e in estimates if not np.isnan(e.value)]
    if not estimates:
        return {name: None, f"{name}_ci": None}
    mean = metrics.mean_over_seeds(estimates, seed)
    return {name: mean.value, f"{name}_ci": metrics.interval(mean.replicates)}


def _key(pair: dict) -> tuple:
    return (pair["task"], pair["weak"], pair["strong"], pair["loss"])


def _named(key: tuple) -> dict:
    return dict(zip(("task", "weak_model", "strong_model", "loss"), key, strict=True))


def _short_names(pairs: list[dict]) -> list[dict]:
    """Folders and hub ids by their last part, where that is unique."""
    short = {}
    for keys in (("task",), ("weak", "strong")):
        names = {p[k] for p in pairs for k in keys}
        last = {n: n.rstrip("/").rsplit("/", 1)[-1] for n in names}
        short.update({(k, n): last[n] if list(last.values()).count(last[n]) == 1 else n for n in names for k in keys})
    return [{**p, **{k: short[k, p[k]] for k in ("task", "weak", "strong")}} for p in pairs]


def _missing(pairs: list[dict], states: dict[str, str]) -> list[dict]:
    rows: dict[str, dict] = {}
    for pair in pairs:
        for role, rel in pair["runs"].items():
            if states[rel] != "done":
                row = rows.setdefault(rel, {"run": rel, "role": role, "state": states[rel], "task": pair["task"], "blocks": 0})
                row["blocks"] += 1
    return list(rows.values())


def _check_results(run_dir, p: Predictions) -> None:
    """results.json and the predictions must be of one run: a number is never printed for another."""
    said = runlog.read_json(run_dir / "results.json").get("accuracy")
    known = p.labels >= 0
    if said is None or not known.any():
        return
    found = float(np.mean(metrics.predictions(p.logits)[known] == p.labels[known]))
    if abs(found - said) > 1e-6:
        raise UserError(f"{run_dir}: results.json says accuracy {said}, predictions/test.parquet gives {found}; they are not of one run")


def _medians(rows: list[dict], draws: dict[tuple, np.ndarray]) -> list[dict]:
    """Median PGR over the pairs whose gap is clear, by metric and loss; its interval from the pairs' shared replicates."""
    out = []
    for metric in METRICS:
        for loss in dict.fromkeys(r["loss"] for r in rows):
            here = [r for r in rows if r["metric"] == metric and r["loss"] == loss]
            clear = [r for r in here if r["gap_clear"]]
            if not here:
                continue
            row = {"metric": metric, "loss": loss, "pgr": None, "pgr_ci": None, "n_pairs": len(clear), "left_out": len(here) - len(clear),
                   "n_undefined": sum(r["pgr"] is None for r in here)}
            if clear:
                table = np.stack([draws[r["task"], r["weak_model"], r["strong_model"], loss, metric] for r in clear])
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
