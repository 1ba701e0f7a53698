"""InStepProbe: a LiveProbe for models whose forward communicates with other processes: FSDP2, SyncBatchNorm.

Each forward that is made to find out what the calls are would leave a process waiting that runs one alone. All
processes make them at the same step, each announced to the others, before the model's own hooks gather anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from relu_doctor.errors import UnsupportedModelError
from relu_doctor.observe.forwards.surroundings import alone, firmly, undisturbed
from relu_doctor.observe.graph.sharding import Company
from relu_doctor.observe.inputs.counting import BY_ROWS
from relu_doctor.observe.inputs.feeding import map_tensors
from relu_doctor.observe.inputs.rehearsal import Inputs
from relu_doctor.observe.live import LiveProbe
from relu_doctor.observe.models.compilation import compiled_calls, is_compiled
from relu_doctor.observe.models.guard import preserved
from relu_doctor.observe.models.hooks import Hook
from relu_doctor.observe.statistics.stats import UnitStats

_WAITED = "a forward took a way that was not known: such ones were not observed before all ranks had learnt it together"


class Agreement(Protocol):
    """What the processes agree on."""

    def may_learn(self) -> bool:
        """Whether all of them find out, at this step, what the calls are."""
        ...

    def learnt(self) -> None:
        """They did."""
        ...

    def company(self) -> Company:
        """Of the processes."""
        ...


class InStepProbe(LiveProbe):
    """Observes a model's own forwards, and makes none without the other processes; a context manager.

    Args:
        model: that is trained.
        wants: as of :class:`LiveProbe`; the same in all processes.
        agreement: what they agree on.
        options: as of :class:`LiveProbe`.
    """

    def __init__(self, model: nn.Module, wants: Callable[[], bool], agreement: Agreement, **options: Any) -> None:
        super().__init__(model, wants, **options)
        self._agreement = agreement
        self._company: Company | None = None
        self.wishes = True
        self._counting = BY_ROWS  # another axis is not tried: a forward that stops half-way leaves the others waiting

    def look_at(self, batches: Iterable[Any]) -> Mapping[str, UnitStats]:
        """Not done: no process runs batches of its own.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError("the forwards of this model communicate, and no process may run one alone")

    def _attach(self) -> None:
        self._knows_compiled = is_compiled(self._called)
        if self._called is self.model and is_compiled(self.model):
            self._undo.append(compiled_calls(self.model, self._before_all))
        elif is_compiled(self._called):
            self._undo.append(self._called.register_forward_pre_hook(Hook(self._before_all), with_kwargs=True).remove)
        else:
            first = self.model.register_forward_pre_hook(Hook(self._before_all), prepend=True, with_kwargs=True)
            self._undo.append(first.remove)
            super()._attach()

    def _before_all(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before anything of a forward, also the hooks that gather its parameters."""
        if torch.compiler.is_compiling() or self.asleep or self.paused or not torch.is_grad_enabled():
            return
        if torch._C._current_graph_task_id() != -1:
            return
        inputs: Inputs = args, kwargs
        if self.is_apart:
            self.num_forwards += 1
            if self._wants():
                with self._noting_failures("observing"), self._in_company(inputs):
                    self._observe_apart(inputs)
        elif self._agreement.may_learn() and self._wants():
            self._agreement.learnt()
            with self._noting_failures("observing"), self._in_company(inputs):
                if self.wishes:
                    self._learn(args, kwargs)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not self.is_apart:
            super()._before(module, args, kwargs)

    def _learn(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._company is not None:
            super()._learn(args, kwargs)
            self.wishes = False
        else:
            self.wishes = True
            self.probe.known.note(_WAITED)

    def _recover(self, inputs: Inputs) -> None:
        self._learn(*inputs)

    def _perform(self, module: nn.Module, inputs: Inputs) -> object:
        assert self._company is not None
        self._company.announce()
        return self._call(module, inputs)

    def _call(self, module: nn.Module, inputs: Inputs) -> object:
        """Its hooks gather what the forward needs, and those of ours are paused."""
        with torch._C._EnableTorchFunction():
            return module(*inputs[0], **inputs[1])

    @contextmanager
    def _in_company(self, inputs: Inputs) -> Iterator[None]:
        """Make forwards of our own as long as any process does."""
        self._company = company = self._agreement.company()
        self.paused += 1
        try:
            yield
            company.accompany(lambda: self._accompany(inputs))
        except Exception:
            company.fail()
            raise
        finally:
            self.paused -= 1
            self._company = None

    def _accompany(self, inputs: Inputs) -> None:
        """A forward that another process has announced."""
        contexts = undisturbed(self.model), preserved(self.model)
        with alone(self.model), firmly(*contexts), torch.no_grad():
            self._call(self.model, map_tensors(inputs, lambda tensor: tensor.detach().clone()))
