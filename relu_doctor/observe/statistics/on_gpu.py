"""Whether Triton's kernel takes a pre-activation, and what is done where it cannot: plain torch gives the same numbers.

Triton comes with torch's CUDA builds. It compiles when a kernel is first needed for a kind of layout, which costs a
second or so, and keeps the machine code on disk. It needs a C compiler on some systems; where anything keeps it from
working, that is tried once in a process, and plain torch is used from then on without a word: it is only slower.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from relu_doctor.observe.rectifiers.kinds import Rectifier
from relu_doctor.observe.statistics.stats import UnitStats

_TYPES = {torch.float32, torch.float16, torch.bfloat16}


@dataclass(slots=True)
class _Loops:
    """The kernel, and whether it has failed."""

    module: ModuleType
    fails: bool = False


def reduce(pre: Tensor, rectifier: Rectifier, valid: Tensor | None, *, least: bool) -> tuple[UnitStats, Tensor] | None:
    """Reduce a pre-activation that lies on a GPU, without waiting for it; ``None`` where the kernel does not apply.

    Args:
        pre: (inputs, units, positions), not empty.
        rectifier: decides what fires.
        valid: bool (inputs, positions), False for padding.
        least: only the maximum, non-finite inputs and what fired.

    Returns:
        As :func:`relu_doctor.observe.statistics.plain.reduce` does.
    """
    if pre.device.type != "cuda" or pre.dtype not in _TYPES or not _is_ordinary(pre):
        return None
    if valid is not None and (valid.device != pre.device or valid.dtype != torch.bool or not _is_ordinary(valid)):
        return None
    loops = _loops()
    if loops is None or loops.fails:
        return None
    dealt = loops.module.plan(tuple(pre.shape), pre.stride(), least=least)
    if dealt is None:
        return None
    try:
        reduced: tuple[UnitStats, Tensor] = loops.module.reduce(
            pre, rectifier.low, rectifier.high, valid, dealt, least=least
        )
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: BLE001  # Triton raises anything: no compiler, an old GPU, a driver that it does not know
        loops.fails = True
        return None
    return reduced


def _is_ordinary(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.layout is torch.strided


@lru_cache(maxsize=1)
def _loops() -> _Loops | None:
    """The kernel; ``None`` where Triton cannot be had."""
    try:
        from relu_doctor.observe.statistics import triton_loops
    except Exception:  # noqa: BLE001  # a broken or misfit Triton raises anything
        return None
    return _Loops(triton_loops)
