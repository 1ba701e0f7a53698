"""LiveProbe: a probe on the forwards that a training run makes anyway.

Hooks on the model tell where a forward begins and ends. In between a mode looks at it, which never raises into it. No
forward is added but those that find out, once, what the calls are; on compiled models, whose inside nothing can look
at, each observed forward is one more, of the original module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from relu_doctor.errors import UnsupportedModelError
from relu_doctor.observe.forwards.calls import UnknownCallError
from relu_doctor.observe.forwards.lenient import LiveForward
from relu_doctor.observe.forwards.registry import Reading
from relu_doctor.observe.forwards.surroundings import alone, firmly, undisturbed
from relu_doctor.observe.inputs.census import digests
from relu_doctor.observe.inputs.counting import BY_ROWS, Counting
from relu_doctor.observe.inputs.feeding import Feeder, map_tensors, mask_in, moved, tensors_in
from relu_doctor.observe.inputs.rehearsal import Inputs, Rehearsal, rehearse
from relu_doctor.observe.models.compilation import compiled_around, compiled_calls, is_compiled
from relu_doctor.observe.models.guard import preserved
from relu_doctor.observe.models.hooks import Hook
from relu_doctor.observe.models.wrappers import behind_wrappers
from relu_doctor.observe.probe import Probe
from relu_doctor.observe.rectifiers.custom import Custom
from relu_doctor.observe.statistics.stats import UnitStats
from relu_doctor.terms import Statistics

PHASE = "train"
_OWN = "reference"  # phase of the forwards on batches of our own
_WRITTEN = "a forward that writes to its inputs took a way that was not known: such ones were not observed"
_MANY = 200  # forwards that were observed, after which compiled loops are worth loading for small ones as well
_SEED = 0  # of the forwards that are compared with each other: dropout must drop the same


class LiveProbe:
    """Observes a model's own forwards; a context manager.

    Args:
        model: that is trained; wrapped or not.
        wants: asked at the beginning of each forward that counts, whether it is to be observed.
        statistics: how much to measure.
        rectifiers: the user's own rectifier classes.
        unit_axis: gives the unit axis of a site by its base name, where the user named one.
        samples: some rows of each site's outputs in the last forward are kept, in ``probe.outputs``.

    Raises:
        UnsupportedModelError: the model is a ScriptModule.

    Attributes:
        probe: what is known and what was counted, under the phase ``train``.
        num_forwards: forwards that counted so far.
        num_inputs: inputs of those that were observed.
        failures: what went wrong in looking, by kind; nothing of it reached the training.
        paused: no forward counts.
        asleep: none is looked at, and none counted, since none is going to be observed.
        wishes: calls were met that are not known, and that no process finds out alone.
    """

    def __init__(
        self,
        model: nn.Module,
        wants: Callable[[], bool],
        *,
        statistics: Statistics = Statistics.FULL,
        rectifiers: Custom = (),
        unit_axis: Callable[[str], int | None] | None = None,
        samples: bool = False,
    ) -> None:
        self.model = behind_wrappers(model)
        if isinstance(self.model, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                "a ScriptModule takes no hooks by which its forwards could be watched: give the module that it was "
                "made of, or scan() this one between two epochs."
            )
        self.probe = Probe(self.model, statistics=statistics, rectifiers=rectifiers, unit_axis=unit_axis)
        self.probe.watch.sampled = PHASE if samples else ""
        self.num_forwards = 0
        self.num_inputs = 0
        self.failures: dict[str, str] = {}
        self.paused = 0
        self.asleep = False
        self.wishes = False
        self._observed = 0  # forwards
        self._wants = wants
        self._counting: Counting | None = None
        self._unknown = False
        self._running: LiveForward | None = None
        self._digests: list[int] | None = None
        self._told: list[tuple[list[int] | None, int]] = []
        self._inputs = 0  # of the forward that is running
        self._given: tuple[Inputs, list[int]] | None = None  # and the versions of its tensors
        self._root = self.model  # whose forwards they are
        self._called = model  # whose call is the forward: a compiled wrapper's is not that of the module inside
        self._knows_compiled = False
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> Self:
        self.probe.__enter__()
        self._attach()
        return self

    @property
    def is_apart(self) -> bool:
        """Whether forwards that are observed are made apart, since the run's own are compiled in part or as a whole."""
        return any(is_compiled(module) for module in (self._called, *self.model.modules()))

    def find_compiled(self) -> bool:
        """Look for what calls the model, where it was compiled after it was attached to; true where that was found."""
        found = compiled_around(self.model)
        if found is None or self._knows_compiled:
            return False
        self._detach()
        self._called = found
        self._attach()
        return True

    def _attach(self) -> None:
        self._knows_compiled = is_compiled(self._called)
        if self._called is self.model and is_compiled(self.model):
            self._undo.append(compiled_calls(self.model, self._before))
        elif is_compiled(self._called):
            self._undo.append(self._called.register_forward_pre_hook(Hook(self._before), with_kwargs=True).remove)
        else:
            before = self.model.register_forward_pre_hook(Hook(self._before), with_kwargs=True)
            after = self.model.register_forward_hook(Hook(self._after), prepend=True, always_call=True)
            self._undo += [before.remove, after.remove]

    def _detach(self) -> None:
        while self._undo:
            self._undo.pop()()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove every hook and mode. Safe to call twice."""
        self.drop()
        self._detach()
        self.probe.close()

    def take_digests(self) -> list[tuple[list[int] | None, int]]:
        """Digests and number of the inputs of each forward that was observed since this was asked last."""
        told, self._told = self._told, []
        return told

    def forget(self, site_id: str, units: Tensor) -> None:
        """Forget what was counted of some units of a site: bool (units,)."""
        kept = self.probe.stats.get(PHASE, {})
        if site_id in kept:
            device = kept[site_id].inputs.device
            kept[site_id] = UnitStats.empty(len(units), device).where(units.to(device), kept[site_id])

    def drop(self) -> None:
        """Take away what a forward left that did not come to its end."""
        if self._running is not None:
            self._running.drop()
            self._running = None

    def look_at(self, batches: Iterable[Any]) -> Mapping[str, UnitStats]:
        """Observe forwards on batches of one's own: in eval mode, without gradients, and without a trace.

        Args:
            batches: as :func:`~relu_doctor.scan` takes them, each passed as there.

        Returns:
            Their statistics, per ``site_id``.

        Raises:
            DataError: a batch does not fit the forward.
            Exception: whatever the forward raises.
        """
        feeder, seen = Feeder(self.model), 0
        device = next((parameter.device for parameter in self.model.parameters()), None)
        contexts = undisturbed(self.model), torch.inference_mode(False), preserved(self.model)
        with alone(self.model), firmly(*contexts), torch.no_grad():
            for module in self.model.modules():
                module.training = False
            for batch in batches:
                arguments = feeder.arguments(batch)
                inputs = moved(arguments.args, device), moved(arguments.kwargs, device)
                seen += self._look_at(inputs, arguments.mask, seen)
        return self.probe.stats.pop(_OWN, {})

    def _look_at(self, inputs: Inputs, mask: Tensor | None, first_ordinal: int) -> int:
        counting = self._counting or BY_ROWS
        reading = replace(self._reading(inputs, counting), mask=mask, first_ordinal=first_ordinal)

        def run(given: Inputs = inputs) -> object:
            return self._perform(self.model, given)

        def prepare() -> Rehearsal | None:
            return rehearse(inputs, reading.num_inputs, mask, counting)

        self.probe.observe(run, reading, phase=_OWN, prepare=prepare, perform=run)
        return reading.num_inputs or 1

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if torch.compiler.is_compiling() or self.asleep:
            return
        self.drop()
        in_backward = torch._C._current_graph_task_id() != -1  # a checkpoint computes it again
        if self.paused or in_backward or not torch.is_grad_enabled():
            return
        self.num_forwards += 1
        if not self._wants():
            return
        with self._noting_failures("observing"):
            if self.is_apart:
                self._observe_apart((args, kwargs))
                return
            if self._unknown or PHASE not in self.probe.known.phases:
                self._learn(args, kwargs)
            counting = self._counting or BY_ROWS
            self._inputs = counting.num_inputs((args, kwargs)) or 1
            self._digests = digests((args, kwargs), counting.num_inputs((args, kwargs)), counting)
            self._given = (args, kwargs), _versions((args, kwargs))
            self._running = self.probe.follow(self._reading((args, kwargs), counting), PHASE)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling() or self._running is None:
            return
        with self._noting_failures("observing"):
            running, self._running = self._running, None
            given, self._given = self._given, None
            error = running.end()
            self._unknown = isinstance(error, UnknownCallError)
            if error is None:
                self.num_inputs += self._inputs
                self._told.append((self._digests, self._inputs))
                self._observed += 1
                if self._observed == _MANY:
                    self.probe.known.compiles = True
            elif not self._unknown:
                raise error
            elif given is not None and _versions(given[0]) != given[1]:
                self.probe.known.note(_WRITTEN)
            elif given is not None and output is not None:
                self._recover(given[0])

    def _recover(self, inputs: Inputs) -> None:
        """Find out what the calls of a forward were that were not known, and observe it again: it counts as well."""
        self._learn(*inputs)
        self._observe_again(inputs)
        self._told.append((self._digests, self._inputs))
        self.num_inputs += self._inputs

    def _perform(self, module: nn.Module, inputs: Inputs) -> object:
        """A forward of our own."""
        with torch._C._EnableTorchFunction():
            return module.forward(*inputs[0], **inputs[1])

    @contextmanager
    def _noting_failures(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  whatever it is, the training goes on
            self.failures.setdefault(f"{what}: {type(error).__name__}", str(error))

    def _reading(self, inputs: Inputs, counting: Counting, *, rehearsed: bool = False) -> Reading:
        return Reading(
            counting.num_inputs(inputs),
            mask_in(inputs[1]),
            self.num_inputs,
            counting.axis,
            counting.positions(inputs),
            rehearsed=rehearsed,
        )

    def _observe_apart(self, inputs: Inputs) -> None:
        """Make the same forward with the original modules, without gradients and without a trace, and observe it."""
        if self._counting is None:
            self._learn(*inputs)
        counting = self._counting or BY_ROWS
        number = counting.num_inputs(inputs)
        self._observe_again(inputs)
        self._told.append((digests(inputs, number, counting), number or 1))
        self.num_inputs += number or 1

    def _observe_again(self, inputs: Inputs) -> None:
        def run(given: Inputs = inputs) -> object:
            return self._perform(self._root, map_tensors(given, lambda tensor: tensor.detach().clone()))

        contexts = undisturbed(self.model), preserved(self.model)
        with alone(self.model), firmly(*contexts), torch.no_grad():
            self.probe.observe(run, self._reading(inputs, self._counting or BY_ROWS), phase=PHASE)

    def _learn(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Find out what the calls of a forward on these inputs are, and how its inputs are counted."""
        modes = {module: module.training for module in self.model.modules()}

        def run(inputs: Inputs = (args, kwargs)) -> object:
            torch.manual_seed(_SEED)
            return self._perform(self._root, map_tensors(inputs, lambda tensor: tensor.detach().clone()))

        def prepare(counting: Counting) -> Rehearsal | None:
            return rehearse((args, kwargs), counting.num_inputs((args, kwargs)), mask_in(kwargs), counting)

        with alone(self.model), firmly(undisturbed(self.model), preserved(self.model)):
            if self._counting is None:
                for module in modes:
                    module.training = False  # where normalisation and dropout do not mix inputs
                with suppress(Exception):  # some models have no eval mode on a training batch
                    self._counting = self.probe.find_counting(prepare, run, run, phase="eval")
                self._counting = self._counting or BY_ROWS
                if self._counting.words:
                    self.probe.known.note(self._counting.words)
                for module, training in modes.items():
                    module.training = training
            self.probe.learn(run, self._reading((args, kwargs), self._counting, rehearsed=True), phase=PHASE)
        self._unknown = False


def _versions(inputs: Inputs) -> list[int]:
    """They change where a forward writes to its inputs."""
    return [tensor._version for tensor in tensors_in(inputs) if not tensor.is_inference()]
