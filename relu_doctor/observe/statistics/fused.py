"""The fast kernel on CPUs: every statistic in one pass over memory, compiled by numba when it is first needed.

numba comes as a wheel and needs no compiler. Its first use costs some seconds; the machine code is then kept on disk
where that is possible. Plain torch gives the same numbers where numba is absent.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from relu_doctor.observe.rectifiers.kinds import Rectifier
from relu_doctor.observe.statistics.crew import numbering, run_together
from relu_doctor.observe.statistics.tally import Array, Tally

LANES = 16
LARGE = 1 << 18  # values in one call that are worth loading numba for
_SHARE = 1 << 16  # values that are worth a thread of their own
_RESULTS = 256  # values of one unit that are worth results of their own
_ENCODINGS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


@dataclass(frozen=True, slots=True)
class Geometry:
    """How (inputs, units, positions) lie in memory.

    Attributes:
        shape, strides: of the three axes.
        encoding: how values are written.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    encoding: int


def geometry_of(arranged: Tensor) -> Geometry | None:
    """How a tensor (inputs, units, positions) lies in memory; ``None`` where the loops do not apply.

    Args:
        arranged: an ordinary floating tensor in this machine's memory, or one without memory that stands for it.
    """
    ordinary = type(arranged) is Tensor and arranged.layout is torch.strided
    if not ordinary or arranged.device.type not in {"cpu", "meta"} or arranged.dtype not in _ENCODINGS:
        return None
    if not arranged.numel() or _compiled() is None:
        return None
    return Geometry(tuple(arranged.shape), arranged.stride(), _ENCODINGS[arranged.dtype])


def _loop(geometry: Geometry, *, padded: bool) -> str:
    """Which of the compiled loops suits."""
    (_, _, positions), (_, along_units, along_positions) = geometry.shape, geometry.strides
    if along_units == 1 and (positions == 1 or along_positions != 1 or padded):
        return "inputs" if positions == 1 else "lines"
    extent = 1 + sum((length - 1) * stride for length, stride in zip(geometry.shape, geometry.strides, strict=True))
    return "rows" if along_positions == 1 and not padded and extent >= LANES else "exact"


def reduce(memory: int, geometry: Geometry, rectifier: Rectifier, valid: Tensor | None, *, least: bool) -> Tally:
    """Reduce a pre-activation in one pass.

    Args:
        memory: address of its first value.
        geometry: how it lies there.
        rectifier: decides what fires, and whether the output's statistics follow.
        valid: bool (inputs, positions), False for padding.
        least: only the maximum, non-finite inputs and what fired.
    """
    compiled = _compiled()
    assert compiled is not None  # the geometry says so
    low, high = rectifier.low, rectifier.high
    inputs, units, positions = geometry.shape
    few, least = least, least and high == np.inf  # where the interval is closed above, maxima do not tell what fired
    marks = None if valid is None or bool(valid.all()) else np.ascontiguousarray(valid.numpy()).view(np.uint8)
    loop = _loop(geometry, padded=marks is not None)
    threads = max(1, min(torch.get_num_threads(), inputs * units * positions // _SHARE))
    spills = loop not in {"rows", "exact"} and units < LANES  # marks are written beyond each input's own
    most = 1 if spills else max(1, min(threads, inputs * positions // _RESULTS))
    rows = -(-inputs // most)  # as torch's own loops share out memory
    jobs = -(-inputs // rows)
    shares = 1 if threads == 1 else 4 if loop == "rows" else -(-threads // jobs)  # a line is best read in few pieces
    share = units if shares == 1 else max(16, -(-units // (shares * 16)) * 16)
    kinds, to_do = compiled.LEAST_ROWS if least else compiled.ROWS, compiled.HEAD + jobs * compiled.JOB
    size = inputs * units + compiled.LANES  # the last bytes may be written to, and are not read
    fired = np.empty(size, np.uint8)[: inputs * units].reshape(inputs, units)
    numbers = np.empty(to_do + jobs * kinds * units, np.int64)
    plan, results, here = numbers[:to_do], numbers[to_do:].reshape(jobs, kinds, units), _address(numbers)
    plan[compiled.HEAD :] = 0
    plan[: compiled.LOW] = (
        0, here, numbering(), threads, jobs, memory, inputs, units, positions, *geometry.strides, rows, share, least,
        0 if marks is None else _address(marks), here + 8 * to_do, _address(fired),
    )  # fmt: skip
    plan.view(np.float64)[compiled.LOW : compiled.HEAD] = low, high
    plain = least or (low >= 0 and high == np.inf)
    unsound = loop == "exact"
    if unsound:
        results[:, compiled.NOT_FINITE] = compiled.UNSOUND
    else:
        run_together(_worker(loop, geometry.encoding, least=least, plain=plain), here, threads)
        unsound = bool(plan[compiled.HEAD + compiled.UNSOUND_UNITS :: compiled.JOB].any())
    if unsound:
        plan[compiled.CAME] = plan[compiled.HEAD + compiled.TAKEN :: compiled.JOB] = 0
        run_together(_worker("exact", geometry.encoding, least=False, plain=False), here, threads)
    if jobs > 1:
        run_together(compiled.join, here, 1)
    results = results[0].copy()
    if not rectifier.clips and not least:
        results[compiled.OUTPUT] = 0
    if few and not least:
        results = results[: compiled.LEAST_ROWS].copy()
        np.minimum(results[compiled.NOT_FINITE], inputs, out=results[compiled.NOT_FINITE])
    seen = None if marks is None else np.any(marks, 1)
    if seen is not None:
        fired[~seen] = 0
    return Tally(results, fired, seen, geometry.encoding == compiled.DOUBLE)


def _address(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


@lru_cache(maxsize=64)
def _worker(loop: str, encoding: int, *, least: bool, plain: bool) -> int:
    compiled = _compiled()
    assert compiled is not None
    address: int = compiled.worker(loop, encoding, least=least, plain=plain)
    return address


@lru_cache(maxsize=1)
def _compiled() -> ModuleType | None:
    """The loops; ``None`` where numba cannot be had."""
    try:
        import numba

        from relu_doctor.observe.statistics import compiled
    except Exception:  # noqa: BLE001  # a broken or misfit numba raises anything; torch alone gives the same numbers
        return None
    return None if numba.config.DISABLE_JIT else compiled  # type: ignore[attr-defined]
