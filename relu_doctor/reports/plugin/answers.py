"""What the tab is told of a run: plain values for JSON, and bytes for what is told unit by unit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from relu_doctor.reports.packing import COLUMNS
from relu_doctor.reports.plugin.records import Columns, Kept, Run
from relu_doctor.reports.timelines import UNKNOWN, spread

_TOLD = ("firing_rate", "firing_rate_upper", "pre_max", "margin", "bias")  # over time


def window(kept: Kept) -> dict[str, Any]:
    """What one window says, its sites with their counts."""
    header = kept.header
    return {name: header[name] for name in ("verdict", "findings", "numbers", "alerts", "sites")}


def packed_columns(columns: Columns) -> bytes:
    """A site's columns one behind the other, in the order of ``COLUMNS``."""
    return b"".join(columns[name].astype(dtype).tobytes() for name, dtype in COLUMNS)


def windows_of(run: Run, site: int, unit: int) -> list[int]:
    """The windows that know a unit, by their places."""
    site_id = run.site(site)["site_id"]
    return [place for place, kept in enumerate(run.windows) if unit < dict(kept.summary.sites).get(site_id, 0)]


def history(run: Run, site: int, unit: int, numbers: Iterable[Columns | None]) -> dict[str, Any]:
    """One unit over all windows that know it; null for NaN, text for infinities.

    Args:
        run: whose it is.
        site: its place among the run's.
        unit: its place in the site.
        numbers: of the site, per window of :func:`windows_of`.
    """
    site_id, places = run.site(site)["site_id"], windows_of(run, site, unit)
    found: dict[str, list[Any]] = {name: [] for name in ("status", *_TOLD, "mechanism")}
    onset, onset_step = 0, -1
    for place, columns in zip(places, numbers, strict=True):
        kept = run.windows[place]
        found["status"].append(int(kept.status[(kept.summary.start_of(site_id) or 0) + unit]))
        for name in _TOLD:
            found[name].append(None if columns is None else number(columns[name][unit]))
        found["mechanism"].append(0 if columns is None else int(columns["mechanism"][unit]))
        if columns is not None:
            onset, onset_step = int(columns["onset"][unit]), int(columns["onset_step"][unit])
    return {"windows": places, **found, "onset": onset, "onset_step": onset_step}


def whole_column(run: Run, kept: Kept, name: str, numbers: Iterable[Columns | None]) -> bytes:
    """One column of every unit of all sites, ``UNKNOWN`` in each byte where nothing is kept; empty if nothing is.

    Args:
        run: whose window it is.
        kept: the window.
        name: of the column.
        numbers: per site of the window.
    """
    dtype, pieces, any_kept = np.dtype(dict(COLUMNS)[name]), [], False
    for (_, units), columns in zip(kept.summary.sites, numbers, strict=True):
        any_kept |= columns is not None
        unknown = np.full(units * dtype.itemsize, UNKNOWN, np.uint8).view(dtype)
        pieces.append(unknown if columns is None else columns[name].astype(dtype))
    return spread(np.concatenate(pieces), kept.summary, run.sites).tobytes() if any_kept else b""


def number(value: Any) -> float | str | None:
    """A number as JSON can tell it, with all digits that half precision has.

    >>> number(float("nan")), number(float("-inf")), number(np.float16(0.1))
    (None, '-Infinity', 0.09998)
    """
    value = float(value)
    if math.isfinite(value):
        return float(f"{value:.4g}")
    return None if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
