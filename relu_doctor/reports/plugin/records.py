"""Runs as TensorBoard holds them: the windows of each, read through its data provider, kept while they are looked at.

A data provider hands out whole time series, never a range of one. So the packed windows of the runs that were asked
for last are kept here, and read anew when TensorBoard has loaded a later one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.errors import PublicError

from relu_doctor.reports.packing import FrameError, read_header, read_numbers, read_status
from relu_doctor.reports.plugin.names import MOST_BLOBS, PLUGIN, UNITS_TAG, WINDOWS_TAG
from relu_doctor.reports.timelines import Row, Summary, spread, summarize, union

ALL = 1 << 30  # more than any time series has
_AT_ONCE = 32  # blobs that are asked for
_MOST_BYTES = 1 << 28  # of packed windows kept, of all runs together; the run in use is kept whatever its size
Stamp = tuple[int, float]
Columns = Mapping[str, NDArray[Any]]


class NotFoundError(LookupError):
    """There is no such run, window or site."""


@dataclass(frozen=True, slots=True)
class Kept:
    """One window: its packed header and status, and what is always needed of its header."""

    step: int
    packed_header: bytes
    packed_status: bytes
    summary: Summary

    @property
    def header(self) -> Row:
        """All of it, read again: it is too large to be kept for every window."""
        return read_header(self.packed_header)

    @property
    def status(self) -> NDArray[np.uint8]:
        """uint8 (units,), of its own sites."""
        return read_status(self.packed_status, self.summary.num_units)


@dataclass(frozen=True, eq=False)
class Run:
    """The windows of one run, by ascending step.

    Attributes:
        name: as TensorBoard calls it.
        windows: those that could be read.
        unreadable: what was wrong with the others, a sentence each.
        sites: of all windows together, in forward order; ``start`` is the place of the first unit among all units.
    """

    name: str
    windows: Sequence[Kept]
    unreadable: Sequence[str]
    sites: Sequence[Row]
    references: Mapping[int, Sequence[str]] = field(repr=False)  # step -> keys of the blobs of numbers

    @property
    def num_units(self) -> int:
        """Of all sites together."""
        return sum(site["num_units"] for site in self.sites)

    def window(self, index: int) -> Kept:
        """One window by its place.

        Raises:
            NotFoundError: there are fewer.
        """
        if not 0 <= index < len(self.windows):
            raise NotFoundError(f"expected a window from 0 to {len(self.windows) - 1}, found {index}.")
        return self.windows[index]

    def site(self, index: int) -> Row:
        """One site by its place.

        Raises:
            NotFoundError: there are fewer.
        """
        if not 0 <= index < len(self.sites):
            raise NotFoundError(f"expected a site from 0 to {len(self.sites) - 1}, found {index}.")
        return self.sites[index]

    def status(self, index: int) -> bytes:
        """A byte per unit of all sites together, ``UNKNOWN`` where the window does not know the site."""
        kept = self.window(index)
        return spread(kept.status, kept.summary, self.sites).tobytes()

    def size(self) -> int:
        """Bytes that are kept of it, about."""
        packed = sum(len(kept.packed_header) + len(kept.packed_status) for kept in self.windows)
        return packed + sum(len(key) for keys in self.references.values() for key in keys)


class Records:
    """Reads runs through a data provider; safe to use from several threads.

    Args:
        provider: TensorBoard's.
    """

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self._lock = threading.Lock()
        self._runs: OrderedDict[tuple[str, str], tuple[Stamp, Run]] = OrderedDict()
        self._summaries: dict[tuple[str, str], tuple[Stamp, Row]] = {}
        # An answer of the fast reader takes 40 ms to come, whatever its size; many may be on their way.
        self._pool = ThreadPoolExecutor(_AT_ONCE, "relu_doctor")

    def summaries(self, context: Any, experiment: str) -> list[Row]:
        """Per run: ``run``, ``windows`` (kept), ``made``, ``first_step``, ``last_step``, ``unreadable`` (first)."""
        found = []
        for name, stamp in sorted(self._stamps(context, experiment).items()):
            with self._lock:
                known = self._summaries.get((experiment, name))
            if known is None or known[0] != stamp:
                known = (stamp, self._summary(self.run(context, experiment, name)))
                with self._lock:
                    self._summaries[experiment, name] = known
            found.append(known[1])
        return found

    def run(self, context: Any, experiment: str, name: str) -> Run:
        """A run as it stands now.

        Raises:
            NotFoundError: there is none of that name with windows.
        """
        stamp = self._stamps(context, experiment, name).get(name)
        if stamp is None:
            raise NotFoundError(f"expected a run that relu_doctor watched, found none named {name[:200]!r}.")
        with self._lock:
            known = self._runs.get((experiment, name))
            if known is not None and known[0] == stamp:
                self._runs.move_to_end((experiment, name))
                return known[1]
        run = self._read(context, experiment, name, known[1] if known else None)
        with self._lock:
            self._runs[experiment, name] = (stamp, run)
            self._runs.move_to_end((experiment, name))
            while len(self._runs) > 1 and sum(each.size() for _, each in self._runs.values()) > _MOST_BYTES:
                self._runs.popitem(last=False)
        return run

    def numbers(
        self, context: Any, run: Run, wanted: Iterable[tuple[Kept, str]], *, strict: bool = True
    ) -> Iterator[Columns | None]:
        """The columns of sites in windows, one after another; None where they are not kept.

        Args:
            context: TensorBoard's.
            run: whose windows they are.
            wanted: windows and ``site_id``.
            strict: False gives None, too, for what cannot be read, so that one damaged blob does not hide the others.

        Raises:
            FrameError: what is kept cannot be read, and ``strict``.
        """
        places = [(kept, site_id, *self._place(run, kept, site_id)) for kept, site_id in wanted]
        blobs = {key: self._pool.submit(self._blob, context, key) for _, _, key, _ in places if key is not None}
        for kept, site_id, key, place in places:
            blob = None if key is None else blobs[key].result()
            if blob is None:
                yield None
                continue
            try:
                columns = _columns(blob, place, dict(kept.summary.sites)[site_id])
            except FrameError:
                if strict:
                    raise
                columns = None
            yield columns

    @staticmethod
    def _place(run: Run, kept: Kept, site_id: str) -> tuple[str | None, int]:
        """The key of the blob that a site's numbers lie in, and their place in it."""
        names = [name for name, _ in kept.summary.sites]
        keys = run.references.get(kept.step, ())
        if site_id not in names:
            return None, 0
        blob, place = divmod(names.index(site_id), sites_per_blob(len(names)))
        return (keys[blob] if blob < len(keys) else None), place

    def _blob(self, context: Any, key: str) -> bytes | None:
        try:
            return bytes(self._provider.read_blob(context, blob_key=key))
        except PublicError:  # dropped meanwhile; or the fast reader, which reads no blob of a run named with quotes
            return None

    def _stamps(self, context: Any, experiment: str, name: str | None = None) -> dict[str, Stamp]:
        """Per run, what changes when a window comes."""
        listed = self._provider.list_tensors(
            context, experiment_id=experiment, plugin_name=PLUGIN, run_tag_filter=_of(name, WINDOWS_TAG)
        )
        return {
            run: (int(tags[WINDOWS_TAG].max_step or 0), float(tags[WINDOWS_TAG].max_wall_time or 0))
            for run, tags in listed.items()
            if WINDOWS_TAG in tags
        }

    def _read(self, context: Any, experiment: str, name: str, before: Run | None) -> Run:
        read = self._provider.read_tensors(
            context,
            experiment_id=experiment,
            plugin_name=PLUGIN,
            downsample=ALL,
            run_tag_filter=_of(name, WINDOWS_TAG),
        )
        known = {kept.step: kept for kept in before.windows} if before else {}
        found: dict[int, Kept] = {}
        unreadable: list[str] = []
        for datum in read.get(name, {}).get(WINDOWS_TAG, ()):
            try:
                kept = _kept(int(datum.step), datum.numpy, known.get(int(datum.step)))
            except FrameError as error:
                unreadable.append(f"step {datum.step}: {error}")
            else:
                found[kept.step] = kept
        blobs = self._provider.read_blob_sequences(
            context, experiment_id=experiment, plugin_name=PLUGIN, downsample=ALL, run_tag_filter=_of(name, UNITS_TAG)
        )
        references = {
            int(datum.step): tuple(value.blob_key for value in datum.values)
            for datum in blobs.get(name, {}).get(UNITS_TAG, ())
        }
        windows = [found[step] for step in sorted(found)]
        layouts = {kept.summary.sites: kept for kept in reversed(windows)}  # the earliest window of each
        sites = union([kept.header["sites"] for kept in reversed(layouts.values())])
        return Run(name, windows, unreadable, sites, references)

    @staticmethod
    def _summary(run: Run) -> Row:
        last = max(
            (kept.summary.told["window"] for kept in run.windows if kept.summary.told["window"] is not None),
            default=None,
        )
        return {
            "run": run.name,
            "windows": len(run.windows),
            "made": len(run.windows) if last is None else max(int(last) + 1, len(run.windows)),
            "first_step": run.windows[0].summary.told["first_step"] if run.windows else None,
            "last_step": run.windows[-1].summary.told["last_step"] if run.windows else None,
            "unreadable": list(run.unreadable[:1]),
        }


def sites_per_blob(sites: int) -> int:
    """How many neighbouring sites share a blob.

    >>> sites_per_blob(64), sites_per_blob(65)
    (1, 2)
    """
    return max(-(-sites // MOST_BLOBS), 1)


def split_blob(blob: bytes) -> list[bytes]:
    """The packed numbers of the sites that share a blob.

    Raises:
        FrameError: it was cut short, or is no such blob.
    """
    count = int.from_bytes(blob[:4], "little")
    start = 4 + 4 * count
    if count == 0 or start > len(blob):
        raise FrameError(f"expected the lengths of {count:,} sites' numbers, found {len(blob):,} bytes in all.")
    lengths = [int(length) for length in np.frombuffer(blob, "<u4", count, 4)]
    if start + sum(lengths) != len(blob):
        raise FrameError(f"expected {start + sum(lengths):,} bytes of numbers, found {len(blob):,}.")
    return [blob[first:last] for first, last in pairwise(accumulate(lengths, initial=start))]


def _columns(blob: bytes, place: int, units: int) -> Columns:
    """The numbers of one of the sites that share a blob.

    Raises:
        FrameError: they cannot be read.
    """
    pieces = split_blob(blob)
    if place >= len(pieces):
        raise FrameError(f"expected the numbers of {place + 1} sites, found those of {len(pieces)}.")
    return read_numbers(pieces[place], units)


def _kept(step: int, values: Any, known: Kept | None) -> Kept:
    """One record; the one that is known where it has not changed.

    Raises:
        FrameError: it is none of ours.
    """
    strings = np.asarray(values)
    parts = [bytes(part) for part in strings.ravel().tolist()] if strings.dtype == object else []
    if len(parts) != 2:
        raise FrameError(f"expected a window's header and status, found {len(parts)} parts.")
    if known is not None and [known.packed_header, known.packed_status] == parts:
        return known
    kept = Kept(step, parts[0], parts[1], summarize(read_header(parts[0], findings=False), step))
    read_status(parts[1], kept.summary.num_units)  # so that what cannot be read is told now
    return kept


def _of(run: str | None, tag: str) -> Any:
    from tensorboard.data.provider import RunTagFilter

    return RunTagFilter(runs=None if run is None else [run], tags=[tag])
