"""Every statistic of a pre-activation in plain torch: on any device, and on CPUs where numba is not wanted.

Block by block, small enough that a block's several passes find it in the cache, and that what is set aside for them
stays far smaller than an activation. On devices nothing here waits for a result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from relu_doctor.observe.statistics.stats import UnitStats

BLOCK = 1 << 18  # values that are worked on at a time on a CPU
_DEVICE_BLOCK = 1 << 22  # the same elsewhere, where each call costs more and memory is faster
_WIDE = {torch.float32, torch.float64}


@dataclass(frozen=True, slots=True)
class _Rows:
    """One block, reduced over its positions, (rows, units) each; moments are ``None`` where they are not wanted."""

    seen: Tensor
    firings: Tensor
    non_finite: Tensor
    highest: Tensor
    lowest: Tensor
    mean: Tensor | None
    squares: Tensor | None
    outputs: Tensor | None


def reduce(
    pre: Tensor, low: float, high: float, valid: Tensor | None = None, *, least: bool = False
) -> tuple[UnitStats, Tensor]:
    """Reduce (inputs, units, positions), of any floating dtype and layout.

    Args:
        pre: not empty.
        low: lower edge of the open firing interval; the output is taken to be the value clipped to the interval.
        high: its upper edge.
        valid: bool (inputs, positions), False for padding.
        least: only the maximum, non-finite inputs and what fired.

    Returns:
        The statistics but for those that count inputs, and bool (inputs, units): whether any position fired.
    """
    inputs, units, positions = pre.shape
    single = positions == 1  # then statistics are taken over the inputs at once
    values = pre.transpose(0, 2) if single else pre
    marks = valid.transpose(0, 1) if single and valid is not None else valid
    fired = torch.zeros(inputs, units, dtype=torch.bool, device=pre.device)
    spoiled = torch.zeros_like(fired)
    parts: list[_Rows] = []
    scratch = torch.empty(0)
    for rows, places in _blocks(values):
        block = values[rows, :, places]
        block = block if block.dtype in _WIDE else block.float()
        if scratch.shape != block.shape or scratch.dtype != block.dtype:
            scratch = torch.empty_like(block)
        part, fires = _reduce_block(
            block, scratch, low, high, None if marks is None else marks[rows, places], least=least
        )
        parts.append(part)
        if single:
            fired[places] = fires[0].transpose(0, 1)
        else:
            fired[rows] |= part.firings > 0
        if least and not single:
            spoiled[rows] |= part.non_finite > 0
    if least:
        highest = torch.cat([part.highest for part in parts]).amax(0)
        spoiled_inputs = torch.cat([part.non_finite for part in parts]) if single else spoiled
        return _least_of(highest, spoiled_inputs.sum(0), pre.dtype), fired
    return _over_rows(parts), fired


def _least_of(highest: Tensor, spoiled: Tensor, dtype: torch.dtype) -> UnitStats:
    """The minimal statistics, held in few bytes: maxima, and how many inputs were not finite."""
    narrow = highest if dtype == torch.float64 else highest.float()
    return UnitStats.of(len(narrow), {"pre_max": narrow, "non_finite_values": spoiled.int()}, narrow.device)


def _blocks(values: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of the rows and of the positions; a block is never less than one position of every unit."""
    size = BLOCK if values.device.type == "cpu" else _DEVICE_BLOCK
    rows, units, positions = values.shape
    many = max(1, min(positions, size // units))
    few = max(1, size // (units * many))
    for first in range(0, rows, few):
        for place in range(0, positions, many):
            yield slice(first, min(first + few, rows)), slice(place, min(place + many, positions))


def _reduce_block(
    block: Tensor, scratch: Tensor, low: float, high: float, valid: Tensor | None, *, least: bool
) -> tuple[_Rows, Tensor]:
    """One block over its positions, and where it fires. The scratch is of its shape, and is written over."""
    highest, lowest = block.amax(2), block.amin(2)
    rows, units, positions = block.shape
    seen = torch.full((1, 1), positions, device=block.device).expand(rows, units)
    non_finite = torch.zeros(1, 1, dtype=torch.int64, device=block.device).expand(rows, units)
    dropped: Tensor | None = None
    if valid is not None or block.device.type != "cpu" or not _all_finite(highest, lowest):
        dropped = ~torch.isfinite(block)
        absent = torch.zeros_like(dropped) if valid is None else ~valid[:, None, :].expand_as(dropped)
        non_finite = (dropped & ~absent).sum(2)
        dropped |= absent
        seen = positions - dropped.sum(2)
        highest = torch.where(dropped, -torch.inf, block).amax(2)
        lowest = torch.where(dropped, torch.inf, block).amin(2)
    elif not least and _is_awkward(highest, lowest):
        block, scratch = block.double(), scratch.double()

    def sum_of(values: Tensor) -> Tensor:
        return (values if dropped is None else values.masked_fill_(dropped, 0)).sum(2)

    fires = block > low if high == torch.inf else (block > low) & (block < high)
    if dropped is not None:
        fires &= ~dropped
    firings = sum_of(scratch.copy_(fires)).long()
    if least:
        return _Rows(seen, firings, non_finite, highest.double(), lowest.double(), None, None, None), fires
    outputs = sum_of(torch.clamp(block, low, high, out=scratch).abs_()).double()
    number = seen.clamp_min(1)
    center = sum_of(scratch.copy_(block)) / number.to(block.dtype)
    torch.sub(block, center[:, :, None], out=scratch)
    rest = sum_of(scratch).double()
    squares = sum_of(scratch.square_()).double() - rest * rest / number
    mean = center.double() + rest / number
    return _Rows(seen, firings, non_finite, highest.double(), lowest.double(), mean, squares, outputs), fires


def _all_finite(highest: Tensor, lowest: Tensor) -> bool:
    return bool((torch.isfinite(highest) & torch.isfinite(lowest)).all())


def _is_awkward(highest: Tensor, lowest: Tensor) -> bool:
    """Whether squares in float32 would overflow or vanish."""
    if highest.dtype == torch.float64:
        return False
    spread = highest.double() - lowest
    largest = torch.maximum(highest.abs(), lowest.abs())
    return bool(((largest > 1e18) | ((spread > 0) & (spread < 1e-15))).any())


def _over_rows(parts: list[_Rows]) -> UnitStats:
    """Statistics over all rows of all blocks."""

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    seen, mean, highest = joined("seen"), joined("mean"), joined("highest").amax(0)
    positions = seen.sum(0)
    over_all = (mean * seen).sum(0) / positions.clamp_min(1)
    squares = joined("squares") + (mean - over_all) ** 2 * seen
    measured = {
        "positions": positions,
        "positions_fired": joined("firings").sum(0),
        "non_finite_values": joined("non_finite").sum(0),
        "pre_max": highest,
        "pre_min": joined("lowest").amin(0),
        "pre_mean": over_all,
        "pre_squares": squares.sum(0).clamp_min(0),
        "post_abs_sum": joined("outputs").sum(0),
    }
    return UnitStats.of(len(highest), measured, highest.device)
