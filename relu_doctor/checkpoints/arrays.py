"""Arrays of inputs: checked, and dealt row by row so that a file larger than memory can be scanned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relu_doctor.errors import DataError

RANDOM_INPUTS = 1024  # how many inputs ``random:`` draws when nobody says
_CHUNK_ELEMENTS = 2**22  # checked or drawn at a time
_MOST_DRAWN_TOGETHER = 64

# What torch computes with; the others are turned into the next that holds their values.
_CONVERSIONS = {
    "float64": np.float32,
    "float128": np.float32,
    "longdouble": np.float32,
    "uint16": np.int32,
    "uint32": np.int64,
}
_KEPT = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "complex64", "complex128")


class NumpyRows:
    """A numpy array, in memory or memory-mapped, whose rows come out as torch tensors when they are indexed."""

    def __init__(self, array: np.ndarray[Any, Any], *, shown: str) -> None:
        """Wrap ``array``.

        Args:
            array: the inputs along the first axis.
            shown: the file's name for messages, already clean.

        Raises:
            DataError: it holds objects, text or dates, numbers that torch has not, or it is 0-dimensional.
        """
        if array.dtype.kind not in "buifc":
            kind = {"O": "objects", "U": "text", "S": "text", "M": "dates", "m": "durations"}.get(
                array.dtype.kind, "records"
            )
            raise DataError(f"{shown} holds {kind} (dtype {array.dtype}); an array of numbers is needed.")
        target = _CONVERSIONS.get(array.dtype.name)
        if target is None and array.dtype.name not in _KEPT:
            raise DataError(
                f"{shown} is of dtype {array.dtype}, which torch does not compute with; save it as float32."
            )
        self._array = array
        self._dtype = np.dtype(target) if target is not None else array.dtype.newbyteorder("=")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole array."""
        return tuple(self._array.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows that come out."""
        return torch.from_numpy(np.empty(0, self._dtype)).dtype

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self._array)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """Rows as a tensor of their own memory; float64 comes out as float32."""
        rows = self._array[index if isinstance(index, slice) else index.numpy()]
        with np.errstate(over="ignore"):  # a value too large for float32 becomes Inf, and is reported as such
            return torch.from_numpy(np.array(rows, dtype=self._dtype, order="C"))


class TensorRows:
    """A tensor whose rows come out in the dtype that models compute in: float64 as float32."""

    def __init__(self, tensor: Tensor) -> None:
        """Wrap ``tensor``, with the inputs along the first axis."""
        self._tensor = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return tuple(self._tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows that come out."""
        return torch.float32 if self._tensor.dtype == torch.float64 else self._tensor.dtype

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self._tensor)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """Some rows."""
        return self._tensor[index].to(self.dtype)


Rows = NumpyRows | TensorRows


def check_rows(rows: Rows, indices: Tensor | None, *, shown: str) -> None:
    """See that there are rows, and that the ones to be read hold neither NaN nor Inf; a chunk at a time.

    Raises:
        DataError: there is nothing, or values are not finite: how many, and in which row first.
    """
    if not rows.shape:
        raise DataError(f"{shown} is a single number; an array with the inputs along its first axis is needed.")
    if 0 in rows.shape:
        raise DataError(f"{shown} is empty: its shape is {describe_shape(rows.shape)}.")
    if not (rows.dtype.is_floating_point or rows.dtype.is_complex):
        return
    total = len(rows) if indices is None else len(indices)
    per_row = max(int(np.prod(rows.shape[1:], dtype=np.float64)), 1)
    step = max(_CHUNK_ELEMENTS // per_row, 1)
    bad = 0
    first: int | None = None
    for start in range(0, total, step):
        chunk = rows[slice(start, start + step)] if indices is None else rows[indices[start : start + step]]
        wrong = ~torch.isfinite(chunk)
        here = int(wrong.sum())
        if here and first is None:
            at = (
                start + int(wrong.flatten(1).any(1).nonzero()[0])
                if wrong.dim() > 1
                else start + int(wrong.nonzero()[0])
            )
            first = at if indices is None else int(indices[at])
        bad += here
    if bad:
        values = "value is" if bad == 1 else "values are"
        raise DataError(f"{shown}: {bad:,} {values} NaN or Inf, the first in row {first}; remove or replace them.")


class RandomBatches(Sequence[Tensor]):
    """Standard-normal inputs, drawn batch by batch and the same every time, for any batch size.

    Input number *i* depends on the seed, the shape and *i* alone; torch's global generator is not touched.
    """

    def __init__(self, shape: tuple[int, ...], batch_size: int, *, num_inputs: int, seed: int) -> None:
        """Draw ``num_inputs`` inputs of ``shape``, ``batch_size`` at a time."""
        self.shape = shape
        self.batch_size = batch_size
        self.num_inputs = num_inputs
        self.seed = seed
        elements = max(int(np.prod(shape, dtype=np.float64)), 1)
        self._last: tuple[int, Tensor] | None = None
        self._together = min(max(_CHUNK_ELEMENTS // elements, 1), _MOST_DRAWN_TOGETHER)

    def spread(self, num_inputs: int) -> RandomBatches:
        """The first ``num_inputs`` of the same inputs; of random ones the first are as good as any."""
        fewer = min(num_inputs, self.num_inputs)
        return RandomBatches(self.shape, self.batch_size, num_inputs=fewer, seed=self.seed)

    def __len__(self) -> int:
        """How many batches there are."""
        return math.ceil(self.num_inputs / self.batch_size)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # slices of batches are not needed
        """One batch, the inputs along its first axis, float32."""
        start = index * self.batch_size
        if not 0 <= start < self.num_inputs:
            raise IndexError(index)
        stop = min(start + self.batch_size, self.num_inputs)
        first = start // self._together
        drawn = [self._draw(number) for number in range(first, -(-stop // self._together))]
        offset = start - first * self._together
        return torch.cat(drawn)[offset : offset + stop - start]

    def __iter__(self) -> Iterator[Tensor]:
        """All batches, from the beginning each time."""
        return (self[index] for index in range(len(self)))

    def _draw(self, number: int) -> Tensor:
        if self._last is not None and self._last[0] == number:
            return self._last[1]
        seeds = np.random.SeedSequence([self.seed, number]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(seeds[0]) >> 1)
        drawn = torch.randn((self._together, *self.shape), generator=generator)
        self._last = (number, drawn)
        return drawn


def describe_shape(shape: tuple[int, ...]) -> str:
    """A shape as ``3x32x32``, the way that ``random:`` takes it."""
    return "x".join(str(extent) for extent in shape)
