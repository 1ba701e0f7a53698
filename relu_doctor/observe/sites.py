"""ActivationSite: a place where a rectifier is applied, known by the parameters that feed it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from relu_doctor.errors import ConfigError
from relu_doctor.observe.graph.edges import Edge
from relu_doctor.observe.graph.operations import Source, all_sources
from relu_doctor.observe.graph.passing import Speaker
from relu_doctor.observe.graph.provenance import Provenance
from relu_doctor.observe.graph.units import Spread, Term, Units, find_units, group
from relu_doctor.observe.rectifiers.kinds import Rectifier


@dataclass(frozen=True, slots=True)
class ActivationSite:
    """A place where a rectifier is applied, with its units.

    Attributes:
        site_id: hash of what feeds it; the same in every file, rank and resumed run of one architecture.
        base_name: dotted path of the rectifier module, or ``path.function()``.
        name: ``base_name``, with ``#k`` where one module applies several sites.
        rectifier: the activation function.
        producers: qualified names of the parameters that compute the pre-activation.
        producer: the modules that own them, for reading.
        num_units: channels or features.
        codes: indices along ``unit_axes``; several may share a unit.
        unit_axes: axes of the pre-activation that count units; empty where they could not be told.
        grouping: int64 (codes,): unit of each index along ``unit_axes`` where several share one, else ``None``.
        terms: the parametrised operations.
        complete: the rows of every operation that feeds the site could be told, and nothing else is added.
        unweighted_summand: another site's output, or an input, is added in without a weight.
        mixed: the same, but behind a normalisation, which scales it.
        feeds: ``site_id`` of the sites whose outputs this one reads.
        order: position in the first forward pass.
        note: what a report must say about this site; empty where all is well.
        readers: qualified names of the weights and scales that consume its units, the first weighted one on each path.
        speaker: the parameter whose gradient tells which units were silent; ``None`` where no gradient does.
        selected: its output goes through a choice (a top-k, a mask), and it fires where it passes that.
        spread: how its units are shared with other processes; they are this process's own, and ``site_id`` is that of
            the site as a whole.
    """

    site_id: str
    base_name: str
    name: str
    rectifier: Rectifier
    producers: tuple[str, ...]
    producer: str
    num_units: int
    codes: int
    unit_axes: tuple[int, ...]
    grouping: Tensor | None
    terms: tuple[Term, ...]
    complete: bool
    unweighted_summand: bool
    mixed: bool
    feeds: tuple[str, ...]
    order: int
    note: str = ""
    readers: tuple[str, ...] = ()
    speaker: Speaker | None = None
    selected: bool = False
    spread: Spread | None = None

    def renamed(self, name: str) -> ActivationSite:
        """The same site under its final name."""
        return replace(self, name=name)


def build_site(
    *,
    base_name: str,
    kind: str,
    rectifier: Rectifier,
    edge: Edge | None,
    shape: torch.Size,
    provenance: Provenance,
    feeds: tuple[str, ...],
    order: int,
    occurrence: int,
    unit_axis: int | None = None,
) -> ActivationSite:
    """Put a site together from what discovery learned of one call.

    Args:
        base_name: dotted path of the module, or ``path.function()``.
        kind: the function applied, part of the identity.
        rectifier: with its interval.
        edge: the pre-activation in the graph; ``None`` where there is no graph.
        shape: shape of the pre-activation.
        provenance: what feeds it.
        feeds: ids of the sites that its producers read.
        order: how many sites were found before.
        occurrence: which call from this module it is, for sites that no parameter feeds.
        unit_axis: the axis that a configuration names for this site.
    """
    units = find_units(edge, provenance.sources) if edge is not None and provenance.sources else Units()
    if unit_axis is not None and units.axes != (wanted := (_checked_axis(unit_axis, shape, base_name),)):
        units = Units(axes=wanted, told=True)
    if not units.told and rectifier.on_output and provenance.sources:  # the rectifier itself mixes its inputs' units
        units = replace(units, axes=_producer_axes(shape, provenance.sources[0]), table=None)
    if not units.told and not units.axes:
        units = replace(units, axes=_fallback_axes(shape, provenance), table=None)
    note = ""
    if not provenance.sources and unit_axis is None:
        note = "no weighted operation was found behind it: known by its module and the order of its calls"
    told = units.told or bool(units.axes)
    if not told:
        nothing = "it was called on nothing, which shows no units" if 0 in shape else ""
        note = nothing or note or units.note or "the axis of its units could not be told"
    codes = math.prod(shape[axis] for axis in units.axes)
    grouping = group(units.table)
    num_units = (int(grouping.max()) + 1 if grouping is not None else codes) if told else 0
    parameters: dict[str, None] = {}
    for source in all_sources(provenance.sources):
        parameters.update(dict.fromkeys(source.weight + source.additive))
    producers = tuple(parameters)
    low_high = "{}:{}".format(*rectifier.shape)
    spread = units.spread
    identity = [
        kind,
        low_high,
        *sorted(producers),
        str(provenance.crossed),
        str(num_units if spread is None else spread.num_units),
        _row_signature(units.terms if spread is None else spread.terms),
    ]
    identity += [*provenance.shifts, *_part_names(units.terms)]
    if not producers:
        identity += [base_name, str(occurrence)]
    site_id = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:12]
    return ActivationSite(
        site_id=site_id,
        base_name=base_name,
        name=base_name,
        rectifier=rectifier,
        producers=producers,
        producer=_owners(provenance.sources),
        num_units=num_units,
        codes=codes,
        unit_axes=units.axes,
        grouping=grouping,
        terms=units.terms,
        complete=_is_complete(units, provenance),
        unweighted_summand=bool(provenance.summands) or provenance.raw_summand,
        mixed=any(source.mixed for source in all_sources(provenance.sources)),
        feeds=feeds,
        order=order,
        note=note,
        spread=spread,
    )


def name_sites(sites: Mapping[str, ActivationSite], parameter_order: Mapping[str, int]) -> list[ActivationSite]:
    """Final names, in forward order: ``#k`` numbers the sites of one module by their producers' place in the model."""
    by_base: dict[str, list[ActivationSite]] = {}
    for site in sites.values():
        by_base.setdefault(site.base_name, []).append(site)
    named: list[ActivationSite] = []
    for base, members in by_base.items():
        if len(members) == 1:
            named.append(members[0].renamed(base))
            continue
        members.sort(key=lambda site: (_place(site, parameter_order), site.order))
        named += [site.renamed(f"{base}#{k}") for k, site in enumerate(members, start=1)]
    return sorted(named, key=lambda site: site.order)


def _place(site: ActivationSite, parameter_order: Mapping[str, int]) -> int:
    """Where the nearest producer stands among the model's parameters; sites without one come last."""
    own = [parameter_order[name] for name in site.producers if name in parameter_order]
    return max(own) if own else len(parameter_order)


def _owners(sources: list[Source]) -> str:
    """The modules that own the parameters: weights first, then what normalises or shifts them."""
    found = list(all_sources(sources))
    owners: dict[str, None] = {}
    for source in sorted(found, key=lambda source: source.kind != "weight"):
        for name in source.weight + source.additive:
            owner, _, leaf = name.rpartition(".")
            if "parametrizations" in owner:
                owner = owner.split("parametrizations")[0].rstrip(".")
            owners[owner or leaf] = None
    return ", ".join(owners)


def _fallback_axes(shape: torch.Size, provenance: Provenance) -> tuple[int, ...]:
    """Where no parameter feeds a site: a matrix has its features last; of more axes nothing is guessed."""
    if provenance.sources:
        return ()
    return (1,) if len(shape) == 2 else ()


def _producer_axes(shape: torch.Size, source: Source) -> tuple[int, ...]:
    """Where the producer's units would lie, if they are still there."""
    return source.row_axes if len(source.shape) == len(shape) else ()


def _checked_axis(axis: int, shape: torch.Size, base_name: str) -> int:
    """The axis that a configuration names, counted from the front.

    Raises:
        ConfigError: there is no such axis.
    """
    if not -len(shape) <= axis < len(shape):
        raise ConfigError(
            f"unit_axis of {base_name} must lie between {-len(shape)} and {len(shape) - 1}, since what it is applied "
            f"to has {len(shape)} axes, found {axis}."
        )
    return axis % len(shape)


def _is_complete(units: Units, provenance: Provenance) -> bool:
    """Whether every operation that feeds the site is accounted for, row by row, and nothing else is added."""
    nearest = [term for term in units.terms if term.nearest]
    return units.whole and len(nearest) == len(provenance.sources) and not provenance.constants


def _part_names(terms: tuple[Term, ...]) -> list[str]:
    """Tells apart sites whose producers are parts of one parameter: the experts of a stack."""
    parts = [part.name for term in terms for part in (term.weight_part, term.additive_part) if part is not None]
    return [name for name in parts if name]


def _row_signature(terms: tuple[Term, ...]) -> str:
    """Tells apart sites that read different rows of one producer (query and key of a fused projection)."""
    if not terms:
        return ""
    rows = terms[0].rows
    return f"{int(rows[0])}:{int(rows[-1])}" if len(rows) else ""
