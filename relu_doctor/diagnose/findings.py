"""Findings: what the verdicts on units add up to, each with its evidence and what to do.

A rule is a function with a stable code. Its docstring is what ``relu-doctor explain CODE`` prints.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from relu_doctor.config import Config
from relu_doctor.diagnose.judgement import Judgement
from relu_doctor.diagnose.origins import LearningRateEvidence
from relu_doctor.diagnose.table import SiteRecord, UnitTable
from relu_doctor.numerals import plural
from relu_doctor.terms import Status


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing worth telling.

    Attributes:
        code: stable, as ``RD205``; ``relu-doctor explain`` knows it.
        title: one line, with numbers.
        site: name of the site, empty where the finding is about the whole model or scan.
        unit_indices: the units concerned, in the site's own numbering.
        mechanism: what holds them, empty where that is not the subject.
        evidence: the numbers behind it.
        advice: what to do.
    """

    code: str
    title: str
    site: str = ""
    unit_indices: tuple[int, ...] = ()
    mechanism: str = ""
    evidence: str = ""
    advice: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Some units of a site, column by column: a rule looks at few columns of many sites.

    Attributes:
        columns: of the site, (units,) each; those of the unit table but for ``first_fired`` and ``last_fired``.
        places: int64 (rows,), which of the site's units these are.
    """

    columns: Mapping[str, NDArray[Any]]
    places: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, column: str) -> NDArray[Any]:
        """A column, (rows,)."""
        values: NDArray[Any] = self.columns[column][self.places]
        return values

    def where(self, mask: NDArray[np.bool_]) -> Rows:
        """Those for which it holds: bool (rows,)."""
        return Rows(self.columns, self.places[mask])

    def of(self, *statuses: Status) -> Rows:
        """Those that have one of some statuses."""
        status = self["status"]
        return self.where(np.logical_or.reduce([status == each.value for each in statuses]))


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """Everything that a rule may read."""

    table: UnitTable
    judgement: Judgement
    config: Config
    history: LearningRateEvidence | None = None
    by_site: Mapping[str, Rows] = field(default_factory=dict)

    def sites(self) -> Iterator[tuple[SiteRecord, Rows]]:
        """Each site that has units, with its rows."""
        for site in self.table.sites:
            if site.site_id in self.by_site:
                yield site, self.by_site[site.site_id]


Rule = Callable[[Case], Iterable[Finding]]
RULES: dict[str, Rule] = {}
CONSEQUENCES = {"RD202"}  # told after their causes


def rule(code: str) -> Callable[[Rule], Rule]:
    """Register a rule under its code; findings appear in the order of the codes."""

    def register(function: Rule) -> Rule:
        RULES[code] = function
        return function

    return register


def find(
    table: UnitTable, judgement: Judgement, config: Config, history: LearningRateEvidence | None
) -> tuple[Finding, ...]:
    """Apply every rule."""
    by_site = _by_site(table, judgement.units)
    case = Case(table, judgement, config, history, by_site)
    order = sorted(RULES, key=lambda code: (code[:3], code in CONSEQUENCES, code))
    return tuple(finding for code in order for finding in RULES[code](case))


def _by_site(table: UnitTable, units: pd.DataFrame) -> dict[str, Rows]:
    names = [
        name for name in units.columns if name not in {"site", "site_id", "rectifier", "first_fired", "last_fired"}
    ]
    columns = {name: units[name].to_numpy(object if name in {"status", "mechanism"} else None) for name in names}
    stops = np.cumsum([site.num_units for site in table.sites])
    return {
        site.site_id: Rows(
            {name: values[stop - site.num_units : stop] for name, values in columns.items()}, np.arange(site.num_units)
        )
        for site, stop in zip(table.sites, stops, strict=True)
        if site.num_units
    }


def explanation(code: str) -> str:
    """The text of a rule.

    Raises:
        KeyError: no rule has this code.
    """
    return inspect.cleandoc(RULES[code].__doc__ or "")


def share_of(rows: Rows, site_rows: Rows) -> str:
    """``12 of 64 units``, ``all 64 units``."""
    if len(rows) == len(site_rows):
        return "the only unit" if len(rows) == 1 else f"all {len(rows):,} units"
    return f"{len(rows):,} of {plural(len(site_rows), 'unit')}"


def typical(values: NDArray[Any]) -> str:
    """Median of the finite values, for a sentence."""
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    return f"{np.median(finite):.3g}" if len(finite) else "unknown"


def indices(rows: Rows) -> tuple[int, ...]:
    """Unit indices of some rows."""
    return tuple(rows.places.tolist())
