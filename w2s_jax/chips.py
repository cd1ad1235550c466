"""What accelerators have: memory, peak arithmetic, bandwidths. One table, from the published specification sheets.

TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. GPUs: NVIDIA's data sheets of the A100, H100, H200, B200, L4 and L40S; dense figures
(without sparsity), SXM modules where there are several, HBM 40 or 80 GB for the A100.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re

from w2s_jax.errors import UserError, nearest

GIB = 2**30
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as jax sees it (a TPU v4 or v5p chip is one device: its two cores work as one, "megacore").

    Attributes:
      name: as in a topology, "v5p". kind: "tpu" | "gpu".
      memory: bytes that programs may use: of a TPU what its compiler takes as available (a little less than is published); of a
        GPU what the driver shows.
      bf16: peak FLOP/s of bfloat16 matrix products with float32 sums. f32: the same of float32 ones under jax's default precision
        (one pass in bfloat16 on a TPU, TF32 on a GPU); f32_high, f32_highest: under matmul_precision high and highest (three and six
        passes on a TPU; three passes in TF32, and full float32, on a GPU).
      bandwidth: bytes/s between the chip and its memory.
      link: bytes/s that a chip sends over one of its links. links: how many it has to chips of its slice or node; a switched
        network (NVLink, PCIe) counts as one link with all of its bandwidth. axes: dimensions of the torus, 0 = switched.
      node: chips that share the links; a TPU's slice has as many as its topology says (0).
      network: bytes/s that a chip sends to other nodes, as the usual machines have it.
      devices: beginnings of jax's `device_kind` that mean it.
    """

    name: str
    kind: str
    memory: int
    bf16: float
    f32: float
    f32_high: float
    f32_highest: float
    bandwidth: float
    link: float
    links: int
    axes: int
    node: int
    network: float
    devices: tuple[str, ...]

    def peak(self, dtype: str, precision: str = "default") -> float:
        """Peak FLOP/s of matrix products of `dtype` (float32 | bfloat16) under `precision` (default | high | highest)."""
        if dtype == "bfloat16":
            return self.bf16
        return {"default": self.f32, "high": self.f32_high, "highest": self.f32_highest}[precision]


def _tpu(name, memory, bf16, bandwidth, link, axes, *devices) -> Chip:
    return Chip(name, "tpu", int(memory * GIB), bf16, bf16, bf16 / 3, bf16 / 6, bandwidth, link, 2 * axes, axes, 0, 6.25e9, devices)


def _gpu(name, memory, bf16, tf32, f32, bandwidth, link, node, network, *devices) -> Chip:
    return Chip(name, "gpu", memory * MIB, bf16, tf32, tf32 / 3, f32, bandwidth, link, 1, 0, node, network, devices)


# TPUs: the memory is what the compiler (libtpu 0.0.52) names as available when a program asks for too much. Links: the published
# bidirectional bandwidth of a chip (600, 400, 1200 and 800 GB/s), over 2 directions and its 6, 4, 6 and 4 ports.
# GPUs: memory in MiB as `nvidia-smi` shows it. NVLink is published as the sum of both directions; so is PCIe (64 GB/s for x16 of Gen4).
# Network: 50 Gb/s a chip on TPU hosts; one 400 Gb/s adapter for each GPU of an H100, H200 or B200 node, 200 for an A100's, 100 else.
CHIPS: dict[str, Chip] = {chip.name: chip for chip in (
    _tpu("v4", 30.75, 275e12, 1.228e12, 50e9, 3, "TPU v4"),
    _tpu("v5e", 15.75, 197e12, 8.19e11, 50e9, 2, "TPU v5 lite", "TPU v5e"),
    _tpu("v5p", 95.73, 459e12, 2.765e12, 100e9, 3, "TPU v5p", "TPU v5"),
    _tpu("v6e", 31.24, 918e12, 1.638e12, 100e9, 2, "TPU v6 lite", "TPU v6e"),
    _gpu("a100-40g", 40536, 312e12, 156e12, 19.5e12, 1.555e12, 300e9, 8, 25e9, "NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
    _gpu("a100-80g", 81920, 312e12, 156e12, 19.5e12, 2.039e12, 300e9, 8, 25e9, "NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB", "NVIDIA A100"),
    _gpu("h100", 81559, 989.4e12, 494.7e12, 66.9e12, 3.35e12, 450e9, 8, 50e9, "NVIDIA H100"),
    _gpu("h200", 143771, 989.4e12, 494.7e12, 66.9e12, 4.8e12, 450e9, 8, 50e9, "NVIDIA H200"),
    _gpu("b200", 183359, 2.25e15, 1.12e15, 75e12, 8e12, 900e9, 8, 50e9, "NVIDIA B200"),
    _gpu("l4", 23034, 121e12, 60e12, 30.3e12, 3.0e11, 32e9, 8, 12.5e9, "NVIDIA L4"),
    _gpu("l40s", 46068, 362.05e12, 183e12, 91.6e12, 8.64e11, 32e9, 8, 12.5e9, "NVIDIA L40S"),
)}  # fmt: skip


def of_device(kind: str) -> Chip | None:
    """The chip that jax's `device_kind` names, or None: the one with the longest matching beginning."""
    found = [(len(start), chip.name) for chip in CHIPS.values() for start in chip.devices if kind.startswith(start)]
    return CHIPS[max(found)[1]] if found else None


_EXAMPLES = {0: "8", 2: "4x4", 3: "4x4x4"}  # by dimensions of the torus


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips that work together: a slice of a TPU pod, "v5p:4x4x8" (chips along the axes of its torus), or GPUs, "h100:16"."""

    chip: Chip
    axes: tuple[int, ...]

    @property
    def devices(self) -> int:
        return math.prod(self.axes)

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.axes))}"


def topology(text: str, key: str = "topology") -> Topology:
    """What a topology's name means; `key` names it in errors.

    Raises:
      UserError: no such chip, or axes that it does not have.
    """
    name, _, size = text.partition(":")
    known = f"expected one of {', '.join(f'{c.name}:{_EXAMPLES[c.axes]}' for c in CHIPS.values())}"
    if name not in CHIPS:
        raise UserError(f"config.{key}: {text!r} names no chip that is known; {known}{nearest(name, CHIPS)}")
    chip = CHIPS[name]
    if not re.fullmatch(r"[1-9]\d*" + r"x[1-9]\d*" * max(chip.axes - 1, 0), size):
        what = f"{chip.axes} axes of its torus" if chip.axes else "a number of GPUs"
        raise UserError(f"config.{key}: {text!r}, expected {what} behind the colon, as in {name}:{_EXAMPLES[chip.axes]}")
    return Topology(chip, tuple(int(n) for n in size.split("x")))


def check_compiler(topology: Topology) -> None:
    """UserError where the compiler for a topology is not installed."""
    if topology.chip.kind == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise UserError(f"config.topology: {str(topology)!r} needs libtpu, the TPU's compiler, which is not installed: "
                        "pip install libtpu")
