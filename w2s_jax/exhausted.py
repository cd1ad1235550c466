"""The memory of a device here, and the line that answers where it ran out."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import jax
import numpy as np

from w2s_jax import chips
from w2s_jax.errors import UserError
from w2s_jax.memory import show

VARIABLE = "W2S_DEVICE_MEMORY"
_UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_size(text: str, what: str = VARIABLE) -> int:
    """Bytes of `16GiB`, `500M`, `2e9`. UserError where it is none; `what` names it."""
    match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    try:
        size = int(float(match[1]) * _UNITS[match[2]])
    except (TypeError, ValueError):
        size = 0
    if size <= 0:
        raise UserError(f"{what}={text!r}: expected a size such as 16GiB or 500MiB")
    return size


def _host_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int(Path(file).read_text()))
    return total


def device_memory() -> int:
    """Bytes of one device, the same on all processes: as W2S_DEVICE_MEMORY says, as the backend says, by the kind of device
    (chips.py), or of a CPU its share of the host's."""
    device = jax.local_devices()[0]
    if stated := os.environ.get(VARIABLE):
        return parse_size(stated)
    stats = device.memory_stats() or {}
    if stats.get("bytes_limit"):
        size = int(stats["bytes_limit"])
    elif chip := chips.of_device(device.device_kind):
        size = chip.memory
    else:
        size = _host_memory() // jax.local_device_count()
    if jax.process_count() > 1:  # hosts may differ a little, their decisions must not
        from jax.experimental import multihost_utils

        size = int(np.min(multihost_utils.process_allgather(np.int32(size >> 20)))) << 20
    return size


# --------------------------------------------------------------------------- out of memory


def is_exhausted(error: BaseException) -> bool:
    """Whether an exception means that memory ran out: of a device (at compile, load or run time) or of the host."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(re.search(r"RESOURCE_EXHAUSTED|out of memory|bad_alloc", str(error), re.IGNORECASE))


def asked(error: BaseException) -> int | None:
    """How many bytes XLA says that it asked for, or that the program uses."""
    text = str(error)
    for pattern in (r"allocat\w*\s+(?:of\s+)?([\d.]+)\s*([KMGT]?)i?B", r"allocat\w*\s+(?:of\s+)?(\d+)()\s*bytes",
                    r"Used ([\d.]+)([KMGT]?) of"):
        if match := re.search(pattern, text, re.IGNORECASE):
            return int(float(match[1]) * _UNITS[match[2].lower()])
    return None


def answer(error: BaseException, what: str, advice: str) -> UserError:
    """The line that answers an exhausted memory."""
    size = asked(error)
    where = f"asking for {show(size)} more than was free" if size else "asking for more than was free"
    with contextlib.suppress(RuntimeError):
        where += f" (a device has {show(device_memory())})"
    return UserError(f"memory: {what} ran out of it, {where}{advice}")


def advice(config) -> str:
    """What to change in a stage whose needs nobody has estimated."""
    keys = []
    if "eval_batch_size" in config:
        size = config.eval_batch_size
        keys.append(f"--config.eval_batch_size={max(size // 2, 1)}" if size else "a small --config.eval_batch_size (documents a pass)")
    if isinstance(config.get("microbatch_size"), int) and config.batch_size > 1:
        keys.append(f"--config.microbatch_size={max((config.microbatch_size or config.batch_size) // 2, 1)}")
    if config.get("remat") == "none":
        keys.append("--config.remat=full")
    if "mesh" in config and config.mesh.get("fsdp") != len(jax.devices()) > 1:
        keys.append(f"--config.mesh={'x'.join(map(str, (1, len(jax.devices()), 1)))}")
    if config.get("dtype") == "float32":
        keys.append("--config.dtype=bfloat16")
    return f"; expected {' or '.join(keys)}" if keys else "; expected a smaller model or more memory"
