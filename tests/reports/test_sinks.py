"""Sinks that a string names: opened, written window by window on a real run, closed; and refused in one sentence."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from relu_doctor.errors import ConfigError, HistoryError, MonitorWarning, OutputError
from relu_doctor.reports.json_lines import JsonLinesSink
from relu_doctor.reports.sinks import Sinks
from relu_doctor.reports.tensorboard import TensorBoardSink
from relu_doctor.training.monitor import Monitor
from tests.training.loops import batches, perceptron, train
from tests.training.test_monitor import sgd

pytestmark = pytest.mark.filterwarnings("ignore::relu_doctor.errors.DyingUnitsWarning")


def run(sinks, steps=60, **options):
    """A run of three windows in which units of the second site are killed after update 30, and its windows."""
    model = perceptron()
    optimizer = sgd(model)
    windows = []

    def kill(step):
        if step == 31:
            model[2].bias.data[:12] = -100

    sinks = [windows.append, *([sinks] if isinstance(sinks, str) else sinks)]
    monitor = Monitor(model, optimizer=optimizer, every=5, window=20, sinks=sinks, **options)
    train(model, batches(steps), optimizer, monitor, kill)
    return windows


def events_of(path):
    accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def test_tensorboard_shows_a_run(tmp_path):
    """Every window is there at its last step: fractions, deaths, updates, and the run's own numbers."""
    windows = run(f"tensorboard:{tmp_path / 'runs'}")
    events = events_of(tmp_path / "runs")
    for name, value in {
        "dead_fraction": lambda window: window.diagnosis.summary["dead_fraction"],
        "deaths": lambda window: window.sites["deaths"].sum(),
        "revivals": lambda window: window.sites["revivals"].sum(),
        "update_ratio": lambda window: window.sites["update_ratio"].max(),
        "loss": lambda window: window.numbers["loss"],
        "lr": lambda window: window.numbers["lr"],
        "grad_norm": lambda window: window.numbers["grad_norm"],
    }.items():
        points = events.Scalars(f"relu_doctor/{name}")
        assert [point.step for point in points] == [20, 40, 60]
        assert [point.value for point in points] == pytest.approx([value(window) for window in windows])
    of_site = [point.value for point in events.Scalars("relu_doctor_sites/3/dead_fraction")]
    assert of_site == pytest.approx([window.diagnosis.sites["dead_fraction"][1] for window in windows])
    assert [each["optimizer"] for each in (window.about for window in windows)] == ["SGD"] * 3


def test_a_sink_that_was_handed_in_stays_open(tmp_path):
    """Its owner goes on with it; one that the monitor opened is closed with the monitor."""
    model = perceptron()
    with TensorBoardSink(tmp_path / "own") as own:
        monitor = Monitor(model, optimizer=sgd(model), sinks=[own, f"tensorboard:{tmp_path / 'named'}"], window=10)
        named = [sink for _, sink in monitor._sinks][1]
        train(model, batches(10), monitor._optimizers[0], monitor)
        own.write(monitor.diagnosis, 999)
        with pytest.raises(ValueError, match="closed"):
            named.write(monitor.diagnosis, 999)
    assert [point.step for point in events_of(tmp_path / "own").Scalars("relu_doctor/dead_fraction")] == [10, 999]


def test_a_line_of_json_per_window(tmp_path):
    """Strict JSON: the flat scalars, the run's numbers and the alerts of each window; a second run adds to it."""
    path = tmp_path / "new" / "run.jsonl"
    windows = run([f"jsonl:{path}"])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["last_step"] for line in lines] == [20, 40, 60]
    for line, window in zip(lines, windows, strict=True):
        for name, value in window.scalars().items():
            assert line[name] == (value if math.isfinite(value) else None), name
        assert line["relu_doctor/loss"] == window.numbers["loss"]
        assert set(window.diagnosis.scalars()) < set(line)
    told = [alert for line in lines for alert in line["alerts"]]
    assert [(alert["code"], alert["site"], alert["evidence"]["update"]) for alert in told] == [("RD701", "3", 30)]
    run([f"jsonl:{path}"], steps=20)
    assert len(path.read_text().splitlines()) == 4


def test_lines_are_there_while_the_run_goes_on(tmp_path):
    """A window's line can be read as soon as step() has returned; NaN is null."""
    path, model = tmp_path / "run.jsonl", perceptron()
    optimizer = sgd(model)
    with Monitor(model, optimizer=optimizer, window=5, sinks=f"jsonl:{path}") as monitor:
        for number, (x, _) in enumerate(batches(10), start=1):
            model(x).sum().backward()
            optimizer.step()
            monitor.step(loss=math.nan)
            assert len(path.read_text().splitlines()) == number // 5
    assert json.loads(path.read_text().splitlines()[0])["relu_doctor/loss"] is None


def test_a_line_that_was_cut_short_does_not_spoil_the_next(tmp_path):
    """What a killed run left unfinished stays a line of its own."""
    path = tmp_path / "run.jsonl"
    path.write_text('{"window":0}\n{"window":1,"fir')
    run([f"jsonl:{path}"], steps=20)
    lines = path.read_text().splitlines()
    assert lines[:2] == ['{"window":0}', '{"window":1,"fir']
    assert json.loads(lines[2])["last_step"] == 20


@pytest.mark.parametrize(
    ("sink", "sentence"),
    [
        ("tensorbord:runs", "found 'tensorbord:runs', whose kind is not known; did you mean 'tensorboard'"),
        ("runs/exp1", "a sink is 'tensorboard:DIR' or 'jsonl:FILE', found 'runs/exp1', whose kind is not known"),
        ("jsonl:", "the sink 'jsonl:' has no target; name it as 'jsonl:FILE'"),
        ("tensorboard", "the sink 'tensorboard' has no target; name it as 'tensorboard:DIR'"),
        (7, "expects functions that take a Window, 'tensorboard:DIR' or 'jsonl:FILE', found int"),
    ],
)
def test_what_is_no_sink_is_refused(sink, sentence):
    """Before anything is opened, in one sentence."""
    for given in (sink, [sink]):
        with pytest.raises(ConfigError, match=sentence) as caught:
            Monitor(perceptron(), sinks=given)
        assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize("kind", ["tensorboard", "jsonl"])
def test_what_cannot_be_written_is_refused_and_the_others_are_closed(kind, tmp_path):
    """A file in the way of a folder; nothing stays open, and an unwritable history closes the sinks."""
    (tmp_path / "file").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(OutputError, match=r"cannot write .* to '.*/file/below'"):
            Monitor(perceptron(), sinks=[f"jsonl:{tmp_path / 'good'}", f"{kind}:{tmp_path / 'file' / 'below'}"])
        with pytest.raises(HistoryError):
            Monitor(perceptron(), sinks=[f"{kind}:{tmp_path / 'other'}"], history=tmp_path / "file")


def test_only_the_process_that_reports_opens_anything(tmp_path):
    """Others check what they are given, and make no files."""
    assert list(Sinks([f"jsonl:{tmp_path / 'run.jsonl'}", print], reports=False)) == []
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError):
        Sinks(["nonsense:x"], reports=False)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_disk_that_fills_up_is_told_of_once():
    """Training goes on, the windows are kept, and closing says what could not be written."""
    with pytest.warns(MonitorWarning) as caught:
        windows = run(["jsonl:/dev/full"])
    told = [str(each.message) for each in caught if each.category is MonitorWarning]
    assert len(told) == 2
    assert told[0].startswith("the sink jsonl:/dev/full raised OSError: [Errno 28]")
    assert told[1].startswith("the sink jsonl:/dev/full raised OSError when it was closed")
    assert len(windows) == 3


def test_a_closed_sink_says_so(tmp_path):
    """Closing twice is fine."""
    sink = JsonLinesSink(tmp_path / "run.jsonl")
    sink.close()
    sink.close()
    with pytest.raises(ValueError, match="closed"):
        sink(None)
