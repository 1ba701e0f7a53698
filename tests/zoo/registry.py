"""The register of the zoo, and what its models are made with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.planting import Case, Site

CASES: dict[str, Case] = {}
Batches = Callable[[], list[Any]]


def case(batches: Batches, *sites: Site, **about: Any) -> Callable[[Any], Any]:
    """Register the model that a factory makes."""

    def register(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        name = make.__name__
        CASES[name] = Case(name, lambda: make().eval(), batches, tuple(sites), **about)
        return make

    return register


def settled(model: nn.Module, batch: Tensor) -> nn.Module:
    """A model whose BatchNorms have seen some data."""
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(batch)
    return model.eval()


class Chain(nn.Module):
    """The parts that a function is written with."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = [function]  # in a list, so that it is no method and pickles by name

    def forward(self, x: Any) -> Any:
        return self.function[0](self, x)
