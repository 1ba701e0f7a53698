"""The run's own numbers over a window: loss, gradient norm, learning rates; nothing on a device is waited for."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from relu_doctor.errors import ConfigError

Number = float | Tensor


class Mean:
    """The mean of numbers, some of which may be tensors on a device; it is read when a window closes."""

    def __init__(self) -> None:
        self._sum: Number = 0.0
        self._count = 0

    def add(self, value: Number) -> None:
        """Take in one."""
        self._sum = self._sum + value
        self._count += 1

    def take(self) -> float | None:
        """The mean since this was asked last; ``None`` where there was nothing."""
        mean = float(self._sum) / self._count if self._count else None
        self._sum, self._count = 0.0, 0
        return mean


class RunNumbers:
    """What the training loop tells about itself.

    Args:
        optimizers: whose learning rates are read.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self._optimizers = tuple(optimizers)
        self._means = {"loss": Mean(), "grad_norm": Mean()}

    def take_in(self, **values: object) -> None:
        """One step's numbers.

        Raises:
            ConfigError: one of them is no number.
        """
        for name, value in values.items():
            if value is not None:
                self._means[name].add(_number(name, value))

    def learning_rates(self) -> dict[str, float]:
        """The learning rate of each parameter group, as it is now: ``lr``, then ``lr/1``, ``lr/2`` …."""
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        return {
            f"lr/{place}" if place else "lr": float(group["lr"]) for place, group in enumerate(groups) if "lr" in group
        }

    def close(self) -> dict[str, float]:
        """The numbers of the window that closes; those that were told."""
        means = {name: mean.take() for name, mean in self._means.items()}
        return {name: value for name, value in means.items() if value is not None} | self.learning_rates()


def _number(name: str, value: object) -> Number:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return value.detach().reshape(()).to(torch.float64 if value.device.type == "cpu" else torch.float32)
    if isinstance(value, int | float):
        return float(value)
    found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise ConfigError(f"step({name}=…) expects a number or a tensor of one element, found {found}.")
