"""The function modes that watch a forward: recognise known calls, trace them, or discover new ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from relu_doctor.observe.graph import Edge, GraphReader, Provenance
from relu_doctor.observe.layout import Layout, Sample, read_layout
from relu_doctor.observe.recorder import Pending, Recorder
from relu_doctor.observe.rectifiers import GENERIC, MODULES, Rectifier, recognise
from relu_doctor.observe.registry import ROOT, Call, CallRegistry, Reading, Witness
from relu_doctor.observe.sites import ActivationSite, build_site, strip_wrappers
from relu_doctor.terms import Statistics


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


class GradientInForwardError(Exception):
    """The forward asks autograd itself: its graph must keep real values."""


@dataclass(frozen=True, slots=True)
class Depth:
    """How much a discovery pass takes over from the model."""

    gradients: bool  # a graph at all
    everywhere: bool  # also inside the model's own no_grad blocks and past detach
    real: bool  # the graph keeps real values


class ForwardMode(TorchFunctionMode):
    """Sees torch calls, collects the witness, and stages one forward's statistics."""

    def __init__(self, watch: Watch, reading: Reading, phase: str) -> None:
        super().__init__()
        self.watch = watch
        self.reading = reading
        self.phase = phase
        self.recorder = Recorder(watch.known, reading, watch.statistics)
        self.called: set[int] = set()
        self.used: dict[str, None] = {}
        self.pending: list[Pending | None] = []
        self.sample: Sample | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = None if self.watch.inside_custom else recognise(func, args, kwargs)
        if known is None:
            self._note_parameters(args, kwargs)
            return self.call(func, args, kwargs)
        if torch._C._functorch.is_functorch_wrapped_tensor(known[2]):
            self.watch.known.note(f"{known[0]}() inside torch.func (vmap, grad, …) was not observed")
            return func(*args, **kwargs)
        self.before(*known)
        result = func(*args, **kwargs)
        self.after(result)
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

    def before(self, name: str, rectifier: Rectifier, pre: Tensor) -> None:
        """A rectifier is about to be applied: measure its input, which it may overwrite."""
        witness: Witness = (name, pre.dim(), rectifier.low, rectifier.high, tuple(self.used))
        self.used = {}
        site = self.identify(witness, name, rectifier, pre)
        self.pending.append(
            None if site is None or not site.num_units else self.recorder.begin(site, pre.detach(), self.sample)
        )

    def after(self, post: Any) -> None:
        """The rectifier was applied."""
        pending = self.pending.pop()
        if pending is not None:
            self.recorder.end(pending, post)

    def identify(self, witness: Witness, name: str, rectifier: Rectifier, pre: Tensor) -> ActivationSite | None:
        """Which site a call belongs to; ``None`` where it is none."""
        raise NotImplementedError


class RecognisingMode(ForwardMode):
    """The fast mode: every call must be one that a discovery has met in this place."""

    def __init__(self, watch: Watch, reading: Reading, phase: str) -> None:
        super().__init__(watch, reading, phase)
        self.state = ROOT

    def identify(self, witness: Witness, name: str, rectifier: Rectifier, pre: Tensor) -> ActivationSite | None:
        """The site that a discovery met in this place."""
        known = self.watch.known.transition(self.phase, self.state, witness)
        if known is None:
            raise UnknownCallError
        call, self.state = known
        self.sample, site = call.sample, call.site
        if site is not None and site.unit_axes and site.codes != _codes(pre.shape, site.unit_axes):
            raise UnknownCallError
        return site


class TracingMode(RecognisingMode):
    """Keeps the pre-activations of a few inputs, to compare them; counts nothing."""

    def __init__(self, watch: Watch, reading: Reading, phase: str) -> None:
        super().__init__(watch, reading, phase)
        self.trace: list[tuple[ActivationSite, Tensor, Layout]] = []

    def before(self, name: str, rectifier: Rectifier, pre: Tensor) -> None:
        """Keep the pre-activation instead of measuring it."""
        witness: Witness = (name, pre.dim(), rectifier.low, rectifier.high, tuple(self.used))
        self.used = {}
        site = self.identify(witness, name, rectifier, pre)
        if site is not None and site.num_units:
            seen = self.watch.known.seen.get(site.site_id)
            layout = read_layout(pre.shape, site, self.reading.num_inputs, None, seen)
            self.trace.append((site, pre.detach().clone(), layout))
        self.pending.append(None)


class DiscoveringMode(ForwardMode):
    """The slow mode: reads every call's producers off the graph."""

    def __init__(self, watch: Watch, reading: Reading, phase: str, depth: Depth) -> None:
        super().__init__(watch, reading, phase)
        self.depth = depth
        self.path: list[tuple[str, nn.Module]] = []
        self.calls: list[Call] = []
        self.rectified: dict[Node, int] = {}
        self.graph = GraphReader(watch.known.names, self.rectified)
        self.anonymous: dict[str, int] = {}

    @contextmanager
    def module_paths(self) -> Iterator[None]:
        """Follow which module's forward is running."""
        handles: list[RemovableHandle] = []
        try:
            for name, module in self.watch.model.named_modules():
                path = strip_wrappers(f"{name}.")[:-1]
                if isinstance(module, torch.jit.ScriptModule):
                    continue  # takes no hooks; it is listed as not observed

                def enter(module: nn.Module, args: Any, path: str = path) -> None:
                    self.path.append((path, module))

                def leave(module: nn.Module, args: Any, output: Any) -> None:
                    self.path.pop()

                handles.append(module.register_forward_pre_hook(enter, prepend=True))
                handles.append(module.register_forward_hook(leave, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Keep the graph whole where the model cuts it; the values are the same."""
        if not self.depth.gradients:
            return func(*args, **kwargs)
        if not self.depth.real and func in _ASKS_AUTOGRAD:
            raise GradientInForwardError
        if self.depth.everywhere:
            if func is torch._C._set_grad_enabled and args and not args[0]:
                return None
            if func is Tensor.detach and args[0].requires_grad:
                return args[0].view_as(args[0])
        if func in _LEAVES_TORCH and args[0].requires_grad:  # works in the model's own no_grad run
            return func(args[0].detach(), *args[1:], **kwargs)
        return func(*args, **kwargs)

    def identify(self, witness: Witness, name: str, rectifier: Rectifier, pre: Tensor) -> ActivationSite | None:
        """The site that the graph shows."""
        base_name, rectifier = self._base_name(name, rectifier)
        edge: Edge | None = None if pre.grad_fn is None else (pre.grad_fn, pre.output_nr)
        provenance = self.graph.provenance(edge) if edge is not None else Provenance([], (), True, 0)
        site: ActivationSite | None = None
        if provenance.sources or name not in GENERIC:
            feeding = sorted(self.graph.feeding(() if edge is None else (edge,)))
            feeds = tuple(
                dict.fromkeys(found.site_id for call in feeding if (found := self.calls[call].site) is not None)
            )
            occurrence = self.anonymous.get(base_name, 0)
            site = build_site(
                base_name=base_name,
                kind=name,
                rectifier=rectifier,
                edge=edge,
                shape=pre.shape,
                provenance=provenance,
                feeds=feeds,
                order=self.watch.known.num_sites,
                occurrence=occurrence,
                unit_axis=self.watch.known.unit_axis(base_name),
            )
            if not site.producers:
                self.anonymous[base_name] = occurrence + 1
            if name in GENERIC and not site.num_units:
                site = None
            else:
                self.watch.known.know(site)
        self.calls.append(Call(witness, site, Sample(pre.shape, self.reading.num_inputs)))
        return site

    def after(self, post: Any) -> None:
        """Remember which node of the graph the rectifier's output is."""
        super().after(post)
        if isinstance(post, Tensor) and post.grad_fn is not None:
            self.rectified[post.grad_fn] = len(self.calls) - 1

    def learn(self) -> None:
        """Let the recogniser know this order of calls."""
        self.watch.known.learn(self.phase, self.calls)

    def _base_name(self, name: str, rectifier: Rectifier) -> tuple[str, Rectifier]:
        path, module = self.path[-1] if self.path else ("", self.watch.model)
        if isinstance(module, MODULES) or self.watch.inside_custom:
            self.called.add(id(module))
            kind = type(module).__name__
            return path or kind, replace(rectifier, name=kind)
        return f"{path}.{name}()" if path else f"{name}()", rectifier


def _codes(shape: torch.Size, axes: tuple[int, ...]) -> int:
    return math.prod(shape[axis] for axis in axes)


_LEAVES_TORCH: set[Any] = {Tensor.numpy, Tensor.__array__}
_ASKS_AUTOGRAD = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}
