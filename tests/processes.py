"""Real processes of the command line on this machine, as a launcher starts them: what the tests of several processes share."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import tiny
from conftest import DEVICES, ROOT

FAST = " ".join(f"--{key}={str(value).lower()}" for key, value in tiny.FAST.items())


def live(argv: list[str], log: str, environment: dict[str, str]) -> None:
    """A process's whole life: the command line `argv`; stdout and stderr to `<log>.out` and `<log>.err`."""
    for number, end in ((1, "out"), (2, "err")):
        with open(f"{log}.{end}", "w") as stream:
            os.dup2(stream.fileno(), number)
    os.environ.update(environment)
    from w2s_jax import main

    if environment.get("COUNTS"):
        count(Path(environment["COUNTS"]))
    sys.argv = ["w2s", *argv]
    main.cli()


def count(file: Path) -> None:
    """From now on `file` says how many bytes of weights this process has read, places for tokens made, files hashed."""
    from w2s_jax import hub
    from w2s_jax.data import packing
    from w2s_jax.models import weights

    counts = {"weights": 0, "tokens": 0, "fingerprints": 0}

    def counted(key, function, size):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            counts[key] += size(result)
            file.write_text(json.dumps(counts))
            return result
        return call

    hub.fingerprint_file = counted("fingerprints", hub.fingerprint_file, lambda _: 1)
    weights.Checkpoint.read = counted("weights", weights.Checkpoint.read, lambda array: array.nbytes)
    packing._fill = counted("tokens", packing._fill, lambda batch: batch["tokens"].size)


class Job:
    """Processes that were started together; `logs` = a prefix for their files."""

    def __init__(self, started: list, logs: list[str]):
        self.processes, self._logs = started, logs

    def wait(self, seconds: float = 300) -> list[int]:
        """Their exit codes; those that do not end in time are killed and fail the test."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(end - time.monotonic(), 0.1))
        late = [number for number, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
            process.join()
        assert not late, f"processes {late} did not end\n{self.text()}"
        return [process.exitcode for process in self.processes]

    def done(self, seconds: float = 300) -> "Job":
        """All ended well."""
        codes = self.wait(seconds)
        assert codes == [0] * len(codes), f"{codes}\n{self.text()}"
        return self

    def out(self, number: int = 0) -> str:
        return self._read(number, "out")

    def err(self, number: int = 0) -> str:
        return self._read(number, "err")

    def _read(self, number: int, end: str) -> str:
        file = Path(f"{self._logs[number]}.{end}")
        return file.read_text() if file.exists() else ""

    def text(self) -> str:
        return "\n".join(f"--- process {n}\n{self.out(n)[-1500:]}{self.err(n)[-3000:]}" for n in range(len(self.processes)))

    def until(self, moment, seconds: float = 200) -> "Job":
        """Waits for `moment()` while all live."""
        end = time.monotonic() + seconds
        while not moment():
            assert all(process.is_alive() for process in self.processes) and time.monotonic() < end, self.text()
            time.sleep(0.005)
        return self

    def signal(self, number: int, what=signal.SIGKILL) -> "Job":
        os.kill(self.processes[number].pid, what)
        return self


def port() -> int:
    """A port of this machine that is free, and the next ones most likely too."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return 10000 + sock.getsockname()[1] % 10000


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """`launch(n, *argv, devices=1, only=None, **environment)` -> Job of `n` processes with `devices` fake ones each, forked from one
    that has the imports behind it; `only`: the numbers of those that are started. `{i}` in a flag stands for the number."""
    folder = tmp_path_factory.mktemp("processes")
    cache = folder / "cache"
    environment = {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "XLA_FLAGS": ""}
    before = {key: os.environ.get(key) for key in environment}
    os.environ.update(environment)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["w2s_jax.stages.finetune", "w2s_jax.stages.label", "w2s_jax.stages.pretrain", "processes"])
    started, jobs = [], []

    def start(n: int, *argv, devices: int = 1, only=None, flags: bool = True, **extra) -> Job:
        at, logs = port(), []
        for number in range(n):
            own = [f"--coordinator=127.0.0.1:{at}", f"--num_processes={n}", f"--process_id={number}"] if n > 1 and flags else []
            logs.append(str(folder / f"{len(jobs)}.{number}"))
            more = {key: value.format(i=number) for key, value in extra.items()}
            arguments = [*(str(word).replace("{i}", str(number)) for word in argv), *own]
            process = context.Process(target=live, args=(arguments, logs[-1], {"XLA_FLAGS": f"{DEVICES}={devices} {FAST}", **more}))
            if only is None or number in only:
                process.start()
                started.append(process)
            else:
                logs.pop()
        jobs.append(Job(started[len(started) - len(logs):], logs))
        return jobs[-1]

    yield start
    for process in started:
        if process.is_alive():
            process.kill()
    for key, value in before.items():
        os.environ.pop(key) if value is None else os.environ.__setitem__(key, value)
