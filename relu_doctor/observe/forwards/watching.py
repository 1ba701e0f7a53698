"""What every watching mode is: blind to its own work, asleep for that of others, not to be talked out of an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


class Caller:
    """Performs the model's own calls, and remembers what they raised.

    Attributes:
        raised: identity of the last exception that came out of a call of the model's; the others are ours.
    """

    __slots__ = ("raised",)

    def __init__(self) -> None:
        self.raised = 0

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Perform a call, which the user's own function modes and tensor classes are to see."""
        try:
            with torch._C._EnableTorchFunction():
                return func(*args, **kwargs)
        except Exception as error:
            self.raised = id(error)
            raise


class WatchingMode(TorchFunctionMode):
    """Hands each torch call of a model to :meth:`see`, and nothing else.

    What is done to look at a call is itself made of torch calls: neither other probes nor modes of the user's own see
    those, so that a default device or a second probe changes nothing.

    Attributes:
        asleep: how many others are at work in the middle of the forward (a scan that a hook makes); not looked at.
        broken: what was raised in looking at the forward. Nothing more of it is looked at, and a model that catches
            the error and takes another path does not pass for one that was observed.
        below: the call that is being looked at was seen at the dispatcher.
        caller: performs the model's own calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asleep = 0
        self.broken: Exception | None = None
        self.below = False
        self.caller = Caller()

    @property
    def is_blind(self) -> bool:
        """Whether calls are let through without a look; so is what a checkpoint computes again for the backward."""
        return bool(self.asleep) or self.broken is not None or torch._C._current_graph_task_id() != -1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.is_blind:
            return func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            try:
                return self.see(func, types, args, kwargs or {})
            except Exception as error:
                self.note_error(error)
                raise

    def see(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Look at a call and perform it."""
        raise NotImplementedError

    def perform(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Perform any torch call of the model's."""
        if self.below:  # all function modes have had it
            return func(*args, **kwargs)
        return self.caller(func, args, kwargs)

    def note_error(self, error: Exception) -> None:
        """Remember an error, unless it is the model's own."""
        if id(error) != self.caller.raised and self.broken is None:
            self.broken = error

    def raise_broken(self) -> None:
        """Raise what broke the forward off, if anything did; it is forgotten, since it holds on to all frames.

        Raises:
            Exception: the first error in looking at the forward.
        """
        error, self.broken = self.broken, None
        try:
            if error is not None:
                raise error from None
        finally:
            del error

    @contextmanager
    def own_work(self) -> Iterator[None]:
        """Look at something outside of a torch call, in a hook."""
        with aside():
            try:
                yield
            except Exception as error:
                self.note_error(error)
                raise


@contextmanager
def sleeping(modes: list[WatchingMode]) -> Iterator[None]:
    """Let modes sleep: what is done within is no call of the model that they watch."""
    for mode in modes:
        mode.asleep += 1
    try:
        yield
    finally:
        for mode in modes:
            mode.asleep -= 1


@contextmanager
def aside() -> Iterator[None]:
    """Let no mode see what is done within: it is work of ours in the middle of a forward."""
    with torch._C.DisableTorchFunction(), sleeping(awake()):
        yield


def awake() -> list[WatchingMode]:
    """The modes that would see torch calls of this thread, of functions or handed on by a mode of operators."""
    behind = [getattr(mode, "mode", None) for mode in _get_current_dispatch_mode_stack()]
    found = [mode for mode in (*_get_current_function_mode_stack(), *behind) if isinstance(mode, WatchingMode)]
    return list(dict.fromkeys(found))
