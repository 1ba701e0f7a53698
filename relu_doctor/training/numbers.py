"""The run's own numbers over a window: loss, gradient norm, learning rates; nothing on a device is waited for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from relu_doctor.errors import ConfigError

Number = float | Tensor
_RATES = 1000  # changes of the learning rates that are remembered
_READ = "grad_norm_read"  # as the optimizers find it, beside the one that the loop tells


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
    """What the training loop tells about itself, and what its optimizers show.

    Args:
        optimizers: whose learning rates are read.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self._optimizers = tuple(optimizers)
        self._means = {name: Mean() for name in ("loss", "grad_norm", "watched_grad_norm", _READ)}
        self._rates: deque[tuple[int, list[float | None]]] = deque(
            maxlen=_RATES
        )  # those that differ, and since which step
        self._norms: dict[Optimizer, Tensor] = {}  # of the step that is being made

    def note_rates(self, step: int) -> None:
        """The learning rates of an update; those that lie on a device are not waited for."""
        rates = [_rate(group.get("lr")) for optimizer in self._optimizers for group in optimizer.param_groups]
        if not self._rates or self._rates[-1][1] != rates:
            self._rates.append((step, rates))

    def rates_between(self, first: int, last: int, parameters: Iterable[Tensor]) -> dict[str, tuple[float, float]]:
        """The least and the largest learning rate over some updates, under the names of :meth:`learning_rates`.

        Args:
            first: of these updates.
            last: of them.
            parameters: only of the groups that hold one of them.
        """
        own = {id(parameter) for parameter in parameters}
        before = [rates for at, rates in self._rates if at <= first][-1:]
        told = [*before, *(rates for at, rates in self._rates if first < at <= last)]
        found = {}
        for place, group in enumerate(group for each in self._optimizers for group in each.param_groups):
            values = [rates[place] for rates in told if place < len(rates)]
            known = [value for value in values if value is not None]
            if known and any(id(parameter) in own for parameter in group["params"]):
                found[_name(place)] = (min(known), max(known))
        return found

    def read_gradients(self, optimizer: Optimizer) -> None:
        """Take in the norm of all gradients of an optimizer, as they are now."""
        norm = gradient_norm(optimizer)
        if norm is not None:
            self._norms[optimizer] = norm

    def heard(self, norm: Number) -> None:
        """Take in the norm of the gradients that the watch has read."""
        self._means["watched_grad_norm"].add(norm)

    def take_in(self, **values: object) -> None:
        """One step's numbers; several optimizers' gradients are taken together.

        Raises:
            ConfigError: one of them is no number.
        """
        if self._norms:
            self._means[_READ].add(_number("grad_norm", get_total_norm(self._norms.values())))
            self._norms = {}
        for name, value in values.items():
            if value is not None:
                self._means[name].add(_number(name, value))

    def learning_rates(self) -> dict[str, float]:
        """The learning rate of each parameter group, as it is now: ``lr``, then ``lr/1``, ``lr/2`` …."""
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        rates = [_rate(group.get("lr"), waits=True) for group in groups]
        return {_name(place): rate for place, rate in enumerate(rates) if rate is not None}

    def close(self) -> dict[str, float]:
        """The numbers of the window that closes; a gradient norm that was told counts before those that were read."""
        means = {name: mean.take() for name, mean in self._means.items()}
        read = means.pop(_READ)
        if means["grad_norm"] is None:
            means["grad_norm"] = read
        return {name: value for name, value in means.items() if value is not None} | self.learning_rates()


@torch.no_grad()
def gradient_norm(optimizer: Optimizer) -> Tensor | None:
    """The 2-norm of all gradients of an optimizer; on their device, which is not waited for.

    Gradients that a ``GradScaler`` leaves scaled, for a fused optimizer, are told as they are without the scale.

    Returns:
        A scalar; ``None`` where there is no gradient, or one is spread over processes.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients or any(type(gradient) is not Tensor for gradient in gradients):
        return None
    dense = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]
    norm = get_total_norm(dense)
    scale = getattr(optimizer, "grad_scale", None)
    return norm if scale is None else norm / scale


def _name(place: int) -> str:
    """Of a parameter group's learning rate."""
    return f"lr/{place}" if place else "lr"


def _rate(value: object, *, waits: bool = False) -> float | None:
    """A learning rate; ``None`` for one that is no number (some optimizers find it themselves), or on a device."""
    if isinstance(value, Tensor) and not waits and value.device.type != "cpu":
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return None


def _number(name: str, value: object) -> Number:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value.item()) if value.device.type == "cpu" else value.detach().reshape(()).to(torch.float32)
    if not isinstance(value, Tensor | str):
        with suppress(TypeError, ValueError):
            return float(value)  # type: ignore[arg-type]  # what has no number in it raises
    found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise ConfigError(f"step({name}=…) expects a number or a tensor of one element, found {found}.")
