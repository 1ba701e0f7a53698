"""Monitor.report(): how a run stands, at any moment, as text and in colour."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console
from torch.nn import functional as F

from relu_doctor.reports.history import look, render_history_text
from relu_doctor.training.history import History
from relu_doctor.training.monitor import Monitor
from tests.training.loops import batches, perceptron, train
from tests.training.test_monitor import sgd

pytestmark = pytest.mark.filterwarnings("ignore::relu_doctor.errors.DyingUnitsWarning")


def shown(report, width=80):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system="standard")
    console.print(report)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run whose second site loses 12 of 16 units after update 30: its monitor, and its history."""
    path = tmp_path_factory.mktemp("run")
    model = perceptron()
    optimizer = sgd(model)

    def kill(step):
        if step == 31:
            model[2].bias.data[:12] = -100

    monitor = Monitor(model, optimizer=optimizer, every=5, window=20, history=path)
    train(model, batches(90), optimizer, monitor, kill)
    return monitor, path


def test_before_the_first_window_it_says_so():
    """A sentence, and what the alerts have said."""
    model = perceptron()
    optimizer = sgd(model)
    with Monitor(model, optimizer=optimizer, every=5, window=20, start_step=100) as monitor:
        told = "Watching, 0 steps made: no window has closed yet, the first closes with step 120."
        assert str(monitor.report()).split() == told.split()
        for number, (x, y) in enumerate(batches(19), start=1):
            if number == 5:
                model[2].bias.data[:12] = -100
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            monitor.step()
        told = str(monitor.report())
    assert told.startswith("Watching, 19 steps made: no window has closed yet, the first closes")
    assert [alert.code for alert in monitor.alerts] == ["RD701"]
    assert f"RD701  step {monitor.alerts[0].step}: 3: update 104 at lr 0.05: 12 of 16" in told
    with Monitor(perceptron()) as unused:
        pass
    assert str(unused.report()) == "Ended with step 0: no window has closed."


def test_it_tells_the_run_s_numbers_the_sites_the_alerts_and_the_verdict(killed):
    """All that there is, within 80 columns."""
    monitor, _ = killed
    told = str(monitor.report())
    assert told.startswith("Ended with step 90: 5 windows closed.\n  step 90; loss ")
    words = " ".join(told.split())
    numbers, sites = monitor.timeline.iloc[-1], monitor.sites
    assert f"loss {numbers['loss']:.4g}, lr 0.05, gradient norm {numbers['grad_norm']:.4g}, largest update" in words
    assert "25 % of 48 units silent (0 dead)" in words
    assert "··▆▆▆" in told
    assert "max update" in told
    assert f"{sites['weight_norm'][1]:.3g}" in told
    assert "100 %" in told.split("still dormant")[1].split("Alerts", maxsplit=1)[0]
    assert "RD701 step 34: 3: update 30 at lr 0.05: 12 of 16 units of 3" in words
    assert words.endswith("684 inputs needed; often cited: 20–50 % dead.")
    assert all(cell_len(line) <= 80 for line in told.splitlines())
    assert repr(monitor.report()) == "<MonitorReport: Ended with step 90: 5 windows closed.>"


def test_the_history_tells_the_same(killed):
    """The report of the directory has the same lines of the run."""
    monitor, path = killed
    of_history = render_history_text(look(History.read(path)))
    alike = str(monitor.report()).split("\n", 1)[1].split("\n\nInconclusive")[0]
    kept_line = next(line for line in of_history.splitlines(keepends=True) if "the last closed" in line)
    assert alike in of_history.replace(kept_line, "")
    assert "max update  weight norm  still dormant" in of_history


def test_rich_shows_it_in_colour_and_a_rank_that_is_not_told_says_so(killed):
    """The same words as the text has."""
    monitor, _ = killed
    coloured = shown(monitor.report())
    assert "\x1b[" in coloured
    plain = Console(file=io.StringIO(), width=80)
    plain.print(monitor.report())
    assert plain.file.getvalue().split() == str(monitor.report()).split()
    elsewhere = replace(monitor.report(), reports=False, window=None)
    assert str(elsewhere).startswith("Ended with step 90: rank 0 reports what all ranks saw.")


@pytest.mark.parametrize("width", [60, 72, 110])
def test_no_line_is_wider_than_the_console(killed, width):
    """From 60 cells on."""
    console = Console(file=io.StringIO(), width=width)
    console.print(killed[0].report())
    assert all(cell_len(line) <= width for line in console.file.getvalue().splitlines())
