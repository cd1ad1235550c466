"""The command line and the configs: what is refused and how, help, overrides, identity, packaging."""

import json
import shlex
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from pathlib import Path

import pytest
import tiny

from w2s_jax import checks, stages
from w2s_jax import config as configs
from w2s_jax import main as entry
from w2s_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def model_folder(tmp_path):
    """A folder that looks like a model in Hugging Face's format from outside."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return folder


@pytest.fixture
def calls(monkeypatch):
    """Stands in for the stages: records what main() asks them to do."""
    made = []
    monkeypatch.setattr(stages, "run", lambda config, workdir, **options: made.append((config, workdir, options)) or {})
    monkeypatch.setattr(stages, "prepare", lambda config: {})
    monkeypatch.setattr(entry, "setup_devices", lambda: None)
    return made


# What is typed (F = --config=finetune, W = --workdir=<a folder that does not exist>) and a part of the answer.
BAD = {
    "no config": ("", '--config: is missing'),
    "config without a name": ("--config=", '--config=: is empty'),
    "config without a value": ("--config", '--config: has no value'),
    "two configs": ("F --config=report", 'given 2 times'),
    "missing config": ("--config=finetun W", "did you mean 'finetune'"),
    "missing config file": ("--config=/nowhere/x.py W", '/nowhere/x.py: no such file'),
    "argument of a config": ("--config=finetune:runlocl W", "':runlocl'"),
    "no workdir": ("F", '--workdir: is missing'),
    "positional": ("F W extra", "'extra': positional"),
    "unknown flag": ("F --wrkdir=W", "--wrkdir: is not a flag; did you mean 'workdir'"),
    "unknown key": ("F W --config.batchsize=3", "config.batchsize: is not a key of this config; did you mean 'batch_size'"),
    "unknown nested key": ("F W --config.loss_args.alfa=3", "did you mean 'loss_args.alpha'"),
    "index into a number": ("F W --config.batch_size[0]=3", 'batch_size[0]'),
    "text for an integer": ("F W --config.batch_size=many", '--config.batch_size=many: expected an integer'),
    "fraction for an integer": ("F W --config.batch_size=3.5", '=3.5: expected an integer'),
    "text for a number": ("F W --config.learning_rate=fast", '=fast: expected a number'),
    "text for a placeholder": ("F W --config.loss_args.alpha=z", '=z: expected a number'),
    "text for a switch": ("F W --config.balance=maybe", '=maybe: expected true or false'),
    "number for a group of keys": ("F W --config.mesh=3", 'config.mesh=3'),
    "axis twice": ("F W --config.mesh=data=2,data=4", 'config.mesh=data=2,data=4: expected auto, the sizes of data, fsdp, model'),
    "folder that cannot be": ("--config=sweep:runlocal --workdir=/proc/nope", '--workdir=/proc/nope: cannot be made'),
    "flag without a value": ("F W --config.seed", 'config.seed'),
    "switch": ("F W --rerun=perhaps", '--rerun=perhaps: expected true or false'),
    "unknown loss": ("F W --config.loss=xnt", "config.loss: 'xnt', expected one of xent"),
    "argument of another loss": ("F W --config.loss_args.alpha=1", 'config.loss_args.alpha: 1.0 is set'),
    "argument of another optimizer": ("F W --config.optimizer_args.momentum=.9", 'optimizer_args.momentum'),
    "radius": ("F W --config.loss=window --config.loss_args.radius=\"'wide'\"", "loss_args.radius: 'wide'"),
    "warm-up fraction": ("F W --config.loss=logconf --config.loss_args.warmup=100", 'a fraction of training'),
    "unknown task": ("F W --config.task=scq", "config.task: 'scq'"),
    "missing task folder": ("F W --config.task=/nowhere/data", "config.task: '/nowhere/data'"),
    "missing task_dir": ("F W --config.task_dir=/nowhere", "config.task_dir: '/nowhere', no such folder"),
    "missing model folder": ("F W --config.model=/nowhere", "config.model: '/nowhere', no such folder"),
    "model path with two slashes": ("F W --config.model=runs/gpt2/model", "'runs/gpt2/model', no such folder"),
    "impossible hub id": ("F W '--config.model=my model'", "'my model', expected a hub id"),
    "missing labels": ("F W --config.labels=/nowhere/l.parquet", "config.labels: '/nowhere/l.parquet'"),
    "negative": ("F W --config.n_val=-1", 'config.n_val: -1, expected a number at least 0'),
    "zero": ("F W --config.learning_rate=0", 'config.learning_rate: 0.0, expected a number above 0'),
    "not a number": ("F W --config.dropout=nan", 'config.dropout: nan'),
    "infinite": ("F W --config.learning_rate=inf", 'config.learning_rate: inf'),
    "share of one": ("F W --config.test_fraction=1", 'config.test_fraction: 1.0, expected a number at least 0 and below 1'),
    "mesh with two rests": ("F W --config.mesh.data=-1 --config.mesh.fsdp=-1", '-1 for at most one axis'),
    "mesh of nothing": ("F W --config.mesh.fsdp=-2", 'config.mesh.fsdp: -2'),
    "heads": ("--config=pretrain W --config.arch.heads=5", 'config.arch.heads: 5, expected a divisor'),
    "context": ("--config=pretrain W --config.max_length=64", 'config.max_length: 64, expected at most config.arch.context'),
    "part to label": ("--config=label W --config.split=c", "config.split: 'c', expected one of b, a, train, val, test"),
    "run that is none": ("--config=label W --config.run=/", "config.run: '/' is not a run directory"),
    "missing file to label": ("--config=label W --config.run=/ --config.file=/nowhere.csv", "config.file: '/nowhere.csv', no such file"),
    "range of a key left open": ("--config=label W --config.n_train=0", "config.n_train: 0, expected a number at least 1"),
    "unknown loss of a sweep": ("--config=sweep W --config.losses=xent,logcnf", "config.losses: 'logcnf', expected one of xent"),
    "unknown task of a sweep": ("--config=sweep W --config.tasks=sciq,scq", "config.tasks: 'scq' is neither"),
    "missing model of a sweep": ("--config=sweep W --config.models=gpt2,/nowhere", "config.models: '/nowhere', no such folder"),
    "unknown rung of a sweep": ("--config=sweep W --config.rungs=small,huge", "config.rungs: 'huge', expected one of small, medium, large"),
    "seed of a sweep": ("--config=sweep W --config.seeds=0,-1", "config.seeds: -1, expected an integer at least 0"),
    "seed that is a fraction": ("--config=sweep W --config.seeds=0.5", "config.seeds"),
    "rate of a sweep": ("--config=sweep W --config.learning_rates=1e-3,0.", "config.learning_rates: 0.0, expected a number above 0"),
    "nested value": ("--config=sweep W --config.base.epochs=0", "config.base.epochs: 0, expected a number at least 1"),
    "nested choice": ("--config=sweep W --config.pretrain.shuffle=twice", "config.pretrain.shuffle: 'twice', expected one of"),
    "argument of no loss": ("--config=sweep W --config.base.loss_args.radius=.1", "radius: 0.1 is set, but loss 'xent', 'logconf'"),
    "missing corpus": ("--config=pretrain W --config.corpus=/nowhere", "config.corpus: '/nowhere', no such file or folder"),
    "missing tokenizer": ("--config=pretrain W --config.tokenizer=./nowhere", "config.tokenizer: './nowhere', no such folder"),
    "rung": ("--config=pretrain:huge W", "':huge'"),
    "ensemble of one run": ("--config=ensemble W --config.runs=/", "config.runs: ('/',), expected two or more different label run"),
    "ensemble of no runs": ("--config=ensemble W --config.runs=/,/nowhere", "config.runs: '/' is not a run directory"),
    "unknown way to combine": ("--config=ensemble W --config.how=means", "config.how: 'means', expected one of mean, vote, disagreement"),
    "part of an ensemble": ("--config=ensemble W --config.split=test", "config.split: 'test', expected one of b, a, train, val"),
    "template without an answer": ("--config=prompt W --config.template={text}?", "config.template: '{text}?', expected {text} once and"),
    "one answer": ("--config=prompt W --config.answers=Yes,", "config.answers: ('Yes',), expected two different texts"),
    "answers of a head that has none": ("F W --config.answers=No,Yes", "is set, but config.head_init='zeros' has no use for answers"),
    "readout of an unembedding": ("F W --config.head_init=unembedding --config.readout=mean", "config.readout: 'mean', expected auto"),
    "status of nothing": ("status", 'status: expected one directory'),
    "status of a missing root": ("status /nowhere", '/nowhere: no such directory'),
    "missing flagfile": ("--flagfile=/nowhere", '/nowhere'),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_command_lines_get_one_line_and_exit_code_2(case, tmp_path, capfd, monkeypatch):
    arguments, expected = BAD[case]
    monkeypatch.chdir(tmp_path)
    words = {"F": "--config=finetune", "W": f"--workdir={tmp_path}/w"}
    assert entry.main([words.get(a, a) for a in shlex.split(arguments)]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
    assert expected in err
    assert list(tmp_path.iterdir()) == [], "a wrong command line makes no folder"


PRESET = """
from ml_collections import ConfigDict
from w2s_jax.config import shipped
def get_config(arg=''):
    c = {}
    {}
    return c
"""
SHIPPED = "shipped('finetune')"
UNTYPED = "ConfigDict(shipped('finetune').to_dict(), type_safe=False)"
BAD_FILES = {
    "syntax": ("def get_config(:\n", "line 1 fails: SyntaxError"),
    "failing": ("def get_config(arg=''):\n    return 1 / 0\n", "line 2 fails: ZeroDivisionError"),
    "missing import": ("import nowhere_to_be_found\n", "line 1 fails: ModuleNotFoundError"),
    "no get_config": ("x = 1\n", "defines no get_config()"),
    "no config": (PRESET.format("{}", ""), "returned dict"),
    "no stage": (PRESET.format("ConfigDict()", ""), "config.stage: None"),
    "unknown stage": (PRESET.format("ConfigDict({'stage': 'finetun'})", ""), "did you mean 'finetune'"),
    "unknown key": (PRESET.format(SHIPPED, "c.batchsize = 3"), "config.batchsize: is not a key of the stage finetune; did you mean"),
    "key left out": (PRESET.format(SHIPPED, "del c.overlong"), "config.overlong: is missing"),
    "type set": (PRESET.format(SHIPPED, "c.epochs = 'two'"), "line 6 fails: TypeError"),
    "another type": (PRESET.format(UNTYPED, "c.epochs = 'two'"), "config.epochs: 'two', expected an integer"),
    "a switch for a number": (PRESET.format(UNTYPED, "c.epochs = True"), "config.epochs: True, expected an integer"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_config_files_are_named(case, tmp_path, capfd):
    text, expected = BAD_FILES[case]
    file = tmp_path / "mine.py"
    file.write_text(text)
    assert entry.main([f"--config={file}", f"--workdir={tmp_path}/w"]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and expected in err
    assert not (tmp_path / "w").exists()


HEAVY = ("jax", "flax", "transformers", "datasets", "torch", "pandas", "matplotlib", "pyarrow", "scipy")


@pytest.mark.parametrize("typed", ["--config=finetune --config.task=scq --workdir=w", "--config=finetune --help", "--help"])
def test_flags_and_checks_import_nothing_heavy(typed, tmp_path):
    code = f"""
        import sys
        from w2s_jax.main import main
        main({typed.split()!r})
        print("loaded:", *[m for m in {HEAVY!r} if m in sys.modules])
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert done.stdout.strip().endswith("loaded:"), done.stdout[-200:] + done.stderr


def test_overrides_reach_the_stage(calls, model_folder, tmp_path):
    code = entry.main([
        "--config=configs/finetune.py", f"--config.model={model_folder}", "--config.seed", "7", "--config.balance", "--noconfig.balance",
        "--config.loss=window", "--config.loss_args.radius=midweak", "--config.mesh.fsdp=2", "--config.learning_rate=1", "--rerun",
        f"--workdir={tmp_path}/w",
    ])  # fmt: skip
    assert code == 0
    (config, workdir, options), = calls
    assert (config.seed, config.balance, config.loss_args.radius, config.mesh.fsdp, config.learning_rate) == (7, False, "midweak", 2, 1.0)
    assert workdir == f"{tmp_path}/w" and options == {"rerun": True}


def test_a_dry_run_checks_and_stops(calls, model_folder, tmp_path):
    flags = ["--config=finetune", f"--config.model={model_folder}", "--dry_run", f"--workdir={tmp_path}/w"]
    assert entry.main(flags) == 0 and entry.main([*flags, "--config.batch_size=0"]) == 2
    assert not calls and not (tmp_path / "w").exists()


def test_flagfile_and_calls_in_one_process_do_not_mix(calls, model_folder, tmp_path):
    flagfile = tmp_path / "flags"
    flagfile.write_text(f"--config=finetune\n--config.model={model_folder}\n--config.epochs=5\n")
    assert entry.main([f"--flagfile={flagfile}", f"--workdir={tmp_path}/a"]) == 0
    assert entry.main(["--config=finetune", f"--config.model={model_folder}", f"--workdir={tmp_path}/b"]) == 0
    assert [config.epochs for config, _, _ in calls] == [5, configs.shipped("finetune").epochs]


@pytest.mark.parametrize("text, default, value", [
    ("a,b", ("x",), "('a','b',)"), ("a", (), "('a',)"), ("0,1", (5,), "(0,1,)"), ("('a', 'b')", ("x",), "('a', 'b')"),
    ("1e-3,-2.5", (), "(1e-3,-2.5,)"), ("1,b", (), "('1','b',)"), ("0", ("x",), "('0',)"), ("", ("x",), "()"),
])  # fmt: skip
def test_commas_make_a_tuple(text, default, value):
    assert entry._tuple_text(text, default) == value


def test_the_file_here_wins_over_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configs.find("configs/finetune.py") == configs.find("finetune") == configs.find("finetune.py")
    (tmp_path / "configs").mkdir()
    mine = tmp_path / "configs" / "finetune.py"
    mine.write_text(PRESET.format(SHIPPED, "c.epochs = 9"))
    assert configs.load("configs/finetune.py").epochs == 9
    assert configs.load("finetune").epochs != 9


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("name", configs.names())
def test_help_shows_every_key_with_its_comment(name, capfd):
    assert entry.main([f"--config={name}", "--help"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    for key in configs.flatten(configs.load(name)):
        line = next((i for i, text in enumerate(out.splitlines()) if text.strip().startswith(f"--config.{key}=")), None)
        network, _, inner = key.partition(".")
        if network in configs.NETWORKS and inner.split(".")[0] in ("stage", *configs.GIVEN, *configs.SET[network]):
            assert line is None, f"{key} is set by the experiment"
            continue
        assert line is not None, f"{key} is not in the help of {name}"
        shown = " ".join(out.splitlines()[line:line + 2]).split("=", 1)[1]
        assert len(shown.split()) >= 2, f"configs/{name}.py: {key} has no comment"


def test_help_without_a_config_lists_the_configs(capfd):
    assert entry.main(["--help"]) == 0
    out = capfd.readouterr().out
    assert all(f"  {name} " in out for name in configs.names()) and "w2s status ROOT" in out


@pytest.mark.parametrize("name", configs.names())
def test_every_shipped_config_takes_runlocal_and_passes_its_checks(name, tmp_path, monkeypatch, model_folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "runlocal").mkdir(parents=True)
    model_folder.rename(tmp_path / "runs" / "runlocal" / "model")
    for arg in (None, "runlocal"):
        config = configs.load(name, arg)
        with config.unlocked():
            for key in ("run", "root"):
                if key in config:
                    config[key] = str(tmp_path / "runs" / "runlocal" / "model")  # it has a config.json
            if "runs" in config:
                (tmp_path / "other").mkdir(exist_ok=True)
                (tmp_path / "other" / "config.json").write_text("{}")
                config.runs = (str(tmp_path / "runs" / "runlocal" / "model"), str(tmp_path / "other"))
        checks.check(config)
    with pytest.raises(UserError, match=":no-such-argument"):
        configs.load(name, "no-such-argument")


# ---------------------------------------------------------------- identity

FINGERPRINTS = {"model": "m", "task": "t", "labels": None}


def changed(**keys):
    return tiny.set_keys(configs.shipped("finetune"), **keys)


def hash_of(c, **fingerprints):
    return configs.identity_hash(configs.identity(c, {**FINGERPRINTS, **fingerprints}))


BASE = hash_of(changed())


@pytest.mark.parametrize("keys", [
    {"mesh__fsdp": 2}, {"microbatch_size": 4}, {"remat": "full"}, {"attention": "xla"}, {"steps_per_dispatch": 8}, {"logger": "wandb"},
    {"log_every": 10}, {"eval_every": 10}, {"checkpoint_every": 1}, {"keep": "all"}, {"eval_batch_size": 3}, {"model": "elsewhere/gpt2"},
    {"task": "copy"}, {"task_dir": "d"}, {"revision": "abc"}, {"optimizer_args__b1": 0.9}, {"epochs": 2},
], ids=str)  # fmt: skip
def test_execution_and_names_are_outside_the_identity(keys):
    assert hash_of(changed(**keys)) == BASE


@pytest.mark.parametrize("keys", [
    {"seed": 1}, {"data_seed": 1}, {"loss": "product"}, {"learning_rate": 6e-5}, {"optimizer_args__b1": 0.8}, {"dtype": "bfloat16"},
    {"n_train": 10}, {"matmul_precision": "highest"}, {"split": "b"}, {"dropout": 0.1}, {"max_length": 10},
], ids=str)  # fmt: skip
def test_what_changes_the_result_is_in_the_identity(keys):
    assert hash_of(changed(**keys)) != BASE


@pytest.mark.parametrize("fingerprint", ["model", "task", "labels"])
def test_content_is_in_the_identity(fingerprint):
    assert hash_of(changed(), **{fingerprint: "other"}) != BASE


def test_defaults_of_the_loss_are_resolved_and_other_arguments_left_out():
    plain, spelt = changed(loss="logconf_eleuther"), changed(loss="logconf_eleuther", loss_args__warmup=100.0, loss_args__buffer=32)
    assert hash_of(plain) == hash_of(spelt)
    resolved = configs.identity(plain, FINGERPRINTS)["loss_args"]
    assert resolved == {"aux_coef": 0.5, "warmup": 100.0, "buffer": 32, "chunk": 0, "balance_batch": False}
    assert hash_of(changed(loss_args__alpha=2.0)) == BASE, "xent has no alpha"
    d = configs.identity(plain, FINGERPRINTS)
    assert json.loads(json.dumps(d)) == d


def test_a_sweep_gives_its_base_to_losses_with_other_arguments():
    c = configs.choose_loss(changed(loss_args__aux_coef=0.75, loss_args__alpha=2.0), "logconf")
    assert configs.loss_args(c) == {"aux_coef": 0.75, "warmup": 0.2} and c.loss_args.alpha is None


def test_an_identity_needs_the_fingerprints_of_what_is_named():
    with pytest.raises(AssertionError, match="model"):
        configs.identity(changed(), {"task": "t"})


# ---------------------------------------------------------------- stages and packaging


def test_stages_run_checks_first(tmp_path):
    with pytest.raises(UserError, match="config.epochs: 0"):
        stages.run(changed(epochs=0), tmp_path / "w")
    assert not (tmp_path / "w").exists()
    assert set(stages.STAGES) == set(configs.CHOICES["stage"])


def test_cache_folder_follows_the_cpu_and_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = entry.cache_folder()
    assert here.parent == tmp_path / "w2s_jax"
    monkeypatch.setattr(Path, "read_text", lambda *a, **k: "model name: another\n")
    assert entry.cache_folder() != here


def test_pyproject_and_requirements_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "w2s_jax").rglob("__init__.py")} | {"w2s_jax.configs"}
    assert listed == found
    jax = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("jax>"))
    for extra in ("cuda12", "cuda13", "tpu"):
        assert project["project"]["optional-dependencies"][extra] == [jax.replace("jax", f"jax[{extra}]", 1)]


def test_the_wheel_carries_the_configs_and_the_command(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", tmp_path / "out", "."]
    source = tmp_path / "source"  # a build writes into its source tree
    source.mkdir()
    for name in ("pyproject.toml", "requirements.txt", "LICENSE", "w2s_jax", "configs", "README.md"):
        if (ROOT / name).exists():
            subprocess.run(["cp", "-r", ROOT / name, source], check=True)
    (source / "README.md").touch()
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        points = next(n for n in archive.namelist() if n.endswith("entry_points.txt"))
        assert "w2s = w2s_jax.main:cli" in archive.read(points).decode() and "w2s_jax/job.sh" in archive.namelist()
    code = "from w2s_jax import config, runlog; print(config.folder()); print(*config.names()); print(runlog.commit())"
    command, env = [sys.executable, "-c", code], {"PYTHONPATH": str(tmp_path / "site")}
    ran = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    folder, names, commit = ran.stdout.splitlines()
    assert Path(folder) == tmp_path / "site" / "w2s_jax" / "configs" and names.split() == configs.names() and commit == "None"
