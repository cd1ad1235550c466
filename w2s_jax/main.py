"""The one way in: flags, devices, then `stages.run`.

    python -m w2s_jax.main --config=finetune --config.model=gpt2 --config.task=sciq --workdir=runs/gpt2
    python -m w2s_jax.main --config=finetune --help
    python -m w2s_jax.main status runs/sweep

Exit codes: 0 done, 2 the user's mistake (one line on stderr), 1 a defect of the program (a traceback), 3 another process of the job is
gone, 75 stopped by SIGTERM (the same command goes on), 130 interrupted.
Nothing heavy is imported before the flags and the config are known to be good.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
import traceback
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from w2s_jax import checks, distributed, interrupts, launchers, usage
from w2s_jax import config as configs
from w2s_jax.errors import UserError, nearest


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv` (without the program's name; None = sys.argv) and returns the exit code.

    Where this is one of several processes, it only returns when all are done; an error ends them all.
    """
    try:
        code = _main(sys.argv[1:] if argv is None else list(argv))
        distributed.leave()
        return code
    except UserError as error:
        return distributed.end(2, f"error: {error}")
    except interrupts.Stopped as stopped:
        goes_on = str(stopped) or "the same command goes on where the last checkpoint was saved"
        return distributed.end(interrupts.RESTARTABLE, f"stopped by SIGTERM; {goes_on}")
    except KeyboardInterrupt:
        return distributed.end(130, "interrupted; the same command goes on where the last checkpoint was saved")
    except Exception as error:
        if distributed.processes() == 1:
            raise
        distributed.settle()
        traceback.print_exc()
        return distributed.end(1, f"error: {type(error).__name__}: {error}".split("\n")[0])


def cli() -> None:
    """The command `w2s`."""
    interrupts.install()
    interrupts.follow_parent()
    sys.exit(main())


def _main(argv: list[str]) -> int:
    if argv and argv[0] == "status":
        return status(argv[1:])
    argv = _expand_flagfiles(argv)
    wants_help = any(a in ("--help", "-help", "-h", "--helpfull", "--helpshort") for a in argv)
    argv, spec = _take_config(argv)
    if wants_help:
        print(usage.help_text(spec))
        return 0
    if spec is None:
        raise UserError(f"--config: is missing; expected one of {', '.join(configs.names())}, or a file; see --help")
    config, values = parse(argv, spec)
    if not values["workdir"]:
        raise UserError("--workdir: is missing; expected the directory that the run is written to")
    workdir = _workdir(values["workdir"])
    if (job := launchers.detect(values)) is not None:
        about = _about([f"--config={':'.join(filter(None, spec))}", *argv])
        distributed.join(job, about, values["join_seconds"] or distributed.START_SECONDS)
    if spec[0].endswith(".json"):
        from w2s_jax import schedule

        schedule.check_needs(spec[0])
    checks.check(config)

    if config.stage == "plan":  # it computes nothing itself, and must not take the devices of somebody who does
        os.environ["JAX_PLATFORMS"] = "cpu"
    from w2s_jax import stages

    stages.check_processes(config.stage)
    options = {name: True for name in ("rerun", "dry_run") if values[name]} | stages.prepare(config)
    if values["dry_run"] and config.stage != "sweep":
        return 0
    if config.get("executor", "here") != "here":
        keep_off_devices()
    elif config.stage not in stages.FILES_ONLY:
        setup_devices()
    stages.run(config, workdir, **options)
    return 0


def _about(argv: list[str]) -> dict[str, str]:
    """What must be the same in all processes of a job."""
    from w2s_jax import provenance

    own = re.compile(r"--?(process_id|coordinator)(=|$)")
    rest = [word for before, word in zip(["", *argv], argv) if not own.match(word) and not (own.match(before) and "=" not in before)]
    return {"the flags": " ".join(rest), "the commit": str(provenance.commit()),
            "the versions": " ".join(f"{name}={version}" for name, version in provenance.versions().items())}


def _workdir(text: str) -> str:
    """`--workdir` with `~` resolved. UserError where a file stands in its way."""
    if "://" in text:
        configs.check_store("--workdir", text)
        return text
    path = Path(text).expanduser()
    there = next((p for p in (path, *path.parents) if p.exists()), path)
    if there.is_file():
        raise UserError(f"--workdir={text}: {'is' if there == path else f'{there} is'} a file, expected a directory")
    return str(path)


# ---------------------------------------------------------------- flags


def _expand_flagfiles(argv: list[str]) -> list[str]:
    try:
        return flags.FlagValues().read_flags_from_files(argv, force_gnu=True)
    except flags.Error as error:
        raise UserError(f"--flagfile: {error}") from error


def _take_config(argv: list[str]) -> tuple[list[str], tuple[str, str | None] | None]:
    """Splits `--config=NAME[:ARG]` off: the other arguments, and (NAME, ARG or None) or None."""
    rest, found, position = [], [], 0
    while position < len(argv):
        word = argv[position]
        if word in ("--config", "-config"):
            position += 1
            if position == len(argv):
                raise UserError("--config: has no value")
            found.append(argv[position])
        elif re.match(r"--?config=", word):
            found.append(word.split("=", 1)[1])
        else:
            rest.append(word)
        position += 1
    if len(found) > 1:
        raise UserError(f"--config: is given {len(found)} times ({', '.join(found)}), expected once")
    if not found:
        return rest, None
    if found[0].endswith(".json"):  # a recorded config takes no argument, and its path may hold a colon
        return rest, (found[0], None)
    name, colon, arg = found[0].partition(":")
    if not name:
        raise UserError(f"--config={found[0]}: is empty, expected one of {', '.join(configs.names())}, or a file")
    return rest, (name, arg if colon else None)


def parse(argv: list[str], spec: tuple[str, str | None]) -> tuple[ConfigDict, dict]:
    """The config that the command line means, locked, and the values of the other flags.

    absl and ml_collections parse; what they would answer with a traceback, or drop, becomes a UserError here.
    """
    config = configs.load(*spec)
    known = configs.flatten(config)
    argv = [word for given in _join_tuples(argv, known) for word in _spelled_mesh(given, config)]
    overrides = [(i, m) for i, word in enumerate(argv) if (m := re.match(r"--?(no)?config\.([^=]+)(=(.*))?$", word, re.DOTALL))]
    for index, match in overrides:
        key = match[2]
        bare = re.sub(r"\[.*", "", key)
        if bare not in known and not isinstance(_get(config, bare), ConfigDict):
            raise UserError(f"--config.{key}: is not a key of this config{nearest(key, known)}; --help lists them")
        if isinstance(known.get(key), tuple) and match[3]:
            argv[index] = f"--config.{key}={_tuple_text(match[4], known[key])}"

    values = flags.FlagValues()
    for name, (kind, text) in usage.FLAGS.items():
        if kind is bool:
            flags.DEFINE_bool(name, False, text, flag_values=values)
        elif kind is int:
            flags.DEFINE_integer(name, None, text, lower_bound=0, flag_values=values)
        else:
            flags.DEFINE_string(name, None, text, flag_values=values)
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        rest = values(["w2s", *argv])[1:]
        config = values["config"].value
    except (flags.Error, ValueError, TypeError, LookupError, AttributeError, SyntaxError) as error:
        raise UserError(_flag_message(error, configs.load(*spec))) from error
    if rest:
        raise UserError(f"{rest[0]!r}: positional arguments are not taken; expected --flag=value (see --help)")
    return config, {name: values[name].value for name in usage.FLAGS}


def _get(config: ConfigDict, key: str):
    for part in key.split("."):
        if not isinstance(config, ConfigDict) or part not in config:
            return None
        config = config[part]
    return config


def _join_tuples(argv: list[str], known: dict) -> list[str]:
    """A key that holds a tuple in one form, `--config.key=a,b`: also where it was given as `--config.key a,b`, or several times."""
    joined, place, words = [], {}, iter(argv)
    for word in words:
        match = re.match(r"--?config\.([^=]+)(=(.*))?$", word, re.DOTALL)
        if not match or not isinstance(known.get(match[1]), tuple):
            joined.append(word)
            continue
        text = match[3] if match[2] else next(words, None)
        if match[1] in place:
            joined[place[match[1]]] += f",{text or ''}"
        else:
            place[match[1]] = len(joined)
            joined.append(f"--config.{match[1]}" + ("" if text is None else f"={text}"))
    return joined


def _spelled_mesh(word: str, config: ConfigDict) -> list[str]:
    """A whole mesh in one flag, `--config.mesh=auto`, `1x8x1` or `data=2,fsdp=4`, as one flag an axis; any other word as it is."""
    match = re.match(r"--?config\.((?:\w+\.)*mesh)=(.*)$", word, re.DOTALL)
    if not match or not isinstance(mesh := _get(config, match[1]), ConfigDict):
        return [word]
    axes, text = list(mesh), match[2].strip()
    sizes = text.split("x")
    if text == "auto":
        sizes = ["0"] * len(axes)
    elif "=" in text:
        parts = text.replace(" ", "").split(",")
        named = dict(part.split("=", 1) if "=" in part else (part, "") for part in parts)
        sizes = [named.pop(axis, "0") for axis in axes] if set(named) <= set(axes) and len(named) == len(parts) else []
    if len(sizes) != len(axes) or not all(re.fullmatch(r"-?\d+", size) for size in sizes):
        raise UserError(f"--{word.lstrip('-')}: expected auto, the sizes of {', '.join(axes)} as in 1x8x1, or some as in data=2,fsdp=4")
    return [f"--config.{match[1]}.{axis}={size}" for axis, size in zip(axes, sizes)]


def _tuple_text(text: str, default: tuple) -> str:
    """`a,b` as the tuple literal that ml_collections wants; texts that are literals already stay."""
    if text.strip().startswith(("(", "[")):
        return text
    items = [item.strip() for item in text.split(",") if item.strip()]
    words = isinstance(default[0], str) if default else not all(re.fullmatch(r"[-+.\d][-+.\deE]*", item) for item in items)
    return "(" + "".join(f"{item!r}," if words else f"{item}," for item in items) + ")"


def _flag_message(error: Exception, config: ConfigDict) -> str:
    """absl's message in the form "key, value, what was expected"."""
    known = configs.flatten(config)
    text = " ".join(str(error.args[0] if error.args else error).split())
    if isinstance(error, flags.UnrecognizedFlagError):
        names = [*usage.FLAGS, "config", *(f"config.{k}" for k in known)]
        return f"--{error.flagname}: is not a flag{nearest(error.flagname, names)}; --help lists them"
    if match := re.match(r"flag --(no)?config\.([^=]+)=(.*?): ", text):
        if match[2] in known:
            return f"--config.{match[2]}={match[3]}: expected {configs.describe(configs.key_type(config, match[2]))}"
    elif (match := re.match(r"flag --(\w+)=(.*?): ", text)) and (kind := usage.FLAGS.get(match[1], (None,))[0]) in (bool, int):
        return f"--{match[1]}={match[2]}: expected {'true or false' if kind is bool else 'an integer of 0 or more'}"
    return text.replace("flag --", "--", 1)


# ---------------------------------------------------------------- devices and status


def cache_folder() -> Path:
    """Where compiled programs are kept: keyed by the host's CPU, since a program compiled for another one may not run here."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        found = [line for line in text.splitlines() if line.startswith(("model name", "flags", "Features", "CPU part"))]
        cpu = "\n".join(sorted(set(found)))
    except OSError:
        cpu = platform.processor()
    key = hashlib.sha256(f"{platform.machine()}\n{cpu}".encode()).hexdigest()[:10]
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "w2s_jax" / f"xla-{key}"


def setup_devices() -> None:
    """Imports jax, turns the persistent compilation cache on and joins the devices of the job's other processes."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = cache_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            print(f"no compilation cache: {folder}: {error.strerror}", file=sys.stderr)
        else:
            jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    distributed.initialize_jax()


def keep_off_devices() -> None:
    """For a process that plans runs and starts others: on an accelerator it would hold what these need."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def status(argv: list[str]) -> int:
    """`w2s status ROOT`: a line per run under ROOT, and how many are done, running, queued, stopped, failed and waiting."""
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError(f"status: expected one directory, got {' '.join(argv) or 'none'}")
    from w2s_jax import status as found

    print("\n".join(found.lines(argv[0])))
    return 0


if __name__ == "__main__":
    cli()
