"""The sink that writes diagnoses and a monitor's windows for TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from relu_doctor.errors import ConfigError, OutputError
from relu_doctor.reports.frames import Frame
from relu_doctor.reports.scalars import ALL
from relu_doctor.reports.tensorboard.files import BorrowedWriter, EventFile, Events
from relu_doctor.reports.tensorboard.hparams import METRICS, Settings, Value
from relu_doctor.reports.tensorboard.markdown import findings_markdown, verdict_markdown
from relu_doctor.reports.tensorboard.numbers import LAYOUT, Numbers
from relu_doctor.reports.tensorboard.past import Past
from relu_doctor.reports.tensorboard.pictures import picture_of_units, picture_over_time
from relu_doctor.reports.tensorboard.values import layout, picture, records, session, text
from relu_doctor.text import clean_text

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard import SummaryWriter

    from relu_doctor.diagnose.diagnosis import Diagnosis
    from relu_doctor.training.windows import Window

_DETAILS = ("worst", "all")


class TensorBoardSink:
    """Writes diagnoses and windows as events that TensorBoard shows. A context manager; closing twice is fine.

    It is a sink of a :class:`~relu_doctor.Monitor`, which opens one itself for ``sinks=["tensorboard:runs/exp1"]``.

    Per diagnosis, or window at its last step:

    * scalars, at most 40 tags in a run: under ``relu_doctor/`` the ``dead_fraction``, ``unproven_fraction``,
      ``rare_fraction``, ``dormant_fraction`` and ``non_finite_fraction`` of all units, ``deaths`` and ``revivals`` in
      the window, the largest ``update_ratio``, ``loss``, ``grad_norm``, up to eight learning rates ``lr``, ``lr/1`` …,
      and the ends of the often-cited band of 20–50 %; and ``relu_doctor_sites/<site>/dead_fraction`` of the worst
      sites. Those are all, where at most twelve can die. Else a site comes in when it has dead units and is among the
      twelve worst of a window: the first twelve at once, up to eight later ones when their dead fraction reaches the
      profile's ``mild_fraction``. One that came in stays in to the end. A fraction is NaN, which is drawn as a gap,
      where nothing is known of the units,
    * histograms: the log10 of the firing rates of all units, and of the first six of the worst sites these and the
      highest pre-activations,
    * verdict and findings as text, where there is another finding than before, and at the close; the name of a site
      leads to it in the tab *ReLU Doctor*,
    * the records of the tab *ReLU Doctor*.

    With the first one comes a layout for the tab *Custom Scalars*, and at the close pictures of the units by status,
    and the settings of the run for the tab *HParams*: the largest learning rate of the first parameter group, and the
    classes of model and optimizer where they are known.

    Files of its own are written by a thread, so that a run does not wait for the disk; what that thread could not write
    is told with the next window, or at the close. A run that is resumed in a directory where nobody else writes takes
    the place of what was written there from its first step on, and so do scans that are written again. Two sinks that
    are open in one directory are warned of, and neither takes the other's place: give each run a directory of its own.

    Args:
        target: a directory, which is made where it is missing; or an open ``SummaryWriter`` of
            ``torch.utils.tensorboard``, which is written to and not closed.
        detail: ``"all"`` tells of every site beside the worst: a group of tags per number, in it the sites in forward
            order, as ``relu_doctor_sites_dead_fraction/003_layer1.relu``.
        scalars: whether scalars, the layout and HParams are written; ``False`` where a framework's logger has them.
        hparams: further settings of the run for the tab *HParams*; ``False`` writes none.

    Raises:
        OutputError: the directory cannot be written to.
        ConfigError: an argument is none of these.

    Example:
        >>> with TensorBoardSink("runs/scan") as sink:  # doctest: +SKIP
        ...     sink.write(diagnosis, step=1200)
    """

    def __init__(
        self,
        target: str | Path | SummaryWriter,
        *,
        detail: Literal["worst", "all"] = "worst",
        scalars: bool = True,
        hparams: Mapping[str, Value] | bool = True,
    ) -> None:
        if detail not in _DETAILS:
            raise ConfigError(f"detail= expects 'worst' or 'all', found {clean_text(repr(detail))}.")
        self._scalars = scalars
        self._numbers = Numbers(every_site=detail == "all")
        self._settings = Settings(hparams if isinstance(hparams, Mapping) else {})
        self._compares = scalars and hparams is not False
        self._past = Past()
        self._said: object = None  # the findings that were written last,
        self._said_of: Frame | None = None  # and with which window
        self._last: tuple[Frame, Diagnosis] | None = None
        self._told = False  # that something could not be written
        self._events: Events | None = _open(target)

    def write(self, diagnosis: Diagnosis, step: int) -> None:
        """Write one diagnosis at a training step, a whole number, and wait until it is written.

        Raises:
            ConfigError: ``step`` is no whole number.
            OutputError: the event file cannot be written.
            ValueError: the sink is closed.
        """
        events = self._opened()
        try:
            place = index(step)
        except TypeError as error:
            raise ConfigError(
                f"step= expects a whole number, found {clean_text(repr(step))}; give the training step that the "
                "diagnosis is of."
            ) from error
        self._settings.saw_scan(diagnosis)
        self._take_place(events, place)
        self._add(events, Frame.of_diagnosis(diagnosis, place), diagnosis, time.time())
        events.settle()

    def __call__(self, window: Window) -> None:
        """Write one window at its last step.

        Raises:
            OutputError: this window or an earlier one cannot be written.
            ValueError: the sink is closed.
        """
        events = self._opened()
        self._settings.saw_rate(window.numbers.get("lr"))
        self._settings.saw(window.about)
        try:
            self._take_place(events, window.first_step)
            self._add(events, Frame.of_window(window), window.diagnosis, window.closed)
        except OutputError:
            self._told = True
            raise

    def close(self) -> None:
        """Write what is written once, and finish the event file; a ``SummaryWriter`` that was given stays open.

        Raises:
            OutputError: it cannot be written, and that was not told before.
        """
        events, self._events = self._events, None
        if events is None:
            return
        try:
            try:
                if self._last is not None:
                    frame, diagnosis = self._last
                    _write(events, self._closing(frame, diagnosis), int(frame.span["last_step"] or 0), time.time())
            finally:
                events.close()
        except OutputError:
            if not self._told:
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _opened(self) -> Events:
        if self._events is None:
            raise ValueError("expected an open TensorBoardSink, found a closed one; write inside its with block.")
        return self._events

    def _take_place(self, events: Events, step: int) -> None:
        """With the first thing that is written: of what was written by earlier sinks, from its step on."""
        if self._last is None and isinstance(events, EventFile) and events.is_alone and events.has_earlier:
            events.add(_restart(step))

    def _add(self, events: Events, frame: Frame, diagnosis: Diagnosis, when: float) -> None:
        worst = self._numbers.meet(frame, diagnosis)
        values = [layout(LAYOUT)] if self._scalars and self._last is None else []
        self._last = frame, diagnosis
        self._past.add(frame)
        values += self._numbers.scalars(frame, worst) if self._scalars else ()
        values += self._numbers.histograms(frame, diagnosis, worst)
        said = [(each["code"], each["site"]) for each in frame.findings]
        values += self._texts(frame, diagnosis) if said != self._said else ()
        self._said = said
        _write(events, [*values, *records(frame)], int(frame.span["last_step"] or 0), when)

    def _texts(self, frame: Frame, diagnosis: Diagnosis) -> list[Summary.Value]:
        self._said_of = frame
        return [
            text(f"{ALL}/verdict", verdict_markdown(diagnosis)),
            text(f"{ALL}/findings", findings_markdown(diagnosis)),
        ]

    def _closing(self, frame: Frame, diagnosis: Diagnosis) -> list[Summary.Value]:
        self._past.end(frame)
        told = f"Each unit by its status after step {frame.span['last_step']:,}; sites in forward order."
        values = [] if self._said_of is frame else self._texts(frame, diagnosis)
        values.append(picture(f"{ALL}/map_of_units", picture_of_units(frame), told))
        over_time = picture_over_time(frame, self._past)
        if over_time is not None:
            told = "The units of the worst sites by status, window by window."
            values.append(picture(f"{ALL}/worst_sites_over_time", over_time, told))
        known = self._settings.known() if self._compares else {}
        return [*values, *(session(known, METRICS) if known else [])]


def _open(target: str | Path | SummaryWriter) -> Events:
    from torch.utils.tensorboard import SummaryWriter

    if isinstance(target, SummaryWriter):
        return BorrowedWriter(target)
    if not isinstance(target, str | Path):
        raise ConfigError(
            f"TensorBoardSink expects a directory or a SummaryWriter of torch.utils.tensorboard, found "
            f"{type(target).__name__}; give its log directory."
        )
    if "://" in str(target):
        raise ConfigError(
            f"TensorBoardSink writes to directories of this machine, found {clean_text(target)!r}; give a "
            "SummaryWriter that writes there."
        )
    return EventFile(Path(target))


def _write(events: Events, values: Iterable[Summary.Value], step: int, when: float) -> None:
    """All values of a step as one event, which is one record of the file."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    events.add(Event(wall_time=when, step=step, summary=Summary(value=values)))


def _restart(step: int) -> Any:
    """Tells TensorBoard that what it has read of this run from a step on is void."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    return Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START))
