"""The models that the benchmarks time. Every rectifier is a module, so that tools which hook modules see them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """A residual block, as torchvision writes it: one ReLU object for all of its sites."""

    def __init__(self, inputs: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        sizes = [(inputs, width, 3), (width, width, 3)] if expansion == 1 else [(inputs, width, 1), (width, width, 3)]
        if expansion > 1:
            sizes.append((width, width * expansion, 1))
        strided = next(index for index, (_, _, kernel) in enumerate(sizes) if kernel == 3)
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, k, stride if index == strided else 1, k // 2, bias=False)
            for index, (i, o, k) in enumerate(sizes)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _ in sizes)
        self.relu = nn.ReLU(inplace=True)
        outputs = width * expansion
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if stride > 1 or inputs != outputs
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """(inputs, channels, height, width) to the same."""
        out = x
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            out = norm(conv(out))
            if index < len(self.convs) - 1:
                out = self.relu(out)
        out += x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(out)
        return result


class ResNet(nn.Module):
    """ResNet-18 with the stem for 32 x 32 images, or ResNet-50 with ImageNet's."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        blocks, expansion = {18: ((2, 2, 2, 2), 1), 50: ((3, 4, 6, 3), 4)}[depth]
        small = depth == 18
        self.conv1 = nn.Conv2d(3, 64, 3 if small else 7, 1 if small else 2, 1 if small else 3, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(64), nn.ReLU(inplace=True)
        self.pool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        layers: list[nn.Module] = []
        inputs = 64
        for stage, count in enumerate(blocks):
            for index in range(count):
                layers.append(Block(inputs, 64 << stage, 2 if stage and not index else 1, expansion))
                inputs = (64 << stage) * expansion
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(inputs, 10 if small else 1000)

    def forward(self, x: Tensor) -> Tensor:
        """(inputs, 3, height, width) to (inputs, classes)."""
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        result: Tensor = self.fc(self.layers(x).mean((2, 3)))
        return result


class Attention(nn.Module):
    """Self-attention by torch's own function, so that no fused path is lost to a tool that watches."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        """(inputs, tokens, width) to the same."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        result: Tensor = self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return result


class Layer(nn.Module):
    """A transformer layer that normalises first, with ReLU in its feed-forward part."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.feed = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """(inputs, tokens, width) to the same."""
        x = x + self.attention(self.norm1(x))
        result: Tensor = x + self.feed(self.norm2(x))
        return result


def perceptron(width: int, depth: int) -> nn.Module:
    """``depth`` layers of ``width`` units, each with its ReLU."""
    return nn.Sequential(*(part for _ in range(depth) for part in (nn.Linear(width, width), nn.ReLU())))


@dataclass(frozen=True)
class Workload:
    """A model to time.

    Attributes:
        title: of its columns.
        make: builds the model.
        shape: of one batch.
        dtype: of the model and its inputs.
        dim: where the units lie in what its rectifiers are given.
    """

    title: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    dim: int = 1

    def build(self, device: str, count: int, *, batch: int | None = None) -> tuple[nn.Module, list[Tensor]]:
        """The model in eval mode and ``count`` batches."""
        torch.manual_seed(0)
        model = self.make().eval().to(device, self.dtype)
        shape = (batch or self.shape[0], *self.shape[1:])
        return model, [torch.randn(shape).to(device, self.dtype) for _ in range(count)]


WORKLOADS = {
    "resnet18": Workload("ResNet-18, 64 x 3 x 32 x 32", lambda: ResNet(18), (64, 3, 32, 32)),
    "transformer": Workload(
        "12-layer transformer, 32 x 128 x 256",
        lambda: nn.Sequential(*(Layer(256, 1024, 4) for _ in range(12))),
        (32, 128, 256),
        dim=-1,
    ),
    "mlp": Workload("4 x 2048 MLP, 512 x 2048", lambda: perceptron(2048, 4), (512, 2048)),
    "resnet50": Workload(
        "ResNet-50 in bf16, 64 x 3 x 224 x 224", lambda: ResNet(50), (64, 3, 224, 224), torch.bfloat16
    ),
    "tiny": Workload("2 x 64 MLP, 32 x 64", lambda: perceptron(64, 2), (32, 64)),
}  # fmt: skip
