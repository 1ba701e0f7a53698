"""Reading packed frames: light, so that TensorBoard reads them without loading PyTorch. The format is in frames.py."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relu_doctor.terms import Mechanism, Status

SCHEMA = 1
STATUSES = tuple(status.value for status in Status)
MECHANISMS = tuple(mechanism.value for mechanism in Mechanism)
ONSETS = ("", "born_dead", "found_dead", "died", "revived")
COLUMNS = (  # of a unit's numbers; rates and values in half precision: three digits
    ("inputs", "<i4"),
    ("firing_rate", "<f2"),
    ("firing_rate_upper", "<f2"),
    ("pre_max", "<f2"),
    ("margin", "<f2"),
    ("bias", "<f2"),
    ("mechanism", "u1"),
    ("onset", "u1"),
    ("onset_step", "<i4"),
)

Bytes = NDArray[np.uint8]


class FrameError(ValueError):
    """What was read is no frame, or one of a newer schema."""


def read_header(packed: bytes, *, findings: bool = True) -> dict[str, Any]:
    """The header of a packed frame.

    Args:
        packed: as it was written.
        findings: whether the findings are wanted; in a large network they are most of a header.

    Raises:
        FrameError: it is none, or of a newer schema.
    """
    try:
        text = _inflated(packed, 1 << 26)
        header = json.loads(text if findings else _without_findings(text))
        schema = int(header["schema"])
    except (ValueError, KeyError, TypeError) as error:
        raise FrameError(
            f"expected the header of a window that relu_doctor wrote, found other data ({error})."
        ) from error
    if schema > SCHEMA:
        raise FrameError(f"expected a window of schema {SCHEMA} or older, found {schema}; update relu-doctor.")
    return dict(header)


def _without_findings(text: bytes) -> bytes:
    """A header's text with its findings left out, where they stand as they are written: before the alerts.

    Inside of a text its quotation marks are escaped, so that neither key can be found there.
    """
    start, stop = text.find(b'"findings":['), text.rfind(b',"alerts":[')
    return text if not 0 <= start < stop else text[:start] + b'"findings":[]' + text[stop:]


def read_status(packed: bytes, num_units: int) -> Bytes:
    """The status of every unit: uint8 (units,).

    Raises:
        FrameError: these are no statuses of so many units.
    """
    raw = _inflated(packed, num_units)
    if len(raw) != num_units:
        raise FrameError(f"expected the status of {num_units:,} units, found that of {len(raw):,}.")
    return np.frombuffer(raw, np.uint8)


def read_numbers(packed: bytes, num_units: int, columns: Sequence[Sequence[str]] = COLUMNS) -> dict[str, NDArray[Any]]:
    """The numbers of one site's units, (units,) each.

    Raises:
        FrameError: these are no numbers of so many units.
    """
    dtypes = [(str(name), np.dtype(str(dtype))) for name, dtype in columns]
    size = num_units * sum(dtype.itemsize for _, dtype in dtypes)
    raw = np.frombuffer(_inflated(packed, size), np.uint8)
    if len(raw) != size:
        raise FrameError(f"expected {size:,} bytes for the numbers of {num_units:,} units, found {len(raw):,}.")
    found, place = {}, 0
    for name, dtype in dtypes:
        length = num_units * dtype.itemsize
        planes = raw[place : place + length].reshape(dtype.itemsize, num_units)
        found[name] = np.ascontiguousarray(planes.T).view(dtype).reshape(num_units)
        place += length
    return found


def _inflated(packed: bytes, most: int) -> bytes:
    """What was deflated, and no more than it may be."""
    reader = zlib.decompressobj()
    try:
        raw = reader.decompress(packed, most + 1)
    except zlib.error as error:
        raise FrameError(f"expected deflated data of a window, found other data ({error}).") from error
    if len(raw) > most or not reader.eof:
        raise FrameError(f"expected at most {most:,} bytes of a window's data, found more, or a part of them.")
    return raw
