"""The slow function mode: discovers what a forward's rectifier calls are, by reading the graph behind each."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from relu_doctor.observe.custom import looks_like_a_rectifier
from relu_doctor.observe.gates import SCATTERS, SHAPES, Chosen, Output
from relu_doctor.observe.graph import Edge, GraphReader, Provenance
from relu_doctor.observe.layout import Sample
from relu_doctor.observe.modes import ForwardMode, Open, Watch
from relu_doctor.observe.rectifiers import ANY, GENERIC, MODULES, Rectifier, argument
from relu_doctor.observe.recurrent import RecurrentLayer, recurrent_site
from relu_doctor.observe.registry import Call, Reading, Witness
from relu_doctor.observe.selection import Selection
from relu_doctor.observe.sites import ActivationSite, build_site, strip_wrappers


class GradientInForwardError(Exception):
    """The forward asks autograd itself: its graph must keep real values."""


@dataclass(frozen=True, slots=True)
class Depth:
    """How much a discovery pass takes over from the model."""

    gradients: bool  # a graph at all
    everywhere: bool  # also inside the model's own no_grad blocks and past detach
    real: bool  # the graph keeps real values


@dataclass(slots=True)
class _Candidate:
    """A top-k that may turn out to be a site.

    Attributes:
        base_name: where it was called.
        pre: what it chose from.
        dim: along which axis.
        result: its values and indices.
        low: values at most this do not fire, by a rectifier that is applied to them.
    """

    base_name: str
    pre: Tensor
    dim: int
    result: Any
    low: float = -math.inf


class DiscoveringMode(ForwardMode):
    """The slow mode: reads every call's producers off the graph."""

    def __init__(self, watch: Watch, reading: Reading, phase: str, depth: Depth) -> None:
        super().__init__(watch, reading, phase)
        self.depth = depth
        self.path: list[tuple[str, nn.Module]] = []
        self._entered: list[int] = []  # calls seen before each of those modules
        self.calls: list[Call] = []
        self.rectified: dict[Node, int] = {}
        self.graph = GraphReader(watch.known.names, self.rectified)
        self.anonymous: dict[str, int] = {}
        self._candidates: dict[int, _Candidate] = {}
        self._refinements: list[tuple[Open, Selection]] = []
        self._used_otherwise: set[int] = set()  # calls whose output goes to something else than a choice

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
                    self._entered.append(self.num_calls)

                def leave(module: nn.Module, args: Any, output: Any) -> None:
                    path, _ = self.path.pop()
                    if self._entered.pop() == self.num_calls and not self.watch.inside_custom:
                        self._look(path, module, args, output)

                handles.append(module.register_forward_pre_hook(enter, prepend=True))
                handles.append(module.register_forward_hook(leave, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _look(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        """Point out a module in which no rectifier was seen, but which looks like one."""
        pre = args[0] if args else None
        if isinstance(pre, Tensor) and looks_like_a_rectifier(module, pre, output):
            self.watch.known.point_out(path, type(module).__name__)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Perform a call, and see whether it makes use of a rectifier's output or of a top-k."""
        result = self._perform(func, args, kwargs)
        if isinstance(result, Tensor) and result.requires_grad and func not in SHAPES and func not in SCATTERS:
            for value in args:
                output = self.ledger.output(value)
                if output is not None and not output.chosen:
                    self._used_otherwise.add(output.index)
        if func in SCATTERS:
            chosen, source = self.ledger.about(argument(args, kwargs, 2, "index")), argument(args, kwargs, 3, "src")
            values = self.ledger.output(source)
            if isinstance(chosen, Chosen) and values is not None and values.chosen:
                self._promote(values, -math.inf)
                self.ledger.note(result, values)
                if isinstance(result, Tensor) and result.grad_fn is not None:
                    self.rectified[result.grad_fn] = values.index
        return result

    def _perform(self, func: Any, args: Any, kwargs: Any) -> Any:
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
        site = self._found(*self._base_name(name, rectifier), name, pre)
        self.calls.append(Call(witness, site, Sample(pre.shape, self.reading.num_inputs)))
        return site

    def _found(self, base_name: str, rectifier: Rectifier, name: str, pre: Tensor) -> ActivationSite | None:
        edge: Edge | None = None if pre.grad_fn is None else (pre.grad_fn, pre.output_nr)
        provenance = self.graph.provenance(edge) if edge is not None else Provenance([], (), True, 0)
        site: ActivationSite | None = None
        if provenance.sources or name not in GENERIC:
            feeds = self._feeding(pre)
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
        return site

    def identify_recurrent(self, witness: Witness, layer: RecurrentLayer, result: Any) -> ActivationSite | None:
        """The site that the layer's weights name."""
        path, module = self.path[-1] if self.path else ("", self.watch.model)
        self.called.add(id(module))
        if layer.feeds_from is not None:
            below = [self.calls[len(self.calls) - back].site for back in layer.feeds_from]
            feeds = tuple(site.site_id for site in below if site is not None)
        else:
            feeds = self._feeding(layer.entry)
        site = recurrent_site(
            f"{path or type(module).__name__}{layer.suffix}",
            type(module).__name__,
            witness[-1],
            layer,
            feeds=feeds,
            order=self.watch.known.num_sites,
        )
        self.watch.known.know(site)
        self.calls.append(Call(witness, site, Sample(layer.output.shape, self.reading.num_inputs)))
        outputs = result if isinstance(result, Tensor) else result[0]
        if outputs.grad_fn is not None:
            self.rectified[outputs.grad_fn] = len(self.calls) - 1
        return site

    def after(self, post: Any, fires: Tensor | None = None) -> None:
        """Remember which node of the graph the rectifier's output is."""
        index = self.running[-1].index
        super().after(post, fires)
        if isinstance(post, Tensor) and post.grad_fn is not None:
            self.rectified[post.grad_fn] = index

    def awaits(self, site: ActivationSite) -> bool:
        """It is not known yet."""
        return True

    def refine(self, call: Open, selection: Selection) -> None:
        """Remember a choice until it is known whether the output goes anywhere else."""
        self._refinements.append((call, selection))

    def choose(self, witness: Witness, func: Any, args: Any, kwargs: Any) -> Any:
        """Perform a top-k, which is a site if its values are put back in their places, or rectified."""
        pre = argument(args, kwargs, 0, "input")
        result = self._perform(func, args, kwargs)
        base_name, _ = self._base_name("topk", ANY)
        dim = argument(args, kwargs, 2, "dim", -1)
        output = Output(len(self.calls), weakref.ref(pre), chosen=True)
        self._candidates[output.index] = _Candidate(base_name, pre, dim, result)
        self.calls.append(Call(witness, None, Sample(pre.shape, self.reading.num_inputs)))
        self.num_calls += 1
        self.ledger.note(result[0], output)
        self.ledger.note(result[1], Chosen(output))
        return result

    def absorb(self, witness: Witness, rectifier: Rectifier, choice: Output) -> None:
        """Let the top-k be a site that fires where this rectifier does."""
        self.calls.append(Call(witness, None, Sample(torch.Size(), self.reading.num_inputs)))
        self.num_calls += 1
        self._promote(choice, rectifier.low)

    def _promote(self, choice: Output, low: float) -> None:
        """A top-k is a site after all."""
        candidate = self._candidates.get(choice.index)
        if candidate is None:
            return
        known = self.calls[choice.index].site
        if known is not None and low > candidate.low:
            self.watch.known.forget(known)  # it was taken for one that fires wherever it selects
        candidate.low = max(candidate.low, low)
        rectifier = Rectifier("topk", candidate.low, selects=True)
        site = self._found(candidate.base_name, rectifier, "topk", candidate.pre)
        self.calls[choice.index] = replace(self.calls[choice.index], site=site)

    def finish(self) -> None:
        """The forward is over: settle what fires where something else selects."""
        for call, selection in self._refinements:
            if call.pending is not None and call.index not in self._used_otherwise:
                self.watch.known.selected.add(call.pending.site.site_id)
                selection.apply(call.pending)
        for index, candidate in self._candidates.items():
            pending = self.measure(self.calls[index].site, candidate.pre.detach())
            if pending is not None:
                Selection.by_top_k(candidate.pre.shape, candidate.dim, candidate.result, candidate.low).apply(pending)
                self.recorder.stage(pending)
        super().finish()

    def learn(self) -> None:
        """Let the recogniser know this order of calls."""
        self.watch.known.learn(self.phase, self.calls)

    def _feeding(self, pre: Tensor | None) -> tuple[str, ...]:
        """The sites whose outputs reach a tensor."""
        edges = () if pre is None or pre.grad_fn is None else ((pre.grad_fn, pre.output_nr),)
        sites = [self.calls[call].site for call in sorted(self.graph.feeding(edges))]
        return tuple(dict.fromkeys(site.site_id for site in sites if site is not None))

    def _base_name(self, name: str, rectifier: Rectifier) -> tuple[str, Rectifier]:
        path, module = self.path[-1] if self.path else ("", self.watch.model)
        if isinstance(module, MODULES) or self.watch.inside_custom:
            self.called.add(id(module))
            kind = type(module).__name__
            return path or kind, replace(rectifier, applied=kind)
        if self.mark:
            return self.mark, rectifier
        return f"{path}.{name}()" if path else f"{name}()", rectifier


_LEAVES_TORCH: set[Any] = {Tensor.numpy, Tensor.__array__}
_ASKS_AUTOGRAD = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}
