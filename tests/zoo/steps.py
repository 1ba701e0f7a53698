"""One layer called at every step of a loop, whose outputs are put together before they are rectified."""

from __future__ import annotations

import torch
import torch.nn.utils.parametrizations as parametrizations
from torch import nn
from torch.nn import functional as F

from tests.planting import Site, channels, normal
from tests.zoo.registry import Chain, case


def _states(m, x):
    state, outputs = x.new_zeros(len(x), 7), []
    for step in x.unbind(1):
        state = m.cell(step, state)
        outputs.append(m.out(state))
    return F.relu(torch.stack(outputs, 1))


@case(normal(4, 6), Site("relu()", 5, {1, 4}, {0}, "out.bias"))
def outputs_of_a_cell():
    return Chain(_states, cell=nn.GRUCell(6, 7), out=nn.Linear(7, 5))


@case(normal(4, 6), Site("relu()", 5, {1, 4}, {0}, "out.bias"))
def outputs_of_a_cell_by_computed_weights():
    return Chain(_states, cell=nn.GRUCell(6, 7), out=parametrizations.weight_norm(nn.Linear(7, 5)))


@case(normal(3, 2, 6, 6), Site("relu()", 5, {1, 4}, {0}, "a.bias", arrange=channels))
def frames_stacked():
    return Chain(lambda m, x: F.relu(torch.stack([m.a(frame) for frame in x.unbind(1)], 2)), a=nn.Conv2d(2, 5, 3))


class BatchEnsemble(nn.Module):
    """Members that share a weight: each has its own scales of what goes in and comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4, bias=False)
        self.before, self.after = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.randn(3, 4))
        self.bias = nn.Parameter(torch.zeros(3, 4))

    def forward(self, x):
        members = [self.layer(x * self.before[k]) * self.after[k] for k in range(3)]
        return F.relu(torch.stack(members, 1) + self.bias)


@case(normal(6), Site("relu()", 12, {1, 6, 10}, {4}, "bias", arrange=lambda pre, num_inputs: pre.flatten(1)[..., None]))
def members_that_share_a_weight():
    return BatchEnsemble()


def _parts(m, x):
    z = torch.complex(m.a(x), m.b(x))
    return torch.complex(F.relu(z.real), F.relu(z.imag)).abs()


@case(normal(6), Site("relu()#1", 5, {1, 4}, {0}, "a.bias"), Site("relu()#2", 5, {2}, {3}, "b.bias"))
def both_parts_of_complex_numbers():
    return Chain(_parts, a=nn.Linear(6, 5), b=nn.Linear(6, 5))


@case(normal(6, sizes=(10, 10)), Site("relu()", 5, {1, 4}, {0}, "a.bias"))
def neighbours_in_a_sparse_matrix():
    edges = (torch.eye(10) + torch.eye(10).roll(1, 0)).to_sparse()
    return Chain(
        lambda m, x: F.relu(m.a(x) + 0 * torch.sparse.mm(m.edges, x).sum()), a=nn.Linear(6, 5), edges=nn.Buffer(edges)
    )
