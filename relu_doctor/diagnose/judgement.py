"""From evidence to one status and one mechanism per unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


_DERIVED = (
    "status", "mechanism", "firing_rate", "firing_rate_upper", "position_firing_rate", "margin", "dormancy", "offset",
    "reach",
)  # fmt: skip
_READ = (
    "inputs", "inputs_fired", "positions", "positions_fired", "non_finite_values", "pre_max", "pre_min", "pre_mean",
    "pre_std", "post_mean", "bias", "weight_l2", "gamma", "beta",
)  # fmt: skip
Columns = dict[str, NDArray[Any]]


def judge(table: UnitTable, config: Config) -> Judgement:
    """Give every unit its status, in the order of precedence of :class:`~relu_doctor.terms.Status`."""
    rectifying = sum(site.num_units for site in table.sites if site.can_die)
    starts = np.cumsum([0, *(site.num_units for site in table.sites)])
    evidence: Columns = {name: table.units[name].to_numpy() for name in _READ}
    judged: list[Columns] = []
    for site, start, stop in zip(table.sites, starts[:-1], starts[1:], strict=True):
        rows = {name: values[start:stop] for name, values in evidence.items()}
        judged.append(_with_rates(rows, site, table, config, rectifying))
    silent = {site.site_id: _silent(rows) for site, rows in zip(table.sites, judged, strict=True)}
    blamed = blame_upstream(table.sites, silent)
    known = {site.site_id for site in table.sites}
    for site, rows in zip(table.sites, judged, strict=True):
        culprit = blamed[site.site_id]
        rows["mechanism"] = _mechanisms(
            rows,
            site,
            culprit,
            config,
            all_seen=set(site.feeds) <= known,
            wholly=any(silent[other.site_id] == 1 for other in table.sites if other.name == culprit),
        )
    filled = [rows for rows in judged if len(rows["status"])]
    columns = [*COLUMNS, *(name for name in table.units.columns if name.startswith("train_"))]
    if filled:
        derived: dict[str, Any] = {name: np.concatenate([rows[name] for rows in filled]) for name in _DERIVED}
        for name in ("first_fired", "last_fired"):
            ordinals = table.units[name].to_numpy(np.int64, copy=True)
            derived[name] = pd.arrays.IntegerArray(ordinals, ordinals < 0)
        kept = table.units[[name for name in columns if name not in derived]].reset_index(drop=True)
        units = pd.concat([kept, pd.DataFrame(derived)], axis=1)[columns]
    else:
        units = pd.DataFrame(columns=columns)
    strictest = min(
        (config.for_site(site.name).max_firing_rate for site in table.sites if site.can_die),
        default=config.max_firing_rate,
    )
    needed = inputs_needed(strictest, confidence=config.confidence, num_units=max(rectifying, 1))
    return Judgement(units, blamed, rectifying, needed)


def _silent(rows: Columns) -> float:
    """The share of a site's units that were silent."""
    status = rows["status"]
    return float(np.isin(status, [Status.DEAD.value, Status.UNPROVEN.value]).mean()) if len(status) else 0.0


def _with_rates(rows: Columns, site: SiteRecord, table: UnitTable, config: Config, num_units: int) -> Columns:
    """A site's columns of evidence, and what follows from them."""
    limits, rows = config.for_site(site.name), dict(rows)
    inputs, fired, positions = (rows[name].astype(float) for name in ("inputs", "inputs_fired", "positions"))
    coverage = table.coverage
    share = coverage.distinct_inputs / coverage.num_inputs if coverage.num_inputs else 1.0
    distinct = np.floor(inputs * share + 1e-9)
    upper = firing_rate_upper(
        np.minimum(np.ceil(fired * share - 1e-9), distinct), distinct, confidence=config.confidence, num_units=num_units
    )
    low = 0.0 if site.low is None else site.low
    silent = (fired == 0) & (inputs > 0)
    post, bias = rows["post_mean"], rows["bias"]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        rows["firing_rate"] = fired / inputs
        rows["firing_rate_upper"] = np.where(inputs > 0, upper, np.nan)
        rows["position_firing_rate"] = rows["positions_fired"] / np.where(positions > 0, positions, np.nan)
        margin = (low - rows["pre_max"]) / rows["pre_std"]
        rows["margin"] = np.where(silent & site.can_die & (not site.selects) & np.isfinite(margin), margin, np.nan)
        measured = post[~np.isnan(post)]
        mean_output = measured.mean() if len(measured) else 0.0
        rows["dormancy"] = post / mean_output if mean_output > 0 else post * 0.0
        applies = site.decomposable & np.isfinite(rows["pre_mean"])
        rows["offset"] = np.where(applies, rows["pre_mean"] - np.where(np.isnan(bias), 0.0, bias), np.nan)
        rows["reach"] = rows["pre_max"] - rows["pre_mean"]
    proved = upper <= limits.max_firing_rate
    if coverage.random_inputs:
        proved = np.zeros_like(silent)
    elif coverage.exhaustive:
        proved = np.ones_like(silent)
    saturated = silent & (rows["pre_min"] >= (np.inf if site.high is None else site.high))
    held = silent & site.can_die & ~saturated
    tau = limits.dormancy_tau
    dormant = (rows["dormancy"] <= tau) if tau is not None else np.zeros_like(silent)
    rules: tuple[tuple[Status, NDArray[np.bool_]], ...] = (
        (Status.UNOBSERVED, inputs == 0),
        (Status.NON_FINITE, rows["non_finite_values"] > 0),
        (Status.DEAD, held & proved),
        (Status.UNPROVEN, held),
        (Status.SATURATED, saturated & site.can_die),
        (Status.RARE, (fired / np.maximum(inputs, 1) < limits.rare_firing_rate) & site.can_die),
        (Status.DORMANT, dormant),
        (Status.ACTIVE, np.ones_like(silent)),
    )
    status: NDArray[np.object_] = np.full(len(silent), "", dtype=object)
    for value, holds in reversed(rules):
        status[holds] = value.value
    rows["status"] = status
    return rows


def _mechanisms(
    rows: Columns, site: SiteRecord, blamed: str | None, config: Config, *, all_seen: bool, wholly: bool
) -> NDArray[np.object_]:
    status = rows["status"]
    silent = np.isin(status, [Status.DEAD.value, Status.UNPROVEN.value])
    found = find_mechanisms(rows, site, silent, blamed, config, all_seen=all_seen, wholly=wholly)
    found[status == Status.NON_FINITE.value] = Mechanism.NON_FINITE.value
    found[status == Status.SATURATED.value] = Mechanism.SATURATED.value
    return found
