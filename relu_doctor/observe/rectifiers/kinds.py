"""Rectifiers: where each one's slope is not zero, and how calls to them are recognised.

A unit *fires* where the slope of its rectifier is not zero: z > 0 for ReLU, 0 < z < 6 for ReLU6. A rectifier whose
slope is zero nowhere (Leaky ReLU, GELU, …) cannot hold a unit dead: it is listed and measured, never called dead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relu_doctor.observe.rectifiers.bends import Bend

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

    @property
    def shape(self) -> tuple[float, float]:
        """Its interval but for where its edges lie, which may be data: 1 for any that is not at 0 or infinite."""
        low, high = (edge if edge == 0 or math.isinf(edge) else 1.0 for edge in (self.low, self.high))
        return low, high

    def fired(self, pre: Tensor) -> Tensor:
        """Where pre-activations lie in the firing interval; NaN does not."""
        if self.high == math.inf:
            return pre > self.low
        return (pre > self.low) & (pre < self.high)


_EDGES = (0.0, -3.0, 6.0, -math.inf, math.inf)  # the same in all types of numbers
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


def _rrelu(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rectifier | None:
    slopes = argument(args, kwargs, 1, "lower", 1 / 8), argument(args, kwargs, 2, "upper", 1 / 3)
    return Rectifier(name, clips=True) if slopes == (0, 0) else Rectifier(name, -math.inf)


def _clipped(name: str, low: object, high: object) -> Rectifier | None:
    """What clips at zero: from below, or from above."""
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    if not isinstance(low, int | float) or not isinstance(high, int | float) or not low < high or 0 not in (low, high):
        return None
    return Rectifier(name, float(low), float(high), clips=True)


def _hardtanh(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rectifier | None:
    return _clipped(name, argument(args, kwargs, 1, "min_val", -1.0), argument(args, kwargs, 2, "max_val", 1.0))


def _clamp(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rectifier | None:
    return _clipped(name, argument(args, kwargs, 1, "min", None), argument(args, kwargs, 2, "max", None))


def _clamp_max(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rectifier | None:
    return _clipped(name, None, argument(args, kwargs, 1, "max", None))


def _shrink(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rectifier | None:
    return replace(ANY, applied=name)


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
    add(_clamp_max, "clamp_max", "clamp_max_")
    add(_shrink, "softshrink", "hardshrink")
    add(_threshold, "threshold", "threshold_", "_threshold")
    add(_hardtanh, "hardtanh", "hardtanh_")
    add(_hardswish, "hardswish", "hardswish_")
    add(_sloped("negative_slope", 0.01), "leaky_relu", "leaky_relu_")
    add(_sloped("alpha", 1.0), "elu", "elu_")
    add(_cannot_die, "prelu", "selu", "selu_", "celu", "celu_", "gelu", "silu", "silu_", "mish", "mish_", "softplus")
    add(_rrelu, "rrelu", "rrelu_")
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
    nn.Softshrink,
    nn.Hardshrink,
)
# Also used for other ends: such a call is a site only where parameters feed it.
GENERIC = frozenset(
    {"clamp", "clip", "clamp_min", "threshold", "hardtanh", "maximum", "fmax", "max", "where", "mul", "multiply"}
    | {"masked_fill", "__setitem__", "topk", "clamp_max", "minimum", "fmin", "min", "add", "sub", "rsub"}
)


def rectifies(module: nn.Module) -> bool:
    """Whether a module applies a rectifier when it is called, as far as its class tells."""
    if isinstance(module, nn.Hardtanh) and not isinstance(module, nn.ReLU6):
        return module.min_val == 0 or module.max_val == 0
    return isinstance(module, MODULES) or (isinstance(module, nn.RNN) and module.nonlinearity == "relu")


def quantised_modules(model: nn.Module) -> list[str]:
    """The modules that compute with quantised weights or values, which is not supported: paths, and their classes."""
    found: list[str] = []
    for path, module in model.named_modules():
        name = f"{type(module).__module__}.{type(module).__name__}"
        if isinstance(module, torch.jit.ScriptModule):
            name = str(module._c.qualified_name)
        cls = name.rpartition(".")[2]
        if ".quantized." in name and cls not in {"Quantize", "DeQuantize", "LinearPackedParams"}:
            found.append(f"{path} ({cls})")
    return found


@dataclass(slots=True)
class Applied:
    """A torch call that applies a rectifier.

    Attributes:
        name: of the function.
        rectifier: what is applied.
        pre: to what.
        fires: where it fires, of the shape of ``pre``, where no interval tells.
        written: what the call writes its output to, where it returns nothing.
        flipped: it is flat above: the rectifier is what it is of ``-pre``.
        bend: what the output is of ``pre``, where that does not follow from the rectifier.
        replaces: calls of rectifiers that are parts of this one.
    """

    name: str
    rectifier: Rectifier
    pre: Tensor
    fires: Tensor | None = None
    written: Tensor | None = None
    flipped: bool = False
    bend: Bend | None = None
    replaces: tuple[int, ...] = ()


def name_of(function: Function) -> str | None:
    """The name of a torch function that rectifies for some arguments; ``None`` for any other."""
    known = _KNOWN.get(function)
    return None if known is None else known[0]


def rounded(value: float, dtype: torch.dtype) -> float:
    """A threshold as a comparison with values of a type takes it."""
    return torch.tensor(value, dtype=dtype).item() if value and dtype.is_floating_point else value


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
    if rectifier is None:
        return None
    if rectifier.high == 0:
        return Applied(name, replace(rectifier, low=0.0, high=-rectifier.low), pre, flipped=True)
    if rectifier.low not in _EDGES or rectifier.high not in _EDGES:
        low, high = rounded(rectifier.low, pre.dtype), rounded(rectifier.high, pre.dtype)
        rectifier = replace(rectifier, low=low, high=high)
    fires = pre.abs() > argument(args, kwargs, 1, "lambd", 0.5) if rectifier.selects else None
    return Applied(name, rectifier, pre, fires)
