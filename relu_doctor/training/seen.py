"""Seen: what was seen in a window, of one process or of all together, before it is judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from relu_doctor.observe.statistics.stats import NEVER, UnitStats


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What was seen in a window.

    Attributes:
        index: of the window.
        first_step, last_step: of it.
        stats: per ``site_id``, on the CPU; ``first_fired`` and ``last_fired`` hold steps.
        steps: int64 (steps,), those that were observed, ascending.
        num_inputs: observed.
        notes: remarks for the report.
        ratios: per ``site_id``, float (units,): update-to-weight ratios of one step.
        heard: per ``site_id`` that the gradients follow, int64 (units,), the last step at which each had one; -1 for
            never.
        checked: the same of the steps that were observed in full.
        apart: the forwards that were observed are not the run's own, but made beside them: dropout drops others.
        told: digests and number of the inputs of each forward that was observed.
        numbers: the run's own.
        reference: per ``site_id``, what the reference batches showed, where there are any.
        effective_ranks: per ``site_id``, of the process's own outputs, where they are wanted.
    """

    index: int
    first_step: int
    last_step: int
    stats: Mapping[str, UnitStats]
    steps: Tensor
    num_inputs: int
    notes: tuple[str, ...]
    ratios: Mapping[str, Tensor]
    heard: Mapping[str, Tensor]
    told: Sequence[tuple[list[int] | None, int]]
    numbers: Mapping[str, float]
    checked: Mapping[str, Tensor] = field(default_factory=dict)
    apart: bool = False
    reference: Mapping[str, UnitStats] = field(default_factory=dict)
    effective_ranks: Mapping[str, float] = field(default_factory=dict)


def nothing(first_step: int) -> Seen:
    """A window in which nothing was seen."""
    steps = torch.zeros(0, dtype=torch.int64)
    return Seen(0, first_step, first_step - 1, {}, steps, 0, (), {}, {}, [], {})


def in_steps(stats: UnitStats, ordinals: Tensor, steps: Tensor) -> UnitStats:
    """Statistics whose units tell the steps at which they fired first and last instead of the inputs.

    Args:
        stats: on any device.
        ordinals: int64 (steps,), the first ordinal of each step that was observed.
        steps: int64 (steps,), those steps, ascending.

    Returns:
        The same on the CPU; ordinals of inputs mean nothing over windows and processes.
    """
    stats = stats.to("cpu")
    if not len(steps):
        empty = UnitStats.empty(stats.num_units)
        return replace(stats, first_fired=empty.first_fired, last_fired=empty.last_fired)
    has_fired = stats.last_fired >= 0
    return replace(
        stats,
        first_fired=torch.where(has_fired, _steps_of(stats.first_fired, ordinals, steps), NEVER),
        last_fired=torch.where(has_fired, _steps_of(stats.last_fired, ordinals, steps), stats.last_fired),
    )


def _steps_of(inputs: Tensor, ordinals: Tensor, steps: Tensor) -> Tensor:
    """The step of each input, by its ordinal."""
    return steps[(torch.searchsorted(ordinals, inputs, right=True) - 1).clamp_min(0)]
