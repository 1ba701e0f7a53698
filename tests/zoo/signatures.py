"""Dtypes, and what a forward takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.planting import Site, channels, normal
from tests.zoo.branches import Siamese, pairs
from tests.zoo.registry import case


@case(normal(6, dtype=torch.float64), Site("1", 8, {1, 5}, {2}, "0.bias"), Site("3", 7, {0}, {6}, "2.bias"))
def double_precision():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU()).double()


@case(
    normal(3, 5, 5, dtype=torch.bfloat16),
    Site("2", 8, {1, 5}, {2}, "1.bias", arrange=channels),
    Site("4", 7, {0}, {6}, "3.bias", arrange=channels),
    seed=1,
)
def brain_float():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 7, 3), nn.ReLU())
    return model.bfloat16()


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(4, 5)

    def forward(self, left, right, scale=1.0):
        return F.relu(self.a(left) + self.b(right)) * scale


@case(
    lambda: [(a, b, torch.zeros(len(a))) for a, b in zip(normal(6)(), normal(4)(), strict=True)],
    Site("relu()", 5, {1, 4}, {0}, "a.bias"),
    call=lambda model, batch: model(*batch[:2]),
    count=lambda batch: len(batch[0]),
)
def two_inputs():
    return TwoInputs()


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(30, 6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, input_ids, attention_mask=None, *, labels=None):
        hidden = self.embed(input_ids)
        if attention_mask is not None:
            hidden = torch.where(attention_mask[:, :, None] > 0, hidden, 100.0)  # what padding holds must not matter
        hidden = self.down(F.relu(self.up(hidden)))
        return Output(logits=hidden.sum(-1), hidden=hidden)


def _padded() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for size in (8, 8, 1):
        lengths = torch.randint(1, 7, (size, 1), generator=generator)
        ids = torch.randint(0, 30, (size, 6), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": (torch.arange(6) < lengths).long(), "extra": [1]})
    return batches


@case(
    _padded,
    Site("relu()", 8, {1, 4}, {0}, "up.bias"),
    call=lambda model, batch: model(batch["input_ids"], batch["attention_mask"]),
    count=lambda batch: len(batch["input_ids"]),
    mask=lambda batch: batch["attention_mask"].bool(),
)
def padded_mappings():
    torch.manual_seed(5)
    return Language()


@case(
    lambda: [{"x": batch} for batch in normal(6)()],
    Site("relu()", 5, {1, 4}, {0}, "a.bias"),
    call=lambda model, batch: model(x=batch["x"]),
    count=lambda batch: len(batch["x"]),
)
def keyword_arguments():
    return KeywordOnly()


class KeywordOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 5)

    def forward(self, *, x):
        return {"out": [F.relu(self.a(x))]}


@case(
    lambda: [{"a": a, "b": b} for a, b in pairs()],
    Site("body.1", 5, {1, 4}, {0}, "body.0.bias", calls=2),
    Site("relu()", 4, {2}, {3}, "head.bias"),
    call=lambda model, batch: model(batch["a"], batch["b"]),
    count=lambda batch: len(batch["a"]),
    scan={"forward": lambda model, batch: model(batch["a"], b=batch["b"])},
)
def a_forward_of_your_own():
    return Siamese()


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(6, 6), "act": nn.ReLU()}) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block["act"](block["fc"](x)) + x
        return F.relu(x)


@case(
    normal(6),
    Site("blocks.0.act", 6, {1, 4}, {0}, "blocks.0.fc.bias"),
    Site("blocks.1.act", 6, {2}, {3}, "blocks.1.fc.bias"),
    Site("relu()", 6),
    scan={"sites": ["!relu()"]},
)
def nested_containers():
    return Nested()
