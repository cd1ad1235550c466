"""What runs know of each other and say of themselves: fingerprints, predictions on disk, results and the line about them. No jax."""

from __future__ import annotations

import json

import numpy as np
from etils import epath

from w2s_jax import config as config_lib
from w2s_jax import distributed, metrics, runlog
from w2s_jax.data import labels as labels_lib
from w2s_jax.data.examples import Examples
from w2s_jax.errors import UserError
from w2s_jax.progress import say


def run_identity(path) -> str | None:
    """The identity of the run in a folder, or None where the folder holds no run.

    A run's identity stands for its content, since it decides it; so a sweep can name its runs before they exist.
    """
    file = epath.Path(path) / "config.json"
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text())
    except ValueError:
        return None
    return config_lib.identity_hash(record["identity"]) if isinstance(record, dict) and "identity" in record else None


def fingerprint_run(path, planned: dict | None = None) -> str:
    """`run:<identity>` of a run directory; `planned` maps paths to the runs that a sweep will make (`graph.Planned`)."""
    if planned and str(path) in planned:
        return f"run:{planned[str(path)].identity}"
    found = run_identity(path)
    if found is None:
        raise UserError(f"run: {path} is not a run directory (no config.json with an identity)")
    return f"run:{found}"


def evaluate(logits: np.ndarray, examples: Examples) -> dict:
    """Accuracy, AUROC, intervals and baseline of the documents whose label is known; see `metrics.evaluate`."""
    known = np.flatnonzero(examples.labels >= 0)
    if not len(known):
        return {}
    return metrics.evaluate(logits[known], examples.labels[known], [examples.groups[i] for i in known])


def write_predictions(run, split: str, examples: Examples, logits: np.ndarray | None = None, **columns) -> None:
    """`predictions/<split>.parquet` of a run; `columns` as `labels.write_predictions` takes them."""
    if not run.writes:
        return
    folder = epath.Path(run.path) / "predictions"
    folder.mkdir(parents=True, exist_ok=True)
    labels_lib.write_predictions(folder / f"{split}.parquet", examples, logits, **columns)


def shown(path) -> str:
    """A run directory's or a model's name in a line of output: its last two parts, without a trailing `model`."""
    parts = [p for p in str(path).rstrip("/").split("/") if p]
    return "/".join((parts[:-1] if len(parts) > 1 and parts[-1] == "model" else parts)[-2:])


def summary(results: dict, things: str = "documents") -> str:
    """The line that a finished run prints; `things`: what it was tested on."""
    if "accuracy" not in results:
        return f"{results.get('n_test', 0)} {things}"
    low, high = results["accuracy_ci"] or (float("nan"), float("nan"))
    line = (f"accuracy {results['accuracy']:.3f} [{low:.3f}, {high:.3f}] on {results['n_test']} {things} "
            f"(majority {results['majority_baseline']:.3f})")
    return line + (f", AUROC {results['auroc']:.3f}" if results.get("auroc") is not None else "")


def finished(workdir, config, ident: dict, rerun: bool, summary=summary) -> dict | None:
    """The results of a run that is done already, so that nothing is loaded for it; a directory of another run is refused here.

    `summary(results)`: what the printed line says of them.
    """
    if not distributed.once((epath.Path(workdir) / "config.json").exists, "finished"):
        return None
    with runlog.Run.open(workdir, config, ident) as held:
        if held.results is None or rerun:
            return None
        say(f"{shown(workdir)}: done already ({summary(held.results)}); --rerun redoes it")
        return held.results
