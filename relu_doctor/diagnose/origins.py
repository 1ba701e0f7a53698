"""Origin: how a unit got there, so far as files tell. A first learning-rate finding from optimizer state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Ratios = Mapping[str, NDArray[np.float64]]
_FULL_STEP = 0.15  # of the weights: in a small trial deaths of 30-44 % came with 0.17 and more (Adam) [H]


@dataclass(frozen=True, slots=True, eq=False)
class LearningRateEvidence:
    """What files record about how far the weights of each unit moved.

    Attributes:
        learning_rates: of the optimizer's parameter groups.
        optimizer: its family, for reading (``Adam-like``, ``SGD``).
        last_update: per ``site_id``, size of each unit's last update over the norm of its weights, float64 (units,),
            NaN where unknown; as the optimizer's state implies it.
        full_step: the same of an update by the learning rate in every weight, which is what Adam makes while
            gradients agree from step to step, the first step always (Kingma and Ba 2015); empty for other optimizers.
        between: the same from one checkpoint of the run to the next: from the last in which the unit fired, for those
            that fell silent, else from the latest before this one.
        per_update: ``between`` over the updates in that stretch, where the files say how many.
        earlier: what the earlier checkpoints are called, empty where none was given.
        from_start: the earliest of them is from before the first update.
        at_start: this checkpoint itself is.
        newly_silent: per ``site_id``, bool (units,): fired in an earlier checkpoint, silent in this one.
    """

    learning_rates: tuple[float, ...] = ()
    optimizer: str = ""
    last_update: Ratios = field(default_factory=dict)
    full_step: Ratios = field(default_factory=dict)
    between: Ratios = field(default_factory=dict)
    per_update: Ratios = field(default_factory=dict)
    earlier: str = ""
    from_start: bool = False
    at_start: bool = False
    newly_silent: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)


class Fit(StrEnum):
    """Whether a too high learning rate fits what the files record."""

    CONSISTENT = "consistent with a too high learning rate"
    NOT_CONSISTENT = "not consistent with a too high learning rate"
    UNDECIDED = "the files do not show whether the learning rate was too high"


@dataclass(frozen=True, slots=True)
class UpdateComparison:
    """Update-to-weight ratios of silent units beside those of their live neighbours; medians, NaN where unknown.

    Attributes:
        last_silent, last_live: the last update.
        full_silent: an Adam update of full size, on the weights at which the silent units came to rest.
        moved_silent, moved_live: from one checkpoint to the next; of silent units those that fell silent.
        rate_silent, rate_live: the same per update, on average.
        newly_silent: how many fired in an earlier checkpoint and no longer do.
        born_silent: how many were silent in all.
    """

    last_silent: float
    last_live: float
    full_silent: float
    moved_silent: float
    moved_live: float
    rate_silent: float
    rate_live: float
    newly_silent: int
    born_silent: int

    def fit(self, evidence: LearningRateEvidence, high: float, healthy: float) -> Fit:
        """Hold the ratios against thresholds.

        A dead unit no longer moves, and a run that has converged or collapsed hardly does, so that a small last update
        says little of the past. Net movement over many steps is at least what they made together on average.

        Args:
            evidence: what the ratios are from.
            high: over this, one update is large.
            healthy: about this is usual.
        """
        if evidence.at_start or (evidence.from_start and not self.newly_silent):
            return Fit.NOT_CONSISTENT  # silent before the first update
        rates = (self.last_live, self.rate_silent, self.rate_live)
        if any(ratio > high for ratio in rates) or self.full_silent > _FULL_STEP:
            return Fit.CONSISTENT
        seen = [ratio for ratio in rates if np.isfinite(ratio)]
        moving = self.last_live > 1e-3 * healthy or not np.isfinite(self.last_live)
        known = self.newly_silent or not evidence.earlier
        if seen and max(seen) <= 3 * healthy and moving and known:
            return Fit.NOT_CONSISTENT
        return Fit.UNDECIDED


def compare_updates(evidence: LearningRateEvidence, silent: Mapping[str, NDArray[np.bool_]]) -> UpdateComparison:
    """Put the updates of silent units beside those of live ones, over all sites.

    Args:
        evidence: from the files.
        silent: per ``site_id``, bool (units,).
    """
    newly = {key: flags & silent[key] for key, flags in evidence.newly_silent.items() if key in silent}
    live = {key: ~flags for key, flags in silent.items()}
    num_newly = sum(int(flags.sum()) for flags in newly.values())
    return UpdateComparison(
        last_silent=_median(evidence.last_update, silent),
        last_live=_median(evidence.last_update, live),
        full_silent=_median(evidence.full_step, silent),
        moved_silent=_median(evidence.between, newly),
        moved_live=_median(evidence.between, live),
        rate_silent=_median(evidence.per_update, newly),
        rate_live=_median(evidence.per_update, live),
        newly_silent=num_newly,
        born_silent=sum(int(silent[key].sum()) for key in newly) - num_newly,
    )


def _median(ratios: Ratios, chosen: Mapping[str, NDArray[np.bool_]]) -> float:
    values = [ratios[key][chosen[key]] for key in ratios if key in chosen and len(ratios[key]) == len(chosen[key])]
    together = np.concatenate(values) if values else np.empty(0)
    finite = together[np.isfinite(together)]
    return float(np.median(finite)) if len(finite) else float("nan")
