"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): which matrices have one, their merging, and PEFT's files of them.

An adapted Linear has two parameters beside its kernel, stacked over the layers and always float32: `lora_a` [layers, inputs,
rank], uniform in +-1/sqrt(inputs), and `lora_b` [layers, rank, outputs], 0 at the start (layers.Linear). A fused matrix (GPT-2's
c_attn, GPT-NeoX's query_key_value) has one adapter as a whole, as in PEFT.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from w2s_jax import mesh as mesh_lib
from w2s_jax import peft
from w2s_jax.errors import UserError
from w2s_jax.models import heads
from w2s_jax.models.layers import Adapter
from w2s_jax.models.weights import is_adapter, names_of, nest, paths

ALL = "all-linear"
_STACK = "backbone/layers/"


@dataclass(frozen=True)
class Lora:
    """`rank` and `alpha` (the addition is scaled by alpha/rank, or alpha/sqrt(rank) with `rslora`, arXiv 2312.03732); `dropout` on
    the adapters' input; `targets`: "all-linear" (every matrix of the layers), comma-separated ends of module names in the
    checkpoint (q_proj,v_proj), or a regex over whole module names."""

    rank: int
    alpha: float
    dropout: float
    targets: str
    rslora: bool

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def modules(abstract: dict, config, family) -> dict[str, list[str]]:
    """Matrix inside a layer ("attn/q") -> the names of its modules in transformers' class for classification, one a layer."""
    names = names_of(paths(abstract), config, family, family.prefixes[0])
    return {path[len(_STACK):].removesuffix("/kernel"): [n.removesuffix(".weight") for n in found]
            for path, found in names.items() if path.startswith(_STACK) and path.endswith("/kernel")}


def adapters(lora: Lora, found: dict[str, list[str]]) -> tuple[tuple[str, Adapter], ...]:
    """The adapters that `lora.targets` asks for among `found` (`modules`).

    Raises:
      UserError: a regex that is none; a target that names no matrix, or one in some of the layers only.
    """
    def no_such(target):
        return UserError(f"lora.targets: {target!r} names no matrix of this model; expected {ALL}, ends of names such as "
                         f"{', '.join(names[0].rsplit('.', 1)[-1] for names in found.values())}, or a regex over whole names such as "
                         f"{next(iter(found.values()))[0]}")

    if lora.targets == ALL:
        chosen = list(found)
    else:
        if re.fullmatch(r"[\w.]+(,[\w.]+)*", lora.targets):
            tests = {t: (lambda name, t=t: name == t or name.endswith(f".{t}")) for t in lora.targets.split(",")}
        else:
            try:
                tests = {lora.targets: re.compile(lora.targets).fullmatch}
            except re.error as error:
                raise UserError(f"lora.targets: {lora.targets!r} is no regex: {error}") from None
        for target, test in tests.items():
            if not any(test(name) for names in found.values() for name in names):
                raise no_such(target)
        chosen = []
        for path, names in found.items():
            hits = [i for i, name in enumerate(names) if any(test(name) for test in tests.values())]
            if hits and len(hits) < len(names):
                raise UserError(f"lora.targets: {lora.targets!r} names {names[hits[0]].rsplit('.', 1)[-1]} in {len(hits)} of {len(names)} "
                                "layers, expected all layers or none")
            chosen += [path] if hits else []
    sites = {path: i for i, path in enumerate(found)}
    return tuple((path, Adapter(lora.rank, lora.scale, lora.dropout, sites[path])) for path in chosen)


@functools.partial(jax.jit, static_argnums=3)
def _merged(kernel, a, b, scale):
    delta = jnp.einsum("...ir,...ro->...io", a, b, precision="highest")
    return (kernel.astype(jnp.float32) + scale * delta).astype(kernel.dtype)


def merge(params: dict, scale: float) -> dict:
    """Params without adapters: each one's product, times `scale`, is added to its kernel in float32 and rounded once."""
    flat = paths(params)
    for path in [p for p in flat if p.endswith("/lora_a")]:
        base = path.removesuffix("/lora_a")
        flat[f"{base}/kernel"] = _merged(flat[f"{base}/kernel"], flat.pop(path), flat.pop(f"{base}/lora_b"), scale)
    return nest(flat)


# --------------------------------------------------------------------------- PEFT's files


def _name(module: str, which: str) -> str:
    return f"base_model.model.{module}.lora_{which.upper()}.weight"


def read(folder, params: dict, model, family) -> dict:
    """`params` with the adapters of a PEFT folder, and with its classification head where it holds one.

    Raises:
      UserError: tensors missing, surplus or of another shape (all of them in one message), a head with a bias.
    """
    file = Path(folder).expanduser() / peft.TENSORS
    try:
        with safe_open(file, "numpy") as opened:
            there = {name: opened.get_tensor(name) for name in opened.keys()}
    except (SafetensorError, OSError, FileNotFoundError) as error:
        raise UserError(f"{file}: missing, truncated or not a safetensors file ({error})") from None
    flat, wanted = paths(params), {}
    found = modules({"backbone": model.abstract["backbone"]}, model.config, family)
    for path, leaf in flat.items():
        if is_adapter(path):
            names = [_name(module, path[-1]) for module in found[path[len(_STACK):].rsplit("/", 1)[0]]]
            wanted[path] = (names, leaf.shape[:0:-1])
    head = {path: f"base_model.model.{name}" for path, name in heads.tensor_names(params["head"], family.classifier[1]).items()}
    if any(name in there for name in head.values()):
        wanted |= {f"head/{path}": ([name], flat[f"head/{path}"].shape[::-1]) for path, name in head.items()}
    bias = f"base_model.model.{family.classifier[1].removesuffix('weight')}bias"
    if bias in there:
        if there[bias].any():
            raise UserError(f"{file}: {bias} is not 0, and the heads here have no bias")
        del there[bias]

    names = {name: shape for found_names, shape in wanted.values() for name in found_names}
    problems = [f"{n} is missing" for n in names if n not in there] + [f"{n} has no place" for n in there if n not in names]
    problems += [f"{n} is {list(there[n].shape)}, expected {list(shape)}" for n, shape in names.items()
                 if n in there and there[n].shape != tuple(shape)]
    if problems:
        raise UserError(f"{file}: does not fit the model and {peft.CONFIG}: {'; '.join(problems[:4])}"
                        + (f"; and {len(problems) - 4} more" if len(problems) > 4 else ""))
    for path, (names, _) in wanted.items():
        leaf = flat[path]
        stack = np.stack([there[n].T for n in names]).astype(leaf.dtype)
        flat[path] = mesh_lib.put(stack if is_adapter(path) else stack[0], leaf.sharding)
    return nest(flat)


def files(params: dict, model, family, lora: Lora, base: str, revision: str) -> tuple[dict, bytes]:
    """adapter_config.json (as a dict) and the bytes of adapter_model.safetensors: the adapters and the head, float32."""
    found = modules({"backbone": model.abstract["backbone"]}, model.config, family)
    tensors, targets = {}, set()
    for path, leaf in paths(params).items():
        if is_adapter(path):
            names = found[path[len(_STACK):].rsplit("/", 1)[0]]
            targets.add(names[0])
            stack = mesh_lib.fetch(leaf)
            tensors |= {_name(module, path[-1]): np.ascontiguousarray(stack[i].T) for i, module in enumerate(names)}
    head = heads.tensors(mesh_lib.fetch(params["head"]), family.classifier[1], model.classes)
    tensors |= {f"base_model.model.{name}": value for name, value in head.items()}
    settings = {"rank": lora.rank, "alpha": lora.alpha, "dropout": lora.dropout, "rslora": lora.rslora,
                "targets": _as_peft_has_them(targets, found, bool(model.config.pooler))}
    return (peft.config_json(settings, base, revision, family.classifier[1].split(".")[0], not family.transposed),
            save(tensors, metadata={"format": "pt"}))


def _as_peft_has_them(chosen: set[str], found: dict[str, list[str]], pooler: bool) -> list[str] | str:
    """target_modules: the last parts of the names where these tell the chosen matrices (named as in the first layer) from all
    others, else a regex. A pooler, outside of the layers, may share its name with a matrix inside."""
    ends = {name.rsplit(".", 1)[-1] for name in chosen}
    if not pooler and all(names[0] in chosen for names in found.values() if names[0].rsplit(".", 1)[-1] in ends):
        return sorted(ends)
    return "|".join(re.sub(r"\\\.0\\\.", r"\\.\\d+\\.", re.escape(name), count=1) for name in sorted(chosen))
