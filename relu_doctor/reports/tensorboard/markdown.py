"""Verdict and findings as the Markdown that TensorBoard's tab Text shows; names of sites are no markup."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import quote

from relu_doctor.numerals import plural
from relu_doctor.reports.coverage import coverage_line, coverage_remarks
from relu_doctor.reports.verdict import verdict
from relu_doctor.reports.words import plain_name, ranges

if TYPE_CHECKING:
    from relu_doctor.diagnose.diagnosis import Diagnosis

_MARKDOWN = re.compile(r"[\\`*_{}\[\]()<>#+!|~&-]")
_MOST_FINDINGS = 25


def verdict_markdown(diagnosis: Diagnosis) -> str:
    """Coverage and verdict as Markdown, names escaped."""
    said = verdict(diagnosis)
    lines = [f"**{_escape(said.sentence)}**", *map(_escape, said.details), _escape(coverage_line(diagnosis))]
    return "\n\n".join([*lines, *map(_escape, coverage_remarks(diagnosis))])


def findings_markdown(diagnosis: Diagnosis) -> str:
    """The findings as a Markdown list, names escaped; the name of a site leads to it in the tab *ReLU Doctor*."""
    if not diagnosis.findings:
        return "No findings."
    known = {site.name: site.site_id for site in diagnosis.table.sites}
    lines = []
    for finding in diagnosis.findings[:_MOST_FINDINGS]:
        place = f"{_linked(finding.site, known.get(finding.site))}: " if finding.site else ""
        parts = [f"**{_escape(finding.code)}** {place}{_escape(finding.title)}"]
        parts += [_escape(finding.evidence)] if finding.evidence else []
        parts += [f"units {_escape(ranges(finding.unit_indices, 20))}"] if finding.unit_indices else []
        parts += [f"*{_escape(finding.advice)}*"] if finding.advice else []
        lines.append("- " + "  \n  ".join(parts))
    if rest := len(diagnosis.findings) - _MOST_FINDINGS:
        lines += [f"- and {plural(rest, 'more finding')}"] if rest > 0 else []
    return "\n".join(lines)


def link_to(site_id: str) -> str:
    """The address of a site in the tab *ReLU Doctor*, from any other tab of the same TensorBoard."""
    return f"#relu_doctor&p.relu_doctor.site={quote(site_id, safe='')}"


def _linked(name: str, site_id: str | None) -> str:
    return _escape(name) if site_id is None else f"[{_escape(name)}]({link_to(site_id)})"


def _escape(text: str) -> str:
    """Markup as character references: which backslashes Markdown obeys differs between its readers."""
    return _MARKDOWN.sub(lambda found: f"&#{ord(found.group())};", plain_name(text))
