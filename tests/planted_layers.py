"""One layer with planted units, and what else the tests of recognition share."""

from __future__ import annotations

import torch
from torch import nn

DEAD, ONCE = {1, 4}, {2}
SPECIAL = 17  # the one input on which the once-unit fires


def inputs(*shape: int, num_inputs: int = 60):
    """Normal inputs whose last feature is zero but in one of them."""
    x = torch.randn(num_inputs, *shape, generator=torch.Generator().manual_seed(0))
    x[..., -1] = 0
    x[SPECIAL, ..., -1] = 1
    return x


def planted(in_features: int, units: int = 7) -> nn.Linear:
    """Units 1 and 4 never fire; unit 2 only on the special input; the others on about half."""
    torch.manual_seed(1)
    layer = nn.Linear(in_features, units)
    with torch.no_grad():
        layer.weight[:, -1] = 0
        layer.bias[sorted(DEAD)] = -100.0
        layer.weight[2] = 0
        layer.weight[2, -1] = 50.0
        layer.bias[2] = -10.0
    return layer


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = planted(8), nn.Linear(7, 3), function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


class Module(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def dead_units(diagnosis) -> list[set[int]]:
    return [set(mask.nonzero().flatten().tolist()) for mask in diagnosis.mask("dead").values()]


def fires_by_output(function, z) -> torch.Tensor:
    """Bool (inputs, units): where a function's output is not zero at any position."""
    fired = function(z.clone()) != 0
    return fired.reshape(len(z), -1, z.shape[-1]).any(1)
