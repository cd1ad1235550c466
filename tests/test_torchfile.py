"""PyTorch's files without torch: bit for bit what torch wrote, and nothing executed whatever the file says."""

import argparse
import collections
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from w2s_jax.errors import UserError
from w2s_jax.models import pickled
from w2s_jax.models.torchfile import MAGIC, NUMPY, PROTOCOL, TorchFile

ZIP, PLAIN = True, False
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
          "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "U16": torch.uint16, "U32": torch.uint32,
          "U64": torch.uint64}  # fmt: skip
EVENTS, WATCHED = [], ("pickle.find_class", "os.system", "subprocess.Popen")
sys.addaudithook(lambda event, args: EVENTS.append(event) if event in WATCHED else None)


def save(content, path: Path, form: bool, **options) -> Path:
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
    def __init__(self, elements, key="0", kind=torch.FloatStorage, view=()):
        self.identifier = ("storage", kind, key, "cpu", elements, *view)


def dumped(content, protocol: int = 2) -> bytes:
    stream = io.BytesIO()
    Saving(stream, protocol).dump(content)
    return stream.getvalue()


def tensor(storage, offset=0, shape=(2, 3), stride=(3, 1), hooks=collections.OrderedDict()):  # noqa: B006 (never changed)
    return Told(torch._utils._rebuild_tensor_v2, (storage, offset, shape, stride, False, hooks))


def equal(found: np.ndarray, expected: torch.Tensor) -> bool:
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    expected = expected.detach().contiguous()
    return found.shape == tuple(expected.shape) and found.tobytes() == expected.view(words).numpy().tobytes()


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """All types, views with strides and offsets, storages that are shared, scalars, empty tensors, parameters."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=g)
    out = {f"all.{name}": (torch.randn(3, 5, generator=g) * 50).abs().to(dtype) for name, dtype in DTYPES.items()}
    out |= {"view.turned": base.T, "view.part": base[1:4, 2::3], "view.row": base[5], "view.same": base, "view.permuted": torch.randn(
        2, 3, 4, 5, generator=g).permute(3, 0, 2, 1), "scalar": torch.tensor(-1.5), "count": torch.tensor(2**62 + 1),
        "empty": torch.zeros(0, 7), "flag": torch.tensor([True, False, True]), "tied": (tied := torch.randn(4, generator=g)),
        "tied.too": tied, "parameter": torch.nn.Parameter(torch.randn(2, 2, generator=g)), "special": torch.tensor(
            [float("nan"), float("inf"), -0.0, 1e-45])}
    return out


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("form", [ZIP, PLAIN])
def test_what_torch_writes_is_read_bit_for_bit(state, form, protocol, tmp_path):
    found = TorchFile(save(state, tmp_path / "state.pth", form, pickle_protocol=protocol))
    assert list(found.tensors) == list(state)
    for name, expected in state.items():
        entry = found.tensors[name]
        assert entry.shape == tuple(expected.shape) and DTYPES[entry.dtype] == expected.dtype and entry.key == name
        array = found.read(name)
        assert array.dtype == NUMPY[entry.dtype] and equal(array, expected), name
        assert array.flags.owndata or array.base.flags.owndata  # a copy: nothing keeps the file mapped
        if expected.ndim > 1:
            index = tuple(slice(1, n) for n in expected.shape[:-1])
            assert equal(found.read(name, index), expected[index])
            index = (*index, slice(0, 2))
            assert equal(found.read(name, index), expected[index])
    found.release()
    assert equal(found.read("view.part"), state["view.part"])
    assert found.read("all.BF16").dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("form", [ZIP, PLAIN])
def test_a_module_with_buffers_and_a_deflated_archive_of_another_name(form, tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))  # an OrderedDict with _metadata
    file = save(model.state_dict(), tmp_path / "model.pth", form)
    if form == ZIP:
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / "small.bin", "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name.replace("model/", "other name/"), old.read(name))
        file = tmp_path / "small.bin"
    found = TorchFile(file)
    assert all(equal(found.read(n), t) for n, t in model.state_dict().items()) and len(found.tensors) == 7
    assert found.tensors["1.num_batches_tracked"].dtype == "I64"


@pytest.mark.parametrize("name, n", [("resnet20-12fca82f.th", 97), ("resnet32-d509ac18.th", 157)])
def test_real_checkpoints(name, n, shared):
    file = shared / "data" / "weights" / "resnet_cifar10" / name
    found, expected = TorchFile(file), torch.load(file, weights_only=True, map_location="cpu")["state_dict"]
    assert len(found.tensors) == n == len(expected)
    for key, value in expected.items():
        assert found.tensors[key.removeprefix("module.")].key == key
        assert equal(found.read(key.removeprefix("module.")), value)


@pytest.mark.parametrize("little", [True, False])
def test_the_byte_order_of_the_machine_that_wrote_it(little, tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    raw = values.astype("<f4" if little else ">f4").tobytes()
    older = plain(tmp_path / "older", dumped({"w": tensor(Stored(6, view=(None,)))}), (("0", 6, raw),), little=little)
    newer = zipped(tmp_path / "newer", dumped({"w": tensor(Stored(6))}), {"0": raw}, byteorder=b"little" if little else b"big")
    for file in (older, newer):
        assert np.array_equal(TorchFile(file).read("w"), values)


def test_older_ways_to_write_the_same(tmp_path):
    """Views of storages, an OrderedDict of Python 2, _rebuild_tensor, storages of the GPU."""
    raw = np.arange(10, dtype=np.float32).tobytes()
    pairs = [["a", tensor(Stored(10, view=(("1", 4, 6),)))],
             ["b", Told(torch._utils._rebuild_tensor, (Stored(10, view=(None,)), 1, (3,), (2,)))]]
    file = plain(tmp_path / "views", dumped(Told(collections.OrderedDict, (pairs,))), (("0", 10, raw),))
    found = TorchFile(file)
    assert found.read("a").tolist() == [[4, 5, 6], [7, 8, 9]] and found.read("b").tolist() == [1, 3, 5]
    on_gpu = dumped({"w": tensor(Stored(10))}).replace(b"ctorch\nFloatStorage", b"ctorch.cuda\nFloatStorage")
    assert TorchFile(zipped(tmp_path / "gpu", on_gpu, {"0": raw})).read("w").shape == (2, 3)
    text = dumped({"w": tensor(Stored(10))}).replace(b"X\x01\x00\x00\x00w", b"U\x01w")  # Python 2's str
    assert list(TorchFile(zipped(tmp_path / "two", text, {"0": raw})).tensors) == ["w"]


W, X = torch.arange(4.0), torch.ones(2, 2)
PLAIN_METADATA = {"epoch": 3, "best": 0.5, "arch": "resnet", "none": None, "flags": [True, (1, 2)], "size": torch.Size([3]),
                  "device": torch.device("cpu"), "acc": torch.tensor(9.0), "big": 2**70, "optimizer": {"state": {0: {"m": W}}, "groups": [
                      {"lr": 0.1, "params": [0, 1]}]}}  # fmt: skip


@pytest.mark.parametrize("form", [ZIP, PLAIN])
@pytest.mark.parametrize("content, under, names", [
    ({"state_dict": {"w": W}, **PLAIN_METADATA}, "", ["w"]),
    ({"model": {"module.w": W, "module.b.x": X}, **PLAIN_METADATA}, "", ["w", "b.x"]),
    ({"teacher": {"backbone.w": W}, "student": {"module.backbone.x": X}}, "student", ["x"]),
    ({"teacher": {"backbone.w": W, "head.x": X}, "student": {"module.backbone.x": X}}, "teacher", ["backbone.w", "head.x"]),
    ({"module.w": W, "x": X}, "", ["module.w", "x"]),
    ({"module.": W}, "", ["module."]),
], ids=str)  # fmt: skip
def test_the_state_dict_of_a_checkpoint(content, under, names, form, tmp_path):
    found = TorchFile(save(content, tmp_path / "c.pt", form), under)
    assert list(found.tensors) == names
    assert equal(found.read(names[0]), X if names[0] == "x" else W)


@pytest.mark.parametrize("content, under, says", [
    ({"teacher": {"w": W}, "student": {"w": W}}, "", "2 state dicts; say which one is wanted: 'teacher', 'student'"),
    ({"teacher": {"w": W}, "student": {"w": W}}, "teachr", "no state dict 'teachr'.*did you mean 'teacher'"),
    ({"w": W}, "model", "no state dict 'model'; it holds none under a key"),
    ({"model": {"w": W}, "queue": X}, "", "the tensor 'queue' beside the state dict 'model'"),
    ({"w": W, "epoch": 3}, "", "no state dict .* but 'w', 'epoch'"),
    ({"model": {"w": W, "note": "x"}}, "", "no state dict .* but 'model'"),
    ({3: W}, "", "no state dict"),
    ({}, "", "no state dict .* but nothing"),
    ([W, X], "", "holds a list; expected a state dict"),
    (W, "", "holds a tensor; expected a state dict"),
    (None, "", "holds a NoneType"),
    ({"model": {"w": W}, "args": argparse.Namespace(lr=1)}, "", "'argparse.Namespace'"),
    (torch.nn.Linear(2, 2), "", "torch.nn.modules.linear.Linear|persistent id of kind 'module'"),
    ({"w": torch.ones(2, dtype=torch.complex64)}, "", "torch.ComplexFloatStorage"),
    ({"w": torch.ones(2).to(torch.float8_e4m3fn)}, "", "torch.float8_e4m3fn"),
    ({"w": torch.eye(3).to_sparse()}, "", "torch._utils._rebuild_sparse_tensor"),
    ({"w": np.float64(3), "x": W}, "", "numpy"),
    ({"w": {1, 2}}, "", "set"),
    ({"w": collections.defaultdict(dict)}, "", "collections.defaultdict"),
    ({"w": torch.ones(1).expand(1000, 1000)}, "", r"'w' of shape \[1000, 1000\].*repeats the 1 elements"),
    ({(1, 2): W}, "", "a key of type"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("form", [ZIP, PLAIN])
def test_what_torch_writes_and_is_refused(content, under, says, form, tmp_path):
    file = save(content, tmp_path / "c.pt", form)
    with pytest.raises(UserError, match=f"{file}: .*({says})") as caught:
        TorchFile(file, under)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


RAW = np.arange(6, dtype=np.float32).tobytes()
ONE = dumped({"w": tensor(Stored(6))})
MEMO = b"\x80\x02}(X\x01\x00\x00\x00wNr\xff\xff\xff\xffu."  # stores at index 2**32 - 1: the C machine allocates for all below


def touching(path: Path):
    return os.system, (f"touch {path}",)


MALICIOUS = {
    "system": (lambda t: dumped(Told(*touching(t))), "'posix.system'"),
    "system, protocol 4": (lambda t: dumped(Told(*touching(t)), 4), "'posix.system'"),
    "eval": (lambda t: dumped({"w": Told(eval, (f"open({str(t)!r}, 'w')",))}), "'__builtin__.eval'"),
    "getattr": (lambda t: dumped(Told(getattr, (Told(__import__, ("os",)), "system"))), "'__builtin__.getattr'"),
    "an attribute's attribute": (lambda t: b"\x80\x04\x8c\x05torch\x8c\x11storage.os.system\x93.", "'torch.storage.os.system'"),
    "torch.load": (lambda t: dumped(Told(torch.load, (str(t),))), "'torch.serialization.load'"),
    "another rebuild": (lambda t: dumped(Told(torch._utils._rebuild_device_tensor_from_numpy, ())), "_rebuild_device_tensor_from_numpy"),
    "build on a class": (lambda t: b"\x80\x02ctorch._utils\n_rebuild_parameter\n}X\x01\x00\x00\x00aK\x01sb.", "_rebuild_parameter a state"),
    "build with attributes": (lambda t: b"\x80\x02ccollections\nOrderedDict\n)R}X\x09\x00\x00\x00__class__K\x01sb.", "a dict a state"),
    "parameter of no tensor": (lambda t: dumped({"w": Told(torch._utils._rebuild_parameter, (1, 2, 3))}), "calls torch._utils._rebuild_p"),
    "hooks": (lambda t: dumped({"w": tensor(Stored(6), hooks=collections.OrderedDict(a=1))}), "calls torch._utils._rebuild_tensor_v2"),
    "OrderedDict of text": (lambda t: dumped(Told(collections.OrderedDict, ("ab",))), "calls collections.OrderedDict"),
    "Size of text": (lambda t: dumped(Told(torch.Size, ("ab",))), "calls torch.Size"),
    "call of no function": (lambda t: b"\x80\x02K\x01)R.", "calls something that is no function"),
    "INST": (lambda t: b"(S'true'\nios\nsystem\n.", "opcode STRING"),
    "OBJ": (lambda t: b"\x80\x02(ctorch\nSize\no.", "opcode OBJ"),
    "NEWOBJ": (lambda t: b"\x80\x02ctorch\nSize\n)\x81.", "opcode NEWOBJ"),
    "NEWOBJ_EX": (lambda t: b"\x80\x04ctorch\nSize\n)}\x92.", "opcode NEWOBJ_EX"),
    "EXT1": (lambda t: b"\x80\x02\x82\x01.", "opcode EXT1"),
    "PERSID": (lambda t: b"P0\n.", "opcode PERSID"),
    "LONG4": (lambda t: b"\x80\x02\x8b\xff\xff\xff\x7f1.", "opcode LONG4"),
    "NEXT_BUFFER": (lambda t: b"\x80\x05\x97.", "opcode NEXT_BUFFER"),
    "no opcode": (lambda t: b"\x80\x02\x00.", "opcode 0x00"),
    "persistent module": (lambda t: b"\x80\x02X\x06\x00\x00\x00module\x85Q.", "persistent id of kind 'module'"),
    "persistent text": (lambda t: b"\x80\x02X\x06\x00\x00\x00moduleQ.", "persistent id of kind 'module'"),
    "a long string": (lambda t: b"\x80\x02X\xff\xff\xff\xffabc.", "a string of 4294967295 bytes"),
    "a longer string": (lambda t: b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "a string of 9223372036854775807 bytes"),
    "a string that is none": (lambda t: b"\x80\x02X\x02\x00\x00\x00\xff\xfe.", "not UTF-8"),
    "memo": (lambda t: MEMO, "holds no state dict"),
    "memo, absent": (lambda t: b"\x80\x02h\x05.", "recalls an object 5"),
    "holds itself": (lambda t: b"\x80\x02}q\x00X\x01\x00\x00\x00wh\x00s.", "holds no state dict"),
    "laughs": (lambda t: b"\x80\x02]q\x00" + b"".join(b"0](" + b"h%c" % i * 10 + b"eq%c" % (i + 1) for i in range(30)) + b".",
               "holds a list"),
    "deep": (lambda t: b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "holds a list"),
    "list as a key": (lambda t: b"\x80\x02}]K\x01s.", "a key of type a list"),
    "empty stack": (lambda t: b"\x80\x02R.", "its stack is empty"),
    "objects left": (lambda t: b"\x80\x02NN.", "objects are left"),
    "no mark": (lambda t: b"\x80\x02NNt.", "a mark is missing"),
    "takes the mark": (lambda t: b"\x80\x02(\x85.", "its stack is empty"),
    "append to a dict": (lambda t: b"\x80\x02}Na.", "appends to something"),
    "odd items": (lambda t: b"\x80\x02}(Nu.", "sets items"),
    "no end": (lambda t: b"\x80\x02X\x05\x00\x00\x00ab", "truncated or damaged"),
    "long name": (lambda t: b"\x80\x02c" + b"a" * 5000 + b"\nb\n.", "a name of more than"),
    "empty": (lambda t: b"", "it ends early"),
}


@pytest.mark.parametrize("write", [zipped, plain], ids=["zip", "plain"])
@pytest.mark.parametrize("case", MALICIOUS)
def test_nothing_is_called(case, write, tmp_path):
    make, says = MALICIOUS[case]
    target = tmp_path / "touched"
    file = write(tmp_path / "bad.pth", make(target))
    EVENTS.clear()
    with pytest.raises(UserError) as caught:
        TorchFile(file)
    assert not EVENTS and not target.exists()
    text = str(caught.value)
    assert str(file) in text and says in text and "\n" not in text and len(text) < 500


def test_the_work_is_bounded(monkeypatch, tmp_path):
    monkeypatch.setattr(pickled, "STEPS", 1000)
    for write in (zipped, plain):
        with pytest.raises(UserError, match="more than 1000 steps"):
            TorchFile(write(tmp_path / "endless", b"\x80\x02" + b"N0" * 1000 + b"N."))


@pytest.mark.parametrize("shape, stride, offset, elements, says", [
    ((2, 3), (3, 1), 1, 6, "lies beyond its storage of 6 elements"),
    ((2, 4), (3, 1), 0, 6, "lies beyond"),
    ((2, 3), (2**62, 1), 0, 6, "lies beyond"),
    ((2**62, 2**62), (0, 0), 0, 6, "lies beyond"),
    ((0, 2**62, 2**62), (0, 0, 0), 0, 6, "lies beyond"),
    ((0,), (1,), 7, 6, "lies beyond"),
    ((2, 3), (3, 1), -1, 6, "offset -1"),
    ((-2, 3), (3, 1), 0, 6, r"shape (-2, 3)"),
    ((2, 3), (-3, 1), 3, 6, r"strides (-3, 1)"),
    ((2, 3), (1,), 0, 6, r"strides (1,)"),
    ((2.0, 3), (3, 1), 0, 6, "integers from 0"),
    ((True, 3), (3, 1), 0, 6, "integers from 0"),
    ([2, 3], (3, 1), 0, 6, "integers from 0"),
    ((2**64,), (1,), 0, 6, "integers from 0"),
    ((1,) * 33, (1,) * 33, 0, 6, "integers from 0"),
    ((2, 3), (3, 1), 0, 7, "its storage has 24 bytes in the file; expected 7 elements"),
    ((2, 3), (3, 1), 0, 2**62, "its storage has 24 bytes"),
    ((2, 3), (3, 1), 0, -6, "persistent id of kind 'storage'"),
    ((1000, 1000), (0, 0), 0, 6, "repeats the 6 elements"),
], ids=str)  # fmt: skip
def test_a_view_beyond_its_storage(shape, stride, offset, elements, says, tmp_path):
    data = dumped({"w": tensor(Stored(elements), offset, shape, stride)})
    data_with_view = dumped({"w": tensor(Stored(elements, view=(None,)), offset, shape, stride)})
    for file in (zipped(tmp_path / "zip", data, {"0": RAW}), plain(tmp_path / "plain", data_with_view, (("0", 6, RAW),))):
        with pytest.raises(UserError) as caught:
            TorchFile(file)
        assert says in str(caught.value) and str(file) in str(caught.value)


VIEW = dumped({"w": tensor(Stored(6, view=(("1", 4, 6),)))})
OTHER = dumped({"w": tensor(Stored(6, kind=torch.DoubleStorage))})
BYTES = dumped({"w": tensor(Stored(24, kind=torch.UntypedStorage))})


def lying(path: Path) -> Path:
    """A zip whose directory says that a storage lies elsewhere."""
    raw = bytearray(zipped(path, ONE, {"0": RAW}).read_bytes())
    at = raw.rindex(b"PK\x01\x02")
    raw[at + 42:at + 46] = struct.pack("<I", 2**31)
    path.write_bytes(raw)
    return path


def bomb(path: Path) -> Path:
    """A zip whose directory says that 24 bytes are 24 million when they are inflated."""
    raw = bytearray(zipped(path, dumped({"w": tensor(Stored(6_000_000))}), {"0": RAW}, method=zipfile.ZIP_DEFLATED).read_bytes())
    at = raw.rindex(b"PK\x01\x02")
    raw[at + 24:at + 28] = struct.pack("<I", 24_000_000)
    path.write_bytes(raw)
    return path


def written(raw: bytes):
    return lambda p: p.write_bytes(raw) and p


def cut(form: bool, n: int):
    def make(path: Path) -> Path:
        raw = save({"w": torch.arange(100.0)}, path, form).read_bytes()
        path.write_bytes(raw[:n])
        return path
    return make


BROKEN = {
    "absent": (lambda p: p, "No such file"),
    "folder": (lambda p: p.mkdir() or p, "cannot be read"),
    "empty": (lambda p: p.touch() or p, "cannot be read"),
    "text": (written(b"hello, world\n"), "not a PyTorch file"),
    "random": (written(np.random.default_rng(0).bytes(5000)), "not a PyTorch file"),
    "zeros": (written(bytes(5000)), "not a PyTorch file"),
    "safetensors": (written(struct.pack("<Q", 2) + b"{}"), "not a PyTorch file"),
    "another zip": (lambda p: zipfile.ZipFile(p, "w").writestr("a.txt", "x") or p, "torch.save did not write"),
    "zip's beginning": (written(b"PK\x03\x04" + bytes(100)), "truncated, or not a zip archive"),
    "zip, cut": (cut(ZIP, 700), "truncated, or not a zip archive"),
    "plain, cut in a storage": (cut(PLAIN, -1), "should have 400 bytes, but 399 are left"),
    "plain, cut in the pickle": (cut(PLAIN, 200), "truncated or damaged"),
    "plain, more": (lambda p: p.write_bytes(plain(p, ONE, (("0", 6, RAW),)).read_bytes() + b"x") and p, "1 bytes follow"),
    "wrong magic": (lambda p: plain(p, ONE, magic=MAGIC + 1), "not a PyTorch file"),
    "wrong protocol": (lambda p: plain(p, ONE, protocol=7), "protocol 7; expected 1001"),
    "byte order": (lambda p: plain(p, ONE, little="yes"), "expected the byte order"),
    "keys": (lambda p: plain(p, ONE, (("0", 6, RAW), ("0", 6, RAW))), "the list of its storages' keys"),
    "a key too many": (lambda p: plain(p, ONE, (("0", 6, RAW), ("1", 6, RAW))), "storage '1' belongs to no tensor"),
    "a key too few": (lambda p: plain(p, ONE), "its storage '0' is not in the file"),
    "a huge storage": (lambda p: plain(p, ONE, (("0", 2**62, RAW),)), "truncated: storage '0' should have"),
    "a negative storage": (lambda p: plain(p, ONE, (("0", -1, RAW),)), "truncated: storage '0' should have"),
    "a view beyond": (lambda p: plain(p, VIEW, (("0", 6, RAW),)), "a view"),
    "zip without the storage": (lambda p: zipped(p, ONE), "its storage '0' is not in the file"),
    "zip, short storage": (lambda p: zipped(p, ONE, {"0": RAW[:-4]}), "its storage has 20 bytes in the file; expected 6 elements"),
    "another type": (lambda p: zipped(p, OTHER, {"0": RAW}), "its storage has 24 bytes in the file; expected 6 elements of type F64"),
    "no type": (lambda p: zipped(p, BYTES, {"0": RAW}), "expected a storage and integers"),
    "order of bytes": (lambda p: zipped(p, ONE, {"0": RAW}, byteorder=b"middle"), "byteorder says b'middle'"),
    "long order of bytes": (lambda p: zipped(p, ONE, {"0": RAW}, byteorder=b"l" * 99), "has 99 bytes; expected at most 16"),
    "bzip2": (lambda p: zipped(p, ONE, {"0": RAW}, method=zipfile.ZIP_BZIP2), "compressed otherwise than by deflate"),
    "lies": (lying, "is not where the archive's directory says"),
    "bomb": (bomb, "is not where the archive's directory says"),
    "TorchScript": (lambda p: torch.jit.script(torch.nn.Linear(2, 2)).save(p) or p, "a TorchScript archive"),
    "tar": (written(b"storages".ljust(257, b"\0") + b"ustar".ljust(255, b"\0")), "first format (a tar archive, before 0.2)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_with_one_line(case, tmp_path):
    make, says = BROKEN[case]
    file = make(tmp_path / "broken.pth")
    with pytest.raises(UserError) as caught:
        TorchFile(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.parametrize("form, changed", [(ZIP, 500), (PLAIN, 500)])
def test_flipped_bytes_give_an_error_or_tensors(form, changed, tmp_path):
    content = {"state_dict": collections.OrderedDict(w=torch.arange(6.0).reshape(2, 3), b=torch.ones(3).half()), "epoch": 1, "x": [1, (2,)]}
    good = save(content, tmp_path / "good.pth", form).read_bytes()
    rng = np.random.default_rng(0)
    file, refused = tmp_path / "bad.pth", 0
    EVENTS.clear()
    for _ in range(changed):
        raw = bytearray(good)
        for place in rng.integers(len(raw), size=rng.integers(1, 4)):
            raw[place] = rng.integers(256)
        file.write_bytes(raw)
        try:
            found = TorchFile(file)
            for name, entry in found.tensors.items():
                assert found.read(name).shape == entry.shape
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 0 < refused < changed and not EVENTS


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    file = save({"w": torch.arange(1000.0)}, tmp_path / "w.pth", PLAIN)
    found = TorchFile(file)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(UserError, match="cannot read tensor 'w'"):
        found.read("w")


def test_without_torch(state, tmp_path):
    """In a process in which torch cannot be imported."""
    for form in (ZIP, PLAIN):
        save(state, tmp_path / f"{form}.pth", form)
    code = f"""
import sys
sys.modules["torch"] = None
from w2s_jax.models.torchfile import TorchFile
for form in (True, False):
    found = TorchFile(f"{tmp_path}/{{form}}.pth")
    print(len(found.tensors), sum(found.read(n).nbytes for n in found.tensors))
"""
    root = Path(__file__).resolve().parents[1]
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True).stdout
    total = sum(t.numel() * t.element_size() for t in state.values())
    assert out == f"{len(state)} {total}\n" * 2
