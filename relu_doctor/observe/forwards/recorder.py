"""Recorder: measures rectifier calls and keeps what one forward leaves behind, until it is committed or let go."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from relu_doctor.observe.forwards.layout import Layout, Sample, Seen, layout_of_rows, read_layout
from relu_doctor.observe.forwards.outputs import OutputRows
from relu_doctor.observe.forwards.pieces import Arrangement
from relu_doctor.observe.forwards.registry import CallRegistry, Reading
from relu_doctor.observe.inputs.feeding import sent
from relu_doctor.observe.inputs.owners import Rows
from relu_doctor.observe.sites import ActivationSite
from relu_doctor.observe.statistics import fused
from relu_doctor.observe.statistics.kernels import (
    CallSummary,
    count_inputs,
    joined,
    output_magnitude,
    pool_rows,
    summarize,
)
from relu_doctor.observe.statistics.stats import UnitStats
from relu_doctor.observe.statistics.tally import Ledger, Tally
from relu_doctor.terms import Statistics

_MOST_ARRANGEMENTS = 4096  # that are remembered: sequences come in many lengths


@dataclass(slots=True)
class Pending:
    """A rectifier call between its input and its output."""

    site: ActivationSite
    arrangement: Arrangement
    shape: torch.Size
    valid: Tensor | None
    summary: CallSummary

    @property
    def layout(self) -> Layout:
        """How the call's axes are read."""
        return self.arrangement.layout

    @property
    def tokens(self) -> bool:
        """Whether every position is evidence by itself."""
        return self.arrangement.tokens

    def arranged(self, values: Tensor) -> Tensor:
        """Values of the call's shape as (evidence, units, positions), as they were measured."""
        return torch.cat(list(self.arrangement.pieces(values, self.site)))


@dataclass(slots=True)
class Staged:
    """One site's statistics of one forward, not yet committed.

    Attributes:
        tally: as the compiled loops left them, while nothing else has a part in them.
        stats: the same as tensors.
        fired, valid: of the calls on one set of inputs, or of several.
    """

    tally: Tally | None = None
    stats: UnitStats | None = None
    fired: list[Tensor] = field(default_factory=list)
    valid: list[Tensor] = field(default_factory=list)

    def add(self, summary: CallSummary, *, others: bool) -> None:
        """Take in a call, on the same inputs as those before it, or on others."""
        tally = summary.tally
        if tally is not None and self.stats is None and self.tally is None:
            self.tally = tally
        elif tally is not None and self.tally is not None and self.tally.accepts(tally, others=others):
            self.tally.add(tally, others=others)
        else:
            if self.tally is not None:
                before, self.tally = CallSummary.of(self.tally), None
                self._add(before, others=others)
            self._add(summary, others=others)

    def _add(self, summary: CallSummary, *, others: bool) -> None:
        stats = summary.stats
        self.stats = stats if self.stats is None else self.stats.merge(stats)
        for index, fired in enumerate(() if others else self.fired):
            if fired.shape == summary.fired.shape:
                self.fired[index] = fired | summary.fired
                self.valid[index] = self.valid[index] | summary.valid
                return
        self.fired.append(summary.fired)
        self.valid.append(summary.valid)

    def added_to(self, before: UnitStats | None, first_ordinal: int, *, least: bool = False) -> UnitStats:
        """What was counted before, and this; compiled loops add in place."""
        if self.tally is not None:
            ledger = Ledger.of(before or UnitStats.empty(self.tally.num_units), self.tally)
            if ledger is not None:
                ledger.add(self.tally, first_ordinal)
                return ledger.stats
            self._add(CallSummary.of(self.tally), others=False)
        assert self.stats is not None
        fired, valid = torch.cat(self.fired), torch.cat(self.valid)
        fresh = count_inputs(self.stats, fired & valid[:, None], valid, first_ordinal, least=least)
        return fresh if before is None else before.merge(fresh)


class Recorder:
    """Reduces each call to numbers as it happens; no activation outlives its call, but for rows that are asked for.

    Args:
        known: what is known of the model's calls; remarks go there.
        reading: how the forward's inputs are counted.
        statistics: how much to measure.
        tokens: every position that is no padding is evidence by itself.
        samples: some rows of each site's outputs are kept.

    Attributes:
        outputs: those rows, per ``site_id``.
    """

    def __init__(
        self,
        known: CallRegistry,
        reading: Reading,
        statistics: Statistics,
        *,
        tokens: bool = False,
        samples: bool = False,
    ) -> None:
        self.known = known
        self.reading = reading
        self.least = statistics is Statistics.MINIMAL
        self.tokens = tokens
        self.outputs: dict[str, OutputRows] = {}
        self._samples = samples
        self._staged: dict[str, Staged] = {}

    def begin(self, site: ActivationSite, pre: Tensor, sample: Sample | None, rows: Rows | None = None) -> Pending:
        """Measure the input of a rectifier, which the call may overwrite.

        Args:
            site: that the call belongs to.
            pre: the pre-activation, detached.
            sample: the same call with fewer inputs.
            rows: the places of its rows, where they are a selection.
        """
        seen, num_inputs = self.known.seen.get(site.site_id), self.reading.num_inputs
        told = num_inputs == 1 or self.known.rows_told is True
        layout = None if rows is None else layout_of_rows(pre.shape, site, rows, told=told)
        if layout is None:
            arrangement, rows = self._remembered(site, pre, sample, seen), None
        else:
            arrangement = self._arrangement(pre, layout, site)
        layout = arrangement.layout
        valid = self._valid(arrangement, rows, seen, pre.device)
        summary = self._measured(arrangement, site, pre, valid)
        if self.tokens:
            return Pending(site, arrangement, pre.shape, valid, summary)
        if layout.owners is not None and num_inputs:
            summary = pool_rows(summary, num_inputs, layout.owners)
        elif layout.by_rows and num_inputs:
            most = min(num_inputs, -(-len(summary.fired) // self.reading.positions))
            if len(summary.fired) > most or rows is not None:
                summary = pool_rows(summary, most)
                if not self.reading.rehearsed:
                    self.known.note(
                        f"{site.base_name}: which rows belong to which input does not show; they are counted as no "
                        "more inputs than they must be of"
                    )
        return Pending(site, arrangement, pre.shape, valid, summary)

    def _remembered(self, site: ActivationSite, pre: Tensor, sample: Sample | None, seen: Seen | None) -> Arrangement:
        """How a call's values are arranged, as it was found out when the like was met first."""
        if pre.numel() >= fused.LARGE:
            self.known.compiles = True
        strides = pre.stride() if pre.layout is torch.strided else None
        key = (
            site.site_id, site.unit_axes, sample, seen, self.reading.num_inputs, self.known.compiles,
            pre.shape, strides, pre.dtype, pre.device,
        )  # fmt: skip
        found = self.known.arrangements.get(key)
        if found is None:
            if len(self.known.arrangements) >= _MOST_ARRANGEMENTS:
                self.known.arrangements.clear()
            layout = read_layout(pre.shape, site, self.reading.num_inputs, sample, seen)
            found = self.known.arrangements[key] = self._arrangement(pre, layout, site)
        return found

    def _arrangement(self, values: Tensor, layout: Layout, site: ActivationSite) -> Arrangement:
        return Arrangement.of(values, layout, site, tokens=self.tokens, compiled=self.known.compiles)

    def _valid(
        self, arrangement: Arrangement, rows: Rows | None, seen: Seen | None, device: torch.device
    ) -> Tensor | None:
        """Which of a call's positions are no padding, in the shape in which they are counted; ``None`` for all."""
        mask = self.reading.mask
        if mask is None:
            return None
        inputs, _, positions = arrangement.shape
        if self.tokens:
            inputs, positions = arrangement.layout.num_inputs, inputs // max(arrangement.layout.num_inputs, 1)
        if rows is not None:
            valid = rows.valid(mask, positions)
        elif seen is not None and seen.padded and mask.shape == (inputs, positions):
            valid = sent(mask.bool(), device)
        else:
            return None
        return valid.reshape(-1, 1) if self.tokens and valid is not None else valid

    def _measured(
        self, arrangement: Arrangement, site: ActivationSite, pre: Tensor, valid: Tensor | None
    ) -> CallSummary:
        if arrangement.geometry is not None and type(pre) is Tensor:
            return CallSummary.of(
                fused.reduce(pre.data_ptr(), arrangement.geometry, site.rectifier, valid, least=self.least)
            )
        summaries, first = [], 0
        for piece in arrangement.pieces(pre, site):
            own = None if valid is None else valid[first : first + len(piece)]
            summaries.append(summarize(piece, site.rectifier, own, least=self.least, compiled=self.known.compiles))
            first += len(piece)
        return joined(summaries)

    def end(self, pending: Pending, post: Any) -> None:
        """Take in a rectifier's output, of which the statistics do not follow from its input where it does not clip."""
        site, layout = pending.site, pending.layout
        if not isinstance(post, Tensor) or post.shape != pending.shape:
            return
        if self._samples:
            self._sample(pending, post.detach())
        if self.least or site.rectifier.clips:
            return
        post, first, total = post.detach(), 0, None
        for piece in self._arrangement(post, layout, site).pieces(post, site):
            own = None if pending.valid is None else pending.valid[first : first + len(piece)]
            more = output_magnitude(piece, own, compiled=self.known.compiles)
            total = more if total is None else total + more
            first += len(piece)
        if total is not None:
            pending.summary.put_output(total)

    def _sample(self, pending: Pending, post: Tensor) -> None:
        site = pending.site
        try:
            arrangement = self._arrangement(post, pending.layout, site)
            rows = self.outputs.setdefault(site.site_id, OutputRows())
            rows.take(arrangement.pieces(post, site), arrangement.shape, pending.valid)
        except Exception as error:  # noqa: BLE001  the other statistics do not depend on it
            self.outputs.pop(site.site_id, None)
            self.known.note(f"{site.base_name}: its outputs could not be sampled ({type(error).__name__}: {error})")

    def stage(self, pending: Pending) -> None:
        """Keep a call's numbers until the forward is committed."""
        staged = self._staged.setdefault(pending.site.site_id, Staged())
        seen = self.known.seen.get(pending.site.site_id)
        alone = seen is not None and seen.alone and len(pending.summary.fired) == 1
        staged.add(pending.summary, others=pending.tokens or alone)

    def commit(self, kept: MutableMapping[str, UnitStats]) -> None:
        """Add the forward to what is kept per ``site_id``."""
        for site_id, staged in self._staged.items():
            kept[site_id] = staged.added_to(kept.get(site_id), self.reading.first_ordinal, least=self.least)
