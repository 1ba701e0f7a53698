"""A rehearsal: a few inputs, run again with one input or the padding altered, to see which values are whose.

Which axis counts inputs, in which order flattened rows stand, and which positions are padding cannot be read off
shapes: a decoder may be as long as its encoder, a feature map of 3 x 3 has as many positions as nine tokens. So it is
tried: what changes when the first input is altered belongs to the first input, what changes when only padding is
altered is padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from relu_doctor.observe.inputs.counting import BY_ROWS, Counting, first_list, with_list
from relu_doctor.observe.inputs.feeding import map_tensors, tensors_in

SAMPLE = 3  # inputs of a rehearsal
Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """A few inputs of a batch, as forward arguments.

    Attributes:
        plain: as they are.
        altered: with the first input changed.
        altered_last: with the last input changed.
        padded: with padding positions changed; ``None`` where there is no padding.
        pointed: with the last position of the first input changed that is no padding.
        mask: bool (inputs, positions) of these inputs, where there is one.
        num_inputs: how many they are.
        axis: on which they lie.
    """

    plain: Inputs
    altered: Inputs
    altered_last: Inputs
    padded: Inputs | None
    pointed: Inputs | None
    mask: Tensor | None
    num_inputs: int
    axis: int | None = 0


def rehearse(
    inputs: Inputs, num_inputs: int | None, mask: Tensor | None, counting: Counting = BY_ROWS
) -> Rehearsal | None:
    """Pick a few inputs of a batch, the most padded ones where there is padding.

    Args:
        inputs: the arguments of a forward.
        num_inputs: inputs in the batch.
        mask: bool (inputs, positions), False for padding.
        counting: on which axis the inputs lie.

    Returns:
        ``None`` where the inputs cannot be told apart: tensors of different first axes (edges between nodes, say).
    """
    if counting.items:
        return _of_items(inputs, counting)
    tensors = [tensor for tensor in tensors_in(inputs) if tensor.dim()]
    if not num_inputs or not any(counting.has_inputs(tensor, num_inputs) for tensor in tensors):
        return None
    if counting.axis == 0 and not all(len(tensor) in {num_inputs, 1} for tensor in tensors):
        return None
    mask = mask if mask is not None and len(mask) == num_inputs else None
    padding = None if mask is None else (~mask).sum(1)
    some_padding = padding is not None and bool(padding.any())
    rows = torch.arange(min(SAMPLE, num_inputs))
    if padding is not None and some_padding:
        rows = torch.argsort(padding, descending=True, stable=True)[:SAMPLE].cpu()
    plain: Inputs = counting.pick(inputs, rows, num_inputs)
    own = None if mask is None else mask[rows.to(mask.device)]

    def changed(change: Callable[[Tensor], Tensor]) -> Inputs:
        def altered(tensor: Tensor) -> Tensor:
            if not counting.has_inputs(tensor, len(rows)):
                return tensor  # the same for all inputs
            return counting.inputs_first(change(counting.inputs_first(tensor))).contiguous()

        args, kwargs = plain
        kept = {key: value if "mask" in key else map_tensors(value, altered) for key, value in kwargs.items()}
        return map_tensors(args, altered), kept

    padded = pointed = None
    if own is not None and some_padding:
        keep = torch.ones_like(own)
        keep[0, last_position(own)] = False
        padded = changed(lambda tensor: _alter_where_not(tensor, own))
        pointed = changed(lambda tensor: _alter_where_not(tensor, keep))
    last = changed(lambda tensor: _alter_first(tensor.flip(0)).flip(0))
    return Rehearsal(plain, changed(_alter_first), last, padded, pointed, own, len(rows), counting.axis)


def _of_items(inputs: Inputs, counting: Counting) -> Rehearsal | None:
    """The first few tensors of a list that is passed; ``None`` where there is none, or a single one."""
    count = min(SAMPLE, counting.num_inputs(inputs) or 0)
    plain: Inputs = counting.pick(inputs, slice(count), count)
    items = first_list(plain)
    if items is None or count < 2:
        return None
    first: Inputs = with_list(plain, items, [_altered(items[0]), *items[1:]])
    last: Inputs = with_list(plain, items, [*items[:-1], _altered(items[-1])])
    return Rehearsal(plain, first, last, None, None, None, count)


def altered_one_by_one(inputs: Inputs, num_inputs: int, counting: Counting) -> list[Inputs | None]:
    """The inputs with one tensor altered, for each that has a value per input, in the order of ``tensors_in``.

    Returns:
        ``None`` for a tensor that cannot be altered: it is the same for all inputs.
    """
    found: list[Inputs | None] = []
    for place, tensor in enumerate(tensors_in(inputs)):
        if counting.has_inputs(tensor, num_inputs):
            other = counting.inputs_first(_altered(counting.inputs_first(tensor))).contiguous()
            found.append(None if torch.equal(other, tensor) else _with(inputs, place, other))
    return found


def _altered(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.bool:
        return ~tensor
    return 1 - 2 * tensor if tensor.is_floating_point() or tensor.is_complex() else tensor.roll(1, 0)


def _with(inputs: Inputs, place: int, other: Tensor) -> Inputs:
    """The inputs with another tensor in one place."""
    places = count()
    changed: Inputs = map_tensors(inputs, lambda tensor: other if next(places) == place else tensor)
    return changed


def last_position(mask: Tensor) -> int:
    """The last position of the first input that is no padding; 0 where all is."""
    positions = mask[0].nonzero()
    return int(positions[-1]) if len(positions) else 0


def _alter_first(tensor: Tensor) -> Tensor:
    """Other values in the first row: valid ones for whole numbers, which may be indices."""
    if not tensor.dim() or not len(tensor) or tensor.dtype == torch.bool:
        return tensor
    altered = tensor.clone()
    if tensor.is_floating_point() or tensor.is_complex():
        altered[0] = 1 - 2 * tensor[0]
    elif not torch.equal(tensor[-1], tensor[0]):
        altered[0] = tensor[-1]
    elif tensor.dim() > 1:
        altered[0] = tensor[0].flip(-1)
    return altered


def _alter_where_not(tensor: Tensor, mask: Tensor) -> Tensor:
    """Other values at the positions where a mask (inputs, positions) is False."""
    if tensor.shape[:2] != mask.shape or tensor.dtype == torch.bool:
        return tensor
    padding = ~mask.to(tensor.device)
    if tensor.is_floating_point():
        return torch.where(padding.reshape(padding.shape + (1,) * (tensor.dim() - 2)), 1 - 2 * tensor, tensor)
    known = tensor.flatten().unique()
    other = torch.where(tensor == known[0], known[-1], known[0])
    return torch.where(padding.reshape(padding.shape + (1,) * (tensor.dim() - 2)), other, tensor)


def differs(one: Tensor, other: Tensor) -> Tensor:
    """Where values differ; NaN is like NaN."""
    return (one != other) & ~(torch.isnan(one) & torch.isnan(other))
