"""PyTorch's files (.pth, .pt, .th, .bin) without PyTorch: tensors by name, mapped, and read slice by slice.

Two formats, as torch/serialization.py writes and reads them:

  zip     since PyTorch 1.6: <top>/data.pkl, a pickle, and <top>/data/<key>, the bytes of each storage; <top>/byteorder
  plain   before, and many published files still: one pickle after another (magic number, protocol, system, object, storage
          keys), then the storages in the order of the keys, each its number of elements (int64) and its bytes

No pickle is executed (models.pickled). Each tensor is a view (offset, shape, strides) of a storage, and lies within it, or the
file is refused before a byte of a tensor is read. A zip's checksum covers the pickle and deflated storages; the storages that are
mapped have none that could be checked slice by slice, nor has the plain format any.
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from w2s_jax.errors import UserError, nearest
from w2s_jax.models import pickled
from w2s_jax.models.pickled import SIZES, Described, Storage, whole

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
PICKLE = 2**27  # bytes of a zip's data.pkl
DEFLATED = 1032  # times that deflate can shrink a file at most
ELEMENTS = 2**48  # of a shape, its zeros left out
UNREADABLE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, LookupError, OverflowError, RuntimeError)
PREFIXES = ("module.", "backbone.")  # of DataParallel, and of models with a head that was left out
NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64, "I32": np.int32,
         "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64}


class Tensor(NamedTuple):
    """A tensor of the file: `key` is its name there, `dtype` safetensors' name of its type, `view` what the pickle says of it."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    view: Described


class _Part(NamedTuple):
    """Where a storage's bytes are: mapped from `start` of the file, or (deflated) a member of the zip."""

    size: int  # bytes
    start: int = 0
    member: str | None = None


class TorchFile:
    """The tensors of a state dict that `torch.save` wrote, by name; the interface of `weights.Checkpoint`.

    Args:
      path: the file.
      under: where the file is a checkpoint that holds several state dicts (DINO's have `teacher` and `student`): the key of the
        one that is wanted. "" = the only one.
    Attributes:
      tensors: name -> Tensor. A prefix of PREFIXES that all names have is left out.
    Raises:
      UserError: not a PyTorch file, a damaged one, TorchScript, the tar format of before 0.2, an object that is no tensor or
        plain container, no state dict or several, a tensor that does not lie within its storage.
    """

    def __init__(self, path, under: str = ""):
        self.file = Path(path)
        self._mapped: np.ndarray | None = None
        self._inflated: dict[str, np.ndarray] = {}
        data = self._bytes()
        if bytes(data[:4]) in (b"PK\x03\x04", b"PK\x05\x06"):
            content, self._parts, self._swapped = self._zip()
        elif bytes(data[257:262]) == b"ustar":
            raise UserError(f"{self.file}: in PyTorch's first format (a tar archive, before 0.2), which is not read; load it with torch "
                            "and save it again")
        else:
            content, self._parts, self._swapped = self._plain(data)
        found = self._state_dict(content, under)
        self.tensors = {}
        for name, (key, view) in found.items():
            self._check(key, view)
            self.tensors[name] = Tensor(self.file, key, view.shape, view.dtype, view)
        self.release()

    def read(self, name: str, index: tuple = ()) -> np.ndarray:
        """A copy of one tensor, or of the part of it that `index` (a tuple of slices with step 1) selects; BF16 as ml_dtypes.bfloat16."""
        view = self.tensors[name].view
        if 0 in view.shape:
            return np.empty(view.shape, NUMPY[view.dtype])[index]
        size, part = SIZES[view.dtype], self._parts[view.storage.key]
        raw = self._bytes() if part.member is None else self._inflate(part)
        start = part.start + view.storage.start * SIZES[view.storage.dtype] + view.offset * size
        if start + _extent(view) * size > len(raw):  # the file has changed since it was opened
            raise UserError(f"{self.file}: cannot read tensor {name!r}: the file is shorter than it was")
        words = np.ndarray(view.shape, f"u{size}", raw, start, tuple(n * size for n in view.stride))
        copied = words[index or (Ellipsis,)].copy()
        if view.dtype == "BOOL":
            return copied != 0
        return (copied.byteswap() if self._swapped else copied).view(NUMPY[view.dtype])

    def release(self) -> None:
        """Unmap the file: its pages count as this process's memory while it is mapped."""
        self._mapped = None
        self._inflated.clear()

    # The formats.

    def _bytes(self) -> np.ndarray:
        """The file, mapped: uint8 `[bytes]`."""
        if self._mapped is None:
            try:
                self._mapped = np.memmap(self.file, np.uint8, "r")
            except (OSError, ValueError) as error:  # ValueError: an empty file
                raise UserError(f"{self.file}: cannot be read ({error})") from None
        return self._mapped

    def _zip(self) -> tuple[object, dict[str, _Part], bool]:
        """The object, the storages and whether their bytes are swapped."""
        try:
            with zipfile.ZipFile(self.file) as archive:
                members = {m.filename: m for m in archive.infolist()}
                tops = [name.removesuffix("data.pkl") for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
                if script := [name for name in members if name.split("/", 1)[-1].startswith(("constants.pkl", "code/"))]:
                    raise UserError(f"{self.file}: a TorchScript archive (it holds {script[0][:100]!r}), which is not read; expected "
                                    "a state dict, as torch.save(model.state_dict(), file) writes it")
                if len(tops) != 1 or len(members) < len(archive.infolist()):
                    raise UserError(f"{self.file}: a zip archive that torch.save did not write; expected one <folder>/data.pkl in it")
                top = tops[0]
                content, _ = pickled.read(self._small(archive, members[f"{top}data.pkl"], PICKLE), 0, self.file)
                order = b"little"  # which files without the entry are, too
                if f"{top}byteorder" in members:
                    order = self._small(archive, members[f"{top}byteorder"], 16)
        except UNREADABLE as error:
            raise UserError(f"{self.file}: truncated, or not a zip archive that torch.save wrote ({error})") from None
        if order not in (b"little", b"big"):
            raise UserError(f"{self.file}: byteorder says {order!r}; expected little or big")
        inside = f"{top}data/"
        parts = {name.removeprefix(inside): self._member(m) for name, m in members.items() if name.startswith(inside)}
        return content, parts, order == b"big"

    def _small(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo, most: int) -> bytes:
        if self._member(member).size > most:
            raise UserError(f"{self.file}: {member.filename[:100]!r} has {member.file_size} bytes; expected at most {most}")
        return archive.read(member)

    def _member(self, member: zipfile.ZipInfo) -> _Part:
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(f"{self.file}: {member.filename[:100]!r} is encrypted, or compressed otherwise than by deflate")
        header = bytes(self._bytes()[member.header_offset:member.header_offset + 30])
        start = member.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        stored = member.compress_type == zipfile.ZIP_STORED
        small = member.file_size == member.compress_size if stored else member.file_size <= DEFLATED * member.compress_size
        if header[:4] != b"PK\x03\x04" or not small or member.header_offset < 0 or start + member.compress_size > len(self._bytes()):
            raise UserError(f"{self.file}: truncated or damaged: {member.filename[:100]!r} is not where the archive's directory says")
        return _Part(member.file_size, start) if stored else _Part(member.file_size, 0, member.filename)

    def _inflate(self, part: _Part) -> np.ndarray:
        if part.member not in self._inflated:
            try:
                with zipfile.ZipFile(self.file) as archive, archive.open(part.member) as member:
                    raw = member.read(part.size + 1)
            except UNREADABLE as error:
                raise UserError(f"{self.file}: cannot read {part.member[:100]!r} ({error})") from None
            if len(raw) != part.size:
                raise UserError(f"{self.file}: {part.member[:100]!r} has another size than the {part.size} bytes of the directory")
            self._inflated[part.member] = np.frombuffer(raw, np.uint8)
        return self._inflated[part.member]

    def _plain(self, data: np.ndarray) -> tuple[object, dict[str, _Part], bool]:
        try:
            magic, at = pickled.read(data, 0, self.file)
        except UserError:
            magic = None
        if magic != MAGIC:
            raise UserError(f"{self.file}: not a PyTorch file: expected a zip archive, or the magic number of the older format")
        protocol, at = pickled.read(data, at, self.file)
        if protocol != PROTOCOL:
            raise UserError(f"{self.file}: has protocol {str(protocol)[:40]}; expected {PROTOCOL}")
        system, at = pickled.read(data, at, self.file)
        little = system.get("little_endian") if type(system) is dict else None
        if type(little) is not bool:
            raise UserError(f"{self.file}: damaged: expected the byte order of the machine that wrote it")
        content, at = pickled.read(data, at, self.file)
        keys, at = pickled.read(data, at, self.file)
        if type(keys) is not list or not all(type(k) is str or whole(k) for k in keys) or len({str(k) for k in keys}) < len(keys):
            raise UserError(f"{self.file}: damaged: expected the list of its storages' keys")
        storages = {s.key: s for s in _storages(content)}
        parts = {}
        for key in map(str, keys):
            if key not in storages:
                raise UserError(f"{self.file}: damaged: storage {key[:40]!r} belongs to no tensor")
            elements, at = int.from_bytes(bytes(data[at:at + 8]), "little"), at + 8
            size = elements * SIZES[storages[key].dtype]
            if at + size > len(data):
                raise UserError(f"{self.file}: truncated: storage {key[:40]!r} should have {size} bytes, but {max(len(data) - at, 0)} "
                                "are left")
            parts[key], at = _Part(size, at), at + size
        if at != len(data):
            raise UserError(f"{self.file}: {len(data) - at} bytes follow the last storage; expected the end of the file")
        return content, parts, not little

    # What is in them.

    def _state_dict(self, content, under: str) -> dict[str, tuple[str, Described]]:
        """Name without prefix -> name in the file, view."""
        if type(content) is not dict:
            kind = "a tensor" if type(content) is Described else f"a {type(content).__name__}"
            raise UserError(f"{self.file}: holds {kind}; expected a state dict: tensors by name")
        wrapped = {key: value for key, value in content.items() if type(key) is str and _is_state_dict(value)}
        if under:
            if under not in wrapped:
                raise UserError(f"{self.file}: has no state dict {under!r}; it holds {_some(wrapped) or 'none under a key'}"
                                f"{nearest(under, wrapped)}")
            chosen = wrapped[under]
        elif _is_state_dict(content):
            chosen = content
        elif len(wrapped) == 1:
            [(under, chosen)] = wrapped.items()
        elif wrapped:
            raise UserError(f"{self.file}: holds {len(wrapped)} state dicts; say which one is wanted: {_some(wrapped)}")
        else:
            raise UserError(f"{self.file}: holds no state dict (a dict of tensors alone, by name) but {_some(content) or 'nothing'}")
        if chosen is not content:  # a measure that was saved with the model is a scalar
            for key, value in content.items():
                if type(value) is Described and math.prod(value.shape) > 1:
                    raise UserError(f"{self.file}: holds the tensor {str(key)[:60]!r} beside the state dict {under!r}; expected all in one")
        names = {key: key for key in chosen}
        while prefix := next((p for p in PREFIXES if all(len(n) > len(p) and n.startswith(p) for n in names)), ""):
            names = {n.removeprefix(prefix): key for n, key in names.items()}
        return {name: (key, chosen[key]) for name, key in names.items()}

    def _check(self, name: str, view: Described) -> None:
        """That a tensor lies within its storage, and the storage in the file."""
        storage, part = view.storage, self._parts.get(view.storage.key)
        what = f"{self.file}: tensor {name[:100]!r} of shape {str(list(view.shape))[:80]}, strides {str(list(view.stride))[:80]}"
        if part is None:
            raise UserError(f"{what}: its storage {storage.key[:40]!r} is not in the file")
        if part.size != storage.elements * SIZES[storage.dtype]:
            raise UserError(f"{what}: its storage has {part.size} bytes in the file; expected {storage.elements} elements of type "
                            f"{storage.dtype.rstrip('?')}")
        length = storage.elements if storage.length is None else storage.length
        room = length * SIZES[storage.dtype] // SIZES[view.dtype]
        if view.offset > room or view.offset + _extent(view) > room or math.prod(n for n in view.shape if n) > ELEMENTS:
            raise UserError(f"{what}, offset {view.offset}: lies beyond its storage of {room} elements")
        if math.prod(view.shape) > room:
            raise UserError(f"{what}: repeats the {room} elements of its storage (an expanded view); save it with .contiguous()")


def _extent(view: Described) -> int:
    """Elements from a tensor's first to its last in its storage, both counted."""
    return 0 if 0 in view.shape else 1 + sum((n - 1) * s for n, s in zip(view.shape, view.stride))


def _is_state_dict(value) -> bool:
    return type(value) is dict and bool(value) and all(type(k) is str and type(v) is Described for k, v in value.items())


def _some(names) -> str:
    shown = [repr(n)[:60] for n in list(names)[:6]]
    return ", ".join(shown) + (", ..." if len(names) > 6 else "")


def _storages(content) -> list[Storage]:
    """Every storage in nested containers, each container once: they may hold each other, or themselves."""
    found, seen, waiting = [], set(), [content]
    while waiting:
        value = waiting.pop()
        if type(value) in (Described, Storage):
            found.append(value if type(value) is Storage else value.storage)
        elif type(value) in (dict, list, tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if type(value) is dict else value)
    return found
