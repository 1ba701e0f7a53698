"""Scanner: feeds batches to a probed model, and keeps the books of what was read."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from relu_doctor.config import Config
from relu_doctor.diagnose.evidence import inputs_needed
from relu_doctor.errors import (
    DataError,
    ForwardError,
    ReLUDoctorError,
    UnsupportedModelError,
)
from relu_doctor.observe.forwards.registry import Reading
from relu_doctor.observe.forwards.watching import aside
from relu_doctor.observe.graph.sharding import Company
from relu_doctor.observe.inputs.census import Census, check_no_nan
from relu_doctor.observe.inputs.counting import BY_ROWS, Counting, first_list
from relu_doctor.observe.inputs.feeding import (
    Arguments,
    Feeder,
    describe,
    map_tensors,
    moved,
    refuse_nested,
    tensors_in,
)
from relu_doctor.observe.inputs.reading import Source, plan, take
from relu_doctor.observe.inputs.rehearsal import Inputs, Rehearsal, altered_one_by_one, rehearse
from relu_doctor.observe.models.state import keep_tensors
from relu_doctor.observe.probe import Probe
from relu_doctor.observe.rectifiers.custom import Custom
from relu_doctor.terms import Evidence, Mode, Statistics
from relu_doctor.text import clean_text

Forward = Callable[[nn.Module, Any], object]
Mask = Callable[[Any], Tensor | None]
Progress = Callable[[int, int | None], None]
_FIRST_INPUTS = 64  # read to see how many units share the bound, where as many inputs are read as it needs


@dataclass(frozen=True, slots=True)
class ScanRequest:
    """The arguments of :func:`scan`, checked; and what only a command knows.

    Attributes:
        random_inputs: the batches are random numbers.
        source: where the model came from.
    """

    forward: Forward | None = None
    mode: Mode = Mode.EVAL
    sites: tuple[str, ...] = ()
    mask: Mask | None = None
    max_inputs: int | str | None = None
    device: torch.device | None = None
    statistics: Statistics = Statistics.FULL
    evidence: Evidence = Evidence.INPUT
    rectifiers: Custom = ()
    exhaustive: bool = False
    config: Config = field(default_factory=Config)
    progress: Progress | None = None
    random_inputs: bool = False
    source: Mapping[str, Any] | None = None


class Scanner:
    """Feeds batches to a probed model and keeps the books of what was read."""

    def __init__(self, model: nn.Module, probe: Probe, request: ScanRequest, device: torch.device | None) -> None:
        self.model = model
        self.probe = probe
        self.request = request
        self.device = device
        self.feeder = Feeder(model)
        self.census = Census()
        self.telling: list[bool] | None = None  # of the tensors of a batch, which make a difference to any site
        self.num_inputs = 0
        self.num_batches = 0
        self.passed = ""
        self.masked = False
        self.counting: Counting | None = None  # until a batch has shown it
        self.inputs_survive = False  # until a forward has shown that it does not write to its inputs
        self.read_to_end = False
        self.company = Company(model)
        self.last: _Run | None = None  # forward, where other processes may ask for more
        self.source = Source((), "all", None, None)
        self.goal: int | None = None  # inputs that there will be in all, where that is known

    def read(self, batches: Iterable[Any]) -> None:
        """Observe the batches that are to be read, in step with the other processes of a model that has some."""
        try:
            self._read(batches)
            self.company.accompany(self._again)
        except Exception:
            self.company.fail()
            raise

    def _again(self) -> None:
        """A forward that counts for nothing."""
        assert self.last is not None
        with torch.no_grad():
            self.last.alone()

    def _read(self, batches: Iterable[Any]) -> None:
        auto = self.request.max_inputs == "auto"
        if isinstance(batches, list | tuple) and batches:
            self._count(batches[0])
        limit = self.request.max_inputs if isinstance(self.request.max_inputs, int) else None
        counting = self.counting or BY_ROWS
        first = plan(batches, _FIRST_INPUTS, counting) if auto else None
        if first is not None and first.picked is not None:  # how many units share the bound is seen on a few inputs
            self._take(first)
            limit = -(-self._needed() * self.num_inputs // max(self.evidence, 1))
        else:
            first = None
        self._take(plan(batches, limit, counting, after=first), stop=self._enough if auto else None)
        self.read_to_end = self.source.sampling == "all" and not (auto and first is None and self._enough())
        if not self.num_inputs:
            raise DataError("expected at least one input, found an empty data set; check the data source.")

    def _take(self, source: Source, *, stop: Callable[[], bool] | None = None) -> None:
        self.source = source
        start, size = self.num_inputs, source.available if source.limit is None else source.limit
        self.goal = None if size is None else start + size
        for batch in _said_by_data(take(source, counting=self._count, stop=stop), first=self.num_batches):
            self._observe(batch, self.num_batches)
            self.num_batches += 1

    @property
    def evidence(self) -> int:
        """Units of evidence read."""
        return self.census.tokens if self.request.evidence is Evidence.TOKEN else self.num_inputs

    @property
    def repetitions(self) -> int:
        """Of those, how many repeated an earlier one."""
        return self.census.repeated_tokens if self.request.evidence is Evidence.TOKEN else self.census.repeated

    def _needed(self) -> int:
        config = self.request.config
        rates = [config.for_site(site.name).max_firing_rate for site in self.probe.sites() if site.rectifier.can_die]
        units = sum(site.num_units for site in self.probe.sites() if site.rectifier.can_die)
        return inputs_needed(min(rates, default=config.max_firing_rate), confidence=config.confidence, num_units=units)

    def _enough(self) -> bool:
        return bool(self.num_inputs) and self.evidence - self.repetitions >= self._needed()

    def _arguments(self, batch: Any) -> Arguments:
        refuse_nested(batch)
        if self.request.forward is None:
            return self.feeder.arguments(batch)
        return Arguments((batch,), {}, f"forward= of {describe(batch)}", None)

    def _count(self, batch: Any) -> Counting:
        """How the inputs of a batch are counted: tried out on the first that has any."""
        if self.counting is not None:
            return self.counting
        arguments = self._arguments(batch)
        args, kwargs = moved(arguments.args, self.device), moved(arguments.kwargs, self.device)
        if not BY_ROWS.num_inputs((args, kwargs)):
            return BY_ROWS
        if self.company:  # another axis is not tried: a forward that stops half-way would leave the others waiting
            self.counting = BY_ROWS
            return self.counting
        phase = Mode.TRAIN if self.request.mode is Mode.TRAIN else Mode.EVAL
        run = self._run_of(phase, args, kwargs)

        def prepare(counting: Counting) -> Rehearsal | None:
            return rehearse((args, kwargs), counting.num_inputs((args, kwargs)), arguments.mask, counting)

        self.counting = self.probe.find_counting(prepare, run.rehearse, run, phase=phase.value)
        if self.counting.words:
            self.probe.known.note(self.counting.words)
        return self.counting

    def _observe(self, batch: Any, index: int) -> None:
        counting, arguments = self._count(batch), self._arguments(batch)
        check_no_nan((arguments.args, arguments.kwargs), index)
        rows = counting.num_inputs((arguments.args, arguments.kwargs))
        if rows == 0:
            return
        if self.request.mask is not None:
            arguments = replace(arguments, mask=self._asked_mask(batch, rows))
        passed = arguments.args, arguments.kwargs
        args, kwargs = moved(arguments.args, self.device), moved(arguments.kwargs, self.device)
        positions = counting.positions(passed)
        reading = Reading(rows, arguments.mask, self.evidence, counting.axis, positions)
        phases = (Mode.EVAL, Mode.TRAIN) if self.request.mode is Mode.BOTH else (self.request.mode,)
        for phase in phases:
            self._run(phase, args, kwargs, reading, index)
        self._register(passed, rows, reading)
        self.num_inputs += rows or 1
        self.passed = self.passed or arguments.passed
        self.masked |= arguments.mask is not None
        if self.request.progress is not None:
            self.request.progress(self.num_inputs, self.goal)

    def _register(self, passed: Inputs, rows: int | None, reading: Reading) -> None:
        """Count a batch in the census by the tensors that make a difference; a mere number would tell all apart."""
        counting = self.counting or BY_ROWS
        if counting.items:
            for item in first_list(passed) or ():
                own = torch.tensor([counting.positions([item])])
                self.census.add(item, 1, Counting(None), tokens=own)
            return
        held = [tensor for tensor in tensors_in(passed) if counting.has_inputs(tensor, rows or 0)]
        if self.telling is None:
            self.telling = self._differences(passed, rows or 0, len(held), reading)
        if len(held) == len(self.telling):
            held = [tensor for tensor, tells in zip(held, self.telling, strict=True) if tells]
        tokens = reading.mask.sum(1) if reading.mask is not None else torch.full((rows or 1,), reading.positions)
        self.census.add(held if counting.axis is not None else passed, rows, counting, tokens=tokens)

    def _differences(self, passed: Inputs, rows: int, held: int, reading: Reading) -> list[bool]:
        """Which tensors of a batch make a difference to any site, tried out where there are several."""
        counting = self.counting or BY_ROWS
        phase = Mode.TRAIN if self.request.mode is Mode.TRAIN else Mode.EVAL
        few = None if held < 2 or self.company else rehearse(passed, rows, reading.mask, counting)
        if few is None:
            return [True] * held
        run, plain = self._run_of(phase, *passed), moved(few.plain, self.device)
        others = altered_one_by_one(plain, few.num_inputs, counting)
        return [
            other is None
            or self.probe.rehearser.changes(run.rehearse, plain, other, few.num_inputs, counting.axis, phase.value)
            for other in others
        ]

    def _run(self, phase: Mode, args: tuple[Any, ...], kwargs: Mapping[str, Any], reading: Reading, index: int) -> None:
        counting, run = self.counting or BY_ROWS, self._run_of(phase, args, kwargs)

        def prepare() -> Rehearsal | None:
            return rehearse((args, kwargs), reading.num_inputs, reading.mask, counting)

        try:
            self.probe.observe(run, reading, phase=phase.value, prepare=prepare, perform=run.rehearse)
        except ReLUDoctorError:
            raise
        except Exception as error:
            raise _forward_error(self.model, error, (args, kwargs), index) from error

    def _run_of(self, phase: Mode, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Run:
        """The forward on a batch, with the model in the mode that a phase asks for."""
        if phase is Mode.TRAIN:
            try:
                self.model.train()
            except NotImplementedError as error:
                raise UnsupportedModelError(
                    f"the model has no train mode ({clean_text(error)}), as exported programs have none; scan it with "
                    "mode='eval'."
                ) from error
        else:
            for module in self.model.modules():
                if getattr(module, "training", False):  # frozen scripts have none
                    module.training = False
        run = _Run(self, phase, args, kwargs)
        self.last = run if self.company else None
        return run

    def _asked_mask(self, batch: Any, rows: int | None) -> Tensor | None:
        assert self.request.mask is not None
        try:
            with torch._C._EnableTorchFunction():
                mask: Any = self.request.mask(batch)
        except Exception as error:
            raise DataError(f"mask= raised {type(error).__name__}: {error}; it is called with a batch.") from error
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dim() != 2 or (rows is not None and len(mask) != rows):
            found = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise DataError(
                f"mask= must return a boolean tensor of shape (inputs, positions) = ({rows}, …), found {found}."
            )
        return mask.bool()


@dataclass(slots=True)
class _Run:
    """The forward of a scan's model on one batch; called again on copies where the model writes to its inputs."""

    scanner: Scanner
    phase: Mode
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self) -> object:
        self.scanner.company.announce()
        return self._perform(self.args, self.kwargs)

    def rehearse(self, inputs: Inputs) -> object:
        """The same on other inputs."""
        self.scanner.company.announce()
        with aside():
            args, kwargs = map_tensors(inputs, torch.clone)
        return self._perform(args, kwargs)

    def alone(self) -> object:
        """The same, when others have announced it."""
        return self._perform(self.args, self.kwargs)

    def _perform(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
        scanner, forward = self.scanner, self.scanner.request.forward
        with aside():
            given, named = (args, kwargs) if scanner.inputs_survive else map_tensors((args, kwargs), torch.clone)
            versions = [tensor._version for tensor in tensors_in((given, named))]
            restore = keep_tensors(scanner.model) if self.phase is Mode.TRAIN else None
        try:
            result = scanner.model(*given, **named) if forward is None else forward(scanner.model, *given)
            return deque(result, maxlen=0) if isinstance(result, Generator) else result
        finally:
            with aside():
                scanner.inputs_survive = versions == [tensor._version for tensor in tensors_in((given, named))]
                if restore is not None:
                    restore()


def _said_by_data(batches: Iterator[Any], *, first: int) -> Iterator[Any]:
    """The batches, with an exception of the data's own code told as such."""
    for index in count(first):
        try:
            batch = next(batches)
        except StopIteration:
            return
        except ReLUDoctorError:
            raise
        except Exception as error:
            raise DataError(
                f"the data raised {type(error).__name__} at batch {index}: {clean_text(error)}; mend the data source."
            ) from error
        yield batch


def _forward_error(model: nn.Module, error: Exception, passed: Any, index: int) -> ForwardError:
    paths = {id(module): name for name, module in model.named_modules()}
    where = ""
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        ours = (
            frame.f_globals.get("__name__", "").partition(".")[0] == "relu_doctor"
        )  # to look would make it hold itself
        owner = None if ours else frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in paths:
            where = f"{paths[id(owner)] or 'the model'} ({type(owner).__name__})"
        trace = trace.tb_next
    lines = str(error).strip().splitlines() or ["no message"]
    message = lines[0]
    if "TorchScript interpreter" in message:  # which tells first where it was
        message = next((line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)), lines[-1])
    shown = ", ".join(describe(value) for value in (*passed[0], *passed[1].values()))
    return ForwardError(
        f"the model's forward raised in {where or 'the model'} on batch {index}: {type(error).__name__}: "
        f"{clean_text(message, 300)} (passed: {shown}). "
        "Give data of the shape and dtype that the model takes, or forward=."
    )
