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
        clips: its output is the pre-activation itself inside the interval and the nearer edge outside, as that of
            ReLU and ReLU6 is; then the output's statistics follow from the pre-activation's.
    """

    name: str
    low: float = 0.0
    high: float = math.inf
    clips: bool = False

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
    return Rectifier(name, clips=True)


def _relu6(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rectifier | None:
    return Rectifier(name, 0.0, 6.0, clips=True)


def _hardswish(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rectifier | None:
    return Rectifier(name, -3.0)


def _cannot_die(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rectifier | None:
    return Rectifier(name, -math.inf)


def _threshold(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rectifier | None:
    threshold = _argument(args, kwargs, 1, "threshold", None)
    return Rectifier(name, float(threshold)) if isinstance(threshold, int | float) else None


def _hardtanh(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rectifier | None:
    low, high = _argument(args, kwargs, 1, "min_val", -1.0), _argument(args, kwargs, 2, "max_val", 1.0)
    return Rectifier(name, 0.0, float(high), clips=True) if low == 0 and high > 0 else None


def _clamp(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rectifier | None:
    low, high = _argument(args, kwargs, 1, "min", None), _argument(args, kwargs, 2, "max", None)
    if not isinstance(low, int | float) or low != 0 or not (high is None or isinstance(high, int | float)):
        return None
    return Rectifier(name, 0.0, math.inf if high is None else float(high), clips=True)


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
    classes: list[Any] = [given] if isinstance(given, type) else list(given)
    for cls in classes:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise UnsupportedModelError(
                f"rectifiers= expects nn.Module classes or a mapping of them to (low, high), found {cls!r}."
            )
    return dict.fromkeys(classes)


def probe_interval(module: nn.Module) -> tuple[float, float]:
    """The interval on which a module's slope is not zero, read with autograd on a grid from -10 to 10 and bisected.

    Raises:
        UnsupportedModelError: the module is not elementwise, or its firing region is no single interval.
    """
    name = type(module).__name__
    grid = torch.linspace(-10, 10, 2001, dtype=torch.float64)
    fires = _fires(module, grid)
    inside = fires.nonzero().flatten()
    if not len(inside):
        raise UnsupportedModelError(f"{name} has slope zero on all of [-10, 10]: it is no rectifier.")
    first, last = int(inside[0]), int(inside[-1])
    if last - first + 1 - len(inside) > 2:  # the slope may vanish at a point inside, as that of z² at 0
        raise UnsupportedModelError(
            f"{name} fires on more than one interval; name one with rectifiers={{{name}: (low, high)}}."
        )
    low = -math.inf if first == 0 else _edge(module, float(grid[first - 1]), float(grid[first]))
    high = math.inf if last == len(grid) - 1 else _edge(module, float(grid[last + 1]), float(grid[last]))
    return low, high


def _fires(module: nn.Module, points: Tensor) -> Tensor:
    """Where a module's slope is not zero."""
    name = type(module).__name__
    try:
        with torch.enable_grad():
            leaf = points.clone().requires_grad_()
            (slope,) = torch.autograd.grad(module(leaf * 1).sum(), leaf)
    except Exception as error:
        raise UnsupportedModelError(
            f"the slope of {name} could not be probed ({type(error).__name__}: {error}). Name its firing interval: "
            f"rectifiers={{{name}: (low, high)}}."
        ) from error
    return slope != 0


def _edge(module: nn.Module, outside: float, inside: float) -> float:
    """The edge of the firing region between a silent and a firing point, to 1e-9."""
    while abs(inside - outside) > 1e-9:
        middle = (inside + outside) / 2
        if bool(_fires(module, torch.tensor([middle], dtype=torch.float64))):
            inside = middle
        else:
            outside = middle
    return round(outside, 6) + 0.0
