"""Prompts: a document in a template, the shots before it, and which tokens of it are the answer.

Templates of the registered tasks follow their texts (tasks.py): where a text ends in a yes/no question, or in "A:", the answer follows
at once; where it shows a question with an answer, the template asks whether that is correct; sentiment is asked for as in Zhao et
al. 2021 (arXiv 2102.09690, table 5).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from w2s_jax import hub
from w2s_jax.data import labels as labels_lib
from w2s_jax.data import splits
from w2s_jax.data.examples import Examples
from w2s_jax.errors import UserError

SHOTS = 0x5407  # the random stream of the choice of shots
BETWEEN = "\n\n"  # what stands between shots
CONTENT_FREE = ("N/A", "[MASK]", "")  # Zhao et al. 2021, section 4


class Style(NamedTuple):
    """How a task is asked: `template` with {text} in it and {answer} at its end, and the answers of class 0 and class 1."""

    template: str
    answers: tuple[str, str] = ("No", "Yes")


CORRECT = Style("{text}\nIs this answer correct?\nAnswer: {answer}")
ASKED = Style("{text}\nAnswer: {answer}")  # the text ends in a question
OPEN = Style("{text} {answer}")  # the text ends in "A:"
DEFAULT = Style("{text}\nIs this correct?\nAnswer: {answer}")  # a user's folder, of which nothing is known
STYLES: dict[str, Style] = {
    **dict.fromkeys(("sciq", "cosmos_qa", "dream", "openbookqa", "piqa", "ethics-utilitarianism"), CORRECT),
    **dict.fromkeys(("sciq_with_support", "boolq", "anli-r2", "mc_taco", "hellaswag", "multirc", "paws", "quail", "quartz", "social_i_qa",
                     "wic"), ASKED),
    **dict.fromkeys(("ethics-deontology", "ethics-justice", "ethics-virtue"), OPEN),
    **dict.fromkeys(("sst2", "amazon_polarity"), Style("Review: {text}\nSentiment: {answer}", ("Negative", "Positive"))),
    "twitter-sentiment": Style("Tweet: {text}\nSentiment: {answer}", ("Negative", "Positive")),
    "cola": Style("{text}\nIs this sentence grammatically correct?\nAnswer: {answer}"),
    "anthropic_hh": Style("{text}\n\nIs the assistant's last reply helpful and harmless?\nAnswer: {answer}"),
    "world": Style("{text} it is {answer}", ("not", "so")),  # its vocabulary has no yes and no
}


def style(config) -> Style:
    """What `config.template` and `config.answers` say, the task's own where they are empty."""
    own = STYLES.get(config.task, DEFAULT)
    return Style(config.template.replace("\\n", "\n") or own.template, tuple(config.answers) or own.answers)


def resolve(config):
    """The config with its template and answers filled in: what the run's identity is made of."""
    full = config.copy_and_resolve_references()
    with full.unlocked(), full.ignore_type():
        full.template, full.answers = style(config)
    return full.lock()


# --------------------------------------------------------------------------- documents


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What is asked.

    Attributes:
      documents: those that `config.split` names.
      shots: training documents, in the order in which they stand in a prompt; their `labels` are the answers shown.
      n_dropped, notes, fingerprint: as `splits.Prepared` has them.
    """

    documents: Examples
    shots: Examples
    n_dropped: dict[str, int]
    notes: list[str]
    fingerprint: str


def prepare(config) -> Prepared:
    """The documents and the shots of a resolved config.

    The shots are of half A, which a supervisor is trained on (of half B for split=a); with `labels`, of half B, whose
    documents these label. So no document that is asked about, and none of its group (group=auto), is a shot.

    Raises:
      UserError: as `splits.prepare`; documents of token ids without texts; too few labelled training documents of a class.
    """
    part = "b" if config.labels or config.split == "a" else "a"
    data = config.copy_and_resolve_references()
    with data.unlocked(), data.ignore_type():
        data.split, data.shuffle, data.n_val = part, "once", 0
    found = splits.prepare(data, only=config.split)
    if found.wanted.texts is None:
        raise UserError(f"task={config.task!r}: has token ids only; a prompt is made of texts, expected a column text")
    pool = found.train
    if config.labels and config.shots:
        pool = _labelled(pool, labels_lib.read(config.labels))
    return Prepared(found.wanted, choose_shots(pool, config.shots, config.seed), found.n_dropped, list(found.notes), found.fingerprint)


def _labelled(pool: Examples, given: labels_lib.Labels) -> Examples:
    """The documents that a label file labels, with its labels; those that it weighs 0, or left out as over-long, are none of them."""
    there = set(given.ids)
    kept = [row for row, i in enumerate(pool.ids) if i in there]
    labelled = labels_lib.attach(pool.select(kept) if kept else pool, given)
    return labelled if labelled.weights is None else labelled.select(np.flatnonzero(labelled.weights > 0))


def choose_shots(pool: Examples, shots: int, seed: int) -> Examples:
    """`shots` documents of `pool`: a seeded choice, of different groups, the classes in turn (the first by the seed).

    Fewer shots of the same seed are the first of more, and no model or tokenizer plays a part.
    """
    rng = np.random.default_rng([seed, SHOTS])
    first = int(rng.integers(2))
    order = rng.permutation(len(pool))
    wanted = [(first + i) % 2 for i in range(shots)]
    known, used, chosen = pool.labels, set(), []
    queues = {label: iter([row for row in order if known[row] == label]) for label in (0, 1)}
    for label in wanted:
        row = next((r for r in queues[label] if pool.groups[r] not in used), None)
        if row is None:
            raise UserError(f"shots={shots}: too few training documents of class {label} ({int((known == label).sum())} of {len(pool)}); "
                            "expected fewer shots or a larger n_train")
        used.add(pool.groups[row])
        chosen.append(row)
    return pool.select(chosen)


# --------------------------------------------------------------------------- tokens


class Prompt(NamedTuple):
    """A prompt with either answer: `sequences`, int32 token ids each, with the tokens that the tokenizer puts before a text, and
    `context`, how many of them are before the answer."""

    sequences: tuple[np.ndarray, np.ndarray]
    context: int

    @property
    def length(self) -> int:
        """Tokens, with the longer answer."""
        return max(map(len, self.sequences))


def encode(folder, how: Style, shots: Examples, texts: list[str]) -> list[Prompt]:
    """The prompts of `texts`, each behind all of `shots`.

    Context and answer are cut together, and the answer's tokens are those beyond as many as the context alone has; spaces before
    {answer} belong to the answer (both as EleutherAI/lm-evaluation-harness, `TemplateLM._encode_pair`; where a tokenizer merges
    across the boundary, its sequence is the context's own tokens and then the answer's, here it is the whole text's).

    Raises:
      UserError: an answer adds no token, or both are the same tokens.
    """
    head, tail = how.template.removesuffix("{answer}").split("{text}")
    shown = [f"{head}{text}{tail}{how.answers[label]}{BETWEEN}" for text, label in zip(shots.texts or (), shots.labels)]
    contexts = ["".join([*shown, head, text, tail]) for text in texts]
    bare = _cut(folder, [c.rstrip() for c in contexts])
    out = []
    for before, *both in zip(bare, *(_cut(folder, [c + answer for c in contexts]) for answer in how.answers)):
        for text, ids in zip(how.answers, both):
            if len(ids) <= len(before):
                raise UserError(f"answers: {text!r} adds no token to a prompt in the template {how.template!r}; expected a space or a line "
                                "break before {answer}")
        if np.array_equal(*both):
            raise UserError(f"answers: {how.answers} are the same tokens to the tokenizer in {folder.path}; expected words that it knows")
        out.append(Prompt(tuple(both), len(before)))
    return out


def _cut(folder, texts: list[str]) -> list[np.ndarray]:
    """Token ids of texts that go on: with the tokens that the tokenizer puts before a text, without those behind it."""
    end = hub.closing_tokens(folder)
    return [ids[: len(ids) - end] for ids in hub.tokenize(folder, texts, special=True)]


def shorten(folder, how: Style, text: str, prompt: Prompt, tokens: int) -> Prompt:
    """A prompt without shots cut to `tokens` tokens: the end of its text goes, what the template puts behind it stays.

    Raises:
      UserError: the template and the answers alone are as long.
    """
    head, _ = how.template.removesuffix("{answer}").split("{text}")
    first, ids = _cut(folder, [head, head + text])
    gone = prompt.length - tokens
    alone = prompt.length - len(ids) + len(first)
    if alone >= tokens:
        raise UserError(f"max_length={tokens}: the template and the answers alone take {alone} tokens; expected a larger max_length")
    kept = len(ids) - gone
    return Prompt(tuple(np.concatenate([s[:kept], s[len(ids) :]]) for s in prompt.sequences), prompt.context - gone)
