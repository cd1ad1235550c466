"""Where the lines of metrics.jsonl also go: TensorBoard or Weights & Biases. Both are imported only when a run asks for them."""

from __future__ import annotations

import importlib.util
import os

from w2s_jax.errors import UserError

LIBRARIES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def check(name: str) -> None:
    """UserError where the library of a logger is not installed."""
    if name in LIBRARIES and importlib.util.find_spec(LIBRARIES[name]) is None:
        raise UserError(f"config.logger: {name!r} needs the package {LIBRARIES[name]}: pip install {LIBRARIES[name]}")


class Logger:
    """`log(row)` for each line of metrics; does nothing for the logger `none`.

    Args:
      name: none | tensorboard (event files in `<folder>/tensorboard`) | wandb (a run named after the folder).
      folder: the run directory.
      config: the resolved config as a dict, shown beside the curves.
    """

    def __init__(self, name: str, folder, config: dict):
        check(name)
        self._name, self._writer = name, None
        if name == "tensorboard":
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(os.fspath(folder / "tensorboard"))
        elif name == "wandb":
            import wandb

            self._writer = wandb.init(project="w2s_jax", name=folder.name, dir=os.fspath(folder), config=config, resume="allow",
                                      id="-".join(folder.parts[-2:]).replace("/", "-"))

    def log(self, row: dict) -> None:
        numbers = {k: v for k, v in row.items() if k != "step" and isinstance(v, (int, float))}
        if self._name == "tensorboard":
            for key, value in numbers.items():
                self._writer.add_scalar(key, value, row["step"])
        elif self._name == "wandb":
            self._writer.log(numbers, step=row["step"])

    def close(self) -> None:
        if self._name == "tensorboard":
            self._writer.close()
        elif self._name == "wandb":
            self._writer.finish()
