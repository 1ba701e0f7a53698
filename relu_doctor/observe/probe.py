"""Probe: the hooks and modes on a model while it is observed, and nothing else.

A call to a rectifier is seen by a :class:`torch.overrides.TorchFunctionMode`, which ``nn.ReLU.forward`` passes
through as well, so that modules and functions are seen alike and once each; the user's own rectifier classes are seen
by hooks. The first forward is watched with gradients enabled, and each call's *producers* are read off the autograd
graph. Later forwards are recognised call by call: by the function, the number of axes, and a *witness*, the parameters
that torch calls used since the rectifier before. A forward whose calls are all known is committed; any other is
discarded and run again as a discovery, so that branches and loops of varying length never mix two sites.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from relu_doctor.observe.graph import Edge, GraphReader, Provenance, graph_without_tensors
from relu_doctor.observe.guard import gradients_required
from relu_doctor.observe.kernels import (
    CallSummary,
    count_inputs,
    output_magnitude,
    pool_rows,
    summarize,
    summarize_minimal,
)
from relu_doctor.observe.layout import (
    Layout,
    Sample,
    Seen,
    arrange,
    changed_positions,
    changed_rows,
    read_layout,
    valid_positions,
)
from relu_doctor.observe.rectifiers import (
    GENERIC,
    MODULES,
    Rectifier,
    custom_rectifiers,
    probe_interval,
    recognise,
    rectifies,
)
from relu_doctor.observe.rehearsal import Inputs, Rehearsal, last_position
from relu_doctor.observe.sites import ActivationSite, build_site, name_sites, qualified_names, strip_wrappers
from relu_doctor.observe.stats import UnitStats
from relu_doctor.terms import Statistics

Witness = tuple[str, int, float, float, tuple[str, ...]]
_ROOT = 0  # state of the call recogniser before the first call


@dataclass(slots=True)
class Reading:
    """How one forward's inputs are counted.

    Attributes:
        num_inputs: inputs in the batch; ``None`` where no tensor shows it.
        mask: bool (inputs, positions), False for padding.
        first_ordinal: ordinal of the batch's first input.
    """

    num_inputs: int | None
    mask: Tensor | None
    first_ordinal: int


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of a rectifier as a discovery met it; the site is ``None`` where it is none that is measured."""

    witness: Witness
    site: ActivationSite | None
    sample: Sample

    def is_like(self, other: _Call) -> bool:
        """Whether both are the same site, seen on the same axes."""
        if self.site is None or other.site is None:
            return self.site is other.site
        return (self.site.site_id, self.site.unit_axes) == (other.site.site_id, other.site.unit_axes)


@dataclass(slots=True)
class _Pending:
    """A rectifier call between its input and its output."""

    site: ActivationSite
    layout: Layout
    shape: torch.Size
    valid: Tensor | None
    summary: CallSummary


@dataclass(slots=True)
class _Staged:
    """One site's statistics of one forward, not yet committed."""

    stats: UnitStats
    fired: list[Tensor] = field(default_factory=list)
    valid: list[Tensor] = field(default_factory=list)

    def add(self, summary: CallSummary) -> None:
        self.stats = self.stats.merge(summary.stats)
        for index, fired in enumerate(self.fired):
            if fired.shape == summary.fired.shape:
                self.fired[index] = fired | summary.fired
                self.valid[index] = self.valid[index] | summary.valid
                return
        self.fired.append(summary.fired)
        self.valid.append(summary.valid)

    def counted(self, first_ordinal: int) -> UnitStats:
        fired, valid = torch.cat(self.fired), torch.cat(self.valid)
        return count_inputs(self.stats, fired & valid[:, None], valid, first_ordinal)


class _UnknownCallError(Exception):
    """A call that the recogniser has not met: the forward must be discovered."""


class _GradientInForwardError(Exception):
    """The forward asks autograd itself: its graph must keep real values."""


@dataclass(frozen=True, slots=True)
class _Depth:
    """How much a discovery pass takes over from the model."""

    gradients: bool  # a graph at all
    everywhere: bool  # also inside the model's own no_grad blocks and past detach
    real: bool  # the graph keeps real values


_DEPTHS = (
    _Depth(True, True, False),
    _Depth(True, False, False),
    _Depth(True, False, True),
    _Depth(False, False, False),
)


class Probe:
    """Watches one model; a context manager that leaves no trace.

    Args:
        model: the model to watch.
        statistics: how much to measure.
        rectifiers: the user's own rectifier classes, or a mapping of them to (low, high).
        unit_axis: gives the unit axis of a site by its base name, where the user named one.

    Attributes:
        stats: committed statistics, per phase and ``site_id``.
        notes: what could not be seen as it should, in order.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        statistics: Statistics = Statistics.FULL,
        rectifiers: Any = (),
        unit_axis: Callable[[str], int | None] | None = None,
    ) -> None:
        self.model = model
        self.statistics = statistics
        self.stats: dict[str, dict[str, UnitStats]] = {}
        self.notes: list[str] = []
        self.names = qualified_names(model)
        self._sites: dict[str, ActivationSite] = {}
        self._transitions: dict[tuple[str, int, Witness], tuple[_Call, int]] = {}
        self._states = _ROOT
        self._phases: set[str] = set()  # of which an order of calls is known
        self._order: list[str] = []  # of the sites in the forward
        self.seen: dict[str, Seen] = {}  # per site
        self.unit_axis = unit_axis or (lambda name: None)
        self._custom = custom_rectifiers(rectifiers)
        self._custom_modules: dict[int, Rectifier] = {}
        self._handles: list[RemovableHandle] = []
        self.inside_custom: list[int] = []
        self._active: _Mode | None = None
        self._called: set[int] = set()

    def __enter__(self) -> Self:
        for module in self.model.modules():
            if type(module) in self._custom:
                interval = self._custom[type(module)] or probe_interval(module)
                self._custom_modules[id(module)] = Rectifier(type(module).__name__, *interval)
                self._handles.append(module.register_forward_pre_hook(self._enter_custom, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._leave_custom, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove every hook. Safe to call twice."""
        while self._handles:
            self._handles.pop().remove()

    def sites(self) -> list[ActivationSite]:
        """The sites found so far, in forward order, under their final names."""
        order = {name: place for place, name in enumerate(self.names.values())}
        places = {site_id: place for place, site_id in enumerate(self._order)}
        return sorted(name_sites(self._sites, order), key=lambda site: places.get(site.site_id, len(places)))

    def unused_modules(self) -> list[tuple[str, nn.Module]]:
        """Modules that rectify but that no observed forward showed, with their paths.

        Rectifier modules that were never called, and those whose inside cannot be seen: ``nn.RNN`` with ReLU, scripted
        modules.
        """
        found: list[tuple[str, nn.Module]] = []
        scripted: list[str] = []
        for name, module in self.model.named_modules():
            if any(name.startswith(f"{outer}.") for outer in scripted):
                continue
            if isinstance(module, torch.jit.ScriptModule):
                scripted.append(name)
            elif id(module) in self._called or not rectifies(module):
                continue
            found.append((strip_wrappers(f"{name}.")[:-1], module))
        return found

    def observe(
        self,
        run: Callable[[], object],
        reading: Reading,
        *,
        phase: str = "eval",
        prepare: Callable[[], Rehearsal | None] | None = None,
        perform: Callable[[Inputs], object] | None = None,
    ) -> None:
        """Watch one forward.

        Args:
            run: performs the forward; called again when the forward has to be discovered.
            reading: how its inputs are counted.
            phase: under which name the statistics are kept; the recogniser keeps phases apart as well.
            prepare: picks a few of the inputs. Discovery is cheaper on them, and it is tried out which values are
                whose. The model may raise on them, or take another path: then the whole batch is discovered.
            perform: performs the forward on the inputs of a rehearsal.

        Raises:
            Exception: whatever the model's forward raises.
        """
        rehearsal = prepare() if prepare is not None and self._is_curious(reading, phase) else None
        if rehearsal is not None and perform is not None:
            self._rehearse(rehearsal, perform, phase)
        if self._recognise(run, reading, phase):
            return
        rehearsal = rehearsal or (prepare() if prepare is not None else None)
        if rehearsal is not None and perform is not None:
            self._rehearse(rehearsal, perform, phase, again=True)
            if self._recognise(run, reading, phase):
                return
        self._commit(self._discover(run, reading, phase), reading, phase)

    def _is_curious(self, reading: Reading, phase: str) -> bool:
        """Whether a rehearsal could tell something that is not known yet."""
        padded = reading.mask is not None and any(seen.padded is None for seen in self.seen.values())
        return phase not in self._phases or bool(self._sites.keys() - self.seen.keys()) or padded

    def _rehearse(
        self, rehearsal: Rehearsal, perform: Callable[[Inputs], object], phase: str, *, again: bool = False
    ) -> None:
        """Discover on a few inputs what is not known yet, and see which values are whose."""
        reading = Reading(rehearsal.num_inputs, None, 0)
        if again or phase not in self._phases:
            with suppress(Exception):  # the model may refuse a part of a batch in any way
                self._discover(lambda: perform(rehearsal.plain), reading, phase)
        unknown = self._sites.keys() - self.seen.keys()
        padding = rehearsal.padded is not None and any(seen.padded is None for seen in self.seen.values())
        if phase not in self._phases or not (unknown or padding):
            return
        before = self._trace(perform, rehearsal.plain, reading, phase)
        after = self._trace(perform, rehearsal.altered, reading, phase)
        for (site, pre, layout), (other, changed, _) in zip(before, after, strict=False):
            if site.site_id not in self.seen and site.site_id == other.site_id and pre.shape == changed.shape:
                self.seen[site.site_id] = _whose(pre, changed, layout, site, rehearsal.num_inputs)
        for site_id in unknown:
            self.seen.setdefault(site_id, Seen())
        if rehearsal.padded is not None and rehearsal.pointed is not None and rehearsal.mask is not None:
            before = self._trace(perform, rehearsal.plain, reading, phase)  # now by what was seen
            padded = self._trace(perform, rehearsal.padded, reading, phase)
            pointed = self._trace(perform, rehearsal.pointed, reading, phase)
            found: dict[str, bool] = {}
            for (site, pre, layout), (one, by_padding, _), (two, by_point, _) in zip(
                before, padded, pointed, strict=False
            ):
                same = site.site_id == one.site_id == two.site_id and pre.shape == by_padding.shape == by_point.shape
                fits = same and _is_masked(
                    changed_positions(pre, by_padding, layout, site),
                    changed_positions(pre, by_point, layout, site),
                    rehearsal.mask,
                )
                found[site.site_id] = found.get(site.site_id, True) and fits
            for site_id, seen in self.seen.items():
                if seen.padded is None:
                    self.seen[site_id] = replace(seen, padded=found.get(site_id, False))

    def _trace(
        self, perform: Callable[[Inputs], object], inputs: Inputs, reading: Reading, phase: str
    ) -> list[tuple[ActivationSite, Tensor, Layout]]:
        """The pre-activations of a forward, call by call; those before an unknown call where there is one."""
        mode = _Tracing(self, reading, phase)
        state = torch.get_rng_state()
        torch.manual_seed(0)  # the same noise in every rehearsal
        with torch.no_grad(), suppress(Exception):
            self._watch(lambda: perform(inputs), mode)
        torch.set_rng_state(state)
        return mode.trace

    def _recognise(self, run: Callable[[], object], reading: Reading, phase: str) -> bool:
        """Watch a forward whose calls are all known; false where one is not, and nothing was counted."""
        if phase not in self._phases:
            return False
        try:
            with torch.no_grad():
                self._commit(self._watch(run, _Recognising(self, reading, phase)), reading, phase)
        except _UnknownCallError:
            return False
        return True

    @property
    def num_sites(self) -> int:
        """How many sites were found so far."""
        return len(self._sites)

    def know(self, site: ActivationSite) -> None:
        """Add a site, or meet it again; what feeds it is the union over all meetings."""
        known = self._sites.get(site.site_id)
        if known is None or (not known.num_units and site.num_units):
            self._sites[site.site_id] = site
        elif set(site.feeds) - set(known.feeds):
            self._sites[site.site_id] = replace(known, feeds=tuple(dict.fromkeys((*known.feeds, *site.feeds))))

    def transition(self, phase: str, state: int, witness: Witness) -> tuple[_Call, int] | None:
        """What a call is in a state of the recogniser, and the state after it; ``None`` where it was never met."""
        return self._transitions.get((phase, state, witness))

    def learn(self, phase: str, calls: list[_Call]) -> None:
        """Remember an order of calls; a site may be called with other axes from one call to the next."""
        self._phases.add(phase)
        state = _ROOT
        for call in calls:
            known = self._transitions.get((phase, state, call.witness))
            if known is None or not known[0].is_like(call):
                self._states += 1
                known = self._transitions[(phase, state, call.witness)] = (call, self._states)
            state = known[1]
        self._place(calls)

    def _place(self, calls: list[_Call]) -> None:
        """Put sites that are met for the first time behind the one that was called before them."""
        place = 0
        for call in calls:
            if call.site is None:
                continue
            if call.site.site_id in self._order:
                place = self._order.index(call.site.site_id) + 1
            else:
                self._order.insert(place, call.site.site_id)
                place += 1

    def note(self, text: str) -> None:
        """Keep a remark for the report, once."""
        if text not in self.notes:
            self.notes.append(text)

    def _watch(self, run: Callable[[], object], mode: _Mode) -> _Mode:
        self._active = mode
        self.inside_custom.clear()
        try:
            with mode:
                run()
        finally:
            self._active = None
        return mode

    def _discover(self, run: Callable[[], object], reading: Reading, phase: str) -> _Mode:
        first_error: Exception | None = None
        for depth in _DEPTHS:
            mode = _Discovering(self, reading, phase, depth)
            try:
                with ExitStack() as stack:
                    stack.enter_context(_gradient_mode(depth.gradients))
                    if depth.gradients:
                        stack.enter_context(gradients_required(self.model))
                    if depth.gradients and not depth.real:
                        stack.enter_context(graph_without_tensors())
                    stack.enter_context(mode.module_paths())
                    self._watch(run, mode)
            except Exception as error:  # noqa: BLE001 the model's own code may raise anything
                first_error = first_error or error
                self._note_depth(depth, error)
                if depth is _DEPTHS[0] and not isinstance(error, _GradientInForwardError):
                    with torch.no_grad():
                        run()  # raises by itself: the model's own error, not ours
                continue
            mode.learn()
            self._called |= mode.called
            return mode
        assert first_error is not None
        raise first_error

    def _note_depth(self, depth: _Depth, error: Exception) -> None:
        if depth is _DEPTHS[-2]:
            self.note(
                f"no autograd graph could be had ({type(error).__name__}): sites are named by module and call order"
            )

    def _commit(self, mode: _Mode, reading: Reading, phase: str) -> None:
        kept = self.stats.setdefault(phase, {})
        for site_id, staged in mode.staged.items():
            fresh = staged.counted(reading.first_ordinal)
            kept[site_id] = kept[site_id].merge(fresh) if site_id in kept else fresh

    def _enter_custom(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._active is not None:
            pre = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            self.inside_custom.append(id(module))
            if pre is not None:
                rectifier = self._custom_modules[id(module)]
                self._active.before(rectifier.name, rectifier, pre)

    def _leave_custom(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._active is not None and self.inside_custom:
            self.inside_custom.pop()
            self._active.called.add(id(module))
            if isinstance(output, Tensor):
                self._active.after(output)


@contextmanager
def _gradient_mode(enabled: bool) -> Iterator[None]:
    with torch.inference_mode(False), torch.set_grad_enabled(enabled):
        yield


class _Mode(TorchFunctionMode):
    """Sees torch calls, collects the witness, and stages one forward's statistics."""

    def __init__(self, probe: Probe, reading: Reading, phase: str) -> None:
        super().__init__()
        self.probe = probe
        self.reading = reading
        self.phase = phase
        self.staged: dict[str, _Staged] = {}
        self.called: set[int] = set()
        self.used: dict[str, None] = {}
        self.pending: list[_Pending | None] = []
        self.sample: Sample | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = None if self.probe.inside_custom else recognise(func, args, kwargs)
        if known is None:
            self._note_parameters(args, kwargs)
            return self.call(func, args, kwargs)
        if torch._C._functorch.is_functorch_wrapped_tensor(known[2]):
            self.probe.note(f"{known[0]}() inside torch.func (vmap, grad, …) was not observed")
            return func(*args, **kwargs)
        self.before(*known)
        result = func(*args, **kwargs)
        self.after(result)
        return result

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Perform a torch call that applies no rectifier."""
        return func(*args, **kwargs)

    def _note_parameters(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        names = self.probe.names
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
        self.pending.append(None if site is None or not site.num_units else self._measure(site, pre.detach()))

    def after(self, post: Any) -> None:
        """The rectifier was applied."""
        pending = self.pending.pop()
        if pending is None:
            return
        if self.probe.statistics is Statistics.FULL and isinstance(post, Tensor) and post.shape == pending.shape:
            values = arrange(post.detach(), pending.layout, pending.site)
            pending.summary.stats.post_abs_sum = output_magnitude(values, pending.valid)
        staged = self.staged.get(pending.site.site_id)
        if staged is None:
            staged = self.staged[pending.site.site_id] = _Staged(UnitStats.empty(pending.site.num_units, post.device))
        staged.add(pending.summary)

    def _measure(self, site: ActivationSite, pre: Tensor) -> _Pending:
        seen = self.probe.seen.get(site.site_id)
        layout = read_layout(pre.shape, site, self.reading.num_inputs, self.sample, seen)
        values = arrange(pre, layout, site)
        valid = valid_positions(self.reading.mask, values) if seen is not None and seen.padded else None
        if self.probe.statistics is Statistics.FULL:
            summary = summarize(values, site.rectifier, valid)
        else:
            summary = summarize_minimal(values, site.rectifier, valid)
        if layout.by_rows and self.reading.num_inputs and len(summary.fired) > self.reading.num_inputs:
            summary = pool_rows(summary, self.reading.num_inputs)
            self.probe.note(
                f"{site.base_name}: which rows belong to which input does not show; they are counted as at most "
                "the inputs of their batch"
            )
        return _Pending(site, layout, pre.shape, valid, summary)

    def identify(self, witness: Witness, name: str, rectifier: Rectifier, pre: Tensor) -> ActivationSite | None:
        """Which site a call belongs to; ``None`` where it is none."""
        raise NotImplementedError


class _Recognising(_Mode):
    """The fast mode: every call must be one that a discovery has met in this place."""

    def __init__(self, probe: Probe, reading: Reading, phase: str) -> None:
        super().__init__(probe, reading, phase)
        self.state = _ROOT

    def identify(self, witness: Witness, name: str, rectifier: Rectifier, pre: Tensor) -> ActivationSite | None:
        known = self.probe.transition(self.phase, self.state, witness)
        if known is None:
            raise _UnknownCallError
        call, self.state = known
        self.sample, site = call.sample, call.site
        if site is not None and site.unit_axes and site.codes != _codes(pre.shape, site.unit_axes):
            raise _UnknownCallError
        return site


class _Tracing(_Recognising):
    """Keeps the pre-activations of a few inputs, to compare them; counts nothing."""

    def __init__(self, probe: Probe, reading: Reading, phase: str) -> None:
        super().__init__(probe, reading, phase)
        self.trace: list[tuple[ActivationSite, Tensor, Layout]] = []

    def before(self, name: str, rectifier: Rectifier, pre: Tensor) -> None:
        witness: Witness = (name, pre.dim(), rectifier.low, rectifier.high, tuple(self.used))
        self.used = {}
        site = self.identify(witness, name, rectifier, pre)
        if site is not None and site.num_units:
            seen = self.probe.seen.get(site.site_id)
            layout = read_layout(pre.shape, site, self.reading.num_inputs, None, seen)
            self.trace.append((site, pre.detach().clone(), layout))
        self.pending.append(None)


class _Discovering(_Mode):
    """The slow mode: reads every call's producers off the graph."""

    def __init__(self, probe: Probe, reading: Reading, phase: str, depth: _Depth) -> None:
        super().__init__(probe, reading, phase)
        self.depth = depth
        self.path: list[tuple[str, nn.Module]] = []
        self.calls: list[_Call] = []
        self.rectified: dict[Node, int] = {}
        self.graph = GraphReader(probe.names, self.rectified)
        self.anonymous: dict[str, int] = {}

    @contextmanager
    def module_paths(self) -> Iterator[None]:
        """Follow which module's forward is running."""
        handles: list[RemovableHandle] = []
        try:
            for name, module in self.probe.model.named_modules():
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
            raise _GradientInForwardError
        if self.depth.everywhere:
            if func is torch._C._set_grad_enabled and args and not args[0]:
                return None
            if func is Tensor.detach and args[0].requires_grad:
                return args[0].view_as(args[0])
        if func in _LEAVES_TORCH and args[0].requires_grad:  # works in the model's own no_grad run
            return func(args[0].detach(), *args[1:], **kwargs)
        return func(*args, **kwargs)

    def identify(self, witness: Witness, name: str, rectifier: Rectifier, pre: Tensor) -> ActivationSite | None:
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
                order=self.probe.num_sites,
                occurrence=occurrence,
                unit_axis=self.probe.unit_axis(base_name),
            )
            if not site.producers:
                self.anonymous[base_name] = occurrence + 1
            if name in GENERIC and not site.num_units:
                site = None
            else:
                self.probe.know(site)
        self.calls.append(_Call(witness, site, Sample(pre.shape, self.reading.num_inputs)))
        return site

    def after(self, post: Any) -> None:
        super().after(post)
        if isinstance(post, Tensor) and post.grad_fn is not None:
            self.rectified[post.grad_fn] = len(self.calls) - 1

    def learn(self) -> None:
        """Let the recogniser know this order of calls."""
        self.probe.learn(self.phase, self.calls)

    def _base_name(self, name: str, rectifier: Rectifier) -> tuple[str, Rectifier]:
        path, module = self.path[-1] if self.path else ("", self.probe.model)
        if isinstance(module, MODULES) or self.probe.inside_custom:
            self.called.add(id(module))
            kind = type(module).__name__
            return path or kind, Rectifier(kind, rectifier.low, rectifier.high)
        return f"{path}.{name}()" if path else f"{name}()", rectifier


def _whose(before: Tensor, after: Tensor, layout: Layout, site: ActivationSite, num_inputs: int) -> Seen:
    """What altering the first input shows of a site's axes."""
    others = [axis for axis in range(before.dim()) if axis not in site.unit_axes]
    alone = [
        axis for axis in others if before.shape[axis] == num_inputs > 1 and changed_rows(before, after, axis) == [0]
    ]
    rows = changed_rows(before, after, layout.order[0]) if layout.split and num_inputs > 1 else []
    interleaved = bool(rows) and all(row % num_inputs == 0 for row in rows) and max(rows) >= layout.split
    return Seen(batch=alone[0] if len(alone) == 1 else None, interleaved=interleaved)


def _is_masked(by_padding: Tensor, by_point: Tensor, mask: Tensor) -> bool:
    """Whether a mask's positions are those of a site.

    They are if every padding position changed when only padding was altered; or, where padding is overwritten and
    nothing of it comes through, if altering one position changed that one and few others.
    """
    padding = ~mask.to(by_padding.device)
    if by_padding.shape != padding.shape:
        return False
    own = bool(by_point[0, last_position(mask)]) and int(by_point.sum()) <= max(1, padding.shape[1] // 2)
    return bool(by_padding[padding].all()) or (own and not bool(by_padding.any()))


def _codes(shape: torch.Size, axes: tuple[int, ...]) -> int:
    return math.prod(shape[axis] for axis in axes)


_LEAVES_TORCH: set[Any] = {Tensor.numpy, Tensor.__array__}
_ASKS_AUTOGRAD = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}
