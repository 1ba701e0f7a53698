"""The user's own rectifiers: classes to be probed, firing intervals, and functions that tell where a module fires."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from relu_doctor.errors import UnsupportedModelError
from relu_doctor.observe.inputs.feeding import tensors_in
from relu_doctor.observe.rectifiers.kinds import Fires, Rectifier

Custom = Iterable[type[nn.Module] | Rectifier] | Mapping[type[nn.Module], tuple[float, float]]


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


def output_like(pre: Tensor, output: object) -> Tensor | None:
    """The tensor of an output that is of a pre-activation's type and shape, as far as one is; ``None`` without any."""
    tensors = sorted(tensors_in(output), key=lambda tensor: (tensor.dtype != pre.dtype, tensor.shape != pre.shape))
    return tensors[0] if tensors else None


def fires_by(name: str, fires: Fires, pre: Tensor, post: Tensor, module: nn.Module | None = None) -> Tensor:
    """Ask the user's function where something fired.

    Args:
        name: what it is, for the message of an error.
        fires: the user's function of (pre, post, module), or of fewer.
        pre: the pre-activation.
        post: the output.
        module: that was called, if it was one.

    Returns:
        A boolean tensor of the shape of ``pre`` or of ``post``.

    Raises:
        UnsupportedModelError: it raised, or returned something else.
    """
    given = (pre, post) if module is None else (pre, post, module)
    words = "the pre-activation and the output" if module is None else "the pre-activation, the output and the module"
    try:
        mask: object = fires(*given[: _positional(fires)])
    except Exception as error:
        raise UnsupportedModelError(
            f"fires= of {name} raised {type(error).__name__}: {error}; it is called with {words}, as many of them as "
            "it takes."
        ) from error
    if isinstance(mask, Tensor) and mask.shape in {pre.shape, post.shape}:
        like = pre if mask.shape == pre.shape else post
    elif isinstance(mask, Tensor) and pre.shape == post.shape and _spreads(mask.shape, pre.shape):
        like = pre
    else:
        found = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedModelError(
            f"fires= of {name} must return a boolean tensor of the shape of its input {tuple(pre.shape)} or of its "
            f"output {tuple(post.shape)}, found {found}."
        )
    return (mask.detach() != 0) & torch.ones_like(like, dtype=torch.bool)


def _spreads(shape: torch.Size, wider: torch.Size) -> bool:
    """Whether a tensor of one shape is broadcast to another."""
    try:
        return bool(torch.broadcast_shapes(shape, wider) == wider)
    except RuntimeError:
        return False


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
    if pre.numel() < 8 or not bool((silent & (pre != 0)).any()) or bool(silent.all()):
        return False  # zeros that were there before are not its doing
    return bool(pre[silent].max() <= pre[~silent].min())
