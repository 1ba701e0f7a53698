"""How a discovery keeps the graph whole: every torch call is performed so that autograd can follow it.

A model's own code cuts the graph in many ways: ``no_grad`` and ``inference_mode`` blocks, ``detach``, parameters that
are frozen or that were made in inference mode, results written into ``out=``, checkpointed parts that autograd sees as
one function of their own. Here each call is given *stand-ins* for such tensors: tensors in the same memory with a node
of their own in the graph, which says for what it stands. Nothing of the model is changed, and the graph keeps no
parameter alive, so that offloaded weights are let go as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakTensorKeyDictionary

from relu_doctor.observe.forwards.watching import Caller
from relu_doctor.observe.graph.edges import Edge, hollow_hooks
from relu_doctor.observe.graph.names import ParameterNames
from relu_doctor.observe.inputs.feeding import tensors_in
from relu_doctor.observe.models.leaves import in_same_memory
from relu_doctor.observe.models.writes import writes


@dataclass(frozen=True, slots=True)
class Depth:
    """How much a discovery pass takes over from the model."""

    gradients: bool  # a graph at all
    everywhere: bool  # also inside the model's own no_grad and inference_mode blocks, and past detach
    real: bool  # the graph keeps real values, since the model itself asks autograd


class StandIn(torch.autograd.Function):
    """A tensor in another's memory, whose node tells for what it stands: a parameter's name, or an edge."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, held: list[Tensor], stands_for: str | Edge) -> Tensor:
        """Make the tensor.

        Args:
            ctx: the node.
            leaf: anything that requires gradients.
            held: the tensor to share memory with, in a list, so that autograd does not look at it.
            stands_for: what to read off the node.
        """
        ctx.stands_for = stands_for
        return in_same_memory(held[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        """Gradients end here."""
        return None, None, None


class Follower:
    """Performs the torch calls of one discovery.

    Args:
        names: of the model's parameters.
        depth: how much is followed.
        call: performs a call of the model's.
    """

    def __init__(self, names: ParameterNames, depth: Depth, call: Caller) -> None:
        self._call = call
        self.names = names
        self.depth = depth
        self._hooks = hollow_hooks()
        self._leaf = torch.empty(0, requires_grad=True)  # what every stand-in's node hangs on
        self._edges = WeakTensorKeyDictionary()  # where tensors stood in the graph when a call returned them

    def hollow(self) -> AbstractContextManager[object]:
        """Within it, the graph keeps no activation alive, unless the model needs real values."""
        return saved_tensors_hooks(*self._hooks) if self.depth.gradients and not self.depth.real else nullcontext()

    def edge(self, tensor: Tensor) -> Edge | None:
        """Where a tensor stands in the graph, also if it was cut off, or came out of a function of its own."""
        node = tensor.grad_fn
        if node is not None and not _is_function(node):
            return node, tensor.output_nr
        kept: Edge | None = self._edges.get(tensor)
        return kept if kept is not None or node is None else (node, tensor.output_nr)

    def perform(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Perform a call; the values are those that it has by itself."""
        follows = self.depth.gradients and (self.depth.everywhere or torch.is_grad_enabled())
        if not follows or _is_about_the_object(func) or torch._C._are_functorch_transforms_active():
            return self._call(func, args, kwargs)
        if func in _LEAVES_TORCH:  # works in the model's own no_grad run
            return self._call(func, (args[0].detach(), *args[1:]), kwargs)
        with self._modes(), self.hollow():  # innermost: a checkpoint's own hooks would run its forward again
            written = args[0] if args and writes(func) else None
            given = _Given(lambda tensor: self._stand_in(tensor, is_written=tensor is written))
            args, named = given.swapped(args), given.swapped(dict(kwargs))
            out = named.pop("out", None)
            if out is not None and any(tensor.requires_grad for tensor in tensors_in((args, named))):
                return self._write(self._call(func, args, named), out)
            if out is not None:
                named["out"] = out
            if self.depth.everywhere and func in _DETACHES and args[0].requires_grad:
                func = _as_itself
            result = self._call(func, args, named)
            for value in tensors_in(result):
                self._keep(value, value)
            for original, stand_in in given.pairs:
                self._keep(original, stand_in)  # it stands elsewhere if the call has written to it
                if original is written and not original.is_inference():
                    torch.autograd.graph.increment_version(original)
            return given.handed_back(result)

    def _modes(self) -> AbstractContextManager[object]:
        if self.depth.everywhere and torch.is_inference_mode_enabled():
            return torch.inference_mode(False)
        return torch.enable_grad() if self.depth.everywhere else nullcontext()

    def _stand_in(self, tensor: Tensor, *, is_written: bool) -> Tensor:
        """What a call is given for a tensor: the tensor itself where autograd follows it already.

        A tensor without history that the call writes to is the model's own (a buffer, an input): it gets none.
        """
        stands_for: Edge | str | None = None
        if tensor.is_floating_point() or tensor.is_complex():
            stands_for = self.edge(tensor)
            if stands_for is not None and stands_for[0] is tensor.grad_fn:
                return tensor
            if stands_for is None:
                stands_for = self.names.find(tensor)
            if isinstance(stands_for, str) and self.depth.real and tensor.requires_grad:
                return tensor  # the model may ask for its gradient
        if stands_for is None:
            return in_same_memory(tensor) if is_written or tensor.is_inference() else tensor
        stand_in: Tensor = StandIn.apply(self._leaf, [tensor], stands_for)  # type: ignore[no-untyped-call]
        return stand_in

    def _keep(self, tensor: Tensor, made: Tensor) -> None:
        """Remember where a tensor stands that a call made."""
        if made.grad_fn is not None and getattr(made.grad_fn, "stands_for", None) is None:
            self._edges[tensor] = (made.grad_fn, made.output_nr)

    def _write(self, result: Any, out: Any) -> Any:
        """Put a result where the model wants it, which autograd would refuse to follow."""
        for value, place in zip(tensors_in(result), tensors_in(out), strict=True):
            with torch.no_grad():
                place.resize_(value.shape).copy_(value)
            self._keep(place, value)
        return out


class _Given:
    """The arguments of one call, with stand-ins in their places.

    Args:
        stand_in: gives what a tensor is replaced by, or the tensor itself.

    Attributes:
        pairs: each tensor that was replaced, and its stand-in.
    """

    def __init__(self, stand_in: Callable[[Tensor], Tensor]) -> None:
        self.stand_in = stand_in
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def swapped(self, value: Any) -> Any:
        """The same nest of arguments."""
        if isinstance(value, Tensor):
            replaced = self.stand_in(value)
            if replaced is not value:
                self.pairs.append((value, replaced))
            return replaced
        if type(value) in {tuple, list}:
            return type(value)(self.swapped(item) for item in value)
        if type(value) is dict:
            return {key: self.swapped(item) for key, item in value.items()}
        return value

    def handed_back(self, result: Any) -> Any:
        """The result, with the tensor itself where the call returned its stand-in."""
        if isinstance(result, Tensor):
            return next((original for original, stand_in in self.pairs if stand_in is result), result)
        if type(result) in {tuple, list}:
            return type(result)(self.handed_back(item) for item in result)
        return result


def _is_function(node: object) -> bool:
    """Whether a node is a function with a backward of its own, written in Python."""
    return isinstance(node, BackwardCFunction)


def _as_itself(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor)


def _is_about_the_object(func: Any) -> bool:
    """Whether a call reads or changes what a tensor is, not its values."""
    if getattr(func, "__name__", "") in {"__get__", "__set__", "__delete__"}:
        return func not in _VIEWS
    return func in _OF_THE_OBJECT


_VIEWS: set[Any] = {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag", "data")}
_DETACHES: set[Any] = {Tensor.detach, Tensor.detach_, torch.detach, Tensor.data.__get__}  # type: ignore[attr-defined]
_LEAVES_TORCH: set[Any] = {Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.__deepcopy__}
_OF_THE_OBJECT: set[Any] = {
    getattr(Tensor, name)
    for name in (
        "backward",
        "requires_grad_",
        "retain_grad",
        "register_hook",
        "register_post_accumulate_grad_hook",
        "set_",
        "resize_",
        "resize_as_",
        "untyped_storage",
        "share_memory_",
        "pin_memory",
        "is_inference",
    )
}
