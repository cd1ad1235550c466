"""Splits: seeded, disjoint by group, the same for every model and seed."""

import collections
import json

import numpy as np
import pytest

from w2s_jax.config import shipped
from w2s_jax.data import splits
from w2s_jax.errors import UserError

pytestmark = pytest.mark.quick


def config(task, **changes):
    c = shipped("finetune")
    c.task = str(task)
    for key, value in changes.items():
        c[key] = value
    return c


def write(folder, **parts):
    """A folder of jsonl files; a row is (text, label, group)."""
    folder.mkdir(exist_ok=True)
    for split, rows in parts.items():
        lines = [json.dumps({"text": text, "label": label, "group": group}) for text, label, group in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def rows(prefix, n, per_group=4, positive=0.5):
    return [(f"{prefix} {i}", int((i * 7919) % 100 < 100 * positive), f"{prefix}-{i // per_group}") for i in range(n)]


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "mine", train=rows("train", 400), test=rows("test", 100))


def texts(examples):
    return set(examples.texts)


@pytest.mark.parametrize("n_train", [400, 90, 20000])
@pytest.mark.parametrize("n_val", [0, 21])
def test_halves_and_validation(folder, n_train, n_val):
    got = {name: splits.prepare(config(folder, n_train=n_train, n_val=n_val, split=name)) for name in ("a", "b", "train")}
    a, b = got["a"], got["b"]
    n = min(n_train, 400)
    sizes = {name: len(p.train) + len(p.val) for name, p in got.items()}
    assert n - 3 <= sizes["a"] + sizes["b"] == sizes["train"] <= n and abs(sizes["a"] - sizes["b"]) <= 8
    for name, p in got.items():
        assert n_val - 3 <= len(p.val) <= n_val
        parts = {"train": p.train, "val": p.val, "test": p.test}
        parts |= {"other": got[{"a": "b", "b": "a"}[name]].train} if name != "train" else {}
        owners = collections.defaultdict(set)
        for part, examples in parts.items():
            for group in examples.groups:
                owners[group].add(part)
        assert max(map(len, owners.values())) == 1
    assert texts(a.train) | texts(a.val) | texts(b.train) | texts(b.val) == texts(got["train"].train) | texts(got["train"].val)


@pytest.mark.parametrize("changes, same", [
    ({"seed": 5, "model": "other", "max_length": 7, "loss": "logconf", "epochs": 9, "shuffle": "epoch"}, True),
    ({"n_test": 10}, True),
    ({"data_seed": 1}, False),
])
def test_halves_depend_on_the_data_seed_alone(folder, changes, same):
    one, other = (splits.prepare(config(folder, **c)) for c in ({}, changes))
    assert (one.train.ids == other.train.ids) == same
    assert one.fingerprint == other.fingerprint  # of the content, not of the choice


def test_n_val_leaves_the_halves_alone(folder):
    whole, held = splits.prepare(config(folder)), splits.prepare(config(folder, n_val=40))
    rest = set(held.val.ids)
    assert [i for i in whole.train.ids if i not in rest] == held.train.ids and len(rest) == 40
    assert splits.prepare(config(folder, n_val=40), only="a").wanted.ids == whole.train.ids
    assert splits.prepare(config(folder, n_val=40), only="val").wanted.ids == held.val.ids


def test_order_is_seeded_and_mixes_groups(folder):
    train = splits.prepare(config(folder)).train
    row = [int(i.split("/")[2]) for i in train.ids]
    assert row != sorted(row) and sum(a == b for a, b in zip(train.groups, train.groups[1:])) < 20
    in_order = splits.prepare(config(folder, shuffle="none")).train
    assert in_order.ids == sorted(train.ids, key=lambda i: int(i.split("/")[2]))


def test_file_order_holds_nothing_out_and_drops_nothing(tmp_path):
    repeated = [("same", 0, "g"), ("x", 1, "h"), ("same", 0, "g"), ("test", 1, "t")]
    folder = write(tmp_path / "mine", train=repeated, test=[("test", 1, "t"), ("u", 0, "u")])
    got = splits.prepare(config(folder, split="train", shuffle="none"))
    assert got.train.texts == ["same", "x", "same", "test"] and got.test.texts == ["test", "u"] and not len(got.val)
    assert set(got.n_dropped.values()) == {0} and any("1 of 4 training documents share a group with the test set" in n for n in got.notes)
    assert splits.prepare(config(folder, split="train", shuffle="none", n_train=2)).train.texts == ["same", "x"]


def test_overlap_with_the_test_set_and_duplicates_are_dropped_and_counted(tmp_path):
    train = [*rows("train", 40, 1), ("train 3", 1, "again"), ("leak", 0, "test-1"), ("test 9", 1, "lonely")]
    folder = write(tmp_path / "mine", train=train, test=rows("test", 10, 1))
    got = splits.prepare(config(folder, split="train"))
    assert got.n_dropped == {"group": 2, "duplicate": 1, "empty": 0}
    assert texts(got.train) == {f"train {i}" for i in range(40)}
    assert sum("dropped" in note for note in got.notes) == 2


def test_identical_texts_join_their_groups(tmp_path):
    # one - two - three hang together through texts; "two" is in the test set, so all three go
    train = [*rows("train", 40, 1), ("p", 0, "one"), ("q", 1, "one"), ("p", 0, "two"), ("r", 0, "three"), ("q", 1, "three")]
    folder = write(tmp_path / "mine", train=train, test=[*rows("test", 10, 1), ("s", 0, "two")])
    got = splits.prepare(config(folder, split="train"))
    assert texts(got.train) == {f"train {i}" for i in range(40)} and got.n_dropped["group"] == 3


def test_group_none_keeps_everything_and_says_so(tmp_path):
    folder = write(tmp_path / "mine", train=[*rows("train", 40), ("train 3", 1, "x"), ("leak", 0, "test-1")], test=rows("test", 20))
    got = splits.prepare(config(folder, group="none"))
    other = splits.prepare(config(folder, group="none", split="b"))
    assert len(got.train) + len(other.train) == 42 and set(got.n_dropped.values()) == {0}
    assert not set(got.train.ids) & set(other.train.ids)
    assert any("1 of 42 training documents share a group with the test set" in n for n in got.notes)
    assert any("halves a and b share" in n for n in got.notes)


@pytest.mark.parametrize("there", ["train", "test"])
def test_test_fraction_carves_by_group(tmp_path, there):
    folder = write(tmp_path / "mine", **{there: rows("x", 400)})
    with pytest.raises(UserError, match=r"no (train|test)\.\*.*test_fraction"):
        splits.prepare(config(folder))
    got = splits.prepare(config(folder, test_fraction=0.25, split="train"))
    assert len(got.test) == 100 and len(got.train) == 300
    assert not set(got.test.groups) & set(got.train.groups)
    assert all(f"/{there}/" in i for i in got.test.ids + got.train.ids)
    assert got.test.ids == splits.prepare(config(folder, test_fraction=0.25, n_train=50, split="b")).test.ids


def test_balance(tmp_path):
    folder = write(tmp_path / "mine", train=rows("train", 400, positive=0.8), test=rows("test", 100, positive=0.8))
    got = splits.prepare(config(folder, balance=True, split="train"))
    assert (len(got.train), len(got.test)) == (160, 40) and got.train.labels.mean() == got.test.labels.mean() == 0.5
    assert splits.prepare(config(folder, split="train")).train.labels.mean() == 0.8


def test_n_test_is_a_seeded_choice_in_file_order(folder):
    got = splits.prepare(config(folder, n_test=30)).test
    row = [int(i.split("/")[2]) for i in got.ids]
    assert row == sorted(row) and len(row) == 30 and row != list(range(30))
    assert splits.prepare(config(folder, n_test=100)).test.texts == [f"test {i}" for i in range(100)]


@pytest.mark.parametrize("only, n", [("a", 200), ("b", 200), ("train", 400), ("test", 100)])
def test_only(folder, only, n):
    wanted = splits.prepare(config(folder), only=only).wanted
    assert len(wanted) == n
    assert splits.prepare(config(folder)).wanted is None
    if only in ("a", "b"):
        assert wanted.ids == splits.prepare(config(folder, split=only)).train.ids
        assert wanted.ids == splits.prepare(config(folder, split="train"), only=only).wanted.ids


def test_labelling_needs_no_labels(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    got = splits.prepare(config(tmp_path), only="test").wanted
    assert got.texts == ["a", "b"] and got.labels.tolist() == [-1, -1]
    examples, fingerprint = splits.read_documents(tmp_path / "test.jsonl")
    assert examples.ids == ["test/test/0/0", "test/test/1/0"] and len(fingerprint) == 64


@pytest.mark.parametrize("train, test, changes, message", [
    (rows("t", 40, positive=0), rows("u", 40), {}, "all 20 train documents are of class 0"),
    (rows("t", 40), rows("u", 40, positive=1), {}, "all 40 test documents are of class 1"),
    (rows("t", 40, per_group=40), rows("u", 40), {}, "no train documents (split='a'"),
    (rows("t", 40), rows("t", 40), {}, "no train documents"),
    (rows("t", 40), rows("u", 40), {"n_test": 0}, "no test documents (n_test=0)"),
    (rows("t", 40), rows("u", 40), {"n_train": 1}, "no train documents (split='a', n_train=1)"),
    (rows("t", 40), rows("u", 40), {"n_val": 1}, "n_val=1: no validation documents"),
    (rows("t", 40), rows("u", 40), {"split": "c"}, "split='c': expected a | b | train"),
    (rows("t", 40), rows("u", 40), {"group": "nine"}, "group='nine': expected auto | none; did you mean 'none'?"),
    (rows("t", 40), None, {"test_fraction": 1.5}, "test_fraction=1.5: expected a share between 0 and 1"),
])
def test_too_little_data(tmp_path, train, test, changes, message):
    folder = write(tmp_path / "mine", train=train, **({"test": test} if test else {}))
    with pytest.raises(UserError) as error:
        splits.prepare(config(folder, **changes))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_task_dir_split_names_both_files(tmp_path):
    write(tmp_path / "other", train=rows("t", 4))
    with pytest.raises(UserError, match=r"task_dir=.*no train\.\* or validation\.\* .*'boolq'"):
        splits.prepare(config("boolq", task_dir=str(tmp_path)))
    with pytest.raises(UserError, match="task_dir='/nowhere': no such folder"):
        splits.prepare(config("boolq", task_dir="/nowhere"))


def test_empty_texts_of_a_registered_task_are_counted(tmp_path):
    for split, n in (("train", 30), ("validation", 10)):
        lines = [json.dumps({"sentence": f"{split} {i}" if i else " ", "label": i % 2}) for i in range(n)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    got = splits.prepare(config("cola", task_dir=str(tmp_path), split="train"))
    assert got.n_dropped["empty"] == 2 and (len(got.train), len(got.test)) == (29, 9)


def test_checked_not_assumed(folder):
    part = splits.prepare(config(folder)).train
    with pytest.raises(AssertionError, match="is in a and in b"):
        splits._check_disjoint({"a": part.select([0, 1]), "b": part.select([1])}, grouped=False)


def test_world():
    got = splits.prepare(config("world"))
    assert len(got.train) > 1000 and not set(got.train.groups) & set(got.test.groups)
    assert got.train.ids[0].startswith("world/train/")


# Real data: the official splits overlap and repeat texts; the counts are those of these files


@pytest.mark.parametrize("name, group_dropped, duplicates, test_fraction", [
    ("sciq", 7, 15, 0.0), ("sst2", 0, 371, 0.0), ("cola", 16, 19, 0.0), ("ethics-deontology", 296, 0, 0.0),
    ("ethics-justice", 1, 9, 0.0), ("openbookqa", 22, 2, 0.0), ("anthropic_hh", 0, 0, 0.2),
])
def test_real_splits(shared, name, group_dropped, duplicates, test_fraction):
    options = {"task_dir": str(shared / "data" / "tasks"), "test_fraction": test_fraction, "n_val": 100}
    a, b = (splits.prepare(config(name, split=split, **options)) for split in "ab")
    assert a.n_dropped == b.n_dropped == {"group": group_dropped, "duplicate": duplicates, "empty": 0}
    groups = [set(p.groups) for p in (a.train, a.val, a.test, b.train, b.val)]
    assert sum(map(len, groups)) == len(set().union(*groups))
    assert a.test.ids == b.test.ids and len(a.val) == len(b.val) == 100
    assert not texts(a.train) & (texts(b.train) | texts(b.val) | texts(a.test))


def test_golden_folder_is_read_as_it_is(shared, tmp_path):
    raw = {"train": shared / "golden" / "openai" / "train_soft.jsonl", "test": shared / "golden" / "openai" / "test.jsonl"}
    for split, file in raw.items():
        (tmp_path / f"{split}.jsonl").write_bytes(file.read_bytes())
    got = splits.prepare(config(tmp_path, split="train", shuffle="none"))
    for split, file in raw.items():
        expected = [json.loads(line) for line in file.read_text().splitlines()]
        examples = getattr(got, split)
        assert [t.tolist() for t in examples.tokens] == [row["input_ids"] for row in expected]
        np.testing.assert_array_equal(examples.soft_labels, np.float32([row["soft_label"] for row in expected]))
