"""Rectifiers: where each one's slope is not zero, and how calls to them are recognised.

A unit *fires* where the slope of its rectifier is not zero: z > 0 for ReLU, 0 < z < 6 for ReLU6. A rectifier whose
slope is zero nowhere (Leaky ReLU, GELU, …) cannot hold a unit dead: it is listed and measured, never called dead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relu_doctor.errors import UnsupportedModelError

Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Rectifier:
    """An activation function as a diagnosis sees it.

    Attributes:
        name: as torch spells it: ``ReLU`` for the module, ``relu`` for the function.
        low, high: the open interval of pre-activations in which its slope is not zero.
    """

    name: str
    low: float = 0.0
    high: float = math.inf

    @property
    def can_die(self) -> bool:
        """Whether there is a low side on which the slope is zero."""
        return self.low > -math.inf

    def fired(self, pre: Tensor) -> Tensor:
        """Where pre-activations lie in the firing interval; NaN does not."""
        if self.high == math.inf:
            return pre > self.low
        return (pre > self.low) & (pre < self.high)


Reader = Callable[[str, tuple[Any, ...], Mapping[str, Any]], Rectifier | None]


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, name: str, default: Any) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


def _relu(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rectifier | None:
    return Rectifier(name)


def _relu6(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rectifier | None:
    return Rectifier(name, 0.0, 6.0)


def _hardswish(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rectifier | None:
    return Rectifier(name, -3.0)


def _cannot_die(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rectifier | None:
    return Rectifier(name, -math.inf)


def _threshold(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rectifier | None:
    threshold = _argument(args, kwargs, 1, "threshold", None)
    return Rectifier(name, float(threshold)) if isinstance(threshold, int | float) else None


def _hardtanh(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rectifier | None:
    low, high = _argument(args, kwargs, 1, "min_val", -1.0), _argument(args, kwargs, 2, "max_val", 1.0)
    return Rectifier(name, 0.0, float(high)) if low == 0 and high > 0 else None


def _clamp(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rectifier | None:
    low, high = _argument(args, kwargs, 1, "min", None), _argument(args, kwargs, 2, "max", None)
    if not isinstance(low, int | float) or low != 0 or not (high is None or isinstance(high, int | float)):
        return None
    return Rectifier(name, 0.0, math.inf if high is None else float(high))


def _functions() -> dict[Function, tuple[str, Reader]]:
    found: dict[Function, tuple[str, Reader]] = {}

    def add(reader: Reader, *names: str) -> None:
        for name in names:
            for owner in (F, torch, torch.Tensor, torch._C._nn):
                function = getattr(owner, name, None)
                if callable(function):
                    found[function] = (name.rstrip("_").lstrip("_"), reader)

    add(_relu, "relu", "relu_")
    add(_relu6, "relu6")
    add(_clamp, "clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_min_")
    add(_threshold, "threshold", "threshold_", "_threshold")
    add(_hardtanh, "hardtanh", "hardtanh_")
    add(_hardswish, "hardswish", "hardswish_")
    add(_cannot_die, "leaky_relu", "leaky_relu_", "prelu", "rrelu", "rrelu_", "elu", "elu_", "selu", "selu_", "celu")
    add(_cannot_die, "celu_", "gelu", "silu", "silu_", "mish", "mish_", "softplus")
    return found


_KNOWN: dict[Function, tuple[str, Reader]] = _functions()
MODULES: tuple[type[nn.Module], ...] = (
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    nn.Threshold,
    nn.Hardswish,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Softplus,
)
GENERIC = frozenset(
    {"clamp", "clip", "clamp_min", "threshold", "hardtanh"}
)  # also used for other ends: need a producer


def rectifies(module: nn.Module) -> bool:
    """Whether a module applies a rectifier when it is called, as far as its class tells."""
    if isinstance(module, nn.Hardtanh) and not isinstance(module, nn.ReLU6):
        return module.min_val == 0
    return isinstance(module, MODULES) or (isinstance(module, nn.RNN) and module.nonlinearity == "relu")


def recognise(
    function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[str, Rectifier, Tensor] | None:
    """Whether a torch call applies a rectifier.

    Returns:
        The function's name, the rectifier and the pre-activation; ``None`` for any other call.
    """
    known = _KNOWN.get(function)
    if known is None:
        return None
    name, reader = known
    pre = _argument(args, kwargs, 0, "input", None)
    if not isinstance(pre, Tensor) or not pre.dtype.is_floating_point:
        return None
    rectifier = reader(name, args, kwargs)
    return None if rectifier is None else (name, rectifier, pre)


Custom = Iterable[type[nn.Module]] | Mapping[type[nn.Module], tuple[float, float]]


def custom_rectifiers(given: Custom) -> dict[type[nn.Module], tuple[float, float] | None]:
    """The user's own rectifier classes, to their firing interval, or ``None`` where it is still to be probed."""
    if isinstance(given, Mapping):
        return {cls: (float(low), float(high)) for cls, (low, high) in given.items()}
    classes: list[Any] = list(given)
    for cls in classes:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise UnsupportedModelError(
                f"rectifiers= expects nn.Module classes or a mapping of them to (low, high), found {cls!r}."
            )
    return dict.fromkeys(classes)


def probe_interval(module: nn.Module) -> tuple[float, float]:
    """The interval on which a module's slope is not zero, read with autograd on a grid from -10 to 10 in steps of 0.01.

    Raises:
        UnsupportedModelError: the module is not elementwise, or its firing region is no single interval.
    """
    grid = torch.linspace(-10, 10, 2001, dtype=torch.float64)
    points = grid.clone().requires_grad_()
    try:
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(module(points * 1).sum(), points)
    except Exception as error:
        raise UnsupportedModelError(
            f"the slope of {type(module).__name__} could not be probed ({type(error).__name__}: {error}). "
            f"Name its firing interval: rectifiers={{{type(module).__name__}: (low, high)}}."
        ) from error
    fires = slope != 0
    if not bool(fires.any()):
        raise UnsupportedModelError(f"{type(module).__name__} has slope zero on all of [-10, 10]: it is no rectifier.")
    inside = fires.nonzero().flatten()
    first, last = int(inside[0]), int(inside[-1])
    if last - first + 1 - len(inside) > 2:
        raise UnsupportedModelError(
            f"{type(module).__name__} fires on more than one interval; name one with "
            f"rectifiers={{{type(module).__name__}: (low, high)}}."
        )
    low = -math.inf if first == 0 else float(grid[first - 1])
    high = math.inf if last == len(grid) - 1 else float(grid[last + 1])
    return round(low, 6), round(high, 6)
