"""Pretrain a language model on next-token prediction, by the trainer that fine-tunes, and save it in Hugging Face's format.

Writes the run directory that DESIGN.md describes, without predictions, and `<workdir>/model/`: config.json,
model.safetensors and the tokenizer's files, which `model=<workdir>/model` of every other stage takes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from w2s_jax import config as config_lib
from w2s_jax import feeding, forward, hub, ladder, losses, models, optimizers, train, workload
from w2s_jax import mesh as mesh_lib
from w2s_jax.data import corpus as corpus_lib
from w2s_jax.data import packing, world
from w2s_jax.errors import UserError
from w2s_jax.progress import say
from w2s_jax.runlog import Run

WORLD = "world"


# --------------------------------------------------------------------------- what the run is


def identity(config, planned: dict | None = None, text: corpus_lib.Text | None = None) -> dict:
    """The run's identity; `planned` = identities of runs that a sweep will make, `text` = the corpus where it is read already."""
    if config.corpus == WORLD:
        content = f"world:{world.fingerprint()}"
    else:
        content = f"sha256:{(text or corpus_lib.read(config.corpus)).fingerprint}"
    prints = {"model": "", "corpus": content, "tokenizer": ""}
    if config.model:
        prints["model"] = workload.fingerprint_model(config.model, config.revision, planned)
    if config.tokenizer:
        folder = hub.resolve_tokenizer(config.tokenizer, config.revision)
        prints["tokenizer"] = f"hub:{config.tokenizer}@{folder.commit}" if folder.commit else f"sha256:{hub.fingerprint(folder)}"
    return config_lib.identity(config, prints)


def run(config, workdir, *, rerun: bool = False, planned: dict | None = None, **_) -> dict:
    """Run the stage in `workdir` and return its results (those of results.json).

    Raises:
      UserError: bad input, found before anything is written; a non-finite loss.
    """
    start = time.perf_counter()
    text = None if config.corpus == WORLD else corpus_lib.read(config.corpus)
    identity_ = identity(config, planned, text)
    if not rerun and (epath.Path(workdir) / "results.json").exists():
        with Run.open(workdir, config, identity_) as held:
            if held.results is not None:
                say(f"{workload.shown(workdir)}: done already ({summary(held.results)}); --rerun redoes it")
                return held.results
    with workload.precision(config), _tokenizer(config) as folder:
        return _run(config, workdir, text, folder, identity_, rerun, start)


@contextlib.contextmanager
def _tokenizer(config):
    """The folder of the tokenizer that the run uses and hands on."""
    if config.tokenizer:
        yield hub.resolve_tokenizer(config.tokenizer, config.revision)
    elif config.model:
        yield hub.resolve(config.model, config.revision)
    elif config.corpus == WORLD:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in world.tokenizer_files().items():
                (Path(folder) / name).write_text(content)
            yield hub.Folder(folder)
    else:
        raise UserError(f"tokenizer: empty, expected a folder or a hub id: corpus={config.corpus} is not the world, whose words "
                        "are all that its own tokenizer knows")


# --------------------------------------------------------------------------- documents


def _pieces(config, text: corpus_lib.Text | None, folder, notes: list[str]) -> tuple[list, list, list[str], dict]:
    """Token ids for training and held out, names of the training pieces, and counts for the results; lines to print join `notes`."""
    if text is None:
        # One sentence for each place in a batch: no sentence is drawn for one step and met again in another.
        documents = world.corpus(config.seed, config.steps * config.batch_size + config.n_heldout)
        unique = {sentence: i for i, sentence in enumerate(dict.fromkeys(documents))}
        ids = hub.tokenize(folder, unique)
        tokens = [ids[unique[sentence]] for sentence in documents]
    else:
        tokens = hub.tokenize(folder, text.documents)
    pieces = corpus_lib.cut(tokens, config.max_length)
    counts = pieces.counts
    if not counts["pieces"]:
        raise UserError(f"corpus={config.corpus}: {counts['documents']} documents, none of two tokens or more; there is nothing to predict")
    if text is None:
        fit, held = np.split(np.arange(counts["pieces"]), [counts["pieces"] - config.n_heldout])
        names = [f"sentence {i}" for i in fit]
    else:
        fit, held = corpus_lib.hold_out(pieces, config.n_heldout, config.data_seed)
        names = [f"{text.names[d]}, piece {i}" for i, d in zip(fit.tolist(), pieces.document[fit].tolist())]
        if text.left_out:
            more = " ..." if len(text.left_out) > 5 else ""
            notes.append(f"corpus: {len(text.left_out)} files of other kinds are left out ({', '.join(text.left_out[:5])}{more})")
    notes.append(f"corpus: {counts['documents']} documents, {counts['tokens']} tokens; {counts['cut']} documents cut into pieces "
                 f"of at most {config.max_length} tokens; {counts['empty']} empty, {counts['single']} of one token; "
                 f"{len(fit)} pieces for training, {len(held)} held out")
    return [pieces.tokens[i] for i in fit], [pieces.tokens[i] for i in held], names, counts


def learning_rates(config) -> np.ndarray:
    """The rate of every update, float64 `[steps]`: `schedule`, ending at `final_lr_fraction` of the peak instead of at 0."""
    share = optimizers.learning_rates(config.schedule, 1.0, config.steps, config.warmup_steps)
    falling = np.arange(config.steps) >= config.warmup_steps
    return config.learning_rate * np.where(falling, config.final_lr_fraction + (1 - config.final_lr_fraction) * share, share)


# --------------------------------------------------------------------------- the model


def _shape(config, folder, source: hub.Folder | None) -> tuple[models.Architecture, dict]:
    """The language model's sizes and its config.json: the checkpoint's, or config.arch's."""
    if source:
        raw = models.read_raw(source)
    else:
        sizes = {key: config.arch[key] for key in ("width", "layers", "heads", "context")}
        raw = world.model_config(**sizes, vocab_size=hub.vocabulary_size(folder))
    shape = models.parse(raw, str(Path(source.path) / "config.json") if source else "arch")
    if config.max_length > shape.max_positions:
        raise UserError(f"max_length={config.max_length}: the model has {shape.max_positions} positions, expected at most that")
    return shape, raw


def _build(config, shape: models.Architecture) -> models.Model:
    return models.build(shape, head="lm", dtype=config.dtype, param_dtype=config.param_dtype, remat=config.remat,
                        attention=config.attention, dropout=float(config.dropout))


def _parameters(config, model, mesh, source: hub.Folder | None) -> tuple[dict, list[str]]:
    """The parameters on their mesh, random or the checkpoint's, and those that fell back to a lesser sharding."""
    shardings, _ = mesh_lib.param_shardings(mesh, model.abstract, config.offload)
    if source:
        params = models.load(source, model, shardings)
    else:
        params = jax.jit(model.init, out_shardings=shardings)(jax.random.key(config.seed))
    return params, mesh_lib.lesser(model, mesh)


@dataclasses.dataclass(frozen=True)
class _NextToken:
    """The likeliest token after each document, in the place of a head: `apply` gives its id, float32 `[cells, slots, 1]`."""

    model: models.Model

    @property
    def config(self):
        return self.model.config

    def apply(self, params, batch):
        return self.model.next_tokens(params, batch).astype(jnp.float32)[..., None]


def facts_known(config, model, params, mesh, folder, stats: dict) -> dict:
    """Shares of the world's facts that a language model knows: of all, and by quarters of the creatures, the most talked about first.

    Known = after "the A of the E is" the likeliest token is the value.
    """
    prompts = world.fact_prompts()
    tokens = hub.tokenize(folder, [p["text"] for p in prompts])
    answers = np.array([ids[0] for ids in hub.tokenize(folder, [p["value"] for p in prompts])])
    size = workload.forward_tokens(config, tokens, mesh, model)
    said = forward.predict(_NextToken(model), params, tokens, mesh, tokens_per_batch=size, stats=stats)
    known = said[:, 0] == answers
    return {"facts_known": float(known.mean()), "facts_known_by_quarter": [float(q.mean()) for q in np.array_split(known, 4)]}


# --------------------------------------------------------------------------- the run


def _run(config, workdir, text, folder, identity_: dict, rerun: bool, start: float) -> dict:
    notes: list[str] = []  # said once the input is known to be good
    fit, held, names, counts = _pieces(config, text, folder, notes)
    source = hub.resolve(config.model, config.revision) if config.model else None
    shape, raw = _shape(config, folder, source)
    largest = max(int(ids.max()) for ids in (*fit, *held))
    if largest >= shape.vocab:
        raise UserError(f"tokenizer: gives token id {largest}, expected ids from 0 to {shape.vocab - 1} (the model's vocabulary)")

    predicted = np.array([len(ids) - 1 for ids in fit], np.float32)
    corpus = feeding.Texts(fit, predicted[:, None], predicted, names)
    passes = config.steps * config.batch_size / len(fit)
    batches = packing.batch_stream(len(fit), config.batch_size, int(np.ceil(passes)), config.shuffle, config.seed)[:config.steps]
    stats: dict = {}
    fitted = ladder.fit(config, lambda c: _build(c, shape), corpus, batches, losses.make("next_token", ground_truth=True), optimizers.of,
                        stats=stats)
    config, plan, program, model, mesh = fitted.config, fitted.plan, fitted.program, fitted.model, fitted.mesh
    notes += [line for line in (program.optimizer.notice, fitted.line) if line]
    with ladder.answered("loading", fitted):
        params, fallen = _parameters(config, model, mesh, source)
    parameters = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(model.abstract))

    with Run.open(workdir, config, identity_, rerun=rerun) as run_, ladder.answered("pretraining", fitted):
        run_.start({
            "revision": source.commit if source else "", "memory": fitted.record, "mesh": dict(mesh.shape),
            "shapes": [[s.rows, s.time] for s in plan.shapes], "cells": plan.cells,
            "microbatches": plan.microbatches, "steps": config.steps, "parameters": parameters, "lesser_sharding": fallen, "parents": [],
        })
        for note in notes:
            say(note)
        say(f"{workload.shown(workdir)}: {parameters} parameters, {config.steps} steps of {config.batch_size} pieces, {passes:.3g} passes, "
            f"shapes {', '.join(f'{s.rows}x{s.time}' for s in plan.shapes)}, padding {plan.padding_fraction:.1%}")

        def heldout(params) -> dict:
            size = workload.forward_tokens(config, held, mesh, model, fitted.memory.optimizer_state)
            nll = forward.predict(model, params, held, mesh, tokens_per_batch=size, stats=stats)
            return {"heldout_loss": float(nll.sum(dtype=np.float64) / sum(len(ids) - 1 for ids in held))}

        params = train.train(config, program, params, corpus, plan, learning_rates(config), run_, on_eval=heldout if held else None,
                             label="pretrain", stats=stats)
        results = heldout(params) if held else {}
        if config.corpus == WORLD:
            results |= facts_known(config, model, params, mesh, folder, stats)
        models.save(epath.Path(run_.path) / "model", params, raw, tokenizer_files_from=folder)
        results |= {
            "n_heldout": len(held), "n_train": len(fit), "passes": passes, "steps": config.steps, "parameters": parameters,
            "corpus": counts | {"files_left_out": len(text.left_out) if text else 0}, "tokens_trained": plan.useful,
            "train_teraflop": 6e-12 * parameters * plan.useful, "padding_fraction": plan.padding_fraction,
            "programs": len(stats.get("programs", ())), "compile_seconds": stats.get("compile_seconds", 0.0),
            "seconds": time.perf_counter() - start,
        }
        train.finish_checkpoints(config, run_)
        run_.finish(results)
    say(f"{workload.shown(workdir)}: {summary(results)}")
    return results


def summary(results: dict) -> str:
    """The line that a finished run prints."""
    parts = [f"{results['parameters']} parameters"]
    if "heldout_loss" in results:
        parts.append(f"held-out loss {results['heldout_loss']:.4f} nats a token on {results['n_heldout']} pieces")
    if "facts_known" in results:
        parts.append(f"facts known {results['facts_known']:.1%}")
    return ", ".join(parts)
