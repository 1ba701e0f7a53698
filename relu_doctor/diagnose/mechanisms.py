"""Mechanism: what holds a silent unit down, read from one snapshot.

The decomposition max z = O + b + R is exact: with the mean input h-bar, O = w . h-bar = mean(z) - b is the offset and
R = max(z) - mean(z) >= 0 the reach. A unit is silent exactly when O + b + R does not pass the rectifier's low edge.
Setting b := 0 asks whether the bias holds it down, O := 0 (centred inputs) whether the offset does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relu_doctor.config import Config
from relu_doctor.diagnose.table import SiteRecord
from relu_doctor.terms import Mechanism

Bools = NDArray[np.bool_]
_ROUNDING = 1e-6  # of a bias: what float32 leaves of inputs that do not vary


def find_mechanisms(
    units: Mapping[str, Any],
    site: SiteRecord,
    silent: Bools,
    upstream: str | None,
    config: Config,
    *,
    all_seen: bool = True,
    wholly: bool = False,
) -> NDArray[np.object_]:
    """The mechanism of each unit of one site; the first rule that holds wins.

    Args:
        units: columns of the unit table, the site's rows of each.
        site: its record.
        silent: bool (units,): which units never fired on the low side.
        upstream: name of a silent site that feeds this one, ``None`` where there is none.
        config: thresholds.
        wholly: the site to blame is silent in all its units, so that nothing it feeds can vary.
        all_seen: every site that feeds this one is in the table; else constant inputs cannot be told from dead ones.

    Returns:
        Mechanism values, object (units,); empty for units that are not silent.
    """
    found: NDArray[np.object_] = np.full(len(silent), "", dtype=object)
    low = 0.0 if site.low is None else site.low
    bias, highest, lowest, mean, weights, gamma, beta = (
        np.asarray(units[name], dtype=float)
        for name in ("bias", "pre_max", "pre_min", "pre_mean", "weight_l2", "gamma", "beta")
    )
    bias = np.where(np.isnan(bias), 0.0, bias)
    with np.errstate(invalid="ignore", divide="ignore"):
        reach = highest - mean
        several = (np.asarray(units["positions"]) >= 2) & np.isfinite(lowest)
        size = np.maximum(np.abs(highest - bias), np.abs(lowest - bias))
        constant = several & (highest - lowest <= config.constant_tolerance * size + _ROUNDING * np.abs(bias))
        weightless = (weights == 0) & (site.norm != "norm") & (not site.mixed)
        weightless |= (gamma == 0) & (site.norm != "mixed")
        zero = weightless & (bias <= low) & (not site.unweighted_summand)
        shift = (beta - low) / np.abs(gamma)
        normalised = (site.norm == "batch_norm") & (shift < -config.normalization_z)
        by_bias = (bias < 0) & (highest - bias > low)
        by_offset = (mean - bias < 0) & (bias + reach > low)
        by_both = reach > low
    weighted = ((weights > 0) | (np.isnan(weights) & (gamma > 0))) & site.decomposable
    held = Mechanism.CONSTANT_INPUTS if upstream is None else Mechanism.DEAD_UPSTREAM
    told = constant & (weighted | wholly) & (all_seen | (upstream is not None))
    below = highest <= low  # else it leaps over its slope, between two flat sides
    known = np.isfinite(mean) & several & site.decomposable & below
    rules: Sequence[tuple[Mechanism, Bools]] = (
        (Mechanism.ZERO_WEIGHTS, zero),
        (held, told),
        (Mechanism.NOT_SELECTED, site.selects & ((site.low is None) | (highest > low))),
        (Mechanism.NORMALIZATION, normalised),
        (Mechanism.BIAS_OR_OFFSET, known & by_bias & by_offset),
        (Mechanism.NEGATIVE_BIAS, known & by_bias),
        (Mechanism.INPUT_OFFSET, known & by_offset),
        (Mechanism.BIAS_AND_OFFSET, known & by_both),
        (Mechanism.UNKNOWN, np.ones(len(silent), dtype=np.bool_)),
    )
    for mechanism, holds in reversed(rules):
        found[silent & holds] = mechanism.value
    return found


def blame_upstream(sites: Sequence[SiteRecord], silent_fraction: Mapping[str, float]) -> dict[str, str | None]:
    """For each site, the earliest site in forward order that feeds it, however far back, and has gone silent.

    A wholly silent ancestor is blamed before a site that reads the unit's inputs directly and is silent in part.

    Args:
        sites: in forward order.
        silent_fraction: per ``site_id``.

    Returns:
        Per ``site_id`` the name of the site to blame, or ``None``.
    """
    by_id = {site.site_id: site for site in sites}
    blamed: dict[str, str | None] = {}
    for site in sites:
        ancestors: dict[str, None] = {}
        stack = list(site.feeds)
        while stack:
            current = stack.pop()
            if current in ancestors or current == site.site_id or current not in by_id:
                continue
            ancestors[current] = None
            stack.extend(by_id[current].feeds)
        whole = [other.name for other in sites if other.site_id in ancestors and silent_fraction[other.site_id] == 1]
        partly = [other.name for other in sites if other.site_id in site.feeds and silent_fraction[other.site_id] > 0]
        blamed[site.site_id] = next(iter([*whole, *partly]), None)
    return blamed
