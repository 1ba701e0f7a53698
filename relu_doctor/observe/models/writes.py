"""Parameters that a forward writes to (moving averages, clamped weights, ``max_norm``), or adds gradients to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from relu_doctor.observe.inputs.feeding import tensors_in

BACKWARD = {torch.autograd.backward, Tensor.backward}
_LOOKUPS = {"embedding": 3, "embedding_bag": 4}  # and where their max_norm stands: rows that exceed it are rescaled


def writes(func: Any) -> bool:
    """Whether a call writes to its first argument."""
    name: str = getattr(func, "__name__", "")
    if name.endswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in {"__invert__", "__index__", "__int__"})
    return name.endswith("_")


def may_write(func: Any) -> bool:
    """Whether a call of a function writes to a parameter or a gradient for some arguments, ``out=`` apart."""
    return writes(func) or getattr(func, "__name__", "") in _LOOKUPS or func in BACKWARD


class Writes:
    """Keeps the values of parameters and of their gradients from the moment a forward is about to write to them.

    Memory is looked at, not identity: a parameter is also written to through its ``data`` and through views of it.

    Args:
        model: whose parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._own: dict[int, list[Tensor]] = {}  # by where their memory begins
        self._gradients = [tensor.grad for tensor in model.parameters() if tensor.grad is not None]
        for tensor in (*model.parameters(), *self._gradients):
            if type(tensor) in {Tensor, nn.Parameter} and tensor.layout is torch.strided and tensor.numel():
                self._own.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        self._own.pop(0, None)  # on no device
        self._kept: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def expect(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A call is about to be performed."""
        if writes(func):
            for tensor in tensors_in(args[:1]):
                self._keep(tensor)
        elif getattr(func, "__name__", "") in _LOOKUPS:
            place = _LOOKUPS[func.__name__]
            if kwargs.get("max_norm", args[place] if len(args) > place else None) is not None:
                for tensor in tensors_in((*args[:2], *kwargs.values())):
                    self._keep(tensor)
        elif func in BACKWARD:
            for tensor in self._gradients:
                self._keep(tensor)
        for tensor in tensors_in(kwargs.get("out", ())):
            self._keep(tensor)

    def undo(self) -> None:
        """Put the values back."""
        while self._kept:
            for tensor, values in self._kept.popitem()[1]:
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    tensor.copy_(values)

    def _keep(self, tensor: Tensor) -> None:
        if type(tensor) not in {Tensor, nn.Parameter} or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return
        if tensor.layout is torch.strided and not tensor.is_meta:
            start = tensor.untyped_storage().data_ptr()
            if start in self._own and start not in self._kept:
                self._kept[start] = [(each, each.detach().clone()) for each in self._own[start]]
