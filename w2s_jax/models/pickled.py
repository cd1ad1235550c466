"""The pickle inside a PyTorch file, read as data: tensors' descriptions and plain containers, nothing imported, nothing called.

A pickle is a program for a stack machine, and Python's own machine, `pickle.Unpickler`, is only as safe as its `find_class`:
what that returns is still called (REDUCE), filled (BUILD) and extended by the machine itself, its memo grows to whatever index
the file names, and its extension registry belongs to the whole process. So this is a machine of our own, of the 43 opcodes that
PyTorch and Python 2 and 3 write for a state dict. It cannot do harm because it has nothing to do it with: a GLOBAL is looked up in a
table of a few names, each standing for an inert `Name`; REDUCE is a `match` over these names that builds records of ours; every
other opcode (INST, OBJ, NEWOBJ, EXT1, PERSID, ...) and every other name is refused by name. The memo is a dict, nothing recurses, and
the work is bounded (STEPS, TEXT). PyTorch's own `torch.load(weights_only=True)` (torch/_weights_only_unpickler.py) goes the same way.
"""

from __future__ import annotations

import pickle  # for the names of its opcodes alone
import struct
from collections.abc import Callable
from typing import NamedTuple

from w2s_jax.errors import UserError

STEPS = 2**23  # opcodes of one pickle: a state dict has about 30 a tensor; each makes at most one small object
TEXT = 2**20  # bytes of one string
DIMENSIONS = 32

# PyTorch's storage classes and dtypes -> safetensors' names of their types. "U8?" is a storage of bytes, whose tensors say their type.
STORAGES = {"DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64",
            "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
            "UntypedStorage": "U8?"}  # fmt: skip
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16",
          "int8": "I8", "uint8": "U8", "bool": "BOOL", "uint16": "U16", "uint32": "U32", "uint64": "U64"}  # fmt: skip
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "U16": 2, "U32": 4,
         "U64": 8, "U8?": 1}  # fmt: skip
REBUILDS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")


class Name(NamedTuple):
    """An imported object's name, standing for nothing but itself."""

    module: str
    name: str


class Storage(NamedTuple):
    """A run of bytes in the file: what a persistent id says of it."""

    key: str
    dtype: str  # a key of SIZES
    elements: int  # of the whole storage
    start: int = 0  # of a view, in elements
    length: int | None = None  # of a view, in elements; None = all


class Described(NamedTuple):
    """A tensor as the pickle describes it; nothing of it is checked against the file yet. Units: elements of `dtype`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Mark:
    pass


_MARK = _Mark()


def whole(value, least: int = 0) -> bool:
    """Whether a value out of a pickle is an integer of 64 bits that is not below `least`."""
    return type(value) is int and least <= value < 2**63


def read(data, position: int, file) -> tuple[object, int]:
    """The object that the pickle at `data[position:]` describes, and where the pickle ends.

    Args:
      data: bytes, or anything whose slices are bytes-like (a memory map).
      position: of its first byte.
      file: its name, for messages.
    Returns:
      dicts (OrderedDict too), lists, tuples, numbers, str, bytes, None, `Name`, and `Described` for a tensor.
    Raises:
      UserError: another object than these, named; a truncated or damaged pickle.
    """
    return _Machine(data, position, file).run()


class _Machine:
    def __init__(self, data, position: int, file):
        self.data, self.at, self.file = data, position, file
        self.stack: list = []
        self.memo: dict[int, object] = {}

    def run(self) -> tuple[object, int]:
        for _ in range(STEPS):
            code = self.take(1)[0]
            if code == 0x2E:  # STOP
                result = self.pop()
                if self.stack:
                    raise self.damaged("objects are left on its stack")
                return result, self.at
            step = _STEPS.get(code)
            if step is None:
                raise UserError(f"{self.file}: its pickle uses the opcode {_opcode(code)} at byte {self.at - 1}, which no state dict "
                                "needs; it is not read")
            step(self)
        raise UserError(f"{self.file}: its pickle has more than {STEPS} steps; expected the state dict of a model")

    # Reading.

    def damaged(self, why: str) -> UserError:
        return UserError(f"{self.file}: truncated or damaged: its pickle cannot be read at byte {self.at} ({why})")

    def take(self, n: int) -> bytes:
        found = bytes(self.data[self.at:self.at + n])
        if len(found) < n:
            raise self.damaged("it ends early")
        self.at += n
        return found

    def unsigned(self, n: int) -> int:
        return int.from_bytes(self.take(n), "little")

    def sized(self, n: int) -> bytes:
        """Bytes behind their own length, itself an integer of `n` bytes."""
        length = self.unsigned(n)
        if length > TEXT:
            raise self.damaged(f"a string of {length} bytes")
        return self.take(length)

    def text(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.damaged("a string that is not UTF-8") from None

    def line(self) -> str:
        raw = bytearray()
        while (byte := self.take(1)) != b"\n":
            raw += byte
            if len(raw) > 1000:
                raise self.damaged("a name of more than 1,000 bytes")
        return self.text(bytes(raw))

    # The stack.

    def push(self, value) -> None:
        self.stack.append(value)

    def pop(self):
        if not self.stack or self.stack[-1] is _MARK:
            raise self.damaged("its stack is empty")
        return self.stack.pop()

    def top(self):
        if not self.stack or self.stack[-1] is _MARK:
            raise self.damaged("its stack is empty")
        return self.stack[-1]

    def to_mark(self) -> list:
        """All above the last mark, which goes with them."""
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is _MARK:
                found = self.stack[i + 1:]
                del self.stack[i:]
                return found
        raise self.damaged("a mark is missing")

    def tuple_of(self, n: int) -> None:
        found = [self.pop() for _ in range(n)]
        self.push(tuple(reversed(found)))

    def remember(self, index: int) -> None:
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise self.damaged(f"it recalls an object {index} that it never stored")
        self.push(self.memo[index])

    def append(self, values: list) -> None:
        if type(self.top()) is not list:
            raise self.damaged("it appends to something that is no list")
        self.top().extend(values)

    def put(self, items: list) -> None:
        target = self.top()
        if type(target) is not dict or len(items) % 2:
            raise self.damaged("it sets items of something that is no dict")
        for key, value in zip(items[::2], items[1::2]):
            self.key(key)
            target[key] = value

    def key(self, key) -> None:
        if type(key) not in (str, bytes, int, float, bool, type(None)):
            raise UserError(f"{self.file}: a dict has a key of type {_named(key)}; expected text or numbers")

    # Objects.

    def name(self, module: str, name: str) -> None:
        known = (
            (module in ("torch", "torch.cuda", "torch.storage") and name in STORAGES)
            or (module == "torch" and (name in DTYPES or name in ("Size", "device")))
            or (module == "torch._utils" and name in REBUILDS)
            or (module == "collections" and name == "OrderedDict")
        )
        if not known:
            raise UserError(f"{self.file}: holds an object {f'{module}.{name}'[:200]!r}, which is not read; expected tensors, numbers, "
                            "text and plain containers alone (save model.state_dict() by itself)")
        self.push(Name(module, name))

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(function) is not Name or type(arguments) is not tuple:
            raise self.damaged("it calls something that is no function")
        match function.name, arguments:
            case "OrderedDict", ():
                self.push({})
            case "OrderedDict", (list(pairs),) if all(type(p) in (list, tuple) and len(p) == 2 for p in pairs):  # Python 2
                self.push({})
                self.put([part for pair in pairs for part in pair])
            case "Size", (tuple(shape),) | (list(shape),) if all(whole(n) for n in shape):
                self.push(tuple(shape))
            case "device", (str(), *rest) if len(rest) <= 1 and all(whole(n) for n in rest):
                self.push(":".join(map(str, arguments)))
            case "_rebuild_parameter", (Described() as tensor, _, hooks) if not hooks:
                self.push(tensor)
            case "_rebuild_tensor", (storage, offset, shape, stride):
                self.push(self.tensor(storage, offset, shape, stride))
            case "_rebuild_tensor_v2", (storage, offset, shape, stride, _, hooks, *metadata) if not hooks and not any(metadata):
                self.push(self.tensor(storage, offset, shape, stride))
            case "_rebuild_tensor_v3", (storage, offset, shape, stride, _, hooks, Name() as dtype, *metadata) if (
                not hooks and not any(metadata) and dtype.name in DTYPES
            ):
                self.push(self.tensor(storage, offset, shape, stride, DTYPES[dtype.name]))
            case _:
                raise UserError(f"{self.file}: calls {function.module}.{function.name} with arguments that PyTorch does not give it "
                                "for a plain tensor; it is not read")

    def tensor(self, storage, offset, shape, stride, dtype: str | None = None) -> Described:
        good = (type(storage) is Storage and whole(offset) and type(shape) is tuple and type(stride) is tuple
                and len(shape) == len(stride) <= DIMENSIONS and all(whole(n) for n in shape + stride))
        if not good or (dtype is None and storage.dtype == "U8?"):
            raise UserError(f"{self.file}: a tensor of offset {_named(offset)}, shape {_named(shape)}, strides {_named(stride)} in "
                            f"{_named(storage)}; expected a storage and integers from 0")
        if dtype is None:
            return Described(storage, storage.dtype, offset, shape, stride)
        if storage.dtype not in ("U8?", dtype):
            raise UserError(f"{self.file}: a tensor of type {dtype} in a storage of type {storage.dtype}")
        return Described(storage, dtype, offset, shape, stride)

    def persistent(self) -> None:
        match self.pop():
            case ("storage", Name() as kind, key, str(), elements, *view) if (
                kind.name in STORAGES and (type(key) is str or whole(key)) and whole(elements) and len(view) <= 1
            ):
                found = Storage(str(key), STORAGES[kind.name], elements)
                match view[0] if view else None:
                    case None:
                        self.push(found)
                    case (_, start, length) if whole(start) and whole(length) and start + length <= elements:
                        self.push(found._replace(start=start, length=length))
                    case other:
                        raise UserError(f"{self.file}: a view {_named(other)} of a storage of {elements} elements")
            case other:
                kind = other[0] if type(other) is tuple and other else other
                raise UserError(f"{self.file}: holds a persistent id of kind {_named(kind)}; expected a tensor's storage (save "
                                "model.state_dict() by itself)")

    def build(self) -> None:
        """An OrderedDict's attributes, which is where a state dict keeps the versions of its modules: they are no tensors."""
        state, target = self.pop(), self.top()
        if type(target) is not dict or type(state) is not dict or set(state) - {"_metadata"}:
            raise UserError(f"{self.file}: gives {_named(target)} a state ({_named(state)}); expected plain containers alone")

    def global_from_stack(self) -> None:
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            raise self.damaged("a name that is no text")
        self.name(module, name)

    def integer(self, n: int) -> None:
        self.push(int.from_bytes(self.sized(n), "little", signed=True))


def _named(value) -> str:
    """A value in a message: short, and never its content where that may be long or deep."""
    if type(value) in (int, float, bool, str, bytes, type(None)):
        return repr(value)[:80]
    if type(value) is Name:
        return f"{value.module}.{value.name}"[:200]
    if type(value) is tuple and all(whole(n, -(2**63)) for n in value):
        return repr(value)[:80]
    return {"Described": "a tensor", "Storage": "a storage"}.get(type(value).__name__, f"a {type(value).__name__}")


def _opcode(code: int) -> str:
    return next((n for n in pickle.__all__ if n.isupper() and getattr(pickle, n) == bytes([code])), f"0x{code:02x}")


def _unpacked(form: str) -> Callable[[_Machine], None]:
    return lambda m: m.push(struct.unpack(form, m.take(struct.calcsize(form)))[0])


def _pushing(make: Callable) -> Callable[[_Machine], None]:
    return lambda m: m.push(make(m))


_BY_NAME: dict[str, Callable[[_Machine], None]] = {
    "PROTO": lambda m: m.take(1), "FRAME": lambda m: m.take(8),
    "MARK": lambda m: m.push(_MARK), "POP": lambda m: m.stack.pop() if m.stack and m.stack[-1] is _MARK else m.pop(),
    "POP_MARK": lambda m: m.to_mark(), "DUP": lambda m: m.push(m.top()),
    "NONE": _pushing(lambda m: None), "NEWTRUE": _pushing(lambda m: True), "NEWFALSE": _pushing(lambda m: False),
    "BININT": _unpacked("<i"), "BININT1": _unpacked("<B"), "BININT2": _unpacked("<H"), "BINFLOAT": _unpacked(">d"),
    "LONG1": lambda m: m.integer(1),
    "BINUNICODE": _pushing(lambda m: m.text(m.sized(4))), "SHORT_BINUNICODE": _pushing(lambda m: m.text(m.sized(1))),
    "BINUNICODE8": _pushing(lambda m: m.text(m.sized(8))),
    "BINSTRING": _pushing(lambda m: m.text(m.sized(4))), "SHORT_BINSTRING": _pushing(lambda m: m.text(m.sized(1))),  # Python 2's str
    "BINBYTES": _pushing(lambda m: m.sized(4)), "SHORT_BINBYTES": _pushing(lambda m: m.sized(1)),
    "EMPTY_LIST": _pushing(lambda m: []), "EMPTY_DICT": _pushing(lambda m: {}), "EMPTY_TUPLE": _pushing(lambda m: ()),
    "LIST": _pushing(lambda m: m.to_mark()), "TUPLE": _pushing(lambda m: tuple(m.to_mark())),
    "TUPLE1": lambda m: m.tuple_of(1), "TUPLE2": lambda m: m.tuple_of(2), "TUPLE3": lambda m: m.tuple_of(3),
    "APPEND": lambda m: m.append([m.pop()]), "APPENDS": lambda m: m.append(m.to_mark()),
    "SETITEM": lambda m: m.put([m.pop(), m.pop()][::-1]), "SETITEMS": lambda m: m.put(m.to_mark()),
    "BINPUT": lambda m: m.remember(m.unsigned(1)), "LONG_BINPUT": lambda m: m.remember(m.unsigned(4)),
    "MEMOIZE": lambda m: m.remember(len(m.memo)),
    "BINGET": lambda m: m.recall(m.unsigned(1)), "LONG_BINGET": lambda m: m.recall(m.unsigned(4)),
    "GLOBAL": lambda m: m.name(m.line(), m.line()), "STACK_GLOBAL": lambda m: m.global_from_stack(),
    "REDUCE": lambda m: m.reduce(), "BUILD": lambda m: m.build(), "BINPERSID": lambda m: m.persistent(),
}  # fmt: skip


_STEPS = {getattr(pickle, name)[0]: step for name, step in _BY_NAME.items()}
