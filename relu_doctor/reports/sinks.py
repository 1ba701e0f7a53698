"""Sinks: who takes a monitor's windows beside its history; those that a string names are opened here.

``tensorboard:DIR`` writes event files, ``jsonl:FILE`` a line of JSON per window.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from relu_doctor.errors import ConfigError, MonitorWarning
from relu_doctor.reports.json_lines import JsonLinesSink
from relu_doctor.reports.tensorboard import TensorBoardSink
from relu_doctor.text import clean_text, closest_name

if TYPE_CHECKING:
    from relu_doctor.training.windows import Window

Sink = Callable[["Window"], object]


class _Opened(Protocol):
    """A sink that is opened for a target, and closed."""

    def __call__(self, window: Window) -> None: ...

    def close(self) -> None: ...


_KINDS: Mapping[str, tuple[str, Callable[[str], _Opened]]] = {  # what its target is, and what opens it
    "tensorboard": ("DIR", TensorBoardSink),
    "jsonl": ("FILE", JsonLinesSink),
}


class Sinks:
    """The sinks of one monitor.

    Args:
        given: functions that take a :class:`~relu_doctor.training.windows.Window`, and strings ``kind:target``; one
            may be given by itself.
        reports: windows are handed out in this process; in others nothing is opened.

    Raises:
        ConfigError: one of them is neither, a kind is unknown, or a target is empty.
        OutputError: a target cannot be written to.
    """

    def __init__(self, given: Sink | str | Iterable[Sink | str], *, reports: bool = True) -> None:
        planned = [(each, _planned(each)) for each in several(given)]
        self._sinks: list[tuple[str, Sink]] = []
        self._own: list[tuple[str, _Opened]] = []
        try:
            for each, plan in planned if reports else ():
                self._add(each, plan)
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[tuple[str, Sink]]:
        """Each with its name, for messages."""
        return iter(self._sinks)

    def close(self) -> None:
        """Close those that were opened here; one that cannot be is told of by a warning. Safe to call twice."""
        own, self._own = self._own, []
        for name, sink in own:
            try:
                sink.close()
            except Exception as error:  # noqa: BLE001  the others, and the run, must be closed all the same
                told = f"{name} raised {type(error).__name__} when it was closed: {error}."
                warnings.warn(told, MonitorWarning, stacklevel=2)

    def _add(self, each: Any, plan: tuple[Callable[[str], _Opened], str] | None) -> None:
        if plan is None:
            name = getattr(each, "__name__", type(each).__name__)
            self._sinks.append((f"the sink {name}", each))
            return
        opener, target = plan
        opened = opener(target)
        name = f"the sink {clean_text(each)}"
        self._sinks.append((name, opened))
        self._own.append((name, opened))


def several(given: object) -> tuple[Any, ...]:
    """What ``sinks=`` was given, one by one."""
    if isinstance(given, Iterable) and not isinstance(given, str) and not callable(given):
        return tuple(given)
    return (given,)


def _planned(given: object) -> tuple[Callable[[str], _Opened], str] | None:
    """What opens the sink that a string names, and its target; ``None`` for a function."""
    forms = " or ".join(f"'{kind}:{target}'" for kind, (target, _) in _KINDS.items())
    if callable(given):
        return None
    if not isinstance(given, str):
        raise ConfigError(f"sinks= expects functions that take a Window, {forms}, found {type(given).__name__}.")
    kind, _, target = given.partition(":")
    if kind not in _KINDS:
        near = closest_name(kind, list(_KINDS))
        hint = f"; did you mean {near!r}?" if near else "."
        raise ConfigError(f"a sink is {forms}, found {clean_text(given)!r}, whose kind is not known{hint}")
    if not target.strip():
        raise ConfigError(f"the sink {clean_text(given)!r} has no target; name it as '{kind}:{_KINDS[kind][0]}'.")
    return _KINDS[kind][1], target
