"""How sure: bounds on firing rates, and how many inputs it takes.

The unit of evidence is the input (one image, one sequence). Zero firings in n inputs bound the firing rate by
1 - alpha^(1/n); k firings by the Beta(k + 1, n - k) quantile (Clopper and Pearson 1934). With m units examined
together, alpha / m is used (Bonferroni), valid under any dependence between units.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv


def firing_rate_upper(
    inputs_fired: ArrayLike, inputs: ArrayLike, *, confidence: float = 0.95, num_units: int = 1
) -> NDArray[np.float64]:
    """Upper bound on firing rates, simultaneous over ``num_units`` units.

    Args:
        inputs_fired: inputs that fired each unit.
        inputs: independent inputs seen by each unit; 0 bounds nothing.
        confidence: of the whole statement, in (0, 1).
        num_units: units examined together.

    Returns:
        Rates in [0, 1], float64, in the shape of the arguments.

    >>> round(float(firing_rate_upper(0, 299)), 4)
    0.01
    >>> float(firing_rate_upper(7, 7))
    1.0
    """
    fired, seen = np.broadcast_arrays(np.asarray(inputs_fired, dtype=float), np.asarray(inputs, dtype=float))
    alpha = (1 - confidence) / max(num_units, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        silent = -np.expm1(np.log(alpha) / np.maximum(seen, 1e-300))
        some = betaincinv(fired + 1, np.maximum(seen - fired, 1e-12), 1 - alpha)
    bound = np.where(fired <= 0, silent, np.where(fired >= seen, 1.0, some))
    return np.asarray(np.where(seen <= 0, 1.0, bound), dtype=np.float64)


def inputs_needed(max_firing_rate: float, *, confidence: float = 0.95, num_units: int = 1) -> int:
    """Inputs on which a unit must be silent to be called dead at a rate: ln(alpha / m) / ln(1 - p0), rounded up.

    >>> inputs_needed(0.01), inputs_needed(0.001), inputs_needed(0.001, num_units=1000)
    (299, 2995, 9899)
    """
    alpha = (1 - confidence) / max(num_units, 1)
    return math.ceil(math.log(alpha) / math.log1p(-max_firing_rate) - 1e-9)
