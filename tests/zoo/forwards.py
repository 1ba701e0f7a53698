"""What a forward may do besides: cut the graph, catch errors, write to its input."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.planting import Site, channels, normal
from tests.zoo.registry import Chain, case, settled


def _no_grad(m, x):
    with torch.no_grad():
        x = F.relu(m.a(x))
    return F.relu(m.b(x))


@case(normal(6), Site("relu()#1", 5, {1, 4}, {0}, "a.bias"), Site("relu()#2", 5, {2}, {3}, "b.bias"))
def a_no_grad_block():
    return Chain(_no_grad, a=nn.Linear(6, 5), b=nn.Linear(5, 5))


def _detach(m, x):
    x = F.relu(m.a(x).detach())
    return F.relu(m.b(x.detach()) + m.c(x).detach())


@case(normal(6), Site("relu()#1", 5, {1, 4}, {0}, "a.bias"), Site("relu()#2", 5, {2}, {3}, "b.bias"))
def detach():
    return Chain(_detach, a=nn.Linear(6, 5), b=nn.Linear(5, 5), c=nn.Linear(5, 5))


def _checkpointed(m, x):
    x = checkpoint(m.first, x, use_reentrant=False)
    return checkpoint(m.second, x, use_reentrant=False)


@case(
    normal(3, 5, 5),
    Site("first.2", 5, {1, 4}, {0}, "first.1.bias", arrange=channels),
    Site("second.1", 4, {2}, {3}, "second.0.bias", arrange=channels),
)
def activation_checkpointing():
    model = Chain(
        _checkpointed,
        first=nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(inplace=True)),
        second=nn.Sequential(nn.Conv2d(5, 4, 3), nn.ReLU()),
    )
    return settled(model, torch.randn(32, 3, 5, 5))


def _reentrant(m, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that no input requires gradients, as it is in an evaluation
        return checkpoint(m.first, x, use_reentrant=True)


@case(normal(6), Site("first.1", 5, {1, 4}, {0}, "first.0.bias"))
def reentrant_checkpointing():
    return Chain(_reentrant, first=nn.Sequential(nn.Linear(6, 5), nn.ReLU()))


def _writes_to_its_input(m, x):
    x.mul_(2)
    return F.relu(m.a(x))


@case(normal(6), Site("relu()", 5, {1, 4}, {0}, "a.bias"))
def writes_to_its_input():
    return Chain(_writes_to_its_input, a=nn.Linear(6, 5))


def _tolerant(m, x):
    try:
        m.broken(x)
    except RuntimeError:
        x = F.relu(m.a(x))
    return F.relu(m.b(x))


@case(normal(6), Site("relu()#1", 5, {1, 4}, {0}, "a.bias"), Site("relu()#2", 5, {2}, {3}, "b.bias"))
def catches_its_own_error():
    return Chain(_tolerant, broken=nn.Linear(3, 3), a=nn.Linear(6, 5), b=nn.Linear(5, 5))


def _asks_autograd(m, x):
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(m.energy(x).sum(), x)
    return F.relu(m.a(slope))


@case(normal(6), Site("relu()", 5, {1, 4}, {0}, "a.bias"))
def asks_autograd_in_its_forward():
    return Chain(_asks_autograd, energy=nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)), a=nn.Linear(6, 5))


def _masked_fill(m, x):
    return F.relu(m.a(x).masked_fill(x[..., :1] > 1, 0.0))


@case(normal(7, 6), Site("relu()", 5, {1, 4}, {0}, "a.bias"))
def masked_fill_between():
    return Chain(_masked_fill, a=nn.Linear(6, 5))


def _by_index(m, x):
    return F.relu(m.a(x)[:, [2, 0, 3, 1]])


@case(normal(3, 5, 5), Site("relu()", 4, {0, 2}, {1}, arrange=channels))
def channels_by_index():
    torch.manual_seed(5)
    model, x = Chain(_by_index, a=nn.Conv2d(3, 4, 3)), torch.cat(normal(3, 5, 5)())
    with torch.no_grad():  # channels 0 and 2 of the indexed map are the convolution's 2 and 3
        highest = model.a(x).amax((2, 3)).sort(0).values
        model.a.bias[[2, 3]] -= highest[-1, [2, 3]] + 1
        model.a.bias[0] -= (highest[-1, 0] + highest[-2, 0]) / 2
    return model


def _gated(m, x):
    return F.relu(m.a(x) * torch.sigmoid(m.b(x)))


@case(normal(3, 5, 5), Site("relu()", 6, {1, 5}, {3}, arrange=channels))
def gated_by_another_layer():
    torch.manual_seed(6)
    model, x = Chain(_gated, a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(3, 6, 3)), torch.cat(normal(3, 5, 5)())
    with torch.no_grad():
        highest = model.a(x).amax((2, 3)).sort(0).values
        model.a.bias[[1, 5]] -= highest[-1, [1, 5]] + 1
        model.a.bias[3] -= (highest[-1, 3] + highest[-2, 3]) / 2
    return model


@case(
    normal(6),
    Site("1", 5, {1, 4}, {0}, "0.bias"),
    Site("2", 5, {1, 4}, {0}, high=6, post=lambda z: np.clip(z, 0, 6)),
)
def a_rectifier_behind_a_rectifier():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.ReLU6())


def _autocast(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        return m.b(F.relu(m.a(x)))


@case(normal(6), Site("relu()", 5, {1, 4}, {0}, "a.bias"), seed=1)
def autocast():
    return Chain(_autocast, a=nn.Linear(6, 5), b=nn.Linear(5, 2))


def _inference(m, x):
    with torch.inference_mode():
        return F.relu(m.a(x))


@case(normal(6), Site("relu()", 5, {1, 4}, {0}, "a.bias"))
def an_inference_mode_block():
    return Chain(_inference, a=nn.Linear(6, 5))


class MessagePassing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 5)

    def forward(self, nodes, edges):
        return F.relu(self.a(torch.zeros_like(nodes).index_add(0, edges[1], nodes[edges[0]])))


def _graphs() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(batch, torch.randint(0, len(batch), (2, 30), generator=generator)) for batch in normal(6)()]


@case(
    _graphs,
    Site("relu()", 5, {1, 4}, {0}, "a.bias"),
    call=lambda model, batch: model(*batch),
    count=lambda batch: len(batch[0]),
)
def edges_between_inputs():
    return MessagePassing()
