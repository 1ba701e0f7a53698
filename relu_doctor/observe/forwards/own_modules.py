"""The user's own rectifier modules while a model is watched: measured where they are called, as one rectifier each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from relu_doctor.observe.forwards.calls import Watch
from relu_doctor.observe.forwards.modes import ForwardMode
from relu_doctor.observe.forwards.probing import probe
from relu_doctor.observe.forwards.registry import CallRegistry
from relu_doctor.observe.rectifiers.bends import version_of
from relu_doctor.observe.rectifiers.custom import Custom, custom_rectifiers, fires_by, output_like
from relu_doctor.observe.rectifiers.kinds import Rectifier


@dataclass(slots=True)
class _Running:
    """A call of one of the user's modules.

    Attributes:
        rectifier: what it applies; ``None`` where it takes no tensor.
        pre: what it is given: a copy where it writes to it.
        version: of what it is given, when it was called.
    """

    rectifier: Rectifier | None
    given: Tensor | None
    pre: Tensor | None
    version: int


class OwnModules:
    """Measures the calls of the modules whose classes the user named.

    Args:
        given: the user's classes, intervals and rectifiers.
        watch: what is watched.
        active: the mode of the forward that is running.
    """

    def __init__(self, given: Custom, watch: Watch, active: Callable[[], ForwardMode | None]) -> None:
        self._classes = custom_rectifiers(given)
        self._watch = watch
        self._active = active
        self._rectifiers: dict[int, Rectifier] = {}
        self._writing: dict[int, bool] = {}
        self._running: list[_Running] = []

    def find(self) -> list[nn.Module]:
        """The model's modules of the classes that were named; a class that names none is remarked on."""
        modules = list(self._watch.model.modules())
        classes = {id(module): self._class_of(module, self._watch.known) for module in modules}
        scripted = {module.original_name for module in modules if isinstance(module, torch.jit.ScriptModule)}
        for cls in self._classes.keys() - set(classes.values()):
            why = (
                "is scripted, and seen as what it is made of, if at all"
                if cls.__name__ in scripted
                else "is no module of the model"
            )
            self._watch.known.note(f"rectifiers= names {cls.__name__}, which {why}")
        return [module for module in modules if classes[id(module)] is not None]

    def _class_of(self, module: nn.Module, known: CallRegistry) -> type[nn.Module] | None:
        """The class that was named, of which a module is: its own, or one whose forward it inherits."""
        cls = next((cls for cls in type(module).__mro__ if cls in self._classes), None)
        if cls is None or type(module).forward is cls.forward:
            return cls
        known.note(
            f"{type(module).__name__} is a {cls.__name__} with a forward of its own, and was not measured as one: "
            "name it as well"
        )
        return None

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A module is called."""
        mode = self._active()
        if mode is None or mode.is_blind:
            return
        self._watch.inside_custom.append(id(module))
        if len(self._watch.inside_custom) > 1:
            return  # a part of the rectifier around it
        with mode.own_work():
            given = _first_tensor(args, kwargs)
            if given is None:
                self._running.append(_Running(None, None, None, 0))
                return
            rectifier = self._rectifier(module, args, kwargs, given)
            pre, version = given, version_of(given)
            if rectifier.fires is None:
                mode.enter(rectifier, given)
            elif self._writing.get(id(module), True):
                pre = mode.perform(torch.clone, (given,), {})
            self._running.append(_Running(rectifier, given, pre, version))

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """It has returned, or raised; what it raised may be caught, and the forward go on."""
        mode = self._active()
        if mode is None or mode.is_blind or not self._watch.inside_custom:
            return
        try:
            if len(self._watch.inside_custom) == 1 and self._running:
                with mode.own_work():
                    self._measure(mode, module, self._running.pop(), output)
        finally:
            self._watch.inside_custom.pop()

    def clear(self) -> None:
        """Forget calls that did not return."""
        self._running.clear()
        self._watch.inside_custom.clear()

    def _measure(self, mode: ForwardMode, module: nn.Module, call: _Running, output: Any) -> None:
        mode.called.add(id(module))
        name, rectifier, pre = type(module).__name__, call.rectifier, call.pre
        if rectifier is None or pre is None or call.given is None:
            self._watch.known.note(f"{name} takes no tensor, and was not observed")
            return
        post = output_like(pre, output)
        self._writing[id(module)] = version_of(call.given) != call.version or call.version < 0
        if rectifier.fires is None:
            mode.leave(post)
        elif post is None:
            self._watch.known.note(f"{name} returns no tensor, and was not observed")
        else:
            with torch.no_grad():
                mask = fires_by(name, rectifier.fires, pre, post, module)
            on_output = mask.shape != pre.shape
            mode.enter(replace(rectifier, on_output=on_output), post if on_output else pre, behind=call.given)
            mode.leave(post, mask)

    def _rectifier(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], pre: Tensor) -> Rectifier:
        """What a module applies: as the user says, or as its slope shows."""
        known = self._rectifiers.get(id(module))
        if known is None:
            cls = self._class_of(module, self._watch.known)
            named = self._classes[cls] if cls is not None else None
            if named is None:
                named, told = probe(module, args, kwargs, pre)
                self._watch.known.note(told)
            known = self._rectifiers[id(module)] = replace(named, applied=type(module))
        return known


def _first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
