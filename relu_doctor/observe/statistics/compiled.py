"""The loops that numba compiles: every statistic of a pre-activation in one pass over memory.

Imported only where numba is wanted; :mod:`~relu_doctor.observe.statistics.fused` calls them. A pre-activation is handed
over as the memory that it lies in, with the strides of its (inputs, units, positions). Values are summed in their own
precision, in short runs and as deviations from a *pivot* near their mean, and each run's sums are taken over into
float64: that is as fast as memory is read, and exact to rounding even where the mean is many deviations large. Units
whose sums cannot be trusted so (NaN, infinities, squares out of range) are marked, to be counted again in float64,
value by value.

What is to be done is written into a *plan*: a head, int64 (``HEAD``,), and behind it how far each *job* is, int64
(``JOB``,), at the places named below. A job is some of the inputs, with results of its own. Any number of threads may
work on a plan at once: each begins with the job of the inputs that torch's own loops give to that thread, so that
memory stays with the core that wrote it and will write it next, and takes units of it until none is left, there or in
another job.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, attr-defined"
# What numba compiles is typed by what it is called with.

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba import types

from relu_doctor.observe.statistics import lanes
from relu_doctor.observe.statistics.lanes import (
    DEVIATIONS,
    DOUBLE,
    FIRINGS,
    HIGHEST,
    LANES,
    LOWEST,
    OUTPUTS,
    PIVOT,
    SLOT,
    SQUARES,
    clear,
    gather,
    next_of,
    number_from,
    pointer_to,
    take_lines,
    take_rows,
    value_at,
)

RUN = 1024  # values of one unit that are summed in their own precision, in as many lanes as there are
AHEAD = 2  # units that are read after this one, to be fetched before that
LINES = 64  # the same where units lie side by side, in one lane

# Places in a plan's head: how many threads came, its own address, that of a function that numbers threads, if there is
# one, how many threads there are to be and how many jobs, what is to be counted, how many inputs each job has, and how
# many units a share of it.
CAME, HERE, NUMBERING, THREADS, JOBS, MEMORY, INPUTS, UNITS, POSITIONS, STRIDES = range(10)  # three strides
ROWS_EACH, SHARE, LEAST, VALID, RESULTS, FIRED_BYTES, LOW, HIGH, HEAD = range(12, 21)  # the edges are float64
# Places in a job: how many shares of it were taken, and whether a unit must be counted exactly.
TAKEN, UNSOUND_UNITS, JOB = range(3)
# Rows of the results, int64 or the bits of float64 (rows, units). The minimal statistics are the first two.
NOT_FINITE, MAX, SEEN, FIRED, MIN, MEAN, SPREAD, OUTPUT = range(8)
ROWS, LEAST_ROWS = 8, 2
UNSOUND = -1  # in the place of NOT_FINITE: count this unit exactly

_LIBERTIES = {"reassoc", "contract", "nsz"}  # sums may be reordered, but NaN and infinities must be seen
# numba keeps machine code by the date of this file and by what its functions enclose: so that of the other is enclosed.
_SOURCE = hashlib.sha256(Path(lanes.__file__).read_bytes()).hexdigest()

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _part(function: _Function) -> _Function:
    """To be compiled as a part of what calls it."""
    return cast(_Function, numba.njit(inline="always")(function))


def _kept(compile_with: Callable[..., Any], function: Callable[..., Any]) -> Any:
    """Compile, and keep the machine code on disk where there is a place for it."""
    options: dict[str, Any] = {"error_model": "numpy", "fastmath": _LIBERTIES}
    try:
        return compile_with(cache=True, **options)(function)
    except RuntimeError:  # nowhere to keep it
        return compile_with(cache=False, **options)(function)


@_part
def _rounded(value, double):
    """As it is where values are summed."""
    return value if double else np.float64(np.float32(value))


@_part
def _move_pivot(slot, lane, seen, double):
    """Make the mean so far the pivot; the sums of deviations and of their squares are made to fit."""
    old, deviations = slot[PIVOT, lane], slot[DEVIATIONS, lane]
    slot[PIVOT, lane] = _rounded(old + deviations / seen, double)
    moved = slot[PIVOT, lane] - old
    slot[SQUARES, lane] += moved * (seen * moved - 2 * deviations)
    slot[DEVIATIONS, lane] -= seen * moved


@_part
def _write(job, unit, slot, lane, seen, least, double, reals, counts):
    """The results of a unit from its sums; marked where its values were not all finite or its squares out of range."""
    large, small = (1e150, 1e-140) if double else (1e18, 1e-15)
    highest, lowest, deviations = slot[HIGHEST, lane], slot[LOWEST, lane], slot[DEVIATIONS, lane]
    sound = np.isfinite(highest) and np.isfinite(deviations)
    if not least:
        far, spread = max(abs(highest), abs(lowest)), highest - lowest
        sound = sound and np.isfinite(slot[SQUARES, lane]) and far < large and (spread == 0 or spread > small)
        reals[MIN, unit], reals[OUTPUT, unit] = lowest, slot[OUTPUTS, lane]
        reals[MEAN, unit] = slot[PIVOT, lane] + deviations / seen
        reals[SPREAD, unit] = max(slot[SQUARES, lane] - deviations * (deviations / seen), 0.0)
        counts[SEEN, unit], counts[FIRED, unit] = seen, np.int64(slot[FIRINGS, lane])
    reals[MAX, unit], counts[NOT_FINITE, unit] = highest, 0 if sound else UNSOUND
    if not sound:
        job[UNSOUND_UNITS] = 1


@_part
def _begun(address):
    """A plan's head, the number of the job that this thread is to begin with, and the interval in which units fire."""
    head, numbers = numba.carray(address, (HEAD,), np.int64), numba.carray(address, (HEAD,), np.float64)
    own = number_from(head[NUMBERING]) if head[NUMBERING] else next_of(head[HERE])
    return head, own * head[JOBS] // head[THREADS], numbers[LOW], numbers[HIGH]


@_part
def _opened(head, turn):
    """A job: how far it is, the address of its first value, its inputs, and the arrays that are filled."""
    number, units, rows = turn % head[JOBS], head[UNITS], head[ROWS_EACH]
    first = number * rows
    inputs = min(rows, head[INPUTS] - first)
    job = numba.carray(pointer_to(head[HERE] + 8 * (HEAD + number * JOB)), (JOB,), np.int64)
    padded = np.int64(head[VALID] != 0)
    valid = pointer_to(head[VALID] + padded * first * head[POSITIONS])
    fired = pointer_to(head[FIRED_BYTES] + first * units)
    results = pointer_to(head[RESULTS] + number * (LEAST_ROWS if head[LEAST] else ROWS) * units * 8)
    return (
        job,
        first,
        inputs,
        numba.carray(valid, (padded * inputs, head[POSITIONS]), np.uint8),
        numba.carray(fired, (inputs, units), np.uint8),
        numba.carray(results, (ROWS, units), np.float64),  # or only the first of these rows
        numba.carray(results, (ROWS, units), np.int64),
    )


@_part
def _share(head, turn):
    """Where the next share of a job starts and stops; none is smaller than all lanes, but where units are fewer."""
    job, units = head[HERE] + 8 * (HEAD + turn % head[JOBS] * JOB), head[UNITS]
    start = next_of(job) * head[SHARE]
    if start and units - start < LANES:
        return units, units
    stop = start + head[SHARE]
    return start, (units if units - stop < LANES else stop)


def _rows(encoding: int, *, least: bool, plain: bool) -> Callable[[Any], None]:
    """For units whose positions lie side by side; there is no padding."""
    size, double, code = lanes.size_of(encoding), encoding == DOUBLE, _SOURCE

    def work(address):
        assert code
        head, first_job, low, high = _begun(address)
        for turn in range(first_job, first_job + head[JOBS]):
            job, first_input, inputs, _, fired_bytes, reals, counts = _opened(head, turn)
            memory, positions = head[MEMORY] + first_input * head[STRIDES] * size, head[POSITIONS]
            together, pieces = max(1, RUN // positions), (positions + RUN - 1) // RUN
            slots, marks = np.empty((LANES, SLOT, LANES)), np.empty((inputs, LANES), np.uint8)
            along_inputs, along_units = head[STRIDES] * size, head[STRIDES + 1] * size
            last = memory + (inputs - 1) * along_inputs + (head[UNITS] - 1) * along_units + (positions - LANES) * size
            fetched = 0 if together == 1 else min(4, (positions * size + 63) // 64)
            start, stop = _share(head, turn)
            while start < stop:
                for first in range(
                    start, stop, LANES
                ):  # some units at a time, in the order in which they lie in memory
                    number = min(LANES, stop - first)
                    runs, seen = 0, 0
                    for row in range(0, inputs, together):
                        rows = min(together, inputs - row)
                        for own in range(number):
                            slot, here = slots[own], slots.ctypes.data + own * SLOT * LANES * 8
                            if row == 0:
                                clear(here, 0.0)
                            ahead = along_units * AHEAD
                            if own + AHEAD >= number and row + together < inputs:
                                ahead = along_inputs * together - along_units * (number - AHEAD)
                            runs_here, seen_here = runs, seen
                            for piece in range(pieces):
                                length = min(RUN, positions - piece * RUN)
                                at = memory + row * along_inputs + (first + own) * along_units + piece * RUN * size
                                fired, earlier = marks.ctypes.data + row * LANES + own, np.int64(piece > 0)
                                if not least and runs_here == 0:  # the mean of the first run, for a pivot
                                    take_rows(
                                        encoding, True, True, here, low, high, at, rows, along_inputs, length, ahead,
                                        fetched, last, fired, LANES, 0,
                                    )  # fmt: skip
                                    gather(here)
                                    clear(here, _rounded(slot[DEVIATIONS, 0] / (rows * length), double))
                                take_rows(
                                    encoding, least, plain, here, low, high, at, rows, along_inputs, length, ahead,
                                    fetched, last, fired, LANES, earlier,
                                )  # fmt: skip
                                runs_here, seen_here = runs_here + 1, seen_here + rows * length
                                if not least and runs_here > 1 and runs_here & (runs_here - 1) == 0:  # twice as many
                                    gather(here)
                                    _move_pivot(slot, 0, seen_here, double)
                                    for lane in range(1, LANES):
                                        slot[PIVOT, lane] = slot[PIVOT, 0]
                        runs, seen = runs + pieces, seen + rows * positions
                    for own in range(number):
                        gather(slots.ctypes.data + own * SLOT * LANES * 8)
                        _write(job, first + own, slots[own], 0, seen, least, double, reals, counts)
                    for row in range(inputs):
                        for own in range(number):
                            fired_bytes[row, first + own] = marks[row, own]
                start, stop = _share(head, turn)

    return work


def _lines(encoding: int, *, single: bool, least: bool, plain: bool) -> Callable[[Any], None]:
    """For units that lie side by side, a line for each position; of a single one, it is the inputs that are lines."""
    size, double, code = lanes.size_of(encoding), encoding == DOUBLE, _SOURCE

    def work(address):
        assert code
        head, first_job, low, high = _begun(address)
        for turn in range(first_job, first_job + head[JOBS]):
            job, first_input, inputs, valid, _, reals, counts = _opened(head, turn)
            memory, positions = head[MEMORY] + first_input * head[STRIDES] * size, head[POSITIONS]
            marks_at = head[FIRED_BYTES] + first_input * head[UNITS]
            start, stop = _share(head, turn)
            while start < stop:
                width = stop - start
                slots = np.empty(((width + LANES - 1) // LANES, SLOT, LANES))
                places, marks = np.empty(LINES, np.int64), np.empty(LINES, np.int64)
                # Few units are read with what is beside them; the last lines are copied, for that to exist.
                copies, end = np.zeros(LINES * LANES), memory
                end += (
                    (inputs - 1) * head[STRIDES] * size
                    + (positions - 1) * head[STRIDES + 2] * size
                    + head[UNITS] * size
                )
                for index in range(len(slots)):
                    clear(slots.ctypes.data + index * SLOT * LANES * 8, 0.0)
                seen, renewed = 0, 0
                for row in range(1 if single else inputs):
                    line, lines_here, earlier = 0, inputs if single else positions, 0
                    while line < lines_here:
                        number = 0
                        while line < lines_here and number < LINES:  # gather lines that are no padding
                            owner, position = (line, 0) if single else (row, line)
                            line += 1
                            if len(valid) == 0 or valid[owner, position]:
                                at = memory + size * (owner * head[STRIDES] + position * head[STRIDES + 2] + start)
                                if width < LANES and at + LANES * size > end:
                                    copy = copies.ctypes.data + number * LANES * 8
                                    source = numba.carray(pointer_to(at), (width * size,), np.uint8)
                                    target = numba.carray(pointer_to(copy), (width * size,), np.uint8)
                                    for index in range(width * size):
                                        target[index] = source[index]
                                    at = copy
                                places[number] = at
                                marks[number] = marks_at + owner * head[UNITS] + start
                                number += 1
                        if number == 0:
                            continue
                        is_first, seen = seen == 0, seen + number
                        renews = not least and not is_first and seen >= 2 * renewed
                        renewed = seen if renews or is_first else renewed
                        fired = marks_at + row * head[UNITS] + start
                        for index in range(len(slots)):
                            slot, offset = slots[index], max(0, min(index * LANES, width - LANES))
                            here = slots.ctypes.data + index * SLOT * LANES * 8
                            if not least and is_first:  # the mean of the first lines, for a pivot
                                take_lines(
                                    encoding, True, True, single, here, low, high, places.ctypes.data, number, offset,
                                    fired, marks.ctypes.data, 0,
                                )  # fmt: skip
                                for lane in range(LANES):
                                    slot[PIVOT, lane] = _rounded(slot[DEVIATIONS, lane] / number, double)
                                    slot[HIGHEST, lane], slot[DEVIATIONS, lane] = -np.inf, 0.0
                            take_lines(
                                encoding, least, plain, single, here, low, high, places.ctypes.data, number, offset,
                                fired, marks.ctypes.data, earlier,
                            )  # fmt: skip
                            if renews:
                                for lane in range(LANES):
                                    _move_pivot(slot, lane, seen, double)
                        earlier = 1
                for unit in range(width):
                    index = unit // LANES
                    lane = unit - max(0, min(index * LANES, width - LANES))
                    _write(job, start + unit, slots[index], lane, seen, least, double, reals, counts)
                start, stop = _share(head, turn)

    return work


def _exact(encoding: int) -> Callable[[Any], None]:
    """For units in any layout, with padding, NaN and infinities, in float64, value by value; only those marked."""
    size, code = lanes.size_of(encoding), _SOURCE

    def work(address):
        assert code
        head, first_job, low, high = _begun(address)
        for turn in range(first_job, first_job + head[JOBS]):
            _, first_input, inputs, valid, fired, reals, counts = _opened(head, turn)
            memory, least = head[MEMORY] + first_input * head[STRIDES] * size, head[LEAST] != 0
            start, stop = _share(head, turn)
            while start < stop:
                for unit in range(start, stop):
                    if counts[NOT_FINITE, unit] != UNSOUND:
                        continue
                    highest, lowest, pivot = -np.inf, np.inf, 0.0
                    deviations, squares, outputs = 0.0, 0.0, 0.0
                    seen, firings, not_finite = np.int64(0), np.int64(0), np.int64(0)
                    for row in range(inputs):
                        firings_before, not_finite_before = firings, not_finite
                        for position in range(head[POSITIONS]):
                            if len(valid) and not valid[row, position]:
                                continue
                            at = row * head[STRIDES] + unit * head[STRIDES + 1] + position * head[STRIDES + 2]
                            value = value_at(encoding, memory + at * size)
                            if not np.isfinite(value):
                                not_finite = not_finite_before + 1 if least else not_finite + 1
                                continue
                            if seen == 0:
                                pivot = value
                            seen += 1
                            highest, lowest = max(highest, value), min(lowest, value)
                            deviations += value - pivot
                            squares += (value - pivot) * (value - pivot)
                            outputs += abs(min(max(value, low), high))
                            firings += (value > low) & (value < high)
                        fired[row, unit] = firings > firings_before
                    reals[MAX, unit], counts[NOT_FINITE, unit] = highest, not_finite
                    if not least:
                        mean = deviations / (seen or 1)
                        reals[MIN, unit], reals[OUTPUT, unit] = lowest, outputs
                        reals[MEAN, unit], reals[SPREAD, unit] = pivot + mean, max(squares - deviations * mean, 0.0)
                        counts[SEEN, unit], counts[FIRED, unit] = seen, firings
                start, stop = _share(head, turn)

    return work


def worker(loop: str, encoding: int, *, least: bool, plain: bool) -> int:
    """The address of a function that works on a plan, void (void*).

    Args:
        loop: for units whose positions lie side by side, ``"rows"``; for units that lie side by side, ``"lines"``, or
            ``"inputs"`` where there is one position; or ``"exact"``.
        encoding: how values are written.
        least: only the minimal statistics.
        plain: units fire above a number that is not below zero.
    """
    if loop == "exact":
        work = _exact(encoding)
    elif loop == "rows":
        work = _rows(encoding, least=least, plain=plain)
    else:
        work = _lines(encoding, single=loop == "inputs", least=least, plain=plain)
    return int(_kept(partial(numba.cfunc, types.void(types.voidptr)), work).address)


def _add(reals, counts, more_reals, more_counts):
    """Add the results of other positions to results, in place; means and spreads after Chan, Golub and LeVeque."""
    for unit in range(reals.shape[1]):
        reals[MAX, unit] = max(reals[MAX, unit], more_reals[MAX, unit])
        counts[NOT_FINITE, unit] += more_counts[NOT_FINITE, unit]
        if len(reals) == LEAST_ROWS:
            continue
        reals[MIN, unit] = min(reals[MIN, unit], more_reals[MIN, unit])
        reals[OUTPUT, unit] += more_reals[OUTPUT, unit]
        counts[FIRED, unit] += more_counts[FIRED, unit]
        here, there = counts[SEEN, unit], more_counts[SEEN, unit]
        if there:
            share, moved = there / (here + there), more_reals[MEAN, unit] - reals[MEAN, unit]
            reals[MEAN, unit] += moved * share
            reals[SPREAD, unit] += more_reals[SPREAD, unit] + moved * moved * share * here
            counts[SEEN, unit] = here + there


def _count_inputs(inputs, fired, first_ordinal):
    """Count the inputs that fired, in place.

    Args:
        inputs: int64 (3, units): inputs that fired, and the ordinals of the first and the last of them; of the minimal
            statistics (1, units).
        fired: uint8 (inputs, units), 0 for padding.
        first_ordinal: of these inputs.
    """
    number, units = fired.shape
    block = 255  # so many rows are counted in bytes
    counts, firsts, lasts = np.empty(units, np.uint8), np.empty(units, np.uint8), np.empty(units, np.uint8)
    for start in range(0, number, block):
        counts[:], firsts[:], lasts[:] = 0, 0, 0
        for row in range(min(block, number - start)):
            marks = fired[start + row]
            from_start, from_end = np.uint8(row + 1), np.uint8(block - row)
            for unit in range(units):
                counts[unit] += marks[unit]
            if len(inputs) == 3:
                for unit in range(units):
                    here = np.uint8(np.uint8(0) - marks[unit])  # all bits, or none
                    firsts[unit] = max(firsts[unit], np.uint8(from_end & here))
                    lasts[unit] = max(lasts[unit], np.uint8(from_start & here))
        for unit in range(units):
            inputs[0, unit] += counts[unit]
            if len(inputs) == 3 and counts[unit]:
                inputs[1, unit] = min(inputs[1, unit], first_ordinal + start + block - firsts[unit])
                inputs[2, unit] = max(inputs[2, unit], first_ordinal + start + lasts[unit] - 1)


add, count_inputs = _kept(numba.njit, _add), _kept(numba.njit, _count_inputs)


def _join(address):
    """Add the results of all jobs of a plan to those of the first."""
    assert _SOURCE
    head = numba.carray(address, (HEAD,), np.int64)
    rows, units = (LEAST_ROWS if head[LEAST] else ROWS), head[UNITS]
    reals = numba.carray(pointer_to(head[RESULTS]), (rows, units), np.float64)
    counts = numba.carray(pointer_to(head[RESULTS]), (rows, units), np.int64)
    for number in range(1, head[JOBS]):
        more = pointer_to(head[RESULTS] + number * rows * units * 8)
        more_reals, more_counts = (
            numba.carray(more, (rows, units), np.float64),
            numba.carray(more, (rows, units), np.int64),
        )
        add(reals, counts, more_reals, more_counts)


join: int = _kept(partial(numba.cfunc, types.void(types.voidptr)), _join).address
