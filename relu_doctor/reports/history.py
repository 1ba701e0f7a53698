"""The report of a history: how it stands, each site over time, the alerts; then its latest diagnosis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from relu_doctor.diagnose.storage import dump_json, plain, records
from relu_doctor.numerals import percent, plural
from relu_doctor.reports.console import MAX_WIDTH, MIN_WIDTH, WIDTH, report_lines
from relu_doctor.reports.lines import paragraph, plain_text, print_lines, table_lines
from relu_doctor.reports.site_table import MAX_SITES, folded_note, worst_sites
from relu_doctor.reports.words import plain_name, shorten
from relu_doctor.training.history_reading import EMPTY, ENDED, RUNNING, STOPPED, HistoryReader, RunState
from relu_doctor.training.history_schema import SCHEMA_VERSION

if TYPE_CHECKING:
    from relu_doctor.diagnose.diagnosis import Diagnosis

MAX_ALERTS = 8
_LEVELS = "▁▂▃▄▅▆▇█"
_CURVE = 16  # cells
_WIDE = 76  # from this width on the curve has all its cells
_LEAST_NAME = 8  # cells of a site's name
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


def history_lines(view: HistoryView, width: int, *, most: int = MAX_SITES) -> list[Text]:
    """How it stands, each site over time, and the last alerts.

    Args:
        view: of a history.
        width: in terminal cells.
        most: sites shown; of more, the worst.
    """
    width = min(max(width, MIN_WIDTH), MAX_WIDTH)
    lines = _state_lines(view, width)
    if len(view.timeline):
        lines += [Text(), *_site_lines(view.timeline, width, most)]
    if len(view.alerts):
        lines += [Text(), *_alert_lines(view.alerts, width)]
    return lines


def state_sentence(view: HistoryView) -> str:
    """How the run stands, in one sentence."""
    return {
        RUNNING: f"Running: {view.state.writer}.",
        ENDED: f"Ended: {plain_name(view.state.reason)}.",
        STOPPED: "Stopped without saying so: it was killed, or its machine was. What it had committed is here.",
        EMPTY: "No run has begun.",
    }[view.state.state]


def window_sentence(row: Any) -> str:
    """The run's own numbers at the close of a window, a row of ``windows``."""
    told = [
        f"{word} {row[name]:.4g}"
        for name, word in (("loss", "loss"), ("lr", "lr"), ("grad_norm", "gradient norm"))
        if row[name] is not None and pd.notna(row[name])
    ]
    silent = f"{percent(row['silent_fraction'])} of {row['num_units']:,} units silent ({row['dead']:,} dead)"
    return "; ".join([f"step {row['last_step']:,}", *([", ".join(told)] if told else []), silent])


def _state_lines(view: HistoryView, width: int) -> list[Text]:
    sentence = state_sentence(view)
    lines = paragraph(sentence, width)
    lines[0].stylize(_STYLES[view.state.state], 0, min(len(lines[0].plain), len(sentence.split(":")[0]) + 1))
    if not len(view.windows):
        return [*lines, *paragraph("No window has closed yet.", width, first="  ", indent="  ")]
    last = view.windows.iloc[-1]
    lines += paragraph(window_sentence(last), width, first="  ", indent="  ")
    closed = datetime.fromtimestamp(float(last["closed"]), UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    kept = f"{plural(len(view.windows), 'window')} of {plural(len(view.runs), 'run')}, the last closed {closed}"
    if view.superseded:
        kept += f"; {plural(view.superseded, 'window')} of abandoned branches kept beside"
    return lines + paragraph(kept, width, style="dim", first="  ", indent="  ")


def _site_lines(timeline: pd.DataFrame, width: int, most: int) -> list[Text]:
    latest = timeline[timeline["window_id"] == timeline["window_id"].iloc[-1]]
    shown, folded = worst_sites(records(latest), max(most, 1))
    by_site = dict(iter(timeline.groupby("site_id", sort=False)))
    cells = _CURVE if width >= _WIDE else _CURVE // 2
    headings = ["units", "silent over time" if width >= _WIDE else "trend", "silent", "dead", "deaths", "revivals"]
    rows = [_site_cells(row, by_site[row["site_id"]], cells) for row in shown]
    taken = [max(cell_len(heading), *(row[place].cell_len for row in rows)) for place, heading in enumerate(headings)]
    room = max(width - sum(taken) - 2 * len(taken), _LEAST_NAME)
    names = [Text(shorten(plain_name(row["site"]), room), "bold" if row["silent"] else "") for row in shown]
    lines = table_lines(["site", *headings], [[name, *row] for name, row in zip(names, rows, strict=True)], left=[0, 2])
    return [*lines, *([Text(folded_note(folded), "dim")] if folded else [])]


def _site_cells(row: Mapping[str, Any], over_time: pd.DataFrame, cells: int) -> list[Text]:
    return [
        Text(f"{row['num_units']:,}"),
        Text(curve(over_time["silent_fraction"].tolist(), cells), "red" if row["silent"] else "green"),
        Text(percent(row["silent_fraction"]), "yellow" if row["silent"] else "dim"),
        Text(f"{row['dead']:,}", "red" if row["dead"] else "dim"),
        *(Text(f"{over_time[name].sum():,.0f}") for name in ("deaths", "revivals")),
    ]


def curve(fractions: Sequence[float], cells: int = _CURVE) -> str:
    """Fractions as a small curve: ``·`` for none, then eighths; of more than there are cells, the largest of each.

    >>> curve([0.0, 0.01, 0.5, 1.0])
    '·▁▄█'
    """
    size = -(-len(fractions) // cells) or 1
    highest = [max(fractions[start : start + size]) for start in range(0, len(fractions), size)]
    return "".join("·" if value <= 0 else _LEVELS[min(int(value * 8 - 1e-9), 7)] for value in highest)


def _alert_lines(alerts: pd.DataFrame, width: int) -> list[Text]:
    lines = [Text("Alerts", "bold")]
    for row in records(alerts.tail(MAX_ALERTS)):
        lines += alert_lines(row, width)
    if (rest := len(alerts) - MAX_ALERTS) > 0:
        lines.insert(1, Text(f"{rest:,} earlier (relu-doctor export DIR --table alerts has all)", "dim"))
    return lines


def alert_lines(row: Any, width: int) -> list[Text]:
    """One alert, a row of ``alerts``."""
    place = f"{shorten(plain_name(row['site']), 40)}: " if row["site"] else ""
    first = f"{plain_name(row['code'])}  "
    indent = " " * len(first)
    lines = paragraph(f"step {row['step']:,}: {place}{plain_name(row['message'])}", width, first=first, indent=indent)
    lines[0].stylize("bold red", 0, len(first))
    return lines
