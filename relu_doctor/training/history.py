"""History: every window of a run, kept in an embedded store that survives the run's death at any moment."""

from __future__ import annotations

import os
import socket
import sqlite3
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Any, Self

from relu_doctor.config import Config
from relu_doctor.diagnose.diagnosis import made_now
from relu_doctor.errors import HistoryError, ReLUDoctorWarning
from relu_doctor.text import clean_text
from relu_doctor.training.history_files import (
    connect_to_write,
    explained,
    identity,
    make_directory,
    named,
    plain_json,
)
from relu_doctor.training.history_lock import WriterLock
from relu_doctor.training.history_owner import lock_to_write, new_writer, writer_in
from relu_doctor.training.history_reading import HistoryReader
from relu_doctor.training.history_rows import Codes, WindowRows, insert, supersede, tell
from relu_doctor.training.history_schema import stored_text
from relu_doctor.training.windows import Alert, Window


class History:
    """The store of a run, open for writing; :meth:`open` makes one, :meth:`read` reads one.

    What :meth:`append` has returned from is on the disk: it survives ``kill -9`` and the loss of power. One process
    writes at a time, and readers may look at any time. A run that goes on with the same directory continues the
    timeline by global step; one that goes back to an earlier step supersedes the windows from that step on, which are
    kept and marked. The tables are described in :mod:`relu_doctor.training.history_schema`.

    May be used from several threads, not from a forked child. On a network file system the readers must be on the
    writer's machine, or wait for the run's end.
    """

    _closed = True  # until it is open: what __del__ sees of one that never was

    def __init__(self, path: Path, lock: WriterLock, connection: sqlite3.Connection) -> None:
        self.path = path
        self.run_id: int | None = None
        self._lock, self._connection = lock, connection
        self._guard = RLock()
        self._owner = os.getpid()
        self._file = identity(path)
        self._codes = Codes(connection)
        self._writer = new_writer()
        self._closed = False

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, patience: float = 1.0) -> Self:
        """Open the history of a directory for writing; both are made where there is none.

        Args:
            path: of the directory; other files in it are left alone.
            patience: seconds to wait for another process that writes it.

        Raises:
            HistoryError: another process writes it, it is foreign, damaged or of a newer schema, or the directory
                cannot be written.
        """
        directory = Path(path)
        with explained(directory, "write"):
            if directory.exists() and not directory.is_dir():
                raise HistoryError(
                    f"expected a directory for the history, found a file at {named(directory)}; give another path."
                )
            make_directory(directory)
            lock = lock_to_write(directory, patience)
            try:
                history = cls(directory, lock, connect_to_write(directory))
            except BaseException:
                lock.release()
                raise
        try:
            with history._transaction(claim=True) as connection:
                connection.execute("INSERT OR REPLACE INTO meta VALUES ('writer', ?)", [history._writer])
        except BaseException:
            history.close()
            raise
        return history

    @staticmethod
    def read(path: str | os.PathLike[str], *, superseded: bool = False) -> HistoryReader:
        """Read a history: finished, killed or still being written, also where nothing may be written.

        Args:
            path: of the directory.
            superseded: also show windows of abandoned branches, marked by ``superseded_by``.

        Raises:
            HistoryError: there is none, or it is foreign, damaged, of a newer schema or unreadable.
        """
        return HistoryReader(Path(path), superseded=superseded)

    def begin(
        self,
        *,
        start_step: int = 0,
        config: Config | Mapping[str, Any] | None = None,
        command: Sequence[str] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> int:
        """Note that a run begins; a former one of this writer ends.

        Args:
            start_step: the first global step that the run will take. Where the history already reaches it, a
                :class:`~relu_doctor.errors.ReLUDoctorWarning` says that those windows will be superseded.
            config: the thresholds in use.
            command: the command line; this process's by default. The environment is not kept.
            details: what else to keep, plain values.

        Returns:
            The number of the run, from 1.

        Raises:
            HistoryError: it cannot be written.
        """
        self._end("another run began")
        made = made_now()
        row = {
            "started": time.time(),
            "start_step": int(start_step),
            "pid": os.getpid(),
            "host": stored_text(socket.gethostname()),
            "command": plain_json(list(sys.argv if command is None else command)),
            "versions": plain_json({**made["versions"], "python": made["python"]}),
            "config": plain_json(config.to_dict() if isinstance(config, Config) else dict(config or {})),
            "details": plain_json(dict(details or {})),
        }
        with self._transaction() as connection:
            run_id = insert(connection, "runs", row)
            reached = connection.execute("SELECT max(last_step) FROM live_windows").fetchone()[0]
        self.run_id = run_id
        if reached is not None and reached >= start_step:
            warnings.warn(
                f"the history {named(self.path)} already reaches step {reached:,} and this run begins at step "
                f"{start_step:,}: its windows will supersede those from there on, which are kept; give another "
                "directory if this is another run.",
                ReLUDoctorWarning,
                stacklevel=2,
            )
        return run_id

    def append(self, window: Window) -> int:
        """Keep a window; once this returns, it survives the process and the machine.

        Live windows that reach its first step or beyond are superseded by it. Where it cannot be kept, the store is as
        it was, stays open, and takes later windows.

        Returns:
            The number of the window, from 1.

        Raises:
            HistoryError: the disk is full, the store was removed or taken over, or :meth:`begin` was not called.
            ValueError: the window's tables do not fit its diagnosis.
        """
        run_id = self._begun()
        rows = WindowRows(window)
        with self._transaction() as connection:
            window_id = insert(connection, "windows", {"run_id": run_id, **rows.window_row()})
            supersede(connection, window_id, run_id, window.first_step)
            keys = rows.site_keys(connection)
            for key, row in zip(keys, rows.site_window_rows(), strict=True):
                insert(connection, "site_windows", {"window_id": window_id, "site_key": key, **row})
            for key, row in zip(keys, rows.unit_rows(connection, self._codes), strict=True):
                insert(connection, "units", {"window_id": window_id, "site_key": key, **row})
            for row in rows.finding_rows():
                insert(connection, "findings", {"window_id": window_id, **row})
            for alert in window.alerts:
                tell(connection, run_id, alert, window_id)
            connection.execute(
                "UPDATE alerts SET window_id = ? WHERE window_id IS NULL AND run_id = ? AND step <= ?",
                [window_id, run_id, int(window.last_step)],
            )
            connection.execute("DELETE FROM diagnosis")
            for part, content in enumerate(rows.parts):
                insert(connection, "diagnosis", {"window_id": window_id, "part": part, "content": content})
        return window_id

    def append_alert(self, alert: Alert) -> None:
        """Keep an alert at once, before its window closes; the window may tell it again, and it is kept once.

        Raises:
            HistoryError: as :meth:`append`.
        """
        run_id = self._begun()
        with self._transaction() as connection:
            tell(connection, run_id, alert, None)

    def end(self, reason: str = "finished") -> None:
        """Note that the run ended, and why; a run that ended already stays as it was noted.

        Raises:
            HistoryError: it cannot be written.
        """
        self._end(reason)

    def _end(self, reason: str) -> None:
        if self.run_id is None:
            return
        with self._transaction() as connection:
            connection.execute(
                "UPDATE runs SET ended = ?, reason = ? WHERE run_id = ?",
                [time.time(), stored_text(reason), self.run_id],
            )
        self.run_id = None

    def close(self) -> None:
        """End the run if that was not noted, and let go of the store; once is as good as twice. Never raises."""
        with self._guard:
            if self._closed:
                return
            if os.getpid() != self._owner:  # a forked child's copy: the parent's is the one to close
                self._closed = True
                return
            with suppress(HistoryError):  # what was committed is there; the run will read as stopped
                self._end("closed")
            self._closed = True
            try:
                _leave_one_file(self._connection)
            finally:
                self._connection.close()
                self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not self._closed:
                self._end("finished" if error is None else f"{type(error).__name__}: {clean_text(error)}")
        except HistoryError:
            if error is None:
                raise
        finally:
            self.close()

    def __del__(self) -> None:
        if not self._closed and os.getpid() == self._owner:
            warnings.warn(
                f"the history {named(self.path)} was not closed; use `with`.",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )
            self.close()

    def _begun(self) -> int:
        if self.run_id is None and not self._closed:
            raise HistoryError(f"expected begin() before a window of the history {named(self.path)}, found no run.")
        return self.run_id or 0

    @contextmanager
    def _transaction(self, *, claim: bool = False) -> Iterator[sqlite3.Connection]:
        """All of it or nothing is written; ``claim`` is the one by which this writer begins."""
        with self._guard, explained(self.path, "write"):
            self._check_mine()
            connection = self._connection
            try:
                connection.execute("BEGIN IMMEDIATE")
                # A program that copies the directory in this process lets go of its locks unawares, as POSIX has it.
                if not claim and writer_in(connection) != self._writer:
                    raise HistoryError(
                        f"the history {named(self.path)} was taken over by another process; this one writes no more."
                    )
                yield connection
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    def _check_mine(self) -> None:
        """Raises HistoryError where a write would be lost or do harm."""
        where = named(self.path)
        if os.getpid() != self._owner:
            raise HistoryError(
                f"the history {where} was opened by process {self._owner} and cannot be used in its fork {os.getpid()}."
            )
        if self._closed:
            raise HistoryError(f"the history {where} is closed; open it again.")
        if identity(self.path) != self._file:
            raise HistoryError(f"the history {where} was removed or replaced while it was written; open it again.")


def _leave_one_file(connection: sqlite3.Connection) -> None:
    """Fold the log into the store, which can then be read where nothing may be written; a reader may prevent it."""
    try:
        connection.execute("PRAGMA busy_timeout = 250")
        connection.execute("PRAGMA journal_mode = DELETE").fetchone()
    except sqlite3.Error:
        pass
