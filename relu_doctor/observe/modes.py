"""The function modes that watch a forward: recognise known calls, trace them, or discover new ones."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from relu_doctor.errors import UnsupportedModelError
from relu_doctor.observe.gates import Chosen, Ledger, Output, Refined
from relu_doctor.observe.layout import Layout, Sample, read_layout
from relu_doctor.observe.recorder import Pending, Recorder
from relu_doctor.observe.rectifiers import ANY, Applied, Rectifier, argument, recognise
from relu_doctor.observe.recurrent import RECURRENT, RecurrentLayer, recurrent_layers
from relu_doctor.observe.registry import ROOT, CallRegistry, Reading, Witness
from relu_doctor.observe.selection import TOP_K, Selection
from relu_doctor.observe.sites import ActivationSite
from relu_doctor.observe.tapping import tap
from relu_doctor.observe.transforms import outside_of_transforms, without_vmap
from relu_doctor.terms import Statistics
from relu_doctor.text import clean_text


@dataclass(slots=True)
class Watch:
    """What the modes of one probe share.

    Attributes:
        model: the model that is watched.
        known: what is known of its calls.
        statistics: how much to measure.
        inside_custom: the user's own rectifier modules whose forward is running; calls inside are theirs.
    """

    model: nn.Module
    known: CallRegistry
    statistics: Statistics
    inside_custom: list[int] = field(default_factory=list)


class UnknownCallError(Exception):
    """A call that the recogniser has not met: the forward must be discovered."""


@dataclass(eq=False, slots=True)
class Open:
    """A recognised call of the forward that is running.

    Attributes:
        index: which call it is.
        pre: what the rectifier is applied to.
        pending: its numbers; ``None`` where nothing is measured.
        choice: the top-k whose values it is applied to, which it only refines.
    """

    index: int
    pre: weakref.ref[Tensor]
    pending: Pending | None
    choice: Output | None = None


class ForwardMode(TorchFunctionMode):
    """Sees torch calls, collects the witness, and stages one forward's statistics."""

    def __init__(self, watch: Watch, reading: Reading, phase: str) -> None:
        super().__init__()
        self.watch = watch
        self.reading = reading
        self.phase = phase
        self.recorder = Recorder(watch.known, reading, watch.statistics)
        self.ledger = Ledger()
        self.called: set[int] = set()
        self.used: dict[str, None] = {}
        self.running: list[Open] = []
        self.waiting: list[Pending] = []  # calls whose output may yet be chosen from
        self.num_calls = 0
        self.sample: Sample | None = None
        self.mark = ""  # the name of the tap that is being looked at

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is tap:
            return self._tap(*args, **kwargs)
        if not self.watch.inside_custom:
            applied = recognise(func, args, kwargs) or self.ledger.recognise(func, args, kwargs)
            if isinstance(applied, Applied):
                return self._apply(applied, func, args, kwargs)
            if isinstance(applied, Refined):
                result = func(*args, **kwargs)
                self.ledger.note(result, Output(applied.output.index, applied.output.pre, chosen=True))
                if applied.output.record is not None:
                    self.refine(applied.output.record, Selection.by_mask(applied.mask))
                return result
            if func in TOP_K:
                return self._choose(func, args, kwargs)
            if func in RECURRENT:
                return self._recur(func, args, kwargs)
        self._note_parameters(args, kwargs)
        result = self.call(func, args, kwargs)
        self.ledger.follow(func, args, kwargs, result)
        return result

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Perform a torch call that applies no rectifier."""
        return func(*args, **kwargs)

    def _note_parameters(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        names = self.watch.known.names
        for value in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(value, nn.Parameter):
                name = names.get(id(value))
                if name is not None:
                    self.used[name] = None

    def _apply(self, applied: Applied, func: Any, args: Any, kwargs: Any) -> Any:
        if not torch._C._functorch.is_functorch_wrapped_tensor(applied.pre):
            self.before(applied.name, applied.rectifier, applied.pre)
            result = func(*args, **kwargs)
            self.after(applied.pre if applied.in_place else result, applied.fires)
            return result
        pre = without_vmap(applied.pre)
        if pre is None:
            self.watch.known.note(f"{applied.name}() inside torch.func.grad or jvp was not observed")
            return func(*args, **kwargs)
        fires = None if applied.fires is None else without_vmap(applied.fires)
        with outside_of_transforms():
            self.before(applied.name, applied.rectifier, pre)
        result = func(*args, **kwargs)
        post = without_vmap(applied.pre if applied.in_place else result)
        with outside_of_transforms():
            self.after(post, fires)
        return result

    def before(self, name: str, rectifier: Rectifier, pre: Tensor) -> None:
        """A rectifier is about to be applied: measure its input, which it may overwrite."""
        witness = self._witness(name, rectifier, pre)
        choice = self.ledger.output(pre)
        if choice is not None and choice.chosen:
            self.absorb(witness, rectifier, choice)
            self.running.append(Open(choice.index, choice.pre, None, choice))
            return
        site = self.identify(witness, name, rectifier, pre)
        self.running.append(Open(self.num_calls, weakref.ref(pre), self.measure(site, pre.detach())))
        self.num_calls += 1

    def _witness(self, name: str, rectifier: Rectifier, pre: Tensor) -> Witness:
        used, self.used = tuple(self.used), {}
        return name, pre.dim(), rectifier.low, rectifier.high, used

    def measure(self, site: ActivationSite | None, pre: Tensor) -> Pending | None:
        """Measure a call of a site."""
        return None if site is None or not site.num_units else self.recorder.begin(site, pre, self.sample)

    def after(self, post: Any, fires: Tensor | None = None) -> None:
        """The rectifier was applied.

        Args:
            post: its output.
            fires: where it fired, of the pre-activation's shape, where no interval tells.
        """
        call = self.running.pop()
        awaits = call.pending is not None and self.awaits(call.pending.site)
        if isinstance(post, Tensor):
            self.ledger.note(post, call.choice or Output(call.index, call.pre, call if awaits else None))
        if call.pending is None:
            return
        self.recorder.end(call.pending, post)
        if fires is not None:
            Selection.by_mask(fires).apply(call.pending)
        if awaits:
            self.waiting.append(call.pending)
        else:
            self.recorder.stage(call.pending)

    def _choose(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A top-k: it decides what fires, of a rectifier's output or by itself."""
        pre = argument(args, kwargs, 0, "input")
        wrapped = isinstance(pre, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(pre)
        if wrapped or not pre.is_floating_point() or not argument(args, kwargs, 3, "largest", True):
            return self.call(func, args, kwargs)
        output = self.ledger.output(pre)
        if output is not None and not output.chosen:
            result = func(*args, **kwargs)
            if output.record is not None:
                dim = argument(args, kwargs, 2, "dim", -1)
                self.refine(output.record, Selection.by_top_k(pre.shape, dim, result, 0.0))
            self.ledger.note(result[0], Output(output.index, output.pre, chosen=True))
            self.ledger.note(result[1], Chosen(Output(output.index, weakref.ref(pre))))
            return result
        return self.choose(self._witness("topk", ANY, pre), func, args, kwargs)

    def _tap(
        self, name: str, pre: Tensor, post: Tensor, *, fires: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> Any:
        """A mark in the model's own code."""
        if pre.shape != post.shape:
            raise UnsupportedModelError(
                f"tap({name!r}, pre, post) expects two tensors of one shape, found {tuple(pre.shape)} and "
                f"{tuple(post.shape)}."
            )
        self.mark = clean_text(str(name))
        try:
            self.before(f"tap {self.mark}", replace(ANY, applied="tap"), pre)
        finally:
            self.mark = ""
        with torch.no_grad():
            self.after(post, (post if fires is None else fires(pre, post)).detach() != 0)
        return post

    def _recur(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A recurrent layer with ReLU inside one fused call: only its outputs are seen."""
        result = self.call(func, args, kwargs)
        for layer in recurrent_layers(func, args, kwargs, result):
            names = [self.watch.known.names.get(id(weight)) for weight in layer.weights]
            used = tuple(name for name in names if name is not None)
            witness: Witness = ("rnn_relu", layer.output.dim(), 0.0, math.inf, used)
            site = self.identify_recurrent(witness, layer, result)
            pending = self.measure(site, layer.output.detach())
            self.num_calls += 1
            if pending is not None:
                self.recorder.end(pending, layer.output)
                pending.summary.stats.positions = pending.summary.stats.positions - layer.num_padding
                self.recorder.stage(pending)
        self.used = {}
        return result

    def finish(self) -> None:
        """The forward is over: stage what waited for a choice."""
        while self.waiting:
            self.recorder.stage(self.waiting.pop(0))

    def identify(self, witness: Witness, name: str, rectifier: Rectifier, pre: Tensor) -> ActivationSite | None:
        """Which site a call belongs to; ``None`` where it is none."""
        raise NotImplementedError

    def identify_recurrent(self, witness: Witness, layer: RecurrentLayer, result: Any) -> ActivationSite | None:
        """Which site a layer of a recurrent call is."""
        raise NotImplementedError

    def awaits(self, site: ActivationSite) -> bool:
        """Whether a later call of the forward may choose from a site's output."""
        raise NotImplementedError

    def refine(self, call: Open, selection: Selection) -> None:
        """What a call fires goes on only where something else selects it."""
        raise NotImplementedError

    def choose(self, witness: Witness, func: Any, args: Any, kwargs: Any) -> Any:
        """Perform a top-k that does not choose from a rectifier's output."""
        raise NotImplementedError

    def absorb(self, witness: Witness, rectifier: Rectifier, choice: Output) -> None:
        """A rectifier is applied to the values of a top-k, and belongs to it."""
        raise NotImplementedError


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
        return site

    def awaits(self, site: ActivationSite) -> bool:
        """As a discovery found out."""
        return site.site_id in self.watch.known.selected

    def refine(self, call: Open, selection: Selection) -> None:
        """Apply a selection to a site of which a discovery found that it is selected from."""
        if call.pending is not None and self.awaits(call.pending.site):
            selection.apply(call.pending)

    def choose(self, witness: Witness, func: Any, args: Any, kwargs: Any) -> Any:
        """Measure a top-k that a discovery found to be a site."""
        pre = argument(args, kwargs, 0, "input")
        site = self._known(witness, pre.shape)
        pending = self.measure(site, pre.detach())
        result = self.call(func, args, kwargs)
        output = Output(self.num_calls, weakref.ref(pre), chosen=True)
        self.num_calls += 1
        self.ledger.note(result[0], output)
        self.ledger.note(result[1], Chosen(output))
        if site is not None and pending is not None:
            dim = argument(args, kwargs, 2, "dim", -1)
            Selection.by_top_k(pre.shape, dim, result, site.rectifier.low).apply(pending)
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
        self.trace: list[tuple[ActivationSite, Tensor, Layout]] = []

    def measure(self, site: ActivationSite | None, pre: Tensor) -> Pending | None:
        """Keep the pre-activation instead of measuring it."""
        if site is not None and site.num_units:
            seen = self.watch.known.seen.get(site.site_id)
            layout = read_layout(pre.shape, site, self.reading.num_inputs, None, seen)
            self.trace.append((site, pre.clone(), layout))
        return None


def _codes(shape: torch.Size, axes: tuple[int, ...]) -> int:
    return math.prod(shape[axis] for axis in axes)
