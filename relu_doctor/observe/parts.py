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
from relu_doctor.observe.live import LiveProbe
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
        for name, module in self.model.named_modules():
            if next(module.parameters(), None) is not None:
                before = module.register_forward_pre_hook(self._before_part, with_kwargs=True)
                after = module.register_forward_hook(self._after_part, prepend=True, always_call=True)
                self._undo += [before.remove, after.remove]
            elif rectifies(module):
                self._undo.append(module.register_forward_pre_hook(self._between(name)).remove)

    def find_compiled(self) -> bool:
        """Not looked for: no single call is the forward."""
        return False

    def drop(self) -> None:
        """Take away what a forward left that did not come to its end."""
        super().drop()
        self._within = None

    def _before_part(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        in_backward = torch._C._current_graph_task_id() != -1
        if torch.compiler.is_compiling() or in_backward or self._within is not None:
            return
        part = self._parts.setdefault(module, _Part())
        self._root, self._counting, self._unknown = module, part.counting, part.unknown
        self._before(module, args, kwargs)
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

    def _between(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            counts = torch.is_grad_enabled() and not self.paused and torch._C._current_graph_task_id() == -1
            if not torch.compiler.is_compiling() and self._within is None and counts:
                self.probe.known.note(
                    f"{name} is called between modules, where what feeds it is not seen: it was not observed; call it "
                    "within a module's forward"
                )

        return hook
