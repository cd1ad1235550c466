"""A process's way to the service of jax in process 0, which does not break when process 0 dies.

jax's client ends its process with some lines of C++ as soon as its connection closes, mostly before anything here has noticed the
loss. So it connects to a port of its own process, where threads pass the bytes on; they keep its end open, whatever happens to the other.
"""

from __future__ import annotations

import socket
import threading

_open: list[socket.socket] = []  # a socket that nothing refers to closes


def start(host: str, port: int) -> int:
    """Opens a port on the loopback interface that stands for `host:port`, and returns its number."""
    listener = socket.create_server(("127.0.0.1", 0))
    _open.append(listener)
    _thread(_accept, listener, host, port)
    return listener.getsockname()[1]


def _thread(function, *args) -> None:
    threading.Thread(target=function, args=args, name="w2s-relay", daemon=True).start()


def _accept(listener: socket.socket, host: str, port: int) -> None:
    while True:
        near, _ = listener.accept()
        try:
            far = socket.create_connection((host, port))
        except OSError:  # not there yet: the client tries again
            near.close()
            continue
        for sock in (near, far):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _open.extend((near, far))
        _thread(_pass_on, near, far, True)
        _thread(_pass_on, far, near, False)


def _pass_on(source: socket.socket, target: socket.socket, close: bool) -> None:
    """Until the source ends; the target is told if `close`."""
    try:
        while data := source.recv(1 << 16):
            target.sendall(data)
        if close:
            target.shutdown(socket.SHUT_WR)
    except OSError:
        pass
