"""Rectifiers written out: ``torch.where(x > 0, x, 0)``, ``x * (x > threshold)``, ``x - torch.minimum(x, 0)``.

None of these calls says by itself that it rectifies. A ledger remembers, for the length of one forward, which masks
come from comparing which tensor with what, which tensors are zeros, which are functions of which, and which are the
outputs of rectifiers. It holds weak references only, so that no activation outlives its use, and forgets what it knew
of a tensor that is written to.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from relu_doctor.observe.inputs.feeding import tensors_in
from relu_doctor.observe.rectifiers.bends import Bend, is_constant, version_of
from relu_doctor.observe.rectifiers.facts import Chosen, Comparison, Fact, Output, Refined, Zeros
from relu_doctor.observe.rectifiers.kinds import ANY, Applied, Function, Rectifier, argument, rounded


def _all(*names: str) -> set[Function]:
    owners = (torch, torch.Tensor, torch.nn.functional, torch.special)
    found = {getattr(owner, name) for name in names for owner in owners if callable(getattr(owner, name, None))}
    return found | ({torch.Tensor.data.__get__} if "data" in names else set())  # type: ignore[attr-defined]


SCATTERS = _all("scatter", "scatter_", "scatter_add", "scatter_add_", "__setitem__", "index_put", "index_put_")
_FOLLOWED: dict[Function, str] = {
    function: kind
    for kind, names in {
        "above": ("gt", "ge", "greater", "greater_equal", "__gt__", "__ge__"),
        "below": ("lt", "le", "less", "less_equal", "__lt__", "__le__"),
        "step": ("heaviside",),
        "negative": ("signbit",),
        "inverted": ("logical_not", "bitwise_not", "__invert__"),
        "joined": ("logical_and", "bitwise_and", "__and__", "logical_or", "bitwise_or", "__or__"),
        "same": (
            *("float", "double", "half", "bfloat16", "bool", "int", "long", "to", "type", "type_as"),
            *("detach", "clone", "contiguous", "data", "requires_grad_"),
        ),
        "view": ("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel", "view_as", "reshape_as"),
        "zeros": ("zeros", "zeros_like", "new_zeros", "tensor", "full", "full_like", "new_full", "scalar_tensor"),
        "neg": ("neg", "negative", "neg_", "__neg__"),
        "abs": ("abs", "absolute", "abs_", "__abs__"),
        "rising": ("exp", "exp_", "expm1", "log", "log1p", "sigmoid", "tanh", "sqrt", "sign", "sgn"),
        "unary": ("square", "pow", "__pow__"),
        "mul": ("mul", "multiply", "mul_", "__mul__", "__rmul__", "__imul__"),
        "div": ("div", "divide", "true_divide", "div_", "__truediv__", "__itruediv__"),
        "add": ("add", "add_", "__add__", "__radd__", "__iadd__"),
        "sub": ("sub", "subtract", "sub_", "__sub__", "__isub__"),
        "rsub": ("rsub", "__rsub__"),
        "maximum": ("maximum", "fmax", "max"),
        "minimum": ("minimum", "fmin", "min"),
        "sort": ("sort", "argsort"),
        "item": ("__getitem__",),
        "gather": ("gather", "take_along_dim"),
        "one_hot": ("one_hot",),
        "reduced": ("sum", "amax", "any"),
    }.items()
    for function in _all(*names)
} | dict.fromkeys(SCATTERS, "scatter")  # after what they are else
_GATES: dict[Function, str] = {
    function: name
    for name, names in {
        "where": ("where",),
        "masked_fill": ("masked_fill", "masked_fill_"),
        "__setitem__": ("__setitem__",),
        "mul": ("mul", "mul_", "multiply", "multiply_", "__mul__", "__rmul__", "__imul__"),
        "maximum": ("maximum",),
        "fmax": ("fmax",),
        "max": ("max",),
        "minimum": ("minimum",),
        "fmin": ("fmin",),
        "min": ("min",),
        "add": ("add", "add_", "__add__", "__radd__", "__iadd__"),
        "sub": ("sub", "subtract", "sub_", "__sub__", "__isub__"),
        "rsub": ("rsub", "__rsub__"),
        "clamp": ("clamp", "clamp_", "clip", "clip_"),
        "clamp_min": ("clamp_min", "clamp_min_"),
        "clamp_max": ("clamp_max", "clamp_max_"),
    }.items()
    for function in _all(*names)
}
_SECOND = {"clamp_min": "min", "clamp_max": "max", "maximum": "other", "minimum": "other"}


COMPARISONS = frozenset(function for function, kind in _FOLLOWED.items() if kind in {"above", "below"})
# Calls that ask some of their arguments for nothing but their shape and type: how many of them they read.
_READS: dict[Function, int] = {
    function: {"same": 1, "view": 1, "zeros": 0}[kind]
    for function, kind in _FOLLOWED.items()
    if kind in {"same", "view", "zeros"}
}


def is_followed(function: Function) -> bool:
    """Whether a call of a function may rectify in the light of what went before, or tells something for later."""
    return function in _FOLLOWED or function in _GATES


class Ledger:
    """What one forward has made so far of masks, zeros, functions of tensors, and rectifiers' outputs."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int, Fact]] = {}

    def note(self, tensor: object, fact: Fact) -> None:
        """Remember what a tensor is."""
        if isinstance(tensor, Tensor):
            self._known[id(tensor)] = weakref.ref(tensor), version_of(tensor), fact

    def about(self, tensor: object) -> Fact | None:
        """What a tensor is, if that was noted and it was not written to since."""
        entry = self._known.get(id(tensor))
        if entry is None or (known := entry[0]()) is None or known is not tensor or entry[1] != version_of(known):
            return None
        return entry[2]

    def output(self, tensor: object) -> Output | None:
        """The rectifier or top-k whose output a tensor is."""
        fact = self.about(tensor)
        return fact if isinstance(fact, Output) else None

    def bend(self, tensor: object) -> Bend | None:
        """What a tensor is of another, where that was noted and the other is still as it was."""
        fact = self.about(tensor)
        if fact is None:
            return None
        bend = fact.bend if isinstance(fact, Output) else fact
        return (
            next((seen for seen in bend.views() if seen.source() is not None), None) if isinstance(bend, Bend) else None
        )

    def calls(self, values: Iterable[object]) -> set[int]:
        """The rectifier calls that tensors are made of, with no choice in between."""
        found: set[int] = set()
        for value in values:
            fact = self.about(value)
            if isinstance(fact, Output) and not fact.chosen:
                found.add(fact.index)
            elif isinstance(fact, Bend):
                found.update(fact.calls)
        return found

    def parts(self, post: Tensor, pre: Tensor) -> tuple[int, ...]:
        """The rectifier calls that make one tensor of another, with nothing else in between."""
        fact, origin = self.about(post), self.origin(pre)[0]
        if isinstance(fact, Output) and any(fact.pre() is own for own in (pre, origin)):
            return tuple(self.calls([post]))
        bend = self.bend(post)
        return () if bend is None or bend.source() is not origin else bend.calls

    def indices(self, values: Iterable[object]) -> set[int]:
        """The rectifier calls that tensors are made of, or chosen from."""
        values = list(values)
        outputs = (self.output(value) for value in values)
        return self.calls(values) | {output.index for output in outputs if output is not None}

    def read(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> set[int]:
        """The rectifier calls whose output goes into a call."""
        values = (*args, *kwargs.values())
        return self.calls(tensors_in(values[: _READS.get(function)]))

    def origin(self, tensor: Tensor) -> tuple[Tensor, bool]:
        """The tensor that one is a function of, and whether it is that tensor itself, value by value."""
        bend = self.bend(tensor)
        root = None if bend is None else bend.source()
        if bend is None or root is None:
            return tensor, True
        exact, inner = bend.straight and bend.above == 1, bend.inner
        while inner is not None:
            within = inner.source()
            root, exact = (root, exact) if within is None else (within, False)
            inner = inner.inner
        return root, exact

    def follow(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Note what came out of a call that applies no rectifier."""
        kind = _FOLLOWED.get(function)
        if kind is None:
            return
        first = argument(args, kwargs, 0, "input")
        if kind == "scatter":
            self._follow_scatter(args, kwargs, first if result is None else result)
        elif kind == "sort":
            self._follow_sort(first, result)
        elif not isinstance(result, Tensor):
            return
        elif kind == "zeros":
            if _is_made_of_zeros(function, args, kwargs):
                self.note(result, Zeros())
        elif isinstance(first, Tensor) or kind in _BINARY:
            fact = self._followed(function, first, argument(args, kwargs, 1, "other"), args, kwargs, result)
            if fact is not None:
                self.note(result, fact)

    def _followed(
        self,
        function: Function,
        first: Any,
        second: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Tensor,
    ) -> Fact | None:
        kind = _FOLLOWED[function]
        if kind in {"above", "below", "step", "negative"}:
            against = second if kind in {"above", "below"} else 0.0
            return self._comparison(first, against, above=kind in {"above", "step"})
        known = self.about(first)
        if kind in {"joined", "mul"}:
            masks = [fact for fact in (known, self.about(second)) if isinstance(fact, Comparison)]
            if masks and (len(masks) == 2 or result.dtype == torch.bool):
                return masks[0].narrowed()
        elif isinstance(known, Comparison) and kind in {"same", "view", "inverted", "reduced"}:
            if result.shape != first.shape:
                return known.narrowed()
            return known.inverted() if kind == "inverted" else known
        if kind in {"same", "view"} and isinstance(known, Output | Chosen) and first.numel() == result.numel():
            return known
        if kind == "item" and isinstance(known, Chosen):
            return known
        if kind == "one_hot" and isinstance(known, Chosen):
            return Comparison(known.source, None, above=True, exact=False, index=known.index)
        if kind == "gather":
            chosen = self.about(argument(args, kwargs, 2, "index"))
            return chosen.output if isinstance(chosen, Chosen) and self.origin(first)[0] is chosen.source() else None
        if not result.is_floating_point() or kind not in _BENDING:
            return None
        return self._bent(function, kind, first, second, kwargs, result)

    def _bent(
        self, function: Function, kind: str, first: Any, second: Any, kwargs: Mapping[str, Any], result: Tensor
    ) -> Fact | None:
        """A result as a function of another tensor, element by element."""
        if kind in _BINARY and isinstance(second, Tensor):
            joined = self._joined(kind, first, second, kwargs)
            if joined is not None:
                return joined[2]
        if kind in {"maximum", "minimum"}:
            return None
        if kind in _BINARY and isinstance(second, Tensor):
            if not isinstance(first, Tensor) or second.dim() > first.dim():
                first, second = second, first
                kind = {"sub": "rsub", "rsub": "sub", "div": "unary"}.get(kind, kind)
            if not isinstance(first, Tensor) or first.shape != result.shape:
                return None
        known = self.bend(first)
        if known is None and isinstance(second, Tensor) and kind in _BINARY and not is_constant(second, first):
            known = self.bend(second)
            if known is None or second.shape != result.shape:
                return None
            first, second, kind = second, first, "unary" if kind == "div" else kind
        bend = known or Bend.itself(first)
        if known is not None and not known.exact and not known.calls:
            bend = replace(Bend.itself(first), inner=known)
        if known is not None and (output := self.output(first)) is not None:
            bend = known.of(output)
        if kind == "same":
            return bend if first.shape == result.shape else None
        if kind == "neg":
            return bend.times(-1)
        if kind == "abs":
            return bend.absolute()
        if kind in {"mul", "div"} and isinstance(second, int | float):
            if second == 0:
                return Zeros() if kind == "mul" and bend.exact else None
            return bend.times(second if kind == "mul" else 1 / second)
        if kind in {"add", "sub", "rsub"} and isinstance(second, int | float):
            turned = bend.times(-1 if kind == "rsub" else 1)
            added = -second if kind == "sub" else second
            return turned if second == 0 else turned.passed(rising=True, by=lambda value: value + added)
        if kind == "rising":
            return bend.passed(rising=True, by=lambda value: _value(function, value))
        return bend.passed(own=kind not in _BINARY or is_constant(second, first))

    def _comparison(self, first: Any, second: Any, *, above: bool) -> Comparison | None:
        if not isinstance(first, Tensor):
            first, second, above = second, first, not above
        if not isinstance(first, Tensor):
            return None
        chosen = self.about(first)
        if isinstance(chosen, Chosen):  # ranks
            return Comparison(chosen.source, None, above, exact=False, index=chosen.index)
        root, exact = self.origin(first)
        right: float | weakref.ref[Tensor] | None = None
        if isinstance(second, Tensor):
            right = 0.0 if self.is_zero(second) else weakref.ref(self.origin(second)[0])
            if self.is_zero(first):
                root, exact = self.origin(second)
                right, above = 0.0, not above
        elif isinstance(second, int | float):
            right = rounded(float(second), first.dtype)
        output = self.output(first)
        return Comparison(weakref.ref(root), right, above, exact, None if output is None else output.index)

    def _follow_scatter(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor) -> None:
        """What is put to where a top-k found its values: ones are a mask, its own values are its output."""
        chosen, source = self.scattered(args, kwargs)
        if chosen is None:
            return
        values = self.output(source)
        if values is not None and values.chosen:
            self.note(result, values)
        elif values is None and (result.dtype == torch.bool or self._was_zero(argument(args, kwargs, 0, "input"))):
            self.note(result, Comparison(chosen.source, None, above=True, exact=False, index=chosen.index))

    def _was_zero(self, tensor: object) -> bool:
        """Whether a tensor was zero all over before the last call wrote to it."""
        entry = self._known.get(id(tensor))
        return entry is not None and entry[0]() is tensor and isinstance(entry[2], Zeros)

    def scattered(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Chosen | None, object]:
        """Where a call puts values, if to where a top-k chose, and the values."""
        if len(args) == 3 and not isinstance(args[1], int):  # x[index] = values
            index, source = args[1], args[2]
        else:
            index, source = argument(args, kwargs, 2, "index"), argument(args, kwargs, 3, "src", kwargs.get("value"))
        for place in index if isinstance(index, tuple | list) else (index,):
            chosen = self.about(place)
            if isinstance(chosen, Chosen):
                return chosen, source
        return None, source

    def _follow_sort(self, first: object, result: Any) -> None:
        """An order of values is a choice from them, once it is cut."""
        if isinstance(first, Tensor):
            known, output = self.about(first), self.output(first)
            source = weakref.ref(self.origin(first)[0])
            indices = result if isinstance(result, Tensor) else result[1]
            order = Chosen(source, None if output is None else output.index)
            self.note(indices, known if isinstance(known, Chosen) else order)  # the order of an order are ranks

    def is_zero(self, value: object) -> bool:
        """Whether a number or tensor is zero all over."""
        if isinstance(value, int | float):
            return value == 0
        if not isinstance(value, Tensor) or value.is_complex():
            return False
        if isinstance(self.about(value), Zeros):
            return True
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
        first = argument(args, kwargs, 0, "input")
        if name in {"add", "sub", "rsub"}:
            return self._sum(name, first, argument(args, kwargs, 1, "other"), kwargs)
        if name == "clamp":
            low, high = argument(args, kwargs, 1, "min"), argument(args, kwargs, 2, "max")
            if isinstance(low, Tensor) and isinstance(high, Tensor):
                return self._between(first, low, high)
            if isinstance(low, Tensor) and high is None:
                return self._edge("clamp", first, low)
            return self._edge("clamp", first, high, top=True) if isinstance(high, Tensor) and low is None else None
        if name in {"maximum", "fmax", "max", "minimum", "fmin", "min", "clamp_min", "clamp_max"}:
            second = argument(args, kwargs, 1, _SECOND.get(name, "other"))
            if not isinstance(second, Tensor):
                return None
            top = name in {"minimum", "fmin", "min", "clamp_max"}
            edge = self._edge(name, first, second, top=top) or self._sum(name, first, second, kwargs)
            return edge or (None if top else _learned_edge(name, first, second) or _learned_edge(name, second, first))
        if name == "where":
            return self._where(args, kwargs)
        second = argument(args, kwargs, 1, "other")
        if name == "mul":
            return self._gate(name, first, second) or self._gate(name, second, first)
        if name == "masked_fill":
            mask, filler = argument(args, kwargs, 1, "mask"), argument(args, kwargs, 2, "value")
            return self._gate(name, first, mask, inverted=True) if self.is_zero(filler) else None
        if len(args) == 3 and self.is_zero(args[2]):
            applied = self._gate(name, first, second, inverted=True)
            if isinstance(applied, Applied):
                applied.written = first
                return applied
        return None

    def output_of(self, applied: Applied) -> Bend | None:
        """What the output of a rectifier is of the tensor behind it; ``None`` where that is not bent at 0 alone."""
        rectifier = applied.rectifier
        if applied.bend is not None or rectifier.low != 0 or rectifier.high < float("inf") or not rectifier.clips:
            return applied.bend
        known = self.bend(applied.pre)
        straight = known is not None and known.straight and known.comparable()
        if known is None or not straight:
            itself = Bend.itself(applied.pre)
            bend = itself if known is None else replace(itself, inner=known)
        else:
            bend = known
        return bend.times(-1).rectified().times(-1) if applied.flipped else bend.rectified()

    def _where(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Applied | Refined | None:
        first = argument(args, kwargs, 0, "input")
        if args and isinstance(first, Tensor) and first.is_floating_point():  # the method: x.where(mask, 0)
            mask, kept, other = argument(args, kwargs, 1, "condition"), first, argument(args, kwargs, 2, "other")
        else:
            mask, kept = argument(args, kwargs, 0, "condition"), argument(args, kwargs, 1, "input")
            other = argument(args, kwargs, 2, "other")
        if self.is_zero(other):
            return self._gate("where", kept, mask)
        return self._gate("where", other, mask, inverted=True) if self.is_zero(kept) else None

    def _edge(self, name: str, first: object, second: object, *, top: bool = False) -> Applied | None:
        """A largest or smallest of a value and zero."""
        for pre, other in ((first, second), (second, first)):
            if isinstance(pre, Tensor) and pre.is_floating_point() and self.is_zero(other):
                return Applied(name, Rectifier(name, clips=True), pre, flipped=top)
        return None

    def _between(self, pre: object, low: Tensor, high: Tensor) -> Applied | None:
        """A clamp to what lies between zero and a tensor, of which a single value is read."""
        if not isinstance(pre, Tensor) or not pre.is_floating_point() or not self.is_zero(low):
            return None
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(high)
        plain = high.numel() == 1 and high.device.type == "cpu" and not wrapped
        top = rounded(float(high.detach()), pre.dtype) if plain else float("inf")
        return Applied("clamp", Rectifier("clamp", 0.0, top, clips=plain), pre) if top > 0 else None

    def _joined(
        self, kind: str, first: object, second: object, kwargs: Mapping[str, Any]
    ) -> tuple[Bend, Bend, Bend] | None:
        """Two functions of one tensor, and what their sum, difference, maximum or minimum is of it."""
        pair = self._pair(first, second)
        if pair is None or not (pair[0].own and pair[1].own):
            return None
        left, right = pair
        factor = kwargs.get("alpha", 1)
        if kind == "add":
            return left, right, left.plus(right, factor)
        if kind == "sub":
            return left, right, left.plus(right, -factor)
        if kind == "rsub":
            return left, right, right.plus(left, -factor)
        if kind in {"maximum", "minimum"} and left.comparable() and right.comparable():
            return left, right, left.larger(right) if kind == "maximum" else left.smaller(right)
        return None

    def _pair(self, first: object, second: object) -> tuple[Bend, Bend] | None:
        """Two tensors as functions of the same one."""
        if not isinstance(first, Tensor) or not isinstance(second, Tensor):
            return None
        left, right = self.bend(first), self.bend(second)
        if (left is None and right is None) or first.shape != second.shape:
            return None
        if left is not None and left.source() is second:
            return left, Bend.itself(second)
        if right is not None and right.source() is first:
            return Bend.itself(first), right
        if left is None or right is None:
            return None
        pairs = ((one, other) for one in left.views() for other in right.views())  # max(x, 0) + min(exp(x) - 1, 0)
        return next((pair for pair in pairs if pair[0].source() is pair[1].source() is not None), None)

    def _sum(self, name: str, first: object, second: object, kwargs: Mapping[str, Any]) -> Applied | None:
        """A sum, maximum or minimum of functions of one tensor that is flat on one side of 0, or is so no more."""
        kind = {"fmax": "maximum", "max": "maximum", "fmin": "minimum", "min": "minimum"}.get(name, name)
        joined = self._joined(kind, first, second, kwargs)
        root = None if joined is None else joined[2].source()
        if joined is None or root is None or not isinstance(first, Tensor) or root.shape != first.shape:
            return None
        *parts, result = joined
        if result.below == result.above == 0:
            return None
        if not result.one_sided:
            if not result.calls:
                return None
            return Applied(name, Rectifier(name, ANY.low), root, bend=result, replaces=result.calls)
        flipped = result.above == 0
        if any(part.one_sided and part.calls and (part.above == 0) == flipped for part in parts):
            return None  # more of what one of the parts already is
        slope = abs(result.below + result.above)
        rectifier = Rectifier(name, clips=slope == 1 and result.exact)
        return Applied(name, rectifier, root, flipped=flipped, bend=result, replaces=result.calls)

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
        output = self.output(value)
        root, itself = self.origin(value)
        if output is not None:
            if output.index == compared.index or (
                left is not None and any(left is own for own in (root, output.pre()))
            ):
                return Refined(output)
            return None if left is None or left.shape != value.shape else Refined(output, left)
        right = compared.right() if isinstance(compared.right, weakref.ref) else compared.right
        if left is not root and right is not root:
            return None
        bend = self.bend(value) or Bend.itself(value)
        if left is root and compared.exact and isinstance(right, float):
            kept = bend.cut(above=compared.above) if right == 0 else None
            if compared.above:
                return Applied(name, Rectifier(name, right, clips=right == 0 and itself), root, bend=kept)
            if right == 0:
                return Applied(name, Rectifier(name, clips=itself), root, flipped=True, bend=kept)
        passes = (mask == 0) if inverted else (mask != 0)
        return Applied(name, Rectifier(name, ANY.low, selects=True), root, passes)


def _learned_edge(name: str, pre: object, edge: object) -> Applied | None:
    """The larger of a value and a parameter: it fires above that."""
    if not isinstance(edge, nn.Parameter) or isinstance(pre, nn.Parameter) or not isinstance(pre, Tensor):
        return None
    if not pre.is_floating_point() or torch.broadcast_shapes(pre.shape, edge.shape) != pre.shape:
        return None
    with torch.no_grad():
        fires = pre.detach() > edge
    return Applied(name, Rectifier(name, ANY.low, selects=True), pre, fires)


_BINARY = {"mul", "div", "add", "sub", "rsub", "maximum", "minimum"}
_BENDING = _BINARY | {"same", "neg", "abs", "unary", "rising"}


def _value(function: Function, value: float) -> float:
    """What a function of torch makes of a number."""
    with torch._C.DisableTorchFunction(), torch.no_grad():
        return float(function(torch.tensor(value, dtype=torch.float64)))


def _is_made_of_zeros(function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    name = getattr(function, "__name__", "")
    if name in {"full", "full_like", "new_full"}:
        return bool(argument(args, kwargs, 2 if name == "new_full" else 1, "fill_value") == 0)
    if name in {"tensor", "scalar_tensor"}:
        value = argument(args, kwargs, 0, "data", kwargs.get("s"))
        return isinstance(value, int | float) and value == 0
    return True
