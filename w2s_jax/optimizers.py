"""Optimizers and learning-rate schedules.

The rules are optax's; around them stand the three things that a run needs and that are the same for all: the learning
rate is an input of the step, not a constant of the program; weight decay is decoupled and decided by the parameter's
path; and a stacked parameter `[layers, ...]` is treated as the separate tensors that it holds.

`adafactor_openai` is the rule that openai/weak-to-strong reaches through torch_optimizer (relative steps, so that the
learning rate is not used), kept for that preset.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from w2s_jax.config import CHOICES, OPTIMIZER_ARGS, optimizer_args
from w2s_jax.errors import UserError, nearest
from w2s_jax.mesh import map_paths, paths

# Which parameters are decayed: the first pattern found in the path decides.
DECAY = ((r"(^|/)(bias|scale)$", False), (r"", True))


def is_stacked(path: str) -> bool:
    """Whether the parameter at `path` has a leading axis of layers: `backbone/layers/...`."""
    return path.split("/")[1:2] == ["layers"]


def decayed(path: str) -> bool:
    """Whether weight decay applies to the parameter at `path`: not to biases and the scales of norms."""
    return next(value for pattern, value in DECAY if re.search(pattern, path))


def learning_rates(schedule: str, peak: float, total_steps: int, warmup_steps: int = 0) -> np.ndarray:
    """The learning rate of every update, float64 `[total_steps]`.

    With warm-up, the first update has rate exactly 0 and update `warmup_steps` the peak (transformers'
    get_cosine_schedule_with_warmup); without, the first update has the peak (torch's CosineAnnealingLR over
    `total_steps`). cosine and linear fall towards 0, which update `total_steps` would have.

    Raises:
      UserError: unknown schedule, negative warm-up.
    """
    shapes = {
        "constant": np.ones_like,
        "cosine": lambda t: 0.5 * (1 + np.cos(math.pi * t)),
        "linear": lambda t: 1 - t,
    }
    if schedule not in shapes:
        raise UserError(f"schedule={schedule!r}: expected one of {', '.join(shapes)}{nearest(schedule, shapes)}")
    if warmup_steps < 0:
        raise UserError(f"warmup_steps={warmup_steps}: expected 0 or more")
    step = np.arange(total_steps, dtype=np.float64)
    rates = shapes[schedule](np.maximum(step - warmup_steps, 0) / max(1, total_steps - warmup_steps))
    return peak * np.where(step < warmup_steps, step / max(1, warmup_steps), rates)


# ---------------------------------------------------------------------------------------------------------------------
# Rules: optax transformations whose update is a direction; the step is minus the learning rate times it.


def _kept_in(tx: optax.GradientTransformation, mu_dtype: str) -> optax.GradientTransformation:
    """`tx` with first moments that are stored in `mu_dtype`, and rounded to it once an update, behind the direction."""
    def stored(state):
        return state._replace(mu=jax.tree.map(lambda m: m.astype(mu_dtype), state.mu))

    def update(grads, state, params=None):
        directions, state = tx.update(grads, state._replace(mu=_float32(state.mu)), params)
        return directions, stored(state)

    return optax.GradientTransformation(lambda params: stored(tx.init(params)), update)


def _adam(b1: float, b2: float, eps: float, mu_dtype: str) -> optax.GradientTransformation:
    """optax.scale_by_adam with bias corrections that keep their digits.

    optax computes 1 - b2**t in float32, which for b2 = 0.999 is off by 1e-5 of itself in the first steps, a hundred
    times the rounding of everything else; torch computes it in double.
    """
    moments = optax.scale_by_adam(b1, b2, eps)

    def update(grads, state, params=None):
        _, state = moments.update(grads, state, params)
        c1, c2 = (-jnp.expm1(state.count * math.log(b)) if b > 0 else jnp.float32(1) for b in (b1, b2))
        return jax.tree.map(lambda m, v: (m / c1) / (jnp.sqrt(v / c2) + eps), state.mu, state.nu), state

    return _kept_in(optax.GradientTransformation(moments.init, update), mu_dtype)


def _adafactor() -> optax.GradientTransformation:
    """optax.adafactor's chain, the learning rate left to the caller."""
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())


def _adafactor_openai() -> optax.GradientTransformation:
    """torch_optimizer's Adafactor at its defaults, for ONE tensor: the update it gives is the whole step.

    State: `count` of updates, and the second moments of rows and columns (two or more dimensions) or of every element.
    """

    def rms(x):
        return jnp.sqrt(jnp.mean(jnp.square(x)))

    def init(p):
        shape = tuple(p.shape)
        moments = {"v": shape} if len(shape) < 2 else {"v_row": shape[:-1], "v_col": shape[:-2] + shape[-1:]}
        return {"count": jnp.zeros((), jnp.int32), **{k: jnp.zeros(s, jnp.float32) for k, s in moments.items()}}

    def update(g, state, p):
        step = (state["count"] + 1).astype(jnp.float32)
        rate = jnp.maximum(1e-3, rms(p)) * jnp.minimum(1e-2, 1 / jnp.sqrt(step))
        beta2 = 1 - step**-0.8
        square = jnp.square(g) + 1e-30
        fresh = {"v": square} if g.ndim < 2 else {"v_row": square.mean(-1), "v_col": square.mean(-2)}
        new = {k: beta2 * state[k] + (1 - beta2) * v for k, v in fresh.items()}
        if g.ndim < 2:
            direction = g * jax.lax.rsqrt(new["v"])
        else:
            row = jax.lax.rsqrt(new["v_row"] / new["v_row"].mean(-1, keepdims=True))
            direction = g * row[..., :, None] * jax.lax.rsqrt(new["v_col"])[..., None, :]
        direction = direction / jnp.maximum(1.0, rms(direction))
        return rate * direction, {"count": state["count"] + 1, **new}

    return optax.GradientTransformation(init, update)


class _Kind(NamedTuple):
    """A registry entry: `rule(**args)`, and whether it treats elements apart or needs whole tensors."""

    rule: Callable[..., optax.GradientTransformation]
    per_tensor: bool = False
    applies_lr: bool = True
    notice: str = ""


MU_DTYPES = CHOICES["optimizer_args.mu_dtype"]
OPTIMIZERS: dict[str, _Kind] = {
    "adam": _Kind(_adam),
    "adamw": _Kind(_adam),
    "adafactor": _Kind(_adafactor, per_tensor=True),
    "sgd": _Kind(lambda momentum: optax.trace(momentum) if momentum else optax.identity()),
    "lion": _Kind(lambda b1, b2, mu_dtype: _kept_in(optax.scale_by_lion(b1, b2), mu_dtype)),
    "adafactor_openai": _Kind(_adafactor_openai, per_tensor=True, applies_lr=False,
                              notice="learning_rate and schedule are logged but not applied: its steps are relative"),
}
if set(OPTIMIZERS) != set(OPTIMIZER_ARGS):
    raise AssertionError(f"optimizers.OPTIMIZERS and config.OPTIMIZER_ARGS differ in {sorted(set(OPTIMIZERS) ^ set(OPTIMIZER_ARGS))}")


# ---------------------------------------------------------------------------------------------------------------------


def _per_tensor(tx: optax.GradientTransformation, stacked: Callable[[str], bool]) -> optax.GradientTransformation:
    """`tx`, a rule for one tensor, over a tree; a stacked parameter is its layers' tensors. State: a tree of tx's states."""

    def over(params, one, *trees):
        treedef = jax.tree.structure(params)
        rows = zip(*(treedef.flatten_up_to(tree) for tree in trees), strict=True)
        return [(jax.vmap(one) if stacked(path) else one)(*row) for (path, _), row in zip(paths(params), rows, strict=True)], treedef

    def init(params):
        states, treedef = over(params, tx.init, params)
        return treedef.unflatten(states)

    def update(grads, state, params):
        pairs, treedef = over(params, tx.update, grads, state, params)
        return treedef.unflatten([d for d, _ in pairs]), treedef.unflatten([s for _, s in pairs])

    return optax.GradientTransformation(init, update)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer with its arguments. Equal ones hash alike: use it as a static argument of jit or a key of a cache.

    Parameters and gradients are nested dicts of arrays. The arithmetic is float32 whatever the parameters' type, and so is the
    state but for first moments under mu_dtype=bfloat16, which changes what Adam and Lion hold from 8 and 4 bytes a parameter to 6
    and 2. Second moments stay float32: with b2 = 0.999 an update changes them by a thousandth, which bfloat16's 8 bits round away.

    Attributes:
      name: a key of `OPTIMIZERS`.
      args: the resolved arguments, `((name, value), ...)` in order of name.
      weight_decay: each update takes `lr * weight_decay * p` off the parameters of `decayed`.
      grad_clip: gradients are scaled by `min(1, grad_clip / (global norm + 1e-6))`; 0 = off.
      stacked: path -> whether the parameter has a leading axis of layers.
    """

    name: str
    args: tuple[tuple[str, Any], ...]
    weight_decay: float = 0.0
    grad_clip: float = 0.0
    stacked: Callable[[str], bool] = is_stacked

    @functools.cached_property
    def _tx(self) -> optax.GradientTransformation:
        kind = OPTIMIZERS[self.name]
        tx = kind.rule(**dict(self.args))
        return _per_tensor(tx, self.stacked) if kind.per_tensor else tx

    @property
    def notice(self) -> str:
        """A line that the caller prints before training, or the empty string."""
        notice = OPTIMIZERS[self.name].notice
        return f"optimizer={self.name}: {notice}" if notice else ""

    def init(self, params):
        """The state before the first update. Traceable; pass `state_shardings` as jit's out_shardings where it matters."""
        return self._tx.init(_float32(params))

    def update(self, grads, state, params, lr: jax.Array):
        """One update: `(new parameters, new state)`.

        Args:
          grads: as `params`, any floating type.
          state: what `init` or the last update gave.
          params: nested dict of arrays; the new ones have their types.
          lr: float32 scalar, an input of the program (a schedule does not recompile it).
        """
        grads, values = _float32(grads), _float32(params)
        if self.grad_clip:
            scale = jnp.minimum(1.0, self.grad_clip / (optax.global_norm(grads) + 1e-6))
            grads = jax.tree.map(lambda g: g * scale, grads)
        directions, state = self._tx.update(grads, state, values)
        rate = jnp.asarray(lr, jnp.float32) if OPTIMIZERS[self.name].applies_lr else jnp.float32(1)

        def step(path, p, value, direction):
            if self.weight_decay and decayed(path):
                value = value * (1 - rate * self.weight_decay)
            return (value - rate * direction).astype(p.dtype)

        return map_paths(step, params, values, directions), state

    def state_shardings(self, abstract_params, param_shardings):
        """Shardings of the state: moments lie as their parameters do, factored ones along the dimensions they keep.

        Args:
          abstract_params: nested dict of arrays or ShapeDtypeStruct.
          param_shardings: nested dict of NamedSharding of the same structure.

        Returns:
          A tree of NamedSharding with the structure of `init(params)`; counts are replicated.
        """
        params = {tuple(path.split("/")): leaf for path, leaf in paths(abstract_params)}
        shardings = {tuple(path.split("/")): leaf for path, leaf in paths(param_shardings)}
        if set(params) != set(shardings):
            raise ValueError(f"parameters and shardings differ in {sorted('/'.join(p) for p in set(params) ^ set(shardings))}")

        def place(path, leaf):
            keys = tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
            # A moment's path holds its parameter's: mu/backbone/... (optax's trees), backbone/.../v_row (per tensor).
            owner = next((keys[i:j] for i in range(len(keys)) for j in range(len(keys), i, -1) if keys[i:j] in params), None)
            if owner is None:
                return NamedSharding(mesh, PartitionSpec())
            spec = tuple(shardings[owner].spec) + (None,) * (len(params[owner].shape) - len(shardings[owner].spec))
            return NamedSharding(mesh, PartitionSpec(*_kept(params[owner].shape, leaf.shape, spec, last=keys[-1] != "v_col")))

        mesh = next(iter(shardings.values())).mesh
        return jax.tree_util.tree_map_with_path(place, jax.eval_shape(self.init, abstract_params))


def _kept(shape: tuple, moment: tuple, spec: tuple, last: bool) -> tuple:
    """The entries of `spec` for a moment that keeps all dimensions of `shape` or all but one, else replication.

    In a square matrix the shapes don't say which dimension a factored moment lost: `last` takes the last candidate.
    """
    if moment == shape:
        return spec
    candidates = [i for i in range(len(shape)) if shape[:i] + shape[i + 1:] == moment]
    if not candidates:
        return ()
    gone = candidates[-1 if last else 0]
    return spec[:gone] + spec[gone + 1:]


def _float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def of(config) -> Optimizer:
    """The optimizer of a training config."""
    return make(config.optimizer, optimizer_args(config), weight_decay=config.weight_decay, grad_clip=config.grad_clip)


def make(name: str, args: dict | None = None, *, weight_decay: float = 0.0, grad_clip: float = 0.0,
         stacked: Callable[[str], bool] = is_stacked) -> Optimizer:
    """The optimizer called `name`.

    Args:
      name: a key of `config.OPTIMIZER_ARGS`.
      args: its arguments; absent or None ones take the default of `config.OPTIMIZER_ARGS`.
      weight_decay, grad_clip, stacked: see `Optimizer`.

    Raises:
      UserError: unknown name or argument, a value out of range.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"optimizer={name!r}: expected one of {', '.join(OPTIMIZERS)}{nearest(name, OPTIMIZERS)}")
    defaults = OPTIMIZER_ARGS[name]
    given = {k: v for k, v in dict(args or {}).items() if v is not None}
    for key in given:
        if key not in defaults:
            takes = ", ".join(defaults) or "none"
            raise UserError(f"optimizer_args.{key}: optimizer={name} does not take it, its arguments: {takes}{nearest(key, defaults)}")
    values = {key: value if isinstance(value, str) else float(value) for key, value in {**defaults, **given}.items()}
    mu_dtype = values.get("mu_dtype", "float32")
    if mu_dtype not in MU_DTYPES:
        raise UserError(f"optimizer_args.mu_dtype={mu_dtype!r}: expected one of {', '.join(MU_DTYPES)}{nearest(mu_dtype, MU_DTYPES)}")
    decay = "b2" if name == "lion" else "b1"  # of the first moments
    if mu_dtype == "bfloat16" and values[decay] > 0.99:
        raise UserError(f"optimizer_args.{decay}={values[decay]!r}: expected at most 0.99 with mu_dtype=bfloat16, whose 8 bits "
                        "round smaller changes of a first moment away")
    for key, value in values.items():
        if key == "mu_dtype":
            continue
        if key == "eps" and not value > 0:
            raise UserError(f"optimizer_args.eps={value!r}: expected a number above 0")
        if key != "eps" and not 0 <= value < 1:
            raise UserError(f"optimizer_args.{key}={value!r}: expected 0 or more and below 1")
    for key, value in (("weight_decay", weight_decay), ("grad_clip", grad_clip)):
        if not value >= 0:
            raise UserError(f"{key}={value!r}: expected 0 or more")
    if weight_decay and not OPTIMIZERS[name].applies_lr:
        raise UserError(f"weight_decay={weight_decay!r}: optimizer={name} takes none, having no learning rate to scale it; expected 0")
    return Optimizer(name, tuple(sorted(values.items())), float(weight_decay), float(grad_clip), stacked)
