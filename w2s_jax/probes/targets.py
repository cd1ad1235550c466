"""Label sets of the K-class probes: checked, held once, and made noisy."""

from __future__ import annotations

import numpy as np

from w2s_jax.errors import UserError, nearest

_NOISE = 0x401E  # the stream of a seed that labels are replaced from
SUM = 1e-3  # how far from 1 the sum of a label's probabilities may be


class Targets:
    """Label sets by name: classes int `[n]`, or distributions `[n, classes]`; only the `used` ones are read.

    Args:
      classes: their number, where it may be more than labels show; 0 = that of the distributions, else one more than the largest class.

    Attributes:
      classes: their number.
      soft: the distributions, float32 `[sets, n, classes]`; `[1, 1, classes]` of zeros where there are none.

    Raises:
      UserError: labels that are unknown, of another length, not finite, or no distributions.
    """

    def __init__(self, targets: dict, n: int, used: set[str], classes: int = 0):
        self._hard: dict[str, np.ndarray] = {}
        self._sets: dict[str, int] = {}
        soft, widths = [], {}
        for name in sorted(used):
            if name not in targets:
                raise UserError(f"labels={name!r}: expected one of {', '.join(targets)}{nearest(name, targets)}")
            labels = np.asarray(targets[name])
            if labels.ndim not in (1, 2) or len(labels) != n or labels.size == 0:
                raise UserError(f"labels.{name}: {list(labels.shape)}, expected [{n}] or [{n}, classes], one a row of the features")
            if labels.ndim == 2:
                labels = self._distributions(name, labels)
                widths[name] = labels.shape[1]
                if _one_hot(labels):
                    labels = labels.argmax(axis=1)
            elif labels.dtype.kind not in "iu" or labels.min() < 0:
                raise UserError(f"labels.{name}: {labels.dtype} from {labels.min()}, expected classes, integers of at least 0")
            if labels.ndim == 1:
                self._hard[name] = labels.astype(np.int32)
            else:
                self._sets[name] = len(soft)
                soft.append(labels)
        if len(set(widths.values())) > 1:
            raise UserError(f"labels: {', '.join(f'{name} has {k} classes' for name, k in widths.items())}; expected one number")
        highest = {name: int(labels.max()) + 1 for name, labels in self._hard.items()}
        self.classes = classes or next(iter(widths.values()), max(highest.values(), default=0))
        for name, count in widths.items():
            if count != self.classes:
                raise UserError(f"labels.{name}: {count} classes, expected {self.classes}")
        for name, count in highest.items():
            if count > self.classes:
                raise UserError(f"labels.{name}: class {count - 1}, expected one below {self.classes}, the number of classes")
        self.soft = np.stack(soft) if len(soft) > 1 else soft[0][None] if soft else np.zeros((1, 1, self.classes), np.float32)
        self.n = n

    @staticmethod
    def _distributions(name: str, labels: np.ndarray) -> np.ndarray:
        labels = np.ascontiguousarray(labels, np.float32)
        for start in range(0, len(labels), 4096):
            block = labels[start : start + 4096]
            good = (block.min(axis=1) >= 0) & (np.abs(block.sum(axis=1, dtype=np.float64) - 1) <= SUM)  # False for NaN
            if not good.all():
                raise UserError(f"labels.{name}: row {start + int((~good).argmax())} is no distribution over the classes, "
                                "expected probabilities that sum to 1")
        return labels

    def of(self, name: str, noise: float = 0.0, seed: int = 0) -> tuple[np.ndarray, int]:
        """What a lane trains on: int32 `[n]`, a class or -1 for the row's distribution, and which of the `soft` sets that is in.

        With probability `noise` a label is replaced by another class than its likeliest, drawn uniformly. Of one seed, the labels
        that a lower noise replaces are replaced by a higher one, too, by the same classes.
        """
        hard, which = (self._hard[name].copy(), 0) if name in self._hard else (np.full(self.n, -1, np.int32), self._sets[name])
        if noise:
            draw = np.random.default_rng([seed, _NOISE])
            chosen, other = draw.random(self.n) < noise, draw.integers(self.classes - 1, size=self.n)
            likeliest = hard if name in self._hard else self.soft[which].argmax(axis=1)
            hard[chosen] = (other + (other >= likeliest))[chosen]
        return hard, which


def _one_hot(labels: np.ndarray) -> bool:
    """Whether every row is 1 at one class and 0 elsewhere. In blocks, and the first row decides in nearly every case."""
    for start in (0, *range(1, len(labels), 4096)):
        block = labels[start : start + (4096 if start else 1)]
        if not ((block == 0) | (block == 1)).all() or not (np.count_nonzero(block, axis=1) == 1).all():
            return False
    return True
