"""Who writes a history: noted in it, and named where another wants to write."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import sys
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path

from relu_doctor.errors import HistoryError
from relu_doctor.text import clean_text
from relu_doctor.training.history_files import check_is_there, connected_to_read, named, plain_json
from relu_doctor.training.history_lock import WriterLock
from relu_doctor.training.history_schema import stored_text


def new_writer() -> str:
    """This process as a writer, for ``meta``: JSON."""
    return plain_json(
        {
            "pid": os.getpid(),
            "host": stored_text(socket.gethostname()),
            "since": time.time(),
            "command": list(sys.argv),
            "token": uuid.uuid4().hex,  # tells writers apart where a process id is used again
        }
    )


def writer_in(connection: sqlite3.Connection) -> str:
    """The writer that has noted itself last, as :func:`new_writer` made it."""
    row = connection.execute("SELECT value FROM meta WHERE key = 'writer'").fetchone()
    return str(row[0]) if row else ""


def lock_to_write(directory: Path, patience: float) -> WriterLock:
    """The lock of a history.

    Raises:
        HistoryError: another holds it, who is named.
        sqlite3.Error: it cannot be had.
    """
    try:
        return WriterLock(directory, patience=patience)
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
            raise
        raise HistoryError(
            f"the history {named(directory)} is being written by {_holder(directory)}; wait for it to end, or give "
            "another directory."
        ) from error


def _holder(directory: Path) -> str:
    """Who writes a history, as far as it has been noted."""
    try:
        check_is_there(directory)
        with connected_to_read(directory) as connection:
            return writer_of(connection)
    except HistoryError:
        return "another process"


def writer_of(connection: sqlite3.Connection) -> str:
    """Who writes a history or last wrote it: ``process 42 on node3 since 2026-11-21 17:00 UTC (train.py)``."""
    row = connection.execute("SELECT value FROM meta WHERE key = 'writer'").fetchone()
    try:
        writer = json.loads(row[0])
        since = datetime.fromtimestamp(float(writer["since"]), UTC).strftime("%Y-%m-%d %H:%M UTC")
        who = "this process" if writer["pid"] == os.getpid() else "process"
        command = clean_text(" ".join(map(str, writer["command"])), 100)
        return f"{who} {int(writer['pid'])} on {clean_text(writer['host'], 60)} since {since} ({command})"
    except (TypeError, ValueError, LookupError, OverflowError):
        return "another process"
