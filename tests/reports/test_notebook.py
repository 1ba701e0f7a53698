"""The report as HTML."""

from __future__ import annotations

from html.parser import HTMLParser

from relu_doctor.reports.notebook import render_html
from tests.builders import make_diagnosis, site

NAME = "<script>alert(1)</script>&\"'\x1b\u202e"


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def read(html):
    reader = Reader()
    reader.feed(html)
    return reader


def test_names_are_text_and_nothing_is_loaded():
    """Whatever a name holds, the page has only our tags and no address."""
    diagnosis = make_diagnosis(
        site(NAME, active=20, negative_bias=4, producer=NAME, rectifier=NAME),
        notes=(NAME,),
        unused=(NAME,),
        passed=NAME,
    )
    reader = read(diagnosis._repr_html_())
    allowed = {"div", "p", "small", "strong", "table", "thead", "tbody", "tr", "th", "td", "br"}
    assert set(reader.tags) <= allowed
    assert set(reader.attributes) <= {("style", "text-align:left")}
    assert "<script>alert(1)</script>" in reader.text
    assert "\x1b" not in reader.text
    assert "\u202e" not in reader.text


def test_it_tells_coverage_verdict_sites_and_findings():
    """The same sentences as on the console, and dead has its rate."""
    text = read(
        render_html(make_diagnosis(site("relu1", active=60, negative_bias=4), site("gelu", low=None, active=1)))
    ).text
    assert "2 of 2 sites observed on 1,797 inputs" in text
    assert "Mild: 4 of 64 units (6.25 %) are dead (each fires on < 0.398 % of inputs)" in text
    assert "dead (fires on < 0.398 % of inputs)" in text
    assert "RD205" in text


def test_many_sites_are_folded():
    """The worst 40 of 50."""
    html = render_html(make_diagnosis(*(site(f"relu{i}", active=4) for i in range(50))))
    assert html.count("<tr>") == 41
    assert "and 10 more sites, all of them sound" in html
