"""Whose the rows of a selection are: experts, masks and permutations take rows of a batch in an order of their own.

Which input each row of such a selection belongs to does not show in its shape. So the selecting calls of a forward
(indexing by masks and indices, splits, permutations) are performed a second time, on the places of the rows, and the
places are passed on with the rows. Whether the places mean what they seem to (a batch may be flattened position by
position) is tried out in a rehearsal before any input is counted by them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from relu_doctor.observe.inputs.feeding import sent, tensors_in

Function = Callable[..., Any]


def _all(*names: str) -> set[Function]:
    return {getattr(owner, name) for owner in (torch, Tensor) for name in names if hasattr(owner, name)}


_INDEXING = {Tensor.__getitem__}
_PICKING = _all("index_select")
_CUTTING = _all("split", "chunk", "tensor_split", "split_with_sizes", "unsafe_split", "unsafe_chunk")
_FLIPS = _all("flip")
_MOVING = _FLIPS | _all("roll", "repeat_interleave")
_JOINING = _all("cat", "concat", "concatenate")
_WRITING = _all(
    "index_add", "index_add_", "index_copy", "index_copy_", "index_put", "index_put_", "scatter", "scatter_",
    "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_", "index_reduce", "index_reduce_", "__setitem__",
)  # fmt: skip
_TURNING = _all("t", "transpose", "permute", "movedim", "swapaxes", "adjoint", "matrix_H", "T", "mT") | {
    Tensor.T.__get__,  # type: ignore[attr-defined]
    Tensor.mT.__get__,  # type: ignore[attr-defined]
}
_PRODUCTS = _all("matmul", "mm", "bmm", "addmm", "baddbmm", "__matmul__", "__rmatmul__", "einsum", "tensordot")


_PACK: Function = torch._VF._pack_padded_sequence
_SELECTING = _INDEXING | _PICKING | _CUTTING | _MOVING


@dataclass(frozen=True, slots=True)
class Rows:
    """Places of the rows of a tensor in the grid of (inputs, positions).

    Attributes:
        places: int64 (rows,), or (rows, positions) where whole inputs were selected: input x positions + position.
        positions: of an input.
    """

    places: Tensor
    positions: int

    @property
    def owners(self) -> Tensor:
        """The input that each row belongs to: int64 (rows,)."""
        places = self.places if self.places.dim() == 1 else self.places[:, 0]
        return places // self.positions

    def valid(self, mask: Tensor | None, num_positions: int) -> Tensor | None:
        """A mask of (inputs, positions) for these rows: bool (rows, num_positions); ``None`` where it is not theirs."""
        if mask is None or mask.shape[1] != self.positions:
            return None
        valid = sent(mask, self.places.device).flatten()[self.places]
        if valid.dim() == 2 and valid.shape[1] == num_positions:
            return valid
        valid = valid if valid.dim() == 1 else valid.any(1)
        return valid[:, None].expand(len(valid), num_positions)


class RowFollower:
    """Follows the rows of one forward's selections; no activation is held.

    Args:
        num_inputs: inputs in the batch; ``None`` where no tensor shows it.
        axis: of what is passed, on which they lie.
    """

    def __init__(self, num_inputs: int | None, axis: int | None) -> None:
        self.num_inputs = num_inputs
        self.axis = axis
        self._known: dict[int, tuple[weakref.ref[Tensor], Rows]] = {}
        self._packed: dict[int, tuple[weakref.ref[Tensor], Rows]] = {}

    def of_packed(self, tensor: object) -> Rows | None:
        """The places of the sequences that were packed into a tensor, longest first."""
        reference, rows = self._packed.get(id(tensor), (None, None))
        return rows if reference is not None and reference() is tensor else None

    def note_packed(self, tensor: Tensor, rows: Rows) -> None:
        """Remember whose sequences are packed into a tensor."""
        self._packed[id(tensor)] = (weakref.ref(tensor), rows)

    def of(self, tensor: object) -> Rows | None:
        """The places of a tensor's rows, where it is made of a selection."""
        reference, rows = self._known.get(id(tensor), (None, None))
        return rows if reference is not None and reference() is tensor else None

    def follow(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Note whose the rows of a call's result are."""
        if (self._known or function in _SELECTING) and self.num_inputs and self.axis is not None:
            with suppress(RuntimeError, IndexError, TypeError, ValueError):  # a kind of tensor with rules of its own
                self._follow(function, args, kwargs, result)

    def _follow(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        if function in _SELECTING:
            if args and isinstance(args[0], Tensor) and not isinstance(args[0], torch.nn.Parameter):
                self._select(function, args, kwargs, result)
        elif function is _PACK:
            rows = self.of(args[0])
            if rows is not None:
                self.note_packed(result[0], rows)
        elif self._known and function not in _TURNING:
            self._pass_on(function, args, kwargs, result)

    def _select(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Perform a selection on the places of the rows."""
        source, leading = args[0], 1
        if function in _INDEXING:
            index, leading = _leading_index(args[1])
            if index is None:
                if isinstance(result, Tensor) and result.dim() and len(result) == len(source):
                    self._pass_on(function, args, kwargs, result)
                return
            args = (source, index)
        elif _dim_of(function, args, kwargs) != 0:
            self._pass_on(function, args, kwargs, result)
            return
        rows = self.of(source) or self._of_batch(source, leading)
        if rows is None or rows.places.dim() < leading:
            return
        with torch.no_grad(), torch._C.DisableTorchFunction():
            picked = function(rows.places, *args[1:], **kwargs)
        for part, places in zip(tensors_in(result), tensors_in(picked), strict=False):
            self._note(part, Rows(places, rows.positions))

    def _of_batch(self, tensor: Tensor, leading: int) -> Rows | None:
        """The places of a whole batch's rows: its inputs, or its inputs and positions, flattened or not."""
        assert self.num_inputs is not None
        count, size = self.num_inputs, len(tensor) if tensor.dim() else 0
        if not size:
            return None
        axes = tensor.dim() - int(tensor.is_floating_point() or tensor.is_complex())  # but for features
        if self.axis == 0 and size == count:
            positions = tensor.shape[1] if axes > 1 else 1
            places = torch.arange(count * positions, device=tensor.device).view(count, positions)
            return Rows(places if axes > 1 else places[:, 0], positions)
        if self.axis == 1 and leading == 2 and tensor.shape[1] == count:
            return Rows(torch.arange(size * count, device=tensor.device).view(count, size).T, size)
        if size % count == 0 and leading == 1:
            positions = size // count
            places = torch.arange(size, device=tensor.device)
            turned = places.view(count, positions).T.reshape(-1)
            return Rows(turned if self.axis == 1 else places, positions)
        return None

    def _pass_on(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        if function in _JOINING:
            self._join(args, kwargs, result)
            return
        given = list(tensors_in(args[:1] if function in _WRITING or function in _PRODUCTS else (args, kwargs)))
        rows = next((known for tensor in given if (known := self.of(tensor)) is not None), None)
        if rows is None:
            return
        for value in tensors_in(result):
            if not value.dim():
                continue
            if len(value) == len(rows.places):
                self._note(value, rows)
            elif rows.places.dim() == 2 and len(value) == rows.places.numel():
                self._note(value, Rows(rows.places.flatten(), rows.positions))

    def _join(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        parts = list(tensors_in(args[:1])) or list(tensors_in(kwargs.get("tensors", ())))
        known = [self.of(part) for part in parts]
        told = [rows for rows in known if rows is not None]
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        if dim != 0:
            if told and len(told[0].places) == len(result):
                self._note(result, told[0])
        elif len(told) == len(known) and len({(rows.positions, rows.places.shape[1:]) for rows in told}) == 1:
            self._note(result, Rows(torch.cat([rows.places for rows in told]), told[0].positions))

    def _note(self, tensor: Tensor, rows: Rows) -> None:
        self._known[id(tensor)] = (weakref.ref(tensor), rows)


def _dim_of(function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The axis along which a call picks, cuts or moves; ``None`` for several."""
    place = 1 if function in _PICKING or function in _FLIPS else 2
    given = args[place] if len(args) > place else next((kwargs[key] for key in ("dim", "dims") if key in kwargs), None)
    if isinstance(given, tuple | list):
        given = given[0] if len(given) == 1 else None
    elif len(args) > place + 1 and function in _FLIPS:
        return None
    return 0 if given is None and function in _CUTTING else given


def _leading_index(index: Any) -> tuple[Any, int]:
    """The part of an index that picks rows, and the axes that it takes; ``None`` where it keeps or drops whole axes."""
    items = index if isinstance(index, tuple) else (index,)
    if len(items) > 1 and items[0] is None:  # a new axis in front
        rest, leading = _leading_index(items[1:])
        return (None if rest is None else (None, *(rest if isinstance(rest, tuple) else (rest,)))), leading
    first = items[0] if items else None
    if isinstance(first, slice):
        return (None, 1) if first == slice(None) else (first, 1)
    if isinstance(first, list):
        return first, 1
    if not isinstance(first, Tensor) or first.dim() == 0:
        return None, 1
    if first.dtype in {torch.bool, torch.uint8}:
        return (first, first.dim()) if first.dim() <= 2 else (None, 1)
    second = items[1] if len(items) > 1 else None
    if isinstance(second, Tensor) and second.dim() == 1:
        return (first, second), 2
    return (first, 1) if first.dim() == 1 else (None, 1)
