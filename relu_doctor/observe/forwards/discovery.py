"""The slow function mode: discovers what a forward's rectifier calls are, by reading the graph behind each."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.utils.parametrize import ParametrizationList

from relu_doctor.errors import ReLUDoctorError
from relu_doctor.observe.forwards.calls import Open, Watch
from relu_doctor.observe.forwards.following import Depth, Follower
from relu_doctor.observe.forwards.layout import Sample
from relu_doctor.observe.forwards.modes import ForwardMode
from relu_doctor.observe.forwards.paths import ModulePaths
from relu_doctor.observe.forwards.readings import Readings
from relu_doctor.observe.forwards.recorder import Pending
from relu_doctor.observe.forwards.recurrent import LAYERS, RecurrentLayer, recurrent_site
from relu_doctor.observe.forwards.registry import Call, Reading, Witness
from relu_doctor.observe.forwards.selection import Choice, Selection
from relu_doctor.observe.forwards.unseen import DROPOUTS, is_accounted_for, made_zero
from relu_doctor.observe.forwards.watching import aside
from relu_doctor.observe.graph.edges import Edge
from relu_doctor.observe.graph.passing import candidates, passing
from relu_doctor.observe.graph.provenance import GraphReader, Provenance
from relu_doctor.observe.graph.routing import uses
from relu_doctor.observe.inputs.feeding import tensors_in
from relu_doctor.observe.rectifiers.bends import Bend
from relu_doctor.observe.rectifiers.custom import looks_like_a_rectifier
from relu_doctor.observe.rectifiers.facts import Output
from relu_doctor.observe.rectifiers.gates import SCATTERS
from relu_doctor.observe.rectifiers.kinds import ANY, GENERIC, MODULES, Rectifier, argument, name_of
from relu_doctor.observe.rectifiers.transforms import outside_of_transforms, without_vmap
from relu_doctor.observe.sites import ActivationSite, build_site


class GradientInForwardError(Exception):
    """The forward asks autograd itself: its graph must keep real values."""


@dataclass(slots=True)
class _Candidate:
    """A top-k that may turn out to be a site.

    Attributes:
        base_name: where it was called.
        choice: what it chose.
        node: where its values stand in the graph.
        low: values at most this do not fire, by a rectifier that is applied to them.
    """

    base_name: str
    choice: Choice
    node: Node | None
    low: float = -math.inf


class DiscoveringMode(ForwardMode):
    """The slow mode: reads every call's producers off the graph."""

    def __init__(self, watch: Watch, reading: Reading, phase: str, depth: Depth) -> None:
        super().__init__(watch, reading, phase)
        self.depth = depth
        self.follower = Follower(watch.known.names, depth, self.caller)
        self.paths = ModulePaths(watch, self, self._left)
        self.calls: list[Call] = []
        self.rectified: dict[Node, int] = {}
        self.graph = GraphReader(watch.known.names, self.rectified)
        self.anonymous: dict[str, int] = {}
        self._of_weights: set[int] = set()  # calls on parameters, whose output is a weight
        self._results: list[Node] = []  # what the calls and modules returned, for what reads a rectifier's output
        self._origin: tuple[str, str] | None = None  # path and class behind the operator that is being called
        self._made: tuple[Tensor, int] | None = None  # the last output, until its node is known
        self._candidates: dict[int, _Candidate] = {}
        self._refinements: list[tuple[Open, Selection, bool]] = []
        self._gated: set[int] = set()  # calls that another layer's mask lets pass
        self._readings = Readings(self.ledger, self.follower.edge)
        self._read_otherwise: set[int] = set()  # calls whose output goes to something else than a choice
        self._parts: list[tuple[int, tuple[int, ...]]] = []  # calls that turn out to be a rectifier, and their parts
        self._measured: dict[int, Pending] = {}
        self._drops = phase == "train"

    def _left(self, path: str, module: nn.Module, args: Any, output: Any, called_before: int) -> None:
        """A module's forward has returned."""
        self._keep(output)
        self._note_computed(module, output)
        if called_before == self.num_calls and not self.watch.inside_custom:
            with aside():
                self._look(path, module, args, output)

    def _note_computed(self, module: nn.Module, output: Any) -> None:
        """Remember what a parametrization computes, which is a weight however it is made."""
        if isinstance(module, ParametrizationList) and isinstance(output, Tensor):
            edge = self.follower.edge(output)
            if edge is not None:
                self.graph.operations.computed.add(edge)

    def _look(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        """Point out a module in which no rectifier was seen, but which looks like one."""
        pre = args[0] if args else None
        if isinstance(pre, Tensor) and looks_like_a_rectifier(module, pre, output):
            self.watch.known.point_out(path, type(module).__name__)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Perform a call, and see whether it makes use of a rectifier's output or of a top-k."""
        chosen, source = self.ledger.scattered(args, kwargs) if func in SCATTERS else (None, None)
        values = None if chosen is None else self.ledger.output(source)
        put_back = values is not None and values.chosen and _is_zero(argument(args, kwargs, 0, "input"))
        self._readings.expect(func, args, kwargs)
        result = self.perform(func, args, kwargs)
        if put_back and values is not None:
            with outside_of_transforms():
                self._promote(values, -math.inf)
                self._note_made(without_vmap(args[0] if result is None else result), values.index)
        if args and isinstance(args[0], Tensor) and args[0].is_quantized and (name := name_of(func)) is not None:
            base_name, _ = self._base_name(name, ANY)
            self.watch.known.note(f"{base_name} was called on a quantised tensor, which is not supported")
        return result

    def passed(self, result: Any) -> None:
        """See whether the call before made anything else of a rectifier's output than a choice from it."""
        self._readings.take_in(result, everywhere=self.below)

    def consume(self, calls: set[int]) -> None:
        """Note that another rectifier reads them."""
        self._readings.consume(calls)

    def perform(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Keep the graph whole where the model cuts it; the values are the same."""
        if self.below or not self.depth.gradients:  # below autograd there is nothing to keep
            return super().perform(func, args, kwargs)
        if not self.depth.real and func in _ASKS_AUTOGRAD:
            raise GradientInForwardError
        if self.depth.everywhere and func is torch._C._set_grad_enabled and args and not args[0]:
            return None
        self.watch.known.ranks.note_call(func, args)
        self._look_at_zeros(func, args, kwargs)
        result = self.follower.perform(func, args, kwargs)
        if func in LAYERS:
            self._mark(args, kwargs, result)
        self._keep(result)
        return result

    def _look_at_zeros(self, func: Any, args: Any, kwargs: Any) -> None:
        """Point out values that something has rectified which was not recognised; dropout makes zeros as well."""
        self._drops |= func in DROPOUTS and bool(argument(args, kwargs, 2, "training", True))
        if self._drops or self.watch.inside_custom or torch._C._are_functorch_transforms_active():
            return
        for tensor in made_zero(func, args, kwargs):
            edge = self.follower.edge(tensor)
            known = {node for node, index in self.rectified.items() if self.calls[index].site is not None}
            if edge is None or is_accounted_for(edge, self.graph.operations, known):
                continue
            path, module = self.paths.here
            self.watch.known.note(
                f"what {path or type(module).__name__} reads is zero in many places, and no rectifier was seen to have "
                "made it so: mark an activation of your own with relu_doctor.tap(name, pre, post)"
            )

    def _keep(self, result: Any) -> None:
        """Remember where results stand in the graph."""
        edges = (self.follower.edge(tensor) for tensor in tensors_in(result))
        self._results += [edge[0] for edge in edges if edge is not None]

    def _mark(self, args: Any, kwargs: Any, result: Any) -> None:
        """Let a recurrent layer's outputs stand for its weights, whatever nodes it is made of."""
        given = list(tensors_in((args, kwargs)))
        named = [(tensor, self.watch.known.names.of(tensor)) for tensor in given]
        edges = [self.follower.edge(tensor) for tensor, name in named if name is None]
        outputs = [edge for tensor in tensors_in(result) if (edge := self.follower.edge(tensor)) is not None]
        weights = tuple(name for tensor, name in named if name is not None and tensor.dim() > 1)
        biases = tuple(name for tensor, name in named if name is not None and tensor.dim() == 1)
        self.graph.operations.mark(outputs, tuple(edge for edge in edges if edge is not None), weights, biases)

    def identify(self, witness: Witness, name: str, rectifier: Rectifier, pre: Tensor) -> ActivationSite | None:
        """The site that the graph shows; a tap on a rectifier that was seen names its site."""
        self.settle()
        if self.marked is not None and self._rename(self.marked, self.mark):
            site = None
        else:
            site = self._found(*self._base_name(name, rectifier), name, pre)
        self.calls.append(Call(witness, site, Sample(pre.shape, self.reading.num_inputs)))
        return site

    def _rename(self, index: int, base_name: str) -> bool:
        """Give the site of a call another name, if it is a site."""
        site = self.calls[index].site
        if site is not None:
            site = replace(site, base_name=base_name)
            self.calls[index] = replace(self.calls[index], site=site)
            self.watch.known.rename(site)
        return site is not None

    def _found(self, base_name: str, rectifier: Rectifier, name: str, pre: Tensor) -> ActivationSite | None:
        edge = self.follower.edge(pre)
        provenance = self.graph.provenance(edge) if edge is not None else Provenance([], (), True, 0)
        told: int | None = None
        if self.below:
            base_name, rectifier, told = self._placed(base_name, rectifier, name, provenance)
        wanted = self.watch.known.unit_axis(base_name)
        site: ActivationSite | None = None
        if self._makes_a_weight(pre, edge, provenance):
            self._of_weights.add(len(self.calls))
            return None
        if provenance.sources or name not in GENERIC:
            feeds = self._feeding(pre)
            occurrence = self.anonymous.get(base_name, 0)
            build = partial(
                build_site,
                base_name=base_name,
                kind=name,
                rectifier=rectifier,
                shape=pre.shape,
                provenance=provenance,
                feeds=feeds,
                order=self.watch.known.num_sites,
                occurrence=occurrence,
                unit_axis=told if wanted is None and not provenance.sources else wanted,
            )
            try:
                site = build(edge=edge)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:  # a node that cannot be run backwards
                if not self.depth.real or isinstance(error, ReLUDoctorError):
                    raise  # another depth may know better
                site = build(edge=None)
            if not site.producers:
                self.anonymous[base_name] = occurrence + 1
            if name in GENERIC and not site.num_units and pre.numel():
                site = None
                self.watch.known.note(f"{base_name} may rectify: the axis of the units behind it could not be told")
            else:
                self.watch.known.know(site)
        return site

    def _makes_a_weight(self, pre: Tensor, edge: Edge | None, provenance: Provenance) -> bool:
        """Whether a rectifier is applied to parameters alone, as by weights that are kept positive."""
        if self.watch.known.names.of(pre) is not None:
            return True
        return edge is not None and not provenance.sources and self.graph.operations.is_parameter(edge)

    def identify_recurrent(self, witness: Witness, layer: RecurrentLayer, result: Any) -> ActivationSite | None:
        """The site that the layer's weights name."""
        path, module = self.paths.here
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
        edge = self.follower.edge(outputs)
        if edge is not None:
            self.rectified[edge[0]] = len(self.calls) - 1
        return site

    def after(self, post: Any, fires: Tensor | None = None, bend: Bend | None = None) -> None:
        """Remember which node of the graph the rectifier's output is."""
        call = self.running[-1]
        if call.pending is not None:
            self._measured[call.index] = call.pending
        super().after(post, fires, bend)
        self._note_made(post, call.index)

    def _note_made(self, post: Any, index: int) -> None:
        self._made = (post, index) if isinstance(post, Tensor) else None
        if not self.below:
            self.settle()

    def settle(self) -> None:
        """Remember which node of the graph the last output is; an operator's has none before it has returned."""
        if self._made is not None:
            post, index = self._made
            self._made = None
            edge = self.follower.edge(post)
            if edge is not None and index not in self._of_weights:
                self.rectified[edge[0]] = index

    def enter_operator(self, operator: Any) -> None:
        """Look up which module an exported program has the operator from."""
        self._origin = self.paths.step(operator)

    def hidden(self, name: str) -> None:
        """Say that an operator rectifies inside."""
        self.watch.known.hidden.add(name)
        self.watch.known.note(f"{name} rectifies inside one operator, where it was not observed")

    def awaits(self, site: ActivationSite) -> bool:
        """It is not known yet."""
        return True

    def refine(self, call: Open, selection: Selection, *, gate: Tensor | None = None, further: bool = False) -> None:
        """Remember a choice until it is known whether the output goes anywhere else."""
        if gate is not None:
            edge = self.follower.edge(gate)
            if edge is None or call.pending is None or not self.graph.provenance(edge).sources:
                self._readings.consume({call.index})  # padding, dropout: nothing that could hold a unit back
                return
            self._gated.add(call.index)
        self._refinements.append((call, selection, further))

    def replaced(self, calls: tuple[int, ...]) -> None:
        """Remember that rectifiers are parts of another."""
        if calls:
            self._parts.append((self.running[-1].index, calls))

    def choose(self, witness: Witness, func: Any, args: Any, kwargs: Any) -> Any:
        """Perform a top-k, which is a site if its values are put back in their places, or rectified."""
        pre = argument(args, kwargs, 0, "input")
        result = self.perform(func, args, kwargs)
        base_name, _ = self._base_name("topk", ANY)
        index = len(self.calls)
        choice = self.choice_of(args, kwargs, result)
        if choice is not None:
            edge = self.follower.edge(choice.values)
            self._candidates[index] = _Candidate(base_name, choice, None if edge is None else edge[0])
        self.calls.append(Call(witness, None, Sample(pre.shape, self.reading.num_inputs)))
        self.num_calls += 1
        self._note_choice(pre, result, Output(index, weakref.ref(pre), chosen=True))
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
        if bool(torch.isneginf(candidate.choice.pre).any()):
            self.watch.known.note(f"{candidate.base_name} chooses from what a mask leaves: no site")
            return
        known = self.calls[choice.index].site
        if known is not None and low > candidate.low:
            self.watch.known.forget(known)  # it was taken for one that fires wherever it selects
        candidate.low = max(candidate.low, low)
        rectifier = Rectifier("topk", candidate.low, selects=True)
        site = self._found(candidate.base_name, rectifier, "topk", candidate.choice.pre)
        self.calls[choice.index] = replace(self.calls[choice.index], site=site)

    def finish(self) -> None:
        """The forward is over: settle what fires where something else selects."""
        self._read_otherwise = self._readings.others(self._results)
        self._drop_parts()
        self._settle_selections()
        for call, selection, further in self._refinements:
            if call.pending is not None and call.index not in self._read_otherwise:
                site_id = call.pending.site.site_id
                self.watch.known.selected.add(site_id)
                if call.index in self._gated:
                    self.watch.known.gated.add(site_id)
                call.select(selection, further=further)
        for index, candidate in self._candidates.items():
            pending = self.measure(self.calls[index].site, candidate.choice.pre.detach())
            if pending is not None:
                candidate.choice.selection(candidate.low).apply(pending)
                self.recorder.stage(pending)
        super().finish()

    def _drop_parts(self) -> None:
        """Take back the sites of rectifiers that are nothing but parts of another."""
        for whole, parts in self._parts:
            if self.calls[whole].site is not None:
                for part in set(parts) - self._read_otherwise:
                    self._take_back(part)

    def _take_back(self, index: int) -> None:
        """A call turns out to be none of a site."""
        site = self.calls[index].site
        self.calls[index] = replace(self.calls[index], site=None)
        self.waiting = [pending for pending in self.waiting if pending is not self._measured.get(index)]
        if site is not None and all(call.site is None or call.site.site_id != site.site_id for call in self.calls):
            self.watch.known.forget(site)

    def _settle_selections(self) -> None:
        """Tell what is selected for a layer to read from gates, which weigh other parts of the model."""
        selected = {node: index for node, index in self.rectified.items() if self._selects(index)}
        selected |= {
            candidate.node: index for index, candidate in self._candidates.items() if candidate.node is not None
        }
        if not selected:
            return
        use = uses(self._results, selected, self.graph.operations)
        for index in use.codes - use.gates:
            if self.calls[index].site is None and index in self._candidates:
                self._promote(Output(index, weakref.ref(self._candidates[index].choice.pre)), -math.inf)
        for index in use.gates:
            site = self.calls[index].site
            if site is not None:
                self._take_back(index)
                self.watch.known.note(f"{site.base_name} chooses which parts of the model count: no site")

    def _selects(self, index: int) -> bool:
        """Whether a call fires where something else than its sign decides."""
        site = self.calls[index].site
        return site is not None and (
            site.rectifier.selects or (site.rectifier.name in _GATES and site.rectifier.low != 0)
        )

    def learn(self) -> None:
        """Let the recogniser know this order of calls, and which parameters read each site's output."""
        for index, names in self.graph.readers(self._results).items():
            site = self.calls[index].site
            if site is not None:
                self.watch.known.note_readers(site.site_id, names)
        self._note_speakers()
        self.watch.known.learn(self.phase, self.calls)

    def _note_speakers(self) -> None:
        """Note the parameters whose gradients tell which units were silent."""
        sites = {index: call.site for index, call in enumerate(self.calls) if call.site is not None}
        possible = {
            site.site_id: {speaker.name: speaker for speaker in candidates(site.terms)}
            for site in sites.values()
            if site.rectifier.can_die and site.num_units
        }
        owned = {index: possible.get(site.site_id, {}) for index, site in sites.items()}
        speak = passing(self._results, self.rectified, owned, self.watch.known.names)
        for site_id, speakers in possible.items():
            told = {name: speaker for name, speaker in speakers.items() if name in speak}
            self.watch.known.note_speakers(site_id, told)

    def _feeding(self, pre: Tensor | None) -> tuple[str, ...]:
        """The sites whose outputs reach a tensor."""
        edge = None if pre is None else self.follower.edge(pre)
        edges = () if edge is None else (edge,)
        sites = [self.calls[call].site for call in self.graph.feeding(edges)]
        return tuple(dict.fromkeys(site.site_id for site in sites if site is not None))

    def _placed(
        self, base_name: str, rectifier: Rectifier, name: str, provenance: Provenance
    ) -> tuple[str, Rectifier, int | None]:
        """The name of a call in scripted code, its rectifier, and the axis of its units where the code tells it."""
        nearest = [name for source in provenance.sources for name in (*source.weight, *source.additive)]
        script, first = self.paths.script
        place = self.watch.code.locate(name, nearest, provenance.crossed, script, self.num_calls - first)
        if place is None:
            return base_name, rectifier, None
        if place.cls:
            return place.path or place.cls, replace(rectifier, applied=place.cls), place.axis
        return _called(place.path, name), rectifier, place.axis

    def _base_name(self, name: str, rectifier: Rectifier) -> tuple[str, Rectifier]:
        path, module = self.paths.here
        if self._origin is not None:
            (path, kind), self._origin = self._origin, None
            return (path, replace(rectifier, applied=kind)) if kind else (_called(path, name), rectifier)
        if isinstance(module, MODULES) or self.watch.inside_custom:
            self.called.add(id(module))
            kind = type(module).__name__
            return path or kind, replace(rectifier, applied=kind)
        if self.mark:
            return self.mark, rectifier
        return _called(path, name), rectifier


def _called(path: str, name: str) -> str:
    return f"{path}.{name}()" if path else f"{name}()"


def _is_zero(tensor: Tensor) -> bool:
    plain = without_vmap(tensor)
    with outside_of_transforms():
        return plain is not None and not bool((plain != 0).any())


_GATES = {"mul", "multiply", "where", "masked_fill", "__setitem__"}
_ASKS_AUTOGRAD = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}
