"""Alerts: what a run must be told at once, each once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd

from relu_doctor.config import Config
from relu_doctor.errors import DyingUnitsWarning
from relu_doctor.numerals import percent, plural
from relu_doctor.observe.sites import ActivationSite
from relu_doctor.training.windows import Alert

WAVE_UNITS = 4  # units that fall silent together
WAVE_SHARE = 0.1  # of their site


@dataclass(frozen=True, slots=True, eq=False)
class Wave:
    """Units of a site that fell silent together, and were observed in full since.

    Attributes:
        site: whose.
        update: the last one before which they fired.
        silent: units that fired up to it and on none of the inputs since.
        inputs: on which they were silent.
        until: the first at which it was looked again, less one: the update that silenced them is one of these.
        learning_rates: the least and the largest in that range, of each parameter group that updates the site.
    """

    site: ActivationSite
    update: int
    silent: int
    inputs: int
    until: int = 0
    learning_rates: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def is_large(self) -> bool:
        """Whether it is worth an alert."""
        return self.silent >= max(WAVE_UNITS, WAVE_SHARE * self.site.num_units)


class Alerts:
    """Raises alerts, each once per site; of waves those that double what came before.

    Args:
        on_alert: called with each.
        config: thresholds.

    Attributes:
        raised: all so far.
    """

    def __init__(self, on_alert: Callable[[Alert], object] | None, config: Config) -> None:
        self._on_alert = on_alert
        self._config = config
        self._known: set[tuple[str, str]] = set()
        self._open: list[Alert] = []
        self._untold: list[Alert] = []
        self._silenced: dict[str, int] = {}  # units of each site, by waves so far
        self.raised: list[Alert] = []

    def take(self) -> tuple[Alert, ...]:
        """Those since this was asked last."""
        taken, self._open = tuple(self._open), []
        return taken

    def tell(self, keep: Callable[[Alert], object]) -> None:
        """Tell those that were raised since this was called last, each as a warning and to ``on_alert``.

        Args:
            keep: called with each before it is told.
        """
        while self._untold:  # those after one that raises are told the next time
            alert = self._untold.pop(0)
            keep(alert)
            warnings.warn(f"step {alert.step}: {alert.message} [{alert.code}]", DyingUnitsWarning, stacklevel=4)
            if self._on_alert is not None:
                self._on_alert(alert)

    def state(self) -> dict[str, Any]:
        """What a run that is resumed needs, as plain values: what was told, and what the open window is to tell."""
        return {
            "known": [list(each) for each in sorted(self._known)],
            "silenced": dict(self._silenced),
            "raised": [asdict(alert) for alert in self.raised],
            "open": [asdict(alert) for alert in self._open],
        }

    def remember(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` told; it is not told again."""
        self._known = {(code, site) for code, site in state["known"]}
        self._silenced = dict(state["silenced"])
        self.raised, self._open = ([Alert(**each) for each in state[name]] for name in ("raised", "open"))

    def wave(self, wave: Wave, step: int) -> None:
        """Many units fell silent with one update; of a site, one that is smaller than all before is not told."""
        before = self._silenced.get(wave.site.site_id, 0)
        self._silenced[wave.site.site_id] = before + wave.silent
        if wave.silent < before:
            return
        self._known.discard(("RD701", wave.site.name))
        rates = sorted({rate for pair in wave.learning_rates.values() for rate in pair})
        at = (
            ""
            if not rates
            else f" at lr {rates[0]:g}"
            if rates[0] == rates[-1]
            else f" at lr {rates[0]:g} to {rates[-1]:g}"
        )
        suspected = "; suspected: learning rate" if rates else ""
        which = f"update {wave.update}" if wave.until <= wave.update else f"updates {wave.update} to {wave.until}"
        self._raise(
            Alert(
                "RD701",
                step,
                wave.site.name,
                f"{which}{at}: {wave.silent} of {wave.site.num_units} units of {wave.site.name} fired "
                f"before it and none since, {plural(wave.inputs, 'input')}{suspected}",
                {"update": wave.update, "until": max(wave.until, wave.update), "silent": wave.silent}
                | {"inputs": wave.inputs}
                | {name: most for name, (_, most) in wave.learning_rates.items()},
            )
        )

    def window(self, step: int, sites: pd.DataFrame, deaths: Mapping[str, int]) -> None:
        """A window closed.

        Args:
            step: its last.
            sites: as in a diagnosis.
            deaths: in this window, per ``site_id``.
        """
        columns = [sites[name].tolist() for name in ("site", "site_id", "dead", "num_units", "dead_fraction")]
        for site, site_id, dead, number, share in zip(*columns, strict=True):
            died = deaths.get(site_id, 0)
            counts = f"{dead} of {number} units of {site} are dead ({percent(share)})"
            if died >= max(WAVE_UNITS, WAVE_SHARE * number):
                message = f"{counts}, {died} of them since the last window"
                self._raise(Alert("RD702", step, site, message, {"deaths": died}))
            if share >= self._config.serious_fraction:
                self._raise(Alert("RD703", step, site, counts, {"dead": dead, "dead_fraction": share}))

    def _raise(self, alert: Alert) -> None:
        if (alert.code, alert.site) in self._known:
            return
        self._known.add((alert.code, alert.site))
        self.raised.append(alert)
        self._open.append(alert)
        self._untold.append(alert)
