"""What is known of a model's rectifier calls: the sites, their orders, and what was seen of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from relu_doctor.observe.forwards.layout import Sample, Seen
from relu_doctor.observe.graph.names import ParameterNames
from relu_doctor.observe.graph.passing import Speaker
from relu_doctor.observe.inputs.ranks import Ranks
from relu_doctor.observe.sites import ActivationSite, name_sites

Witness = tuple[str, int, float, float, tuple[str, ...]]  # function, axes, interval, parameters since
ROOT = 0  # state of the recogniser before the first call of a forward


@dataclass(frozen=True, slots=True)
class Reading:
    """How one forward's inputs are counted.

    Attributes:
        num_inputs: inputs in the batch; ``None`` where no tensor shows it.
        mask: bool (inputs, positions), False for padding.
        first_ordinal: ordinal of the batch's first input, or token.
        axis: of what is passed, on which its inputs lie; ``None`` where it is one input.
        positions: at most so many rows of a selection can belong to one input.
        rehearsed: nothing of it is kept.
    """

    num_inputs: int | None
    mask: Tensor | None
    first_ordinal: int
    axis: int | None = 0
    positions: int = 1
    rehearsed: bool = False


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

    @property
    def shows_nothing(self) -> bool:
        """Whether its units did not show because it was called on nothing: an expert that no token came to."""
        return self.site is not None and not self.site.num_units and 0 in self.sample.shape


class CallRegistry:
    """The memory of a probe: what one forward taught is what the next one is recognised by.

    Args:
        model: whose calls.
        unit_axis: gives the unit axis of a site by its base name, where the user named one.

    Attributes:
        names: of the parameters.
        seen: what rehearsals showed, per ``site_id``.
        selected: sites whose output goes through a choice (a top-k, a mask) before anything reads it.
        gated: those of them where the choice may be another layer's.
        readers: per ``site_id``, the parameters that consume its units.
        speakers: per ``site_id``, the parameters whose gradients may tell which units were silent; of all forwards.
        phases: of which an order of calls is known.
        hidden: operators of the dispatcher that rectify inside, where nothing can be measured.
        rows_told: whether it was seen whose the rows of selections are; ``None`` while that was not tried.
        ranks: whether its layers were given batches or single inputs.
        compiles: a call was large enough to load the compiled loops for, or there were very many.
        arrangements: how values of calls are taken apart, by all that it depends on.
        notes: what could not be seen as it should, in order.
    """

    def __init__(self, model: nn.Module, unit_axis: Callable[[str], int | None] | None = None) -> None:
        self.names = ParameterNames(model)
        self.unit_axis = unit_axis or (lambda name: None)
        self.seen: dict[str, Seen] = {}
        self.selected: set[str] = set()
        self.gated: set[str] = set()
        self.readers: dict[str, dict[str, None]] = {}
        self.speakers: dict[str, dict[str, Speaker]] = {}
        self.phases: set[str] = set()
        self.hidden: set[str] = set()
        self.rows_told: bool | None = None
        self.ranks = Ranks()
        self.compiles = False
        self.arrangements: dict[Any, Any] = {}
        self.notes: list[str] = []
        self._pointed_out: set[str] = set()
        self._sites: dict[str, ActivationSite] = {}
        self._order: list[str] = []  # of the sites in the forward
        self._transitions: dict[tuple[str, int, Witness], tuple[Call, int]] = {}
        self._states = ROOT
        self._told: dict[Witness, ActivationSite | None] = {}  # by what feeds them, the sites of calls on something
        self._empty: dict[Witness, ActivationSite | None] = {}  # those that were called on nothing so far
        self._nothing: set[str] = set()  # sites as calls on nothing showed them

    def sites(self) -> list[ActivationSite]:
        """The sites found so far, in forward order, under their final names."""
        order = {name: place for place, name in enumerate(self.names)}
        known = {site.site_id for site in (*self._empty.values(), *self._told.values()) if site is not None}
        filled = self._nothing - known
        met = [  # in forwards that came to their end
            site_id for site_id in self._order if site_id in self._sites and site_id not in filled
        ]
        places = {site_id: place for place, site_id in enumerate(met)}
        named = [
            replace(
                site,
                selected=site.site_id in self.selected,
                speaker=next(iter(self.speakers.get(site.site_id, {}).values()), None),
                readers=tuple(sorted(self.readers.get(site.site_id, ()), key=lambda name: order.get(name, len(order)))),
            )
            for site in name_sites({site_id: self._sites[site_id] for site_id in places}, order)
        ]
        return sorted(named, key=lambda site: places[site.site_id])

    @property
    def one_by_one(self) -> set[str]:
        """The sites that a forward calls once for each input."""
        return {site_id for site_id, seen in self.seen.items() if seen.alone}

    @property
    def unseen(self) -> set[str]:
        """The sites of which no rehearsal has shown anything yet."""
        return {site_id for site_id in self._order if site_id in self._sites} - self.seen.keys()

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

    def rename(self, site: ActivationSite) -> None:
        """Let a site have another base name from now on."""
        self._sites[site.site_id] = replace(self._sites[site.site_id], base_name=site.base_name)

    def forget(self, site: ActivationSite) -> None:
        """Take a site back that turned out to be another."""
        self._sites.pop(site.site_id, None)

    def note_readers(self, site_id: str, names: Iterable[str]) -> None:
        """Remember which parameters consume a site's units; they are all those of all forwards."""
        self.readers.setdefault(site_id, {}).update(dict.fromkeys(names))

    def note_speakers(self, site_id: str, speakers: Mapping[str, Speaker]) -> None:
        """Remember which parameters speak for a site: those that did so in every forward so far."""
        before = self.speakers.get(site_id)
        self.speakers[site_id] = {
            name: speaker for name, speaker in (speakers if before is None else before).items() if name in speakers
        }

    def forget_calls(self) -> Callable[[], None]:
        """Forget the orders of calls and what rehearsals showed, since inputs may be counted in another way.

        Returns:
            A function that brings all of it back.
        """
        kept = self.seen, self.phases, self._transitions, self.rows_told
        self.seen, self.phases, self._transitions, self.rows_told = {}, set(), {}, None

        def recall() -> None:
            self.seen, self.phases, self._transitions, self.rows_told = kept

        return recall

    def transition(self, phase: str, state: int, witness: Witness) -> tuple[Call, int] | None:
        """What a call is in a state of the recogniser, and the state after it; ``None`` where it was never met."""
        return self._transitions.get((phase, state, witness))

    def learn(self, phase: str, calls: list[Call]) -> None:
        """Remember an order of calls; a site may be called with other axes from one call to the next."""
        self.phases.add(phase)
        state = ROOT
        calls = [self._filled(call) for call in calls]
        for call in calls:
            known = self._transitions.get((phase, state, call.witness))
            if known is None or not known[0].is_like(call) or known[0].shows_nothing:
                self._states += 1
                known = self._transitions[(phase, state, call.witness)] = (call, self._states)
            state = known[1]
        self._place(calls)

    def _filled(self, call: Call) -> Call:
        """A call on nothing is of the site that the same weights feed when there is something."""
        if not call.shows_nothing:
            self._told[call.witness] = call.site
            self._empty.pop(call.witness, None)
            return call
        if call.site is not None:
            self._nothing.add(call.site.site_id)
        if call.witness in self._told:
            return replace(call, site=self._told[call.witness])
        self._empty[call.witness] = call.site
        return call

    def _place(self, calls: list[Call]) -> None:
        """Put sites that are met for the first time behind the one that was called before them.

        Those of a forward that shows none that is known come last: it began elsewhere.
        """
        known = any(call.site is not None and call.site.site_id in self._order for call in calls)
        place = 0 if known else len(self._order)
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
