"""Probe: the hooks and modes on a model while it is observed, and nothing else.

A call to a rectifier is seen by a :class:`torch.overrides.TorchFunctionMode`, which ``nn.ReLU.forward`` passes
through as well, so that modules and functions are seen alike and once each; the user's own rectifier classes are seen
by hooks. The first forward is watched with gradients enabled, and each call's *producers* are read off the autograd
graph. Later forwards are recognised call by call: by the function, the number of axes, and a *witness*, the parameters
that torch calls used since the rectifier before. A forward whose calls are all known is committed; any other is
discarded and run again as a discovery, so that branches and loops of varying length never mix two sites.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from relu_doctor.errors import ReLUDoctorError
from relu_doctor.observe.forwards.calls import UnknownCallError, Watch
from relu_doctor.observe.forwards.discovery import DiscoveringMode, GradientInForwardError
from relu_doctor.observe.forwards.dispatch import OperatorMode
from relu_doctor.observe.forwards.following import Depth
from relu_doctor.observe.forwards.lenient import LenientMode, LiveForward
from relu_doctor.observe.forwards.modes import ForwardMode
from relu_doctor.observe.forwards.outputs import OutputRows
from relu_doctor.observe.forwards.own_modules import OwnModules
from relu_doctor.observe.forwards.patience import recognising_mode
from relu_doctor.observe.forwards.registry import CallRegistry, Reading
from relu_doctor.observe.forwards.rehearsing import Rehearser
from relu_doctor.observe.graph.names import strip_wrappers
from relu_doctor.observe.graph.sharding import groups_of
from relu_doctor.observe.inputs.counting import Counting, first_list
from relu_doctor.observe.inputs.rehearsal import Inputs, Rehearsal
from relu_doctor.observe.models.guard import gradients_required
from relu_doctor.observe.models.places import ScriptedCode
from relu_doctor.observe.models.scripted import compile_scripts, constants_require_gradients, holds_scripts, unoptimized
from relu_doctor.observe.models.state import ModelState
from relu_doctor.observe.models.writes import Writes
from relu_doctor.observe.rectifiers.kinds import quantised_modules, rectifies
from relu_doctor.observe.sites import ActivationSite
from relu_doctor.observe.statistics.stats import UnitStats
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
        tokens: every position that is no padding is evidence by itself.
        rectifiers: the user's own rectifier classes, or a mapping of them to (low, high).
        unit_axis: gives the unit axis of a site by its base name, where the user named one.

    Attributes:
        stats: committed statistics, per phase and ``site_id``.
        outputs: per ``site_id``, rows of its outputs in the last forward that showed some, where they are wanted.
        known: the sites found and what is known of them.
        rehearser: tries out on a few inputs which values are whose.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        statistics: Statistics = Statistics.FULL,
        tokens: bool = False,
        rectifiers: Any = (),
        unit_axis: Callable[[str], int | None] | None = None,
    ) -> None:
        self.model = model
        self.known = CallRegistry(model, unit_axis)
        self.watch = Watch(
            model,
            self.known,
            statistics,
            ScriptedCode(model),
            holds_scripts(model),
            bool(groups_of(model)),
            Writes(model),
            tokens=tokens,
        )
        for name, weight in self.watch.code.weights.items():
            self.known.names.add(name, weight)
        probe = weakref.proxy(self)  # held by nothing that it holds, so that its model is free when it is closed
        self.rehearser = Rehearser(
            self.watch,
            lambda *args: probe._try(probe._discover, *args),
            lambda *args: probe._try(probe._watch, *args),
        )
        self._state = ModelState(model)
        self.stats: dict[str, dict[str, UnitStats]] = {}
        self.outputs: dict[str, OutputRows] = {}
        self._own = OwnModules(rectifiers, self.watch, lambda: probe._active)
        self._handles: list[RemovableHandle] = []
        self._active: ForwardMode | None = None
        self._called: set[int] = set()

    def __enter__(self) -> Self:
        compile_scripts(self.model)
        quantised = quantised_modules(self.model)
        if quantised:
            more = f" and {len(quantised) - 4} more" if len(quantised) > 4 else ""
            named = f"{', '.join(quantised[:4])}{more}"
            self.known.note(f"quantised modules are not supported and were not observed: {named}")
        for module in self._own.find():
            self._handles.append(module.register_forward_pre_hook(self._own.enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._own.leave, with_kwargs=True, always_call=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove every hook, and undo what the forwards wrote to parameters. Safe to call twice."""
        while self._handles:
            self._handles.pop().remove()
        self.watch.writes.undo()

    def sites(self) -> list[ActivationSite]:
        """The sites found so far, in forward order, under their final names."""
        return self.known.sites()

    def unused_modules(self) -> list[tuple[str, nn.Module]]:
        """Modules that rectify but that no observed forward showed, with their paths.

        Rectifier modules that were never called, in Python or in scripted code.
        """
        uncalled = [
            (strip_wrappers(f"{name}.")[:-1], module)
            for name, module in self.model.named_modules()
            if rectifies(module) and id(module) not in self._called
        ]
        return uncalled + self.watch.code.unreached()

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
        rehearsal = prepare() if prepare is not None and self.rehearser.is_curious(reading, phase) else None
        if rehearsal is not None and perform is not None:
            self.rehearser.rehearse(rehearsal, perform, phase)
        if self._recognise(run, reading, phase):
            return
        rehearsal = rehearsal or (prepare() if prepare is not None else None)
        if rehearsal is not None and perform is not None:
            self.rehearser.rehearse(rehearsal, perform, phase, again=True)
            if self._recognise(run, reading, phase):
                return
        self._commit(self._discover(run, reading, phase))

    def find_counting(
        self,
        prepare: Callable[[Counting], Rehearsal | None],
        perform: Callable[[Inputs], object],
        run: Callable[[], object],
        *,
        phase: str = "eval",
    ) -> Counting:
        """Try out how the inputs of a batch are counted; nothing of it is measured.

        Args:
            prepare: picks a few of its inputs, counted in one way or another.
            perform: performs the forward on the inputs of a rehearsal.
            run: performs the forward on the whole batch.
            phase: under which name its calls are known.
        """
        rehearsal = prepare(Counting(0))
        apart = None if rehearsal is None else self.rehearser.rehearse(rehearsal, perform, phase)
        apart = self.known.rows_told if apart is None else apart  # all that a rectifier sees may be a selection
        if phase not in self.known.phases:
            with suppress(Exception):  # told when the batch is observed
                self._try(self._discover, run, Reading(None, None, 0, rehearsed=True), phase)
        single = self.known.ranks.single and not self.known.one_by_one
        listed = prepare(Counting(items=True))
        if not single and (apart or (rehearsal is not None and rehearsal.num_inputs < 2 and listed is None)):
            return Counting(0)
        recall = self.known.forget_calls()
        if listed is not None:
            apart = self.rehearser.rehearse(listed, perform, phase)
            differ = len({tensor.shape for tensor in first_list(listed.plain) or ()}) > 1  # no sides of a pair
            if apart or (differ and self.rehearser.takes_turns(listed, perform, phase)):
                return Counting(items=True)
            self.known.forget_calls()
        if single:
            return Counting(None)
        other = prepare(Counting(1))
        if other is not None and self.rehearser.rehearse(other, perform, phase):
            return Counting(1)
        recall()
        return Counting(0)

    def learn(self, run: Callable[[], object], reading: Reading, *, phase: str) -> None:
        """Find out what a forward's calls are; nothing of it is counted, and the model's state is put back."""
        self._try(self._discover, run, reading, phase)

    def follow(self, reading: Reading, phase: str) -> LiveForward:
        """Follow a forward that somebody else is about to perform, whose calls are known.

        Args:
            reading: how its inputs are counted.
            phase: under which name its calls are known, and its statistics kept.
        """
        mode = LenientMode(self.watch, reading, phase)
        self._active = mode
        self._own.clear()
        return LiveForward(mode, self._leave, below=self.watch.below)

    def _leave(self, mode: LenientMode) -> Exception | None:
        """A forward that was followed is over: its statistics are kept, unless something in it was not known."""
        self._active = None
        error, mode.broken = mode.broken, None
        if error is None:
            try:
                mode.finish()
                self._commit(mode)
            except Exception as failure:  # noqa: BLE001  told by whoever follows; the training goes on
                return failure
        return error

    def _recognise(self, run: Callable[[], object], reading: Reading, phase: str) -> bool:
        """Watch a forward whose calls are all known; false where one is not, and nothing was counted."""
        if phase not in self.known.phases:
            return False
        try:
            with torch.set_grad_enabled(self.watch.gradients):
                self._commit(self._watch(run, recognising_mode(self.watch, reading, phase)))
        except UnknownCallError:
            return False
        return True

    def _try(self, watch: Callable[..., ForwardMode], *args: Any) -> ForwardMode:
        """Watch a forward that is only tried out: the model is put back in the state that it was in."""
        restore = self._state.keep()
        try:
            return watch(*args)
        finally:
            restore()

    def _watch(self, run: Callable[[], object], mode: ForwardMode) -> ForwardMode:
        """Watch a forward; one that raises, and may be run again, leaves no trace in the model's state."""
        self._active = mode
        self._own.clear()
        operators = OperatorMode(mode, opens=isinstance(mode, DiscoveringMode))
        restore = None if self._state.changes is False else self._state.keep()
        try:
            with ExitStack() as stack:
                stack.enter_context(mode)
                if self.watch.below or isinstance(mode, DiscoveringMode):
                    stack.enter_context(unoptimized() if self.watch.below else nullcontext())
                    stack.enter_context(operators)
                with torch._C._EnableTorchFunction():
                    run()
            mode.raise_broken()
            mode.finish()
        except Exception:
            if restore is not None:
                restore()
            mode.raise_broken()  # the model may have made another error of it
            if operators.error is not None:  # scripted code lets it come out as an error of its own
                raise operators.error from None
            raise
        finally:
            self._active = operators.error = mode.broken = None  # an error holds on to all that its frames hold
        self.watch.below |= operators.num_calls > 0
        return mode

    def _discover(self, run: Callable[[], object], reading: Reading, phase: str) -> ForwardMode:
        known = {site.site_id for site in self.known.sites()}
        for depth in _DEPTHS:
            mode = DiscoveringMode(self.watch, reading, phase, depth)
            try:
                with ExitStack() as stack:
                    stack.enter_context(_gradient_mode(depth.gradients))
                    if depth.gradients:
                        stack.enter_context(gradients_required(self.model))
                        stack.enter_context(constants_require_gradients(self.watch.code.weights.values()))
                    if depth.gradients and not depth.real:
                        stack.enter_context(mode.follower.hollow())
                    stack.enter_context(mode.paths.followed())
                    self._watch(run, mode)
            except Exception as error:
                if isinstance(error, ReLUDoctorError) or depth is _DEPTHS[-1]:
                    raise
                for site in self.known.sites():  # what a forward showed that stopped half-way may have been cut short
                    if site.site_id not in known:
                        self.known.forget(site)
                self._note_depth(depth, error)
                if depth is _DEPTHS[0] and not isinstance(error, GradientInForwardError):
                    with torch.no_grad(), torch._C._EnableTorchFunction():
                        run()  # raises by itself: the model's own error, not ours
                continue
            if depth.real and not self.watch.gradients:
                self.watch.gradients = not self._runs_without_gradients(run)
            mode.learn()
            self._called |= mode.called
            return mode
        raise AssertionError("at the last depth it is found or raised")

    def _runs_without_gradients(self, run: Callable[[], object]) -> bool:
        """Whether a forward that asks autograd itself enables gradients itself."""
        restore = self._state.keep()
        try:
            with torch.no_grad():
                run()
        except RuntimeError:
            return False
        finally:
            restore()
        return True

    def _note_depth(self, depth: Depth, error: Exception) -> None:
        if depth is _DEPTHS[-2]:
            self.known.note(
                f"no autograd graph could be had ({type(error).__name__}): sites are named by module and call order"
            )

    def _commit(self, mode: ForwardMode) -> None:
        mode.recorder.commit(self.stats.setdefault(mode.phase, {}))
        for rows in mode.recorder.outputs.values():
            rows.thin()
        self.outputs |= mode.recorder.outputs


@contextmanager
def _gradient_mode(enabled: bool) -> Iterator[None]:
    with torch.inference_mode(False), torch.set_grad_enabled(enabled):
        yield
