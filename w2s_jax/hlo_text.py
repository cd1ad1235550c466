"""HLO text as XLA prints it: computations of instructions, with the shapes of their results."""

from __future__ import annotations

import dataclasses
import math
import re

_SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4,
          "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape: `dims`, the type of its elements (f32, bf16, s32 ...), and whether it lies in the main memory (not in a
    TPU's vector memory)."""

    dims: tuple[int, ...]
    type: str
    main: bool

    @property
    def itemsize(self) -> float:
        return _SIZES.get(self.type, 1)

    @property
    def bytes(self) -> float:
        return math.prod(self.dims) * self.itemsize


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes, and of a constant or a parameter what stands in its parentheses
    root: bool

    @property
    def bytes(self) -> float:
        """In main memory."""
        return sum(a.bytes for a in self.arrays if a.main)

    def called(self, key: str) -> str | None:
        """The computation that the attribute `key` names."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None


def read(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """The computations of a module, each `{name: instruction}` in the order of the text, and the name of the first to run.

    Raises:
      ValueError: the text is no HLO module.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, inside = "", None
    for line in text.splitlines():
        if not line.startswith(" ") and (head := _HEAD.match(line)):
            inside = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif inside is not None and (instruction := _instruction(line)):
            inside[instruction.name] = instruction
    if not entry:
        raise ValueError("no ENTRY computation in this text: it is no HLO module")
    return computations, entry


def _bracketed(text: str, start: int) -> int:
    """Position behind the bracket that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] in "([{") - (text[at] in ")]}")
        if not depth:
            return at + 1
    return len(text)


def _arrays(text: str) -> tuple[Array, ...]:
    out = []
    for kind, dims, layout in _ARRAY.findall(text):
        if kind in _SIZES or kind.startswith("f8"):
            space = re.search(r"S\((\d+)\)", layout)
            out.append(Array(tuple(int(d) for d in dims.split(",") if d), kind, not space or space[1] == "0"))
    return tuple(out)


def _instruction(line: str) -> Instruction | None:
    found = _LINE.match(line)
    if not found:
        return None
    line = re.sub(r"/\*.*?\*/", "", line[found.end():])
    end = _bracketed(line, 0) if line.startswith("(") else line.find(" ")
    shape, rest = line[:end], line[end:].strip()
    opens = rest.find("(")
    if opens < 1:
        return None
    closes = _bracketed(rest, opens)
    inside = rest[opens + 1 : closes - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or tuple(w for w in inside.replace(" ", "").split(",") if re.match(r"[a-zA-Z]", w))
    keep = inside if rest[:opens] in ("constant", "parameter") else ""
    return Instruction(found[2], _arrays(shape), rest[:opens], operands, keep + rest[closes:], bool(found[1]))
