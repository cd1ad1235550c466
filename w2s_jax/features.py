"""Frozen features: hidden states of a model for whole sets of documents, computed once and kept on disk.

A store is a folder; any number of runs share it, one at a time writes. It holds, for each model and way to read it,

    <name of the model>-<pool>-<12 hex>/        12 hex of sha256 over what makes the numbers: see `Store`
        <12 hex>/                               one forward pass
            layer-016.npy                       float32 [documents, embed]: layer 16 of 0 (embeddings) to the model's last
            index.json                          written last: a pass without it is unfinished, and is never read

index.json: `layers` that lie beside it; for each row of them `ids`, `text_shas` (of the text) and `token_shas` (of the tokens that
the model saw: w2s_jax.data.examples.text_sha); `model`, `pool`, `dtype`, `param_dtype`, `matmul_precision`, `embed`; `devices`,
`versions`. Without this package:

    index = json.load(open("index.json")); x = numpy.load("layer-016.npy", mmap_mode="r"); x[index["ids"].index("sciq/train/0/1")]

Numbers are float32 whatever the compute type, which it holds exactly. A document is known by its tokens, so that another split,
another order or a later task that shares documents computes only what is new; so does another layer. A pass that was killed
goes on after its last 10 seconds on a local disk, and starts over on an object store. Any finished pass may be deleted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from etils import epath

from w2s_jax import forward, runlog, workload
from w2s_jax import mesh as mesh_lib
from w2s_jax.claim import Claim
from w2s_jax.data import packing
from w2s_jax.data.examples import Examples, text_sha
from w2s_jax.errors import UserError
from w2s_jax.files import is_object_store, read_json, write_json
from w2s_jax.progress import Progress

FORMAT = 1
INDEX, PROGRESS = "index.json", "progress.json"
SECONDS = 10.0  # between two notes of how far a pass is


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


class Store:
    """The features of one model, read in one way.

    `folder`: of the store, local or gs://. `model`: fingerprint of the model's content (`workload.fingerprint_model`,
    `fingerprint_run`); `name`: for the folder's name only. `pool`: last | mean, see `models.Model.features`. The types and the
    precision of the products are those of the config that the model is opened with.
    """

    def __init__(self, folder, model: str, name: str, *, pool: str, dtype: str, param_dtype: str, matmul_precision: str):
        self.about = {"format": FORMAT, "model": model, "pool": pool, "dtype": dtype, "param_dtype": param_dtype,
                      "matmul_precision": matmul_precision}
        key = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:12]
        self.path = epath.Path(folder).expanduser() / f"{re.sub(r'[^A-Za-z0-9._]+', '_', name)}-{pool}-{key}"

    def missing(self, examples: Examples, layers: tuple[int, ...]) -> int:
        """How many of the documents (with tokens) lack the features of one of the layers."""
        shas = [text_sha(t) for t in examples.tokens]
        known = [set(self._rows(layer)) for layer in layers]
        return len({sha for sha in shas if not all(sha in rows for rows in known)})

    def get(self, examples: Examples, layer: int) -> np.ndarray:
        """float32 [documents, embed] of one layer, in the documents' order. KeyError for a document that was not computed."""
        rows = self._rows(layer)
        found = [rows[text_sha(t)] for t in examples.tokens]
        arrays: dict = {}
        out = None
        for part in dict.fromkeys(part for part, _ in found):
            arrays[part] = self._load(part, layer)
            if out is None:
                out = np.empty((len(found), arrays[part].shape[1]), np.float32)
            here = [i for i, (p, _) in enumerate(found) if p == part]
            out[here] = arrays[part][[found[i][1] for i in here]]
        return out

    def fill(self, config, loaded: workload.Loaded, examples: Examples, layers: tuple[int, ...], *, stats: dict | None = None) -> None:
        """Compute what is missing of the documents' features at `layers`: one forward pass, none if nothing is missing.

        Waits while another process fills the store, and computes then what that one did not.

        Args:
          config: gives eval_batch_size (documents a forward pass; 0 = by tokens).
          loaded: the model on its mesh.
          examples: documents with tokens.
          stats: as for `forward.forward`; counts "documents" and "batches" that were computed, too.

        Raises:
          UserError: features that are not finite; no room on the disk.
        """
        place = self.path / ".claim"  # a folder of its own: a store is no run directory
        place.mkdir(parents=True, exist_ok=True)
        claim = Claim(place, wait=True)
        try:
            for needed, rows in self._needed(examples, tuple(sorted(set(layers)))).items():
                _Pass(self, config, loaded, examples.select(rows), needed, stats if stats is not None else {}).run()
        finally:
            claim.release()

    def _needed(self, examples: Examples, layers: tuple[int, ...]) -> dict[tuple[int, ...], list[int]]:
        """The layers that documents lack -> the rows of those documents, each text once, in the order of their hashes."""
        known = {layer: self._rows(layer) for layer in layers}
        needed: dict = {}
        for sha, row in sorted({text_sha(t): i for i, t in reversed(list(enumerate(examples.tokens)))}.items()):
            if lacks := tuple(layer for layer in layers if sha not in known[layer]):
                needed.setdefault(lacks, []).append(row)
        return needed

    def _rows(self, layer: int) -> dict[str, tuple[epath.Path, int]]:
        """Hash of a document's tokens -> (the pass that computed this layer of it, row)."""
        rows: dict = {}
        for file in sorted(self.path.glob(f"*/{INDEX}")) if self.path.is_dir() else ():
            index = read_json(file)
            if layer in index["layers"] and (file.parent / layer_file(layer)).exists():
                rows |= {sha: (file.parent, row) for row, sha in enumerate(index["token_shas"])}
        return rows

    def _load(self, part: epath.Path, layer: int) -> np.ndarray:
        """The array of a finished pass, mapped into memory where it is a local file."""
        file, index = part / layer_file(layer), read_json(part / INDEX)
        try:
            if is_object_store(file):
                array = np.load(io.BytesIO(file.read_bytes()), allow_pickle=False)
            else:
                array = np.load(os.fspath(file), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{file}: is damaged ({error}); delete {part} and run again") from None
        if array.dtype != np.float32 or array.shape != (len(index["token_shas"]), index["embed"]):
            raise UserError(f"{file}: is {array.dtype} {list(array.shape)}, expected float32 "
                            f"{[len(index['token_shas']), index['embed']]}; delete {part} and run again")
        return array


def layer_file(layer: int) -> str:
    return f"layer-{layer:03d}.npy"


@dataclasses.dataclass
class _Pass:
    """One forward pass over documents that streams into a folder of the store; rows are in the order of the pass."""

    store: Store
    config: object
    loaded: workload.Loaded
    examples: Examples
    layers: tuple[int, ...]
    stats: dict

    def run(self) -> None:
        model, mesh, tokens = self.loaded.model, self.loaded.mesh, self.examples.tokens
        batches = packing.forward_batches(tokens, cells=mesh_lib.cells(mesh), embed=model.config.embed,
                                          tokens_per_batch=workload.forward_tokens(self.config, tokens, mesh))
        orders = [batch.documents[batch.documents >= 0] for batch in batches]
        order = np.concatenate(orders)
        ends = np.cumsum([len(o) for o in orders])
        shas = [text_sha(tokens[d]) for d in order]
        # The name says what is computed in which batches, so that a pass of this name that was killed can be continued.
        name = hashlib.sha256(json.dumps([self.layers, shas, ends.tolist()]).encode()).hexdigest()[:12]
        self.width, self.documents = model.config.embed, len(order)
        with contextlib.ExitStack() as stack:
            part = self.store.path / name
            target = Path(stack.enter_context(tempfile.TemporaryDirectory()) if is_object_store(part) else part)
            (part / INDEX).unlink(missing_ok=True)  # of a finished pass that has lost a layer
            self._check_room(target)
            done = self._done(target, ends)
            rows = int(ends[done - 1]) if done else 0
            files = [stack.enter_context(self._open(target / layer_file(layer), rows)) for layer in self.layers]
            self._compute(batches, done, files, target)
            for file in files:
                _sync(file)
            if target != Path(part):
                part.mkdir(parents=True, exist_ok=True)
                for layer in self.layers:
                    with (target / layer_file(layer)).open("rb") as source, (part / layer_file(layer)).open("wb") as sink:
                        shutil.copyfileobj(source, sink)
            texts = self.examples.text_shas
            write_json(part / INDEX, self.store.about | {
                "layers": self.layers, "embed": self.width, "devices": runlog.devices(), "versions": runlog.versions(),
                "ids": [self.examples.ids[d] for d in order], "text_shas": [texts[d] for d in order], "token_shas": shas})
            (target / PROGRESS).unlink(missing_ok=True)

    def _compute(self, batches, done: int, files: list, target: Path) -> None:
        model, layers, pool = self.loaded.model, self.layers, self.store.about["pool"]
        skipped = sum(int((b.documents >= 0).sum()) for b in batches[:done])
        saved = time.monotonic()
        with Progress(self.documents, start=skipped, label="features", unit="doc") as progress:
            outputs = forward.passes((model, "features", layers, pool), lambda params, arrays: model.features(params, arrays, layers, pool),
                                     self.loaded.params, batches[done:], self.loaded.mesh, stats=self.stats, progress=progress)
            for number, (batch, found) in enumerate(outputs, done + 1):
                found = np.asarray(found[:, batch.documents >= 0], "<f4")
                if not np.isfinite(found).all():
                    bad = self.examples.ids[batch.documents[batch.documents >= 0][np.argmin(np.isfinite(found).all((0, 2)))]]
                    raise UserError(f"the model's hidden states are not finite, first for document {bad!r}")
                for file, layer in zip(files, found):
                    file.write(np.ascontiguousarray(layer).data)
                self.stats["batches"] = self.stats.get("batches", 0) + 1
                self.stats["documents"] = self.stats.get("documents", 0) + found.shape[1]
                if time.monotonic() - saved >= SECONDS:
                    for file in files:
                        _sync(file)
                    write_json(target / PROGRESS, {"batches": number})
                    saved = time.monotonic()

    def _header(self) -> bytes:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (self.documents, self.width)})
        return header.getvalue()

    def _done(self, target: Path, ends: np.ndarray) -> int:
        """The batches of this pass that lie there from an attempt that was killed."""
        try:
            done = read_json(target / PROGRESS)["batches"]
            sizes = [(target / layer_file(layer)).stat().st_size for layer in self.layers]
        except (UserError, OSError, KeyError):
            return 0
        known = isinstance(done, int) and 0 < done <= len(ends)
        return done if known and min(sizes) >= len(self._header()) + int(ends[done - 1]) * self.width * 4 else 0

    @contextlib.contextmanager
    def _open(self, file: Path, rows: int):
        """The file of a layer, to be written on after `rows` rows."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "r+b" if rows else "w+b") as opened:
            header = self._header()
            opened.write(header)
            opened.seek(len(header) + rows * self.width * 4)
            opened.truncate()
            yield opened

    def _check_room(self, target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        needed, free = len(self.layers) * self.documents * self.width * 4, shutil.disk_usage(target).free
        if needed > free + sum(f.stat().st_size for f in target.glob("*.npy")):
            raise UserError(f"config.features: {target} has room for {free / 1e9:.3g} GB, expected {needed / 1e9:.3g} GB for "
                            f"{self.documents} documents x {len(self.layers)} layers x {self.width} features")


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


