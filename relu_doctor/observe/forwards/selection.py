"""Selection: what fires where a top-k or a mask, and not the pre-activation alone, decides what goes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from relu_doctor.observe.forwards.recorder import Pending
from relu_doctor.observe.inputs.feeding import sent
from relu_doctor.observe.statistics.kernels import pool_rows

TOP_K = {torch.topk, Tensor.topk}


@dataclass(frozen=True, slots=True)
class Selection:
    """Which values of a tensor go on.

    Attributes:
        count: per call, int (inputs, units): how many positions of an input were selected; and the summed magnitude
            of what was selected, float64 (units,), or ``None`` where that is the rectifier's own.
    """

    count: Callable[[Pending], tuple[Tensor, Tensor | None]]

    @classmethod
    def by_mask(cls, mask: Tensor) -> Selection:
        """What a mask lets pass.

        Args:
            mask: bool, in the shape of the call or any other with the values in the same order.
        """

        def count(pending: Pending) -> tuple[Tensor, Tensor | None]:
            passed = pending.arranged(mask.detach().reshape(pending.shape))
            if pending.valid is not None:
                passed = passed & pending.valid[:, None, :]
            return passed.sum(2), None

        return cls(count)

    @classmethod
    def by_top_k(cls, shape: torch.Size, dim: int, result: Any, low: float) -> Selection:
        """What a top-k returned.

        Args:
            shape: of what it chose from: the call's shape, or another with the values in the same order.
            dim: along which axis it chose.
            result: its values and indices.
            low: values at most this do not fire.
        """
        values, indices = result[0].detach(), result[1].detach()

        def count(pending: Pending) -> tuple[Tensor, Tensor | None]:
            places = _places(shape, dim, indices).reshape(-1)
            chosen = values.reshape(-1)
            keep = chosen > low
            if pending.valid is not None or pending.tokens:
                mask = torch.zeros(shape.numel(), dtype=torch.bool, device=values.device)
                return cls.by_mask(mask.scatter_(0, places, keep)).count(pending)
            owners, units = _owners(places, pending)
            num_inputs, num_units = pending.layout.num_inputs, pending.site.num_units
            counts = torch.zeros(num_inputs * num_units, dtype=torch.int32, device=values.device)
            counts.scatter_add_(0, owners * num_units + units, keep.int())
            magnitude = torch.zeros(num_units, dtype=torch.float64, device=values.device)
            magnitude.scatter_add_(0, units, torch.where(keep, chosen, 0).double().abs())
            return counts.reshape(num_inputs, num_units), magnitude if low == -math.inf else None

        return cls(count)

    def apply(self, pending: Pending, *, also: bool = False) -> None:
        """Let a call fire where it was selected.

        Args:
            pending: the call.
            also: it fires as well where it was selected before.
        """
        counts, magnitude = self.count(pending)
        summary = pending.summary
        full = int(summary.stats.positions.shape[0]) > 0
        owners = None if pending.tokens else pending.layout.owners
        pooled = owners is not None or len(counts) != len(summary.fired)
        fired_before, positions_before = summary.fired, summary.stats.positions_fired
        summary.stats.positions_fired = counts.sum(0)
        if magnitude is not None and full:
            summary.stats.post_abs_sum = magnitude
        own = type(summary)(summary.stats, counts > 0, summary.valid.new_ones(len(counts)))
        summary.fired = pool_rows(own, len(summary.fired), owners).fired if pooled else own.fired
        if also:
            summary.fired = summary.fired | fired_before
            summary.stats.positions_fired = torch.maximum(summary.stats.positions_fired, positions_before)


@dataclass(frozen=True, slots=True)
class Choice:
    """What a top-k chose.

    Attributes:
        pre: what it chose from.
        values, indices: what it returned.
        dim: along which axis.
    """

    pre: Tensor
    values: Tensor
    indices: Tensor
    dim: int

    def selection(self, low: float) -> Selection:
        """What goes on where values at most ``low`` do not."""
        return Selection.by_top_k(self.pre.shape, self.dim, (self.values, self.indices), low)


def _places(shape: torch.Size, dim: int, indices: Tensor) -> Tensor:
    """Where chosen values lie in the flattened tensor: int64, in the shape of the indices."""
    if not shape:
        return indices
    dim %= len(shape)
    places = torch.zeros_like(indices)
    stride = 1
    for axis in reversed(range(len(shape))):
        if axis == dim:
            places = places + indices * stride
        else:
            view = [1] * len(shape)
            view[axis] = shape[axis]
            places = places + torch.arange(shape[axis], device=indices.device).reshape(view) * stride
        stride *= shape[axis]
    return places


def _owners(places: Tensor, pending: Pending) -> tuple[Tensor, Tensor]:
    """The input and the unit that each place of a call's flattened pre-activation belongs to."""
    coordinates: list[Tensor] = []
    rest = places
    for size in reversed(pending.shape):
        coordinates.insert(0, rest % size)
        rest = rest // size
    layout, site = pending.layout, pending.site
    units = torch.zeros_like(places)
    for axis in site.unit_axes:
        units = units * pending.shape[axis] + coordinates[axis]
    if site.grouping is not None:
        units = sent(site.grouping, places.device)[units]
    batch = layout.order[0]
    if batch in site.unit_axes:
        return torch.zeros_like(places), units
    row = coordinates[batch]
    if layout.split:
        row = row % layout.num_inputs if layout.interleaved else row // layout.split
    return row, units
