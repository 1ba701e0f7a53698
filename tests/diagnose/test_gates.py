"""Gates fail on proved deaths alone, and are never green where something unknown could change that."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from relu_doctor import Diagnosis, load_config, scan
from relu_doctor.diagnose.diagnosis import diagnose
from relu_doctor.diagnose.gates import Gate, Outcome, decide
from relu_doctor.scanner import ScanRequest
from relu_doctor.scanning import observe


def half_dead(num_units: int = 20) -> nn.Module:
    """A layer of which the first half is dead, and a small one that is all dead."""
    model = nn.Sequential(nn.Linear(4, num_units), nn.ReLU(), nn.Linear(num_units, 4), nn.ReLU())
    with torch.no_grad():
        model[0].bias[: num_units // 2] = -100.0
        model[2].bias[:] = -100.0
    return model


@pytest.fixture(scope="module")
def diagnosis() -> Diagnosis:
    return scan(half_dead(), torch.randn(2000, 4, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("gate", "outcome"),
    [
        (Gate(), Outcome.PASSED),
        (Gate(per_site=0.5), Outcome.PASSED),
        (Gate(per_site=0.49), Outcome.FAILED),
        (Gate(per_site=0.5, min_units=4), Outcome.FAILED),
        (Gate(total=14 / 24), Outcome.PASSED),
        (Gate(total=0.5), Outcome.FAILED),
    ],
)
def test_a_limit_holds_for_large_sites_and_for_the_whole(diagnosis, gate, outcome):
    """Sites below ``min_units`` are left to the total; the limit itself still passes."""
    assert decide(diagnosis, gate).outcome is outcome


def test_a_failure_names_the_site_and_the_numbers(diagnosis):
    """The reason says where, how many and what the limit was."""
    reason = decide(diagnosis, Gate(per_site=0.1)).reason
    assert "10 of 20" in reason
    assert "10 %" in reason


def test_unproven_units_make_a_gate_inconclusive_only_where_they_could_change_it():
    """40 inputs prove nothing: over the limit it is open, under it the answer stands."""
    few = scan(half_dead(), torch.randn(40, 4, generator=torch.Generator().manual_seed(0)))
    assert decide(few, Gate(per_site=0.2)).outcome is Outcome.INCONCLUSIVE
    assert "inputs are needed" in decide(few, Gate(per_site=0.2)).reason
    assert decide(few, Gate(per_site=0.9)).outcome is Outcome.PASSED


def test_random_data_decide_nothing_but_never_fail():
    """Whatever random inputs show, the gate stays open."""
    inputs = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    table = observe(half_dead(), inputs, ScanRequest(random_inputs=True)).table
    for limit in (0.0, 0.99):
        assert decide(diagnose(table), Gate(per_site=limit)).outcome is Outcome.INCONCLUSIVE


def test_an_unobserved_site_keeps_a_gate_open():
    """A rectifier that no input reached could be dead."""

    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.spare = half_dead(), nn.ReLU()

        def forward(self, x):
            return self.body(x)

    diagnosis = scan(Skipping(), torch.randn(2000, 4, generator=torch.Generator().manual_seed(0)))
    result = decide(diagnosis, Gate(per_site=0.9))
    assert result.outcome is Outcome.INCONCLUSIVE
    assert "spare" in result.reason


def test_nan_is_no_pass():
    """A layer of NaN has no dead fraction that could be under a limit."""
    model = half_dead()
    with torch.no_grad():
        model[0].weight[:] = torch.nan
    diagnosis = scan(model, torch.randn(2000, 4))
    assert decide(diagnosis, Gate(per_site=0.9)).outcome is Outcome.INCONCLUSIVE


def test_gates_follow_a_rediagnosis(diagnosis):
    """Under a stricter rate the same evidence no longer proves death, and the gate opens."""
    strict = diagnosis.rediagnose(load_config({"max_firing_rate": 1e-4}))
    assert decide(strict, Gate(per_site=0.2)).outcome is Outcome.INCONCLUSIVE
