"""The fast function modes: every call must be one that a discovery has met in its place."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor

from relu_doctor.observe.forwards.calls import Open, Traced, UnknownCallError, Watch
from relu_doctor.observe.forwards.layout import read_layout
from relu_doctor.observe.forwards.modes import ForwardMode
from relu_doctor.observe.forwards.recorder import Pending
from relu_doctor.observe.forwards.recurrent import (
    RecurrentLayer,
)
from relu_doctor.observe.forwards.registry import ROOT, Reading, Witness
from relu_doctor.observe.forwards.selection import Selection
from relu_doctor.observe.rectifiers.facts import Output
from relu_doctor.observe.rectifiers.kinds import Rectifier, argument
from relu_doctor.observe.rectifiers.transforms import outside_of_transforms, without_vmap
from relu_doctor.observe.sites import ActivationSite


class RecognisingMode(ForwardMode):
    """The fast mode: every call must be one that a discovery has met in this place."""

    def __init__(self, watch: Watch, reading: Reading, phase: str) -> None:
        super().__init__(watch, reading, phase)
        self.state = ROOT

    def identify(self, witness: Witness, name: str, rectifier: Rectifier, pre: Tensor) -> ActivationSite | None:
        """The site that a discovery met in this place."""
        return self._known(witness, pre.shape)

    def identify_recurrent(self, witness: Witness, layer: RecurrentLayer, result: Any) -> ActivationSite | None:
        """The site that a discovery met in this place."""
        return self._known(witness, layer.output.shape)

    def _known(self, witness: Witness, shape: torch.Size) -> ActivationSite | None:
        known = self.watch.known.transition(self.phase, self.state, witness)
        if known is None:
            raise UnknownCallError
        call, self.state = known
        self.sample, site = call.sample, call.site
        if site is not None and site.unit_axes and site.codes != _codes(shape, site.unit_axes):
            raise UnknownCallError
        if call.shows_nothing and 0 not in shape:
            raise UnknownCallError
        return site

    def awaits(self, site: ActivationSite) -> bool:
        """As a discovery found out."""
        return site.site_id in self.watch.known.selected

    def refine(self, call: Open, selection: Selection, *, gate: Tensor | None = None, further: bool = False) -> None:
        """Apply a selection to a site of which a discovery found that it is selected from."""
        if call.pending is not None and (gate is None or call.pending.site.site_id in self.watch.known.gated):
            call.select(selection, further=further)

    def choose(self, witness: Witness, func: Any, args: Any, kwargs: Any) -> Any:
        """Measure a top-k that a discovery found to be a site."""
        pre = argument(args, kwargs, 0, "input")
        whole = without_vmap(pre)
        site = None if whole is None else self._known(witness, whole.shape)
        with outside_of_transforms():
            pending = None if whole is None else self.measure(site, whole.detach())
        result = self.perform(func, args, kwargs)
        self._note_choice(pre, result, Output(self.num_calls, weakref.ref(pre), chosen=True))
        self.num_calls += 1
        choice = self.choice_of(args, kwargs, result) if pending is not None else None
        if choice is not None and site is not None and pending is not None:
            with outside_of_transforms():
                choice.selection(site.rectifier.low).apply(pending)
            self.recorder.stage(pending)
        return result

    def absorb(self, witness: Witness, rectifier: Rectifier, choice: Output) -> None:
        """Pass a call that a discovery found to belong to a top-k."""
        if self._known(witness, torch.Size()) is not None:
            raise UnknownCallError


class TracingMode(RecognisingMode):
    """Keeps the pre-activations of a few inputs, to compare them; counts nothing."""

    def __init__(self, watch: Watch, reading: Reading, phase: str) -> None:
        super().__init__(watch, reading, phase)
        self.trace: list[Traced] = []

    def measure(self, site: ActivationSite | None, pre: Tensor) -> Pending | None:
        """Keep the pre-activation instead of measuring it."""
        if site is not None and site.num_units:
            seen = self.watch.known.seen.get(site.site_id)
            layout = read_layout(pre.shape, site, self.reading.num_inputs, None, seen)
            self.trace.append(Traced(site, pre.clone(), layout, self.whose))
        self.whose = None
        return None


def _codes(shape: torch.Size, axes: tuple[int, ...]) -> int:
    return math.prod(shape[axis] for axis in axes)
