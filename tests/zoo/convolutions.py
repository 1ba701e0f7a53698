"""Convolutions of every kind, and the ways of nets that are made of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from tests.planting import Case, Site, channels, flattened, normal
from tests.zoo.registry import CASES, Chain, case, settled


def _convolution(name: str, layer: Callable[[], nn.Module], units: int, *shape: int) -> None:
    sites = Site("1", units, {0, units - 1}, {1}, "0.bias", arrange=channels)
    CASES[name] = Case(name, lambda: nn.Sequential(layer(), nn.ReLU()).eval(), normal(*shape), (sites,))


_convolution("conv_1d", lambda: nn.Conv1d(3, 5, 3), 5, 3, 9)
_convolution("conv_2d", lambda: nn.Conv2d(3, 5, 3, stride=2, dilation=2), 5, 3, 9, 9)
_convolution("conv_3d", lambda: nn.Conv3d(2, 5, 2), 5, 2, 4, 4, 4)
_convolution("conv_grouped", lambda: nn.Conv2d(4, 6, 3, groups=2), 6, 4, 5, 5)
_convolution("conv_depthwise", lambda: nn.Conv2d(4, 4, 3, groups=4), 4, 4, 5, 5)
_convolution("conv_depthwise_wide", lambda: nn.Conv2d(3, 6, 3, groups=3, padding="same"), 6, 3, 5, 5)
_convolution("conv_transposed", lambda: nn.ConvTranspose2d(3, 5, 3, 2), 5, 3, 4, 4)
_convolution("conv_transposed_1d", lambda: nn.ConvTranspose1d(3, 5, 3), 5, 3, 4)
_convolution("conv_transposed_grouped", lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), 6, 4, 4, 4)
_convolution("conv_of_one_pixel", lambda: nn.Conv2d(3, 5, 4), 5, 3, 4, 4)
_convolution("conv_circular", lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"), 5, 3, 4, 4)
_convolution("conv_of_one_channel", lambda: nn.Conv2d(1, 3, 3), 3, 1, 5, 5)


@case(normal(3, 5, 5), Site("1", 1, {0}, set(), "0.bias", arrange=channels))
def one_unit():
    return nn.Sequential(nn.Conv2d(3, 1, 3), nn.ReLU())


@case(normal(3, 5, 5), Site("2", 6, {1, 2}, {4}, "1.bias", arrange=channels))
def conv_bn_relu():
    return settled(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()), torch.randn(32, 3, 5, 5))


@case(
    normal(3, 6, 6),
    Site("2", 3, {1}, {2}, "1.bias", arrange=channels),
    Site("5", 5, {0, 4}, {3}, "4.bias", arrange=channels),
)
def pre_activation_order():
    return settled(
        nn.Sequential(
            nn.Identity(), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(),
            nn.Conv2d(5, 2, 1),
        ),
        torch.randn(32, 3, 6, 6),
    )  # fmt: skip


@case(
    normal(3, 6, 6),
    Site("1", 4, {1}, {2}, "0.bias", arrange=channels),
    Site("4", 5, {0, 4}, {3}, "3.bias", arrange=channels),
)
def relu_before_bn():
    return settled(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3), nn.ReLU()),
        torch.randn(32, 3, 6, 6),
    )


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(7), nn.Conv2d(7, 3, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(10)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([x, self.conv1(F.relu(self.norm1(x)))], 1)
        x = torch.cat([x, self.conv2(F.relu(self.norm2(x)))], 1)
        return F.relu(self.norm3(x)).mean((2, 3))


@case(
    normal(3, 5, 5),
    Site("relu()#1", 4, {1}, {2}, "norm1.bias", arrange=channels),
    Site("relu()#2", 7, {0, 6}, {4}, "norm2.bias", arrange=channels),
    Site("relu()#3", 10, {3, 5, 9}, {0, 8}, "norm3.bias", arrange=channels),
)
def densenet():
    return settled(Dense(), torch.randn(32, 3, 5, 5))


class Stream(nn.Module):
    """A residual stream that no rectifier interrupts: what a block reads is the sum of all layers before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)) for _ in range(3)
        )

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return x


@case(
    normal(3, 5, 5),
    Site("blocks.0.1", 4, {1}, {2}, "blocks.0.0.bias", arrange=channels),
    Site("blocks.1.1", 4, {0, 3}, {1}, "blocks.1.0.bias", arrange=channels),
    Site("blocks.2.1", 4, {2}, {0}, "blocks.2.0.bias", arrange=channels),
)
def residual_stream():
    return settled(Stream(), torch.randn(32, 3, 5, 5))


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.three = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 3, 3, padding=1)
        self.relu, self.head = nn.ReLU(), nn.Conv2d(7, 5, 1)

    def forward(self, x):
        return self.relu(self.head(self.relu(torch.cat([self.one(x), self.three(x)], 1))))


@case(
    normal(3, 5, 5),
    Site("relu#1", 7, {1, 5}, {0, 4}, arrange=channels),
    Site("relu#2", 5, {2}, {3}, "head.bias", arrange=channels),
)
def cat_then_relu():
    torch.manual_seed(1)
    model, x = Inception(), torch.cat(normal(3, 5, 5)())
    with torch.no_grad():
        for conv, dead, once in ((model.one, 1, 0), (model.three, 1, 0)):
            highest = conv(x).amax((2, 3)).sort(0).values
            conv.bias[dead] -= highest[-1, dead] + 1
            conv.bias[once] -= (highest[-1, once] + highest[-2, once]) / 2
    return model


@case(
    normal(3, 4, 4),
    Site("2", 5, {1, 3}, {0}, "0.bias", arrange=flattened(5)),
    Site("4", 6, {2}, {5}, "3.bias"),
)
def conv_flatten_relu():
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.ReLU(), nn.Linear(20, 6), nn.ReLU())


@case(normal(3, 8, 8), Site("2", 5, {1, 3}, {0}, "0.bias", arrange=channels))
def max_pool_between():
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.MaxPool2d(2), nn.ReLU())


@case(normal(3, 8, 8), Site("3", 5, {1, 3}, {0}, "0.bias", arrange=channels))
def average_pool_and_dropout_between():
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.AvgPool2d(2), nn.Dropout2d(0.5), nn.ReLU())


@case(normal(3, 8, 8), Site("1", 5, {1, 3}, {0}, "0.bias", arrange=channels))
def channels_last():
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 3)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@case(normal(4, 4, 4, sizes=(4, 4, 4)), Site("1", 4, {1, 3}, {0}, "0.bias", arrange=channels))
def all_axes_of_four():
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())


@case(
    normal(4, 4, 4, sizes=(4, 4, 4)),
    Site("relu", 4, {1, 3}, {0}, "conv.bias", arrange=lambda z, n: z.permute(0, 2, 1, 3).flatten(2)),
)
def all_axes_of_four_and_permuted():
    return Chain(lambda m, x: m.relu(m.conv(x).transpose(1, 2)), conv=nn.Conv2d(4, 4, 3, padding=1), relu=nn.ReLU())


@case(normal(3, 5, 5, sizes=(1,) * 6), Site("1", 5, {1, 3}, {0}, "0.bias", arrange=channels))
def batches_of_one():
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 6, 3), nn.ReLU()

    def forward(self, x):
        z = self.conv(x)
        return self.relu(z.view(len(x), 2, 3, *z.shape[2:]).transpose(1, 2).reshape(z.shape))


@case(
    normal(3, 5, 5),
    Site("relu", 6, {2, 4}, {1}, arrange=channels),
)
def channel_shuffle():
    torch.manual_seed(4)
    model, x = Shuffle(), torch.cat(normal(3, 5, 5)())
    with torch.no_grad():  # a unit is a channel of what the rectifier reads: 2 and 4 are the convolution's 1 and 2
        highest = model.conv(x).amax((2, 3)).sort(0).values
        model.conv.bias[[1, 2]] -= highest[-1, [1, 2]] + 1
        model.conv.bias[3] -= (highest[-1, 3] + highest[-2, 3]) / 2
    return model


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(5, 3, 2, 2), nn.Conv2d(7, 4, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        skip = self.relu(self.down(x))
        low = self.relu(self.middle(F.max_pool2d(skip, 2)))
        return self.relu(self.out(torch.cat([self.relu(self.up(low)), skip], 1)))


@case(
    normal(2, 6, 6),
    Site("relu#1", 4, {1}, {2}, "down.bias", arrange=channels),
    Site("relu#2", 5, {0}, {4}, "middle.bias", arrange=channels),
    Site("relu#3", 3, {2}, {0}, "up.bias", arrange=channels),
    Site("relu#4", 4, {3}, {1}, "out.bias", arrange=channels),
)
def u_net():
    return UNet()


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.reduce, self.expand = nn.Linear(6, 4), nn.Linear(4, 6)

    def forward(self, x):
        x = self.bn(self.conv(x))
        gate = torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3))))))
        return F.relu(x * gate[:, :, None, None])


@case(
    normal(3, 5, 5),
    Site("relu()#1", 4, {1}, {2}, "reduce.bias"),
    Site("relu()#2", 6, {0, 5}, {3}, arrange=channels),
)
def squeeze_excite():
    torch.manual_seed(2)
    x = torch.cat(normal(3, 5, 5)())
    model = settled(SqueezeExcite(), torch.randn(32, 3, 5, 5))
    with torch.no_grad():
        highest = model.bn(model.conv(x)).amax((2, 3)).sort(0).values
        for unit in (0, 5):
            model.bn.bias[unit] -= highest[-1, unit] + 1
        model.bn.bias[3] -= (highest[-1, 3] + highest[-2, 3]) / 2
    return model
