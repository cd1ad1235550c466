"""Keys of a run: loading configs, checking them before anything heavy starts, and a run's identity."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import traceback
from pathlib import Path

from ml_collections import ConfigDict

from w2s_jax.errors import UserError, nearest

# Arguments that each loss takes, with its defaults (losses.py says where each form was published).
LOSS_ARGS: dict[str, dict] = {
    "xent": {},
    "product": {"alpha": 1.0, "beta": 1.0},
    "logconf": {"aux_coef": 0.5, "warmup": 0.2},
    "logconf_openai": {"aux_coef": 0.5, "warmup": 0.1},
    "logconf_eleuther": {"aux_coef": 0.5, "warmup": 100, "buffer": 32, "chunk": 0, "balance_batch": False},
    "entropy": {"aux_coef": 0.5, "warmup": 100},
    "window": {"radius": 0.15},
    "adaptconf": {"temperature": 0.5},
    "kl": {},
    "reverse_xent": {},
    "reverse_kl": {},
}

# Arguments that each optimizer takes, with its defaults.
OPTIMIZER_ARGS: dict[str, dict] = {
    "adam": {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "mu_dtype": "float32"},
    "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "mu_dtype": "float32"},
    "adafactor": {},
    "sgd": {"momentum": 0.0},
    "lion": {"b1": 0.9, "b2": 0.99, "mu_dtype": "float32"},
    "adafactor_openai": {},
}

# Settings of LoRA, with their defaults: rank 8, scale 1 and every matrix of the layers, as EleutherAI/w2s has them.
LORA_ARGS: dict = {"rank": 8, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear", "rslora": False, "init": ""}

# Arguments that each probe takes, with its defaults; an l2 of None is chosen by cross-validation (the reference's code has 1e-3).
PROBE_ARGS: dict[str, dict] = {
    "knn": {"k": 50},
    "logistic": {"l2": None, "folds": 5},
    "linear": {"l2": None, "folds": 5},
    "mean_difference": {},
    "topofilter": {"k": 50},
}

# What a key may hold, wherever it stands (one stage's `shuffle` means another stage's `shuffle`).
CHOICES: dict[str, tuple[str, ...]] = {
    "stage": ("finetune", "label", "ensemble", "probe", "prompt", "export", "pretrain", "vision", "vision_train", "sweep", "report",
              "benchmark", "vision_benchmark", "plan"),
    "dtype": ("float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16", "auto"),
    "matmul_precision": ("default", "high", "highest"),
    "attention": ("auto", "xla", "cudnn", "splash", "pallas"),
    "remat": ("auto", "none", "full", "dots", "dots_no_batch", "nothing_saveable", "everything_saveable"),
    "offload": ("none", "optimizer", "params"),
    "train": ("full", "head", "lora"),
    "what": ("train", "label"),
    "head_init": ("zeros", "normal", "small", "unembedding"),
    "readout": ("auto", "last", "mean", "first"),
    "split": ("a", "b", "train"),
    "group": ("auto", "none"),
    "overlong": ("drop", "truncate", "error"),
    "shuffle": ("none", "once", "epoch"),
    "loss": tuple(LOSS_ARGS),
    "schedule": ("constant", "cosine", "linear"),
    "optimizer": tuple(OPTIMIZER_ARGS),
    "optimizer_args.mu_dtype": ("float32", "bfloat16"),
    "probe": tuple(PROBE_ARGS),
    "mode": ("predict", "filter", "relabel", "extract"),
    "pool": ("last", "mean"),
    "how": ("mean", "vote", "disagreement"),
    "calibrate": ("none", "content_free", "prior"),
    "objective": ("supervised", "contrastive"),
    "bad_images": ("error", "skip"),
    "interpolation": ("auto", "bilinear", "bicubic"),
    "keep": ("params", "all", "none"),
    "select": ("last", "val_labels", "agreement", "oracle"),
    "logger": ("none", "tensorboard", "wandb"),
    "executor": ("here", "devices", "slurm"),
}

# Keys that change how a run is executed, not what comes out: two runs that differ only in these are the same run.
EXECUTION = (
    "mesh", "microbatch_size", "remat", "offload", "attention", "steps_per_dispatch", "logger", "log_every", "eval_every",
    "checkpoint_every", "keep", "eval_batch_size", "features", "workers", "pictures", "predictions", "workdir",
    "bad_images",  # error ends a run where skip leaves something out: a run that is done has the same results with both
)  # fmt: skip
# The networks that the stage vision trains, and what it gives them: its own keys, and what it sets by itself.
NETWORKS = ("weak_train", "strong_train", "student_train")
GIVEN = (
    "data_seed", "dataset", "data_dir", "dataset_split", "classes", "bad_images", "n_weak", "n_train", "n_test", "resize", "crop",
    "interpolation", "dtype", "matmul_precision", "eval_batch_size", "workers", "mesh",
)  # fmt: skip
SET = {
    "weak_train": ("labels", "seed"), "strong_train": ("labels",),
    "student_train": ("model", "revision", "labels", "seed", "loss", "loss_args", "arch"),
}  # fmt: skip
# Keys whose content counts, not their name: an identity holds a fingerprint in their place.
CONTENT = ("model", "task", "labels", "stats_labels", "run", "corpus", "tokenizer")
NAMES_OF_CONTENT = ("revision", "task_dir", "task_revision")  # where the content was found; covered by its fingerprint
STORES = {"gs": ("gcsfs", "etils[epath-gcs]"), "s3": ("s3fs", "s3fs")}  # object stores: the module that reads one, and what to install


# ---------------------------------------------------------------- loading


def folder() -> Path:
    """The shipped configs: in an installed package its own `configs/`, in a checkout the one beside the package."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "configs"


def names() -> list[str]:
    """Names of the shipped configs."""
    return sorted(file.stem for file in folder().glob("*.py") if not file.name.startswith("_"))


def find(path_or_name: str) -> Path:
    """The config file that is meant: a file here, else the shipped one of that name (`finetune`, `finetune.py`, `configs/finetune.py`).

    Raises:
        UserError: there is no such file; the message names the nearest shipped config.
    """
    path = Path(path_or_name).expanduser()
    if path.is_file() and path.suffix in (".py", ".json"):
        return path
    inner = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
    if inner.parts and not inner.is_absolute() and ".." not in inner.parts:
        shipped_file = folder() / (inner if inner.suffix == ".py" else inner.with_name(inner.name + ".py"))
        if shipped_file.is_file():
            return shipped_file
    what = f"expected a config file (.py) or one of {', '.join(names())}{nearest(path.stem, names())}"
    raise UserError(f"--config={path_or_name}: no such file; {what}")


def load(path_or_name: str, arg: str | None = None) -> ConfigDict:
    """Runs the `get_config(arg)` of a config file and returns its config, locked.

    Args:
        path_or_name: as for `find`, or a .json file with a config under `config`, as a run records it (see `recorded`).
        arg: what stands after the colon in `--config=finetune:runlocal`; None calls `get_config()`.

    Raises:
        UserError: no such file, or the file fails; the message names the file and the line.
    """
    if path_or_name.endswith(".json"):
        return recorded(path_or_name).lock()
    file = find(path_or_name)
    try:
        # Not an import: bytecode kept beside the file could outlive a quick edit of it.
        module = {"__name__": f"w2s_config_{file.stem}", "__file__": str(file)}
        exec(compile(file.read_bytes(), str(file), "exec"), module)
        if "get_config" not in module:
            raise UserError(f"--config={path_or_name}: {file} defines no get_config()")
        config = module["get_config"]() if arg is None else module["get_config"](arg)
    except UserError:
        raise
    except ValueError as error:  # how a config refuses its argument
        raise UserError(f"--config={path_or_name}{'' if arg is None else ':' + arg}: {error}") from error
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else (lines or [None])[-1]
        where = f"{file}" + (f", line {line}" if line else "")
        raise UserError(f"--config={path_or_name}: {where} fails: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={path_or_name}: get_config() returned {type(config).__name__}, expected an ml_collections.ConfigDict")
    return config.lock()


def shipped(name: str, arg: str | None = None) -> ConfigDict:
    """The shipped config `name`, unlocked: what presets and sweeps start from.

    c = shipped("finetune")
    c.loss = "logconf_openai"
    """
    file = folder() / f"{name}.py"
    if not file.is_file():
        raise UserError(f"config {name!r}: expected one of {', '.join(names())}{nearest(name, names())}")
    return load(str(file), arg).unlock()


def recorded(path: str) -> ConfigDict:
    """The config in a JSON file (local or gs://): the value of its key `config`, put over the defaults of its stage, unlocked.

    UserError where the file cannot be read or holds no config. Keys and types are `checks.check`'s to judge.
    """
    from w2s_jax.files import read_json

    def tuples(value):
        if isinstance(value, dict):
            return {key: tuples(entry) for key, entry in value.items()}
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    values = read_json(path).get("config")
    if not isinstance(values, dict) or values.get("stage") not in CHOICES["stage"]:
        raise UserError(f"--config={path}: expected a config under the key 'config', with its stage")
    c = shipped(values["stage"])
    with c.ignore_type():
        c.update(tuples(values))
    return c


def runlocal(c: ConfigDict) -> ConfigDict:
    """Makes a config a smoke run on the embedded world: seconds on a laptop, with the model that `pretrain:runlocal` makes."""
    small = {
        "model": "runs/runlocal/model", "task": "world", "task_dir": "", "n_train": 256, "n_val": 0, "n_test": 128, "max_length": 32,
        "batch_size": 16, "epochs": 1, "learning_rate": 1e-3, "warmup_steps": 0, "checkpoint_every": 8, "eval_every": 0,
    }  # fmt: skip
    with c.ignore_type(), c.unlocked():
        c.update({key: value for key, value in small.items() if key in c})
    return c


def set_words(c: ConfigDict, text: str, name: str) -> None:
    """Sets keys of `c` from `key=value,key=value`, the argument of the config called `name`. ValueError: no such key, or no such value."""
    known = flatten(c)
    for word in text.split(","):
        key, equals, value = word.partition("=")
        if not equals or key not in known:
            raise ValueError(f"configs/{name}.py takes ':runlocal' or keys, as key=value,key=value; {word!r} is none{nearest(key, known)}")
        kind = key_type(c, key)
        if kind not in (int, float, str, bool) or (kind is bool and value not in ("true", "false")):
            raise ValueError(f"{key}={value}: expected {describe(kind)}; lists are set by --config.{key}")
        try:
            parsed = value == "true" if kind is bool else kind(value)
        except ValueError:
            raise ValueError(f"{key}={value}: expected {describe(kind)}") from None
        *parents, last = key.split(".")
        node = c
        for parent in parents:
            node = node[parent]
        node[last] = parsed


def flatten(c, prefix: str = "") -> dict[str, object]:
    """Leaves of a nested config by dotted key; placeholders that nobody filled are None."""
    flat = {}
    for key in c:
        value = c[key]
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def key_type(c: ConfigDict, key: str) -> type:
    """The type that the dotted key holds, or will hold once its placeholder is filled."""
    *parents, last = key.split(".")
    for parent in parents:
        c = c[parent]
    return c.get_type(last)


def describe(kind: type) -> str:
    """A type in words."""
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a text", tuple: "a list a,b,c"}
    return words.get(kind, f"a value of type {kind.__name__}")


def check_store(key: str, path: str) -> None:
    """UserError where `path` is on an object store that is not supported, or whose library is not installed."""
    store, found, _ = path.partition("://")
    if not found:
        return
    if store not in STORES:
        raise UserError(f"{key}: {path!r}, expected a local path, gs:// or s3://")
    module, install = STORES[store]
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{key}: {path!r} needs the package {module}: pip install '{install}'")


# ---------------------------------------------------------------- resolved arguments and identity


def _resolve(values, defaults: dict) -> dict:
    """Defaults with what is set put over them; numbers in one form each, so that 100 and 100.0 are one argument."""
    resolved = {}
    for name, default in defaults.items():
        value = (values or {}).get(name)
        value = default if value is None else value
        whole = isinstance(default, bool) or name in ("buffer", "chunk", "k", "folds")
        resolved[name] = value if whole or value is None or isinstance(value, str) else float(value)
    return resolved


def loss_args(c: ConfigDict) -> dict:
    """The chosen loss's arguments, its defaults filled in; arguments of other losses are left out."""
    return _resolve(c.get("loss_args"), LOSS_ARGS[c.loss])


def optimizer_args(c: ConfigDict) -> dict:
    """The chosen optimizer's arguments, its defaults filled in."""
    return _resolve(c.get("optimizer_args"), OPTIMIZER_ARGS[c.optimizer])


def probe_args(c: ConfigDict) -> dict:
    """The chosen probe's arguments, its defaults filled in; an l2 that nobody set stays None."""
    return _resolve(c.get("probe_args"), PROBE_ARGS[c.probe])


def identity(c: ConfigDict, fingerprints: dict[str, str]) -> dict:
    """What a run is: every key that changes its result, in one canonical form.

    Args:
        c: the resolved config.
        fingerprints: content hashes of what `model`, `task`, `labels`, `run`, `corpus`, `tokenizer` name, as far as those
            are set; other entries are taken over too.

    Returns:
        A dict that survives a JSON round trip unchanged.
    """
    result = json.loads(json.dumps(c.to_dict()))
    selects = c.get("select", "last") != "last"  # then the evaluations decide which step is kept
    for key in (*EXECUTION, *NAMES_OF_CONTENT):
        if not (selects and key == "eval_every"):
            result.pop(key, None)
    for key in CONTENT:
        if key in result:
            assert key in fingerprints or not result[key], f"identity() needs the fingerprint of {key}={result[key]!r}"
            result[key] = None
    if "loss" in c:
        result["loss_args"] = loss_args(c)
    if "optimizer" in c:
        result["optimizer_args"] = optimizer_args(c)
        if result["optimizer_args"].get("mu_dtype") == "float32":  # as it was before there was a choice
            del result["optimizer_args"]["mu_dtype"]
    if "lora" in c and c.train != "lora":
        result["lora"] = None
    if "probe" in c:
        result["probe_args"] = probe_args(c)
    if result.get("head_init", "unembedding") != "unembedding":  # another head has no use for the answers' tokens
        result.pop("answers", None)
    if c.get("model") and "arch" in result:
        result["arch"] = None  # the sizes come from the model
    return plain_identity(result | fingerprints)


def plain_identity(d: dict) -> dict:
    """`d` in canonical form: keys sorted, tuples as lists, unchanged by a JSON round trip."""
    return json.loads(json.dumps(d, sort_keys=True, allow_nan=False))


def identity_hash(d: dict) -> str:
    """sha256 (hex) of an identity's canonical JSON."""
    return hashlib.sha256(json.dumps(d, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def choose_loss(c: ConfigDict, loss: str) -> ConfigDict:
    """Sets the loss and clears the arguments that it does not take: how a sweep gives one config to several losses."""
    c.loss = loss
    for name in c.loss_args:
        if name not in LOSS_ARGS[loss]:
            c.loss_args[name] = None
    return c
