"""Where a module's slope is not zero, read with autograd on a grid of pre-activations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from relu_doctor.errors import UnsupportedModelError
from relu_doctor.observe.models.state import ModelState
from relu_doctor.observe.rectifiers.custom import interval_text, output_like
from relu_doctor.observe.rectifiers.kinds import Rectifier
from relu_doctor.observe.rectifiers.transforms import outside_of_transforms, without_vmap

_LOOK = 10.0  # pre-activations are tried from minus this to this
_FARTHER = 5  # powers of ten that are tried where nothing fires there
_VALUES = 2**22  # values that a module is given at a time


def probe(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], pre: Tensor) -> tuple[Rectifier, str]:
    """Find the interval on which a module's slope is not zero: bisected to 1e-9, and for each unit by itself.

    Args:
        module: it is left as it was.
        args: as it is called.
        kwargs: as it is called.
        pre: which of the arguments is the pre-activation; its values play no part.

    Returns:
        The rectifier, and a sentence that tells what was found.

    Raises:
        UnsupportedModelError: the slope cannot be had, is zero everywhere, or is not zero on several intervals.
    """
    name = type(module).__name__
    restore = ModelState(module).keep()
    plain = without_vmap(pre)
    try:
        with outside_of_transforms(), torch.inference_mode(False), torch.enable_grad(), _real_graph():
            rest = tuple((pre if plain is None else plain).shape[1:])
            low, high = _Probing(module, args, kwargs, pre).intervals(rest)
    finally:
        restore()
    told = f"{name}: its slope was probed on [-{_LOOK:g}, {_LOOK:g}]"
    if bool((low == low.max()).all()) and bool((high == high.max()).all()):
        rectifier = Rectifier(type(module), float(low.max()), float(high.max()))
        return rectifier, f"{told}: {interval_text(rectifier)}"
    ends = (Rectifier(type(module), float(edge(low)), float(edge(high))) for edge in (torch.min, torch.max))
    first, last = (interval_text(rectifier) for rectifier in ends)

    def fires(values: Tensor) -> Tensor:
        lowest, highest = (
            edge.to(values.device, torch.promote_types(values.dtype, torch.float32)) for edge in (low, high)
        )
        return (values > lowest) & (values < highest)

    varying = replace(Rectifier(type(module)), fires=fires, selects=True)
    return varying, f"{told}, unit by unit: from one that {first} to one that {last}"


def _real_graph() -> saved_tensors_hooks:
    """A graph that holds what autograd saves, inside of one that does not."""
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


class _Probing:
    """Asks one module for its slope.

    Args:
        module: whose.
        args: as it is called.
        kwargs: as it is called.
        pre: which of the arguments is replaced.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], pre: Tensor) -> None:
        self.module, self.args, self.kwargs, self.pre = module, args, kwargs, pre
        self.name = type(module).__name__
        own = next((tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()), None)
        self.dtype = torch.float64 if own is None else own.dtype

    def intervals(self, rest: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The edges of the firing interval of each value of one input.

        Args:
            rest: shape of one input. Axes along which a module treats all values alike are cut short, to be quick.

        Returns:
            The low and the high edges, float64, of that shape, but 1 along the axes where they are all alike.
        """
        short = tuple(min(size, 2) for size in rest)
        shapes = dict.fromkeys([(*rest[:1], *short[1:]), (*short[:-1], *rest[-1:]), rest])
        error: UnsupportedModelError | None = None
        for shape in shapes:
            try:
                low, high = self._edges(shape)
            except UnsupportedModelError as raised:
                error = error or raised
                continue
            for axis, size in enumerate(shape):
                first = [edge.narrow(axis, 0, 1) for edge in (low, high)]
                if bool((low == first[0]).all()) and bool((high == first[1]).all()):
                    low, high = first
                elif size != rest[axis]:
                    break
            else:
                return low, high
        raise error or UnsupportedModelError(
            f"{self.name} fires where something else than its input decides; tell where with "
            f"rectifiers=[Rectifier({self.name}, fires=…)]."
        )

    def _edges(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        grid = torch.linspace(-_LOOK, _LOOK, 2001, dtype=torch.float64)
        far = torch.logspace(1, _FARTHER, 33, dtype=torch.float64)
        low, high = self._edges_on(grid, shape)
        if bool(low.isnan().all()):
            raise UnsupportedModelError(f"{self.name} has slope zero on all of [-10, 10]: it is no rectifier.")
        if bool(low.isnan().any()):
            beyond = self._edges_on(torch.cat([-far.flip(0), grid[1:-1], far]), shape)
            low, high = (torch.where(near.isnan(), wide, near) for near, wide in zip((low, high), beyond, strict=True))
        if bool(low.isnan().any()):
            raise UnsupportedModelError(
                f"{self.name} has slope zero everywhere for some of its units, as far as it was probed; tell where it "
                f"fires with rectifiers=[Rectifier({self.name}, fires=…)]."
            )
        return low, high

    def _edges_on(self, grid: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The edges as a grid shows them, NaN where nothing fires on it."""
        fires = self._fires(grid, shape)
        count = fires.sum(0)
        first = fires.int().argmax(0)
        last = len(grid) - 1 - fires.flip(0).int().argmax(0)
        if bool((last - first + 1 - count > 2)[count > 0].any()):  # it may vanish at a point inside, as that of z² at 0
            raise UnsupportedModelError(
                f"{self.name} fires on more than one interval; tell where with rectifiers=[Rectifier({self.name}, "
                f"fires=…)], or name one with rectifiers={{{self.name}: (low, high)}}."
            )
        low = self._bisected(grid[(first - 1).clamp_min(0)], grid[first])
        high = self._bisected(grid[(last + 1).clamp_max(len(grid) - 1)], grid[last])
        low = torch.where(first == 0, -math.inf, low)
        high = torch.where(last == len(grid) - 1, math.inf, high)
        return torch.where(count > 0, low, math.nan), torch.where(count > 0, high, math.nan)

    def _bisected(self, outside: Tensor, inside: Tensor) -> Tensor:
        """The edges of the firing region, each between a silent and a firing point."""
        while bool(((inside - outside).abs() > 1e-9).any()):
            middle = (inside + outside) / 2
            if bool(((middle == inside) | (middle == outside)).all()):
                break
            fires = self._slopes(middle[None])[0]
            inside, outside = torch.where(fires, middle, inside), torch.where(fires, outside, middle)
        return (outside * 1e6).round() / 1e6 + 0.0

    def _fires(self, grid: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Bool (grid, *shape): where the slope is not zero."""
        chunk = max(1, _VALUES // max(1, math.prod(shape)))
        view = (-1, *(1 for _ in shape))
        return torch.cat([self._slopes(points.view(view).expand(-1, *shape)) for points in grid.split(chunk)])

    def _slopes(self, points: Tensor) -> Tensor:
        try:
            leaf = points.to(self.pre.device, self.dtype).clone().requires_grad_()
            given = leaf * 1  # which the module may write to
            output = output_like(
                given, self.module.forward(*self._with(given, self.args), **self._with(given, self.kwargs))
            )
            if output is None:
                raise TypeError("it returns no tensor")
            (slope,) = torch.autograd.grad(output.sum(), leaf)
        except Exception as error:
            raise UnsupportedModelError(
                f"the slope of {self.name} could not be probed ({type(error).__name__}: {error}). Name its firing "
                f"interval, rectifiers={{{self.name}: (low, high)}}, or tell where it fires, "
                f"rectifiers=[Rectifier({self.name}, fires=…)]."
            ) from error
        return (slope != 0).cpu()

    def _with(self, given: Tensor, arguments: Any) -> Any:
        """Arguments with the pre-activation replaced."""
        if isinstance(arguments, Mapping):
            return {name: given if value is self.pre else value for name, value in arguments.items()}
        return tuple(given if value is self.pre else value for value in arguments)
