"""The processes of a job find each other before jax does: process 0 listens, the others connect, and all learn who is missing.

The sockets stay open (`distributed` watches them). A connection begins with one line of JSON each way; a foreign program, or another
job, on a port of ours is noticed by it, and both sides go on to the next port of the job.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import threading
import time

from w2s_jax.errors import UserError
from w2s_jax.launchers import Job

REPLY_SECONDS = 3.0  # within which a process 0 of ours answers
_LONGEST = 1 << 20  # bytes of a first line


@dataclasses.dataclass
class Peer:
    """The other end of a connection. `left`: it has said goodbye. `early`: what it said behind the roll call, to be handled first."""

    process: int
    sock: socket.socket
    host: str
    pid: int
    buffer: bytes = b""
    left: bool = False
    early: list[dict] = dataclasses.field(default_factory=list)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def send(self, message: dict) -> None:
        """A peer that is gone gets nothing: whoever reads from it notices."""
        with self.lock, contextlib.suppress(OSError):
            self.sock.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict] | None:
        """The messages that have come; waits for at least a part of one. None = the connection is closed."""
        try:
            data = self.sock.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            return None
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        return [json.loads(line) for line in lines]


def gather(job: Job, about: dict, seconds: float) -> dict[int, Peer]:
    """The other processes as this one talks to them, by number: all of them in process 0, process 0 alone in the others.

    Args:
      about: what must be the same everywhere, text by name.
      seconds: how long to wait for the others.

    Raises:
      UserError: a process is missing when the time is over, or its `about` differs.
    """
    return _listen(job, about, seconds) if job.process == 0 else _connect(job, about, seconds)


def free_port(host: str) -> int:
    """A port that nobody uses here now."""
    with contextlib.closing(_socket(host)) as sock:
        sock.bind((bind_address(host), 0))
        return sock.getsockname()[1]


def _socket(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)


def bind_address(host: str) -> str:
    """Where to listen as `host`: everywhere (""), but of a job on one machine nobody outside can connect."""
    return "127.0.0.1" if host == "localhost" else host if host.startswith("127.") or host == "::1" else ""


def _keep_alive(sock: socket.socket) -> None:
    """A host that vanishes without a word is noticed after half a minute."""
    sock.setblocking(True)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 30_000)):
        if hasattr(socket, name):  # Linux has them all
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def numbers(processes) -> str:
    """`process 2`, `processes 1, 2 and 7`."""
    some = [str(p) for p in sorted(processes)]
    if len(some) == 1:
        return f"process {some[0]}"
    shown = some if len(some) <= 12 else [*some[:10], f"{len(some) - 10} more"]
    return f"processes {', '.join(shown[:-1])} and {shown[-1]}"


# --------------------------------------------------------------------------- process 0


def _open(job: Job) -> socket.socket:
    problem = None
    for port in job.ports:
        listener = _socket(job.host)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port whose last user is gone may be taken at once
        try:
            listener.bind((bind_address(job.host), port))
            listener.listen(job.processes + 16)
        except OSError as error:
            problem = problem or error
            listener.close()
        else:
            return listener
    raise UserError(f"process 0 of {job.processes} ({job.launcher}): none of the ports {', '.join(map(str, job.ports))} is free here "
                    f"({problem.strerror if problem else 'none is named'}); expected another --coordinator=host:port")


def _listen(job: Job, about: dict, seconds: float) -> dict[int, Peer]:
    peers: dict[int, Peer] = {}
    end = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(contextlib.closing(_open(job)))
        selector = stack.enter_context(selectors.DefaultSelector())
        selector.register(listener, selectors.EVENT_READ)
        try:
            while len(peers) < job.processes - 1:
                if time.monotonic() > end:
                    missing = set(range(1, job.processes)) - set(peers)
                    raise UserError(f"{numbers(missing)} of {job.processes} ({job.launcher}) did not come to process 0 at {job.host}:"
                                    f"{listener.getsockname()[1]} within {seconds:g} s; expected all to be started together")
                for key, _ in selector.select(0.2):
                    if key.fileobj is listener:
                        sock, _ = listener.accept()
                        sock.settimeout(REPLY_SECONDS)
                        selector.register(sock, selectors.EVENT_READ, Peer(-1, sock, "", 0))
                    else:
                        _greet(job, about, key.data, peers, selector)
        except BaseException as error:
            line = str(error) if isinstance(error, UserError) else f"process 0 of {job.processes} stopped while the others were awaited"
            for peer in peers.values():
                peer.send({"refused": line})
                peer.sock.close()
            raise
        finally:
            for key in list(selector.get_map().values()):
                if isinstance(key.data, Peer) and key.data.process < 0:
                    key.data.sock.close()
    for peer in peers.values():
        _keep_alive(peer.sock)
        peer.send({"complete": True})
    return peers


def _greet(job: Job, about: dict, peer: Peer, peers: dict[int, Peer], selector) -> None:
    """Reads from a connection: its first line, or its end."""
    try:
        messages = peer.receive()
    except ValueError:  # no JSON: no process of ours
        messages = None
    if messages is None or (peer.process < 0 and len(peer.buffer) > _LONGEST):
        selector.unregister(peer.sock)
        peer.sock.close()
        if peer.process >= 0:  # it may come again
            peers.pop(peer.process)
        return
    for message in messages:
        process = message.get("process") if isinstance(message, dict) else None
        mine = isinstance(process, int) and message.get("token") == job.token and 0 < process < job.processes and process not in peers
        if not mine:
            selector.unregister(peer.sock)
            peer.send({"other": True})
            peer.sock.close()
            return
        peer.process, peer.host, peer.pid = process, str(message.get("host")), int(message.get("pid") or 0)
        peers[process] = peer
        for key, here in about.items():
            if (there := (message.get("about") or {}).get(key)) != here:
                raise UserError(f"process {process} of {job.processes} (host {peer.host}) was started with {key} {_short(there, here)}, "
                                f"process 0 with {_short(here, there)}; expected the same everywhere")
        peer.send({"seen": job.token, "host": socket.gethostname(), "pid": os.getpid()})


def _short(text: str | None, other: str | None) -> str:
    """The words of a text that the other has not; the text where there are none."""
    words = [word for word in str(text).split(" ") if word not in str(other).split(" ")]
    return repr(" ".join(words)[:200]) if words else repr(str(text)[:200])


# --------------------------------------------------------------------------- the others


def _connect(job: Job, about: dict, seconds: float) -> dict[int, Peer]:
    hello = {"token": job.token, "process": job.process, "host": socket.gethostname(), "pid": os.getpid(), "about": about}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for port in job.ports:
            if (sock := _reach(job.host, port)) is None:
                continue
            peer = Peer(0, sock, "", 0)
            peer.send(hello)
            if _answered(job, peer, end):
                _keep_alive(sock)
                return {0: peer}
            sock.close()
        time.sleep(0.1)
    raise UserError(f"process {job.process} of {job.processes} ({job.launcher}): process 0 did not answer at {job.host}:{job.ports[0]} "
                    f"within {seconds:g} s; expected all to be started together, and that address to be reachable from here")


def _reach(host: str, port: int) -> socket.socket | None:
    try:
        sock = socket.create_connection((host, port), timeout=2.0)
    except OSError:
        return None
    if sock.getsockname() == sock.getpeername():  # on loopback, a connection to a free port may find itself
        sock.close()
        return None
    return sock


def _answered(job: Job, peer: Peer, end: float) -> bool:
    """Waits until process 0 has seen all; False where this is no process 0 of this job, or it went away."""
    peer.sock.settimeout(REPLY_SECONDS)
    while True:
        try:
            messages = peer.receive()
        except ValueError:
            return False
        for number, message in enumerate(messages or ()):
            if not isinstance(message, dict) or "other" in message:
                return False
            if "refused" in message:
                raise UserError(message["refused"])
            if message.get("seen") == job.token:
                peer.host, peer.pid = message["host"], message["pid"]
                # Process 0 tells when its own time is over; a margin for one that has vanished.
                peer.sock.settimeout(max(end - time.monotonic(), 0) + 60)
            if "complete" in message and peer.pid:
                peer.early = messages[number + 1:]
                return True
        if messages is None:
            return False
