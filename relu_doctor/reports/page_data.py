"""The data of a page: what the tab would ask TensorBoard for, packed so that a whole run fits into a file to share.

What is told unit by unit lies unit by unit, a unit's windows one behind the other, because a unit seldom changes: that
deflates well. The front end's embedded.js reads it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relu_doctor.reports.frames import Frame
from relu_doctor.reports.packing import COLUMNS
from relu_doctor.reports.timelines import UNKNOWN, Row, Summary, spread, summarize, timeline, union

DECADES = 6  # of firing rates that are told: from one in a million
_SHADES = 253  # steps of them; 0 is never, 254 is always, 255 is not known
_MOST_CELLS = 20_000_000  # units times windows; of more, every second, third, … window is there
_MOST_RATES = 2_000_000  # units times windows of which firing rates are told, and not of the last window alone

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the data, under the name by which the front end finds it."""

    name: str
    data: bytes


def parts_of(frames: Sequence[Frame], title: str, made: int | None = None) -> list[Part]:
    """The data of a run.

    Args:
        frames: by ascending step; at least one.
        title: the name of the run.
        made: how many windows the run had, where ``frames`` are not all.
    """
    total = max(len(frames), made or 0, 1 + max((int(frame.span["window"] or 0) for frame in frames), default=0))
    units = max(sum(site["num_units"] for site in frame.sites) for frame in frames)
    frames = _thinned(frames, max(1, _MOST_CELLS // max(units, 1)))
    summaries = [summarize(frame.header, place) for place, frame in enumerate(frames)]
    sites = union([frame.sites for frame in frames])
    told = timeline(title, summaries, sites)
    told["made"] = total
    status = _stacked([frame.status for frame in frames], summaries, sites)
    held = _stacked([_column(frame, "mechanism") for frame in frames], summaries, sites)
    parts = [Part("status", _unit_major(status)), Part("mechanism", _unit_major(held))]
    if told["num_units"] * len(frames) <= _MOST_RATES:
        rates = [coded(_column(frame, "firing_rate")) for frame in frames]
        parts.append(Part("rates", _unit_major(_stacked(rates, summaries, sites))))
    windows, marks = _windows(frames, sites)
    last = b"".join(
        spread(_column(frames[-1], name).astype(dtype), summaries[-1], sites).tobytes() for name, dtype in COLUMNS
    )
    whole = {"timeline": told, "windows": windows, "decades": DECADES, "shades": _SHADES}
    return [Part("data", _dumped(whole)), *parts, Part("marks", marks), Part("last", last)]


def coded(rates: NDArray[Any]) -> Bytes:
    """Firing rates in a byte each, on a logarithmic scale.

    >>> coded(np.array([0, 1e-9, 1e-6, 1, np.nan])).tolist()
    [0, 1, 1, 254, 255]
    """
    values = rates.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = 1 + np.round(_SHADES * np.clip(1 + np.log10(values) / DECADES, 0, 1))
    return np.where(np.isnan(values), UNKNOWN, np.where(values <= 0, 0, scaled)).astype(np.uint8)


def _thinned(frames: Sequence[Frame], most: int) -> Sequence[Frame]:
    """At most so many, evenly; the first and the last are among them."""
    if len(frames) <= most:
        return frames
    if most == 1:
        return frames[-1:]
    places = sorted({round(place * (len(frames) - 1) / (most - 1)) for place in range(most)})
    return [frames[place] for place in places]


def _column(frame: Frame, name: str) -> NDArray[Any]:
    """(units,), of all sites."""
    dtype = np.dtype(dict(COLUMNS)[name])
    return np.concatenate([columns[name].astype(dtype) for columns in frame.units] or [np.zeros(0, dtype)])


def _stacked(values: Sequence[NDArray[Any]], summaries: Sequence[Summary], sites: Sequence[Row]) -> Bytes:
    """(windows, units of all sites)."""
    return np.stack([spread(each, window, sites) for each, window in zip(values, summaries, strict=True)])


def _unit_major(values: Bytes) -> bytes:
    return np.ascontiguousarray(values.T).tobytes()


def _windows(frames: Sequence[Frame], sites: Sequence[Row]) -> tuple[list[Row], bytes]:
    """What each window says; which units its findings are about is told by bits.

    A finding (its code and site) that comes in several windows has a layer of bits: per unit of its site the windows in
    which it is about that unit, eight to a byte.
    """
    places = {site["name"]: place for place, site in reversed(list(enumerate(sites)))}
    layers: dict[tuple[str, str], NDArray[np.bool_]] = {}
    windows: list[Row] = []
    for index, frame in enumerate(frames):
        findings = []
        for finding in frame.findings:
            key = (finding["code"], finding["site"])
            if finding["units"] and finding["site"] in places:
                size = sites[places[finding["site"]]]["num_units"]
                layer = layers.setdefault(key, np.zeros((size, len(frames)), np.bool_))
                for first, last in finding["units"]:
                    layer[first : last + 1, index] = True
            told = {name: finding[name] for name in ("code", "site", "title", "evidence", "advice")}
            findings.append({**told, "layer": list(layers).index(key) if key in layers else -1})
        windows.append({"verdict": dict(frame.verdict), "findings": findings})
    bits = [np.packbits(layer, axis=1, bitorder="little").tobytes() for layer in layers.values()]
    windows[0]["layers"] = [layer.shape[0] for layer in layers.values()]
    return windows, b"".join(bits)


def _dumped(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")
