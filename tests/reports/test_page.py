"""The page of its own, read as text: what is in it, what is not, and how large it is."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import zlib
from dataclasses import replace

import numpy as np
import pytest

from relu_doctor.reports.page import PageError, build_page, bundle
from relu_doctor.reports.page_data import coded, parts_of
from tests.browser import planted

NAMES, SIZES, WINDOWS = ("a", "b"), (5, 40), 9


def blocks(page: str) -> dict[str, bytes]:
    """The data in a page."""
    found = re.findall(r'<script type="text/plain" id="rd-(\w+)">([^<]*)</script>', page)
    return {name: zlib.decompress(base64.b64decode(text)) for name, text in found}


@pytest.fixture(scope="module")
def page() -> str:
    return build_page(planted.frames(NAMES, SIZES, WINDOWS), title="exp1", command="relu-doctor report exp1")


def test_statuses_lie_unit_by_unit(page):
    """The data are those of the frames, a unit's windows one behind the other."""
    frames = list(planted.frames(NAMES, SIZES, WINDOWS))
    told = np.frombuffer(blocks(page)["status"], np.uint8).reshape(sum(SIZES), WINDOWS)
    assert told.T.tolist() == [frame.status.tolist() for frame in frames]
    timeline = json.loads(blocks(page)["data"])["timeline"]
    assert timeline["counts"]["dead"] == [[site["dead"] for site in frame.sites] for frame in frames]
    assert timeline["made"] == WINDOWS


def test_nothing_but_its_own_scripts_may_run(page):
    """The policy allows the one script and the one style that are in the page, and no address at all."""
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    script = re.search(r'<script type="module">(.*?)</script>', page, re.DOTALL)[1]
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    for kind, text in (("script-src", script), ("style-src", style)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")
    assert not re.search(r"(?:src|href)=|https?://(?!www\.w3\.org/2000/svg)", page.replace(policy, ""))


def test_a_large_run_fits_into_two_megabytes():
    """10,000 units, 100 windows, firing rates that differ every time."""
    names, sizes = [f"blocks.{site}.act" for site in range(40)], [250] * 40
    assert len(build_page(planted.frames(names, sizes, 100), title="large").encode()) < 2_000_000


def test_too_many_windows_are_thinned_and_that_is_said(monkeypatch):
    """Evenly, with the first and the last; the page knows how many there were."""
    monkeypatch.setattr("relu_doctor.reports.page_data._MOST_CELLS", 45 * 4)
    monkeypatch.setattr("relu_doctor.reports.page_data._MOST_RATES", 45)
    parts = {part.name: part.data for part in parts_of(list(planted.frames(NAMES, SIZES, WINDOWS)), "exp1")}
    timeline = json.loads(parts["data"])["timeline"]
    assert [window["window"] for window in timeline["windows"]] == [0, 3, 5, 8]
    assert timeline["made"] == WINDOWS
    assert "rates" not in parts


def test_hostile_text_ends_no_element():
    """Names, titles and commands are text in the markup; in the data they are base64."""
    hostile = "</script><script>x()</script>\"'<!--\u202e\x07"
    page = build_page(planted.frames([hostile], [4], 2), title=hostile, command=f"scan {hostile}")
    assert "<script>x" not in page
    assert "<!--" not in page.split("<body>")[1]
    assert "\u202e" not in page
    assert page.count("</script>") == 1 + len(blocks(page))


def test_no_text_shows_a_home_or_a_token():
    """Neither what is read in the page nor the data in it, in the verdict, the findings, the alerts or the notes."""
    told = "/home/ann/x, https://ann:abc@host/y?sig=abc, hf_abcdefghijkl"
    frame = next(iter(planted.frames(NAMES, SIZES, 1)))
    verdict = {**frame.verdict, "sentence": told, "remarks": [f"Checkpoint: {told}", f"Data: {told}", told]}
    finding = {"code": "RD001", "site": "a", "title": told, "evidence": told, "advice": told, "units": [[0, 0]]}
    frame = replace(
        frame,
        verdict=verdict,
        findings=[finding],
        alerts=[{"code": "RD001", "step": 1, "site": "a", "message": told}],
        sites=[{**site, "note": told} for site in frame.sites],
    )
    page = build_page([frame], title=told)
    for text in (page.split("rd-data")[0], blocks(page)["data"].decode()):
        assert "~/x, https://[redacted]@host/y?[redacted]" in text
        assert not re.search(r"\bann\b|sig=abc|hf_abc", text)
    footer = page.split('<footer class="plain">')[1]
    given, unseen = footer.split("<h2>Input</h2>")[1].split("<h2>What was not seen</h2>")
    assert given.count("<li>") == 2
    assert unseen.split("</section>")[0].count("<li>") == 1


def test_firing_rates_keep_two_digits():
    """The logarithmic scale of a byte is within 3 % of what was measured; never, always and not known are exact."""
    rates = np.array([0, 1, np.nan, *np.geomspace(1e-5, 1, 500)])
    codes = coded(rates).astype(float)
    assert codes[:3].tolist() == [0, 254, 255]
    back = 10 ** (((codes[3:] - 1) / 253 - 1) * 6)
    assert np.abs(back / rates[3:] - 1).max() < 0.03


def test_no_frames_are_no_page():
    """It says what was expected."""
    with pytest.raises(PageError, match="expected at least one window"):
        build_page([], title="nothing")


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_bundle_is_one_script(tmp_path):
    """All modules in one, without imports and exports, and with each name in its own place."""
    path = tmp_path / "bundle.mjs"
    path.write_text(bundle(), "utf-8")
    subprocess.run(["node", "--check", str(path)], check=True)


def test_the_bundle_imports_nothing():
    """What is left of the modules asks for no file."""
    assert not re.search(r"^\s*(import|export)\b|import\.meta|\bfetch\(", bundle(), re.MULTILINE)
