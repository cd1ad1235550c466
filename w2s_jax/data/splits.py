"""Which documents train, validate and test a run: seeded, and disjoint by group.

Everything here is governed by the task and `data_seed`: never by a model, a tokenizer or `seed`, so
that supervisor, ceiling and student of an experiment agree on halves A and B and on the test set.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json

import numpy as np

from w2s_jax.data import sources, tasks
from w2s_jax.data.examples import Examples
from w2s_jax.errors import UserError, nearest

PARTS = ("a", "b", "train")
# Independent random streams of one data_seed, so that a change of one choice leaves the others alone.
TEST, ORDER, VAL, BALANCE, BALANCE_TEST = range(5)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The documents of a run.

    Attributes:
      train: what `config.split` names, less `val`; in seeded order, or in file order under shuffle=none.
      val: whole groups of that part, held out for validation.
      test: the test documents.
      wanted: the documents that `only` asked for (whole halves, validation documents included), else None.
      n_dropped: training documents removed: "group" = their group occurs in the test set, "duplicate" = same text
        as an earlier one; "empty" = no text (test set included).
      notes: lines to print.
      fingerprint: hex digest over the task's name and the content of its splits.
    """

    train: Examples
    val: Examples
    test: Examples
    wanted: Examples | None
    n_dropped: dict[str, int]
    notes: list[str]
    fingerprint: str


def prepare(config, only: str | None = None) -> Prepared:
    """Loads a task and cuts it into train, val and test.

    Args:
      config: a run's config: task, task_dir, task_revision, data_seed, split, n_train, n_val, n_test,
        test_fraction, group, balance, shuffle, labels.
      only: "a", "b", "train", "val" or "test": also return these documents as `wanted`, and ask only of them
        that there are any (for labelling; otherwise train and test must hold both classes).

    The order of things: empty and (group=auto) duplicate training documents go; the test set is the source's, or
    is carved; training documents whose group is in it go; `balance`; `n_train` documents in seeded order are
    halved; `n_val` are held out of the part. Groups are never cut, unless group=none.

    Raises UserError where there are too few documents, or one class only.
    """
    for key, known in (("split", PARTS), ("group", ("auto", "none"))):
        if config[key] not in known:
            raise UserError(f"{key}={config[key]!r}: expected {' | '.join(known)}{nearest(config[key], known)}")
    if only not in (None, *PARTS, "val", "test"):
        raise UserError(f"part {only!r}: expected a | b | train | val | test")
    grouped = config.group == "auto"
    in_file_order = config.shuffle == "none" and config.split == "train" and not config.n_val and only not in ("a", "b")
    dropped = dict.fromkeys(("group", "duplicate", "empty"), 0)
    notes: list[str] = []

    pool, test, content = _load(config, only, dropped, notes)
    if grouped:
        pool, test = _merge_groups(pool, test)
    if grouped and not in_file_order:
        pool = _drop_duplicates(pool, dropped, notes)
    if test is None:
        pool, test = _carve(pool, config, grouped)
    pool = _drop_test_groups(pool, test, grouped and not in_file_order, dropped, notes)
    if config.balance:
        pool = _balance(pool, _rng(config, BALANCE), "training", notes)
        test = _balance(test, _rng(config, BALANCE_TEST), "test", notes)

    if len(test) < config.n_test:
        notes.append(f"n_test={config.n_test}: the task has {len(test)} test documents, all are used")
    else:
        test = test.select(np.sort(_rng(config, TEST).permutation(len(test))[: config.n_test]))  # a seeded choice, in file order
    if len(pool) < config.n_train:
        notes.append(f"n_train={config.n_train}: the task has {len(pool)} training documents, all are used")

    if in_file_order:
        part = pool.select(range(min(len(pool), config.n_train)))
        halves = {"train": part}
        val = part.select([])
    else:
        order = _rng(config, ORDER).permutation(len(pool))
        keys = pool.groups if grouped else pool.ids
        chosen, _ = fill(order, keys, config.n_train)
        a, b = fill(chosen, keys, len(chosen) // 2)
        if config.shuffle == "none":
            chosen, a, b = (np.sort(rows) for rows in (chosen, a, b))
        halves = {"a": pool.select(a), "b": pool.select(b), "train": pool.select(chosen)}
        part, val = halves[config.split], part_val(halves[config.split], config, grouped)
        held_out = set(val.ids)
        part = part.select([row for row, i in enumerate(part.ids) if i not in held_out])
        _check_disjoint({"train": part, "val": val, "test": test} if grouped else {"train": part, "val": val}, grouped)
        _check_disjoint({"a": halves["a"], "b": halves["b"]}, grouped)
        if not grouped and config.split != "train":
            shared = len(set(halves["a"].groups) & set(halves["b"].groups))
            notes.append(f"group=none: halves a and b share {shared} of {len(set(pool.groups))} groups")

    everything = {"train": part, "val": val, "test": test}
    wanted = None if only is None else {**everything, **halves}.get(only)
    if only is None:
        unlabelled = ("train",) if config.labels else ()
        for name in ("train", "test"):
            check_usable(everything[name], name, config, labelled=name not in unlabelled)
        if config.n_val and not len(val):
            raise UserError(f"n_val={config.n_val}: no validation documents could be held out of {len(part)}")
    elif wanted is None or not len(wanted):
        raise UserError(f"task={config.task!r}: no documents in part {only!r} "
                        f"(n_train={config.n_train}, n_val={config.n_val}, n_test={config.n_test})")
    return Prepared(part, val, test, wanted, dropped, notes, content)


def read_documents(path) -> tuple[Examples, str]:
    """The documents of one file of the user's, for labelling: (examples, fingerprint). The file's stem is their split."""
    source = sources.read_file(path)
    return tasks.user_examples(tasks.short_name(str(path)).split(".")[0], source), source.fingerprint


def concat(*parts: Examples) -> Examples:
    """Several examples, one after the other (all with texts, or all with tokens)."""
    def join(columns):
        return None if any(c is None for c in columns) else [x for c in columns for x in c]
    return Examples(join([p.ids for p in parts]), join([p.texts for p in parts]), join([p.tokens for p in parts]),
                    np.concatenate([p.soft_labels for p in parts]), join([p.groups for p in parts]),
                    None if any(p.weights is None for p in parts) else np.concatenate([p.weights for p in parts]))


def fingerprint(config) -> str:
    """`Prepared.fingerprint` without preparing anything."""
    return _fingerprint(config.task, _sources(config))


def _sources(config) -> dict[str, sources.Source | None]:
    return {role: sources.load(config.task, role, task_dir=config.task_dir, revision=config.task_revision, seed=config.data_seed)
            for role in ("train", "test")}


def _fingerprint(task: str, found: dict) -> str:
    content = {"task": tasks.short_name(task), **{role: source and source.fingerprint for role, source in found.items()}}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _rng(config, stream: int) -> np.random.Generator:
    return np.random.default_rng([config.data_seed, stream])


def _load(config, only, dropped, notes) -> tuple[Examples, Examples | None, str]:
    """(training pool, test documents or None where they must be carved, fingerprint)."""
    task = tasks.find(config.task)
    found = _sources(config)
    missing = [role for role, source in found.items() if source is None]
    names = {role: task.splits[i] if task else role for i, role in enumerate(("train", "test"))}
    if missing and not (config.test_fraction and len(missing) == 1) and not (missing == ["train"] and only == "test"):
        where = f"task_dir={config.task_dir!r}" if task else f"task={config.task!r}"
        files = " or ".join(f"{names[role]}.*" for role in missing)
        raise UserError(f"{where}: no {files} (jsonl, csv or parquet, .gz or not) of task {config.task!r}; "
                        "where one split is there, test_fraction=F carves the share F of it, by group, as the test set")
    if not missing and config.test_fraction:
        notes.append(f"test_fraction={config.test_fraction} is not used: the task has a test split")
    documents: dict[str, Examples] = {}
    for role, source in found.items():
        if source is None:
            continue
        if source.note:
            notes.append(source.note)
        if task:
            documents[role] = _drop_empty(tasks.examples(config.task, source, config.data_seed), dropped)
        else:
            documents[role] = tasks.user_examples(tasks.short_name(config.task), source)
    content = _fingerprint(config.task, found)
    if missing == ["train"] and only == "test" and not config.test_fraction:
        return documents["test"].select([]), documents["test"], content
    if missing:  # the one split there is serves as the pool
        return next(iter(documents.values())), None, content
    if (documents["train"].texts is None) != (documents["test"].texts is None):
        raise UserError(f"task={config.task!r}: one of train and test has texts, the other token ids only")
    return documents["train"], documents["test"], content


def _drop_empty(examples: Examples, dropped) -> Examples:
    keep = [row for row, text in enumerate(examples.texts) if text.strip()]
    dropped["empty"] += len(examples) - len(keep)
    return examples.select(keep) if len(keep) < len(examples) else examples


def _merge_groups(pool: Examples, test: Examples | None) -> tuple[Examples, Examples | None]:
    """Groups that share an identical text become one, named by the first of them in the alphabet."""
    parent: dict[str, str] = {}

    def root(group: str) -> str:
        while (above := parent.get(group, group)) != group:
            parent[group] = group = parent.get(above, above)
        return group

    of_text: dict[str, str] = {}
    parts = [p for p in (pool, test) if p is not None]
    for part in parts:
        for sha, group in zip(part.text_shas, part.groups):
            first, second = sorted((root(of_text.setdefault(sha, group)), root(group)))
            if first != second:
                parent[second] = first
    merged = [p.replace(groups=[root(g) for g in p.groups]) if parent else p for p in parts]
    return merged[0], merged[1] if test is not None else None


def _drop_duplicates(pool: Examples, dropped, notes) -> Examples:
    first: dict[str, int] = {}
    at = [first.setdefault(sha, row) for row, sha in enumerate(pool.text_shas)]
    keep = [row for row, earlier in enumerate(at) if row == earlier]
    if len(keep) == len(pool):
        return pool
    known = pool.labels
    other = sum(known[row] != known[earlier] for row, earlier in enumerate(at))
    dropped["duplicate"] = len(pool) - len(keep)
    notes.append(f"{dropped['duplicate']} training documents dropped: same text as an earlier one ({other} of them with another label)")
    return pool.select(keep)


def _carve(pool: Examples, config, grouped: bool) -> tuple[Examples, Examples]:
    fraction = config.test_fraction
    if not 0 < fraction < 1:
        raise UserError(f"test_fraction={fraction}: expected a share between 0 and 1")
    keys = pool.groups if grouped else pool.ids
    test, rest = fill(_rng(config, TEST).permutation(len(pool)), keys, round(fraction * len(pool)))
    return pool.select(np.sort(rest)), pool.select(np.sort(test))


def _drop_test_groups(pool: Examples, test: Examples, drop: bool, dropped, notes) -> Examples:
    """Removes training documents whose group occurs in the test set, or says how many there are."""
    in_test = set(test.groups)
    keep = [row for row, group in enumerate(pool.groups) if group not in in_test]
    n = len(pool) - len(keep)
    if n and drop:
        dropped["group"] = n
        notes.append(f"{n} training documents dropped: their group occurs in the test set")
        return pool.select(keep)
    if n:
        notes.append(f"{n} of {len(pool)} training documents share a group with the test set; they are kept "
                     "(group=none, or the file is read as it is under split=train, shuffle=none)")
    return pool


def _balance(examples: Examples, rng: np.random.Generator, name: str, notes) -> Examples:
    """Undersamples the majority class to 50/50; the order stays."""
    known = examples.labels
    rows = [np.flatnonzero(known == label) for label in (0, 1)]
    if (known < 0).any():
        raise UserError(f"balance=True: {int((known < 0).sum())} {name} documents have no label")
    n = min(map(len, rows))
    notes.append(f"balance: {len(examples) - 2 * n} of {len(examples)} {name} documents of the majority class dropped")
    return examples.select(np.sort(np.concatenate([rng.permutation(r)[:n] for r in rows])))


def fill(order, keys: list[str], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts `order` (row numbers) into (first, rest): whole groups, by first appearance, while they fit into `n` documents."""
    sizes = collections.Counter(keys[row] for row in order)
    left, chosen = n, set()
    for key in dict.fromkeys(keys[row] for row in order):
        if sizes[key] <= left:
            chosen.add(key)
            left -= sizes[key]
    inside = np.asarray([keys[row] in chosen for row in order], bool)
    order = np.asarray(order, np.int64)
    return order[inside], order[~inside]


def part_val(part: Examples, config, grouped: bool) -> Examples:
    """The `n_val` documents of a part that are held out: whole groups, a seeded choice, in the part's order."""
    keys = part.groups if grouped else part.ids
    chosen, _ = fill(_rng(config, VAL).permutation(len(part)), keys, config.n_val)
    return part.select(np.sort(chosen))


def _check_disjoint(parts: dict[str, Examples], grouped: bool) -> None:
    """Raises AssertionError where two parts share a group (group=none: a document): a defect of this program."""
    owner: dict[str, str] = {}
    for name, part in parts.items():
        for key in set(part.groups if grouped else part.ids):
            if owner.setdefault(key, name) != name:
                raise AssertionError(f"{key!r} is in {owner[key]} and in {name}")


def check_usable(part: Examples, name: str, config, labelled: bool, left: str = "") -> None:
    """UserError where a part is empty, lacks labels, or holds one class only; `left` names what else decided what is left of it."""
    key = f"split={config.split!r}, n_train={config.n_train}" if name == "train" else f"n_test={config.n_test}"
    key += "".join(f", {name}={config[name]}" for name in ("n_val", "test_fraction") if config[name]) + left
    if not len(part):
        raise UserError(f"task={config.task!r}: no {name} documents ({key}); expected at least one of each class")
    if not labelled:
        return
    known = part.labels
    if (known < 0).any():
        raise UserError(f"task={config.task!r}: {int((known < 0).sum())} {name} documents have no label, "
                        f"the first {part.ids[int(np.argmax(known < 0))]!r}; expected a column label or soft_label")
    if len(set(known.tolist())) < 2:
        raise UserError(f"task={config.task!r}: all {len(part)} {name} documents are of class {known[0]} ({key}); "
                        "expected both classes")
