"""Flat scalars for any tracker: stable names, totals, and the sites that have lost most."""

from __future__ import annotations

import math

import torch
from torch import nn

import relu_doctor


def stack(layers: int, dead: int) -> nn.Module:
    """A chain of rectified layers of ten units; of the k-th, min(k, dead) are dead."""
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for number in range(layers):
        linear = nn.Linear(10, 10)
        with torch.no_grad():
            linear.bias[: min(number, dead)] = -1000
        parts += [linear, nn.ReLU()]
    return nn.Sequential(*parts)


def test_totals_and_the_worst_sites_are_told_under_stable_names():
    """Fractions are of the units that can die; twelve sites are told, the worst first."""
    diagnosis = relu_doctor.scan(stack(15, 6), [torch.randn(64, 10)], exhaustive=True)
    scalars = diagnosis.scalars()
    totals = {name.removeprefix("relu_doctor/") for name in scalars if name.startswith("relu_doctor/")}
    assert totals == {
        "dead_fraction", "unproven_fraction", "silent_fraction", "rare_fraction", "dormant_fraction",
        "saturated_fraction", "non_finite_fraction", "unobserved_fraction", "dead", "num_units",
    }  # fmt: skip
    assert scalars["relu_doctor/dead"] == diagnosis.summary["dead"]
    assert scalars["relu_doctor/dead_fraction"] == diagnosis.summary["dead_fraction"]
    assert scalars["relu_doctor/num_units"] == 150
    sites = [name for name in scalars if name.startswith("relu_doctor_sites/") and name.endswith("/dead_fraction")]
    told = [scalars[name] for name in sites]
    assert len(told) == 12
    assert told == sorted(diagnosis.sites["dead_fraction"], reverse=True)[:12]
    assert all(isinstance(value, float) for value in scalars.values())


def test_what_is_not_known_is_nan():
    """A network in which nothing is finite shows a gap, not 0."""
    model = stack(1, 0)
    with torch.no_grad():
        model[0].weight.fill_(torch.nan)
    scalars = relu_doctor.scan(model, [torch.randn(8, 10)]).scalars()
    assert math.isnan(scalars["relu_doctor/dead_fraction"])
    assert scalars["relu_doctor/non_finite_fraction"] == 1
