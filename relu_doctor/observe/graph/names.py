"""The names of a model's parameters, also of those that wrappers put in their place while a forward runs."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_OF_KERAS = "_torch_params."  # where a Keras layer registers its own parameters and those of all layers inside it


def strip_wrappers(name: str) -> str:
    """A qualified name without what DataParallel, compile, FSDP, checkpoint wrappers and Keras put in."""
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
        name = name.replace("." + wrapper, ".")
    return _keras_name(name)


def _keras_name(name: str) -> str:
    """The path of a parameter in the tree of Keras's layers."""
    head, found, path = name.rpartition(_OF_KERAS)
    return path.replace("/", ".") if found else head + path


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a module keeps a parameter."""

    held: dict[str, Any]
    key: str
    name: str


class ParameterNames:
    """The qualified name of each parameter of a model, wrapper prefixes stripped; tied parameters have one name.

    A parameter is known by its identity, kept with a weak reference, since the identity of a freed tensor comes back
    with another. What is not known is looked for in the model then and there: FSDP gathers parameters, and offloading
    fetches them, for the length of a forward only.

    Args:
        model: whose parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: dict[int, tuple[weakref.ref[Tensor], str | None]] = {}
        self._added: dict[str, Tensor] = {}
        self._names: dict[tuple[int, str], str] = {}  # by module and leaf: tied parameters keep one name when replaced
        self._places = self._look_through()
        self._next = 0

    def __iter__(self) -> Iterator[str]:
        """The names, in the model's order."""
        return iter(dict.fromkeys([*(place.name for place in self._places), *self._added]))

    def add(self, name: str, tensor: Tensor) -> None:
        """Name a tensor that the model does not list; it is kept alive."""
        self._added[name] = tensor
        self._remember(tensor, name)

    def of(self, tensor: Tensor) -> str | None:
        """The name of a parameter; ``None`` for any other tensor."""
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] is not None:
            return known[1]
        return self.find(tensor) if type(tensor) is not Tensor and isinstance(tensor, nn.Parameter) else None

    def find(self, tensor: Tensor) -> str | None:
        """The same, also of a plain tensor that was put in a parameter's place (``torch.func.functional_call``)."""
        known = self._known.get(id(tensor))
        met = known is not None and known[0]() is tensor
        if known is not None and met and known[1] is not None:
            return known[1]
        name = self._found(tensor)  # also if it was met before: it may have been put into the model since
        if name is None and not met and isinstance(tensor, nn.Parameter):
            self._places = self._look_through()  # or its place may be new
            name = self._found(tensor)
        self._remember(tensor, name)
        return name

    def _found(self, tensor: Tensor) -> str | None:
        for step in range(len(self._places)):  # parameters are mostly used in their order
            index = (self._next + step) % len(self._places)
            place = self._places[index]
            if place.held.get(place.key) is tensor:
                self._next = index + 1
                return place.name
        return None

    def _remember(self, tensor: Tensor, name: str | None) -> None:
        self._known[id(tensor)] = (weakref.ref(tensor), name)

    def _look_through(self) -> list[_Place]:
        places: list[_Place] = []
        names: dict[int, str] = {}
        for path, module in self._model.named_modules(remove_duplicate=False):
            held: dict[str, Any] = module._parameters
            if isinstance(module, torch.jit.ScriptModule):  # whose dictionaries are made anew at each look
                held = dict(module.named_parameters(recurse=False))
            for leaf, parameter in held.items():
                if parameter is None:
                    continue
                name = names.setdefault(id(parameter), strip_wrappers(f"{path}.{leaf}" if path else leaf))
                name = self._names.setdefault((id(module), leaf), name)
                places.append(_Place(held, leaf, name))
                self._remember(parameter, name)
        return places
