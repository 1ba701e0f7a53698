"""Tags: which sites are told one by one, and under which names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from relu_doctor.reports.frames import Frame
from relu_doctor.reports.scalars import SITES, WORST, site_tags

if TYPE_CHECKING:
    from relu_doctor.diagnose.diagnosis import Diagnosis

MOST_SITES = 20  # that are told in a run


class Tags:
    """The tags of the sites of a run; once given, a tag stays."""

    def __init__(self) -> None:
        self._tags: dict[str, str] = {}
        self._places: dict[str, str] = {}
        self._sites: tuple[str, ...] = ()

    def meet(self, diagnosis: Diagnosis) -> None:
        """Give tags to sites that were not known yet."""
        sites = tuple(site.site_id for site in diagnosis.table.sites)
        if sites == self._sites:
            return
        self._sites = sites
        for place, (site_id, tag) in enumerate(site_tags(diagnosis).items()):
            if site_id not in self._tags:
                while tag in self._tags.values():
                    tag += "_"
                self._tags[site_id] = tag
                self._places[site_id] = f"{place:03d}_{tag.removeprefix(f'{SITES}/')}"

    def of(self, site_id: str, number: str) -> str:
        """The tag of a number of a site that is told by itself: the numbers of a site stand together."""
        return f"{self._tags[site_id]}/{number}"

    def among_all(self, site_id: str, number: str) -> str:
        """The tag of a number that all sites are told of: a group per number, in it the sites in forward order."""
        return f"{SITES}_{number}/{self._places[site_id]}"


class Worst:
    """The sites that are told one by one.

    Where at most twelve can die, it is all of them. Else a site comes in when it has dead units and is among the twelve
    worst of a window. The first twelve that do so come in at once, and up to eight later ones when their dead fraction
    reaches ``mild_fraction``, so that what goes wrong late is shown too. One that is in stays in.
    """

    def __init__(self) -> None:
        self._told: dict[str, None] = {}

    def among(self, frame: Frame, mild_fraction: float) -> list[str]:
        """The ``site_id`` of those that are told with this window, in the order in which they came in."""
        mortal = [site for site in frame.sites if site["can_die"] and site["num_units"]]
        ranked = sorted(mortal, key=_loss, reverse=True)[:WORST]
        for site in ranked if len(mortal) > WORST else mortal:
            late = len(self._told) >= WORST
            wanted = _loss(site)[0] >= mild_fraction if late else site["dead"] > 0 or len(mortal) <= WORST
            if wanted and len(self._told) < MOST_SITES:
                self._told.setdefault(site["site_id"])
        here = {site["site_id"] for site in frame.sites}
        return [site_id for site_id in self._told if site_id in here]


def worst_of(frame: Frame, most: int) -> Sequence[int]:
    """The places of the sites of a frame that have lost most, dead units before those that are merely unproven."""
    mortal = [place for place, site in enumerate(frame.sites) if site["can_die"] and site["num_units"]]
    return sorted(mortal, key=lambda place: _loss(frame.sites[place]), reverse=True)[:most]


def _loss(site: Mapping[str, Any]) -> tuple[float, float]:
    """Its dead and its unproven fraction."""
    return site["dead"] / site["num_units"], site["unproven"] / site["num_units"]
