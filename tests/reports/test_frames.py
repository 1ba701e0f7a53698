"""Frames: what pictures are drawn from says the same as the data frames, packed or not, from a run or its history."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest
import torch
from torch import nn

import relu_doctor
from relu_doctor.reports.frames import (
    COLUMNS,
    MECHANISMS,
    ONSETS,
    STATUSES,
    Frame,
    FrameError,
    ranges_of,
    read_header,
    read_numbers,
    read_status,
)
from relu_doctor.reports.history_frames import frames_of
from relu_doctor.training.monitor import Monitor
from tests.training.loops import batches, perceptron, train

pytestmark = pytest.mark.filterwarnings("ignore::relu_doctor.errors.DyingUnitsWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The windows of a run with planted deaths, and the directory of its history."""
    model, windows = perceptron(), []
    with torch.no_grad():
        model[0].bias[:5] = -100
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def plant(step: int) -> None:
        if step == 31:
            with torch.no_grad():
                model[2].bias[10:14] = -100

    directory = tmp_path_factory.mktemp("run")
    monitor = Monitor(model, optimizer=optimizer, every=2, window=100, sinks=[windows.append], history=directory)
    train(model, batches(450), optimizer, monitor, plant)
    return windows, directory


def test_a_frame_says_what_the_data_frames_say(run):
    """Status, numbers and lives of each unit, in the precision that is promised."""
    for window in run[0]:
        frame, units = Frame.of_window(window), window.diagnosis.units
        assert [STATUSES[code] for code in frame.status] == units["status"].tolist()
        for name in ("firing_rate", "pre_max", "bias", "margin"):
            told = np.concatenate([columns[name] for columns in frame.units]).astype(float)
            np.testing.assert_allclose(told, units[name].to_numpy(float), rtol=1e-3, atol=1e-7)
        whole = {name: np.concatenate([columns[name] for columns in frame.units]) for name, _ in COLUMNS}
        assert whole["inputs"].tolist() == units["inputs"].tolist()
        assert [MECHANISMS[code] for code in whole["mechanism"]] == units["mechanism"].tolist()
        assert [ONSETS[code] for code in whole["onset"]] == window.units["onset"].tolist()
        assert whole["onset_step"].tolist() == window.units["onset_step"].tolist()
        assert [site["dead"] for site in frame.sites] == window.diagnosis.sites["dead"].tolist()


def test_what_is_packed_is_read_back(run):
    """Header, statuses and numbers, to the bit."""
    frame = Frame.of_window(run[0][-1])
    header, status, numbers = frame.pack()
    assert read_header(header) == json.loads(json.dumps(frame.header))
    assert read_status(status, len(frame.status)).tolist() == frame.status.tolist()
    assert [name for name, _ in COLUMNS] == [name for name, _ in read_header(header)["columns"]]
    for site, packed, columns in zip(frame.sites, numbers, frame.units, strict=True):
        found = read_numbers(packed, site["num_units"])
        for name in found:
            np.testing.assert_array_equal(found[name], columns[name])


def test_a_history_has_the_frames_of_its_run(run):
    """All but the words of verdicts before the last, which are not kept."""
    kept = list(frames_of(relu_doctor.History.read(run[1])))
    assert len(kept) == len(run[0]) == 5
    for window, frame in zip(run[0], kept, strict=True):
        told = Frame.of_window(window)
        assert frame.status.tolist() == told.status.tolist()
        for columns, others in zip(frame.units, told.units, strict=True):
            for name, values in others.items():
                np.testing.assert_array_equal(columns[name], values)
        assert {**frame.header, "verdict": 0} == {**told.header, "verdict": 0}
    assert kept[-1].header == Frame.of_window(run[0][-1]).header


def test_the_frame_of_a_scan_has_no_lives():
    """No window, no onset; sites whose units cannot be told are there, with none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU())
    frame = Frame.of_diagnosis(relu_doctor.scan(model, torch.randn(400, 4)), step=7)
    assert (frame.span["window"], frame.span["last_step"]) == (None, 7)
    assert [site["can_die"] for site in frame.sites] == [True, False]
    assert not any(columns["onset"].any() for columns in frame.units)
    json.dumps(frame.header, allow_nan=False)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (b"", "found other data"),
        (b"no deflated data", "found other data"),
        (zlib.compress(b"[1]"), "found other data"),
        (zlib.compress(b'{"schema": 99}'), "found 99; update relu-doctor"),
        (zlib.compress(b'{"schema": "x"}'), "found other data"),
        (zlib.compress(bytes(1 << 27)), "at most"),
        (zlib.compress(b'{"schema": 1}')[:-4], "or a part of them"),
    ],
)
def test_what_is_no_header_is_refused_in_a_sentence(packed, message):
    """Whatever lies in an event file."""
    with pytest.raises(FrameError, match=message):
        read_header(packed)


def test_data_of_another_size_are_refused(run):
    """Before anything is made of them."""
    _, status, numbers = Frame.of_window(run[0][0]).pack()
    with pytest.raises(FrameError, match="status of 49 units"):
        read_status(status, 49)
    with pytest.raises(FrameError, match="at most 47 bytes"):
        read_status(status, 47)
    with pytest.raises(FrameError, match="numbers of 33 units"):
        read_numbers(numbers[0], 33)


def test_ranges_hold_each_index_once():
    """Both ends included."""
    assert ranges_of([]) == []
    assert ranges_of([3, 1, 2, 9]) == [[1, 3], [9, 9]]
