"""scan: one walk through the house, from a model and batches to a diagnosis."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from relu_doctor.config import Config, load_config
from relu_doctor.diagnose.diagnosis import Diagnosis, diagnose
from relu_doctor.diagnose.evidence import inputs_needed
from relu_doctor.diagnose.table import Coverage, UnitTable, tabulate
from relu_doctor.errors import (
    ConfigError,
    DataError,
    FilterWarning,
    ForwardError,
    NoActivationSitesError,
    NothingObservedError,
    ReLUDoctorError,
    UnsupportedModelError,
)
from relu_doctor.observe.census import Census, check_no_nan
from relu_doctor.observe.custom import Custom
from relu_doctor.observe.feeding import (
    Arguments,
    Feeder,
    describe,
    map_tensors,
    moved,
    num_inputs_of,
    tensors_in,
)
from relu_doctor.observe.guard import preserved, preserved_buffers
from relu_doctor.observe.probe import Probe
from relu_doctor.observe.reading import Source, open_batches, plan, take
from relu_doctor.observe.registry import Reading
from relu_doctor.observe.rehearsal import Inputs, Rehearsal, rehearse
from relu_doctor.observe.sites import ActivationSite
from relu_doctor.terms import Mode, Statistics
from relu_doctor.text import clean_text

Forward = Callable[[nn.Module, Any], object]
Mask = Callable[[Any], Tensor | None]
Progress = Callable[[int, int | None], None]
_Choice = TypeVar("_Choice", Mode, Statistics)


def scan(
    model: nn.Module,
    batches: Iterable[Any] | Tensor,
    *,
    forward: Forward | None = None,
    mode: str = "eval",
    sites: Iterable[str] | str | None = None,
    mask: Mask | None = None,
    max_inputs: int | str | None = None,
    device: str | torch.device | None = None,
    statistics: str = "full",
    rectifiers: Custom = (),
    exhaustive: bool = False,
    config: Config | Mapping[str, Any] | str | Path | None = None,
    progress: bool | Progress = False,
) -> Diagnosis:
    """Find the dead units of a model on some data. The model is left bit for bit as it was.

    Args:
        model: any module.
        batches: any iterable, read once and never held; a tensor is one batch. Of each batch a tensor is passed as the
            one input, of a tuple or list as many leading elements as the forward requires, of a mapping the keys that
            it takes (an ``attention_mask`` also masks positions).
        forward: passes a batch to the model instead: ``lambda model, batch: model.encode(batch["x"])``.
        mode: ``eval``, ``train`` or ``both``; with ``both``, units that only BatchNorm's running statistics silence
            are a finding of their own.
        sites: glob patterns of site names to include, or with ``!`` to exclude.
        mask: gives a bool (inputs, positions) of a batch, False for padding.
        max_inputs: inputs to read at most, spread evenly over a source that has a length; ``"auto"`` reads as many as
            the bound needs.
        device: where to run; by default where the model is. A model that is moved is moved back.
        statistics: ``full``, or ``minimal`` for the verdict alone.
        rectifiers: classes of your own activation modules, or a mapping of them to their firing interval (low, high).
        exhaustive: the data are the whole population, so that silent is dead on it.
        config: a profile's name, a path, a mapping or a :class:`~relu_doctor.config.Config`.
        progress: show progress on stderr, or a function of (inputs read, inputs in all).

    Returns:
        A :class:`~relu_doctor.Diagnosis`.

    Raises:
        NoActivationSitesError: the model applied no rectifier.
        NothingObservedError: the patterns left nothing, or nothing could be observed.
        DataError: the data are empty, hold NaN, or do not fit the forward.
        ForwardError: the model's forward raised.
        UnsupportedModelError: the model cannot be observed.
        ConfigError: the configuration is wrong.

    >>> import torch, relu_doctor
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
    >>> _ = torch.nn.init.constant_(model[0].bias, -100.0)
    >>> diagnosis = relu_doctor.scan(model, torch.randn(1000, 4))
    >>> diagnosis.units["status"].tolist(), diagnosis.units["mechanism"].unique().tolist()
    (['dead', 'dead', 'dead'], ['negative_bias'])
    """
    if progress is True:
        from relu_doctor.reports.progress import progress_bar

        with progress_bar("scanning") as report:
            return scan(
                model,
                batches,
                forward=forward,
                mode=mode,
                sites=sites,
                mask=mask,
                max_inputs=max_inputs,
                device=device,
                statistics=statistics,
                rectifiers=rectifiers,
                exhaustive=exhaustive,
                config=config,
                progress=report,
            )
    request = ScanRequest(
        forward=forward,
        mode=_member(Mode, "mode", mode),
        sites=_checked_patterns(sites),
        mask=mask,
        max_inputs=_checked_limit(max_inputs),
        device=usable_device(device),
        statistics=_member(Statistics, "statistics", statistics),
        rectifiers=rectifiers,
        exhaustive=exhaustive,
        config=load_config(config),
        progress=progress or None,
    )
    return diagnose(observe(model, batches, request).table, request.config)


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
    rectifiers: Custom = ()
    exhaustive: bool = False
    config: Config = field(default_factory=Config)
    progress: Progress | None = None
    random_inputs: bool = False
    source: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """What a scan saw, before any verdict.

    Attributes:
        table: the evidence.
        sites: the sites of the table, with the parameters that feed them.
    """

    table: UnitTable
    sites: tuple[ActivationSite, ...]


def observe(model: nn.Module, batches: Iterable[Any] | Tensor, request: ScanRequest) -> Observation:
    """The evidence part of :func:`scan`: find, observe and tabulate, without a verdict."""
    model = _observable(model)
    iterable = open_batches(batches)
    home = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), None)
    device = request.device or _only_device(model)
    limits = request.config
    with torch.inference_mode(False), preserved(model):
        try:
            if request.device is not None and home is not None and home != request.device:
                model.to(request.device)
            with Probe(
                model,
                statistics=request.statistics,
                rectifiers=request.rectifiers,
                unit_axis=lambda name: limits.for_site(name).unit_axis,
            ) as probe:
                scanner = _Scanner(model, probe, request, device)
                scanner.read(iterable)
                return scanner.observation()
        finally:
            if request.device is not None and home is not None and home != request.device:
                model.to(home)


class _Scanner:
    """Feeds batches to a probed model and keeps the books of what was read."""

    def __init__(self, model: nn.Module, probe: Probe, request: ScanRequest, device: torch.device | None) -> None:
        self.model = model
        self.probe = probe
        self.request = request
        self.device = device
        self.feeder = Feeder(model)
        self.census = Census()
        self.num_inputs = 0
        self.passed = ""
        self.masked = False
        self.inputs_survive = False  # until a forward has shown that it does not write to its inputs
        self.read_to_end = False
        self.source = Source((), "all", None, None)

    def read(self, batches: Iterable[Any]) -> None:
        """Observe the batches that are to be read."""
        auto = self.request.max_inputs == "auto"
        limit = self.request.max_inputs if isinstance(self.request.max_inputs, int) else None
        if auto and (plan(batches, 1).sampling == "spread"):
            self._discover_units(batches)
            limit = self._needed()
        self.source = plan(batches, limit)
        for index, batch in enumerate(_said_by_data(take(self.source, stop=self._enough if auto else None))):
            self._observe(batch, index)
        self.read_to_end = self.source.sampling == "all" and not (auto and self._enough())
        if not self.num_inputs:
            raise DataError("expected at least one input, found an empty data set; check the data source.")

    def _discover_units(self, batches: Iterable[Any]) -> None:
        """One batch, to learn how many units share the bound; its statistics are read again in their place."""
        self._observe(next(iter(take(plan(batches, 64)))), 0)
        self.probe.stats.clear()
        self.census, self.num_inputs = Census(), 0

    def _needed(self) -> int:
        config = self.request.config
        rates = [config.for_site(site.name).max_firing_rate for site in self.probe.sites() if site.rectifier.can_die]
        units = sum(site.num_units for site in self.probe.sites() if site.rectifier.can_die)
        return inputs_needed(min(rates, default=config.max_firing_rate), confidence=config.confidence, num_units=units)

    def _enough(self) -> bool:
        return bool(self.num_inputs) and self.num_inputs - self.census.repeated >= self._needed()

    def _observe(self, batch: Any, index: int) -> None:
        if self.request.forward is None:
            arguments = self.feeder.arguments(batch)
        else:
            arguments = Arguments((batch,), {}, num_inputs_of(batch), f"forward= of {describe(batch)}", None)
        check_no_nan((arguments.args, arguments.kwargs), index)
        rows = arguments.num_inputs
        if rows == 0:
            return
        if self.request.mask is not None:
            arguments = replace(arguments, mask=self._asked_mask(batch, rows))
        self.census.add((arguments.args, arguments.kwargs), rows)
        args, kwargs = moved(arguments.args, self.device), moved(arguments.kwargs, self.device)
        reading = Reading(rows, arguments.mask, self.num_inputs)
        phases = (Mode.EVAL, Mode.TRAIN) if self.request.mode is Mode.BOTH else (self.request.mode,)
        for phase in phases:
            self._run(phase, args, kwargs, reading, index)
        self.num_inputs += rows or 1
        self.passed = self.passed or arguments.passed
        self.masked |= arguments.mask is not None
        if self.request.progress is not None:
            self.request.progress(self.num_inputs, self.source.limit or self.source.available)

    def _run(self, phase: Mode, args: tuple[Any, ...], kwargs: Mapping[str, Any], reading: Reading, index: int) -> None:
        if phase is Mode.TRAIN:
            self.model.train()
        else:
            for module in self.model.modules():
                module.training = False
        forward = self.request.forward

        def run(args: tuple[Any, ...] = args, kwargs: Mapping[str, Any] = kwargs) -> object:
            given, named = (args, kwargs) if self.inputs_survive else map_tensors((args, kwargs), torch.clone)
            versions = [tensor._version for tensor in tensors_in((given, named))]
            try:
                with preserved_buffers(self.model) if phase is Mode.TRAIN else nullcontext():
                    return self.model(*given, **named) if forward is None else forward(self.model, *given)
            finally:
                self.inputs_survive = versions == [tensor._version for tensor in tensors_in((given, named))]

        def prepare() -> Rehearsal | None:
            return rehearse((args, kwargs), reading.num_inputs, reading.mask)

        def perform(inputs: Inputs) -> object:
            return run(*map_tensors(inputs, torch.clone))

        try:
            self.probe.observe(run, reading, phase=phase.value, prepare=prepare, perform=perform)
        except ReLUDoctorError:
            raise
        except Exception as error:
            raise _forward_error(self.model, error, (args, kwargs), index) from error

    def _asked_mask(self, batch: Any, rows: int | None) -> Tensor | None:
        assert self.request.mask is not None
        try:
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

    def observation(self) -> Observation:
        """The evidence, of the sites that were wanted."""
        found = self.probe.sites()
        unused = [name for name, _ in self.probe.unused_modules()]
        if not found:
            raise NoActivationSitesError(_nothing_found(self.model, unused, self.probe.known.notes))
        wanted = _wanted(found, self.request)
        if not wanted:
            raise NothingObservedError(
                f"the patterns left none of {len(found)} sites ({', '.join(site.name for site in found[:6])}"
                f"{', …' if len(found) > 6 else ''}); change sites= or ignore_sites."
            )
        if not any(site.num_units for site in wanted):
            raise NothingObservedError(
                f"none of {len(wanted)} sites could be observed: {wanted[0].name}: {wanted[0].note}; name the unit "
                f'axis in the configuration: [sites."{wanted[0].base_name}"] unit_axis = 1.'
            )
        request = self.request
        if request.exhaustive and not self.read_to_end:
            self.probe.known.note("exhaustive was left out of account: the data were not read to their end")
        coverage = Coverage(
            num_inputs=self.num_inputs,
            distinct_inputs=self.num_inputs - self.census.repeated,
            available_inputs=self.source.available,
            sampling=self.source.sampling,
            read_to_end=self.read_to_end,
            passed=self.passed,
            mode=request.mode.value,
            statistics=request.statistics.value,
            random_inputs=request.random_inputs,
            exhaustive=request.exhaustive and self.read_to_end,
            masked=self.masked,
            unused=tuple(name for name in unused if _selected(name, request)),
            excluded=len(found) - len(wanted),
            notes=tuple(self.probe.known.notes),
            source=dict(request.source or {}),
        )
        first = Mode.TRAIN if request.mode is Mode.TRAIN else Mode.EVAL
        train = self.probe.stats.get(Mode.TRAIN.value) if request.mode is Mode.BOTH else None
        table = tabulate(self.model, wanted, self.probe.stats.get(first.value, {}), coverage, train_stats=train)
        return Observation(table, tuple(wanted))


def _said_by_data(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches, with an exception of the data's own code told as such."""
    for index in count():
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


def _observable(model: nn.Module) -> nn.Module:
    """The module to watch: behind DataParallel and compile, the original one.

    Raises:
        UnsupportedModelError: it cannot be watched.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a torch.nn.Module, found {type(model).__name__}.")
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        return _observable(model._orig_mod)  # type: ignore[arg-type]
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return _observable(model.module)
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            f"expected a Python module, found a {type(model).__name__}, whose calls cannot be seen; "
            "scan the model it was made from."
        )
    for name, parameter in model.named_parameters():
        if torch.nn.parameter.is_lazy(parameter):
            raise UnsupportedModelError(
                f"{name} is a lazy parameter without a shape; run one batch through the model before the scan."
            )
        if parameter.is_meta:
            raise UnsupportedModelError(f"{name} is on the meta device and holds no values; load the weights first.")
    return model


def _only_device(model: nn.Module) -> torch.device | None:
    devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
    return devices.pop() if len(devices) == 1 else None


def _member(enum: type[_Choice], name: str, value: str) -> _Choice:
    try:
        return enum(value)
    except ValueError:
        raise ValueError(f"{name} must be one of {', '.join(item.value for item in enum)}, found {value!r}.") from None


def _checked_limit(limit: int | str | None) -> int | str | None:
    if limit is None or limit == "auto" or (isinstance(limit, int) and not isinstance(limit, bool) and limit > 0):
        return limit
    raise DataError(f"max_inputs must be a positive whole number or 'auto', found {limit!r}.")


def _checked_patterns(sites: Any) -> tuple[str, ...]:
    patterns = (sites,) if isinstance(sites, str) else tuple(sites) if isinstance(sites, Iterable) else (sites,)
    if sites is None:
        return ()
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"sites must be a glob pattern or several, found {sites!r}.")
    return patterns


def usable_device(device: str | torch.device | None) -> torch.device | None:
    """The device by its name.

    Raises:
        UnsupportedModelError: there is no such device here.
    """
    if device is None:
        return None
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedModelError(f"the device {str(device)!r} cannot be used here: {reason[:200]}.") from error
    return found


def _selected(name: str, request: ScanRequest) -> bool:
    """Whether the user's patterns and the configuration keep a site; a pattern without ``#k`` names all of a module."""
    names = (name, name.split("#", maxsplit=1)[0])
    includes = [pattern for pattern in request.sites if not pattern.startswith("!")]
    excludes = [pattern[1:] for pattern in request.sites if pattern.startswith("!")]
    kept = not includes or any(fnmatchcase(each, pattern) for each in names for pattern in includes)
    dropped = any(fnmatchcase(each, pattern) for each in names for pattern in excludes)
    return kept and not dropped and not any(request.config.for_site(each).ignore for each in names)


def _wanted(found: list[ActivationSite], request: ScanRequest) -> list[ActivationSite]:
    names = [name for site in found for name in (site.name, site.base_name)]
    missed = [p for p in request.sites if not any(fnmatchcase(name, p.removeprefix("!")) for name in names)]
    missed += request.config.unmatched_patterns(names)
    for pattern in missed:
        known = ", ".join(dict.fromkeys(site.name for site in found[:6]))
        warnings.warn(f"the pattern {pattern!r} matches no site; sites are {known}", FilterWarning, stacklevel=4)
    return [site for site in found if _selected(site.name, request)]


def _nothing_found(model: nn.Module, unused: list[str], notes: list[str]) -> str:
    modules = sum(1 for _ in model.modules())
    looked = f"no rectifier was applied in {type(model).__name__}: looked at {modules} modules and one forward"
    if unused:
        names = ", ".join(unused[:4])
        return f"{looked}; {len(unused)} rectifier modules were never called ({names}). Give inputs that reach them."
    if notes:
        return f"{looked}. {'; '.join(notes)}."
    return f"{looked}. Name your own activation class with rectifiers=[MyReLU]."


def _forward_error(model: nn.Module, error: Exception, passed: Any, index: int) -> ForwardError:
    paths = {id(module): name for name, module in model.named_modules()}
    where = ""
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in paths:
            where = f"{paths[id(owner)] or 'the model'} ({type(owner).__name__})"
        trace = trace.tb_next
    message = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
    shown = ", ".join(describe(value) for value in (*passed[0], *passed[1].values()))
    return ForwardError(
        f"the model's forward raised in {where or 'the model'} on batch {index}: {type(error).__name__}: "
        f"{clean_text(message, 300)} (passed: {shown}). "
        "Give data of the shape and dtype that the model takes, or forward=."
    )
