"""The table of units for other programs: CSV that is safe to open in a spreadsheet, and Parquet."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from io import BytesIO
from typing import TYPE_CHECKING, Any

import pandas as pd

from relu_doctor.errors import OutputError
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
    table = _units(diagnoses)
    for name in _TEXT:
        if name in table.columns:
            table[name] = inert(table[name])
    return str(table.to_csv(index=False, lineterminator="\n"))


def units_parquet(diagnoses: Diagnosis | Mapping[str, Diagnosis]) -> bytes:
    """One row per unit as a Parquet file, every value as it is.

    Args:
        diagnoses: as for :func:`units_csv`.

    Raises:
        OutputError: pyarrow is not installed.
    """
    need_parquet()
    file = BytesIO()
    _units(diagnoses).to_parquet(file, index=False, engine="pyarrow")
    return file.getvalue()


def need_parquet() -> None:
    """Refuse at once what could not be written.

    Raises:
        OutputError: pyarrow is not installed.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise OutputError(
            "Parquet needs the package pyarrow, which is not installed: pip install pyarrow, or take --format csv."
        )


def _units(diagnoses: Diagnosis | Mapping[str, Diagnosis]) -> pd.DataFrame:
    if not isinstance(diagnoses, Mapping):
        return diagnoses.units.copy()
    frames = [each.units.assign(checkpoint=name) for name, each in diagnoses.items()]
    table = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["checkpoint"])
    return table[["checkpoint", *(name for name in table.columns if name != "checkpoint")]]


def inert(texts: pd.Series[Any]) -> pd.Series[Any]:
    """A column of texts as a spreadsheet may open it; missing values stay missing."""
    safe = {value: _inert(str(value)) for value in texts.dropna().unique()}
    return texts.map(safe)


def _inert(text: str) -> str:
    shown = plain_name(text)
    return f"'{shown}" if text.startswith(_FORMULA) else shown
