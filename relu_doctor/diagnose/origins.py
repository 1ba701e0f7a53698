"""Origin: how a unit got there, so far as files tell. A first learning-rate finding from optimizer state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Ratios = Mapping[str, NDArray[np.float64]]


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
        between: the same from an earlier checkpoint of the run to this one, over all steps between.
        earlier: what the earlier checkpoint is called, empty where none was given.
        steps_between: updates between the two, where the files say.
        newly_silent: per ``site_id``, bool (units,): fired in the earlier checkpoint, silent in this one.
    """

    learning_rates: tuple[float, ...] = ()
    optimizer: str = ""
    last_update: Ratios = field(default_factory=dict)
    full_step: Ratios = field(default_factory=dict)
    between: Ratios = field(default_factory=dict)
    earlier: str = ""
    steps_between: int | None = None
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
        moved_silent, moved_live: since the earlier checkpoint; of silent units those that fell silent since.
        newly_silent: how many fired in the earlier checkpoint and no longer do.
        born_silent: how many were silent in both.
    """

    last_silent: float
    last_live: float
    full_silent: float
    moved_silent: float
    moved_live: float
    newly_silent: int
    born_silent: int

    def fit(self, steps: int | None, high: float, healthy: float) -> Fit:
        """Hold the ratios against thresholds.

        A dead unit no longer moves, and a run that has converged or collapsed hardly does, so that a small last update
        says little of the past. Net movement over many steps is at least what they made together on average.

        Args:
            steps: updates since the earlier checkpoint.
            high: over this, one update is large.
            healthy: about this is usual.
        """
        average = [moved / steps for moved in (self.moved_silent, self.moved_live) if steps]
        if any(ratio > high for ratio in (self.last_live, *average)) or self.full_silent > 10 * high:
            return Fit.CONSISTENT
        if self.born_silent and not self.newly_silent:
            return Fit.NOT_CONSISTENT
        seen = [ratio for ratio in (self.last_live, *average) if np.isfinite(ratio)]
        if seen and max(seen) <= 3 * healthy and self.last_live > 1e-3 * healthy:
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
        newly_silent=num_newly,
        born_silent=sum(int(silent[key].sum()) for key in newly) - num_newly,
    )


def _median(ratios: Ratios, chosen: Mapping[str, NDArray[np.bool_]]) -> float:
    values = [ratios[key][chosen[key]] for key in ratios if key in chosen and len(ratios[key]) == len(chosen[key])]
    together = np.concatenate(values) if values else np.empty(0)
    finite = together[np.isfinite(together)]
    return float(np.median(finite)) if len(finite) else float("nan")
