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
    """A Rich progress bar that is made when it is first shown; shown by a timer, moved by the work."""

    def __init__(self, label: str) -> None:
        self._label = clean_text(label, 60)
        self._lock = Lock()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._done, self._total = 0, None if False else None
        self._closed = False

    def show(self) -> None:
        raise NotImplementedError
