"""Monitor: attached to a training run, it tells while something can still be done which units fall silent, and why."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pandas as pd
import torch
from torch import nn
from torch.optim import Optimizer

from relu_doctor.config import Config, load_config
from relu_doctor.diagnose.diagnosis import Diagnosis
from relu_doctor.errors import DyingUnitsWarning, MonitorError, ReLUDoctorError
from relu_doctor.observe.gradients import GradientWatch, after_steps, before_steps
from relu_doctor.observe.graph.names import strip_wrappers
from relu_doctor.observe.instep import InStepProbe
from relu_doctor.observe.live import PHASE, LiveProbe
from relu_doctor.observe.parts import PartsProbe
from relu_doctor.observe.rectifiers.custom import Custom
from relu_doctor.observe.sites import ActivationSite
from relu_doctor.observe.statistics.stats import UnitStats
from relu_doctor.reports.monitoring import MonitorReport
from relu_doctor.reports.sinks import Sink, Sinks
from relu_doctor.training.alerts import Alerts
from relu_doctor.training.arguments import count, held_batches, keeper, listener, optimizers, switch
from relu_doctor.training.closeness import CloseLook
from relu_doctor.training.closing import Closer
from relu_doctor.training.effective_rank import effective_ranks
from relu_doctor.training.history import History
from relu_doctor.training.maturity import Maturity, find_site
from relu_doctor.training.misuse import UNSTEPPED, Misuse
from relu_doctor.training.numbers import RunNumbers
from relu_doctor.training.ranks import Ranks, Together, find_ranks
from relu_doctor.training.saved import restore, state_of
from relu_doctor.training.schedule import Schedule
from relu_doctor.training.seen import Seen, in_steps
from relu_doctor.training.timeline import Timeline
from relu_doctor.training.updates import UpdateMeter
from relu_doctor.training.windows import Alert, Window


class Monitor:
    """Watches the rectifiers of a model while it is trained; a context manager.

    Every ``every`` steps the run's own forward is observed in full. In between, the gradients of the biases tell which
    units fire, at the cost of reading them: after each of the first 100 steps, then after every tenth. After
    ``window`` steps what was seen becomes a :class:`~relu_doctor.Diagnosis`; a unit without enough evidence stays
    unproven, and its evidence is carried on.

    Args:
        model: that is trained; wrapped or not.
        optimizer: one or several; without any, gradients are read in :meth:`step`, and no update is measured.
        every: steps from one that is observed in full to the next; at most ``window``.
        window: steps in a window.
        reference: batches that are run again when a window closes, in eval mode and without gradients: a unit that
            falls silent in training and fires on them did not die by its parameters. They are held; each window costs
            one forward of each.
        history: a directory that keeps every window, or an open :class:`~relu_doctor.History`.
        sinks: called with each :class:`~relu_doctor.training.windows.Window` that closes; or ``"tensorboard:DIR"`` and
            ``"jsonl:FILE"``, which the monitor opens and closes.
        on_alert: called with each :class:`~relu_doctor.training.windows.Alert`, at once.
        config: a profile's name, a path, a mapping or a :class:`~relu_doctor.Config`.
        rectifiers: classes of your own activation modules, as for :func:`~relu_doctor.scan`.
        start_step: updates that were made before, in a run that is resumed.
        parts: the model is never called as a whole, and a forward is the outermost call of any module of it.
        ranks: where several processes train the model, all of them make a monitor: what they see is merged, and rank 0
            reports, in :meth:`step` of a later step. ``"all"`` are those of DistributedDataParallel or FSDP2, and of a
            model without either all of ``torch.distributed``; ``"alone"`` merges nothing; or a process group.
        effective_rank: per window and site, the effective rank (Roy and Vetterli 2007) of its outputs, rows x units, in
            the last forward of the window that was observed; of several ranks, of rank 0's own inputs. A row is a
            position of an input; at most 1,024 are taken, evenly. It costs a copy of these rows per site, held until
            the window closes, and then an eigenvalue problem: 0.1 s for 512 units, 0.5 s for thousands. NaN where the
            outputs were not seen.
        maturity: for so many steps from the beginning of the run, and from its treatment (:meth:`treated`), a unit is
            not called dead or dormant, and no alert speaks of it; its evidence is gathered and counts afterwards.

    Attributes:
        diagnosis: the latest; ``None`` before the first window has closed, and in ranks that do not report.
        windows: how many have closed.
        alerts: all so far.

    Raises:
        ConfigError: an argument is out of range.
        UnsupportedModelError: the model cannot be observed.
        HistoryError: the history cannot be written.
        OutputError: a sink cannot be written to.
    """

    _closed = True  # until it is attached

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        every: int = 50,
        window: int = 500,
        reference: Iterable[Any] | None = None,
        history: str | Path | History | None = None,
        sinks: Sink | str | Iterable[Sink | str] = (),
        on_alert: Callable[[Alert], object] | None = None,
        config: Config | Mapping[str, Any] | str | Path | None = None,
        rectifiers: Custom = (),
        start_step: int = 0,
        parts: bool = False,
        ranks: Any = "all",
        effective_rank: bool = False,
        maturity: int = 0,
    ) -> None:
        thresholds = load_config(config)
        self._schedule = Schedule(count("every", every), count("window", window), count("start_step", start_step, 0))
        self._maturity = Maturity(count("maturity", maturity, 0))
        self._optimizers = optimizers(optimizer)
        self._reference = held_batches("reference", reference)
        self._alerts = Alerts(listener("on_alert", on_alert), thresholds)
        kept = keeper(history)
        switch("effective_rank", effective_rank)
        self._ranks: Together = find_ranks(model, ranks, window)
        options = {
            "rectifiers": rectifiers,
            "unit_axis": lambda name: thresholds.for_site(name).unit_axis,
            "samples": effective_rank,
        }
        self._live = self._probe(model, options, parts=switch("parts", parts))
        self.model = self._live.model
        self.diagnosis: Diagnosis | None = None
        self.windows = 0
        self._config = thresholds
        self._numbers = RunNumbers(self._optimizers)
        self._closer = Closer(self.model, thresholds, from_start=start_step == 0, maturity=self._maturity)
        self._watch: GradientWatch | None = None
        self._meter: UpdateMeter | None = None
        self._misuse = Misuse(self.model, self._optimizers)
        self._heard: Mapping[str, torch.Tensor] = {}  # of a run that is resumed, by the gradient watch
        self._measured: Mapping[str, Mapping[str, torch.Tensor]] = {}  # and by the meter
        self._remembered: set[str] = set()  # sites of which its state knew
        self._look = CloseLook()
        self._has_news = False  # gradients were read in this step
        self._sites: list[ActivationSite] = []
        self._known = (0, 0)  # how many sites this process has met, and which version of what all know
        self._observed: list[tuple[int, int]] = []  # first ordinal and step of what was observed in this window
        self._first_step = self._schedule.current
        self._timeline = Timeline()
        self._last: Window | None = None
        self._seen_forwards = 0
        self._about = {"model": type(self.model).__name__}
        if self._optimizers:
            self._about["optimizer"] = ", ".join(dict.fromkeys(type(each).__name__ for each in self._optimizers))
        self._updates = 0  # since it was looked last
        self._parameters: dict[str, nn.Parameter] = {}  # by name, as they were when the sites were learnt
        self._updates_all = False  # the only optimizer updates all that is followed
        self._wakes = 0  # the step before which there is nothing to be done
        kept = kept if self._ranks.reports else None
        with ExitStack() as undo:
            undo.callback(self._ranks.leave, broken=True)
            self._sinks = Sinks(sinks, reports=self._ranks.reports)
            undo.callback(self._sinks.close)
            self._history = History.open(kept) if isinstance(kept, Path) else kept
            undo.pop_all()
        self._owns_history = isinstance(kept, Path)
        self._handles = [
            *before_steps(self._optimizers, self._before_update),
            *after_steps(self._optimizers, self._after_update),
        ]
        self._live.__enter__()
        self._closed = False
        if self._history is not None and self._owns_history:
            self._history.begin(config=thresholds, start_step=start_step + 1)
        self._misuse.check_optimizers()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close("finished" if kind is None else kind.__name__, broken=kind is not None)

    def __del__(self) -> None:
        if not self._closed:
            message = "a Monitor was not closed; use it in a with block, or call close()."
            warnings.warn(message, ResourceWarning, stacklevel=2, source=self)

    def step(self, loss: object = None, *, grad_norm: object = None) -> Diagnosis | None:
        """One update was made.

        Args:
            loss: of the step, a number or a tensor of one element; a device is not waited for.
            grad_norm: of all gradients, where the loop has it. Else that of all gradients of the optimizers is
                taken, as they find them (clipped, and without the scale of a ``GradScaler``), at the steps that are
                observed in full; later than the first 100, at most at one in ten.

        Returns:
            A diagnosis when a window has closed, else ``None``; of several ranks, in the one that reports.

        Raises:
            MonitorError: the monitor is closed.
        """
        if self._closed:
            raise MonitorError("step() was called on a closed monitor; make a new one, with start_step= of the run.")
        self._numbers.take_in(loss=loss, grad_norm=grad_norm)
        if self._schedule.current < self._wakes:
            self._schedule.advance()
            self._live.asleep = self._schedule.current < self._wakes
            return None
        closed: list[Window] = []
        with self._going_on():
            self._live.drop()
            if not self._optimizers:
                self._read_gradients()
            self._measure_update()
            self._check_loop()
            self._learn_sites()
            self._look_at_waves()
            if self._schedule.advance():
                self._ranks.send(self._take_window(), self._live.probe.sites(), wishes=self._live.wishes)
            closed += [self._judge(seen) for seen in self._ranks.arrived()]
            self._rest()
        return closed[-1].diagnosis if closed else None

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        """A fault of the monitor ends what it does, and never the training."""
        try:
            yield
        except Warning:  # the user has made warnings errors
            raise
        except Exception as error:  # noqa: BLE001  whatever it is, the training goes on
            self._watch = self._meter = None
            self._wakes, self._live.asleep = sys.maxsize, True
            self._ranks.leave(broken=True)  # the others are not to wait for this one
            self._misuse.tell(
                f"the monitor failed ({_named(error)}) and watches no more; the training goes on, and what was told is "
                "kept. This is a fault of relu_doctor: please report it."
            )

    def _rest(self) -> None:
        """Sleep up to the step at which there is something to be done again."""
        idle = self._sites and not self._ranks.waits and self._look.since is None
        idle = idle and (self._meter is None or self._meter.is_done)
        self._wakes = self._schedule.next_due if idle else self._schedule.current
        self._live.asleep = self._schedule.current < self._wakes

    @contextmanager
    def pause(self) -> Iterator[None]:
        """No forward within counts: an evaluation with gradients, a target network, a rollout."""
        self._live.paused += 1
        try:
            yield
        finally:
            self._live.paused -= 1

    def treated(self, site: str, units: Any) -> None:
        """Some units were treated just now: re-initialised, rescaled, moved. What is known of them begins anew.

        What they were silent on before is no evidence any more, and for ``maturity`` steps they are not judged. One
        that was dead and fires again is ``revived``; one that stays silent is found dead after this step. To be called
        between two steps, right after :meth:`step`; of several ranks by each alike.

        Args:
            site: its name or ``site_id``, as in :attr:`sites`.
            units: indices, or bool (units,).

        Raises:
            ConfigError: there is no such site, or no such unit.
            MonitorError: the monitor is closed.
        """
        if self._closed:
            raise MonitorError("treated() was called on a closed monitor; call it while the run is watched.")
        self._learn_sites()
        whose = find_site(self._sites, site)
        which = self._maturity.treat(whose, units, self._schedule.step)
        if self._ranks.reports:
            self._closer.treatments.append((self._schedule.step, whose.site_id, which))
        self._live.forget(whose.site_id, which)
        if self._watch is not None:
            self._watch.forget(whose.site_id, which)

    def state_dict(self) -> dict[str, Any]:
        """What a run that is resumed needs to go on as if it had not stopped: plain values and tensors on the CPU.

        It may be taken after :meth:`close`, and is read by ``torch.load(..., weights_only=True)``.
        """
        return state_of(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` kept; before the first step.

        Raises:
            MonitorError: a step was made already, or the state is none of a monitor.
        """
        restore(self, state)

    def close(self, reason: str = "closed") -> None:
        """Leave the model and the optimizers as they were; what was seen since the last window becomes one.

        Of several ranks each waits for the others to close theirs. Safe to call twice.
        """
        self._close(reason, broken=False)

    def _close(self, reason: str, *, broken: bool) -> None:
        if not self._closed:
            self._closed = True
            with suppress(Warning) if broken else nullcontext():  # the run's own error is to be seen
                self._finish(reason, broken=broken)

    def _finish(self, reason: str, *, broken: bool) -> None:
        try:
            with self._going_on():
                if broken:
                    self._ranks.leave(broken=True)
                    for seen in self._ranks.arrived():
                        self._judge(seen)
                elif self._live.num_forwards > 1 and not self._schedule.made:
                    self._misuse.forwards_without_step(self._live.num_forwards)
                for seen in self._ranks.finish(self._take_window(), self._live.probe.sites()):
                    self._judge(seen)
        finally:
            self._ranks.leave(broken=broken)
            for handle in self._handles:
                handle.remove()
            self._live.close()
            try:
                self._sinks.close()
            finally:
                self._end_history(reason)

    def _end_history(self, reason: str) -> None:
        if self._history is not None and self._owns_history:
            try:
                self._history.end(reason)
            except (ReLUDoctorError, OSError) as error:  # what the user's own code raised must not be lost for that
                self._misuse.tell(f"the history could not be ended: {error} What was committed is there.")
            finally:
                self._history.close()

    @property
    def alerts(self) -> tuple[Alert, ...]:
        """All so far."""
        return tuple(self._alerts.raised)

    @property
    def units(self) -> pd.DataFrame:
        """One row per unit of the latest window: its status, mechanism, evidence and onset."""
        if self._last is None:
            return pd.DataFrame()
        return self._last.diagnosis.units.merge(self._last.units, on=["site_id", "unit"], how="left")

    @property
    def sites(self) -> pd.DataFrame:
        """One row per site of the latest window."""
        if self._last is None:
            return pd.DataFrame()
        return self._last.diagnosis.sites.merge(self._last.sites, on="site_id", how="left")

    @property
    def timeline(self) -> pd.DataFrame:
        """One row per window and site."""
        return self._timeline.frame()

    def report(self) -> MonitorReport:
        """How the run stands now: its numbers, the worst sites, the alerts and the verdict; to be printed."""
        return MonitorReport(
            step=self._schedule.step,
            made=self._schedule.made,
            windows=self.windows,
            next_close=None if self._closed else self._schedule.next_close,
            reports=self._ranks.reports,
            window=self._last,
            timeline=self.timeline,
            alerts=self.alerts,
        )

    def _probe(self, model: nn.Module, options: Mapping[str, Any], *, parts: bool) -> LiveProbe:
        if isinstance(self._ranks, Ranks) and self._ranks.in_step:
            return InStepProbe(model, self._wants, self._ranks, **options)
        return PartsProbe(model, self._wants, **options) if parts else LiveProbe(model, self._wants, **options)

    def _wants(self) -> bool:
        wanted = self._schedule.wants()
        if self._live.num_forwards - self._seen_forwards == UNSTEPPED and not self._schedule.made:
            self._misuse.forwards_without_step(UNSTEPPED)
        if wanted and not self._is_observed:
            self._observed.append((self._live.num_inputs, self._schedule.current))
        return wanted

    @property
    def _is_observed(self) -> bool:
        """Whether a forward of the step that is being made was observed in full."""
        return bool(self._observed) and self._observed[-1][1] == self._schedule.current

    def _before_update(self, optimizer: Optimizer, has_gradients: bool) -> None:
        try:
            self._updates += 1
            self._numbers.note_rates(self._schedule.current)
            if self._live.asleep:
                return
            meter = self._meter  # in the step that shows the sites, some frameworks make the forward only now
            if self._watch is None:
                self._learn_sites()
            if has_gradients:
                self._read_gradients(optimizer)
            if meter is not None:
                meter.before(optimizer, has_gradients=has_gradients)
        except Exception as error:  # noqa: BLE001  whatever it is, the training goes on
            self._give_up_watching(error)

    def _after_update(self, optimizer: Optimizer, had_gradients: bool) -> None:
        if self._live.asleep or had_gradients:
            return
        try:
            if self._watch is None:  # a closure made them, and perhaps the first forward
                self._learn_sites()
            self._read_gradients(optimizer)
        except Exception as error:  # noqa: BLE001  whatever it is, the training goes on
            self._give_up_watching(error)

    def _measure_update(self) -> None:
        """All optimizers have made their updates."""
        if self._meter is None:
            return
        self._meter.step()
        try:
            if self._meter.is_open:
                self._meter.after()
        except Exception as error:  # noqa: BLE001  whatever it is, the training goes on
            self._give_up_watching(error)

    def _give_up_watching(self, error: Exception) -> None:
        self._watch = self._meter = None
        self._misuse.tell(
            f"the gradients and updates could not be read ({_named(error)}); they are not followed any "
            "more, the training is as it was."
        )

    def _read_gradients(self, optimizer: Optimizer | None = None) -> None:
        if optimizer is not None and self._is_observed and self._schedule.measures():
            self._numbers.read_gradients(optimizer)
        if self._watch is None or not self._schedule.listens():
            return
        alone = optimizer is None or (len(self._optimizers) == 1 and self._updates_all)
        if self._watch.read(self._schedule.current, observed=self._is_observed, optimizer=None if alone else optimizer):
            self._has_news = True
            self._numbers.heard(self._watch.norm)

    def _learn_sites(self) -> None:
        """Take in sites that a forward has shown for the first time."""
        probe = self._live.probe
        known = probe.known.num_sites, self._ranks.version
        if known == self._known:
            return
        self._known, self._sites = known, self._ranks.sites(probe.sites(), probe.known.names)
        self._follow()
        self._misuse.check_sites(self._remembered, {site.site_id for site in self._sites})

    def _follow(self) -> None:
        """Follow the parameters that speak for the sites as the model holds them now."""
        before, self._watch = self._watch, GradientWatch(self.model, self._sites)
        if before is not None:
            self._watch.go_on_from(before)
        elif self._heard:
            self._watch.remember(self._heard)
        self._parameters = self._named_parameters()
        self._updates_all = all(self._watch.belongs_to(each) for each in self._optimizers)
        meter, self._meter = self._meter, UpdateMeter(self.model, self._sites) if self._optimizers else None
        if self._meter is not None:
            self._meter.remember(self._measured if meter is None else meter.state())

    def _named_parameters(self) -> dict[str, nn.Parameter]:
        return {strip_wrappers(name): each for name, each in self.model.named_parameters(remove_duplicate=False)}

    def _follow_replaced(self) -> None:
        """Some of them may have been replaced: ``load_state_dict(assign=True)``, a module that was swapped."""
        if self._watch is not None:
            named = self._named_parameters()
            if not self._watch.fits(named) or (self._meter is not None and not self._meter.fits(named)):
                self._follow()

    def _look_at_waves(self) -> None:
        """Look closely where gradients show that units fell silent together; speak when that has been seen."""
        if self._watch is None or self._ranks.in_step:  # all processes must observe the same steps
            return
        has_news, self._has_news = self._has_news, False
        if has_news and self._look.is_called_for(self._watch) and not self._schedule.is_close:
            self._schedule.look_closely()
            self._look.begin(self._schedule.current, self._live.num_inputs, self._live.probe.stats.get(PHASE, {}))
        elif self._look.since is not None and not self._schedule.is_close:
            stats = self._live.probe.stats.get(PHASE, {})
            step, observed = self._schedule.current, self._observed
            for wave in self._look.end(self._sites, stats, observed, self._watch, self._maturity, step):
                if self._ranks.reports:
                    until = self._schedule.next_look(wave.update) - 1
                    own = [self._parameters[name] for name in wave.site.producers if name in self._parameters]
                    rates = self._numbers.rates_between(wave.update, until, own)
                    self._alerts.wave(replace(wave, until=until, learning_rates=rates), step)
            self._tell_alerts()

    def _take_window(self) -> Seen:
        """What was seen since the window before; of a step that was not made it is the forward."""
        last_step = max(self._schedule.step, self._first_step) if self._observed else self._schedule.step
        stats = self._live.probe.stats.pop(PHASE, {})
        outputs, self._live.probe.outputs = self._live.probe.outputs, {}
        observed, self._observed = self._observed, []
        self._learn_sites()
        ordinals = torch.tensor([ordinal for ordinal, _ in observed], dtype=torch.int64)
        steps = torch.tensor([at for _, at in observed], dtype=torch.int64)
        seen = Seen(
            index=self.windows,
            first_step=self._first_step,
            last_step=last_step,
            stats={site_id: in_steps(each, ordinals, steps) for site_id, each in stats.items()},
            steps=steps,
            num_inputs=self._live.num_inputs - (observed[0][0] if observed else self._live.num_inputs),
            notes=(*self._live.probe.known.notes, *self._failures()),
            ratios={} if self._meter is None else self._meter.take(),
            heard={} if self._watch is None else self._watch.heard(),
            checked={} if self._watch is None else self._watch.checked(),
            apart=self._live.is_apart,
            told=self._live.take_digests(),
            numbers=self._numbers.close(),
            reference=self._referred(),
            effective_ranks=effective_ranks(self._sites, outputs) if self._ranks.reports else {},
        )
        self._first_step = self._schedule.current
        self._look.window_closed(seen.stats)
        self._follow_replaced()
        return seen

    def _judge(self, seen: Seen) -> Window:
        """Say what a window shows, of which all that belongs to it has come."""
        self._learn_sites()
        notes = tuple(dict.fromkeys((*seen.notes, *self._ranks.notes)))
        seen = replace(seen, index=self.windows, notes=notes)
        diagnosis, sites, units = self._closer.close(seen, self._sites)
        step = seen.last_step
        numbers = {
            **seen.numbers,
            "observed_steps": float(len(seen.steps)),
            "observed_inputs": float(seen.num_inputs),
        }
        deaths = dict(zip(sites["site_id"], sites["deaths"].fillna(0).astype(int), strict=True)) if len(sites) else {}
        self._alerts.window(step, diagnosis.sites, deaths)
        window = Window(
            self.windows,
            seen.first_step,
            step,
            time.time(),
            diagnosis,
            sites,
            units,
            numbers,
            self._alerts.take(),
            self._about,
        )
        self._last, self.diagnosis = window, diagnosis
        self.windows += 1
        self._timeline.append(window)
        self._hand_out(window)
        self._tell_alerts()
        return window

    def _referred(self) -> Mapping[str, UnitStats]:
        """What the reference batches show now."""
        if not self._reference or not self._sites or not self._ranks.reports:
            return {}
        try:
            return self._live.look_at(self._reference)
        except Exception as error:  # noqa: BLE001  whatever it is, the training goes on
            self._misuse.tell(f"the reference batches could not be run ({_named(error)}); they are left out.")
            self._reference = []
            return {}

    def _tell_alerts(self) -> None:
        try:
            self._alerts.tell(self._keep_alert)
        except DyingUnitsWarning:  # the user has made warnings errors
            raise
        except Exception as error:  # noqa: BLE001  a pager that is down must not end a training run
            self._misuse.tell(
                f"on_alert= raised {_named(error)}; the training goes on, and the alerts are kept.",
                key="on_alert",
            )

    def _keep_alert(self, alert: Alert) -> None:
        """In the history at once: its window may never close."""
        if self._history is not None:
            self._hand("the history", self._history.append_alert, alert)

    def _hand_out(self, window: Window) -> None:
        """Give a window to the history and to each sink."""
        if self._history is not None:
            self._hand("the history", self._history.append, window)
        for name, take in self._sinks:
            self._hand(name, take, window)

    def _hand(self, name: str, take: Callable[[Any], object], given: Alert | Window) -> None:
        """Hand something over; whoever raises is told of once, and training goes on."""
        try:
            take(given)
        except Exception as error:  # noqa: BLE001  a full disk must not end a training run
            self._misuse.tell(
                f"{name} raised {_named(error)}; the training goes on, and the data are kept in the monitor.", key=name
            )

    def _check_loop(self) -> None:
        """Speak where the loop does not do what is needed to follow it."""
        forwards, self._seen_forwards = self._live.num_forwards - self._seen_forwards, self._live.num_forwards
        self._misuse.check_forwards(self._live, forwards, self._schedule.made)
        reads = self._watch is not None and (self._has_news or self._schedule.listens())
        self._misuse.check_updates(updates=self._updates, has_news=self._has_news if reads else None)
        self._updates = 0

    def _failures(self) -> list[str]:
        return [f"{kind}: {message}" for kind, message in self._live.failures.items()]


def _named(error: Exception) -> str:
    """Its type and words, for the middle of a sentence."""
    return f"{type(error).__name__}: {str(error).rstrip('.')}"
