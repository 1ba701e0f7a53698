"""What modules hold beside their parameters: kept as it is, and put back."""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from relu_doctor.observe.graph.sharding import is_spread
from relu_doctor.observe.models.scripted import scripted_attributes

Restore = Callable[[], bool]  # puts back, and says whether anything had changed

_CONTAINERS = (list, dict, set, deque, OrderedDict)
_TABLES = ("_parameters", "_buffers", "_modules")  # of which scripted code makes dictionaries of its own kind


class ModelState:
    """The state of a model: attributes, buffers, what scripted code writes.

    Args:
        model: whose.

    Attributes:
        changes: whether a forward changes it; ``None`` until one was undone.
    """

    def __init__(self, model: nn.Module) -> None:
        self.changes: bool | None = None
        self._model = model
        self._scripted = scripted_attributes(model)

    def keep(self) -> Callable[[], None]:
        """Keep the state as it is now.

        Returns:
            Puts it back.
        """
        kept = (keep_attributes(self._model), keep_tensors(self._model), keep_scripted(self._scripted))

        def restore() -> None:
            changed = [put_back() for put_back in reversed(kept)]
            self.changes = bool(self.changes) or any(changed)

        return restore


def keep_attributes(model: nn.Module) -> Restore:
    """Keep the attributes of every module, its hooks, and what is in lists, dictionaries and sets among them."""
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
    inside: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        places: list[dict[str, Any]] = [vars(module)]
        if not isinstance(module, torch.jit.ScriptModule):  # whose parameters and buffers are views of its own
            places += [module._buffers, module._modules]
            if not any(parameter is not None and is_spread(parameter) for parameter in module._parameters.values()):
                places.append(module._parameters)  # else FSDP keeps book of what it puts there
        kept += [(names, dict(names)) for names in places]
        for name, value in vars(module).items():
            if name not in _TABLES:
                _keep_items(value, inside)

    def restore() -> bool:
        changed = False
        for names, before in kept:
            if list(names) != list(before):
                changed = True
                names.clear()
            changed |= any(names.get(name) is not value for name, value in before.items())
            names.update(before)
        for container, before in inside.values():
            if not _same_items(container, before):
                changed = True
                container.clear()
                container.extend(before) if isinstance(container, list | deque) else container.update(before)
        return changed

    return restore


def _keep_items(value: Any, kept: dict[int, tuple[Any, Any]]) -> None:
    """Copy a container of Python's own, and those that are in it, each once."""
    if type(value) in _CONTAINERS and id(value) not in kept:
        kept[id(value)] = value, copy.copy(value)
        for item in tuple(value.values() if isinstance(value, dict) else value):
            _keep_items(item, kept)
    elif type(value) is tuple:
        for item in value:
            _keep_items(item, kept)


def _same_items(one: Any, other: Any) -> bool:
    if len(one) != len(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(other[key] is value for key, value in one.items())
    return one == other if isinstance(one, set) else all(a is b for a, b in zip(one, other, strict=True))


def keep_tensors(model: nn.Module) -> Restore:
    """Keep every buffer and tensor attribute: the object in its place, and its values.

    Values are compared, since batch_norm writes to its running statistics without a new version of the tensor.
    """
    held: list[tuple[Any, str, Tensor | None]] = []  # a module of scripted code has dictionaries of its own kind
    for module in model.modules():
        held += [(module._buffers, name, buffer) for name, buffer in module._buffers.items()]
        plain = [(name, value) for name, value in vars(module).items() if isinstance(value, Tensor)]
        held += [(vars(module), name, value) for name, value in plain if value.grad_fn is None]
    kept = [(*place, None if (now := place[2]) is None or now.is_meta else now.detach().clone()) for place in held]

    def restore() -> bool:
        changed = False
        with torch.no_grad():
            for names, name, tensor, values in kept:
                changed |= name not in names or names[name] is not tensor
                names[name] = tensor
                if tensor is not None and values is not None and not _are_equal(tensor, values):
                    changed = True
                    tensor.copy_(values)
        return changed

    return restore


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape hold the same values; sparse ones by what they are made of."""
    if one.layout is torch.strided:
        return torch.equal(one, other)
    parts = _PARTS.get(one.layout)
    if parts is None:
        return torch.equal(one.to_dense(), other.to_dense())
    pairs = ((getattr(one, name)(), getattr(other, name)()) for name in parts)
    return all(mine.shape == theirs.shape and torch.equal(mine, theirs) for mine, theirs in pairs)


_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    **dict.fromkeys((torch.sparse_csr, torch.sparse_bsr), ("crow_indices", "col_indices", "values")),
    **dict.fromkeys((torch.sparse_csc, torch.sparse_bsc), ("ccol_indices", "row_indices", "values")),
}


def keep_scripted(places: list[tuple[Any, str]]) -> Restore:
    """Keep the attributes of scripted code, which no dictionary of Python holds.

    Args:
        places: their owners and names, as :func:`~relu_doctor.observe.models.scripted.scripted_attributes` gives them.
    """
    kept: list[tuple[Any, str, Any, Any]] = []
    for owner, name in places:
        value = owner.getattr(name)
        kept.append((owner, name, value, value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)))

    def restore() -> bool:
        changed = False
        for owner, name, value, before in kept:
            now = owner.getattr(name)
            if not isinstance(value, Tensor):
                different = not _equal(now, before)
            else:
                different = now is not value
                if not torch.equal(value, before):
                    changed = True
                    with torch.no_grad():
                        value.copy_(before)
            if different:
                changed = True
                owner.setattr(name, value if isinstance(value, Tensor) else before)
        return changed

    return restore


def _equal(one: Any, other: Any) -> bool:
    """Whether two values of scripted code are alike, tensors inside containers included."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    return bool(one == other)
