"""UnitStats: what is accumulated per unit, each statistic declared together with the law by which it merges.

Batches, windows, ranks and resumed runs all merge by the same laws, so a statistic is added in one line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

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


def stat(law: Law, dtype: torch.dtype, initial: float, *, narrow: torch.dtype | None = None) -> Tensor:
    """Declare a statistic: its merge law, its dtype, its neutral element, and a narrower dtype that it may have."""
    default: Tensor = field(metadata={"law": law, "dtype": dtype, "initial": initial, "narrow": narrow or dtype})
    return default


@dataclass(slots=True, eq=False)
class UnitStats:
    """Streaming statistics of one site, each a tensor of shape (units,).

    A statistic that is the same for all units, or that was not measured, is one element that is expanded; merging keeps
    it so. The full statistics take 96 bytes per unit at most, the minimal ones 16.

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
        ledger: the arrays that these are a view of and that go on being added to, where there are such.
    """

    inputs: Tensor = stat(Law.SUM, torch.int64, 0)
    inputs_fired: Tensor = stat(Law.SUM, torch.int64, 0)
    positions: Tensor = stat(Law.SUM, torch.int64, 0)
    positions_fired: Tensor = stat(Law.SUM, torch.int64, 0)
    non_finite_values: Tensor = stat(Law.SUM, torch.int64, 0, narrow=torch.int32)
    pre_max: Tensor = stat(Law.MAX, torch.float64, -torch.inf, narrow=torch.float32)
    pre_min: Tensor = stat(Law.MIN, torch.float64, torch.inf)
    pre_mean: Tensor = stat(Law.MEAN, torch.float64, 0)
    pre_squares: Tensor = stat(Law.SQUARES, torch.float64, 0)
    post_abs_sum: Tensor = stat(Law.SUM, torch.float64, 0)
    first_fired: Tensor = stat(Law.MIN, torch.int64, NEVER)
    last_fired: Tensor = stat(Law.MAX, torch.int64, -1)
    ledger: Any = field(default=None, repr=False)

    @classmethod
    def empty(cls, num_units: int, device: torch.device | str = "cpu") -> UnitStats:
        """Statistics of ``num_units`` units that saw nothing: the neutral element of :meth:`merge`."""
        return cls.of(num_units, {}, device)

    @classmethod
    def of(cls, num_units: int, measured: Mapping[str, Tensor], device: torch.device | str = "cpu") -> UnitStats:
        """Statistics of which some were measured; the others are as of units that saw nothing.

        Args:
            num_units: how many units.
            measured: by name, each of shape (units,), or (1,) where it is the same for all units.
            device: where they are kept.
        """
        neutral: dict[tuple[float, torch.dtype], Tensor] = {}
        values: dict[str, Tensor] = {}
        for declared in _DECLARED:
            value = measured.get(declared.name)
            if value is None:
                key = declared.metadata["initial"], declared.metadata["narrow"]
                value = neutral.get(key)
                if value is None:
                    value = neutral[key] = torch.full((1,), key[0], dtype=key[1], device=device).expand(num_units)
            elif len(value) != num_units:
                value = value.expand(num_units)
            values[declared.name] = value
        return cls(**values)

    @property
    def num_units(self) -> int:
        """How many units are described."""
        return len(self.inputs)

    def merge(self, other: UnitStats) -> UnitStats:
        """The statistics of both sets of inputs together; associative and commutative, neither operand is changed."""
        number = self.num_units
        a, b = self._brief(), other._brief()
        pair = _Pair(a, b)
        merged: dict[str, Tensor] = {}
        for declared in _DECLARED:
            value = _LAWS[declared.metadata["law"]](declared.name, pair)
            merged[declared.name] = value if len(value) == number else value.expand(number)
        return UnitStats(**merged)

    def where(self, mask: Tensor, other: UnitStats) -> UnitStats:
        """These statistics for some units, and other ones for the rest.

        Args:
            mask: bool (units,), for which units these hold.
            other: of as many units.
        """
        chosen = {
            declared.name: torch.where(mask, getattr(self, declared.name), getattr(other, declared.name))
            for declared in _DECLARED
        }
        return UnitStats(**chosen)

    def to(self, device: torch.device | str) -> UnitStats:
        """The same on another device."""
        number, brief = self.num_units, self._brief()
        return UnitStats(**{name: value.to(device).expand(number) for name, value in brief.items()})

    def pre_std(self) -> Tensor:
        """Population standard deviation of the finite pre-activations; NaN where none was seen."""
        return (self.pre_squares.clamp_min(0) / self.positions).sqrt()

    def _brief(self) -> dict[str, Tensor]:
        """Each statistic as it is held: one element where it is the same for all units."""
        return {
            declared.name: value if value.stride(0) else value[:1]
            for declared in _DECLARED
            for value in (getattr(self, declared.name),)
        }


_DECLARED = tuple(declared for declared in fields(UnitStats) if "law" in declared.metadata)


class _Pair:
    """Two operands, by name, and what the law of the moments needs of both."""

    def __init__(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
        self.a, self.b = a, b
        together = (a["positions"] + b["positions"]).clamp_min(1).to(torch.float64)  # integers would divide in float32
        self.share = b["positions"] / together
        self.delta = b["pre_mean"] - a["pre_mean"]


def _squares(name: str, pair: _Pair) -> Tensor:
    return pair.a[name] + pair.b[name] + pair.delta * pair.delta * pair.share * pair.a["positions"]


_LAWS: dict[Law, Callable[[str, _Pair], Tensor]] = {
    Law.SUM: lambda name, pair: pair.a[name] + pair.b[name],
    Law.MAX: lambda name, pair: torch.maximum(pair.a[name], pair.b[name]),
    Law.MIN: lambda name, pair: torch.minimum(pair.a[name], pair.b[name]),
    Law.MEAN: lambda name, pair: pair.a[name] + pair.delta * pair.share,
    Law.SQUARES: _squares,
}
