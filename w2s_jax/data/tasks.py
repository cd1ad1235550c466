"""The text tasks, each a few declarative lines, and how their rows become labelled documents.

A task says where its rows are (a hub data set and the names of its two splits), how a row is worded,
and either which column is the label or which answers there are. With answers, a seeded coin shows the
true one (label 1) or a wrong one (label 0): one `random.Random(seed)` a split, walked in row order, as
openai/weak-to-strong and EleutherAI/w2s do, whose wordings these are.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from pathlib import PurePath

import numpy as np

from w2s_jax.data.examples import Examples, one_hot, text_sha
from w2s_jax.errors import UserError, nearest

PARQUET = "refs/convert/parquet"  # where the hub keeps the rows of data sets that are loading scripts


class Row:
    """One row of a source, read by column with the checks that make a bad row one clear line."""

    def __init__(self, values: dict, where: str):
        self.values, self.where = values, where

    def get(self, column: str):
        """The value of a column. UserError where the column is missing or the value is null or NaN."""
        if column not in self.values:
            known = sorted(map(str, self.values))
            raise UserError(f"{self.where}: no column {column!r}{nearest(column, known)} (columns: {', '.join(known)})")
        value = self.values[column]
        if value is None or (isinstance(value, float) and np.isnan(value)):
            raise UserError(f"{self.where}: column {column!r} is {'null' if value is None else 'NaN'}")
        return value

    def text(self, column: str) -> str:
        value = self.get(column)
        if not isinstance(value, str):
            raise UserError(f"{self.where}: column {column!r} is {value!r}, expected text")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, written as \ud800 in JSON: no tokenizer takes it
            raise UserError(f"{self.where}: column {column!r} holds {ascii(value[error.start])}, which is no character") from error
        return value

    __getitem__ = text  # a template takes its fields as texts

    def nested(self, column: str):
        """A column of lists or named lists; csv files hold these as JSON."""
        value = self.get(column)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                pass  # the caller says what it expected
        return value

    def items(self, column: str) -> list:
        value = self.nested(column)
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{self.where}: column {column!r} is {value!r}, expected a list")
        return list(value)

    def texts(self, column: str) -> list[str]:
        values = self.items(column)
        if not all(isinstance(v, str) for v in values):
            raise UserError(f"{self.where}: column {column!r} is {values!r}, expected a list of texts")
        return values

    def struct(self, column: str) -> Row:
        """A column of named columns, such as `choices` = {text: [...], label: [...]}."""
        value = self.nested(column)
        if not isinstance(value, dict):
            raise UserError(f"{self.where}: column {column!r} is {value!r}, expected named lists")
        return Row(value, f"{self.where}: {column}")

    def index(self, column: str, size: int, first: int = 0) -> int:
        """An integer in `first .. first + size - 1`, returned counted from 0. "1", 1.0, true and "true" are 1."""
        value = self.get(column)
        number = {"true": 1, "false": 0}.get(str(value).lower(), value)
        try:
            number = float(number)
        except (TypeError, ValueError):
            number = float("nan")
        if number not in range(first, first + size):
            expected = f"{first} or {first + 1}" if size == 2 else f"{first} to {first + size - 1}"
            raise UserError(f"{self.where}: column {column!r} is {value!r}, expected {expected}")
        return int(number) - first


@dataclasses.dataclass(frozen=True)
class Task:
    """Where a task's rows are and how they are worded.

    Attributes:
      hub: hub id of the data set; empty where the rows are generated.
      text: template over the row's columns, and `{answer}` where the task has answers.
      config: the data set's configuration.
      splits: names of the source splits that serve as train and test.
      label: the column that is 0 or 1, or a function of the row.
      answers: function of the row: the answers, the true one first, then the wrong ones in field order.
      no_true: rows of which a wrong answer is always shown (no coin is drawn).
      arrange: function of (row, rng), called after the coin: further fields of the row.
      fields: function of the row: further fields for the template.
      group: column (or function of the row) that must stay on one side of a split; None = the text.
      revision: revision of the data set that is read unless the config names another.
      rows: for generated tasks, `rows(split, seed) -> list of dicts`.
    """

    hub: str
    text: str
    config: str | None = None
    splits: tuple[str, str] = ("train", "test")
    label: str | Callable[[Row], int] | None = None
    answers: Callable[[Row], Sequence[str]] | None = None
    no_true: Callable[[Row], bool] | None = None
    arrange: Callable[[Row, random.Random], dict] | None = None
    fields: Callable[[Row], dict] | None = None
    group: str | Callable[[Row], str] | None = None
    revision: str | None = None
    rows: Callable[[str, int], list[dict]] | None = None


def columns(*names: str) -> Callable[[Row], list[str]]:
    """Answers that stand in columns of their own, the true one first."""
    return lambda row: [row.text(name) for name in names]


def true_first(answers: Sequence[str], true: int) -> list[str]:
    return [answers[true], *(a for i, a in enumerate(answers) if i != true)]


def listed(row: Row, column: str, index: str) -> list[str]:
    """Answers in one list, the true one by its index."""
    answers = row.texts(column)
    return true_first(answers, row.index(index, len(answers)))


def keyed(row: Row, by_letter: bool = False) -> list[str]:
    """Answers in `choices` = {text, label} with the true one's letter in `answerKey`, shown as the letter where `by_letter`."""
    choices = row.struct("choices")
    texts, letters, key = choices.texts("text"), choices.texts("label"), row.text("answerKey")
    if key not in letters or len(texts) != len(letters):
        raise UserError(f"{row.where}: column 'answerKey' is {key!r}, expected one of {', '.join(letters)}")
    answers = true_first(texts, letters.index(key))
    return [key, *answers[1:]] if by_letter else answers


def cosmos_answers(row: Row) -> list[str]:
    answers = [row.text(f"answer{i}") for i in range(4)]
    true = answers[row.index("label", 4)]
    return [true, *(a for a in answers if a != true)]


def dream_answers(row: Row) -> list[str]:
    choices, true = row.texts("choice"), row.text("answer")
    if true not in choices:
        raise UserError(f"{row.where}: column 'answer' is {true!r}, expected one of the column 'choice'")
    return true_first(choices, choices.index(true))


def pleasant_order(row: Row, rng: random.Random) -> dict:
    order = [row.text("baseline"), row.text("less_pleasant")]
    rng.shuffle(order)
    better = order.index(row.text("baseline"))
    return {"first": order[0], "second": order[1], "better": str(better + 1), "worse": str(2 - better)}


def world_rows(split: str, seed: int) -> list[dict]:
    from w2s_jax.data import world  # generated on demand

    return world.task_rows(split, seed)


SCIQ = columns("correct_answer", "distractor1", "distractor2", "distractor3")
VALIDATION = ("train", "validation")  # the hub's test split has no labels, or is smaller

TASKS: dict[str, Task] = {
    "sciq": Task("allenai/sciq", "Q: {question} A: {answer}", answers=SCIQ, group="question"),
    "sciq_with_support": Task(
        "allenai/sciq", 'Name: Bob\n\nPassage 1:\n{support}\n\nQ1: "{question}" Is the answer "{answer}"?',
        answers=SCIQ, group=lambda r: r["support"] or r["question"]),
    "boolq": Task("google/boolq", "Passage: {passage}\nQuestion: {question}", splits=VALIDATION, label="answer", group="passage"),
    "cosmos_qa": Task(
        "allenai/cosmos_qa", "Context: {context}\nQuestion: {question}\nAnswer: {answer}", splits=VALIDATION, revision=PARQUET,
        answers=cosmos_answers, no_true=lambda r: "None of the above choices ." in cosmos_answers(r)[0], group="context"),
    "amazon_polarity": Task("fancyzhx/amazon_polarity", "{title} {content}", label="label"),
    "anthropic_hh": Task(
        "Anthropic/hh-rlhf", "{answer}", answers=columns("chosen", "rejected"),
        group=lambda r: r["chosen"].rpartition("\n\nAssistant:")[0] or r["chosen"]),
    "anli-r2": Task(
        "facebook/anli", "Premise: {premise}\nHypothesis: {hypothesis}\n\nDoes the premise entail the hypothesis?",
        splits=("train_r2", "test_r2"), label=lambda r: int(r.index("label", 3) == 0)),
    "cola": Task("nyu-mll/glue", "{sentence}", config="cola", splits=VALIDATION, label="label"),
    "dream": Task(
        "dataset-org/dream", "{joined}\n\nQ: {question} A: {answer}", revision=PARQUET, answers=dream_answers,
        fields=lambda r: {"joined": "\n".join(r.texts("dialogue"))}, group=lambda r: "\n".join(r.texts("dialogue"))),
    "ethics-deontology": Task(
        "hendrycks/ethics", "Q: Is the following a morally valid excuse?\n\n{scenario}\n\n{excuse}\n\nA:",
        config="deontology", revision=PARQUET, label="label", group="scenario"),
    "ethics-justice": Task(
        "hendrycks/ethics", "Q: Does this statement exemplify justice?\n\n{scenario}\n\nA:",
        config="justice", revision=PARQUET, label="label", group="scenario"),
    "ethics-virtue": Task(
        "hendrycks/ethics", "Q: Does this behavior match the adjective that follows?\n\n{scenario}\n\nA:",
        config="virtue", revision=PARQUET, label="label", group="scenario"),
    "ethics-utilitarianism": Task(
        "hendrycks/ethics", "Which is more pleasant?\n1) {first}\n2) {second} A: {answer}",
        config="utilitarianism", revision=PARQUET, arrange=pleasant_order, answers=columns("better", "worse"), group="baseline"),
    "mc_taco": Task(  # the hub's test split is the larger one, so it trains
        "CogComp/mc_taco", "{sentence}\n\nGiven the above, {question} Is the answer {answer}?",
        splits=("test", "validation"), revision=PARQUET, label="label", group="sentence"),
    "hellaswag": Task(
        "Rowan/hellaswag", 'Context:\n{ctx}\n\nContinuations:\n\n{joined}\n\nQ: Is "{answer}" the best continuation?',
        splits=VALIDATION, revision=PARQUET, answers=lambda r: listed(r, "endings", "label"),
        fields=lambda r: {"joined": "\n".join(r.texts("endings"))}, group="ctx"),
    "multirc": Task(
        "aps/super_glue", 'Passage:\n\n{paragraph}\n\nQ: "{question}" Is the answer "{answer}"?',
        config="multirc", splits=VALIDATION, revision=PARQUET, label="label", group="paragraph"),
    "openbookqa": Task(  # as published: the form of the answer (letter or text) gives the label away
        "allenai/openbookqa", "Q: {question_stem}\n\nChoices:\n{joined}\n\nAnswer: {answer}", config="main",
        answers=lambda r: keyed(r, by_letter=True), group="question_stem",
        fields=lambda r: {"joined": "\n".join(f"{a}) {t}" for a, t in zip(r.struct("choices").texts("label"),
                                                                          r.struct("choices").texts("text")))}),
    "paws": Task(
        "google-research-datasets/paws", "Sent 1: {sentence1}\nSent 2: {sentence2}\n\nQ: Are these sentences semantically equivalent?",
        config="labeled_final", label="label"),
    "piqa": Task(
        "ybisk/piqa", "Q: {goal} A: {answer}", splits=VALIDATION, revision=PARQUET, group="goal",
        answers=lambda r: true_first([r["sol1"], r["sol2"]], r.index("label", 2))),
    "quail": Task(
        "textmachinelab/quail", 'Passage:\n\n{context}\n\nQ: "{question}" Is the answer "{answer}"?', splits=VALIDATION,
        revision=PARQUET, answers=lambda r: listed(r, "answers", "correct_answer_id"), group="context"),
    "quartz": Task(
        "allenai/quartz", 'Passage:\n{para}\n\nQ: "{question}" Is the answer "{answer}"?', revision=PARQUET,
        answers=keyed, group="para"),
    "social_i_qa": Task(
        "allenai/social_i_qa",
        'Context:\n{context}\n\nQuestion: "{question}"\n\nChoices:\n{answerA}\n{answerB}\n{answerC}\n\nIs the answer "{answer}"?',
        splits=VALIDATION, revision=PARQUET, group="context",
        answers=lambda r: true_first([r["answerA"], r["answerB"], r["answerC"]], r.index("label", 3, first=1))),
    "sst2": Task("stanfordnlp/sst2", "{sentence}", splits=VALIDATION, label="label"),
    "wic": Task(
        "aps/super_glue", 'Sentence 1:\n{sentence1}\n\nSentence 2:\n{sentence2}\n\n'
        'Q: Does "{word}" have the same meaning in the above sentences?',
        config="wic", splits=VALIDATION, revision=PARQUET, label="label"),
    "twitter-sentiment": Task("EleutherAI/twitter-sentiment", "{text}", label="label"),
    "world": Task("", "{text}", label="label", group="entity", rows=world_rows),
}


def find(name: str) -> Task | None:
    """The registered task of that name, None for an existing folder. UserError for anything else."""
    from etils import epath

    if name in TASKS:
        return TASKS[name]
    if name and epath.Path(name).is_dir():
        return None
    raise UserError(f"task={name!r}: neither a registered task nor a folder{nearest(name, TASKS)}; registered: {', '.join(TASKS)}")


def short_name(name: str) -> str:
    """What a task is called in document ids: its registered name, or the last part of the folder's path."""
    return name if name in TASKS else PurePath(name.rstrip("/")).name or "task"


def examples(name: str, source, seed: int) -> Examples:
    """Every row of one split of a registered task as a labelled document, in row order.

    Args:
      name: registered name of the task.
      source: a `sources.Source`.
      seed: `data_seed`; it governs the coins and nothing else here.

    Raises UserError naming the file (or hub id), the row and the column where a row can't be read.
    """
    task = TASKS[name]
    rng = random.Random(seed)
    ids, texts, labels, groups = [], [], [], []
    for number, values in zip(source.numbers, source.rows):
        row = Row(values, f"{source.name}, row {number}")
        variant = 0
        fields = {}
        if task.answers:
            true = not (task.no_true and task.no_true(row)) and rng.random() < 0.5
            if task.arrange:
                row = Row({**values, **task.arrange(row, rng)}, row.where)
            answers = task.answers(row)
            if not true:
                if len(answers) < 2:
                    raise UserError(f"{row.where}: no wrong answer to show")
                # Where there is one wrong answer the references draw nothing.
                variant = rng.choice(range(1, len(answers))) if len(answers) > 2 else 1
            fields["answer"], label = answers[variant], int(true)
        else:
            label = task.label(row) if callable(task.label) else row.index(task.label, 2)
        if task.fields:
            fields |= task.fields(row)
        text = task.text.format_map(Row({**row.values, **fields}, row.where))
        group = text if task.group is None else task.group(row) if callable(task.group) else row.text(task.group)
        ids.append(f"{name}/{source.split}/{number}/{variant}")
        texts.append(text)
        labels.append(label)
        groups.append(text_sha(group))
    return Examples(ids, texts, None, one_hot(np.asarray(labels, np.int32)), groups)


def user_examples(name: str, source) -> Examples:
    """Every row of a user's file, in file order.

    Columns: `text` or `input_ids` (or both), at most one of `label` (0 or 1) and `soft_label` (two
    probabilities, or the one of class 1), and if wanted `id` (unique) and `group`. Without a label the
    rows of `soft_labels` are NaN: such a file can be labelled, not trained on.
    """
    def has(column):
        return any(column in row for row in source.rows)
    if not (has("text") or has("input_ids")):
        known = sorted({str(c) for row in source.rows[:1] for c in row})
        raise UserError(f"{source.name}: no column 'text' or 'input_ids' (columns: {', '.join(known)})")
    if has("label") and has("soft_label"):
        raise UserError(f"{source.name}: both 'label' and 'soft_label'; expected one of them")
    ids, texts, tokens, soft, groups = [], [], [], [], []
    for number, values in zip(source.numbers, source.rows):
        row = Row(values, f"{source.name}, row {number}")
        if has("text"):
            texts.append(row.text("text"))
            if not texts[-1].strip() and not has("input_ids"):
                raise UserError(f"{row.where}: column 'text' is empty")
        if has("input_ids"):
            tokens.append(token_ids(row))
        if has("soft_label"):
            soft.append(soft_label(row))
        elif has("label"):
            soft.append(np.eye(2, dtype=np.float32)[row.index("label", 2)])
        else:
            soft.append(np.full(2, np.nan, np.float32))
        document = texts[-1] if texts else tokens[-1]
        ids.append(str(row.get("id")) if has("id") else f"{name}/{source.split}/{number}/0")
        groups.append(str(row.get("group")) if has("group") else text_sha(document))
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = next(i for i in ids if i in seen or seen.add(i))
        raise UserError(f"{source.name}: column 'id' holds {twice!r} more than once, expected unique ids")
    return Examples(ids, texts or None, tokens or None, np.stack(soft).astype(np.float32), groups)


def token_ids(row: Row) -> np.ndarray:
    """The column `input_ids` as int32, never empty and never negative."""
    values = row.items("input_ids")
    whole = all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) and 0 <= v < 2**31 for v in values)
    if not values or not whole:
        raise UserError(f"{row.where}: column 'input_ids' is {str(values)[:60]}, expected one or more token ids")
    return np.asarray(values, np.int32)


def soft_label(row: Row) -> np.ndarray:
    """The column `soft_label` as float32 `[2]`: two probabilities that sum to 1, or the one of class 1."""
    value = row.nested("soft_label")
    try:
        pair = np.asarray(value, np.float64).reshape(-1)
        pair = np.asarray([1 - pair[0], pair[0]]) if pair.size == 1 else pair
    except (TypeError, ValueError):
        pair = np.empty(0)
    if pair.shape != (2,) or not np.isfinite(pair).all() or (pair < 0).any() or (pair > 1).any() or abs(pair.sum() - 1) > 1e-4:
        raise UserError(f"{row.where}: column 'soft_label' is {value!r}, expected two probabilities that sum to 1, or one in [0, 1]")
    return pair.astype(np.float32)
