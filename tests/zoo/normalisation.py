"""Normalisation between a layer and its rectifier."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.planting import Site, channels, normal, plant_rows, positive
from tests.zoo.registry import Chain, case, settled


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


@case(normal(3, 5, 5), Site("2", 6, {1, 5}, {2}, arrange=channels), seed=1)
def layer_norm_over_whole_maps():
    model, x = nn.Sequential(nn.Conv2d(3, 6, 3), nn.LayerNorm((6, 3, 3)), nn.ReLU()), torch.cat(normal(3, 5, 5)())
    with torch.no_grad():
        highest = model[:2](x).amax((2, 3)).sort(0).values
        for unit in (1, 5):
            model[1].bias[unit] -= highest[-1, unit] + 1
        model[1].bias[2] -= (highest[-1, 2] + highest[-2, 2]) / 2
    return model


@case(normal(4, 9), Site("2", 6, {1, 5}, {2}, "1.bias", arrange=channels))
def batch_norm_of_sequences():
    return settled(nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.ReLU()), torch.randn(32, 4, 9))


@case(normal(3, 5, 5), Site("2", 6, {1, 5}, {2}, "1.bias", arrange=channels))
def group_norm_of_one_group():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(1, 6), nn.ReLU())
