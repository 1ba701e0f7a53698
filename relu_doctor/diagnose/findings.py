"""Findings: what the verdicts on units add up to, each with its evidence and what to do.

A rule is a function with a stable code. Its docstring is what ``relu-doctor explain CODE`` prints.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from relu_doctor.config import Config
from relu_doctor.diagnose.judgement import Judgement
from relu_doctor.diagnose.origins import LearningRateEvidence
from relu_doctor.diagnose.table import SiteRecord, UnitTable
from relu_doctor.numerals import plural


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
class Case:
    """Everything that a rule may read."""

    table: UnitTable
    judgement: Judgement
    config: Config
    history: LearningRateEvidence | None = None
    by_site: Mapping[str, pd.DataFrame] = field(default_factory=dict)

    def sites(self) -> Iterator[tuple[SiteRecord, pd.DataFrame]]:
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
    by_site = (
        {str(key): rows for key, rows in judgement.units.groupby("site_id", sort=False)} if len(judgement.units) else {}
    )
    case = Case(table, judgement, config, history, by_site)
    order = sorted(RULES, key=lambda code: (code[:3], code in CONSEQUENCES, code))
    return tuple(finding for code in order for finding in RULES[code](case))


def explanation(code: str) -> str:
    """The text of a rule.

    Raises:
        KeyError: no rule has this code.
    """
    return inspect.cleandoc(RULES[code].__doc__ or "")


def share_of(rows: pd.DataFrame, site_rows: pd.DataFrame) -> str:
    """``12 of 64 units``, ``all 64 units``."""
    if len(rows) == len(site_rows):
        return "the only unit" if len(rows) == 1 else f"all {len(rows):,} units"
    return f"{len(rows):,} of {plural(len(site_rows), 'unit')}"


def typical(values: pd.Series[float] | np.ndarray) -> str:
    """Median of the finite values, for a sentence."""
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    return f"{np.median(finite):.3g}" if len(finite) else "unknown"


def indices(rows: pd.DataFrame) -> tuple[int, ...]:
    """Unit indices of some rows."""
    return tuple(int(unit) for unit in rows["unit"])
