"""A monitor's windows as lines of JSON: one file that any program can follow while it grows."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from relu_doctor.diagnose.storage import dump_json, plain
from relu_doctor.errors import OutputError
from relu_doctor.reports.scalars import window_scalars
from relu_doctor.reports.words import plain_name

if TYPE_CHECKING:
    from relu_doctor.training.windows import Window


class JsonLinesSink:
    """Adds a line to a file for each window; closing twice is fine.

    A line is an object of ``window``, ``first_step``, ``last_step``, ``closed`` (seconds since the epoch), all of
    :meth:`Window.scalars() <relu_doctor.training.windows.Window.scalars>` and ``alerts``, a list of objects. What is
    not finite is ``null``. It is handed to the system before training goes on.

    Args:
        path: what is in it already is kept, so that a resumed run goes on; folders are made where they are missing.

    Raises:
        OutputError: the file cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: BinaryIO | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab+")
            self._begin_line(self._file)
        except OSError as error:
            self.close()
            raise OutputError(
                f"cannot write lines of JSON to '{plain_name(self.path)}': {error.strerror or error}; give a file that "
                "can be written to."
            ) from error

    def __call__(self, window: Window) -> None:
        """Add one line.

        Raises:
            OSError: it cannot be written.
            ValueError: the sink is closed.
        """
        if self._file is None:
            raise ValueError("expected an open JsonLinesSink, found a closed one.")
        told = {
            "window": window.index,
            "first_step": window.first_step,
            "last_step": window.last_step,
            "closed": window.closed,
            **window_scalars(window),
            "alerts": [asdict(alert) for alert in window.alerts],
        }
        self._file.write(dump_json(plain(told)).encode())
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    @staticmethod
    def _begin_line(file: BinaryIO) -> None:
        """End the line that a run which was killed has left unfinished."""
        if file.seek(0, 2) > 0:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
