"""Defaults per model: the references' rates, the usual ladders, and anything else."""

import pytest

from w2s_jax import registry
from w2s_jax.config import shipped


@pytest.mark.parametrize("model, rate", [
    ("gpt2", 5e-5), ("openai-community/gpt2-medium", 5e-5), ("gpt2-large", 1e-5), ("gpt2-xl", 1e-5), ("Qwen/Qwen-1_8B", 1e-5),
    ("Qwen/Qwen-72B", 1e-5), ("Qwen/Qwen1.5-0.5B", 2e-5), ("Qwen/Qwen2.5-0.5B-Instruct", 2e-5), ("Qwen/Qwen2.5-7B", 1e-5),
    ("Qwen/Qwen3-1.7B-Base", 1e-5), ("meta-llama/Meta-Llama-3-8B", 1e-5), ("meta-llama/Llama-3.2-1B", 1e-5),
    ("EleutherAI/pythia-160m-deduped", 5e-5), ("EleutherAI/pythia-1.4b", 1e-5), ("EleutherAI/pythia-12b", 1e-5),
    ("google/gemma-2-2b", 1e-5), ("microsoft/phi-2", 1e-5), ("google/bert_uncased_L-2_H-128_A-2", 3e-4),
    ("google-bert/bert-base-uncased", 3e-5), ("somebody/else", 5e-5), ("/models/Qwen/Qwen-72B", 5e-5), ("", 5e-5),
])
def test_what_is_left_open_is_the_models_own(model, rate):
    config = shipped("finetune")
    config.model = model
    filled = registry.fill(config)
    assert (filled.learning_rate, filled.revision) == (rate, "main")
    # These follow from the memory there is, once the devices are known (test_ladder.py).
    assert (filled.remat, filled.microbatch_size, not any(filled.mesh.values())) == ("auto", "auto", True)
    assert config.learning_rate is None and config.revision == ""  # the one that was given is as it was
    assert registry.fill(filled) is filled


def test_where_memory_does_not_decide_a_replica_lies_on_every_device():
    config = shipped("vision_train")
    config.mesh.data = config.mesh.fsdp = config.mesh.model = 0
    config.remat = "auto"
    filled = registry.fill(config)
    assert (tuple(filled.mesh.values()), filled.remat) == ((-1, 1, 1), "none")


@pytest.mark.parametrize("given, mesh", [
    ({"data": 1}, (1, 1, 1)), ({"fsdp": 4}, (-1, 4, 1)), ({"fsdp": -1}, (1, -1, 1)), ({"data": 2, "model": 2}, (2, 1, 2)),
    ({"model": -1}, (1, 1, -1)),
])
def test_a_mesh_that_is_partly_set_is_completed(given, mesh):
    config = shipped("finetune")
    config.model = "Qwen/Qwen-72B"
    config.mesh.update(given)
    config.learning_rate, config.remat, config.revision = 1e-3, "dots", "step1000"
    filled = registry.fill(config)
    assert tuple(filled.mesh[axis] for axis in ("data", "fsdp", "model")) == mesh
    assert (filled.learning_rate, filled.remat, filled.revision) == (1e-3, "dots", "step1000")


@pytest.mark.parametrize("model, rate", [("Qwen/Qwen1.5-0.5B", 5e-4), ("meta-llama/Meta-Llama-3-8B", 8e-5), ("somebody/else", 2e-4)])
def test_adapters_have_rates_of_their_own_and_settings(model, rate):
    config = shipped("finetune")
    config.model, config.train, config.lora.rank = model, "lora", 4
    filled = registry.fill(config)
    assert filled.learning_rate == rate and registry.fill(filled) is filled
    assert dict(filled.lora) == {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear", "rslora": False, "init": ""}
