"""Reading a pickle without running it.

Python's own unpickler imports and calls what the file names. This reader walks the opcodes itself and never calls,
imports or sets an attribute on anything that the file chose: known names are made by our own constructors, every
other one becomes a :class:`Placeholder`. It keeps its own stack, so that no nesting is too deep for it.
"""

from __future__ import annotations

import codecs
import pickletools
import warnings
from collections.abc import Callable
from typing import Any

from relu_doctor.checkpoints.constructors import (
    NotPlainError,
    find_constructor,
    resolve_global,
    set_array_state,
    set_dtype_state,
)
from relu_doctor.checkpoints.nodes import (
    ArrayNode,
    DamagedPickleError,
    Global,
    NumpyDtype,
    OrderedItems,
    Placeholder,
    TensorRef,
    as_key,
)
from relu_doctor.checkpoints.streams import BoundedReader

MOST_BYTES = 2**30  # of one pickle; tensors lie outside it
MOST_OPCODES = 20_000_000
_COPY_ALLOWANCE = 2**24
_MOST_COPIES = 16  # bytes of copies for each byte of pickle
_POINTER_BYTES = 8

PersistentLoad = Callable[[object], object]

_LITERALS = frozenset(
    """INT BININT BININT1 BININT2 LONG LONG1 LONG4 STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8
    UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 FLOAT BINFLOAT""".split()  # noqa: SIM905  # a list of 19 lines
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_FRESH: dict[str, Callable[[], object]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_LINES = frozenset({"STRING", "GLOBAL", "INST", "PERSID"})
_IGNORED = frozenset({"PROTO", "FRAME", "READONLY_BUFFER"})
_OPCODES = {operation.code.encode("latin-1"): operation for operation in pickletools.opcodes}
# What a damaged stream makes the readers of arguments and our own list operations raise.
_DAMAGE = (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, MemoryError)


def read_pickle(reader: BoundedReader, persistent_load: PersistentLoad | None = None) -> object:
    """Read one pickle up to its STOP.

    Args:
        reader: where the pickle starts.
        persistent_load: makes the node for a persistent id; without it, such ids are an error.

    Returns:
        Plain values and the nodes of ``nodes.py``.

    Raises:
        DamagedPickleError: the stream is cut short, breaks the rules of pickle, or is too large.
    """
    return _Machine(reader, persistent_load).run()


class _Machine:
    """The stack machine of pickle, of which only the inert half is built."""

    def __init__(self, reader: BoundedReader, persistent_load: PersistentLoad | None) -> None:
        self.reader = reader
        self.stream: Any = reader  # pickletools wants a file but only reads from it
        self.persistent_load = persistent_load
        self.stack: list[object] = []
        self.marks: list[list[object]] = []
        self.memo: dict[int, object] = {}
        self.copied = 0
        self.opcodes = 0
        self.handlers = {
            name.removeprefix("on_").upper(): getattr(self, name) for name in dir(self) if name.startswith("on_")
        }

    def run(self) -> object:
        try:
            return self.loop()
        except _DAMAGE as error:
            raise DamagedPickleError(f"it breaks the rules of pickle ({type(error).__name__})") from error

    def loop(self) -> object:
        while True:
            self.opcodes += 1
            if self.opcodes > MOST_OPCODES:
                raise DamagedPickleError(f"it has more than {MOST_OPCODES:,} pickle instructions")
            code = self.reader.read(1)
            if not code:
                raise DamagedPickleError("its pickle ends early")
            operation = _OPCODES.get(code)
            if operation is None:
                raise DamagedPickleError("it holds an unknown pickle instruction")
            name = operation.name
            argument: Any = None
            if operation.arg is not None:
                argument = self.read_line(name) if name in _LINES else operation.arg.reader(self.stream)
            if name in _LITERALS:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _FRESH:
                self.stack.append(_FRESH[name]())
            elif name == "STOP":
                return self.stack.pop()
            elif name not in _IGNORED:
                self.handlers[name](argument)

    def read_line(self, name: str) -> str | tuple[str, str]:
        """The argument of an instruction whose text pickletools would unescape, with warnings about what is in it."""
        line = self.whole_line()
        if name != "STRING":
            return (line.decode(), self.whole_line().decode()) if name != "PERSID" else line.decode()
        line = line.strip()
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
            raise ValueError("a string without quotes")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unknown escape in the file is not the caller's business
            return codecs.escape_decode(line[1:-1])[0].decode("latin-1")  # what pickle itself uses

    def whole_line(self) -> bytes:
        line = self.reader.readline()
        if not line.endswith(b"\n"):
            raise ValueError("a line that does not end")
        return line[:-1]

    # The stack

    def on_mark(self, _: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[object]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def on_pop(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def on_pop_mark(self, _: Any) -> None:
        self.pop_mark()

    def on_dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def on_put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    on_binput = on_long_binput = on_put

    def on_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def on_get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    on_binget = on_long_binget = on_get

    # Containers

    def on_bytearray8(self, data: bytes) -> None:
        self.stack.append(bytearray(data))

    def on_tuple(self, _: Any) -> None:
        items = tuple(self.pop_mark())
        self.stack.append(items)

    def push_tuple(self, length: int) -> None:
        items = tuple(self.stack[-length:])
        if len(items) != length:
            raise IndexError
        self.stack[-length:] = [items]

    def on_tuple1(self, _: Any) -> None:
        self.push_tuple(1)

    def on_tuple2(self, _: Any) -> None:
        self.push_tuple(2)

    def on_tuple3(self, _: Any) -> None:
        self.push_tuple(3)

    def on_list(self, _: Any) -> None:
        items = self.pop_mark()
        self.stack.append(items)

    def on_dict(self, _: Any) -> None:
        items = self.pop_mark()
        result: dict[object, object] = {}
        self.set_items(result, items)
        self.stack.append(result)

    def on_frozenset(self, _: Any) -> None:
        items = self.pop_mark()
        self.stack.append(frozenset(as_key(item) for item in items))

    def on_append(self, _: Any) -> None:
        item = self.stack.pop()
        self.extend(self.stack[-1], [item])

    def on_appends(self, _: Any) -> None:
        items = self.pop_mark()
        self.extend(self.stack[-1], items)

    def on_additems(self, _: Any) -> None:
        items = self.pop_mark()
        target = self.stack[-1]
        if type(target) is set:
            target.update(as_key(item) for item in items)
        else:
            self.extend(target, items)

    def extend(self, target: object, items: list[object]) -> None:
        if isinstance(target, Placeholder):
            target.elements.extend(items)
        elif type(target) is list:
            target.extend(items)
        else:
            raise TypeError("items for something that is no list")

    def on_setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items(self.stack[-1], [key, value])

    def on_setitems(self, _: Any) -> None:
        items = self.pop_mark()
        self.set_items(self.stack[-1], items)

    def set_items(self, target: object, items: list[object]) -> None:
        if len(items) % 2:
            raise ValueError("a key without a value")
        into = target.items if isinstance(target, Placeholder) else target
        if type(into) not in (dict, OrderedItems):
            raise TypeError("items for something that is no dictionary")
        assert isinstance(into, dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            into[as_key(key)] = value

    # Names, and what would be calls

    def on_global(self, names: tuple[str, str]) -> None:
        self.stack.append(resolve_global(*names))

    def on_stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise TypeError("a name that is no text")
        self.stack.append(resolve_global(module, name))

    def on_ext1(self, code: int) -> None:
        self.stack.append(Global("copyreg extension", str(code)))

    on_ext2 = on_ext4 = on_ext1

    def on_persid(self, identity: Any) -> None:
        if self.persistent_load is None:
            raise ValueError("a persistent id")
        self.stack.append(self.persistent_load(identity))

    def on_binpersid(self, _: Any) -> None:
        self.on_persid(self.stack.pop())

    def on_reduce(self, _: Any) -> None:
        args, target = self.stack.pop(), self.stack.pop()
        self.construct(target, args)

    on_newobj = on_reduce

    def on_newobj_ex(self, _: Any) -> None:
        kwargs, args, target = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.construct(target, args, kwargs)

    def on_inst(self, names: tuple[str, str]) -> None:
        args = tuple(self.pop_mark())
        self.construct(resolve_global(*names), args)

    def on_obj(self, _: Any) -> None:
        target, *args = self.pop_mark()
        self.construct(target, tuple(args))

    def construct(self, target: object, args: object, kwargs: object = None) -> None:
        """Push what calling ``target`` would have given, made by us, or a placeholder. Nothing is called."""
        if not isinstance(args, tuple):
            raise TypeError("arguments that are no tuple")
        if isinstance(target, Global):
            constructor = find_constructor(target) if not kwargs else None
            if constructor is not None:
                try:
                    made = constructor(*args)
                except (NotPlainError, TypeError, ValueError):
                    made = Placeholder(target.dotted, args)
                self.charge(made)
                self.stack.append(made)
                return
            self.stack.append(Placeholder(target.dotted, args, kwargs))
        elif isinstance(target, Placeholder):
            self.stack.append(Placeholder(f"{target.dotted[:200]}()", args, kwargs))
        else:
            raise TypeError("a call of something that is no name")

    def charge(self, made: object) -> None:
        """Copies cost: a short pickle must not fill the memory by copying one long value again and again."""
        if isinstance(made, str | bytes | bytearray):
            self.copied += len(made)
        elif isinstance(made, tuple | list | set | frozenset | dict):
            self.copied += _POINTER_BYTES * len(made)
        if self.copied > _COPY_ALLOWANCE + _MOST_COPIES * self.reader.consumed:
            raise DamagedPickleError("it copies the same values over and over")

    def on_build(self, _: Any) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Placeholder | OrderedItems):
            target.state = state
        elif isinstance(target, ArrayNode):
            set_array_state(target, state)
        elif isinstance(target, NumpyDtype):
            set_dtype_state(target, state)
        elif not isinstance(target, TensorRef):  # an attribute that somebody hung on a tensor
            raise TypeError("a state for a plain value")
