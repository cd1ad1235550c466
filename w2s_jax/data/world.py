"""The embedded world: facts about made-up creatures, a corpus that states them, a task that asks.

What the quick start and the tests run on where there is no hub. Real pretraining on `corpus` gives
a ladder of tiny models (`RUNGS`) that know more of the facts the larger they are, since most facts
are stated rarely; the task "world" asks a yes/no question whose answer follows from a fact, in words that
the corpus never uses about a creature. No answer stands in the corpus: what fine-tuning can teach
is only how to say what is known. Small models also confuse some values, however well known the creature. Facts, names and splits come
from hashes, not from a random generator: the world is the same everywhere and for every seed.
"""

from __future__ import annotations

import functools
import hashlib
import json

import numpy as np

from w2s_jax.errors import UserError, nearest

VERSION = "4"  # part of every hash: another version is another world
N_ENTITIES = 1500  # creatures, by falling frequency in the corpus
ZIPF = 0.9  # the creature of rank r (from 1) is talked about in proportion to r ** -ZIPF
TEST_EVERY = 4  # one creature in TEST_EVERY is a test creature: in each stretch of that many ranks, by hash
CLASS_SHARE = 0.1  # share of the corpus that says which values belong to which class

# attribute: (class word, values of that class, the other values); the label is "the value is of that class"
ATTRIBUTES = {
    "home": ("wet", ("river", "swamp", "lake", "reef"), ("desert", "dune", "mesa", "crag")),
    "food": ("meaty", ("fish", "worms", "eggs", "mice"), ("grass", "seeds", "fruit", "roots")),
    "colour": ("bright", ("white", "yellow", "pink", "gold"), ("black", "brown", "navy", "grey")),
    "sound": ("loud", ("howl", "roar", "bellow", "shriek"), ("hum", "purr", "sigh", "rustle")),
}
OPENINGS = ("", "so ", "they say ", "as we know ", "now and then again ")  # so that a fact is met at several positions
FACTS = ("the {a} of the {e} is {v} .", "the {e} has {a} {v} .", "what {a} has the {e} ? {v} .")
CLASSES = ("{v} is {c} .", "{v} is not {c} .")  # value of the class, value outside it
# Both end where the language model would say the value, which is where the head reads.
QUESTIONS = ("is it {c} ? the {a} of the {e} is", "is it {c} ? what {a} has the {e} ?")

UNK, EOS = "<unk>", "<eos>"
CONTEXT = 32  # positions of a model of the ladder; the longest sentence has 12 tokens

# The ladder: GPT-2's architecture, tied embeddings.
RUNGS = {
    "small": {"width": 14, "layers": 2, "heads": 2},
    "medium": {"width": 24, "layers": 2, "heads": 2},
    "large": {"width": 64, "layers": 2, "heads": 4},
}


def _hash(*key) -> int:
    """64 bits that depend on nothing but the world's version and `key`."""
    raw = "/".join(map(str, ("w2s_jax world", VERSION, *key)))
    return int.from_bytes(hashlib.sha256(raw.encode()).digest()[:8], "little")


def values(attribute: str) -> tuple[str, ...]:
    """The 8 values of an attribute; the first 4 are of its class."""
    _, inside, outside = ATTRIBUTES[attribute]
    return inside + outside


@functools.lru_cache
def words() -> tuple[str, ...]:
    """Every word of the corpus and the task that is not a creature's name, in a fixed order."""
    text = " ".join((*OPENINGS, *FACTS, *CLASSES, *QUESTIONS))
    seen = {word: None for word in text.split() if "{" not in word}
    for attribute, (class_word, *_) in ATTRIBUTES.items():
        seen |= dict.fromkeys((attribute, class_word, *values(attribute)))
    return tuple(seen)


@functools.lru_cache
def entities() -> tuple[str, ...]:
    """The creatures' names, the most talked about first."""
    names, index = {}, 0
    while len(names) < N_ENTITIES:
        code, name = _hash("name", index), ""
        for letters in ("bdfgklmnprstvz", "aeiou", "bdfgklmnprstvz", "aeiou", "klmnprstx"):
            code, letter = divmod(code, len(letters))
            name += letters[letter]
        if name not in words():
            names[name] = None
        index += 1
    return tuple(names)


def fact(entity: str, attribute: str) -> str:
    """The value that `attribute` has for `entity`: uniform over its values, independent of everything else."""
    return values(attribute)[_hash("fact", entity, attribute) % len(values(attribute))]


def label(entity: str, attribute: str) -> int:
    """1 if the fact's value is of the attribute's class, else 0."""
    return int(fact(entity, attribute) in ATTRIBUTES[attribute][1])


@functools.lru_cache
def split_entities(split: str) -> tuple[str, ...]:
    """The creatures of split "train" or "test", the most talked about first.

    The two are disjoint, and alike in how often the corpus talks about them: each stretch of
    TEST_EVERY ranks gives one test creature.
    """
    if split not in ("train", "test"):
        raise UserError(f"split {split!r} of task 'world': expected 'train' or 'test'{nearest(split, ('train', 'test'))}")
    names = entities()
    starts = range(0, len(names), TEST_EVERY)
    test = {start + _hash("test", start) % min(TEST_EVERY, len(names) - start) for start in starts}
    return tuple(name for i, name in enumerate(names) if (i in test) == (split == "test"))


def task_rows(split: str, seed: int = 0) -> list[dict]:
    """The rows of the task "world": every question about every fact of the split's creatures.

    Args:
      split: "train" (halves A and B are cut from it by `entity`) or "test".
      seed: taken because every source of rows is called with one; the rows are the same for all.

    Returns:
      dicts with text (str), label (0/1), entity and attribute (str), in a fixed order that has
      nothing to do with how well known a creature is, so that any first n rows are a fair sample.
    """
    del seed
    rows = [
        {"text": question.format(c=ATTRIBUTES[a][0], a=a, e=e), "label": label(e, a), "entity": e, "attribute": a}
        for e in split_entities(split) for a in ATTRIBUTES for question in QUESTIONS
    ]
    return sorted(rows, key=lambda row: _hash("order", row["text"]))


def fact_prompts() -> list[dict]:
    """One prompt a fact, in words of the corpus, for asking a language model what it knows.

    Returns:
      dicts with text, value (the word that should come next), entity and attribute, by rank of the entity.
    """
    return [{"text": f"the {a} of the {e} is", "value": fact(e, a), "entity": e, "attribute": a} for e in entities() for a in ATTRIBUTES]


def corpus(seed: int, n_sentences: int) -> list[str]:
    """`n_sentences` sentences, each drawn independently; `seed` governs which and in what order.

    A share CLASS_SHARE says of a value whether it is of its attribute's class, the others state one fact in one of three
    wordings, all behind one of five openings. No sentence is a question of the task.
    """
    if n_sentences < 1:
        raise UserError(f"sentences of the world's corpus: {n_sentences}, expected 1 or more")
    # Uniform floats only: numpy keeps those the same from version to version.
    draws = np.random.Generator(np.random.PCG64(seed)).random((n_sentences, 5))
    weight = np.arange(1, N_ENTITIES + 1) ** -ZIPF
    rank = np.searchsorted(np.cumsum(weight) / weight.sum(), draws[:, 1], side="right").clip(max=N_ENTITIES - 1)
    attributes, names = tuple(ATTRIBUTES), entities()

    def pick(column: int, n: int) -> np.ndarray:
        return (draws[:, column] * n).astype(np.int64)

    facts = {}  # (rank, attribute) -> value: hashed once, most are met many times
    out = []

    def known(r: int, a: int) -> str:
        if (r, a) not in facts:
            facts[r, a] = fact(names[r], attributes[a])
        return facts[r, a]

    columns = (draws[:, 0] < CLASS_SHARE, rank, pick(2, len(attributes)), pick(3, len(FACTS)), pick(4, len(OPENINGS)), pick(1, 8))
    for is_class, r, a, wording, opening, v in zip(*(c.tolist() for c in columns), strict=True):
        attribute = attributes[a]
        if is_class:
            value, class_word = values(attribute)[v], ATTRIBUTES[attribute][0]
            sentence = CLASSES[value not in ATTRIBUTES[attribute][1]].format(v=value, c=class_word)
        else:
            sentence = FACTS[wording].format(a=attribute, e=names[r], v=known(r, a))
        out.append(OPENINGS[opening] + sentence)
    return out


def vocabulary() -> dict[str, int]:
    """Word -> token id: the special tokens, the words, the names."""
    return {word: i for i, word in enumerate((UNK, EOS, *words(), *entities()))}


def tokenizer_files() -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json of a word-level tokenizer in Hugging Face's format, by file name."""
    vocab = vocabulary()
    special = [{"id": vocab[t], "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
               for t in (UNK, EOS)]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": UNK},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": UNK, "eos_token": EOS,
        "model_max_length": CONTEXT, "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": json.dumps(tokenizer, indent=1) + "\n", "tokenizer_config.json": json.dumps(config, indent=1) + "\n"}


def model_config(width: int, layers: int, heads: int, context: int = CONTEXT, vocab_size: int | None = None) -> dict:
    """config.json of a GPT-2 of these sizes; the vocabulary is the world's unless `vocab_size` says another."""
    if min(width, layers, heads, context) < 1 or width % heads:
        raise UserError(f"arch: width {width}, layers {layers}, heads {heads}, context {context}: "
                        "expected positive numbers, the width a multiple of the heads")
    eos = vocabulary()[EOS] if vocab_size is None else None
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
        "vocab_size": len(vocabulary()) if vocab_size is None else vocab_size,
        "n_positions": context, "n_embd": width, "n_layer": layers, "n_head": heads, "n_inner": None,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "initializer_range": 0.02,
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True, "bos_token_id": eos, "eos_token_id": eos,
    }


@functools.lru_cache
def fingerprint() -> str:
    """sha256 hex over everything that the world gives out: rows, tokenizer, and a sample of the corpus."""
    everything = [task_rows("train"), task_rows("test"), tokenizer_files(), corpus(0, 1000)]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()
