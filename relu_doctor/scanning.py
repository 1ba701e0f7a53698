"""scan: one walk through the house, from a model and batches to a diagnosis."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from relu_doctor.config import Config, load_config
from relu_doctor.diagnose.diagnosis import Diagnosis, diagnose
from relu_doctor.diagnose.table import Coverage, UnitTable, tabulate
from relu_doctor.errors import (
    ConfigError,
    DataError,
    FilterWarning,
    NoActivationSitesError,
    NothingObservedError,
    UnsupportedModelError,
)
from relu_doctor.observe.assembling import assembled
from relu_doctor.observe.forwards.surroundings import alone, firmly, undisturbed
from relu_doctor.observe.inputs.reading import open_batches
from relu_doctor.observe.models.guard import preserved
from relu_doctor.observe.models.wrappers import behind_wrappers
from relu_doctor.observe.probe import Probe
from relu_doctor.observe.rectifiers.custom import Custom
from relu_doctor.observe.sites import ActivationSite
from relu_doctor.scanner import Forward, Mask, Progress, Scanner, ScanRequest
from relu_doctor.terms import Evidence, Mode, Statistics

_Choice = TypeVar("_Choice", Mode, Statistics, Evidence)


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
    evidence: str = "input",
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
        forward: passes a batch to the model instead: ``lambda model, batch: model.encode(batch["x"])``. It is given the
            module that DataParallel, DistributedDataParallel or torch.compile hold.
        mode: ``eval``, ``train`` or ``both``; with ``both``, units that only BatchNorm's running statistics silence
            are a finding of their own.
        sites: glob patterns of site names to include, or with ``!`` to exclude.
        mask: gives a bool (inputs, positions) of a batch, False for padding.
        max_inputs: inputs to read at most, spread evenly over a source that has a length; ``"auto"`` reads as many as
            the bound needs.
        device: where to run; by default where the model is. A model that is moved is moved back.
        statistics: ``full``, or ``minimal`` for the verdict alone.
        evidence: what counts as one unit of evidence: ``input`` (an image, a sequence), or ``token`` where every
            position that is no padding counts by itself.
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
                evidence=evidence,
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
        evidence=_member(Evidence, "evidence", evidence),
        rectifiers=rectifiers,
        exhaustive=exhaustive,
        config=load_config(config),
        progress=progress or None,
    )
    return diagnose(observe(model, batches, request).table, request.config)


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
    model = behind_wrappers(model)
    iterable = open_batches(batches)
    home = next(iter(_devices(model)), None)
    if request.device is not None and any(tensor.is_meta for tensor in model.parameters()):
        raise UnsupportedModelError("the model is offloaded: its own hooks decide where it runs; leave out device=.")
    device = request.device or _only_device(model)
    limits = request.config
    with alone(model), firmly(undisturbed(model), torch.inference_mode(False), preserved(model)):
        try:
            if request.device is not None and home is not None and home != request.device:
                model.to(request.device)
            with Probe(
                model,
                statistics=request.statistics,
                tokens=request.evidence is Evidence.TOKEN,
                rectifiers=request.rectifiers,
                unit_axis=lambda name: limits.for_site(name).unit_axis,
            ) as probe:
                scanner = Scanner(model, probe, request, device)
                scanner.read(iterable)
                return _observation(scanner)
        finally:
            if request.device is not None and home is not None and home != request.device:
                model.to(home)


def _observation(scanner: Scanner) -> Observation:
    """The evidence of a scanner, of the sites that were wanted."""
    request, probe, model = scanner.request, scanner.probe, scanner.model
    found, stats = assembled(model, probe.sites(), probe.stats)
    unused = [name for name, _ in probe.unused_modules()]
    if not found:
        raise NoActivationSitesError(_nothing_found(model, unused, probe.known.notes))
    wanted = _wanted(found, request)
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
    if request.exhaustive and not scanner.read_to_end:
        probe.known.note("exhaustive was left out of account: the data were not read to their end")
    first = Mode.TRAIN if request.mode is Mode.TRAIN else Mode.EVAL
    train = stats.get(Mode.TRAIN.value) if request.mode is Mode.BOTH else None
    seen = dict(stats.get(first.value, {}))
    for site in wanted:
        if train is not None and site.site_id not in seen and site.site_id in train:
            seen[site.site_id] = train[site.site_id]
            probe.known.note(f"{site.name} is called in train mode only: its numbers are from there")
    num_read = scanner.num_inputs
    if request.evidence is Evidence.TOKEN:  # as many as the site saw that saw most
        num_read = max((int(seen[key].inputs.max()) for key in seen if seen[key].num_units), default=0)
    coverage = Coverage(
        num_inputs=num_read,
        distinct_inputs=num_read - -(-num_read * scanner.repetitions // max(scanner.evidence, 1)),
        available_inputs=scanner.source.available,
        sampling=scanner.source.sampling,
        read_to_end=scanner.read_to_end,
        passed=scanner.passed,
        mode=request.mode.value,
        statistics=request.statistics.value,
        evidence=request.evidence.value,
        sequences=scanner.num_inputs if request.evidence is Evidence.TOKEN else None,
        random_inputs=request.random_inputs,
        exhaustive=request.exhaustive and scanner.read_to_end,
        masked=scanner.masked,
        unused=tuple(name for name in unused if _selected(name, request)),
        excluded=len(found) - len(wanted),
        notes=tuple(probe.known.notes),
        source=dict(request.source or {}),
    )
    table = tabulate(model, wanted, seen, coverage, train_stats=train)
    return Observation(table, tuple(wanted))


def _devices(model: nn.Module) -> list[torch.device]:
    """Where a model's values are; what is offloaded is nowhere."""
    tensors = [tensor for tensor in [*model.parameters(), *model.buffers()] if not tensor.is_meta]
    return list(dict.fromkeys(tensor.device for tensor in tensors))


def _only_device(model: nn.Module) -> torch.device | None:
    devices = _devices(model)
    return devices[0] if len(devices) == 1 and not any(tensor.is_meta for tensor in model.parameters()) else None


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
        if found.type == "meta":
            raise RuntimeError("it holds no values")
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
