"""The one trainer: weak supervisor, ceiling, student, head-only and LoRA runs, and language-model pretraining.

A step takes d loss / d logits once over the whole batch, `[batch, classes]`, and pulls it back through
each microbatch, so that a loss may use a quantile or a mean of the batch while memory is bounded
(DESIGN.md, idea 1). Dispatch is asynchronous: metrics are read one dispatch late.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax import checkpoint as ckpt
from w2s_jax import distributed, interrupts, losses, optimizers, selection
from w2s_jax import mesh as mesh_lib
from w2s_jax.constraints import fetched
from w2s_jax.data import packing
from w2s_jax.errors import UserError
from w2s_jax.feeding import Corpus
from w2s_jax.forward import compiled
from w2s_jax.progress import Progress, say
from w2s_jax.trainable import merge_params, split_params

CELLS = 2  # axis of the cells in the arrays of a dispatch: [group, microbatches, cells, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """What decides the code of a training step; equal programs share their compilations within a process."""

    model: object
    loss: losses.Loss
    optimizer: optimizers.Optimizer
    mesh: jax.sharding.Mesh
    train: str = "full"
    offload: str = "none"  # what lies in the host's memory: "optimizer": its state, between updates; "params": the layers' matrices too

    def shardings(self) -> dict:
        """Shardings of `trainable`, `frozen` and `opt_state` between steps; scalars of the state stay on the device."""
        whole, _ = mesh_lib.param_shardings(self.mesh, self.model.abstract, self.offload)
        trainable, frozen = split_params(whole, self.train)
        abstract, _ = split_params(self.model.abstract, self.train)
        state = self.optimizer.state_shardings(abstract, trainable)
        if self.offload != "none":
            shapes = jax.eval_shape(self.optimizer.init, abstract)
            state = jax.tree.map(lambda place, leaf: place.with_memory_kind(mesh_lib.HOST) if leaf.ndim else place, state, shapes)
        return {"trainable": trainable, "frozen": frozen, "opt_state": state}

    def update(self, grads, opt_state, trainable, lr):
        """The optimizer's update; what is offloaded is brought in from the host and back."""
        if self.offload == "none":
            return self.optimizer.update(grads, opt_state, trainable, lr)
        at, back = dataclasses.replace(self, offload="none").shardings(), self.shardings()
        grads, trainable = (jax.device_put(tree, at["trainable"]) for tree in (grads, trainable))
        trainable, opt_state = self.optimizer.update(grads, jax.device_put(opt_state, at["opt_state"]), trainable, lr)
        return jax.device_put(trainable, back["trainable"]), jax.device_put(opt_state, back["opt_state"])


def _logits(program: Program, trainable, frozen, batch, key):
    """Outputs of one microbatch, float32 `[cells * slots, classes]`."""
    out = program.model.apply(merge_params(trainable, frozen), batch, key)
    return out.reshape(-1, out.shape[-1])


def _gradients(program: Program, trainable, frozen, loss_state, x, key):
    """Loss, logits `[batch, classes]`, new loss state and gradients of one step.

    `x["batch"]` has a leading axis of microbatches.
    """
    context = losses.Context(x["coefficient"], x["weights"], x["denominator"])
    batch, labels = x["batch"], x["labels"]
    microbatches = batch["documents"].shape[0]
    if microbatches == 1:
        def objective(trainable):
            flat = _logits(program, trainable, frozen, jax.tree.map(lambda a: a[0], batch), key)
            logits = flat[x["where"]]
            value, state = program.loss(logits, labels, context, loss_state)
            return value, (logits, state)
        (value, (logits, state)), grads = jax.value_and_grad(objective, has_aux=True)(trainable)
        return value, logits, state, grads

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), trainable)
    add = functools.partial(jax.tree.map, lambda a, g: a + fetched(g).astype(a.dtype))
    if program.loss.per_document:  # one forward: a document's gradient does not depend on the others
        def body(carry, part):
            total, grads = carry
            slot = part["documents"].reshape(-1)
            inside = context._replace(weights=jnp.where(slot >= 0, context.weights[slot], 0.0))

            def objective(trainable):
                flat = _logits(program, trainable, frozen, part, key)
                value, _ = program.loss(flat, labels[slot], inside, loss_state)
                return value, flat
            (value, flat), g = jax.value_and_grad(objective, has_aux=True)(trainable)
            return (total + value, add(grads, g)), flat
        (value, grads), flat = jax.lax.scan(body, (jnp.zeros(()), zeros), batch)
        return value, flat.reshape(-1, flat.shape[-1])[x["where"]], loss_state, grads

    # Two forwards: the loss sees the whole batch before any gradient is pulled back.
    flat = jax.lax.map(lambda part: _logits(program, trainable, frozen, part, key), batch)
    logits = flat.reshape(-1, flat.shape[-1])[x["where"]]
    (value, state), pull = jax.value_and_grad(lambda z: program.loss(z, labels, context, loss_state), has_aux=True)(logits)

    def body(grads, part):
        slot = part["documents"].reshape(-1)
        cotangent = jnp.where((slot >= 0)[:, None], pull[slot], 0.0)
        _, vjp = jax.vjp(lambda t: _logits(program, t, frozen, part, key), trainable)
        return add(grads, vjp(cotangent)[0]), None
    grads, _ = jax.lax.scan(body, zeros, batch)
    return value, logits, state, grads


def step(program: Program, trainable, opt_state, loss_state, frozen, key, x):
    """One update. Returns the new `(trainable, opt_state, loss_state)` and float32 `[loss, right answers]`."""
    key = jax.random.fold_in(key, x["step"])
    value, logits, loss_state, grads = _gradients(program, trainable, frozen, loss_state, x, key)
    trainable, opt_state = program.update(grads, opt_state, trainable, x["lr"])
    right = (jnp.argmax(logits, -1) == jnp.argmax(x["labels"], -1)) * (x["weights"] > 0)
    return trainable, opt_state, loss_state, jnp.stack([value.astype(jnp.float32), right.sum()])


def _dispatch(program: Program, trainable, opt_state, loss_state, frozen, key, n, xs):
    """`n` steps (of the `[group]` that `xs` has room for) in one call of the device."""
    group = xs["lr"].shape[0]
    if group == 1:
        *carry, metrics = step(program, trainable, opt_state, loss_state, frozen, key, jax.tree.map(lambda a: a[0], xs))
        return (*carry, metrics[None])

    def body(i, carry):
        x = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), xs)
        *state, metrics = step(program, *carry[:3], frozen, key, x)
        return (*state, carry[3].at[i].set(metrics))
    # A loop of dynamic length: the last, shorter group of a run needs no program of its own.
    return jax.lax.fori_loop(0, n, body, (trainable, opt_state, loss_state, jnp.zeros((group, 2), jnp.float32)))


def lower(program: Program, *args) -> jax.stages.Lowered:
    """The program of a dispatch, ready to be compiled; `args` as `_dispatch` takes them, arrays or their shapes with shardings."""
    s = program.shardings()
    none = mesh_lib.replicated(program.mesh)
    call = jax.jit(functools.partial(_dispatch, program), donate_argnums=(0, 1, 2),
                   out_shardings=(s["trainable"], s["opt_state"], none, none))
    return call.lower(*args)


def abstract_arguments(program: Program, xs: dict) -> tuple:
    """Shapes with shardings of all that `_dispatch` takes: what a run would hold, for compiling ahead of it.

    `xs`: the arrays of a dispatch, as `stack_inputs` gives them.
    """
    places, none = program.shardings(), mesh_lib.replicated(program.mesh)
    cells = mesh_lib.batch_sharding(program.mesh, CELLS)
    place = lambda tree, sharding: ckpt.abstract(tree, jax.tree.map(lambda _: sharding, tree))  # noqa: E731
    trainable, frozen = split_params(program.model.abstract, program.train)
    return (ckpt.abstract(trainable, places["trainable"]),
            ckpt.abstract(jax.eval_shape(program.optimizer.init, trainable), places["opt_state"]),
            place(jax.eval_shape(program.loss.init_state), none), ckpt.abstract(frozen, places["frozen"]),
            place(jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))), none),
            place(jax.ShapeDtypeStruct((), np.int32), none), {k: place(v, cells if k == "batch" else none) for k, v in xs.items()})


def _compile(program: Program, stats: dict, *args):
    """The program for arguments of these shapes, which may be abstract."""
    signature = tuple((a.shape, str(a.dtype)) for a in jax.tree.leaves(args[-1]))
    return compiled((program, signature), lambda: lower(program, *args).compile(), stats)


def _run_dispatch(program: Program, stats: dict, *args):
    return _compile(program, stats, *args)(*args)


def compile_ahead(program: Program, corpus: Corpus, plan: packing.Plan, which: int, stats: dict):
    """The compiled program of the dispatches of shape `which`, from shapes alone: no parameter need be read yet. The run finds it made."""
    return _compile(program, stats, *abstract_arguments(program, dispatch_inputs(corpus, plan, which)))


def dispatch_inputs(corpus: Corpus, plan: packing.Plan, which: int) -> dict:
    """The arrays of the first dispatch of shape `which`, with rates of 0."""
    dispatch = next(d for d, shape in zip(plan.dispatches, plan.shape_of) if shape == which)
    zeros = np.zeros(len(plan.batches))
    return stack_inputs(plan, dispatch, plan.shapes[which], max(map(len, plan.dispatches)), corpus, zeros, zeros)


# --------------------------------------------------------------------------- the run


def stack_inputs(plan: packing.Plan, dispatch: range, shape: packing.Shape, group: int, corpus: Corpus, rates, coefficients,
                 own=None) -> dict:
    """The arrays of one dispatch, with room for `group` steps; of the batches the cells `own`, None = all."""
    rows = []
    for s in dispatch:
        docs = plan.batches[s]
        batch, where = corpus.assemble(docs, plan, shape, own)
        pad = plan.batch_size - len(docs)
        rows.append({
            "batch": batch, "where": where,
            "labels": np.pad(corpus.labels[docs].astype(np.float32), ((0, pad), (0, 0))),
            "weights": np.pad(np.ones(len(docs), np.float32) if corpus.weights is None else corpus.weights[docs], (0, pad)),
            "denominator": np.float32(corpus.counts[docs].sum()),
            "lr": np.float32(rates[s]), "coefficient": np.float32(coefficients[s]), "step": np.int32(s),
        })
    rows += [rows[-1]] * (group - len(rows))
    return jax.tree.map(lambda *a: np.stack(a), *rows)


def _inputs(plan: packing.Plan, dispatch: range, shape: packing.Shape, group: int, corpus: Corpus, rates, coefficients, mesh) -> dict:
    """The arrays of one dispatch on the devices, each process making its own cells; see `stack_inputs`."""
    xs = stack_inputs(plan, dispatch, shape, group, corpus, rates, coefficients, mesh_lib.own_cells(mesh))
    batch = {k: mesh_lib.put_cells(v, mesh, CELLS) for k, v in xs.pop("batch").items()}
    return mesh_lib.put(xs, mesh_lib.replicated(mesh)) | {"batch": batch}


@interrupts.deferred()
def train(config, program: Program, params: dict, corpus: Corpus, plan: packing.Plan, rates: np.ndarray, run, *,
          on_eval: Callable | None = None, label: str = "train", stats: dict | None = None) -> dict:
    """Train, from the newest checkpoint of the run where there is one. After SIGTERM it saves a whole one and raises Stopped.

    Args:
      params: the whole nested dict of parameters, placed by the mesh's rules; the trained ones are donated.
      rates: learning rate of each step, float64 `[steps]`.
      run: an open `runlog.Run`.
      on_eval: `on_eval(params) -> dict`, called every `config.eval_every` updates but not after the last; what it
        returns joins the metrics of the next step, which are all from before that step's update. Unless `config.select` is
        last, it holds a `select_score`, is called after the last update too, and the parameters of the best score are kept.
      stats: collects programs and seconds, and under `selected` the step that was kept: step, score, steps (done in all).

    Returns:
      The trained (or selected) parameters, whole.

    Raises:
      UserError: the loss is not finite; names the step and the documents of its batch.
    """
    stats = {} if stats is None else stats
    total = len(plan.batches)
    mesh, loss = program.mesh, program.loss
    shardings, none = program.shardings(), mesh_lib.replicated(mesh)
    trainable, frozen = split_params(params, program.train)
    checkpoints = ckpt.Checkpoints(run.path)
    key = mesh_lib.put(jax.random.key_data(jax.random.key(config.seed)), none)
    coefficients = [loss.coefficient(s, total) for s in range(total)]

    opt_shapes = jax.eval_shape(program.optimizer.init, trainable)
    state_shapes = jax.eval_shape(loss.init_state)
    done = 0
    for at in checkpoints.steps():  # the newest that can be read
        want_opt = None
        if at < total:
            want_opt = {"optimizer": ckpt.abstract(opt_shapes, shardings["opt_state"]),
                        "loss": jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=none), state_shapes)}
        try:
            restored, states = checkpoints.restore(at, ckpt.abstract(trainable, shardings["trainable"]), want_opt)
        except UserError as error:
            say(f"{error}; trying an older one")
            continue
        trainable, done = restored, at
        if at == total and (kept := checkpoints.meta(at).get("selected")):
            stats["selected"] = kept
        break
    if done == 0:
        init = jax.jit(program.optimizer.init, out_shardings=shardings["opt_state"])
        opt_state = compiled((program, "init"), lambda: init.lower(trainable).compile())(trainable)
        loss_state = mesh_lib.put(loss.init_state(), none)
    elif done < total:
        opt_state, loss_state = states["optimizer"], states["loss"]
        say(f"{label}: resumed at step {done} of {total}")
    run.resume_metrics(done)
    best = selection.Best(run.path, config.eval_every, config.patience) if config.get("select", "last") != "last" and done < total else None

    def evaluate(at: int) -> None:
        """Of the state after `at` updates; the line of the next step gets the figures."""
        nonlocal clock
        evaluated[at] = on_eval(merge_params(trainable, frozen))
        if best:
            best.offer(at, evaluated[at]["select_score"], trainable)
        clock = time.perf_counter()

    def save(finished: int, last: bool):
        nonlocal saved
        whole, saved = not last or config.keep == "all", finished
        run.flush()  # no line before a checkpoint's step may be missing
        meta = {"step": finished, "total_steps": total, "train": program.train, "selected": stats.get("selected")}
        checkpoints.save(finished, params=trainable, opt_state={"optimizer": opt_state, "loss": loss_state} if whole else None,
                         rng=key if whole else None, meta=meta)

    # Another attempt may have stopped inside what is one dispatch now (steps_per_dispatch, checkpoint_every may change).
    todo = [(range(max(d.start, done), d.stop), which) for d, which in zip(plan.dispatches, plan.shape_of) if d.stop > done]
    # Programs that only an earlier attempt needed count too, so that a resumed run's results are the same.
    stats.setdefault("programs", set()).update((program, plan.shapes[w]) for w in set(plan.shape_of) - {w for _, w in todo})
    progress = Progress(total, start=done, label=label, counted=corpus.unit)
    sizes = corpus.sizes
    group = max(len(d) for d in plan.dispatches)
    waiting: list[tuple] = []
    evaluated: dict[int, dict] = {}
    clock, stopped, saved = time.perf_counter(), total, done

    def collect(keep: int):
        """Read the metrics of all but the newest `keep` dispatches."""
        nonlocal clock
        while len(waiting) > keep:
            steps_, metrics, useful = waiting.pop(0)
            metrics = np.asarray(metrics)[: len(steps_)]
            now = time.perf_counter()
            speed, clock = sum(useful) / max(now - clock, 1e-9), now
            for s, (value, right) in zip(steps_, metrics):
                if not np.isfinite(value):
                    names = [corpus.ids[d] for d in plan.batches[s]]
                    raise UserError(f"loss: {value} at step {s}, expected a finite number; {corpus.things} of the batch ({len(names)}): "
                                    f"{', '.join(names[:3])} ...; try a lower learning_rate, grad_clip, or another loss")
                row = {"step": int(s), "progress": s / total, "loss": float(value)}
                if corpus.labels.shape[1] > 1:
                    row["train_accuracy"] = float(right / len(plan.batches[s]))
                row |= {"lr": float(rates[s]), f"{corpus.unit}_per_second": round(float(speed), 1)}
                row |= evaluated.pop(int(s), {})
                if s % config.log_every == 0 or s == total - 1:
                    run.metrics(row)
            progress.update(len(steps_), loss=row["loss"], accuracy=row.get("train_accuracy"), **{corpus.unit: sum(useful)})

    try:
        for boundary, (dispatch, which) in enumerate(todo):
            if distributed.due(boundary):
                collect(keep=0)
                if dispatch.start > saved:
                    save(dispatch.start, last=False)
                interrupts.stop(f"the same command goes on at step {dispatch.start} of {total}")
            if on_eval and config.eval_every and dispatch.start and dispatch.start % config.eval_every == 0:
                collect(keep=0)
                evaluate(dispatch.start)
                if best and best.exhausted(dispatch.start):
                    stopped = dispatch.start
                    say(f"{label}: no better {config.select} for {config.patience} evaluations, stopped at step {stopped} of {total}")
                    break
            xs = _inputs(plan, dispatch, plan.shapes[which], group, corpus, rates, coefficients, mesh)
            n = mesh_lib.put(np.int32(len(dispatch)), none)
            trainable, opt_state, loss_state, metrics = _run_dispatch(
                program, stats, trainable, opt_state, loss_state, frozen, key, n, xs)
            waiting.append((dispatch, metrics, [int(sizes[plan.batches[s]].sum()) for s in dispatch]))
            collect(keep=1)
            at = dispatch.stop
            if config.checkpoint_every and at % config.checkpoint_every == 0 and at < total:
                collect(keep=0)  # a state behind a non-finite loss is never saved
                save(at, last=False)
        collect(keep=0)
        if best:
            if stopped == total:
                evaluate(total)
            trainable = best.restore(ckpt.abstract(trainable, shardings["trainable"]))
            stats["selected"] = {"step": best.step, "score": best.score, "steps": stopped}
        if done < total:  # under the last step's number, wherever it stopped: there is nothing left to train
            save(total, last=True)
    finally:
        progress.close()
        if best:
            best.close()
        checkpoints.close()
    return merge_params(trainable, frozen)


def finish_checkpoints(config, run) -> None:
    """What `config.keep` leaves once predictions are written: the last step (params or everything), or nothing."""
    selection.clear(run.path)
    checkpoints = ckpt.Checkpoints(run.path)
    try:
        if config.keep == "none":
            checkpoints.clear()
        elif steps := checkpoints.steps():
            checkpoints.keep_only({steps[0]})
    finally:
        checkpoints.close()
