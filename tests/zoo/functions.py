"""Rectifiers that a forward applies as functions."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.planting import Site, normal
from tests.zoo.registry import case


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e, self.f = (nn.Linear(6, 6) for _ in range(6))

    def forward(self, x):
        x = F.relu(self.a(x))
        x = torch.relu(self.b(x))
        x = self.c(x).relu_()
        x = self.d(x).clamp(min=0)
        x = self.e(x).clamp_min(0)
        return F.relu(self.f(x), inplace=True)


@case(
    normal(6),
    Site("relu()#1", 6, {0}, {1}, "a.bias"),
    Site("relu()#2", 6, {1}, {2}, "b.bias"),
    Site("relu()#3", 6, {2}, {3}, "c.bias"),
    Site("clamp()", 6, {3}, {4}, "d.bias"),
    Site("clamp_min()", 6, {4}, {5}, "e.bias"),
    Site("relu()#4", 6, {5}, {0}, "f.bias"),
)
def functions():
    return Functional()
