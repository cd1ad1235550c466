"""Measure training and labelling against PyTorch with transformers, in one process, contenders taking turns.

What is timed is what runs use: the trainer's dispatch (packing, transfer, forward, backward, Adam) and
`forward.predict`. The other side is transformers' GPT2Model with the same weights: padded to the longest document of a
batch, and in the loop of openai/weak-to-strong `train.py` (commit 6b450f2), whose default minibatch is 1. A round runs
every contender once, so that whatever else the machine does falls on all of them alike; ratios are medians over rounds.

    results.json   medians, all rounds, ratios, programs, padding, start-up, differences between the two sides
    benchmark.md   the table, also printed
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from w2s_jax import config as config_lib
from w2s_jax import feeding, forward, hub, losses, models, optimizers, registry, train, workload
from w2s_jax import mesh as mesh_lib
from w2s_jax.data import packing, splits, world
from w2s_jax.data.lengths import sciq_lengths
from w2s_jax.errors import UserError
from w2s_jax.files import plain, write_text
from w2s_jax.progress import Progress, say
from w2s_jax.runlog import Run

OURS = "w2s_jax"
PADDED = "transformers, padded to the longest"
REFERENCE = "openai's loop, minibatch as the batch"
SHIPPED = "openai's loop, minibatch 1 (as shipped)"
SINGLE = "transformers, one by one"
MATMUL = "matmul"  # the yardstick of the utilisation
AIMS = {("training", PADDED): 2.2, ("training", SHIPPED): 4.5, ("labelling", PADDED): 2.0}  # on a CPU

RATE = 5e-5  # learning rate of both sides
COMPARED = 2  # first steps whose losses are compared
_YARD = 2048  # side of the yardstick's matrices
SMALL = {"width": 64, "layers": 2, "heads": 2, "context": 128, "vocab": 1000}  # the model that start-up is timed with

def identity(config, planned: dict | None = None) -> dict:
    """Every key: a measurement depends on how it is executed."""
    return config_lib.plain_identity(json.loads(config.to_json_best_effort()))


def run(config, workdir, *, rerun: bool = False, **_) -> dict:
    """Measure, write results.json and benchmark.md, print the table.

    Raises:
      UserError: sizes or documents that do not fit.
    """
    with workload.precision(config), Run.open(workdir, config, identity(config), rerun=rerun) as run_:
        file = epath.Path(run_.path) / "benchmark.md"
        if run_.results is not None:
            say(f"{workdir}: measured already; --rerun measures again")
            print(file.read_text())
            return run_.results
        model, documents = _model(config.arch, config), _documents(config)
        run_.start({"parents": []})
        results = _measure(config, model, documents)
        text = table(results)
        write_text(file, text)
        run_.finish(results)
    print(text)
    return results


# --------------------------------------------------------------------------- what is measured


def _raw(arch) -> dict:
    """config.json of GPT-2's architecture in these sizes."""
    return world.model_config(arch["width"], arch["layers"], arch["heads"], arch["context"], arch["vocab"])


def _model(arch, config) -> models.Model:
    """A classifier on it; the head starts random, so that the first loss already depends on every layer."""
    return models.build(models.parse(_raw(arch), "config.arch"), head="classifier", dtype=config.dtype, remat=config.remat,
                        attention=config.attention, head_init="normal")


def _documents(config) -> feeding.Texts:
    """The documents of an epoch: a task's, or random tokens with SciQ's lengths and random soft labels."""
    if config.task:
        if not config.tokenizer:
            raise UserError(f"config.tokenizer: '', expected a folder or a hub id, since config.task={config.task!r} brings none")
        wanted = config_lib.shipped("finetune")
        wanted.update({key: config[key] for key in ("task", "task_dir", "data_seed", "n_train")} | {"split": "train"})
        limits = workload.Limits(config.arch.context, config.arch.context, "drop")
        folder = hub.resolve_tokenizer(config.tokenizer)
        found, _ = workload.tokenized(splits.prepare(wanted).train, folder, limits, config.arch.vocab, "training")
        tokens, labels, ids = found.tokens, found.soft_labels.astype(np.float32), found.ids
    else:
        rng = np.random.default_rng(config.seed)
        lengths = np.minimum(sciq_lengths(config.n_train, config.seed), config.arch.context)
        tokens = [rng.integers(1, config.arch.vocab, n).astype(np.int32) for n in lengths]
        one = rng.random(len(tokens))
        labels, ids = np.stack([1 - one, one], 1).astype(np.float32), [str(i) for i in range(len(tokens))]
    if len(tokens) < COMPARED * config.batch_size:
        raise UserError(f"config.n_train: {len(tokens)} documents, expected at least {COMPARED} batches of {config.batch_size}")
    return feeding.Texts(tokens, labels, np.ones(len(tokens), np.float32), ids)


def _measure(config, model, corpus: feeding.Texts) -> dict:
    device = jax.devices()[0]
    results = {"machine": {"platform": device.platform, "device": device.device_kind, "threads": _threads()},
               "model": {"parameters": sum(int(np.prod(a.shape)) for a in jax.tree.leaves(model.abstract)), **config.arch.to_dict()}}
    if config.startup:
        results["startup"] = startup()
    mesh = mesh_lib.make_mesh(config.mesh)
    shardings, _ = mesh_lib.param_shardings(mesh, model.abstract)
    params = jax.jit(model.init, out_shardings=shardings)(jax.random.key(config.seed))
    if missing := config.torch and importlib.util.find_spec("torch") is None:
        say("torch is not installed (pip install torch==2.13.0): only this project is timed")
    other = Torch(config, model, params) if config.torch and not missing else None
    results["torch"] = other.described if other else None
    ours = Ours(config, model, mesh, params, corpus)
    square, product = jnp.ones((_YARD, _YARD), models.DTYPES[config.dtype]), jax.jit(lambda a: a @ a)
    yard = {MATMUL: lambda k: product(square).block_until_ready()}  # what the machine gives to matrix products at this moment

    # Labelling first: training gives the parameters away.
    documents = corpus.tokens[: config.n_label]
    passes: dict[str, Callable] = {OURS: lambda k: ours.label(documents)}
    if other:
        passes |= {PADDED: lambda k: other.label(documents, config.batch_size), SINGLE: lambda k: other.label(documents, 1)}
    seen, times = turns(passes | yard, range(config.repeats), "labelling", warm=[0])
    results["labelling"] = {"documents": len(documents), "rows": _rows("labelling", times, 1, sum(map(len, documents)),
                                                                      _flops(model.config, documents))}
    if other:
        results["labelling"]["largest_difference"] = float(np.abs(seen[OURS] - seen[PADDED]).max())

    plan = ours.plan
    first = [loss for k in range(min(COMPARED, len(plan.dispatches))) for loss in ours.step(k)][:COMPARED]
    if other:
        results["first_losses"] = {"ours": first, "theirs": [other.step(corpus, plan.batches[s], None) for s in range(COMPARED)]}
    steps: dict[str, Callable] = {OURS: ours.step}
    if other:  # one step each, the first of the dispatch
        steps |= {name: lambda k, n=n: other.step(corpus, plan.batches[plan.dispatches[k].start], n)
                  for name, n in ((PADDED, None), (REFERENCE, config.batch_size), (SHIPPED, 1))}
    dispatches = [k % len(plan.dispatches) for k in range(COMPARED, COMPARED + config.repeats)]
    for k in {s: k for k, s in enumerate(plan.shape_of)}.values():
        ours.step(k)  # every program that an epoch needs
    _, times = turns(steps | yard, dispatches, "training", warm=dispatches[:1])
    batches = [[[corpus.tokens[d] for d in plan.batches[s]] for s in plan.dispatches[k]] for k in dispatches]
    work = np.array([np.mean([[sum(map(len, b)), 3 * _flops(model.config, b)] for b in group], axis=0) for group in batches])
    results["training"] = {"documents": config.batch_size, "steps_a_dispatch": max(map(len, plan.dispatches)),
                           "rows": _rows("training", times, np.array([len(group) for group in batches]), work[:, 0], work[:, 1])}
    longest = sum(max(len(corpus.tokens[d]) for d in b) * len(b) for b in plan.batches)
    results["padding"] = {"ours": plan.padding_fraction, "padded": 1 - plan.useful / longest,
                          "shapes": [[s.rows, s.time] for s in plan.shapes], "steps": len(plan.batches)}
    results["programs"] = {"training": len(ours.stats["training"]["programs"]), "labelling": len(ours.stats["labelling"]["programs"]),
                           "compile_seconds": sum(s.get("compile_seconds", 0.0) for s in ours.stats.values())}
    return results


def _flops(config, documents) -> float:
    """FLOPs of a forward pass over documents alone, without padding: matrix products with weights, and causal attention."""
    weights = config.layers * (4 * config.embed**2 + 2 * config.embed * config.mlp)
    return sum(2.0 * weights * len(d) + 2.0 * config.layers * config.embed * len(d) * (len(d) + 1) for d in documents)


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def turns(contenders: dict[str, Callable], rounds, label: str, warm=()) -> tuple[dict, dict[str, np.ndarray]]:
    """Run the contenders in turn, once for each of `rounds`.

    Returns what each gave first, and for each float `[rounds, 2]`: wall-clock and CPU seconds.
    """
    seen, times = {}, {name: [] for name in contenders}
    with Progress(len(warm) + len(rounds), label=label, unit="round") as progress:
        for k in (*warm, *rounds):
            for name, call in contenders.items():
                wall, cpu = time.perf_counter(), time.process_time()
                seen.setdefault(name, call(k))
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            progress.update(1)
    return seen, {name: np.array(spent[len(warm):]) for name, spent in times.items()}


def _rows(what: str, times: dict, steps, tokens, flops) -> dict[str, dict]:
    """For each contender: medians, tokens per second, utilisation against the yardstick of the same round, how much faster ours is.

    `steps` that a call of ours makes (the others make one), and the useful `tokens` and `flops` of a step, by round or of all.
    """
    ours, rows = times[OURS] / np.reshape(steps, (-1, 1)), {}
    yard = times.pop(MATMUL)[:, 0] / (2.0 * _YARD**3)  # seconds a FLOP
    for name, spent in times.items():
        spent = ours if name == OURS else spent
        (ratio, cpu_ratio), seconds = (spent / np.maximum(ours, 1e-9)).T, spent[:, 0]
        rows[name] = row = {"seconds": np.median(seconds), "rounds": seconds, "tokens_per_second": np.median(tokens / seconds),
                            "utilisation": np.median(flops * yard / seconds)}
        if name != OURS:
            row |= {"ratio": np.median(ratio), "ratio_range": [ratio.min(), ratio.max()], "aim": AIMS.get((what, name))}
        if jax.default_backend() == "cpu":
            row |= {"cpu_seconds": np.median(spent[:, 1]), "cpu_ratio": np.median(cpu_ratio)}
    return plain(rows)


# --------------------------------------------------------------------------- the two sides


class Ours:
    """The trainer's own dispatches, without its run directory, and the forward passes of labelling."""

    def __init__(self, config, model, mesh, params, corpus: feeding.Texts):
        keys = registry.fill(config_lib.shipped("finetune"))
        with keys.ignore_type():
            keys.update({k: config[k] for k in ("batch_size", "microbatch_size", "steps_per_dispatch")})
        batches = packing.batch_stream(len(corpus.tokens), config.batch_size, 1, "none", config.seed)
        self.program = train.Program(model, losses.make("xent", {}, ground_truth=True, label_stats={}), optimizers.make("adam", {}), mesh)
        self.plan = feeding.make_plan(keys, model, corpus, batches, mesh)
        self.model, self.mesh, self.corpus, self.params = model, mesh, corpus, params
        self.per_batch = workload.forward_tokens(keys, corpus.tokens, mesh, model)
        self.stats: dict = {"training": {}, "labelling": {}}
        self.state = None

    def label(self, documents) -> np.ndarray:
        """Logits, float32 `[documents, 2]`."""
        return forward.predict(self.model, self.params, documents, self.mesh, tokens_per_batch=self.per_batch,
                               stats=self.stats["labelling"])

    def step(self, k: int) -> list[float]:
        """Dispatch `k` of the plan, as `train.train` does it; the losses of its steps."""
        plan, none = self.plan, mesh_lib.replicated(self.mesh)
        if self.state is None:
            trainable, self.frozen = train.split_params(self.params, "full")
            moments = jax.jit(self.program.optimizer.init, out_shardings=self.program.shardings()["opt_state"])(trainable)
            self.state = [trainable, moments, jax.device_put(self.program.loss.init_state(), none)]
            self.key = jax.device_put(jax.random.key_data(jax.random.key(0)), none)
            self.params = None
        dispatch, total = plan.dispatches[k], len(plan.batches)
        group = max(map(len, plan.dispatches))
        xs = train._inputs(plan, dispatch, plan.shapes[plan.shape_of[k]], group, self.corpus, [RATE] * total, [0.0] * total, self.mesh)
        *self.state, metrics = train._run_dispatch(self.program, self.stats["training"], *self.state, self.frozen, self.key,
                                                   jax.device_put(np.int32(len(dispatch)), none), xs)
        jax.block_until_ready(self.state)
        return np.asarray(metrics)[: len(dispatch), 0].tolist()


class Torch:
    """transformers' GPT2Model with our weights, a linear head on the last token, and Adam."""

    def __init__(self, config, model: models.Model, params: dict):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.torch = torch
        self.device = torch.device("cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu")
        torch.set_num_threads(_threads())
        torch.backends.cuda.matmul.allow_tf32 = config.matmul_precision == "default"
        with tempfile.TemporaryDirectory() as folder:
            models.save(Path(folder) / "model", {"backbone": params["backbone"]}, _raw(config.arch))
            self.body = transformers.GPT2Model.from_pretrained(Path(folder) / "model", dtype=torch.float32).to(self.device)
        self.body.eval()  # no dropout, as in the reference
        self.head = torch.nn.Linear(model.config.embed, model.classes, bias=False).to(self.device)
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(np.array(params["head"]["kernel"]).T))
        self.optimizer = torch.optim.Adam([*self.body.parameters(), *self.head.parameters()], lr=RATE)
        self.half = config.dtype == "bfloat16"
        self.described = {"torch": torch.__version__, "transformers": transformers.__version__, "device": str(self.device),
                          "threads": torch.get_num_threads(), "attention": self.body.config._attn_implementation}

    def _logits(self, documents, masked: bool):
        """Logits of a batch padded to its longest document; openai's loop passes no mask, since nothing attends forward."""
        torch, lengths = self.torch, [len(d) for d in documents]
        ids = np.zeros((len(documents), max(lengths)), np.int64)
        for row, d in zip(ids, documents):
            row[: len(d)] = d
        ends = torch.tensor(lengths, device=self.device)
        ids = torch.from_numpy(ids).to(self.device)
        mask = (torch.arange(ids.shape[1], device=self.device) < ends[:, None]).long() if masked else None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            hidden = self.body(ids, attention_mask=mask).last_hidden_state
        if masked:
            return self.head(hidden[torch.arange(len(documents), device=self.device), ends - 1].float())
        return self.head(torch.stack([hidden[i, n - 1, :] for i, n in enumerate(lengths)]).float())

    def label(self, documents, size: int) -> np.ndarray:
        """Logits, float32 `[documents, 2]`, in batches of `size` in the documents' order."""
        with self.torch.no_grad():
            out = [self._logits(documents[i : i + size], masked=True) for i in range(0, len(documents), size)]
            return self.torch.cat(out).cpu().numpy()

    def step(self, corpus: feeding.Texts, batch: np.ndarray, minibatch: int | None) -> float:
        """One step over the documents `batch`: padded as a whole (`minibatch` None), or as openai's loop does it; the loss.

        The loop keeps the graphs of all minibatches until the one backward.
        """
        torch = self.torch
        labels, documents = torch.from_numpy(corpus.labels[batch]).to(self.device), [corpus.tokens[d] for d in batch]
        if minibatch is None:
            logits = self._logits(documents, masked=True)
        else:
            logits = torch.cat([self._logits(documents[i : i + minibatch], masked=False) for i in range(0, len(documents), minibatch)])
        loss = torch.nn.functional.cross_entropy(logits, labels)
        value = loss.item()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return value


def startup() -> dict:
    """Seconds from the start of `python -m w2s_jax.main --config=finetune` to its first step, on a small model.

    `cold`: with an empty compilation cache; `warm`: with the cache that it left.
    """
    out = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys = registry.fill(config_lib.shipped("finetune"))
        keys.remat = "none"  # it may be left to the memory there is, which this model does not fill
        model = _model(SMALL, keys)
        models.save(folder / "model", {"backbone": jax.jit(model.init)(jax.random.key(0))["backbone"]}, _raw(SMALL))
        rng = np.random.default_rng(0)
        (folder / "task").mkdir()
        for split in ("train", "test"):
            rows = [{"input_ids": rng.integers(1, SMALL["vocab"], n).tolist(), "label": i % 2} for i, n in enumerate(sciq_lengths(32, 0))]
            (folder / "task" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        root = str(Path(__file__).resolve().parents[2])
        env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
                            "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
        for what in ("cold", "warm"):
            command = [sys.executable, "-m", "w2s_jax.main", "--config=finetune", f"--config.model={folder / 'model'}", "--config.epochs=1",
                       f"--config.task={folder / 'task'}", "--config.split=train", "--config.shuffle=none", f"--workdir={folder / what}"]
            with open(folder / f"{what}.log", "w") as log:
                start = time.perf_counter()
                child = subprocess.Popen(command, env=env, stdout=log, stderr=log)
                metrics = folder / what / "metrics.jsonl"  # its only step is written at once
                while child.poll() is None and not (metrics.exists() and metrics.stat().st_size):
                    time.sleep(0.005)
                out[what] = time.perf_counter() - start
                if child.wait():
                    raise RuntimeError(f"{' '.join(command)}: exit code {child.returncode}\n{(folder / f'{what}.log').read_text()}")
        out["programs"] = json.loads((folder / "warm" / "results.json").read_text())["programs"]
    return out


# --------------------------------------------------------------------------- the table


def table(results: dict) -> str:
    """results.json as markdown."""
    machine, cpu, torch = results["machine"], results["machine"]["platform"] == "cpu", results["torch"]
    head = ["", "seconds", "w2s_jax is faster by", "lowest - highest", "aim", "useful tokens/s", "utilisation"]
    head += ["CPU seconds", "by CPU time"] if cpu else []
    lines = [f"{results['model']['parameters'] / 1e6:.0f}M parameters, {machine['device']} ({machine['platform']}, {machine['threads']} "
             f"threads), {', '.join(f'{k} {v}' for k, v in torch.items()) if torch else 'without PyTorch'}", "",
             "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for what, title in (("training", "a training step of {} documents"), ("labelling", "labelling {} documents")):
        lines.append(f"| **{title.format(results[what]['documents'])}** |" + " |" * (len(head) - 1))
        for name, row in results[what]["rows"].items():
            other = "ratio" in row
            cells = [name, f"{row['seconds']:.3g}", f"{row['ratio']:.2f}x" if other else "",
                     "{:.2f} - {:.2f}".format(*row["ratio_range"]) if other else "", f"{row['aim']:g}x" if row.get("aim") else "",
                     f"{row['tokens_per_second']:.0f}", f"{row['utilisation']:.0%}"]
            cells += [f"{row['cpu_seconds']:.3g}", f"{row['cpu_ratio']:.2f}x" if other else ""] if cpu else []
            lines.append("| " + " | ".join(cells) + " |")
        if not torch:
            lines.append("| PyTorch | not timed |" + " |" * (len(head) - 2))
    padding, programs = results["padding"], results["programs"]
    lines += ["", f"- padding over an epoch of {padding['steps']} steps: {padding['ours']:.1%}, shapes "
              f"{', '.join(f'{r}x{t}' for r, t in padding['shapes'])} (padded to the longest: {padding['padded']:.1%})",
              f"- programs compiled: {programs['training']} for training, {programs['labelling']} for labelling, "
              f"{programs['compile_seconds']:.1f} s together",
              "- utilisation: useful FLOPs a second (padding and recomputation do not count) over those of a "
              f"{_YARD} x {_YARD} matrix product in the same round"]
    if "startup" in results:
        lines.append("- `python -m w2s_jax.main --config=finetune` to its first step, on a small model: {cold:.1f} s with an empty "
                     "compilation cache, {warm:.1f} s with a filled one".format(**results["startup"]))
    if torch:
        ours, theirs = (results["first_losses"][k] for k in ("ours", "theirs"))
        lines.append(f"- both sides compute the same: losses of the first {len(ours)} steps {', '.join(f'{v:.6f}' for v in ours)} differ "
                     f"by at most {max(abs(a - b) for a, b in zip(ours, theirs)):.1e}, the logits of the labelling by "
                     f"{results['labelling']['largest_difference']:.1e}")
    return "\n".join(lines) + "\n"
