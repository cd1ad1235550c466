"""Ctrl-C and SIGTERM: no signal gets lost or crashes the program, and SIGTERM lets a training run save first.

Batch systems and preemptible machines send SIGTERM some seconds to minutes before they kill. Exit code RESTARTABLE tells them that
the same command goes on.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading

RESTARTABLE = 75  # EX_TEMPFAIL of sysexits.h
PARENT = "W2S_PARENT"  # environment variable: the process without which this one is to end (see `follow_parent`)

_requested = threading.Event()
_depth = 0  # of blocks that put SIGTERM off
_raised = False


class Stopped(KeyboardInterrupt):
    """SIGTERM has come. The message, if there is one, says where the same command goes on."""


def requested() -> bool:
    """Whether SIGTERM has come."""
    return _requested.is_set()


@contextlib.contextmanager
def deferred():
    """SIGTERM is only noted inside of the block (`requested`); where it still counts at its end, `Stopped` is raised there."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
    if _requested.is_set() and not _depth:
        stop()


def stop(goes_on: str = "") -> None:
    """Raises `Stopped`, once: a second SIGTERM must not interrupt what closes files and gives claims back."""
    global _raised
    if not _raised:
        _raised = True
        raise Stopped(goes_on)


def follow_parent() -> None:
    """Linux: SIGTERM comes to this process when the one that PARENT names, its parent, dies: nobody else would end it.

    A pool that is killed so takes its runs along, and the next one finds them free.
    """
    parent = os.environ.pop(PARENT, "")
    if not parent or not sys.platform.startswith("linux"):
        return
    import ctypes

    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):  # it died before
        os.kill(os.getpid(), signal.SIGTERM)


def install() -> None:
    """Take over SIGINT and SIGTERM in this process.

    One that comes while an extension module loads, or where exceptions are dropped, is repeated soon: jaxlib ends in a segmentation
    fault where its loading is interrupted, and jax has a callback of the garbage collector.
    """
    dropped = sys.unraisablehook

    def later(number: int) -> None:
        timer = threading.Timer(0.05, _thread.interrupt_main, (number,))
        timer.daemon = True
        timer.start()

    def handler(number, frame):
        if number == signal.SIGTERM:
            _requested.set()
            if _depth:
                return
        at = frame
        while at is not None and not at.f_code.co_qualname.startswith("ExtensionFileLoader."):
            at = at.f_back
        if at is not None:
            later(number)
        elif number == signal.SIGTERM:
            stop()
        else:
            signal.default_int_handler(number, frame)

    def hook(unraisable):
        global _raised
        if issubclass(unraisable.exc_type, Stopped):
            _raised = False
            later(signal.SIGTERM)
        elif issubclass(unraisable.exc_type, KeyboardInterrupt):
            later(signal.SIGINT)
        else:
            dropped(unraisable)

    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)
    sys.unraisablehook = hook
