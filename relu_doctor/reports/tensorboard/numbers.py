"""The numbers of a window as scalars and histograms: at most 40 scalar tags, or those of every site as well."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from relu_doctor.reports.frames import STATUSES, Frame
from relu_doctor.reports.scalars import ALL, SITES, UNKNOWN
from relu_doctor.reports.tensorboard.tags import Tags, Worst
from relu_doctor.reports.tensorboard.values import histogram, scalar
from relu_doctor.terms import Status
from relu_doctor.training.windows import SITE_COLUMNS

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

    from relu_doctor.diagnose.diagnosis import Diagnosis

_SHARES = (Status.DEAD, Status.UNPROVEN, Status.RARE, Status.DORMANT)
_COUNTED = (*(status.value for status in _SHARES), *UNKNOWN)
_UNKNOWN = [STATUSES.index(status) for status in UNKNOWN]
_RUN = ("loss", "grad_norm")
_RATE = re.compile(r"lr(/\d+)?\Z")
_MOST_RATES = 8
_LOW, _HIGH = "often_cited_low", "often_cited_high"
_BAND = {_LOW: 0.2, _HIGH: 0.5}
NEVER = -8.0  # log10 of a firing rate that is 0
_DENSITY = np.linspace(NEVER, 0.0, 33)  # of a quarter of a decade
_BUCKETS = 20
_SHOWN = 6  # sites with histograms, which take more room than all scalars

_TOLD = {
    "dead_fraction": "Of the units that can die: never fired, on enough inputs to be sure. A gap: nothing is known.",
    "unproven_fraction": "Of the units that can die: never fired, on too few inputs to call them dead.",
    "rare_fraction": "Of the units that can die: fired, at a rate under the threshold. Rare is not dead.",
    "dormant_fraction": "Of the units that can die: mean output tiny beside its site's. 0 unless the profile sets tau.",
    "non_finite_fraction": "Of all units: NaN or Inf reached them.",
    "deaths": "Units that were found dead in this window and had not been before.",
    "revivals": "Units that were dead and fire again.",
    "update_ratio": "Norm of an update / norm of the weight, the largest of all units; about 1e-3 is common.",
    "loss": "Mean over the window.",
    "grad_norm": "Mean over the window.",
    "lr": "Learning rate of the first parameter group, at the end of the window.",
    _LOW: "20 %: the lower end of what is often cited as the usual fraction of dead units.",
    _HIGH: "50 %: the upper end of what is often cited as the usual fraction of dead units.",
}
_DENSITY_TOLD = f"log10 of the firing rate of each unit; those that never fired stand at {NEVER:.0f}."
_HIGHEST_TOLD = "The highest pre-activation of each unit. Left of 0: it never fired."

LAYOUT = {  # the regular expressions must match from the start of a tag; charts of other kinds would come last
    "ReLU Doctor": {
        "Dead fraction, and the often-cited 20–50 %": ["Multiline", [rf"{ALL}/(dead_fraction|often_cited_\w+)$"]],
        "Learning rate": ["Multiline", [rf"{ALL}/lr(/\d+)?$"]],
        "Dead fraction of the worst sites": ["Multiline", [rf"{SITES}/.+/dead_fraction$", rf"{ALL}/often_cited_"]],
        "Dead, unproven, rare, dormant": ["Multiline", [rf"{ALL}/(dead|unproven|rare|dormant)_fraction$"]],
        "Deaths and revivals per window": ["Multiline", [rf"{ALL}/(deaths|revivals)$"]],
    }
}


class Numbers:
    """What is written of each window as scalars and histograms.

    Args:
        every_site: beside the worst sites each one is told of, in a group of tags per number.
    """

    def __init__(self, *, every_site: bool) -> None:
        self.tags = Tags()
        self._worst = Worst()
        self._every_site = every_site
        self._described: set[str] = set()

    def meet(self, frame: Frame, diagnosis: Diagnosis) -> list[str]:
        """The ``site_id`` of the sites that are told one by one."""
        self.tags.meet(diagnosis)
        return self._worst.among(frame, diagnosis.config.mild_fraction)

    def scalars(self, frame: Frame, worst: list[str]) -> Iterator[Summary.Value]:
        """Of all sites together, of the worst, and of each where that was asked for."""
        for name, value in totals(frame).items():
            yield scalar(f"{ALL}/{name}", value, self._first(name))
        sites = {site["site_id"]: site for site in frame.sites}
        for site_id in worst:
            yield scalar(self.tags.of(site_id, "dead_fraction"), _share(sites[site_id], Status.DEAD))
        if self._every_site:
            for site_id, site in sites.items():
                for name, value in _of_site(site).items():
                    yield scalar(self.tags.among_all(site_id, name), value)

    def histograms(self, frame: Frame, diagnosis: Diagnosis, worst: list[str]) -> Iterator[Summary.Value]:
        """Firing densities of all units, and those and the highest pre-activations of the first six of the worst."""
        shown = worst[:_SHOWN]
        units = diagnosis.units
        rates, highest = units["firing_rate"].to_numpy(float), units["pre_max"].to_numpy(float)
        rates = np.where(np.isin(frame.status, _UNKNOWN), np.nan, rates)
        yield from self._density(f"{ALL}/log10_firing_rate", rates)
        stop = 0
        for site in frame.sites:
            start, stop = stop, stop + site["num_units"]
            if site["site_id"] in shown:
                yield from self._density(self.tags.of(site["site_id"], "log10_firing_rate"), rates[start:stop])
                values = highest[start:stop]
                if len(values := values[np.isfinite(values)]):
                    tag = self.tags.of(site["site_id"], "pre_max")
                    yield histogram(tag, values, _around_nought(values), self._first(tag, _HIGHEST_TOLD))

    def _density(self, tag: str, rates: NDArray[np.float64]) -> Iterator[Summary.Value]:
        rates = rates[np.isfinite(rates)]
        if len(rates):
            with np.errstate(divide="ignore"):
                densities = np.maximum(np.log10(rates), NEVER)
            yield histogram(tag, densities, _DENSITY, self._first(tag, _DENSITY_TOLD))

    def _first(self, name: str, told: str | None = None) -> str:
        """What a tag means, when it is written for the first time: TensorBoard reads it then."""
        if name in self._described:
            return ""
        self._described.add(name)
        return _TOLD.get(name, "") if told is None else told


def totals(frame: Frame) -> dict[str, float]:
    """Of the whole run, by name; what was not had is left out, and a fraction is NaN where nothing is known."""
    whole: dict[str, Any] = {"num_units": 0, **dict.fromkeys(_COUNTED, 0)}
    for site in frame.sites:
        if site["can_die"]:
            for name in whole:
                whole[name] += site[name]
    found = {f"{status.value}_fraction": _share(whole, status) for status in _SHARES}
    broken, units = sum(site["non_finite"] for site in frame.sites), sum(site["num_units"] for site in frame.sites)
    found["non_finite_fraction"] = broken / units if units else math.nan
    for name in ("deaths", "revivals"):
        if any(name in site for site in frame.sites):
            found[name] = sum(site.get(name, 0.0) for site in frame.sites)
    ratios = [site["update_ratio"] for site in frame.sites if "update_ratio" in site]
    found |= {"update_ratio": max(ratios)} if ratios else {}
    found |= {name: frame.numbers[name] for name in _RUN if name in frame.numbers}
    rates = [name for name in frame.numbers if _RATE.match(name)][:_MOST_RATES]
    return found | {name: frame.numbers[name] for name in rates} | _BAND


def _share(of: Mapping[str, Any], status: Status) -> float:
    """NaN where of no unit is known whether it fired."""
    known = of["num_units"] - of["unobserved"] - of["non_finite"]
    return of[status.value] / of["num_units"] if known > 0 else math.nan


def _of_site(site: Mapping[str, Any]) -> dict[str, float]:
    """What is had of one site; fractions of units that cannot die are left out."""
    shares = {f"{status.value}_fraction": _share(site, status) for status in _SHARES} if site["can_die"] else {}
    return shares | {name: site[name] for name in SITE_COLUMNS if name in site}


def _around_nought(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Edges around all values, 0 among them, so that no bucket mixes units that fire with those that do not."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    width = (high - low) / _BUCKETS
    if not 0 < width < math.inf:
        return np.array([low - 1, low, low + 1] if width == 0 else [low, 0.0, high])
    edges: NDArray[np.float64] = width * np.arange(math.floor(low / width), math.ceil(high / width) + 1.0)
    return edges
