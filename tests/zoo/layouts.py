"""Layouts: where the units, the inputs and the positions lie."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.planting import Site, channels, normal
from tests.zoo.registry import CASES, Case, Chain, case, settled


def _convolution(name, layer, units, *shape):
    site = Site("1", units, {0, units - 1}, {1}, "0.bias", arrange=channels)
    CASES[name] = Case(name, lambda: nn.Sequential(layer(), nn.ReLU()).eval(), normal(*shape), (site,))


_convolution("conv_transposed_3d", lambda: nn.ConvTranspose3d(2, 5, 2), 5, 2, 3, 3, 3)
_convolution("conv_transposed_depthwise", lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), 4, 4, 4, 4)
_convolution("conv_depthwise_3d", lambda: nn.Conv3d(4, 8, 2, groups=4), 8, 4, 3, 3, 3)
_convolution("conv_grouped_1d", lambda: nn.Conv1d(4, 6, 3, groups=2), 6, 4, 8)


@case(
    normal(4, 6, 6),
    Site("2", 8, {1}, {2}, "1.bias", arrange=channels),
    Site("5", 8, {0, 6}, {3}, "4.bias", arrange=channels),
    Site("8", 5, {4}, {1}, "7.bias", arrange=channels),
)
def separable_convolutions():
    return settled(
        nn.Sequential(
            nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, bias=False),
            nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1, bias=False), nn.BatchNorm2d(5), nn.ReLU(),
        ),
        torch.randn(32, 4, 6, 6),
    )  # fmt: skip


def steps_first(pre, num_inputs):
    """(positions x inputs, units)."""
    return pre.reshape(-1, num_inputs, pre.shape[-1]).permute(1, 2, 0)


@case(normal(7, 6), Site("relu()", 4, {2}, {1}, "a.bias", arrange=steps_first))
def tokens_flattened_time_first():
    return Chain(lambda m, x: F.relu(m.a(x.transpose(0, 1).reshape(-1, 6))), a=nn.Linear(6, 4))


@case(normal(7, 6, sizes=(7, 7)), Site("relu()", 4, {2}, {1}, "a.bias", arrange=steps_first))
def tokens_flattened_time_first_of_a_square():
    return Chain(lambda m, x: F.relu(m.a(x.transpose(0, 1).reshape(-1, 6))), a=nn.Linear(6, 4))


def _moved(m, x):
    x = F.relu(m.conv(x).permute(0, 2, 3, 1))
    x = F.relu(m.mix(x.permute(0, 3, 1, 2).flatten(2).transpose(1, 2)).transpose(1, 2))
    return F.relu(m.head(x.mean(2)))


@case(
    normal(3, 6, 6),
    Site("relu()#1", 5, {1, 3}, {0}, "conv.bias", arrange=lambda z, n: z.flatten(1, 2).transpose(1, 2)),
    Site("relu()#2", 4, {2}, {1}, "mix.bias", arrange=channels),
    Site("relu()#3", 6, {0}, {5}, "head.bias"),
    seed=1,
)
def channels_moved_about():
    return Chain(_moved, conv=nn.Conv2d(3, 5, 3), mix=nn.Linear(5, 4), head=nn.Linear(4, 6))


class Mixer(nn.Module):
    """Units over positions in one place, over channels in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.tokens, self.channels = nn.LayerNorm(6), nn.Linear(5, 7), nn.Linear(6, 4)
        self.back = nn.Linear(7, 5)

    def forward(self, x):
        x = x + self.back(F.relu(self.tokens(self.norm(x).transpose(1, 2)))).transpose(1, 2)
        return F.relu(self.channels(x))


@case(
    normal(5, 6),
    Site("relu()#1", 7, {1, 3}, {0}, "tokens.bias"),
    Site("relu()#2", 4, {2}, {1}, "channels.bias"),
)
def mixer():
    return Mixer()


class Attention(nn.Module):
    """A rectifier on a value projection split into heads, and one on queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def heads(self, x):
        return x.view(*x.shape[:2], 2, 3).transpose(1, 2)

    def forward(self, x):
        q, v = F.relu(self.heads(self.q(x))), F.relu(self.heads(self.v(x)))
        mixed = torch.softmax(q @ q.transpose(-1, -2), -1) @ v
        return F.relu(self.out(mixed.transpose(1, 2).flatten(2)))


def heads(pre, num_inputs):
    """(inputs, heads, positions, features)."""
    return pre.transpose(2, 3).flatten(1, 2)


@case(
    normal(5, 6),
    Site("relu()#1", 6, {1, 3}, {0}, "q.bias", arrange=heads),
    Site("relu()#2", 6, {4}, {5}, "v.bias", arrange=heads),
    Site("relu()#3", 4, {2}, {1}, "out.bias"),
)
def heads_of_attention():
    return Attention()


@case(
    normal(3, 5, 5, dtype=torch.float16),
    Site("1", 8, {1, 5}, {2}, "0.bias", arrange=channels),
    Site("3", 7, {0}, {6}, "2.bias", arrange=channels),
    seed=1,
)
def half_precision():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 7, 3), nn.ReLU()).half()


@case(
    lambda: [*normal(6)(), torch.zeros(0, 6), torch.randn(4, 6, generator=torch.Generator().manual_seed(9))],
    Site("1", 5, {1, 4}, {0}, "0.bias"),
)
def empty_batches():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU())


@case(normal(12, sizes=(4, 1, 3)), Site("1", 5, {1, 4}, {0}, "0.bias"))
def wide_inputs():
    return nn.Sequential(nn.Linear(12, 5), nn.ReLU())


def _window(m, x):
    b, h, w, c = x.shape
    x = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
    return F.relu(m.a(x))


@case(
    normal(4, 6, 3), Site("relu()", 5, {1, 4}, {0}, "a.bias", arrange=lambda z, n: z.reshape(n, -1, 5).transpose(1, 2))
)
def windows():
    return Chain(_window, a=nn.Linear(3, 5))


@case(
    normal(2, 3, 6, 6),
    Site("relu()", 5, {1, 4}, {0}, "a.bias", arrange=lambda z, n: z.reshape(n, -1, 5, 16).transpose(1, 2).flatten(2)),
)
def frames_of_a_video():
    return Chain(lambda m, x: F.relu(m.a(x.flatten(0, 1))), a=nn.Conv2d(3, 5, 3))


def one_image(pre, num_inputs):
    """(units, height, width) of one input."""
    return pre.flatten(1)[None]


@case(
    normal(3, 6, 6),
    Site("relu()", 5, {1, 4}, {0}, "a.bias", arrange=one_image),
    order=lambda batch: ["relu()"] * len(batch),
    owners=lambda batch: {"relu()": [torch.tensor([index]) for index in range(len(batch))]},
)
def images_one_by_one():
    return Chain(lambda m, x: torch.stack([F.relu(m.a(image)) for image in x]), a=nn.Conv2d(3, 5, 3))


def twins(pre, num_inputs):
    """(two x inputs, units): first all left ones, then all right ones."""
    return pre.unflatten(0, (2, num_inputs)).permute(1, 2, 0)


class Twins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 5)

    def forward(self, left, right):
        return F.relu(self.body(torch.cat([left, right]))).chunk(2)


@case(
    lambda: list(zip(normal(6, seed=1)(), normal(6, seed=2)(), strict=True)),
    Site("relu()", 5, {1, 4}, {0}, "body.bias", arrange=twins),
    call=lambda model, batch: model(*batch),
    count=lambda batch: len(batch[0]),
)
def twins_joined_along_the_batch():
    return Twins()
