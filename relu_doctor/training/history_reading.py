"""HistoryReader: what a history holds, as DataFrames and as its latest Diagnosis, while the run goes on or after it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pandas as pd

from relu_doctor.diagnose.diagnosis import Diagnosis
from relu_doctor.diagnose.storage import from_columns
from relu_doctor.errors import DiagnosisFormatError, HistoryError
from relu_doctor.text import clean_text
from relu_doctor.training.history_files import connected_to_read, named
from relu_doctor.training.history_lock import is_locked
from relu_doctor.training.history_owner import writer_of
from relu_doctor.training.history_schema import COUNTS, FILE, FRACTIONS, TIMELINE, UNIT_DATA, unpack

EMPTY, RUNNING, ENDED, STOPPED = "empty", "running", "ended", "stopped"
_LIVE = "windows.superseded_by IS NULL"


@dataclass(frozen=True, slots=True)
class RunState:
    """How a history stands.

    Attributes:
        state: ``running``, ``ended``, ``stopped`` (killed: it did not say that it ended) or ``empty``.
        reason: why it ended.
        writer: who writes or last wrote, for people.
    """

    state: str
    reason: str
    writer: str


class HistoryReader:
    """Reads a history; nothing is written, and a run that writes it never waits.

    Each property reads what is there when it is asked for. Inside ``with reader:`` all of them read one moment, which
    keeps the writer's log from being folded: leave it soon.

    Args:
        path: of the directory.
        superseded: also show abandoned branches, marked by ``superseded_by``.

    Raises:
        HistoryError: there is no history, or it is foreign, damaged, of a newer schema or unreadable.
    """

    def __init__(self, path: Path, *, superseded: bool = False) -> None:
        self.path = path
        self._where = "1" if superseded else _LIVE
        self._moment = ExitStack()
        self._held: sqlite3.Connection | None = None
        with self._connected():
            pass

    def __enter__(self) -> Self:
        self._held = self._moment.enter_context(connected_to_read(self.path))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held = None
        self._moment.close()

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        if self._held is not None:
            yield self._held
            return
        with connected_to_read(self.path) as connection:
            yield connection

    def _frame(self, query: str, *values: Any) -> pd.DataFrame:
        with self._connected() as connection:
            cursor = connection.execute(query, values)
            frame = pd.DataFrame(cursor.fetchall(), columns=[column[0] for column in cursor.description])
        for name in ("superseded_by", "window_id"):
            if name in frame:
                frame[name] = frame[name].astype("Int64")
        return frame

    @property
    def windows(self) -> pd.DataFrame:
        """One row per window, in the order of their steps; columns as in the table ``windows``."""
        return self._frame(f"SELECT * FROM windows WHERE {self._where} ORDER BY last_step, window_id")

    @property
    def sites(self) -> pd.DataFrame:
        """One row per site of the latest window, in forward order: what it is, and its numbers of that window."""
        counts = ", ".join(f"site_windows.{name}" for name in ("num_units", *COUNTS, *FRACTIONS))
        return self._frame(
            f"SELECT site, site_id, rectifier, producer, readers, {counts} FROM site_windows "
            "JOIN sites USING (site_key) WHERE window_id = (SELECT max(window_id) FROM windows) ORDER BY place"
        )

    @property
    def timeline(self) -> pd.DataFrame:
        """One row per window and site, in the order of steps and of the forward."""
        return self._frame(f"{TIMELINE} WHERE {self._where} ORDER BY last_step, window_id, place")

    @property
    def findings(self) -> pd.DataFrame:
        """One row per finding and window; ``units`` holds their indices."""
        frame = self._frame(
            f"SELECT findings.* FROM findings JOIN windows USING (window_id) WHERE {self._where} "
            "ORDER BY last_step, window_id, place"
        )
        with self._sound():
            frame["units"] = [unpack(blob, "<i8", deflated=True).tolist() for blob in frame["units"]]
        return frame

    @property
    def alerts(self) -> pd.DataFrame:
        """One row per alert, in the order of their steps; ``window_id`` is missing while its window is open."""
        where = self._where.replace("windows.", "")
        return self._frame(f"SELECT * FROM alerts WHERE {where} ORDER BY step, alert_id")

    @property
    def runs(self) -> pd.DataFrame:
        """One row per run that wrote here; ``ended`` is missing of one that runs or was killed."""
        return self._frame("SELECT * FROM runs ORDER BY run_id")

    @property
    def num_superseded(self) -> int:
        """How many windows of abandoned branches are kept."""
        with self._connected() as connection:
            found = connection.execute("SELECT count(*) FROM windows WHERE superseded_by IS NOT NULL").fetchone()
        return int(found[0])

    @property
    def mark(self) -> tuple[Any, ...]:
        """Changes whenever a window, an alert, a run or the state does; cheap to ask for."""
        with self._connected() as connection:
            query = (
                "SELECT (SELECT max(window_id) FROM windows), (SELECT max(alert_id) FROM alerts), count(*) FROM runs"
            )
            return (*connection.execute(query).fetchone(), self.state)

    def units(self, window: int | None = None) -> pd.DataFrame:
        """One row per unit of a window, in forward order.

        Args:
            window: ``window_id``; the latest by default.

        Returns:
            ``window_id, site, site_id, unit`` and the per-unit data; floats are float32, whole numbers int64.

        Raises:
            HistoryError: there is no such window, or its data are damaged.
        """
        with self._connected() as connection:
            if window is None:
                window = connection.execute("SELECT max(window_id) FROM windows").fetchone()[0]
            elif not connection.execute("SELECT 1 FROM windows WHERE window_id = ?", [window]).fetchone():
                raise HistoryError(f"expected a window_id of the history {named(self.path)}, found {window}.")
            return self._units(connection, window)

    def unit_frames(self) -> Iterator[pd.DataFrame]:
        """:meth:`units` of one window after the other: all of them may be more than fits in memory."""
        for window in self.windows["window_id"]:
            yield self.units(int(window))

    def _units(self, connection: sqlite3.Connection, window: int | None) -> pd.DataFrame:
        words = {
            kind: np.array([word for _, word in sorted(table.items())], dtype=object)
            for kind, table in _codes(connection).items()
        }
        columns = ", ".join(f"units.{column.name}" for column in UNIT_DATA)
        cursor = connection.execute(
            f"SELECT site, site_id, units.num_units, {columns} FROM units JOIN sites USING (site_key) "
            "JOIN site_windows USING (window_id, site_key) WHERE window_id = ? ORDER BY place",
            [window],
        )
        rows = cursor.fetchall()
        sizes = [int(row[2]) for row in rows]
        data: dict[str, Any] = {
            "window_id": np.full(sum(sizes), window or 0, dtype=np.int64),
            "site": np.repeat(np.array([row[0] for row in rows], dtype=object), sizes),
            "site_id": np.repeat(np.array([row[1] for row in rows], dtype=object), sizes),
            "unit": np.concatenate([np.arange(size) for size in (0, *sizes)]).astype(np.int64),
        }
        with self._sound():
            for place, column in enumerate(UNIT_DATA, start=3):
                missing = {"word": 0, "whole": -1, "real": np.nan}[column.kind]
                pieces = [np.zeros(0, column.dtype)]
                for row, size in zip(rows, sizes, strict=True):
                    values = (
                        np.full(size, missing, column.dtype)
                        if row[place] is None
                        else unpack(row[place], column.dtype, deflated=column.deflated)
                    )
                    if len(values) != size:
                        raise ValueError(f"{len(values)} values of {column.name} for {size} units")
                    pieces.append(values)
                values = np.concatenate(pieces)
                data[column.name] = words[column.name][values] if column.kind == "word" else values
        return pd.DataFrame(data)

    @property
    def latest(self) -> Diagnosis | None:
        """The whole diagnosis of the latest window; ``None`` while no window has closed."""
        with self._connected() as connection:
            parts = [part for (part,) in connection.execute("SELECT content FROM diagnosis ORDER BY part")]
        if not parts:
            return None
        try:
            return from_columns(b"".join(parts), self.path / FILE)
        except DiagnosisFormatError as error:
            raise HistoryError(str(error)) from error

    @property
    def state(self) -> RunState:
        """Whether a run writes it now, and how the last one ended."""
        locked = is_locked(self.path)
        with self._connected() as connection:
            run = connection.execute("SELECT ended, reason FROM runs ORDER BY run_id DESC LIMIT 1").fetchone()
            writer = writer_of(connection)
        if locked:
            return RunState(RUNNING, "", writer)
        if run is None:
            return RunState(EMPTY, "", writer)
        return RunState(STOPPED if run[0] is None else ENDED, str(run[1] or ""), writer)

    @contextmanager
    def _sound(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, TypeError, LookupError) as error:
            raise HistoryError(f"the history {named(self.path)} is damaged: {clean_text(error)}.") from error


def _codes(connection: sqlite3.Connection) -> dict[str, dict[int, str]]:
    codes: dict[str, dict[int, str]] = {column.name: {} for column in UNIT_DATA if column.kind == "word"}
    for kind, code, word in connection.execute("SELECT kind, code, word FROM codes"):
        codes.setdefault(kind, {})[code] = word
    return codes
