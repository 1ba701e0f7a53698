"""Lists of tensors, each of which is one input."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.planting import SIZES, Site, channels
from tests.zoo.registry import case


def images() -> list[list[torch.Tensor]]:
    """Batches of images of different sizes."""
    generator = torch.Generator().manual_seed(3)
    sides = [torch.randint(6, 11, (2,), generator=generator).tolist() for _ in range(sum(SIZES))]
    return [list(part) for part in _parts([torch.randn(3, *side, generator=generator) for side in sides])]


def _parts(items):
    first = 0
    for size in SIZES:
        yield items[first : first + size]
        first += size


class Detector(nn.Module):
    """Brings its images to one size, and takes them as a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 5, 3), nn.Linear(5, 4)

    def forward(self, images):
        batch = torch.stack([F.interpolate(image[None], (7, 7))[0] for image in images])
        return F.relu(self.head(F.relu(self.conv(batch)).mean((2, 3))))


@case(
    images,
    Site("relu()#1", 5, {1, 4}, {0}, "conv.bias", arrange=channels),
    Site("relu()#2", 4, {2}, {1}, "head.bias"),
    scan={"forward": lambda model, batch: model(batch)},
)
def images_of_different_sizes():
    return Detector()
