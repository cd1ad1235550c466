"""What the language stages share: a model on its mesh, documents as tokens, fingerprints, predictions on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from etils import epath

from w2s_jax import checkpoint as ckpt
from w2s_jax import forward, hub, ladder, models, runlog, train
from w2s_jax import mesh as mesh_lib
from w2s_jax.data import labels as labels_lib
from w2s_jax.data import splits
from w2s_jax.data.examples import Examples
from w2s_jax.errors import UserError
from w2s_jax.outcomes import evaluate, fingerprint_run, finished, run_identity, shown, summary, write_predictions
from w2s_jax.progress import Progress, say

__all__ = [
    "Limits", "Loaded", "arch_bytes", "build", "evaluate", "fingerprint_labels", "fingerprint_model", "fingerprint_run", "fingerprint_task",
    "finished", "forward_tokens", "model_bytes", "open_model", "precision", "predict", "restore", "run_identity", "shown", "summary",
    "tokenized", "write_predictions",
]  # fmt: skip

FORWARD_TOKENS = {"cpu": 8192}  # tokens of a forward pass on one device; others take _FORWARD_TOKENS
_FORWARD_TOKENS = 65536


# --------------------------------------------------------------------------- fingerprints


def fingerprint_model(model: str, revision: str, planned: dict | None = None) -> str:
    """What identifies a model's content: its pretraining run, its hub commit, or a hash of its files."""
    parent = epath.Path(model).parent
    made = (planned and str(parent) in planned) or (hub.is_local(model) and run_identity(parent))
    if made and epath.Path(model).name == "model":
        return fingerprint_run(parent, planned) + "/model"
    folder = hub.resolve(model, revision)
    return f"hub:{model}@{folder.commit}" if folder.commit else f"sha256:{hub.fingerprint(folder)}"


def model_bytes(model: str, revision: str) -> float:
    """Size of a model's safetensors."""
    return float(sum(f.stat().st_size for f in Path(hub.resolve(model, revision).path).glob("*.safetensors")))


def arch_bytes(config) -> float:
    """Size in float32 of the model that a pretrain config makes (12 width^2 a block; embeddings)."""
    a = config.arch
    return model_bytes(config.model, config.revision) if config.model else 4.0 * a.width * (12 * a.layers * a.width + a.context + 2000)


def fingerprint_task(config, planned: dict | None = None) -> str:
    """What identifies a task's content; a sweep, which passes `planned`, reads each task once."""
    if planned is None:
        return splits.fingerprint(config)
    key = ("task", config.task, config.task_dir, config.task_revision, config.data_seed)
    if key not in planned:
        planned[key] = splits.fingerprint(config)
    return planned[key]


def fingerprint_labels(path, planned: dict | None = None, read: labels_lib.Labels | None = None) -> str:
    """What identifies a set of labels: the run that made it, or the hash of a file (`read`: its content, where it is read already)."""
    if not path:
        return ""
    if planned and str(path) in planned or epath.Path(path).is_dir():
        return fingerprint_run(path, planned)
    folder = epath.Path(path).parent
    made = folder.parent
    if folder.name == "predictions" and (planned and str(made) in planned or run_identity(made)):
        return f"{fingerprint_run(made, planned)}/{epath.Path(path).name}"
    return f"labels:{(read or labels_lib.read(path)).fingerprint}"


# --------------------------------------------------------------------------- documents


@dataclasses.dataclass(frozen=True)
class Limits:
    """When a document is too long: at `max_length` tokens or more under `drop` and `error`, above it under `truncate`;
    always above the model's positions."""

    max_length: int
    positions: int
    overlong: str

    def fits(self, tokens: int) -> bool:
        if self.overlong == "truncate":
            return tokens <= self.cut
        return tokens < self.max_length and tokens <= self.positions

    @property
    def cut(self) -> int:
        return min(self.max_length, self.positions)


def tokenized(examples: Examples, folder, limits: Limits, vocab: int, what: str, notes: list[str] | None = None) -> tuple[Examples, dict]:
    """Examples with tokens (with those that the model's tokenizer puts around a text), over-long and empty documents dealt with,
    and the counts `{"overlong", "truncated", "empty"}`.

    Counts that are not 0 make a line, which joins `notes` where they are given, and is printed at once where not.

    Raises:
      UserError: an over-long document under `overlong=error`, a token id outside the vocabulary, or nothing left.
    """
    given = examples.tokens is not None
    tokens = examples.tokens if given else hub.tokenize(folder, examples.texts, special=True)
    for ident, ids in zip(examples.ids, tokens):
        if len(ids) and (ids.max() >= vocab or ids.min() < 0):
            bad = int(ids.max() if ids.max() >= vocab else ids.min())
            raise UserError(f"task: document {ident} holds token id {bad}, expected ids from 0 to {vocab - 1} (the model's vocabulary)")
    long = [i for i, ids in enumerate(tokens) if not limits.fits(len(ids))]
    counts = {"overlong": 0, "truncated": 0, "empty": sum(len(ids) == 0 for ids in tokens)}
    if long and limits.overlong == "error":
        i = long[0]
        raise UserError(f"overlong=error: document {examples.ids[i]} has {len(tokens[i])} tokens; max_length={limits.max_length}, "
                        f"the model has {limits.positions} positions; expected shorter documents, or overlong=drop or truncate")
    if limits.overlong == "truncate":
        end = hub.closing_tokens(folder) if long and not given else 0  # a text that is cut is still closed as the model expects it
        if end >= limits.cut:
            raise UserError(f"max_length={limits.cut}: the tokenizer alone puts {end} tokens behind a text; expected a larger max_length")
        tokens = [ids if len(ids) <= limits.cut else np.concatenate([ids[: limits.cut - end], ids[len(ids) - end :]]) for ids in tokens]
        counts["truncated"] = len(long)
    else:
        counts["overlong"] = len(long)
    keep = [i for i, ids in enumerate(tokens) if len(ids) and (limits.overlong == "truncate" or limits.fits(len(ids)))]
    if not keep:
        raise UserError(f"max_length={limits.max_length}: none of the {len(examples)} {what} documents fits; expected a larger max_length")
    said = [f"{n} {k}" for k, n in counts.items() if n]
    if said:
        (say if notes is None else notes.append)(
            f"{what}: of {len(examples)} documents {', '.join(said)} "
            f"(max_length {limits.max_length}, positions {limits.positions}, overlong={limits.overlong})")
    return examples.replace(tokens=[np.asarray(t, np.int32) for t in tokens]).select(keep), counts


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run trains on, as tokens. `train`, `val`: with the truth; `given`: both, one after the other, with the labels (and
    weights) to train on; `dropped`: counts by reason."""

    train: Examples
    val: Examples
    given: Examples
    dropped: dict[str, int]


def training_parts(prepared: splits.Prepared, labels: labels_lib.Labels | None, folder, limits: Limits, vocab: int,
                   notes: list[str]) -> Parts:
    """The training and validation documents, over-long ones dealt with (see `tokenized`), matched with `labels` (None = the truth).

    Raises:
      UserError: as `tokenized`; labels that do not fit the documents.
    """
    dropped, parts = dict(prepared.n_dropped), {}
    for part, what in ((prepared.train, "training"), (prepared.val, "validation")):
        parts[what] = part
        if len(part):
            parts[what], counts = tokenized(part, folder, limits, vocab, what, notes)
            for key, n in counts.items():
                dropped[key] = dropped.get(key, 0) + n
    train_part, val = parts.values()
    given = splits.concat(*(part for part in parts.values() if len(part)))
    if labels:
        given = labels_lib.attach(given, labels, frozenset(prepared.train.ids + prepared.val.ids) - set(given.ids))
    return Parts(train_part, val, given, dropped)


# --------------------------------------------------------------------------- models


@dataclasses.dataclass
class Loaded:
    """A model with its parameters on a mesh."""

    model: models.Model
    params: dict
    mesh: jax.sharding.Mesh
    folder: hub.Folder
    replicated: list[str]  # what lies on the mesh in a lesser way (mesh.lesser)
    step: int = 0  # of the checkpoint that they come from


def precision(config):
    """Context manager for `config.matmul_precision`."""
    return jax.default_matmul_precision(None if config.matmul_precision == "default" else config.matmul_precision)


def param_dtype(config, folder: hub.Folder) -> str:
    """The type of the parameters: `config.param_dtype`, or that of the checkpoint where it says auto."""
    return models.stored_dtype(folder) if config.param_dtype == "auto" else config.param_dtype


def build(config, folder: hub.Folder, head: str = "classifier") -> models.Model:
    """The model that a config names, without parameters; one that leaves remat open is for forward passes."""
    remat = "none" if config.remat == "auto" else config.remat
    return models.build(
        models.read_config(folder), head=head, dtype=config.dtype, param_dtype=param_dtype(config, folder), remat=remat,
        attention=config.attention, dropout=float(config.get("dropout", 0.0)), readout=config.readout, head_init=config.head_init,
        lora=lora(config))


def lora(config) -> models.Lora | None:
    """The adapters of a run: None where it trains none."""
    if config.get("train") != "lora":
        return None
    c = config.lora
    return models.Lora(int(c.rank), float(c.alpha), float(c.dropout), c.targets, bool(c.rslora))


def open_model(config, *, head: str = "classifier", seed: int = 0) -> Loaded:
    """Build and load `config.model` on `config.mesh` (left open: as suits forward passes); `seed` initialises the head and the
    adapters, unless the latter start from `config.lora.init`."""
    folder = hub.resolve(config.model, config.revision)
    model = build(config, folder, head)
    mesh = _mesh(config, model)
    shardings = _shardings(config, mesh, model)
    params = models.load(folder, model, shardings, jax.random.key(seed))
    if head == "classifier" and config.head_init == "unembedding":
        params["head"]["kernel"] = mesh_lib.put(_unembedding(config, model, folder), params["head"]["kernel"].sharding)
    if lora(config) and config.lora.init:
        params = models.load_adapter(config.lora.init, params, model)
    return Loaded(model, params, mesh, folder, mesh_lib.lesser(model, mesh))


def _mesh(config, model) -> jax.sharding.Mesh:
    """config.mesh on the devices here; where it is left open, one that serves forward passes."""
    tokens = FORWARD_TOKENS.get(jax.default_backend(), _FORWARD_TOKENS)
    return mesh_lib.make_mesh(ladder.place(model, config.mesh, tokens=tokens, offload=_offload(config)))


def _offload(config) -> str:
    """What of a model lies in the host's memory; a run's checkpoint may be read where there is none to lie in."""
    return config.get("offload", "none") if ladder.has_host_memory() else "none"


def _shardings(config, mesh, model) -> dict:
    return mesh_lib.param_shardings(mesh, model.abstract, _offload(config))[0]


def _unembedding(config, model: models.Model, folder: hub.Folder) -> np.ndarray:
    """The head that head_init="unembedding" starts from, float32 `[embed, 2]`: the output vectors of the two answers' tokens
    (Burns et al. 2023, appendix A)."""
    ids = [hub.single_token(folder, answer) for answer in config.answers]
    if len(set(ids)) < len(ids):
        raise UserError(f"answers: {tuple(config.answers)} are the same token to the tokenizer in {folder.path}; expected different ones")
    return models.unembedding(folder, model, ids)


def restore(source: runlog.LoadedRun, config=None) -> Loaded:
    """The model of a trained run, from its newest checkpoint, on the mesh of `config` (default: the run's own config).

    A checkpoint holds what was trained; the rest is read from the base model, whose content must be the same still.

    Raises:
      UserError: no checkpoint, or the base model changed.
    """
    config = source.config if config is None else config
    trained = source.config
    checkpoints = ckpt.Checkpoints(source.path, read_only=True)
    try:
        steps = checkpoints.steps()
        if not steps:
            raise UserError(f"run={source.path}: has no checkpoint (keep={trained.get('keep')!r}); expected one with keep=params or all")
        revision = source.record.get("revision") or trained.revision  # the commit that it was trained from, wherever main is now
        folder = hub.resolve(trained.model, revision)
        model = build(config, folder)
        mesh = _mesh(config, model)
        shardings = _shardings(config, mesh, model)
        wanted, rest = train.split_params(model.abstract, trained.train)
        params, _ = checkpoints.restore(steps[0], ckpt.abstract(wanted, train.split_params(shardings, trained.train)[0]))
        if rest:
            now, then = fingerprint_model(trained.model, revision), source.record["identity"]["model"]
            if now != then:
                raise UserError(f"run={source.path}: its base model {trained.model} is {now}, expected {then}: the files changed since")
            whole = models.load(folder, model, shardings, jax.random.key(trained.seed))
            params = train.merge_params(params, train.split_params(whole, trained.train)[1])
    finally:
        checkpoints.close()
    return Loaded(model, params, mesh, folder, mesh_lib.lesser(model, mesh), steps[0])


def forward_tokens(config, tokens: Sequence[np.ndarray], mesh, model, held: int = 0) -> int:
    """Tokens of a forward pass: from `eval_batch_size` documents, else by the kind of device, and by what fits its memory beside
    `held` bytes (of training)."""
    cells = mesh_lib.cells(mesh)
    wanted = tokens_per_batch(config, tokens, cells, mesh.devices.flat[0].platform)
    if config.eval_batch_size:
        return wanted
    return ladder.forward_tokens(model, mesh, wanted // cells, max(len(t) for t in tokens), held,
                                 offload=_offload(config)) * cells


def tokens_per_batch(config, tokens: Sequence[np.ndarray], cells: int, platform: str) -> int:
    """Tokens of a pass over `cells` places along data x fsdp of a platform, which need not be here, whatever memory it has."""
    if config.eval_batch_size:
        return max(int(config.eval_batch_size * float(np.mean([len(t) for t in tokens]))), max(len(t) for t in tokens))
    return FORWARD_TOKENS.get(platform, _FORWARD_TOKENS) * cells


def predict(config, model, params, examples: Examples, mesh, *, label: str, stats: dict) -> np.ndarray:
    """Logits of every document, float32 `[documents, classes]`, with a progress bar."""
    with Progress(len(examples), label=label, unit="doc") as progress:
        return forward.predict(model, params, examples.tokens, mesh, tokens_per_batch=forward_tokens(config, examples.tokens, mesh, model),
                               stats=stats, progress=progress)
