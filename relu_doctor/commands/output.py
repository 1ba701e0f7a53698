"""What all commands share: how they end, where they print, and what they may write to."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from relu_doctor.text import clean_text

if TYPE_CHECKING:
    from rich.console import Console

PASSED, FAILED, BAD_INPUT, INCONCLUSIVE = 0, 1, 2, 3


class StopError(Exception):
    """Ends the command with a sentence on stderr and an exit code."""

    def __init__(self, message: str, code: int = BAD_INPUT) -> None:
        super().__init__(message)
        self.code = code


def fail(message: str) -> NoReturn:
    """End the command with exit code 2.

    Args:
        message: one sentence.
    """
    raise StopError(message)


def _raise_broken_pipe() -> None:
    raise BrokenPipeError


def console() -> Console:
    """Where reports are printed."""
    from rich.console import Console

    console = Console(highlight=False)
    console.on_broken_pipe = _raise_broken_pipe  # type: ignore[method-assign]  # Rich's own would exit
    return console


@contextmanager
def while_it_is_read() -> Iterator[None]:
    """What is printed inside ends in silence where its reader has seen enough."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the exit would try again


def check_output(output: Path | None, tensorboard: Path | None) -> None:
    """Refuse before the scan what could not be written after it."""
    if output is not None and (output.is_dir() or not _writable(output if output.exists() else output.parent)):
        fail(
            f"--output {clean_text(output)} cannot be written: give a file in a folder that exists and "
            "can be written to."
        )
    if tensorboard is not None:
        nearest = next(folder for folder in (tensorboard, *tensorboard.absolute().parents) if folder.exists())
        if not nearest.is_dir() or not _writable(nearest):
            fail(f"--tensorboard {clean_text(tensorboard)} cannot be written: give a folder that can be written to.")


def _writable(path: Path) -> bool:
    return path.exists() and os.access(path, os.W_OK)


class warnings_as_notes:  # noqa: N801 a context manager that reads as a verb
    """Show relu_doctor's warnings as one line each on stderr."""

    def __enter__(self) -> None:
        import warnings

        from relu_doctor.errors import ReLUDoctorWarning

        self._caught = warnings.catch_warnings()
        self._caught.__enter__()
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *rest: object) -> None:
            if issubclass(category, ReLUDoctorWarning):
                print(f"relu-doctor: note: {clean_text(message, limit=500)}", file=sys.stderr)
            else:
                shown(message, category, *rest)  # type: ignore[arg-type]

        warnings.simplefilter("always", ReLUDoctorWarning)
        warnings.showwarning = show  # type: ignore[assignment]

    def __exit__(self, *error: object) -> None:
        self._caught.__exit__(*error)  # type: ignore[arg-type]


def write_text(text: str, output: Path | None) -> None:
    """Write to a file, or to stdout."""
    from relu_doctor.diagnose.storage import write_atomically

    if output is None:
        sys.stdout.write(text)
    else:
        write_atomically(output, text.encode())


def write_bytes(content: bytes, output: Path | None) -> None:
    """Write to a file, or to stdout."""
    from relu_doctor.diagnose.storage import write_atomically

    if output is None:
        sys.stdout.buffer.write(content)
    else:
        write_atomically(output, content)
