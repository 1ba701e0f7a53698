"""Parameters without a layer, and layers whose parameters are computed."""

from __future__ import annotations

import warnings

import torch
import torch.nn.utils.parametrizations as parametrizations
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from tests.planting import Site, channels, normal, plant_rows, positive
from tests.zoo.registry import Chain, case


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.zeros(5))
        self.w2, self.b2 = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.zeros(4))
        self.w3, self.b3 = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.zeros(3, 1))

    def forward(self, x):
        x = F.relu(x @ self.w1 + self.b1)
        x = F.relu(torch.einsum("bi,io->bo", x, self.w2) + self.b2)
        return F.relu(self.w3 @ x.T + self.b3).T


@case(
    normal(6),
    Site("relu()#1", 5, {1, 4}, {0}, "b1"),
    Site("relu()#2", 4, {2}, {3}, "b2"),
    Site("relu()#3", 3, {0}, {2}, "b3", arrange=lambda z, n: z.T[:, :, None]),
    seed=2,
)
def bare_parameters():
    return Bare()


@case(normal(5, 6), Site("relu()", 5, {1, 4}, {0}, "b"))
def bare_parameters_on_sequences():
    return Chain(_einsum, w=nn.Parameter(torch.randn(6, 5)), b=nn.Parameter(torch.zeros(5)))


def _einsum(m, x):
    return F.relu(torch.einsum("bti,io->bto", x, m.w) + m.b)


@case(positive(6), Site("1", 5, {1, 4}, {0}))
def linear_without_bias():
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU())
    plant_rows(model[0].weight, {1, 4}, {0})
    return model


@case(positive(3, 5, 5), Site("1", 5, {1, 4}, {0}, arrange=channels), seed=1)
def conv_without_bias():
    model = nn.Sequential(nn.Conv2d(3, 5, 5, bias=False), nn.ReLU())
    with torch.no_grad():
        model[0].weight[[0, 1, 4]] = -model[0].weight[[0, 1, 4]].abs() - 0.01
        model[0].weight[0, 0] = 1
    return model


@case(positive(6), Site("1", 5, {1, 4}, {0}))
def weight_norm_without_bias():
    linear = nn.Linear(6, 5, bias=False)
    plant_rows(linear.weight, {1, 4}, {0})
    return nn.Sequential(parametrizations.weight_norm(linear), nn.ReLU())


@case(normal(6), Site("1", 8, {1, 5}, {2}, "0.bias"), Site("3", 7, {0}, {6}, "2.bias"))
def weight_norm():
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(6, 8)),
        nn.ReLU(),
        parametrizations.weight_norm(nn.Linear(8, 7)),
        nn.ReLU(),
    )


@case(normal(3, 5, 5), Site("1", 5, {1}, {2}, "0.bias", arrange=channels))
def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 5, 3)), nn.ReLU())


@case(normal(6), Site("1", 8, {1, 5}, {2}, "0.bias"), Site("3", 7, {0}, {6}, "2.bias"))
def spectral_norm():
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(6, 8)),
        nn.ReLU(),
        parametrizations.spectral_norm(nn.Linear(8, 7)),
        nn.ReLU(),
    )


@case(normal(6), Site("1", 8, {1, 5}, {2}, "0.bias"), Site("3", 7, {0}, {6}, "2.bias_orig"))
def pruned():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU())
    prune.random_unstructured(model[0], "weight", 0.3)
    prune.random_unstructured(model[2], "weight", 0.3)
    prune.identity(model[2], "bias")
    return model


@case(normal(6), Site("1", 5, {1, 4}, {0}, "0.bias"), Site("3", 5, {2}, {3}, "2.bias"))
def frozen():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU()).requires_grad_(False)


@case(normal(6), Site("1", 5, {1, 4}, {0}, "0.bias"), Site("3", 5, {2}, {3}, "2.bias"))
def partly_frozen():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU())
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


class LoRA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(6, 5), nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x):
        return F.relu(self.base(x) + 0.5 * self.up(self.down(x)))


@case(normal(6), Site("relu()", 5, {1, 4}, {0}, "base.bias"))
def lora():
    return LoRA()


def _positive(m, x):
    return F.relu(F.linear(x, F.softplus(m.weight), m.bias))


@case(
    normal(6),
    Site("relu()", 5, {1, 4}, {0}, "bias"),
    order=lambda batch: ["", "relu()"],
)
def weights_kept_positive():
    return Chain(_positive, weight=nn.Parameter(torch.randn(5, 6)), bias=nn.Parameter(torch.zeros(5)))


@case(normal(6), Site("relu()", 5, {1, 4}, {0}, "bias"))
def sparse_inputs():
    return Chain(
        lambda m, x: F.relu(torch.sparse.mm(x.to_sparse(), m.weight) + m.bias),
        weight=nn.Parameter(torch.randn(6, 5)),
        bias=nn.Parameter(torch.zeros(5)),
    )


def _standardised(m, x):
    weight = (m.weight - m.weight.mean((1, 2, 3), keepdim=True)) / m.weight.std((1, 2, 3), keepdim=True)
    return F.relu(F.conv2d(x, weight, m.bias))


@case(normal(3, 5, 5), Site("relu()", 5, {1, 4}, {0}, "bias", arrange=channels))
def weights_standardised_in_the_forward():
    return Chain(_standardised, weight=nn.Parameter(torch.randn(5, 3, 3, 3)), bias=nn.Parameter(torch.zeros(5)))


class Spectral(nn.Module):
    """A layer of a Fourier operator: complex weights on the lowest frequencies, beside a convolution of one place."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5, 3, dtype=torch.cfloat) * 0.3)
        self.local, self.head = nn.Conv1d(4, 5, 1), nn.Linear(5, 4)

    def forward(self, x):
        spectrum = torch.fft.rfft(x)
        mixed = torch.zeros(len(x), 5, spectrum.shape[-1], dtype=torch.cfloat)
        mixed[:, :, :3] = torch.einsum("bit,iot->bot", spectrum[:, :, :3], self.weight)
        y = F.relu(torch.fft.irfft(mixed, n=x.shape[-1]) + self.local(x))
        return F.relu(self.head(y.mean(2)))


@case(
    normal(4, 8),
    Site("relu()#1", 5, {1, 4}, {0}, "local.bias", arrange=channels),
    Site("relu()#2", 4, {2}, {1}, "head.bias"),
)
def complex_weights():
    return Spectral()
