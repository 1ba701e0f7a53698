"""What a pickle turns into here: plain values, and these inert nodes in place of everything that would be code.

None of these classes has a method that a file can reach: the reader in ``pickles.py`` fills their fields itself.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from relu_doctor.checkpoints.streams import StorageFile
from relu_doctor.text import clean_text

_MOST_DIMENSIONS = 64
_MOST_ELEMENTS = 2**62
_DEEPEST_KEY = 16
_LARGEST_KEY = 1000


class DamagedPickleError(Exception):
    """The stream breaks the rules of pickle or of torch's tensors; becomes a CheckpointError that names the file."""


class OrderedItems(dict[object, object]):
    """A dict that may carry an attribute state beside its items, as a ``state_dict`` carries ``_metadata``."""

    state: object = None


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the file refers to; never imported."""

    module: str
    name: str

    @property
    def dotted(self) -> str:
        """The full name, as the file spells it."""
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True, repr=False)
class Placeholder:
    """What stands where an object of unknown make would be: its name and what it would have been made from."""

    dotted: str
    args: tuple[object, ...] = ()
    kwargs: object = None
    state: object = None
    items: dict[object, object] = field(default_factory=dict)
    elements: list[object] = field(default_factory=list)

    def __repr__(self) -> str:
        """The name alone: what is inside may be of any size."""
        return f"<placeholder for {clean_text(self.dotted)}>"


@dataclass(frozen=True, slots=True)
class StorageType:
    """A torch storage class; ``dtype`` is ``None`` for the untyped one, ``item_bytes`` 0 for a kind we cannot read."""

    name: str
    dtype: torch.dtype | None
    item_bytes: int


@dataclass(eq=False, slots=True)
class NumpyDtype:
    """A numpy dtype while it is being read: its code (``f8``) and byte order."""

    code: str
    order: str = "|"

    def resolve(self) -> np.dtype[np.generic] | None:
        """The numpy dtype if it is a plain number, else ``None``."""
        kind, width = self.code[:1], self.code[1:]
        if self.code == "?":
            kind, width = "b", "1"
        widths = {
            "b": ("1",),
            "i": ("1", "2", "4", "8"),
            "u": ("1", "2", "4", "8"),
            "f": ("2", "4", "8"),
            "c": ("8", "16"),
        }
        if width not in widths.get(kind, ()) or self.order not in ("<", ">", "=", "|"):
            return None
        return np.dtype(f"{self.order}{kind}{width}")


@dataclass(eq=False, slots=True)
class ArrayNode:
    """A numpy array in a pickle: read as a tensor when somebody asks for it."""

    shape: tuple[int, ...] = (0,)
    dtype: NumpyDtype | None = None
    column_major: bool = False
    data: bytes | bytearray = b""

    @property
    def numel(self) -> int:
        """How many elements the array has."""
        return math.prod(self.shape)

    def load(self) -> Tensor | None:
        """The array as a tensor of native byte order, or ``None`` where torch has no such dtype or the sizes lie."""
        dtype = None if self.dtype is None else self.dtype.resolve()
        if dtype is None or len(self.shape) > _MOST_DIMENSIONS or any(extent < 0 for extent in self.shape):
            return None
        if self.numel * dtype.itemsize != len(self.data):
            return None
        flat = np.frombuffer(self.data, dtype).astype(dtype.newbyteorder("="))
        return torch.from_numpy(flat.reshape(self.shape, order="F" if self.column_major else "C"))


@dataclass(frozen=True, eq=False, slots=True)
class StorageRef:
    """A storage that the pickle names: a range of bytes of a record."""

    source: StorageFile
    key: str
    start: int  # bytes into the record
    nbytes: int
    dtype: torch.dtype | None  # None: untyped; the tensor says
    readable: bool = True  # False for quantized kinds


@dataclass(frozen=True, eq=False, slots=True)
class TensorRef:
    """A tensor whose shape has been checked against its storage, not yet read. Expanded tensors stay views."""

    storage: StorageRef
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # elements into the storage

    @property
    def numel(self) -> int:
        """How many elements the tensor has (an expanded one more than its storage)."""
        return math.prod(self.shape)

    def load(self, cache: dict[tuple[str, torch.dtype], torch.UntypedStorage] | None = None) -> Tensor:
        """Read the tensor. Tensors loaded with the same ``cache`` share storages as they did when they were saved.

        Raises:
            CheckpointError: the file has changed since it was opened, or cannot be read.
        """
        if self.numel == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        where = (self.storage.key, self.dtype)
        data = None if cache is None else cache.get(where)
        if data is None:
            data = self.storage.source.read(self.storage.key, self.dtype)
            if cache is not None:
                cache[where] = data
        first = self.storage.start // self.dtype.itemsize + self.offset
        return torch.empty(0, dtype=self.dtype).set_(data, first, self.shape, self.stride)


def make_tensor(storage: object, offset: object, shape: object, stride: object, dtype: torch.dtype | None) -> object:
    """Check a tensor's description against the bytes of its storage.

    Returns:
        A :class:`TensorRef`, or a :class:`Placeholder` when the storage is of a kind that cannot be read (quantized).

    Raises:
        DamagedPickleError: sizes, strides or offset are no numbers, negative, overflow, or reach past the storage.
    """
    if not isinstance(storage, StorageRef):
        raise DamagedPickleError("a tensor has no storage")
    dtype = dtype or storage.dtype or torch.uint8
    if not storage.readable:
        return Placeholder("torch._utils._rebuild_qtensor")
    sizes, strides = _extents(shape), _extents(stride)
    if type(offset) is not int or not 0 <= offset < _MOST_ELEMENTS or len(sizes) != len(strides):
        raise DamagedPickleError("a tensor's shape, stride and offset do not fit together")
    numel = math.prod(sizes)
    if numel >= _MOST_ELEMENTS:
        raise DamagedPickleError("a tensor's size overflows")
    if numel:
        reach = offset + 1 + sum((size - 1) * step for size, step in zip(sizes, strides, strict=True))
        if reach * dtype.itemsize > storage.nbytes or storage.start % dtype.itemsize:
            raise DamagedPickleError("a tensor reaches past the end of its data")
    return TensorRef(storage, dtype, sizes, strides, offset)


_BY_IDENTITY = Global | Placeholder | TensorRef | StorageRef | StorageType | ArrayNode | NumpyDtype | torch.dtype


def _extents(values: object) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or len(values) > _MOST_DIMENSIONS:
        raise DamagedPickleError("a tensor's shape is not a tuple of numbers")
    checked = []
    for value in values:
        if type(value) is not int or not 0 <= value < _MOST_ELEMENTS:
            raise DamagedPickleError("a tensor's shape holds something that is no size")
        checked.append(value)
    return tuple(checked)


def as_key(value: object) -> Hashable:
    """``value``, when it can be hashed without running code, without deep recursion and in little time.

    Raises:
        DamagedPickleError: it cannot.
    """
    plain = str | bytes | int | float | complex | None
    waiting: list[tuple[object, int]] = [(value, 0)]
    looked_at = 0
    while waiting:
        part, depth = waiting.pop()
        looked_at += 1
        if isinstance(part, tuple):
            if depth >= _DEEPEST_KEY or looked_at + len(waiting) + len(part) > _LARGEST_KEY:
                raise DamagedPickleError("a dictionary key is nested too deeply")
            waiting.extend((inner, depth + 1) for inner in part)
        elif not isinstance(part, plain | _BY_IDENTITY | frozenset):  # frozensets were made here from checked elements
            raise DamagedPickleError(f"a {type(part).__name__} stands where a dictionary key should be")
    return value
