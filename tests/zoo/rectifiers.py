"""Rectifiers other than ReLU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tests.planting import Site, normal
from tests.zoo.registry import Chain, case


@case(normal(6), Site("1", 8, {1, 5}, {2}, "0.bias", high=6, post=lambda z: np.clip(z, 0, 6)))
def relu6():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU6())


@case(normal(6), Site("1", 8, {1, 5}, {2}, "0.bias", high=1, post=lambda z: np.clip(z, 0, 1)))
def hardtanh_with_a_zero_edge():
    return nn.Sequential(nn.Linear(6, 8), nn.Hardtanh(0, 1))


@case(normal(6), Site("clamp()", 8, {1, 5}, {2}, "a.bias", high=2, post=lambda z: np.clip(z, 0, 2)))
def clamp_on_both_sides():
    return Chain(_clamp, a=nn.Linear(6, 8))


def _clamp(m, x):
    return m.a(x).clamp(0, 2)


@case(
    normal(6),
    Site("1", 8, {1, 5}, {2}, "0.bias", low=-3, post=lambda z: z * np.clip(z + 3, 0, 6) / 6),
)
def hardswish():
    return nn.Sequential(nn.Linear(6, 8), nn.Hardswish())


@case(normal(6), Site("1", 8, {1, 5}, {2}, "0.bias", low=0.5, post=lambda z: np.where(z > 0.5, z, 20)))
def threshold():
    return nn.Sequential(nn.Linear(6, 8), nn.Threshold(0.5, 20))


@case(
    normal(6),
    Site("1", 8, set(), set(), low=-np.inf, post=lambda z: np.where(z > 0, z, 0.01 * z), immortal=True),
    Site("3", 4, {1}, {2}, "2.bias"),
)
def leaky_relu():
    model = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(), nn.Linear(8, 4), nn.ReLU())
    with torch.no_grad():
        model[0].bias[1] = -100
    return model


def _gelu(z: Any) -> Any:
    return F.gelu(torch.from_numpy(np.asarray(z))).numpy()


@case(normal(6), Site("1", 8, set(), set(), low=-np.inf, post=_gelu, immortal=True), Site("3", 4, {1}, {2}, "2.bias"))
def gelu():
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4), nn.ReLU())


def _crelu(m, x):
    z = m.a(x)
    return F.relu(torch.cat([z, -z], 1))


@case(normal(6), Site("relu()", 10, {1, 8}, {0}))
def crelu():
    torch.manual_seed(3)
    model, x = Chain(_crelu, a=nn.Linear(6, 5)), torch.cat(normal(6)())
    with torch.no_grad():
        highest = model.a(x).sort(0).values
        model.a.bias[1] -= highest[-1, 1] + 1
        model.a.bias[3] -= highest[0, 3] - 1
        model.a.bias[0] -= (highest[-1, 0] + highest[-2, 0]) / 2
    return model


def _reglu(m, x):
    gate, value = m.a(x).chunk(2, -1)
    return m.out(F.relu(gate) * value)


@case(normal(7, 6), Site("relu()", 5, {1, 4}, {0}, "a.bias", (0, 5)))
def reglu():
    return Chain(_reglu, a=nn.Linear(6, 10), out=nn.Linear(5, 6))


def _query_key(m, x):
    query, key = m.qk(x).split(4, -1)
    return F.relu(query) + F.relu(key)


@case(
    normal(7, 6),
    Site("relu()#1", 4, {1}, {0}, "qk.bias", (0, 4)),
    Site("relu()#2", 4, {2}, {3}, "qk.bias", (4, 8)),
)
def two_halves_of_one_layer():
    return Chain(_query_key, qk=nn.Linear(6, 8))
