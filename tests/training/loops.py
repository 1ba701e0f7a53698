"""Training loops for the tests: plain ones, on data and seeds that are always the same."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relu_doctor.diagnose.diagnosis import Diagnosis
from relu_doctor.training.monitor import Monitor


class Net(nn.Module):
    """A convolution with BatchNorm, dropout and two rectifiers that are one object."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.2)
        self.hidden, self.out = nn.Linear(6 * 16, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(inputs, 1, 4, 4) to (inputs, 4)."""
        x = self.drop(self.relu(self.norm(self.conv(x))).flatten(1))
        return self.out(self.relu(self.hidden(x)))


def perceptron() -> nn.Sequential:
    """16 inputs, two rectified layers of 32 and 16 units, 4 outputs."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))


def batches(steps: int, size: int = 16, shape: tuple[int, ...] = (16,)) -> list[tuple[Tensor, Tensor]]:
    """Batches of inputs and labels that can be learnt."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(steps):
        x = torch.randn(size, *shape, generator=generator)
        made.append((x, (x.flatten(1)[:, :4]).argmax(1)))
    return made


@dataclass
class Run:
    """What a training run left."""

    losses: list[float] = field(default_factory=list)
    closed: list[Diagnosis] = field(default_factory=list)


def train(
    model: nn.Module,
    data: list[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    monitor: Monitor | None = None,
    before: Callable[[int], Any] = lambda step: None,
) -> Run:
    """A plain loop; ``before`` is called with the number of each step, from 1."""
    run = Run()
    with monitor or nullcontext():
        for step, (x, y) in enumerate(data, start=1):
            before(step)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            run.losses.append(loss.item())
            diagnosis = None if monitor is None else monitor.step(loss=loss)
            if diagnosis is not None:
                run.closed.append(diagnosis)
    return run
