"""Export a trained run as a folder in Hugging Face's format: transformers' own class for sequence classification where it
has one that reads what the run's head reads, else the backbone beside the head, in `score.safetensors`. Adapters are merged
into the matrices, or, with `merge=False`, written alone in PEFT's format.

Writes `<workdir>/model/`: config.json, safetensors, the tokenizer's files, and a README.md with the lines of Python that
compute the run's logits (tests/test_export.py runs them).
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from safetensors.numpy import save

from w2s_jax import __version__, distributed, hub, models, peft, registry, runlog, workload
from w2s_jax import mesh as mesh_lib
from w2s_jax.errors import UserError
from w2s_jax.files import plain
from w2s_jax.models import heads, writing
from w2s_jax.models.families import Family, qwen1
from w2s_jax.progress import Progress, say
from w2s_jax.runlog import Run

SCORE = "score.safetensors"
# Keys of the base's config.json that say nothing true of what is written: remote code, quantization, another head's task.
DROPPED = ("torch_dtype", "auto_map", "quantization_config", "_name_or_path", "problem_type", "num_labels")
SAMPLE = "The answer is: 42, isn't it?"  # cut by two readers of one tokenizer, to see whether they agree


def identity(config, planned: dict | None = None) -> dict:
    """What the export is: the run. `planned` = the runs that a sweep will make, by path."""
    return plain({"stage": "export", "run": workload.fingerprint_run(config.run, planned), "merge": config.merge})


def run(config, workdir, *, rerun: bool = False, **_) -> dict:
    """Write `<workdir>/model/` and return the results.

    Raises:
      UserError: the run has no checkpoint, its base model changed, or `workdir` holds something else; merge=False, and the run
        has no adapters, or transformers has no class that reads what its head reads.
    """
    start = time.perf_counter()
    source = runlog.load_done(config.run, "finetune")
    if not config.merge and source.config.train != "lora":
        raise UserError(f"merge=False: {config.run} trained train={source.config.train}, expected a run with adapters (train=lora)")
    ident = identity(config)
    target = epath.Path(workdir).expanduser() / "model"
    there = distributed.once(lambda: [(target.parent / "config.json").exists(), target.exists()], "finished")
    if there[0]:  # nothing is loaded for what is done
        with Run.open(workdir, config, ident) as held:
            if held.results is not None and not rerun:
                say(f"{workload.shown(workdir)}: done already ({summary(held.results)}); --rerun redoes it")
                return held.results
    elif there[1]:
        raise UserError(f"--workdir={workdir}: holds model/ but no config.json, so it is no run of this program; choose another")

    loaded = workload.restore(source, _where(config, source))
    with _tokenizer_files(loaded.folder) as tokenizer_files:
        return _run(config, workdir, source, loaded, tokenizer_files, ident, rerun, start)


def _run(config, workdir, source, loaded: workload.Loaded, tokenizer_files: str, ident: dict, rerun: bool, start: float) -> dict:
    target = epath.Path(workdir).expanduser() / "model"
    lora = workload.lora(source.config)
    if lora and config.merge:
        loaded = replace(loaded, params=models.merge(loaded.params, lora))
    raw, arch, family, params = _as_transformers_has_it(loaded)
    form = _form(loaded, raw, family, tokenizer_files, str(loaded.model.param_dtype))
    head = _head(loaded, form)
    if not config.merge:
        if form.kind != "classifier" or family.model_type != models.read_raw(loaded.folder)["model_type"]:
            raise UserError(f"merge=False: {form.reason or 'transformers has no class for this family'}; expected merge=True")
        settings, adapter = models.adapter_files(loaded.params, loaded.model, lora, source.config.model, loaded.folder.commit)
        form = replace(form, kind="adapter", base=source.config.model)
        tensors, head = {}, {}
        files = {peft.CONFIG: json.dumps(settings, indent=2, sort_keys=True) + "\n", peft.TENSORS: adapter,
                 "README.md": readme(form, loaded, source)}
    else:
        tensors = writing.entries(params, arch, form.family)
        files = {"config.json": json.dumps(form.raw, indent=2, sort_keys=True) + "\n", "README.md": readme(form, loaded, source)}
    if form.kind == "classifier":
        tensors |= {name: writing.Entry(array.nbytes, lambda array=array: array) for name, array in head.items()}
    elif form.kind == "backbone":
        files[SCORE] = save(head, metadata={"format": "pt"})
    with Run.open(workdir, config, ident, rerun=rerun) as run_:
        run_.start({"mesh": dict(loaded.mesh.shape), "lesser_sharding": loaded.replicated, "parents": [config.run],
                    "checkpoint": loaded.step})
        if form.reason:
            say(f"{workload.shown(workdir)}: {form.reason}; the head is in model/{SCORE}, and model/README.md says how to use it")
        with Progress(len(tensors), label="export", unit="tensor") as progress:
            def counted(entry):
                return entry._replace(get=lambda: progress.update() or entry.get())

            writing.write(target, {name: counted(entry) for name, entry in tensors.items()}, files, tokenizer_files)
        results = {
            "class": form.name, "kind": form.kind, "classes": loaded.model.classes, "readout": loaded.model.readout,
            "dtype": form.raw["dtype"], "pad_token_id": form.pad, "tokenizer": _has_tokenizer(tokenizer_files),
            "parameters": sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(loaded.model.abstract)),
            "bytes": sum(entry.size for entry in tensors.values()) or len(files[peft.TENSORS]), "seconds": time.perf_counter() - start}
        run_.finish(results)
    say(f"{workload.shown(workdir)}: {workload.shown(config.run)} is in {target}, {summary(results)}")
    return results


def summary(results: dict) -> str:
    """The line that a finished run prints."""
    what = results["class"] + {"classifier": "", "backbone": f" and {SCORE}", "adapter": ", adapters alone"}[results["kind"]]
    return (f"{what}, {results['classes']} classes, {results['parameters']} parameters, {results['bytes'] / 1e6:.4g} MB of "
            f"{results['dtype']}, {'with' if results['tokenizer'] else 'without'} a tokenizer")


def _where(config, source):
    """The run's own config, on the devices that are asked for, and its base model at the commit that it was."""
    full = source.config.copy_and_resolve_references()
    with full.unlocked(), full.ignore_type():
        full.mesh, full.attention = config.mesh, "auto"
        full.revision = source.record.get("revision") or full.revision
    return registry.fill(full)


# --------------------------------------------------------------------------- the form


@dataclass(frozen=True)
class Form:
    """How a run is written.

    `kind`: classifier (transformers' class for it) | backbone (its base class and score.safetensors) | adapter (PEFT's files, for
    the model `base`). `name`: the class;
    `reason`: why it is no classifier. `family`: whose names the tensors get. `raw`: config.json. `pad`: id of the padding
    token, None = there is none; `pad_from`: what it is else. `tokenizer`, `special`, `cut`: see `_tokenizer`.
    """

    kind: str
    name: str
    reason: str
    family: Family
    raw: dict
    pad: int | None
    pad_from: str
    tokenizer: Any
    special: bool
    cut: str
    base: str = ""


def _form(loaded: workload.Loaded, raw: dict, family: Family, tokenizer_files: str, dtype: str) -> Form:
    model, arch = loaded.model, loaded.model.config
    name = family.classifier[0]
    base = name.replace("ForSequenceClassification", "Model")
    if model.readout == arch.readout and model.pooled == bool(arch.pooler):
        kind, base, reason = "classifier", name, ""
    else:
        kind = "backbone"
        reason = f"{name} reads otherwise than readout={model.readout!r} does, so this is {base}"
    tokenizer, special, cut, closing = _tokenizer(tokenizer_files)
    pad, pad_from = _padding(raw, tokenizer, arch, closing)
    labels = [str(i) for i in range(model.classes)]
    raw = {k: v for k, v in raw.items() if k not in DROPPED} | {
        "architectures": [base], "dtype": dtype, "id2label": {i: i for i in labels}, "label2id": {i: int(i) for i in labels}}
    if arch.causal:  # always said: the class has a default of its own
        raw["pad_token_id"] = pad
    if "classifier_pooling" in raw or family.model_type == "modernbert":
        raw["classifier_pooling"] = "mean" if arch.readout == "mean" else "cls"
    return Form(kind, base, reason, family, raw, pad, pad_from, tokenizer, special, cut)


def _as_transformers_has_it(loaded: workload.Loaded) -> tuple[dict, models.Architecture, Family, dict]:
    """config.json, architecture, family and params of what is written: transformers has some models as another family.

    Of a Gemma 3 that sees images too, the text half is a model of its own; Qwen's first version is a Qwen2 with other names.
    """
    raw, arch, params = models.read_raw(loaded.folder), loaded.model.config, loaded.params
    if raw["model_type"] == "gemma3":
        from transformers import Gemma3TextConfig  # knows what a text_config leaves out

        raw, same = Gemma3TextConfig(**raw["text_config"]).to_dict(), replace(arch, family="gemma3_text")
        raw["architectures"] = None
    elif raw["model_type"] == "qwen":
        (raw, params), same = qwen1.as_qwen2(raw, arch, params), replace(arch, family="qwen2", qkv="split")
    else:
        return raw, arch, models.FAMILIES[arch.family], params
    assert models.parse(raw, "export") == same, "what is written would be another model"
    return raw, same, models.FAMILIES[same.family], params


@contextlib.contextmanager
def _tokenizer_files(folder: hub.Folder):
    """The folder whose tokenizer files are handed on; made for the while where transformers does not read the base model's."""
    made = hub.tiktoken_as_json(folder)
    if made is None:
        yield folder.path
        return
    with tempfile.TemporaryDirectory() as temporary:
        for name, content in made.items():
            (Path(temporary) / name).write_text(content)
        yield temporary


def _has_tokenizer(folder) -> bool:
    return any(file for pattern in hub.TOKENIZER_FILES for file in Path(folder).glob(pattern))


def _tokenizer(folder: str) -> tuple[Any, bool, str, int | None]:
    """transformers' tokenizer of a folder, None where it does not cut texts as the run did; whether with the special tokens that
    it adds by itself; this in words; and the special token that it puts behind a text, if any."""
    if not _has_tokenizer(folder):
        return None, False, "The base model has no tokenizer: documents are token ids, as the run had them.", None
    from transformers import AutoTokenizer, logging

    logging.set_verbosity_error()
    closing = None
    try:
        ours = hub.tokenize(folder, [SAMPLE], special=True)[0].tolist()
        closing = ours[-1] if hub.closing_tokens(folder) else None
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        for special, which in ((True, "with the special tokens that it adds by itself, if any"), (False, "without special tokens")):
            if tokenizer(SAMPLE, add_special_tokens=special)["input_ids"] == ours:
                return tokenizer, special, f"The run cut texts with this tokenizer, {which}.", closing
        why = "cuts texts otherwise than w2s_jax does"
    except Exception as error:  # libraries raise of all kinds, and the run may have had token ids only
        why = f"does not read ({' '.join(f'{type(error).__name__}: {error}'.split())[:120]})"
    return None, False, f"The tokenizer's files are copied, but transformers {why}: give token ids, as the run had them.", closing


def _padding(raw: dict, tokenizer, arch, closing: int | None = None) -> tuple[int | None, str]:
    """The padding token and what it is else. A decoder's class finds a document's end by it, so it is one that ends no text:
    not the tokenizer's `closing` token either."""
    def first(value):
        return value[0] if isinstance(value, list) and value else value

    own = raw.get("pad_token_id")
    if not arch.causal:  # as it was pretrained: RoBERTa counts its positions by it
        return (own if isinstance(own, int) else 0), "the base model's"
    candidates = [
        (getattr(tokenizer, "pad_token_id", None), "the tokenizer's padding token"), (own, "the base model's"),
        (getattr(tokenizer, "eos_token_id", None), "the tokenizer's end of text"), (first(raw.get("eos_token_id")), "the end of text"),
        (getattr(tokenizer, "bos_token_id", None), "the tokenizer's start of text"), (first(raw.get("bos_token_id")), "the start of text")]
    usable = [(i, what) for i, what in candidates if type(i) is int and 0 <= i < arch.vocab and i != closing]
    return usable[0] if usable else (None, "")


def _head(loaded: workload.Loaded, form: Form) -> dict[str, np.ndarray]:
    """The head's tensors, by the names of transformers' class."""
    head = mesh_lib.fetch(loaded.params["head"])
    if form.kind != "classifier":
        assert not loaded.model.pooled, "a class that has the pooler reads it too"
        return {"score.weight": np.ascontiguousarray(head["kernel"].T)}
    return heads.tensors(head, form.family.classifier[1], loaded.model.classes)


# --------------------------------------------------------------------------- README.md

_CLASSIFIER = """\
import torch
from transformers import {imports}

folder = "."  # where this file lies
model = AutoModelForSequenceClassification.from_pretrained(folder, {options}).eval()


@torch.no_grad()
def logits(input_ids, attention_mask):
    \"\"\"Token ids, padded on the right, and 1 where they are real, [documents, tokens] -> [documents, classes].\"\"\"
    return model(input_ids=input_ids, attention_mask=attention_mask).logits
"""
_BACKBONE = """\
import torch
from safetensors.torch import load_file
from transformers import {imports}

folder = "."  # where this file lies
model = AutoModel.from_pretrained(folder, {options}).eval()
score = load_file(f"{{folder}}/score.safetensors")["score.weight"]  # [classes, width]


@torch.no_grad()
def logits(input_ids, attention_mask):
    \"\"\"Token ids, padded on the right, and 1 where they are real, [documents, tokens] -> [documents, classes].\"\"\"
    x = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    {read}
    return x @ score.T
"""
_ADAPTER = """\
import torch
from peft import PeftModel
from transformers import {imports}

folder = "."  # where this file lies
base = AutoModelForSequenceClassification.from_pretrained("{base}", num_labels={classes}, {options})
base.config.pad_token_id = {pad}
model = PeftModel.from_pretrained(base, folder).eval()


@torch.no_grad()
def logits(input_ids, attention_mask):
    \"\"\"Token ids, padded on the right, and 1 where they are real, [documents, tokens] -> [documents, classes].\"\"\"
    return model(input_ids=input_ids, attention_mask=attention_mask).logits
"""
_READ = {
    "last": "x = x[torch.arange(len(x)), attention_mask.sum(1) - 1]  # the last real token",
    "first": "x = x[:, 0]  # the first token",
    "mean": "x = (x * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)  # the mean of the real tokens",
}
_TEXTS = """

tokenizer = AutoTokenizer.from_pretrained(folder)
{pad}texts = [{texts}]
batch = tokenizer(texts, {options}return_tensors="pt")
print(logits(batch["input_ids"], batch["attention_mask"]))
"""
_IDS = """

documents = {documents}
longest = max(map(len, documents))
input_ids = [ids + [{pad}] * (longest - len(ids)) for ids in documents]
attention_mask = [[1] * len(ids) + [0] * (longest - len(ids)) for ids in documents]
print(logits(torch.tensor(input_ids), torch.tensor(attention_mask)))
"""


def _snippet(form: Form, loaded: workload.Loaded) -> str:
    """Lines of Python that define `logits` and call it, run in the folder."""
    model, texts = loaded.model, form.tokenizer is not None
    auto = "AutoModel" if form.kind == "backbone" else "AutoModelForSequenceClassification"
    options = ["dtype=torch.float32"]
    if model.config.attention_cap is not None:  # the only implementation that has it
        options.append('attn_implementation="eager"')
    if form.kind == "backbone" and form.family.model_type in ("bert", "roberta"):
        options.append("add_pooling_layer=False")
    head = {"classifier": _CLASSIFIER, "backbone": _BACKBONE, "adapter": _ADAPTER}[form.kind].format(
        imports=", ".join([auto] + ["AutoTokenizer"] * texts), options=", ".join(options), read=_READ[model.readout],
        base=form.base, classes=model.classes, pad=form.pad)
    alone = form.kind != "backbone" and form.pad is None
    if texts:
        options = "" if form.special else "add_special_tokens=False, "
        if alone:
            return head + _TEXTS.format(pad="", options=options, texts='"A text."')
        pad = "" if form.tokenizer.pad_token_id == form.pad else f"tokenizer.pad_token_id = {form.pad}\n"
        options += 'padding=True, padding_side="right", '
        return head + _TEXTS.format(pad=pad, options=options, texts='"A text.", "And another one."')
    documents = "[[3, 1, 2]]  # token ids" if alone else "[[3, 1, 2], [1, 2]]  # token ids"
    return head + _IDS.format(documents=documents, pad=form.pad or 0)


def readme(form: Form, loaded: workload.Loaded, source) -> str:
    """README.md of the exported folder."""
    model, trained = loaded.model, source.config
    task, base = workload.shown(trained.task), workload.shown(trained.model)
    notes = []
    if form.reason:
        notes.append(f"{form.reason[0].upper()}{form.reason[1:]}, with the head (float32, no bias) in `{SCORE}`.")
    if form.raw["model_type"] != model.config.family:
        notes.append(f"The base model's family is {model.config.family!r}; transformers computes the same as {form.raw['model_type']!r}.")
    notes.append(form.cut)
    notes.append(f"A document has at most {model.config.max_positions} tokens; the run had max_length={trained.max_length}, "
                 f"overlong={trained.overlong}.")
    if form.kind != "backbone" and model.config.causal:
        notes.append(
            f"`{form.name}` reads the last token that is not `pad_token_id` = {form.pad} ({form.pad_from}), whatever the attention mask "
            "says: pad with that token, and let no document end with it, or a token before it is read." if form.pad is not None else
            f"`{form.name}` finds the end of a document by `pad_token_id`, and no token of this model can serve for padding: give it one "
            "document at a time.")
    if form.kind != "backbone" and not form.family.classifier[1].startswith("score"):
        notes.append("The run's head has no bias: that of the class is 0.")
    if form.raw["dtype"] != "float32":
        notes.append(f"Weights are {form.raw['dtype']}, the head's float32: transformers rounds that too without `dtype=torch.float32`.")
    if trained.train == "lora" and form.kind != "adapter" and form.raw["dtype"] != "float32":
        notes.append("The adapters were added to these matrices and rounded with them, so that logits differ a little from the run's; "
                     "merge=False writes them as they are.")
    if trained.dtype != "float32":
        notes.append(f"The run computed in {trained.dtype}: its own predictions are rounded more than these logits.")
    if form.kind == "classifier":
        notes.append("w2s_jax takes this folder as a `model`, with a new head; it labels and predicts with the run.")
    elif form.kind == "adapter":
        notes.append(f"The adapters and the head are for {form.base}; w2s_jax starts from them with train=lora, lora.init=<this folder>.")
    else:
        notes.append(f"w2s_jax takes this folder as a `model` (with a new head, readout={model.readout}).")
    return (f"# {workload.shown(source.path)}\n\nA classifier of {model.classes} classes, trained by w2s_jax {__version__}: {base} on "
            f"{task}, loss {trained.loss}, seed {trained.seed}, step {loaded.step}. Its logits:\n\n"
            f"```python\n{_snippet(form, loaded)}```\n\n"
            + "".join(f"- {note}\n" for note in notes))
