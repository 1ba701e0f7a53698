"""Diagnosis: the evidence, the verdicts on it, and what they add up to."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import relu_doctor.diagnose.rules  # noqa: F401 registers the rules
from relu_doctor.config import Config, load_config
from relu_doctor.diagnose.findings import Finding, find
from relu_doctor.diagnose.judgement import Judgement, judge
from relu_doctor.diagnose.origins import LearningRateEvidence
from relu_doctor.diagnose.table import UnitTable
from relu_doctor.terms import Severity, Status

_COUNTED = (
    Status.DEAD,
    Status.UNPROVEN,
    Status.RARE,
    Status.DORMANT,
    Status.SATURATED,
    Status.NON_FINITE,
    Status.UNOBSERVED,
    Status.ACTIVE,
)


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What is wrong with a model's rectifiers, how sure that is, and what to do.

    Attributes:
        table: the evidence; judged again by :meth:`rediagnose`.
        judgement: the verdicts on it.
        config: the thresholds used.
        history: learning-rate evidence from files, ``None`` where there was none.
        metadata: when and with which versions it was made; the only part that differs between identical scans.
        stored: the findings of a diagnosis that was read from a file, else ``None``.
    """

    table: UnitTable
    judgement: Judgement
    config: Config
    history: LearningRateEvidence | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    stored: tuple[Finding, ...] | None = None

    @cached_property
    def units(self) -> pd.DataFrame:
        """One row per unit, with its status and mechanism."""
        return self.judgement.units.copy(deep=False)  # what is done to it touches no verdict

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """What the verdicts add up to."""
        if self.stored is not None:
            return self.stored
        return find(self.table, self.judgement, self.config, self.history)

    @property
    def blamed(self) -> Mapping[str, str | None]:
        """Per ``site_id``, the silent site upstream that is blamed, or ``None``."""
        return self.judgement.blamed

    @property
    def needed(self) -> int:
        """Inputs on which a silent unit must be seen to be called dead."""
        return self.judgement.needed

    @cached_property
    def sites(self) -> pd.DataFrame:
        """One row per site in forward order: counts per status, and the dead and silent fraction of its units."""
        counts = self._counts()
        rows = []
        for site, of in zip(self.table.sites, counts, strict=True):
            silent = of["dead"] + of["unproven"]
            rows.append(
                {
                    "site": site.name,
                    "site_id": site.site_id,
                    "rectifier": site.rectifier,
                    "producer": site.producer,
                    "readers": ", ".join(site.readers),
                    "num_units": site.num_units,
                    "silent": silent,
                    **of,
                    "dead_fraction": _fraction(of["dead"], site.num_units),
                    "silent_fraction": _fraction(silent, site.num_units),
                }
            )
        columns = [
            "site", "site_id", "rectifier", "producer", "readers", "num_units", "dead", "unproven", "silent", "rare",
            "dormant", "saturated", "non_finite", "unobserved", "active", "dead_fraction", "silent_fraction",
        ]  # fmt: skip
        return pd.DataFrame(rows, columns=columns)

    def _counts(self) -> list[dict[str, int]]:
        """Of each site, how many units have each status."""
        sizes = np.array([site.num_units for site in self.table.sites], dtype=np.int64)
        codes, known = pd.factorize(self.judgement.units["status"])
        owners = np.repeat(np.arange(len(sizes)), sizes)
        table = np.bincount(owners * len(known) + codes, minlength=len(sizes) * len(known)).reshape(
            len(sizes), len(known)
        )
        places = {status: place for place, status in enumerate(known)}
        return [
            {status.value: int(row[places[status.value]]) if status.value in places else 0 for status in _COUNTED}
            for row in table
        ]

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The verdict in plain values; fractions are of the units that can die."""
        sites, coverage = self.sites, self.table.coverage
        mortal = [site.can_die for site in self.table.sites]
        num_units = int(sites.loc[mortal, "num_units"].sum())
        total = {status.value: int(sites[status.value].sum()) for status in _COUNTED}
        silent = total["dead"] + total["unproven"]
        return {
            "severity": self._severity(num_units, total).value,
            "num_units": num_units,
            **total,
            "silent": silent,
            "dead_fraction": _fraction(total["dead"], num_units),
            "silent_fraction": _fraction(silent, num_units),
            "num_other_units": int(sites["num_units"].sum()) - num_units,
            "num_inputs": coverage.num_inputs,
            "distinct_inputs": coverage.distinct_inputs,
            "inputs_needed": self.needed,
            "max_firing_rate": self.config.max_firing_rate,
            "confidence": self.config.confidence,
            "num_sites": len(sites) + len(coverage.unused),
            "num_observed_sites": len(sites) - len(self._unobserved()),
            "unobserved_sites": [*self._unobserved(), *coverage.unused],
            "random_inputs": coverage.random_inputs,
            "mode": coverage.mode,
        }

    def _unobserved(self) -> list[str]:
        units = self.judgement.units
        seen = set(units["site_id"].to_numpy(object)[units["inputs"].to_numpy() > 0])
        return [site.name for site in self.table.sites if site.site_id not in seen]

    def _severity(self, num_units: int, total: Mapping[str, int]) -> Severity:
        if total["non_finite"]:
            return Severity.NON_FINITE
        open_question = total["unproven"] and _fraction(total["dead"], num_units) < self.config.mild_fraction
        if self.table.coverage.random_inputs or open_question or (num_units and total["unobserved"] >= num_units):
            return Severity.INCONCLUSIVE
        stuck = _fraction(total["dead"] + total["unproven"] + total["saturated"], num_units)
        for limit, severity in (
            (self.config.critical_fraction, Severity.CRITICAL),
            (self.config.serious_fraction, Severity.SERIOUS),
            (self.config.mild_fraction, Severity.MILD),
        ):
            if stuck >= limit:
                return severity
        return Severity.HEALTHY

    def scalars(self) -> dict[str, float]:
        """Flat numbers for any experiment tracker, under names that stay the same.

        ``relu_doctor/`` and ``dead_fraction``, ``unproven_fraction``, ``silent_fraction`` (both together),
        ``rare_fraction``, ``dormant_fraction``, ``saturated_fraction``, ``dead`` and ``num_units`` are of the units
        that can die; ``non_finite_fraction`` and ``unobserved_fraction`` of all. ``relu_doctor_sites/<site>/`` has
        ``dead_fraction`` and ``silent_fraction`` of the 12 sites that have lost most. A fraction is NaN where nothing
        is known of the units.
        """
        from relu_doctor.reports.scalars import flat_scalars

        return flat_scalars(self)

    def mask(self, status: str | Status) -> dict[str, Tensor]:
        """Site name to a bool tensor (units,): which of its units have a status.

        Args:
            status: one of :class:`~relu_doctor.terms.Status`, or ``silent`` for dead and unproven together.

        Raises:
            ValueError: there is no such status.
        """
        known = [value.value for value in Status]
        if status != "silent" and status not in known:
            raise ValueError(f"expected one of {', '.join([*known, 'silent'])}, found {status!r}.")
        wanted = ["dead", "unproven"] if status == "silent" else [str(status)]
        return {
            str(name): torch.from_numpy(rows["status"].isin(wanted).to_numpy().copy())
            for name, rows in self.units.groupby("site", sort=False)
        }

    def rediagnose(self, config: Config | Mapping[str, Any] | str | Path | None) -> Diagnosis:
        """Judge the same evidence under other thresholds, without the model.

        Args:
            config: anything that :func:`~relu_doctor.config.load_config` takes.
        """
        return diagnose(self.table, config, history=self.history, made=self.metadata)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, versioned; see :mod:`relu_doctor.diagnose.storage`."""
        from relu_doctor.diagnose.storage import to_dict

        return to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Diagnosis:
        """The diagnosis that :meth:`to_dict` described."""
        from relu_doctor.diagnose.storage import from_dict

        return from_dict(data)

    def save(self, path: str | Path) -> Path:
        """Write the diagnosis: ``.json``, or a columnar ``.safetensors`` file above 100,000 units.

        Returns:
            The path written, whose suffix is ``.safetensors`` where the columnar file was needed.

        Raises:
            OutputError: the file cannot be written.
        """
        from relu_doctor.diagnose.storage import save

        return save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Self | Diagnosis:
        """Read what :meth:`save` wrote.

        Raises:
            DiagnosisFormatError: the file is missing, damaged, not a diagnosis, or of a newer schema.
        """
        from relu_doctor.diagnose.storage import load

        return load(Path(path))

    def __str__(self) -> str:
        from relu_doctor.reports.console import render_text

        return render_text(self)

    def __repr__(self) -> str:
        summary = self.summary
        return (
            f"<Diagnosis {summary['severity']}: {summary['dead']} dead, {summary['unproven']} unproven of "
            f"{summary['num_units']} units, {len(self.table.sites)} sites, {summary['num_inputs']} inputs>"
        )

    def _repr_html_(self) -> str:
        from relu_doctor.reports.notebook import render_html

        return render_html(self)


def _fraction(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def diagnose(
    table: UnitTable,
    config: Config | Mapping[str, Any] | str | Path | None = None,
    *,
    history: LearningRateEvidence | None = None,
    made: Mapping[str, Any] | None = None,
) -> Diagnosis:
    """Judge a table of evidence.

    Args:
        table: from a scan, a saved diagnosis, or made by hand.
        config: anything that :func:`~relu_doctor.config.load_config` takes.
        history: learning-rate evidence from files.
        made: metadata of the scan; made up here where it is new.
    """
    thresholds = load_config(config)
    return Diagnosis(
        table=table,
        judgement=judge(table, thresholds),
        config=thresholds,
        history=history,
        metadata=dict(made) if made is not None else made_now(),
    )


def made_now() -> dict[str, Any]:
    """When, and with which versions: the metadata of what is made now."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in ("torch", "pandas", "numpy", "relu-doctor")},
        "python": platform.python_version(),
    }


@lru_cache(maxsize=8)
def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"
