"""Evidence that is carried from window to window: a unit that stays silent is proved dead by all it was silent on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from relu_doctor.observe.statistics.stats import UnitStats


class Sightings:
    """How many distinct inputs were seen since any window, in bounded memory.

    A run shows the same inputs once an epoch, and a repetition proves nothing new. The window in which each input was
    seen last is remembered for the first 200,000; later ones, and those on a device, are taken for distinct.
    """

    LIMIT = 200_000

    def __init__(self) -> None:
        self._last: dict[int, int] = {}
        self._counts: list[int] = []  # per window, the inputs that were seen in it and not since

    def add(self, digests: list[int] | None, num_inputs: int, window: int) -> None:
        """Count a batch.

        Args:
            digests: of its inputs, where these are told apart.
            num_inputs: how many there are.
            window: in which it was seen, from 0; not before those of earlier calls.
        """
        while len(self._counts) <= window:
            self._counts.append(0)
        if digests is None:
            self._counts[window] += num_inputs
            return
        for digest in digests:
            before = self._last.get(digest)
            if before is None and len(self._last) >= self.LIMIT:
                self._counts[window] += 1
            elif before != window:
                if before is not None:
                    self._counts[before] -= 1
                self._last[digest] = window
                self._counts[window] += 1

    def since(self, window: int) -> int:
        """Distinct inputs that were seen in a window or after it."""
        return sum(self._counts[window:])


@dataclass(slots=True, eq=False)
class _Carried:
    """Of one site.

    Attributes:
        stats: what each unit was silent on since it fired last; nothing for one that fired in the window before.
        since: int64 (units,), the window in which that began.
    """

    stats: UnitStats
    since: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What a window is judged by, of one site.

    Attributes:
        stats: of the window; of a unit that was silent in it, also of those before in which it was silent.
        since: int64 (units,), the window in which that begins.
    """

    stats: UnitStats
    since: Tensor


class Carrier:
    """Carries the evidence of silent units on."""

    def __init__(self) -> None:
        self._carried: dict[str, _Carried] = {}

    def take_in(self, window: int, stats: Mapping[str, UnitStats]) -> dict[str, Evidence]:
        """Close a window.

        Args:
            window: its index.
            stats: what was observed in it, per ``site_id``.

        Returns:
            The evidence, of every site that was observed in this window or is carried on.
        """
        judged: dict[str, Evidence] = {}
        for site_id in dict.fromkeys((*stats, *self._carried)):
            here, before = stats.get(site_id), self._carried.get(site_id)
            if here is None and before is not None:
                judged[site_id] = Evidence(before.stats, before.since)
                continue
            assert here is not None
            here = here.to("cpu")
            fired = here.inputs_fired > 0
            if before is None or before.stats.num_units != here.num_units:
                merged, since = here, torch.full((here.num_units,), window, dtype=torch.int64)
            else:
                merged = here.where(fired, before.stats.merge(here))
                fresh = fired | (before.stats.inputs == 0)
                since = torch.where(fresh, torch.full_like(before.since, window), before.since)
            judged[site_id] = Evidence(merged, since)
            nothing = UnitStats.empty(here.num_units)
            self._carried[site_id] = _Carried(nothing.where(fired, merged), since)
        return judged

    def carry(self, site_id: str, stats: UnitStats, since: Tensor) -> None:
        """Take over what another carrier held of a site.

        Args:
            site_id: of the site.
            stats: what each unit was silent on.
            since: int64 (units,), the window in which that began.
        """
        self._carried[site_id] = _Carried(stats, since)

    def forget(self, site_id: str, units: Tensor) -> None:
        """Begin anew for some units of a site: they were treated, and what they were silent on before is no evidence.

        Args:
            site_id: of the site.
            units: bool (units,).
        """
        carried = self._carried.get(site_id)
        if carried is not None:
            carried.stats = UnitStats.empty(carried.stats.num_units).where(units, carried.stats)
