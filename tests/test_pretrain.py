"""Pretraining: what is read, how it is cut, and a model in Hugging Face's format at the end."""

import gzip
import json

import numpy as np
import pytest

from w2s_jax import checks
from w2s_jax import config as config_lib
from w2s_jax.data import corpus, world
from w2s_jax.errors import UserError

# --------------------------------------------------------------------------- reading


def test_a_folder_is_read_whole_and_nothing_is_stripped(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.txt").write_text("  first\n\n ")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"text": "second"}\n{"text": "", "more": 1}\n')
    (tmp_path / "readme.md").write_text("not this")
    text = corpus.read(tmp_path)
    assert text.documents == ["second", "", "  first\n\n "]
    assert text.names == ["a.jsonl.gz row 1", "a.jsonl.gz row 2", "b/one.txt"]
    assert text.left_out == ["readme.md"]
    before = text.fingerprint
    (tmp_path / "readme.md").write_text("still not this")
    assert corpus.read(tmp_path).fingerprint == before
    (tmp_path / "b" / "one.txt").write_text("  first\n\n")
    assert corpus.read(tmp_path).fingerprint != before
    assert corpus.read(tmp_path / "b" / "one.txt").documents == ["  first\n\n"]


@pytest.mark.parametrize("name, content, expected", [
    ("a.md", b"x", "ends in"),
    ("a.txt", b"", "empty"),
    ("a.txt", b"ok\n\xff", "a.txt, line 2: not UTF-8"),
    ("a.txt.gz", gzip.compress(b"some text" * 100, mtime=0)[:-9], "damaged gzip"),
    ("a.txt.gz", b"plain", "damaged gzip"),
    ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', "row 2: expected a column text"),
    ("a.jsonl", b'{"text": "x"}\n{', "line 2: not JSON"),
])
def test_unreadable_files_are_named(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=expected):
            corpus.read(path)
    with pytest.raises(UserError, match="no such file"):
        corpus.read(tmp_path / "nowhere")


# --------------------------------------------------------------------------- cutting


@pytest.mark.parametrize("length", [2, 3, 4, 5, 8, 9, 50])
def test_every_token_but_the_first_is_predicted_once(length):
    documents = [np.arange(n, dtype=np.int32) + 100 * n for n in (0, 1, 2, 5, 9, 17)]
    pieces = corpus.cut(documents, length)
    assert all(2 <= len(piece) <= length for piece in pieces.tokens)
    for d, ids in enumerate(documents):
        mine = [piece for piece, owner in zip(pieces.tokens, pieces.document, strict=True) if owner == d]
        predicted = [t for piece in mine for t in piece[1:].tolist()]
        assert predicted == ids[1:].tolist()
    assert pieces.counts == {
        "documents": 6, "tokens": 34, "cut": sum(len(d) > length for d in documents), "pieces": len(pieces.tokens), "empty": 1, "single": 1,
    }


def test_held_out_pieces_are_whole_documents_but_one():
    pieces = corpus.cut([np.arange(9, dtype=np.int32)] * 20, 3)  # 4 pieces a document
    fit, held = corpus.hold_out(pieces, 10, seed=0)
    assert sorted([*fit, *held]) == list(range(80)) and len(held) == 10
    torn = set(pieces.document[fit]) & set(pieces.document[held])
    assert len(torn) == 1
    assert (np.diff(fit) > 0).all()  # the others keep their order
    other = corpus.hold_out(pieces, 10, seed=1)[1]
    assert set(pieces.document[other]) != set(pieces.document[held])
    assert not len(corpus.hold_out(pieces, 0, seed=0)[1])
    with pytest.raises(UserError, match="n_heldout=41"):
        corpus.hold_out(pieces, 41, seed=0)
    with pytest.raises(UserError, match="max_length=1"):
        corpus.cut([np.arange(3)], 1)


# --------------------------------------------------------------------------- the stage


def tiny(**keys):
    """A run of seconds."""
    config = config_lib.shipped("pretrain", "runlocal")
    config.update({"steps": 6, "warmup_steps": 2, "n_heldout": 8, "batch_size": 8, "checkpoint_every": 0, "steps_per_dispatch": 2} | keys)
    return config


def test_learning_rates_end_at_the_final_fraction():
    pytest.importorskip("jax")
    from w2s_jax.stages import pretrain

    config = tiny(steps=101, warmup_steps=1, learning_rate=2.0, final_lr_fraction=0.1)
    rates = pretrain.learning_rates(config)
    assert rates[0] == 0 and rates[1] == 2.0 and rates[51] == pytest.approx(1.1) and 0.2 < rates[-1] < 0.201
    config.schedule = "constant"
    assert (pretrain.learning_rates(config)[1:] == 2.0).all()


def test_world_model_loads_in_transformers_with_the_same_loss(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from w2s_jax import stages

    config = tiny(steps=12, learning_rate=2e-2)
    results = stages.run(config, tmp_path / "run")
    assert 0 <= results["facts_known"] <= 1 and len(results["facts_known_by_quarter"]) == 4
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(12)) and lines[-1]["loss"] < lines[0]["loss"] - 0.3
    assert lines[0]["loss"] == pytest.approx(np.log(len(world.vocabulary())), abs=0.1)  # nats a token
    assert not list((tmp_path / "run" / "checkpoints").glob("*")), "keep=none leaves only model/"

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    held = world.corpus(config.seed, config.steps * config.batch_size + config.n_heldout)[-config.n_heldout:]
    total, count, known = 0.0, 0, 0
    with torch.no_grad():
        for text in held:
            ids = torch.tensor(tokenizer(text)["input_ids"])[None]
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        prompts = world.fact_prompts()
        for prompt in prompts[:40]:
            ids = torch.tensor(tokenizer(prompt["text"])["input_ids"])[None]
            known += tokenizer.decode([int(model(ids).logits[0, -1].argmax())]) == prompt["value"]
    assert results["heldout_loss"] == pytest.approx(total / count, abs=1e-5)
    assert results["facts_known_by_quarter"][0] * len(prompts) / 4 >= known

    assert stages.run(config, tmp_path / "run") == json.loads((tmp_path / "run" / "results.json").read_text())  # done already
    with pytest.raises(UserError, match="seed: 0 -> 1"):
        stages.run(tiny(steps=12, learning_rate=2e-2, seed=1), tmp_path / "run")


def test_own_text_own_tokenizer_then_pretraining_goes_on(tmp_path, capsys):
    pytest.importorskip("jax")
    from w2s_jax import stages

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name, content in world.tokenizer_files().items():
        (folder / name).write_text(content)
    (tmp_path / "text").mkdir()
    sentences = world.corpus(5, 120)
    (tmp_path / "text" / "long.txt").write_text(" ".join(sentences[:20]))
    (tmp_path / "text" / "empty.txt").write_text("")
    (tmp_path / "text" / "short.jsonl").write_text("".join(json.dumps({"text": s}) + "\n" for s in (*sentences[20:], "so")))
    (tmp_path / "text" / "notes.md").write_text("not text for this")
    keys = {"corpus": str(tmp_path / "text"), "max_length": 16}
    config = tiny(tokenizer=str(folder), **keys)
    results = stages.run(config, tmp_path / "first")
    counts = results["corpus"]
    assert (counts["documents"], counts["cut"], counts["empty"], counts["single"], counts["files_left_out"]) == (103, 1, 1, 1, 1)
    words = sum(len(s.split()) for s in (*sentences, "so"))
    assert counts["tokens"] == words
    said = capsys.readouterr().err
    assert "notes.md" in said and "1 documents cut" in said and "1 empty, 1 of one token" in said
    assert "facts_known" not in results and results["n_train"] + results["n_heldout"] == counts["pieces"]

    again = tiny(model=str(tmp_path / "first" / "model"), learning_rate=1e-9, **keys)
    more = stages.run(again, tmp_path / "second")
    assert more["heldout_loss"] == pytest.approx(results["heldout_loss"], abs=1e-5)  # it starts where the first ended
    assert (tmp_path / "second" / "model" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    with pytest.raises(UserError, match="max_length=64: the model has 32 positions"):
        stages.run(tiny(model=str(tmp_path / "first" / "model"), corpus=keys["corpus"], max_length=64), tmp_path / "third")
    assert not (tmp_path / "third").exists()


@pytest.mark.slow
def test_same_run_whatever_the_execution(tmp_path):
    """Microbatches, devices and steps a dispatch change rounding only; a resumed run is found by its identity."""
    pytest.importorskip("jax")
    from w2s_jax import stages
    from w2s_jax.stages import pretrain

    losses = []
    for i, keys in enumerate(({}, {"microbatch_size": 2}, {"steps_per_dispatch": 1, "mesh": {"data": 2, "fsdp": 2, "model": 2}})):
        config = tiny(**keys)
        stages.run(config, tmp_path / str(i))
        losses.append([json.loads(line)["loss"] for line in (tmp_path / str(i) / "metrics.jsonl").read_text().splitlines()])
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=2e-5)
    np.testing.assert_allclose(losses[2], losses[0], rtol=0, atol=2e-5)
    assert pretrain.identity(tiny()) == pretrain.identity(tiny(microbatch_size=2)) != pretrain.identity(tiny(steps=7))


@pytest.mark.parametrize("keys, expected", [
    ({"corpus": "nowhere"}, "config.corpus: 'nowhere'"),
    ({"corpus": "."}, "config.tokenizer: ''"),
    ({"tokenizer": "./nowhere"}, "config.tokenizer: './nowhere'"),
    ({"max_length": 33}, "config.max_length: 33"),
    ({"warmup_steps": 6}, "config.warmup_steps: 6"),
    ({"final_lr_fraction": 1.5}, "config.final_lr_fraction: 1.5"),
])
def test_wrong_configs_are_refused_before_jax(keys, expected):
    with pytest.raises(UserError) as error:
        checks.check(tiny(**keys))
    assert expected in str(error.value)
