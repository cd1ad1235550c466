"""Safetensors in, params out, and back: read slice by slice, strict both ways.

Every tensor of the checkpoint must be taken by a parameter (or be declared as no parameter by its family), and every
parameter filled by a tensor of its shape. The classification head, which no checkpoint has, is the only exception.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from w2s_jax.errors import UserError
from w2s_jax.hub import TOKENIZER_FILES

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
READABLE = {"F32", "F16", "BF16"}


def paths(tree: dict, prefix: str = "") -> dict:
    """A nested dict flattened: {"backbone/norm/scale": leaf, ...}; `nest` is the way back."""
    flat = {}
    for key, value in tree.items():
        flat |= paths(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


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


class Checkpoint:
    """The tensors of a folder's safetensors by name, opened lazily (memory-mapped), sharded or not."""

    def __init__(self, folder: Path):
        self.folder = folder
        files = [SINGLE] if (folder / SINGLE).exists() else self._indexed()
        self.tensors = {}  # name -> slice reader
        self.where = {}  # name -> file
        for name in files:
            file = folder / name
            if not file.exists():
                raise UserError(f"{file}: no such file, although {folder / INDEX} names it")
            try:
                opened = safe_open(file, "numpy")
                readers = {tensor: opened.get_slice(tensor) for tensor in list(opened.keys())}
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: truncated or not a safetensors file ({error})") from None
            if twice := self.tensors.keys() & readers.keys():
                raise UserError(f"{file}: tensor {min(twice)!r} stands in {self.where[min(twice)]} too")
            self.tensors |= readers
            self.where |= dict.fromkeys(readers, file)

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
        try:
            return self.tensors[name][index or (Ellipsis,)]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.where[name]}: cannot read tensor {name!r} ({error})") from None


def names_of(config, family) -> dict[str, list[str] | str]:
    """Path under "backbone/" -> name of its tensor, or the list of its layers' names; without the family's prefix."""
    return {path: [name.format(i) for i in range(config.layers)] if "{}" in name else name for path, name in family.NAMES.items()}


def _differences(folder: Path, checkpoint: Checkpoint, wanted: dict[str, tuple], family) -> None:
    """UserError with both sides of the difference between the tensors there and those `wanted` (name -> shape)."""
    there = checkpoint.tensors
    surplus = [n for n in there if n not in wanted and not family.NOT_PARAMETERS.fullmatch(n)]
    missing = [n for n in wanted if n not in there]
    shapes = [f"{n} {list(there[n].get_shape())} where config.json says {list(s)}" for n, s in wanted.items()
              if n in there and tuple(there[n].get_shape()) != s]
    if surplus or missing or shapes:
        def some(title, items):
            return f"{len(items)} {title} ({', '.join(items[:4])}{', ...' if len(items) > 4 else ''})" if items else ""

        parts = [some("missing", missing), some("that nothing takes", surplus), some("of another shape", shapes)]
        raise UserError(f"{folder}: the tensors do not fit config.json: {'; '.join(p for p in parts if p)}")
    for name in wanted:
        dtype = there[name].get_dtype()
        if dtype not in READABLE:
            raise UserError(f"{checkpoint.where[name]}: tensor {name!r} is {dtype}; expected one of {', '.join(sorted(READABLE))}")


def load(folder, model, family, shardings: dict | None, key) -> dict:
    """Params of `model` (a models.Model) from the safetensors in `folder`.

    `shardings`: nested dict of jax.sharding.Sharding like the params (default: one device); each device reads only its
    slice. Tensors are cast to the model's parameter type, layers stacked as they are read. `key`: random key of the head's
    initialisation (the head is what model.init(key) makes). UserError: missing, surplus or mis-shaped tensors (all of them
    in one message), a type other than F32, F16, BF16, a file that cannot be read.
    """
    folder = Path(folder)
    checkpoint = Checkpoint(folder)
    prefix = family.PREFIX if any(n.startswith(family.PREFIX) for n in checkpoint.tensors) else ""
    names, abstract = names_of(model.config, family), paths(model.abstract["backbone"])
    assert names.keys() == abstract.keys(), f"{family.MODEL_TYPE}: table and model differ: {names.keys() ^ abstract.keys()}"
    wanted = {}
    for path, name in names.items():
        shape = abstract[path].shape
        wanted |= {prefix + n: shape[1:] for n in name} if isinstance(name, list) else {prefix + name: shape}
    _differences(folder, checkpoint, wanted, family)

    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = paths(shardings) if shardings is not None else {}

    def read(path):
        name, leaf = names[path], abstract[path]

        def part(index):
            if not isinstance(name, list):
                return np.asarray(checkpoint.read(prefix + name, index)).astype(leaf.dtype, copy=False)
            layers = name[index[0]] if index else name
            first = checkpoint.read(prefix + layers[0], index[1:])
            out = np.empty((len(layers), *first.shape), leaf.dtype)
            out[0] = first
            for i, n in enumerate(layers[1:], 1):
                out[i] = checkpoint.read(prefix + n, index[1:])
            return out

        cached: dict = {}  # replicas of a slice are read once

        def callback(index):
            where = tuple((s.start, s.stop) for s in index)
            if where not in cached:
                cached[where] = part(index)
            return cached[where]

        return jax.make_array_from_callback(leaf.shape, placed.get(f"backbone/{path}", default), callback)

    params = {"backbone": nest({path: read(path) for path in names})}
    if "head" in model.abstract:
        head = model.init_head(jax.random.key(0) if key is None else key)
        if key is None and any(np.asarray(leaf).any() for leaf in jax.tree.leaves(head)):
            raise ValueError("load needs a key: this head's initialisation is random")
        params["head"] = {k: jax.device_put(v, placed.get(f"head/{k}", default)) for k, v in head.items()}
    return params


def save(folder, params: dict, config, family, tokenizer_files_from=None) -> None:
    """Write config.json and model.safetensors in Hugging Face's format, and copy tokenizer files if a folder of them is named.

    `params` = {"backbone": ...} of a language model. Atomic: `folder` appears, or is replaced, when everything is written.
    """
    if params.keys() != {"backbone"}:
        raise ValueError(f"save writes a language model, params of {sorted(params)} have no place in its format")
    flat, tensors = paths(params["backbone"]), {}
    for path, name in names_of(config, family).items():
        array = np.ascontiguousarray(jax.device_get(flat.pop(path)))
        for i, n in enumerate(name if isinstance(name, list) else [name]):
            tensors[family.PREFIX + n] = array[i] if isinstance(name, list) else array
    if flat:
        raise ValueError(f"parameters without a name in the checkpoint: {sorted(flat)}")
    dtypes = {t.dtype for t in tensors.values()}
    assert len(dtypes) == 1 and dtypes <= {np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)}, dtypes

    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        save_file(tensors, temporary / SINGLE, metadata={"format": "pt"})
        raw = family.write(config) | {"dtype": str(dtypes.pop())}
        (temporary / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
        for pattern in TOKENIZER_FILES if tokenizer_files_from else ():
            for file in Path(tokenizer_files_from).glob(pattern):
                shutil.copyfile(file, temporary / file.name)
        os.chmod(temporary, 0o777 & ~_umask())
        if folder.exists():  # a folder cannot be renamed onto a full one: the old one steps aside first
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
            os.replace(folder, old / "replaced")
            os.replace(temporary, folder)
            shutil.rmtree(old)
        else:
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
