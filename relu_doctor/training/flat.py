"""What a rank saw of a window, in one flat buffer whose layout all ranks share; and all that did not fit, beside it.

The buffer is made of int64, in which floats keep their bits: a header, the observed steps as bits, digests of inputs,
then per site whether it was observed and its columns.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relu_doctor.observe.sites import ActivationSite
from relu_doctor.observe.statistics.stats import UnitStats
from relu_doctor.training.seen import Seen

Words = np.ndarray[Any, np.dtype[np.int64]]

_DECLARED = [declared for declared in fields(UnitStats) if "law" in declared.metadata]
_COLUMNS = len(_DECLARED) + 3  # and when gradients were heard and checked, and the update-to-weight ratio
_NUMBERS = ("loss", "grad_norm")
_HEADER = 9 + len(_NUMBERS)  # words
_LEAST = 64  # digests that there is room for


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things stand in the buffer.

    Attributes:
        sites: ``site_id`` and number of units, in order.
        digests: for how many there is room.
        steps: words that hold the observed steps as bits.
    """

    sites: tuple[tuple[str, int], ...] = ()
    digests: int = 0
    steps: int = 1

    @property
    def words(self) -> int:
        """Length of the buffer."""
        columns = sum(1 + _COLUMNS * units for _, units in self.sites)
        return _HEADER + self.steps + self.digests + columns

    def fitting(self, digests: int) -> int:
        """Room for so many digests, and some more, so that it is not outgrown soon."""
        return self.digests if digests <= self.digests else max(_LEAST, 1 << (digests - 1).bit_length())


@dataclass(slots=True)
class Extra:
    """What has no place in the buffer.

    Attributes:
        sites: that the others do not know, or not like this.
        order: ``site_id`` of all sites that the rank knows, in forward order.
        stats, heard, checked, ratios: of the window, of sites without a place.
        digests: those for which there was no room.
        notes: that the others do not know.
    """

    sites: list[ActivationSite] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    stats: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    heard: dict[str, Tensor] = field(default_factory=dict)
    checked: dict[str, Tensor] = field(default_factory=dict)
    ratios: dict[str, Tensor] = field(default_factory=dict)
    digests: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def packed(self) -> bytes:
        """As bytes, padded to whole words; none where there is nothing to say."""
        if not (self.sites or self.stats or self.digests or self.notes):
            return b""
        packed = pickle.dumps(replace(self, sites=[_sendable(site) for site in self.sites]))
        return packed + bytes(-len(packed) % 8)


@dataclass(frozen=True, slots=True)
class Header:
    """Of a rank's buffer.

    Attributes:
        extra: words that did not fit.
        first_step, last_step: of the window; it is empty where the rank makes no more steps.
        num_inputs: observed.
        untold: inputs among them that have no digest.
        digests: of the other ones, in all.
        wishes: the rank met calls that it does not know.
        leaves: the rank has closed its monitor.
        numbers: which of the run's numbers were told, as bits; the numbers follow.
    """

    extra: int
    first_step: int
    last_step: int
    num_inputs: int
    untold: int
    digests: int
    wishes: int
    leaves: int
    numbers: int


def pack(layout: Layout, seen: Seen, extra: Extra, *, wishes: bool, leaves: bool) -> tuple[Words, bytes]:
    """Fill the buffer of one rank.

    Args:
        layout: that all ranks share.
        seen: what the rank saw.
        extra: with the sites and notes that the others do not know; the rest of what does not fit is added to it.
        wishes: the rank met calls that it does not know.
        leaves: the rank has closed its monitor.

    Returns:
        The buffer, and ``extra`` as bytes.
    """
    told = [digest for digests, _ in seen.told for digest in digests or ()]
    extra.digests = told[layout.digests :]
    _put_aside(layout, seen, extra)
    words = np.zeros(layout.words, dtype=np.int64)
    beside = extra.packed()
    told_numbers = sum((name in seen.numbers) << bit for bit, name in enumerate(_NUMBERS))
    untold = sum(count for digests, count in seen.told if digests is None)
    header = Header(
        len(beside) // 8,
        seen.first_step,
        seen.last_step,
        seen.num_inputs,
        untold,
        len(told),
        wishes,
        leaves,
        told_numbers,
    )
    words[: _HEADER - len(_NUMBERS)] = astuple(header)
    words[_HEADER - len(_NUMBERS) : _HEADER].view(np.float64)[:] = [seen.numbers.get(name, 0.0) for name in _NUMBERS]
    place = _HEADER
    steps = (seen.steps - seen.first_step).numpy()
    bits = np.zeros(64 * layout.steps, dtype=np.uint8)
    bits[steps[(steps >= 0) & (steps < len(bits))]] = 1
    words[place : place + layout.steps] = np.packbits(bits, bitorder="little").view(np.int64)
    place += layout.steps
    held = np.array(told[: layout.digests], dtype=np.uint64).view(np.int64)
    words[place : place + len(held)] = held
    place += layout.digests
    for site_id, units in layout.sites:
        columns = words[place + 1 : place + 1 + _COLUMNS * units].reshape(_COLUMNS, units)
        stats = seen.stats.get(site_id)
        if stats is not None and stats.num_units == units:
            words[place] = 1
        _fill(columns, seen, site_id, units)
        place += 1 + _COLUMNS * units
    return words, beside


def unpack(layout: Layout, words: Words, beside: bytes) -> Seen:
    """What a rank saw, out of its buffer.

    Args:
        layout: that all ranks share.
        words: the buffer.
        beside: what had no place in it.
    """
    header, extra = header_of(words), extra_of(beside)
    place = _HEADER
    bits = np.unpackbits(words[place : place + layout.steps].view(np.uint8), bitorder="little")
    steps = torch.from_numpy(np.flatnonzero(bits).astype(np.int64)) + header.first_step
    place += layout.steps
    digests = words[place : place + min(header.digests, layout.digests)].view(np.uint64).tolist() + extra.digests
    place += layout.digests
    stats: dict[str, UnitStats] = {}
    heard, checked, ratios = dict(extra.heard), dict(extra.checked), dict(extra.ratios)
    for site_id, units in layout.sites:
        columns = words[place + 1 : place + 1 + _COLUMNS * units].reshape(_COLUMNS, units)
        if words[place]:
            stats[site_id] = _stats(columns)
        heard[site_id] = torch.from_numpy(columns[-3].copy())
        checked[site_id] = torch.from_numpy(columns[-2].copy())
        ratios[site_id] = torch.from_numpy(columns[-1].view(np.float64).copy())
        place += 1 + _COLUMNS * units
    for site_id, held in extra.stats.items():
        stats[site_id] = UnitStats.of(len(next(iter(held.values()))), held)
    told: list[tuple[list[int] | None, int]] = [(digests, len(digests))] if digests else []
    if header.untold:
        told.append((None, header.untold))
    numbers = words[_HEADER - len(_NUMBERS) : _HEADER].view(np.float64).tolist()
    return Seen(
        index=0,
        first_step=header.first_step,
        last_step=header.last_step,
        stats=stats,
        steps=steps,
        num_inputs=header.num_inputs,
        notes=tuple(extra.notes),
        ratios=ratios,
        heard=heard,
        checked=checked,
        told=told,
        numbers={name: numbers[bit] for bit, name in enumerate(_NUMBERS) if header.numbers >> bit & 1},
    )


def header_of(words: Words) -> Header:
    """The header of a buffer."""
    return Header(*words[: _HEADER - len(_NUMBERS)].tolist())


def extra_of(beside: bytes) -> Extra:
    """What had no place in a buffer; the bytes come from a rank of the same run."""
    if not beside:
        return Extra()
    extra = pickle.loads(beside)
    assert isinstance(extra, Extra)
    return extra


def _put_aside(layout: Layout, seen: Seen, extra: Extra) -> None:
    """Keep what has no place in the buffer."""
    places = dict(layout.sites)
    for site_id, stats in seen.stats.items():
        if places.get(site_id) != stats.num_units:
            extra.stats[site_id] = {each.name: getattr(stats, each.name).clone() for each in _DECLARED}
    extra.heard = {site_id: heard for site_id, heard in seen.heard.items() if places.get(site_id) != len(heard)}
    extra.checked = {site_id: steps for site_id, steps in seen.checked.items() if places.get(site_id) != len(steps)}
    extra.ratios = {site_id: ratio for site_id, ratio in seen.ratios.items() if places.get(site_id) != len(ratio)}


def _fill(columns: Words, seen: Seen, site_id: str, units: int) -> None:
    stats, ratios = seen.stats.get(site_id), seen.ratios.get(site_id)
    if stats is not None and stats.num_units == units:
        for column, each in zip(columns, _DECLARED, strict=False):
            values = getattr(stats, each.name).numpy()
            column[:] = values.astype(np.float64).view(np.int64) if each.metadata["dtype"].is_floating_point else values
    for place, told in ((-3, seen.heard), (-2, seen.checked)):
        steps = told.get(site_id)
        columns[place] = steps.numpy() if steps is not None and len(steps) == units else -1
    nothing = np.full(units, np.nan)
    columns[-1] = (ratios.double().numpy() if ratios is not None and len(ratios) == units else nothing).view(np.int64)


def _stats(columns: Words) -> UnitStats:
    values: Mapping[str, Tensor] = {
        each.name: torch.from_numpy(
            column.view(np.float64).copy() if each.metadata["dtype"].is_floating_point else column.copy()
        )
        for column, each in zip(columns, _DECLARED, strict=False)
    }
    return UnitStats(**values)


def _sendable(site: ActivationSite) -> ActivationSite:
    """A site without what cannot be sent and is not needed to judge it: a function of the user's own, a group."""
    try:
        pickle.dumps(site)
    except Exception:  # noqa: BLE001  pickle has no error that all that cannot be pickled would raise
        rectifier = replace(site.rectifier, applied=site.rectifier.name, fires=None)
        return replace(site, rectifier=rectifier, spread=None)
    return site


def merged(parts: Sequence[Seen], own: Seen) -> Seen:
    """What all ranks saw, each statistic by its law.

    Args:
        parts: of each rank, in order.
        own: of the rank that reports, for what is not sent.
    """
    stats: dict[str, UnitStats] = {}
    heard: dict[str, Tensor] = {}
    checked: dict[str, Tensor] = {}
    ratios: dict[str, Tensor] = {}
    for part in parts:
        for site_id, theirs in part.stats.items():
            known = stats.get(site_id)
            stats[site_id] = theirs if known is None or known.num_units != theirs.num_units else known.merge(theirs)
        _take_latest(heard, part.heard)
        _take_latest(checked, part.checked)
        for site_id, values in part.ratios.items():
            most = ratios.get(site_id)
            ratios[site_id] = values if most is None or len(most) != len(values) else torch.fmax(most, values)
    numbers = dict(own.numbers)
    for name in _NUMBERS:
        told = [part.numbers[name] for part in parts if name in part.numbers]
        if told:
            numbers[name] = sum(told) / len(told)
    made = [part for part in parts if part.last_step >= part.first_step] or [own]
    return replace(
        own,
        first_step=min(part.first_step for part in made),
        last_step=max(part.last_step for part in made),
        stats=stats,
        steps=torch.cat([part.steps for part in parts]).unique(),
        num_inputs=sum(part.num_inputs for part in parts),
        ratios=ratios,
        heard=heard,
        checked=checked,
        told=[told for part in parts for told in part.told],
        numbers=numbers,
    )


def _take_latest(known: dict[str, Tensor], told: Mapping[str, Tensor]) -> None:
    """The later of two steps, unit by unit."""
    for site_id, steps in told.items():
        before = known.get(site_id)
        known[site_id] = steps if before is None or len(before) != len(steps) else torch.maximum(before, steps)
