"""UnitStats: what is accumulated per unit, each statistic declared together with the law by which it merges.

Batches, windows, ranks and resumed runs all merge by the same laws, so a statistic is added in one line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import StrEnum

import torch
from torch import Tensor

NEVER = torch.iinfo(torch.int64).max  # first_fired of a unit that never fired


class Law(StrEnum):
    """How two values of one statistic become one."""

    SUM = "sum"
    MAX = "max"
    MIN = "min"
    MEAN = "mean"  # weighted by positions
    SQUARES = "squares"  # squared deviations from the mean (Chan, Golub and LeVeque 1979)


def stat(law: Law, dtype: torch.dtype, initial: float) -> Tensor:
    """Declare a statistic: its merge law, its dtype and its neutral element."""
    default: Tensor = field(metadata={"law": law, "dtype": dtype, "initial": initial})
    return default


@dataclass(slots=True, eq=False)
class UnitStats:
    """Streaming statistics of one site, each a tensor of shape (units,).

    Attributes:
        inputs: inputs on which the site was called (images, sequences).
        inputs_fired: inputs of which at least one position fired.
        positions: positions seen (spatial or time locations over all inputs), finite ones only.
        positions_fired: positions that fired.
        non_finite_values: positions at which the pre-activation was NaN or infinite.
        pre_max, pre_min: extremes of the finite pre-activations.
        pre_mean, pre_squares: mean and summed squared deviation of the finite pre-activations.
        post_abs_sum: summed absolute post-activation, for dormancy.
        first_fired, last_fired: ordinal of the first and last input that fired, from 0; ``NEVER`` and -1 for none.
    """

    inputs: Tensor = stat(Law.SUM, torch.int64, 0)
    inputs_fired: Tensor = stat(Law.SUM, torch.int64, 0)
    positions: Tensor = stat(Law.SUM, torch.int64, 0)
    positions_fired: Tensor = stat(Law.SUM, torch.int64, 0)
    non_finite_values: Tensor = stat(Law.SUM, torch.int64, 0)
    pre_max: Tensor = stat(Law.MAX, torch.float64, -torch.inf)
    pre_min: Tensor = stat(Law.MIN, torch.float64, torch.inf)
    pre_mean: Tensor = stat(Law.MEAN, torch.float64, 0)
    pre_squares: Tensor = stat(Law.SQUARES, torch.float64, 0)
    post_abs_sum: Tensor = stat(Law.SUM, torch.float64, 0)
    first_fired: Tensor = stat(Law.MIN, torch.int64, NEVER)
    last_fired: Tensor = stat(Law.MAX, torch.int64, -1)

    @classmethod
    def empty(cls, num_units: int, device: torch.device | str = "cpu") -> UnitStats:
        """Statistics of ``num_units`` units that saw nothing: the neutral element of :meth:`merge`."""
        return cls(
            **{
                declared.name: torch.full(
                    (num_units,), declared.metadata["initial"], dtype=declared.metadata["dtype"], device=device
                )
                for declared in fields(cls)
            }
        )

    @property
    def num_units(self) -> int:
        """How many units are described."""
        return len(self.inputs)

    def merge(self, other: UnitStats) -> UnitStats:
        """The statistics of both sets of inputs together; associative and commutative, neither operand is changed."""
        return UnitStats(**{d.name: _LAWS[d.metadata["law"]](d.name, self, other) for d in fields(self)})

    def to(self, device: torch.device | str) -> UnitStats:
        """A copy on another device."""
        return UnitStats(**{d.name: getattr(self, d.name).to(device) for d in fields(self)})

    def pre_std(self) -> Tensor:
        """Population standard deviation of the finite pre-activations; NaN where none was seen."""
        return (self.pre_squares.clamp_min(0) / self.positions).sqrt()


def _share(a: UnitStats, b: UnitStats) -> tuple[Tensor, Tensor]:
    """B's share of the positions, and the difference of the means."""
    together = (a.positions + b.positions).clamp_min(1).to(a.pre_mean.dtype)  # integers would divide in float32
    return b.positions / together, b.pre_mean - a.pre_mean


def _mean(_: str, a: UnitStats, b: UnitStats) -> Tensor:
    share, delta = _share(a, b)
    return a.pre_mean + delta * share


def _squares(_: str, a: UnitStats, b: UnitStats) -> Tensor:
    share, delta = _share(a, b)
    return a.pre_squares + b.pre_squares + delta * delta * share * a.positions


_LAWS: dict[Law, Callable[[str, UnitStats, UnitStats], Tensor]] = {
    Law.SUM: lambda name, a, b: getattr(a, name) + getattr(b, name),
    Law.MAX: lambda name, a, b: torch.maximum(getattr(a, name), getattr(b, name)),
    Law.MIN: lambda name, a, b: torch.minimum(getattr(a, name), getattr(b, name)),
    Law.MEAN: _mean,
    Law.SQUARES: _squares,
}
