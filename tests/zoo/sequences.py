"""Sequences: batch first, time first, flattened, over steps."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.planting import Site, channels, normal, time_first, tokens
from tests.zoo.registry import case


@case(normal(5, 6), Site("1", 8, {1, 5}, {2}, "0.bias"), Site("3", 4, {0}, {3}, "2.bias"))
def sequences():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU())


@case(normal(2, 3, 6), Site("1", 8, {1, 5}, {2}, "0.bias"))
def four_axes_with_features_last():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU())


@case(normal(4, 4, sizes=(4, 4, 4)), Site("1", 4, {1, 3}, {2}, "0.bias"))
def square_sequences():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU())


class Permuted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv1d(6, 5, 3), nn.Linear(5, 4)

    def forward(self, x):
        x = F.relu(self.conv(x.transpose(1, 2)).transpose(1, 2))
        return F.relu(self.linear(x).permute(0, 2, 1))


@case(
    normal(7, 6),
    Site("relu()#1", 5, {1, 3}, {0}, "conv.bias"),
    Site("relu()#2", 4, {2}, {1}, "linear.bias", arrange=channels),
)
def permuted_sequences():
    return Permuted()


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.relu = nn.Linear(6, 4), nn.ReLU()

    def forward(self, x):
        return self.relu(self.linear(x.transpose(0, 1))).transpose(0, 1)


@case(normal(7, 6), Site("relu", 4, {2}, {1}, "linear.bias", arrange=time_first))
def time_comes_first():
    return TimeFirst()


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.out = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        return F.relu(self.out(F.relu(self.linear(flat)))).view(*x.shape[:-1], 3)


@case(
    normal(7, 6),
    Site("relu()#1", 4, {2}, {1}, "linear.bias", arrange=tokens),
    Site("relu()#2", 3, {0}, {2}, "out.bias", arrange=tokens),
)
def flattened_tokens():
    return Tokens()


@case(
    normal(7, 8),
    Site("layers.0.relu()", 6, {2, 3}, {1}, "layers.0.linear1.bias"),
    Site("layers.1.relu()", 6, {0}, {5}, "layers.1.linear1.bias"),
)
def transformer_encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 6, batch_first=True), 2)


@case(
    normal(7, 8),
    Site("layers.0.activation", 6, {2, 3}, {1}, "layers.0.linear1.bias"),
)
def transformer_encoder_with_a_module():
    layer = nn.TransformerEncoderLayer(8, 2, 6, activation=nn.ReLU(), batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


class Unrolled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.relu = nn.Linear(4, 6), nn.Linear(6, 6, bias=False), nn.ReLU()
        with torch.no_grad():
            self.outer.weight.mul_(0.2)

    def forward(self, x):
        state = x.new_zeros(len(x), 6)
        for step in range(x.shape[1]):
            state = self.relu(self.inner(x[:, step]) + self.outer(state))
        return state


@case(
    lambda: [b for t in (4, 2, 5, 4) for b in normal(t, 4, sizes=(7,), seed=t)()],
    Site("relu", 6, {2, 3}, {1}, "inner.bias"),
    order=lambda batch: ["relu"] * batch.shape[1],
)
def recurrent_over_steps():
    return Unrolled()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        with torch.no_grad():
            self.inner.weight.mul_(0.3)

    def forward(self, x):
        for _ in range(3):
            x = F.relu(self.inner(x))
        return x


@case(normal(6), Site("relu()", 6, {2, 3}, {1}, "inner.bias", calls=3))
def weight_tied_layers():
    return Tied()


class TiedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x):
        return F.relu(self.b(F.relu(self.a(x))))


@case(normal(6), Site("relu()#1", 6, {2, 3}, {1}, "a.bias"), Site("relu()#2", 6, {0}, {4}, "b.bias"), seed=1)
def tied_weights_own_biases():
    return TiedWeights()
