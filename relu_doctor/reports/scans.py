"""The report of a whole command: each checkpoint's own, then all of them side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from relu_doctor.reports.console import MAX_FINDINGS, MAX_WIDTH, MIN_WIDTH, WIDTH, report_lines
from relu_doctor.reports.lines import plain_text, print_lines
from relu_doctor.reports.side_by_side import comparison_lines
from relu_doctor.reports.words import plain_name, shorten

if TYPE_CHECKING:
    from relu_doctor.diagnose.diagnosis import Diagnosis

_FINDINGS_EACH = 4  # of several checkpoints, which mostly repeat one another


def render_scans(scans: Sequence[tuple[str, Diagnosis]], console: Console) -> None:
    """Print the reports of some checkpoints, and of several a table that sets them side by side.

    Args:
        scans: name and diagnosis, in the order to tell of them.
        console: where; it decides on colour and width.
    """
    print_lines(scan_lines(scans, console.width), console)


def render_scans_text(scans: Sequence[tuple[str, Diagnosis]], *, width: int | None = None) -> str:
    """The same as text without colour, ended by a line break.

    Args:
        scans: name and diagnosis, in the order to tell of them.
        width: of a line, in terminal cells; 80 by default.
    """
    return plain_text(scan_lines(scans, width or WIDTH))


def scan_lines(scans: Sequence[tuple[str, Diagnosis]], width: int) -> list[Text]:
    """The lines of :func:`render_scans`."""
    if len(scans) == 1:
        return report_lines(scans[0][1], width, max_findings=MAX_FINDINGS)
    lines: list[Text] = []
    for name, diagnosis in scans:
        lines += [_heading(plain_name(name), width), Text()]
        lines += [*report_lines(diagnosis, width, max_findings=_FINDINGS_EACH), Text()]
    if scans:
        lines += [_heading("side by side", width), Text()]
        lines += comparison_lines([(name, diagnosis, {}) for name, diagnosis in scans], width)
    return lines


def _heading(text: str, width: int) -> Text:
    width = min(max(width, MIN_WIDTH), MAX_WIDTH)
    line = Text("── ", "dim")
    line.append(shorten(text, width - 10), "bold not dim")
    line.append(" ")
    line.append("─" * (width - line.cell_len))
    return line
