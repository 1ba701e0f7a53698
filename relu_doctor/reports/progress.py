"""Progress on stderr, for work that turns out to take more than two seconds. Nothing here needs torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, Timer
from typing import TYPE_CHECKING

from relu_doctor.text import clean_text

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PATIENCE = 2.0  # seconds before anything is shown


@contextmanager
def progress_bar(label: str, *, patience: float = PATIENCE) -> Iterator[Callable[[int, int | None], None]]:
    """Gives a function of (done, total) that moves a bar on stderr; ``total`` is ``None`` where it is not known.

    The bar appears once ``patience`` seconds have passed, only on a terminal, and leaves nothing behind. Piped, nothing
    is written.

    Args:
        label: what is going on.
        patience: in seconds.
    """
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    bar = _Bar(label)
    timer = Timer(patience, bar.show)
    timer.daemon = True
    timer.start()
    try:
        yield bar.move
    finally:
        timer.cancel()
        bar.close()


class _Bar:
    """A Rich progress bar that is made when it is first shown: shown by a timer, moved by the work."""

    def __init__(self, label: str) -> None:
        self._label = clean_text(label, 60)
        self._lock = Lock()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._done = 0
        self._total: int | None = None
        self._closed = False

    def show(self) -> None:
        """Start the bar, unless the work is over."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        with self._lock:
            if self._closed:
                return
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
                redirect_stdout=False,  # what others print belongs on stdout
                redirect_stderr=False,
            )
            self._task = self._progress.add_task(self._label, total=self._total, completed=self._done)
            self._progress.start()

    def move(self, done: int, total: int | None) -> None:
        """Take note of how far the work is."""
        with self._lock:
            self._done, self._total = done, total
            if self._progress is not None and self._task is not None:
                self._progress.update(self._task, completed=done, total=total)

    def close(self) -> None:
        """Take the bar away."""
        with self._lock:
            self._closed = True
            if self._progress is not None:
                self._progress.stop()
                self._progress = None
