"""CloseLook: units that fall silent together are seen in the gradients, and then looked at step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from relu_doctor.observe.gradients import Array, GradientWatch
from relu_doctor.observe.sites import ActivationSite
from relu_doctor.observe.statistics.stats import UnitStats
from relu_doctor.training.alerts import WAVE_SHARE, WAVE_UNITS, Wave
from relu_doctor.training.maturity import Maturity
from relu_doctor.training.seen import in_steps

_USUAL = 0.2  # weight of the newest step in what is usual


class CloseLook:
    """When to look closely, and what that showed.

    Attributes:
        since: the step since which every one is observed; ``None`` where none is.
    """

    def __init__(self) -> None:
        self.since: int | None = None
        self._first_ordinal = 0
        self._looked = -1  # when the last look began
        self._inputs: dict[str, int] = {}  # that each site had seen in its window when the look began
        self._before: dict[
            str, Tensor
        ] = {}  # of each site, when its units were observed to fire in windows that closed
        self._usual: Array | None = None  # per site that the gradients follow, the share that is silent as a rule

    def is_called_for(self, watch: GradientWatch) -> bool:
        """Whether more units of a site are without a gradient than as a rule; a GPU is not waited for."""
        shares = watch.shares()
        if shares is None:
            return False
        if self._usual is None or len(self._usual) != len(shares):
            self._usual = shares.copy()
            return False
        more, sizes = shares - self._usual, watch.sizes
        jump = more * sizes >= np.maximum(WAVE_SHARE * sizes, WAVE_UNITS)
        called_for = bool(jump.any())
        self._usual += np.where(jump, more, _USUAL * more) if called_for else _USUAL * more
        return called_for

    def begin(self, step: int, first_ordinal: int, stats: Mapping[str, UnitStats]) -> None:
        """Every step from one on is observed.

        Args:
            step: the first of them.
            first_ordinal: of its first input.
            stats: of the window so far.
        """
        self.since, self._first_ordinal = step, first_ordinal
        self._inputs = {site_id: _most_inputs(each) for site_id, each in stats.items()}

    def window_closed(self, stats: Mapping[str, UnitStats]) -> None:
        """Remember when units fired: per ``site_id`` what was observed in a window, in steps."""
        for site_id, each in stats.items():
            known = self._before.get(site_id)
            same = known is not None and len(known) == each.num_units
            self._before[site_id] = (
                torch.maximum(known, each.last_fired) if known is not None and same else each.last_fired
            )

    def end(
        self,
        sites: Sequence[ActivationSite],
        stats: Mapping[str, UnitStats],
        observed: Sequence[tuple[int, int]],
        watch: GradientWatch,
        maturity: Maturity,
        step: int,
    ) -> list[Wave]:
        """Enough was observed: which units fell silent together.

        Args:
            sites: all.
            stats: of the window so far.
            observed: first ordinal and step of what was observed in it.
            watch: knows when each unit had its last gradient.
            maturity: which units are exempt.
            step: that is being made.
        """
        since, self.since = self.since or 0, None
        ordinals = torch.tensor([ordinal for ordinal, _ in observed], dtype=torch.int64)
        steps = torch.tensor([at for _, at in observed], dtype=torch.int64)
        waves = []
        for site in sites:
            span, here = watch.span(site.site_id), stats.get(site.site_id)
            if span is None or here is None:
                continue
            inputs, before_it = _most_inputs(here), self._inputs.get(site.site_id, 0)
            inputs -= before_it if before_it <= inputs else 0  # a window may have closed in between
            if inputs <= 0:  # it was not called: a branch that is not taken any more
                continue
            fired = torch.maximum(watch.last_fired[span].cpu(), in_steps(here, ordinals, steps).last_fired)
            before = self._before.get(site.site_id)
            if before is not None and len(before) == len(fired):
                fired = torch.maximum(fired, before)
            silent = (here.last_fired.cpu() < self._first_ordinal) & (fired >= 0)
            silent &= fired <= since  # others of several processes may have seen it fire
            silent &= fired > self._looked  # those before were looked at then
            silent &= ~maturity.exempt(site, step)
            updates, counts = torch.unique(fired[silent], return_counts=True)
            if len(updates):
                most = int(counts.argmax())
                waves.append(Wave(site, int(updates[most]), int(counts[most]), inputs))
        self._looked = since
        return [wave for wave in waves if wave.is_large]


def _most_inputs(stats: UnitStats) -> int:
    return int(stats.inputs.max()) if stats.num_units else 0
