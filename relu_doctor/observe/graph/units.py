"""The units of a pre-activation: the axes that count them, and the rows of the parameters that each is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from relu_doctor.observe.graph.axes import Stretch, UnitMap
from relu_doctor.observe.graph.edges import Edge, edge_shape
from relu_doctor.observe.graph.operations import Source
from relu_doctor.observe.graph.parts import Part, is_computed, part_of
from relu_doctor.observe.graph.sharding import Shard, shard_of
from relu_doctor.observe.graph.steps import are_steps


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
        weight_part, additive_part: which part of the parameters it uses, where it is not all of them.
        computed: its weight is made of parameters in the forward, and is none itself.
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
    weight_part: Part | None = None
    additive_part: Part | None = None
    computed: bool = False


@dataclass(frozen=True, slots=True)
class Spread:
    """Units that several processes share, numbered over all of them by the rows that they are made of.

    Attributes:
        shard: which share is this process's.
        units: int64 (its units,) of each process, the number of each of its own units.
        num_units: over all processes.
        terms: the parametrised operations, with the rows of all units.
    """

    shard: Shard
    units: tuple[Tensor, ...]
    num_units: int
    terms: tuple[Term, ...]


@dataclass(frozen=True, slots=True)
class Units:
    """What was found out of a pre-activation's units.

    Attributes:
        axes: the axes that count them; none where there is a single unit, or where they could not be told.
        table: int64 (codes,): the row of each index along those axes in the first source that tells, or ``None``.
        terms: the parametrised operations, with the row of each unit.
        told: whether there are units to speak of.
        whole: each unit is one row of every operation that feeds it.
        note: why they could not be told.
        spread: how they are shared with other processes; ``None`` where each process has them all.
    """

    axes: tuple[int, ...] = ()
    table: Tensor | None = None
    terms: tuple[Term, ...] = ()
    told: bool = False
    whole: bool = True
    note: str = ""
    spread: Spread | None = None


def find_units(edge: Edge, sources: Sequence[Source]) -> Units:
    """Ask the graph where the units of a pre-activation lie.

    Args:
        edge: the pre-activation.
        sources: the operations that feed it directly.
    """
    with _disable_current_modes():  # what is asked of the graph is no call of the model
        return _found(edge, sources)


def _found(edge: Edge, sources: Sequence[Source]) -> Units:
    if any(source.by_data for source in sources):
        return Units(note="the data choose the weights of each input: which unit a value is of does not show")
    stretch = Stretch(edge, sources)
    for source in sources:
        _narrow(source)
    maps = _maps(stretch, sources, None)
    if not maps:
        return Units()
    if len(sources) > 1 and _overlap(maps):
        axes = maps[0][1].axes
        turning = stretch.turns(sources, axes)
        if turning is not None and are_steps(
            sources, stretch.between
        ):  # the steps of a loop: the same units at each of them
            maps = maps[:1]
        elif turning is not None:  # layers that are stacked, not summed: a dead unit must not hide behind a live one
            maps = _maps(stretch, sources, tuple(sorted((*axes, turning))))
            if len(maps) < len(sources) or _overlap(maps) or not _is_one_to_one(maps):
                return Units(note="several layers feed different places of it: their units cannot be told apart")
    table = _combined([unit_map.rows for _, unit_map in maps])
    if not all(unit_map.one_to_one for _, unit_map in maps):
        table = torch.arange(len(table), device=table.device)
    terms: list[Term] = []
    grouping = group(table)
    units = torch.arange(len(table), device=table.device) if grouping is None else grouping.to(table.device)
    for source, unit_map in maps:
        rows = _per_unit(unit_map.rows, units)
        terms.append(_term(source, rows, nearest=True, direct=True, unit_slope=unit_map.additive))
        terms += _terms_behind(source, rows, direct=source.kind in {"elementwise", "other"})
    whole = not any(unit_map.gathered for _, unit_map in maps)
    shard, is_spread = shard_of(stretch.between)
    spread = None if shard is None else _numbered(shard, terms)
    if is_spread and spread is None:
        return Units(note="its values are spread over processes in a way that does not tell which units are whose")
    return Units(maps[0][1].axes, table, tuple(terms), True, whole, spread=spread)


def _numbered(shard: Shard, terms: Sequence[Term]) -> Spread | None:
    """Number the units of all processes; ``None`` where their rows are not this process's share of any."""
    first = shard.rows_elsewhere(terms[0].rows)
    if first is None or bool((terms[0].rows < 0).any()):
        return None
    units = torch.cat(first).unique(return_inverse=True)[1].split([len(rows) for rows in first])
    num_units = int(torch.cat(units).max()) + 1
    if num_units != sum(len(own) for own in units):
        return None
    everywhere: list[Term] = []
    for term in terms:
        rows = torch.full((num_units,), -1, dtype=torch.int64)
        for own, theirs in zip(units, shard.rows_elsewhere(term.rows) or (), strict=False):
            rows[own] = theirs
        everywhere.append(replace(term, rows=rows))
    return Spread(shard, units, num_units, tuple(everywhere))


def group(table: Tensor | None) -> Tensor | None:
    """Unit of each code where several share a row, equally many each (a flattened feature map); else ``None``."""
    if table is None or bool((table < 0).any()):
        return None
    rows, units, sizes = torch.unique(table, return_inverse=True, return_counts=True)
    return None if len(rows) == len(table) or bool((sizes != sizes[0]).any()) else units.cpu()


def _maps(stretch: Stretch, sources: Sequence[Source], axes: tuple[int, ...] | None) -> list[tuple[Source, UnitMap]]:
    """Where the units of each source lie, on the axes that the first tells; what has one row may be a mere factor."""
    maps: list[tuple[Source, UnitMap]] = []
    for source in sorted(sources, key=lambda source: source.num_rows == 1):
        unit_map = stretch.locate(source, axes)
        if unit_map is not None:
            maps.append((source, unit_map))
            axes = unit_map.axes
    return maps


def _overlap(maps: Sequence[tuple[Source, UnitMap]]) -> bool:
    """Whether some unit is fed by several sources."""
    return bool((torch.stack([unit_map.rows >= 0 for _, unit_map in maps]).sum(0) > 1).any())


def _is_one_to_one(maps: Sequence[tuple[Source, UnitMap]]) -> bool:
    """Whether every index has a row of its own."""
    table = _combined([unit_map.rows for _, unit_map in maps])
    return bool((table >= 0).all()) and len(table.unique()) == len(table)


def _narrow(source: Source) -> None:
    """A norm over (C, H, W) has a scale for every place: its units are still those of the layer before it."""
    if source.kind == "norm" and len(source.row_axes) > 1:
        for entry, behind in zip(source.inputs, source.behind, strict=False):
            unit_map = Stretch(entry, source.behind).locate(behind)
            if unit_map is not None and len(edge_shape(entry)) == len(source.shape):
                source.row_axes = unit_map.axes
                return


def _terms_behind(source: Source, rows: Tensor, *, direct: bool) -> list[Term]:
    """The terms that a normalisation or an elementwise parameter hides, with their rows composed."""
    if not source.behind or (len(source.row_axes) != 1 and source.kind != "elementwise"):
        return []
    stretches = [
        Stretch(entry, source.behind, slopes=direct)
        for entry in source.inputs
        if len(edge_shape(entry)) == len(source.shape)
    ]
    terms: list[Term] = []
    for behind in source.behind:
        for stretch in stretches:
            unit_map = stretch.locate(behind, source.row_axes)
            if unit_map is None:
                continue
            composed = torch.where(rows >= 0, unit_map.rows[rows.clamp_min(0) % len(unit_map.rows)], -1)
            keeps_slope = direct and unit_map.additive and not source.weight
            terms.append(_term(behind, composed, nearest=False, direct=direct, unit_slope=keeps_slope))
            terms += _terms_behind(behind, composed, direct=direct and behind.kind == "elementwise")
            break
    return terms


def _term(source: Source, rows: Tensor, *, nearest: bool, direct: bool, unit_slope: bool) -> Term:
    part = None if source.operand is None else part_of(*source.operand)
    bias = source.bias
    if bias is not None:
        wide = tuple(axis for axis, size in enumerate(edge_shape(bias)) if size > 1)
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
        part if source.weight else None,
        part if not source.weight else None if bias is None else part_of(bias, wide or (0,)),
        computed=source.operand is not None and is_computed(source.operand[0]),
    )


def _combined(tables: Sequence[Tensor]) -> Tensor:
    """One row per code over all sources; each source's rows are kept apart so that ``cat`` groups nothing."""
    combined = torch.full_like(tables[0], -1)
    offset = 0
    for table in tables:
        fresh = (combined < 0) & (table >= 0)
        combined[fresh] = table[fresh] + offset
        offset += int(table.max()) + 1
    return combined


def _per_unit(rows: Tensor, units: Tensor) -> Tensor:
    per_unit = torch.full((int(units.max()) + 1,), -1, dtype=torch.int64, device=rows.device)
    per_unit[units] = rows
    return per_unit
