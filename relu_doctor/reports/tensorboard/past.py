"""The past of a run: the status of every unit in each window, small enough to be kept until the run ends."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relu_doctor.reports.frames import STATUSES, Frame
from relu_doctor.terms import Status

_MOST = 512  # windows; beyond, every second one is left out
UNKNOWN = 255  # the site was not known yet
_LOST = [STATUSES.index(Status.DEAD.value), STATUSES.index(Status.UNPROVEN.value)]


@dataclass(frozen=True, slots=True)
class _Moment:
    step: int
    places: dict[str, tuple[int, int]]  # of each site: its first unit, and one past its last
    status: bytes  # deflated


class Past:
    """Statuses of past windows, evenly spread over the run."""

    def __init__(self) -> None:
        self._moments: list[_Moment] = []
        self._every = 1
        self._seen = 0

    def add(self, frame: Frame) -> None:
        """Keep one window."""
        if self._seen % self._every == 0:
            self._keep(frame)
            if len(self._moments) > _MOST:
                self._moments = self._moments[::2]
                self._every *= 2
        self._seen += 1

    def end(self, frame: Frame) -> None:
        """The last window is kept in any case."""
        if self._moments and self._moments[-1].step != frame.span["last_step"]:
            self._keep(frame)

    @property
    def steps(self) -> list[int]:
        """The last step of each window that is kept."""
        return [moment.step for moment in self._moments]

    def of(self, sites: Sequence[Mapping[str, Any]]) -> list[NDArray[np.uint8]]:
        """Of each site the status of its units, (units, windows); ``UNKNOWN`` where it was not known yet."""
        found = [np.full((site["num_units"], len(self._moments)), UNKNOWN, np.uint8) for site in sites]
        for column, moment in enumerate(self._moments):
            status = np.frombuffer(zlib.decompress(moment.status), np.uint8)
            for site, history in zip(sites, found, strict=True):
                start, stop = moment.places.get(site["site_id"], (0, 0))
                if stop - start == site["num_units"]:
                    history[:, column] = status[start:stop]
        return found

    def losses(self, sites: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
        """Of each site the largest dead and the largest unproven fraction that it had in one window."""
        found = np.zeros((len(sites), len(_LOST)))
        for moment in self._moments:
            status = np.frombuffer(zlib.decompress(moment.status), np.uint8)
            for place, site in enumerate(sites):
                start, stop = moment.places.get(site["site_id"], (0, 0))
                if stop - start == site["num_units"] > 0:
                    numbers = np.bincount(status[start:stop], minlength=len(STATUSES))[_LOST]
                    found[place] = np.maximum(found[place], numbers / site["num_units"])
        return [(dead, unproven) for dead, unproven in found.tolist()]

    def _keep(self, frame: Frame) -> None:
        stops = np.cumsum([0, *(site["num_units"] for site in frame.sites)], dtype=int).tolist()
        places = dict(zip((site["site_id"] for site in frame.sites), pairwise(stops), strict=True))
        if self._moments and self._moments[-1].places == places:
            places = self._moments[-1].places  # one for all windows
        status = zlib.compress(frame.status.tobytes(), 1)
        self._moments.append(_Moment(int(frame.span["last_step"] or 0), places, status))
