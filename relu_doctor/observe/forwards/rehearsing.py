"""Rehearsals on a probed model: what a few inputs, altered one by one, show of a model's sites and of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from relu_doctor.observe.forwards.calls import Traced, Watch
from relu_doctor.observe.forwards.layout import Seen, changed_positions, changed_rows
from relu_doctor.observe.forwards.modes import ForwardMode
from relu_doctor.observe.forwards.patience import tracing_mode
from relu_doctor.observe.forwards.registry import Reading
from relu_doctor.observe.inputs.rehearsal import Inputs, Rehearsal, differs, last_position
from relu_doctor.observe.sites import ActivationSite

Perform = Callable[[Inputs], object]
Run = Callable[[], object]
Trace = list[Traced]
_MOST_TRIES = 5  # rehearsals in which no selection held rows of the altered input and of others


@dataclass(frozen=True, slots=True)
class Trial:
    """A rehearsal with one input altered.

    Attributes:
        altered: which one.
        trace: the calls.
    """

    altered: int
    trace: Trace

    def pre_like(self, call: Traced, place: int) -> Tensor | None:
        """The pre-activation of the same call; ``None`` where there is none of its shape."""
        other = self.trace[place] if place < len(self.trace) else None
        return other.pre if other is not None and _are_alike(call, other) else None


@dataclass(slots=True)
class Rehearser:
    """Performs rehearsals; what they show is kept with what else is known of the model.

    Attributes:
        watch: what the modes of the probe share.
        discover: watches a forward in the slow mode.
        follow: watches a forward in the mode that it is given.
    """

    watch: Watch
    discover: Callable[[Run, Reading, str], ForwardMode]
    follow: Callable[[Run, ForwardMode], ForwardMode]
    _tries: int = 0

    @property
    def _asks_for_rows(self) -> bool:
        """Whether it is open whose the rows of the model's selections are."""
        return 0 < self._tries < _MOST_TRIES and self.watch.known.rows_told is None

    def is_curious(self, reading: Reading, phase: str) -> bool:
        """Whether a rehearsal could tell something that is not known yet."""
        known = self.watch.known
        padded = reading.mask is not None and any(seen.padded is None for seen in known.seen.values())
        if (reading.num_inputs or 0) > 1 and any(not seen.tried for seen in known.seen.values()):
            return True
        return phase not in known.phases or bool(known.unseen) or padded or self._asks_for_rows

    def rehearse(self, rehearsal: Rehearsal, perform: Perform, phase: str, *, again: bool = False) -> bool | None:
        """Discover on a few inputs what is not known yet, and see which values are whose.

        Args:
            rehearsal: the inputs, as they are and altered.
            perform: performs the forward on inputs.
            phase: under which name calls are known.
            again: discover although the phase is known: a forward met a call that is not.

        Returns:
            Whether altering the first input changed nothing of the others, at any site; ``None`` where that was not
            tried.
        """
        known = self.watch.known
        reading = _reading(rehearsal.num_inputs, rehearsal.axis)
        if again or phase not in known.phases:
            with suppress(Exception):  # the model may refuse a part of a batch in any way
                self.discover(lambda: perform(rehearsal.plain), reading, phase)
        unknown, several = known.unseen, rehearsal.num_inputs > 1
        if several:
            unknown |= {site_id for site_id, seen in known.seen.items() if not seen.tried}
        padding = rehearsal.padded is not None and any(seen.padded is None for seen in known.seen.values())
        if phase not in known.phases or not (unknown or padding or self._asks_for_rows):
            return None
        before = self.trace(perform, rehearsal.plain, reading, phase)
        trials = [Trial(0, self.trace(perform, rehearsal.altered, reading, phase))]
        if several:
            last = self.trace(perform, rehearsal.altered_last, reading, phase)
            trials.append(Trial(rehearsal.num_inputs - 1, last))
        for place, call in enumerate(before):
            site_id = call.site.site_id
            changed = {trial.altered: trial.pre_like(call, place) for trial in trials}
            if site_id in unknown and None not in changed.values():
                unknown.discard(site_id)
                known.seen[site_id] = _whose(call, changed, rehearsal.num_inputs, known.seen.get(site_id, Seen()))
        for site_id in unknown:
            known.seen[site_id] = replace(known.seen.get(site_id, Seen()), tried=several)
        if several:
            for site_id in _one_by_one(before, trials, rehearsal.num_inputs):
                known.seen[site_id] = replace(known.seen.get(site_id, Seen()), alone=True)
        if any(call.rows is not None for call in before):
            self._tries += 1
            told = [_rows_hold(before, trial) for trial in trials]
            holds = False if False in told else True if True in told else None
            known.rows_told = holds if known.rows_told is None or holds is False else known.rows_told
        if rehearsal.mask is not None:
            self._see_padding(rehearsal, perform, phase)
        return _keeps_apart(before, trials, rehearsal.num_inputs, known.one_by_one)

    def _see_padding(self, rehearsal: Rehearsal, perform: Perform, phase: str) -> None:
        """Try out at which sites the positions of the mask are padding."""
        if rehearsal.padded is None or rehearsal.pointed is None or rehearsal.mask is None:
            return
        known = self.watch.known
        reading = _reading(rehearsal.num_inputs, rehearsal.axis)
        before = self.trace(perform, rehearsal.plain, reading, phase)  # now by what was seen
        padded = self.trace(perform, rehearsal.padded, reading, phase)
        pointed = self.trace(perform, rehearsal.pointed, reading, phase)
        found: dict[str, bool] = {}
        for plain, by_padding, by_point in zip(before, padded, pointed, strict=False):
            fits = _are_alike(plain, by_padding) and _are_alike(plain, by_point)
            if fits:
                fits = _is_masked(_changed(plain, by_padding), _changed(plain, by_point), rehearsal.mask)
            found[plain.site.site_id] = found.get(plain.site.site_id, True) and fits
        for site_id, seen in known.seen.items():
            if seen.padded is None:
                known.seen[site_id] = replace(seen, padded=found.get(site_id, False))

    def takes_turns(self, rehearsal: Rehearsal, perform: Perform, phase: str) -> bool:
        """Whether what changes with the first and with the last input lies apart in every call, however it is put.

        Args:
            rehearsal: the inputs, as they are and altered.
            perform: performs the forward on inputs.
            phase: under which name calls are known.
        """
        reading = _reading(rehearsal.num_inputs, rehearsal.axis)
        given = rehearsal.plain, rehearsal.altered, rehearsal.altered_last
        before, first, last = (self.trace(perform, inputs, reading, phase) for inputs in given)
        if not before or not len(before) == len(first) == len(last):
            return False
        calls = list(zip(before, first, last, strict=True))
        return all(_are_alike(one, a) and _are_alike(one, b) and _lie_apart(one, a.pre, b.pre) for one, a, b in calls)

    def changes(
        self, perform: Perform, plain: Inputs, altered: Inputs, num_inputs: int, axis: int | None, phase: str
    ) -> bool:
        """Whether any site sees a difference between two versions of some inputs; true where that cannot be told.

        Args:
            perform: performs the forward on inputs.
            plain: the inputs.
            altered: the same, altered.
            num_inputs: how many they are.
            axis: on which they lie.
            phase: under which name calls are known.
        """
        reading = _reading(num_inputs, axis)
        before, after = (self.trace(perform, inputs, reading, phase) for inputs in (plain, altered))
        if not before or len(before) != len(after):
            return True
        return any(_differ(one, other) for one, other in zip(before, after, strict=True))

    def trace(self, perform: Perform, inputs: Inputs, reading: Reading, phase: str) -> Trace:
        """The pre-activations of a forward, call by call; those before an unknown call where there is one."""
        mode = tracing_mode(self.watch, reading, phase)
        state = torch.get_rng_state()
        torch.manual_seed(0)  # the same noise in every rehearsal
        with torch.set_grad_enabled(self.watch.gradients), suppress(Exception):
            self.follow(lambda: perform(inputs), mode)
        torch.set_rng_state(state)
        return mode.trace


def _reading(num_inputs: int, axis: int | None) -> Reading:
    return Reading(num_inputs, None, 0, axis, rehearsed=True)


def _are_alike(one: Traced, other: Traced) -> bool:
    return one.site.site_id == other.site.site_id and one.pre.shape == other.pre.shape


def _differ(one: Traced, other: Traced) -> bool:
    return not _are_alike(one, other) or bool(differs(one.pre, other.pre).any())


def _changed(one: Traced, other: Traced) -> Tensor:
    return changed_positions(one.pre, other.pre, one.layout, one.site)


def _whose(before: Traced, changed: dict[int, Tensor | None], num_inputs: int, seen: Seen) -> Seen:
    """What altering single inputs shows of a site's axes.

    Args:
        before: the call as it was.
        changed: by the input that was altered, the pre-activation.
        num_inputs: of the rehearsal.
        seen: what was seen of the site before.
    """
    pre, layout = before.pre, before.layout
    others = [axis for axis in range(pre.dim()) if axis not in before.site.unit_axes]
    alone = []
    for axis in (axis for axis in others if pre.shape[axis] == num_inputs > 1):
        told = {altered: changed_rows(pre, after, axis) for altered, after in changed.items() if after is not None}
        if any(told.values()) and all(found in ([], [altered]) for altered, found in told.items()):
            alone.append(axis)
    first = changed[0]
    rows = changed_rows(pre, first, layout.order[0]) if layout.split and num_inputs > 1 and first is not None else []
    interleaved = bool(rows) and all(row % num_inputs == 0 for row in rows) and max(rows) >= layout.split
    apart = all(
        after is not None and _is_apart(pre, after, before.site, num_inputs, altered)
        for altered, after in changed.items()
    )
    return Seen(alone[0] if len(alone) == 1 else None, interleaved, seen.padded, num_inputs > 1, apart)


def _rows_hold(before: Trace, trial: Trial) -> bool | None:
    """Whether the rows of selections are those that they seem to be: the altered input's changed, the others did not.

    Returns:
        ``None`` where they do not tell: the altered input may not be among the selected, or be of another length.
    """
    then, now = (_rows_by_owner(trace, trial.altered) for trace in (before, trial.trace))
    changed = stayed = False
    for site_id in then.keys() & now.keys():
        (own, others), (altered, still) = then[site_id], now[site_id]
        if others.shape[1:] != still.shape[1:]:
            return None  # other lengths: the altered input was the longest
        if others.shape != still.shape or not torch.allclose(others, still, rtol=1e-3, atol=1e-5, equal_nan=True):
            return False
        stayed |= len(others) > 0
        changed |= own.shape != altered.shape or not torch.equal(own, altered)
    return (changed and stayed) or None


def _rows_by_owner(trace: Trace, owner: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Per site, the selected rows of one input and those of the others, in their order."""
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for call in trace:
        if call.rows is not None and call.pre.dim() and len(call.pre) == len(call.rows.places):
            first = call.rows.owners == owner
            own, rest = found.setdefault(call.site.site_id, ([], []))
            own.append(call.pre[first].flatten(1).float() if call.pre.dim() > 1 else call.pre[first, None].float())
            rest.append(call.pre[~first].flatten(1).float() if call.pre.dim() > 1 else call.pre[~first, None].float())
    return {site_id: (torch.cat(own), torch.cat(rest)) for site_id, (own, rest) in found.items()}


def _keeps_apart(before: Trace, trials: Sequence[Trial], num_inputs: int, alone: set[str]) -> bool | None:
    """Whether what changed with an input is that input's alone; ``None`` where nothing tells.

    Args:
        before: the calls as they were.
        trials: with one input altered.
        num_inputs: of the rehearsal.
        alone: the sites that are called once for each input.
    """
    if num_inputs < 2 or any(len(trial.trace) != len(before) for trial in trials):
        return None
    told = [
        _are_alike(one, other)
        and (one.site.site_id in alone or _is_apart(one.pre, other.pre, one.site, num_inputs, trial.altered))
        for trial in trials
        for one, other in zip(before, trial.trace, strict=True)
        if one.rows is None and _differ(one, other)  # a selection may be another one now
    ]
    return all(told) if told else None


def _lie_apart(call: Traced, one: Tensor, other: Tensor) -> bool:
    """Whether two changes of a call have no row of some axis in common."""
    for axis in (axis for axis in range(call.pre.dim()) if axis not in call.site.unit_axes):
        if not set(changed_rows(call.pre, one, axis)) & set(changed_rows(call.pre, other, axis)):
            return True
    return torch.equal(call.pre, one) or torch.equal(call.pre, other)


def _one_by_one(before: Trace, trials: Sequence[Trial], num_inputs: int) -> set[str]:
    """The sites that are called once for each input: of their calls only that of the altered input changed."""
    found: set[str] | None = None
    for trial in trials:
        changed: dict[str, list[bool]] = {}
        for one, other in zip(before, trial.trace, strict=False):
            changed.setdefault(one.site.site_id, []).append(_differ(one, other))
        wanted = [place == trial.altered for place in range(num_inputs)]
        sites = {site_id for site_id, calls in changed.items() if calls == wanted}
        found = sites if found is None else found & sites
    return found or set()


def _is_apart(before: Tensor, after: Tensor, site: ActivationSite, num_inputs: int, altered: int) -> bool:
    """Whether what changed with an input is its share of an axis: a stretch of it, or every n-th row."""
    for axis in (axis for axis in range(before.dim()) if axis not in site.unit_axes):
        size = before.shape[axis]
        rows = changed_rows(before, after, axis)
        each = size // num_inputs
        if each == 0 or size % num_inputs:
            continue
        if all(row // each == altered for row in rows) or all(row % num_inputs == altered for row in rows):
            return True
    return False


def _is_masked(by_padding: Tensor, by_point: Tensor, mask: Tensor) -> bool:
    """Whether a mask's positions are those of a site.

    They are if every padding position changed when only padding was altered; or, where padding is overwritten and
    nothing of it comes through, if altering one position changed that one and few others.
    """
    padding = ~mask.to(by_padding.device)
    if by_padding.shape != padding.shape:
        return False
    own = bool(by_point[0, last_position(mask)]) and int(by_point.sum()) <= max(1, padding.shape[1] // 2)
    return bool(by_padding[padding].all()) or (own and not bool(by_padding.any()))
