"""The checks of a config that need no jax."""

from __future__ import annotations

import math
import re
from pathlib import Path

from ml_collections import ConfigDict

from w2s_jax import chips, logger
from w2s_jax import config as configs
from w2s_jax.config import CHOICES, LOSS_ARGS, OPTIMIZER_ARGS, PROBE_ARGS, check_store, describe, flatten, folder, key_type, shipped
from w2s_jax.errors import UserError, nearest

# What a key may hold in one stage, where that is not what it may hold elsewhere.
OF_STAGE = {
    ("label", "split"): ("b", "a", "train", "val", "test"), ("ensemble", "split"): ("b", "a", "train", "val"),
    ("prompt", "split"): ("test", "b", "a"), ("pretrain", "param_dtype"): ("float32", "bfloat16"),
    ("vision_train", "split"): ("weak", "train", "both"), ("vision_train", "param_dtype"): ("float32", "bfloat16"),
    ("vision_train", "train"): ("full", "head"), ("vision_train", "head_init"): ("zeros", "normal", "small"),
    ("vision", "schedule"): ("constant", "cosine"), ("plan", "attention"): ("auto", "xla"),
}  # fmt: skip

# Closed ranges (low, high); a low of TINY excludes 0. Keys that stand nowhere here are free.
TINY = float.fromhex("0x1p-1022")
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**31 - 1), "data_seed": (0, 2**31 - 1),
    "n_train": (1, math.inf), "n_val": (0, math.inf), "n_test": (1, math.inf), "n_heldout": (0, math.inf),
    "test_fraction": (0, 1 - 1e-9), "max_length": (1, math.inf),
    "batch_size": (1, math.inf), "microbatch_size": (0, math.inf), "epochs": (1, math.inf), "steps": (1, math.inf),
    "learning_rate": (TINY, 1e6), "final_lr_fraction": (0, 1), "warmup_steps": (0, math.inf),
    "grad_clip": (0, 1e30), "weight_decay": (0, 1e30), "dropout": (0, 1 - 1e-9),
    "log_every": (1, math.inf), "eval_every": (0, math.inf), "eval_batch_size": (0, math.inf),
    "checkpoint_every": (0, math.inf), "patience": (0, math.inf), "steps_per_dispatch": (0, math.inf),
    "utilisation": (TINY, 1), "compiles": (1, 100), "contamination": (TINY, 1 - 1e-9), "shots": (0, 1000), "s2s_rounds": (0, math.inf),
    "replicates": (40, math.inf), "repeats": (1, math.inf), "n_label": (1, math.inf), "arch.vocab": (2, math.inf),
    "arch.width": (1, math.inf), "arch.layers": (1, math.inf), "arch.heads": (1, math.inf), "arch.context": (1, math.inf),
    "loss_args.alpha": (0, 1e6), "loss_args.beta": (0, 1e6), "loss_args.aux_coef": (0, 1), "loss_args.warmup": (0, 1e12),
    "loss_args.buffer": (1, math.inf), "loss_args.chunk": (0, math.inf), "loss_args.radius": (TINY, 1),
    "loss_args.temperature": (TINY, 1e6),
    "optimizer_args.b1": (0, 1 - 1e-12), "optimizer_args.b2": (0, 1 - 1e-12), "optimizer_args.eps": (TINY, 1),
    "optimizer_args.momentum": (0, 1 - 1e-12),
    "lora.rank": (1, math.inf), "lora.alpha": (TINY, 1e6), "lora.dropout": (0, 1 - 1e-9),
    "embed": (1, math.inf), "n_classes": (2, math.inf), "images": (1, math.inf), "pixels": (1, 1e5),
    "n_weak": (0, math.inf), "resize": (-1, 1e5), "crop": (-1, 1e5), "workers": (0, 1024), "pictures": (0, 1000),
    "arch.mlp": (1, math.inf), "arch.patch": (1, math.inf), "contrast.width": (1, math.inf), "contrast.outputs": (1, math.inf),
    "contrast.temperature": (TINY, 1e6), "augment.shift": (0, 1), "augment.zoom": (0, 1 - 1e-9), "augment.rotate": (0, 180),
    "augment.brightness": (0, 1), "augment.contrast": (0, 1), "augment.noise": (0, 1),
    "slots": (0, 4096), "slurm.devices": (1, 4096), "slurm.cpus": (0, 4096), "slurm.at_once": (0, 1e6), "slurm.grace": (0, 65535),
    "slurm.restarts": (0, 1e6),
    "probe_args.k": (1, math.inf), "probe_args.l2": (TINY, 1e30), "probe_args.folds": (2, math.inf),
}  # fmt: skip
WORDS = (("loss_args.radius", "midweak"), ("microbatch_size", "auto"))  # in place of a number
RANGES_OF_STAGE = {(stage, key): (0, math.inf) for stage in ("vision", "vision_train") for key in ("n_train", "n_test")}  # 0 = the rest
RUNS = ("run", "weak", "ceiling", "student", "label")  # keys that name a run directory


def check(c: ConfigDict) -> None:
    """Everything that can be told without jax: keys, types, choices, ranges, registry names, paths. Writes nothing.

    Raises:
        UserError: one line that names the key, its value and what was expected.
    """
    stage = c.get("stage")
    _choose("stage", stage, CHOICES["stage"])
    defaults = {}
    if (folder() / f"{stage}.py").is_file():
        reference = shipped(stage)
        defaults = flatten(reference)
        _check_keys(flatten(c), defaults, reference, stage)
    if stage == "sweep":
        _check_sweep(c)
    elif stage == "vision":
        _check_vision(c)
    else:
        _check_values(c, defaults, (c.loss,) if "loss" in c else ())
        _check_paths(c)


def _check_values(c: ConfigDict, defaults: dict, losses: tuple[str, ...], probes: tuple[str, ...] = ()) -> None:
    """Choices, ranges, arguments of the losses and of the optimizer, rules between keys."""
    for key, value in flatten(c).items():
        if value is None or (value == "" and defaults.get(key) == ""):  # left open
            continue
        if key in CHOICES:
            _choose(key, value, OF_STAGE.get((c.get("stage"), key), CHOICES[key]))
        if key in RANGES and (key, value) not in WORDS:
            _in_range(key, value, RANGES_OF_STAGE.get((c.get("stage"), key)), whole=key == "microbatch_size")
    if losses:
        _check_arguments(c, "loss", LOSS_ARGS, losses)
    if "optimizer" in c:
        _check_arguments(c, "optimizer", OPTIMIZER_ARGS, (c.optimizer,))
    for name, value in (c.get("lora") or {}).items():
        if value is not None and c.train != "lora":
            raise UserError(f"config.lora.{name}: {value!r} is set, but train={c.train} trains no adapters; expected train=lora")
    if "probe" in c:
        _check_arguments(c, "probe", PROBE_ARGS, probes or (c.probe,))
    if "mesh" in c:
        _check_mesh(c.mesh)
    if "logger" in c:
        logger.check(c.logger)
    _check_together(c, losses)


def _check_paths(c: ConfigDict) -> None:
    """What the config names exists, as far as it is here and not on a hub."""
    for key in ("task", "task_dir", "labels", "stats_labels", "file", "corpus", "root", "features", *RUNS):
        if isinstance(c.get(key), str):
            check_store(f"config.{key}", c[key])
    if c.get("task"):
        check_task(c.task, c.get("task_dir", ""))
    _check_features(c)
    if c.get("model") and not (c.get("stage") == "probe" and c.run):  # the run names its own model
        if c.stage != "plan" or not c.models:
            (check_image_model if c.stage == "vision_train" else check_model)(c.model)
    if c.get("tokenizer") and is_path(c.tokenizer) and not Path(c.tokenizer).expanduser().is_dir():
        raise UserError(f"config.tokenizer: {c.tokenizer!r}, no such folder")
    for key in ("labels", "stats_labels", "file", "corpus", "root", *RUNS):
        name = c.get(key)
        if not isinstance(name, str) or not name or "://" in name or (key, name) == ("corpus", "world"):
            continue
        if key in RUNS:
            _check_run(name, key)
        elif not Path(name).expanduser().exists():
            raise UserError(f"config.{key}: {name!r}, no such file or folder")
    for name in c.get("runs", ()):
        check_store("config.runs", str(name))
        if "://" not in str(name):
            _check_run(str(name), "runs")
    if "corpus" in c and c.corpus != "world" and not c.tokenizer and not c.model:
        raise UserError(f"config.tokenizer: '', expected a hub id or a local folder, since config.corpus={c.corpus!r} brings none")


def _check_features(c: ConfigDict) -> None:
    check_store("config.features", c.get("features") or "")
    if c.get("features") and "://" not in c.features and Path(c.features).expanduser().is_file():
        raise UserError(f"config.features: {c.features!r} is a file, expected a folder")


def _check_run(name: str, key: str) -> None:
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(f"config.{key}: {name!r}, no such file or folder")
    if not (path / "config.json").is_file():
        raise UserError(f"config.{key}: {name!r} is not a run directory: it has no config.json")


def _check_sweep(c: ConfigDict) -> None:
    """The lists of a sweep, and the configs that its runs start from (`graph.check` says whether the lists fit together)."""
    for key, choices in (("losses", CHOICES["loss"]), *((key, tuple(PROBE_ARGS)) for key in ("probes", "filters", "relabels")),
                         ("ensembles", CHOICES["how"]), ("floors", ("zero_shot", "few_shot"))):
        for value in c[key]:
            _choose(key, value, choices)
    _choose("members", c.members, ("seeds", "models"))
    _choose("executor", c.executor, CHOICES["executor"])
    for key in ("s2s_rounds", "shots", "slots", *(f"slurm.{key}" for key in ("devices", "cpus", "at_once", "grace", "restarts"))):
        _in_range(key, flatten(c)[key])
    if "few_shot" in c.floors and not c.shots:
        raise UserError("config.shots: 0, expected 1 or more for config.floors=few_shot")
    for rung in c.rungs:
        from w2s_jax.data.world import RUNGS

        _choose("rungs", rung, tuple(RUNGS))
    for seed in c.seeds:
        _in_range("seeds", seed, RANGES["seed"], whole=True)
    for rate in c.learning_rates:
        _in_range("learning_rates", rate, RANGES["learning_rate"])
    probes = (*c.probes, *c.filters, *c.relabels)
    for key in ("base", "pretrain", "probe", "prompt"):
        try:
            _check_values(c[key], flatten(shipped(c[key].stage)), ("xent", *c.losses) if key == "base" else (), probes)
            if key == "pretrain":
                _check_paths(c[key])
        except UserError as error:
            raise UserError(str(error).replace("config.", f"config.{key}.", 1)) from error
    for task in c.tasks:
        check_task(task, c.base.task_dir, "tasks")
    for model in () if c.rungs else c.models:
        check_model(model, "models")


def _check_vision(c: ConfigDict) -> None:
    """The keys of an image experiment, and the configs of the networks that it trains."""
    for key in ("seeds", "losses"):
        if not c[key]:
            raise UserError(f"config.{key}: is empty, expected at least one")
    for key in ("seeds", "losses", "noise"):
        if len(set(c[key])) < len(c[key]):
            raise UserError(f"config.{key}: {tuple(c[key])} names one twice, expected each once")
    for seed in c.seeds:
        _in_range("seeds", seed, RANGES["seed"], whole=True)
    for loss in c.losses:
        _choose("losses", loss, CHOICES["loss"])
    for level in c.noise:
        _in_range("noise", level, (TINY, 1 - 1e-9))
    for l2 in c.l2:
        _in_range("l2", l2, RANGES["probe_args.l2"])
    if list(c.l2) != sorted(set(c.l2), reverse=True):
        raise UserError(f"config.l2: {tuple(c.l2)}, expected penalties from the largest to the smallest, each once")
    _check_values(c, flatten(shipped("vision")), ("xent", *c.losses))
    for key, is_used in zip(configs.NETWORKS, (not c.weak_model, not c.strong_model, c.finetune)):
        if is_used:
            _check_network(c, key)
    if not c.weak_model and not c.n_weak:
        raise UserError("config.n_weak: 0, expected images for weak_train, since config.weak_model is empty")
    for key in ("weak_model", "strong_model"):
        if c[key]:
            check_image_model(c[key], key)
    _check_features(c)


def _check_network(c: ConfigDict, key: str) -> None:
    """The config of a network that an image experiment trains: what the experiment sets stands there as it is shipped."""
    part, usual = c[key], flatten(shipped("vision_train"))
    for name, value in flatten(part).items():
        owner = name.split(".")[0]
        if owner in (*configs.GIVEN, *configs.SET[key]) and value != usual[name]:
            by = f"config.{name} of the experiment" if owner in configs.GIVEN else "the experiment"
            raise UserError(f"config.{key}.{name}: {value!r} is set, but {by} sets it; expected {usual[name]!r}")
    if part.model:
        check_image_model(part.model, f"{key}.model")
    if key != "strong_train" and part.objective != "supervised":
        raise UserError(f"config.{key}.objective: {part.objective!r}, expected supervised: it learns from labels")
    if key == "student_train" and part.split != "train":
        raise UserError(f"config.{key}.split: {part.split!r}, expected train: its labels are of that part")
    try:
        _check_values(part, usual, (part.loss,))
    except UserError as error:
        raise UserError(str(error).replace("config.", f"config.{key}.", 1)) from error


def _choose(key: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"config.{key}: {value!r}, expected one of {', '.join(choices)}{nearest(value, choices)}")


def _in_range(key: str, value, limits: tuple[float, float] | None = None, whole: bool = False) -> None:
    low, high = limits or RANGES[key]
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not (low <= value <= high and value < math.inf):
        lower = "above 0" if low == TINY else f"at least {low:g}"
        upper = "" if math.isinf(high) else " and below 1" if 1 - 1e-8 < high < 1 else f" and at most {high:g}"
        word = "".join(f", or {word!r}" for name, word in WORDS if name == key)
        raise UserError(f"config.{key}: {value!r}, expected {describe(int if whole else float)} {lower}{upper}{word}")


def _check_keys(flat: dict, expected: dict, reference: ConfigDict, stage: str) -> None:
    """A config file of the user's own has the keys of its stage, with values of their types."""
    for key in flat:
        if key not in expected:
            raise UserError(f"config.{key}: is not a key of the stage {stage}{nearest(key, expected)}")
    for key in expected:
        if key not in flat:
            raise UserError(f"config.{key}: is missing; the stage {stage} needs it (see configs/{stage}.py)")
    for key, value in flat.items():
        kind = key_type(reference, key)
        fits = isinstance(value, kind) or (kind is float and isinstance(value, int)) or (value is None and expected[key] is None)
        if not fits or (isinstance(value, bool) and kind in (int, float)):
            raise UserError(f"config.{key}: {value!r}, expected {describe(kind)}")


def _check_arguments(c: ConfigDict, what: str, table: dict[str, dict], chosen) -> None:
    """Arguments that are set are ones that (one of) the chosen losses, optimizers or probes take."""
    takes = {name for one in chosen for name in table[one]}
    for name, value in (c.get(f"{what}_args") or {}).items():
        if value is None or name in takes:
            continue
        names = ", ".join(map(repr, dict.fromkeys(chosen)))
        shown = f"{what} {names} takes {', '.join(sorted(takes)) or 'no arguments'}"
        raise UserError(f"config.{what}_args.{name}: {value!r} is set, but {shown}")


def _check_mesh(mesh: ConfigDict) -> None:
    for axis, size in mesh.items():
        if size < -1:
            raise UserError(f"config.mesh.{axis}: {size}, expected a number of devices, -1 for all that are left, or 0 (left open)")
    if sum(size == -1 for size in mesh.values()) > 1:
        raise UserError(f"config.mesh: {dict(mesh)}, expected -1 for at most one axis")


def _check_together(c: ConfigDict, losses: tuple[str, ...]) -> None:
    """Rules between keys."""
    radius = (c.get("loss_args") or {}).get("radius")
    if isinstance(radius, str) and radius != "midweak":
        raise UserError(f"config.loss_args.radius: {radius!r}, expected a number or 'midweak'")
    for loss in losses:
        if loss in ("logconf", "logconf_openai") and ((c.get("loss_args") or {}).get("warmup") or 0) > 1:
            raise UserError(f"config.loss_args.warmup: {c.loss_args.warmup!r}, expected a fraction of training (0 to 1) for {loss}")
    if c.get("steps") is not None and c.get("warmup_steps", 0) >= c.steps:
        raise UserError(f"config.warmup_steps: {c.warmup_steps}, expected fewer than config.steps ({c.steps})")
    if c.get("select", "last") != "last":
        for key in ("eval_every", "n_val"):
            if not c[key]:
                raise UserError(f"config.{key}: 0, expected more with select={c.select}, which scores validation documents as it goes")
    elif c.get("patience"):
        raise UserError(f"config.patience: {c.patience}, but select=last compares no steps; expected val_labels, agreement or oracle")
    if "arch" in c and not c.get("model"):
        if c.arch.width % c.arch.heads:
            raise UserError(f"config.arch.heads: {c.arch.heads}, expected a divisor of config.arch.width ({c.arch.width})")
        if "context" in c.arch and c.get("max_length", 0) > c.arch.context:
            raise UserError(f"config.max_length: {c.max_length}, expected at most config.arch.context ({c.arch.context})")
    if "layer" in c and c.layer not in ("middle", "last") and not c.layer.isdecimal() and (c.layer, c.mode) != ("all", "extract"):
        raise UserError(f"config.layer: {c.layer!r}, expected middle, last or a number of 0 (embeddings) or more; all with mode=extract")
    if c.get("mode") == "extract" and c.labels:
        raise UserError(f"config.labels: {c.labels!r}, but mode=extract has no use for labels")
    if c.get("objective") == "contrastive":
        for key, none in (("labels", ""), ("train", "full"), ("dropout", 0.0)):
            if c[key] != none:
                raise UserError(f"config.{key}: {c[key]!r}, but config.objective=contrastive has no use for it; expected {none!r}")
        if c.batch_size < 2:
            raise UserError(f"config.batch_size: {c.batch_size}, expected 2 or more images to tell apart for config.objective=contrastive")
    if c.get("stage") == "prompt":
        if c.template and (c.template.count("{text}") != 1 or c.template.count("{answer}") != 1 or not c.template.endswith("{answer}")):
            raise UserError(f"config.template: {c.template!r}, expected {{text}} once and {{answer}} once, at the end")
        if c.answers:
            _check_answers(tuple(c.answers))
        if c.labels and (c.split != "test" or not c.shots):
            raise UserError(f"config.labels: {c.labels!r}, expected it empty with config.split={c.split!r}, config.shots={c.shots}: labels "
                            "are the answers that shots show, for split=test")
    if "answers" in c and "head_init" in c:
        answers = tuple(c.answers)
        if c.head_init == "unembedding":
            _check_answers(answers)
            if c.readout not in ("auto", "last"):
                raise UserError(f"config.readout: {c.readout!r}, expected auto or last with config.head_init='unembedding'")
        elif answers != shipped("finetune").answers:
            raise UserError(f"config.answers: {answers!r} is set, but config.head_init={c.head_init!r} has no use for answers")
    if "runs" in c and len(set(c.runs)) < max(len(c.runs), 2):
        raise UserError(f"config.runs: {tuple(c.runs)!r}, expected two or more different label run directories")
    if c.get("stage") == "plan":
        _check_plan(c)
    if c.get("stage") == "benchmark" and c.batch_size > c.n_train:
        raise UserError(f"config.batch_size: {c.batch_size}, expected at most config.n_train ({c.n_train})")


def _check_plan(c: ConfigDict) -> None:
    """The machines and models of a plan, and its documents."""
    for key, name in (("topology", c.topology), *(("topologies", name) for name in c.topologies)):
        chips.topology(name, key)
    for key in ("topologies", "models"):
        if len(set(c[key])) < len(c[key]):
            raise UserError(f"config.{key}: {tuple(c[key])} names one twice, expected each once")
    for name in c.models:
        check_model(name, "models")
    if c.lengths != "sciq" and not (c.lengths.isdecimal() and int(c.lengths)):
        raise UserError(f"config.lengths: {c.lengths!r}, expected sciq or a number of tokens")
    if c.what == "train" and c.batch_size > c.n_train:
        raise UserError(f"config.batch_size: {c.batch_size}, expected at most config.n_train ({c.n_train})")
    if -1 in c.mesh.values():
        raise UserError(f"config.mesh: {dict(c.mesh)}, expected sizes, or 0 for axes that are chosen")


def _check_answers(answers: tuple) -> None:
    if len(answers) != 2 or not all(isinstance(a, str) and a.strip() for a in answers) or answers[0] == answers[1]:
        raise UserError(f"config.answers: {answers!r}, expected two different texts, of class 0 and of class 1")


def is_path(name: str) -> bool:
    """Whether `name` means a local folder rather than a hub id: it is one, or it is written as a path."""
    return name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1 or Path(name).is_dir()


def check_task(name: str, task_dir: str = "", key: str = "task") -> None:
    """UserError unless `name` is a registered task or a folder, and `task_dir` is empty or a folder."""
    from w2s_jax.data.tasks import TASKS

    if name not in TASKS and "://" not in name and not Path(name).expanduser().is_dir():
        raise UserError(
            f"config.{key}: {name!r} is neither a folder nor a registered task ({', '.join(sorted(TASKS))}){nearest(name, TASKS)}"
        )
    if task_dir and "://" not in task_dir and not Path(task_dir).expanduser().is_dir():
        raise UserError(f"config.task_dir: {task_dir!r}, no such folder")


def check_model(name: str, key: str = "model") -> None:
    """UserError if `name` is written as a local path and is no folder in Hugging Face's format, or is no possible hub id."""
    if "://" in name:
        return
    if is_path(name):
        path = Path(name).expanduser()
        if not path.is_dir():
            hint = "; make it with --config=pretrain:runlocal --workdir=runs/runlocal" if name == "runs/runlocal/model" else ""
            raise UserError(f"config.{key}: {name!r}, no such folder{hint}")
        if not (path / "config.json").is_file():
            raise UserError(f"config.{key}: {name!r} is not in Hugging Face's format: it has no config.json")
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"config.{key}: {name!r}, expected a hub id (name or organisation/name) or a local folder")


def check_image_model(name: str, key: str = "model") -> None:
    """UserError unless `name` may be a published checkpoint, a file as its authors published it, a folder in Hugging Face's format or
    a hub id."""
    from w2s_jax.published import PUBLISHED

    if name in PUBLISHED or Path(name).expanduser().is_file():
        return
    if "/" not in name:  # a hub id of one part is no image model's: it was meant as a published name
        raise UserError(f"config.{key}: {name!r}, expected one of {', '.join(PUBLISHED)}, a file, a folder or a hub id"
                        f"{nearest(name, PUBLISHED)}")
    check_model(name, key)
