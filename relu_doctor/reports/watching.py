"""A history followed live: a page that renews itself on a terminal, a line per window elsewhere."""

from __future__ import annotations

import time

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from relu_doctor.diagnose.storage import records
from relu_doctor.reports.history import HistoryView, history_lines, look, state_sentence
from relu_doctor.reports.lines import encodable, print_lines
from relu_doctor.reports.standing import alert_lines, verdict_lines, window_sentence
from relu_doctor.training.history_reading import RUNNING, HistoryReader

_OTHER_LINES = 16  # of a page, beside its sites


def watch_history(reader: HistoryReader, console: Console, *, every: float, once: bool = False) -> None:
    """Show a history until its run has ended, or the user has seen enough (Ctrl-C).

    Args:
        reader: of the history.
        console: where.
        every: seconds between two looks.
        once: show it as it stands, and leave.

    Raises:
        HistoryError: the history was removed or is damaged.
    """
    if once:
        print_lines(_page(look(reader), console), console)
        return
    try:
        if console.is_terminal:
            _renew(reader, console, every)
        else:
            _follow(reader, console, every)
    except KeyboardInterrupt:
        return


def _renew(reader: HistoryReader, console: Console, every: float) -> None:
    mark, view = reader.mark, look(reader)
    with Live(_group(view, console), console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while view.state.state == RUNNING:
            time.sleep(every)
            if reader.mark != mark:
                mark = reader.mark  # before the look: what changes in between is seen the next time
                view = look(reader)
            live.update(_group(view, console), refresh=True)  # the terminal may have another size by now


def _follow(reader: HistoryReader, console: Console, every: float) -> None:
    seen: set[int] = set()
    told: set[int] = set()
    while True:
        mark = reader.mark  # before the look: what changes in between is seen the next time
        view = look(reader)
        for row in records(view.alerts[~view.alerts["alert_id"].isin(told)]):
            told.add(row["alert_id"])
            print_lines(alert_lines(row, console.width), console)
        for row in records(view.windows[~view.windows["window_id"].isin(seen)]):
            seen.add(row["window_id"])
            print_lines([Text(window_sentence(row))], console)
        if view.state.state != RUNNING:
            print_lines([Text(state_sentence(view))], console)
            return
        while reader.mark == mark:
            time.sleep(every)


def _page(view: HistoryView, console: Console) -> list[Text]:
    most = max(console.height - _OTHER_LINES, 4)
    lines = history_lines(view, console.width, most=most, measured=False)
    return lines if view.diagnosis is None else [*lines, *verdict_lines(view.diagnosis, console.width)]


def _group(view: HistoryView, console: Console) -> Group:
    return Group(*(encodable(line, console.encoding) for line in _page(view, console)))
