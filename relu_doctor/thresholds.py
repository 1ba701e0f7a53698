"""What a threshold is: a number with a meaning, a unit, a source and a range."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from relu_doctor.errors import ConfigError

OFF = "off"  # TOML has no null: this is how a file switches a threshold off


@dataclass(frozen=True, slots=True)
class Threshold:
    """What there is to know about one threshold beside its value.

    Attributes:
        meaning: what the threshold decides.
        unit: what the number counts.
        source: where the default comes from.
        low: the smallest value that makes sense.
        high: the largest.
        low_open: the value must lie above `low`, not at it.
        high_open: the value must lie below `high`, not at it.
        can_be_off: ``None`` (in a file: "off") switches the rule off.
    """

    meaning: str
    unit: str
    source: str
    low: float = 0.0
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    can_be_off: bool = False

    @property
    def interval(self) -> str:
        """The allowed values in words."""
        low = f"{'above' if self.low_open else 'at least'} {self.low:g}"
        high = "" if math.isinf(self.high) else f" and {'below' if self.high_open else 'at most'} {self.high:g}"
        return low + high + (f', or "{OFF}"' if self.can_be_off else "")

    def check(self, name: str, value: object) -> float | None:
        """Returns `value` as a float, ``None`` where it is off.

        Args:
            name: the key, for the message.
            value: what was found.

        Raises:
            ConfigError: `value` is no number, or lies outside the range.
        """
        if self.can_be_off and (value is None or value == OFF):
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{name} must be a number, {self.interval}, and is {value!r}.")
        above = value > self.low or (value == self.low and not self.low_open)
        below = value < self.high or (value == self.high and not self.high_open)
        if not (above and below and math.isfinite(value)):
            raise ConfigError(f"{name} must be {self.interval} ({self.unit}), and is {value!r}.")
        return float(value)


def threshold(default: float | None, **about: Any) -> Any:
    """A dataclass field that carries its :class:`Threshold`.

    Args:
        default: the field's default value.
        **about: the attributes of :class:`Threshold`.
    """
    return field(default=default, metadata={"threshold": Threshold(**about)})
