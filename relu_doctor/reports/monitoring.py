"""The report of a monitor: how its run stands now."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import pandas as pd
from rich.console import Console, ConsoleOptions
from rich.text import Text

from relu_doctor.numerals import plural
from relu_doctor.reports.console import MAX_WIDTH, MIN_WIDTH, WIDTH
from relu_doctor.reports.lines import encodable, paragraph, plain_text
from relu_doctor.reports.standing import largest_update, run_lines, verdict_lines, window_sentence

if TYPE_CHECKING:
    from relu_doctor.training.windows import Alert, Window

_MOST_SITES = 12


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class MonitorReport:
    """How a run stands: its numbers, the worst sites over time, the alerts and the verdict.

    ``print`` shows it as text, Rich's ``print`` and consoles in colour.

    Attributes:
        step: global, the last that was made.
        made: steps that the monitor has seen.
        windows: that have closed.
        next_close: step with which the next will; ``None`` where the monitor is closed.
        reports: this process is told of windows; of several ranks, the first.
        window: the latest.
        timeline: one row per window and site.
        alerts: all so far.
    """

    step: int
    made: int
    windows: int
    next_close: int | None
    reports: bool
    window: Window | None
    timeline: pd.DataFrame
    alerts: Sequence[Alert]

    def __str__(self) -> str:
        return plain_text(self._lines(WIDTH)).rstrip("\n")

    def __repr__(self) -> str:
        return f"<MonitorReport: {self._sentence()}>"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """The lines, for Rich."""
        for line in self._lines(options.max_width):
            yield encodable(line, console.encoding)

    def _sentence(self) -> str:
        closed = f"{plural(self.windows, 'window')} closed" if self.windows else "no window has closed yet"
        if not self.reports:
            closed = "rank 0 reports what all ranks saw"
        if self.next_close is None:
            return f"Ended with step {self.step:,}: {closed.removesuffix(' yet')}."
        following = f", the {'next' if self.windows else 'first'} closes with step {self.next_close:,}"
        return f"Watching, {plural(self.made, 'step')} made: {closed}{following if self.reports else ''}."

    def _lines(self, width: int) -> list[Text]:
        width = min(max(width, MIN_WIDTH), MAX_WIDTH)
        lines = paragraph(self._sentence(), width)
        lines[0].stylize("bold", 0, len(lines[0].plain.split(":")[0].split(",")[0]))
        if self.window is not None:
            row = {**self.window.diagnosis.summary, **self.window.numbers, "last_step": self.window.last_step}
            told = window_sentence(row, largest_update(self.timeline))
            lines += paragraph(told, width, first="  ", indent="  ")
        alerts = pd.DataFrame([asdict(alert) for alert in self.alerts])
        others = "monitor.alerts has all"
        lines += run_lines(self.timeline, alerts, width, most=_MOST_SITES, measured=True, others=others)
        return lines if self.window is None else [*lines, *verdict_lines(self.window.diagnosis, width)]
