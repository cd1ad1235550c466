"""Models: a checkpoint's config.json -> `DecoderConfig` -> `Model`, whose parameters are a plain nested dict of arrays.

    config = read_config(folder)
    model = build(config, head="classifier")
    params = load(folder, model)               # or model.init(key)
    logits = model.apply(params, batch)        # [cells, slots, classes], float32

A batch is a dict of int32 arrays: `tokens`, `segments` (0 = padding, else 1 + index of the document in the batch) and
`positions`, [cells, rows, time]; `documents` (index in the batch, -1 = empty slot) and `last` (row * time + position of
the document's last token inside its cell), [cells, slots]. Models carry no sharding.
"""

import json
import os
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from w2s_jax.errors import UserError, nearest
from w2s_jax.models import gpt2, heads, weights
from w2s_jax.models.decoder import ATTENTION_IMPLEMENTATIONS, REMAT, Backbone, Compute, DecoderConfig
from w2s_jax.models.weights import nest, paths

__all__ = ["FAMILIES", "DecoderConfig", "Model", "build", "load", "nest", "paths", "read_config", "save"]

FAMILIES = {gpt2.MODEL_TYPE: gpt2}  # model_type in config.json -> module with read, write, NAMES, PREFIX, NOT_PARAMETERS
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def read_config(folder: str | os.PathLike) -> DecoderConfig:
    """The architecture in `folder`/config.json. UserError: no such file, not JSON, a family or a value that is not supported."""
    file = Path(folder) / "config.json"
    try:
        raw = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; a model folder needs config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise UserError(f"{file}: has no key model_type; expected one of {', '.join(FAMILIES)}")
    family = raw["model_type"]
    if family not in FAMILIES:
        raise UserError(f"{file}: model_type={family!r} is not supported{nearest(family, FAMILIES)}; expected one of {', '.join(FAMILIES)}")
    return FAMILIES[family].read(raw, str(file))


class _Network(nnx.Module):
    """Backbone and, for a classifier, the head: the module whose state the params are."""

    def __init__(self, config: DecoderConfig, compute: Compute, classes: int | None, head_init: str, key: jax.Array):
        self.backbone = Backbone(config, compute, rngs=nnx.Rngs(params=jax.random.fold_in(key, 0)))
        if classes is not None:
            self.head = heads.Classifier(config.embed, classes, head_init, rngs=nnx.Rngs(params=jax.random.fold_in(key, 1)))


class Model:
    """A backbone and a head as pure functions of params; made by `build`, which gives equal arguments the same object.

    `config`: the DecoderConfig. `head`: "classifier" | "lm". `classes`: outputs a document. `param_dtype`: numpy dtype of the
    backbone's parameters. `abstract`: nested dict of jax.ShapeDtypeStruct with the structure of params.
    """

    def __init__(self, config: DecoderConfig, head: str, classes: int, compute: Compute, readout: str, head_init: str):
        self.config, self.head, self.readout = config, head, readout
        self.classes = classes if head == "classifier" else 1
        self.compute, self.param_dtype = compute, compute.param_dtype
        self._make = lambda key: _Network(config, compute, classes if head == "classifier" else None, head_init, key)
        # One function for the model's life, so that each run after the first finds it compiled; the rest of init is dead code.
        self._init_head = jax.jit(lambda key: {k: v for k, v in self.init(key).items() if k == "head"})
        self._graph, state = nnx.split(nnx.eval_shape(self._make, jax.random.key(0)))
        self.abstract = nnx.to_pure_dict(state)

    def init(self, key: jax.Array) -> dict:
        """Random params by the family's published initialisation, the head by head_init; works under jit with out_shardings."""
        return nnx.to_pure_dict(nnx.state(self._make(key)))

    def init_head(self, key: jax.Array) -> dict:
        """Only the head's part of `init(key)`, {"kernel": [embed, classes]} (nothing for a language model)."""
        return self._init_head(key).get("head", {})

    def _merge(self, params: dict) -> _Network:
        if jax.tree.structure(params) != jax.tree.structure(self.abstract):
            raise ValueError(f"params have other keys than the model: {sorted(set(paths(params)) ^ set(paths(self.abstract)))}")
        assert all(hasattr(leaf, "astype") for leaf in jax.tree.leaves(params)), "a parameter is not an array"
        return nnx.merge(self._graph, params)

    def _states(self, network: _Network, batch: dict, dropout_key=None, **options):
        """Hidden states before the final norm, [cells, rows, time, embed]; see Backbone."""
        cells, rows, time = batch["tokens"].shape
        flat = [batch[k].reshape(cells * rows, time) for k in ("tokens", "segments", "positions")]
        states = network.backbone(*flat, dropout_key, **options)
        return jax.tree.map(lambda a: a.reshape(*a.shape[:-3], cells, rows, *a.shape[-2:]), states)

    def apply(self, params: dict, batch: dict, dropout_key: jax.Array | None = None) -> jax.Array:
        """The head's output for each document, float32 [cells, slots, classes]; empty slots hold finite values of no meaning.

        classifier: logits. lm: one number, the sum in nats of the document's next-token negative log-likelihoods (0 in empty
        slots). Dropout is on only with `dropout_key` (one per step) and a rate above 0.
        """
        network = self._merge(params)
        x = self._states(network, batch, dropout_key)
        norm = network.backbone.norm
        if self.head == "lm":
            return heads.next_token_nll(norm(x), self._table(network), batch)
        if self.readout == "last":  # the norm is per token: only the tokens that are read need it
            return network.head(norm(heads.gather_last(x, batch["last"])))
        return network.head(heads.mean_over_tokens(norm(x), batch["segments"], batch["documents"]))

    def hidden(self, params: dict, batch: dict, all_layers: bool = False) -> jax.Array:
        """Hidden states after the final norm, [cells, rows, time, embed] in the compute type.

        `all_layers`: [layers + 1, cells, rows, time, embed] as transformers' hidden_states: the embeddings, the output of
        each layer but the last, and the last one's after the final norm.
        """
        network = self._merge(params)
        if not all_layers:
            return network.backbone.norm(self._states(network, batch))
        x, inputs = self._states(network, batch, all_layers=True)
        return jnp.concatenate([inputs, network.backbone.norm(x)[None]])

    def logits(self, params: dict, batch: dict) -> jax.Array:
        """The language model's logits, float32 [cells, rows, time, vocab] (large: for tests and small models)."""
        network = self._merge(params)
        x = network.backbone.norm(self._states(network, batch))
        return jnp.einsum("...e,ve->...v", x, self._table(network), preferred_element_type=jnp.float32)

    def _table(self, network: _Network) -> jax.Array:
        return network.backbone.embed.tokens.embedding[...].astype(self.compute.dtype)


@cache
def build(config: DecoderConfig, *, head: str, classes: int = 2, dtype: str = "float32", param_dtype: str = "float32",
          remat: str = "none", attention: str = "auto", dropout: float = 0.0, readout: str = "last",
          head_init: str = "zeros") -> Model:
    """The Model for these arguments (the config's keys of the same names); equal arguments give the identical object."""
    choices = {"head": (head, ("classifier", "lm")), "dtype": (dtype, DTYPES), "param_dtype": (param_dtype, DTYPES),
               "remat": (remat, REMAT), "attention": (attention, ATTENTION_IMPLEMENTATIONS), "readout": (readout, heads.READOUTS),
               "head_init": (head_init, heads.HEAD_INITS)}
    for key, (value, known) in choices.items():
        if value not in known:
            raise UserError(f"{key}={value!r} is not known{nearest(value, known)}; expected one of {', '.join(known)}")
    if not 0.0 <= dropout < 1.0:
        raise UserError(f"dropout={dropout!r}: expected a rate from 0 to below 1")
    compute = Compute(jnp.dtype(DTYPES[dtype]), jnp.dtype(DTYPES[param_dtype]), remat, attention, dropout)
    return Model(config, head, classes, compute, readout, head_init)


def load(folder, model: Model, shardings: dict | None = None, key: jax.Array | None = None) -> dict:
    """Params of `model` from the safetensors in `folder`; see w2s_jax.models.weights.load."""
    return weights.load(folder, model, FAMILIES[model.config.family], shardings, key)


def save(folder, params: dict, config: DecoderConfig, tokenizer_files_from=None) -> None:
    """Write the backbone in Hugging Face's format; see w2s_jax.models.weights.save."""
    weights.save(folder, params, config, FAMILIES[config.family], tokenizer_files_from)
