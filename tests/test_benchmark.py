"""The benchmark: both sides compute the same, the table has its rows. No time is asserted: machines differ."""

import importlib.util
import json

import numpy as np
import pytest

from w2s_jax import config as config_lib
from w2s_jax import stages
from w2s_jax.errors import UserError
from w2s_jax.stages import benchmark

HAS_TORCH = importlib.util.find_spec("torch") is not None


def tiny(**keys):
    config = config_lib.shipped("benchmark", "runlocal")
    config.update({"startup": False, "repeats": 2} | keys)
    config.arch.update({"width": 16, "vocab": 64})
    return config


def rows(markdown: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line.startswith("|")]


def test_lengths_are_those_of_sciq():
    lengths = benchmark.sciq_lengths(20000, 0)
    assert abs(lengths.mean() - 21.7) < 0.3
    assert [np.quantile(lengths, q) for q in (0.5, 0.9, 0.99)] == pytest.approx([21, 29, 43], abs=1)
    assert lengths.min() >= 10 and lengths.max() <= 100
    assert (lengths == benchmark.sciq_lengths(20000, 0)).all() and (lengths != benchmark.sciq_lengths(20000, 1)).any()


@pytest.mark.parametrize("torch", [pytest.param(True, marks=pytest.mark.skipif(not HAS_TORCH, reason="needs torch")), False])
def test_the_table(tmp_path, torch, capsys):
    results = stages.run(tiny(torch=torch), tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    markdown = (tmp_path / "benchmark.md").read_text()
    assert markdown in capsys.readouterr().out
    head, _, *body = rows(markdown)
    assert all(len(row) == len(head) for row in body)
    names = {what: [benchmark.OURS] for what in ("training", "labelling")}
    if torch:
        names["training"] += [benchmark.PADDED, benchmark.REFERENCE, benchmark.SHIPPED]
        names["labelling"] += [benchmark.PADDED, benchmark.SINGLE]
    for what, expected in names.items():
        found = results[what]["rows"]
        assert list(found) == expected
        for name, row in found.items():
            assert len(row["rounds"]) == 2 and row["seconds"] == pytest.approx(np.median(row["rounds"]))
            if name != benchmark.OURS:
                ratios = np.array(row["rounds"]) / found[benchmark.OURS]["rounds"]
                assert row["ratio"] == pytest.approx(np.median(ratios))
    shown = [row[0] for row in body]
    extra = [] if torch else ["PyTorch"]
    assert shown == ["**a training step of 8 documents**", *names["training"], *extra,
                     "**labelling 32 documents**", *names["labelling"], *extra]
    assert results["programs"]["training"] == len(results["padding"]["shapes"])
    assert 0 <= results["padding"]["ours"] < 1
    if torch:  # the same weights, two steps of Adam, the labelling's logits
        assert results["first_losses"]["ours"] == pytest.approx(results["first_losses"]["theirs"], abs=2e-6)
        assert results["labelling"]["largest_difference"] < 2e-6
    assert stages.run(tiny(torch=torch), tmp_path) == results  # done already: nothing is measured


@pytest.mark.slow
def test_start_up():
    found = benchmark.startup()
    assert {*found} == {"cold", "warm", "programs"} and found["programs"] >= 2  # a training step, a forward pass


@pytest.mark.parametrize("keys, expected", [
    ({"n_train": 8}, "at least 2 batches of 8"),
    ({"task": "sciq"}, "config.tokenizer"),
])
def test_what_does_not_fit_is_said(tmp_path, keys, expected):
    with pytest.raises(UserError, match=expected):
        stages.run(tiny(torch=False, **keys), tmp_path / "run")
