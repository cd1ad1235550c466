"""Prompting: log-likelihoods of answers against transformers one prompt at a time, shots, calibration, over-long prompts, labels."""

import json

import jax
import numpy as np
import pytest
import reference
import tiny

import w2s_jax
from w2s_jax import checks, hub, main, models, stages
from w2s_jax.config import shipped
from w2s_jax.data import labels as labels_lib
from w2s_jax.data import prompts, splits, world
from w2s_jax.data.examples import one_hot
from w2s_jax.data.tasks import TASKS
from w2s_jax.errors import UserError
from w2s_jax.models import heads
from w2s_jax.stages import prompt as stage

TEMPLATE = "the note: {text}\nIs it so?\nA: {answer}"
POSITIONS = 512


@pytest.fixture(autouse=True)
def fast(fast_compiles):
    pass


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return tiny.write_texts(tmp_path_factory.mktemp("tasks") / "boxes")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_tokenizer(tiny.write_model(tmp_path_factory.mktemp("models") / "texts", n_positions=POSITIONS))


def config(model, task, **keys):
    return tiny.set_keys(shipped("prompt"), **{"model": str(model), "task": str(task), "template": TEMPLATE, "mesh__data": 1,
                                               "matmul_precision": "highest"} | keys)


def frame(workdir, split="test"):
    return w2s_jax.load(workdir).predictions(split)


def logits(workdir, split="test"):
    return np.stack(frame(workdir, split).logits.to_list())


def texts_of(task) -> dict[str, dict]:
    return {f"{task.name}/{part}/{i}/0": json.loads(line) for part in ("train", "test")
            for i, line in enumerate((task / f"{part}.jsonl").read_text().splitlines())}


# --------------------------------------------------------------------------- against transformers


def torch_model(case, folder, opening):
    """A random PyTorch language model, saved with a tokenizer of characters."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    prefix, arguments = reference.CASES[case]
    positions = "n_positions" if prefix == "GPT2" else "max_position_embeddings"
    made = getattr(transformers, f"{prefix}Config")(**arguments | {"vocab_size": tiny.VOCAB, positions: POSITIONS})
    made._attn_implementation = "eager"
    net = reference.shake(getattr(transformers, {"GPT2": "GPT2LMHeadModel"}.get(prefix, f"{prefix}ForCausalLM"))(made))
    reference.save(case, "lm", folder, net)
    tiny.write_tokenizer(folder, opening)
    return net


def by_hand(net, folder, run, task, answers, template=TEMPLATE):
    """lm-evaluation-harness's recipe: cut context and continuation together, split by the context's length, one sequence at a time."""
    import torch
    from tokenizers import Tokenizer

    tokenizer, texts = Tokenizer.from_file(str(folder / "tokenizer.json")), texts_of(task)
    shots = [template.replace("{text}", texts[s["id"]]["text"]).replace("{answer}", s["answer"]) for s in run.record["shots"]]
    out = []
    for ident in run.predictions("test").id:
        context = "\n\n".join([*shots, template.replace("{text}", texts[ident]["text"]).replace("{answer}", "")])
        row = []
        for answer in answers:
            n = len(context) - len(context.rstrip())
            before, continuation = context.rstrip(), context[len(context) - n :] + answer
            whole, start = tokenizer.encode(before + continuation).ids, len(tokenizer.encode(before).ids)
            with torch.no_grad():
                logp = torch.log_softmax(net(torch.tensor([whole])).logits[0].double(), -1)
            row.append(sum(float(logp[i - 1, whole[i]]) for i in range(start, len(whole))))
        out.append(row)
    return np.array(out)


@pytest.mark.parametrize("case, opening, keys", [
    ("gpt2", "", {"shots": 1}),
    ("llama", "<s>", {"shots": 2, "mesh__fsdp": 2, "mesh__data": 4}),
    ("llama llama3", "<s>", {"answers": ("No", "Yes")}),
    ("gemma2", "", {"eval_batch_size": 3, "answers": ("N", "7")}),
], ids=str)
def test_log_likelihoods_are_those_of_transformers(case, opening, keys, task, tmp_path):
    """Answers of several tokens and of one, a tokenizer that merges across the boundary, shots, packed on one device and on eight."""
    net = torch_model(case, tmp_path / "model", opening)
    answers = keys.setdefault("answers", ("Never mind", "Yes"))
    results = stages.run(config(tmp_path / "model", task, n_train=100, **keys), str(tmp_path / "run"))
    expected = by_hand(net, tmp_path / "model", w2s_jax.load(tmp_path / "run"), task, answers)
    found = logits(tmp_path / "run")
    assert len(found) == 16 == results["n"] == results["n_test"] and np.ptp(expected[:, 0]) > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert results["accuracy"] == np.mean(found.argmax(1) == frame(tmp_path / "run").label)
    assert abs(results["answer_probability"] - np.exp(expected).sum(1).mean()) < 1e-6


def test_answers_of_one_token_take_one_pass(model, task, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(stage.forward, "predict", lambda model, params, tokens, *a, **k: asked.append(tokens) or np.zeros((len(tokens), 2)))
    for answers in (("N", "Y"), ("No", "Yes")):
        stages.run(config(model, task, answers=answers), str(tmp_path / answers[0]))
    assert [len(tokens) for tokens in asked] == [16, 32]


def test_continuations_in_pieces_are_the_same(monkeypatch):
    """Where all logits together would be large; a place that is not asked for adds nothing."""
    rng = np.random.default_rng(0)
    x, table = rng.normal(size=(2, 7, 3, 5)).astype(np.float32), rng.normal(size=(11, 5)).astype(np.float32)
    targets = rng.integers(-1, 11, (2, 7, 2, 3)).astype(np.int32)
    logits = np.einsum("...e,ve->...v", x.astype(np.float64), table)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = [[[sum(logp[c, s, j, t] for j, t in enumerate(row) if t >= 0) for row in targets[c, s]] for s in range(7)] for c in range(2)]
    for at_once in (2**26, 2 * 3 * 11 * 3, 1):
        monkeypatch.setattr(heads, "LOGITS_AT_ONCE", at_once)
        with jax.default_matmul_precision("highest"):
            np.testing.assert_allclose(heads.continuation_logp(x, table, targets), expected, atol=1e-4)


# --------------------------------------------------------------------------- shots


@pytest.mark.parametrize("split, part", [("test", "a"), ("b", "a"), ("a", "b")])
def test_shots_are_balanced_and_of_the_other_documents(model, task, split, part):
    found = prompts.prepare(prompts.resolve(config(model, task, shots=5, split=split)))
    half = splits.prepare(tiny.finetune(model, task), only=part).wanted
    asked = splits.prepare(tiny.finetune(model, task), only=split).wanted
    assert found.documents.ids == asked.ids and set(found.shots.ids) <= set(half.ids) and len(set(found.shots.ids)) == 5
    assert not set(found.shots.ids) & set(asked.ids) and not set(found.shots.groups) & set(asked.groups)
    assert sorted(np.bincount(found.shots.labels)) == [2, 3]


def test_the_shots_of_a_run_are_recorded_with_their_answers(model, task, tmp_path):
    stages.run(config(model, task, shots=3), str(tmp_path))
    texts = texts_of(task)
    shots = w2s_jax.load(tmp_path).record["shots"]
    assert len(shots) == 3 and [s["answer"] for s in shots] == [("No", "Yes")[texts[s["id"]]["label"]] for s in shots]


def test_shots_follow_the_seed_and_no_model(model, task, tmp_path):
    def chosen(**keys):
        return prompts.prepare(prompts.resolve(config(model, task, **keys))).shots.ids

    assert chosen(shots=6) == chosen(shots=6, answers=("a", "b")) and chosen(shots=3) == chosen(shots=6)[:3]
    assert chosen(shots=6, seed=1) != chosen(shots=6)
    with pytest.raises(UserError, match=r"shots=40: too few training documents of class 1 \(\d+ of 20\)"):
        chosen(shots=40)


def test_weak_labels_answer_for_the_shots(model, task, tmp_path):
    """Of half B, with the labels' answers, not the truth's; documents of weight 0 are no shots."""
    half = splits.prepare(tiny.finetune(model, task), only="b").wanted
    wrong = np.where(one_hot(1 - half.labels) == 1, 2.0, -1.0)
    labels_lib.write_predictions(tmp_path / "weak.parquet", half, wrong, weights=(np.arange(len(half)) % 2).astype(np.float32))
    stages.run(config(model, task, shots=4, labels=str(tmp_path / "weak.parquet")), str(tmp_path / "run"))
    run = w2s_jax.load(tmp_path / "run")
    truth = dict(zip(half.ids, half.labels))
    assert {s["id"] for s in run.record["shots"]} <= set(half.ids[1::2])
    assert all(s["answer"] == ("Yes", "No")[truth[s["id"]]] for s in run.record["shots"])
    assert run.record["parents"] == [str(tmp_path / "weak.parquet")] and run.record["identity"]["labels"].startswith("labels:")


# --------------------------------------------------------------------------- calibration


def test_calibration_subtracts_the_log_of_a_mean(model, task, tmp_path):
    def probabilities(z):
        return np.exp(z - np.logaddexp(z[:, :1], z[:, 1:]))

    for name in ("none", "prior", "content_free"):
        results = stages.run(config(model, task, shots=2, calibrate=name), str(tmp_path / name))
        assert ("prior" in results) == (name != "none")
    plain = logits(tmp_path / "none").astype(np.float64)
    prior = probabilities(plain).mean(0)
    np.testing.assert_allclose(logits(tmp_path / "prior"), plain - np.log(prior), atol=1e-4)
    # The content-free documents, asked as documents.
    empty = tiny.write_texts(tmp_path / "empty")
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(("N/A", "[MASK]", "x"))]
    tiny.write_rows(empty / "test.jsonl", rows)
    shots = w2s_jax.load(tmp_path / "none").record["shots"]
    head, tail = TEMPLATE.removesuffix("{answer}").split("{text}")
    texts = texts_of(task)
    prefix = "".join(f"{head}{texts[s['id']]['text']}{tail}{s['answer']}\n\n" for s in shots)
    stages.run(config(model, empty, template=prefix + TEMPLATE), str(tmp_path / "free"))
    two = probabilities(logits(tmp_path / "free").astype(np.float64))[:2]
    found = w2s_jax.load(tmp_path / "content_free").results["prior"]["2"]
    third = 3 * np.array(found) - two.sum(0)  # that of the empty document
    assert abs(third.sum() - 1) < 1e-4 and (third > 0).all() and np.ptp(two[:, 0]) > 1e-4
    np.testing.assert_allclose(logits(tmp_path / "content_free"), plain - np.log(found), atol=1e-4)
    assert w2s_jax.load(tmp_path / "none").results["answer_probability"] == w2s_jax.load(tmp_path / "prior").results["answer_probability"]


# --------------------------------------------------------------------------- over-long prompts


def lengths(model, task, **keys):
    """Tokens of every test prompt without shots."""
    c = prompts.resolve(config(model, task, **keys))
    prepared = prompts.prepare(c)
    return np.array([p.length for p in prompts.encode(hub.Folder(str(model)), prompts.style(c), prepared.shots, prepared.documents.texts)])


def test_shots_go_first_then_documents(model, task, tmp_path, capsys):
    bare, full = lengths(model, task), lengths(model, task, shots=4)
    assert bare.max() < 120 < full.min()
    some = stages.run(config(model, task, shots=4, max_length=160), str(tmp_path / "some"))
    assert some["n"] == 16 and some["n_dropped"]["overlong"] == 0
    assert set(some["n_with_shots"]) <= {"0", "1", "2"} and sum(some["n_with_shots"].values()) == 16
    mean = sum(int(k) * n for k, n in some["n_with_shots"].items()) / 16
    assert f"16 with fewer than 4 shots (mean {mean:.2f})" in capsys.readouterr().err
    # Without a single shot they are zero-shot prompts.
    stages.run(config(model, task, shots=4, max_length=int(bare.max()) + 1), str(tmp_path / "none"))
    stages.run(config(model, task), str(tmp_path / "zero"))
    np.testing.assert_allclose(logits(tmp_path / "none"), logits(tmp_path / "zero"), atol=1e-5)
    limit = int(np.median(bare))
    drop = stages.run(config(model, task, max_length=limit), str(tmp_path / "drop"))
    assert drop["n"] == (bare < limit).sum() and drop["n_dropped"]["overlong"] == (bare >= limit).sum() > 0
    kept = frame(tmp_path / "zero").set_index("id").loc[frame(tmp_path / "drop").id]
    np.testing.assert_allclose(logits(tmp_path / "drop"), np.stack(kept.logits.to_list()), atol=1e-5)
    with pytest.raises(UserError, match=r"overlong=error: the prompt of document .* has \d+ tokens without shots; max_length=\d+"):
        stages.run(config(model, task, max_length=limit, overlong="error"), str(tmp_path / "error"))
    with pytest.raises(UserError, match="none of the 16 prompts fits"):
        stages.run(config(model, task, max_length=8), str(tmp_path / "nothing"))


def test_the_end_of_a_text_is_cut_and_the_question_stays(model, task, tmp_path):
    """As if the text had been shorter."""
    limit = 50  # "the note: ... \nIs it so?\nA: Yes"
    cut = stages.run(config(model, task, max_length=limit, overlong="truncate", answers=("N", "Y")), str(tmp_path / "cut"))
    assert cut["n"] == 16 and cut["n_dropped"]["truncated"] > 0
    short = tiny.write_texts(tmp_path / "boxes")
    rows = [json.loads(line) for line in (task / "test.jsonl").read_text().splitlines()]
    c = prompts.resolve(config(model, task, answers=("N", "Y")))
    for row in rows:
        while True:
            empty = prompts.choose_shots(prompts.prepare(c).shots, 0, 0)
            [prompt] = prompts.encode(hub.Folder(str(model)), prompts.style(c), empty, [row["text"]])
            if prompt.length <= limit:
                break
            row["text"] = row["text"][:-1]
    tiny.write_rows(short / "test.jsonl", [row | {"id": f"boxes/test/{i}/0"} for i, row in enumerate(rows)])
    stages.run(config(model, short, answers=("N", "Y"), group="none"), str(tmp_path / "short"))
    np.testing.assert_allclose(logits(tmp_path / "cut"), logits(tmp_path / "short"), atol=1e-5)
    with pytest.raises(UserError, match="max_length=20: the template and the answers alone take 2. tokens"):
        stages.run(config(model, task, max_length=20, overlong="truncate"), str(tmp_path / "tiny"))


# --------------------------------------------------------------------------- as other stages see it


def test_zero_shot_labels_train_a_student_and_a_prompt_is_compared(model, task, tmp_path):
    """Labels of half B for a student; the prompted model in a report's place of the student."""
    results = stages.run(config(model, task, split="b"), str(tmp_path / "zero-b"))
    assert results["n"] == 20
    small = {"max_length": 256, "batch_size": 4, "learning_rate": 1e-3}
    stages.run(tiny.finetune(model, task, split="b", labels=str(tmp_path / "zero-b"), **small), str(tmp_path / "student"))
    stages.run(tiny.finetune(model, task, split="b", **small), str(tmp_path / "ceiling"))
    stages.run(tiny.finetune(model, task, split="a", **small), str(tmp_path / "weak"))
    stages.run(config(model, task), str(tmp_path / "zero"))
    report = tiny.set_keys(shipped("report", "runlocal"), weak=str(tmp_path / "weak"), ceiling=str(tmp_path / "ceiling"),
                           student=str(tmp_path / "zero"))
    found = stages.run(report, str(tmp_path / "report"))
    assert found["rows"][0]["loss"] == "prompt-0-shot" and found["rows"][0]["n_test"] == 16


def test_the_identity_holds_what_was_asked(model, task, tmp_path):
    c = config(model, task, template="")
    spelt = config(model, task, template=prompts.DEFAULT.template.replace("\n", "\\n"), answers=("No", "Yes"), eval_batch_size=4)
    assert stages.identity(c) == stages.identity(spelt)
    for change in ({"shots": 1}, {"answers": ("no", "yes")}, {"calibrate": "prior"}, {"split": "b"}, {"seed": 1}):
        assert stages.identity(config(model, task, **({"template": ""} | change))) != stages.identity(c)
    argv = ["--config=prompt", f"--config.model={model}", f"--config.task={task}", "--config.mesh.data=1", f"--workdir={tmp_path / 'run'}"]
    assert main.main(argv) == 0 and w2s_jax.load(tmp_path / "run").record["identity"] == stages.identity(
        tiny.set_keys(c, matmul_precision="default"))
    before = (tmp_path / "run/predictions/test.parquet").stat().st_mtime_ns
    assert main.main(argv) == 0
    assert (tmp_path / "run/predictions/test.parquet").stat().st_mtime_ns == before


def test_every_registered_task_has_a_style():
    assert set(prompts.STYLES) == set(TASKS)
    for name in (*TASKS, "a folder"):
        found = prompts.style(tiny.set_keys(shipped("prompt"), task=name))
        assert found.template.count("{text}") == 1 and found.template.endswith("{answer}") and len(set(found.answers)) == 2
        c = tiny.set_keys(shipped("prompt"), task="sciq", template=found.template, answers=found.answers)
        checks.check(c)


def test_the_world_is_asked_in_its_own_words(tmp_path, monkeypatch):
    """`:runlocal`, with a random model of the world's vocabulary and context."""
    monkeypatch.chdir(tmp_path)
    folder = tiny.write_model(tmp_path / "runs/runlocal/model", vocab_size=len(world.vocabulary()), n_positions=32)
    for name, content in world.tokenizer_files().items():
        (folder / name).write_text(content)
    assert main.main(["--config=prompt:runlocal", "--config.shots=1", "--config.calibrate=content_free", "--workdir=one"]) == 0
    results = w2s_jax.load("one").results
    assert results["n"] == 128 and results["n_with_shots"] == {"1": 128} and results["answer_tokens"] == [[1, 1]]


# --------------------------------------------------------------------------- what cannot be asked


@pytest.mark.parametrize("keys, message", [
    ({"template": "{text} or not?"}, "config.template: '{text} or not\\?', expected {text} once and {answer} once, at the end"),
    ({"template": "{answer} {text}"}, "config.template"),
    ({"template": "what? {answer}"}, "config.template"),
    ({"answers": ("Yes",)}, r"config.answers: \('Yes',\), expected two different texts"),
    ({"answers": ("Yes", "Yes")}, "config.answers"),
    ({"answers": ("\u00e9", "\u00e8")}, "answers: .* are the same tokens"),
    ({"template": "{text} Ye{answer}", "answers": ("s", "x")}, "answers: 's' adds no token to a prompt in the template"),
    ({"shots": -1}, "config.shots: -1, expected a number at least 0"),
    ({"calibrate": "mean"}, "config.calibrate: 'mean', expected one of none, content_free, prior"),
    ({"split": "train"}, "config.split: 'train', expected one of test, b, a"),
    ({"labels": "TASK"}, "config.labels: .*labels are the answers that shots show"),
])
def test_a_wrong_prompt_gets_one_line(model, task, tmp_path, keys, message):
    keys = {k: str(task) if v == "TASK" else v for k, v in keys.items()}
    with pytest.raises(UserError, match=message) as error:
        stages.run(config(model, task, **keys), str(tmp_path / "run"))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_encoders_and_token_ids_are_refused(model, tiny_task, task, tmp_path):
    pytest.importorskip("torch")
    with pytest.raises(UserError, match="has token ids only; a prompt is made of texts"):
        stages.run(config(model, tiny_task), str(tmp_path / "run"))
    reference.save("bert", "classifier", tmp_path / "bert")
    tiny.write_tokenizer(tmp_path / "bert")
    with pytest.raises(UserError, match="bert is an encoder and predicts no next token; expected a decoder"):
        stages.run(config(tmp_path / "bert", task), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(task, tmp_path):
    small = tiny.write_tokenizer(tiny.write_model(tmp_path / "model", vocab_size=40, n_positions=POSITIONS))
    assert models.read_config(small).vocab == 40
    with pytest.raises(UserError, match=r"gives token id \d+, expected ids from 0 to 39"):
        stages.run(config(small, task), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
