"""The report as HTML for notebooks: coverage, verdict, a plain table of sites, findings. Nothing is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from relu_doctor.numerals import plural
from relu_doctor.reports.coverage import coverage_line, coverage_remarks
from relu_doctor.reports.site_table import INAPPLICABLE, LOOKS, MAX_SITES, UNKNOWN, folded_note, worst_sites
from relu_doctor.reports.verdict import dead_rate, verdict
from relu_doctor.reports.words import plain_name
from relu_doctor.terms import Status

if TYPE_CHECKING:
    from relu_doctor.diagnose.diagnosis import Diagnosis

_MAX_FINDINGS = 20
_LEFT = ' style="text-align:left"'


def render_html(diagnosis: Diagnosis) -> str:
    """A piece of HTML without scripts, styles of its own document, or anything from elsewhere; all text is escaped."""
    said = verdict(diagnosis)
    pieces = [
        _paragraph(coverage_line(diagnosis)),
        *(f"<p><small>{_text(remark)}</small></p>" for remark in coverage_remarks(diagnosis)),
        f"<p><strong>{_text(said.sentence)}</strong></p>",
        *(_paragraph(detail) for detail in said.details),
        _sites(diagnosis),
        *_findings(diagnosis),
    ]
    return f"<div>{''.join(pieces)}</div>"


def _text(value: object) -> str:
    return escape(plain_name(value))


def _paragraph(text: str) -> str:
    return f"<p>{_text(text)}</p>"


def _sites(diagnosis: Diagnosis) -> str:
    rows: list[dict[str, Any]] = [
        {str(key): value for key, value in row.items()} for row in diagnosis.sites.to_dict("records")
    ]
    mortal = {site.site_id for site in diagnosis.table.sites if site.can_die}
    shown, folded = worst_sites(rows, MAX_SITES)
    statuses = [
        status
        for status in LOOKS
        if status in (Status.DEAD, Status.UNPROVEN, Status.ACTIVE) or any(row[status.value] for row in rows)
    ]
    rate = dead_rate(diagnosis)
    headings = [LOOKS[status].heading + (f" ({rate})" if status is Status.DEAD and rate else "") for status in statuses]
    head = _row(["site", "rectifier", "producer", "units", *headings], "th")
    body = "".join(_row(_cells(row, statuses, can_die=row["site_id"] in mortal), "td") for row in shown)
    note = f"<p><small>{_text(folded_note(folded))}</small></p>" if folded else ""
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>{note}"


def _cells(row: dict[str, Any], statuses: Iterable[Status], *, can_die: bool) -> list[str]:
    cells = [str(row["site"]), str(row["rectifier"]), str(row["producer"]), f"{row['num_units']:,}"]
    unknown = row["num_units"] == row["non_finite"] + row["unobserved"]
    for status in statuses:
        number = row[status.value]
        silent = status in (Status.DEAD, Status.UNPROVEN)
        blank = INAPPLICABLE if silent and not can_die else UNKNOWN if silent and unknown else "0"
        cells.append(f"{number:,}" if number else blank)
    return cells


def _row(cells: Sequence[str], tag: str) -> str:
    return (
        "<tr>"
        + "".join(f"<{tag}{_LEFT if index < 3 else ''}>{_text(cell)}</{tag}>" for index, cell in enumerate(cells))
        + "</tr>"
    )


def _findings(diagnosis: Diagnosis) -> Iterable[str]:
    for finding in diagnosis.findings[:_MAX_FINDINGS]:
        place = f"{finding.site}: " if finding.site else ""
        yield (
            f"<p><strong>{_text(finding.code)}</strong> {_text(place + finding.title)}<br>"
            f"<small>{_text(finding.evidence)}</small><br>{_text(finding.advice)}</p>"
        )
    rest = len(diagnosis.findings) - _MAX_FINDINGS
    if rest > 0:
        yield _paragraph(f"and {plural(rest, 'more finding')} (in diagnosis.findings)")
