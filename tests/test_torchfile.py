"""PyTorch's files without torch: bit for bit what torch wrote."""

import argparse
import collections
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from torchfiles import PLAIN, ZIP, Stored, Told, dumped, plain, save, tensor, zipped

from w2s_jax.errors import UserError
from w2s_jax.models.torchfile import NUMPY, TorchFile

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
          "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "U16": torch.uint16, "U32": torch.uint32,
          "U64": torch.uint64}  # fmt: skip


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
