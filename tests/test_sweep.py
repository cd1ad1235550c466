"""The sweep: which runs there are, what they share, in which order they are made, and what happens when one fails."""

import csv
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

import w2s_jax
from w2s_jax import config as config_lib
from w2s_jax import experiment, forward, main, runlog, stages, train
from w2s_jax import graph as graph_lib
from w2s_jax.config import shipped
from w2s_jax.errors import UserError

SMALL = {"base__batch_size": 8, "base__epochs": 1, "base__learning_rate": 3e-3, "base__mesh__data": 1, "base__steps_per_dispatch": 2}


@pytest.fixture(autouse=True)
def fast(fast_compiles):
    pass


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """Folders of three models, weakest first."""
    folder = tmp_path_factory.mktemp("ladder")
    sizes = {"tiny": {"n_embd": 12, "n_inner": 48}, "small": {"n_embd": 24, "n_inner": 96}, "large": {}}
    return [str(tiny.write_model(folder / name, seed=i, **size)) for i, (name, size) in enumerate(sizes.items())]


def sweep(models, tasks, **keys):
    return tiny.set_keys(shipped("sweep"), **SMALL | {"models": tuple(models), "tasks": tuple(map(str, tasks)), "losses": ("xent",)} | keys)


def build(config, root="/nowhere"):
    return experiment.build(config, root, stages.identity)


# --------------------------------------------------------------------------- the graph


@pytest.mark.parametrize("keys, counts", [
    # weak and labels: one for each model that supervises; ceilings: one for each that is supervised; students: pairs x losses
    ({}, {"weak": 2, "label": 2, "ceiling": 2, "student": 3}),
    ({"pairs": "adjacent"}, {"weak": 2, "label": 2, "ceiling": 2, "student": 2}),
    ({"losses": ("xent", "logconf", "product")}, {"weak": 2, "label": 2, "ceiling": 2, "student": 9}),
    ({"seeds": (0, 3)}, {"weak": 4, "label": 4, "ceiling": 4, "student": 6}),
    ({"losses": ("kl", "logconf"), "seeds": (0, 1), "pairs": "adjacent"}, {"weak": 4, "label": 4, "ceiling": 4, "student": 8}),
], ids=str)
def test_every_run_is_there_once_and_ground_truth_is_shared(ladder, tiny_task, keys, counts):
    config = sweep(ladder, [tiny_task], **keys)
    found = build(config)
    used = {role: {pair["runs"][role] for pair in found.pairs} for role in ("weak", "label", "ceiling", "student")}
    assert {role: len(names) for role, names in used.items()} == counts
    assert set.union(*used.values()) == set(found.nodes) and len(found.nodes) == sum(counts.values())
    for pair in found.pairs:
        runs = {role: found.nodes[name] for role, name in pair["runs"].items()}
        weak, strong = (next(m for m in ladder if m.endswith(pair[role])) for role in ("weak", "strong"))
        for role, expected in {"weak": ("a", "", "xent", weak), "ceiling": ("b", "", "xent", strong),
                               "student": ("b", "/nowhere/" + pair["runs"]["label"], pair["method"], strong)}.items():
            c = runs[role].config
            assert (c.split, c.labels, c.loss, c.model) == expected and c.seed == pair["seed"]
            assert (c.stage, c.task, c.data_seed, c.batch_size) == ("finetune", str(tiny_task), 0, 8)
        assert runs["label"].config.run == "/nowhere/" + pair["runs"]["weak"] and runs["label"].config.split == "b"
        assert runs["label"].parents == (pair["runs"]["weak"],) and runs["student"].parents == (pair["runs"]["label"],)


@pytest.mark.parametrize("root", ["/nowhere", "runs/nowhere"])
@pytest.mark.parametrize("options", [{"losses": ("xent", "logconf")}, {"rungs": ("small", "medium", "large")}], ids=str)
def test_names_say_what_a_run_is_and_parents_come_first(ladder, tiny_task, options, root):
    config = sweep(() if "rungs" in options else ladder, ["world"] if "rungs" in options else [tiny_task], seeds=(0, 1), **options)
    found, seen = build(config, root), set()
    for name, node in found.nodes.items():
        task, directory = name.split("/")
        pattern = r"(finetune-\w+-\w+|label-\w+|pretrain-\w+)-s\d-[0-9a-f]{10}"
        assert re.fullmatch(pattern, directory), directory
        assert task == ("pretrain" if node.stage == "pretrain" else config.tasks[0].split("/")[-1])
        assert set(node.parents) <= seen
        seen.add(name)
    if "rungs" in options:
        pretrained = [name for name, node in found.nodes.items() if node.stage == "pretrain"]
        assert len(pretrained) == 3  # one ladder for both seeds
        for node in found.nodes.values():
            if node.stage == "finetune":  # trained on a model that the sweep makes, so that must be there first
                assert [p for p in node.parents if f"{root}/{p}/model" == node.config.model]
    assert list(build(config, root).nodes) == list(found.nodes)


@pytest.mark.parametrize("keys, changed", [
    ({}, set()),
    ({"base__microbatch_size": 2, "base__mesh__data": 8, "base__checkpoint_every": 1}, set()),  # execution
    ({"losses": ("logconf",)}, {"student"}),
    ({"base__loss_args__aux_coef": 0.3, "losses": ("logconf",)}, {"student"}),  # xent, that of ground truth, has no such argument
    ({"base__learning_rate": 1e-3}, {"weak", "label", "ceiling", "student"}),
    ({"base__data_seed": 1}, {"weak", "label", "ceiling", "student"}),
    ({"pairs": "adjacent"}, set()),
], ids=tiny.stable)
def test_a_run_keeps_its_name_as_long_as_it_is_the_same(ladder, tiny_task, keys, changed):
    one, two = (build(sweep(ladder[:2], [tiny_task], **k)).pairs[0]["runs"] for k in ({}, keys))
    assert {role for role in one if one[role] != two[role]} == changed


def test_learning_rates_belong_to_models(ladder, tiny_task):
    found = build(sweep(ladder, [tiny_task], learning_rates=(1e-3, 2e-3, 3e-3)))
    assert {(node.config.model, node.config.learning_rate) for node in found.nodes.values() if node.stage == "finetune"} == \
        set(zip(ladder, (1e-3, 2e-3, 3e-3)))


@pytest.mark.parametrize("keys, message", [
    ({"models": ("gpt2",)}, "models: .*at least two"),
    ({"losses": ()}, "losses: is empty"),
    ({"seeds": (1, 1)}, "seeds: .*names one twice"),
    ({"models": ("a/gpt2", "b/gpt2")}, "models: .*same name"),
    ({"tasks": ("x/sciq", "y/sciq")}, "tasks: .*same name"),
    ({"learning_rates": (1e-3,)}, "learning_rates: .*one for each of 3 models"),
    ({"pairs": "some"}, "pairs: 'some', expected all or adjacent"),
    ({"base__labels": "x"}, "base.labels: 'x', expected it empty"),
], ids=str)
def test_lists_that_do_not_fit_together(ladder, tiny_task, keys, message):
    with pytest.raises(UserError, match=f"config.{message}"):
        graph_lib.check(tiny.set_keys(sweep(ladder, [tiny_task]), **keys))


@pytest.mark.parametrize("name, expected", [("gpt2", "gpt2"), ("EleutherAI/pythia-160m", "pythia_160m"), ("/x/run-1/model/", "run_1"),
                                            ("/x/my model", "my_model"), ("model", "model")])
def test_short_names(name, expected):
    assert graph_lib.short(name) == expected


def test_a_dry_run_prints_the_graph_and_writes_nothing(ladder, tiny_task, tmp_path, capsys):
    argv = ["--config=sweep", f"--config.models={','.join(ladder)}", f"--config.tasks={tiny_task}", f"--workdir={tmp_path / 'root'}",
            "--dry_run"]
    assert main.main(argv) == 0
    out, err = capsys.readouterr()
    lines = out.strip().splitlines()
    assert len(lines) == 12 and all(line.startswith("absent   tiny/") for line in lines)  # 2 weak, 2 labels, 2 ceilings, 6 students
    student = next(line for line in lines if "tiny_to_large-logconf" in line)
    assert re.search(r" <- tiny/label-tiny-s0-[0-9a-f]{10}$", student)
    assert "12 runs, 0 of them done" in err and "MB" in err
    assert not (tmp_path / "root").exists()


# --------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def finished(ladder, tiny_task, tmp_path_factory):
    """The root of a finished sweep over two models and two losses, and its results."""
    root = tmp_path_factory.mktemp("sweep") / "root"
    with pytest.MonkeyPatch.context() as monkeypatch:
        tiny.fast_compiles(monkeypatch)
        return root, stages.run(sweep(ladder[:2], [tiny_task], losses=("xent", "logconf")), str(root))


def test_every_run_is_what_its_name_says(finished):
    root, results = finished
    assert set(results["runs"].values()) == {"done"} and len(results["runs"]) == 5
    for name in results["runs"]:
        run = w2s_jax.load(root / name)
        assert config_lib.identity_hash(run.record["identity"])[:10] == name[-10:]
        assert run.results is not None
    for pair in results["pairs"]:
        runs = {role: w2s_jax.load(root / name) for role, name in pair["runs"].items()}
        assert runs["student"].record["identity"]["labels"] == "run:" + config_lib.identity_hash(runs["label"].record["identity"])
        assert runs["label"].record["identity"]["run"] == "run:" + config_lib.identity_hash(runs["weak"].record["identity"])
        tests = [run.predictions("test") for role, run in runs.items() if role != "label"]
        assert all(t.id.to_list() == tests[0].id.to_list() and t.label.to_list() == tests[0].label.to_list() for t in tests)
    record = json.loads((root / "sweep.json").read_text())
    assert record["pairs"] == results["pairs"] and record["runs"] == list(results["runs"])


def test_it_ends_in_a_report(finished):
    root, results = finished
    text = (root / "report/report.md").read_text()
    for pair in results["pairs"]:
        assert pair["method"] in text
    with open(root / "report/table.csv") as file:
        table = list(csv.DictReader(file))
    assert {(row["method"], row["metric"]) for row in table} == set(itertools.product(("xent", "logconf"), ("accuracy", "auroc")))
    ceiling = w2s_jax.load(root / results["pairs"][0]["runs"]["ceiling"]).results["accuracy"]
    assert {float(row["ceiling"]) for row in table if row["metric"] == "accuracy"} == {ceiling}


def stamps(root):
    return {str(f.relative_to(root)): f.stat().st_mtime_ns for f in root.glob("*/*/results.json")}


def test_a_finished_sweep_makes_nothing_again_and_a_larger_one_only_what_is_new(finished, ladder, tiny_task):
    root, results = finished
    before = stamps(root)
    stages.run(sweep(ladder[:2], [tiny_task], losses=("xent", "logconf")), str(root))
    assert stamps(root) == before
    more = stages.run(sweep(ladder[:2], [tiny_task], losses=("xent", "logconf", "window")), str(root))
    after = stamps(root)
    assert {k: after[k] for k in before} == before and len(after) == len(before) + 1
    assert set(more["runs"]) > set(results["runs"])


def test_a_stopped_sweep_goes_on(finished, ladder, tiny_task, tmp_path, monkeypatch):
    reference, results = finished
    root, real, left = tmp_path / "root", train.train, [2]

    class Stopped(BaseException):
        pass

    def stop(*args, **options):
        if not left[0]:
            raise Stopped
        left[0] -= 1
        return real(*args, **options)

    monkeypatch.setattr(train, "train", stop)
    config = sweep(ladder[:2], [tiny_task], losses=("xent", "logconf"))
    with pytest.raises(Stopped):
        stages.run(config, str(root))
    before = stamps(root)
    states = [runlog.state(root / name) for name in results["runs"]]
    assert states.count("done") == len(before) == 3 and "stopped" in states  # weak, labels and ceiling; the student was begun
    monkeypatch.setattr(train, "train", real)
    assert set(stages.run(config, str(root))["runs"]) == set(results["runs"])
    assert {k: v for k, v in stamps(root).items() if k in before} == before
    for name in results["runs"]:
        one, two = w2s_jax.load(reference / name), w2s_jax.load(root / name)
        split = "b" if "/label-" in name else "test"
        np.testing.assert_array_equal(np.stack(one.predictions(split).logits), np.stack(two.predictions(split).logits))


@pytest.mark.parametrize("broken, failing", [
    ("student", {"ceiling", "student"}),  # the strong model is broken: its own two kinds of runs fail, the supervisor's are made
    ("weak", {"weak", "label", "student"}),  # the supervisor is: so nothing can follow it, but the ceiling is made
])
def test_a_run_that_fails_does_not_stop_the_others(broken, failing, ladder, tiny_task, tmp_path, capsys):
    """A model with a NaN in its weights cannot be trained."""
    models = list(ladder[:2])
    which = ["weak", "student"].index(broken)
    bad = tiny.write_model(tmp_path / f"bad{which}", n_embd=12, n_inner=48)
    tensors = load_file(bad / "model.safetensors")
    tensors["transformer.ln_f.weight"] = tensors["transformer.ln_f.weight"] * np.nan
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    models[which] = str(bad)
    root = tmp_path / "root"
    argv = ["--config=sweep", f"--config.models={','.join(models)}", f"--config.tasks={tiny_task}", f"--workdir={root}",
            *tiny.flags(**SMALL, losses="xent")]
    assert main.main(argv) == 2
    err = capsys.readouterr().err
    assert re.search(rf"error: {root}: {len(failing)} of 4 runs failed, the first tiny/finetune-bad\d.*: loss: nan at step 0", err)
    runs = json.loads((root / "sweep.json").read_text())["pairs"][0]["runs"]
    states = {role: runlog.state(root / name) for role, name in runs.items()}
    assert {role for role, state in states.items() if state == "done"} == set(runs) - failing
    assert {role for role, state in states.items() if state == "absent"} == ({"label", "student"} if broken == "weak" else set())
    assert not (root / "report").exists()  # no pair is whole


def test_one_broken_task_leaves_the_others_their_report(ladder, tiny_task, tmp_path):
    rows = tiny.rows(40, seed=3)
    bad = tmp_path / "bad"
    tiny.write_rows(bad / "train.jsonl", [row | {"label": 1} for row in rows])  # one class only
    tiny.write_rows(bad / "test.jsonl", tiny.rows(10))
    root = tmp_path / "root"
    with pytest.raises(UserError, match="4 of 8 runs failed, the first bad/finetune-.* documents are of class 1"):
        stages.run(sweep(ladder[:2], [bad, tiny_task]), str(root))
    assert sum(runlog.state(f.parent) == "done" for f in root.glob("tiny/*/results.json")) == 4
    assert "tiny" in (root / "report/table.csv").read_text()


def test_a_long_sweep_makes_room_for_its_programs(ladder, tiny_task, tmp_path, monkeypatch):
    """Thousands of programs in one process would end it (vm.max_map_count); between runs they are forgotten, and made again."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("only Linux says how many memory maps there are")
    forgotten, real = [], forward.make_room

    def make_room(maps=None):
        forgotten.append((len(forward._compiled), real(0)))

    monkeypatch.setattr(forward, "make_room", make_room)
    results = stages.run(sweep(ladder[:2], [tiny_task]), str(tmp_path / "root"))
    assert len(forgotten) >= len(results["runs"]) + 1 and all(done for _, done in forgotten)
    assert max(programs for programs, _ in forgotten[2:]) > 0 and set(results["runs"].values()) == {"done"}
    assert not real(10**9)  # there is room
