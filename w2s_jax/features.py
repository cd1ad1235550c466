"""Frozen features: hidden states of a language model for whole sets of documents, computed once and kept on disk.

The store (w2s_jax/store.py) holds, for each model and way to read it,

    <name of the model>-<pool>-<12 hex>/        12 hex of sha256 over what makes the numbers: see `Store`
        <12 hex>/                               one forward pass
            layer-016.npy                       float32 [documents, embed]: layer 16 of 0 (embeddings) to the model's last
            index.json                          written last: a pass without it is unfinished, and is never read

index.json: `layers` that lie beside it; for each row of them `ids`, `text_shas` (of the text) and `token_shas` (of the tokens that
the model saw: w2s_jax.data.examples.text_sha); `model`, `pool`, `dtype`, `param_dtype`, `matmul_precision`, `embed`; `devices`,
`versions`. Without this package:

    index = json.load(open("index.json")); x = numpy.load("layer-016.npy", mmap_mode="r"); x[index["ids"].index("sciq/train/0/1")]

Numbers are float32 whatever the compute type, which it holds exactly. A document is known by its tokens.
"""

from __future__ import annotations

import numpy as np

from w2s_jax import forward, store, workload
from w2s_jax.data.examples import Examples, text_sha
from w2s_jax.errors import UserError

FORMAT = 1


def layer_number(layer: str, layers: int) -> int:
    """`middle` (half of the layers, rounded down: EleutherAI/w2s), `last`, or a number from 0 (the embeddings), of a model's `layers`."""
    named = {"middle": layers // 2, "last": layers}
    number = named[layer] if layer in named else int(layer) if str(layer).isdecimal() else -1
    if not 0 <= number <= layers:
        raise UserError(f"config.layer: {layer!r}, expected middle, last or a number from 0 (embeddings) to {layers} (the last layer)")
    return number


def layer_numbers(layer: str, layers: int) -> tuple[int, ...]:
    """As `layer_number`, and `all`: 0 to `layers`."""
    return tuple(range(layers + 1)) if layer == "all" else (layer_number(layer, layers),)


class Documents(store.Source):
    """Documents (with tokens) as a model reads them; `config` gives eval_batch_size (documents a forward pass; 0 = by tokens)."""

    key_column = "token_shas"

    def __init__(self, config, loaded: workload.Loaded, examples: Examples, pool: str):
        self.config, self.loaded, self.examples, self.pool = config, loaded, examples, pool
        self.ids, self.keys, self.width = examples.ids, [text_sha(t) for t in examples.tokens], loaded.model.config.embed

    def select(self, rows) -> Documents:
        return Documents(self.config, self.loaded, self.examples.select(rows), self.pool)

    def orders(self) -> list[np.ndarray]:
        tokens, mesh = self.examples.tokens, self.loaded.mesh
        self.batches = forward.pack(tokens, mesh, embed=self.width,
                                    tokens_per_batch=workload.forward_tokens(self.config, tokens, mesh, self.loaded.model))
        return [batch.documents[batch.documents >= 0] for batch in self.batches]

    def outputs(self, layers, start, stats, progress):
        model, pool = self.loaded.model, self.pool
        found = forward.passes((model, "features", layers, pool), lambda params, arrays: model.features(params, arrays, layers, pool),
                               self.loaded.params, self.batches[start:], self.loaded.mesh, stats=stats, progress=progress)
        return ((batch.documents, values) for batch, values in found)

    def columns(self, order) -> dict[str, list]:
        texts = self.examples.text_shas
        return super().columns(order) | {"text_shas": [texts[d] for d in order]}


class Store(store.Store):
    """The features of one model, read in one way.

    `folder`: of the store, local or gs://. `model`: fingerprint of the model's content (`workload.fingerprint_model`,
    `fingerprint_run`); `name`: for the folder's name only. `pool`: last | mean, see `models.Model.features`. The types and the
    precision of the products are those of the config that the model is opened with.
    """

    key_column = Documents.key_column

    def __init__(self, folder, model: str, name: str, *, pool: str, dtype: str, param_dtype: str, matmul_precision: str):
        super().__init__(folder, f"{name.replace('-', '_')}-{pool}", {
            "format": FORMAT, "model": model, "pool": pool, "dtype": dtype, "param_dtype": param_dtype,
            "matmul_precision": matmul_precision})

    def missing(self, examples: Examples, layers: tuple[int, ...]) -> int:
        """How many of the documents (with tokens) lack the features of one of the layers."""
        return self.missing_keys([text_sha(t) for t in examples.tokens], layers)

    def get(self, examples: Examples, layer: int) -> np.ndarray:
        """float32 [documents, embed] of one layer, in the documents' order. KeyError for a document that was not computed."""
        return self.rows_of([text_sha(t) for t in examples.tokens], layer)

    def fill(self, config, loaded: workload.Loaded, examples: Examples, layers: tuple[int, ...], *, stats: dict | None = None) -> None:
        """Compute what is missing of the documents' features at `layers`; see `store.Store.compute` and `Documents`."""
        self.compute(Documents(config, loaded, examples, self.about["pool"]), layers, stats)
