"""Which part of a parameter a tensor of the running forward is: the weights of one expert in a stack of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from relu_doctor.observe.graph.names import ParameterNames

_CUTS: set[Callable[..., Any]] = {
    getattr(owner, name)
    for owner in (torch, Tensor)
    for name in ("__getitem__", "__iter__", "select", "narrow", "unbind", "chunk", "split", "tensor_split")
    if hasattr(owner, name)
}


def is_cut(func: Callable[..., Any]) -> bool:
    """Whether a call of a function cuts its first argument into parts."""
    return func in _CUTS


class Slices:
    """Follows the parts that one forward cuts out of its parameters; none of them is held, since some are copies.

    Args:
        names: of the parameters.
    """

    def __init__(self, names: ParameterNames) -> None:
        self._names = names
        self._parts: dict[int, tuple[weakref.ref[Tensor], str]] = {}

    def of(self, tensor: Tensor) -> str | None:
        """The name of a part; ``None`` for any other tensor."""
        part = self._parts.get(id(tensor))
        return None if part is None or part[0]() is not tensor else part[1]

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Any:
        """Note what was cut out of a parameter.

        Returns:
            The result of the call, an iterator over parts made anew.
        """
        if func not in _CUTS or not args or not isinstance(args[0], Tensor):
            return result
        name = self._names.of(args[0]) or self.of(args[0])
        if name is None:
            return result
        again = isinstance(result, Iterator)
        parts = list(result) if again else result
        where = ",".join(_written(item) for item in (*args[1:], *kwargs.values()))
        for number, part in enumerate(parts if isinstance(parts, list | tuple) else [parts]):
            if isinstance(part, Tensor) and part is not args[0]:
                self._parts[id(part)] = (weakref.ref(part), f"{name}[{where}]{number}")
        return iter(parts) if again else result


def _written(item: Any) -> str:
    """An index as text; of indices that are tensors only single ones are read, as indexing itself does."""
    if isinstance(item, Tensor):
        plain = type(item) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(item)
        single = plain and item.dim() == 0 and not item.is_meta and not item.dtype.is_floating_point
        return str(int(item)) if single else "?"
    if isinstance(item, tuple | list):
        return ",".join(_written(each) for each in item)
    return str(item)
