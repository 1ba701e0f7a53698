"""LenientMode: watches a forward that is somebody's training step, and must go on whatever we make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

from relu_doctor.observe.forwards.calls import Watch
from relu_doctor.observe.forwards.dispatch import OPERATORS, OperatorMode, function_of
from relu_doctor.observe.forwards.recognising import RecognisingMode
from relu_doctor.observe.forwards.registry import Reading
from relu_doctor.observe.forwards.watching import aside
from relu_doctor.observe.models.scripted import unoptimized
from relu_doctor.observe.rectifiers.bends import Bend
from relu_doctor.observe.rectifiers.kinds import Rectifier


class LenientMode(RecognisingMode):
    """Recognises calls; an unknown call, or an error of ours, ends the looking and not the forward.

    Each of the model's own calls is performed exactly once, also where looking at it went wrong half-way.
    """

    def __init__(self, watch: Watch, reading: Reading, phase: str) -> None:
        super().__init__(watch, reading, phase)
        self._done: Any = None  # the call that was performed last on this level, and its result

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outer, self._done = self._done, None
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except Exception as error:
            if id(error) == self.caller.raised:
                raise
            done = self._done
            if done is not None and (done[0] is func or (isinstance(func, OPERATORS) and done[0] is function_of(func))):
                return done[1]
            return func(*args, **(kwargs or {}))
        finally:
            self._done = outer

    def perform(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Perform a call, and remember that it was."""
        result = super().perform(func, args, kwargs)
        self._done = func, result
        return result

    def enter(self, rectifier: Rectifier, pre: Tensor, behind: Tensor | None = None, name: str = "") -> None:
        """Measure a call, unless the forward is not looked at any more; also from a module's hook."""
        self._guarded(super().enter, rectifier, pre, behind, name)

    def leave(self, post: Any, fires: Tensor | None = None, bend: Bend | None = None) -> None:
        """Take in its output, unless the forward is not looked at any more."""
        self._guarded(super().leave, post, fires, bend)

    @contextmanager
    def own_work(self) -> Iterator[None]:
        """Look at something outside of a torch call, in a hook."""
        with aside():
            try:
                yield
            except Exception as error:  # noqa: BLE001  as in _guarded
                self.note_error(error)

    def _guarded(self, look: Any, *args: Any) -> None:
        if self.broken is None:
            try:
                look(*args)
            except Exception as error:  # noqa: BLE001  whatever it is, it must not reach the user's training
                self.note_error(error)


class LiveForward:
    """A forward of somebody else's, followed from its beginning to its end.

    Args:
        mode: that looks at it.
        leave: takes in what it saw; returns what was raised in looking at it.
        below: rectifiers are called where only the dispatcher sees them.
    """

    def __init__(self, mode: LenientMode, leave: Callable[[LenientMode], Exception | None], *, below: bool) -> None:
        self._leave = leave
        self._stack = ExitStack()
        self._mode: LenientMode | None = mode
        self._stack.enter_context(mode)
        if below:
            self._stack.enter_context(unoptimized())
            self._stack.enter_context(OperatorMode(mode, opens=False))

    def end(self) -> Exception | None:
        """It has returned.

        Returns:
            What kept it from being counted: :class:`UnknownCallError` where it made a call that is not known yet.
        """
        mode = self.drop()
        return None if mode is None else self._leave(mode)

    def drop(self) -> LenientMode | None:
        """Look at it no more, however it ended; safe to call twice."""
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.asleep += 1  # where a mode that was entered after ours is still there, ours cannot be taken away
            if mode in _get_current_function_mode_stack()[-1:] or mode.below:
                self._stack.close()
        return mode
