"""Numbers as findings and reports print them; bounds are rounded so that they still hold."""

from __future__ import annotations

import math


def percent(fraction: float) -> str:
    """A fraction as a percentage of at most three significant digits; only a whole is 100 %, only nothing is 0 %.

    >>> percent(0.1875), percent(0.99999), percent(1e-9), percent(1.0)
    ('18.8 %', '> 99.9 %', '< 0.001 %', '100 %')
    """
    value = 100 * fraction
    if 0 < value < 0.001:
        return "< 0.001 %"
    if 99.95 <= value < 100:
        return "> 99.9 %"
    return f"{value:.3g} %"


def upper_percent(rate: float) -> str:
    """An upper bound as a percentage of three significant digits, rounded up so that it still holds.

    >>> upper_percent(0.0058312), upper_percent(0.01)
    ('0.584 %', '1 %')
    """
    scaled, unit = _three_digits(rate)
    return f"{math.ceil(scaled - 1e-6) * unit:.3g} %"


def lower_percent(rate: float) -> str:
    """A lower bound as a percentage of three significant digits, rounded down so that it still holds.

    >>> lower_percent(0.0058392)
    '0.583 %'
    """
    scaled, unit = _three_digits(rate)
    return f"{math.floor(scaled + 1e-6) * unit:.3g} %"


def _three_digits(rate: float) -> tuple[float, float]:
    """A percentage in units of its third significant digit, and that unit."""
    value = 100 * rate
    unit = 10.0 ** (math.floor(math.log10(value)) - 2) if value > 0 else 1.0
    return value / unit, unit


def plural(number: int, noun: str) -> str:
    """``1 unit``, ``1,797 units``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
