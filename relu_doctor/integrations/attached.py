"""Attachment: what the adapters share. A monitor for as long as a framework trains, and what it leaves for the next."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict

from torch import nn
from torch.optim import Optimizer

from relu_doctor.config import Config
from relu_doctor.errors import MonitorError, MonitorWarning
from relu_doctor.observe.rectifiers.custom import Custom
from relu_doctor.reports.sinks import Sink, several
from relu_doctor.reports.tensorboard import TensorBoardSink
from relu_doctor.training.history import History
from relu_doctor.training.monitor import Monitor
from relu_doctor.training.windows import Alert


def needed(framework: str, extra: str) -> ModuleNotFoundError:
    """What to say where a framework is not installed."""
    return ModuleNotFoundError(
        f"relu_doctor.integrations.{framework} needs {framework}, which is not installed: "
        f"pip install 'relu-doctor[{extra}]'."
    )


class Options(TypedDict, total=False):
    """What the adapters pass on to their :class:`~relu_doctor.Monitor`, which documents it."""

    every: int
    window: int
    reference: Iterable[Any] | None
    history: str | Path | History | None
    sinks: Sink | str | Iterable[Sink | str]
    on_alert: Callable[[Alert], object] | None
    config: Config | Mapping[str, Any] | str | Path | None
    rectifiers: Custom
    effective_rank: bool
    maturity: int


class Attachment:
    """One monitor at a time.

    Args:
        options: of the monitors.

    Attributes:
        monitor: the latest; it stays to be read when it is closed, and is ``None`` before the first.

    Raises:
        TypeError: a monitor has no such option.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        unknown = sorted(options.keys() - Options.__annotations__.keys())
        if unknown:
            raise TypeError(f"expected {', '.join(Options.__annotations__)}, found {', '.join(unknown)}.")
        self.monitor: Monitor | None = None
        self._options = dict(options)
        self._boards: tuple[TensorBoardSink, ...] = ()

    def begin(
        self,
        model: nn.Module,
        optimizers: Iterable[Optimizer],
        *,
        step: int,
        saved: Mapping[str, Any] | None = None,
        parts: bool = False,
        boards: Iterable[TensorBoardSink] = (),
    ) -> Monitor:
        """Attach a monitor; one that is still attached, since a run before was cut short, is closed.

        Args:
            model: that is trained.
            optimizers: of it.
            step: updates that were made before.
            saved: the state of a monitor, to go on from.
            parts: as of the monitor.
            boards: further sinks, on writers of the framework's; they are closed with the monitor.
        """
        self.abandon("another run began")
        start = step if saved is None else int(saved.get("step", step))
        self._boards = tuple(boards)
        options = {**self._options, "sinks": (*several(self._options.get("sinks", ())), *self._boards)}
        self.monitor = Monitor(model, optimizer=list(optimizers), start_step=start, parts=parts, **options)
        if saved is not None:
            try:
                self.monitor.load_state_dict(saved)
            except MonitorError as error:
                warnings.warn(f"the evidence begins anew at step {start:,}: {error}", MonitorWarning, stacklevel=2)
        return self.monitor

    def end(self, reason: str) -> bool:
        """Close the monitor, if there is one; true where that has closed a window."""
        if self.monitor is None:
            return False
        before = self.monitor.windows
        self.monitor.close(reason)
        self._close_boards()
        return self.monitor.windows > before

    def abandon(self, reason: str) -> None:
        """Close the monitor of a run that was cut short, without waiting for other ranks."""
        if self.monitor is not None:
            self.monitor._close(reason, broken=True)
        self._close_boards()

    def _close_boards(self) -> None:
        boards, self._boards = self._boards, ()
        for board in boards:
            try:
                board.close()
            except Exception as error:  # noqa: BLE001  a full disk must not end a training run
                message = f"TensorBoard's writer raised {type(error).__name__} at the close: {error}"
                warnings.warn(message, MonitorWarning, stacklevel=2)

    def state(self) -> dict[str, Any] | None:
        """Of the monitor, where there is one."""
        return None if self.monitor is None else self.monitor.state_dict()

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or what another process is sent, has the options and no monitor."""
        return {"monitor": None, "_options": self._options, "_boards": ()}

    def __del__(self) -> None:
        if getattr(self, "monitor", None) is not None:
            with suppress(Exception):  # there is nobody left to tell
                self.abandon("abandoned")
