"""One HTML file that shows a run: the tab's front end and the data in it; it asks no network for anything.

Beside the picture stand the verdict, the findings and the sites as plain text and tables, for readers without scripts.
"""

from __future__ import annotations

import base64
import hashlib
import html
import platform
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from relu_doctor.numerals import percent, plural
from relu_doctor.reports.frames import Frame
from relu_doctor.reports.page_data import Part, parts_of
from relu_doctor.reports.redaction import redacted, redacted_text, redacted_texts
from relu_doctor.reports.words import plain_name, shorten

WEB = Path(__file__).resolve().parent / "web"
_ENTRY = "page.js"
_IMPORT = re.compile(r'^import \{(?P<names>[^}]*)\} from "\./(?P<file>[\w.]+)";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?P<kind>(?:async )?(?:function|class|const)) (?P<name>[\w$]+)", re.MULTILINE)
_PACKAGES = ("relu-doctor", "torch", "numpy")
_MOST_ROWS = 300  # of a table
_INPUT = ("Checkpoint: ", "Data: ")  # so begin the remarks that tell what was looked at


class PageError(ValueError):
    """There is nothing to make a page of."""


def build_page(
    frames: Iterable[Frame],
    *,
    title: str,
    command: str | Sequence[str] | None = None,
    versions: Mapping[str, str] | None = None,
    made: int | None = None,
) -> str:
    """A whole HTML document.

    Args:
        frames: the windows of a run, or scans, by ascending step.
        title: what it is about: the name of the run or the file; like all texts it loses homes and tokens.
        command: that made it, as a shell would read it or as words; what is secret is taken out.
        versions: of what was used; those of relu-doctor, torch, numpy and Python by default.
        made: how many windows the run had, where not all of them are here.

    Raises:
        PageError: there are no frames.
    """
    kept = [_shared(frame) for frame in frames]
    if not kept:
        raise PageError("expected at least one window to make a page of, found none.")
    name = plain_name(redacted_text(title))
    parts = parts_of(kept, name, made)
    script, style = bundle(), (WEB / "style.css").read_text("utf-8")
    head = "; ".join(
        [
            "default-src 'none'",
            f"script-src 'sha256-{_digest(script)}'",
            f"style-src 'sha256-{_digest(style)}'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    return "".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{head}">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n',
            f"<title>{_text(shorten(name, 80))} – ReLU Doctor</title>\n<style>{style}</style>\n</head>\n",
            '<body>\n<div class="relu-doctor-page">\n',
            _banner(name, kept[-1]),
            '<main id="relu-doctor"></main>\n',
            _tables(kept[-1]),
            _footer(kept[-1], command, versions or installed()),
            "</div>\n",
            *(_block(part) for part in parts),
            f'<script type="module">{script}</script>\n</body>\n</html>\n',
        ]
    )


def _shared(frame: Frame) -> Frame:
    """With texts that are fit to be shared: files and data are named in them."""
    sites = [{**site, "note": redacted_text(site["note"])} if site.get("note") else site for site in frame.sites]
    return replace(
        frame,
        verdict=redacted_texts(frame.verdict),
        sites=sites,
        findings=redacted_texts(frame.findings),
        alerts=redacted_texts(frame.alerts),
    )


def installed() -> dict[str, str]:
    """The versions of what makes a diagnosis."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return {**found, "Python": platform.python_version()}


def bundle() -> str:
    """The front end's modules in one: each in a function of its own, in the order in which they need each other."""
    done: dict[str, str] = {}

    def add(file: str) -> None:
        if file in done:
            return
        source = (WEB / file).read_text("utf-8")
        for found in _IMPORT.finditer(source):
            add(found["file"])
        names = [found["name"] for found in _EXPORT.finditer(source)]
        body = _EXPORT.sub(r"\g<kind> \g<name>", _IMPORT.sub(_taken, source))
        done[file] = f"const {_module(file)} = (() => {{\n{body}\nreturn {{ {', '.join(names)} }};\n}})();\n"

    add(_ENTRY)
    script = "".join(done.values())
    return f"{script}{_module(_ENTRY)}.start();\n"


def _taken(found: re.Match[str]) -> str:
    return f"const {{{found['names']}}} = {_module(found['file'])};\n"


def _module(file: str) -> str:
    return f"${file.removesuffix('.js')}"


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _block(part: Part) -> str:
    """Data as a script that is none: base64 has nothing in it that could end it."""
    packed = base64.b64encode(zlib.compress(part.data, 9)).decode("ascii")
    return f'<script type="text/plain" id="rd-{part.name}">{packed}</script>\n'


def _banner(title: str, last: Frame) -> str:
    told = last.verdict
    return (
        f'<header class="banner">\n<p class="of">ReLU Doctor</p>\n<h1>{_name(title)}</h1>\n'
        f'<p class="sentence {_text(told["severity"])}">{_text(told["sentence"])}</p>\n'
        f"<p>{_text(told['coverage'])}</p>\n</header>\n"
    )


def _tables(last: Frame) -> str:
    """Open where no script closes them."""
    findings = [
        f'<tr><td class="code">{_text(finding["code"])}</td><td>{_name(finding["site"])}</td>'
        f"<td>{_text(finding['title'])}</td>"
        f"<td>{_text(finding['evidence'])}</td><td>{_text(finding['advice'])}</td></tr>"
        for finding in last.findings
    ]
    sites = [
        f'<tr><td>{_name(site["name"])}</td><td>{_text(site["rectifier"])}</td><td class="number">{site["num_units"]:,}'
        f'</td><td class="number">{_dead(site)}</td><td class="number">{_share(site)}</td>'
        f'<td class="number">{site["unproven"]:,}</td></tr>'
        for site in last.sites[:_MOST_ROWS]
    ]
    more = f"<p>{plural(len(last.sites) - _MOST_ROWS, 'more site')}.</p>" if len(last.sites) > _MOST_ROWS else ""
    return (
        '<details class="plain" id="relu-doctor-tables" open>\n<summary>Findings and sites as tables</summary>\n'
        + _table(("code", "site", "finding", "evidence", "advice"), findings, "No findings.")
        + _table(("site", "rectifier", "units", "dead", "dead fraction", "unproven"), sites, "No sites.")
        + f"{more}</details>\n"
    )


def _dead(site: Mapping[str, Any]) -> str:
    return f"{site['dead']:,}" if _known(site) else "–"


def _share(site: Mapping[str, Any]) -> str:
    return percent(site["dead"] / site["num_units"]) if site["can_die"] and _known(site) else "–"


def _known(site: Mapping[str, Any]) -> bool:
    """Whether of any unit is known whether it fired."""
    return bool(site["num_units"] > site["non_finite"] + site["unobserved"])


def _table(heads: Sequence[str], rows: Sequence[str], nothing: str) -> str:
    if not rows:
        return f"<p>{nothing}</p>\n"
    titles = "".join(f"<th>{head}</th>" for head in heads)
    return f"<table>\n<thead><tr>{titles}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody>\n</table>\n"


def _footer(last: Frame, command: str | Sequence[str] | None, versions: Mapping[str, str]) -> str:
    told = last.verdict
    sure = "".join(f"<p>{_text(text)}</p>" for text in told["details"])
    remarks: tuple[list[str], list[str]] = ([], [])  # of what was seen, and of what was not
    for text in told["remarks"]:
        remarks[not text.startswith(_INPUT)].append(f"<li>{_text(text)}</li>")
    given, unseen = ("".join(each) for each in remarks)
    made = f"<pre>{_text(plain_name(redacted(command)))}</pre>" if command else ""
    used = ", ".join(f"{name} {number}" for name, number in versions.items())
    return (
        '<footer class="plain">\n'
        + (f"<section><h2>How sure</h2>{sure}</section>\n" if sure else "")
        + (f"<section><h2>Input</h2><ul>{given}</ul></section>\n" if given else "")
        + (f"<section><h2>What was not seen</h2><ul>{unseen}</ul></section>\n" if unseen else "")
        + f"<section><h2>Made by</h2>{made}<p>{_text(used)}</p></section>\n</footer>\n"
    )


def _name(text: object) -> str:
    """A name, isolated from the text around it."""
    return f"<bdi>{_text(shorten(plain_name(text), 120))}</bdi>"


def _text(text: object) -> str:
    return html.escape(plain_name(text))
