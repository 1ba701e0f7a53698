"""The fast kernel on GPUs: every statistic of a pre-activation in one pass over memory, compiled by Triton.

Imported only where Triton is wanted; :mod:`~relu_doctor.observe.statistics.on_gpu` calls it. It was checked without a
GPU: what it computes in Triton's interpreter, against the slow reference of the tests, and that it becomes machine code
by compiling it for GPUs of several generations. On a GPU it has not run yet, and how fast it is was not measured.

A *tile* of (inputs, units, positions) is read at a time, along memory where the strides allow. Each of its places, a
*lane*, keeps its own sums from tile to tile, in float32 and as deviations from the first finite value that it met:
nothing is exchanged between threads while memory is read. At most ``_RUN`` tiles later the lanes are merged by the law
of Chan, Golub and LeVeque, and so, in float64, are the runs: that is exact to rounding even where the mean is many
deviations large. As in plain torch on devices, squares are out of range where values differ by more than 1e19 or less
than 1e-19. No two programs add to one number: results are the same from run to run. Nothing waits for the device.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# What Triton compiles is typed by what it is called with.

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from relu_doctor.observe.statistics.stats import UnitStats

_TILE = 1024  # values that are read at a time by one program: eight for each of its threads
_LINE = 64  # units of a tile where units lie side by side: runs of memory that are read at full speed
_RUN = 64  # tiles that lanes sum up in float32
_LEAST_RUN = 4  # tiles that are worth a program of their own
_PROGRAMS = 1024  # that keep a large GPU busy
_MOST = 65535  # programs along the second or third axis of a grid
_BLOCKS, _COLUMNS = 128, 8  # runs and units that are merged at a time
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}  # Triton warns where the second is left to it

# Rows of the parts, float64 (rows, runs, units). The minimal statistics are the first two.
_MAX, _NOT_FINITE = tl.constexpr(0), tl.constexpr(1)
_SEEN, _FIRED, _MIN, _MEAN, _SPREAD, _OUTPUT = (tl.constexpr(row) for row in range(2, 8))
_ROWS, _LEAST_ROWS = 8, 2
# Rows of what the parts are merged to.
_COUNTS = ("positions", "positions_fired", "non_finite_values")
_REALS = ("pre_max", "pre_min", "pre_mean", "pre_squares", "post_abs_sum")

# What differs from batch to batch is no reason to compile again.
_CHANGING = ("inputs", "run_inputs", "run_positions", "marks_along_inputs", "runs")
_kernel: Callable[[Any], Any] = triton.jit(do_not_specialize=_CHANGING)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a pre-activation is dealt to programs.

    Attributes:
        tile: (inputs, units, positions) that are read at a time, powers of two.
        runs: tiles of inputs and of positions that one program reads.
        grid: programs along the units, the inputs and the positions.
    """

    tile: tuple[int, int, int]
    runs: tuple[int, int]
    grid: tuple[int, int, int]


def plan(shape: tuple[int, ...], strides: tuple[int, ...], *, least: bool) -> Plan | None:
    """Deal (inputs, units, positions) to programs; ``None`` where they lie too far apart, or are too many.

    Args:
        shape: not empty.
        strides: in values.
        least: lanes only keep maxima and counts, however many tiles they sum up.
    """
    inputs_inside = shape[0] > 1 and all(strides[0] < strides[axis] or shape[axis] == 1 for axis in (1, 2))
    tile, room = [1, 1, 1], _TILE // _LINE if inputs_inside else _TILE
    for axis in sorted((2, 1), key=lambda axis: (shape[axis] == 1, strides[axis])):
        most = min(room, _LINE) if axis == 1 else room
        tile[axis] = min(triton.next_power_of_2(shape[axis]), most)
        room //= tile[axis]
    tile[0] = _TILE // (tile[1] * tile[2])  # however many there are: that changes from batch to batch
    tiles = [-(-size // own) for size, own in zip(shape, tile, strict=True)]
    run = max(_LEAST_RUN, -(-tiles[0] * tiles[1] * tiles[2] // _PROGRAMS))
    if not least:
        run = min(run, _RUN)
    along_positions = min(tiles[2], run)
    along_inputs = max(1, run // along_positions)
    grid = tiles[1], -(-tiles[0] // along_inputs), -(-tiles[2] // along_positions)
    reach = sum((own - 1) * stride for own, stride in zip(tile, strides, strict=True))
    if max(grid[1:]) > _MOST or reach >= 2**31:
        return None
    return Plan((tile[0], tile[1], tile[2]), (along_inputs, along_positions), grid)


def reduce(
    pre: Tensor, low: float, high: float, valid: Tensor | None, dealt: Plan, *, least: bool
) -> tuple[UnitStats, Tensor]:
    """Reduce a pre-activation in one pass.

    Args:
        pre: (inputs, units, positions), not empty, of any layout: float32, float16 or bfloat16.
        low: lower edge of the open firing interval; the output is taken to be the value clipped to the interval.
        high: its upper edge.
        valid: bool (inputs, positions), False for padding.
        dealt: how it is dealt to programs.
        least: only the maximum, non-finite inputs and what fired.

    Returns:
        The statistics but for those that count inputs, and bool (inputs, units): whether any position fired.
    """
    inputs, units, positions = pre.shape
    runs = dealt.grid[1] * dealt.grid[2]
    split = least and dealt.grid[2] > 1  # several programs read one input: each marks what it found
    fired = torch.zeros(1 + split, inputs, units, dtype=torch.uint8, device=pre.device)
    parts = torch.empty(_LEAST_ROWS if least else _ROWS, runs, units, dtype=torch.float64, device=pre.device)
    marks = fired if valid is None else valid.view(torch.uint8)  # the kernel asks for some memory
    strides = [stride if size > 1 else 0 for size, stride in zip(pre.shape, pre.stride(), strict=True)]
    with torch.cuda.device(pre.device) if pre.is_cuda else nullcontext():
        _reduce[dealt.grid](
            pre, marks, fired, parts, inputs, units, positions, *strides,
            *((0, 0) if valid is None else valid.stride()), *dealt.runs, low, high,
            padded=valid is not None, least=least, split=split,
            tile_inputs=dealt.tile[0], tile_units=dealt.tile[1], tile_positions=dealt.tile[2], **_OPTIONS,
        )  # fmt: skip
        if least:
            spoiled = fired[1].sum(0, dtype=torch.int32) if split else parts[1].sum(0).int()
            measured = {"pre_max": parts[0].amax(0).float(), "non_finite_values": spoiled}
            return UnitStats.of(units, measured, pre.device), fired[0].view(torch.bool)
        counts = torch.empty(len(_COUNTS), units, dtype=torch.int64, device=pre.device)
        reals = torch.empty(len(_REALS), units, dtype=torch.float64, device=pre.device)
        _merge[(-(-units // _COLUMNS),)](
            parts, counts, reals, runs, units, tile_runs=_BLOCKS, tile_units=_COLUMNS, **_OPTIONS
        )
    measured = dict(zip(_COUNTS, counts, strict=True)) | dict(zip(_REALS, reals, strict=True))
    return UnitStats.of(units, measured, pre.device), fired[0].view(torch.bool)


@_kernel
def _reduce(
    values,
    valid,
    fired,
    parts,
    inputs,
    units,
    positions,
    along_inputs,
    along_units,
    along_positions,
    marks_along_inputs,
    marks_along_positions,
    run_inputs,
    run_positions,
    low,
    high,
    padded: tl.constexpr,
    least: tl.constexpr,
    split: tl.constexpr,
    tile_inputs: tl.constexpr,
    tile_units: tl.constexpr,
    tile_positions: tl.constexpr,
):
    """One run: ``run_inputs`` x ``run_positions`` tiles of ``tile_units`` units, summed lane by lane, and merged."""
    i = tl.arange(0, tile_inputs)[:, None, None]
    u = tl.arange(0, tile_units)[None, :, None]
    p = tl.arange(0, tile_positions)[None, None, :]
    first_unit = tl.program_id(0).to(tl.int64) * tile_units
    first_input = tl.program_id(1).to(tl.int64) * run_inputs * tile_inputs
    first_position = tl.program_id(2).to(tl.int64) * run_positions * tile_positions
    end_input = tl.minimum(first_input + run_inputs * tile_inputs, inputs)
    end_position = tl.minimum(first_position + run_positions * tile_positions, positions)
    corner = values + first_unit * along_units
    lanes = i * along_inputs + u * along_units + p * along_positions
    marks = i * marks_along_inputs + p * marks_along_positions
    has_unit = first_unit + u < units

    highest = tl.full([tile_inputs, tile_units, tile_positions], -float("inf"), tl.float32)
    lowest = tl.full([tile_inputs, tile_units, tile_positions], float("inf"), tl.float32)
    pivot = tl.full([tile_inputs, tile_units, tile_positions], float("nan"), tl.float32)
    deviations = tl.zeros([tile_inputs, tile_units, tile_positions], tl.float32)
    squares = tl.zeros([tile_inputs, tile_units, tile_positions], tl.float32)
    outputs = tl.zeros([tile_inputs, tile_units, tile_positions], tl.float32)
    seen = tl.zeros([tile_inputs, tile_units, tile_positions], tl.int32)
    firings = tl.zeros([tile_inputs, tile_units, tile_positions], tl.int32)
    real = tl.zeros([tile_inputs, 1, tile_positions], tl.int32)
    spoiled = tl.zeros([tile_inputs, tile_units], tl.int32)

    for start in range(first_input, end_input, tile_inputs):
        hits = tl.zeros([tile_inputs, tile_units, tile_positions], tl.int32)
        flaws = tl.zeros([tile_inputs, tile_units, tile_positions], tl.int32)
        for position in range(first_position, end_position, tile_positions):
            inside = (start + i < inputs) & (position + p < positions)
            present = inside & has_unit
            place = corner + (start * along_inputs + position * along_positions)
            z = tl.load(place + lanes, mask=present, other=0.0).to(tl.float32)
            if padded:  # is read as well, since memory is read fastest in whole lines
                place = valid + (start * marks_along_inputs + position * marks_along_positions)
                inside = tl.load(place + marks, mask=inside, other=0) != 0
                real += inside.to(tl.int32)
                present = present & inside
            finite = present & (tl.abs(z) < float("inf"))
            fires = finite & (z > low) & (z < high)
            hits += fires.to(tl.int32)
            highest = tl.maximum(highest, tl.where(finite, z, -float("inf")))
            if least:
                flaws += (present & (finite == 0)).to(tl.int32)
            else:
                lowest = tl.minimum(lowest, tl.where(finite, z, float("inf")))
                pivot = tl.where((pivot != pivot) & finite, z, pivot)
                deviation = tl.where(finite, z - pivot, 0.0)
                deviations += deviation
                squares += deviation * deviation
                outputs += tl.where(finite, tl.abs(tl.minimum(tl.maximum(z, low), high)), 0.0)
                seen += finite.to(tl.int32)
        row = start + tl.arange(0, tile_inputs)[:, None]
        unit = first_unit + tl.arange(0, tile_units)[None, :]
        one = tl.full([tile_inputs, tile_units], 1, tl.uint8)
        tl.store(fired + row * units + unit, one, mask=tl.max(hits, axis=2) > 0)
        if least:
            flawed = tl.max(flaws, axis=2) > 0
            if split:
                tl.store(fired + (row + inputs) * units + unit, one, mask=flawed)
            else:
                spoiled += flawed.to(tl.int32)
        else:
            firings += hits

    unit = first_unit + tl.arange(0, tile_units)
    run = tl.program_id(1).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
    apart = tl.num_programs(1).to(tl.int64) * tl.num_programs(2) * units
    place = parts + run * units + unit
    own = unit < units
    tl.store(place + _MAX * apart, tl.max(tl.max(highest, axis=2), axis=0).to(tl.float64), mask=own)
    if least:
        tl.store(place + _NOT_FINITE * apart, tl.sum(spoiled, axis=0).to(tl.float64), mask=own)
    else:
        number = seen.to(tl.float32)
        some = seen > 0
        full_lanes = tl.sum(tl.sum(some.to(tl.float32), axis=2), axis=0)
        share = (1.0 / tl.maximum(full_lanes, 1.0))[None, :, None]
        center = tl.sum(tl.sum(tl.where(some, pivot * share, 0.0), axis=2), axis=0)  # near the mean, of all lanes alike
        off = tl.where(some, (pivot - center[None, :, None]) + deviations / tl.maximum(number, 1.0), 0.0)
        counted = tl.sum(tl.sum(seen, axis=2), axis=0)
        mean = tl.sum(tl.sum(number * off, axis=2), axis=0) / tl.maximum(counted.to(tl.float32), 1.0)
        within = squares - deviations * deviations / tl.maximum(number, 1.0)
        between = tl.where(some, off - mean[None, :, None], 0.0)
        spread = tl.sum(tl.sum(within + number * between * between, axis=2), axis=0)
        if padded:
            to_see = tl.sum(tl.sum(real, axis=2), axis=0)
        else:
            to_see = (end_input - first_input) * (end_position - first_position)
        tl.store(place + _NOT_FINITE * apart, (to_see - counted).to(tl.float64), mask=own)
        tl.store(place + _SEEN * apart, counted.to(tl.float64), mask=own)
        tl.store(place + _FIRED * apart, tl.sum(tl.sum(firings, axis=2), axis=0).to(tl.float64), mask=own)
        tl.store(place + _MIN * apart, tl.min(tl.min(lowest, axis=2), axis=0).to(tl.float64), mask=own)
        tl.store(place + _MEAN * apart, center.to(tl.float64) + mean.to(tl.float64), mask=own)
        tl.store(place + _SPREAD * apart, tl.maximum(spread, 0.0).to(tl.float64), mask=own)
        tl.store(place + _OUTPUT * apart, tl.sum(tl.sum(outputs, axis=2), axis=0).to(tl.float64), mask=own)


@_kernel
def _merge(parts, counts, reals, runs, units, tile_runs: tl.constexpr, tile_units: tl.constexpr):
    """The runs of ``tile_units`` units, merged in float64: first what their mean is, then how far from it they are."""
    unit = tl.program_id(0).to(tl.int64) * tile_units + tl.arange(0, tile_units)
    own = unit < units
    apart = tl.cast(runs, tl.int64) * units
    seen = tl.zeros([tile_units], tl.float64)
    total = tl.zeros([tile_units], tl.float64)
    firings = tl.zeros([tile_units], tl.float64)
    not_finite = tl.zeros([tile_units], tl.float64)
    outputs = tl.zeros([tile_units], tl.float64)
    highest = tl.full([tile_units], -float("inf"), tl.float64)
    lowest = tl.full([tile_units], float("inf"), tl.float64)
    for first in range(0, runs, tile_runs):
        run = first + tl.arange(0, tile_runs)[:, None]
        here = (run < runs) & own[None, :]
        place = parts + run * units + unit[None, :]
        number = tl.load(place + _SEEN * apart, mask=here, other=0.0)
        total += tl.sum(number * tl.load(place + _MEAN * apart, mask=here, other=0.0), axis=0)
        seen += tl.sum(number, axis=0)
        firings += tl.sum(tl.load(place + _FIRED * apart, mask=here, other=0.0), axis=0)
        not_finite += tl.sum(tl.load(place + _NOT_FINITE * apart, mask=here, other=0.0), axis=0)
        outputs += tl.sum(tl.load(place + _OUTPUT * apart, mask=here, other=0.0), axis=0)
        highest = tl.maximum(highest, tl.max(tl.load(place + _MAX * apart, mask=here, other=-float("inf")), axis=0))
        lowest = tl.minimum(lowest, tl.min(tl.load(place + _MIN * apart, mask=here, other=float("inf")), axis=0))
    mean = total / tl.maximum(seen, 1.0)
    spread = tl.zeros([tile_units], tl.float64)
    for first in range(0, runs, tile_runs):
        run = first + tl.arange(0, tile_runs)[:, None]
        here = (run < runs) & own[None, :]
        place = parts + run * units + unit[None, :]
        number = tl.load(place + _SEEN * apart, mask=here, other=0.0)
        off = tl.load(place + _MEAN * apart, mask=here, other=0.0) - mean[None, :]
        spread += tl.sum(tl.load(place + _SPREAD * apart, mask=here, other=0.0) + number * off * off, axis=0)
    tl.store(counts + unit, seen.to(tl.int64), mask=own)
    tl.store(counts + units + unit, firings.to(tl.int64), mask=own)
    tl.store(counts + 2 * units + unit, not_finite.to(tl.int64), mask=own)
    tl.store(reals + unit, highest, mask=own)
    tl.store(reals + units + unit, lowest, mask=own)
    tl.store(reals + 2 * units + unit, mean, mask=own)
    tl.store(reals + 3 * units + unit, spread, mask=own)
    tl.store(reals + 4 * units + unit, outputs, mask=own)
