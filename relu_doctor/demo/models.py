"""The demo's two networks, for ``--model relu_doctor.demo.models:make_mlp`` and ``…:make_cnn``.

Both take images of shape (inputs, 1, 8, 8) and return the logits of ten classes, so the same data feed both. Nothing
about them is unusual: torch's default initialisation, no normalisation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

IMAGE_SHAPE = (1, 8, 8)
NUM_CLASSES = 10


def make_mlp(hidden: Sequence[int] = (256, 64)) -> nn.Sequential:
    """A multilayer perceptron, one ReLU after each hidden layer.

    Args:
        hidden: units of each hidden layer.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    width = IMAGE_SHAPE[0] * IMAGE_SHAPE[1] * IMAGE_SHAPE[2]
    for number, units in enumerate(hidden, start=1):
        layers[f"linear{number}"] = nn.Linear(width, units)
        layers[f"relu{number}"] = nn.ReLU()
        width = units
    layers["output"] = nn.Linear(width, NUM_CLASSES)
    return nn.Sequential(layers)


def make_cnn(channels: Sequence[int] = (16, 32)) -> nn.Sequential:
    """A convolutional net: 3×3 convolutions, each followed by a ReLU and a pooling that halves the image.

    Args:
        channels: output channels of each convolution, three of them at most (an 8×8 image is then one pixel).
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    width, side = IMAGE_SHAPE[0], IMAGE_SHAPE[1]
    for number, units in enumerate(channels, start=1):
        layers[f"conv{number}"] = nn.Conv2d(width, units, kernel_size=3, padding=1)
        layers[f"relu{number}"] = nn.ReLU()
        layers[f"pool{number}"] = nn.MaxPool2d(2)
        width, side = units, side // 2
    layers["flatten"] = nn.Flatten()
    layers["output"] = nn.Linear(width * side * side, NUM_CLASSES)
    return nn.Sequential(layers)
