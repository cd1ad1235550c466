"""What `--help` prints: the usage, the shipped configs, and every key of one with its value and the comment beside it in the source."""

from __future__ import annotations

import ast
import inspect
import io
import re
import textwrap
import tokenize
from pathlib import Path

from ml_collections import ConfigDict

from w2s_jax import config as configs

USAGE = """\
usage: w2s --config=NAME[:ARG] --workdir=DIR [--config.KEY=VALUE ...]     run a stage
       w2s --config=NAME --help                                           the keys of a config
       w2s status ROOT                                                    the runs under a directory"""
FLAGS = {  # name: (kind, help)
    "workdir": (str, "the run's directory; the root for a sweep and a report (local or gs://)"),
    "rerun": (bool, "redo a run that is done"),
    "dry_run": (bool, "check all that can be told without devices, print the graph of a sweep, and stop"),
    "coordinator": (str, "several processes: host:port where process 0 is found; the launcher says it on SLURM, Open MPI and TPUs"),
    "num_processes": (int, "several processes without such a launcher: how many"),
    "process_id": (int, "several processes without such a launcher: which one this is, from 0"),
    "join_seconds": (int, "several processes: how long to wait for the others (60)"),
    "distributed": (bool, "several processes: refuse to run as one where nothing says who the others are"),
}


def help_text(spec: tuple[str, str | None] | None) -> str:
    """The usage, and the shipped configs (without a config) or every key of one with its value and comment."""
    lines = [USAGE, "", "flags:", *_table([(f"--{name}", text) for name, (_, text) in FLAGS.items()])]
    if spec is None:
        described = [(name, _docstring(configs.find(name)).split("\n")[0]) for name in configs.names()]
        return "\n".join([*lines, "", "configs (add --help to one to see its keys):", *_table(described)])
    file, config = configs.find(spec[0]), configs.load(*spec)
    if file.suffix == ".json":
        file = configs.folder() / f"{config.stage}.py"
    own, headings = _comments(file)
    sources = {"": config.get("stage")}  # a preset comments on what it changes, its stage on all keys; a sweep holds whole configs
    sources |= {f"{key}.": config[key].stage for key in config if isinstance(config[key], ConfigDict) and "stage" in config[key]}
    comments: dict[str, str] = {}
    for prefix, stage in sources.items():
        base = configs.folder() / f"{stage}.py"
        if not base.is_file() or (not prefix and base.samefile(file)):
            comments |= {k: v for k, v in own.items() if not k.startswith(tuple(sources)[1:])}
            continue
        more, heads = _comments(base)
        comments |= {f"{prefix}{k}": own.get(f"{prefix}{k}") or v for k, v in more.items()}
        headings = {f"{prefix}{k}": f"{prefix[:-1]}: {v}" if prefix else v for k, v in heads.items()} | headings
    comments |= {k: v for k, v in own.items() if k not in comments}
    lines += ["", textwrap.indent(_docstring(file), "  "), "", f"keys of {spec[0]}:"]
    rows, flat = [], configs.flatten(config)
    for prefix in (p for p in sources if p):
        flat = {k: v for k, v in flat.items() if not k.startswith(prefix) or not _set_elsewhere(prefix[:-1], k.removeprefix(prefix))}
        headings.setdefault(next(k for k in comments if k in flat and k.startswith(prefix)), prefix[:-1])
    for key in [*(k for k in comments if k in flat), *(k for k in flat if k not in comments)]:
        if key in headings:
            lines += [*_table(rows), "", f"  {headings[key]}"]
            rows = []
        rows.append((f"--config.{key}={_shown(flat[key])}", comments.get(key, "")))
    return "\n".join(lines + _table(rows))


def _set_elsewhere(network: str, key: str) -> bool:
    """Whether the stage vision gives this key to a network that it trains: then it is no key of the user's."""
    return network in configs.NETWORKS and key.split(".")[0] in ("stage", *configs.GIVEN, *configs.SET[network])


def _shown(value) -> str:
    return "" if value is None else ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _docstring(file: Path) -> str:
    return inspect.cleandoc(ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "")


def _table(rows: list[tuple[str, str]]) -> list[str]:
    lines = []
    for left, right in rows:
        wrapped = textwrap.wrap(right, 88) or [""]
        if len(left) > 38:
            lines.append(f"  {left}")
            left = ""
        lines += [f"  {left if i == 0 else '':<38}  {text}".rstrip() for i, text in enumerate(wrapped)]
    return lines


def _comments(file: Path) -> tuple[dict[str, str], dict[str, str]]:
    """From a config's source, in its order: key -> the comment beside its assignment, and key -> the heading above it."""
    source = file.read_text(encoding="utf-8")
    beside, alone = {}, {}  # line -> comment
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            place = alone if token.line.lstrip().startswith("#") else beside
            place[token.start[0]] = token.string.lstrip("# ")
    comments, headings, previous = {}, {}, 0
    assignments = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assign)]
    for node in sorted(assignments, key=lambda node: node.lineno):
        for target in node.targets:
            name = ast.unparse(target)
            if re.fullmatch(r"\w+(\.\w+)+", name):
                key = name.split(".", 1)[1]
                comments.setdefault(key, beside.get(node.end_lineno) or beside.get(node.lineno) or "")
                above = [alone[line] for line in range(previous + 1, node.lineno) if line in alone]
                if len(above) == 1 and len(above[0]) < 40:
                    headings[key] = above[0]
        previous = node.lineno
    return comments, headings
