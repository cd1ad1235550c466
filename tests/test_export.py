"""Exports, in PyTorch: a trained run's folder gives the run's own predictions, by transformers' class or by the README's lines."""

import base64
import json
import re
import shutil

import numpy as np
import pytest
import reference
import tiny
from safetensors.numpy import load_file, save_file

import w2s_jax
from w2s_jax import files, hub, main, models, stages, workload
from w2s_jax.config import shipped
from w2s_jax.data import world
from w2s_jax.models import writing

pytestmark = pytest.mark.slow  # minutes together

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CLASSES = {  # case -> what transformers must make of the export
    "gpt2": "GPT2", "gpt_neox": "GPTNeoX", "llama": "Llama", "qwen2": "Qwen2", "gemma2": "Gemma2", "gemma3": "Gemma3Text",
    "olmo2": "Olmo2", "phi3": "Phi3", "bert": "Bert", "roberta": "Roberta", "modernbert": "ModernBert", "modernbert mean": "ModernBert",
    "qwen1": "Qwen2",
}  # fmt: skip


EOS = world.vocabulary()[world.EOS]


@pytest.fixture(autouse=True)
def fast(fast_compiles):
    pass


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Token ids from 4 on: none is a special token of tests/reference.py, by which transformers finds a document's end."""
    rng = np.random.default_rng(3)

    def rows(n):
        lengths = rng.integers(1, reference.POSITIONS, n)
        return [{"input_ids": rng.integers(4, reference.VOCAB, size).tolist(), "label": i % 2} for i, size in enumerate(lengths)]

    folder = tmp_path_factory.mktemp("task")
    tiny.write_rows(folder / "train.jsonl", rows(24))
    tiny.write_rows(folder / "test.jsonl", rows(9))
    return folder


def train(model, task, folder, **keys):
    """A run of three steps; the head has left its zeros."""
    keys = {"matmul_precision": "highest", "learning_rate": 3e-2, "head_init": "normal", "checkpoint_every": 0} | keys
    stages.run(tiny.finetune(model, task, **keys), str(folder))
    return folder


def export(run, folder, **keys):
    results = stages.run(tiny.set_keys(shipped("export"), run=str(run), **keys), str(folder))
    return results, folder / "model"


def padded(documents, pad):
    """[documents, tokens] with `pad` on the right, and the attention mask."""
    longest = max(map(len, documents))
    ids = [[*map(int, d), *[pad] * (longest - len(d))] for d in documents]
    return torch.tensor(ids), torch.tensor([[1] * len(d) + [0] * (longest - len(d)) for d in documents])


def the_runs(run, task):
    """Test documents of a run, and its logits of them."""
    frame = w2s_jax.load(run).predictions("test")
    documents = [json.loads(line)["input_ids"] for line in (task / "test.jsonl").read_text().splitlines()]
    logits = np.stack(frame.logits.to_list())
    assert len(documents) == len(logits) and np.ptp(logits) > 0.1  # it is a trained model
    return documents, logits


def the_readme(folder, monkeypatch, capsys):
    """`logits` of README.md's lines, which also run to their end."""
    monkeypatch.chdir(folder)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), names)
    assert re.search(r"\d\.\d+", capsys.readouterr().out), "it prints logits"
    return names["logits"]


def close(ours, theirs):
    np.testing.assert_allclose(np.asarray(theirs), ours, atol=1e-4, rtol=1e-4)


def loads(auto, folder, **options):
    """What transformers makes of a folder; nothing is missing, nothing is left over."""
    net, info = auto.from_pretrained(folder, output_loading_info=True, dtype=torch.float32, **options)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return net.eval()


def base_model(case, folder):
    reference.save(case, "classifier" if reference.is_encoder(case) else "lm", folder)
    return folder


# --------------------------------------------------------------------------- every family


@pytest.mark.parametrize("case, keys", [
    *((case, {}) for case in CLASSES), ("llama", {"param_dtype": "bfloat16"}), ("roberta", {"param_dtype": "bfloat16"}),
    ("gpt2", {"train": "head", "readout": "last"}), *((case, {"train": "lora"}) for case in ("gpt2", "phi3", "roberta", "qwen1")),
], ids=str)
def test_transformers_class_gives_the_runs_logits(case, keys, task, tmp_path, monkeypatch, capsys):
    run = train(base_model(case, tmp_path / "base"), task, tmp_path / "run", **keys)
    results, folder = export(run, tmp_path / "export")
    documents, ours = the_runs(run, task)
    config = json.loads((folder / "config.json").read_text())
    pad = config.get("pad_token_id") or 0
    ids, mask = padded(documents, pad)
    close(ours, the_readme(folder, monkeypatch, capsys)(ids, mask))
    assert config["dtype"] == results["dtype"] == keys.get("param_dtype", "float32") and "torch_dtype" not in config
    assert results["class"] == f"{CLASSES[case]}ForSequenceClassification" and not (folder / "score.safetensors").exists()
    net = loads(transformers.AutoModelForSequenceClassification, folder)
    assert type(net).__name__ == results["class"] and net.config.id2label == {0: "0", 1: "1"} and net.config.label2id == {"0": 0, "1": 1}
    with torch.no_grad():
        close(ours, net(input_ids=ids, attention_mask=mask).logits)
        close(ours[:1], net(input_ids=ids[:1, : len(documents[0])]).logits)  # alone, and without a mask
    stored = {name: str(tensor.dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    heads = [name for name in stored if re.fullmatch(r"score\.weight|classifier(\.out_proj)?\.(weight|bias)", name)]
    assert {stored.pop(name) for name in heads} == {"float32"} and set(stored.values()) == {results["dtype"]}


@pytest.mark.parametrize("case, readout, name", [
    ("gpt2", "mean", "GPT2Model"), ("bert", "mean", "BertModel"), ("roberta", "last", "RobertaModel"),
    ("modernbert", "first", "ModernBertModel"),
])
def test_a_readout_that_no_class_has(case, readout, name, task, tmp_path, monkeypatch, capsys):
    run = train(base_model(case, tmp_path / "base"), task, tmp_path / "run", readout=readout)
    capsys.readouterr()
    results, folder = export(run, tmp_path / "export")
    assert "the head is in model/score.safetensors, and model/README.md says how" in capsys.readouterr().err
    assert results["class"] == name and load_file(folder / "score.safetensors")["score.weight"].shape == (2, 32)
    documents, ours = the_runs(run, task)
    close(ours, the_readme(folder, monkeypatch, capsys)(*padded(documents, 0)))
    loads(transformers.AutoModel, folder, **({"add_pooling_layer": False} if case in ("bert", "roberta") else {}))
    params = models.load(folder, models.build(models.read_config(folder), head="classifier", readout=readout))  # model=<folder>
    trained = models.paths(w2s_jax.load(run).model().params)
    for path, leaf in models.paths({"backbone": params["backbone"]}).items():
        np.testing.assert_array_equal(leaf, trained[path], err_msg=path)


def test_the_text_half_of_a_model_that_sees_images(task, tmp_path, monkeypatch, capsys):
    base = base_model("gemma3", tmp_path / "base")
    text = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text, "dtype": "float32"}))
    tensors = load_file(base / "model.safetensors")
    tensors = {f"language_model.{name}": tensor for name, tensor in tensors.items() if name.startswith("model.")}
    save_file(tensors | {"vision_tower.x": np.zeros(3, np.float32)}, base / "model.safetensors")
    run = train(base, task, tmp_path / "run")
    results, folder = export(run, tmp_path / "export")
    assert results["class"] == "Gemma3TextForSequenceClassification"
    documents, ours = the_runs(run, task)
    ids, mask = padded(documents, json.loads((folder / "config.json").read_text())["pad_token_id"])
    with torch.no_grad():
        close(ours, loads(transformers.AutoModelForSequenceClassification, folder)(input_ids=ids, attention_mask=mask).logits)
    close(ours, the_readme(folder, monkeypatch, capsys)(ids, mask))


def test_qwens_first_version_with_its_tokenizer(task, tmp_path):
    base = base_model("qwen1", tmp_path / "base")
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    (base / "qwen.tiktoken").write_text("\n".join(lines))
    results, folder = export(train(base, task, tmp_path / "run"), tmp_path / "export")
    assert results["tokenizer"] and not (folder / "qwen.tiktoken").exists()
    text = "Ca, voil\u00e0 1 2<|endoftext|>"
    theirs = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert theirs == hub.tokenize(base, [text], special=True)[0].tolist() == hub.tokenize(folder, [text])[0].tolist()
    assert "padding" in (folder / "README.md").read_text()


# --------------------------------------------------------------------------- config.json, tokenizer, files


def specials(file, closing=False):
    """Makes a tokenizer.json one that begins each text with a special token, and ends it with that too."""
    tokenizer = json.loads(file.read_text())
    special, text = {"SpecialToken": {"id": world.EOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    tokenizer["post_processor"] = {"type": "TemplateProcessing", "pair": [], "single": [special, text, *[special] * closing],
                                   "special_tokens": {world.EOS: {"id": world.EOS, "ids": [EOS], "tokens": [world.EOS]}}}
    file.write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("places", ["nothing", "before", "around"])
def test_texts_are_cut_as_the_run_did(places, tmp_path, monkeypatch, capsys):
    """With a tokenizer that adds nothing, that begins each text with a special token, or that ends it with one too."""
    base = tmp_path / "base"
    size = len(world.vocabulary())
    tiny.write_model(base, **world.model_config(36, 2, 12, 32), auto_map={"AutoModel": "x.Y"}, id2label={"0": "a", "1": "b", "2": "c"},
                     problem_type="regression")
    for name, content in world.tokenizer_files().items():
        (base / name).write_text(content)
    if places != "nothing":
        specials(base / "tokenizer.json", closing=places == "around")
    words = sorted(world.vocabulary())[3:]
    for split, n in (("train", 24), ("test", 8)):
        tiny.write_rows(tmp_path / f"task/{split}.jsonl", [{"text": " ".join(words[i : i + 1 + i % 7]), "label": i % 2} for i in range(n)])
    run = train(base, tmp_path / "task", tmp_path / "run")
    results, folder = export(run, tmp_path / "export")
    config = json.loads((folder / "config.json").read_text())
    # A text that ends with the only special token leaves none for padding.
    assert results["tokenizer"] and config["pad_token_id"] == (None if places == "around" else EOS) and config["vocab_size"] == size
    assert len(config["id2label"]) == 2 and not {"auto_map", "problem_type"} & config.keys()
    logits = the_readme(folder, monkeypatch, capsys)
    texts = [json.loads(line)["text"] for line in (tmp_path / "task/test.jsonl").read_text().splitlines()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(texts)["input_ids"]
    assert ids == [d.tolist() for d in hub.tokenize(base, texts, special=True)]
    assert "add_special_tokens" not in (folder / "README.md").read_text()
    ours = np.stack(w2s_jax.load(run).predictions("test").logits.to_list())
    if places == "around":
        close(ours, np.concatenate([logits(*padded([d], 0)) for d in ids]))
    else:
        close(ours, logits(*padded(ids, EOS)))


@pytest.mark.parametrize("ours, expected", [
    (lambda ids: ids, (False, "without special tokens")), (lambda ids: [EOS, *ids], (True, "with the special tokens")),
    (lambda ids: ids[1:], (None, "cuts texts otherwise")), (None, (None, r"does not read \(UserError: .*tokenizer.json: not a tokenizer")),
])
def test_the_readme_says_how_the_run_cut_texts(ours, expected, tmp_path, monkeypatch):
    """Whatever w2s_jax does with special tokens, the export finds out."""
    from w2s_jax.stages.export import _tokenizer

    for name, content in world.tokenizer_files().items():
        (tmp_path / name).write_text(content)
    if ours is None:
        (tmp_path / "tokenizer.json").write_text("{")
    else:
        specials(tmp_path / "tokenizer.json")
        plain = transformers.AutoTokenizer.from_pretrained(tmp_path)
        monkeypatch.setattr(hub, "tokenize", lambda folder, texts, special: [
            np.array(ours(plain(text, add_special_tokens=False)["input_ids"])) for text in texts])
    tokenizer, special, note, closing = _tokenizer(str(tmp_path))
    assert closing is None
    assert (special if tokenizer is not None else None) == expected[0] and re.search(expected[1], note), note


class Tokenizer:
    """What transformers' tokenizers say of their special tokens."""

    def __init__(self, pad=None, eos=None, bos=None):
        self.pad_token_id, self.eos_token_id, self.bos_token_id = pad, eos, bos


@pytest.mark.parametrize("tokenizer, raw, expected", [
    (Tokenizer(9, 8, 7), {"pad_token_id": 5}, 9), (Tokenizer(99, 8), {"pad_token_id": 5}, 5), (Tokenizer(None, 8), {"eos_token_id": 2}, 8),
    (None, {"pad_token_id": -1, "eos_token_id": [3, 4]}, 3), (None, {"pad_token_id": 50, "bos_token_id": 1}, 1),
    (None, {"eos_token_id": []}, None), (Tokenizer(), {"bos_token_id": True}, None), (Tokenizer(6, 6, 7), {}, 7),
])
def test_the_padding_token_of_a_decoder_is_one_of_its_vocabulary(tokenizer, raw, expected):
    from w2s_jax.stages.export import _padding

    assert _padding(raw, tokenizer, tiny.config(vocab_size=50), closing=6)[0] == expected


@pytest.fixture(scope="module")
def run(tiny_model, tiny_task, tmp_path_factory):
    """A run of a model that names no special token."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        tiny.fast_compiles(monkeypatch)
        return train(tiny_model, tiny_task, tmp_path_factory.mktemp("runs") / "run")


def test_without_a_padding_token_documents_come_alone(run, tiny_task, tmp_path, monkeypatch, capsys):
    results, folder = export(run, tmp_path / "export")
    assert results["pad_token_id"] is None and "one document at a time" in (folder / "README.md").read_text()
    logits = the_readme(folder, monkeypatch, capsys)
    documents, ours = the_runs(run, tiny_task)
    close(ours, np.concatenate([logits(*padded([d], 0)) for d in documents]))


def test_several_files_on_several_devices(run, tiny_task, tmp_path, monkeypatch):
    _, one = export(run, tmp_path / "one", mesh__fsdp=1)
    monkeypatch.setattr(writing, "SHARD", 20_000)
    monkeypatch.setattr(writing, "AT_ONCE", 5_000)
    _, folder = export(run, tmp_path / "several", mesh__fsdp=4, mesh__model=2)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {(one / "README.md").stat().st_mode & 0o777}
    loads(transformers.AutoModelForSequenceClassification, folder)
    whole = load_file(one / "model.safetensors")
    parts = [load_file(file) for file in folder.glob("*.safetensors")]
    assert sum(map(len, parts)) == len(whole)
    for part in parts:
        for name, tensor in part.items():
            np.testing.assert_array_equal(tensor, whole[name], err_msg=name)


def test_our_own_loader_says_what_it_does_not_take(run, tmp_path, capsys):
    _, folder = export(run, tmp_path / "export")
    params = models.load(folder, models.build(models.read_config(folder), head="classifier"))
    assert "its own classification head (score.weight) is not used: a new one is made" in capsys.readouterr().err
    assert not np.asarray(params["head"]["kernel"]).any()


# --------------------------------------------------------------------------- the run directory


def test_by_the_command_line_and_only_once(run, tmp_path, monkeypatch, capsys):
    argv = ["--config=export", f"--config.run={run}", f"--workdir={tmp_path / 'export'}"]
    assert main.main(argv) == 0
    assert re.search(r"export: .*/run is in .*/export/model, GPT2ForSequenceClassification, 2 classes, \d+ parameters, \S+ MB of float32, "
                     r"without a tokenizer\n$", capsys.readouterr().err)
    record, results = w2s_jax.load(tmp_path / "export").record, w2s_jax.load(tmp_path / "export").results
    assert record["parents"] == [str(run)] and record["checkpoint"] == w2s_jax.load(run).results["steps"]
    assert record["identity"] == {"stage": "export", "run": workload.fingerprint_run(run), "merge": True} and results["seconds"] > 0
    before = (tmp_path / "export/model/model.safetensors").stat().st_mtime_ns
    assert main.main([*argv, "--rerun"]) == 0
    after = (tmp_path / "export/model/model.safetensors").stat().st_mtime_ns
    assert after > before
    monkeypatch.setattr(workload, "restore", None)  # nothing is loaded for what is done
    capsys.readouterr()
    assert main.main(argv) == 0
    assert "done already (GPT2ForSequenceClassification, 2 classes" in capsys.readouterr().err
    assert (tmp_path / "export/model/model.safetensors").stat().st_mtime_ns == after
    assert sorted(p.name for p in (tmp_path / "export").iterdir() if not p.name.startswith(".")) == ["config.json", "model", "results.json"]


def test_an_object_store_gets_the_files(run, tmp_path, monkeypatch):
    """Nothing is renamed there; files of an earlier model go."""
    monkeypatch.setattr(writing, "is_object_store", lambda path: str(path).endswith("export/model"))
    export(run, tmp_path / "export")
    (tmp_path / "export/model/model-00001-of-00002.safetensors").write_bytes(b"old")
    stages.run(tiny.set_keys(shipped("export"), run=str(run)), str(tmp_path / "export"), rerun=True)
    assert sorted(p.name for p in (tmp_path / "export/model").iterdir()) == ["README.md", "config.json", "model.safetensors"]


def no_checkpoint(run, workdir):
    shutil.rmtree(run / "checkpoints")


def no_results(run, workdir):
    (run / "results.json").unlink()


def another_stage(run, workdir):
    record = json.loads((run / "config.json").read_text())
    record["config"]["stage"] = "label"
    files.write_json(run / "config.json", record)


def someones_model(run, workdir):
    (workdir / "model").mkdir(parents=True)


def another_run(run, workdir):
    shutil.copytree(run, workdir)


@pytest.mark.parametrize("change, message", [
    (no_checkpoint, "run=.* has no checkpoint"),
    (no_results, "run=.* has no results.json yet, expected a finished run"),
    (another_stage, "run=.* is a run of stage 'label', expected finetune"),
    (someones_model, "--workdir=.*: holds model/ but no config.json"),
    (another_run, 'holds another run, which differs in stage: "finetune" -> "export"'),
])
def test_what_cannot_be_exported_says_why_and_leaves_nothing(run, tmp_path, change, message, capfd):
    shutil.copytree(run, tmp_path / "run")
    change(tmp_path / "run", tmp_path / "export")
    before = sorted(tmp_path.rglob("*"))
    assert main.main(["--config=export", f"--config.run={tmp_path / 'run'}", f"--workdir={tmp_path / 'export'}"]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and re.search(message, error)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_hub_model_is_restored_at_its_commit(run, tmp_path, monkeypatch):
    """`main` may have moved since the run read it."""
    asked = []
    resolve = hub.resolve
    record = json.loads((run / "config.json").read_text())
    shutil.copytree(run, tmp_path / "run")
    files.write_json(tmp_path / "run/config.json", record | {"revision": "abc"})
    monkeypatch.setattr(hub, "resolve", lambda model, revision="main": asked.append(revision) or resolve(model, revision))
    export(tmp_path / "run", tmp_path / "export")
    assert set(asked) == {"abc"}
