"""Branches that data choose, and layers that a forward calls several times."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.planting import Site, normal
from tests.zoo.registry import case


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x):
        return F.relu((self.a if x[0, 0] > 0 else self.b)(x))


def signed() -> list[Tensor]:
    batches = normal(6, sizes=(8, 8, 8, 8, 8))()
    for index, batch in enumerate(batches):
        batch[:, 0] = batch[:, 0].abs() * (1 if index in {0, 3, 4} else -1)
    return batches


@case(
    signed,
    Site("relu()#1", 5, {1, 4}, {0}, "a.bias"),
    Site("relu()#2", 5, {2}, {3}, "b.bias"),
    order=lambda batch: ["relu()#1" if batch[0, 0] > 0 else "relu()#2"],
)
def branches_by_data():
    return Branches()


class Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.relu = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU()

    def forward(self, x):
        first = x[0, 0] > 0
        x = self.relu(self.a(x))
        if first:
            x = self.relu(self.b(x))
        return self.relu(self.c(x))


@case(
    signed,
    Site("relu#1", 6, {1, 4}, {0}, "a.bias"),
    Site("relu#2", 6, {2}, {3}, "b.bias"),
    Site("relu#3", 6, {0, 5}, {2}, "c.bias"),
    order=lambda batch: ["relu#1", "relu#2", "relu#3"] if batch[0, 0] > 0 else ["relu#1", "relu#3"],
)
def skipped_layers():
    return Skipping()


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(6, 5), nn.ReLU()), nn.Linear(10, 4)

    def forward(self, a, b):
        return F.relu(self.head(torch.cat([self.body(a), self.body(b)], 1)))


def pairs() -> list[tuple[Tensor, Tensor]]:
    return list(zip(normal(6, seed=1)(), normal(6, seed=2)(), strict=True))


@case(
    pairs,
    Site("body.1", 5, {1, 4}, {0}, "body.0.bias", calls=2),
    Site("relu()", 4, {2}, {3}, "head.bias"),
    call=lambda model, batch: model(*batch),
    count=lambda batch: len(batch[0]),
)
def siamese():
    return Siamese()
