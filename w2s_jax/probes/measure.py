"""How long a step of a linear probe takes: the reference's loop in torch against `softmax`, in turn, on the same numbers.

The reference's loop (`train_logreg` of openai/weak-to-strong's `vision/run_weak_strong.py`) draws every batch from a DataLoader, row
by row, and keeps a running training accuracy; it is written down here once more, for a CPU.
"""

from __future__ import annotations

import functools
import itertools
import resource
import time

import jax
import numpy as np

from w2s_jax import losses
from w2s_jax.errors import UserError
from w2s_jax.probes.softmax import Lane, Training


def data(n: int, d: int, classes: int, seed: int = 0) -> dict:
    """Features of a linear world with noise, float32 `[n, d]`, and labels of both kinds: made up, but of the real sizes."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(classes, size=n)
    features = rng.standard_normal((n, d), np.float32)
    features += rng.standard_normal((classes, d), np.float32)[truth] * np.float32(0.3)
    weak = rng.standard_normal((n, classes), np.float32)
    weak[np.arange(n), truth] += 5
    np.exp(weak, out=weak)
    weak /= weak.sum(axis=1, keepdims=True)
    return {"features": features, "targets": {"weak": weak, "truth": truth}}


def measure(features, targets: dict, *, batch_size: int = 100, rounds: int = 3, reference: bool = True,
            share: float = 0.1) -> dict:
    """Seconds a step and lane of the reference's loop and of ours, measured in turn.

    Args:
        features: `[n, d]`. targets: label sets as `softmax.train` takes them; each is one lane.
        rounds: how often each is measured, after one round that does not count.
        reference: whether torch's loop is measured, too. Needs torch.
        share: of an epoch, how much a measurement of torch's loop is; ours is always a whole epoch.

    Returns:
        `ours` and `reference` (if asked for), a list each: for every label set {`labels`, `seconds`: the least, `median`,
        `cpu_seconds`: the median of the processors' time, which on a busy machine says more, `loss`: mean of the last epoch or
        stretch}; `ours` also has `ratio`, the median of reference / ours round by round, or None. And `gflop`: of the two products
        of a step, `devices`.

    Raises:
        UserError: the reference is asked for, and there is no torch.
    """
    runs, parts, width, steps = {}, {}, 0, 1
    for name in targets:
        if reference:
            runs["reference", name] = _torch_loop(features, targets[name], batch_size, rounds + 1, share)
        lane = Lane(name, 0, losses.make("xent", ground_truth=True))
        training = Training(features, targets, [lane], epochs=rounds + 1, batch_size=batch_size)
        width, steps = training.d * training.targets.classes, training.steps
        runs["ours", name] = functools.partial(_epoch, training)
    for key in (*runs,) * (rounds + 1):
        loss, seconds, cpu = _timed(runs[key])
        count = max(1, round(share * steps)) if key[0] == "reference" else steps
        parts.setdefault(key, []).append((seconds / count, cpu / count, loss))
    out: dict = {"gflop": 4e-9 * batch_size * width, "devices": f"{len(jax.devices())} x {jax.devices()[0].device_kind}"}
    for (who, name), rows in parts.items():
        wall, cpu, loss = np.array(rows[1:]).T
        row = {"labels": name, "seconds": float(wall.min()), "median": float(np.median(wall)), "cpu_seconds": float(np.median(cpu)),
               "loss": float(loss[-1])}
        if who == "ours":
            row["ratio"] = float(np.median(np.array(parts["reference", name])[1:, 0] / wall)) if reference else None
        out.setdefault(who, []).append(row)
    return out


def _epoch(training: Training) -> float:
    training.run_epoch()
    return float(training.losses()[0])


def _timed(function):
    def cpu():
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    wall, processor = time.perf_counter(), cpu()
    value = function()
    return value, time.perf_counter() - wall, cpu() - processor


def _torch_loop(features, labels, batch_size: int, epochs: int, share: float):
    """The reference's loop: a call does a share of an epoch, from where the last one stopped, and gives the mean loss of its steps."""
    try:
        import torch
    except ImportError:
        raise UserError("torch: is not installed; the reference's loop needs it (pip install torch)") from None
    x, y = torch.from_numpy(np.asarray(features, np.float32)), torch.from_numpy(np.asarray(labels))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), shuffle=True, batch_size=batch_size)
    classes = y.shape[1] if y.ndim == 2 else int(y.max()) + 1
    model, criterion = torch.nn.Linear(x.shape[1], classes), torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(loader) * epochs)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def go() -> float:
        steps, summed, correct, seen = max(1, round(share * len(loader))), 0.0, 0.0, 0
        for rows, target in itertools.islice(batches, steps):
            optimizer.zero_grad()
            scores = model(rows)
            loss = criterion(scores, target)
            loss.backward()
            optimizer.step()
            scheduler.step()
            hard = target.argmax(dim=1) if target.ndim > 1 else target
            correct += (scores.argmax(dim=-1) == hard).float().sum().item()
            seen += len(hard)
            summed += loss.item()
        return summed / steps

    return go
