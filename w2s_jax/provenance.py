"""What is recorded of how a run came about: versions, commit, devices; and in what two identities differ."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path

PACKAGES = ("w2s_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "datasets", "tokenizers")


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Lines `key: old -> new` for every key in which two identities differ, nested keys joined by dots."""
    lines = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b or (key in old) != (key in new):
            lines.append(f"{prefix}{key}: {json.dumps(a)} -> {json.dumps(b)}")
    return lines


@functools.lru_cache(maxsize=1)
def versions() -> dict:
    """Versions of Python and of the packages that a number can depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name == "w2s_jax":
                from w2s_jax import __version__

                found[name] = __version__
    return found


@functools.lru_cache(maxsize=1)
def commit() -> str | None:
    """Commit of the checkout that this package runs from, "+changes" where files differ from it; None for an installed package."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "w2s_jax/__init__.py")  # not some other repository that holds a venv
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def devices() -> dict | None:
    """Platform, kind and number of the devices; None as long as nobody imported jax."""
    jax = sys.modules.get("jax")
    if jax is None:
        return None
    found = jax.devices()
    return {"platform": found[0].platform, "kind": found[0].device_kind, "count": len(found), "processes": jax.process_count()}
