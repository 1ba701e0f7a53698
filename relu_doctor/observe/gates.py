"""Rectifiers written out: ``torch.where(x > 0, x, 0)``, ``x * (x > threshold)``, ``maximum(x, 0)``, ``x[x < 0] = 0``.

None of these calls says by itself that it rectifies. A ledger remembers, for the length of one forward, which masks
come from comparing which tensor with what, which tensors are zeros, and which are the outputs of rectifiers. It holds
weak references only, so that no activation outlives its use.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from relu_doctor.observe.rectifiers import Applied, Function, Rectifier, argument

Ref = weakref.ref[Tensor]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a mask says: where ``left`` lies above ``right``.

    Attributes:
        left: the tensor that was compared.
        right: a number, or another tensor; ``None`` where ``left`` was chosen from in another way (a top-k).
        above: the mask is true where left is above right, else where it is below.
    """

    left: Ref
    right: float | Ref | None
    above: bool

    def inverted(self) -> Comparison:
        """What the opposite mask says."""
        return Comparison(self.left, self.right, not self.above)


@dataclass(eq=False, slots=True)
class Output:
    """What was made of a rectifier's output, or of a choice from it, with nothing but a change of shape in between.

    Attributes:
        index: which call of the forward it was.
        pre: what the rectifier was applied to, or what the top-k chose from.
        record: whatever the mode keeps about the call.
        chosen: it has been through a top-k or a mask.
    """

    index: int
    pre: Ref
    record: Any = None
    chosen: bool = False


@dataclass(frozen=True, slots=True)
class Chosen:
    """The indices that a top-k returned."""

    output: Output


@dataclass(frozen=True, slots=True)
class Zeros:
    """A tensor of zeros, as long as nobody writes to it."""

    version: int


@dataclass(slots=True)
class Refined:
    """A rectifier's output goes on through a mask: what fires is what passes both.

    Attributes:
        output: of which call.
        mask: where it passes, of the output's shape.
    """

    output: Output
    mask: Tensor


def _all(*names: str) -> set[Function]:
    owners = (torch, torch.Tensor, torch.nn.functional)
    return {getattr(owner, name) for name in names for owner in owners if callable(getattr(owner, name, None))}


_ABOVE = _all("gt", "ge", "greater", "greater_equal", "__gt__", "__ge__")
_BELOW = _all("lt", "le", "less", "less_equal", "__lt__", "__le__")
_SAME = _all("float", "double", "half", "bfloat16", "bool", "int", "long", "to", "type", "type_as", "detach", "clone")
_INVERTED = _all("logical_not", "bitwise_not", "__invert__")
_STEP = _all("heaviside")
_VIEWS = _all("reshape", "view", "flatten", "unflatten", "contiguous", "squeeze", "unsqueeze", "ravel", "view_as")
_ZEROS = _all("zeros", "zeros_like", "new_zeros", "tensor", "full", "full_like", "scalar_tensor")
SCATTERS = _all("scatter", "scatter_")
_FOLLOWED = {
    **dict.fromkeys(_ABOVE, "above"),
    **dict.fromkeys(_BELOW, "below"),
    **dict.fromkeys(_SAME, "same"),
    **dict.fromkeys(_INVERTED, "inverted"),
    **dict.fromkeys(_STEP, "step"),
    **dict.fromkeys(_VIEWS, "view"),
    **dict.fromkeys(_ZEROS, "zeros"),
    **dict.fromkeys(SCATTERS, "scatter"),
}
_GATES: dict[Function, str] = {
    **dict.fromkeys(_all("where"), "where"),
    **dict.fromkeys(_all("mul", "mul_", "multiply", "multiply_", "__imul__"), "mul"),
    **dict.fromkeys(_all("masked_fill", "masked_fill_"), "masked_fill"),
    **dict.fromkeys(_all("__setitem__"), "__setitem__"),
    **dict.fromkeys(_all("maximum"), "maximum"),
    **dict.fromkeys(_all("fmax"), "fmax"),
    **dict.fromkeys(_all("max"), "max"),
}
SHAPES = _VIEWS | _SAME | _ZEROS  # calls that make nothing new of a rectifier's output


class Ledger:
    """What one forward has made so far of masks, zeros and rectifiers' outputs."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Ref, Any]] = {}

    def note(self, tensor: object, what: Comparison | Output | Chosen | Zeros) -> None:
        """Remember what a tensor is."""
        if isinstance(tensor, Tensor):
            self._known[id(tensor)] = (weakref.ref(tensor), what)

    def about(self, tensor: object) -> Comparison | Output | Chosen | Zeros | None:
        """What a tensor is, if that was noted."""
        reference, what = self._known.get(id(tensor), (None, None))
        return what if reference is not None and reference() is tensor else None

    def output(self, tensor: object) -> Output | None:
        """The rectifier or top-k whose output a tensor is."""
        what = self.about(tensor)
        return what if isinstance(what, Output) else None

    def follow(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Note what came out of a call that applies no rectifier."""
        kind = _FOLLOWED.get(function)
        if kind is None or not isinstance(result, Tensor):
            return
        first = argument(args, kwargs, 0, "input")
        if kind in {"above", "below"} and isinstance(first, Tensor):
            right = argument(args, kwargs, 1, "other")
            if isinstance(right, Tensor):
                self.note(result, Comparison(weakref.ref(first), weakref.ref(right), kind == "above"))
            elif isinstance(right, int | float):
                self.note(result, Comparison(weakref.ref(first), float(right), kind == "above"))
        elif kind == "step" and isinstance(first, Tensor):
            self.note(result, Comparison(weakref.ref(first), 0.0, above=True))
        elif kind in {"same", "view", "inverted"}:
            known = self.about(first)
            if isinstance(known, Comparison) and kind != "view" and first.shape == result.shape:
                self.note(result, known.inverted() if kind == "inverted" else known)
            elif isinstance(known, Output | Chosen) and kind != "inverted" and first.numel() == result.numel():
                self.note(result, known)
        elif kind == "zeros" and _is_made_of_zeros(function, args, kwargs):
            self.note(result, Zeros(result._version))
        elif kind == "scatter":
            self._follow_scatter(args, kwargs, result)

    def _follow_scatter(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor) -> None:
        """Ones that are scattered to where a top-k found its values are a mask."""
        chosen = self.about(argument(args, kwargs, 2, "index"))
        source = argument(args, kwargs, 3, "src", kwargs.get("value"))
        if isinstance(chosen, Chosen) and self.output(source) is None:
            self.note(result, Comparison(chosen.output.pre, None, above=True))

    def is_zero(self, value: object) -> bool:
        """Whether a number or tensor is zero all over."""
        if isinstance(value, int | float):
            return value == 0
        if not isinstance(value, Tensor) or value.is_complex():
            return False
        known = self.about(value)
        if isinstance(known, Zeros):
            return known.version == value._version
        if value.device.type != "cpu" or torch._C._functorch.is_functorch_wrapped_tensor(value):
            return False  # to look would wait for the device
        return value.numel() == 1 and value.item() == 0

    def recognise(
        self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Applied | Refined | None:
        """Whether a call rectifies in the light of what went before; ``None`` for any other call."""
        name = _GATES.get(function)
        if name is None:
            return None
        first, second = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "other")
        if name in {"maximum", "fmax", "max"}:
            return self._maximum(name, first, second) if isinstance(second, Tensor) else None
        if name == "where":
            if isinstance(self.about(second), Comparison) and isinstance(first, Tensor) and first.is_floating_point():
                mask, kept, other = second, first, argument(args, kwargs, 2, "other")  # the method: x.where(mask, 0)
            else:
                mask, kept, other = argument(args, kwargs, 0, "condition"), second, argument(args, kwargs, 2, "other")
            if self.is_zero(other):
                return self._gate(name, kept, mask)
            return self._gate(name, other, mask, inverted=True) if self.is_zero(kept) else None
        if name == "mul":
            return self._gate(name, first, second) or self._gate(name, second, first)
        if name == "masked_fill":
            mask, filler = argument(args, kwargs, 1, "mask"), argument(args, kwargs, 2, "value")
            return self._gate(name, first, mask, inverted=True) if self.is_zero(filler) else None
        if len(args) == 3 and self.is_zero(args[2]):
            applied = self._gate(name, first, second, inverted=True)
            if isinstance(applied, Applied):
                applied.in_place = True
                return applied
        return None

    def _maximum(self, name: str, first: object, second: object) -> Applied | None:
        for pre, other in ((first, second), (second, first)):
            if isinstance(pre, Tensor) and pre.is_floating_point() and self.is_zero(other):
                return Applied(name, Rectifier(name, clips=True), pre)
        return None

    def _gate(self, name: str, value: object, mask: object, *, inverted: bool = False) -> Applied | Refined | None:
        """A value that passes where a mask is true, or where it is false."""
        compared = self.about(mask)
        if not isinstance(compared, Comparison) or not isinstance(value, Tensor) or not isinstance(mask, Tensor):
            return None
        if mask.shape != value.shape or not value.is_floating_point():
            return None
        if inverted:
            compared = compared.inverted()
        left = compared.left()
        right = compared.right() if isinstance(compared.right, weakref.ref) else compared.right
        passes = (mask == 0) if inverted else (mask != 0)
        output = self.output(value)
        if output is not None and left is not None and (left is value or left is output.pre()):
            return Refined(output, passes)
        if right is value:  # threshold < x
            return Applied(name, Rectifier(name, -math.inf, selects=True), value, passes)
        if left is not value:
            return None
        if compared.above and isinstance(right, float):
            return Applied(name, Rectifier(name, right, clips=right == 0), value)
        return Applied(name, Rectifier(name, -math.inf, selects=True), value, passes)


def _is_made_of_zeros(function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    name = getattr(function, "__name__", "")
    if name in {"full", "full_like"}:
        return bool(argument(args, kwargs, 1, "fill_value") == 0)
    if name in {"tensor", "scalar_tensor"}:
        value = argument(args, kwargs, 0, "data")
        return isinstance(value, int | float) and value == 0
    return True
