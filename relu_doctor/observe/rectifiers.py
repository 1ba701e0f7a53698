"""Rectifiers: where each one's slope is not zero, and how calls to them are recognised.

A unit *fires* where the slope of its rectifier is not zero: z > 0 for ReLU, 0 < z < 6 for ReLU6. A rectifier whose
slope is zero nowhere (Leaky ReLU, GELU, …) cannot hold a unit dead: it is listed and measured, never called dead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Function = Callable[..., Any]


Fires = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Rectifier:
    """An activation function as a diagnosis sees it.

    Give one to :func:`relu_doctor.scan` to name a module of your own: ``rectifiers=[Rectifier(MyGate, fires=…)]``.

    Attributes:
        applied: the module class, or a name as torch spells it: ``ReLU`` for the module, ``relu`` for the function.
        low, high: the open interval of pre-activations in which its slope is not zero.
        clips: its output is the pre-activation itself inside the interval and the nearer edge outside, as that of
            ReLU and ReLU6 is; then the output's statistics follow from the pre-activation's.
        fires: tells where it fires instead of the interval: called with the pre-activation, the output and the
            module, as many of them as it takes; returns a boolean tensor of the pre-activation's shape, or of the
            output's, whose units are then the output's.
        selects: something beside the interval decides what fires: a top-k, a learned threshold, ``fires``.
        on_output: only its output is seen, not its pre-activation; it fires where the output is positive.

    >>> import torch, relu_doctor
    >>> class Gate(torch.nn.Module):
    ...     def forward(self, z):
    ...         return torch.where(z.abs() > 1, z, 0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), Gate())
    >>> gate = relu_doctor.Rectifier(Gate, fires=lambda pre, post: post != 0)
    >>> relu_doctor.scan(model, torch.randn(2000, 4), rectifiers=[gate]).sites["num_units"].tolist()
    [3]
    """

    applied: str | type[nn.Module]
    low: float = 0.0
    high: float = math.inf
    clips: bool = False
    fires: Fires | None = None
    selects: bool = False
    on_output: bool = False

    @property
    def name(self) -> str:
        """What is applied, in one word."""
        return self.applied if isinstance(self.applied, str) else self.applied.__name__

    @property
    def can_die(self) -> bool:
        """Whether a unit can be held where its slope is zero."""
        return self.low > -math.inf or self.selects

    def fired(self, pre: Tensor) -> Tensor:
        """Where pre-activations lie in the firing interval; NaN does not."""
        if self.high == math.inf:
            return pre > self.low
        return (pre > self.low) & (pre < self.high)


ANY = Rectifier("", -math.inf, selects=True)  # something other than an interval decides

Reader = Callable[[str, tuple[Any, ...], Mapping[str, Any]], Rectifier | None]


def argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    return args[position] if len(args) > position else kwargs.get(name, default)


def _relu(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rectifier | None:
    return Rectifier(name, clips=True)


def _relu6(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rectifier | None:
    return Rectifier(name, 0.0, 6.0, clips=True)


def _hardswish(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rectifier | None:
    return Rectifier(name, -3.0)


def _cannot_die(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rectifier | None:
    return Rectifier(name, -math.inf)


def _sloped(keyword: str, default: float) -> Reader:
    """Reads a function whose slope below zero is an argument; where that is 0, it is a ReLU."""

    def read(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rectifier | None:
        slope = argument(args, kwargs, 1, keyword, default)
        flat = isinstance(slope, int | float) and slope == 0
        return Rectifier(name, clips=True) if flat else Rectifier(name, -math.inf)

    return read


def _threshold(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rectifier | None:
    threshold = argument(args, kwargs, 1, "threshold", None)
    return Rectifier(name, float(threshold)) if isinstance(threshold, int | float) else None


def _hardtanh(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rectifier | None:
    low, high = argument(args, kwargs, 1, "min_val", -1.0), argument(args, kwargs, 2, "max_val", 1.0)
    return Rectifier(name, 0.0, float(high), clips=True) if low == 0 and high > 0 else None


def _clamp(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rectifier | None:
    low, high = argument(args, kwargs, 1, "min", None), argument(args, kwargs, 2, "max", None)
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
    add(_sloped("negative_slope", 0.01), "leaky_relu", "leaky_relu_")
    add(_sloped("alpha", 1.0), "elu", "elu_")
    add(_cannot_die, "prelu", "rrelu", "rrelu_", "selu", "selu_", "celu", "celu_", "gelu", "silu", "silu_", "mish")
    add(_cannot_die, "mish_", "softplus")
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
# Also used for other ends: such a call is a site only where parameters feed it.
GENERIC = frozenset(
    {"clamp", "clip", "clamp_min", "threshold", "hardtanh", "maximum", "fmax", "max", "where", "mul", "multiply"}
    | {"masked_fill", "__setitem__", "topk"}
)


def rectifies(module: nn.Module) -> bool:
    """Whether a module applies a rectifier when it is called, as far as its class tells."""
    if isinstance(module, nn.Hardtanh) and not isinstance(module, nn.ReLU6):
        return module.min_val == 0
    return isinstance(module, MODULES) or (isinstance(module, nn.RNN) and module.nonlinearity == "relu")


@dataclass(slots=True)
class Applied:
    """A torch call that applies a rectifier.

    Attributes:
        name: of the function.
        rectifier: what is applied.
        pre: to what.
        fires: where it fires, of the shape of ``pre``, where no interval tells.
        in_place: the call returns nothing and writes its output over ``pre``.
    """

    name: str
    rectifier: Rectifier
    pre: Tensor
    fires: Tensor | None = None
    in_place: bool = False


def recognise(function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Applied | None:
    """Whether a torch call applies a rectifier by itself; ``None`` for any other call."""
    known = _KNOWN.get(function)
    if known is None:
        return None
    name, reader = known
    pre = argument(args, kwargs, 0, "input", None)
    if not isinstance(pre, Tensor) or not pre.dtype.is_floating_point:
        return None
    rectifier = reader(name, args, kwargs)
    return None if rectifier is None else Applied(name, rectifier, pre)
