"""From evidence to one status and one mechanism per unit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from relu_doctor.config import Config
from relu_doctor.diagnose.evidence import firing_rate_upper, inputs_needed
from relu_doctor.diagnose.mechanisms import blame_upstream, find_mechanisms
from relu_doctor.diagnose.table import SiteRecord, UnitTable
from relu_doctor.terms import Mechanism, Status

COLUMNS = (
    "site",
    "site_id",
    "unit",
    "rectifier",
    "status",
    "mechanism",
    "inputs",
    "inputs_fired",
    "firing_rate",
    "firing_rate_upper",
    "position_firing_rate",
    "pre_max",
    "pre_min",
    "pre_mean",
    "pre_std",
    "margin",
    "dormancy",
    "first_fired",
    "last_fired",
    "bias",
    "weight_l2",
    "non_finite_values",
    "positions",
    "positions_fired",
    "post_mean",
    "gamma",
    "beta",
    "offset",
    "reach",
)


@dataclass(frozen=True, slots=True, eq=False)
class Judgement:
    """Verdicts on every unit of a table.

    Attributes:
        units: the table's rows with status, mechanism and the derived columns, in the order of ``COLUMNS``.
        blamed: per ``site_id``, the silent site upstream that is blamed, or ``None``.
        num_units: units that can die, over which every bound is simultaneous.
        needed: inputs on which a silent unit must be seen to be called dead, the strictest over all sites.
    """

    units: pd.DataFrame
    blamed: dict[str, str | None]
    num_units: int
    needed: int


def judge(table: UnitTable, config: Config) -> Judgement:
    """Give every unit its status, in the order of precedence of :class:`~relu_doctor.terms.Status`."""
    rectifying = sum(site.num_units for site in table.sites if site.can_die)
    starts = np.cumsum([0, *(site.num_units for site in table.sites)])
    judged: list[pd.DataFrame] = []
    for site, start, stop in zip(table.sites, starts[:-1], starts[1:], strict=True):
        judged.append(_with_rates(table.units.iloc[start:stop], site, table, config, rectifying))
    silent = {
        site.site_id: float(rows["status"].isin([Status.DEAD.value, Status.UNPROVEN.value]).mean())
        if len(rows)
        else 0.0
        for site, rows in zip(table.sites, judged, strict=True)
    }
    blamed = blame_upstream(table.sites, silent)
    known = {site.site_id for site in table.sites}
    for site, rows in zip(table.sites, judged, strict=True):
        if len(rows):
            culprit = blamed[site.site_id]
            rows["mechanism"] = _mechanisms(
                rows,
                site,
                culprit,
                config,
                all_seen=set(site.feeds) <= known,
                wholly=any(silent[other.site_id] == 1 for other in table.sites if other.name == culprit),
            )
    filled = [frame for frame in judged if len(frame)]
    columns = [*COLUMNS, *(name for name in table.units.columns if name.startswith("train_"))]
    units = pd.concat(filled, ignore_index=True)[columns] if filled else pd.DataFrame(columns=columns)
    for name in ("first_fired", "last_fired"):
        units[name] = units[name].astype("Int64").where(units[name] >= 0)
    strictest = min(
        (config.for_site(site.name).max_firing_rate for site in table.sites if site.can_die),
        default=config.max_firing_rate,
    )
    needed = inputs_needed(strictest, confidence=config.confidence, num_units=max(rectifying, 1))
    return Judgement(units, blamed, rectifying, needed)


def _with_rates(
    units: pd.DataFrame, site: SiteRecord, table: UnitTable, config: Config, num_units: int
) -> pd.DataFrame:
    rows = units.copy()
    limits = config.for_site(site.name)
    inputs, fired = rows["inputs"].to_numpy(float), rows["inputs_fired"].to_numpy(float)
    positions = rows["positions"].to_numpy(float)
    coverage = table.coverage
    share = coverage.distinct_inputs / coverage.num_inputs if coverage.num_inputs else 1.0
    distinct = np.floor(inputs * share + 1e-9)
    upper = firing_rate_upper(
        np.minimum(np.ceil(fired * share - 1e-9), distinct), distinct, confidence=config.confidence, num_units=num_units
    )
    low = 0.0 if site.low is None else site.low
    silent = (fired == 0) & (inputs > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        rows["firing_rate"] = fired / inputs
        rows["firing_rate_upper"] = np.where(inputs > 0, upper, np.nan)
        rows["position_firing_rate"] = rows["positions_fired"].to_numpy(float) / np.where(
            positions > 0, positions, np.nan
        )
        margin = (low - rows["pre_max"].to_numpy(float)) / rows["pre_std"].to_numpy(float)
        rows["margin"] = np.where(silent & site.can_die & (not site.selects) & np.isfinite(margin), margin, np.nan)
        mean_output = rows["post_mean"].mean()
        rows["dormancy"] = rows["post_mean"] / mean_output if mean_output > 0 else rows["post_mean"] * 0.0
        bias = rows["bias"].fillna(0.0)
        applies = site.decomposable & np.isfinite(rows["pre_mean"].to_numpy(float))
        rows["offset"] = np.where(applies, rows["pre_mean"] - bias, np.nan)
        rows["reach"] = rows["pre_max"] - rows["pre_mean"]
    proved = upper <= limits.max_firing_rate
    if coverage.random_inputs:
        proved = np.zeros_like(silent)
    elif coverage.exhaustive:
        proved = np.ones_like(silent)
    saturated = silent & (rows["pre_min"].to_numpy(float) >= (np.inf if site.high is None else site.high))
    held = silent & site.can_die & ~saturated
    tau = limits.dormancy_tau
    dormant = (rows["dormancy"].to_numpy(float) <= tau) if tau is not None else np.zeros_like(silent)
    rules: tuple[tuple[Status, NDArray[np.bool_]], ...] = (
        (Status.UNOBSERVED, inputs == 0),
        (Status.NON_FINITE, rows["non_finite_values"].to_numpy() > 0),
        (Status.DEAD, held & proved),
        (Status.UNPROVEN, held),
        (Status.SATURATED, saturated & site.can_die),
        (Status.RARE, (fired / np.maximum(inputs, 1) < limits.rare_firing_rate) & site.can_die),
        (Status.DORMANT, dormant),
        (Status.ACTIVE, np.ones_like(silent)),
    )
    status: NDArray[np.object_] = np.full(len(rows), "", dtype=object)
    for value, holds in reversed(rules):
        status[holds] = value.value
    rows["status"] = status
    return rows


def _mechanisms(
    rows: pd.DataFrame, site: SiteRecord, blamed: str | None, config: Config, *, all_seen: bool, wholly: bool
) -> NDArray[np.object_]:
    status = rows["status"].to_numpy(object)
    silent = np.isin(status, [Status.DEAD.value, Status.UNPROVEN.value])
    found = find_mechanisms(rows, site, silent, blamed, config, all_seen=all_seen, wholly=wholly)
    found[status == Status.NON_FINITE.value] = Mechanism.NON_FINITE.value
    found[status == Status.SATURATED.value] = Mechanism.SATURATED.value
    return found
