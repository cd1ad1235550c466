"""Linear probes with many classes, trained as openai/weak-to-strong's vision experiment does, many of them at once.

    lanes = [Lane("weak", 0, losses.make("xent", ground_truth=False)), Lane("truth", 0, losses.make("xent", ground_truth=True))]
    trained = train(features, {"weak": soft, "truth": classes}, lanes, test=test, references={"truth": y, "weak": soft_test.argmax(1)})
    trained.against["truth"]                          # test accuracy [lanes, epochs]

The recipe is that of `train_logreg` in `vision/run_weak_strong.py`: torch.nn.Linear's initialisation, Adam, a cosine without
warm-up stepped after every batch, batches reshuffled every epoch (the last, short one is kept), the mean cross-entropy of the batch.
What differs from lane to lane (labels, seed, loss, label noise) is an input of the program, not a part of it: all lanes of one loss
share one compiled epoch. Lanes of one seed share initialisation, order and noise, so that they can be compared in pairs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from w2s_jax import losses
from w2s_jax import mesh as mesh_lib
from w2s_jax.errors import UserError
from w2s_jax.probes import descent
from w2s_jax.probes.rows import Rows
from w2s_jax.probes.targets import Targets
from w2s_jax.progress import Progress

SCHEDULES = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: (1.0 + math.cos(math.pi * done)) / 2,
}
AT_ONCE = 16  # lanes that an accelerator trains in one dispatch; a CPU trains one, whose weights and moments then stay in its cache
BLOCK = 2**26  # numbers in the logits of one block of test rows, at most
_START, _ORDER = 0x57A7, 0x04DE  # streams of a lane's seed


@dataclasses.dataclass(frozen=True)
class Lane:
    """One probe.

    Attributes:
      labels: a key of `targets`.
      seed: of initialisation, order of the batches and noise.
      loss: as `losses.make` gives it.
      noise: the probability with which a training label is replaced by one of the other classes, drawn uniformly.
    """

    labels: str
    seed: int
    loss: losses.Loss
    noise: float = 0.0


@dataclasses.dataclass(frozen=True)
class Trained:
    """Lanes after their training.

    Attributes:
      lanes: as they were given.
      weights: float32 `[lanes, d, classes]`. bias: float32 `[lanes, classes]`.
      loss: mean training loss of every epoch, `[lanes, epochs]`. train_accuracy: how often the arg max was that of the (noisy) label.
      predictions: int32 `[lanes, epochs, m]`, the likeliest classes of the test rows after every epoch.
      against: of each reference the share of test rows where the prediction equals it, `[lanes, epochs]`.
      logits: of the test rows after the last epoch, float32 `[lanes, m, classes]`; None where they were not asked for.
    """

    lanes: tuple[Lane, ...]
    weights: np.ndarray
    bias: np.ndarray
    loss: np.ndarray
    train_accuracy: np.ndarray
    predictions: np.ndarray
    against: dict[str, np.ndarray]
    logits: np.ndarray | None


def train(features, targets: dict, lanes: Sequence[Lane], *, test=None, references: dict | None = None, epochs: int = 20,
          batch_size: int = 100, learning_rate: float = 1e-3, weight_decay: float = 0.0, schedule: str = "cosine",
          classes: int = 0, mesh=None, at_once: int = 0, label: str = "", logits: bool = True,
          resume: tuple[int, dict] | None = None, on_epoch: Callable[[Training], None] | None = None) -> Trained:
    """Trains every lane for `epochs`; the arguments are those of `Training`.

    Args:
      label: of the progress bar; "" = none.
      logits: whether to keep the last logits of the test rows: 4 bytes x lanes x m x classes.
      resume: finished epochs and the state that `Training.state` gave after them. The result is the same bit for bit.
      on_epoch: called after every epoch, so that the caller may write `training.state()` to a checkpoint.
    """
    training = Training(features, targets, lanes, test=test, references=references, epochs=epochs, batch_size=batch_size,
                        learning_rate=learning_rate, weight_decay=weight_decay, schedule=schedule, classes=classes, mesh=mesh,
                        at_once=at_once)
    if resume is not None:
        training.load(*resume)
    bar = Progress(training.work * epochs, start=training.work * training.done, label=label) if label else None
    try:
        while training.done < epochs:
            training.run_epoch(bar)
            if on_epoch is not None:
                on_epoch(training)
    finally:
        if bar is not None:
            bar.close()
    return training.result(logits)


class Training:
    """Lanes on their way, an epoch at a time.

    Args:
      features: `[n, d]`, finite; one copy is held on the device, in bfloat16 if they come so, else in float32, which is what is
        calculated with.
      targets: label sets by name: classes int `[n]`, or distributions `[n, classes]` (one-hot ones are taken as classes).
      lanes: at least one.
      test: `[m, d]`, predicted after every epoch; None = nothing.
      references: int `[m]` by name, what the predictions are compared with.
      epochs: passes over the rows. batch_size: rows a step. weight_decay: torch's, `weight_decay * parameter` added to the gradient.
      schedule: constant | linear | cosine (both to 0 after the last step).
      classes: their number, where labels are classes and the highest may be missing; 0 = as found.
      mesh: the devices; None = the first one. Lanes are spread over `data` x `fsdp` where their number (of one loss) divides, else
        each batch is.
      at_once: lanes of a device that are trained in one dispatch; 0 = as suits the device.

    Attributes:
      done: finished epochs.
      work: steps of all lanes together in an epoch.

    Raises:
      UserError: what does not fit together, or a value out of range.
    """

    def __init__(self, features, targets: dict, lanes: Sequence[Lane], *, test=None, references: dict | None = None, epochs: int = 20,
                 batch_size: int = 100, learning_rate: float = 1e-3, weight_decay: float = 0.0, schedule: str = "cosine",
                 classes: int = 0, mesh=None, at_once: int = 0):
        self._checks(lanes, epochs, batch_size, learning_rate, weight_decay, schedule)
        rows = Rows(features)
        rows.mean()  # finite
        self.lanes, self.targets = tuple(lanes), Targets(targets, rows.n, {lane.labels for lane in lanes}, classes)
        for lane in self.lanes:
            if lane.noise and self.targets.classes < 2:
                raise UserError(f"noise={lane.noise!r}: the labels have one class, expected another one to replace it by")
        self.mesh = mesh_lib.make_mesh({"data": 1, "fsdp": 1, "model": 1}, jax.devices()[:1]) if mesh is None else mesh
        self.epochs, self.decay = epochs, jnp.float32(weight_decay)
        self.n, self.d, self.batch = rows.n, rows.d, min(batch_size, rows.n)
        self.steps = -(-rows.n // self.batch)
        self.work, self.done, total = self.steps * len(self.lanes), 0, self.steps * epochs
        t = np.arange(1, total + 1, dtype=np.float64)
        rate = np.array([learning_rate * SCHEDULES[schedule](step / total) for step in range(total)])
        self._rates = np.float32(rate / (1 - descent.B1**t)).reshape(epochs, -1)
        self._scales = np.float32(1 / np.sqrt(1 - descent.B2**t)).reshape(epochs, -1)
        whole = mesh_lib.replicated(self.mesh)
        self._x = jax.device_put(rows.array if rows.array.dtype.name == "bfloat16" else rows.aligned(), whole, may_alias=True)
        self._soft = jax.device_put(self.targets.soft, whole, may_alias=True)
        self._likeliest = jax.device_put(self.targets.soft.argmax(axis=2).astype(np.int32), whole)
        self._test(test, references or {}, whole)
        shape = (len(self.lanes), epochs)
        self._loss, self._right = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
        self._predictions = np.full((*shape, self._m), -1, np.int32)
        self._make_groups(at_once or (1 if self.mesh.devices.flat[0].platform == "cpu" else AT_ONCE))

    @staticmethod
    def _checks(lanes, epochs, batch_size, learning_rate, weight_decay, schedule) -> None:
        for key, value in (("epochs", epochs), ("batch_size", batch_size), ("lanes", len(lanes))):
            if value < 1:
                raise UserError(f"{key}={value!r}: expected 1 or more")
        for key, value, low in (("learning_rate", learning_rate, np.finfo(np.float32).tiny), ("weight_decay", weight_decay, 0)):
            if not low <= value < np.inf:
                raise UserError(f"{key}={value!r}: expected a number {'above 0' if low else 'of at least 0'}")
        if schedule not in SCHEDULES:
            raise UserError(f"schedule={schedule!r}: expected one of {', '.join(SCHEDULES)}")
        for lane in lanes:
            if not 0 <= lane.noise <= 1:
                raise UserError(f"noise={lane.noise!r}: expected a probability in [0, 1]")

    def _test(self, test, references: dict, whole) -> None:
        self._blocks, self._m, self._references = [], 0, {name: np.asarray(value) for name, value in references.items()}
        if test is not None:
            rows = Rows(test, "test features")
            rows.check(self.d)
            self._m = rows.n
            size = min(rows.size, max(BLOCK // self.targets.classes, 1))
            self._blocks = [jax.device_put(rows.padded(start, size), whole) for start in range(0, rows.n, size)]
        for name, value in self._references.items():
            if value.shape != (self._m,) or value.dtype.kind not in "iu":
                raise UserError(f"references.{name}: {value.dtype} {list(value.shape)}, expected integers [{self._m}], one a test row")

    def _make_groups(self, at_once: int) -> None:
        """Lanes of one loss in groups of one size; the last is filled up with copies of its last lane, whose results are dropped."""
        devices = mesh_lib.cells(self.mesh)
        by_loss: dict = {}
        for i, lane in enumerate(self.lanes):
            # Coefficients are inputs of the program, and nothing else in a loss depends on whether the labels are ground truth.
            by_loss.setdefault(dataclasses.replace(lane.loss, ground_truth=False), []).append(i)
        self._groups = []
        for number, (loss, members) in enumerate(by_loss.items()):
            spread = "" if devices == 1 else "batch" if len(members) % devices else "lanes"
            most = at_once * devices if spread == "lanes" else at_once
            size = -(-len(members) // -(-len(members) // most))
            size = -(-size // devices) * devices if spread == "lanes" else size
            spec = descent.Spec(loss, self.mesh, spread, bool(self.decay > 0))
            for start in range(0, len(members), size):
                own = members[start : start + size]
                self._groups.append(_Group(self, spec, number, own, own + own[-1:] * (size - len(own))))

    def run_epoch(self, bar: Progress | None = None) -> None:
        """Trains every lane for one more epoch and predicts the test rows."""
        e = self.done
        for group in self._groups:
            totals = group.advance(self, e)
            loss, right, count = totals[: len(group.own)].T
            self._loss[group.own, e], self._right[group.own, e] = loss / count, right / count
            if not np.isfinite(loss).all():
                lane = self.lanes[group.own[int(np.flatnonzero(~np.isfinite(loss))[0])]]
                raise UserError(f"learning_rate: the loss of the probe on {lane.labels}, seed {lane.seed}, is not finite in epoch "
                                f"{e + 1}, expected a lower rate")
            for j, block in enumerate(self._blocks):
                at = j * len(block)
                found = np.asarray(descent.scores(group.carry["params"], block)[1])[: len(group.own), : self._m - at]
                self._predictions[group.own, e, at : at + found.shape[1]] = found
            if bar is not None:
                bar.update(self.steps * len(group.own), loss=float(np.mean(loss / count)), accuracy=float(np.mean(right / count)))
        self.done = e + 1

    def losses(self) -> np.ndarray:
        """Mean training loss of every lane in the last epoch, `[lanes]`."""
        return self._loss[:, self.done - 1]

    def state(self) -> dict:
        """All that the next epochs depend on, as nested dicts of numpy arrays: `params` `{weights [lanes, classes, d], bias}`,
        `opt_state` `{m, v, loss}`, `history` `{loss, train_accuracy, predictions}` (epochs to come: NaN and -1).

        It does not depend on the mesh or on `at_once`; `opt_state.loss` is there where a loss carries something from step to step,
        by the number of the loss, `[its lanes, ...]`.
        """
        parts = [group.carry_of_own() for group in self._groups]
        place = np.argsort(np.concatenate([g.own for g in self._groups]))

        def join(trees):
            return jax.tree.map(lambda *a: np.concatenate(a), *trees)

        params, m, v = (jax.tree.map(lambda a: a[place], join([part[key] for part in parts])) for key in ("params", "m", "v"))
        memory = {}
        for i in sorted({g.loss for g in self._groups}):
            if carried := join([part["loss"] for g, part in zip(self._groups, parts) if g.loss == i]):
                memory[str(i)] = carried
        history = {"loss": self._loss.copy(), "train_accuracy": self._right.copy(), "predictions": self._predictions.copy()}
        return {"params": params, "opt_state": {"m": m, "v": v} | ({"loss": memory} if memory else {}), "history": history}

    def abstract(self) -> dict:
        """The form of `state`, as `jax.ShapeDtypeStruct`s on one device, for restoring a checkpoint."""
        place = jax.sharding.SingleDeviceSharding(self.mesh.devices.flat[0])
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), self.state())

    def load(self, done: int, state: dict) -> None:
        """Goes on after `done` epochs from what `state` gave.

        Raises:
          UserError: it is the state of other lanes, features or epochs.
        """
        state = jax.tree.map(np.asarray, state)
        form = [{jax.tree_util.keystr(path): (leaf.shape, str(leaf.dtype)) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
                for tree in (self.abstract(), state)]
        if bad := [key for key in (*form[0], *form[1]) if form[0].get(key) != form[1].get(key)]:
            raise UserError(f"state of the probes: {bad[0]} is {form[1].get(bad[0])}, expected {form[0].get(bad[0])}")
        if not 0 <= done <= self.epochs:
            raise UserError(f"state of the probes: {done} epochs are done, expected 0 to {self.epochs}")
        taken: dict[int, int] = {}
        for group in self._groups:
            pick = {"params": state["params"], "m": state["opt_state"]["m"], "v": state["opt_state"]["v"]}
            first, count = taken.get(group.loss, 0), len(group.own)
            taken[group.loss] = first + count
            rows = first + np.minimum(np.arange(len(group.members)), count - 1)
            memory = jax.tree.map(lambda a, rows=rows: a[rows], state["opt_state"].get("loss", {}).get(str(group.loss), {}))
            group.put({**jax.tree.map(lambda a, members=group.members: a[members], pick), "loss": memory})
        history = state["history"]
        self._loss, self._right, self._predictions = (np.array(history[key]) for key in ("loss", "train_accuracy", "predictions"))
        self.done = int(done)

    def logits(self) -> np.ndarray:
        """Logits of the test rows as they are now, float32 `[lanes, m, classes]`."""
        out = np.empty((len(self.lanes), self._m, self.targets.classes), np.float32)
        for group in self._groups:
            for j, block in enumerate(self._blocks):
                at = j * len(block)
                found = np.asarray(descent.scores(group.carry["params"], block)[0])
                for place, lane in enumerate(group.own):
                    out[lane, at : at + len(block)] = found[place, : self._m - at]
        return out

    def result(self, logits: bool = True) -> Trained:
        """What came of the lanes."""
        params = self.state()["params"]
        against = {name: np.mean(self._predictions == value, axis=-1) for name, value in self._references.items()}
        return Trained(self.lanes, np.swapaxes(params["weights"], 1, 2), params["bias"], self._loss, self._right, self._predictions,
                       against, self.logits() if logits and self._m else None)


class _Group:
    """Lanes that one dispatch trains. `loss`: the number of their loss; `own`: theirs; `members`: those and the copies that fill up."""

    def __init__(self, training: Training, spec: descent.Spec, loss: int, own: list[int], members: list[int]):
        self.spec, self.loss, self.own, self.members = spec, loss, own, members
        self.lanes = [training.lanes[i] for i in members]
        of_lane, of_order = (NamedSharding(spec.mesh, place) for place in descent.specs(spec.spread))
        self._of_lane, self._of_order, self._whole = of_lane, of_order, NamedSharding(spec.mesh, P())
        bound = 1 / math.sqrt(training.d)  # torch.nn.Linear's, for weights and bias
        shapes = {"weights": (training.targets.classes, training.d), "bias": (training.targets.classes,)}
        draws = [np.random.default_rng([lane.seed, _START]) for lane in self.lanes]
        params = {key: np.stack([(bound * (2 * draw.random(shape, np.float32) - 1)) for draw in draws]) for key, shape in shapes.items()}
        self.put(descent.initial(params, spec.loss))
        hard, which = zip(*[training.targets.of(lane.labels, lane.noise, lane.seed) for lane in self.lanes])
        self._labels = jax.device_put({"hard": np.stack(hard), "set": np.array(which, np.int32)}, of_lane)

    def put(self, carry: dict) -> None:
        """Takes over a carry `[members, ...]`; a copy of it, since an epoch reuses the memory."""
        self.carry = jax.device_put(jax.tree.map(jnp.array, carry), self._of_lane)

    def carry_of_own(self) -> dict:
        """The carry on the host, without the copies."""
        return jax.tree.map(lambda a: np.asarray(a)[: len(self.own)], self.carry)

    def advance(self, training: Training, e: int) -> np.ndarray:
        """Trains for epoch `e`; `[members, 3]`, see `descent.epoch`."""
        batch, steps, total = training.batch, training.steps, training.steps * training.epochs
        width = -(-batch // mesh_lib.cells(self.spec.mesh)) * mesh_lib.cells(self.spec.mesh) if self.spec.spread == "batch" else batch
        order = np.full((len(self.lanes), steps, width), -1, np.int32)
        for row, lane in zip(order, self.lanes):
            flat = np.full(steps * batch, -1, np.int32)
            flat[: training.n] = np.random.default_rng([lane.seed, _ORDER, e]).permutation(training.n)
            row[:, :batch] = flat.reshape(steps, batch)
        share = np.array([[lane.loss.coefficient(e * steps + i, total) for i in range(steps)] for lane in self.lanes], np.float32)
        lanes = {**self._labels, "order": jax.device_put(order, self._of_order), "coefficients": jax.device_put(share, self._of_lane)}
        rates, scales = (jax.device_put(a[e], self._whole) for a in (training._rates, training._scales))
        whole = training._x, training._soft, training._likeliest, training.decay
        self.carry, totals = descent.epoch(self.spec, *whole, rates, scales, self.carry, lanes)
        return np.asarray(totals, np.float64)
