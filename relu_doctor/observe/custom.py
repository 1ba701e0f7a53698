"""The user's own rectifiers: classes to be probed, firing intervals, and functions that tell where a module fires."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from relu_doctor.errors import UnsupportedModelError
from relu_doctor.observe.rectifiers import Fires, Rectifier

Custom = Iterable[type[nn.Module] | Rectifier] | Mapping[type[nn.Module], tuple[float, float]]

_LOOK = 10.0  # pre-activations are tried from minus this to this


def custom_rectifiers(given: Custom) -> dict[type[nn.Module], Rectifier | None]:
    """The user's own rectifier classes, and how each fires; ``None`` where that is still to be probed.

    Raises:
        UnsupportedModelError: something is no module class, or an interval is none.
    """
    if isinstance(given, Mapping):
        return {_checked(cls): _of_interval(cls, interval) for cls, interval in given.items()}
    items = [given] if isinstance(given, type | Rectifier) else list(given)
    found: dict[type[nn.Module], Rectifier | None] = {}
    for item in items:
        if isinstance(item, Rectifier):
            found[_checked(item.applied)] = replace(item, selects=item.selects or item.fires is not None)
        else:
            found[_checked(item)] = None
    return found


def _checked(cls: object) -> type[nn.Module]:
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise UnsupportedModelError(
            "rectifiers= expects nn.Module classes, Rectifier(MyGate, fires=…) or a mapping of classes to (low, high), "
            f"found {cls!r}."
        )
    return cls


def _of_interval(cls: type[nn.Module], interval: object) -> Rectifier:
    edges = list(interval) if isinstance(interval, Sequence) else []
    numbers = [float(edge) for edge in edges if isinstance(edge, int | float)]
    if not len(numbers) == len(edges) == 2 or not numbers[0] < numbers[1]:
        raise UnsupportedModelError(
            f"rectifiers= expects the firing interval of {_checked(cls).__name__} as (low, high) with low < high, "
            f"found {interval!r}."
        )
    return Rectifier(_checked(cls), numbers[0], numbers[1])


def interval_text(rectifier: Rectifier) -> str:
    """Where a rectifier fires, in a few words: ``fires where z > 0``."""
    if rectifier.low == -math.inf and rectifier.high == math.inf:
        return "its slope is zero nowhere"
    low = "" if rectifier.low == -math.inf else f"{rectifier.low:g} < "
    if rectifier.high == math.inf:
        return f"fires where z > {rectifier.low:g}"
    return f"fires where {low}z < {rectifier.high:g}"


def fires_by(module: nn.Module, fires: Fires, pre: Tensor, post: Tensor) -> Tensor:
    """Ask the user's function where a module fired.

    Args:
        module: that was called.
        fires: the user's function of (pre, post, module), or of fewer.
        pre: what the module was given.
        post: what it returned.

    Returns:
        A boolean tensor of the shape of ``pre`` or of ``post``.

    Raises:
        UnsupportedModelError: it raised, or returned something else.
    """
    name = type(module).__name__
    given = (pre, post, module)
    try:
        mask: object = fires(*given[: _positional(fires)])
    except Exception as error:
        raise UnsupportedModelError(
            f"fires= of {name} raised {type(error).__name__}: {error}; it is called with the pre-activation, the "
            "output and the module, as many of them as it takes."
        ) from error
    if not isinstance(mask, Tensor) or mask.shape not in {pre.shape, post.shape}:
        found = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedModelError(
            f"fires= of {name} must return a boolean tensor of the shape of its input {tuple(pre.shape)} or of its "
            f"output {tuple(post.shape)}, found {found}."
        )
    return mask.detach() != 0


def _positional(function: Fires) -> int:
    """How many of (pre, post, module) a function takes."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return 2
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return 3
    kinds = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    positional = [parameter for parameter in parameters if parameter.kind in kinds]
    required = [parameter for parameter in positional if parameter.default is parameter.empty]
    return min(3, max(len(required), min(len(positional), 2)))


@torch.no_grad()
def looks_like_a_rectifier(module: nn.Module, pre: Tensor, post: object) -> bool:
    """Whether a module of the user's own has a rectifier's name, or is zero below some value and nowhere above it.

    Args:
        module: that was called.
        pre: what it was given.
        post: what it returned.
    """
    if type(module).__module__.split(".")[0] == "torch" or any(True for _ in module.children()):
        return False
    if "relu" in type(module).__name__.lower():
        return True
    if not isinstance(post, Tensor) or post is pre or post.shape != pre.shape or not pre.is_floating_point():
        return False
    silent = post == 0
    if pre.numel() < 8 or not bool(silent.any()) or bool(silent.all()):
        return False
    return bool(pre[silent].max() <= pre[~silent].min())


def probe_interval(module: nn.Module) -> tuple[float, float]:
    """The interval on which a module's slope is not zero, read with autograd on a grid from -10 to 10 and bisected.

    Raises:
        UnsupportedModelError: the module is not elementwise, or its firing region is no single interval.
    """
    name = type(module).__name__
    grid = torch.linspace(-_LOOK, _LOOK, 2001, dtype=torch.float64)
    fires = _slope(module, grid)
    inside = fires.nonzero().flatten()
    if not len(inside):
        raise UnsupportedModelError(f"{name} has slope zero on all of [-10, 10]: it is no rectifier.")
    first, last = int(inside[0]), int(inside[-1])
    if last - first + 1 - len(inside) > 2:  # the slope may vanish at a point inside, as that of z² at 0
        raise UnsupportedModelError(
            f"{name} fires on more than one interval; tell where with rectifiers=[Rectifier({name}, fires=…)], or name "
            f"one with rectifiers={{{name}: (low, high)}}."
        )
    low = -math.inf if first == 0 else _edge(module, float(grid[first - 1]), float(grid[first]))
    high = math.inf if last == len(grid) - 1 else _edge(module, float(grid[last + 1]), float(grid[last]))
    return low, high


def _slope(module: nn.Module, points: Tensor) -> Tensor:
    """Where a module's slope is not zero."""
    name = type(module).__name__
    like = next((tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()), None)
    try:
        with torch.enable_grad():
            leaf = (points if like is None else points.to(like)).clone().requires_grad_()
            (slope,) = torch.autograd.grad(module(leaf * 1).sum(), leaf)
    except Exception as error:
        raise UnsupportedModelError(
            f"the slope of {name} could not be probed ({type(error).__name__}: {error}). Name its firing interval: "
            f"rectifiers={{{name}: (low, high)}}."
        ) from error
    return (slope != 0).cpu()


def _edge(module: nn.Module, outside: float, inside: float) -> float:
    """The edge of the firing region between a silent and a firing point, to 1e-9."""
    while abs(inside - outside) > 1e-9:
        middle = (inside + outside) / 2
        if bool(_slope(module, torch.tensor([middle], dtype=torch.float64))):
            inside = middle
        else:
            outside = middle
    return round(outside, 6) + 0.0
