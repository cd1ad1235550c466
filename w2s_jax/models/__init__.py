"""Models: a checkpoint's config.json -> `Architecture` -> `Model`, whose parameters are a plain nested dict of arrays.

    config = read_config(folder)
    model = build(config, head="classifier")
    params = load(folder, model)               # or model.init(key)
    logits = model.apply(params, batch)        # [cells, slots, classes], float32

A batch is a dict of int32 arrays: `tokens`, `segments` (0 = padding, else 1 + index of the document in the batch) and
`positions`, [cells, rows, time]; `documents` (index in the batch, -1 = empty slot) and `last` (row * time + position of
the document's last token inside its cell), [cells, slots]. Models carry no sharding.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from w2s_jax.constraints import spread
from w2s_jax.errors import UserError, nearest
from w2s_jax.models import attention as attention_lib
from w2s_jax.models import heads, weights, writing
from w2s_jax.models import lora as lora_lib
from w2s_jax.models.architecture import Architecture
from w2s_jax.models.backbone import REMAT, Backbone
from w2s_jax.models.families import FAMILIES, parse, read_config, read_raw
from w2s_jax.models.layers import Compute, Linear
from w2s_jax.models.lora import Lora
from w2s_jax.models.weights import nest, paths

__all__ = ["FAMILIES", "Architecture", "Lora", "Model", "adapter_files", "build", "load", "load_adapter", "merge", "nest", "parse",
           "paths", "read_config", "read_raw", "save", "stored_dtype", "unembedding"]

POOLS = ("last", "mean")  # what `Model.features` reads of a document
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class _Network(nnx.Module):
    """The module whose state the params are: backbone, and what the head needs beside it."""

    def __init__(self, config: Architecture, compute: Compute, classes: int | None, pooled: bool, head_init: str, key: jax.Array):
        rngs = [nnx.Rngs(params=jax.random.fold_in(key, i), lora=jax.random.fold_in(key, 3)) for i in range(3)]
        self.backbone = Backbone(config, compute, rngs=rngs[0])
        if classes is None:
            if not config.tied:
                self.lm_head = Linear(config.embed, config.vocab, config.init_std, compute, bias=False, rngs=rngs[2])
            return
        pooler = heads.Pooler(config, compute, rngs=rngs[2]) if pooled else None
        if config.pooler == "loaded" and pooled:
            self.pooler = pooler
        self.head = heads.Classifier(config.embed, classes, head_init, pooler=pooler if config.pooler == "fresh" else None, rngs=rngs[1])


class Model:
    """A backbone and a head as pure functions of params; made by `build`, which gives equal arguments the same object.

    `config`: the Architecture. `head`: "classifier" | "lm". `classes`: outputs a document. `readout`: last | first | mean, and
    `pooled`: whether the family's own layer follows it. `param_dtype`: numpy dtype of the backbone's parameters. `abstract`:
    nested dict of jax.ShapeDtypeStruct with the structure of params.
    """

    def __init__(self, config: Architecture, head: str, classes: int, compute: Compute, readout: str, head_init: str):
        self.config, self.head = config, head
        self.readout = config.readout if readout == "auto" else readout
        self.pooled = head == "classifier" and readout == "auto" and bool(config.pooler)
        self.classes = classes if head == "classifier" else 1
        self.compute, self.param_dtype = compute, compute.param_dtype
        self._make = lambda key: _Network(config, compute, classes if head == "classifier" else None, self.pooled, head_init, key)
        # One function for the model's life, so that each run after the first finds it compiled; the rest of init is dead code.
        self._init_new = jax.jit(lambda key: nest({p: leaf for p, leaf in paths(self.init(key)).items()
                                                   if p.startswith("head/") or weights.is_adapter(p)}))
        key = jax.eval_shape(lambda: jax.random.key(0))  # a shape asks for no device
        self._graph, state = nnx.split(nnx.eval_shape(self._make, key))
        self.abstract = nnx.to_pure_dict(state)

    def init(self, key: jax.Array) -> dict:
        """Random params by the family's published initialisation, the head by head_init; works under jit with out_shardings."""
        return nnx.to_pure_dict(nnx.state(self._make(key)))

    def init_new(self, key: jax.Array) -> dict:
        """Only the part of `init(key)` that no checkpoint holds: the head (a language model has none) and the adapters."""
        return self._init_new(key)

    def _merge(self, params: dict) -> _Network:
        if jax.tree.structure(params) != jax.tree.structure(self.abstract):
            raise ValueError(f"params have other keys than the model: {sorted(set(paths(params)) ^ set(paths(self.abstract)))}")
        assert all(hasattr(leaf, "astype") for leaf in jax.tree.leaves(params)), "a parameter is not an array"
        return nnx.merge(self._graph, params)

    def _rows(self, batch: dict) -> tuple[list[jax.Array], dict]:
        """The batch's tokens, segments and positions as [cells * rows, time], and what the backbone is told of it."""
        flat = [batch[k].reshape(-1, batch[k].shape[-1]) for k in ("tokens", "segments", "positions")]
        # One place for a document in a cell: then no row holds two, and the shapes say so.
        return flat, {"one_document": batch["documents"].shape[-1] == 1}

    def _states(self, network: _Network, batch: dict, dropout_key=None) -> jax.Array:
        """Hidden states before the final norm, [cells, rows, time, embed]; see Backbone."""
        flat, options = self._rows(batch)
        states = network.backbone(*flat, dropout_key, **options)
        return states.reshape(*batch["tokens"].shape, -1)

    def apply(self, params: dict, batch: dict, dropout_key: jax.Array | None = None) -> jax.Array:
        """The head's output for each document, float32 [cells, slots, classes]; empty slots hold finite values of no meaning.

        classifier: logits. lm: one number, the sum in nats of the document's next-token negative log-likelihoods (0 in empty
        slots). Dropout is on only with `dropout_key` (one per step) and a rate above 0.
        """
        network = self._merge(params)
        x = self._states(network, batch, dropout_key)
        norm = network.backbone.final_norm
        if self.head == "lm":
            return heads.next_token_nll(norm(x), self._table(network), batch, self.config.logit_cap)
        if self.readout == "mean":
            x = heads.mean_over_tokens(norm(x), batch["segments"], batch["documents"])
        elif self.readout == "first":
            x = norm(heads.gather_first(x, batch["last"], batch["positions"]))
        else:
            x = norm(heads.gather_last(x, batch["last"]))
        x = spread(x)
        if "pooler" in params:
            x = network.pooler(x.astype(self.compute.dtype))
        return network.head(x)

    def hidden(self, params: dict, batch: dict, all_layers: bool = False) -> jax.Array:
        """Hidden states after the final norm, [cells, rows, time, embed] in the compute type.

        `all_layers`: [layers + 1, cells, rows, time, embed] as transformers' hidden_states: the embeddings, the output of
        each layer but the last, and the last one's after the final norm.
        """
        network = self._merge(params)
        if not all_layers:
            return network.backbone.final_norm(self._states(network, batch))
        flat, options = self._rows(batch)
        states = network.backbone.read(*flat, tuple(range(self.config.layers + 1)), lambda x: x, **options)
        return states.reshape(-1, *batch["tokens"].shape, states.shape[-1])

    def features(self, params: dict, batch: dict, layers: tuple[int, ...], pool: str = "last") -> jax.Array:
        """Each document's hidden state at some layers, float32 [len(layers), cells, slots, embed]; empty slots hold no meaning.

        `layers`: ascending numbers as in `hidden` (0 = embeddings); layers above the last of them are not computed, and no
        layer's hidden states are kept whole. `pool`: last (the document's last token) | mean (over its tokens).
        """
        if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] <= self.config.layers:
            raise ValueError(f"layers {layers}: expected ascending numbers from 0 to {self.config.layers}")
        assert pool in POOLS, pool
        network = self._merge(params)
        flat, options = self._rows(batch)

        def pick(x):
            x = x.reshape(*batch["tokens"].shape, -1)
            if pool == "mean":
                return heads.mean_over_tokens(x, batch["segments"], batch["documents"])
            return heads.gather_last(x, batch["last"]).astype(jnp.float32)

        return network.backbone.read(*flat, tuple(layers), pick, **options)

    def logits(self, params: dict, batch: dict) -> jax.Array:
        """The language model's logits, float32 [cells, rows, time, vocab] (large: for tests and small models)."""
        network = self._merge(params)
        x = network.backbone.final_norm(self._states(network, batch))
        return heads.vocabulary_logits(x, self._table(network), self.config.logit_cap)

    def continuations(self, params: dict, batch: dict) -> jax.Array:
        """Log-likelihoods in nats of tokens after each document, float32 [cells, slots, alternatives] (0 where none is asked for).

        `batch["targets"]`: int32 [cells, slots, alternatives, n]. The last of the n is the token after the document's last, the one
        before it the token after its last but one, and so on; -1 = not asked for. Only the logits of these places are computed.
        """
        network = self._merge(params)
        x = heads.gather_ends(self._states(network, batch), batch["last"], batch["targets"].shape[-1])
        return heads.continuation_logp(network.backbone.final_norm(x), self._table(network), batch["targets"], self.config.logit_cap)

    def next_tokens(self, params: dict, batch: dict) -> jax.Array:
        """The likeliest token after each document, int32 [cells, slots]; empty slots hold ids of no meaning."""
        network = self._merge(params)
        x = network.backbone.final_norm(heads.gather_last(self._states(network, batch), batch["last"]))
        return jnp.argmax(heads.vocabulary_logits(x, self._table(network), None), axis=-1)  # a cap changes no order

    def _table(self, network: _Network) -> jax.Array:
        """[vocab, embed] in the compute type: the tied embedding, or the language model's own output matrix."""
        table = network.backbone.embed.tokens.embedding[...] if self.config.tied else network.lm_head.kernel[...].T
        return table.astype(self.compute.dtype)


@cache
def build(config: Architecture, *, head: str, classes: int = 2, dtype: str = "float32", param_dtype: str = "float32",
          remat: str = "none", attention: str = "auto", dropout: float = 0.0, readout: str = "auto",
          head_init: str = "zeros", lora: Lora | None = None) -> Model:
    """The Model for these arguments (the config's keys of the same names); equal arguments give the identical object.

    `lora`: adapters on the layers' matrices. UserError: an argument that is not known, or that does not fit the model.
    """
    choices = {"head": (head, ("classifier", "lm")), "dtype": (dtype, DTYPES), "param_dtype": (param_dtype, DTYPES),
               "remat": (remat, REMAT), "attention": (attention, attention_lib.IMPLEMENTATIONS), "readout": (readout, heads.READOUTS),
               "head_init": (head_init, heads.HEAD_INITS)}
    for key, (value, known) in choices.items():
        if value not in known:
            raise UserError(f"{key}={value!r} is not known{nearest(value, known)}; expected one of {', '.join(known)}")
    if not 0.0 <= dropout < 1.0:
        raise UserError(f"dropout={dropout!r}: expected a rate from 0 to below 1")
    if head == "lm" and not config.causal:
        raise UserError(f"{config.family} is an encoder and predicts no next token; expected a decoder")
    if readout == "first" and config.causal:
        raise UserError("readout='first': a decoder's first token sees nothing of a document but itself; expected auto, last or mean")
    if head_init == "unembedding" and head == "classifier":
        if not config.causal:
            raise UserError(f"head_init='unembedding': {config.family} is an encoder and predicts no next token; expected zeros or normal")
        if readout not in ("auto", "last"):
            raise UserError(f"readout={readout!r}: head_init='unembedding' reads the last token, as the language model does; expected "
                            "auto or last")
    adapters = ()
    if lora is not None:
        whole = build(config, head=head, classes=classes, dtype=dtype, param_dtype=param_dtype, attention=attention, readout=readout)
        backbone = {"backbone": whole.abstract["backbone"]}
        adapters = lora_lib.adapters(lora, lora_lib.modules(backbone, config, FAMILIES[config.family]))
    compute = Compute(jnp.dtype(DTYPES[dtype]), jnp.dtype(DTYPES[param_dtype]), remat, attention, dropout, adapters)
    return Model(config, head, classes, compute, readout, head_init)


def load(folder, model: Model, shardings: dict | None = None, key: jax.Array | None = None) -> dict:
    """Params of `model` from the safetensors in `folder`; see w2s_jax.models.weights.load."""
    return weights.load(folder, model, FAMILIES[model.config.family], shardings, key)


def stored_dtype(folder) -> str:
    """The parameter type that keeps a checkpoint's digits: bfloat16 where all of its tensors are, else float32."""
    return weights.stored_dtype(folder)


def load_adapter(folder, params: dict, model: Model) -> dict:
    """`params` with the adapters (and the head) of a folder in PEFT's format; see w2s_jax.models.lora.read."""
    return lora_lib.read(folder, params, model, FAMILIES[model.config.family])


def merge(params: dict, lora: Lora) -> dict:
    """`params` without adapters, these added to the matrices; see w2s_jax.models.lora.merge."""
    return lora_lib.merge(params, lora.scale)


def adapter_files(params: dict, model: Model, lora: Lora, base: str, revision: str) -> tuple[dict, bytes]:
    """PEFT's two files of the adapters and the head; see w2s_jax.models.lora.files."""
    return lora_lib.files(params, model, FAMILIES[model.config.family], lora, base, revision)


def unembedding(folder, model: Model, ids) -> np.ndarray:
    """The language model's output vectors of the tokens `ids`; see w2s_jax.models.weights.unembedding."""
    return weights.unembedding(folder, model.config, FAMILIES[model.config.family], ids)


def save(folder, params: dict, raw: dict, tokenizer_files_from=None) -> None:
    """Write a language model in Hugging Face's format; see w2s_jax.models.writing.save. `raw`: its config.json."""
    config = parse(raw, "config.json")
    writing.save(folder, params, raw, config, FAMILIES[raw["model_type"]], tokenizer_files_from)
