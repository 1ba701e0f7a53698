"""WriterLock: one process at a time writes a history; the lock dies with its process, on every platform."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from relu_doctor.training.history_schema import LOCK


class WriterLock:
    """An exclusive lock on an empty file beside the history, held by an open SQLite transaction that writes nothing.

    The operating system lets go of it when the process ends, however it ends; a forked child does not inherit it, so a
    data loader's worker that outlives a killed run holds nothing. SQLite keeps it within one process too.

    Args:
        directory: of the history; must exist.
        patience: seconds to wait for another's lock, for those who only look whether it is held.

    Raises:
        sqlite3.Error: it is held (``SQLITE_BUSY``) or cannot be had.
    """

    def __init__(self, directory: Path, *, patience: float = 1.0) -> None:
        self._connection = sqlite3.connect(
            directory / LOCK, timeout=patience, isolation_level=None, check_same_thread=False
        )
        try:
            self._connection.execute("PRAGMA journal_mode = OFF").fetchone()  # nothing is written, so nothing is left
            self._connection.execute("BEGIN EXCLUSIVE")
        except BaseException:
            self._connection.close()
            raise

    def release(self) -> None:
        """Let others write; once is as good as twice."""
        self._connection.close()


def is_locked(directory: Path) -> bool:
    """Whether a process holds the lock of a history now."""
    path = (directory / LOCK).absolute()
    if not path.is_file():
        return False
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=0)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError as error:
        return error.sqlite_errorcode & 0xFF in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
    except sqlite3.DatabaseError:  # no file of ours
        return False
    return False
