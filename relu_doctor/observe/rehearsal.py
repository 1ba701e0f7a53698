"""A rehearsal: a few inputs, run again with one input or the padding altered, to see which values are whose.

Which axis counts inputs, in which order flattened rows stand, and which positions are padding cannot be read off
shapes: a decoder may be as long as its encoder, a feature map of 3 x 3 has as many positions as nine tokens. So it is
tried: what changes when the first input is altered belongs to the first input, what changes when only padding is
altered is padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from relu_doctor.observe.feeding import map_tensors, tensors_in

SAMPLE = 3  # inputs of a rehearsal
Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """A few inputs of a batch, as forward arguments.

    Attributes:
        plain: as they are.
        altered: with the first input changed.
        padded: with padding positions changed; ``None`` where there is no padding.
        pointed: with the last position of the first input changed that is no padding.
        mask: bool (inputs, positions) of these inputs, where there is one.
        num_inputs: how many they are.
    """

    plain: Inputs
    altered: Inputs
    padded: Inputs | None
    pointed: Inputs | None
    mask: Tensor | None
    num_inputs: int


def rehearse(inputs: Inputs, num_inputs: int | None, mask: Tensor | None) -> Rehearsal | None:
    """Pick a few inputs of a batch, the most padded ones where there is padding.

    Returns:
        ``None`` where the inputs cannot be told apart: tensors of different first axes (edges between nodes, say).
    """
    lengths = {len(tensor) for tensor in tensors_in(inputs) if tensor.dim()}
    if not num_inputs or not lengths <= {num_inputs, 1} or num_inputs not in lengths:
        return None
    padding = None if mask is None else (~mask).sum(1)
    some_padding = padding is not None and bool(padding.any())
    rows = torch.arange(min(SAMPLE, num_inputs))
    if padding is not None and some_padding:
        rows = torch.argsort(padding, descending=True, stable=True)[:SAMPLE].cpu()

    def few(tensor: Tensor) -> Tensor:
        return tensor[rows.to(tensor.device)] if tensor.dim() and len(tensor) == num_inputs else tensor

    plain: Inputs = map_tensors(inputs, few)
    own = None if mask is None else mask[rows.to(mask.device)]
    padded = pointed = None
    if own is not None and some_padding:
        keep = torch.ones_like(own)
        keep[0, last_position(own)] = False
        padded = _changed(plain, lambda tensor: _alter_where_not(tensor, own))
        pointed = _changed(plain, lambda tensor: _alter_where_not(tensor, keep))
    return Rehearsal(plain, _changed(plain, _alter_first), padded, pointed, own, len(rows))


def last_position(mask: Tensor) -> int:
    """The last position of the first input that is no padding; 0 where all is."""
    positions = mask[0].nonzero()
    return int(positions[-1]) if len(positions) else 0


def _changed(inputs: Inputs, change: Any) -> Inputs:
    args, kwargs = inputs
    kept = {key: value if "mask" in key else map_tensors(value, change) for key, value in kwargs.items()}
    return map_tensors(args, change), kept


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
