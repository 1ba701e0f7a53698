"""One pass over a pre-activation: per-unit numbers out, the activation itself let go."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from relu_doctor.observe import fused
from relu_doctor.observe.rectifiers import Rectifier
from relu_doctor.observe.stats import NEVER, UnitStats

_WIDE = {torch.float32, torch.float64}


@dataclass(slots=True)
class CallSummary:
    """What one call of a rectifier leaves behind.

    Attributes:
        stats: all statistics but those that count inputs, which several calls of one forward share.
        fired: bool (inputs, units): whether any position of the input fired the unit.
        valid: bool (inputs,): inputs with at least one position that is no padding.
    """

    stats: UnitStats
    fired: Tensor
    valid: Tensor


def summarize(pre: Tensor, rectifier: Rectifier, valid: Tensor | None = None) -> CallSummary:
    """Reduce one call's pre-activation to every statistic.

    Args:
        pre: (inputs, units, positions), any floating dtype; read in float32 or wider.
        rectifier: decides what fires.
        valid: bool (inputs, positions), False where there is padding.
    """
    num_inputs, num_units, num_positions = pre.shape
    pre = _widened(pre)
    stats = UnitStats.empty(num_units, pre.device)
    if pre.numel() == 0:
        return _nothing_seen(stats, num_inputs)
    reduced = fused.reduce(pre, rectifier.low, rectifier.high) if valid is None else None
    if reduced is not None:
        return _from_reduced(stats, reduced, num_inputs * num_positions)
    fires = rectifier.fired(pre)
    highest, lowest = pre.amax(2), pre.amin(2)
    if valid is None and _all_finite(highest, lowest):
        seen = torch.full((num_inputs, num_units), num_positions, dtype=torch.int64, device=pre.device)
        row_mean, row_squares = _moments(pre)
    else:
        finite = torch.isfinite(pre)
        present = torch.ones_like(finite) if valid is None else valid[:, None, :].expand_as(finite)
        stats.non_finite_values = (~finite & present).sum((0, 2))
        counted = finite & present
        fires = fires & counted  # an infinity is no firing: it is told as non-finite
        seen = counted.sum(2)
        highest = torch.where(counted, pre, -torch.inf).amax(2)
        lowest = torch.where(counted, pre, torch.inf).amin(2)
        row_mean = torch.where(counted, pre, 0).double().sum(2) / seen.clamp_min(1)
        row_squares = torch.where(counted, (pre - row_mean[:, :, None]) ** 2, 0).sum(2)
    fired_positions = fires.view(torch.uint8).sum(2, dtype=torch.int32)
    stats.positions = seen.sum(0)
    stats.positions_fired = fired_positions.sum(0, dtype=torch.int64)
    stats.pre_max, stats.pre_min = highest.amax(0).double(), lowest.amin(0).double()
    stats.pre_mean = (row_mean * seen).sum(0) / stats.positions.clamp_min(1)
    stats.pre_squares = (row_squares + (row_mean - stats.pre_mean) ** 2 * seen).sum(0)
    return CallSummary(stats, fired_positions > 0, _rows(num_inputs, valid, pre.device))


def _from_reduced(stats: UnitStats, reduced: fused.Reduced, positions: int) -> CallSummary:
    """What the fast kernel found, as a summary; sums of squares are taken in float64, where they hardly cancel."""
    stats.positions = torch.full_like(stats.positions, positions)
    stats.positions_fired = reduced.positions_fired
    stats.pre_max, stats.pre_min = reduced.highest, reduced.lowest
    stats.pre_mean = reduced.total / positions
    stats.pre_squares = (reduced.squares - reduced.total * stats.pre_mean).clamp_min(0)
    return CallSummary(stats, reduced.fired, _rows(len(reduced.fired), None, stats.positions.device))


def output_magnitude(post: Tensor, valid: Tensor | None = None) -> Tensor:
    """Summed absolute post-activation per unit, float64 (units,), of finite values that are no padding."""
    values = _widened(post)
    if valid is not None:
        values = torch.where(valid[:, None, :], values, 0)
    on_cpu = values.device.type == "cpu"
    if not on_cpu:
        values = torch.where(torch.isfinite(values), values, 0)
    total: Tensor = torch.linalg.vector_norm(values, ord=1, dim=2).double().sum(0)
    if on_cpu and not bool(torch.isfinite(total).all()):
        return output_magnitude(torch.where(torch.isfinite(values), values, 0))
    return total


def summarize_minimal(pre: Tensor, rectifier: Rectifier, valid: Tensor | None = None) -> CallSummary:
    """Reduce one call to what the verdict needs: which inputs fired, the maximum, and whether all was finite.

    Arguments are those of :func:`summarize`. Non-finite values are counted once per input, by its maximum.
    """
    num_inputs, num_units, _ = pre.shape
    pre = _widened(pre)
    stats = UnitStats.empty(num_units, pre.device)
    if pre.numel() == 0:
        return _nothing_seen(stats, num_inputs)
    if valid is not None:
        pre = torch.where(valid[:, None, :], pre, -torch.finfo(pre.dtype).max)
    highest = pre.amax(2)
    finite = torch.isfinite(highest)
    stats.non_finite_values = (~finite).sum(0)
    stats.pre_max = torch.where(finite, highest, -torch.inf).amax(0).double()
    fired = highest > rectifier.low if rectifier.high == torch.inf else rectifier.fired(pre).any(2)
    return CallSummary(stats, fired, _rows(num_inputs, valid, pre.device))


def _widened(values: Tensor) -> Tensor:
    return values if values.dtype in _WIDE else values.float()


def _rows(num_inputs: int, valid: Tensor | None, device: torch.device) -> Tensor:
    return torch.ones(num_inputs, dtype=torch.bool, device=device) if valid is None else valid.any(1)


def _nothing_seen(stats: UnitStats, num_inputs: int) -> CallSummary:
    device = stats.inputs.device
    fired = torch.zeros(num_inputs, stats.num_units, dtype=torch.bool, device=device)
    return CallSummary(stats, fired, torch.zeros(num_inputs, dtype=torch.bool, device=device))


def _all_finite(highest: Tensor, lowest: Tensor) -> bool:
    """Whether extremes show that every value is finite; on a device the answer is no, which needs no host sync."""
    return highest.device.type == "cpu" and bool(torch.isfinite(highest).all() & torch.isfinite(lowest).all())


def _moments(pre: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and summed squared deviation over positions, float64 (inputs, units).

    Sums of squares cost one fast pass but cancel where the mean is large beside the spread: those units are read again.
    """
    positions = pre.shape[2]
    if positions == 1:
        return pre[:, :, 0].double(), torch.zeros((), dtype=torch.float64, device=pre.device)
    mean = pre.sum(2).double() / positions
    norm = torch.linalg.vector_norm(pre, dim=2).double()
    squares = norm**2 - mean**2 * positions
    cancelled = (squares < 0.5 * norm**2).any(0)
    if pre.device.type != "cpu" or bool(cancelled.any()):
        units = cancelled.nonzero().flatten() if pre.device.type == "cpu" else slice(None)
        exact, own = torch.var_mean(pre[:, units], 2, correction=0)
        squares[:, units], mean[:, units] = exact.double() * positions, own.double()
    return mean, squares


def pool_rows(summary: CallSummary, num_inputs: int) -> CallSummary:
    """Rows of which it does not show whose they are, pooled in their order to at most so many inputs."""
    rows = len(summary.fired)
    owner = torch.arange(rows, device=summary.fired.device) * num_inputs // rows
    fired = torch.zeros(num_inputs, summary.fired.shape[1], dtype=torch.int32, device=summary.fired.device)
    fired.index_add_(0, owner, summary.fired.int())
    valid = torch.zeros(num_inputs, dtype=torch.int32, device=summary.valid.device)
    valid.index_add_(0, owner, summary.valid.int())
    return CallSummary(summary.stats, fired > 0, valid > 0)


def count_inputs(stats: UnitStats, fired: Tensor, valid: Tensor, first_ordinal: int) -> UnitStats:
    """Fill in the statistics that count inputs.

    Args:
        stats: the merged statistics of every call that one forward made to the site.
        fired: bool (inputs, units).
        valid: bool (inputs,).
        first_ordinal: ordinal of the first of these inputs.
    """
    ordinals = torch.arange(first_ordinal, first_ordinal + len(fired), device=fired.device)[:, None]
    stats.inputs = valid.sum().expand(fired.shape[1]).clone()
    stats.inputs_fired = fired.sum(0)
    if len(fired):
        stats.first_fired = torch.where(fired, ordinals, NEVER).amin(0)
        stats.last_fired = torch.where(fired, ordinals, -1).amax(0)
    return stats
