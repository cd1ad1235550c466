"""What a family is: a reader of config.json and a table of names."""

from collections.abc import Callable
from dataclasses import dataclass

from w2s_jax.models.architecture import Architecture
from w2s_jax.models.families.reader import Fields


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    `read`: Fields -> Architecture. `names`: path of a parameter -> name of its tensor, {i} = index of the layer, {p} = one of
    `prefixes` (saved with a head) or nothing (the bare model); paths that a model lacks play no part. `ignored`: regex of
    tensors that are no parameters here (buffers, copies, other heads). `renamed`: (old, new) endings of older checkpoints.
    `transposed`: matrices are stored [outputs, inputs], as torch.nn.Linear has them. `classifier`: transformers' class for
    sequence classification, and the name of its linear head's weight there.
    """

    model_type: str
    read: Callable[[Fields], Architecture]
    names: dict[str, str]
    prefixes: tuple[str, ...]
    ignored: str
    classifier: tuple[str, str]
    renamed: tuple[tuple[str, str], ...] = ()
    transposed: bool = True
