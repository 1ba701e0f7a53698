"""The tab *ReLU Doctor* in a real TensorBoard, seen with a real browser."""

from __future__ import annotations

import numpy as np
import pytest

from tests.browser import planted
from tests.browser.conftest import NAMES, SIZES, WINDOWS
from tests.browser.seeing import colours, dead_units

HOSTILE = (
    "<script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 1'>",
    "\"quotes\" & 'apostrophes' &lt;b&gt;",
    "abc\u202edcba\u0007\x1b[31m",
    "long." * 2000,
)


def dead_at(window: int, site: int) -> set[int]:
    """The units that are dead in a window: silent since an earlier one."""
    times = planted.deaths(SIZES, WINDOWS, worst=0.6, peak=0.5)
    return set(np.flatnonzero(times[site] < window).tolist())


def seek(view, window: int) -> None:
    """Moves the slider to a window."""
    view.locator("input.steps").evaluate(
        "(slider, to) => { slider.value = to; slider.dispatchEvent(new Event('input', { bubbles: true })); }", window
    )
    view.wait_for_function(f"() => document.querySelector('.step').textContent === 'step {(window + 1) * 50:,}'")
    view.wait_for_timeout(150)


def test_the_tab_is_there_and_shows_the_planted_units(board, watched):
    """TensorBoard lists the tab, and each site's dead units are drawn where they were planted, in every run."""
    page = watched()
    view = page.open_tab(board)
    assert page.page.get_by_role("tab", name="ReLU Doctor").is_visible()
    assert view.locator(".panel").count() == 2
    assert view.locator(".kept").inner_text() == f"{2 * WINDOWS} of {2 * WINDOWS} windows"
    for site in range(len(NAMES)):
        assert dead_units(view, site) == dead_at(WINDOWS - 1, site)
    assert view.locator(".panel").first.locator(".site .name").all_inner_texts() == list(NAMES)


def test_scrubbing_changes_the_picture(board, watched):
    """At every step the picture is that of the window, and the tallies are its counts."""
    view = watched().open_tab(board)
    for window in (0, 14, 17, 29):
        seek(view, window)
        assert dead_units(view, 1) == dead_at(window, 1)
        tally = view.locator(".panel").first.locator(".site").nth(1).locator(".figure").inner_text()
        assert int(tally) == len(dead_at(window, 1))


def test_play_goes_to_the_end(board, watched):
    """Play begins anew when it stands at the end, moves on by itself, and can be stopped."""
    view = watched().open_tab(board)
    view.get_by_role("button", name="Play").click()
    view.wait_for_function("() => Number(document.querySelector('input.steps').value) > 2", timeout=20_000)
    view.get_by_role("button", name="Pause").click()
    stopped = view.locator("input.steps").input_value()
    view.wait_for_timeout(800)
    assert view.locator("input.steps").input_value() == stopped
    assert int(stopped) < WINDOWS - 1


def test_a_finding_highlights_its_units(board, watched):
    """Pressed, its units keep their colour and all others fade; pressed again, nothing is faded."""
    view = watched().open_tab(board)
    button = view.locator(".findings button").filter(has_text="block2.relu").first
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    assert dead_units(view, 2) == dead_at(WINDOWS - 1, 2)
    assert dead_units(view, 1) == set()
    button.click()
    assert dead_units(view, 1) == dead_at(WINDOWS - 1, 1)


def test_statuses_sites_and_causes_can_be_filtered(board, watched):
    """A status that is pressed away fades, a text leaves its sites, a cause leaves its units."""
    view = watched().open_tab(board)
    chip = view.locator(".chip[data-status=dead]")
    chip.click()
    assert chip.get_attribute("aria-pressed") == "false"
    assert dead_units(view, 1) == set()
    chip.click()
    view.get_by_label("Cause").select_option("dead_upstream")  # planted in every third site
    view.wait_for_timeout(500)
    assert dead_units(view, 1) == set()
    assert dead_units(view, 0) == dead_at(WINDOWS - 1, 0)
    view.get_by_label("Cause").select_option("")
    view.get_by_label("Filter sites by name").fill("BLOCK")
    left = view.locator(".panel").first.locator(".site:visible .name")
    assert left.all_inner_texts() == ["block1.relu", "block2.relu"]
    view.get_by_label("Filter sites by name").fill("nonsense")
    assert view.get_by_text("No site has that in its name.").first.is_visible()


def test_a_unit_tells_its_numbers_and_its_history(board, watched):
    """Under the pointer stand a unit's numbers; picked, its history."""
    view = watched().open_tab(board)
    unit = min(dead_at(WINDOWS - 1, 1))
    strip = view.locator(".panel").first.locator(".strip").nth(1)
    cell = strip.evaluate("strip => Number(strip.dataset.cell)")
    across = int(strip.evaluate("strip => strip.clientWidth")) // cell
    place = {"x": (unit % across + 0.5) * cell, "y": (unit // across + 0.5) * cell}
    strip.hover(position=place)
    tooltip = view.locator(".tooltip")
    tooltip.get_by_text("negative bias").wait_for()
    said = tooltip.inner_text()
    step = int(planted.deaths(SIZES, WINDOWS, worst=0.6, peak=0.5)[1][unit]) * 50
    numbers = ("0 % of 3,200 inputs", "−0.4", "−1.5", "−1.2", f"step {step:,}")
    for words in ("block1.relu", f"unit {unit}", "dead", *numbers):
        assert words in said
    strip.click(position=place)
    card = view.locator(".unit")
    card.locator(".curve").first.wait_for()
    assert card.locator(".curve").count() >= 4


def test_keys_lead_everywhere(board, watched):
    """Strips take arrows, n, Page Down and Enter, the slider arrows; screen readers are told what is under the keys."""
    page = watched()
    view = page.open_tab(board)
    first = view.locator(".panel").first.locator(".strip").first
    first.focus()
    page.page.keyboard.press("ArrowRight")
    page.page.keyboard.press("n")
    expected = min(unit for unit in dead_at(WINDOWS - 1, 0) if unit > 1)
    spoken = view.locator("[role=status][aria-live]")
    view.wait_for_function("() => document.querySelector('[aria-live]').textContent.includes('held by')")
    assert f"stem.relu, unit {expected} of 24: dead" in spoken.inner_text()
    page.page.keyboard.press("PageDown")
    assert view.evaluate("document.activeElement.getAttribute('aria-label')") == "block1.relu, 100 units"
    page.page.keyboard.press("Enter")
    view.locator(".unit h2").wait_for()
    slider = view.locator("input.steps")
    slider.focus()
    page.page.keyboard.press("ArrowLeft")
    assert slider.get_attribute("aria-valuetext") == "step 1,450 of 1,500"
    named = "(e) => e.ariaLabel || e.textContent.trim() || e.labels?.length"
    assert view.evaluate(f"[...document.querySelectorAll('button, input, select')].every({named})")


def test_light_and_dark_follow_tensorboard(board, watched):
    """The tab is dark where TensorBoard is, at once, whatever the system prefers."""
    page = watched(color_scheme="dark")
    view = page.open_tab(board)
    assert view.evaluate("document.documentElement.dataset.theme") == "dark"
    assert "#ff6b3d" in colours(view, 1)
    page.page.evaluate("document.body.classList.remove('dark-mode')")
    view.wait_for_function("() => document.documentElement.dataset.theme === 'light'")
    assert "#c2370c" in colours(view, 1)


def test_firing_rates_can_be_the_colours(board, watched):
    """Units that fire differ in shade, and the dead keep their colour."""
    view = watched().open_tab(board)
    assert len(set(colours(view, 1))) < 8
    view.get_by_label("Colour by").select_option("rate")
    view.wait_for_timeout(500)
    assert len(set(colours(view, 1))) > 5
    assert dead_units(view, 1) == dead_at(WINDOWS - 1, 1)


def test_hostile_names_stay_text(tmp_path, serve, watched):
    """Markup, quotes, bidi and control characters and endless names are shown as text, and none of it runs."""
    planted.write(tmp_path / "logs" / "a<b>&'\"", planted.frames(HOSTILE, [8, 8, 8, 8, 8], 4, worst=0.9))
    address = serve(tmp_path / "logs")
    view = watched().open_tab(address)
    shown = view.locator(".site .name").all_inner_texts()
    assert shown[0] == HOSTILE[0]
    assert shown[1] == HOSTILE[1]
    assert shown[2] == HOSTILE[2]
    assert "\u202e" not in shown[3]
    assert "\x1b" not in shown[3]
    assert len(shown[4]) <= 40
    for button in view.locator(".findings button").all():
        button.click()
    view.locator(".strip").first.click(position={"x": 3, "y": 3})
    view.locator(".unit h2").wait_for()
    assert view.evaluate("window.hit") is None
    assert view.locator(".relu-doctor img, .relu-doctor script").count() == 0
    assert view.evaluate("getComputedStyle(document.querySelector('.site .name')).unicodeBidi") == "isolate"
    assert view.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("fast", ["true", "false"])
def test_under_a_path_prefix(fast, runs, serve, watched):
    """All addresses are relative; with either of TensorBoard's readers."""
    address = serve(runs, "--path_prefix", "/some/where", "--load_fast", fast)
    assert address.endswith("/some/where")
    page = watched()
    view = page.open_tab(address)
    assert dead_units(view, 1) == dead_at(WINDOWS - 1, 1)
    asked = [url for url in page.asked if "relu_doctor" in url]
    assert asked
    assert all(url.startswith(address) for url in asked)


def test_a_sample_of_the_windows_is_said_to_be_one(runs, serve, watched):
    """Where the user has TensorBoard keep fewer windows, the tab says how many of how many, and how to see all."""
    address = serve(runs, "--samples_per_plugin", "relu_doctor=10")
    view = watched().open_tab(address)
    assert view.locator(".kept").inner_text() == f"20 of {2 * WINDOWS} windows"
    assert "--samples_per_plugin relu_doctor=0" in view.locator(".kept").get_attribute("title")


def test_a_link_leads_to_its_site(board, watched):
    """The links of the sink's findings open the tab at a site."""
    page = watched(viewport={"width": 1280, "height": 420})
    page.page.goto(f"{board}/#relu_doctor&p.relu_doctor.site=site3")
    view = page.page.locator("iframe").first.element_handle(timeout=30_000).content_frame()
    view.wait_for_selector(".site.asked", timeout=30_000)
    assert view.locator(".site.asked .name").first.inner_text() == "head.act"
    view.wait_for_timeout(900)
    assert view.locator(".site.asked").first.evaluate("site => site.getBoundingClientRect().top < innerHeight")


def test_later_windows_come_by_themselves(tmp_path, serve, watched):
    """A run that goes on is shown on, the reader at its end stays there, and older windows are not asked for again."""
    whole = list(planted.frames(NAMES, SIZES, 70))
    planted.write(tmp_path / "logs" / "run", whole[:66])
    page = watched()
    view = page.open_tab(serve(tmp_path / "logs", "--reload_interval", "1"))
    view.wait_for_timeout(1000)
    assert view.locator(".kept").inner_text() == "66 of 66 windows"
    asked = len(page.asked)
    planted.write(tmp_path / "logs" / "run", whole[66:])
    view.get_by_text("70 of 70 windows").wait_for(timeout=40_000)
    assert view.locator("output.step").inner_text() == "step 3,500"
    view.wait_for_timeout(1000)
    assert [url.split("first=")[1] for url in page.asked[asked:] if "/status?" in url] == ["64&last=69"]


def test_later_windows_leave_the_keyboard_where_it_is(tmp_path, serve, watched):
    """The unit under the keys stays under them, and the boxes of the runs and statuses are not built anew."""
    whole = list(planted.frames(NAMES, SIZES, 8))
    for name in ("one", "two"):
        planted.write(tmp_path / "logs" / name, whole[:6])
    view = watched().open_tab(serve(tmp_path / "logs", "--reload_interval", "1"))
    view.evaluate("document.querySelectorAll('.run input, .chip').forEach(each => { each.before = true; })")
    strip = view.locator(".panel").nth(1).locator(".strip").nth(2)
    strip.focus()
    for _ in range(3):
        strip.press("ArrowRight")
    planted.write(tmp_path / "logs" / "two", whole[6:])
    view.get_by_text("14 of 14 windows").wait_for(timeout=40_000)
    assert view.evaluate("[...document.querySelectorAll('.strip')].indexOf(document.activeElement)") == len(NAMES) + 2
    strip.press("ArrowRight")
    assert "unit 4 of 300" in view.locator(".unseen[role=status]").inner_text()
    assert view.evaluate("[...document.querySelectorAll('.run input, .chip')].every(each => each.before)")


def test_a_run_of_which_nothing_can_be_read_is_not_hidden(tmp_path, serve, watched):
    """Alone it has the page; beside others it has a line above them; each time the reason is told."""
    frames = list(planted.frames(NAMES, SIZES, 2))
    planted.write_packed(tmp_path / "logs" / "bad", frames, [(b"x", *frame.pack()[1:]) for frame in frames])
    address = serve(tmp_path / "logs", "--reload_interval", "1")
    view = watched().open_tab(address)
    assert "Nothing of bad could be read: step 50: expected" in view.locator(".message").inner_text()
    planted.write(tmp_path / "logs" / "good", frames)
    view.wait_for_selector(".strip canvas", timeout=40_000)
    assert "Nothing of bad could be read: step 50: expected" in view.locator(".top .note").inner_text()


def test_without_windows_it_says_what_to_do(tmp_path, serve, watched):
    """An empty log directory gets the lines that fill it; a TensorBoard that has gone gets a sentence."""
    (tmp_path / "logs").mkdir()
    address = serve(tmp_path / "logs")
    view = watched().open_tab(address)
    said = view.locator(".message").inner_text()
    assert 'sinks=["tensorboard:runs/exp1"]' in said
    assert "--tensorboard" in said
