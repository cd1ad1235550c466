"""The embedded world: honest, balanced, the same everywhere."""

import collections
import json

import numpy as np
import pytest

from w2s_jax.data import world
from w2s_jax.errors import UserError

# A change of this number means that runs made before are runs on another world: raise world.VERSION
# and make the quick start's published table anew.
FINGERPRINT = "60615c9023bdae01b67ad0d0c93703046b607d38b143a3705feb8e57bf288fc7"


def test_world_never_changes_by_accident():
    assert world.fingerprint() == FINGERPRINT


def test_splits_are_disjoint_cover_and_are_alike_in_frequency():
    train, test = world.split_entities("train"), world.split_entities("test")
    assert not set(train) & set(test) and set(train) | set(test) == set(world.entities())
    assert len(set(world.entities())) == world.N_ENTITIES
    assert len(test) >= 250 and len(train) >= 1000
    rank = {e: i for i, e in enumerate(world.entities())}
    means = [np.mean([rank[e] for e in part]) for part in (train, test)]
    assert abs(means[0] - means[1]) < world.TEST_EVERY  # within one stretch of ranks
    with pytest.raises(UserError, match="train"):
        world.task_rows("tets", 0)


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_are_labelled_by_the_facts_and_do_not_depend_on_the_seed(split):
    rows = world.task_rows(split, 0)
    assert rows == world.task_rows(split, 1)
    assert len({row["text"] for row in rows}) == len(rows)
    assert len(rows) == len(world.split_entities(split)) * len(world.ATTRIBUTES) * len(world.QUESTIONS)
    for row in rows[:200]:
        class_word, inside, _ = world.ATTRIBUTES[row["attribute"]]
        assert row["label"] == (world.fact(row["entity"], row["attribute"]) in inside)
        assert class_word in row["text"].split() and row["entity"] in row["text"].split()
    for attribute in world.ATTRIBUTES:  # balanced: always-yes is no better than chance
        labels = [row["label"] for row in rows if row["attribute"] == attribute]
        assert abs(np.mean(labels) - 0.5) < 4 * 0.5 / np.sqrt(len(labels) / len(world.QUESTIONS))


def test_facts_are_independent_between_attributes():
    a, b = (np.array([world.label(e, x) for e in world.entities()]) for x in ("home", "food"))
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(world.N_ENTITIES)


def test_corpus_says_nothing_about_the_answers():
    sentences = world.corpus(0, 20000)
    class_words = {c for c, *_ in world.ATTRIBUTES.values()}
    names = set(world.entities())
    for sentence in sentences:
        tokens = set(sentence.split())
        assert not (tokens & names and tokens & class_words), sentence  # a class is never said of a creature
    stated = 0
    for sentence in sentences[:4000]:  # and what is said is true: a value after its attribute, one for each that is named
        tokens = sentence.split()
        if name := [t for t in tokens if t in names]:
            attributes = [t for t in tokens if t in world.ATTRIBUTES]
            said = [t for t in tokens if any(t in world.values(a) for a in world.ATTRIBUTES)]
            assert said == [world.fact(name[0], a) for a in attributes] and len(name) == 1
            stated += len(said)
    assert stated > 3000


def test_corpus_is_seeded_and_falls_with_rank():
    sentences = world.corpus(3, 50000)
    assert sentences[:20000] == world.corpus(3, 20000) and sentences[:100] != world.corpus(4, 100)
    first = world.entities()[0]
    for a in world.ATTRIBUTES:  # what a model knows is asked in words that the corpus uses
        assert any(s.endswith(f"the {a} of the {first} is {world.fact(first, a)} .") for s in sentences)
    counts = collections.Counter(token for s in sentences for token in s.split())
    heads = [sum(counts[e] for e in world.entities()[start:start + 100]) for start in (0, 100, 1000)]
    assert heads[0] > 2 * heads[1] > 4 * heads[2] > 0
    weight = np.arange(1, world.N_ENTITIES + 1) ** -world.ZIPF
    expected = weight[0] / weight.sum() * (1 - world.CLASS_SHARE) * len(sentences)
    assert counts[world.entities()[0]] == pytest.approx(expected, rel=0.1)
    with pytest.raises(UserError, match="1 or more"):
        world.corpus(0, 0)


def test_tokenizer_loads_and_knows_every_word(tmp_path):
    transformers = pytest.importorskip("transformers")
    for name, content in world.tokenizer_files().items():
        (tmp_path / name).write_text(content)
    (tmp_path / "config.json").write_text(json.dumps(world.model_config(**world.RUNGS["small"])))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == len(world.vocabulary()) == world.model_config(**world.RUNGS["small"])["vocab_size"]
    assert tokenizer.eos_token == world.EOS and tokenizer.unk_token == world.UNK
    texts = world.corpus(0, 300) + [row["text"] for row in world.task_rows("test")[:300]] + [p["text"] for p in world.fact_prompts()[:100]]
    vocab = world.vocabulary()
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert ids == [vocab[word] for word in text.split()]
        assert len(ids) <= world.CONTEXT
    assert tokenizer("the zzzz")["input_ids"] == [vocab["the"], vocab[world.UNK]]


def test_rungs_grow_and_bad_sizes_are_refused():
    assert world.model_config(24, 2, 2, context=16, vocab_size=99)["vocab_size"] == 99
    widths = [world.model_config(**rung)["n_embd"] for rung in world.RUNGS.values()]
    assert widths == sorted(set(widths))
    for sizes in ((15, 2, 2), (16, 0, 2), (16, 2, 0)):
        with pytest.raises(UserError, match="arch"):
            world.model_config(*sizes)


def test_pretrain_config_shares_its_keys_with_finetune():
    import importlib.util
    from pathlib import Path

    def load(name):
        path = Path(__file__).resolve().parents[1] / "configs" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"configs_{name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.get_config

    pretrain, finetune = load("pretrain"), load("finetune")()
    own = {"arch", "tokenizer", "corpus", "n_heldout", "steps", "final_lr_fraction"}
    assert set(pretrain()) - set(finetune) == own
    for name, rung in world.RUNGS.items():
        arch = pretrain(name).arch
        assert {key: arch[key] for key in rung} == rung
    with pytest.raises(ValueError, match="runlocal"):
        pretrain("huge")
