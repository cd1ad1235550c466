"""Measure the linear probe and passes of vision networks against PyTorch: interleaved in one process, ratios.

    python -m w2s_jax.main --config=vision_benchmark --workdir=runs/vision-bench

The probe: openai/weak-to-strong's loop (`vision/run_weak_strong.py`, one batch at a time out of a DataLoader) and ours, on the same
made-up features of the real sizes: 40,000 images, 2,048 features, 1,000 classes. The networks: random weights in transformers' classes
on both sides, whose features are compared, too. PyTorch (`pip install torch==2.13.0`) is optional. Writes results.json and
benchmark.md. `:runlocal` is a smoke run.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    c = ConfigDict()
    c.stage = "vision_benchmark"  # which stage of w2s_jax runs this config
    c.seed = 0  # features, labels, weights and images

    # The probe
    c.n_train = 40_000  # images
    c.embed = 2048  # features of an image
    c.n_classes = 1000  # classes
    c.batch_size = 100  # images a step
    c.epochs = 20  # that a whole run is reckoned for

    # Passes of networks
    c.networks = ("resnet50", "vitb16")  # of resnet50, vits16, vitb16; empty = none
    c.images = 16  # a pass
    c.pixels = 224  # a side
    c.dtype = "float32"  # compute, on both sides: float32 | bfloat16
    c.matmul_precision = "default"  # default | high | highest

    # Running
    c.repeats = 3  # timed rounds; a round runs every contender once
    c.torch = True  # time PyTorch too

    if arg == "runlocal":
        c.n_train, c.embed, c.n_classes, c.repeats, c.images, c.pixels, c.networks = 2000, 64, 10, 2, 2, 64, ("vits16",)
    elif arg:
        raise ValueError(f"configs/vision_benchmark.py takes ':runlocal', got ':{arg}'")
    return c
