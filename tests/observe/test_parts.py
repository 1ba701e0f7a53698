"""Parameters of which a layer uses a part, or on several axes, are read row by row as the forward uses them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import relu_doctor
from relu_doctor.errors import ConfigError
from tests.zoo import CASES


def assert_parameters(units, weights, biases) -> None:
    """weights: (units, inputs), biases: (units,)."""
    np.testing.assert_allclose(units["weight_l2"], weights.norm(dim=1), rtol=1e-6)
    np.testing.assert_allclose(units["bias"], biases, rtol=1e-6)


@pytest.mark.parametrize("name", ["ensemble_bmm", "ensemble_baddbmm", "ensemble_matmul"])
def test_members_of_an_ensemble_have_their_own_rows(name):
    """Unit e x features + j has row j of member e."""
    model, batches = CASES[name].build()
    units = relu_doctor.scan(model, batches).units
    assert_parameters(units, model.w.detach().transpose(1, 2).reshape(12, 6), model.b.detach().reshape(12))


def test_experts_in_one_parameter_have_their_own_rows():
    """Each site reads its own expert's weights out of the stack."""
    model, batches = CASES["experts_in_one_parameter"].build()
    units = relu_doctor.scan(model, batches).units
    for expert in range(3):
        own = units[units["site"] == f"relu()#{expert + 1}"]
        assert_parameters(own, model.weight.detach()[expert], model.bias.detach()[expert])


def test_the_parts_of_a_fused_weight_are_told_apart():
    """Two layers that are halves of one parameter are two sites, each with its rows, whichever is used."""

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.zeros(8))

        def forward(self, x):
            half = int(x[0, 0] > 0)
            weight, bias = self.weight.chunk(2)[half], self.bias[4 * half : 4 * half + 4]
            return F.relu(F.linear(x, weight, bias))

    torch.manual_seed(0)
    model, x = Fused(), torch.randn(30, 6)
    x[:, 0] = x[:, 0].abs()
    batches = [x[:10], -x[10:20], x[20:]]
    with torch.no_grad():
        model.bias[1] = model.bias[6] = -100
    diagnosis = relu_doctor.scan(model, batches, exhaustive=True)
    assert sorted(diagnosis.units.groupby("site")["inputs"].first()) == [10, 20]
    for _, own in diagnosis.units.groupby("site"):
        first = own["inputs"].iloc[0] == 10  # the lower half of the rows is used where the first feature is negative
        rows = slice(0, 4) if first else slice(4, 8)
        assert_parameters(own, model.weight.detach()[rows], model.bias.detach()[rows])
        assert (own["status"] == "dead").tolist() == [k == (1 if first else 2) for k in range(4)]


def test_weights_that_are_unbound_are_told_apart():
    """A loop over the members of a parameter is a site per member, also where a member is left out."""

    class Members(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.randn(3, 5, 6))

        def forward(self, x):
            kept = [weight for k, weight in enumerate(self.weights) if k != 1 or x[0, 0] > 0]
            return sum(F.relu(F.linear(x, weight)).sum(1) for weight in kept)

    torch.manual_seed(0)
    x = torch.randn(30, 6)
    x[:, 0] = x[:, 0].abs()
    units = relu_doctor.scan(Members(), [x[:10], -x[10:20], x[20:]]).units
    assert sorted(units.groupby("site")["inputs"].first()) == [20, 30, 30]


@pytest.mark.parametrize("axis", [2, -3])
def test_a_unit_axis_that_is_not_there_is_refused(axis):
    """The configuration names an axis of the pre-activation, or the scan ends with a sentence."""
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
    with pytest.raises(ConfigError, match="unit_axis of 1 must lie between -2 and 1"):
        relu_doctor.scan(model, torch.randn(9, 6), config={"sites": {"1": {"unit_axis": axis}}})
