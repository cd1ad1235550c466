"""The step that is kept: chosen by the labels trained on, by agreement with them, or by the truth; resumed as if never stopped."""

import numpy as np
import pandas
import pytest
import tiny
from test_resume import Stopped, same_run, stop_after

import w2s_jax
from w2s_jax import config as config_lib
from w2s_jax import losses, main, metrics, selection, stages
from w2s_jax.config import shipped
from w2s_jax.errors import UserError

GIVEN = np.float32([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.7, 0.3]])
TRUTH = np.array([1, 1, 0, -1])
LOGITS = np.float32([[0, -1], [0, 2], [0, -2], [0, 1]])  # class 1 is likelier the larger the second


@pytest.mark.parametrize("select, given, expected", [
    ("val_labels", GIVEN, 0.5),  # hard labels 0 1 1 0 by scores -1 2 -2 1: of 4 pairs (1 over 0) 2 are right
    ("agreement", GIVEN, 0.5),  # predictions 0 1 0 1
    ("oracle", GIVEN, 1.0),  # the fourth is unknown; -1 and 2 lie above -2
    ("val_labels", np.float32([[0.9, 0.1]] * 4), 0.5),  # one class only: accuracy
    ("val_labels", np.eye(3, dtype=np.float32)[[0, 1, 0, 1]], 1.0),  # three classes: accuracy
])
def test_score(select, given, expected):
    logits = LOGITS if given.shape[1] == 2 else np.float32([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0]])
    assert selection.score(select, logits, given, TRUTH) == expected


@pytest.fixture
def config(tiny_task, tmp_path, fast_compiles):
    """A run of 7 steps on half B with 12 validation documents, scored every other step."""
    return tiny.finetune(tiny.write_model(tmp_path / "base", seed=7), tiny_task, split="b", n_train=64, n_val=12, epochs=3, batch_size=8,
                         eval_every=2, select="val_labels", learning_rate=2e-2, schedule="constant", checkpoint_every=3)


@pytest.mark.parametrize("train", ["full", "head", "lora"])
def test_the_best_step_is_kept(config, train, tmp_path):
    results = stages.run(tiny.set_keys(config, train=train), str(tmp_path / "run"))
    run = w2s_jax.load(tmp_path / "run")
    scores = {row["step"]: row["select_score"] for row in run.metrics if "select_score" in row}
    kept = results["selected"]
    assert sorted(scores) == [2, 4, 6, 8, 10][: len(scores)] and kept["steps"] == results["steps"]
    assert kept["score"] >= max(scores.values()) and (kept["step"] == results["steps"] or scores[kept["step"]] == kept["score"])
    assert min(s for s, v in [*scores.items(), (kept["step"], kept["score"])] if v == kept["score"]) == kept["step"]  # the earliest
    val = run.predictions("val")  # of the parameters that are kept
    again = metrics.auroc(metrics.scores(np.stack(val.logits)), val.label.to_numpy().astype(int))
    assert again == pytest.approx(kept["score"]) and kept["oracle"] is False
    assert not (tmp_path / "run" / "best").exists()
    stages.run(tiny.set_keys(shipped("label"), run=str(tmp_path / "run"), split="test", mesh__data=1), str(tmp_path / "labels"))
    for column in ("id", "label"):
        assert w2s_jax.load(tmp_path / "labels").predictions("test")[column].to_list() == run.predictions("test")[column].to_list()
    np.testing.assert_allclose(np.stack(w2s_jax.load(tmp_path / "labels").predictions("test").logits),
                               np.stack(run.predictions("test").logits), atol=1e-6)


def test_labels_choose_and_the_truth_is_an_oracle(config, tmp_path):
    """Labels that are the truth's opposite: what fits them best fits the truth worst."""
    stages.run(tiny.set_keys(config.copy_and_resolve_references(), select="last", eval_every=0, n_val=0), str(tmp_path / "truth"))
    stages.run(tiny.set_keys(shipped("label"), run=str(tmp_path / "truth"), split="b", mesh__data=1), str(tmp_path / "labels"))
    table = w2s_jax.load(tmp_path / "labels").predictions("b")
    pandas.DataFrame({"id": table.id, "p": 1.0 - table.label}).to_parquet(tmp_path / "opposite.parquet")
    kept = {}
    for select in ("val_labels", "agreement", "oracle"):
        chosen = tiny.set_keys(config.copy_and_resolve_references(), select=select, labels=str(tmp_path / "opposite.parquet"))
        kept[select] = stages.run(chosen, str(tmp_path / select))["selected"]
        run = w2s_jax.load(tmp_path / select)
        val = run.predictions("val")
        truth = val.label.to_numpy().astype(int)
        given = np.stack([truth, 1 - truth], axis=1).astype(np.float32)
        assert selection.score(select, np.stack(val.logits), given, truth) == pytest.approx(kept[select]["score"])
    assert [kept[s]["oracle"] for s in kept] == [False, False, True]
    assert kept["oracle"]["score"] != kept["val_labels"]["score"]


def test_patience(config, tmp_path, capfd):
    """At such a learning rate nothing gets better."""
    config = tiny.set_keys(config, patience=2, learning_rate=1e-9)
    results = stages.run(config, str(tmp_path / "run"))
    assert results["selected"] | {"score": None} == {"select": "val_labels", "oracle": False, "step": 2, "score": None, "steps": 6}
    assert "no better val_labels for 2 evaluations, stopped at step 6 of 7" in capfd.readouterr().err
    assert len(w2s_jax.load(tmp_path / "run").metrics) == 6


@pytest.mark.parametrize("keys", [{}, {"patience": 2, "learning_rate": 1e-9}], ids=str)
@pytest.mark.parametrize("dispatches", [3, 5, 8])
def test_stopped_and_started_again(config, keys, dispatches, tmp_path, monkeypatch):
    config = tiny.set_keys(config, steps_per_dispatch=1, **keys)
    stages.run(config, str(tmp_path / "undisturbed"))
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, dispatches)
        try:
            stages.run(config, str(tmp_path / "run"))
        except Stopped:
            assert not (tmp_path / "run" / "results.json").exists()
    stages.run(config, str(tmp_path / "run"))
    same_run(tmp_path / "undisturbed", tmp_path / "run")


def test_evaluations_compile_once(config, tmp_path):
    """However often: validation documents are packed once, and the test set's pass is the one that the run ends with anyway."""
    one = tiny.set_keys(config, steps_per_dispatch=1)  # groups of steps would break at the evaluations
    programs = [stages.run(tiny.set_keys(one.copy_and_resolve_references(), eval_every=every), str(tmp_path / str(every)))["programs"]
                for every in (1, 3)]
    assert programs[0] == programs[1]


def test_the_cadence_is_part_of_such_a_run(config):
    """Elsewhere it says only how often figures are printed."""
    keys = stages.identity(config).keys()
    assert "eval_every" in keys and "eval_every" not in stages.identity(tiny.set_keys(config, select="last")).keys()


@pytest.mark.parametrize("keys, message", [
    ({"eval_every": 0}, "config.eval_every: 0, expected more with select=val_labels"),
    ({"n_val": 0}, "config.n_val: 0, expected more with select=val_labels"),
    ({"select": "last", "patience": 3}, "config.patience: 3, but select=last compares no steps"),
    ({"select": "best"}, "config.select: 'best', expected one of last, val_labels, agreement, oracle"),
])
def test_keys_that_do_not_fit(config, keys, message, tmp_path, capsys):
    flags = tiny.flags(**{"model": config.model, "task": config.task, "select": "val_labels", "eval_every": 2, "n_val": 4} | keys)
    assert main.main(["--config=finetune", *flags, f"--workdir={tmp_path / 'run'}"]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_presets_say_the_reference_s_recipe():
    plain, logconf = (config_lib.load("eleuther", arg) for arg in ("", "logconf"))
    assert plain.loss == "xent" and logconf.loss == "logconf_eleuther" and logconf.loss_args.chunk == 1
    loss = losses.make(logconf.loss, dict(logconf.loss_args), ground_truth=False)
    assert (loss["aux_coef"], loss["warmup"], loss["buffer"]) == (0.5, 100, 32)
    for c in (plain, logconf):
        assert (c.train, c.select, c.eval_every, c.n_val, c.warmup_steps, c.epochs, c.weight_decay, c.grad_clip) == (
            "lora", "val_labels", 25, 1000, 40, 3, 0.1, 1.0)


def test_the_preset_runs_here(tmp_path):
    stages.run(tiny.set_keys(config_lib.load("pretrain", "runlocal"), steps=4), str(tmp_path / "base"))
    c = tiny.set_keys(config_lib.load("eleuther", "logconf,runlocal"), model=str(tmp_path / "base" / "model"))
    results = stages.run(c, str(tmp_path / "run"))
    assert results["selected"]["select"] == "val_labels" and results["n_test"] > 0


def test_an_unknown_kind_of_the_preset_is_refused():
    with pytest.raises(UserError, match="eleuther:xent: configs/eleuther.py takes"):
        config_lib.load("eleuther", "xent")
