"""A classification head that starts as the language model's output vectors of two answers."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny

import w2s_jax
from w2s_jax import hub, main, models, registry, stages, workload
from w2s_jax.errors import UserError

IDS = (40, 7)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_tokenizer(tiny.write_model(tmp_path_factory.mktemp("models") / "texts", n_positions=256))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return tiny.write_texts(tmp_path_factory.mktemp("tasks") / "boxes")


def config(model, task, **keys):
    return tiny.finetune(model, task, **{"head_init": "unembedding", "matmul_precision": "highest"} | keys)


def filled(*args, **keys):
    return registry.fill(config(*args, **keys))


# --------------------------------------------------------------------------- the model


@pytest.mark.parametrize("case", ["gpt2", "gpt_neox", "gpt_neox sequential", "llama", "llama llama3", "qwen1", "gemma", "gemma2", "olmo2"])
def test_the_classifier_starts_as_the_language_model(case, tmp_path):
    """Tied and untied, with and without a scale on the embedding; the head stands before the cap on the logits, if there is one."""
    pytest.importorskip("torch")
    from test_train import unpacked

    reference.save(case, "lm", tmp_path)
    rng = np.random.default_rng(0)
    docs = [rng.integers(0, reference.VOCAB, n).astype(np.int32) for n in (5, 1, 9)]
    batch = unpacked(docs)
    arch = models.read_config(tmp_path)
    with jax.default_matmul_precision("highest"):
        lm, classifier = models.build(arch, head="lm"), models.build(arch, head="classifier", head_init="unembedding")
        expected = jax.jit(lm.logits)(models.load(tmp_path, lm), batch).reshape(1, -1, arch.vocab)[0, batch["last"][0]][:, IDS]
        params = models.load(tmp_path, classifier, key=jax.random.key(0))
        assert not np.asarray(params["head"]["kernel"]).any()
        params["head"]["kernel"] = jnp.asarray(models.unembedding(tmp_path, classifier, IDS))
        found = jax.jit(classifier.apply)(params, batch)[0]
    if arch.logit_cap:
        found = arch.logit_cap * np.tanh(found / arch.logit_cap)
    assert params["head"]["kernel"].dtype == np.float32 and np.ptp(expected) > 0.1
    np.testing.assert_allclose(found[: len(docs)], expected[: len(docs)], atol=1e-5)


# --------------------------------------------------------------------------- the stages


@pytest.mark.parametrize("keys", [{}, {"mesh__data": 2, "mesh__fsdp": 4}, {"mesh__model": 2, "mesh__fsdp": 4}], ids=str)
def test_a_run_starts_from_its_answers(model, task, keys):
    loaded = workload.open_model(filled(model, task, answers=("N", "Yes"), **keys))
    table = np.asarray(models.load(model, models.build(models.read_config(model), head="lm"))["backbone"]["embed"]["tokens"]["embedding"])
    ids = [hub.single_token(model, answer) for answer in ("N", "Yes")]
    np.testing.assert_array_equal(loaded.params["head"]["kernel"], table[ids].T)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, workload.open_model(filled(model, task, head_init="zeros", **keys)).params)
    assert jax.tree.map(lambda leaf: leaf.sharding, loaded.params) == shardings


def test_labels_and_resume_take_the_head_from_the_checkpoint(model, task, tmp_path, fast_compiles, monkeypatch):
    stages.run(config(model, task, keep="all"), str(tmp_path / "run"))
    first = w2s_jax.load(tmp_path / "run")
    # A run that is resumed at its end has the same results; labels and a restored model need no answers.
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for name in ("results.json", "predictions"):
        path = tmp_path / "again" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    stages.run(config(model, task, keep="all"), str(tmp_path / "again"))
    assert w2s_jax.load(tmp_path / "again").predictions("test").equals(first.predictions("test"))

    def nothing(*_, **__):
        raise AssertionError("the answers are not needed")

    monkeypatch.setattr(hub, "single_token", nothing)
    loaded = w2s_jax.load(tmp_path / "run").model()
    assert np.abs(np.asarray(loaded.params["head"]["kernel"])).max() > 0.01
    label = tiny.set_keys(w2s_jax.config.shipped("label"), run=str(tmp_path / "run"), split="test", mesh__data=1)
    stages.run(label, str(tmp_path / "labels"))
    one, two = (np.stack(w2s_jax.load(tmp_path / name).predictions("test").logits.to_list()) for name in ("run", "labels"))
    np.testing.assert_allclose(one, two, atol=1e-5)


def test_answers_count_only_where_they_are_used(model, task):
    assert "answers" not in stages.identity(config(model, task, head_init="zeros"))
    assert stages.identity(config(model, task))["answers"] == ["0", "1"]


@pytest.mark.parametrize("keys, message", [
    ({"answers": ("No", "Yes")}, "answers: 'No' is the tokens 'N', 'o' to the tokenizer in .*; expected a single token"),
    ({"answers": ("\u00e9", "Yes")}, "answers: '\u00e9' is the tokens '<unk>' to the tokenizer"),
    ({"answers": ("0", "0")}, "config.answers: .*expected two different texts"),
    ({"answers": ("0",)}, "config.answers: .*expected two different texts"),
    ({"readout": "mean"}, "config.readout: 'mean', expected auto or last"),
    ({"answers": ("No", "Yes"), "head_init": "zeros"}, "config.answers: .* is set, but config.head_init='zeros' has no use for answers"),
])
def test_what_cannot_start_a_head(model, task, tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        stages.run(config(model, task, **keys), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_encoder_and_a_folder_without_an_output_matrix_are_refused(tmp_path):
    pytest.importorskip("torch")
    from safetensors.numpy import load_file, save_file

    reference.save("bert", "classifier", tmp_path / "bert")
    with pytest.raises(UserError, match="head_init='unembedding': bert is an encoder"):
        models.build(models.read_config(tmp_path / "bert"), head="classifier", head_init="unembedding")
    reference.save("llama", "lm", tmp_path / "llama")
    file = tmp_path / "llama" / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "lm_head" not in k}, file)
    classifier = models.build(models.read_config(tmp_path / "llama"), head="classifier", head_init="unembedding")
    with pytest.raises(UserError, match="has no tensor 'lm_head.weight'; expected a language model's checkpoint"):
        models.unembedding(tmp_path / "llama", classifier, IDS)


def test_a_mark_for_the_start_of_a_text_is_no_part_of_an_answer(tmp_path):
    """As in SentencePiece's tokenizers: "0" alone is cut into the mark and "0"."""
    from tokenizers import Tokenizer, normalizers
    from tokenizers import models as kinds

    tokenizer = Tokenizer(kinds.BPE({"<unk>": 0, "\u2581": 1, "0": 2, "a": 3}, [], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Prepend("\u2581")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert hub.single_token(tmp_path, "0") == 2
    with pytest.raises(UserError, match="'0a' is the tokens '\u2581', '0', 'a'"):
        hub.single_token(tmp_path, "0a")


def test_by_the_command_line(model, task, tmp_path, capsys):
    assert main.main(["--config=finetune", "--config.head_init=unembedding", "--config.answers=no,Yes", f"--config.model={model}",
                      f"--config.task={task}", f"--workdir={tmp_path / 'run'}"]) == 2
    assert "answers: 'no' is the tokens 'n', 'o'" in capsys.readouterr().err and not (tmp_path / "run").exists()
