"""Sites whose units are shared among processes, put together from what each of them saw of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from relu_doctor.observe.graph.sharding import gathered, groups_of
from relu_doctor.observe.graph.units import Spread
from relu_doctor.observe.sites import ActivationSite
from relu_doctor.observe.statistics.stats import UnitStats

Kept = dict[str, dict[str, UnitStats]]  # per phase and site_id


def assembled(model: nn.Module, sites: Iterable[ActivationSite], stats: Kept) -> tuple[list[ActivationSite], Kept]:
    """All units of each site, in every process; a matter for all processes over which the model is spread.

    Args:
        model: whose sites.
        sites: with the units of this process.
        stats: what was seen of them.
    """
    sites, kept = list(sites), {phase: dict(by_site) for phase, by_site in stats.items()}
    for group in groups_of(model):
        own = {
            site.site_id: site.spread
            for site in sites
            if site.spread is not None and site.spread.shard.group.group_name == group.group_name
        }
        seen = {
            phase: {key: by_site[key].to("cpu") for key in own if key in by_site} for phase, by_site in kept.items()
        }
        everywhere = gathered(seen, group)
        for phase, by_site in kept.items():
            for key, spread in own.items():
                parts = [theirs.get(phase, {}).get(key) for theirs in everywhere]
                if any(part is not None for part in parts):
                    by_site[key] = _put_together(spread, parts)
    return [_as_a_whole(site) for site in sites], kept


def _put_together(spread: Spread, parts: Iterable[UnitStats | None]) -> UnitStats:
    placed = [(units, part) for units, part in zip(spread.units, parts, strict=True) if part is not None]
    nothing = UnitStats.empty(spread.num_units)
    columns: dict[str, Tensor] = {}
    for declared in fields(UnitStats):
        if "law" not in declared.metadata:
            continue  # where the numbers come from, no number
        column = getattr(nothing, declared.name).to(getattr(placed[0][1], declared.name).dtype)
        columns[declared.name] = column.clone(memory_format=torch.contiguous_format)
        for units, part in placed:
            columns[declared.name][units] = getattr(part, declared.name)
    return UnitStats(**columns)


def _as_a_whole(site: ActivationSite) -> ActivationSite:
    if site.spread is None:
        return site
    total = site.spread.num_units
    return replace(site, num_units=total, codes=total, grouping=None, terms=site.spread.terms, spread=None)
