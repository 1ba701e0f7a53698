"""What feeds a rectifier tells which it is: neither its module, nor its source line, nor the order of the calls do."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.planting import Site, channels, normal
from tests.zoo.branches import signed
from tests.zoo.registry import Chain, case, settled


class OneLine(nn.Module):
    """One source line serves every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = F.relu(layer(x))
        return x


@case(
    normal(6),
    Site("relu()#1", 6, {1, 4}, {0}, "layers.0.bias"),
    Site("relu()#2", 6, {2}, {3}, "layers.1.bias"),
    Site("relu()#3", 6, {0, 5}, {1}, "layers.2.bias"),
    Site("relu()#4", 6, {3}, {2}, "layers.3.bias"),
)
def one_source_line():
    return OneLine()


class Crepe(nn.Module):
    """The pitch tracker's layers: padded convolution, rectifier, normalisation, pooling, on one source line."""

    def __init__(self) -> None:
        super().__init__()
        for index, (inputs, outputs) in enumerate(((1, 4), (4, 5), (5, 6)), start=1):
            setattr(self, f"conv{index}", nn.Conv2d(inputs, outputs, (8, 1), (2 if index == 1 else 1, 1)))
            setattr(self, f"conv{index}_BN", nn.BatchNorm2d(outputs, eps=0.001, momentum=0.0))
        self.classifier = nn.Linear(6 * 2, 3)

    def forward(self, x):
        x = x[:, None, :, None]
        for index in (1, 2, 3):
            x = self.layer(x, getattr(self, f"conv{index}"), getattr(self, f"conv{index}_BN"))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).reshape(len(x), -1)))

    def layer(self, x, conv, norm):
        return F.max_pool2d(norm(F.relu(conv(F.pad(x, (0, 0, 3, 4))))), (2, 1), (2, 1))


@case(
    normal(32),
    Site("relu()#1", 4, {1}, {0}, "conv1.bias", arrange=channels),
    Site("relu()#2", 5, {2, 4}, {3}, "conv2.bias", arrange=channels),
    Site("relu()#3", 6, {5}, {2}, "conv3.bias", arrange=channels),
)
def pitch_tracker():
    return settled(Crepe(), torch.randn(8, 32))


def _either_order(m, x):
    for name in "ab" if x[0, 0] > 0 else "ba":
        x = torch.cat([m.act(getattr(m, name)(x)), x[:, 5:]], 1)
    return x


def _order(batch):
    return ["act#1", "act#2"] if batch[0, 0] > 0 else ["act#2", "act#1"]


@case(
    signed,
    Site("act#1", 5, {1, 4}, {0}, "a.bias"),
    Site("act#2", 5, {2}, {3}, "b.bias"),
    order=_order,
)
def layers_in_either_order():
    return Chain(_either_order, a=nn.Linear(6, 5), b=nn.Linear(6, 5), act=nn.ReLU())


class Residual(nn.Module):
    """Blocks that a forward may leave out, as stochastic depth does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)) for _ in range(3))
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        for index, block in enumerate(self.blocks):
            if _kept(x, index):
                x = torch.cat([x[:, :1], (x + 0.1 * block(x))[:, 1:]], 1)
        return F.relu(self.head(x))


def _kept(batch, index):
    return bool(batch[0, 0] > 0) == (index != 1)


@case(
    signed,
    Site("blocks.0.1", 6, {1, 4}, {0}, "blocks.0.0.bias"),
    Site("blocks.1.1", 6, {2}, {3}, "blocks.1.0.bias"),
    Site("blocks.2.1", 6, {0, 5}, {1}, "blocks.2.0.bias"),
    Site("relu()", 4, {2}, {3}, "head.bias"),
    order=lambda batch: [f"blocks.{index}.1" for index in range(3) if _kept(batch, index)] + ["relu()"],
)
def blocks_left_out():
    return Residual()


def _drop_path(m, x):
    scale = (torch.arange(len(x)) % 2 == 0).to(x)[:, None] / 0.5
    return F.relu(m.c(x + m.b(F.relu(m.a(x))) * scale))


@case(normal(6), Site("relu()#1", 5, {1, 4}, {0}, "a.bias"), Site("relu()#2", 4, {2}, {3}, "c.bias"))
def branch_dropped_per_input():
    return Chain(_drop_path, a=nn.Linear(6, 5), b=nn.Linear(5, 6), c=nn.Linear(6, 4))


class Triplet(nn.Module):
    """One body for three inputs, given one by one and stacked along the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), nn.ReLU())

    def forward(self, anchor, positive, negative):
        return self.body(anchor), self.body(positive), self.body(negative)


@case(
    lambda: list(zip(normal(6, seed=1)(), normal(6, seed=2)(), normal(6, seed=3)(), strict=True)),
    Site("body.1", 5, {1, 4}, {0}, "body.0.bias", calls=3),
    Site("body.3", 3, {2}, {1}, "body.2.bias", calls=3),
    call=lambda model, batch: model(*batch),
    count=lambda batch: len(batch[0]),
    order=lambda batch: ["body.1", "body.3"] * 3,
)
def triplets():
    return Triplet()
