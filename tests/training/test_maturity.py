"""Units that a warm-up or a reset has touched are not judged for a while, and their evidence begins anew."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from relu_doctor.errors import ConfigError, MonitorError
from relu_doctor.training.monitor import Monitor
from relu_doctor.training.windows import Window
from tests.training.loops import batches, perceptron, train

pytestmark = pytest.mark.filterwarnings("ignore::relu_doctor.errors.DyingUnitsWarning")


def silenced(*units: int, layer: int = 0) -> nn.Sequential:
    """The perceptron with units that no input fires."""
    model = perceptron()
    with torch.no_grad():
        model[layer].bias[list(units)] = -100
    return model


def watched(model: nn.Module, acts: dict[int, Any], steps: int = 800, **options: Any) -> tuple[Monitor, list[Window]]:
    """A run in which something is done before some steps, to the model and to its monitor; every window of it."""
    windows: list[Window] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = Monitor(model, optimizer=optimizer, **({"every": 2, "window": 200} | options), sinks=[windows.append])

    def before(step: int) -> None:
        if step in acts:
            acts[step](model, monitor)

    train(model, batches(steps), optimizer, monitor, before)
    return monitor, windows


def reset(model: nn.Module, monitor: Monitor) -> None:
    with torch.no_grad():
        model[0].weight[5] = torch.randn(16, generator=torch.Generator().manual_seed(2)) / 4
        model[0].bias[5] = 0.5
    monitor.treated("1", [5])


def of_unit(window: Window, unit: int = 5, site: str = "1") -> pd.Series:
    rows = window.diagnosis.units.merge(window.units, on=["site_id", "unit"])
    return rows.query(f"site == '{site}' and unit == {unit}").iloc[0]


@pytest.mark.parametrize("maturity", [0, 100, 500])
def test_a_dead_unit_that_is_treated_and_fires_again_is_revived(maturity):
    """Once, with a step after its treatment, whether it is mature yet or not."""
    monitor, windows = watched(silenced(5), {450: reset}, maturity=maturity)
    last = of_unit(windows[-1])
    assert [of_unit(window)["status"] for window in windows[1:]] == (["unproven"] if maturity > 400 else ["dead"]) + [
        "active",
        "active",
    ]
    was_called_dead = maturity <= 400
    assert last["onset"] == ("revived" if was_called_dead else "")
    assert 450 <= last["onset_step"] <= 800 or not was_called_dead
    assert monitor.timeline.query("site == '1'")["revivals"].sum() == was_called_dead


def test_a_unit_that_stays_silent_is_judged_again_by_what_came_after_its_treatment():
    """Dead, not judged for as long as it is not mature, and dead again; one death, found so after its treatment."""
    monitor, windows = watched(
        silenced(5, 6), {450: lambda model, monitor: monitor.treated("1", [5])}, maturity=250, steps=1000
    )
    told = [of_unit(window) for window in windows]
    assert [unit["status"] for unit in told] == ["unproven", "dead", "unproven", "dead", "dead"]
    assert [unit["onset"] for unit in told] == ["", "born_dead", "", "found_dead", "found_dead"]
    assert told[-1]["onset_step"] == 449
    assert told[-1]["silent_since"] == 451
    assert told[-1]["inputs"] == 16 * 275  # every second of 550 steps
    assert told[2]["silent_since"] == 451
    assert of_unit(windows[-1], 6)["inputs"] == 16 * 501  # and the second
    assert [of_unit(window, 6)["status"] for window in windows] == ["unproven"] + ["dead"] * 4
    assert monitor.timeline.query("site == '1'")["deaths"].tolist() == [0, 2, 0, 0, 0]


def test_without_maturity_a_treatment_begins_the_evidence_anew():
    """Judged at the next window, by the steps of that window since; a unit that was alive and is silent as well."""

    def silence(model: nn.Module, monitor: Monitor) -> None:
        with torch.no_grad():
            model[0].bias[7] = -100
        monitor.treated(monitor.sites.query("site == '1'")["site_id"].iloc[0], torch.arange(32) == 7)

    _, windows = watched(silenced(5), {301: silence, 303: lambda _, monitor: monitor.treated("1", 5)}, 400)
    assert of_unit(windows[-1])["inputs"] == 16 * 49
    assert of_unit(windows[-1])["onset"] == "found_dead"
    silent = of_unit(windows[-1], 7)
    assert (silent["status"], silent["inputs"], silent["onset_step"]) == ("dead", 16 * 50, 300)


def kill(model: nn.Module, monitor: Monitor) -> None:
    with torch.no_grad():
        model[2].bias[:12] = -50


def test_the_first_steps_raise_no_alert():
    """Neither a wave nor a share of dead units; afterwards they are told, with the evidence of all steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor, windows = watched(perceptron(), {12: kill}, 100, window=50, maturity=100)
    assert monitor.alerts == ()
    assert not any((window.diagnosis.units["status"] == "dead").any() for window in windows)
    assert watched(perceptron(), {12: kill}, 100, window=50)[0].alerts[0].code == "RD701"
    monitor, windows = watched(perceptron(), {12: kill}, 150, window=50, maturity=100)
    assert {alert.step for alert in monitor.alerts} == {150}
    assert of_unit(windows[-1], 0, "3")["onset_step"] == 11


def test_units_that_were_treated_are_no_wave():
    """A reset that silences a layer is the user's own doing; without telling the monitor it is a wave."""

    def told(model: nn.Module, monitor: Monitor) -> None:
        kill(model, monitor)
        monitor.treated("3", range(12))

    def but_late(model: nn.Module, monitor: Monitor) -> None:
        monitor.treated("3", range(12))

    options: dict[str, Any] = {"every": 50, "window": 100, "maturity": 20}
    assert watched(perceptron(), {62: told}, 90, **options)[0].alerts == ()
    alerts = watched(perceptron(), {62: kill}, 90, **options)[0].alerts
    assert [alert.code for alert in alerts] == ["RD701"]
    alerts = watched(perceptron(), {55: but_late, 62: kill}, 72, **options)[0].alerts
    assert alerts == ()


def test_units_that_are_not_mature_are_not_dormant():
    """One that puts out next to nothing is active at first, and dormant afterwards."""

    def faint(model: nn.Module, monitor: Monitor) -> None:
        with torch.no_grad():
            model[0].weight[5] *= 1e-6
            model[0].bias[5] = 1e-6
            model[2].weight[:, 5] = 0

    options: dict[str, Any] = {"window": 50, "config": {"dormancy_tau": 0.025}}
    told = [watched(perceptron(), {1: faint}, 100, maturity=steps, **options)[1] for steps in (0, 60)]
    assert [[of_unit(window)["status"] for window in windows] for windows in told] == [
        ["dormant", "dormant"],
        ["active", "dormant"],
    ]
    assert np.isnan(of_unit(told[1][0])["dormancy"])
    overlaps = [windows[1].sites["dormant_overlap"].iloc[0] for windows in told]
    assert overlaps[0] == 1
    assert np.isnan(overlaps[1])


@pytest.mark.parametrize("stop", [452, 500, 600])
def test_a_resumed_run_remembers_treatments(stop):
    """In the open window and at its end: units and sites are those of one run."""
    options: dict[str, Any] = {"every": 2, "window": 200, "maturity": 250}
    data, tables = batches(800), []

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, monitor: Monitor, first: int, last: int) -> None:
        for step in range(first, last + 1):
            if step == 450:
                monitor.treated("1", [5, 6])
            x, y = data[step - 1]
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            monitor.step()

    for parts in ([(1, 800)], [(1, stop), (stop + 1, 800)]):
        model, state = silenced(5, 6), None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for first, last in parts:
            with Monitor(model, optimizer=optimizer, start_step=first - 1, **options) as monitor:
                if state is not None:
                    monitor.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
                steps(model, optimizer, monitor, first, last)
                torch.save(monitor.state_dict(), file := io.BytesIO())
                state = file.getvalue()
        tables.append(monitor.units)
    pd.testing.assert_frame_equal(*tables)
    assert tables[1].query("site == '1' and unit == 5")["onset"].item() == "found_dead"


def test_misuse_is_told_in_a_sentence():
    """A number of steps, a site and units that are none."""
    model = perceptron()
    with pytest.raises(ConfigError, match="maturity must be a whole number of at least 0, found -1"):
        Monitor(model, maturity=-1)
    with Monitor(model) as monitor:
        with pytest.raises(ConfigError, match="the monitor knows none, since no forward was observed yet"):
            monitor.treated("1", [0])
        model(batches(1)[0][0]).sum().backward()
        with pytest.raises(ConfigError, match="by its name or site_id, found '2'; the monitor knows 1, 3"):
            monitor.treated("2", [0])
        with pytest.raises(ConfigError, match="units of 1 from 0 to 31, found 32"):
            monitor.treated("1", [0, 32])
        with pytest.raises(ConfigError, match="units of 1 from 0 to 31, found -1"):
            monitor.treated("1", np.array([-1]))
        for units in (torch.ones(31, dtype=torch.bool), [0.5], "all"):
            with pytest.raises(ConfigError, match=r"expects indices of units of 1 or bool \(32,\), found"):
                monitor.treated("1", units)
        monitor.treated("1", [])
    with pytest.raises(MonitorError, match="closed monitor"):
        monitor.treated("1", [0])
