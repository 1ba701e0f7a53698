"""``relu-doctor watch`` and ``export``: the history of a monitored run."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from relu_doctor.commands.output import check_output, console, while_it_is_read


class TableFormat(StrEnum):
    """What ``export --format`` takes."""

    CSV = "csv"
    JSON = "json"
    PARQUET = "parquet"


class HistoryTable(StrEnum):
    """What ``export --table`` takes."""

    TIMELINE = "timeline"
    WINDOWS = "windows"
    SITES = "sites"
    UNITS = "units"
    FINDINGS = "findings"
    ALERTS = "alerts"
    RUNS = "runs"


_HISTORY = typer.Argument(metavar="DIR", help="The directory of a run's history, Monitor(history=DIR).")


def watch(
    directory: Annotated[Path, _HISTORY],
    once: Annotated[bool, typer.Option("--once", help="Show it as it stands, and leave.")] = False,
    every: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="Between two looks.")] = 2.0,
) -> None:
    """Follow a monitored run live until it ends; Ctrl-C leaves it alone."""
    try:
        from relu_doctor.reports.watching import watch_history
        from relu_doctor.training.history import History

        with while_it_is_read():
            watch_history(History.read(directory), console(), every=every, once=once)
    except KeyboardInterrupt:  # while it was still being loaded
        return


def export(
    directory: Annotated[Path, _HISTORY],
    output_format: Annotated[TableFormat, typer.Option("--format", help="What to write.")],
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write there instead of to stdout.")] = None,
    table: Annotated[
        HistoryTable, typer.Option(help="timeline: a row per window and site; units: a row per window and unit.")
    ] = HistoryTable.TIMELINE,
    window: Annotated[int | None, typer.Option(metavar="ID", help="Only the window of this window_id.")] = None,
    superseded: Annotated[
        bool, typer.Option("--superseded", help="Also windows of branches that a rewound run has abandoned.")
    ] = False,
) -> None:
    """Write a table of a history for other programs: CSV, JSON or Parquet."""
    check_output(output, None)

    from relu_doctor.diagnose.storage import open_atomically
    from relu_doctor.reports.exports import frames, write
    from relu_doctor.reports.tables import need_parquet
    from relu_doctor.training.history import History

    if output_format is TableFormat.PARQUET:
        need_parquet()
    pieces = frames(History.read(directory, superseded=superseded), table, window)
    if output is None:
        with while_it_is_read():
            write(pieces, table, output_format, sys.stdout.buffer)
    else:
        with open_atomically(output) as file:
            write(pieces, table, output_format, file)
