"""Safetensors in, params out: read slice by slice, strict both ways. `writing` is the way back.

Every tensor of the checkpoint must be taken by a parameter (or be declared as no parameter by its family), and every
parameter filled by a tensor of its shape. What no checkpoint of a pretrained model has, the classification head and the
adapters, is the only exception; a head that one does have is left alone, and said.
"""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from w2s_jax import mesh as mesh_lib
from w2s_jax.errors import UserError
from w2s_jax.progress import say

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
READABLE = {"F32", "F16", "BF16"}
AT_ONCE = 2**26  # bytes of a stack of layers that the host holds at a time while it reads or writes


def paths(tree: dict, prefix: str = "") -> dict:
    """A nested dict flattened: {"backbone/norm/scale": leaf, ...}; `nest` is the way back."""
    flat = {}
    for key, value in tree.items():
        flat |= paths(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def is_adapter(path: str) -> bool:
    """Whether the parameter at `path` belongs to a low-rank adapter, which no checkpoint of a model holds (models.lora)."""
    return path.endswith(("/lora_a", "/lora_b"))


def nest(flat: dict) -> dict:
    """The nested dict whose `paths` are `flat`."""
    tree: dict = {}
    for path, value in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = value
    return tree


class Place(NamedTuple):
    """Where tensors come from, for messages and for what is not read: `path`; `says`: who tells what must be there ("config.json
    says"); `ignored`: regex of tensors that are no parameters; `own_head`: those of a classification head that is not used."""

    path: Path
    says: str
    ignored: str
    own_head: tuple[str, ...] = ()


class _Tensor(NamedTuple):
    file: Path
    key: str  # its name in the file
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """The tensors of a folder's safetensors by name, sharded or not, or of one such file; files are mapped only while something
    is read."""

    def __init__(self, folder: Path, renamed: tuple[tuple[str, str], ...] = ()):
        self.folder = folder
        self.tensors: dict[str, _Tensor] = {}
        self._opened: dict = {}
        single = [folder] if folder.is_file() else [folder / SINGLE] if (folder / SINGLE).exists() else None
        for file in single or [folder / name for name in self._indexed()]:
            if not file.exists():
                raise UserError(f"{file}: no such file, although {folder / INDEX} names it")
            try:
                opened = safe_open(file, "numpy")
                found = {key: opened.get_slice(key) for key in list(opened.keys())}
                found = {key: _Tensor(file, key, tuple(s.get_shape()), s.get_dtype()) for key, s in found.items()}
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: truncated or not a safetensors file ({error})") from None
            for old, new in renamed:
                found = {key[: -len(old)] + new if key.endswith(old) else key: t for key, t in found.items()}
            if twice := self.tensors.keys() & found.keys():
                raise UserError(f"{file}: tensor {min(twice)!r} stands in {self.tensors[min(twice)].file} too")
            self.tensors |= found

    def _indexed(self) -> list[str]:
        file = self.folder / INDEX
        try:
            names = set(json.loads(file.read_text())["weight_map"].values())
        except FileNotFoundError:
            raise UserError(f"{self.folder}: no weights; expected {SINGLE} or {INDEX}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file}: not an index of safetensors files ({type(error).__name__}: {error})") from None
        if bad := [n for n in names if not isinstance(n, str) or Path(n).name != n]:
            raise UserError(f"{file}: weight_map names {bad[0]!r}; expected a file of the same folder")
        return sorted(names)

    def read(self, name: str, index: tuple = ()) -> np.ndarray:
        """One tensor, or the part of it that `index` (a tuple of slices with step 1) selects."""
        tensor = self.tensors[name]
        try:
            if tensor.file not in self._opened:
                self._opened[tensor.file] = safe_open(tensor.file, "numpy")
            return self._opened[tensor.file].get_slice(tensor.key)[index or (Ellipsis,)]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{tensor.file}: cannot read tensor {name!r} ({error})") from None

    def release(self) -> None:
        """Unmap the files: their pages count as this process's memory while they are mapped."""
        self._opened.clear()


def stored_dtype(folder) -> str:
    """bfloat16 where all tensors of the checkpoint in `folder` are, else float32."""
    return "bfloat16" if {t.dtype for t in Checkpoint(Path(folder)).tensors.values()} == {"BF16"} else "float32"


def names_of(abstract: dict, config, family, prefix: str) -> dict[str, list[str | None] | str]:
    """Path of each parameter that a checkpoint holds -> name of its tensor, or the list of its layers' names.

    `abstract`: flat params; a name is None where a layer has no such tensor (the norm before the first attention).
    """
    if unknown := [path for path in abstract if path not in family.names and not path.startswith("head/") and not is_adapter(path)]:
        raise ValueError(f"{family.model_type}: parameters without a name in the checkpoint: {sorted(unknown)}")
    names = {}
    for path, name in family.names.items():
        if path not in abstract:
            continue
        if "{i}" not in name:
            names[path] = name.format(p=prefix)
            continue
        layers: list[str | None] = [name.format(p=prefix, i=i) for i in range(config.layers)]
        if "/norm1/" in path and not config.first_norm:
            layers[0] = None
        names[path] = layers
    return names


def each(names: dict):
    """(path, layer or None, tensor name) of every tensor."""
    for path, name in names.items():
        if isinstance(name, str):
            yield path, None, name
        else:
            yield from ((path, i, n) for i, n in enumerate(name) if n is not None)


def transposed(path: str, family) -> bool:
    return family.transposed and path.endswith("kernel")


def _own_head(checkpoint: Checkpoint, family) -> list[str]:
    """Tensors of the head of transformers' class for classification, which a checkpoint may have been saved with."""
    module = family.classifier[1].split(".")[0]
    return [name for name in checkpoint.tensors if name.startswith(f"{module}.")]


def _differences(place: Place, checkpoint, wanted: dict[str, tuple]) -> None:
    """UserError with both sides of the difference between the tensors there and those `wanted` (name -> shape)."""
    there = checkpoint.tensors
    surplus = [n for n in there if n not in wanted and not re.fullmatch(place.ignored, n) and n not in place.own_head]
    missing = [n for n in wanted if n not in there]
    shapes = [f"{n} {list(there[n].shape)} where {place.says} {list(s)}" for n, s in wanted.items()
              if n in there and there[n].shape != s]
    if surplus or missing or shapes:
        def some(title, items):
            return f"{len(items)} {title} ({', '.join(items[:4])}{', ...' if len(items) > 4 else ''})" if items else ""

        parts = [some("missing", missing), some("that nothing takes", surplus), some("of another shape", shapes)]
        raise UserError(f"{place.path}: the tensors do not fit {place.says.removesuffix(' says')}: {'; '.join(p for p in parts if p)}")
    for name in wanted:
        if there[name].dtype not in READABLE:
            raise UserError(f"{there[name].file}: tensor {name!r} is {there[name].dtype}; expected one of {', '.join(sorted(READABLE))}")


def load(folder, model, family, shardings: dict | None, key) -> dict:
    """Params of `model` (a models.Model) from the safetensors in `folder`.

    `shardings`: nested dict of jax.sharding.Sharding like the params (default: one device); each device reads only its
    slice. Tensors are cast to the model's parameter type, layers stacked as they are read: the host holds one tensor, or
    AT_ONCE bytes of layers, at a time. `key`: random key of the head's and the adapters' initialisation (they are what
    model.init(key) makes). UserError: missing, surplus or mis-shaped tensors (all of them in one message), a type other than F32, F16,
    BF16, a file that cannot be read.
    """
    folder = Path(folder)
    checkpoint = Checkpoint(folder, family.renamed)
    prefix = next((p for p in family.prefixes if any(n.startswith(p) for n in checkpoint.tensors)), "")
    names = names_of(paths(model.abstract), model.config, family, prefix)
    place = Place(folder, "config.json says", family.ignored, tuple(_own_head(checkpoint, family)))
    return fill(checkpoint, place, model, names, lambda path: (1, 0) if transposed(path, family) else None, shardings, key)


def fill(checkpoint, place: Place, model, names: dict[str, list[str | None] | str], order: Callable[[str], tuple[int, ...] | None],
         shardings: dict | None, key) -> dict:
    """Params of `model` from an open checkpoint, strictly; `load` says how, and what `shardings`, `key` and errors are.

    `checkpoint`: a Checkpoint, or what has its `tensors`, `read` and `release` (models.torchfile). `names`: as names_of gives
    them. `order(path)`: for each axis of the parameter (of one layer of a stack) the axis of the stored tensor that it is, None =
    as stored: (1, 0) for a matrix that is stored [outputs, inputs].
    """
    abstract = paths(model.abstract)

    def as_stored(path, items):
        """The items of the parameter's axes, in the order of the stored tensor's."""
        turned = order(path)
        return tuple(items) if turned is None else tuple(items[i] for i in np.argsort(turned))

    wanted = {name: as_stored(path, abstract[path].shape[0 if layer is None else 1:]) for path, layer, name in each(names)}
    _differences(place, checkpoint, wanted)
    if place.own_head:
        new = "" if "head" not in model.abstract else ": a new one is made"
        say(f"{place.path}: its own classification head ({', '.join(place.own_head)}) is not used{new}")

    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = paths(shardings) if shardings is not None else {}

    def read(path):
        name, leaf, turned = names[path], abstract[path], order(path)
        sharding = placed.get(path, default)
        layers = None if isinstance(name, str) else name

        def stored(layer, index) -> np.ndarray:
            """(A slice of) one tensor as it is stored, or the ones of a row that no layer reads."""
            if layer is None:
                return np.ones([len(range(n)[s]) for n, s in zip(leaf.shape[1:], index)], np.float32)
            return checkpoint.read(layer, index)

        def array(shape, sharding, part):
            cached: dict = {}  # replicas of a slice are read once

            def callback(index):
                where = tuple((s.start, s.stop) for s in index)
                if where not in cached:
                    cached[where] = part(index)
                return cached[where]

            return jax.make_array_from_callback(shape, sharding, callback)

        def small(index):
            """Stacked, turned and cast by the host."""
            inner = as_stored(path, index if layers is None else index[1:])
            found = [stored(n, inner) for n in ([name] if layers is None else layers[index[0]])]
            found = [t if turned is None else t.transpose(turned) for t in found]
            out = np.empty((len(found), *found[0].shape), leaf.dtype)
            for i, t in enumerate(found):
                out[i] = t
            return out[0] if layers is None else out

        if leaf.size * leaf.dtype.itemsize <= AT_ONCE or layers and sharding.shard_shape(leaf.shape)[0] < len(layers):
            return array(leaf.shape, sharding, small)

        # Large: moved as it is stored (turning a view costs the transfer little), cast by the devices, a few layers at a time.
        def large(index, names):
            inner = as_stored(path, index if layers is None else index[1:])
            found = [stored(n, inner) for n in names]
            out = found[0] if layers is None else np.stack(found)
            if turned is None:
                return out
            return out.transpose(turned if layers is None else (0, *(1 + i for i in turned)))

        if layers is None:
            result = _cast(array(leaf.shape, sharding, lambda index: large(index, [name])), leaf.dtype, sharding)
        else:
            fitting = max(AT_ONCE * len(layers) // (leaf.size * leaf.dtype.itemsize), 1)
            at_once = max(n for n in range(1, len(layers) + 1) if len(layers) % n == 0 and n <= fitting)
            result = _zeros(leaf.shape, leaf.dtype, sharding)
            for i in range(0, len(layers), at_once):
                part = array((at_once, *leaf.shape[1:]), sharding, lambda index, i=i: large(index, layers[i : i + at_once]))
                result = jax.block_until_ready(_put(result, part, i, sharding))
                checkpoint.release()
        return jax.block_until_ready(result)

    params = {}
    for path in names:
        params[path] = read(path)
        checkpoint.release()
    if abstract.keys() - names.keys():
        new = paths(model.init_new(jax.random.key(0) if key is None else key))
        if key is None and any(np.asarray(leaf).any() for leaf in new.values()):
            raise ValueError("load needs a key: the initialisation of this model's head or adapters is random")
        params |= {path: mesh_lib.put(leaf, placed.get(path, default)) for path, leaf in new.items()}
    return nest(params)


def unembedding(folder, config, family, ids) -> np.ndarray:
    """Output vectors of the tokens `ids` (rows of the tied embedding or of the output matrix) in a language model's safetensors.

    float32 `[embed, ids]`: as the kernel of a classification head they give the language model's logits of these tokens, before
    a cap on the logits where the family has one. UserError: the folder holds no output matrix, or no such row.
    """
    checkpoint = Checkpoint(Path(folder), family.renamed)
    prefix = next((p for p in family.prefixes if any(n.startswith(p) for n in checkpoint.tensors)), "")
    name = family.names["backbone/embed/tokens/embedding" if config.tied else "lm_head/kernel"].format(p=prefix)
    if name not in checkpoint.tensors:
        raise UserError(f"head_init='unembedding': {folder} has no tensor {name!r}; expected a language model's checkpoint")
    if bad := [i for i in ids if not 0 <= i < checkpoint.tensors[name].shape[0]]:
        raise UserError(f"head_init='unembedding': token id {bad[0]}, expected ids below {checkpoint.tensors[name].shape[0]} ({name})")
    rows = [np.asarray(checkpoint.read(name, (slice(i, i + 1),)), np.float32) for i in ids]
    checkpoint.release()
    return np.concatenate(rows).T


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape, dtype, sharding):
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _cast(x, dtype, sharding):
    return jax.lax.with_sharding_constraint(x.astype(dtype), sharding)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _put(stack, layers, i, sharding):
    """`layers` at place `i` of the stack, in its type."""
    return jax.lax.with_sharding_constraint(jax.lax.dynamic_update_slice_in_dim(stack, layers.astype(stack.dtype), i, 0), sharding)
