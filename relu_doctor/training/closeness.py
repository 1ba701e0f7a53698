"""CloseLook: units that fall silent together are seen in the gradients, and then looked at step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from relu_doctor.observe.gradients import Array, GradientWatch
from relu_doctor.observe.sites import ActivationSite
from relu_doctor.observe.statistics.stats import UnitStats
from relu_doctor.training.alerts import WAVE_SHARE, WAVE_UNITS, Wave
from relu_doctor.training.maturity import Maturity

_USUAL = 0.2  # weight of the newest step in what is usual


class CloseLook:
    """When to look closely, and what that showed.

    Attributes:
        since: the step since which every one is observed; ``None`` where none is.
    """

    def __init__(self) -> None:
        self.since: int | None = None
        self._first_ordinal = 0
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

    def begin(self, step: int, first_ordinal: int) -> None:
        """Every step from one on is observed.

        Args:
            step: the first of them.
            first_ordinal: of its first input.
        """
        self.since, self._first_ordinal = step, first_ordinal

    def end(
        self,
        sites: Sequence[ActivationSite],
        stats: Mapping[str, UnitStats],
        watch: GradientWatch,
        num_inputs: int,
        learning_rates: Mapping[str, float],
        maturity: Maturity,
        step: int,
    ) -> list[Wave]:
        """Enough was observed: which units fell silent together.

        Args:
            sites: all.
            stats: of the window so far.
            watch: knows when each unit had its last gradient.
            num_inputs: the ordinal of the next input.
            learning_rates: as they are.
            maturity: which units are exempt.
            step: that is being made.
        """
        since, self.since = self.since, None
        waves = []
        for site in sites:
            span, here = watch.span(site.site_id), stats.get(site.site_id)
            inputs = num_inputs - self._first_ordinal
            if span is None or here is None or inputs <= 0:
                continue
            before = watch.last_fired[span].cpu()
            silent = (here.last_fired.cpu() < self._first_ordinal) & (before >= 0)
            silent &= before <= (since or 0)  # others of several processes may have seen it fire
            silent &= ~maturity.exempt(site, step)
            updates, counts = torch.unique(before[silent], return_counts=True)
            if len(updates):
                most = int(counts.argmax())
                waves.append(Wave(site, int(updates[most]), int(counts[most]), inputs, learning_rates))
        return [wave for wave in waves if wave.is_large]
