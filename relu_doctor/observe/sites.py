"""ActivationSite: a place where a rectifier is applied, known by the parameters that feed it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from relu_doctor.observe.axes import UnitMap, locate, takes_turns
from relu_doctor.observe.graph import Edge, Provenance, Source, all_sources, edge_shape
from relu_doctor.observe.rectifiers import Rectifier

_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True, slots=True)
class Term:
    """One parametrised operation that feeds a site, with the row of each unit in it.

    Attributes:
        kind: ``weight``, ``batch_norm``, ``norm`` or ``elementwise``.
        weight, additive: qualified parameter names.
        weight_axis: axis of the weight that counts rows; ``None`` where there is no such axis.
        transposed_groups: groups of a transposed convolution, whose rows lie on axis 1; else 0.
        rows: int64 (units,): row of each unit, -1 where it has none.
        nearest: no other operation with parameters lies between it and the rectifier.
        direct: no normalisation lies between it and the rectifier.
        unit_slope: its additive parameter reaches the pre-activation unscaled.
    """

    kind: str
    weight: tuple[str, ...]
    additive: tuple[str, ...]
    weight_axis: int | None
    transposed_groups: int
    rows: Tensor
    nearest: bool
    direct: bool
    unit_slope: bool


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
        selected: its output goes through a choice (a top-k, a mask), and it fires where it passes that.
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
    selected: bool = False

    def renamed(self, name: str) -> ActivationSite:
        """The same site under its final name."""
        return replace(self, name=name)


def qualified_names(model: nn.Module) -> dict[int, str]:
    """Identity of each parameter to its qualified name, wrapper prefixes stripped; tied parameters have one name."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), strip_wrappers(name))
    return names


def strip_wrappers(name: str) -> str:
    """A qualified name without the prefixes that DataParallel, compile, FSDP and checkpoint wrappers put in."""
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
        name = name.replace("." + wrapper, ".")
    return name


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
    note = ""
    axes, table, terms = _units(edge, provenance) if edge is not None else ((), None, ())
    if axes and edge is not None and _are_pooled(edge, provenance, terms, axes):
        axes, table, terms = (), None, ()
        note = "several layers feed different places of it: their units cannot be told apart"
    if unit_axis is not None:
        wanted = (unit_axis % len(shape),)
        axes, table, terms = (axes, table, terms) if axes == wanted else (wanted, None, ())
    if not axes and rectifier.on_output and provenance.sources:  # the rectifier itself mixes its inputs' units
        axes, table = _producer_axes(shape, provenance.sources[0]), None
    if not axes:
        axes, table = _fallback_axes(shape, provenance), None
        if not provenance.sources:
            note = "no weighted operation was found behind it: known by its module and the order of its calls"
        if not axes:
            note = note or "the axis of its units could not be told"
    codes = 1
    for axis in axes:
        codes *= shape[axis]
    grouping = _grouping(table, codes)
    num_units = (int(grouping.max()) + 1 if grouping is not None else codes) if axes else 0
    parameters: dict[str, None] = {}
    for source in all_sources(provenance.sources):
        parameters.update(dict.fromkeys(source.weight + source.additive))
    producers = tuple(parameters)
    low_high = f"{rectifier.low}:{rectifier.high}"
    identity = [kind, low_high, *sorted(producers), str(provenance.crossed), str(num_units), _row_signature(terms)]
    identity += provenance.shifts
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
        unit_axes=axes,
        grouping=grouping,
        terms=terms,
        complete=len([term for term in terms if term.nearest]) == len(provenance.sources) and not provenance.constants,
        unweighted_summand=bool(provenance.summands) or provenance.raw_summand,
        mixed=any(source.mixed for source in all_sources(provenance.sources)),
        feeds=feeds,
        order=order,
        note=note,
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


def _units(edge: Edge, provenance: Provenance) -> tuple[tuple[int, ...], Tensor | None, tuple[Term, ...]]:
    """Axes of the units, the row of each code in the first source that tells, and the terms with their rows."""
    maps: list[tuple[Source, UnitMap]] = []
    axes: tuple[int, ...] = ()
    for source in provenance.sources:
        _narrow(source)
        unit_map = locate(edge, source, axes or None, among=provenance.sources)
        if unit_map is not None:
            maps.append((source, unit_map))
            axes = axes or unit_map.axes
    if not maps:
        return (), None, ()
    table = _combined([unit_map.rows for _, unit_map in maps])
    if not all(unit_map.one_to_one for _, unit_map in maps):
        table = torch.arange(len(table), device=table.device)
    terms: list[Term] = []
    units = _units_of(table)
    for source, unit_map in maps:
        rows = _per_unit(unit_map.rows, units)
        terms.append(_term(source, rows, nearest=True, direct=True, unit_slope=unit_map.additive))
        terms += _terms_behind(source, rows, direct=source.kind in {"elementwise", "other"})
    return axes, table, tuple(terms)


def _are_pooled(edge: Edge, provenance: Provenance, terms: tuple[Term, ...], axes: tuple[int, ...]) -> bool:
    """Whether units of several layers would pass for one unit: layers that are stacked, not summed."""
    if len(provenance.sources) < 2:
        return False
    fed = sum((term.rows >= 0).int() for term in terms if term.nearest)
    return bool((torch.as_tensor(fed) > 1).any()) and takes_turns(edge, provenance.sources, axes)


def _narrow(source: Source) -> None:
    """A norm over (C, H, W) has a scale for every place: its units are still those of the layer before it."""
    if source.kind == "norm" and len(source.row_axes) > 1:
        for entry, behind in zip(source.inputs, source.behind, strict=False):
            unit_map = locate(entry, behind, among=source.behind)
            if unit_map is not None and len(edge_shape(entry)) == len(source.shape):
                source.row_axes = unit_map.axes
                return


def _terms_behind(source: Source, rows: Tensor, *, direct: bool) -> list[Term]:
    """The terms that a normalisation or an elementwise parameter hides, with their rows composed."""
    terms: list[Term] = []
    for behind in source.behind:
        for entry in source.inputs:
            if len(source.row_axes) != 1 or len(edge_shape(entry)) != len(source.shape):
                continue
            unit_map = locate(entry, behind, source.row_axes, among=source.behind)
            if unit_map is None:
                continue
            composed = torch.where(rows >= 0, unit_map.rows[rows.clamp_min(0) % len(unit_map.rows)], -1)
            keeps_slope = direct and unit_map.additive and not source.weight
            terms.append(_term(behind, composed, nearest=False, direct=direct, unit_slope=keeps_slope))
            terms += _terms_behind(behind, composed, direct=direct and behind.kind == "elementwise")
            break
    return terms


def _term(source: Source, rows: Tensor, *, nearest: bool, direct: bool, unit_slope: bool) -> Term:
    return Term(
        source.kind,
        source.weight,
        source.additive,
        source.weight_axis,
        source.transposed_groups,
        rows.cpu(),
        nearest,
        direct,
        unit_slope,
    )


def _combined(tables: list[Tensor]) -> Tensor:
    """One row per code over all sources; each source's rows are kept apart so that ``cat`` groups nothing."""
    combined = torch.full_like(tables[0], -1)
    offset = 0
    for table in tables:
        fresh = (combined < 0) & (table >= 0)
        combined[fresh] = table[fresh] + offset
        offset += int(table.max()) + 1
    return combined


def _units_of(table: Tensor) -> Tensor:
    """Unit of each code: its own, unless several codes share a row (a flattened feature map)."""
    grouping = _grouping(table, len(table))
    return torch.arange(len(table), device=table.device) if grouping is None else grouping.to(table.device)


def _grouping(table: Tensor | None, codes: int) -> Tensor | None:
    if table is None or bool((table < 0).any()):
        return None
    rows, units, sizes = torch.unique(table, return_inverse=True, return_counts=True)
    return None if len(rows) == codes or bool((sizes != sizes[0]).any()) else units.cpu()


def _per_unit(rows: Tensor, units: Tensor) -> Tensor:
    per_unit = torch.full((int(units.max()) + 1,), -1, dtype=torch.int64, device=rows.device)
    per_unit[units] = rows
    return per_unit


def _fallback_axes(shape: torch.Size, provenance: Provenance) -> tuple[int, ...]:
    """Where no parameter feeds a site: a matrix has its features last; of more axes nothing is guessed."""
    if provenance.sources:
        return ()
    return (1,) if len(shape) == 2 else ()


def _producer_axes(shape: torch.Size, source: Source) -> tuple[int, ...]:
    """Where the producer's units would lie, if they are still there."""
    return source.row_axes if len(source.shape) == len(shape) else ()


def _row_signature(terms: tuple[Term, ...]) -> str:
    """Tells apart sites that read different rows of one producer (query and key of a fused projection)."""
    if not terms:
        return ""
    rows = terms[0].rows
    return f"{int(rows[0])}:{int(rows[-1])}" if len(rows) else ""
