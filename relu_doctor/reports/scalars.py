"""A diagnosis and a window as flat scalars, under names that stay the same: what any experiment tracker takes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pandas as pd

from relu_doctor.reports.words import plain_name
from relu_doctor.terms import Status

if TYPE_CHECKING:
    from relu_doctor.diagnose.diagnosis import Diagnosis
    from relu_doctor.training.windows import Window

ALL = "relu_doctor"
SITES = "relu_doctor_sites"
WORST = 12  # sites that are told one by one
UNKNOWN = (Status.UNOBSERVED.value, Status.NON_FINITE.value)
_COUNTED = (Status.DEAD, Status.UNPROVEN, Status.RARE, Status.DORMANT, Status.SATURATED)
_TAG = re.compile(r"[^\w.#()-]+")


def flat_scalars(diagnosis: Diagnosis) -> dict[str, float]:
    """The totals, and the sites that have lost most; see :meth:`~relu_doctor.Diagnosis.scalars`."""
    units, sites = diagnosis.units, diagnosis.table.sites
    mortal = [site.site_id for site in sites if site.can_die]
    own = units[units["site_id"].isin(mortal)]
    told = {f"{ALL}/{name}": value for name, value in _totals(own).items()}
    told[f"{ALL}/non_finite_fraction"] = share_of(units, Status.NON_FINITE)
    told[f"{ALL}/unobserved_fraction"] = share_of(units, Status.UNOBSERVED)
    told |= {f"{ALL}/dead": float((own["status"] == Status.DEAD.value).sum()), f"{ALL}/num_units": float(len(own))}
    tags = site_tags(diagnosis)
    rows = diagnosis.sites[diagnosis.sites["site_id"].isin(mortal)]
    order = ["dead_fraction", "silent_fraction"]
    worst = rows.sort_values(order, ascending=False, kind="stable")["site_id"].iloc[:WORST].astype(str)
    for site_id in worst:
        found = fractions(units[units["site_id"] == site_id])
        told |= {f"{tags[site_id]}/{name}": value for name, value in found.items()}
    return told


def window_scalars(window: Window) -> dict[str, float]:
    """A diagnosis's scalars, and what its window adds to them; see :meth:`Window.scalars`."""
    return flat_scalars(window.diagnosis) | {f"{ALL}/{name}": value for name, value in window_numbers(window).items()}


def window_numbers(window: Window) -> dict[str, float]:
    """Of a window, over all sites: ``deaths``, ``revivals``, the largest ``update_ratio``; and the run's own numbers.

    What was not had is left out.
    """
    of_sites = window.sites.dropna(axis="columns", how="all")
    told = {name: float(of_sites[name].sum()) for name in ("deaths", "revivals") if name in of_sites}
    if "update_ratio" in of_sites:
        told["update_ratio"] = float(of_sites["update_ratio"].max())
    return told | dict(window.numbers)


def site_tags(diagnosis: Diagnosis) -> dict[str, str]:
    """A tag per ``site_id``: the site's name as it is where that can be, and never one tag for two sites."""
    tags: dict[str, str] = {}
    for site in diagnosis.table.sites:
        tag = f"{SITES}/{_TAG.sub('_', plain_name(site.name))[:200] or '_'}"
        if tag in tags.values():
            tag = f"{tag}_{_TAG.sub('_', site.site_id)}"
        while tag in tags.values():
            tag += "_"
        tags[site.site_id] = tag
    return tags


def fractions(rows: pd.DataFrame) -> dict[str, float]:
    """Of all units; NaN where of none is known whether it fired."""
    if bool(rows["status"].isin(UNKNOWN).all()):
        return {"dead_fraction": float("nan"), "silent_fraction": float("nan")}
    dead = share_of(rows, Status.DEAD)
    return {"dead_fraction": dead, "silent_fraction": dead + share_of(rows, Status.UNPROVEN)}


def share_of(rows: pd.DataFrame, status: Status) -> float:
    """Which part of some units has a status."""
    return float((rows["status"] == status.value).mean()) if len(rows) else 0.0


def _totals(rows: pd.DataFrame) -> dict[str, float]:
    known = not bool(rows["status"].isin(UNKNOWN).all())
    shares = {f"{status.value}_fraction": share_of(rows, status) if known else float("nan") for status in _COUNTED}
    return {**shares, "silent_fraction": fractions(rows)["silent_fraction"]}
