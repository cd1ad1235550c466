"""The devices of one node as a pool: a process for every run, on devices that no other process sees.

Longest first, as soon as what a run reads is done; a run that needs more devices than are free waits until they are, and others pass
it. Processes of one device join no cluster and open no port.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from w2s_jax import interrupts, outcomes, runlog, schedule
from w2s_jax.errors import UserError
from w2s_jax.files import read_json
from w2s_jax.graph import Graph
from w2s_jax.progress import clock, say

FOLDER = "logs"  # under the sweep's root
CORES = 4  # of a CPU, for each run at once
TRIES = 3  # of a run that is stopped from outside, each going on where the last one saved
GRACE = 120.0  # seconds that runs have to save their state once they are told to stop
# What says that a process is one of a cluster's; a run of the pool is none, wherever the pool itself was started.
LAUNCHERS = re.compile(r"(SLURM|OMPI|PMI|PMIX|PRTE|MEGASCALE)_|JAX_LOCAL_DEVICE_IDS")
TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}  # chips of a process -> their shape on the host
TPU_PORT = 8471  # libtpu's own; each process of a host needs another

MEMORY = "W2S_DEVICE_MEMORY"  # what exhausted.py takes for the memory of a device; not imported: it brings jax along

PROBE = """
import jax
from w2s_jax import exhausted
found = jax.local_devices()
platform = found[0].platform
if platform == "gpu":
    platform = "rocm" if "rocm" in found[0].client.platform_version.lower() else "cuda"
print("DEVICES", platform, len({tuple(d.coords) for d in found} if platform == "tpu" else found), exhausted.device_memory())
"""


@dataclasses.dataclass(frozen=True)
class Devices:
    """What a pool hands out: `platform` (cpu | cuda | rocm | tpu), the names of the devices (of a TPU: chips; of a CPU: slots), and the
    bytes that a run may use of each (0 = not known)."""

    platform: str
    ids: tuple[str, ...]
    memory: int = 0


def find(slots: int = 0, environ=os.environ) -> Devices:
    """The devices here, as far as this process may use them.

    jax is asked in a process of its own: who asks holds the devices, and on a GPU most of their memory.

    Args:
      slots: use so many of them; of a CPU, so many runs at once (0 = all; of a CPU, one for every four cores).

    Raises:
      UserError: jax finds no devices, or fewer than `slots`.
    """
    environ = {**environ, "PYTHONPATH": schedule.python_path(environ), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    asked = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env=environ)
    match = re.search(r"^DEVICES (\w+) (\d+) (\d+)$", asked.stdout, re.MULTILINE)
    if not match:
        last = (asked.stderr.strip().splitlines() or ["no answer"])[-1]
        raise UserError(f"config.executor: 'devices', but jax finds none here: {last}")
    platform, count = match[1], int(match[2])
    if platform == "cpu":
        slots, memory = slots or max(1, len(_cores()) // CORES), int(match[3])
        return Devices("cpu", tuple(map(str, range(slots))), memory if environ.get(MEMORY) else memory * count // slots)
    shown = environ.get({"cuda": "CUDA_VISIBLE_DEVICES", "rocm": "HIP_VISIBLE_DEVICES", "tpu": "TPU_VISIBLE_CHIPS"}[platform], "")
    ids = tuple(part for part in shown.split(",") if part)[:count]
    ids = ids if len(ids) == count else tuple(map(str, range(count)))
    if slots > len(ids):
        raise UserError(f"config.slots: {slots}, expected at most the {len(ids)} devices here")
    return Devices(platform, ids[: slots or None], int(match[3]))


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def environment(devices: Devices, held: tuple[str, ...], environ=os.environ) -> dict[str, str]:
    """The environment of a process that sees the devices `held` and no others; none at all: one that computes nothing."""
    out = {key: value for key, value in environ.items() if not LAUNCHERS.match(key)}
    out["PYTHONPATH"] = schedule.python_path(environ)
    names = ",".join(held)
    if not held or devices.platform == "cpu":
        flags = re.sub(r"--xla_force_host_platform_device_count=\S*", "", out.pop("XLA_FLAGS", "")).strip()
        out |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(max(len(held), 1))} | ({"XLA_FLAGS": flags} if flags else {})
        if held and devices.memory:
            out[MEMORY] = str(devices.memory)  # runs share what the host has
    elif devices.platform == "tpu":
        if held != devices.ids:  # all of a host: as it comes
            port = TPU_PORT + devices.ids.index(held[0])
            out |= {"TPU_VISIBLE_CHIPS": names, "TPU_CHIPS_PER_PROCESS_BOUNDS": TPU_BOUNDS[len(held)], "TPU_PROCESS_BOUNDS": "1,1,1",
                    "TPU_PROCESS_ADDRESSES": f"localhost:{port}", "TPU_PROCESS_PORT": str(port), "CLOUD_TPU_TASK_ID": "0",
                    "TPU_WORKER_ID": "0", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    else:
        out[{"cuda": "CUDA_VISIBLE_DEVICES", "rocm": "HIP_VISIBLE_DEVICES"}[devices.platform]] = names
    return out


@dataclasses.dataclass
class _Child:
    process: subprocess.Popen
    held: tuple[str, ...]
    log: Path
    offset: int  # where this attempt's lines begin
    begin: float


class Pool:
    """Makes runs of a graph on the devices of this node.

    Args:
      todo: names of the runs to make; what they read besides is done.
      work: how long each takes compared with the others.
      need: devices that each takes (`schedule.devices`).
      logs: folder of `<run>.log`, appended to.

    Raises:
      UserError: a run needs more devices than there are.
    """

    def __init__(self, graph: Graph, todo, work: dict[str, float], need: dict[str, int], devices: Devices, logs: Path):
        self.graph, self.work, self.devices, self.logs = graph, work, devices, logs
        self.waiting = [name for name in sorted(graph.nodes, key=lambda name: -work[name]) if name in set(todo)]
        self.total = len(self.waiting)
        self.needs = {name: self._need(name, need[name]) for name in self.waiting}
        self.running: dict[str, _Child] = {}
        self.done: list[str] = []
        self.failed: dict[str, str] = {}
        self.tries: collections.Counter = collections.Counter()
        self._stop: int | None = None  # the signal that ends the pool
        self._begin = time.monotonic()

    def _need(self, name: str, need: int) -> int:
        there = len(self.devices.ids)
        if need == schedule.ALL:
            return there
        if need > there:
            raise UserError(f"{name}: its mesh takes {need} devices, but there are {there} here; expected a smaller config.base.mesh, "
                            "or config.executor=slurm")
        if self.devices.platform == "tpu":  # chips go in rectangles
            return next((n for n in (1, 2, 4) if n >= need and n <= there), there) if need else 0
        return need

    def run(self) -> dict[str, str]:
        """Makes the runs; returns why each failed one did. SIGTERM and Ctrl-C stop the processes, which save their state: they end in
        `interrupts.Stopped` and KeyboardInterrupt."""
        here = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, self._signalled) for number in (signal.SIGTERM, signal.SIGINT)} if here else {}
        try:
            while self.waiting or self.running:
                if self._stop is None:
                    self._start_ready()
                    if self._stop is not None:  # a run that was just being started was not told
                        self._tell(signal.SIGTERM)
                elif not self.running:
                    break
                time.sleep(0.05)
                self._collect()
        finally:
            self._end()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._stop is not None:
            say(f"stopped: {self._counts()}")
            raise KeyboardInterrupt if self._stop == signal.SIGINT else interrupts.Stopped("the same command goes on")
        return self.failed

    def _signalled(self, number, frame) -> None:
        if self._stop is not None:  # asked twice: now
            self._tell(signal.SIGKILL)
            return
        self._stop = number
        self._tell(signal.SIGTERM)
        timer = threading.Timer(GRACE, self._tell, [signal.SIGKILL])
        timer.daemon = True
        timer.start()

    def _tell(self, number: int) -> None:
        for child in list(self.running.values()):
            if child.process.poll() is None:
                child.process.send_signal(number)

    def _end(self) -> None:
        """No process outlives the pool, whatever ended it."""
        self._tell(signal.SIGTERM)
        for child in self.running.values():
            try:
                child.process.wait(GRACE)
            except subprocess.TimeoutExpired:
                child.process.kill()

    def _start_ready(self) -> None:
        for name in list(self.waiting):
            if self._stop is not None:
                return
            parents = self.graph.nodes[name].parents
            if broken := [parent for parent in parents if parent in self.failed]:
                self.waiting.remove(name)
                self._fail(name, f"needs {broken[0]}, which failed")
            elif not any(p in self.waiting or p in self.running for p in parents):
                if (held := self._free(self.needs[name])) is not None:
                    self.waiting.remove(name)
                    self._start(name, held)

    def _free(self, count: int) -> tuple[str, ...] | None:
        """So many free devices, of a TPU a rectangle of chips; None where there are not."""
        ids = self.devices.ids
        free = [i for i in ids if not any(i in child.held for child in self.running.values())]
        if self.devices.platform == "tpu" and 1 < count < len(ids):
            blocks = [ids[at: at + count] for at in range(0, len(ids) - count + 1, count)]
            return next((block for block in blocks if set(block) <= set(free)), None)
        return tuple(free[:count]) if count <= len(free) else None

    def _start(self, name: str, held: tuple[str, ...]) -> None:
        log = self.logs / f"{name}.log"
        runlog.make_folder(log.parent, "config.logs")
        cores = _cores()
        if self.devices.platform == "cpu" and held and hasattr(os, "sched_setaffinity"):  # a process takes over its parent's cores
            share = len(cores) // len(self.devices.ids)
            own = [core for i in held for core in cores[int(i) * share: (int(i) + 1) * share]]
            os.sched_setaffinity(0, own or cores)
        try:
            with open(log, "ab") as out:
                offset = out.tell()
                environ = environment(self.devices, held) | {interrupts.PARENT: str(os.getpid())}
                process = subprocess.Popen(schedule.command(self.graph.root, name), stdout=out, stderr=subprocess.STDOUT, env=environ,
                                           stdin=subprocess.DEVNULL, start_new_session=True)  # Ctrl-C is for the pool
        finally:
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, cores)
        self.tries[name] += 1
        self.running[name] = _Child(process, held, log, offset, time.monotonic())
        where = f" on {self.devices.platform} {','.join(held)}" if held else ""
        say(f"started  {name}{where}{', again' if self.tries[name] > 1 else ''}")

    def _collect(self) -> None:
        for name, child in list(self.running.items()):
            code = child.process.poll()
            if code is None:
                continue
            del self.running[name]
            seconds = clock(time.monotonic() - child.begin)
            path = self.graph.root / name
            if code == 0 and runlog.state(path) == "done":
                self.done.append(name)
                say(f"done     {name}: {outcomes.summary(read_json(path / 'results.json'))} ({seconds}); {self._counts()}")
            elif self._stop is not None:
                self.waiting.append(name)
            elif code == interrupts.RESTARTABLE and self.tries[name] < TRIES:
                self.waiting.insert(0, name)
            else:
                self._fail(name, f"{_why(code, child)}; log: {child.log}")

    def _fail(self, name: str, why: str) -> None:
        self.failed[name] = why
        say(f"failed   {name}: {why}")

    def _counts(self) -> str:
        made, left = (sum(self.work[n] for n in names) for names in (self.done, [*self.waiting, *self.running]))
        passed = time.monotonic() - self._begin
        parts = [f"{len(self.done)} of {self.total} done", f"{len(self.running)} running", f"{len(self.failed)} failed"]
        return ", ".join(parts + ([f"about {clock(passed * left / made)} left"] if made and left and self._stop is None else []))


def _why(code: int, child: _Child) -> str:
    """What a process that failed said last, or what ended it."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return schedule.last_words(child.log, child.offset) or f"exit code {code}"
