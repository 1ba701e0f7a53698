"""The files of a history: opened to write, opened to read wherever they lie, and what is wrong with them in words."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from relu_doctor.errors import HistoryError
from relu_doctor.terms import Mechanism, Status
from relu_doctor.text import clean_text
from relu_doctor.training.history_schema import APPLICATION_ID, FILE, LOCK, SCHEMA_VERSION, TABLES, UNIT_DATA

READER_PATIENCE = 5.0  # seconds; a reader only ever waits for a recovery
_FOLD_EVERY = 4000  # pages of SQLite's log, 16 MB: the latest diagnosis is overwritten there before it is folded in
_LOG_LIMIT = 64 << 20  # bytes that the log keeps after a large window
_ASK = "give another directory, or move it away"


def named(directory: Path) -> str:
    """A directory as messages show it."""
    return clean_text(directory)


def connect_to_write(directory: Path) -> sqlite3.Connection:
    """The store of a directory, made where there is none; the caller holds the lock.

    A commit returns once the operating system says that the window is on the disk. Where the file system has no shared
    memory, and so no write-ahead log, SQLite's older journal does the same, and readers wait for moments.

    Raises:
        HistoryError: foreign, damaged or of a newer schema.
        sqlite3.Error: anything else.
    """
    connection = sqlite3.connect(
        directory / FILE, timeout=READER_PATIENCE, isolation_level=None, check_same_thread=False
    )
    try:
        _check(connection, directory, new="may be made")
        connection.execute("PRAGMA journal_mode = WAL").fetchone()
        connection.execute("PRAGMA synchronous = EXTRA")
        connection.execute("PRAGMA fullfsync = 1")  # macOS: through the drive's own cache
        connection.execute("PRAGMA checkpoint_fullfsync = 1")
        connection.execute(f"PRAGMA wal_autocheckpoint = {_FOLD_EVERY}").fetchone()
        connection.execute(f"PRAGMA journal_size_limit = {_LOG_LIMIT}")
        connection.execute("BEGIN IMMEDIATE")
        if not _has_tables(connection):
            _make_tables(connection)
        connection.execute("COMMIT")
    except BaseException:
        connection.close()
        raise
    return connection


def _make_tables(connection: sqlite3.Connection) -> None:
    for statement in TABLES:
        connection.execute(statement)
    connection.executemany(
        "INSERT INTO meta VALUES (?, ?)",
        [("schema_version", str(SCHEMA_VERSION)), ("created", str(time.time()))],
    )
    connection.executemany(
        "INSERT INTO unit_columns VALUES (?, ?, ?, ?)",
        [(column.name, column.dtype, int(column.deflated), column.meaning) for column in UNIT_DATA],
    )
    for kind, words in (("status", Status), ("mechanism", Mechanism), ("onset", ("",))):  # 0 is for none
        rows = [(kind, code, str(word)) for code, word in enumerate(words)]
        connection.executemany("INSERT INTO codes VALUES (?, ?, ?)", rows)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")


def _has_tables(connection: sqlite3.Connection) -> bool:
    return bool(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])


def _check(connection: sqlite3.Connection, directory: Path, *, new: str = "") -> None:
    """Raises HistoryError unless the file is a history that this version knows, or ``new`` and still empty."""
    known = connection.execute("PRAGMA application_id").fetchone()[0]
    if not _has_tables(connection):
        if new and known in {0, APPLICATION_ID}:
            return
        raise HistoryError(f"expected a history in {named(directory)}, found one that was never begun; start the run.")
    if known != APPLICATION_ID:
        raise HistoryError(
            f"expected a history in {named(directory)}, found that its {FILE} is another program's database; {_ASK}."
        )
    row = connection.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone()
    version = int(row[0]) if row is not None and str(row[0]).isdigit() else 0
    if version > SCHEMA_VERSION:
        raise HistoryError(
            f"expected a history of schema {SCHEMA_VERSION} or older in {named(directory)}, found {version}: update "
            "relu-doctor."
        )
    if version < 1:
        raise HistoryError(
            f"expected a schema version in the history of {named(directory)}, found none: it is damaged."
        )


@contextmanager
def connected_to_read(directory: Path) -> Iterator[sqlite3.Connection]:
    """One moment of a history, of a running one too; nothing of it is written, and its writer never waits.

    Raises:
        HistoryError: there is none, it is foreign, damaged, of a newer schema, or cannot be read.
    """
    with ExitStack() as stack, explained(directory, "read"):
        connection = stack.enter_context(closing(_open_to_read(directory, stack)))
        connection.execute("BEGIN")
        _check(connection, directory)
        yield connection


def check_is_there(directory: Path) -> None:
    """Look for a history.

    Raises:
        HistoryError: there is none.
    """
    if not directory.exists():
        raise HistoryError(f"expected the directory of a history, found nothing at {named(directory)}.")
    if not directory.is_dir():
        raise HistoryError(f"expected the directory of a history, found a file at {named(directory)}.")
    if not (directory / FILE).is_file():
        raise HistoryError(
            f"expected a history in {named(directory)}, found no {FILE} there; is it the directory given to "
            "Monitor(history=...)?"
        )


def _open_to_read(directory: Path, stack: ExitStack) -> sqlite3.Connection:
    check_is_there(directory)
    try:
        return _read_only(directory / FILE, "mode=ro")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF not in {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY}:
            raise
    # What a killed run left must first be folded in or rolled back, which cannot be done in place by one who only
    # reads, or where nothing may be written. No process has it open, else SQLite would have read it.
    left = [path for end in ("-wal", "-journal") if (path := directory / f"{FILE}{end}").is_file()]
    if not any(path.stat().st_size for path in left):
        return _read_only(directory / FILE, "immutable=1")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="relu-doctor-")))
    for path in (directory / FILE, *left):
        shutil.copyfile(path, folder / path.name)
    return _read_only(folder / FILE, "mode=rw")


def _read_only(path: Path, how: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?{how}",
        uri=True,
        timeout=READER_PATIENCE,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def identity(directory: Path) -> tuple[int, int] | None:
    """Which file lies under the store's name now; ``None`` where none does."""
    try:
        found = (directory / FILE).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def make_directory(directory: Path) -> None:
    """Make a directory that survives the loss of power, with its parents.

    Raises:
        OSError: it cannot be made.
    """
    missing = [path for path in (directory.absolute(), *directory.absolute().parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _settle(path.parent)


def _settle(path: Path) -> None:
    """Let a directory's new entries survive the loss of power, where the system has a call for it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no directories, and needs none
        return
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse
        pass
    finally:
        os.close(descriptor)


@contextmanager
def explained(directory: Path, doing: str) -> Iterator[None]:
    """What SQLite and the file system raise inside becomes one sentence.

    Args:
        directory: of the history.
        doing: ``read`` or ``write``.

    Raises:
        HistoryError: in place of their errors.
    """
    try:
        yield
    except HistoryError:
        raise
    except sqlite3.Error as error:
        raise HistoryError(_sentence(error, directory, doing)) from error
    except OSError as error:
        raise HistoryError(f"cannot {doing} the history {named(directory)}: {error.strerror or error}.") from error


def _sentence(error: sqlite3.Error, directory: Path, doing: str) -> str:
    where, code = named(directory), getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    can_be_written = os.access(directory, os.W_OK)
    if code == sqlite3.SQLITE_NOTADB:
        return f"expected a history in {where}, found that its {FILE} or {LOCK} is another kind of file; {_ASK}."
    if code == sqlite3.SQLITE_CORRUPT:
        return (
            f"the history {where} is damaged ({clean_text(error)}): move it away; `sqlite3 {FILE} .recover` saves what "
            "can be saved."
        )
    if code == sqlite3.SQLITE_FULL:
        return f"cannot {doing} the history {where}: its disk is full; free some space."
    if code == sqlite3.SQLITE_IOERR:
        return f"cannot {doing} the history {where}: its disk is full, limited or failing ({error})."
    if code in {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM}:
        remedy = "check its permissions" if can_be_written else "it cannot be written to: give a directory that can be"
        return f"cannot {doing} the history {where} ({error}); {remedy}."
    if code == sqlite3.SQLITE_BUSY:
        return f"cannot {doing} the history {where}: another process holds it; close what has it open."
    return f"cannot {doing} the history {where}: {clean_text(error)}; is it one of ours, and whole?"


def plain_json(data: Mapping[str, Any] | list[Any]) -> str:
    """Plain values as ASCII JSON; what JSON does not know becomes text."""
    return json.dumps(data, default=str)
