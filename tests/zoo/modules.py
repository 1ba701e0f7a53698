"""Modules, and one module in several places."""

from __future__ import annotations

import torch
from torch import nn

from tests.planting import Site, channels, normal
from tests.zoo.registry import case, settled


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
