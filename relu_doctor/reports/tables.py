"""The table of units as CSV, safe to open in a spreadsheet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from relu_doctor.reports.words import plain_name

if TYPE_CHECKING:
    from relu_doctor.diagnose.diagnosis import Diagnosis

_TEXT = ("checkpoint", "site", "site_id", "rectifier", "status", "mechanism")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes for the beginning of a formula


def units_csv(diagnoses: Diagnosis | Mapping[str, Diagnosis]) -> str:
    """One row per unit, missing values empty, floats at full precision, lines ended by a line feed.

    A text that a spreadsheet would take for a formula gets an apostrophe in front; control characters in names are
    written as escapes.

    Args:
        diagnoses: one diagnosis, or several by name: then a first column ``checkpoint`` holds the name.
    """
    if isinstance(diagnoses, Mapping):
        frames = [each.units.assign(checkpoint=name) for name, each in diagnoses.items()]
        table = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["checkpoint"])
        table = table[["checkpoint", *(name for name in table.columns if name != "checkpoint")]]
    else:
        table = diagnoses.units.copy()
    for name in _TEXT:
        if name in table.columns:
            table[name] = inert(table[name])
    return str(table.to_csv(index=False, lineterminator="\n"))


def inert(texts: pd.Series[Any]) -> pd.Series[Any]:
    """A column of texts as a spreadsheet may open it; missing values stay missing."""
    safe = {value: _inert(str(value)) for value in texts.dropna().unique()}
    return texts.map(safe)


def _inert(text: str) -> str:
    shown = plain_name(text)
    return f"'{shown}" if text.startswith(_FORMULA) else shown
