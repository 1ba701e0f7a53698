"""From a Window to the rows of a history's tables."""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relu_doctor.diagnose.storage import records, to_columns
from relu_doctor.training.history_files import plain_json
from relu_doctor.training.history_schema import (
    COUNTS,
    FRACTIONS,
    NUMBERS,
    UNIT_DATA,
    UnitColumn,
    pack,
    pack_whole,
    stored_text,
    whole_numbers,
)
from relu_doctor.training.windows import SITE_COLUMNS, Alert, Window

_SITE = ("site_id", "site", "rectifier", "producer", "readers", "num_units")
_PART = 64 << 20  # bytes of a diagnosis in one row; SQLite's own limit is 1 GB
_MOST_WORDS = 256  # a code is a byte


class Codes:
    """The words of a history and their bytes; a word that it does not know yet gets the next byte, for ever.

    Args:
        connection: of the store.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._codes: dict[str, dict[str, int]] = {}
        for kind, code, word in connection.execute("SELECT kind, code, word FROM codes"):
            self._codes.setdefault(kind, {})[word] = code

    def learn(self, connection: sqlite3.Connection, kind: str, words: set[str]) -> None:
        """Give bytes to new words, inside the caller's transaction; told again after it failed, they are kept.

        Raises:
            ValueError: there are more words than a byte can tell apart.
        """
        known = self._codes.setdefault(kind, {})
        for word in sorted(words - known.keys()):
            known[word] = len(known)
        if len(known) > _MOST_WORDS:
            raise ValueError(f"expected at most {_MOST_WORDS} words for {kind}, found {len(known)}.")
        rows = [(kind, known[word], word) for word in words]
        connection.executemany("INSERT OR IGNORE INTO codes VALUES (?, ?, ?)", rows)

    def of(self, kind: str, words: NDArray[Any], uniques: NDArray[Any]) -> NDArray[np.uint8]:
        """Codes of factorized words, (units,)."""
        table = np.array([self._codes[kind][str(word)] for word in uniques], dtype=np.uint8)
        return table[words] if len(table) else np.zeros(len(words), np.uint8)


class WindowRows:
    """The rows that one window adds.

    Args:
        window: what closed.

    Raises:
        ValueError: its tables do not fit its diagnosis.
    """

    def __init__(self, window: Window) -> None:
        self.window = window
        self._sites = window.diagnosis.table.sites
        self._starts = np.cumsum([0, *(site.num_units for site in self._sites)])
        for name, rows in (("diagnosis.units", window.diagnosis.units), ("units", window.units)):
            if len(rows) != self._starts[-1] and (name != "units" or len(rows)):
                raise ValueError(f"expected {self._starts[-1]:,} rows in window.{name}, found {len(rows):,}.")
        parts = to_columns(window.diagnosis)
        self.parts = [parts[start : start + _PART] for start in range(0, len(parts), _PART)]

    def window_row(self) -> dict[str, Any]:
        """The row of ``windows``, but for its keys."""
        window, summary = self.window, self.window.diagnosis.summary
        return {
            "index": int(window.index),
            "first_step": int(window.first_step),
            "last_step": int(window.last_step),
            "closed": float(window.closed),
            "severity": str(summary["severity"]),
            "num_units": int(summary["num_units"]),
            **{name: int(summary[name]) for name in COUNTS},
            **{name: float(summary[name]) for name in FRACTIONS},
            **{name: int(summary[name]) for name in ("num_inputs", "distinct_inputs", "inputs_needed")},
            **{name: float(window.numbers[name]) for name in NUMBERS if name in window.numbers},
            "numbers": plain_json({str(name): _finite(value) for name, value in window.numbers.items()}),
        }

    def site_keys(self, connection: sqlite3.Connection) -> list[int]:
        """The keys of its sites, in forward order; what is new or has changed goes into ``sites``."""
        known = {row[1]: row for row in connection.execute(f"SELECT site_key, {', '.join(_SITE)} FROM sites")}
        keys = []
        for site in self._sites:
            row = {
                "site_id": stored_text(site.site_id),
                "site": stored_text(site.name),
                "rectifier": stored_text(site.rectifier),
                "producer": stored_text(site.producer),
                "readers": plain_json(list(site.readers)),
                "num_units": int(site.num_units),
            }
            found = known.get(row["site_id"])
            if found is None:
                keys.append(insert(connection, "sites", row))
                continue
            keys.append(int(found[0]))
            if found[1:] != tuple(row.values()):
                insert(connection, "sites", {"site_key": found[0], **row}, how="REPLACE")
        return keys

    def site_window_rows(self) -> Iterator[dict[str, Any]]:
        """The rows of ``site_windows``, in forward order, but for their keys."""
        more = {str(row["site_id"]): row for row in records(self.window.sites)}
        for place, row in enumerate(records(self.window.diagnosis.sites)):
            measured: Mapping[Any, Any] = more.get(str(row["site_id"]), {})
            yield {
                "place": place,
                "num_units": int(row["num_units"]),
                **{name: int(row[name]) for name in COUNTS},
                **{name: float(row[name]) for name in FRACTIONS},
                **{name: float(measured[name]) for name in SITE_COLUMNS if measured.get(name) is not None},
            }

    def unit_rows(self, connection: sqlite3.Connection, codes: Codes) -> list[dict[str, Any]]:
        """The rows of ``units``, in forward order, but for their keys; new words are learnt."""
        rows: list[dict[str, Any]] = [{"num_units": int(site.num_units)} for site in self._sites]
        for column in UNIT_DATA:
            source = self.window.units if column.carried else self.window.diagnosis.units
            if column.name not in source:
                continue
            values = _values(column, source[column.name], connection, codes)
            for row, start, stop in zip(rows, self._starts[:-1], self._starts[1:], strict=True):
                if start < stop <= len(values):
                    row[column.name] = pack(column, values[start:stop])
        return rows

    def finding_rows(self) -> Iterator[dict[str, Any]]:
        """The rows of ``findings``, but for the window's key."""
        for place, finding in enumerate(self.window.diagnosis.findings):
            yield {
                "place": place,
                **{name: stored_text(getattr(finding, name)) for name in ("code", "site", "title", "mechanism")},
                **{name: stored_text(getattr(finding, name)) for name in ("evidence", "advice")},
                "units": pack_whole(finding.unit_indices),
            }


def alert_row(alert: Alert) -> dict[str, Any]:
    """The row of ``alerts``, but for its keys and its time."""
    return {
        "code": stored_text(alert.code),
        "step": int(alert.step),
        "site": stored_text(alert.site),
        "message": stored_text(alert.message),
        "evidence": plain_json(dict(alert.evidence)),
    }


def insert(connection: sqlite3.Connection, table: str, row: Mapping[str, Any], *, how: str = "INSERT") -> int:
    """Add one row by the names of its columns.

    Returns:
        Its number.
    """
    names = ", ".join(f'"{name}"' for name in row)
    marks = ", ".join("?" * len(row))
    cursor = connection.execute(f"{how} INTO {table} ({names}) VALUES ({marks})", list(row.values()))
    return int(cursor.lastrowid or 0)


def supersede(connection: sqlite3.Connection, window_id: int, run_id: int, first_step: int) -> None:
    """Mark the live windows that reach a step, and what belongs to them."""
    abandoned = "SELECT window_id FROM windows WHERE superseded_by = :by"
    values = {"by": window_id, "run": run_id, "step": int(first_step)}
    connection.execute(
        "UPDATE windows SET superseded_by = :by WHERE superseded_by IS NULL AND last_step >= :step "
        "AND window_id <> :by",
        values,
    )
    connection.execute(
        f"UPDATE alerts SET superseded_by = :by WHERE superseded_by IS NULL AND (window_id IN ({abandoned}) "
        "OR (window_id IS NULL AND run_id <> :run AND step >= :step))",
        values,
    )


def tell(connection: sqlite3.Connection, run_id: int, alert: Alert, window_id: int | None) -> None:
    """Keep an alert, unless its run has told it already."""
    row = alert_row(alert)
    known = connection.execute(
        "SELECT 1 FROM alerts WHERE run_id = ? AND superseded_by IS NULL AND code = ? AND step = ? AND site = ? "
        "AND message = ?",
        [run_id, *(row[name] for name in ("code", "step", "site", "message"))],
    ).fetchone()
    if known is None:
        insert(connection, "alerts", {"run_id": run_id, "window_id": window_id, "told": time.time(), **row})


def _values(column: UnitColumn, values: Any, connection: sqlite3.Connection, codes: Codes) -> NDArray[Any]:
    if column.kind == "word":
        places, uniques = values.fillna("").factorize()
        codes.learn(connection, column.name, {str(word) for word in uniques})
        return codes.of(column.name, places, np.asarray(uniques, dtype=object))
    if column.kind == "whole":
        return whole_numbers(values)
    with np.errstate(over="ignore"):  # beyond float32's reach: infinite
        return np.asarray(values.to_numpy(dtype=np.float64, na_value=math.nan).astype(column.dtype))


def _finite(value: float) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
