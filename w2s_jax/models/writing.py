"""Params out, in Hugging Face's format: the way back of `weights`."""

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from etils import epath
from safetensors.numpy import save_file

from w2s_jax import distributed
from w2s_jax import mesh as mesh_lib
from w2s_jax.files import is_object_store
from w2s_jax.hub import TOKENIZER_FILES
from w2s_jax.models.weights import AT_ONCE, INDEX, SINGLE, each, is_adapter, names_of, paths, transposed

SHARD = 4 * 2**30  # bytes of a file that is written


class Entry(NamedTuple):
    """A tensor to be written: its size in bytes, and how to get it (contiguous, on the host)."""

    size: int
    get: Callable[[], np.ndarray]


def entries(params: dict, config, family) -> dict[str, Entry]:
    """Name of the tensor -> Entry, for every parameter of the pretrained model, in the checkpoint's own orientation."""
    flat = {path: leaf for path, leaf in paths(params).items() if not path.startswith("head/") and not is_adapter(path)}
    return arranged(flat, names_of(flat, config, family, family.prefixes[0]), lambda path: (1, 0) if transposed(path, family) else None)


def arranged(flat: dict, names: dict, order: Callable[[str], tuple[int, ...] | None]) -> dict[str, Entry]:
    """Name of the tensor -> Entry, of flat params; `names` and `order` as weights.fill has them."""
    whole: dict = {}

    def get(path, layer):
        leaf = flat[path]
        if layer is not None and leaf.nbytes > AT_ONCE:
            array = mesh_lib.fetch(leaf[layer])
        else:
            if path not in whole:
                whole.clear()
                whole[path] = mesh_lib.fetch(leaf)
            array = whole[path] if layer is None else whole[path][layer]
        turned = order(path)
        return np.ascontiguousarray(array if turned is None else array.transpose(np.argsort(turned)))

    return {name: Entry(flat[path].nbytes // (1 if layer is None else len(names[path])), functools.partial(get, path, layer))
            for path, layer, name in each(names)}


def save(folder, params: dict, raw: dict, config, family, tokenizer_files_from=None) -> None:
    """Write a language model: config.json (`raw`, which `config` was read from) and safetensors, and copy tokenizer files if
    a folder of them is named. Atomic: `folder` appears, or is replaced, when everything is written."""
    if surplus := params.keys() - {"backbone", "lm_head"}:
        raise ValueError(f"save writes a language model, params of {sorted(surplus)} have no place in its format")
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(params)}
    assert len(dtypes) == 1 and dtypes <= {np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)}, dtypes
    raw = {k: v for k, v in raw.items() if k != "torch_dtype"} | {"dtype": str(dtypes.pop())}
    write(folder, entries(params, config, family), {"config.json": json.dumps(raw, indent=2, sort_keys=True) + "\n"}, tokenizer_files_from)


def write(folder, tensors: dict[str, Entry], files: dict[str, str | bytes], tokenizer_files_from=None) -> None:
    """A folder with `tensors` in model.safetensors (several files and an index above SHARD bytes, none without tensors), `files`
    by name, and the tokenizer files of another folder. Atomic: it appears, or replaces another, when everything is written. In an
    object store, which renames nothing, it is written here first and copied then. Of several processes all get every tensor, and
    process 0 writes."""
    def get_all() -> None:
        for entry in tensors.values():
            entry.get()

    distributed.once(lambda: _write(folder, tensors, files, tokenizer_files_from), "write a model", meanwhile=get_all)


def _write(folder, tensors: dict[str, Entry], files: dict[str, str | bytes], tokenizer_files_from=None) -> None:
    if is_object_store(folder):
        with tempfile.TemporaryDirectory() as local:
            _write(Path(local) / "model", tensors, files, tokenizer_files_from)
            _upload(Path(local) / "model", epath.Path(folder))
        return
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in tensors.items():
        if shards[-1] and size + entry.size > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += entry.size
    names = [SINGLE] if len(shards) == 1 else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if tensors else []

    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for file, shard in zip(names, shards):
            save_file({name: tensors[name].get() for name in shard}, temporary / file, metadata={"format": "pt"})
            os.chmod(temporary / file, 0o666 & ~_umask())  # the library makes it the owner's alone
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(e.size for e in tensors.values())},
                     "weight_map": {name: file for file, shard in zip(names, shards) for name in shard}}
            (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        for name, content in files.items():
            (temporary / name).write_bytes(content.encode() if isinstance(content, str) else content)
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


def _upload(folder: Path, target: epath.Path) -> None:
    """Replace what lies under `target` by the files of a folder."""
    if target.exists():
        target.rmtree()
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir()):
        with file.open("rb") as source, (target / file.name).open("wb") as sink:
            shutil.copyfileobj(source, sink)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
