"""What is known of a model's rectifier calls: the sites, their orders, and what was seen of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from relu_doctor.observe.layout import Sample, Seen
from relu_doctor.observe.sites import ActivationSite, name_sites, qualified_names

Witness = tuple[str, int, float, float, tuple[str, ...]]  # function, axes, interval, parameters since
ROOT = 0  # state of the recogniser before the first call of a forward


@dataclass(frozen=True, slots=True)
class Reading:
    """How one forward's inputs are counted.

    Attributes:
        num_inputs: inputs in the batch; ``None`` where no tensor shows it.
        mask: bool (inputs, positions), False for padding.
        first_ordinal: ordinal of the batch's first input.
    """

    num_inputs: int | None
    mask: Tensor | None
    first_ordinal: int


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a rectifier as a discovery met it; the site is ``None`` where it is none that is measured."""

    witness: Witness
    site: ActivationSite | None
    sample: Sample

    def is_like(self, other: Call) -> bool:
        """Whether both are the same site, seen on the same axes."""
        if self.site is None or other.site is None:
            return self.site is other.site
        return (self.site.site_id, self.site.unit_axes) == (other.site.site_id, other.site.unit_axes)


class CallRegistry:
    """The memory of a probe: what one forward taught is what the next one is recognised by.

    Args:
        model: whose calls.
        unit_axis: gives the unit axis of a site by its base name, where the user named one.

    Attributes:
        names: parameter identity to qualified name.
        seen: what rehearsals showed, per ``site_id``.
        selected: sites whose output goes through a choice (a top-k, a mask) before anything reads it.
        phases: of which an order of calls is known.
        hidden: operators of the dispatcher that rectify inside, where nothing can be measured.
        notes: what could not be seen as it should, in order.
    """

    def __init__(self, model: nn.Module, unit_axis: Callable[[str], int | None] | None = None) -> None:
        self.names = qualified_names(model)
        self.unit_axis = unit_axis or (lambda name: None)
        self.seen: dict[str, Seen] = {}
        self.selected: set[str] = set()
        self.phases: set[str] = set()
        self.hidden: set[str] = set()
        self.notes: list[str] = []
        self._pointed_out: set[str] = set()
        self._sites: dict[str, ActivationSite] = {}
        self._order: list[str] = []  # of the sites in the forward
        self._transitions: dict[tuple[str, int, Witness], tuple[Call, int]] = {}
        self._states = ROOT

    def sites(self) -> list[ActivationSite]:
        """The sites found so far, in forward order, under their final names."""
        order = {name: place for place, name in enumerate(self.names.values())}
        places = {site_id: place for place, site_id in enumerate(self._order)}
        named = [replace(site, selected=site.site_id in self.selected) for site in name_sites(self._sites, order)]
        return sorted(named, key=lambda site: places.get(site.site_id, len(places)))

    @property
    def unseen(self) -> set[str]:
        """The sites of which no rehearsal has shown anything yet."""
        return self._sites.keys() - self.seen.keys()

    @property
    def num_sites(self) -> int:
        """How many sites were found so far."""
        return len(self._sites)

    def know(self, site: ActivationSite) -> None:
        """Add a site, or meet it again; what feeds it is the union over all meetings."""
        known = self._sites.get(site.site_id)
        if known is None or (not known.num_units and site.num_units):
            self._sites[site.site_id] = site
        elif set(site.feeds) - set(known.feeds):
            self._sites[site.site_id] = replace(known, feeds=tuple(dict.fromkeys((*known.feeds, *site.feeds))))

    def forget(self, site: ActivationSite) -> None:
        """Take a site back that turned out to be another."""
        self._sites.pop(site.site_id, None)

    def transition(self, phase: str, state: int, witness: Witness) -> tuple[Call, int] | None:
        """What a call is in a state of the recogniser, and the state after it; ``None`` where it was never met."""
        return self._transitions.get((phase, state, witness))

    def learn(self, phase: str, calls: list[Call]) -> None:
        """Remember an order of calls; a site may be called with other axes from one call to the next."""
        self.phases.add(phase)
        state = ROOT
        for call in calls:
            known = self._transitions.get((phase, state, call.witness))
            if known is None or not known[0].is_like(call):
                self._states += 1
                known = self._transitions[(phase, state, call.witness)] = (call, self._states)
            state = known[1]
        self._place(calls)

    def _place(self, calls: list[Call]) -> None:
        """Put sites that are met for the first time behind the one that was called before them."""
        place = 0
        for call in calls:
            if call.site is None:
                continue
            if call.site.site_id in self._order:
                place = self._order.index(call.site.site_id) + 1
            else:
                self._order.insert(place, call.site.site_id)
                place += 1

    def point_out(self, path: str, kind: str) -> None:
        """Remark on a module that looks like a rectifier and was not recognised; once per class."""
        if kind not in self._pointed_out:
            self._pointed_out.add(kind)
            self.note(
                f"{path} ({kind}) looks like a rectifier and was not measured: "
                f"name it with rectifiers=[{kind}] or --rectifier"
            )

    def note(self, text: str) -> None:
        """Keep a remark for the report, once."""
        if text not in self.notes:
            self.notes.append(text)
