"""Probe: the hooks and modes on a model while it is observed, and nothing else.

A call to a rectifier is seen by a :class:`torch.overrides.TorchFunctionMode`, which ``nn.ReLU.forward`` passes
through as well, so that modules and functions are seen alike and once each; the user's own rectifier classes are seen
by hooks. The first forward is watched with gradients enabled, and each call's *producers* are read off the autograd
graph. Later forwards are recognised call by call: by the function, the number of axes, and a *witness*, the parameters
that torch calls used since the rectifier before. A forward whose calls are all known is committed; any other is
discarded and run again as a discovery, so that branches and loops of varying length never mix two sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from relu_doctor.observe.custom import custom_rectifiers, fires_by, interval_text, probe_interval
from relu_doctor.observe.discovery import Depth, DiscoveringMode, GradientInForwardError
from relu_doctor.observe.graph import graph_without_tensors
from relu_doctor.observe.guard import gradients_required
from relu_doctor.observe.layout import Layout, Seen, changed_positions, changed_rows
from relu_doctor.observe.modes import ForwardMode, RecognisingMode, TracingMode, UnknownCallError, Watch
from relu_doctor.observe.rectifiers import Rectifier, rectifies
from relu_doctor.observe.registry import CallRegistry, Reading
from relu_doctor.observe.rehearsal import Inputs, Rehearsal, last_position
from relu_doctor.observe.sites import ActivationSite, strip_wrappers
from relu_doctor.observe.stats import UnitStats
from relu_doctor.terms import Statistics

_DEPTHS = (
    Depth(True, True, False),
    Depth(True, False, False),
    Depth(True, False, True),
    Depth(False, False, False),
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
        known: the sites found and what is known of them.
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
        self.known = CallRegistry(model, unit_axis)
        self.watch = Watch(model, self.known, statistics)
        self.stats: dict[str, dict[str, UnitStats]] = {}
        self._custom = custom_rectifiers(rectifiers)
        self._custom_modules: dict[int, Rectifier] = {}
        self._handles: list[RemovableHandle] = []
        self._active: ForwardMode | None = None
        self._called: set[int] = set()

    def __enter__(self) -> Self:
        for module in self.model.modules():
            if type(module) in self._custom:
                self._custom_modules[id(module)] = self._custom[type(module)] or self._probed(module)
                self._handles.append(module.register_forward_pre_hook(self._enter_custom, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._leave_custom, with_kwargs=True))
        return self

    def _probed(self, module: nn.Module) -> Rectifier:
        rectifier = Rectifier(type(module), *probe_interval(module))
        self.known.note(f"{rectifier.name}: its slope was probed on [-10, 10]: {interval_text(rectifier)}")
        return rectifier

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
        return self.known.sites()

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
        self._commit(self._discover(run, reading, phase))

    def _is_curious(self, reading: Reading, phase: str) -> bool:
        """Whether a rehearsal could tell something that is not known yet."""
        padded = reading.mask is not None and any(seen.padded is None for seen in self.known.seen.values())
        return phase not in self.known.phases or bool(self.known.unseen) or padded

    def _rehearse(
        self, rehearsal: Rehearsal, perform: Callable[[Inputs], object], phase: str, *, again: bool = False
    ) -> None:
        """Discover on a few inputs what is not known yet, and see which values are whose."""
        reading = Reading(rehearsal.num_inputs, None, 0)
        if again or phase not in self.known.phases:
            with suppress(Exception):  # the model may refuse a part of a batch in any way
                self._discover(lambda: perform(rehearsal.plain), reading, phase)
        unknown = self.known.unseen
        padding = rehearsal.padded is not None and any(seen.padded is None for seen in self.known.seen.values())
        if phase not in self.known.phases or not (unknown or padding):
            return
        before = self._trace(perform, rehearsal.plain, reading, phase)
        after = self._trace(perform, rehearsal.altered, reading, phase)
        for (site, pre, layout), (other, changed, _) in zip(before, after, strict=False):
            if site.site_id not in self.known.seen and site.site_id == other.site_id and pre.shape == changed.shape:
                self.known.seen[site.site_id] = _whose(pre, changed, layout, site, rehearsal.num_inputs)
        for site_id in unknown:
            self.known.seen.setdefault(site_id, Seen())
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
            for site_id, seen in self.known.seen.items():
                if seen.padded is None:
                    self.known.seen[site_id] = replace(seen, padded=found.get(site_id, False))

    def _trace(
        self, perform: Callable[[Inputs], object], inputs: Inputs, reading: Reading, phase: str
    ) -> list[tuple[ActivationSite, Tensor, Layout]]:
        """The pre-activations of a forward, call by call; those before an unknown call where there is one."""
        mode = TracingMode(self.watch, reading, phase)
        state = torch.get_rng_state()
        torch.manual_seed(0)  # the same noise in every rehearsal
        with torch.no_grad(), suppress(Exception):
            self._watch(lambda: perform(inputs), mode)
        torch.set_rng_state(state)
        return mode.trace

    def _recognise(self, run: Callable[[], object], reading: Reading, phase: str) -> bool:
        """Watch a forward whose calls are all known; false where one is not, and nothing was counted."""
        if phase not in self.known.phases:
            return False
        try:
            with torch.no_grad():
                self._commit(self._watch(run, RecognisingMode(self.watch, reading, phase)))
        except UnknownCallError:
            return False
        return True

    def _watch(self, run: Callable[[], object], mode: ForwardMode) -> ForwardMode:
        self._active = mode
        self.watch.inside_custom.clear()
        try:
            with mode:
                run()
            mode.finish()
        finally:
            self._active = None
        return mode

    def _discover(self, run: Callable[[], object], reading: Reading, phase: str) -> ForwardMode:
        first_error: Exception | None = None
        for depth in _DEPTHS:
            mode = DiscoveringMode(self.watch, reading, phase, depth)
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
                if depth is _DEPTHS[0] and not isinstance(error, GradientInForwardError):
                    with torch.no_grad():
                        run()  # raises by itself: the model's own error, not ours
                continue
            mode.learn()
            self._called |= mode.called
            return mode
        assert first_error is not None
        raise first_error

    def _note_depth(self, depth: Depth, error: Exception) -> None:
        if depth is _DEPTHS[-2]:
            self.known.note(
                f"no autograd graph could be had ({type(error).__name__}): sites are named by module and call order"
            )

    def _commit(self, mode: ForwardMode) -> None:
        mode.recorder.commit(self.stats.setdefault(mode.phase, {}))

    def _enter_custom(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._active is not None:
            self.watch.inside_custom.append(id(module))
            rectifier, pre = self._custom_modules[id(module)], _first_tensor(args, kwargs)
            if pre is not None and rectifier.fires is None:
                self._active.before(rectifier.name, rectifier, pre)

    def _leave_custom(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._active is None or not self.watch.inside_custom:
            return
        rectifier, pre = self._custom_modules[id(module)], _first_tensor(args, kwargs)
        self._active.called.add(id(module))
        if pre is None or not isinstance(output, Tensor):
            self.known.note(f"{rectifier.name} takes or returns no tensor by itself, and was not observed")
        elif rectifier.fires is None:
            self._active.after(output)
        else:
            with torch.no_grad():
                mask = fires_by(module, rectifier.fires, pre, output)
            on_output = mask.shape != pre.shape
            self._active.before(rectifier.name, replace(rectifier, on_output=on_output), output if on_output else pre)
            self._active.after(output, mask)
        self.watch.inside_custom.pop()


def _first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


@contextmanager
def _gradient_mode(enabled: bool) -> Iterator[None]:
    with torch.inference_mode(False), torch.set_grad_enabled(enabled):
        yield


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
