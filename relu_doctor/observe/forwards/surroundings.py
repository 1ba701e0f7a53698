"""What a scan finds around it in the process and leaves so: random states, modes, other scans of the same model."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn, overrides
from torch._C._autograd import _pop_saved_tensors_default_hooks, _top_saved_tensors_default_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _python_dispatch as python_dispatch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from relu_doctor.errors import UnsupportedModelError
from relu_doctor.observe.forwards.dispatch import OperatorMode
from relu_doctor.observe.forwards.watching import WatchingMode, awake, sleeping

Restore = Callable[[], object]


def alone(model: nn.Module) -> AbstractContextManager[None]:
    """Wait until no other thread scans any of a model's modules, and let others wait.

    Raises:
        UnsupportedModelError: this thread is in a scan already, for which the other thread may be waiting.
    """
    return _SCANS.alone(model)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Scan a model in the middle of anything: of its training, of another scan, beside other threads, under any mode.

    Within it no function mode sees torch calls: those of the model's own code are to be made under
    ``torch._C._EnableTorchFunction()``.
    """
    with _kept_modes(), sleeping(awake()), _RANDOM_NUMBERS.preserved(), _own_generators(model):
        try:
            with torch._C.DisableTorchFunction():
                yield
        finally:
            torch.clear_autocast_cache()  # weights that were cast here have no graph that leads back to them


@contextmanager
def firmly(*contexts: AbstractContextManager[object]) -> Iterator[None]:
    """Enter and leave contexts to their end: an interrupt in the midst of it is heard when that is done."""
    with ExitStack() as stack:
        with _deaf():
            for context in contexts:
                stack.enter_context(context)
        try:
            yield
        finally:
            with _deaf():
                stack.close()


@contextmanager
def _deaf() -> Iterator[None]:
    """Put off interrupts from the keyboard; only the main thread hears them."""
    heard: list[tuple[int, FrameType | None]] = []
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: heard.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        for number, frame in heard[:1]:
            handler(number, frame)


@contextmanager
def _kept_modes() -> Iterator[None]:
    """Leave the modes of this thread as they were, wherever an interrupt comes."""
    functions, operators = len(_get_current_function_mode_stack()), len(_get_current_dispatch_mode_stack())
    gradients, hooks = torch.is_grad_enabled(), _top_saved_tensors_default_hooks(True)
    optimised: bool = torch._C._get_graph_executor_optimize()
    try:
        yield
    finally:
        torch._C._set_graph_executor_optimize(optimised)
        with torch._C.DisableTorchFunction():
            torch.set_grad_enabled(gradients)
        while _top_saved_tensors_default_hooks(True) not in (None, hooks):
            _pop_saved_tensors_default_hooks()
        while len(modes := _get_current_dispatch_mode_stack()) > operators and isinstance(modes[-1], OperatorMode):
            python_dispatch._pop_mode()
        while len(modes := _get_current_function_mode_stack()) > functions and isinstance(modes[-1], WatchingMode):
            overrides._pop_mode()


class _Scans:
    """The scans that are going on in this process: of one module there is one at a time, or several in each other."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: list[tuple[int, int, frozenset[int]]] = []  # process, thread, modules

    @contextmanager
    def alone(self, model: nn.Module) -> Iterator[None]:
        """Wait until no other thread scans any of a model's modules."""
        scan = os.getpid(), threading.get_ident(), frozenset(map(id, model.modules()))
        with self._changed:
            while self._is_scanned_elsewhere(scan):
                if any(held[:2] == scan[:2] for held in self._held):
                    raise UnsupportedModelError(
                        f"{type(model).__name__} is being scanned by another thread, which this scan inside of a scan "
                        "cannot wait for; scan it after the other."
                    )
                self._changed.wait()
            self._held.append(scan)
        try:
            yield
        finally:
            with self._changed:
                self._held.remove(scan)
                self._changed.notify_all()

    def _is_scanned_elsewhere(self, scan: tuple[int, int, frozenset[int]]) -> bool:
        process, thread, modules = scan
        return any(held[0] == process and held[1] != thread and held[2] & modules for held in self._held)


class _RandomNumbers:
    """Random states, which all threads share: the last of several scans leaves them as the first found them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._within = 0
        self._first: Restore | None = None

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Restore the random states of torch on every device in use, of numpy and of Python."""
        restore = _keep_random_states()
        with self._lock:
            self._within += 1
            if self._within == 1:
                self._first = restore
        try:
            yield
        finally:
            with self._lock:
                self._within -= 1
                if not self._within and self._first is not None:
                    restore, self._first = self._first, None
            restore()


def _keep_random_states() -> Restore:
    cpu = torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002 the user's global state

    def restore() -> None:
        torch.set_rng_state(cpu)
        for index, state in enumerate(devices):
            torch.cuda.set_rng_state(state, index)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)

    return restore


@contextmanager
def _own_generators(model: nn.Module) -> Iterator[None]:
    """Restore the generators of random numbers that modules hold."""
    kept = [keep for module in model.modules() for value in vars(module).values() if (keep := _keep_generator(value))]
    try:
        yield
    finally:
        for restore in kept:
            restore()


def _keep_generator(value: Any) -> Restore | None:
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state)
    if isinstance(value, np.random.Generator):
        bits: Any = value.bit_generator
        numbers = bits.state
        return lambda: setattr(bits, "state", numbers)
    if isinstance(value, random.Random):
        numbers = value.getstate()
        return lambda: value.setstate(numbers)
    return None


_SCANS = _Scans()
_RANDOM_NUMBERS = _RandomNumbers()
