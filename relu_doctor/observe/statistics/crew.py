"""Threads that work on one job together: torch's own, where they can be had, or ours."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Team:
    """Threads.

    Attributes:
        run: calls compiled code from them: address of the function, address of what it works on, how many.
        numbering: address of a function, int (void), that numbers them as torch's own loops do; 0 where there is none.
    """

    run: Callable[[int, int, int], None]
    numbering: int = 0


def run_together(function: int, job: int, threads: int) -> None:
    """Call compiled code from several threads at once, and wait until all have returned.

    Args:
        function: address of a void (void*) that holds no interpreter lock and shares out the work by itself.
        job: the address that it is called with.
        threads: how many; it is called from this one too, and may be called from fewer.
    """
    if threads < 2 or os.getpid() != _HOME:  # a forked child has none of its parent's threads
        _callable(function)(job)
    else:
        _team().run(function, job, threads)


def numbering() -> int:
    """Address of a function, int (void), that numbers the threads as torch's own loops do; 0 where there is none."""
    return _team().numbering


_HOME = os.getpid()


@lru_cache(maxsize=16)
def _callable(function: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)


@lru_cache(maxsize=1)
def _team() -> Team:
    return _torchs_team() or _own_team()


def _torchs_team() -> Team | None:
    """Torch's own threads: they spin for some milliseconds after each of its calls, in the way of any others."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        try:
            library = ctypes.CDLL(str(path))
            parallel, numbering = library.GOMP_parallel, ctypes.cast(library.omp_get_thread_num, ctypes.c_void_p)
        except (OSError, AttributeError):
            continue
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        return Team(partial(_in_parallel, parallel), numbering.value or 0)
    return None


def _in_parallel(parallel: Any, function: int, job: int, threads: int) -> None:
    parallel(function, job, threads, 0)


def _own_team() -> Team:
    pool = ThreadPoolExecutor(max(os.cpu_count() or 2, 2) - 1, thread_name_prefix="relu_doctor")

    def run(function: int, job: int, threads: int) -> None:
        work = _callable(function)
        others = [pool.submit(work, job) for _ in range(threads - 1)]
        work(job)
        for other in others:
            if not other.cancel():  # one that has not begun would find nothing left to do
                other.result()

    return Team(run)
