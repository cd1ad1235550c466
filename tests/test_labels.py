"""Predictions files, and the labels that a student takes from them: matched strictly."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from w2s_jax.data import labels
from w2s_jax.data.examples import Examples, one_hot, text_sha
from w2s_jax.errors import UserError

pytestmark = pytest.mark.quick

IDS = ["t/train/0/0", "t/train/3/1", "t/train/9/0"]
TEXTS = ["alpha", "beta !", "gamma"]
LOGITS = np.float32([[2.0, -1.0], [0.5, 0.5], [-30.0, 80.0]])


@pytest.fixture
def examples():
    return Examples(IDS, TEXTS, None, one_hot(np.array([1, -1, 0])), ["g", "g", "h"])


def rows(**changes):
    """A label file's rows; a list in `changes` replaces a column, None removes it."""
    columns = {"id": IDS, "text_sha": [text_sha(t) for t in TEXTS], "probs": [[0.9, 0.1], [0.5, 0.5], [0.25, 0.75]]} | changes
    columns = {name: values for name, values in columns.items() if values is not None}
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def write(path, table):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(table), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return path


def test_predictions_on_disk(tmp_path, examples):
    path = tmp_path / "run" / "predictions" / "b.parquet"
    labels.write_predictions(path, examples, LOGITS)
    table = pq.read_table(path)
    assert table.column_names == ["id", "text_sha", "label", "logits", "probs", "p", "group"]
    assert [str(table.schema.field(c).type) for c in ("label", "logits", "probs", "p")] == ["int64", *["list<element: float>"] * 2, "float"]
    got = table.to_pydict()
    assert got["id"] == IDS and got["text_sha"] == [text_sha(t) for t in TEXTS] and got["group"] == ["g", "g", "h"]
    assert got["label"] == [1, None, 0]
    np.testing.assert_array_equal(np.float32(got["logits"]), LOGITS)
    np.testing.assert_allclose(got["probs"], [[0.95257413, 0.04742587], [0.5, 0.5], [0, 1]], rtol=1e-6)
    np.testing.assert_array_equal(np.float32(got["p"]), np.float32(got["probs"])[:, 1])
    assert [p.name for p in path.parent.iterdir()] == ["b.parquet"]  # no temporary file stays


def test_more_classes_have_no_p(tmp_path, examples):
    labels.write_predictions(tmp_path / "b.parquet", examples, np.eye(3))
    assert "p" not in pq.read_table(tmp_path / "b.parquet").column_names
    assert labels.attach(examples, tmp_path / "b.parquet").soft_labels.shape == (3, 3)


@pytest.mark.parametrize("logits", [np.zeros((2, 2)), np.zeros(3)])
def test_logits_of_the_wrong_shape(tmp_path, examples, logits):
    with pytest.raises(ValueError, match="logits .* for 3 documents"):
        labels.write_predictions(tmp_path / "b.parquet", examples, logits)


@pytest.mark.parametrize("of_run", [True, False])
def test_round_trip(tmp_path, examples, of_run):
    labels.write_predictions(tmp_path / "run" / "predictions" / "b.parquet", examples, LOGITS)
    got = labels.attach(examples.select([2, 0, 1]), tmp_path / "run" / ("" if of_run else "predictions/b.parquet"))
    np.testing.assert_array_equal(got.soft_labels, labels.softmax(LOGITS)[[2, 0, 1]])
    assert got.ids == [IDS[2], IDS[0], IDS[1]] and got.texts == [TEXTS[2], TEXTS[0], TEXTS[1]]


def test_token_documents(tmp_path):
    examples = Examples(IDS, None, [np.int32([1, 2]), np.int32([0]), np.int32([3])], one_hot(np.array([0, 1, 0])), IDS)
    labels.write_predictions(tmp_path / "b.parquet", examples, LOGITS)
    labels.attach(examples, tmp_path / "b.parquet")
    with pytest.raises(UserError, match="1 labels were made for another text, the first 't/train/3/1'"):
        labels.attach(examples.replace(tokens=[np.int32([1, 2]), np.int32([7]), np.int32([3])]), tmp_path / "b.parquet")


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_weights(tmp_path, examples, suffix):
    path = tmp_path / f"b{suffix}"
    if suffix == ".parquet":
        labels.write_predictions(path, examples, LOGITS, np.float32([0, 1, 0.25]))
    elif suffix == ".jsonl":
        write(path, rows(weight=[0, 1, 0.25]))
    else:
        path.write_text("id,p,weight\n" + "".join(f"{i},0.5,{w}\n" for i, w in zip(IDS, (0, 1, 0.25))))
    given = labels.read(path)
    assert labels.attach(examples.select([2, 0]), path, frozenset([IDS[1]])).weights.tolist() == [0.25, 0.0]
    assert given.fingerprint != labels.Labels(given.path, given.ids, given.text_shas, given.probs).fingerprint


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("columns, expected", [
    ({}, [[0.9, 0.1], [0.5, 0.5], [0.25, 0.75]]),
    ({"text_sha": None}, [[0.9, 0.1], [0.5, 0.5], [0.25, 0.75]]),
    ({"text_sha": None, "probs": None, "p": [0.25, 1.0, 0.0]}, [[0.75, 0.25], [0, 1], [1, 0]]),
    ({"text_sha": None, "probs": None, "label": [1, 0, 1]}, [[0, 1], [1, 0], [0, 1]]),
    ({"p": [0.1, 0.5, 0.75], "label": [1, 1, 1]}, [[0.9, 0.1], [0.5, 0.5], [0.25, 0.75]]),  # probs first; label is the truth
])
def test_files_of_the_users(tmp_path, examples, suffix, columns, expected):
    path = write(tmp_path / f"mine{suffix}", rows(**columns))
    np.testing.assert_array_equal(labels.attach(examples, path).soft_labels, np.float32(expected))


def columns(**changes):
    """A label file of the usual types, as arrow has it."""
    probs = np.random.default_rng(0).dirichlet(np.ones(4), 9000)
    probs = pa.array(list(probs), pa.list_(pa.float32()))
    return {"id": [f"i{n}" for n in range(9000)], "text_sha": ["s"] * 9000, "probs": probs} | changes


@pytest.mark.parametrize("make", [
    lambda c: pa.table(c), lambda c: pa.concat_tables([pa.table(c).slice(0, 4000), pa.table(c).slice(4000)]),
    lambda c: pa.table(c | {"probs": pa.array(c["probs"].to_pylist(), pa.list_(pa.float64(), 4)), "weight": np.arange(9000.0)}),
    lambda c: pa.table(c | {"id": pa.array(c["id"], pa.large_string()), "probs": c["probs"].cast(pa.large_list(pa.float32()))}),
], ids=["lists", "chunks", "fixed size, doubles, weights", "large types"])
def test_columns_are_read_as_rows_are(tmp_path, make):
    """The way without a Python object a number gives what the way row by row gives, in all the types that hold such a table."""
    pq.write_table(make(columns()), tmp_path / "labels.parquet")
    file, table = str(tmp_path / "labels.parquet"), labels.sources.read_table(tmp_path / "labels.parquet", labels.COLUMNS)
    fast, slow = labels._columns(file, table), labels._rows(file)
    assert fast[0] == slow[0] and fast[2] == slow[2]
    for one, two in ((fast[1], slow[1]), (fast[3], slow[3])):
        np.testing.assert_array_equal(one, two)
    assert fast[1].dtype == slow[1].dtype == np.float32


@pytest.mark.parametrize("row", [0, 4095, 4096, 8999])
@pytest.mark.parametrize("bad", [[0.5, 0.6, 0, 0], [float("nan"), 0.5, 0.5, 0], [1.5, -0.5, 0, 0], [0, 0, 0, 0]])
def test_a_bad_row_of_many_is_named(tmp_path, row, bad):
    probs = columns()["probs"].to_pylist()
    probs[row] = bad
    pq.write_table(pa.table(columns(probs=pa.array(probs, pa.list_(pa.float32())))), tmp_path / "labels.parquet")
    with pytest.raises(UserError, match=rf"labels.parquet, row {row}: column 'probs' is .*, expected probabilities that sum to 1"):
        labels.read(tmp_path / "labels.parquet")


def test_columns_of_other_types_are_read_row_by_row(tmp_path):
    few = {"id": [1, 2], "probs": [[0.5, 0.5], [1, 0]]}
    pq.write_table(pa.table(few), tmp_path / "labels.parquet")
    found = labels.read(tmp_path / "labels.parquet")
    assert found.ids == ["1", "2"] and found.probs.tolist() == [[0.5, 0.5], [1, 0]] and found.text_shas is None


def test_fingerprint_is_of_the_content(tmp_path):
    table = rows()
    prints = [labels.read(write(tmp_path / name, t)).fingerprint for name, t in (
        ("a.jsonl", table), ("b.parquet", table[::-1]), ("c.jsonl", rows(probs=[[0.9, 0.1], [0.5, 0.5], [0.26, 0.74]])))]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("changes, message", [
    ({"id": ["t/train/0/0", "t/train/3/0", "t/train/9/0"]},
     "1 of 3 documents have no label, the first 't/train/3/1'; 1 of 3 labels have no document, the first 't/train/3/0'"),
    ({"id": ["x/1", "x/2", "x/3"]},
     "3 of 3 documents have no label, the first 't/train/0/0'; 3 of 3 labels have no document, the first 'x/1'"),
    ({"text_sha": [text_sha(t) for t in ("alpha", "beta", "gamma")]}, "1 labels were made for another text, the first 't/train/3/1'"),
    ({"id": [IDS[0], IDS[1], IDS[1]]}, "1 ids occur more than once, the first 't/train/3/1'"),
    ({"probs": [[0.9, 0.1], [float("nan"), 0.5], [0.5, 0.5]]}, "row 1: column 'probs' is [nan, 0.5], expected probabilities that sum to 1"),
    ({"probs": [[0.9, 0.1], [0.5, 0.5], [0.5, 0.6]]}, "row 2: column 'probs' is [0.5, 0.6], expected probabilities that sum to 1"),
    ({"probs": [[0.9, 0.1], [0.5, 0.5], [1.5, -0.5]]}, "row 2: column 'probs' is [1.5, -0.5]"),
    ({"probs": [[0.9, 0.1], [0.5, 0.5], [0.2, 0.3, 0.5]]}, "rows of 'probs' differ in length"),
    ({"probs": None, "p": [0.5, float("nan"), 0.5]}, "row 1: column 'p' is NaN"),
    ({"probs": None, "p": [0.5, 0.5, 2.0]}, "row 2: column 'p' is 2.0, expected a probability"),
    ({"probs": None, "label": [0, 1, 2]}, "row 2: column 'label' is 2, expected 0 or 1"),
    ({"probs": None, "score": [0, 1, 0]}, "expected the columns id and probs (or p, or label), found id, score, text_sha"),
    ({"id": None}, "expected the columns id and probs"),
    ({"weight": [1.0, -0.5, 1.0]}, "row 1: column 'weight' is -0.5, expected a number of 0 or more"),
    ({"weight": [1.0, 1.0, float("nan")]}, "row 2: column 'weight' is NaN"),
    ({"weight": [0.0, 0.0, 0.0]}, "every row has weight 0"),
])
def test_labels_that_do_not_fit(tmp_path, examples, changes, message, suffix):
    path = write(tmp_path / f"labels{suffix}", rows(**changes))
    with pytest.raises(UserError) as error:
        labels.attach(examples, path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_documents_that_the_run_left_out_may_have_labels(tmp_path, examples):
    path = write(tmp_path / "labels.jsonl", rows())
    kept = examples.select([0, 2])
    with pytest.raises(UserError, match="1 of 3 labels have no document, the first 't/train/3/1'"):
        labels.attach(kept, path)
    assert labels.attach(kept, path, frozenset([IDS[1]])).soft_labels.tolist() == np.float32([[0.9, 0.1], [0.25, 0.75]]).tolist()


@pytest.mark.parametrize("name, make, message", [
    ("nothing", lambda p: None, "no such file or run directory"),
    ("run", lambda p: p.mkdir(), r"no predictions/b.parquet in it \(predictions: none\); run the label stage"),
    ("run", lambda p: ((p / "predictions").mkdir(parents=True), (p / "predictions" / "test.parquet").touch()),
     r"\(predictions: test.parquet\)"),
    ("labels.pkl", lambda p: p.touch(), "expected a file that ends in"),
    ("labels.parquet", lambda p: p.write_bytes(b"PAR1"), "truncated or damaged parquet"),
    ("labels.parquet", lambda p: p.touch(), "empty file"),
])
def test_paths(tmp_path, examples, name, make, message):
    make(tmp_path / name)
    with pytest.raises(UserError, match=message) as error:
        labels.attach(examples, tmp_path / name)
    assert name in str(error.value)
