"""The backend of the tab: what it tells of event files, through TensorBoard's own reader and application."""

from __future__ import annotations

import json
from argparse import Namespace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from tensorboard.backend.application import TensorBoardWSGI
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from werkzeug.test import Client

from relu_doctor.reports.frames import COLUMNS, STATUSES, Frame
from relu_doctor.reports.packing import FrameError
from relu_doctor.reports.plugin.loader import ReLUDoctorLoader
from relu_doctor.reports.plugin.records import split_blob
from relu_doctor.reports.timelines import UNKNOWN, union
from tests.browser import planted

NAMES, SIZES, WINDOWS = ("a", "b", "c"), (3, 40, 7), 6


class Asking:
    """A client of the plugin's routes, with the frames that were written."""

    def __init__(self, log_dir: Path, frames: list[Frame]) -> None:
        self.frames = frames
        self.log_dir = log_dir
        self._multiplexer = EventMultiplexer(tensor_size_guidance={"relu_doctor": 0})
        provider = MultiplexerDataProvider(self._multiplexer, str(log_dir))
        plugin = ReLUDoctorLoader().load(TBContext(data_provider=provider))
        self._client = Client(TensorBoardWSGI([plugin], data_provider=provider))
        self.reload()

    def reload(self) -> None:
        self._multiplexer.AddRunsFromDirectory(str(self.log_dir))
        self._multiplexer.Reload()

    def __call__(self, route: str, *, code: int = 200, **headers: str) -> Any:
        answer = self._client.get(f"/data/plugin/relu_doctor/{route}", headers=headers)
        assert answer.status_code == code, answer.data
        return answer

    def json(self, route: str, *, code: int = 200) -> Any:
        return json.loads(self(route, code=code).data)


@pytest.fixture
def ask(tmp_path: Path) -> Asking:
    frames = list(planted.frames(NAMES, SIZES, WINDOWS))
    planted.write(tmp_path / "run", frames)
    return Asking(tmp_path, frames)


def test_tensorboard_finds_the_tab():
    """The entry point leads to the loader."""
    assert [entry.load() for entry in entry_points(group="tensorboard_plugins", name="relu_doctor")] == [
        ReLUDoctorLoader
    ]


def test_all_windows_are_kept_unless_the_user_says_otherwise():
    """The loader asks for every record of this plugin, and leaves the user's choice alone."""
    asked, own, without = (
        Namespace(samples_per_plugin={"images": 3}),
        Namespace(samples_per_plugin={"relu_doctor": 5}),
        Namespace(),
    )
    for flags in (asked, own, without):
        ReLUDoctorLoader().fix_flags(flags)
    assert asked.samples_per_plugin == {"images": 3, "relu_doctor": 0}
    assert own.samples_per_plugin == {"relu_doctor": 5}
    assert vars(without) == {}
    assert ReLUDoctorLoader().load(TBContext()) is None


def test_runs_tell_how_many_windows_there_are(ask):
    """Kept and made, first and last step."""
    told = {"run": "run", "windows": WINDOWS, "made": WINDOWS, "first_step": 1, "last_step": 50 * WINDOWS}
    assert ask.json("runs") == {"schema": 1, "runs": [{**told, "unreadable": []}]}


def test_the_timeline_has_the_counts_of_every_window(ask):
    """Windows by step; per window and site the counts of the frame."""
    told = ask.json("timeline?run=run")
    assert [window["last_step"] for window in told["windows"]] == [50 * (window + 1) for window in range(WINDOWS)]
    assert [(site["name"], site["start"], site["num_units"]) for site in told["sites"]] == [
        ("a", 0, 3),
        ("b", 3, 40),
        ("c", 43, 7),
    ]
    for name in ("dead", "unproven", "active", "deaths"):
        assert told["counts"][name] == [[site[name] for site in frame.sites] for frame in ask.frames]
    assert told["statuses"] == list(STATUSES)
    assert told["num_units"] == sum(SIZES)


def test_statuses_and_numbers_are_those_of_the_frames(ask):
    """Byte for byte, whatever chunk is asked for, deflated or not."""
    whole = b"".join(frame.status.tobytes() for frame in ask.frames)
    assert ask("status?run=run&first=0&last=5").data == whole
    assert ask("status?run=run&first=2&last=3").data == whole[2 * sum(SIZES) : 4 * sum(SIZES)]
    packed = ask("status?run=run&first=0&last=5", **{"Accept-Encoding": "gzip"})
    assert packed.headers["Content-Encoding"] == "gzip"
    for site in range(len(SIZES)):
        columns = ask.frames[4].units[site]
        wanted = b"".join(columns[name].astype(dtype).tobytes() for name, dtype in COLUMNS)
        assert ask(f"numbers?run=run&window=4&site={site}").data == wanted
    wanted = b"".join(columns["mechanism"].tobytes() for columns in ask.frames[4].units)
    assert ask("column?run=run&window=4&column=mechanism").data == wanted


def test_a_window_tells_its_verdict_and_findings(ask):
    """As they were written."""
    told = ask.json("window?run=run&window=5")
    frame = ask.frames[5]
    assert told["verdict"] == frame.verdict
    assert told["findings"] == list(frame.findings)
    assert told["sites"] == list(frame.sites)


def test_a_unit_has_its_history(ask):
    """Its status, numbers, cause and onset in all windows; no NaN in JSON."""
    unit = int(np.flatnonzero(ask.frames[-1].units[1]["onset"])[0])
    told = ask.json(f"history?run=run&site=1&unit={unit}")
    assert told["windows"] == list(range(WINDOWS))
    assert told["status"] == [int(frame.status[3 + unit]) for frame in ask.frames]
    assert told["onset_step"] == int(ask.frames[-1].units[1]["onset_step"][unit])
    assert told["firing_rate"][-1] == 0
    assert None in told["margin"]


@pytest.mark.parametrize(
    ("route", "code"),
    [
        ("timeline", 400),
        ("timeline?run=nobody", 404),
        ("timeline?run=../../etc/passwd", 404),
        ("timeline?run=" + "x" * 20_000, 400),
        ("status?run=run&first=0&last=6", 404),
        ("status?run=run&first=0&last=64", 400),
        ("status?run=run&first=3&last=2", 400),
        ("status?run=run&first=-1&last=2", 400),
        ("status?run=run&first=0&last=" + quote("²"), 400),
        ("numbers?run=run&window=0&site=3", 404),
        ("numbers?run=run&window=99999999999&site=0", 400),
        ("column?run=run&window=0&column=__class__", 400),
        ("history?run=run&site=0&unit=3", 404),
        ("window?run=run&window=6", 404),
    ],
)
def test_what_is_asked_wrongly_gets_a_sentence(ask, route, code):
    """Not a trace, and no more than was asked for."""
    assert ask.json(route, code=code)["error"].startswith("expected")


@pytest.mark.parametrize("path", ["../plugin/backend.py", "%2e%2e/frames.py", "..%2f..%2fframes.py", "index.html", ""])
def test_only_the_files_of_the_front_end_are_served(ask, path):
    """Each is a route of its own; no path leads to another file."""
    assert ask("static/index.js").headers["Content-Type"].startswith("text/javascript")
    assert ask("static/style.css").headers["Content-Type"].startswith("text/css")
    ask(f"static/{path}", code=404)


def test_what_cannot_be_read_is_told_and_the_rest_is_shown(tmp_path):
    """A damaged record, one of a newer schema, and one with other data under our tag leave the others alone."""
    frames = list(planted.frames(NAMES, SIZES, 3))
    packed = [frame.pack() for frame in frames]
    broken = [(packed[0][0][:-9], *packed[0][1:]), (packed[1][0], b"x", packed[1][2])]
    planted.write_packed(tmp_path / "run", frames, [*broken, packed[2]])
    told = Asking(tmp_path, frames).json("timeline?run=run")
    assert [window["last_step"] for window in told["windows"]] == [150]
    assert [text.split(":")[0] for text in told["unreadable"]] == ["step 50", "step 100"]


def test_one_damaged_blob_leaves_the_rest_of_a_units_history(tmp_path):
    """That window's numbers are null in the history and 255 in a column; asked for by themselves, it is said why."""
    frames = list(planted.frames(NAMES, SIZES, 3))
    packed = [frame.pack() for frame in frames]
    header, status, sites = packed[1]
    planted.write_packed(
        tmp_path / "run", frames, [packed[0], (header, status, [sites[0], b"damaged", sites[2]]), packed[2]]
    )
    ask = Asking(tmp_path, frames)
    told = ask.json("history?run=run&site=1&unit=0")
    assert told["windows"] == [0, 1, 2]
    assert told["status"] == [int(frame.status[3]) for frame in frames]
    assert [rate is None for rate in told["firing_rate"]] == [False, True, False]
    column = np.frombuffer(ask("column?run=run&window=1&column=mechanism").data, np.uint8)
    assert set(column[3:43]) == {UNKNOWN}
    assert column[43:].tolist() == frames[1].units[2]["mechanism"].tolist()
    assert "error" in ask.json("numbers?run=run&window=1&site=1", code=500)


def test_a_run_of_which_nothing_can_be_read_says_why(tmp_path):
    """It is listed, without windows and with the first reason."""
    frames = list(planted.frames(NAMES, SIZES, 2))
    planted.write_packed(tmp_path / "run", frames, [(b"x", *frame.pack()[1:]) for frame in frames])
    (row,) = Asking(tmp_path, frames).json("runs")["runs"]
    assert row["windows"] == 0
    assert row["unreadable"][0].startswith("step 50: expected")


def test_later_windows_are_seen(ask):
    """What TensorBoard has loaded meanwhile is told with the next answer."""
    assert ask.json("runs")["runs"][0]["windows"] == WINDOWS
    more = list(planted.frames(NAMES, SIZES, WINDOWS + 2))[WINDOWS:]
    planted.write(ask.log_dir / "run", more)
    ask.reload()
    assert ask.json("runs")["runs"][0]["windows"] == WINDOWS + 2
    assert len(ask.json("timeline?run=run")["windows"]) == WINDOWS + 2


def test_a_site_that_comes_and_goes_has_its_place(tmp_path):
    """Units have one place over all windows; where a window does not know them stands 255, and nothing is kept."""
    first = list(planted.frames(("a", "b"), (3, 4), 1))
    second = [
        planted.later(frame, 1)
        for frame in planted.frames(("a", "new", "b"), (3, 2, 4), 1, ids=("site0", "new", "site1"))
    ]
    planted.write(tmp_path / "run", [*first, *second])
    ask = Asking(tmp_path, [*first, *second])
    told = ask.json("timeline?run=run")
    assert [(site["site_id"], site["start"]) for site in told["sites"]] == [("site0", 0), ("new", 3), ("site1", 5)]
    statuses = np.frombuffer(ask("status?run=run&first=0&last=1").data, np.uint8).reshape(2, 9)
    assert statuses[0].tolist() == [*first[0].status[:3], UNKNOWN, UNKNOWN, *first[0].status[3:]]
    assert statuses[1].tolist() == second[0].status.tolist()
    assert ask("numbers?run=run&window=0&site=1", code=204).data == b""
    assert ask.json("history?run=run&site=1&unit=0")["windows"] == [1]


def test_more_sites_than_blobs_share_them(tmp_path):
    """Each site's numbers are found in the blob that it shares with its neighbours."""
    names = tuple(f"s{place}" for place in range(150))
    frames = list(planted.frames(names, (2,) * 150, 1))
    planted.write(tmp_path / "run", frames)
    ask = Asking(tmp_path, frames)
    for site in (0, 2, 77, 149):
        columns = frames[0].units[site]
        wanted = b"".join(columns[name].astype(dtype).tobytes() for name, dtype in COLUMNS)
        assert ask(f"numbers?run=run&window=0&site={site}").data == wanted


@pytest.mark.parametrize("blob", [b"", b"\x01\0\0\0", b"\xff\xff\xff\xff" + b"\0" * 40, b"\x01\0\0\0\x05\0\0\0abc"])
def test_a_damaged_blob_is_no_numbers(blob):
    """Cut short, or of lengths that do not add up."""
    with pytest.raises(FrameError, match="expected"):
        split_blob(blob)


def test_the_union_of_sites_keeps_the_forward_order():
    """The latest window's order; sites that are gone stand behind those that came before them."""
    row = lambda name: {"site_id": name, "num_units": 2}  # noqa: E731
    windows = [[row("a"), row("gone"), row("b")], [row("a"), row("b"), row("late")]]
    assert [site["site_id"] for site in union(windows)] == ["a", "gone", "b", "late"]
