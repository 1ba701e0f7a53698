"""Recognising modes for models that are spread over processes: a forward that is not recognised goes on to its end.

Elsewhere it is broken off at the first unknown call. Here the other processes are in the same forward, and would wait
for this one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from relu_doctor.observe.forwards.calls import UnknownCallError, Watch
from relu_doctor.observe.forwards.recognising import RecognisingMode, TracingMode
from relu_doctor.observe.forwards.registry import Reading
from relu_doctor.observe.rectifiers.bends import Bend
from relu_doctor.observe.rectifiers.kinds import Rectifier


def recognising_mode(watch: Watch, reading: Reading, phase: str) -> RecognisingMode:
    """The fast mode for a model."""
    return (PatientMode if watch.in_company else RecognisingMode)(watch, reading, phase)


def tracing_mode(watch: Watch, reading: Reading, phase: str) -> TracingMode:
    """The mode that keeps pre-activations, for a model."""
    return (PatientTracingMode if watch.in_company else TracingMode)(watch, reading, phase)


class PatientMode(RecognisingMode):
    """Lets the forward go on after an unknown call; that it was one is told at the end."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except UnknownCallError:  # raised before the call was performed
            return func(*args, **(kwargs or {}))

    def before(self, name: str, rectifier: Rectifier, pre: Tensor, behind: Tensor | None = None) -> None:
        """Measure a call, unless the forward is not recognised any more."""
        try:
            if self.broken is None:
                super().before(name, rectifier, pre, behind)
        except UnknownCallError as error:
            self.note_error(error)

    def after(self, post: Any, fires: Tensor | None = None, bend: Bend | None = None) -> None:
        """Take in its output, unless the forward is not recognised any more."""
        if self.broken is None:
            super().after(post, fires, bend)


class PatientTracingMode(PatientMode, TracingMode):
    """The same, keeping pre-activations."""
