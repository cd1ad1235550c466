"""Which step of a run is kept: the last one, or the one that scored best on held-out validation documents.

Burns et al. 2023, section 4.3 (early stopping, on weak labels and against ground truth); EleutherAI/w2s keeps the checkpoint with
the best AUROC against the validation labels that the run is trained on.
"""

from __future__ import annotations

import numpy as np
from etils import epath

from w2s_jax import checkpoint as ckpt
from w2s_jax import distributed, metrics

FOLDER = "best"  # inside a run directory, while the run goes on


def score(select: str, logits: np.ndarray, given: np.ndarray, truth: np.ndarray) -> float:
    """How good validation predictions are, larger = better.

    Args:
      select: val_labels = AUROC against the labels that are trained on, made hard (accuracy where they are all of one class, or of
        more than two classes); agreement = share of documents with the same hard label; oracle = as val_labels, against the truth.
      logits: float32 `[documents, classes]`.
      given: the labels trained on, float32 `[documents, classes]`.
      truth: int `[documents]`, -1 = unknown (left out).
    """
    labels = truth if select == "oracle" else np.argmax(given, axis=1)
    known = labels >= 0
    logits, labels = logits[known], labels[known]
    if select != "agreement" and logits.shape[1] == 2 and len(np.unique(labels)) == 2:
        return float(metrics.auroc(metrics.scores(logits), labels))
    return float(metrics.accuracy(logits, labels))


class Best:
    """The best parameters so far, on disk, so that a killed run still has them when it goes on.

    Args:
      run_path: the run directory.
      every: steps between evaluations.
      patience: evaluations without a better score after which training stops; 0 = never.
    """

    def __init__(self, run_path, every: int, patience: int):
        self._checkpoints = ckpt.Checkpoints(run_path, keep=1, folder=FOLDER)
        self._every, self._patience = every, patience
        self.step, self.score = -1, -np.inf
        if steps := self._checkpoints.steps():
            self.step = steps[0]
            self.score = self._checkpoints.meta(self.step)["score"]

    def offer(self, step: int, score: float, trainable) -> None:
        """Keeps `trainable` if its score is better than all before; of equals the earliest stays."""
        if score > self.score:
            self.step, self.score = step, score
            self._checkpoints.save(step, params=trainable, meta={"step": step, "score": score})

    def exhausted(self, step: int) -> bool:
        """Whether nothing better came for `patience` evaluations."""
        return bool(self._patience) and (step - self.step) // self._every >= self._patience

    def restore(self, abstract):
        """The best parameters; `abstract`: `ShapeDtypeStruct`s with shardings."""
        self._checkpoints.wait()
        return self._checkpoints.restore(self.step, abstract)[0]

    def close(self) -> None:
        self._checkpoints.close()


def clear(run_path) -> None:
    """Removes what a finished run needs no longer."""
    folder = epath.Path(run_path) / FOLDER
    distributed.once(lambda: folder.rmtree() if folder.exists() else None, "clear")
