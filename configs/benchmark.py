"""Measure training and labelling against PyTorch with transformers: interleaved in one process, medians, ratios.

    python -m w2s_jax.main --config=benchmark --workdir=runs/bench

A GPT-2-sized model with random weights, documents with the lengths of SciQ's. "padded" pads a batch to its longest
document; "reference" and "shipped" are the loop of openai/weak-to-strong `train.py` with minibatch 32 and with 1, its
default. PyTorch (`pip install torch==2.13.0`) is optional. Aim on a CPU: a step 2.2 times as fast as padded and 4.5 times as fast
as shipped, labelling twice as fast as padded. Writes results.json and benchmark.md. `:runlocal` is a smoke run.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    c = ConfigDict()
    c.stage = "benchmark"  # which stage of w2s_jax runs this config
    c.seed = 0  # weights, documents and their order
    c.data_seed = 0  # sampling of the task's documents

    # Model: GPT-2's architecture, random weights
    c.arch = ConfigDict()  # sizes (the smallest GPT-2)
    c.arch.width = 768  # of the hidden states
    c.arch.layers = 12  # blocks
    c.arch.heads = 12  # attention heads; they divide the width
    c.arch.context = 1024  # positions
    c.arch.vocab = 50257  # token ids
    c.dtype = "float32"  # compute, on both sides: float32 | bfloat16
    c.matmul_precision = "default"  # default | high | highest (default may mean TF32 on an accelerator, on both sides)
    c.attention = "auto"  # auto | xla | splash (TPU) | pallas, cudnn (GPU; cudnn: one document a row)
    c.remat = "none"  # rematerialisation: none | full | dots | dots_no_batch | nothing_saveable | everything_saveable

    # Documents
    c.task = ""  # a registered task, or a folder; empty = random tokens with the lengths of SciQ's training questions
    c.task_dir = ""  # read a registered task's splits from this folder instead of the hub
    c.tokenizer = ""  # for a task: a local folder or a hub id
    c.n_train = 2048  # documents of an epoch: its plan gives the padding and the programs
    c.n_label = 256  # documents of a labelling pass
    c.batch_size = 32  # documents a step
    c.microbatch_size = 0  # documents over all devices held in memory at once; 0 = the whole batch

    # Running
    c.repeats = 5  # timed rounds; a round runs every contender once
    c.torch = True  # time PyTorch too
    c.startup = True  # time `python -m w2s_jax.main --config=finetune` to its first step
    c.steps_per_dispatch = 0  # steps in one call of the device; 0 = by the size of the model
    c.mesh = ConfigDict()  # devices along each axis (ours; PyTorch takes one); -1 = all that are left
    c.mesh.data = 1  # replicas
    c.mesh.fsdp = 1  # parameters and batch split
    c.mesh.model = 1  # tensors split

    if arg == "runlocal":
        c.arch.update({"width": 32, "layers": 2, "heads": 2, "context": 128, "vocab": 512})
        c.n_train, c.n_label, c.batch_size, c.repeats = 64, 32, 8, 2
    elif arg:
        raise ValueError(f"configs/benchmark.py takes ':runlocal', got ':{arg}'")
    return c
