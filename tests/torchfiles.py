"""PyTorch's files as torch writes them, and as nobody should."""

import collections
import io
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import torch

from w2s_jax.models.torchfile import MAGIC, PROTOCOL

ZIP, PLAIN = True, False


def save(content, path: Path, form: bool, **options) -> Path:
    """What torch.save writes, in the form ZIP or PLAIN."""
    torch.save(content, path, _use_new_zipfile_serialization=form, **options)
    return path


def zipped(path: Path, data: bytes, storages: dict[str, bytes] | None = None, top: str = "archive", method=zipfile.ZIP_STORED,
           **more: bytes) -> Path:
    """A zip file as torch.save writes it, of a pickle and storages; `more`: further entries of the folder, "." for "__"."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(f"{top}/data.pkl", data)
        for key, raw in (storages or {}).items():
            archive.writestr(f"{top}/data/{key}", raw)
        for name, raw in more.items():
            archive.writestr(f"{top}/{name.replace('__', '.')}", raw)
    return path


def plain(path: Path, data: bytes, storages: tuple[tuple[str, int, bytes], ...] = (), magic=MAGIC, protocol=PROTOCOL, little=True) -> Path:
    """A file of the older format, of a pickle and storages (key, elements, bytes)."""
    system = {"protocol_version": PROTOCOL, "little_endian": little, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [pickle.dumps(magic, 2), pickle.dumps(protocol, 2), pickle.dumps(system, 2), data, pickle.dumps([k for k, *_ in storages], 2)]
    path.write_bytes(b"".join(parts) + b"".join(struct.pack("<q", n) + raw for _, n, raw in storages))
    return path


class Told:
    """Pickles as what it is told: a function and its arguments, a persistent id, ..."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


class Saving(pickle.Pickler):
    """Writes `Stored` as PyTorch does storages."""

    def persistent_id(self, value):
        return value.identifier if isinstance(value, Stored) else None


class Stored:
    """A storage's persistent id."""

    def __init__(self, elements, key="0", kind=torch.FloatStorage, view=()):
        self.identifier = ("storage", kind, key, "cpu", elements, *view)


def dumped(content, protocol: int = 2) -> bytes:
    """The pickle of an object with `Told` and `Stored` in it."""
    stream = io.BytesIO()
    Saving(stream, protocol).dump(content)
    return stream.getvalue()


def tensor(storage, offset=0, shape=(2, 3), stride=(3, 1), hooks=collections.OrderedDict()):  # noqa: B006 (never changed)
    return Told(torch._utils._rebuild_tensor_v2, (storage, offset, shape, stride, False, hooks))


class Watch:
    """While it is entered, `seen` collects what an unpickler would do, or would be made to do."""

    EVENTS = ("pickle.find_class", "os.system", "subprocess.Popen")

    def __init__(self):
        self.seen, self.on = [], False
        sys.addaudithook(self._hear)  # for good: hooks cannot be taken away

    def _hear(self, event, _):
        if self.on and event in self.EVENTS:
            self.seen.append(event)

    def __enter__(self):
        self.seen, self.on = [], True
        return self

    def __exit__(self, *_):
        self.on = False
