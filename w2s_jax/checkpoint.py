"""Orbax checkpoints of a run: `params`, `opt_state` (with the loss's state), `rng` and `meta` as separate items.

Saving is asynchronous; a save that is killed leaves a temporary folder and the last good step. Restoring
takes the shardings of the caller's mesh, whatever mesh or number of processes the checkpoint was written by. Labelling
restores `params` alone. Of several processes all call everything here together: each writes and reads its own parts.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from etils import epath

from w2s_jax import distributed, interrupts
from w2s_jax.errors import UserError
from w2s_jax.files import is_object_store

FOLDER = "checkpoints"


@contextlib.contextmanager
def uninterrupted():
    """Ctrl-C and SIGTERM wait for the end of the block, a second Ctrl-C does not: interrupted, Orbax's saving threads lose their event
    loops."""
    with interrupts.deferred(), _without_ctrl_c():
        yield


@contextlib.contextmanager
def _without_ctrl_c():
    usual = signal.getsignal(signal.SIGINT)
    if not callable(usual) or threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = []

    def handler(number, frame):
        pressed.append(number)
        if len(pressed) > 1:
            usual(number, frame)

    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if pressed:
        signal.raise_signal(signal.SIGINT)


class Checkpoints:
    """The checkpoints of one run directory; `read_only` for who does not write the run, which may be going on elsewhere."""

    def __init__(self, workdir, keep: int = 2, read_only: bool = False, folder: str = FOLDER):
        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax logs every save at INFO and WARNING
        place = epath.Path(workdir) / folder
        self._folder = place if is_object_store(place) else epath.Path(Path(place).absolute())  # Orbax refuses a relative one
        self._keep, self._read_only = keep, read_only
        self._manager = None

    @property
    def manager(self) -> ocp.CheckpointManager:
        if self._manager is None:
            own = {"max_to_keep": self._keep, "create": True, "cleanup_tmp_directories": True}
            options = ocp.CheckpointManagerOptions(enable_async_checkpointing=True, **({"read_only": True} if self._read_only else own))
            handlers = {"params": ocp.StandardCheckpointHandler(), "opt_state": ocp.StandardCheckpointHandler(),
                        "rng": ocp.ArrayCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}  # else it can't tell what a step holds
            self._manager = ocp.CheckpointManager(str(self._folder), options=options, item_handlers=handlers)
        return self._manager

    def steps(self) -> list[int]:
        """Finished steps, newest first; an empty list where nothing was saved."""
        if not distributed.once(self._folder.exists, "checkpoints"):
            return []
        manager = self.manager  # made by all processes together
        return distributed.once(lambda: sorted(manager.all_steps(), reverse=True), "steps")

    @uninterrupted()
    def save(self, step: int, *, params, opt_state=None, rng=None, meta: dict) -> None:
        """Start saving `step` (number of finished updates); returns before the files are written."""
        items = {"params": ocp.args.StandardSave(params), "meta": ocp.args.JsonSave(meta)}
        if opt_state is not None:
            items["opt_state"] = ocp.args.StandardSave(opt_state)
            items["rng"] = ocp.args.ArraySave(rng)
        if step in self.manager.all_steps():  # a finished run replaces its last step by one without optimizer state
            self.wait()
            self.manager.delete(step)
        self.manager.save(step, args=ocp.args.Composite(**items), force=True)

    def meta(self, step: int) -> dict:
        return self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(self, step: int, params, opt_state=None):
        """`(params, opt_state)` of a step; arguments are trees of `ShapeDtypeStruct` with shardings.

        Raises:
          UserError: the checkpoint holds other parameters, shapes or dtypes, or cannot be read.
        """
        items = {"params": ocp.args.StandardRestore(params)}
        if opt_state is not None:
            items["opt_state"] = ocp.args.StandardRestore(opt_state)
        problem, cause = "", None
        try:
            found = self.manager.item_metadata(step)["params"]
            held = {jax.tree_util.keystr(p): (tuple(m.shape), str(m.dtype)) for p, m in
                    jax.tree_util.tree_flatten_with_path(found.tree if hasattr(found, "tree") else found)[0]}
            out = self.manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # orbax raises many kinds for a damaged checkpoint; all mean the same to the user
            problem, cause = (str(error).strip() or type(error).__name__).splitlines()[0][:200], error
        if problem := next(filter(None, distributed.everywhere("restored", problem)), ""):
            raise UserError(f"checkpoint {self._folder / str(step)} cannot be read: {problem}") from cause
        for path, want in jax.tree_util.tree_flatten_with_path(params)[0]:  # orbax casts dtypes in silence
            have = held.get(jax.tree_util.keystr(path))
            if have is not None and have != (tuple(want.shape), str(want.dtype)):
                raise UserError(f"checkpoint {self._folder / str(step)}: {jax.tree_util.keystr(path)} is {have[1]}{list(have[0])}, "
                                f"expected {want.dtype}{list(want.shape)}")
        return out["params"], out.get("opt_state") if opt_state is not None else None

    @uninterrupted()
    def wait(self) -> None:
        """Until every save that was started is on disk."""
        if self._manager is not None:
            self._manager.wait_until_finished()

    @uninterrupted()
    def keep_only(self, steps: set[int]) -> None:
        """Delete all other steps."""
        self.wait()
        for step in self.manager.all_steps():
            if step not in steps:
                self.manager.delete(step)

    def clear(self) -> None:
        self.close()
        distributed.once(lambda: self._folder.rmtree() if self._folder.exists() else None, "clear")

    @uninterrupted()
    def close(self) -> None:
        if self._manager is not None:
            self._manager.wait_until_finished()
            self._manager.close()
            self._manager = None


def abstract(tree, shardings):
    """`ShapeDtypeStruct`s with the given shardings, as `Checkpoints.restore` takes them."""
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, shardings)
