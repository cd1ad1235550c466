"""The benchmark of probes and vision networks: what it measures is the same on both sides, and its table says so."""

import json

import pytest
import tiny

from w2s_jax import stages
from w2s_jax.config import shipped
from w2s_jax.errors import UserError


def config(**keys):
    small = {"n_train": 300, "embed": 16, "n_classes": 5, "images": 1, "pixels": 32, "repeats": 1, "networks": ("vits16",), "torch": False}
    return tiny.set_keys(shipped("vision_benchmark", "runlocal"), **small | keys)


@pytest.mark.parametrize("torch", [False, True])
def test_a_smoke_run(tmp_path, capsys, torch):
    if torch:
        pytest.importorskip("torch")
    results = stages.run(config(torch=torch), tmp_path / "run")
    assert results == json.loads((tmp_path / "run" / "results.json").read_text())
    table = capsys.readouterr().out
    assert table.strip() == (tmp_path / "run" / "benchmark.md").read_text().strip() and "| w2s_jax, weak labels |" in table
    assert ("the reference's loop" in table) == torch == ("not timed" not in table)
    assert [row["labels"] for row in results["probe"]["ours"]] == ["weak", "truth"] and results["steps"] == 3 * 20
    if torch:
        assert results["networks"]["vits16"]["largest_difference"] < 1e-4
    stages.run(config(torch=torch), tmp_path / "run")  # done already: the table again
    assert capsys.readouterr().out == table


def test_an_unknown_network(tmp_path):
    with pytest.raises(UserError, match="config.networks: 'vits17', expected some of resnet50, vits16, vitb16; did you mean 'vits16'"):
        stages.run(config(networks=("vits17",)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
