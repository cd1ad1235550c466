"""PyTorch's files that are malicious or broken: one line each, and nothing is executed whatever the file says."""

import collections
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from torchfiles import PLAIN, ZIP, Stored, Told, Watch, dumped, plain, save, tensor, zipped

from w2s_jax.errors import UserError
from w2s_jax.models import pickled
from w2s_jax.models.torchfile import MAGIC, TorchFile

WATCH = Watch()
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
    with WATCH, pytest.raises(UserError) as caught:
        TorchFile(file)
    assert not WATCH.seen and not target.exists()
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
    for _ in range(changed):
        raw = bytearray(good)
        for place in rng.integers(len(raw), size=rng.integers(1, 4)):
            raw[place] = rng.integers(256)
        file.write_bytes(raw)
        try:
            with WATCH:
                found = TorchFile(file)
                for name, entry in found.tensors.items():
                    assert found.read(name).shape == entry.shape
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        assert not WATCH.seen
    assert 0 < refused < changed


def test_the_watch_sees_a_call(tmp_path):
    with WATCH:
        pickle.loads(dumped(Told(*touching(tmp_path / "touched"))))
    assert WATCH.seen and (tmp_path / "touched").exists()
