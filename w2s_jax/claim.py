"""The right to write a run directory: one process at a time, also between hosts."""

from __future__ import annotations

import json
import os
import socket
import threading
import time

from etils import epath

from w2s_jax.errors import UserError
from w2s_jax.files import dumps, is_object_store, write_text
from w2s_jax.progress import say

HEARTBEAT_SECONDS = 60.0  # object stores have no locks: a claim there is alive while its record is younger than 5 of these


def _owner(path: epath.Path) -> dict:
    """The record of who holds the claim; empty where there is none or it cannot be read."""
    try:
        return json.loads((path / ".owner").read_text())
    except (OSError, ValueError):
        return {}


def _held_by(owner: dict) -> str:
    return f"host {owner['host']}, pid {owner['pid']}" if "pid" in owner else "another process"


class Claim:
    """The right to write a run directory, given back by `release` and by the death of the process.

    Locally a kernel lock on `.lock`, which also works between hosts on file systems that carry locks. On an object store
    a record that its owner renews; it counts as abandoned after five missed renewals.
    """

    def __init__(self, path: epath.Path, wait: bool):
        self.path, self._lock, self._stop = path, None, threading.Event()
        me = {"host": socket.gethostname(), "pid": os.getpid()}
        (self._claim_object if is_object_store(path) else self._claim_file)(me, wait)
        self._record(me)

    def _record(self, me: dict) -> None:
        write_text(self.path / ".owner", dumps({**me, "time": time.time()}))

    def _refuse(self, owner: dict):
        raise UserError(f"--workdir={self.path}: is being written by {_held_by(owner)}; wait for it, stop it, or choose another directory")

    def _claim_file(self, me: dict, wait: bool) -> None:
        import filelock

        self._lock = filelock.FileLock(os.fspath(self.path / ".lock"), thread_local=False)
        try:
            self._lock.acquire(timeout=0.5)  # `w2s status` may hold it for a moment
        except filelock.Timeout:
            owner = _owner(self.path)
            if not wait:
                self._refuse(owner)
            say(f"{self.path}: waiting for {_held_by(owner)}")
            self._lock.acquire()

    def _claim_object(self, me: dict, wait: bool) -> None:
        said = False
        while time.time() - (owner := _owner(self.path)).get("time", 0.0) < 5 * HEARTBEAT_SECONDS:
            if not wait:
                self._refuse(owner)
            if not said:
                say(f"{self.path}: waiting for {_held_by(owner)}")
            said = True
            time.sleep(min(HEARTBEAT_SECONDS, 10.0))

        def renew():
            while not self._stop.wait(HEARTBEAT_SECONDS):
                self._record(me)

        threading.Thread(target=renew, name="w2s-claim", daemon=True).start()

    def release(self) -> None:
        """Gives the claim back; safe to call twice."""
        if self._stop.is_set():
            return
        self._stop.set()
        (self.path / ".owner").unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.release()


def held(path) -> bool:
    """Whether a living process holds the claim on `path`, as far as can be seen from here."""
    path = epath.Path(path)
    owner = _owner(path)
    if is_object_store(path) or not owner:
        return bool(owner) and time.time() - owner.get("time", 0.0) < 5 * HEARTBEAT_SECONDS
    import filelock

    lock = filelock.FileLock(os.fspath(path / ".lock"))
    try:
        lock.acquire(timeout=0)
    except OSError:  # held (Timeout is an OSError), or a directory that we may not write
        return True
    lock.release()
    return False
