"""Figures: what is drawn is what the data frames say."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn

import relu_doctor
from relu_doctor.diagnose.diagnosis import Diagnosis
from relu_doctor.errors import ConfigError, HistoryError
from relu_doctor.plot import STATUS_ORDER
from relu_doctor.training.monitor import Monitor
from tests.training.loops import batches, perceptron, train

pytestmark = pytest.mark.filterwarnings("ignore::relu_doctor.errors.DyingUnitsWarning")
mpl.use("Agg")


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def diagnosis() -> Diagnosis:
    model = perceptron()
    with torch.no_grad():
        model[0].bias[:5] = -100
        model[2].bias[3] = -100
    return relu_doctor.scan(model, torch.randn(2000, 16, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Monitor, str]:
    """A monitor whose run is over, and the directory of its history."""
    model = perceptron()
    directory = tmp_path_factory.mktemp("run")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def plant(step: int) -> None:
        if step == 31:
            with torch.no_grad():
                model[0].bias[:16] = -100

    monitor = Monitor(model, optimizer=optimizer, every=2, window=100, history=directory)
    train(model, batches(400), optimizer, monitor, plant)
    return monitor, str(directory)


def test_a_unit_map_shows_each_unit_in_its_colour(diagnosis):
    """A row per site, a column per unit; what a narrower site does not have is empty."""
    axes = relu_doctor.plot.unit_map(diagnosis)
    picture = axes.get_images()[0].get_array().filled(np.nan)
    for row, (_, units) in enumerate(diagnosis.units.groupby("site_id", sort=False)):
        assert [STATUS_ORDER[int(code)] for code in picture[row, : len(units)]] == units["status"].tolist()
        assert np.isnan(picture[row, len(units) :]).all()
    assert [label.get_text() for label in axes.get_yticklabels()] == diagnosis.sites["site"].tolist()
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert set(legend) == {status.replace("_", " ") for status in diagnosis.units["status"]}


def test_firing_rates_count_every_unit_once(diagnosis):
    """Those that fired in the histogram, silent ones in a bar of their own."""
    axes = relu_doctor.plot.firing_rates(diagnosis)
    heights = [sum(bar.get_height() for bar in container) for container in axes.containers]
    fired = int((diagnosis.units["inputs_fired"] > 0).sum())
    assert heights == [fired, int((diagnosis.units["status"] == "dead").sum())]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["fired", "rare below", "dead"]
    one = relu_doctor.plot.firing_rates(diagnosis, site="3")
    assert sum(bar.get_height() for container in one.containers for bar in container) == 16
    with pytest.raises(ConfigError, match="expected the name or site_id of a site, found 'nope'; there are 1, 3"):
        relu_doctor.plot.firing_rates(diagnosis, site="nope")


def test_the_dead_fraction_is_that_of_the_timeline(run):
    """From a monitor, its history, and the directory alike."""
    monitor, directory = run
    rows = monitor.timeline.groupby("last_step")
    expected = (rows["dead"].sum() / rows["num_units"].sum()).tolist()
    assert expected[-1] > 0.3
    for source in (monitor, directory, relu_doctor.History.read(directory)):
        line = next(
            line for line in relu_doctor.plot.dead_fraction(source).get_lines() if line.get_label() == "all units"
        )
        assert line.get_ydata().tolist() == pytest.approx(expected)
        assert line.get_xdata().tolist() == [100, 200, 300, 400]


def test_what_is_not_known_is_a_gap(diagnosis):
    """A window whose units are all not finite is not drawn as a recovery to none dead."""
    model = perceptron()
    with torch.no_grad():
        model[0].weight.fill_(torch.nan)
    broken = relu_doctor.scan(model, torch.randn(100, 16))
    axes = relu_doctor.plot.dead_fraction([(10, diagnosis), (20, broken), (30, diagnosis)])
    lines = axes.get_lines()
    assert len(lines) == 3
    for line in lines:
        assert np.isnan(line.get_ydata()).tolist() == [False, True, False]


def test_what_never_fired_has_no_entry_for_what_did():
    """The legend lists what is drawn."""
    model = perceptron()
    with torch.no_grad():
        model[0].bias.fill_(-100)
    axes = relu_doctor.plot.firing_rates(relu_doctor.scan(model, torch.randn(2000, 16)), site="1")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["rare below", "dead"]


def test_checkpoints_are_drawn_over_their_steps(diagnosis):
    """Pairs of a step and a diagnosis; into axes that are given."""
    _, own = plt.subplots()
    axes = relu_doctor.plot.dead_fraction([(20, diagnosis), (10, diagnosis)], own, sites=1)
    assert axes is own
    assert [line.get_label() for line in axes.get_lines()] == ["1", "all units"]
    assert axes.get_lines()[1].get_xdata().tolist() == [10, 20]


def test_what_cannot_be_drawn_is_told_in_a_sentence(tmp_path):
    """No window, no units, no history, something else."""
    with pytest.raises(ConfigError, match="a window has closed, found none"), Monitor(perceptron()) as monitor:
        relu_doctor.plot.dead_fraction(monitor)
    with pytest.raises(HistoryError):
        relu_doctor.plot.dead_fraction(tmp_path / "none")
    with pytest.raises(ConfigError, match="found int"):
        relu_doctor.plot.dead_fraction(7)
    for draw in (relu_doctor.plot.unit_map, relu_doctor.plot.firing_rates):
        with pytest.raises(ConfigError, match=r"expected a Diagnosis, as relu_doctor\.scan returns it, found int"):
            draw(3)


def test_names_are_drawn_as_they_are():
    """Dollars are no formulas, and a name that begins with an underscore is not left out of the legend."""
    model = nn.Sequential()
    model.add_module("_$x^2$", nn.Sequential(nn.Linear(4, 8), nn.ReLU()))
    diagnosis = relu_doctor.scan(model, torch.randn(400, 4))
    axes = relu_doctor.plot.dead_fraction([(1, diagnosis)])
    assert any("x^2" in text.get_text() for text in axes.get_legend().get_texts())
    relu_doctor.plot.unit_map(diagnosis).figure.canvas.draw()
