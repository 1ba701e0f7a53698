"""Frame: what a picture of one window needs, small enough to be kept for every window of a run.

The TensorBoard tab and the HTML page draw the same frames. A frame stands alone: whatever else of a run is lost, it can
be read. It is packed as

* a header: JSON in UTF-8, deflated; what there is to say of the run, the verdict, the sites and the findings,
* the status of every unit, sites in forward order: one byte each, a place in the header's ``statuses``; deflated,
* per site its numbers: the columns of the header's ``columns`` one behind the other, each of its dtype, little-endian;
  the bytes of each column are regrouped (all first bytes, all second bytes, …), which deflates better; deflated.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from relu_doctor.reports.coverage import coverage_line, coverage_remarks
from relu_doctor.reports.packing import (
    COLUMNS,
    MECHANISMS,
    ONSETS,
    SCHEMA,
    STATUSES,
    Bytes,
    FrameError,
    read_header,
    read_numbers,
    read_status,
)
from relu_doctor.reports.verdict import verdict
from relu_doctor.reports.words import plain_name
from relu_doctor.training.windows import SITE_COLUMNS

if TYPE_CHECKING:
    from relu_doctor.diagnose.diagnosis import Diagnosis
    from relu_doctor.training.windows import Window

__all__ = [
    "COLUMNS",
    "MECHANISMS",
    "ONSETS",
    "SCHEMA",
    "STATUSES",
    "Frame",
    "FrameError",
    "numbers_of",
    "ranges_of",
    "read_header",
    "read_numbers",
    "read_status",
    "site_of",
    "statuses_of",
    "verdict_of",
]
_COUNTS = ("dead", "unproven", "rare", "dormant", "saturated", "non_finite", "unobserved", "active")
_LEVEL = 6  # of zlib
_MOST_FINDINGS = 50


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One window of a run, or one scan.

    Attributes:
        span: ``window`` (its place in the run), ``first_step``, ``last_step`` and ``closed`` (seconds since the epoch).
        verdict: ``label``, ``severity``, ``sentence``, ``details``, ``coverage`` and ``remarks``, all text; and
            ``unit_word``, what is counted (``inputs``, ``tokens``).
        numbers: of the run, those that were had and are finite.
        sites: per site, in forward order: ``site_id``, ``name``, ``rectifier``, ``producer``, ``num_units``,
            ``can_die``, the number of units of each status, and what a window adds.
        status: uint8 (units,), all sites one behind the other: places in ``STATUSES``.
        units: per site, its ``COLUMNS``: (units,) each; ``mechanism`` and ``onset`` are places in ``MECHANISMS`` and
            ``ONSETS``.
        findings: ``code``, ``site``, ``title``, ``evidence``, ``advice`` and ``units``, ranges ``[first, last]``.
        alerts: ``code``, ``step``, ``site`` and ``message``.
    """

    span: Mapping[str, float | int | None]
    verdict: Mapping[str, Any]
    numbers: Mapping[str, float]
    sites: Sequence[Mapping[str, Any]]
    status: Bytes
    units: Sequence[Mapping[str, NDArray[Any]]]
    findings: Sequence[Mapping[str, Any]] = ()
    alerts: Sequence[Mapping[str, Any]] = field(default_factory=tuple)

    @classmethod
    def of_window(cls, window: Window) -> Self:
        """The frame of a monitor's window."""
        span = {
            "window": window.index,
            "first_step": window.first_step,
            "last_step": window.last_step,
            "closed": window.closed,
        }
        more: dict[str, Mapping[Any, Any]] = {str(row["site_id"]): row for row in window.sites.to_dict("records")}
        alerts = [
            {"code": each.code, "step": each.step, "site": plain_name(each.site), "message": plain_name(each.message)}
            for each in window.alerts
        ]
        return cls._of(window.diagnosis, span, window.numbers, more, window.units, alerts)

    @classmethod
    def of_diagnosis(cls, diagnosis: Diagnosis, step: int) -> Self:
        """The frame of a scan of the model after some step."""
        span = {"window": None, "first_step": step, "last_step": step, "closed": None}
        return cls._of(diagnosis, span, {}, {}, pd.DataFrame(), [])

    @classmethod
    def _of(
        cls,
        diagnosis: Diagnosis,
        span: Mapping[str, float | int | None],
        numbers: Mapping[str, float],
        more: Mapping[str, Mapping[Any, Any]],
        lives: pd.DataFrame,
        alerts: Sequence[Mapping[str, Any]],
    ) -> Self:
        sites, columns, stop = [], [], 0
        status, whole = statuses_of(diagnosis.units), numbers_of(diagnosis.units, lives)
        for site, row in zip(diagnosis.table.sites, diagnosis.sites.to_dict("records"), strict=True):
            start, stop = stop, stop + site.num_units
            columns.append({name: values[start:stop] for name, values in whole.items()})
            told = {**row, **more.get(site.site_id, {}), "can_die": site.can_die, "note": site.note}
            sites.append(site_of(told))
        findings = [
            {
                "code": finding.code,
                "site": plain_name(finding.site),
                "title": plain_name(finding.title),
                "evidence": plain_name(finding.evidence),
                "advice": plain_name(finding.advice),
                "units": ranges_of(finding.unit_indices),
            }
            for finding in diagnosis.findings[:_MOST_FINDINGS]
        ]
        finite = {name: float(value) for name, value in numbers.items() if math.isfinite(value)}
        return cls(dict(span), verdict_of(diagnosis), finite, sites, status, columns, findings, list(alerts))

    @property
    def header(self) -> dict[str, Any]:
        """All but what is told unit by unit, as plain values."""
        return {
            "schema": SCHEMA,
            **self.span,
            "verdict": dict(self.verdict),
            "numbers": dict(self.numbers),
            "sites": [dict(site) for site in self.sites],
            "findings": [dict(finding) for finding in self.findings],
            "alerts": [dict(alert) for alert in self.alerts],
            "statuses": list(STATUSES),
            "mechanisms": list(MECHANISMS),
            "onsets": list(ONSETS),
            "columns": [list(column) for column in COLUMNS],
        }

    def pack(self) -> tuple[bytes, bytes, list[bytes]]:
        """Header, status, and each site's numbers; see the head of this file."""
        header = json.dumps(self.header, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
        text = header.encode("utf-8", "replace")
        sites = [_deflated(*(columns[name].astype(dtype) for name, dtype in COLUMNS)) for columns in self.units]
        return zlib.compress(text, _LEVEL), _deflated(self.status), sites


def verdict_of(diagnosis: Diagnosis) -> dict[str, Any]:
    """What a diagnosis says, as the ``verdict`` of a frame."""
    said = verdict(diagnosis)
    return {
        "label": said.label,
        "severity": said.severity.value,
        "sentence": said.sentence,
        "details": list(said.details),
        "coverage": coverage_line(diagnosis),
        "remarks": list(coverage_remarks(diagnosis)),
        "unit_word": diagnosis.table.coverage.units,
        "max_firing_rate": diagnosis.config.max_firing_rate,
        "confidence": diagnosis.config.confidence,
    }


def site_of(row: Mapping[Any, Any]) -> dict[str, Any]:
    """A row per site, with its counts and what was measured of it, as one of the ``sites`` of a frame."""
    told = {"site_id": str(row["site_id"]), "name": plain_name(str(row["site"]))}
    told |= {name: plain_name(str(row[name])) for name in ("rectifier", "producer")}
    counts = {name: int(row[name]) for name in ("num_units", *_COUNTS)}
    measured = {name: _finite(row.get(name)) for name in SITE_COLUMNS}
    others = {"can_die": bool(row.get("can_die", True)), "note": plain_name(str(row.get("note", "")))}
    return told | counts | others | {name: value for name, value in measured.items() if value is not None}


def statuses_of(units: pd.DataFrame) -> Bytes:
    """The ``status`` of a frame, of one row per unit."""
    return _places(units["status"], STATUSES)


def ranges_of(indices: Sequence[int]) -> list[list[int]]:
    """Ascending indices as ranges, both ends included.

    >>> ranges_of([0, 1, 2, 5])
    [[0, 2], [5, 5]]
    """
    found: list[list[int]] = []
    for index in sorted(indices):
        if found and found[-1][1] == index - 1:
            found[-1][1] = index
        else:
            found.append([index, index])
    return found


def numbers_of(units: pd.DataFrame, lives: pd.DataFrame) -> dict[str, NDArray[Any]]:
    """The ``COLUMNS`` of all units.

    Args:
        units: one row each.
        lives: a monitor's, in the same order; empty where there is none.
    """
    number = len(units)
    told = len(lives) == number and number > 0
    found: dict[str, NDArray[Any]] = {"inputs": _whole(units["inputs"].to_numpy())}
    for name in ("firing_rate", "firing_rate_upper", "pre_max", "margin", "bias"):
        with np.errstate(over="ignore"):
            found[name] = units[name].to_numpy(np.float64, na_value=np.nan).astype("<f2")
    found["mechanism"] = _places(units["mechanism"], MECHANISMS)
    found["onset"] = _places(lives["onset"], ONSETS) if told else np.zeros(number, np.uint8)
    found["onset_step"] = _whole(lives["onset_step"].to_numpy()) if told else np.full(number, -1, "<i4")
    return found


def _whole(values: NDArray[Any]) -> NDArray[Any]:
    """Whole numbers in 32 bits; larger ones are told as the largest."""
    clipped: NDArray[Any] = np.clip(values, -1, np.iinfo(np.int32).max)
    return clipped.astype("<i4")


def _places(words: pd.Series[Any], known: Sequence[str]) -> Bytes:
    """Where each word stands among those that are known; 0 for others."""
    codes, uniques = pd.factorize(words)
    table = np.array([known.index(word) if word in known else 0 for word in uniques] or [0], np.uint8)
    found: Bytes = table[codes] if len(codes) else np.zeros(0, np.uint8)
    return found


def _deflated(*columns: NDArray[Any]) -> bytes:
    planes = [
        np.ascontiguousarray(column).view(np.uint8).reshape(len(column), column.dtype.itemsize).T.tobytes()
        for column in columns
    ]
    return zlib.compress(b"".join(planes), _LEVEL)


def _finite(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
