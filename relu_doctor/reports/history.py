"""The report of a history: how it stands, each site over time, the alerts; then its latest diagnosis."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pandas as pd
from rich.console import Console
from rich.text import Text

from relu_doctor.diagnose.storage import dump_json, plain, records
from relu_doctor.numerals import plural
from relu_doctor.reports.console import MAX_WIDTH, MIN_WIDTH, WIDTH, report_lines
from relu_doctor.reports.lines import paragraph, plain_text, print_lines
from relu_doctor.reports.site_table import MAX_SITES
from relu_doctor.reports.standing import largest_update, run_lines, window_sentence
from relu_doctor.reports.words import plain_name
from relu_doctor.training.history_reading import EMPTY, ENDED, RUNNING, STOPPED, HistoryReader, RunState
from relu_doctor.training.history_schema import SCHEMA_VERSION

if TYPE_CHECKING:
    from relu_doctor.diagnose.diagnosis import Diagnosis

_STYLES = {RUNNING: "bold green", ENDED: "bold", STOPPED: "bold red", EMPTY: "bold"}


@dataclass(frozen=True, eq=False)
class HistoryView:
    """One moment of a history, read whole.

    Attributes:
        state: how it stands.
        windows, timeline, alerts: of the live branch.
        runs: all of them.
        superseded: windows of abandoned branches.
        diagnosis: the latest, ``None`` while no window has closed.
    """

    state: RunState
    windows: pd.DataFrame
    timeline: pd.DataFrame
    alerts: pd.DataFrame
    runs: pd.DataFrame
    superseded: int
    diagnosis: Diagnosis | None


def look(reader: HistoryReader) -> HistoryView:
    """Read one moment.

    Raises:
        HistoryError: the history was removed or is damaged.
    """
    with reader:
        return HistoryView(
            state=reader.state,
            windows=reader.windows,
            timeline=reader.timeline,
            alerts=reader.alerts,
            runs=reader.runs,
            superseded=reader.num_superseded,
            diagnosis=reader.latest,
        )


def render_history(view: HistoryView, console: Console) -> None:
    """Print the report of a history."""
    print_lines(_whole(view, console.width), console)


def render_history_text(view: HistoryView, *, width: int | None = None) -> str:
    """The same as text without colour, ended by a line break."""
    return plain_text(_whole(view, width or WIDTH))


def history_json(view: HistoryView) -> str:
    """The same as JSON: ``state, runs, windows, timeline, alerts`` as rows, and ``diagnosis``."""
    return dump_json(
        {
            "schema_version": SCHEMA_VERSION,
            "state": view.state.state,
            "reason": view.state.reason,
            "superseded_windows": view.superseded,
            **{name: plain(records(getattr(view, name))) for name in ("runs", "windows", "timeline", "alerts")},
            "diagnosis": None if view.diagnosis is None else view.diagnosis.to_dict(),
        }
    )


def _whole(view: HistoryView, width: int) -> list[Text]:
    lines = history_lines(view, width)
    if view.diagnosis is not None:
        lines += [Text(), Text("The latest window", "bold"), *report_lines(view.diagnosis, width)]
    return lines


def history_lines(view: HistoryView, width: int, *, most: int = MAX_SITES, measured: bool = True) -> list[Text]:
    """How it stands, each site over time, what was measured in the latest window, and the last alerts.

    Args:
        view: of a history.
        width: in terminal cells.
        most: sites shown; of more, the worst.
        measured: also show the table of what was measured.
    """
    width = min(max(width, MIN_WIDTH), MAX_WIDTH)
    others = "relu-doctor export DIR --table alerts has all"
    head = _state_lines(view, width)
    return [*head, *run_lines(view.timeline, view.alerts, width, most=most, measured=measured, others=others)]


def state_sentence(view: HistoryView) -> str:
    """How the run stands, in one sentence."""
    return {
        RUNNING: f"Running: {view.state.writer}.",
        ENDED: f"Ended: {plain_name(view.state.reason)}.",
        STOPPED: "Stopped without saying so: it was killed, or its machine was. What it had committed is here.",
        EMPTY: "No run has begun.",
    }[view.state.state]


def _state_lines(view: HistoryView, width: int) -> list[Text]:
    sentence = state_sentence(view)
    lines = paragraph(sentence, width)
    lines[0].stylize(_STYLES[view.state.state], 0, min(len(lines[0].plain), len(sentence.split(":")[0]) + 1))
    if not len(view.windows):
        return [*lines, *paragraph("No window has closed yet.", width, first="  ", indent="  ")]
    last = view.windows.iloc[-1]
    lines += paragraph(window_sentence(last, largest_update(view.timeline)), width, first="  ", indent="  ")
    closed = datetime.fromtimestamp(float(last["closed"]), UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    kept = f"{plural(len(view.windows), 'window')} of {plural(len(view.runs), 'run')}, the last closed {closed}"
    if view.superseded:
        kept += f"; {plural(view.superseded, 'window')} of abandoned branches kept beside"
    return lines + paragraph(kept, width, style="dim", first="  ", indent="  ")
