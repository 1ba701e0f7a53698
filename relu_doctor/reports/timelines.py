"""A run over its windows: all that is told of it but what is told unit by unit. The tab and the page share it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relu_doctor.reports.packing import COLUMNS, MECHANISMS, ONSETS, SCHEMA, STATUSES, FrameError

Row = dict[str, Any]
UNKNOWN = 255  # in place of a status: the site was not there in that window
_SITE = ("site_id", "name", "rectifier", "producer", "num_units", "can_die", "note")
_COUNTS = (
    *("num_units", "dead", "unproven", "rare", "dormant", "saturated", "non_finite", "unobserved", "active"),
    *("deaths", "revivals"),
)


@dataclass(frozen=True, slots=True)
class Summary:
    """What is always needed of a window's header.

    Attributes:
        told: ``window``, ``first_step``, ``last_step``, ``closed``, ``severity``, ``label``, ``numbers``, ``alerts``.
        sites: ``site_id`` and number of units, in forward order.
        counts: per name a number per site.
    """

    told: Row
    sites: tuple[tuple[str, int], ...]
    counts: Mapping[str, tuple[int, ...]]

    @property
    def num_units(self) -> int:
        """Of all its sites."""
        return sum(units for _, units in self.sites)

    def start_of(self, site_id: str) -> int | None:
        """The place of a site's first unit among the window's; None where the window does not know the site."""
        start = 0
        for name, units in self.sites:
            if name == site_id:
                return start
            start += units
        return None


def summarize(header: Mapping[str, Any], step: int) -> Summary:
    """A window's summary.

    Args:
        header: of its frame.
        step: stands in for the last step where the header has none.

    Raises:
        FrameError: the header lacks something.
    """
    try:
        return Summary(
            {
                **{name: header.get(name) for name in ("window", "first_step", "closed")},
                "last_step": step if header.get("last_step") is None else header["last_step"],
                "severity": header["verdict"]["severity"],
                "label": header["verdict"]["label"],
                "numbers": header["numbers"],
                "alerts": header["alerts"],
            },
            tuple((str(site["site_id"]), int(site["num_units"])) for site in header["sites"]),
            {name: tuple(int(site.get(name) or 0) for site in header["sites"]) for name in _COUNTS},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FrameError(f"expected a window's sites and verdict, found a header without ({error}).") from error


def union(windows: Sequence[Sequence[Mapping[str, Any]]]) -> list[Row]:
    """The sites of all windows in one forward order: the latest window's, each other one behind its predecessor."""
    order: list[str] = []
    rows: dict[str, Mapping[str, Any]] = {}
    seen: set[tuple[str, ...]] = set()
    for sites in reversed(windows):
        identity = tuple(f"{site['site_id']} {site['num_units']}" for site in sites)
        if identity in seen:
            continue
        seen.add(identity)
        before = -1
        for site in sites:
            name = str(site["site_id"])
            if name not in rows:
                order.insert(before + 1, name)
                rows[name] = site
            elif site["num_units"] > rows[name]["num_units"]:
                rows[name] = {**rows[name], "num_units": site["num_units"]}
            before = order.index(name)
    found, start = [], 0
    for name in order:
        row = rows[name]
        kept = {
            key: row.get(key) for key in ("site_id", "name", "rectifier", "producer", "num_units", "can_die", "note")
        }
        found.append({**kept, "start": start})
        start += int(row["num_units"])
    return found


def spread(values: NDArray[Any], window: Summary, sites: Sequence[Row]) -> NDArray[Any]:
    """A value per unit of a window, at the places that :func:`union` gives them.

    Args:
        values: (units,), of the window's own sites one behind the other.
        window: whose they are.
        sites: of all windows together.

    Returns:
        (units of all sites,), each byte ``UNKNOWN`` where the window does not know the site.
    """
    if [(site["site_id"], site["num_units"]) for site in sites] == list(window.sites):
        return values
    total = sum(site["num_units"] for site in sites)
    found = np.full(total * values.itemsize, UNKNOWN, np.uint8).view(values.dtype)
    places, start = {site["site_id"]: site["start"] for site in sites}, 0
    for site_id, units in window.sites:
        place = places[site_id]
        found[place : place + units] = values[start : start + units]
        start += units
    return found


def timeline(name: str, windows: Sequence[Summary], sites: Sequence[Row], unreadable: Sequence[str] = ()) -> Row:
    """A run as plain values: its windows, its sites, and counts per window and site.

    Args:
        name: of the run.
        windows: by ascending step.
        sites: those of :func:`union`.
        unreadable: what was wrong with windows that are left out.
    """
    places = {site["site_id"]: place for place, site in enumerate(sites)}
    counts: dict[str, list[list[int]]] = {count: [] for count in _COUNTS}
    for window in windows:
        order = [places[site] for site, _ in window.sites]
        plain = order == list(range(len(sites)))
        for count, values in window.counts.items():
            row = list(values)
            if not plain:
                row = [0] * len(sites)
                for place, value in zip(order, values, strict=True):
                    row[place] = value
            counts[count].append(row)
    return {
        "schema": SCHEMA,
        "run": name,
        "windows": [window.told for window in windows],
        "unreadable": list(unreadable[:20]),
        "sites": list(sites),
        "counts": counts,
        "num_units": sum(site["num_units"] for site in sites),
        "statuses": list(STATUSES),
        "mechanisms": list(MECHANISMS),
        "onsets": list(ONSETS),
        "columns": [list(column) for column in COLUMNS],
    }
