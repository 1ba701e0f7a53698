"""What rectifies and was not recognised is named by what it leaves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import relu_doctor
from tests.planted_layers import inputs, planted


class ByNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return torch.from_numpy(np.maximum(z.detach().numpy(), 0))

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Two(nn.Module):
    """A layer, a function, a layer, and a ReLU that is seen."""

    def __init__(self, function):
        super().__init__()
        self.first, self.second, self.last, self.function = planted(8), nn.Linear(7, 6), nn.Linear(6, 3), function

    def forward(self, x):
        return self.last(F.relu(self.second(self.function(self.first(x)))))


def told(function) -> list[str]:
    notes = relu_doctor.scan(Two(function), inputs(8)).table.coverage.notes
    return [note for note in notes if "zero in many places" in note]


@pytest.mark.parametrize(
    "function",
    [
        ByNumpy.apply,
        lambda z: torch.stack([z, torch.zeros_like(z)]).amax(0),
        lambda z: torch.lerp(torch.zeros_like(z), z, (z > 0).float()),
        lambda z: z * (torch.sign(z) + 1) / 2,
        lambda z: (z + torch.sqrt(z**2)) / 2,
        lambda z: torch.zeros_like(z).masked_scatter(z > 0, z[z > 0]),
        lambda z: torch.einsum("bu,bu->bu", z, (z > 0).float()),
    ],
    ids=["numpy", "stack", "lerp", "sign", "root", "scatter", "einsum"],
)
def test_zeros_that_nothing_recognised_has_made_are_pointed_out(function):
    """However a rectifier is written, a layer that reads its zeros is named beside the sites that were seen."""
    (note,) = told(function)
    assert note.startswith("what second reads is zero")


@pytest.mark.parametrize(
    "function",
    [
        lambda z: z,
        F.relu,
        lambda z: F.relu(z) * 2 + F.relu(-z),
        lambda z: z * (z > 0),
        F.gelu,
        lambda z: (z * 2).round() / 2,
        lambda z: z * (torch.arange(7) > 2),
        lambda z: F.dropout(z, 0.5, training=True),
        lambda z: z * (torch.arange(len(z)) % 3 > 0)[:, None],
        lambda z: torch.cat([z[:, :4], torch.zeros_like(z[:, 4:])], 1),
        lambda z: F.max_unpool1d(*F.max_pool1d(z, 2, return_indices=True), 2, output_size=(7,)),
    ],
    ids=["nothing", "relu", "both", "mask", "gelu", "rounding", "pruned", "dropout", "padding", "joined", "unpooling"],
)
def test_zeros_that_have_another_reason_are_not(function):
    """Rectifiers that were seen, padding, pruned units, dropout, rounding and joined inputs raise no remark."""
    assert told(function) == []


def test_a_site_of_which_nothing_is_called_is_named():
    """An expert that no input comes to is not observed, and says why."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 7) for _ in range(3))

        def forward(self, x):
            route, out = (x[:, 0] > 0).long(), x.new_zeros(len(x), 7)
            for index, expert in enumerate(self.experts):
                out[route == index] = expert(x[route == index]).clamp(min=0)
            return out

    diagnosis = relu_doctor.scan(Experts(), inputs(8))
    assert diagnosis.summary["unobserved_sites"] == ["clamp()#3"]
    assert [site.note for site in diagnosis.table.sites if site.note] == [
        "it was called on nothing, which shows no units"
    ]


def test_a_rectifier_whose_units_cannot_be_told_is_named():
    """A clamp behind a layer, on values that lie on no axis of their own."""
    diagnosis = relu_doctor.scan(Two(lambda z: z @ (z.T @ z).clamp(min=0)), inputs(8))
    assert any(note.startswith("clamp() may rectify") for note in diagnosis.table.coverage.notes)


@torch.library.custom_op("relu_doctor_tests::opaque", mutates_args=())
def opaque(z: torch.Tensor) -> torch.Tensor:
    return z * 2


def refuse(ctx, gradient):
    raise ValueError("no gradient")


opaque.register_autograd(refuse)


def test_an_operator_that_cannot_be_run_backwards_hides_one_site_only():
    """Where the graph cannot be asked, that site is named and all others are observed."""
    model = Two(lambda z: F.relu(opaque(z)))
    with torch.no_grad():
        model.second.bias[2] = -100
    diagnosis = relu_doctor.scan(model, inputs(8), exhaustive=True)
    assert diagnosis.sites["num_units"].tolist() == [0, 6]
    fired = (model.second(F.relu(2 * model.first(inputs(8)))) > 0).any(0)
    assert diagnosis.mask("dead")[diagnosis.sites["site"][1]].tolist() == (~fired).tolist()


def test_sparse_inputs_are_passed_as_they_are():
    """A graph's sparse edges beside its nodes."""

    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = planted(8)

        def forward(self, x, edges):
            return F.relu(torch.sparse.mm(edges, self.layer(x)))

    diagnosis = relu_doctor.scan(Graph(), [(inputs(8), torch.eye(60).to_sparse())], exhaustive=True)
    assert diagnosis.units.index[diagnosis.units["status"] == "dead"].tolist() == [1, 4]
