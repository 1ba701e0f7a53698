"""What a monitor keeps in a checkpoint: a run that is resumed goes on as if it had never stopped."""

from __future__ import annotations

import io
import warnings

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from relu_doctor.errors import DyingUnitsWarning, MonitorError
from relu_doctor.training.monitor import Monitor
from tests.training.loops import batches, perceptron

pytestmark = pytest.mark.filterwarnings("ignore::relu_doctor.errors.DyingUnitsWarning")
OPTIONS = {"every": 5, "window": 40}


def trained(model, optimizer, monitor, data):
    for x, y in data:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        monitor.step(loss=loss)


def through_a_file(state):
    """As a checkpoint does it, and nothing but plain values."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def made(lr=0.05):
    model = perceptron()
    with torch.no_grad():
        model[0].bias[:3] = -100
    return model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


@pytest.mark.parametrize("stop", [20, 40, 55])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(stop):
    """At a window's end and within it: the units, sites and the timeline from there on are those of one run."""
    data = batches(40) * 3
    model, optimizer = made()
    with Monitor(model, optimizer=optimizer, **OPTIONS) as whole:
        trained(model, optimizer, whole, data)
    model, optimizer = made()
    with Monitor(model, optimizer=optimizer, **OPTIONS) as first:
        trained(model, optimizer, first, data[:stop])
        state = through_a_file(first.state_dict())
    with Monitor(model, optimizer=optimizer, start_step=stop, **OPTIONS) as second:
        second.load_state_dict(state)
        trained(model, optimizer, second, data[stop:])
    pd.testing.assert_frame_equal(second.units, whole.units)
    pd.testing.assert_frame_equal(second.sites, whole.sites)
    later = whole.timeline[whole.timeline["last_step"] > stop].reset_index(drop=True)
    # The update that is measured is the first one of a window for which the sites are known.
    one, other = (each.drop(columns="update_ratio") for each in (second.timeline, later))
    pd.testing.assert_frame_equal(one, other)
    assert second.units["onset"].isin(["", "born_dead"]).all()


def test_what_was_kept_does_not_change_with_the_run():
    """A state is of its moment, however the monitor goes on."""
    model, optimizer = made()
    with Monitor(model, optimizer=optimizer, **OPTIONS) as monitor:
        trained(model, optimizer, monitor, batches(30))
        state, kept = monitor.state_dict(), through_a_file(monitor.state_dict())
        trained(model, optimizer, monitor, batches(30))
    assert repr(state) == repr(kept)


def test_it_is_small():
    """Less than a kilobyte for each unit of a network that is alive, beside the digests of its inputs."""
    model = nn.Sequential(nn.Linear(16, 2000), nn.ReLU(), nn.Linear(2000, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, optimizer=optimizer, **OPTIONS) as monitor:
        trained(model, optimizer, monitor, batches(60))
        file = io.BytesIO()
        torch.save(monitor.state_dict(), file)
    assert len(file.getvalue()) < 2000 * 1024


def test_misuse_is_told_in_a_sentence():
    """A state that is none, and a monitor that has already made steps."""
    model, optimizer = made()
    with Monitor(model, optimizer=optimizer, **OPTIONS) as monitor:
        state = monitor.state_dict()
        with pytest.raises(MonitorError, match="expected the state of a monitor"):
            monitor.load_state_dict({"weight": 3})
        with pytest.raises(MonitorError, match="found NoneType"):
            monitor.load_state_dict(None)
        with pytest.raises(MonitorError, match="without"):
            monitor.load_state_dict({"version": state["version"]})
        trained(model, optimizer, monitor, batches(1))
        with pytest.raises(MonitorError, match="after step"):
            monitor.load_state_dict(state)


def test_a_wave_that_was_told_before_is_not_told_by_the_resumed_run():
    """A later one that is smaller makes the resumed run look, and it does not speak of the first again."""

    def silence(units):
        with torch.no_grad():
            model[2].bias[units] = -100

    model, optimizer = made(0.01)
    data = batches(60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DyingUnitsWarning)
        with Monitor(model, optimizer=optimizer, every=50, window=100) as first:
            trained(model, optimizer, first, data[:12])
            silence(slice(0, 10))
            trained(model, optimizer, first, data[12:24])
            state = through_a_file(first.state_dict())
        assert [alert.evidence["silent"] for alert in first.alerts if alert.code == "RD701"] == [10]
        with Monitor(model, optimizer=optimizer, every=50, window=100, start_step=24) as second:
            second.load_state_dict(state)
            trained(model, optimizer, second, data[24:36])
            silence(slice(10, 15))
            trained(model, optimizer, second, data[36:50])
    waves = [[alert for alert in each.alerts if alert.code == "RD701"] for each in (first, second)]
    assert waves[0] == waves[1]
