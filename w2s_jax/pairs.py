"""Who is compared with whom: the pairs of a sweep's `sweep.json`, or of three runs that no sweep made.

A pair is one student: {"task", "weak", "strong", "method", "seed", "runs": {"weak": dir, "label": dir, "ceiling": dir,
"student": dir}}, directories relative to the sweep's root. `method` says how the student was made: a loss ("xent"), a probe
("probe knn"), a filter ("xent filter knn") ... Optional: `control`, the method that is its control ("xent filter knn random");
`baseline`, the method that it is to be compared with ("xent" where that is left out); `oracle`: true where the student's
checkpoint was selected by ground truth.
"""

from __future__ import annotations

import os

from etils import epath

from w2s_jax import runlog
from w2s_jax.errors import UserError

ROLES = ("weak", "label", "ceiling", "student")
BASELINE = "xent"
ORACLE = " (oracle)"  # what a method's name ends in where ground truth selected the student's checkpoint
KEYS = ("task", "weak", "strong", "method")


def read_pairs(root) -> list[dict]:
    """The pairs of ROOT/sweep.json. UserError where it is absent or not what the sweep writes.

    Older files call the method `loss`.
    """
    file = epath.Path(root) / "sweep.json"
    if not file.exists():
        raise UserError(f"{file}: no such file; a report needs the root of a sweep, or the keys weak, ceiling and student")
    pairs = runlog.read_json(file).get("pairs")
    if not isinstance(pairs, list) or not pairs:
        raise UserError(f"{file}: expected a list 'pairs' that is not empty, found {type(pairs).__name__}")
    seen, out = set(), []
    for number, pair in enumerate(pairs):
        pair = dict(pair) if isinstance(pair, dict) else {}
        if "method" not in pair and "loss" in pair:
            pair["method"] = pair.pop("loss")
        _check_pair(pair, f"{file}: pair {number}")
        key = key_of(pair) + (pair["seed"],)
        if key + (bool(pair.get("oracle")),) in seen:
            raise UserError(f"{file}: pair {number} repeats task, weak, strong, method, seed = {key}")
        seen.add(key + (bool(pair.get("oracle")),))
        out.append(pair)
    return out


def _check_pair(pair: dict, where: str) -> None:
    runs = pair.get("runs")
    lacks = [k for k in (*KEYS, "seed", "runs") if k not in pair]
    lacks += [f"runs.{role}" for role in ROLES if isinstance(runs, dict) and role != "label" and role not in runs]
    if lacks or not isinstance(runs, dict):
        raise UserError(f"{where} lacks {', '.join(lacks) or 'runs'}")
    texts = [(k, pair[k]) for k in (*KEYS, "control", "baseline") if k in pair] + [(f"runs.{role}", name) for role, name in runs.items()]
    if wrong := [f"{key} is {value!r}" for key, value in texts if not isinstance(value, str) and not (value is None and key not in KEYS)]:
        raise UserError(f"{where}: {wrong[0]}, expected a text")
    if not isinstance(pair.get("oracle", False), bool):
        raise UserError(f"{where}: oracle is {pair['oracle']!r}, expected true or false")


def pair_of_runs(weak: str, ceiling: str, student: str, label: str = "") -> list[dict]:
    """The pairs (one) of three runs that no sweep made; task, models, method and seed come from their config.json.

    Raises:
      UserError: runs of other stages than a report can use, or of other tasks or models.
    """
    configs = {role: runlog.load(folder).record.get("config", {}) for role, folder in
               (("weak", weak), ("ceiling", ceiling), ("student", student))}  # fmt: skip
    folders = {"weak": weak, "ceiling": ceiling, "student": student}
    for role, config in configs.items():
        if role == "weak" and config.get("stage") == "ensemble":  # stands for a task and a model of its members'
            config.update({"task": configs["student"].get("task"), "model": f"ensemble {config.get('how', '')}".strip()})
        if lacks := [k for k in ("task", "model", "seed") if k not in config]:
            raise UserError(f"{role}={folders[role]}: config.json has no {lacks[0]}; expected a run that predicts a test set")
    method = _method(configs["student"], student)
    for role in ("weak", "ceiling"):
        if configs[role]["task"] != configs["student"]["task"]:
            raise UserError(f"{role}: was trained on task {configs[role]['task']!r}, the student on {configs['student']['task']!r}")
    if configs["ceiling"]["model"] != configs["student"]["model"]:
        raise UserError(f"ceiling: is model {configs['ceiling']['model']!r}, the student is {configs['student']['model']!r}")
    runs = folders | ({"label": label} if label else {})
    return [{"task": configs["student"]["task"], "weak": configs["weak"]["model"], "strong": configs["student"]["model"],
             "method": method, "seed": configs["student"]["seed"],
             "runs": {role: os.path.abspath(r) if "://" not in r else r for role, r in runs.items()}}]


def _method(config: dict, folder: str) -> str:
    """A name for how a student was made, as a sweep would call it."""
    stage = config.get("stage", "finetune")
    if stage == "probe" and "probe" in config:
        return f"probe {config['probe']}"
    if stage == "prompt":
        return "few-shot" if config.get("shots") else "zero-shot"
    if "loss" not in config:
        raise UserError(f"student={folder}: config.json has no loss; expected a run of stage finetune, probe or prompt")
    return config["loss"]


def key_of(pair: dict) -> tuple:
    """What all seeds of one comparison share: task, weak, strong, method."""
    return tuple(pair[k] for k in KEYS)


def arrange(root, pairs: list[dict]) -> list[dict]:
    """The pairs as a report shows them: short names, oracle methods marked, by task, models and method in order of appearance.

    A student is an oracle's where its pair says so or where its run's config has `select` = oracle. `root` is the sweep's.
    """
    short = {}
    for keys in (("task",), ("weak", "strong")):  # folders and hub ids by their last part, where that is unique
        names = {p[k] for p in pairs for k in keys}
        last = {n: n.rstrip("/").rsplit("/", 1)[-1] for n in names}
        short.update({(k, n): last[n] if list(last.values()).count(last[n]) == 1 else n for n in names for k in keys})
    out = []
    for p in pairs:
        config = runlog.load(epath.Path(root) / p["runs"]["student"]).record.get("config", {})
        oracle = bool(p.get("oracle")) or config.get("select") == "oracle"
        method = p["method"] + (ORACLE if oracle and not p["method"].endswith(ORACLE) else "")
        labels = str(config.get("labels") or "")
        out.append({**p, **{k: short[k, p[k]] for k in ("task", "weak", "strong")}, "method": method, "oracle": oracle,
                    "label_file": labels.rsplit("/", 1)[-1].removesuffix(".parquet") if labels.endswith(".parquet") else "b"})
    tasks, models, methods = ({name: i for i, name in enumerate(dict.fromkeys(names))} for names in
                              ((p["task"] for p in out), ((p["weak"], p["strong"]) for p in out), (p["method"] for p in out)))
    return sorted(out, key=lambda p: (tasks[p["task"]], models[p["weak"], p["strong"]], methods[p["method"]]))


def opponents(pairs: list[dict]) -> dict[tuple, dict[str, str]]:
    """(task, weak, strong, method) -> {"baseline": method, "control": method}, as far as these are among the `pairs` of `arrange`.

    Like is compared with like: an oracle's method with the oracle's baseline where there is one, else with the plain one.
    """
    known: dict[tuple, set[str]] = {}
    for p in pairs:
        known.setdefault(key_of(p)[:3], set()).add(p["method"])
    out: dict[tuple, dict[str, str]] = {}
    for p in pairs:
        for kind, name in (("baseline", p.get("baseline") or BASELINE), ("control", p.get("control"))):
            if name is None:
                continue
            plain = name.removesuffix(ORACLE)
            choice = [plain + ORACLE, plain] if p["oracle"] else [plain, plain + ORACLE]
            found = [m for m in choice if m in known[key_of(p)[:3]] and m != p["method"]]
            if p["method"].removesuffix(ORACLE) == plain and not p["oracle"]:
                found = []  # the baseline itself
            if found:
                out.setdefault(key_of(p), {})[kind] = found[0]
    return out
