"""Export a trained run as a folder that transformers loads: AutoModelForSequenceClassification, with the tokenizer.

    python -m w2s_jax.main --config=configs/export.py --config.run=runs/student --workdir=runs/student-export

Writes `<workdir>/model/`: config.json, safetensors, the tokenizer's files and a README.md with the lines of PyTorch that
compute the run's logits. Where transformers has no class for what the run's head reads, the folder is the plain backbone,
with the head in score.safetensors. A LoRA run's adapters are merged, or written alone for PEFT with `--config.merge=False`.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    c = ConfigDict()
    c.stage = "export"  # which stage of w2s_jax runs this config
    c.run = "runs/student"  # the run directory whose newest checkpoint is exported
    c.merge = True  # of a run with adapters: add them to the matrices; False = write them alone, in PEFT's format

    # Running
    c.mesh = ConfigDict()  # devices along each axis; -1 = all that are left
    c.mesh.data = 1  # replicas (nothing is computed: one is enough)
    c.mesh.fsdp = -1  # parameters split
    c.mesh.model = 1  # tensors split

    if arg == "runlocal":
        c.run = "runs/runlocal-weak"
    elif arg:
        raise ValueError(f"configs/export.py takes ':runlocal', got ':{arg}'")
    return c
