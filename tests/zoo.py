"""The zoo: small models that carry their own ground truth, one per way of applying a rectifier."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.utils.parametrizations as parametrizations
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from tests.planting import (
    Case,
    Site,
    channels,
    flattened,
    normal,
    plant_rows,
    positive,
    time_first,
    tokens,
)

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


# --- modules ----------------------------------------------------------------------------------------------------------


@case(
    normal(6),
    Site("1", 8, {1, 5}, {2}, "0.bias"),
    Site("3", 7, {0}, {6}, "2.bias"),
)
def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(inplace=True), nn.Linear(7, 2))


@case(
    normal(6),
    Site("1#1", 8, {1, 5}, {2}, "0.bias"),
    Site("1#2", 8, {0}, {6}, "2.bias"),
)
def one_relu_twice_in_a_sequential():
    relu = nn.ReLU(inplace=True)
    return nn.Sequential(nn.Linear(6, 8), relu, nn.Linear(8, 8), relu)


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, downsample: bool) -> None:
        super().__init__()
        stride = 2 if downsample else 1
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if downsample
            else None
        )

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(5)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(BasicBlock(5, 5, False))
        self.layer2 = nn.Sequential(BasicBlock(5, 6, True))
        self.fc = nn.Linear(6, 2)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


@case(
    normal(3, 6, 6),
    Site("relu", 5, {0}, {3}, "bn1.bias", arrange=channels),
    Site("layer1.0.relu#1", 5, {1}, {0}, "layer1.0.bn1.bias", arrange=channels),
    Site("layer1.0.relu#2", 5, {2, 4}, {1}, "layer1.0.bn2.bias", arrange=channels),
    Site("layer2.0.relu#1", 6, {5}, {2}, "layer2.0.bn1.bias", arrange=channels),
    Site("layer2.0.relu#2", 6, {0, 3}, {4}, "layer2.0.bn2.bias", arrange=channels),
)
def resnet():
    return settled(ResNet(), torch.randn(32, 3, 6, 6))


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.act = nn.ReLU()
        self.alias = self.act
        self.body = nn.Sequential(nn.Linear(8, 8), self.act)
        self.again = self.body

    def forward(self, x):
        return self.again(self.alias(self.first(x)))


@case(
    normal(6),
    Site("act#1", 8, {1, 5}, {2}, "first.bias"),
    Site("act#2", 8, {0}, {6}, "body.0.bias"),
)
def a_module_by_two_names():
    return TwoNames()


# --- functions --------------------------------------------------------------------------------------------------------


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


# --- convolutions -----------------------------------------------------------------------------------------------------


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


# --- sequences --------------------------------------------------------------------------------------------------------


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


# --- branches and repeated calls --------------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x):
        return F.relu((self.a if x[0, 0] > 0 else self.b)(x))


def _signed() -> list[Tensor]:
    batches = normal(6, sizes=(8, 8, 8, 8, 8))()
    for index, batch in enumerate(batches):
        batch[:, 0] = batch[:, 0].abs() * (1 if index in {0, 3, 4} else -1)
    return batches


@case(
    _signed,
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
    _signed,
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


def _pairs() -> list[tuple[Tensor, Tensor]]:
    return list(zip(normal(6, seed=1)(), normal(6, seed=2)(), strict=True))


@case(
    _pairs,
    Site("body.1", 5, {1, 4}, {0}, "body.0.bias", calls=2),
    Site("relu()", 4, {2}, {3}, "head.bias"),
    call=lambda model, batch: model(*batch),
    count=lambda batch: len(batch[0]),
)
def siamese():
    return Siamese()


# --- parameters -------------------------------------------------------------------------------------------------------


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.zeros(5))
        self.w2, self.b2 = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.zeros(4))
        self.w3, self.b3 = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.zeros(3, 1))

    def forward(self, x):
        x = F.relu(x @ self.w1 + self.b1)
        x = F.relu(torch.einsum("bi,io->bo", x, self.w2) + self.b2)
        return F.relu(self.w3 @ x.T + self.b3).T


@case(
    normal(6),
    Site("relu()#1", 5, {1, 4}, {0}, "b1"),
    Site("relu()#2", 4, {2}, {3}, "b2"),
    Site("relu()#3", 3, {0}, {2}, "b3", arrange=lambda z, n: z.T[:, :, None]),
    seed=2,
)
def bare_parameters():
    return Bare()


@case(normal(5, 6), Site("relu()", 5, {1, 4}, {0}, "b"))
def bare_parameters_on_sequences():
    return Chain(_einsum, w=nn.Parameter(torch.randn(6, 5)), b=nn.Parameter(torch.zeros(5)))


def _einsum(m, x):
    return F.relu(torch.einsum("bti,io->bto", x, m.w) + m.b)


@case(positive(6), Site("1", 5, {1, 4}, {0}))
def linear_without_bias():
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU())
    plant_rows(model[0].weight, {1, 4}, {0})
    return model


@case(positive(3, 5, 5), Site("1", 5, {1, 4}, {0}, arrange=channels), seed=1)
def conv_without_bias():
    model = nn.Sequential(nn.Conv2d(3, 5, 5, bias=False), nn.ReLU())
    with torch.no_grad():
        model[0].weight[[0, 1, 4]] = -model[0].weight[[0, 1, 4]].abs() - 0.01
        model[0].weight[0, 0] = 1
    return model


@case(positive(6), Site("1", 5, {1, 4}, {0}))
def weight_norm_without_bias():
    linear = nn.Linear(6, 5, bias=False)
    plant_rows(linear.weight, {1, 4}, {0})
    return nn.Sequential(parametrizations.weight_norm(linear), nn.ReLU())


@case(normal(6), Site("1", 8, {1, 5}, {2}, "0.bias"), Site("3", 7, {0}, {6}, "2.bias"))
def weight_norm():
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(6, 8)),
        nn.ReLU(),
        parametrizations.weight_norm(nn.Linear(8, 7)),
        nn.ReLU(),
    )


@case(normal(3, 5, 5), Site("1", 5, {1}, {2}, "0.bias", arrange=channels))
def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 5, 3)), nn.ReLU())


@case(normal(6), Site("1", 8, {1, 5}, {2}, "0.bias"), Site("3", 7, {0}, {6}, "2.bias"))
def spectral_norm():
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(6, 8)),
        nn.ReLU(),
        parametrizations.spectral_norm(nn.Linear(8, 7)),
        nn.ReLU(),
    )


@case(normal(6), Site("1", 8, {1, 5}, {2}, "0.bias"), Site("3", 7, {0}, {6}, "2.bias_orig"))
def pruned():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU())
    prune.random_unstructured(model[0], "weight", 0.3)
    prune.random_unstructured(model[2], "weight", 0.3)
    prune.identity(model[2], "bias")
    return model


@case(normal(6), Site("1", 5, {1, 4}, {0}, "0.bias"), Site("3", 5, {2}, {3}, "2.bias"))
def frozen():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU()).requires_grad_(False)


@case(normal(6), Site("1", 5, {1, 4}, {0}, "0.bias"), Site("3", 5, {2}, {3}, "2.bias"))
def partly_frozen():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU())
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


class LoRA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(6, 5), nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x):
        return F.relu(self.base(x) + 0.5 * self.up(self.down(x)))


@case(normal(6), Site("relu()", 5, {1, 4}, {0}, "base.bias"))
def lora():
    return LoRA()


# --- normalisation ----------------------------------------------------------------------------------------------------


@case(normal(6), Site("2", 8, {1, 5}, {2}, "1.bias"))
def layer_norm_between():
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU())


@case(normal(3, 5, 5), Site("2", 6, {1, 5}, {2}, "1.bias", arrange=channels))
def group_norm_between():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(3, 6), nn.ReLU())


@case(positive(6), Site("2", 6, {1, 5}, {2}), seed=7)
def rms_norm_between():
    linear = nn.Linear(6, 6, bias=False)
    plant_rows(linear.weight, {1, 5}, {2})
    return nn.Sequential(linear, nn.RMSNorm(6), nn.ReLU())


@case(normal(3, 5, 5), Site("2", 6, {1, 5}, {2}, "1.bias", arrange=channels))
def instance_norm_between():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.ReLU())


@case(normal(3, 5, 5), Site("2", 6, {1, 5}, arrange=channels))
def instance_norm_without_parameters():
    conv = nn.Conv2d(3, 6, 3)
    with torch.no_grad():
        conv.weight[[1, 5]] = 0  # normalised to exactly zero, which does not fire
        conv.bias[[1, 5]] = -0.5
    return nn.Sequential(conv, nn.InstanceNorm2d(6), nn.ReLU())


@case(normal(6), Site("3", 8, {1, 5}, {2}, "2.bias"))
def linear_bn_twice():
    layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, affine=False), nn.BatchNorm1d(8), nn.ReLU())
    return settled(layers, torch.randn(32, 6))


@case(normal(6), Site("2", 8, {1, 5}, {2}, "0.bias"))
def bn_without_parameters():
    return settled(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, affine=False), nn.ReLU()), torch.randn(32, 6))


@case(normal(5, 6), Site("relu()", 8, {1, 5}, {2}, "bn.bias"))
def bn_over_transposed_sequences():
    return settled(Chain(_transposed_bn, fc=nn.Linear(6, 8), bn=nn.BatchNorm1d(8)), torch.randn(32, 5, 6))


def _transposed_bn(m, x):
    return F.relu(m.bn(m.fc(x).transpose(1, 2)).transpose(1, 2))


# --- the forward's own ways -------------------------------------------------------------------------------------------


def _no_grad(m, x):
    with torch.no_grad():
        x = F.relu(m.a(x))
    return F.relu(m.b(x))


@case(normal(6), Site("relu()#1", 5, {1, 4}, {0}, "a.bias"), Site("relu()#2", 5, {2}, {3}, "b.bias"))
def a_no_grad_block():
    return Chain(_no_grad, a=nn.Linear(6, 5), b=nn.Linear(5, 5))


def _detach(m, x):
    x = F.relu(m.a(x).detach())
    return F.relu(m.b(x.detach()) + m.c(x).detach())


@case(normal(6), Site("relu()#1", 5, {1, 4}, {0}, "a.bias"), Site("relu()#2", 5, {2}, {3}, "b.bias"))
def detach():
    return Chain(_detach, a=nn.Linear(6, 5), b=nn.Linear(5, 5), c=nn.Linear(5, 5))


def _checkpointed(m, x):
    x = checkpoint(m.first, x, use_reentrant=False)
    return checkpoint(m.second, x, use_reentrant=False)


@case(
    normal(3, 5, 5),
    Site("first.2", 5, {1, 4}, {0}, "first.1.bias", arrange=channels),
    Site("second.1", 4, {2}, {3}, "second.0.bias", arrange=channels),
)
def activation_checkpointing():
    model = Chain(
        _checkpointed,
        first=nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(inplace=True)),
        second=nn.Sequential(nn.Conv2d(5, 4, 3), nn.ReLU()),
    )
    return settled(model, torch.randn(32, 3, 5, 5))


def _reentrant(m, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that no input requires gradients, as it is in an evaluation
        return checkpoint(m.first, x, use_reentrant=True)


@case(normal(6), Site("first.1", 5, {1, 4}, {0}, "first.0.bias"))
def reentrant_checkpointing():
    return Chain(_reentrant, first=nn.Sequential(nn.Linear(6, 5), nn.ReLU()))


def _writes_to_its_input(m, x):
    x.mul_(2)
    return F.relu(m.a(x))


@case(normal(6), Site("relu()", 5, {1, 4}, {0}, "a.bias"))
def writes_to_its_input():
    return Chain(_writes_to_its_input, a=nn.Linear(6, 5))


def _tolerant(m, x):
    try:
        m.broken(x)
    except RuntimeError:
        x = F.relu(m.a(x))
    return F.relu(m.b(x))


@case(normal(6), Site("relu()#1", 5, {1, 4}, {0}, "a.bias"), Site("relu()#2", 5, {2}, {3}, "b.bias"))
def catches_its_own_error():
    return Chain(_tolerant, broken=nn.Linear(3, 3), a=nn.Linear(6, 5), b=nn.Linear(5, 5))


def _asks_autograd(m, x):
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(m.energy(x).sum(), x)
    return F.relu(m.a(slope))


@case(normal(6), Site("relu()", 5, {1, 4}, {0}, "a.bias"))
def asks_autograd_in_its_forward():
    return Chain(_asks_autograd, energy=nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)), a=nn.Linear(6, 5))


def _masked_fill(m, x):
    return F.relu(m.a(x).masked_fill(x[..., :1] > 1, 0.0))


@case(normal(7, 6), Site("relu()", 5, {1, 4}, {0}, "a.bias"))
def masked_fill_between():
    return Chain(_masked_fill, a=nn.Linear(6, 5))


def _by_index(m, x):
    return F.relu(m.a(x)[:, [2, 0, 3, 1]])


@case(normal(3, 5, 5), Site("relu()", 4, {0, 2}, {1}, arrange=channels))
def channels_by_index():
    torch.manual_seed(5)
    model, x = Chain(_by_index, a=nn.Conv2d(3, 4, 3)), torch.cat(normal(3, 5, 5)())
    with torch.no_grad():  # channels 0 and 2 of the indexed map are the convolution's 2 and 3
        highest = model.a(x).amax((2, 3)).sort(0).values
        model.a.bias[[2, 3]] -= highest[-1, [2, 3]] + 1
        model.a.bias[0] -= (highest[-1, 0] + highest[-2, 0]) / 2
    return model


def _gated(m, x):
    return F.relu(m.a(x) * torch.sigmoid(m.b(x)))


@case(normal(3, 5, 5), Site("relu()", 6, {1, 5}, {3}, arrange=channels))
def gated_by_another_layer():
    torch.manual_seed(6)
    model, x = Chain(_gated, a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(3, 6, 3)), torch.cat(normal(3, 5, 5)())
    with torch.no_grad():
        highest = model.a(x).amax((2, 3)).sort(0).values
        model.a.bias[[1, 5]] -= highest[-1, [1, 5]] + 1
        model.a.bias[3] -= (highest[-1, 3] + highest[-2, 3]) / 2
    return model


@case(
    normal(6),
    Site("1", 5, {1, 4}, {0}, "0.bias"),
    Site("2", 5, {1, 4}, {0}, high=6, post=lambda z: np.clip(z, 0, 6)),
)
def a_rectifier_behind_a_rectifier():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.ReLU6())


def _autocast(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        return m.b(F.relu(m.a(x)))


@case(normal(6), Site("relu()", 5, {1, 4}, {0}, "a.bias"), seed=1)
def autocast():
    return Chain(_autocast, a=nn.Linear(6, 5), b=nn.Linear(5, 2))


def _inference(m, x):
    with torch.inference_mode():
        return F.relu(m.a(x))


@case(normal(6), Site("relu()", 5, {1, 4}, {0}, "a.bias"))
def an_inference_mode_block():
    return Chain(_inference, a=nn.Linear(6, 5))


class MessagePassing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 5)

    def forward(self, nodes, edges):
        return F.relu(self.a(torch.zeros_like(nodes).index_add(0, edges[1], nodes[edges[0]])))


def _graphs() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(batch, torch.randint(0, len(batch), (2, 30), generator=generator)) for batch in normal(6)()]


@case(
    _graphs,
    Site("relu()", 5, {1, 4}, {0}, "a.bias"),
    call=lambda model, batch: model(*batch),
    count=lambda batch: len(batch[0]),
)
def edges_between_inputs():
    return MessagePassing()


# --- other rectifiers -------------------------------------------------------------------------------------------------


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


# --- dtypes and signatures --------------------------------------------------------------------------------------------


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
    lambda: [{"a": a, "b": b} for a, b in _pairs()],
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
