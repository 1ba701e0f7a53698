"""Origin: how a unit got there, so far as files tell. A first learning-rate finding from optimizer state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
        between: the same from an earlier checkpoint of the run to this one, summed over all steps between.
        earlier: what the earlier checkpoint is called, empty where none was given.
        steps_between: updates between the two, where the files say.
        newly_silent: per ``site_id``, bool (units,): fired in the earlier checkpoint, silent in this one.
    """

    learning_rates: tuple[float, ...] = ()
    optimizer: str = ""
    last_update: Ratios = field(default_factory=dict)
    between: Ratios = field(default_factory=dict)
    earlier: str = ""
    steps_between: int | None = None
    newly_silent: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class UpdateComparison:
    """Update-to-weight ratios of silent units beside those of their live neighbours.

    Attributes:
        silent, live: medians of the last update over the weights, NaN where unknown.
        silent_between, live_between: medians of the movement since the earlier checkpoint.
        per_step: the largest of ``live`` and the live movement per update; the regime of the run.
        newly_silent: units that fired in the earlier checkpoint and no longer do.
        born_silent: silent units that were silent in the earlier checkpoint as well.
    """

    silent: float
    live: float
    silent_between: float
    live_between: float
    per_step: float
    newly_silent: int
    born_silent: int


def compare_updates(evidence: LearningRateEvidence, silent: Mapping[str, NDArray[np.bool_]]) -> UpdateComparison:
    """Put the updates of silent units beside those of live ones, over all sites.

    Args:
        evidence: from the files.
        silent: per ``site_id``, bool (units,).
    """
    last_silent, last_live = _split(evidence.last_update, silent)
    moved_silent, moved_live = _split(evidence.between, silent)
    live, live_between = _median(last_live), _median(moved_live)
    # Over many steps updates partly cancel: the movement per step is at least the net movement over the steps' number.
    per_step = live_between / evidence.steps_between if evidence.steps_between else float("nan")
    newly = sum(int((evidence.newly_silent[key] & silent[key]).sum()) for key in evidence.newly_silent if key in silent)
    total = sum(int(silent[key].sum()) for key in evidence.newly_silent if key in silent)
    regime = [value for value in (live, per_step) if np.isfinite(value)]
    return UpdateComparison(
        silent=_median(last_silent),
        live=live,
        silent_between=_median(moved_silent),
        live_between=live_between,
        per_step=max(regime) if regime else float("nan"),
        newly_silent=newly,
        born_silent=total - newly,
    )


def _split(ratios: Ratios, silent: Mapping[str, NDArray[np.bool_]]) -> tuple[list[float], list[float]]:
    dead: list[float] = []
    live: list[float] = []
    for site_id, values in ratios.items():
        if site_id in silent and len(values) == len(silent[site_id]):
            dead += values[silent[site_id]].tolist()
            live += values[~silent[site_id]].tolist()
    return dead, live


def _median(values: list[float]) -> float:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.median(finite)) if finite else float("nan")
