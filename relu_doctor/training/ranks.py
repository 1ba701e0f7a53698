"""Ranks: what the processes that train a model together saw becomes one; and Alone, where there is one process.

At the close of a window each rank launches one collective on a process group of the monitor's own: buffers of one
layout are gathered, and training goes on while they travel. What has no place in the layout (a site that some rank
meets for the first time) follows in a second one, and has its place from then on. Where a forward itself communicates
(FSDP2) all is waited for, so that every rank knows at the same step what all of them know.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from relu_doctor.errors import MonitorWarning
from relu_doctor.observe.graph.sharding import Company
from relu_doctor.observe.models.wrappers import behind_wrappers
from relu_doctor.observe.parameters import ParameterReader
from relu_doctor.observe.sites import ActivationSite
from relu_doctor.training.common import Common
from relu_doctor.training.exchange import Exchange
from relu_doctor.training.flat import Extra, Layout, extra_of, merged, pack, unpack
from relu_doctor.training.meeting import meet
from relu_doctor.training.seen import Seen, nothing


class Together(Protocol):
    """What a monitor asks of the processes that train its model.

    Attributes:
        reports: this one judges windows, and tells of them.
        in_step: no process may run a forward of the model without the others.
        version: changes with what all know of the sites.
        notes: for every report.
    """

    reports: bool
    in_step: bool
    version: int
    notes: tuple[str, ...]

    @property
    def waits(self) -> bool:
        """Whether something is on its way to this process."""
        ...

    def sites(self, own: Sequence[ActivationSite], parameters: Iterable[str]) -> list[ActivationSite]:
        """Those that any process knows, in forward order; ``parameters`` are the model's, in its order."""
        ...

    def send(self, seen: Seen, own: Sequence[ActivationSite], *, wishes: bool = False) -> None:
        """A window has closed here; ``wishes`` tells that calls were met that are not known."""
        ...

    def arrived(self) -> list[Seen]:
        """Windows of all processes that have come together since this was asked last."""
        ...

    def finish(self, seen: Seen, own: Sequence[ActivationSite]) -> Iterator[Seen]:
        """Send the last window and wait for the others; each window of all processes as it comes."""
        ...

    def leave(self, *, broken: bool) -> None:
        """Let go of everything; ``broken`` where the run ended in an error, and nobody is waited for."""
        ...


def find_ranks(model: nn.Module, ranks: Any, window: int) -> Together:
    """The processes that train a model; a matter for all of them.

    Args:
        model: wrapped or not.
        ranks: ``"all"``, ``"alone"`` or a process group.
        window: steps in a window.

    Raises:
        ConfigError: ``ranks`` is none of these.
        UnsupportedModelError: the model cannot be observed.
    """
    inside = behind_wrappers(model)
    meeting = meet(model, inside, ranks)
    if meeting.warning:
        warnings.warn(meeting.warning, MonitorWarning, stacklevel=4)
    if meeting.group is None:
        return Alone(tuple(note for note in (meeting.note, meeting.warning) if note))
    notes = (meeting.note,) if meeting.note else ()
    return Ranks(meeting.group, inside, window, notes, in_step=meeting.in_step)


class Alone:
    """One process: what it saw is all there is.

    Args:
        notes: for every report.
    """

    reports = True
    in_step = False
    waits = False
    version = 0

    def __init__(self, notes: tuple[str, ...] = ()) -> None:
        self.notes = notes
        self._seen: list[Seen] = []

    def sites(self, own: Sequence[ActivationSite], parameters: Iterable[str]) -> list[ActivationSite]:
        """Its own."""
        return list(own)

    def send(self, seen: Seen, own: Sequence[ActivationSite], *, wishes: bool = False) -> None:
        """A window has closed."""
        self._seen.append(seen)

    def arrived(self) -> list[Seen]:
        """The window that was sent."""
        seen, self._seen = self._seen, []
        return seen

    def finish(self, seen: Seen, own: Sequence[ActivationSite]) -> Iterator[Seen]:
        """The last window, if anything was seen in it."""
        if len(seen.steps):
            yield seen

    def leave(self, *, broken: bool) -> None:
        """There is nothing to let go of."""


class Ranks:
    """Several processes.

    Args:
        group: of their monitors' own, for tensors on the CPU.
        model: that they train.
        window: steps in a window.
        notes: for every report.
        in_step: a forward of the model communicates.
    """

    def __init__(
        self, group: Any, model: nn.Module, window: int, notes: tuple[str, ...] = (), *, in_step: bool
    ) -> None:
        self._group: Any = group
        self._model = model
        self._rank, self._size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        self.reports = self._rank == 0
        self.in_step = in_step
        self.version = 0
        self.notes = notes
        self._common = Common()
        self._layout = Layout(steps=-(-(window + 1) // 64))
        self._told: set[object] = set()  # what this rank has told the others of its sites and notes
        self._seen: list[Seen] = []
        self._exchange: Exchange | None = None
        self._broken = False
        self._left = False  # every rank has closed its monitor
        self._learns = True  # at the first forward that is observed, which is the same for all
        self._next_step = 0

    @property
    def waits(self) -> bool:
        """Whether an exchange is under way."""
        return self._exchange is not None

    def sites(self, own: Sequence[ActivationSite], parameters: Iterable[str]) -> list[ActivationSite]:
        """Those that any process knows."""
        return self._common.joined(own, parameters)

    def send(self, seen: Seen, own: Sequence[ActivationSite], *, wishes: bool = False) -> None:
        """Launch the exchange of a window; the one before is waited for."""
        self._send(seen, own, wishes=wishes, leaves=False)

    def arrived(self) -> list[Seen]:
        """Windows of all processes that have come together, in the rank that reports."""
        self._go_on(wait=self.in_step)
        seen, self._seen = self._seen, []
        return seen

    def finish(self, seen: Seen, own: Sequence[ActivationSite]) -> Iterator[Seen]:
        """Go on exchanging until every rank has closed its monitor."""
        self._send(seen, own, wishes=False, leaves=True)
        while True:
            self._go_on(wait=True)
            yield from self.arrived()
            if self._broken or self._left:
                return
            self._send(nothing(self._next_step), (), wishes=False, leaves=True)

    def leave(self, *, broken: bool) -> None:
        """Destroy the group; where the run ended in an error the others hear of it by that."""
        if broken and not self._broken:
            self._go_on(wait=False)
            self._give_up()
        group, self._group = self._group, None
        if group is not None:  # without a group all of the user's would be destroyed
            with suppress(Exception):  # as the user may have done
                torch.distributed.destroy_process_group(group)

    def may_learn(self) -> bool:
        """Whether all of them find out now what their calls are."""
        return self._learns and not self._broken

    def learnt(self) -> None:
        """Not again before all have agreed."""
        self._learns = False

    def company(self) -> Company:
        """All of them."""
        return Company(self._model, [self._group] if not self._broken else [])

    def _send(self, seen: Seen, own: Sequence[ActivationSite], *, wishes: bool, leaves: bool) -> None:
        self._go_on(wait=True)
        self._next_step = seen.last_step + 1
        if self._broken:
            self._keep(seen)
            return
        self._exchange = Exchange(self._group, seen)
        self._guarded(partial(self._launch, self._exchange, own, wishes=wishes, leaves=leaves))

    def _launch(self, exchange: Exchange, own: Sequence[ActivationSite], *, wishes: bool, leaves: bool) -> None:
        extra = self._news(exchange.seen, own)
        words, beside = pack(self._layout, exchange.seen, extra, wishes=wishes, leaves=leaves)
        exchange.launch(torch.from_numpy(words), beside)

    def _news(self, seen: Seen, own: Sequence[ActivationSite]) -> Extra:
        """What the others have not been told of this rank's sites, and its notes."""
        extra = Extra(order=[site.site_id for site in own])
        for site in own:
            speaker = None if site.speaker is None else site.speaker.name
            known = (site.site_id, site.num_units, speaker, site.feeds, site.readers, site.selected, site.note)
            if known not in self._told:
                self._told.add(known)
                extra.sites.append(site)
        extra.notes = [note for note in seen.notes if note not in self._told]
        self._told.update(extra.notes)
        return extra

    def _go_on(self, *, wait: bool) -> None:
        """Take what has come; nothing is waited for unless that is wanted."""
        while (exchange := self._exchange) is not None:
            if not self._guarded(partial(exchange.advance, wait=wait)):
                return
            if exchange.is_over:
                self._guarded(partial(self._take, exchange))
                self._exchange = None

    def _guarded(self, act: Callable[[], object]) -> bool:
        try:
            return bool(act())
        except Exception as error:  # noqa: BLE001  a rank that died, a group that was destroyed: training goes on
            self._give_up()
            own = "what it alone sees from now on" if self.reports and not self.in_step else "nothing more"
            warnings.warn(
                f"the ranks could not exchange what they saw ({type(error).__name__}: {error}); the monitor of rank "
                f"{self._rank} reports {own}.",
                MonitorWarning,
                stacklevel=2,
            )
            return False

    def _give_up(self) -> None:
        self._broken = True
        exchange, self._exchange = self._exchange, None
        self.notes += (f"from some window on this is what rank {self._rank} of {self._size} alone saw",)
        if exchange is not None:
            self._keep(exchange.seen)

    def _keep(self, seen: Seen) -> None:
        """Report what this rank alone saw; parameters that are spread cannot be read without the others."""
        if self.reports and not self.in_step:
            self._seen.append(seen)

    def _take(self, exchange: Exchange) -> None:
        """All ranks do the same with what has come, so that all know the same."""
        headers, beside = exchange.headers, exchange.beside
        extras = [extra_of(each) for each in beside]
        is_window = any(header.num_inputs for header in headers) or not any(header.leaves for header in headers)
        if self.reports:
            received = zip(exchange.received, beside, strict=True)
            parts = [unpack(self._layout, words.numpy(), each) for words, each in received]
            self.notes = tuple(dict.fromkeys((*self.notes, *(note for extra in extras for note in extra.notes))))
            whole = [merged(parts, exchange.seen)] if is_window else []
        if self._common.take_in(extras):
            self.version += 1
        digests = self._layout.fitting(max(header.digests for header in headers))
        self._layout = replace(self._layout, sites=self._common.sizes(), digests=digests)
        self._learns |= any(header.wishes for header in headers)
        self._left = all(header.leaves for header in headers)
        if self.reports:
            self._seen += whole
        elif self.in_step and is_window:
            ParameterReader(self._model, self._common.joined((), ()))  # the rank that reports cannot read them alone
