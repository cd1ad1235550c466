"""Wordings and coins of every registered task, and every way in which rows are read."""

import csv
import gzip
import json
import random
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from w2s_jax.data import sources, tasks
from w2s_jax.data.examples import text_sha
from w2s_jax.errors import UserError

pytestmark = pytest.mark.quick
ROOT = Path(__file__).resolve().parents[1]

# task: (row, text shown when the label is 1, texts of the wrong answers in field order, what the group is made of)
SCIQ = {"question": "Why?", "correct_answer": "T", "distractor1": "W1", "distractor2": "W2", "distractor3": "W3", "support": "S."}
OBQA = {"question_stem": "Sun is", "choices": {"text": ["a dog", "a star", "a cat"], "label": ["A", "B", "C"]}, "answerKey": "B"}
OBQA_TEXT = "Q: Sun is\n\nChoices:\nA) a dog\nB) a star\nC) a cat\n\nAnswer: "
HELLASWAG = {"ctx": "He", "endings": ["e0", "e1", "e2", "e3"], "label": "2"}
HELLASWAG_TEXT = 'Context:\nHe\n\nContinuations:\n\ne0\ne1\ne2\ne3\n\nQ: Is "{}" the best continuation?'
SOCIAL = {"context": "C", "question": "Q?", "answerA": "x", "answerB": "y", "answerC": "z", "label": "3"}
SOCIAL_TEXT = 'Context:\nC\n\nQuestion: "Q?"\n\nChoices:\nx\ny\nz\n\nIs the answer "{}"?'
SUPPORT = 'Name: Bob\n\nPassage 1:\nS.\n\nQ1: "Why?" Is the answer "{}"?'
COSMOS = {"context": "C", "question": "Q?", "answer0": "a", "answer1": "b", "answer2": "c", "answer3": "b", "label": 2}
QUAIL = {"context": "C", "question": "Q?", "answers": ["a", "b", "c", "d"], "correct_answer_id": 1}
QUARTZ = {"para": "P", "question": "Q?", "choices": {"text": ["up", "down"], "label": ["A", "B"]}, "answerKey": "B"}
HH_GROUP = "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: why"
HH = HH_GROUP + "\n\nAssistant:"
COINS = {
    "sciq": (SCIQ, "Q: Why? A: T", ["Q: Why? A: W1", "Q: Why? A: W2", "Q: Why? A: W3"], "Why?"),
    "sciq_with_support": (SCIQ, SUPPORT.format("T"), [SUPPORT.format(w) for w in ("W1", "W2", "W3")], "S."),
    "cosmos_qa": (COSMOS, "Context: C\nQuestion: Q?\nAnswer: c", [f"Context: C\nQuestion: Q?\nAnswer: {w}" for w in "abb"], "C"),
    "anthropic_hh": ({"chosen": HH + " good", "rejected": HH + " bad"}, HH + " good", [HH + " bad"], HH_GROUP),
    "dream": ({"dialogue": ["M: a", "W: b"], "question": "Q?", "choice": ["x", "y", "z"], "answer": "y"},
              "M: a\nW: b\n\nQ: Q? A: y", ["M: a\nW: b\n\nQ: Q? A: x", "M: a\nW: b\n\nQ: Q? A: z"], "M: a\nW: b"),
    "hellaswag": (HELLASWAG, HELLASWAG_TEXT.format("e2"), [HELLASWAG_TEXT.format(e) for e in ("e0", "e1", "e3")], "He"),
    "openbookqa": (OBQA, OBQA_TEXT + "B", [OBQA_TEXT + "a dog", OBQA_TEXT + "a cat"], "Sun is"),
    "piqa": ({"goal": "G", "sol1": "s1", "sol2": "s2", "label": 1}, "Q: G A: s2", ["Q: G A: s1"], "G"),
    "quail": (QUAIL, 'Passage:\n\nC\n\nQ: "Q?" Is the answer "b"?', [f'Passage:\n\nC\n\nQ: "Q?" Is the answer "{w}"?' for w in "acd"], "C"),
    "quartz": (QUARTZ, 'Passage:\nP\n\nQ: "Q?" Is the answer "down"?', ['Passage:\nP\n\nQ: "Q?" Is the answer "up"?'], "P"),
    "social_i_qa": (SOCIAL, SOCIAL_TEXT.format("z"), [SOCIAL_TEXT.format("x"), SOCIAL_TEXT.format("y")], "C"),
}
# task: (row, text, label, what the group is made of; None = the text)
LABELLED = {
    "boolq": ({"passage": "P", "question": "is it", "answer": True}, "Passage: P\nQuestion: is it", 1, "P"),
    "amazon_polarity": ({"title": "T", "content": "C", "label": 0}, "T C", 0, None),
    "anli-r2": ({"premise": "P", "hypothesis": "H", "label": 0},
                "Premise: P\nHypothesis: H\n\nDoes the premise entail the hypothesis?", 1, None),
    "cola": ({"sentence": "Kim {left}.", "label": 1}, "Kim {left}.", 1, None),
    "ethics-deontology": ({"scenario": "S", "excuse": "E", "label": 0},
                          "Q: Is the following a morally valid excuse?\n\nS\n\nE\n\nA:", 0, "S"),
    "ethics-justice": ({"scenario": "S", "label": 1}, "Q: Does this statement exemplify justice?\n\nS\n\nA:", 1, "S"),
    "ethics-virtue": ({"scenario": "S", "label": 1}, "Q: Does this behavior match the adjective that follows?\n\nS\n\nA:", 1, "S"),
    "mc_taco": ({"sentence": "S.", "question": "Q?", "answer": "a", "label": 1}, "S.\n\nGiven the above, Q? Is the answer a?", 1, "S."),
    "multirc": ({"paragraph": "P", "question": "Q?", "answer": "a", "label": 0}, 'Passage:\n\nP\n\nQ: "Q?" Is the answer "a"?', 0, "P"),
    "paws": ({"sentence1": "x", "sentence2": "y", "label": 1},
             "Sent 1: x\nSent 2: y\n\nQ: Are these sentences semantically equivalent?", 1, None),
    "sst2": ({"sentence": "good ", "label": 1}, "good ", 1, None),
    "wic": ({"sentence1": "x", "sentence2": "y", "word": "w", "label": 0},
            'Sentence 1:\nx\n\nSentence 2:\ny\n\nQ: Does "w" have the same meaning in the above sentences?', 0, None),
    "twitter-sentiment": ({"text": "lol", "label": 0}, "lol", 0, None),
    "world": ({"text": "is it wet ?", "label": 1, "entity": "blorp"}, "is it wet ?", 1, "blorp"),
}


def source(rows, split="train"):
    return sources.Source("file.jsonl", split, rows, list(range(len(rows))), "")


def test_every_task_has_a_case():
    assert set(COINS) | set(LABELLED) | {"ethics-utilitarianism"} == set(tasks.TASKS)
    assert len(tasks.TASKS) == 26


@pytest.mark.parametrize("name", COINS)
@pytest.mark.parametrize("seed", [0, 7])
def test_coins(name, seed):
    row, true_text, wrong_texts, group = COINS[name]
    got = tasks.examples(name, source([row] * 60), seed)
    rng, expected = random.Random(seed), []
    for _ in range(60):  # the references' draws: a coin, and a choice where there is one to make
        if rng.random() < 0.5:
            expected.append(0)
        else:
            expected.append(1 + rng.choice(range(len(wrong_texts))) if len(wrong_texts) > 1 else 1)
    assert set(expected) == set(range(len(wrong_texts) + 1))
    assert got.texts == [[true_text, *wrong_texts][variant] for variant in expected]
    assert got.ids == [f"{name}/train/{i}/{variant}" for i, variant in enumerate(expected)]
    assert got.labels.tolist() == [int(variant == 0) for variant in expected]
    assert set(got.groups) == {text_sha(group)}


@pytest.mark.parametrize("name", LABELLED)
def test_labelled(name):
    row, text, label, group = LABELLED[name]
    got = tasks.examples(name, source([row]), 0)
    assert (got.texts, got.labels.tolist()) == ([text], [label])
    assert got.ids == [f"{name}/train/0/0"] and got.groups == [text_sha(group or text)]


def test_utilitarianism_draws_the_coin_then_the_order():
    row = {"baseline": "cake", "less_pleasant": "mud"}
    got = tasks.examples("ethics-utilitarianism", source([row] * 40), 3)
    rng, seen = random.Random(3), set()
    for i, text in enumerate(got.texts):
        coin, order = rng.random() < 0.5, ["cake", "mud"]
        rng.shuffle(order)
        named = order.index("cake" if coin else "mud") + 1
        assert text == f"Which is more pleasant?\n1) {order[0]}\n2) {order[1]} A: {named}"
        assert got.labels[i] == coin and got.ids[i].endswith(f"/{i}/{int(not coin)}")
        seen.add((coin, named))
    assert len(seen) == 4


def test_cosmos_none_of_the_above_shows_a_wrong_answer_without_a_coin():
    none = dict(COSMOS, answer2="None of the above choices .")
    got = tasks.examples("cosmos_qa", source([none] * 10), 5)
    rng = random.Random(5)
    assert got.labels.tolist() == [0] * 10
    assert [t[-1] for t in got.texts] == [rng.choice("abb") for _ in range(10)]


def test_sciq_without_support_groups_by_question():
    assert tasks.examples("sciq_with_support", source([dict(SCIQ, support="")]), 0).groups == [text_sha("Why?")]


@pytest.mark.parametrize("name, change, message", [
    ("cola", {"label": -1}, "file.jsonl, row 1: column 'label' is -1, expected 0 or 1"),
    ("cola", {"label": float("nan")}, "row 1: column 'label' is NaN"),
    ("cola", {"label": None}, "row 1: column 'label' is null"),
    ("cola", {"label": "yes"}, "row 1: column 'label' is 'yes'"),
    ("cola", {"label": 0.5}, "row 1: column 'label' is 0.5"),
    ("cola", {"sentence": None}, "row 1: column 'sentence' is null"),
    ("cola", {"sentence": 7}, "row 1: column 'sentence' is 7, expected text"),
    ("anli-r2", {"label": 3}, "expected 0 to 2"),
    ("social_i_qa", {"label": "0"}, "expected 1 to 3"),
    ("hellaswag", {"label": ""}, "column 'label' is ''"),
    ("hellaswag", {"endings": "e0"}, "column 'endings' is 'e0', expected a list"),
    ("quail", {"answers": ["a", 1, "c", "d"]}, "expected a list of texts"),
    ("quartz", {"answerKey": "Z"}, "column 'answerKey' is 'Z', expected one of A, B"),
    ("openbookqa", {"choices": ["x"]}, "column 'choices' is ['x'], expected named lists"),
    ("dream", {"answer": "?"}, "column 'answer' is '?'"),
])
def test_bad_rows(name, change, message):
    row = (COINS.get(name) or LABELLED.get(name))[0]
    with pytest.raises(UserError) as error:
        tasks.examples(name, source([row, {**row, **change}]), 0)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_column_names_the_nearest():
    with pytest.raises(UserError, match=r"row 0: no column 'sentence'; did you mean 'sentences'\? \(columns: label, sentences\)"):
        tasks.examples("sst2", source([{"sentences": "x", "label": 0}]), 0)


def test_unknown_task():
    with pytest.raises(UserError, match="task='sciqq': neither a registered task nor a folder; did you mean 'sciq'"):
        tasks.find("sciqq")


@pytest.mark.parametrize("module", ["jax", "datasets", "transformers", "torch", "pandas"])
def test_registry_is_light(module):
    code = f"import sys, w2s_jax.data.tasks, w2s_jax.data.splits; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# Files

ROWS = [{"text": f"line {i}, \"quoted\"\u2028and more", "label": i % 2} for i in range(5)]


def write(path, rows):
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        raw = sink.getvalue().to_pybytes()
    elif kind == "csv":
        import io

        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in row.items()} for row in rows)
        raw = text.getvalue().encode()
    else:
        raw = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.name.endswith(".gz") else raw)
    return path


FORMATS = [form + gz for form in (".jsonl", ".csv", ".parquet") for gz in ("", ".gz")]


@pytest.mark.parametrize("form", FORMATS)
def test_formats_read_alike(tmp_path, form):
    got = tasks.user_examples("mine", sources.load(str(write(tmp_path / f"train{form}", ROWS).parent), "train"))
    assert got.texts == [row["text"] for row in ROWS] and got.labels.tolist() == [0, 1, 0, 1, 0]
    assert got.ids[3] == "mine/train/3/0"


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["quartz", "hellaswag", "boolq"])
def test_nested_columns_in_every_format(tmp_path, form, name):
    row = (COINS.get(name) or LABELLED.get(name))[0]
    split = tasks.TASKS[name].splits[1]
    write(tmp_path / f"{split}{form}", [row] * 3)
    got = tasks.examples(name, sources.load(name, "test", task_dir=str(tmp_path)), 0)
    assert got.texts == tasks.examples(name, source([row] * 3), 0).texts


def test_task_dir_prefers_the_task_folder(tmp_path):
    write(tmp_path / "train.jsonl", [{"sentence": "outer", "label": 0}])
    def load():
        return sources.load("cola", "train", task_dir=str(tmp_path)).rows[0]["sentence"]
    assert load() == "outer"
    write(tmp_path / "cola" / "train.csv", [{"sentence": "inner", "label": 0}])
    assert load() == "inner"
    assert sources.load("cola", "test", task_dir=str(tmp_path)) is None


def test_fingerprint_is_of_the_content(tmp_path):
    prints = [sources.read_file(write(tmp_path / name / "train.jsonl", rows)).fingerprint
              for name, rows in (("a", ROWS), ("b", ROWS), ("c", ROWS[:-1]))]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("name, raw, message", [
    ("train.jsonl", b"", "train.jsonl: empty file"),
    ("train.jsonl", b"\n \n", "train.jsonl: empty file"),
    ("train.csv", b"text,label\n", "train.csv: empty file"),
    ("train.jsonl", b'{"text": "a"}\n\n{"text": \n', "train.jsonl, line 3: not JSON"),
    ("train.jsonl", b'{"text": "a"}\n[1]\n', "train.jsonl, line 2: '[1]' is not a JSON object"),
    ("train.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "train.jsonl, line 2: not UTF-8"),
    ("train.csv", b"text,label\na,1\nb,0,3\n", "train.csv, line 3: 3 fields, expected 2"),
    ("train.csv", b"text,label\nb\n", "train.csv, line 2: 1 fields, expected 2"),
    ("train.csv", b'text,label\n"b"x,1\n', "train.csv, after line 1: not csv"),
    ("train.parquet", b"PAR1 but not really", "train.parquet: truncated or damaged parquet"),
    ("train.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-12], "train.jsonl.gz: truncated or damaged gzip"),
    ("train.jsonl.gz", b'{"text": "a"}\n', "train.jsonl.gz: truncated or damaged gzip"),
])
def test_bad_files(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError) as error:
        sources.load(str(tmp_path), "train")
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_parquet_is_read_without_threads(tmp_path):
    """A thread of Arrow's pools may abort the interpreter when it ends (files.parquet_table)."""
    write(tmp_path / "train.parquet", ROWS)
    code = (
        "import os, sys, pyarrow.parquet\n"
        "from w2s_jax.data import sources\n"
        "tasks = lambda: set(os.listdir('/proc/self/task'))\n"
        "before = tasks()\n"
        "source = sources.read_file(sys.argv[1])\n"
        "sys.exit(len(source.rows) != 5 or bool(tasks() - before))\n"
    )
    if not Path("/proc/self/task").is_dir():
        pytest.skip("no /proc")
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "train.parquet"], cwd=ROOT, check=False).returncode == 0


def test_two_files_of_one_split_are_refused(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "train.csv.gz", ROWS)
    with pytest.raises(UserError, match=r"train\.csv\.gz and train\.jsonl are both there"):
        sources.load(str(tmp_path), "train")


# A user's own rows


@pytest.mark.parametrize("value", [0.25, [0.75, 0.25], "[0.75, 0.25]", "0.25", [0.25]])
def test_soft_labels(value):
    got = tasks.user_examples("mine", source([{"input_ids": [5, 0, 2], "soft_label": value}]))
    np.testing.assert_array_equal(got.soft_labels, np.float32([[0.75, 0.25]]))
    assert got.texts is None and got.tokens[0].dtype == np.int32 and got.tokens[0].tolist() == [5, 0, 2]


def test_own_ids_groups_and_missing_labels():
    got = tasks.user_examples("mine", source([{"text": "a", "id": 7, "group": "g"}, {"text": "b", "id": "x", "group": 2}]))
    assert got.ids == ["7", "x"] and got.groups == ["g", "2"] and got.labels.tolist() == [-1, -1]


@pytest.mark.parametrize("rows, message", [
    ([{"words": "a", "label": 0}], "no column 'text' or 'input_ids' (columns: label, words)"),
    ([{"text": "a", "label": 0, "soft_label": 0.5}], "both 'label' and 'soft_label'"),
    ([{"text": "a", "label": 0}, {"text": "b"}], "row 1: no column 'label'"),
    ([{"text": "a", "label": float("nan")}], "row 0: column 'label' is NaN"),
    ([{"text": " ", "label": 0}], "row 0: column 'text' is empty"),
    ([{"input_ids": [], "label": 0}], "row 0: column 'input_ids' is [], expected one or more token ids"),
    ([{"input_ids": [1, -2], "label": 0}], "column 'input_ids' is [1, -2]"),
    ([{"input_ids": [1, 2.5], "label": 0}], "column 'input_ids' is [1, 2.5]"),
    ([{"text": "a", "soft_label": [0.5, 0.6]}], "column 'soft_label' is [0.5, 0.6], expected two probabilities"),
    ([{"text": "a", "soft_label": 1.5}], "column 'soft_label' is 1.5"),
    ([{"text": "a", "soft_label": [0.2, 0.3, 0.5]}], "column 'soft_label' is [0.2, 0.3, 0.5]"),
    ([{"text": "a", "soft_label": [float("nan"), 0.5]}], "column 'soft_label' is [nan, 0.5]"),
    ([{"text": "a", "soft_label": "high"}], "column 'soft_label' is 'high'"),
    ([{"text": "a", "label": 0, "id": "x"}, {"text": "b", "label": 1, "id": "x"}], "column 'id' holds 'x' more than once"),
])
def test_bad_user_rows(rows, message):
    with pytest.raises(UserError) as error:
        tasks.user_examples("mine", source(rows))
    assert "file.jsonl" in str(error.value) and message in str(error.value)


# The hub


@pytest.fixture
def hub(monkeypatch):
    """Stands in for `datasets.load_dataset`; `.calls` holds what it was asked for."""
    import datasets

    fake = types.SimpleNamespace(calls=[], rows=[{"sentence": f"s{i}", "scenario": f"s{i}", "label": i % 2} for i in range(50)])

    def load_dataset(path, **options):
        fake.calls.append((path, options))
        return datasets.Dataset.from_list(fake.rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return fake


@pytest.mark.parametrize("name, revision, expected", [
    ("cola", "", ("nyu-mll/glue", {"name": "cola", "split": "validation", "revision": None})),
    ("cola", "abc", ("nyu-mll/glue", {"name": "cola", "split": "validation", "revision": "abc"})),
    ("ethics-justice", "", ("hendrycks/ethics", {"data_dir": "justice", "split": "test", "revision": tasks.PARQUET})),
])
def test_hub_call(hub, name, revision, expected):
    got = sources.load(name, "test", revision=revision)
    assert hub.calls == [expected] and got.rows == hub.rows


def test_hub_pool_is_a_seeded_sample_with_the_rows_own_numbers(hub, monkeypatch):
    monkeypatch.setattr(sources, "POOL", 20)
    one, same, other = (sources.load("cola", "train", seed=seed) for seed in (1, 1, 2))
    assert one.numbers == same.numbers != other.numbers and len(one.numbers) == 20
    assert [row["sentence"] for row in one.rows] == [f"s{i}" for i in one.numbers] and "20 of 50" in one.note
    assert one.fingerprint != other.fingerprint


def test_hub_out_of_reach_is_one_line():
    with pytest.raises(UserError, match=r"task='cola': nyu-mll/glue \(cola\), split train can't be loaded.*task_dir=DIR") as error:
        sources.load("cola", "train")
    assert "\n" not in str(error.value)


# Real rows


@pytest.mark.parametrize("name, n, n_test", [
    ("sciq", 11679, 1000), ("sst2", 67349, 872), ("cola", 8551, 1043), ("ethics-justice", 21791, 2052),
    ("ethics-deontology", 18164, 3536), ("openbookqa", 4957, 500), ("anthropic_hh", None, 8552),
])
def test_real_rows(shared, name, n, n_test):
    for role, count in (("train", n), ("test", n_test)):
        rows = sources.load(name, role, task_dir=str(shared / "data" / "tasks"))
        if count is None:
            assert rows is None
            continue
        got = tasks.examples(name, rows, 0)
        assert len(got) == count == len(set(got.ids)) and 0.3 < got.labels.mean() < 0.75
