"""The fast kernel on CPUs: every statistic in one pass over memory, compiled by numba when it is first needed.

numba comes as a wheel and needs no compiler. The first use costs about two seconds; the compiled code is cached on disk
where that is possible. Plain torch gives the same numbers in several passes where numba is absent.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

MIN_ELEMENTS = 1 << 18  # below, compiled code saves less than starting it costs
_CHUNK = 1 << 19  # elements that are worth a thread of their own


@dataclass(frozen=True, slots=True)
class Reduced:
    """One pre-activation, reduced; per unit float64 or int64 (units,) but for ``fired``.

    Attributes:
        highest, lowest: extremes.
        total, squares: sum and sum of squares.
        positions_fired: positions in the firing interval.
        fired: bool (inputs, units): whether any position of the input fired the unit.
    """

    highest: Tensor
    lowest: Tensor
    total: Tensor
    squares: Tensor
    positions_fired: Tensor
    fired: Tensor


def reduce(pre: Tensor, low: float, high: float) -> Reduced | None:
    """Reduce (inputs, units, positions) in one pass.

    Args:
        pre: float32 or float64 on a CPU.
        low: lower edge of the open firing interval.
        high: its upper edge.

    Returns:
        ``None`` where the kernel does not apply or is not there, or where a value is not finite: then the plain path
        counts exactly.
    """
    if pre.device.type != "cpu" or pre.dtype not in {torch.float32, torch.float64} or pre.numel() < MIN_ELEMENTS:
        return None
    units_inner = pre.shape[2] > 1 and pre.stride(1) == 1
    memory = pre.transpose(1, 2) if units_inner else pre
    if pre.shape[2] == 1:
        units_inner, memory = True, pre.transpose(1, 2)
    kernels = _compiled() if memory.is_contiguous() else None
    if kernels is None:
        return None
    num_inputs, num_units, _ = pre.shape
    values = memory.detach().numpy()
    extremes = np.empty((2, num_units), dtype=values.dtype)
    sums = np.empty((2, num_units), dtype=np.float64)
    counts = np.empty(num_units, dtype=np.int64)
    fired = np.empty((num_inputs, num_units), dtype=np.uint8)
    edges = values.dtype.type(low), values.dtype.type(high)
    _in_threads(
        lambda start, stop: kernels[units_inner](values, *edges, start, stop, extremes, sums, counts, fired),
        num_units,
        pre.numel(),
    )
    if not np.isfinite(sums).all():
        return None
    return Reduced(
        highest=torch.from_numpy(extremes[0]).double(),
        lowest=torch.from_numpy(extremes[1]).double(),
        total=torch.from_numpy(sums[0]),
        squares=torch.from_numpy(sums[1]),
        positions_fired=torch.from_numpy(counts),
        fired=torch.from_numpy(fired).view(torch.bool),
    )


def _in_threads(work: Callable[[int, int], None], num_units: int, elements: int) -> None:
    """Deal the units to as many threads as torch uses; the kernels hold no interpreter lock."""
    threads = min(torch.get_num_threads(), num_units, max(elements // _CHUNK, 1))
    if threads == 1:
        work(0, num_units)
        return
    cuts = [num_units * part // threads for part in range(threads + 1)]
    pool = _pool(os.getpid(), threads)
    for done in [pool.submit(work, start, stop) for start, stop in pairwise(cuts)]:
        done.result()


@lru_cache(maxsize=4)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked child makes its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"relu_doctor-{process}")


@lru_cache(maxsize=1)
def _compiled() -> tuple[Any, Any] | None:
    """The kernels for units outside and units inside; ``None`` where numba cannot be had."""
    try:
        import numba
    except ImportError:
        return None
    # Sums may be reordered for speed; NaN and infinities must be seen, so no other liberty is taken.
    options: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "contract"}}
    kernels = []
    for kernel in (_positions_inside, _units_inside):
        try:
            kernels.append(numba.njit(cache=True, **options)(kernel))
        except RuntimeError:  # nowhere to keep a cache
            kernels.append(numba.njit(**options)(kernel))
    return kernels[0], kernels[1]


def _positions_inside(values, low, high, start, stop, extremes, sums, counts, fired):  # type: ignore[no-untyped-def]
    """Units from ``start`` to ``stop`` of (inputs, units, positions), contiguous."""
    num_inputs, _, num_positions = values.shape
    for unit in range(start, stop):
        unit_highest, unit_lowest = values[0, unit, 0], values[0, unit, 0]
        unit_total, unit_squares, unit_count = 0.0, 0.0, np.int64(0)
        for row in range(num_inputs):
            highest, lowest = unit_highest, unit_lowest
            total, squares, count = 0.0, 0.0, np.int32(0)
            for position in range(num_positions):
                value = values[row, unit, position]
                highest = max(highest, value)
                lowest = min(lowest, value)
                wide = np.float64(value)
                total += wide
                squares += wide * wide
                count += np.int32((value > low) & (value < high))
            unit_highest, unit_lowest = highest, lowest
            unit_total += total
            unit_squares += squares
            unit_count += count
            fired[row, unit] = count > 0
        extremes[0, unit], extremes[1, unit] = unit_highest, unit_lowest
        sums[0, unit], sums[1, unit], counts[unit] = unit_total, unit_squares, unit_count


def _units_inside(values, low, high, start, stop, extremes, sums, counts, fired):  # type: ignore[no-untyped-def]
    """Units from ``start`` to ``stop`` of (inputs, positions, units), contiguous.

    One short loop per statistic: a row stays in the cache, and each loop is simple enough to be vectorised.
    """
    num_inputs, num_positions, _ = values.shape
    highest, lowest = values[0, 0, start:stop].copy(), values[0, 0, start:stop].copy()
    total, squares = np.zeros(stop - start), np.zeros(stop - start)
    count, count_here = np.zeros(stop - start, np.int64), np.zeros(stop - start, np.int32)
    for row in range(num_inputs):
        count_here[:] = 0
        for position in range(num_positions):
            line = values[row, position, start:stop]
            for unit in range(stop - start):
                highest[unit] = max(highest[unit], line[unit])
            for unit in range(stop - start):
                lowest[unit] = min(lowest[unit], line[unit])
            for unit in range(stop - start):
                wide = np.float64(line[unit])
                total[unit] += wide
                squares[unit] += wide * wide
            for unit in range(stop - start):
                count_here[unit] += np.int32((line[unit] > low) & (line[unit] < high))
        for unit in range(stop - start):
            count[unit] += count_here[unit]
            fired[row, start + unit] = count_here[unit] > 0
    extremes[0, start:stop], extremes[1, start:stop] = highest, lowest
    sums[0, start:stop], sums[1, start:stop], counts[start:stop] = total, squares, count
