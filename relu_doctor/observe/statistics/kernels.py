"""One pass over a pre-activation: per-unit numbers out, the activation itself let go."""

from __future__ import annotations

import torch
from torch import Tensor

from relu_doctor.observe.rectifiers.kinds import Rectifier
from relu_doctor.observe.statistics import fused, on_gpu, plain
from relu_doctor.observe.statistics.stats import NEVER, UnitStats
from relu_doctor.observe.statistics.tally import Tally

_ROWS = 255  # inputs that are counted at a time, in bytes


class CallSummary:
    """What one call of a rectifier leaves behind.

    Args:
        stats: all statistics but those that count inputs, which several calls of one forward share.
        fired: bool (inputs, units): whether any position of the input fired the unit.
        valid: bool (inputs,): inputs with at least one position that is no padding.

    Attributes:
        tally: the same as the compiled loops left it; ``None`` where they did not count, or once it was changed.
    """

    __slots__ = ("_fired", "_stats", "_valid", "tally")

    def __init__(self, stats: UnitStats, fired: Tensor, valid: Tensor) -> None:
        self._stats: UnitStats | None = stats
        self._fired: Tensor | None = fired
        self._valid: Tensor | None = valid
        self.tally: Tally | None = None

    @classmethod
    def of(cls, tally: Tally) -> CallSummary:
        """A summary that is made into tensors only where someone asks for them."""
        summary = cls.__new__(cls)
        summary._stats = summary._fired = summary._valid = None
        summary.tally = tally
        return summary

    @property
    def stats(self) -> UnitStats:
        """The statistics, which may be replaced one by one."""
        if self._stats is None:
            assert self.tally is not None
            self._stats, self._fired, self._valid = self.tally.stats(), self.fired, self.valid
            self.tally = None  # what is changed from now on is the tensors
        return self._stats

    @property
    def fired(self) -> Tensor:
        """Whether any position of an input fired a unit: bool (inputs, units)."""
        if self._fired is not None:
            return self._fired
        assert self.tally is not None
        return torch.from_numpy(self.tally.fired).view(torch.bool)

    @fired.setter
    def fired(self, fired: Tensor) -> None:
        _ = self.stats
        self._fired = fired

    @property
    def valid(self) -> Tensor:
        """Inputs with at least one position that is no padding: bool (inputs,)."""
        if self._valid is not None:
            return self._valid
        assert self.tally is not None
        if self.tally.valid is None:
            return torch.ones(len(self.tally.fired), dtype=torch.bool)
        return torch.from_numpy(self.tally.valid)

    def put_output(self, magnitude: Tensor) -> None:
        """Set the summed absolute post-activation per unit."""
        if self.tally is not None:
            self.tally.put_output(magnitude)
        else:
            self.stats.post_abs_sum = magnitude


def summarize(
    pre: Tensor,
    rectifier: Rectifier,
    valid: Tensor | None = None,
    *,
    least: bool = False,
    compiled: bool | None = None,
) -> CallSummary:
    """Reduce one call's pre-activation to statistics.

    Args:
        pre: (inputs, units, positions), any floating dtype; summed in float32 or wider.
        rectifier: decides what fires. Where it clips, the output's statistics follow and are had as well.
        valid: bool (inputs, positions), False where there is padding.
        least: only what the verdict needs: which inputs fired, the maximum, and how many inputs were not finite.
        compiled: whether the compiled loops are wanted; by default where a call is large enough to load them for.
    """
    num_inputs, num_units, _ = pre.shape
    if pre.numel() == 0:
        nothing = torch.zeros(num_inputs, num_units, dtype=torch.bool, device=pre.device)
        return CallSummary(UnitStats.empty(num_units, pre.device), nothing, nothing.any(1))
    reduced = None
    if pre.numel() >= fused.LARGE if compiled is None else compiled:
        geometry = fused.geometry_of(pre)
        if geometry is not None:
            return CallSummary.of(fused.reduce(pre.data_ptr(), geometry, rectifier, valid, least=least))
        reduced = on_gpu.reduce(pre, rectifier, valid, least=least)
    stats, fired = reduced or plain.reduce(pre, rectifier.low, rectifier.high, valid, least=least)
    if not rectifier.clips:
        stats.post_abs_sum = UnitStats.empty(num_units, pre.device).post_abs_sum
    rows = torch.ones(num_inputs, dtype=torch.bool, device=pre.device) if valid is None else valid.any(1)
    return CallSummary(stats, fired, rows)


_IDENTITY = Rectifier("identity", -torch.inf, clips=True)


def output_magnitude(post: Tensor, valid: Tensor | None = None, *, compiled: bool | None = None) -> Tensor:
    """Summed absolute post-activation per unit, float64 (units,), of finite values that are no padding.

    Args:
        post: (inputs, units, positions), the output of a rectifier that does not clip.
        valid: bool (inputs, positions), False where there is padding.
        compiled: as for :func:`summarize`.
    """
    return summarize(post, _IDENTITY, valid, compiled=compiled).stats.post_abs_sum


def joined(summaries: list[CallSummary]) -> CallSummary:
    """One summary of several, each on inputs of its own."""
    if len(summaries) == 1:
        return summaries[0]
    stats = summaries[0].stats
    for summary in summaries[1:]:
        stats = stats.merge(summary.stats)
    return CallSummary(
        stats,
        torch.cat([summary.fired for summary in summaries]),
        torch.cat([summary.valid for summary in summaries]),
    )


def pool_rows(summary: CallSummary, num_inputs: int, owners: Tensor | None = None) -> CallSummary:
    """Rows of a selection, pooled to the inputs that they belong to.

    Args:
        summary: of a call, row by row.
        num_inputs: inputs in the batch.
        owners: int64 (rows,): the input of each; where it does not show, rows are pooled in their order.
    """
    rows = len(summary.fired)
    if owners is None:
        owners = torch.arange(rows, device=summary.fired.device) * num_inputs // max(rows, 1)
    fired = torch.zeros(num_inputs, summary.fired.shape[1], dtype=torch.int32, device=summary.fired.device)
    fired.index_add_(0, owners, summary.fired.int())
    valid = torch.zeros(num_inputs, dtype=torch.int32, device=summary.valid.device)
    valid.index_add_(0, owners, summary.valid.int())
    return CallSummary(summary.stats, fired > 0, valid > 0)


def count_inputs(
    stats: UnitStats, fired: Tensor, valid: Tensor, first_ordinal: int, *, least: bool = False
) -> UnitStats:
    """Fill in the statistics that count inputs.

    Args:
        stats: the merged statistics of every call that one forward made to the site.
        fired: bool (inputs, units), False for inputs that are all padding.
        valid: bool (inputs,).
        first_ordinal: ordinal of the first of these inputs.
        least: leave out the ordinals.
    """
    numbers, firsts, lasts = [], [], []
    for start in range(0, len(fired), _ROWS):
        marks = fired[start : start + _ROWS].view(torch.uint8)
        number = marks.sum(0, dtype=torch.uint8).long()
        numbers.append(number)
        if least:
            continue
        order = torch.arange(1, len(marks) + 1, dtype=torch.uint8, device=fired.device)[:, None]
        first = first_ordinal + start + len(marks) - (marks * order.flip(0)).amax(0).long()
        last = first_ordinal + start - 1 + (marks * order).amax(0).long()
        silent = number == 0
        firsts.append(first.masked_fill_(silent, NEVER))
        lasts.append(last.masked_fill_(silent, -1))
    stats.inputs = valid.sum().expand(stats.num_units)
    if numbers:
        stats.inputs_fired = torch.stack(numbers).sum(0)
    if firsts:
        stats.first_fired = torch.stack(firsts).amin(0)
        stats.last_fired = torch.stack(lasts).amax(0)
    return stats
