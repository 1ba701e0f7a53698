"""Recorder: measures rectifier calls and keeps what one forward leaves behind, until it is committed or let go."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from relu_doctor.observe.kernels import (
    CallSummary,
    count_inputs,
    output_magnitude,
    pool_rows,
    summarize,
    summarize_minimal,
)
from relu_doctor.observe.layout import Layout, Sample, arrange, read_layout, valid_positions
from relu_doctor.observe.registry import CallRegistry, Reading
from relu_doctor.observe.sites import ActivationSite
from relu_doctor.observe.stats import UnitStats
from relu_doctor.terms import Statistics


@dataclass(slots=True)
class Pending:
    """A rectifier call between its input and its output."""

    site: ActivationSite
    layout: Layout
    shape: torch.Size
    valid: Tensor | None
    summary: CallSummary


@dataclass(slots=True)
class _Staged:
    """One site's statistics of one forward, not yet committed."""

    stats: UnitStats
    fired: list[Tensor] = field(default_factory=list)
    valid: list[Tensor] = field(default_factory=list)

    def add(self, summary: CallSummary) -> None:
        self.stats = self.stats.merge(summary.stats)
        for index, fired in enumerate(self.fired):
            if fired.shape == summary.fired.shape:
                self.fired[index] = fired | summary.fired
                self.valid[index] = self.valid[index] | summary.valid
                return
        self.fired.append(summary.fired)
        self.valid.append(summary.valid)

    def counted(self, first_ordinal: int) -> UnitStats:
        fired, valid = torch.cat(self.fired), torch.cat(self.valid)
        return count_inputs(self.stats, fired & valid[:, None], valid, first_ordinal)


class Recorder:
    """Reduces each call to numbers as it happens; no activation outlives its call.

    Args:
        known: what is known of the model's calls; remarks go there.
        reading: how the forward's inputs are counted.
        statistics: how much to measure.
    """

    def __init__(self, known: CallRegistry, reading: Reading, statistics: Statistics) -> None:
        self.known = known
        self.reading = reading
        self.statistics = statistics
        self._staged: dict[str, _Staged] = {}

    def begin(self, site: ActivationSite, pre: Tensor, sample: Sample | None) -> Pending:
        """Measure the input of a rectifier, which the call may overwrite.

        Args:
            site: that the call belongs to.
            pre: the pre-activation, detached.
            sample: the same call with fewer inputs.
        """
        seen = self.known.seen.get(site.site_id)
        layout = read_layout(pre.shape, site, self.reading.num_inputs, sample, seen)
        values = arrange(pre, layout, site)
        valid = valid_positions(self.reading.mask, values) if seen is not None and seen.padded else None
        if self.statistics is Statistics.FULL:
            summary = summarize(values, site.rectifier, valid)
        else:
            summary = summarize_minimal(values, site.rectifier, valid)
        if layout.by_rows and self.reading.num_inputs and len(summary.fired) > self.reading.num_inputs:
            summary = pool_rows(summary, self.reading.num_inputs)
            self.known.note(
                f"{site.base_name}: which rows belong to which input does not show; they are counted as at most "
                "the inputs of their batch"
            )
        return Pending(site, layout, pre.shape, valid, summary)

    def end(self, pending: Pending, post: Any) -> None:
        """Take in a rectifier's output."""
        if self.statistics is Statistics.FULL and isinstance(post, Tensor) and post.shape == pending.shape:
            values = arrange(post.detach(), pending.layout, pending.site)
            pending.summary.stats.post_abs_sum = output_magnitude(values, pending.valid)

    def stage(self, pending: Pending) -> None:
        """Keep a call's numbers until the forward is committed."""
        staged = self._staged.get(pending.site.site_id)
        if staged is None:
            device = pending.summary.fired.device
            staged = self._staged[pending.site.site_id] = _Staged(UnitStats.empty(pending.site.num_units, device))
        staged.add(pending.summary)

    def commit(self, kept: MutableMapping[str, UnitStats]) -> None:
        """Merge the forward into what is kept per ``site_id``."""
        for site_id, staged in self._staged.items():
            fresh = staged.counted(self.reading.first_ordinal)
            kept[site_id] = kept[site_id].merge(fresh) if site_id in kept else fresh
