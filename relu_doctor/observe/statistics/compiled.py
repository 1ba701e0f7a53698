"""The loops that numba compiles: every statistic of a pre-activation in one pass over memory.

Imported only where numba is wanted; :mod:`~relu_doctor.observe.statistics.fused` calls them. A pre-activation is handed
over as the memory that it lies in, with the strides of its (inputs, units, positions). Values are summed in their own
precision, in short runs and as deviations from a *pivot* near their mean, and each run's sums are taken over into
float64: that is as fast as memory is read, and exact to rounding even where the mean is many deviations large. Units
whose sums cannot be trusted so (NaN, infinities, squares out of range) are marked, to be counted again in float64,
value by value.

All of it is in one file: numba knows by its date whether the machine code that it kept is still that of this code.

What is to be done is written into a *job*, int64 (``JOB``,), at the places named below. Any number of threads may work
on it at once: each takes units until none is left.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, attr-defined"
# What numba compiles is typed by what it is called with.

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

RUN = 1024  # values of one row that are summed in their own precision
LINES = 64  # the same where units lie side by side; as many as the first-level cache holds where they are widened
WIDENED_LINES = 16
TILE = 1024  # units whose sums stay in the first-level cache while lines are read
FLOAT, BFLOAT, HALF, DOUBLE = 0, 1, 2, 3  # how values are written

# Places in a job: how many shares of it were taken, its own address, and what is to be counted.
TAKEN, HERE, ENCODING, MEMORY, INPUTS, UNITS, POSITIONS, STRIDES = range(8)  # three strides
SHARE, LEAST, VALID, RESULTS, FIRINGS, LOW, HIGH, JOB = range(10, 18)  # the edges are written as float64
# Rows of the results, int64 or the bits of float64 (rows, units). The minimal statistics are the first two.
NOT_FINITE, MAX, SEEN, FIRED, MIN, MEAN, SPREAD, OUTPUT = range(8)
ROWS, LEAST_ROWS = 8, 2
UNSOUND = -1  # in the place of NOT_FINITE: count this unit exactly

_LIBERTIES = {"reassoc", "contract", "nsz"}  # sums may be reordered, but NaN and infinities must be seen
# Places in a tile's sums, the pivots being first.
_HIGHEST, _LOWEST, _DEVIATIONS, _SQUARES, _OUTPUTS, _FIRINGS = (TILE * row for row in range(1, 7))

_Function = TypeVar("_Function", bound=Callable[..., Any])
_intrinsic: Callable[[Any], Any] = intrinsic


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


@_intrinsic
def _pointer(context: Any, address: Any) -> Any:
    """An address as a pointer."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), emit


@_intrinsic
def _next(context: Any, address: Any) -> Any:
    """Add one to the number at an address, and return what it was; no two threads get the same."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.int64), emit


@_part
def _widen(halves, at, length, encoding, bits, to):
    """Half-precision numbers as the bits of float32."""
    source, target = halves[at : at + length], bits[to : to + length]
    for index in range(length):
        half = np.int32(source[index])
        magnitude = half & 0x7FFF
        if encoding == BFLOAT:
            wide = half << 16
        elif magnitude < 0x400:  # below the normal range: a multiple of 2 ** -24
            wide = np.float32(np.float32(magnitude) * np.float32(2.0**-24)).view(np.int32) | ((half & 0x8000) << 16)
        else:  # the exponent's bias is another, and its highest value stands for infinities and NaN
            bias = (112 << 23) if magnitude < 0x7C00 else (224 << 23)
            wide = ((magnitude << 13) + bias) | ((half & 0x8000) << 16)
        target[index] = wide


@_part
def _move_pivot(sums, unit, seen, pivots):
    """Make the mean so far the pivot; the sums of deviations and of their squares are made to fit."""
    old = np.float64(pivots[unit])
    pivots[unit] = old + sums[0, unit] / seen
    moved = np.float64(pivots[unit]) - old
    sums[1, unit] += moved * (seen * moved - 2 * sums[0, unit])
    sums[0, unit] -= seen * moved


@_part
def _write(place, unit, seen, firings, highest, lowest, pivots, sums, check, least, double, reals, counts):
    """The results of a unit from its sums; marked where its values were not all finite or its squares out of range."""
    large, small = (1e150, 1e-140) if double else (1e18, 1e-15)
    far, spread = max(abs(highest), abs(lowest)), highest - lowest
    sound = np.isfinite(highest) and np.isfinite(lowest) and np.isfinite(check)
    if not least:
        sound = sound and far < large and (spread == 0 or spread > small)
        reals[MIN, place], reals[OUTPUT, place] = lowest, sums[2, unit]
        reals[MEAN, place] = pivots[unit] + sums[0, unit] / seen
        reals[SPREAD, place] = max(sums[1, unit] - sums[0, unit] * (sums[0, unit] / seen), 0.0)
        counts[SEEN, place], counts[FIRED, place] = seen, firings
    reals[MAX, place], counts[NOT_FINITE, place] = highest, 0 if sound else UNSOUND


@_part
def _rows(flat, bits, halves, encoding, job, start, stop, edges, flip, double, reals, counts, fired):
    """Units whose positions lie side by side; there is no padding.

    Extremes are taken of the bits, read as integers in the order of the numbers: that is fast, and NaN of either sign
    and infinities come out beyond every finite number.
    """
    low, high, zero = edges
    inputs, positions, least = job[INPUTS], job[POSITIONS], job[LEAST] != 0
    number, runs = stop - start, (positions + RUN - 1) // RUN
    buffer = np.empty(min(positions, RUN) if encoding else 1, flat.dtype)
    keys = buffer.view(bits.dtype)
    pivots, highest, lowest = np.zeros(number, flat.dtype), np.empty(number, bits.dtype), np.empty(number, bits.dtype)
    sums, totals = np.zeros((3, number)), np.zeros(number, np.int64)
    for row in range(inputs):
        for unit in range(number):
            firings_here = np.int64(0)
            for run in range(runs):
                at = row * job[STRIDES] + (start + unit) * job[STRIDES + 1] + run * RUN
                length = min(RUN, positions - run * RUN)
                values, numbers = flat, bits
                if encoding:
                    _widen(halves, at, length, encoding, keys, 0)
                    values, numbers, at = buffer, keys, 0
                values, numbers = values[at : at + length], numbers[at : at + length]
                top = numbers[0] if numbers[0] >= 0 else numbers[0] ^ flip
                bottom = top
                if least:
                    for index in range(length):
                        key = numbers[index] if numbers[index] >= 0 else numbers[index] ^ flip
                        top, bottom = max(top, key), min(bottom, key)
                    keys[0] = top if top >= 0 else top ^ flip
                    firings_here += buffer[0] > low
                else:
                    if row == 0 and run == 0:
                        total = zero
                        for index in range(length):
                            total += values[index]
                        pivots[unit] = total / length
                    pivot = pivots[unit]
                    deviations, squares, outputs, firings = zero, zero, zero, np.int32(0)
                    for index in range(length):
                        value, key = values[index], numbers[index]
                        key = key if key >= 0 else key ^ flip
                        top, bottom = max(top, key), min(bottom, key)
                        deviation = value - pivot
                        deviations += deviation
                        squares += deviation * deviation
                        outputs += abs(min(max(value, low), high))
                        firings += np.int32((value > low) & (value < high))
                    firings_here += firings
                    sums[0, unit] += deviations
                    sums[1, unit] += squares
                    sums[2, unit] += outputs
                    done = row * runs + run + 1
                    if done & (done - 1) == 0:  # at the first run and whenever their number has doubled
                        _move_pivot(sums, unit, row * positions + run * RUN + length, pivots)
                if row == 0 and run == 0:
                    highest[unit], lowest[unit] = top, bottom
                else:
                    highest[unit], lowest[unit] = max(highest[unit], top), min(lowest[unit], bottom)
            totals[unit] += firings_here
            fired[row, start + unit] = firings_here > 0
    for unit in range(number):
        keys[0] = highest[unit] if highest[unit] >= 0 else highest[unit] ^ flip
        highest_value = np.float64(buffer[0])
        keys[0] = lowest[unit] if lowest[unit] >= 0 else lowest[unit] ^ flip
        lowest_value = np.float64(buffer[0])
        _write(
            start + unit, unit, inputs * positions, totals[unit], highest_value, lowest_value, pivots, sums,
            sums[1, unit], least, double, reals, counts,
        )  # fmt: skip


@_part
def _lines(flat, bits, halves, encoding, job, start, stop, edges, flip, double, valid, reals, counts, fired):
    """Units that lie side by side, a line for each position; of a single position, it is the inputs that are lines."""
    low, high, zero = edges
    inputs, positions, least = job[INPUTS], job[POSITIONS], job[LEAST] != 0
    single, tiles, most_lines = positions == 1, (stop - start + TILE - 1) // TILE, WIDENED_LINES if encoding else LINES
    buffer = np.empty(WIDENED_LINES * TILE if encoding else 1, flat.dtype)
    keys = buffer.view(bits.dtype)
    state, totals = np.zeros((tiles, 7 * TILE), flat.dtype), np.zeros((tiles, 3, TILE))
    firings, firings_before = np.zeros((tiles, TILE), np.int64), np.zeros((tiles, TILE), np.int64)
    tops = np.empty((tiles, TILE), flat.dtype)
    owners, places, at = np.empty(LINES, np.int64), np.empty(LINES, np.int64), np.empty(LINES, np.int64)
    for tile in range(tiles):
        for unit in range(TILE):
            state[tile, _HIGHEST + unit], state[tile, _LOWEST + unit], tops[tile, unit] = -np.inf, np.inf, -np.inf
    seen, renewed = 0, 0
    for row in range(1 if single else inputs):
        line, lines = 0, inputs if single else positions
        while line < lines:
            # Gather lines that are no padding: few at first, until the pivots are good.
            number, most = 0, min(max(seen, 4), most_lines)
            while line < lines and number < most:
                owner, position = (line, 0) if single else (row, line)
                line += 1
                if len(valid) == 0 or valid[owner, position]:
                    owners[number] = owner
                    places[number] = owner * job[STRIDES] + position * job[STRIDES + 2] + start
                    number += 1
            is_first, seen = seen == 0, seen + number
            renews = not least and number > 0 and seen >= 2 * renewed
            renewed = seen if renews else renewed
            for tile in range(tiles):
                here, sums, count = state[tile], totals[tile], firings[tile]
                width, first = min(TILE, stop - start - tile * TILE), tile * TILE
                for index in range(number):
                    at[index] = index * TILE if encoding else places[index] + first
                    if encoding:
                        _widen(halves, places[index] + first, width, encoding, keys, index * TILE)
                values, index = buffer if encoding else flat, 0
                if is_first and number:
                    values_here = values[at[0] : at[0] + width]
                    for unit in range(width):
                        here[unit] = values_here[unit]
                while index < number:
                    if least:
                        values_here = values[at[index] : at[index] + width]
                        for unit in range(width):
                            value = values_here[unit]
                            here[_HIGHEST + unit] = max(here[_HIGHEST + unit], value)
                            here[_DEVIATIONS + unit] += value  # not finite if any value is not
                        index += 1
                    elif number - index >= 4:
                        _four_lines(values, at, index, width, low, high, here)
                        index += 4
                    else:
                        _line(values, at[index], width, low, high, here)
                        index += 1
                for index in range(number if single else 0):
                    values_here = values[at[index] : at[index] + width]
                    fired_here = fired[owners[index], start + first : start + first + width]
                    for unit in range(width):
                        fired_here[unit] = (values_here[unit] > low) & (values_here[unit] < high)
                for unit in range(width):
                    sums[0, unit] += here[_DEVIATIONS + unit]
                    sums[1, unit] += here[_SQUARES + unit]
                    sums[2, unit] += here[_OUTPUTS + unit]
                    count[unit] += np.int64(here[_FIRINGS + unit])
                    here[_DEVIATIONS + unit], here[_SQUARES + unit] = zero, zero
                    here[_OUTPUTS + unit], here[_FIRINGS + unit] = zero, zero
                if renews:
                    for unit in range(width):
                        _move_pivot(sums, unit, seen, here)
        for tile in range(0 if single else tiles):
            here, width, first = state[tile], min(TILE, stop - start - tile * TILE), start + tile * TILE
            for unit in range(width):
                if least:
                    fired[row, first + unit] = here[_HIGHEST + unit] > low
                    tops[tile, unit] = max(tops[tile, unit], here[_HIGHEST + unit])
                    here[_HIGHEST + unit] = -np.inf
                else:
                    fired[row, first + unit] = firings[tile, unit] > firings_before[tile, unit]
                    firings_before[tile, unit] = firings[tile, unit]
    for unit in range(stop - start):
        tile, own = unit // TILE, unit % TILE
        highest, lowest = np.float64(state[tile, _HIGHEST + own]), np.float64(state[tile, _LOWEST + own])
        check = totals[tile, 1, own]
        if least:
            highest, check = max(highest, np.float64(tops[tile, own])), totals[tile, 0, own]
            lowest = highest
        _write(
            start + unit, own, seen, firings[tile, own], highest, lowest, state[tile], totals[tile], check, least,
            double, reals, counts,
        )  # fmt: skip


@_part
def _line(flat, at, width, low, high, sums):
    """Take in one value of each unit of a tile."""
    values = flat[at : at + width]
    for unit in range(width):
        value = values[unit]
        sums[_HIGHEST + unit] = max(sums[_HIGHEST + unit], value)
        sums[_LOWEST + unit] = min(sums[_LOWEST + unit], value)
        deviation = value - sums[unit]
        sums[_DEVIATIONS + unit] += deviation
        sums[_SQUARES + unit] += deviation * deviation
        sums[_OUTPUTS + unit] += abs(min(max(value, low), high))
        sums[_FIRINGS + unit] += (value > low) & (value < high)


@_part
def _four_lines(flat, places, index, width, low, high, sums):
    """The same for four values of each unit, at four places: the sums are read and written once."""
    a, b, c, d = places[index], places[index + 1], places[index + 2], places[index + 3]
    one, two, three, four = flat[a : a + width], flat[b : b + width], flat[c : c + width], flat[d : d + width]
    for unit in range(width):
        v, w, x, y = one[unit], two[unit], three[unit], four[unit]
        more, most = (max(w, v)), (max(y, x))
        top = max(most, more)
        sums[_HIGHEST + unit] = max(sums[_HIGHEST + unit], top)
        less, least = (min(w, v)), (min(y, x))
        bottom = min(least, less)
        sums[_LOWEST + unit] = min(sums[_LOWEST + unit], bottom)
        pivot = sums[unit]
        dv, dw, dx, dy = v - pivot, w - pivot, x - pivot, y - pivot
        sums[_DEVIATIONS + unit] += (dv + dw) + (dx + dy)
        sums[_SQUARES + unit] += (dv * dv + dw * dw) + (dx * dx + dy * dy)
        sums[_OUTPUTS + unit] += (abs(min(max(v, low), high)) + abs(min(max(w, low), high))) + (
            abs(min(max(x, low), high)) + abs(min(max(y, low), high))
        )
        sums[_FIRINGS + unit] += np.int32((v > low) & (v < high)) + np.int32((w > low) & (w < high))
        sums[_FIRINGS + unit] += np.int32((x > low) & (x < high)) + np.int32((y > low) & (y < high))


@_part
def _exact(flat, bits, halves, encoding, job, start, stop, edges, flip, double, valid, reals, counts, fired):
    """Units in any layout, with padding, NaN and infinities, in float64 and value by value; only those marked."""
    low, high, least = np.float64(edges[0]), np.float64(edges[1]), job[LEAST] != 0
    buffer = np.empty(1, flat.dtype)
    keys = buffer.view(bits.dtype)
    for unit in range(start, stop):
        if counts[NOT_FINITE, unit] != UNSOUND:
            continue
        highest, lowest, pivot = -np.inf, np.inf, 0.0
        deviations, squares, outputs = 0.0, 0.0, 0.0
        seen, firings, not_finite = np.int64(0), np.int64(0), np.int64(0)
        for row in range(job[INPUTS]):
            firings_before, not_finite_before = firings, not_finite
            for position in range(job[POSITIONS]):
                if len(valid) and not valid[row, position]:
                    continue
                at = row * job[STRIDES] + unit * job[STRIDES + 1] + position * job[STRIDES + 2]
                if encoding:
                    _widen(halves, at, 1, encoding, keys, 0)
                value = np.float64(buffer[0] if encoding else flat[at])
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


def worker(loop: str, *, double: bool) -> int:
    """The address of a function that works on a job, void (void*): for rows, lines, or exactly."""
    kind = ("rows", "lines", "exact").index(loop)
    real, integer = (np.float64, np.int64) if double else (np.float32, np.int32)
    all_but_sign = int(np.iinfo(integer).max)

    def work(address):
        job, numbers = numba.carray(address, (JOB,), np.int64), numba.carray(address, (JOB,), np.float64)
        edges, flip = (real(numbers[LOW]), real(numbers[HIGH]), real(0)), integer(all_but_sign)
        inputs, units, positions = job[INPUTS], job[UNITS], job[POSITIONS]
        length = 1 + (inputs - 1) * job[STRIDES] + (units - 1) * job[STRIDES + 1] + (positions - 1) * job[STRIDES + 2]
        memory, rows = _pointer(job[MEMORY]), LEAST_ROWS if job[LEAST] else ROWS
        flat, bits = numba.carray(memory, (length,), real), numba.carray(memory, (length,), integer)
        halves, written = numba.carray(memory, (length,), np.int16), np.int64(0) if double else job[ENCODING]
        valid = numba.carray(_pointer(job[VALID]), (inputs if job[VALID] else 0, positions), np.uint8)
        fired = numba.carray(_pointer(job[FIRINGS]), (inputs, units), np.uint8)
        reals = numba.carray(_pointer(job[RESULTS]), (rows, units), np.float64)
        counts = numba.carray(_pointer(job[RESULTS]), (rows, units), np.int64)
        while True:
            start = _next(job[HERE]) * job[SHARE]
            if start >= units:
                break
            stop = min(start + job[SHARE], units)
            if kind == 0:
                _rows(flat, bits, halves, written, job, start, stop, edges, flip, double, reals, counts, fired)
            elif kind == 1:
                _lines(flat, bits, halves, written, job, start, stop, edges, flip, double, valid, reals, counts, fired)
            else:
                _exact(flat, bits, halves, written, job, start, stop, edges, flip, double, valid, reals, counts, fired)

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
