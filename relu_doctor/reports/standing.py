"""How a run stands: each site over time, what was measured, alerts; a history's report and a monitor's share it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.cells import cell_len
from rich.text import Text

from relu_doctor.diagnose.storage import records
from relu_doctor.numerals import percent
from relu_doctor.reports.lines import paragraph, table_lines
from relu_doctor.reports.site_table import INAPPLICABLE, folded_note, worst_sites
from relu_doctor.reports.verdict import verdict
from relu_doctor.reports.words import plain_name, shorten

if TYPE_CHECKING:
    from relu_doctor.diagnose.diagnosis import Diagnosis

Row = Mapping[str, Any]
MAX_ALERTS = 8
_LEVELS = "▁▂▃▄▅▆▇█"
_CURVE = 16  # cells
_WIDE = 76  # from this width on the curve has all its cells
_LEAST_NAME = 8  # cells of a site's name
_MEASURED = {  # column of a timeline to its heading
    "update_ratio": "max update",
    "weight_norm": "weight norm",
    "dormant_overlap": "still dormant",
    "effective_rank": "eff. rank",
}
_SHARES = {"update_ratio", "dormant_overlap"}


def run_lines(
    timeline: pd.DataFrame, alerts: pd.DataFrame, width: int, *, most: int, measured: bool, others: str
) -> list[Text]:
    """Each site over time, what was measured of it in the latest window, and the last alerts; what there is of it.

    Args:
        timeline: one row per window and site, in the order of steps and of the forward.
        alerts: one row per alert.
        width: in terminal cells.
        most: sites shown; of more, the worst.
        measured: also show the table of what was measured.
        others: says where the alerts are that are not shown.
    """
    lines: list[Text] = []
    if len(timeline):
        shown, folded = worst_sites(_latest(timeline), max(most, 1))
        lines += [Text(), *_site_lines(timeline, shown, folded, width)]
        lines += _measured_lines(shown, width) if measured else []
    if len(alerts):
        lines += [Text(), *_alert_lines(alerts, width, others)]
    return lines


def window_sentence(row: Any, update_ratio: float | None = None) -> str:
    """The run's own numbers at the close of a window.

    Args:
        row: ``last_step``, ``num_units``, ``dead`` and ``silent_fraction``; ``loss``, ``lr`` and ``grad_norm`` where
            they were had.
        update_ratio: the largest of all units.
    """
    told = [
        f"{word} {row[name]:.4g}"
        for name, word in (("loss", "loss"), ("lr", "lr"), ("grad_norm", "gradient norm"))
        if pd.notna(row.get(name))
    ]
    told += [] if update_ratio is None else [f"largest update {percent(update_ratio)} of its weights"]
    silent = f"{percent(row['silent_fraction'])} of {row['num_units']:,} units silent ({row['dead']:,} dead)"
    return "; ".join([f"step {row['last_step']:,}", *([", ".join(told)] if told else []), silent])


def verdict_lines(diagnosis: Diagnosis, width: int) -> list[Text]:
    """The verdict in one sentence; with an empty line before it."""
    return [Text(), *paragraph(verdict(diagnosis).sentence, width, style="bold")]


def largest_update(timeline: pd.DataFrame) -> float | None:
    """The largest update-to-weight ratio of all units in the latest window; ``None`` where none was measured."""
    ratios = [row["update_ratio"] for row in _latest(timeline) if pd.notna(row["update_ratio"])]
    return max(ratios, default=None)


def _latest(timeline: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of the latest window."""
    return records(timeline[timeline["last_step"] == timeline["last_step"].iloc[-1]]) if len(timeline) else []


def _site_lines(timeline: pd.DataFrame, shown: Sequence[Row], folded: Sequence[Row], width: int) -> list[Text]:
    by_site = dict(iter(timeline.groupby("site_id", sort=False)))
    cells = _CURVE if width >= _WIDE else _CURVE // 2
    headings = ["units", "silent over time" if width >= _WIDE else "trend", "silent", "dead", "deaths", "revivals"]
    rows = [_site_cells(row, by_site[row["site_id"]], cells) for row in shown]
    taken = [max(cell_len(heading), *(row[place].cell_len for row in rows)) for place, heading in enumerate(headings)]
    room = max(width - sum(taken) - 2 * len(taken), _LEAST_NAME)
    names = [Text(shorten(plain_name(row["site"]), room), "bold" if row["silent"] else "") for row in shown]
    lines = table_lines(["site", *headings], [[name, *row] for name, row in zip(names, rows, strict=True)], left=[0, 2])
    return [*lines, *([Text(folded_note(folded), "dim")] if folded else [])]


def _site_cells(row: Row, over_time: pd.DataFrame, cells: int) -> list[Text]:
    return [
        Text(f"{row['num_units']:,}"),
        Text(curve(over_time["silent_fraction"].tolist(), cells), "red" if row["silent"] else "green"),
        Text(percent(row["silent_fraction"]), "yellow" if row["silent"] else "dim"),
        Text(f"{row['dead']:,}", "red" if row["dead"] else "dim"),
        *(Text(f"{over_time[name].sum():,.0f}") for name in ("deaths", "revivals")),
    ]


def _measured_lines(shown: Sequence[Row], width: int) -> list[Text]:
    """A table of the columns that hold anything; with an empty line before it."""
    had = [name for name in _MEASURED if any(pd.notna(row[name]) for row in shown)]
    if not had:
        return []
    headings = [_MEASURED[name] for name in had]
    room = max(width - sum(cell_len(heading) + 2 for heading in headings), _LEAST_NAME)
    cells = [
        [Text(shorten(plain_name(row["site"]), room)), *(Text(_measure(name, row[name])) for name in had)]
        for row in shown
    ]
    return [Text(), *table_lines(["site", *headings], cells)]


def _measure(name: str, value: Any) -> str:
    if pd.isna(value):
        return INAPPLICABLE
    return percent(value) if name in _SHARES else f"{value:.3g}"


def curve(fractions: Sequence[float], cells: int = _CURVE) -> str:
    """Fractions as a small curve: ``·`` for none, then eighths; of more than there are cells, the largest of each.

    >>> curve([0.0, 0.01, 0.5, 1.0])
    '·▁▄█'
    """
    size = -(-len(fractions) // cells) or 1
    highest = [max(fractions[start : start + size]) for start in range(0, len(fractions), size)]
    return "".join("·" if value <= 0 else _LEVELS[min(int(value * 8 - 1e-9), 7)] for value in highest)


def _alert_lines(alerts: pd.DataFrame, width: int, others: str) -> list[Text]:
    lines = [Text("Alerts", "bold")]
    for row in records(alerts.tail(MAX_ALERTS)):
        lines += alert_lines(row, width)
    if (rest := len(alerts) - MAX_ALERTS) > 0:
        lines.insert(1, Text(f"{rest:,} earlier ({others})", "dim"))
    return lines


def alert_lines(row: Any, width: int) -> list[Text]:
    """One alert, a row of ``alerts``."""
    place = f"{shorten(plain_name(row['site']), 40)}: " if row["site"] else ""
    first = f"{plain_name(row['code'])}  "
    indent = " " * len(first)
    lines = paragraph(f"step {row['step']:,}: {place}{plain_name(row['message'])}", width, first=first, indent=indent)
    lines[0].stylize("bold red", 0, len(first))
    return lines
