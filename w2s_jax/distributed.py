"""Several processes as one run: what process 0 decides, the others follow; what one of them loses, ends all.

Process 0 keeps a connection to every other process (`rollcall`). Over it go decisions (`once`), meetings (`barrier`), SIGTERM (`due`)
and ends: a process that dies closes its connection, and the others stop with one line instead of waiting in a collective. Arrays
go through jax (`mesh.put`, `mesh.fetch`). With one process nothing here does anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import sys
import threading
import time
from collections.abc import Callable, Mapping

from w2s_jax import interrupts, relay, rollcall
from w2s_jax.errors import UserError
from w2s_jax.launchers import Job

LOST = 3  # exit code where another process of the job is gone
GRACE_SECONDS = 5.0  # within which all processes meet an error of the user's that is everybody's
START_SECONDS = 60.0

_group: _Group | None = None


def processes() -> int:
    """Processes of this run."""
    return _group.job.processes if _group else 1


def is_main() -> bool:
    """Whether this is process 0, which writes and prints."""
    return _group is None or _group.job.process == 0


def join(job: Job, about: Mapping[str, str], seconds: float = START_SECONDS) -> None:
    """Find the other processes of the job and begin to watch them. `about`: what must be the same in all of them.

    Raises:
      UserError: a process is missing after `seconds`, or was started differently.
    """
    global _group
    assert _group is None, "a process joins one job"
    _group = _Group(job, rollcall.gather(job, dict(about), seconds))


def initialize_jax(environ: Mapping[str, str] = os.environ) -> None:
    """`jax.distributed` for the processes of the job, on a port that process 0 finds free. UserError where they do not connect."""
    import jax

    if _group is None:
        return
    job = _group.job
    barrier("devices")  # jax waits for the others too, but aborts where that takes long
    port = once(lambda: rollcall.free_port(job.host), "port")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM over (see `due`)
    jax.config.update("jax_check_proxy_envs", False)
    os.environ["no_grpc_proxy"] = ",".join(filter(None, (os.environ.get("no_grpc_proxy"), "127.0.0.1")))
    inside = rollcall.bind_address(job.host)
    listens = f"[{inside or '::'}]" if ":" in job.host else inside or "0.0.0.0"
    here = inside or ("::1" if ":" in job.host else "127.0.0.1")
    own = relay.start(here if job.process == 0 else _group.peers[0].sock.getpeername()[0], port)
    _divert_stdout()
    try:
        jax.distributed.initialize(
            f"127.0.0.1:{own}", job.processes, job.process, local_device_ids=_own_devices(job, environ),
            cluster_detection_method="deactivate", coordinator_bind_address=f"{listens}:{port}", initialization_timeout=60,
            shutdown_timeout_seconds=60)
    except (ValueError, RuntimeError) as error:
        line = str(error).splitlines()[0]
        raise UserError(f"process {job.process} of {job.processes}: jax.distributed at {job.host}:{port}: {line}") from error
    _group.uses_jax = True


def _divert_stdout() -> None:
    """What C++ prints there (Gloo says whom it found) goes nowhere: stdout is for what Python prints."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)


def _own_devices(job: Job, environ: Mapping[str, str]) -> list[int] | None:
    """Numbers of the GPUs that this process uses, None = all that it sees.

    Several processes on a host take one each, unless the launcher has given each its own.
    """
    if job.local is None or job.local[1] == 1 or environ.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    visible = environ.get("CUDA_VISIBLE_DEVICES") or environ.get("ROCR_VISIBLE_DEVICES") or ""
    bound = any(environ.get(name) for name in ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_GPU_BIND"))
    return None if visible and (bound or "," not in visible) else [job.local[0]]


def once(function: Callable, name: str = "", meanwhile: Callable | None = None):
    """What `function` returns in process 0, in every process: a value that JSON can hold. The other processes call `meanwhile`.

    A UserError of process 0 is raised in all. What `function` itself calls of this module concerns process 0 alone.
    """
    if _group is None or _group.alone:
        return function()
    return _group.once(function, name or getattr(function, "__qualname__", "once"), meanwhile)


def everywhere(name: str, value=True) -> list:
    """Every process's `value` (JSON), in their order; returns when all have come."""
    return [value] if _group is None or _group.alone else _group.exchange(name, value)


def barrier(name: str) -> None:
    """Returns when all processes have come."""
    everywhere(name)


def due(boundary: int) -> bool:
    """Whether a training run is to be saved and ended here, because SIGTERM has come to one of its processes.

    To be asked before each dispatch, with its number in this attempt: all processes get True at the same one.
    """
    return interrupts.requested() if _group is None else _group.due(boundary)


def confirm(error: UserError) -> None:
    """To be called with a UserError that is to be handled: returns where every process has one; else the job ends with it."""
    if _group is not None and not _group.alone:
        _group.confirm(str(error))


def settle(seconds: float = 3.0) -> None:
    """To be called with an unexpected error: its cause may be that another process is gone, which then ends this one."""
    if _group is not None and not _group.alone:
        time.sleep(seconds)


def leave() -> None:
    """The end of a job that went well, for all processes together."""
    global _group
    if _group is not None:
        _group.leave()
        _group = None


def end(code: int, line: str) -> int:
    """Prints the line that a command ends with and returns its exit code; ends the other processes too, and then does not return."""
    if _group is None:
        print(line, file=sys.stderr)
    else:
        _group.end(code, line)
    return code


class _Group:
    """The job of this process. A thread of its own reads what the others say."""

    def __init__(self, job: Job, peers: dict[int, rollcall.Peer]):
        self.job, self.peers, self.main = job, peers, job.process == 0
        self.alone = self.uses_jax = False
        self._calls = 0  # of once and exchange, so that answers are not mixed up
        self._said: queue.SimpleQueue = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._arrived: dict[int, dict[int, tuple]] = {}
        self._failed: dict[int, tuple[float, int, str]] = {}
        self._ending = threading.Lock()
        self._stop_at: int | None = None
        self._stop_asked, self._stop_told = False, set()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="w2s-processes", daemon=True)
        self._thread.start()

    def _who(self, process: int) -> str:
        peer = self.peers.get(process)
        return f"process {process} of {self.job.processes}" + (f" (host {peer.host}, pid {peer.pid})" if peer else "")

    def _tell(self, message: dict) -> None:
        for peer in self.peers.values():
            peer.send(message)

    # decisions and meetings

    def once(self, function: Callable, name: str, meanwhile: Callable | None):
        self._calls += 1
        if not self.main:
            if meanwhile is not None:
                meanwhile()
            return self._hear(name)
        from w2s_jax.files import plain

        self.alone = True
        try:
            value = json.dumps(function(), default=plain)
        except UserError as error:
            self._tell({"said": self._calls, "name": name, "error": str(error)})
            raise
        finally:
            self.alone = False
        self._tell({"said": self._calls, "name": name, "value": value})
        return json.loads(value)

    def exchange(self, name: str, value) -> list:
        self._calls += 1
        if not self.main:
            self.peers[0].send({"here": self._calls, "name": name, "value": value})
            return self._hear(name)
        call, others = self._calls, len(self.peers)
        with self._changed:
            self._changed.wait_for(lambda: len(self._arrived.get(call, ())) == others)
            arrived = self._arrived.pop(call)
        for process, (theirs, _) in arrived.items():
            if theirs != name:
                raise RuntimeError(f"process 0 is at {name!r}, process {process} at {theirs!r}")
        values = [value, *(arrived[process][1] for process in sorted(arrived))]
        self._tell({"said": call, "name": name, "value": json.dumps(values)})
        return values

    def _hear(self, name: str):
        while True:
            message = self._said.get()
            if message["said"] >= self._calls:  # others were for a call that an error cut short
                break
        if (message["said"], message.get("name")) != (self._calls, name):
            raise RuntimeError(f"process {self.job.process} is at {name!r}, process 0 at {message.get('name')!r}")
        if "error" in message:
            raise UserError(message["error"])
        return json.loads(message["value"])

    # errors and ends

    def confirm(self, line: str) -> None:
        if not self.main:
            self.peers[0].send({"failed": 2, "line": f"error: {line}"})
            while "all_failed" not in (message := self._said.get()):
                pass
            self._calls = message["all_failed"]
            return
        with self._changed:
            together = self._changed.wait_for(lambda: len(self._failed) == len(self.peers), GRACE_SECONDS)
            self._failed.clear()
            self._arrived.clear()
        if not together:
            self.end(2, f"error: {line}")
        self._tell({"all_failed": self._calls})

    def end(self, code: int, line: str, all_say: bool = False) -> None:
        """Ends this process and all others, in any thread. The line is printed by process 0, or by all."""
        if not self.main and not all_say:
            self.peers[0].send({"failed": code, "line": line})
            time.sleep(2 * GRACE_SECONDS)  # process 0 ends this one
        self._ending.acquire()  # for good: one thread ends the process
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            print(line, file=sys.stderr, flush=True)
        if self.main:
            self._tell({"end": code, "line": line if all_say else ""})
        os._exit(code)

    def leave(self) -> None:
        self.exchange("leave", None)
        if self.uses_jax:
            import jax

            jax.distributed.shutdown()
        self._tell({"bye": True})
        self._closing.set()
        self._thread.join()
        for peer in self.peers.values():
            peer.sock.close()

    # SIGTERM

    def due(self, boundary: int) -> bool:
        # A process dispatches a step after it has read the metrics of the one before the last, which all had to compute: while
        # process 0 stands before dispatch b, nobody has begun more than b + 1. So b + 2 can be named, once all have heard it.
        if self.main and self._stop_at is None and (self._stop_asked or interrupts.requested()):
            self._stop_at = boundary + 2
            self._tell({"stop": self._stop_at})
            with self._changed:
                self._changed.wait_for(lambda: len(self._stop_told) == len(self.peers))
        return self._stop_at is not None and boundary >= self._stop_at

    # the thread

    def _run(self) -> None:
        try:
            self._watch()
        except Exception as error:  # unwatched, the others would wait for this process
            self.end(1, f"error: {self._who(self.job.process)}: {type(error).__name__}: {error}", all_say=True)

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        for peer in self.peers.values():
            selector.register(peer.sock, selectors.EVENT_READ, peer)
        for peer in self.peers.values():
            for message in peer.early:
                self._handle(peer, message)
        asked = False
        while not self._closing.is_set():
            if not selector.get_map():  # all have said goodbye
                break
            for key, _ in selector.select(0.2):
                messages = key.data.receive()
                if messages is None:
                    selector.unregister(key.fileobj)
                    if not key.data.left:
                        self.end(LOST, f"error: {self._who(key.data.process)} is gone; this run stops, and the same command goes on from "
                                       "its last checkpoint", all_say=True)
                for message in messages or ():
                    self._handle(key.data, message)
            if not self.main and interrupts.requested() and not asked:
                asked = True
                self.peers[0].send({"stop_asked": True})
            if self.main:
                self._end_where_one_failed()

    def _handle(self, peer: rollcall.Peer, message: dict) -> None:
        if "said" in message or "all_failed" in message:
            self._said.put(message)
        elif "end" in message:
            self._ending.acquire()
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                if message["line"]:
                    print(message["line"], file=sys.stderr, flush=True)
            os._exit(message["end"])
        elif "stop" in message:
            self._stop_at = message["stop"]
            peer.send({"stop_told": True})
        elif "bye" in message:
            peer.left = True
        with self._changed:
            if "here" in message:
                self._arrived.setdefault(message["here"], {})[peer.process] = (message["name"], message["value"])
            elif "failed" in message:
                self._failed[peer.process] = (time.monotonic(), message["failed"], message["line"])
            elif "stop_asked" in message:
                self._stop_asked = True
            elif "stop_told" in message:
                self._stop_told.add(peer.process)
            self._changed.notify_all()

    def _end_where_one_failed(self) -> None:
        """An error of one other process that this one does not meet in time. Of a defect its own process tells more."""
        with self._changed:
            failed = min(((at, process, code, line) for process, (at, code, line) in self._failed.items()), default=None)
        if failed and time.monotonic() - failed[0] > (GRACE_SECONDS if failed[2] == 2 else 1.0):
            _, process, code, line = failed
            self.end(code, line.replace("error: ", f"error: {self._who(process)}: ", 1) if code == 2 else line)
