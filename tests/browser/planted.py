"""Runs whose dead units were planted, as frames and in event files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relu_doctor.reports.frames import COLUMNS, MECHANISMS, ONSETS, STATUSES, Frame, ranges_of

DEAD, UNPROVEN, RARE, ACTIVE = (STATUSES.index(word) for word in ("dead", "unproven", "rare", "active"))
NEGATIVE_BIAS = MECHANISMS.index("negative_bias")
DEAD_UPSTREAM = MECHANISMS.index("dead_upstream")
_HELD = ("pass on the silence of an earlier layer", "are held dead by their bias")
DIED = ONSETS.index("died")


def frames(
    names: Sequence[str],
    sizes: Sequence[int],
    windows: int,
    *,
    worst: float = 0.6,
    peak: float = 0.5,
    seed: int = 0,
    ids: Sequence[str] | None = None,
) -> Iterator[Frame]:
    """A run in which units die in one wave around the middle; of site k, unit u in window ``deaths(...)[k][u]``."""
    times = deaths(sizes, windows, worst=worst, peak=peak, seed=seed)
    random = np.random.default_rng(seed + 1)
    base = [random.uniform(0.02, 0.6, size).astype("<f2") for size in sizes]
    rare = [random.random(size) < 0.02 for size in sizes]
    for window in range(windows):
        yield _frame(
            names, ids or [f"site{place}" for place in range(len(names))], times, base, rare, window, windows, random
        )


def later(frame: Frame, windows: int) -> Frame:
    """The same frame some windows later."""
    names = {"window": 1, "first_step": 50, "last_step": 50, "closed": 1}
    moved = {name: (frame.span[name] or 0) + windows * each for name, each in names.items()}
    return replace(frame, span=moved)


def broken(frame: Frame, place: int) -> Frame:
    """The same frame with NaN in every unit of a site."""
    site = frame.sites[place]
    start = sum(each["num_units"] for each in frame.sites[:place])
    status = frame.status.copy()
    status[start : start + site["num_units"]] = STATUSES.index("non_finite")
    none = dict.fromkeys(("dead", "unproven", "rare", "active", "deaths"), 0)
    sites = [*frame.sites[:place], {**site, **none, "non_finite": site["num_units"]}, *frame.sites[place + 1 :]]
    return replace(frame, status=status, sites=sites)


def deaths(sizes: Sequence[int], windows: int, *, worst: float, peak: float, seed: int = 0) -> list[NDArray[Any]]:
    """Per site, the window in which each unit falls silent; ``windows`` for never."""
    random = np.random.default_rng(seed)
    found = []
    for place, size in enumerate(sizes):
        share = worst * math.exp(-(((place - 0.35 * len(sizes)) / (0.35 * len(sizes) + 0.5)) ** 2))
        time = np.clip(random.normal(peak * windows, 0.06 * windows + 0.5, size), 1, windows - 1).astype(int)
        time[random.random(size) >= share] = windows
        found.append(time)
    return found


def _frame(
    names: Sequence[str],
    ids: Sequence[str],
    times: list[NDArray[Any]],
    base: list[NDArray[Any]],
    rare: list[NDArray[Any]],
    window: int,
    windows: int,
    random: np.random.Generator,
) -> Frame:
    steps = 50
    sites, statuses, units, findings = [], [], [], []
    for place, (name, time) in enumerate(zip(names, times, strict=True)):
        size = len(time)
        silent, fresh = time <= window, time == window
        status = np.full(size, ACTIVE, np.uint8)
        status[rare[place]] = RARE
        status[silent] = DEAD
        status[fresh] = UNPROVEN
        dead = int((status == DEAD).sum())
        rate = np.where(silent, 0, np.where(rare[place], 0.004, base[place])).astype("<f2")
        onset = np.where(silent, DIED, 0).astype(np.uint8)
        columns = {
            "inputs": np.full(size, 3200, "<i4"),
            "firing_rate": (rate * random.uniform(0.8, 1.2, size)).astype("<f2"),  # another every time, as in life
            "firing_rate_upper": np.where(silent, np.where(fresh, 0.03, 0.004), rate + 0.02).astype("<f2"),
            "pre_max": np.where(silent, -0.4, 2.5).astype("<f2"),
            "margin": np.where(silent, -1.5, np.nan).astype("<f2"),
            "bias": np.where(silent, -1.2, 0.1).astype("<f2"),
            "mechanism": np.where(silent, NEGATIVE_BIAS if place % 3 else DEAD_UPSTREAM, 0).astype(np.uint8),
            "onset": onset,
            "onset_step": np.where(silent, time * steps, -1).astype("<i4"),
        }
        assert list(columns) == [column for column, _ in COLUMNS]
        units.append(columns)
        statuses.append(status)
        sites.append(
            {
                "site_id": ids[place],
                "name": name,
                "rectifier": "relu",
                "producer": f"{name[:50]}.linear",
                "num_units": size,
                "can_die": True,
                "note": "",
                "dead": dead,
                "unproven": int(fresh.sum()),
                "rare": int((status == RARE).sum()),
                "dormant": 0,
                "saturated": 0,
                "non_finite": 0,
                "unobserved": 0,
                "active": int((status == ACTIVE).sum()),
                "deaths": int(fresh.sum()),
                "revivals": 0,
                "update_ratio": 0.003,
                "weight_norm": 4.0,
            }
        )
        if dead > size * 0.05:
            findings.append(
                {
                    "code": "RD205" if place % 3 else "RD202",
                    "site": name,
                    "title": f"{dead} of {size} units of {name[:60]} {_HELD[bool(place % 3)]}",
                    "evidence": f"{dead} units; their largest pre-activation is −0.4, and their bias is −1.2.",
                    "advice": "Lower the learning rate or its warm-up, or put normalisation before the rectifier.",
                    "units": ranges_of(np.flatnonzero(status == DEAD).tolist()),
                }
            )
    total = sum(len(time) for time in times)
    dead = sum(site["dead"] for site in sites)
    warm, cooling = min(1, (window + 1) / (0.45 * windows)), max(0, window / windows - 0.45)
    lr = 0.03 * warm * (0.5 + 0.5 * math.cos(math.pi * cooling))
    share = dead / total
    severity = "healthy" if share < 0.05 else "mild" if share < 0.2 else "serious" if share < 0.5 else "critical"
    verdict = {
        "label": severity,
        "severity": severity,
        "sentence": f"{dead:,} of {total:,} units are dead ({share:.1%}): they output 0 on every input.",
        "details": [f"Sure to fire on fewer than 1 % of inputs to come (95 %, all {total:,} units together)."],
        "coverage": f"{len(sites)} of {len(sites) + 1} sites observed on 3,200 inputs",
        "remarks": ["head.act was never called on these inputs: nothing is known of its 10 units."],
        "unit_word": "inputs",
        "max_firing_rate": 0.01,
        "confidence": 0.95,
    }
    alerts = []
    if window == windows // 2:
        told = "7 of 64 units fell silent together."
        alerts = [{"code": "RD701", "step": window * steps, "site": names[0], "message": told}]
    return Frame(
        {
            "window": window,
            "first_step": window * steps + 1,
            "last_step": (window + 1) * steps,
            "closed": 1.7e9 + window,
        },
        verdict,
        {"lr": lr, "loss": 2.3 * math.exp(-window / windows) + 0.02 * float(random.random()), "grad_norm": 1.0},
        sites,
        np.concatenate(statuses),
        units,
        sorted(findings, key=lambda finding: -sum(last - first + 1 for first, last in finding["units"])),
        alerts,
    )


def write(log_dir: Path, run: Iterable[Frame]) -> None:
    """Frames as an event file of the tab's."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    from relu_doctor.reports.tensorboard.values import records

    log_dir.mkdir(parents=True, exist_ok=True)
    writer = EventFileWriter(str(log_dir))
    for frame in run:
        event = Event(step=int(frame.span["last_step"] or 0), wall_time=float(frame.span["closed"] or 0))
        event.summary.CopyFrom(Summary(value=records(frame)))
        writer.add_event(event)
    writer.close()


def write_packed(log_dir: Path, run: Sequence[Frame], packed: Sequence[Any]) -> None:
    """Frames as other bytes than their own: per frame what its ``pack()`` would give."""

    class Told:
        def __init__(self, frame: Frame, parts: Any) -> None:
            self.span, self._parts = frame.span, parts

        def pack(self) -> Any:
            return self._parts

    frames: Any = [Told(frame, parts) for frame, parts in zip(run, packed, strict=True)]
    write(log_dir, frames)
