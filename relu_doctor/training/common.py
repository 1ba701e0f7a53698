"""Common: the sites that any rank knows, the same in all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from relu_doctor.observe.sites import ActivationSite, name_sites
from relu_doctor.training.flat import Extra


class Common:
    """What all ranks have told each other of their sites.

    A parameter speaks for a site where it does so in every rank that runs it: gradients are those of all ranks.
    """

    def __init__(self) -> None:
        self._sites: dict[str, ActivationSite] = {}
        self._order: list[str] = []

    def sizes(self) -> tuple[tuple[str, int], ...]:
        """``site_id`` and number of units of each, in the order in which they were told."""
        return tuple((site_id, site.num_units) for site_id, site in self._sites.items())

    def take_in(self, extras: Iterable[Extra]) -> bool:
        """Take in what the ranks have told, in their order.

        Returns:
            Whether anything of it was new.
        """
        new = False
        for extra in extras:
            for site in extra.sites:
                new = True
                known = self._sites.get(site.site_id)
                self._sites[site.site_id] = site if known is None else _both(known, site)
            self._order = _placed(self._order, [each for each in extra.order if each in self._sites])
        return new

    def joined(self, own: Sequence[ActivationSite], parameters: Iterable[str]) -> list[ActivationSite]:
        """These sites and one rank's own, which the others may not have been told of yet.

        Args:
            own: in forward order.
            parameters: the model's, in its order.
        """
        if not self._sites:
            return list(own)
        sites = dict(self._sites)
        for site in own:
            known = sites.get(site.site_id)
            sites[site.site_id] = site if known is None else _both(site, known)
        order = _placed(self._order, [site.site_id for site in own])
        places = {site_id: place for place, site_id in enumerate(order)}
        named = name_sites(sites, {name: place for place, name in enumerate(parameters)})
        return sorted(named, key=lambda site: places.get(site.site_id, len(places)))


def _both(site: ActivationSite, other: ActivationSite) -> ActivationSite:
    """A site as two ranks know it together."""
    if not site.num_units and other.num_units:
        return other
    same = site.speaker is not None and other.speaker is not None and site.speaker.name == other.speaker.name
    return replace(
        site,
        speaker=site.speaker if same else None,
        feeds=tuple(dict.fromkeys((*site.feeds, *other.feeds))),
        readers=tuple(dict.fromkeys((*site.readers, *other.readers))),
        selected=site.selected or other.selected,
        note=site.note or other.note,
    )


def _placed(order: Sequence[str], found: Iterable[str]) -> list[str]:
    """An order with more sites in it, each behind the one that was called before it."""
    order, place = list(order), 0
    for site_id in found:
        if site_id in order:
            place = order.index(site_id) + 1
        else:
            order.insert(place, site_id)
            place += 1
    return order
