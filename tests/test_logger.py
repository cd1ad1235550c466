"""Metrics reach TensorBoard as they reach metrics.jsonl; a logger whose library is absent is refused before anything is made."""

import pytest

from w2s_jax import logger
from w2s_jax.errors import UserError
from w2s_jax.runlog import Run


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboardX")
    with Run.open(tmp_path / "run", {"logger": "tensorboard"}, {"stage": "finetune"}) as run:
        run.start()
        for step in range(3):
            run.metrics({"step": step, "loss": 0.5, "note": "not a number"})
    files = list((tmp_path / "run" / "tensorboard").iterdir())
    assert len(files) == 1 and b"loss" in files[0].read_bytes() and b"note" not in files[0].read_bytes()


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(logger.importlib.util, "find_spec", lambda name: None)
    for name, library in logger.LIBRARIES.items():
        with pytest.raises(UserError, match=f"pip install {library}"):
            logger.check(name)
    logger.check("none")
