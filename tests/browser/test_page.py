"""The page of its own, opened from a file as whoever gets it would, with and without scripts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from relu_doctor.reports.page import build_page
from tests.browser import planted
from tests.browser.conftest import NAMES, SIZES, WINDOWS
from tests.browser.seeing import dead_units
from tests.browser.test_tab import HOSTILE, dead_at, seek


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """The page of the run ``sick``."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    command = "relu-doctor report /home/ann/sick --format html --token abc"
    path.write_text(build_page(planted.frames(NAMES, SIZES, WINDOWS), title="sick", command=command), "utf-8")
    return path


def test_the_page_shows_the_planted_units_at_every_step(file, watched):
    """Opened as a file it draws the same picture as the tab, and asks for nothing but itself."""
    page = watched()
    view = page.open_file(file)
    assert view.locator(".kept").inner_text() == f"{WINDOWS} of {WINDOWS} windows"
    for site in range(len(NAMES)):
        assert dead_units(view, site) == dead_at(WINDOWS - 1, site)
    seek(view, 15)
    assert dead_units(view, 1) == dead_at(15, 1)
    assert [url for url in page.asked if url != file.as_uri()] == []


def test_its_findings_highlight_their_units(file, watched):
    """Also those of an earlier window, whose units lie in the page as bits."""
    view = watched().open_file(file)
    seek(view, 17)
    button = view.locator(".findings button").filter(has_text="block2.relu").first
    button.click()
    assert dead_units(view, 2) == dead_at(17, 2)
    assert dead_units(view, 1) == set()


def test_it_tells_a_unit_and_its_history(file, watched):
    """The last window has all numbers; an earlier one the firing rate and the cause."""
    view = watched().open_file(file)
    strip = view.locator(".strip").nth(1)
    unit = min(dead_at(10, 1) or dead_at(WINDOWS - 1, 1))
    cell = strip.evaluate("strip => Number(strip.dataset.cell)")
    across = int(strip.evaluate("strip => strip.clientWidth")) // cell
    strip.click(position={"x": (unit % across + 0.5) * cell, "y": (unit // across + 0.5) * cell})
    card = view.locator(".unit")
    card.get_by_text("−1.2").wait_for()
    seek(view, 28)
    card.get_by_text("negative bias").wait_for()
    assert card.get_by_text("−1.2").count() == 0


def test_beside_the_picture_stand_how_sure_what_was_not_seen_and_what_made_it(file, watched):
    """The footer tells them, without the home directory and the token; the tables are closed where the picture is."""
    view = watched().open_file(file)
    said = view.locator("footer").inner_text()
    for words in ("How sure", "What was not seen", "head.act was never called", "relu-doctor report ~/sick", "torch"):
        assert words in said
    for secret in ("ann", "abc"):
        assert secret not in view.locator("body").inner_text()
    assert view.locator("#relu-doctor-tables").evaluate("details => details.open") is False


def test_without_scripts_it_can_be_read(file, watched):
    """Verdict, findings and sites are there as text."""
    page = watched(java_script_enabled=False)
    page.page.goto(file.as_uri())
    said = page.page.locator("body").inner_text()
    for words in ("units are dead", "RD205", "held dead by their bias", "block2.relu", "dead fraction"):
        assert words in said


def test_hostile_names_stay_text(tmp_path, watched):
    """In the markup, in the data and in the title."""
    path = tmp_path / "hostile.html"
    run = planted.frames(HOSTILE, [8] * len(HOSTILE), 4, worst=0.9)
    path.write_text(build_page(run, title=HOSTILE[0] + HOSTILE[3], command=f"relu-doctor scan '{HOSTILE[1]}'"), "utf-8")
    view = watched().open_file(path)
    assert view.locator("h1").inner_text().startswith(HOSTILE[0])
    assert view.locator(".site .name").all_inner_texts()[1] == HOSTILE[1]
    view.locator("#relu-doctor-tables summary").click()
    assert view.evaluate("window.hit") is None
    assert view.locator("img").count() == 0
    assert view.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_single_scan_has_no_slider(tmp_path, watched):
    """One window: the picture, its findings and no time."""
    path = tmp_path / "scan.html"
    *_, last = planted.frames(NAMES, SIZES, WINDOWS)
    path.write_text(build_page([last], title="step1500.pt"), "utf-8")
    view = watched().open_file(path)
    assert dead_units(view, 1) == dead_at(WINDOWS - 1, 1)
    assert not view.locator(".player").is_visible()
    assert view.locator(".wave").count() == 0


def test_what_became_nan_has_not_recovered(tmp_path, watched):
    """Its curves have a gap, and where a fraction would stand, a dash and the number of units that are not finite."""
    path = tmp_path / "nan.html"
    run = list(planted.frames(("a", "b"), (16, 16), 6, worst=1))
    for window in (4, 5):
        run[window] = planted.broken(run[window], 0)
    run[5] = planted.broken(run[5], 1)
    path.write_text(build_page(run, title="nan"), "utf-8")
    view = watched().open_file(path)
    ends = "line => Math.max(...line.getAttribute('d').match(/[ML][\\d.]+/g).map(at => Number(at.slice(1))))"
    assert view.locator(".spark .line").nth(0).evaluate(ends) == pytest.approx(88 * 3 / 5, abs=0.1)
    assert view.locator(".spark .line").nth(1).evaluate(ends) == pytest.approx(88 * 4 / 5, abs=0.1)
    assert view.locator(".dead-line").evaluate(ends) < view.locator(".wave").evaluate("wave => wave.clientWidth") * 0.8
    assert "– at last" in view.locator(".wave").get_attribute("aria-label")
    assert view.locator(".verdict").inner_text().split("\n")[1:3] == ["– dead", "32 not finite"]
    assert view.locator(".site").first.locator(".tally").inner_text().split() == ["–", "16", "not", "finite"]
    assert view.locator("#relu-doctor-tables td.number").all_text_contents()[:4] == ["16", "–", "–", "0"]
    view.locator("input.steps").fill("4")
    view.get_by_text("16 not finite").first.wait_for()
    assert view.locator(".site").nth(1).locator(".share").inner_text().endswith("%")


def test_fractions_are_of_the_units_that_were_there(tmp_path, watched):
    """A site that grows, and one that comes late: a window's fractions are of its own units."""
    path = tmp_path / "grown.html"
    *_, first = planted.frames(("a",), (10,), 4, worst=1, peak=0.1)
    *_, second = planted.frames(("a", "late"), (40, 10), 4, worst=1, peak=0.1)
    run = [replace(first, span={**first.span, "window": 0, "first_step": 1, "last_step": 50}), second]
    path.write_text(build_page(run, title="grown"), "utf-8")
    view = watched().open_file(path)
    view.locator("input.steps").fill("0")
    dead, rows = first.sites[0]["dead"], view.locator(".site")
    share = f"{100 * dead / 10:.1f} %".replace("100.0", "100")
    view.locator(".verdict").get_by_text(f"{share} dead").wait_for()
    assert rows.first.locator(".tally").inner_text().split("\n") == [str(dead), share]
    assert rows.nth(1).locator(".tally").inner_text().split("\n") == ["–", "not there"]
    rows.nth(1).locator(".strip").hover(position={"x": 4, "y": 4})
    view.locator(".tooltip").get_by_text("not there in this window").wait_for()


@pytest.mark.parametrize(("sizes", "least", "most"), [((16,) * 45, 12, 14), ((400,) * 30, 9, 9), ((20_000, 64), 2, 5)])
def test_squares_shrink_only_where_that_helps(tmp_path, watched, sizes, least, most):
    """Many small sites keep squares that can be seen; a site of very many units is made to fit."""
    path = tmp_path / "many.html"
    *_, last = planted.frames([f"s{place}" for place in range(len(sizes))], sizes, 2)
    path.write_text(build_page([last], title="many"), "utf-8")
    view = watched().open_file(path)
    assert least <= int(view.locator(".strip").first.get_attribute("data-cell")) <= most


def test_long_names_and_narrow_windows_leave_codes_and_counts_whole(tmp_path, watched):
    """No finding is wider than its list, no code is broken over lines, and a count of nothing can still be read."""
    path = tmp_path / "long.html"
    *_, last = planted.frames(["encoder" * 20], [64], 4, worst=1, peak=0.1)
    path.write_text(build_page([last], title="long"), "utf-8")
    view = watched().open_file(path)
    fits = "card => card.scrollWidth <= card.clientWidth"
    assert view.locator(".findings button").first.evaluate(fits)
    assert view.locator("aside").evaluate(fits)
    faint = "chip => [chip, chip.querySelector('.count')].map(each => getComputedStyle(each).opacity)"
    assert view.locator(".chip.none").first.evaluate(faint) == ["1", "1"]
    narrow = watched(java_script_enabled=False, viewport={"width": 420, "height": 700}).page
    narrow.goto(path.as_uri())
    words = (
        "cell => { const range = new Range(); range.selectNodeContents(cell); return range.getClientRects().length; }"
    )
    assert narrow.locator("td.code").first.evaluate(words) == 1
