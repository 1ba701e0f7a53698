"""Figures for papers and notebooks; needs matplotlib: ``pip install 'relu-doctor[plot]'``.

Each function draws into the axes that it is given, or into new ones, and returns them; nothing is shown or saved.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from relu_doctor.diagnose.diagnosis import Diagnosis
from relu_doctor.errors import ConfigError, OutputError
from relu_doctor.reports.colours import STATUS_COLOURS
from relu_doctor.reports.words import plain_name, shorten
from relu_doctor.terms import Status
from relu_doctor.training.history import History
from relu_doctor.training.history_reading import HistoryReader
from relu_doctor.training.monitor import Monitor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Run = Monitor | HistoryReader | str | Path | Iterable[tuple[int, Diagnosis]]
STATUS_ORDER = tuple(status.value for status in STATUS_COLOURS)  # of the colours of a unit map
_FIRED = "#7d9db5"
_NAME = 24  # characters of a site's name
_OFTEN_CITED = (0.2, 0.5)  # of a network's units
_UNKNOWN = (Status.UNOBSERVED.value, Status.NON_FINITE.value)


def dead_fraction(run: Run, ax: Axes | None = None, *, sites: int = 6) -> Axes:
    """The dead fraction over time: of all units that can die, and of the sites that lost most.

    Args:
        run: a monitor, a history or its directory, or pairs of a step and the diagnosis of the model after it.
        ax: to draw into.
        sites: how many of the worst are drawn one by one.

    Returns:
        The axes: training steps to the right, fractions from 0 to 1 upwards; the band that is often cited is shaded.
        A line has a gap where no unit was observed with finite numbers: there is nothing known then.

    Raises:
        ConfigError: no window has closed yet, or ``run`` is none.
        HistoryError: there is no history in the directory.
        OutputError: matplotlib is not installed.
    """
    timeline = _timeline(run)
    axes = _axes(ax)
    axes.axhspan(*_OFTEN_CITED, color="0.5", alpha=0.12, linewidth=0, label="often cited: 20–50 %")
    known = timeline["num_units"] - timeline[list(_UNKNOWN)].sum(axis=1)
    timeline = timeline.assign(known=known, dead_fraction=timeline["dead_fraction"].where(known > 0))
    steps = timeline.groupby("last_step")[["dead", "num_units", "known"]].sum()
    whole = (steps["dead"] / steps["num_units"]).where(steps["known"] > 0)
    last = timeline[timeline["last_step"] == timeline["last_step"].max()]
    worst = last.sort_values("dead_fraction", ascending=False, kind="stable")["site_id"].iloc[:sites]
    for site_id in worst:
        rows = timeline[timeline["site_id"] == site_id]
        name = shorten(plain_name(str(rows["site"].iloc[0])), _NAME)
        axes.plot(rows["last_step"], rows["dead_fraction"], linewidth=1, label=_literal(name))
    axes.plot(whole.index, whole.to_numpy(), color="black", linewidth=2, label="all units")
    axes.set(xlabel="training step", ylabel="dead fraction", ylim=(0, 1))
    axes.legend(frameon=False, fontsize="small")
    return axes


def firing_rates(diagnosis: Diagnosis, ax: Axes | None = None, *, site: str | None = None) -> Axes:
    """How often units fire: a histogram of log10 of the firing rate, and the silent units in a bar of their own.

    Args:
        diagnosis: of a scan or a window.
        ax: to draw into.
        site: name or ``site_id`` of the only one to draw.

    Returns:
        The axes: rates to the right, units upwards; the threshold below which a unit counts as rare is marked.

    Raises:
        ConfigError: there is no such site, nothing was observed, or ``diagnosis`` is none.
        OutputError: matplotlib is not installed.
    """
    units = _diagnosis(diagnosis).units
    if site is not None:
        units = units[(units["site"] == site) | (units["site_id"] == site)]
        if units.empty:
            names = ", ".join(plain_name(name) for name in diagnosis.sites["site"])
            raise ConfigError(f"expected the name or site_id of a site, found {site!r}; there are {names}.")
    units = units[~units["status"].isin(_UNKNOWN)]
    if units.empty:
        raise ConfigError("no unit was observed, so that there are no firing rates; scan inputs that reach them.")
    rates = units["firing_rate"].to_numpy(float)
    fired = np.log10(rates[rates > 0])
    least = min(-3.0, float(np.floor(fired.min()))) if len(fired) else -3.0
    axes = _axes(ax)
    edges = np.linspace(least, 0, 31)
    axes.hist(fired, bins=edges.tolist(), color=_FIRED, label="fired" if len(fired) else None)
    width = edges[1] - edges[0]
    silent = units["status"][rates == 0]
    bottom, never = 0, least - 4 * width
    for status in (Status.DEAD, Status.UNPROVEN, Status.SATURATED):
        number = int((silent == status.value).sum())
        if number:
            colour = STATUS_COLOURS[status]
            axes.bar(never, number, 3 * width, bottom, color=colour, label=status.value)
            bottom += number
    axes.axvline(
        np.log10(diagnosis.config.rare_firing_rate), color="0.3", linestyle=":", linewidth=1, label="rare below"
    )
    ticks = np.arange(np.ceil(least), 1)
    axes.set_xticks([never, *ticks], ["never", *(f"{10.0**tick:.3g}" for tick in ticks)])
    axes.set(xlabel="firing rate (log scale)", ylabel="units")
    axes.legend(frameon=False, fontsize="small")
    return axes


def unit_map(diagnosis: Diagnosis, ax: Axes | None = None) -> Axes:
    """Every unit, coloured by its status: a row per site in forward order, its units to the right.

    Args:
        diagnosis: of a scan or a window.
        ax: to draw into.

    Returns:
        The axes; a site of fewer units than the widest ends earlier.

    Raises:
        ConfigError: there are no units, or ``diagnosis`` is none.
        OutputError: matplotlib is not installed.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    records = [site for site in _diagnosis(diagnosis).table.sites if site.num_units]
    if not records:
        raise ConfigError("there are no units to draw: no rectifier was observed.")
    axes = _axes(ax, height=1.2 + 0.28 * len(records))
    codes = diagnosis.units["status"].map({status: place for place, status in enumerate(STATUS_ORDER)}).to_numpy(int)
    picture = np.full((len(records), max(site.num_units for site in records)), np.nan)
    stop = 0
    for row, site in enumerate(records):
        start, stop = stop, stop + site.num_units
        picture[row, : site.num_units] = codes[start:stop]
    colours = ListedColormap([STATUS_COLOURS[Status(status)] for status in STATUS_ORDER])
    axes.imshow(picture, cmap=colours, vmin=-0.5, vmax=len(STATUS_ORDER) - 0.5, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(records)), [_literal(shorten(plain_name(site.name), _NAME)) for site in records])
    axes.hlines(np.arange(1, len(records)) - 0.5, *axes.get_xlim(), color="white", linewidth=2)
    axes.set(xlabel="unit")
    there = [status for place, status in enumerate(STATUS_ORDER) if (codes == place).any()]
    handles = [Patch(color=STATUS_COLOURS[Status(status)], label=status.replace("_", " ")) for status in there]
    axes.legend(handles=handles, frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))
    return axes


def _diagnosis(given: object) -> Diagnosis:
    if not isinstance(given, Diagnosis):
        raise ConfigError(
            f"expected a Diagnosis, as relu_doctor.scan returns it, found {type(given).__name__}; of a monitor give "
            "its diagnosis."
        )
    return given


def _axes(ax: Axes | None, height: float = 4.0) -> Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise OutputError(
            "relu_doctor.plot needs matplotlib, which is not installed: pip install 'relu-doctor[plot]'."
        ) from error
    _, axes = plt.subplots(figsize=(7, min(height, 40)), layout="constrained")
    return axes


def _timeline(run: Run) -> pd.DataFrame:
    """One row per window and site that can die: ``last_step, site, site_id, num_units, dead, dead_fraction``."""
    if isinstance(run, str | Path):
        run = History.read(run)
    if isinstance(run, HistoryReader):
        latest = run.latest
        mortal = set() if latest is None else {site.site_id for site in latest.table.sites if site.can_die}
        timeline = run.timeline
        timeline = timeline[timeline["site_id"].isin(mortal)]
    elif isinstance(run, Monitor):
        mortal = set() if run.diagnosis is None else {s.site_id for s in run.diagnosis.table.sites if s.can_die}
        timeline = run.timeline
        timeline = timeline[timeline["site_id"].isin(mortal)] if len(timeline) else timeline
    else:
        timeline = _of_pairs(run)
    if not len(timeline):
        raise ConfigError("expected a run of which a window has closed, found none; wait for the first one.")
    return timeline


def _of_pairs(pairs: Any) -> pd.DataFrame:
    frames = []
    try:
        for step, diagnosis in pairs:
            mortal = {site.site_id for site in diagnosis.table.sites if site.can_die}
            frames.append(diagnosis.sites[diagnosis.sites["site_id"].isin(mortal)].assign(last_step=int(step)))
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            "expected a Monitor, a history or its directory, or pairs of a step and a Diagnosis, found "
            f"{type(pairs).__name__}."
        ) from error
    return pd.concat(frames, ignore_index=True).sort_values("last_step", kind="stable") if frames else pd.DataFrame()


def _literal(text: str) -> str:
    """Names as they are: matplotlib would read dollars as formulas, and leave labels with an underscore out."""
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text
