"""Event files: where events go. Our own are written by a thread, so that a run never waits for a disk."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
import warnings
from collections import deque
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import google_crc32c

from relu_doctor.errors import OutputError, ReLUDoctorWarning
from relu_doctor.text import clean_text

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event
    from torch.utils.tensorboard import SummaryWriter

SUFFIX = ".relu_doctor"  # of our event files
_MOST_PENDING = 64 << 20  # bytes that wait for a disk; what comes beyond is left out
_PATIENCE = 10.0  # seconds at the close
_MASK = 0xA282EAD8  # a CRC of text that holds a CRC would be weak
_NUMBERS = count()
_OPEN: list[Path] = []  # directories in which a file of this process is open, once for each file


class Events(Protocol):
    """Where events go."""

    def add(self, event: Event) -> None:
        """Hand over one event, without waiting for a disk of ours.

        Raises:
            OutputError: this or an earlier event could not be written.
        """

    def settle(self) -> None:
        """Wait until all is written.

        Raises:
            OutputError: it cannot be.
        """

    def close(self) -> None:
        """Finish.

        Raises:
            OutputError: something could not be written, and nobody was told.
        """


class EventFile:
    """An event file of our own.

    After an error the file is cut back to its last whole record, so that it can be read, and what comes later is
    written once there is room again.

    Args:
        log_dir: made where it is missing.

    Attributes:
        is_alone: no other program has written event files into this directory, and no other file of ours is open in
            it, which is warned of; ``has_earlier`` ones are ours.

    Raises:
        OutputError: it cannot be written.
    """

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._place = log_dir.resolve()
        live = self._place in _OPEN
        if live:
            warnings.warn(
                f"'{clean_text(log_dir, 2000)}' is being written to by another TensorBoardSink that is still open, so "
                "that TensorBoard shows both as one run; close that one, or give each a directory of its own.",
                ReLUDoctorWarning,
                stacklevel=4,
            )
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
            others = [path.name for path in log_dir.iterdir() if "tfevents" in path.name]
            name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
            self._file = os.open(log_dir / (name + SUFFIX), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except OSError as error:
            raise self._cannot(error) from error
        self.has_earlier = bool(others)
        self.is_alone = all(name.endswith(SUFFIX) for name in others) and not live
        self._size = 0  # bytes of whole records
        self._pending: deque[bytes] = deque()  # events
        self._weight = 0  # bytes of them, and of the one that is being written
        self._failure: OSError | None = None  # of which nobody was told
        self._closed = False
        self._news = threading.Condition()
        try:
            self._write(_record(_first_event().SerializeToString()))
        except OSError as error:
            os.close(self._file)
            raise self._cannot(error) from error
        self._thread = threading.Thread(target=self._work, name="relu_doctor events", daemon=True)
        self._thread.start()
        _OPEN.append(self._place)

    def add(self, event: Event) -> None:
        """See :class:`Events`."""
        text: bytes = event.SerializeToString()
        with self._news:
            if self._weight + len(text) > _MOST_PENDING:
                self._failure = self._failure or OSError("the disk does not take them as fast as they come")
            else:
                self._pending.append(text)
                self._weight += len(text)
                self._news.notify_all()
        self._tell()

    def settle(self) -> None:
        """See :class:`Events`."""
        with self._news:
            self._news.wait_for(lambda: not self._weight)
        self._tell()

    def close(self) -> None:
        """See :class:`Events`; a disk that hangs is not waited for longer than ten seconds."""
        with self._news:
            if not self._closed:
                _OPEN.remove(self._place)
            self._closed = True
            self._news.notify_all()
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            raise self._cannot(OSError(f"{self._weight:,} bytes were not taken within {_PATIENCE:.0f} seconds"))
        self._tell()

    def _tell(self) -> None:
        with self._news:
            failure, self._failure = self._failure, None
        if failure is not None:
            raise self._cannot(failure) from failure

    def _work(self) -> None:
        while (text := self._next()) is not None:
            failure = None
            try:
                self._write(_record(text))
            except OSError as error:
                failure = error
            with self._news:
                self._failure = self._failure or failure
                self._weight -= len(text)
                self._news.notify_all()
        try:
            os.close(self._file)
        except OSError as error:  # some file systems tell of a full disk only now
            self._failure = self._failure or error

    def _next(self) -> bytes | None:
        with self._news:
            self._news.wait_for(lambda: self._pending or self._closed)
            return self._pending.popleft() if self._pending else None

    def _write(self, record: bytes) -> None:
        rest = memoryview(record)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            with suppress(OSError):  # of what cannot be cut back either, nothing more can be read from there on
                os.ftruncate(self._file, self._size)
                os.lseek(self._file, self._size, os.SEEK_SET)
            raise
        self._size += len(record)

    def _cannot(self, error: OSError) -> OutputError:
        return cannot_write(clean_text(self._log_dir, 2000), error)


class BorrowedWriter:
    """A ``SummaryWriter`` of somebody else's, which stays open.

    It has a thread of its own that writes, and a queue of its own, ten events long by default.
    """

    def __init__(self, writer: SummaryWriter) -> None:
        self._writer = writer

    def add(self, event: Event) -> None:
        """See :class:`Events`."""
        try:
            self._writer._get_file_writer().add_event(event, event.step, event.wall_time)
        except OSError as error:
            raise self._cannot(error) from error

    def settle(self) -> None:
        """See :class:`Events`."""
        try:
            self._writer.flush()
        except OSError as error:
            raise self._cannot(error) from error

    def close(self) -> None:
        """See :class:`Events`."""
        self.settle()

    def _cannot(self, error: OSError) -> OutputError:
        return cannot_write(clean_text(self._writer.get_logdir(), 2000), error)


def cannot_write(where: str, error: OSError) -> OutputError:
    """What to say where event files cannot be written."""
    return OutputError(
        f"cannot write TensorBoard events to '{where}': {error.strerror or error}; give a directory that can be "
        "written to."
    )


def _first_event() -> Event:
    from tensorboard.compat.proto.event_pb2 import Event

    return Event(wall_time=time.time(), file_version="brain.Event:2")


def masked_crc32c(text: bytes) -> int:
    """The checksum of a record's length or data in TensorFlow's record files; TensorBoard's own is slow Python."""
    crc = int(google_crc32c.value(text))
    return (((crc >> 15) | (crc << 17)) + _MASK) & 0xFFFFFFFF


def _record(text: bytes) -> bytes:
    """An event in the framing of TensorFlow's record files."""
    length = struct.pack("<Q", len(text))
    parts = (length, struct.pack("<I", masked_crc32c(length)), text, struct.pack("<I", masked_crc32c(text)))
    return b"".join(parts)
