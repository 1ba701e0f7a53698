"""The console report: coverage, verdict, one row per site, findings. In colour on terminals, plain elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from relu_doctor.numerals import plural
from relu_doctor.reports.coverage import coverage_line, coverage_remarks
from relu_doctor.reports.lines import paragraph, plain_text, print_lines
from relu_doctor.reports.site_table import site_lines
from relu_doctor.reports.verdict import verdict
from relu_doctor.reports.words import GLUE, plain_name, ranges, shorten
from relu_doctor.terms import Severity

if TYPE_CHECKING:
    from relu_doctor.diagnose.diagnosis import Diagnosis
    from relu_doctor.diagnose.findings import Finding

WIDTH = 80
MAX_WIDTH = 110  # longer lines are hard to read
MIN_WIDTH = 60
MAX_FINDINGS = 8

SEVERITY_STYLES = {
    Severity.HEALTHY: "bold green",
    Severity.MILD: "bold yellow",
    Severity.SERIOUS: "bold dark_orange",
    Severity.CRITICAL: "bold red",
    Severity.INCONCLUSIVE: "bold cyan",
    Severity.NON_FINITE: "bold magenta",
}


def render(diagnosis: Diagnosis, console: Console, *, max_findings: int = MAX_FINDINGS) -> None:
    """Print the report.

    Args:
        diagnosis: what to tell of.
        console: where; it decides on colour and width.
        max_findings: of more, the weightiest are shown and the rest counted.
    """
    print_lines(report_lines(diagnosis, console.width, max_findings=max_findings), console)


def render_text(diagnosis: Diagnosis, *, width: int | None = None, max_findings: int = MAX_FINDINGS) -> str:
    """The report as text without colour, the same on every machine.

    Args:
        diagnosis: what to tell of.
        width: of a line, in terminal cells; 80 by default.
        max_findings: of more, the weightiest are shown and the rest counted.
    """
    return plain_text(report_lines(diagnosis, width or WIDTH, max_findings=max_findings)).rstrip("\n")


def report_lines(diagnosis: Diagnosis, width: int, *, max_findings: int = MAX_FINDINGS) -> list[Text]:
    """The lines of the report, wrapped to a width between 60 and 110."""
    width = min(max(width, MIN_WIDTH), MAX_WIDTH)
    blocks = [
        _coverage_lines(diagnosis, width),
        _verdict_lines(diagnosis, width),
        site_lines(diagnosis, width),
        _finding_lines(diagnosis.findings, diagnosis, width, max_findings),
    ]
    lines: list[Text] = []
    for block in blocks:
        if block:
            lines += [Text(), *block] if lines else block
    return lines


def _coverage_lines(diagnosis: Diagnosis, width: int) -> list[Text]:
    parts = coverage_line(diagnosis).split("; ")  # broken between its parts, where they are short
    lines = paragraph("; ".join(part.replace(" ", GLUE) if len(part) < width else part for part in parts), width)
    for remark in coverage_remarks(diagnosis):
        lines += paragraph(remark, width, style="dim", indent="  ")
    return lines


def _verdict_lines(diagnosis: Diagnosis, width: int) -> list[Text]:
    said = verdict(diagnosis)
    lines = paragraph(said.sentence, width, style="bold")
    lines[0].stylize(SEVERITY_STYLES[said.severity], 0, len(said.label) + 1)
    for detail in said.details:
        lines += paragraph(detail, width, first="  ", indent="  ")
    return lines


def _finding_lines(findings: Sequence[Finding], diagnosis: Diagnosis, width: int, most: int) -> list[Text]:
    if not findings:
        return []
    sizes = {site.name: site.num_units for site in diagnosis.table.sites}
    lines = [Text("Findings", "bold")]
    shown = _weightiest(findings, most)
    for (code, advice), group in groupby(shown, key=lambda finding: (finding.code, finding.advice)):
        first = f"{code}  "
        for finding in group:
            lines += _one(finding, width, first, sizes.get(finding.site))
            first = " " * len(first)
        if advice:
            lines += paragraph(_clean(advice), width, first=f"{first}→ ", indent=f"{first}  ")
    if rest := len(findings) - len(shown):
        lines.append(Text(f"and {plural(rest, 'more finding')} (--format json has all)", "dim"))
    return lines


def _one(finding: Finding, width: int, first: str, num_units: int | None) -> list[Text]:
    indent = " " * len(first)
    deeper = indent + "  "
    place = f"{shorten(plain_name(finding.site), 40)}: " if finding.site else ""
    lines = paragraph(place + _clean(finding.title), width, style="bold", first=first, indent=indent)
    lines[0].stylize("cyan", 0, len(first))
    if finding.evidence:
        lines += paragraph(_clean(finding.evidence), width, style="dim", first=deeper, indent=deeper)
    if finding.unit_indices and len(finding.unit_indices) != num_units:
        word = "unit " if len(finding.unit_indices) == 1 else "units "
        lines += paragraph(word + ranges(finding.unit_indices), width, style="dim", first=deeper, indent=deeper)
    return lines


def _weightiest(findings: Sequence[Finding], most: int) -> list[Finding]:
    """What is about the whole scan or about most units, in the order that it was given."""
    ranked = sorted(
        range(len(findings)),
        key=lambda index: (bool(findings[index].site), -len(findings[index].unit_indices), index),
    )
    return [findings[index] for index in sorted(ranked[:most])]


def _clean(text: str) -> str:
    return plain_name(text)
