"""PartsProbe: a LiveProbe for a model that is never called as a whole.

A LightningModule whose ``training_step`` calls an encoder and a decoder, a policy that is asked for distributions and
values: a forward is then the outermost call of any of its modules, and each such module is known by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from relu_doctor.observe.inputs.counting import Counting
from relu_doctor.observe.inputs.feeding import tensors_in
from relu_doctor.observe.inputs.rehearsal import Inputs
from relu_doctor.observe.live import LiveProbe
from relu_doctor.observe.models.hooks import Hook
from relu_doctor.observe.rectifiers.kinds import rectifies


@dataclass(slots=True)
class _Part:
    """What is known of a module that was called."""

    counting: Counting | None = None
    unknown: bool = True  # until its calls were found out


class PartsProbe(LiveProbe):
    """Observes the outermost calls of a model's modules; a context manager, as :class:`LiveProbe`.

    Only modules with parameters are followed: no loss or metric is. What is rectified between the calls is not seen,
    and a rectifier module that is called there is named.
    """

    def _attach(self) -> None:
        self._parts: dict[nn.Module, _Part] = {}
        self._within: nn.Module | None = None
        self._entering = False
        for name, module in self.model.named_modules():
            if next(module.parameters(), None) is not None:
                self._undo.append(module.register_forward_pre_hook(Hook(self._before_part), with_kwargs=True).remove)
            elif rectifies(module):
                self._undo.append(module.register_forward_pre_hook(Hook(self._between(name))).remove)

    def find_compiled(self) -> bool:
        """Not looked for: no single call is the forward."""
        return False

    def drop(self) -> None:
        """Take away what a forward left that did not come to its end."""
        super().drop()
        self._within = None

    def _before_part(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if torch.compiler.is_compiling() or self.asleep or self._entering or self._within is not None:
            return
        if torch._C._current_graph_task_id() != -1:  # a checkpoint computes it again
            return
        if _is_redirected(module):
            return
        part = self._parts.get(module)
        if part is None:
            part = self._parts[module] = _Part()
            after = module.register_forward_hook(Hook(self._after_part), prepend=True, always_call=True)
            self._undo.append(after.remove)  # a module that is only called within others needs none
        self._root, self._counting, self._unknown = module, part.counting, part.unknown
        self._entering = True  # what a forward's calls are is found out by calling the module
        try:
            self._before(module, args, kwargs)
        finally:
            self._entering = False
        part.counting, part.unknown = self._counting, self._unknown
        self._within = module  # whether it is observed or not
        if any(tensor.requires_grad for tensor in tensors_in((args, kwargs))):
            self._digests = []  # made by a part before it, whose inputs were told

    def _after_part(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling() or module is not self._within:
            return
        self._within = None
        self._after(module, args, output)
        self._parts[module].unknown = self._unknown

    def _recover(self, inputs: Inputs) -> None:
        self._entering = True
        try:
            super()._recover(inputs)
        finally:
            self._entering = False

    def _between(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if torch.compiler.is_compiling() or self._entering or self._within is not None or self.paused:
                return
            if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
                self.probe.known.note(
                    f"{name} is called between modules, where what feeds it is not seen: it was not observed; call it "
                    "within a module's forward"
                )

        return hook


def _is_redirected(module: nn.Module) -> bool:
    """Whether a call leads to another method: Lightning's wrappers reach ``training_step`` in the place of forward."""
    return getattr(vars(module).get("forward"), "__qualname__", "").startswith("_ForwardRedirection.")
