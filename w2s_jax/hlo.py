"""What a compiled program costs, read from its HLO text: matrix FLOPs, memory traffic and collectives of one device, loops counted.

XLA's own cost analysis counts the body of a loop once, however often it runs; here every computation counts as often as it is run:
a loop's trips are read from `known_trip_count`, or from the constants that it counts from, by and to. A loop without either
(`train._dispatch` runs a number of steps that is an input) counts once.

Works on the text of an optimized module of any backend; the instructions that only XLA's TPU backend writes (memory spaces, clones of
one asynchronous collective, reduce-scatters written as fusions) are known.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re

from w2s_jax import hlo_text
from w2s_jax.hlo_text import Instruction

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
               "collective-broadcast")
# Instructions that move nothing by themselves.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all", "partition-id",
    "replica-id", "iota", "optimization-barrier", "opt-barrier", "copy-done", "async-done", "async-update", "slice-done",
    *(f"{kind}-done" for kind in COLLECTIVES),
}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")
_ALIASES = ("bitcast", "reshape", "copy", "convert", "transpose")  # inside a fusion: what only passes its operand on
# Matrix products, each 2 * rows * heads * time^2 * width, of the kernels that splash attention consists of.
_KERNELS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind over groups of one size: how many a device takes part in, and the bytes that it sends in all of them.

    Sent are, with n devices in a group and rings as XLA uses them: (n-1)/n of what an all-gather gives, of what a reduce-scatter or an
    all-to-all takes; twice that for an all-reduce; everything for a permutation.
    """

    kind: str
    group: int
    count: int
    bytes: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one device, each loop's body as often as it runs.

    `flops`: of matrix products and convolutions. `attention_flops`: of attention kernels, whole squares. `bytes`: read from and
    written to the main memory. `once`: the FLOPs with each loop's body counted once, as XLA counts them. `loops`: trips of the
    loops, in the order of the text.
    """

    flops: float
    attention_flops: float
    bytes: float
    collectives: tuple[Collective, ...]
    once: float
    loops: tuple[int, ...]


def cost(text: str, devices: int = 1) -> Cost:
    """What the module costs. `devices`: of the whole program, the group of a collective that names none."""
    return _Module(text, devices).cost()


class _Module:
    def __init__(self, text: str, devices: int):
        self.devices = devices
        self.computations, self.entry = hlo_text.read(text)
        # How often each computation runs; where it stands, and in how many loops, plays no part.
        self.times: dict[str, float] = collections.Counter()
        self.fused: set[str] = set()  # computations inside a fusion, or applied to elements: they move nothing themselves
        self.loops: list[int] = []
        self._visit(self.entry, 1.0, fused=False)

    def _visit(self, name: str, times: float, fused: bool) -> None:
        self.times[name] += times
        if fused:
            self.fused.add(name)
        for i in self.computations.get(name, {}).values():
            if i.opcode == "while":
                trips = self._trips(name, i)
                self.loops.append(trips)
                self._visit(i.called("body"), times * trips, fused)
                continue
            branches = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
            if branches:  # one of them runs: the dearest stands for all
                self._visit(max(re.findall(r"[\w.\-]+", branches[1]), key=self._weight), times, fused)
            for key in ("calls", "to_apply", "called_computations"):
                if inner := i.called(key):
                    if inner in self.computations:
                        inside = i.opcode in ("fusion", "custom-call", "async-start") or (key == "to_apply" and i.opcode != "call")
                        self._visit(inner, times, fused or inside)
            for key in ("true_computation", "false_computation"):
                if inner := i.called(key):
                    self._visit(inner, times / 2, fused)

    def _weight(self, name: str) -> float:
        return sum(self._flops(name, i) for i in self.computations[name].values()) + len(self.computations[name])

    def _trips(self, name: str, loop: Instruction) -> int:
        """As XLA wrote them down; else (bound - start) / step of the number that the condition compares, where these are constants."""
        if known := re.search(r'known_trip_count"?[=:]\s*\{"?n"?[=:]\s*"?(\d+)', loop.rest):
            return int(known[1])
        condition, body = loop.called("condition"), loop.called("body")
        end = next((i for i in self.computations[condition].values() if i.opcode == "compare"), None)
        if end is None:  # fused: its operands are the compared ones
            end = next((i for i in self.computations[condition].values() if i.root), None)
        bound = next((v for o in end.operands if (v := self._constant(condition, o)) is not None), None) if end else None
        if bound is None:
            return 1
        number = next((int(found[1]) for o in end.operands if (found := self._number(condition, o))), None)
        start, step = 0, 1
        if number is not None:
            init, result = self._element(name, loop.operands[0], number), next(i for i in self.computations[body].values() if i.root)
            start = (init and self._constant(name, init)) or 0
            step = self._step(body, result.operands[number]) if result.opcode == "tuple" else 1
        return max(-(-(bound - start) // step), 1)

    def _source(self, name: str, operand: str) -> Instruction | None:
        """The instruction that a value comes from, copies left out."""
        i = self.computations[name].get(operand)
        while i is not None and i.opcode in ("copy", "bitcast") and i.operands[0] in self.computations[name]:
            i = self.computations[name][i.operands[0]]
        return i

    def _constant(self, name: str, operand: str) -> int | None:
        i = self._source(name, operand)
        value = re.match(r"\s*(-?\d+)\b", i.rest) if i is not None and i.opcode == "constant" else None
        return int(value[1]) if value else None

    def _number(self, name: str, operand: str) -> re.Match | None:
        """Which element of a loop's state a value is."""
        i = self._source(name, operand)
        return re.search(r"\bindex=(\d+)", i.rest) if i is not None and i.opcode == "get-tuple-element" else None

    def _element(self, name: str, operand: str, number: int) -> str | None:
        i = self._source(name, operand)
        return i.operands[number] if i is not None and i.opcode == "tuple" and number < len(i.operands) else None

    def _step(self, name: str, operand: str) -> int:
        """What is added to a number from trip to trip."""
        i = self._source(name, operand)
        if i is not None and i.opcode == "fusion" and i.called("calls") in self.computations:
            name = i.called("calls")
            i = next((x for x in self.computations[name].values() if x.opcode == "add"), None)
        if i is None or i.opcode != "add":
            return 1
        return next((v for o in i.operands if (v := self._constant(name, o)) and v > 0), 1)

    # ------------------------------------------------------------------ arithmetic

    def _flops(self, name: str, i: Instruction) -> float:
        """Of one instruction, once."""
        inside = self.computations[name]
        if i.opcode == "dot":
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)
            dims = inside[i.operands[0]].arrays[0].dims
            return 2.0 * math.prod(i.arrays[0].dims) * math.prod(dims[int(d)] for d in contracted[1].split(",") if d)
        if i.opcode == "convolution":
            return _convolution(i, inside[i.operands[0]].arrays[0].dims, inside[i.operands[1]].arrays[0].dims)
        return 0.0

    def _kernel(self, name: str, i: Instruction) -> float:
        """FLOPs of an attention kernel, once: of all pairs of places of a row, masked ones too."""
        products = next((n for key, n in _KERNELS.items() if i.name.startswith(key)), 0) if i.opcode == "custom-call" else 0
        inside = self.computations[name]
        wide = [inside[o].arrays[0].dims for o in i.operands if o in inside and inside[o].arrays and len(inside[o].arrays[0].dims) == 4]
        if not products or len(wide) < 2:
            return 0.0
        (rows, heads, time, width), keys = wide[0], wide[1][2]
        return products * 2.0 * rows * heads * time * keys * width

    # ------------------------------------------------------------------ memory

    @functools.cache  # noqa: B019 -- lives as long as the module
    def _reads(self, name: str, index: int) -> float | None:
        """Bytes that a fused computation reads of its parameter `index`, where it reads slices only; None = all of it."""
        inside = self.computations[name]
        start = next((i for i in inside.values() if i.opcode == "parameter" and re.match(rf"\s*{index}\b", i.rest)), None)
        if start is None:
            return None
        total, todo = 0.0, [start.name]
        while todo:
            at = todo.pop()
            for user in inside.values():
                for place, operand in enumerate(user.operands):
                    if operand != at:
                        continue
                    if user.opcode in COLLECTIVES or "AsyncCollective" in user.rest:
                        pass  # counted as what they are
                    elif user.opcode in _SLICES and place == 0:
                        total += sum(a.bytes for a in user.arrays)
                    elif user.opcode == "dynamic-update-slice" and place == 0:
                        pass  # written in place
                    elif user.opcode == "fusion" and (part := self._reads(user.called("calls"), place)) is not None:
                        total += part
                    elif user.opcode in ("bitcast", "tuple") and not (user.root and user.opcode == "bitcast"):
                        todo += [user.name] if user.opcode == "bitcast" else []
                    else:
                        return None
        return total

    def _writes(self, name: str, i: Instruction) -> float:
        """Bytes that an instruction writes: of an array that it changes in place only what is new."""
        inside = self.computations[name]
        if i.opcode == "dynamic-update-slice":
            update = inside[i.operands[1]].arrays
            return sum(a.bytes for a in update) if i.arrays[0].main else 0.0
        if i.opcode != "fusion" or i.called("calls") not in self.computations:
            return i.bytes
        body = self.computations[i.called("calls")]
        root = next(x for x in body.values() if x.root)
        parts = [body[o] for o in root.operands] if root.opcode == "tuple" else [root]
        if len(parts) != len(i.arrays):
            return i.bytes
        total = 0.0
        for part, array in zip(parts, i.arrays):
            while part.opcode in _ALIASES and part.operands and part.operands[0] in body:
                part = body[part.operands[0]]
            if part.opcode == "parameter" or part.opcode in COLLECTIVES or "AsyncCollective" in part.rest:
                continue  # passed on as it is; counted as a collective
            if part.opcode == "dynamic-update-slice" and array.main:
                total += sum(a.bytes for a in body[part.operands[1]].arrays)
            elif array.main:
                total += array.bytes
        return total

    def _bytes(self, name: str, i: Instruction) -> float:
        """Bytes to and from the main memory of one instruction, once."""
        if i.opcode in _FREE or re.search(r'custom_call_target="(AllocateBuffer|ConcatBitcast|Sharding|AsyncCollective\w+)"', i.rest):
            return 0.0
        inside = self.computations[name]
        if i.opcode.removesuffix("-start") in COLLECTIVES:  # counted where the parts of one are known to be one
            return 0.0
        if i.opcode in ("copy-start", "slice-start", "async-start"):  # a tuple of what is read, of the result and of a flag
            taken = [a for o in i.operands if o in inside for a in inside[o].arrays]
            given = [a for a in i.arrays if a.dims]
            for a in taken:
                if a in given:
                    given.remove(a)
            return sum(a.bytes * (any(x.main for x in taken) + a.main) for a in given)
        total = self._writes(name, i)
        for place, operand in enumerate(i.operands):
            source = inside.get(operand)
            if source is None or not source.bytes:
                continue
            if i.opcode in _SLICES and place == 0:
                total += sum(a.bytes for a in i.arrays)
            elif i.opcode == "dynamic-update-slice" and place == 0:
                pass
            elif i.opcode == "fusion" and i.called("calls") in self.computations:
                part = self._reads(i.called("calls"), place)
                total += source.bytes if part is None else min(part, source.bytes)
            else:
                total += source.bytes
        return total

    # ------------------------------------------------------------------ collectives

    def _collective(self, name: str, i: Instruction) -> tuple[str, int, float, float] | None:
        """Kind, devices in a group, bytes that a device sends, bytes to and from its memory; None where it is none."""
        kind = i.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return None
        n = self._group(i)
        inside = self.computations[name]
        taken = sum(a.bytes for o in i.operands if o in inside for a in inside[o].arrays)
        given = sum(a.bytes for a in i.arrays)
        if i.opcode.endswith("-start") and kind == "all-gather":  # (operands, results)
            given -= taken
        share = (n - 1) / n
        if kind == "all-reduce" and name.startswith("all-reduce-scatter"):  # the TPU's way to write one
            kind = "reduce-scatter"
        sent = {"all-gather": given * share, "reduce-scatter": taken * share, "all-reduce": 2 * taken * share,
                "collective-permute": taken, "collective-broadcast": taken}.get(kind, taken * share)
        moved = i.bytes + (0 if i.opcode.endswith("-start") else sum(inside[o].bytes for o in i.operands if o in inside))
        return (kind, n, sent, moved) if n > 1 else None

    def _group(self, i: Instruction) -> int:
        if i.opcode.startswith("collective-permute"):
            return 2
        if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", i.rest):
            sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
            parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
            return math.prod(int(part or sizes[axis]) for axis, part in parts)
        if listed := re.search(r"replica_groups=\{\{([\d, ]*)\}", i.rest):
            return len(listed[1].split(","))
        if iota := re.search(r"replica_groups=\[([\d,]+)\]<=", i.rest):
            return int(iota[1].split(",")[-1])
        return self.devices

    # ------------------------------------------------------------------ the sum

    def cost(self) -> Cost:
        flops = attention = moved = once = 0.0
        found: dict[tuple, tuple[float, float, float]] = {}
        for name, inside in self.computations.items():
            times = self.times.get(name, 0.0)
            if not times:
                continue
            for i in inside.values():
                one = self._flops(name, i)
                flops, once = flops + times * one, once + one
                attention += times * self._kernel(name, i)
                if name not in self.fused:
                    moved += times * self._bytes(name, i)
                if collective := self._collective(name, i):
                    kind, group, sent, touched = collective
                    channel = re.search(r"channel_id=(\d+)", i.rest)
                    # The parts of one asynchronous collective (start, each step, done) carry one channel.
                    key = (kind, group, channel[1] if channel else (name, i.name))
                    found[key] = max(found.get(key, (0.0, 0.0, 0.0)), (times, sent, touched))
        sums: dict[tuple[str, int], list[float]] = {}
        for (kind, group, _), (times, sent, touched) in found.items():
            moved += times * touched
            total = sums.setdefault((kind, group), [0, 0.0])
            total[0] += times
            total[1] += times * sent
        collectives = tuple(Collective(kind, group, round(n), b) for (kind, group), (n, b) in sorted(sums.items(), key=lambda s: -s[1][1]))
        return Cost(flops, attention, moved, collectives, once, tuple(self.loops))


def _convolution(i: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> float:
    """FLOPs of a convolution: multiplications with padding or with the zeros of a dilation are none (batched products come so)."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    left, right, out = labels[1], labels[2], labels[3]
    window = re.search(r"window=\{([^}]*)\}", i.rest)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sorted(c for c in left if c.isdigit())  # the window names them in this order, the labels in any

    def numbers(key, default):
        return [[int(x) for x in part.split("_")] for part in fields[key].split("x")] if key in fields else [default] * len(spatial)

    sizes, strides, pads = numbers("size", [1]), numbers("stride", [1]), numbers("pad", [0, 0])
    in_dilation, kernel_dilation = numbers("lhs_dilate", [1]), numbers("rhs_dilate", [1])
    valid = 1
    for at, axis in enumerate(spatial):
        reach, [size], [stride], [base], [step] = lhs[left.index(axis)], sizes[at], strides[at], in_dilation[at], kernel_dilation[at]
        outputs = i.arrays[0].dims[out.index(axis)]
        last = (reach - 1) * base
        count = 0
        for k in range(size):
            offset = k * step - pads[at][0]
            if stride % base == 0:  # the inputs that output o meets are offset + o * stride: all or none fall on real elements
                if offset % base == 0:
                    low, high = max(0, (stride - 1 - offset) // stride), min(outputs - 1, (last - offset) // stride)
                    count += max(0, high - low + 1)
            else:
                count += sum(0 <= offset + o * stride <= last and (offset + o * stride) % base == 0 for o in range(outputs))
        valid *= count
    features, batch = i.arrays[0].dims[out.index("f")], i.arrays[0].dims[out.index("b")]
    return 2.0 * valid * features * batch * rhs[right.index("i")]  # the kernel's input features are those of one group already
