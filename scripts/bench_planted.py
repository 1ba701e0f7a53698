"""Planted models of the benchmark of correctness: models whose dead units are known.

The truth is no tool's: every pre-activation is stored, at the dispatcher (``tests.reference``) or by plain forward
hooks, and a unit is dead if it fired on no input. Beside the dead ones stand units that fire on one input of 1,024.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.planting import Case, Site, clone, normal, tokens
from tests.reference import Seen
from tests.zoo import CASES

BATCHES = (256,) * 4  # 1,024 inputs are enough for every tool's verdict


@dataclass(frozen=True)
class HookedCase(Case):
    """A planted model whose truth plain forward hooks tell: its sites read what these layers put out, in order."""

    layers: tuple[str, ...] = ()

    def seen(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, Seen]:
        """Every value that each site receives."""
        seen = {site.name: Seen() for site in self.sites}
        first = 0
        for batch in batches:
            outputs: list[Tensor] = []
            hooks = [
                model.get_submodule(layer).register_forward_hook(
                    lambda module, args, output, outputs=outputs: outputs.append(output.clone())
                )
                for layer in self.layers
            ]
            with torch.no_grad():
                self.call(model, clone(batch))
            for hook in hooks:
                hook.remove()
            for site, output in zip(self.sites, outputs, strict=True):
                seen[site.name].add(first, [site.arrange(output, len(batch))])
            first += len(batch)
        return seen


@dataclass(frozen=True)
class Row:
    """A line of the table of correctness.

    Attributes:
        title: what it shows.
        case: the model, its inputs, and what is planted.
        dim: where the units lie in what its rectifiers are given, for tools that ask.
    """

    title: str
    case: Case
    dim: int = 1


class Net(nn.Module):
    """Layers, and how a forward uses them."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.use = [forward]  # in a list, so that it is no method

    def forward(self, x: Tensor) -> Tensor:
        """Whatever was given."""
        return self.use[0](self, x)


def planted(make: Callable[[], nn.Module], *sites: Site, layers: tuple[str, ...] = (), **about: Any) -> Case:
    """A planted model of the benchmark's own, on 1,024 inputs of 6 features unless ``batches`` says otherwise."""
    about = {"batches": normal(6, sizes=BATCHES), **about}
    arguments = {"name": "", "make": lambda: make().eval(), "sites": sites, **about}
    return HookedCase(**arguments, layers=layers) if layers else Case(**arguments)


def zoo(name: str, *shape: int, sizes: tuple[int, ...] = BATCHES, **about: Any) -> Case:
    """A model of the zoo, on as many inputs as a verdict needs."""
    return replace(CASES[name], batches=normal(*shape, sizes=sizes), **about)


def dead_units(case: Case, model: nn.Module, batches: list[Any]) -> dict[str, frozenset[int]]:
    """Per site, the units that fired on no input, from everything that was stored; none where nothing can die."""
    seen = case.seen(model, batches)
    dead = {}
    for site in case.sites:
        fired = np.concatenate([site.fires(values).any(2) for values in seen[site.name].values]).any(0)
        dead[site.name] = frozenset() if site.immortal else frozenset(np.flatnonzero(~fired).tolist())
    return dead


def one_line_for_all(net: Any, x: Tensor) -> Tensor:
    """Four layers by one source line."""
    for layer in net.layers:
        x = torch.relu(layer(x))
    return x


def added_in_place(net: Any, x: Tensor) -> Tensor:
    """What the first rectifier put out is written to afterwards."""
    hidden = net.relu1(net.a(x))
    hidden += net.b(x)
    result: Tensor = net.relu2(net.c(hidden))
    return result


def chosen(net: Any, x: Tensor) -> Tensor:
    """A ReLU spelled as a choice."""
    x = net.a(x)
    return torch.where(x > 0, x, 0)


def three_times(net: Any, x: Tensor) -> Tensor:
    """One layer after itself."""
    for _ in range(3):
        x = net.relu(net.a(0.5 * x))
    return x


def branch(net: Any, x: Tensor) -> Tensor:
    """The first input chooses the layer."""
    result: Tensor = net.relu((net.a if x[0, 0] > 0 else net.b)(x))
    return result


def signed() -> list[Tensor]:
    """Batches of which the first feature of the first input chooses the branch."""
    batches = normal(6, sizes=(256,) * 8)()
    for index, batch in enumerate(batches):
        batch[:, 0] = batch[:, 0].abs() * (1 if index in {0, 3, 4, 6} else -1)
    return batches


def negative_logits() -> nn.Module:
    """A classifier whose outputs are all negative."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[2].bias.sub_(100)  # type: ignore[operator]
    return model


def leaky() -> nn.Module:
    """Rectifiers that cannot die, one unit of each deep on the negative side."""
    rectifiers = (nn.LeakyReLU(), nn.ELU(), nn.GELU())
    layers = (nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    pairs = (part for pair in zip(layers, rectifiers, strict=True) for part in pair)
    model = nn.Sequential(*pairs, nn.Linear(8, 4), nn.ReLU())
    with torch.no_grad():
        for layer, shift in ((0, 100), (2, 10), (4, 3)):
            model[layer].bias[1] -= shift  # type: ignore[index, operator]
    return model


_MORTAL = Site("1", 8, {1, 5}, {2}, "0.bias")
_IMMORTAL = Site("", 8, low=-np.inf, immortal=True)
_RELU = Site("relu()", 6, {1, 4}, {0}, "a.bias")
_SHARED = Site("relu", 6, {1, 4}, {0}, "a.bias")

SPARSE = planted(
    lambda: nn.Sequential(nn.Linear(6, 32), nn.ReLU()), Site("1", 32, {3, 17}, set(range(20, 32)), "0.bias")
)

ROWS = (
    Row("`nn.ReLU` after `nn.Linear`", zoo("mlp", 6)),
    Row("12 of 32 units fire on one input of 1,024", SPARSE),
    Row(
        "a whole layer dead",
        planted(
            lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)),
            Site("1", 12, {0}, {5}, "0.bias"),
            Site("3", 8, set(range(8)), set(), "2.bias"),
        ),
    ),
    Row(
        "nobody is dead",
        planted(
            lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)),
            Site("1", 12, set(), {5}, "0.bias"),
            Site("3", 12, set(), {7}, "2.bias"),
        ),
    ),
    Row("conv with H = W = C", zoo("all_axes_of_four", 4, 4, 4)),
    Row("conv, BatchNorm, ReLU", zoo("conv_bn_relu", 3, 5, 5)),
    Row("sequences (B, T, C)", zoo("sequences", 5, 6), dim=-1),
    Row("sequences (T, B, C)", zoo("time_comes_first", 7, 6), dim=-1),
    Row(
        "tokens flattened to (B·T, C)",
        planted(
            lambda: Net(lambda m, x: m.relu(m.a(x.flatten(0, 1))), a=nn.Linear(6, 6), relu=nn.ReLU()),
            replace(_SHARED, arrange=tokens),
            batches=normal(7, 6, sizes=BATCHES),
        ),
    ),
    Row("`permute` before the ReLU", zoo("all_axes_of_four_and_permuted", 4, 4, 4), dim=2),
    Row("`F.relu`", planted(lambda: Net(lambda m, x: F.relu(m.a(x)), a=nn.Linear(6, 6)), _RELU)),
    Row(
        "`torch.relu` in one source line for four layers",
        planted(
            lambda: Net(one_line_for_all, layers=nn.ModuleList(nn.Linear(6, 6) for _ in range(4))),
            *(Site(f"relu()#{i + 1}", 6, {i}, {i + 1}, f"layers.{i}.bias") for i in range(4)),
        ),
    ),
    Row(
        "`clamp(min=0)`",
        planted(lambda: Net(lambda m, x: m.a(x).clamp(min=0), a=nn.Linear(6, 6)), replace(_RELU, name="clamp()")),
    ),
    Row(
        "`torch.where(x > 0, x, 0)`",
        planted(
            lambda: Net(chosen, a=nn.Linear(6, 6)),
            replace(_RELU, name="where()"),
            layers=("a",),
        ),
    ),
    Row("one `nn.ReLU` twice in a `Sequential`", zoo("one_relu_twice_in_a_sequential", 6)),
    Row("one `nn.ReLU` per ResNet block, two sites", zoo("resnet", 3, 6, 6)),
    Row(
        "in-place ReLU, then an in-place sum",
        planted(
            lambda: Net(
                added_in_place,
                a=nn.Linear(6, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 6), relu1=nn.ReLU(True), relu2=nn.ReLU(True),
            ),
            Site("relu1", 6, {1, 4}, {0}, "a.bias"),
            Site("relu2", 6, {2}, {3}, "c.bias"),
        ),
    ),
    Row("`nn.TransformerEncoder` in eval mode", zoo("transformer_encoder", 7, 8), dim=-1),
    Row("a recurrent cell over 5 steps", zoo("recurrent_over_steps", 5, 4)),
    Row(
        "one layer used three times",
        planted(lambda: Net(three_times, a=nn.Linear(6, 6), relu=nn.ReLU()), replace(_SHARED, calls=3)),
    ),
    Row(
        "a branch chosen by the data",
        planted(
            lambda: Net(branch, a=nn.Linear(6, 6), b=nn.Linear(6, 6), relu=nn.ReLU()),
            replace(_SHARED, name="relu#1"),
            replace(_SHARED, name="relu#2", dead={2}, once={3}, by="b.bias"),
            batches=signed,
            order=lambda batch: ["relu#1" if batch[0, 0] > 0 else "relu#2"],
        ),
    ),
    Row(
        "LeakyReLU, ELU and GELU cannot die",
        planted(
            leaky,
            *(replace(_IMMORTAL, name=name) for name in ("1", "3", "5")),
            Site("7", 4, {1}, {2}, "6.bias"),
            layers=("0", "2", "4", "6"),
        ),
    ),
    Row("logits that are all negative are no dead units", planted(negative_logits, _MORTAL)),
)  # fmt: skip
