"""Unit tables made by hand from compact specs, for tests that need a diagnosis and no model.

``make_table(site("relu1", active=40, negative_bias=3))`` gives a table whose diagnosis calls 40 units active and 3
silent for their bias: dead or unproven, as ``num_inputs`` decides. Every value follows from the spec alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from relu_doctor.diagnose.diagnosis import Diagnosis, diagnose
from relu_doctor.diagnose.table import EVIDENCE, INTEGERS, Coverage, SiteRecord, UnitTable

Row = dict[str, float]
NAN = float("nan")


def _fires(rate: float, **values: float) -> Callable[[int, int], Row]:
    def make(index: int, inputs: int) -> Row:
        fired = max(1, min(inputs, round(inputs * (rate + 0.002 * (index % 50)))))
        found = {"inputs_fired": fired, "positions_fired": fired, "first_fired": index % 7, "last_fired": inputs - 1}
        return {"pre_max": 2.0, "pre_min": -2.0, "pre_mean": 0.0, "pre_std": 1.0, "post_mean": 0.5, **found, **values}

    return make


def _silent(offset: float, bias: float, reach: float, **values: float) -> Callable[[int, int], Row]:
    """Held down by max z = offset + bias + reach <= 0."""

    def make(index: int, inputs: int) -> Row:
        mean = offset + bias - 0.01 * (index % 5)
        found = {"pre_max": mean + reach, "pre_min": mean - reach, "pre_mean": mean, "pre_std": max(reach / 3, 1e-9)}
        return {**found, "bias": bias, "post_mean": 0.0, **values}

    return make


# What a kind of unit looks like: a function of its index in the site and of the inputs that it saw.
KINDS: Mapping[str, Callable[[int, int], Row]] = {
    "active": _fires(0.3),
    "rare": lambda index, inputs: {**_fires(0.3)(index, inputs), "inputs_fired": 1, "positions_fired": 1},
    "dormant": _fires(0.3, post_mean=0.001),
    "negative_bias": _silent(0.5, -4.0, 3.0),
    "input_offset": _silent(-4.0, 0.5, 3.0),
    "bias_or_offset": _silent(-2.0, -2.0, 3.0),
    "bias_and_offset": _silent(-4.0, -4.0, 3.0),
    "zero_weights": _silent(0.0, -0.5, 0.0, weight_l2=0.0),
    "constant": _silent(-1.0, -0.5, 0.0),  # dead upstream where a silent site feeds it, else constant inputs
    "normalization": _silent(0.0, -5.0, 4.0, gamma=1.0, beta=-5.0),  # needs norm="batch_norm"
    "unknown": _silent(-2.0, -2.0, 3.0, pre_mean=NAN),
    "not_selected": _silent(0.5, 0.0, 3.0),  # needs selects=True
    "saturated": lambda index, inputs: {"pre_max": 12.0, "pre_min": 7.0, "pre_mean": 9.0, "pre_std": 1.0},  # of ReLU6
    "non_finite": lambda index, inputs: {"non_finite_values": inputs, "pre_mean": NAN, "pre_max": NAN, "pre_min": NAN},
    "unobserved": lambda index, inputs: {"inputs": 0, "positions": 0, "pre_mean": NAN, "pre_max": NAN, "pre_min": NAN},
}
_USUAL: Row = {"inputs_fired": 0, "positions_fired": 0, "non_finite_values": 0, "first_fired": -1, "last_fired": -1}
_USUAL |= {"bias": 0.1, "weight_l2": 1.0, "gamma": NAN, "beta": NAN, "post_mean": 0.0, "pre_std": 1.0}


@dataclass(frozen=True, eq=False)
class Site:
    """A site to be: its record, and the rows of its units but for the inputs, which the table knows."""

    record: SiteRecord
    kinds: tuple[str, ...]
    num_inputs: int | None


def site(
    name: str,
    *,
    rectifier: str = "ReLU",
    low: float | None = 0.0,
    high: float | None = None,
    producer: str | None = None,
    feeds: tuple[str, ...] = (),
    norm: str = "",
    note: str = "",
    num_inputs: int | None = None,
    **units: int,
) -> Site:
    """A site with so many units of each kind of ``KINDS``, in the order given; ``site_id`` is ``id-`` and the name.

    Args:
        name, rectifier, low, high, producer, norm, note: as in :class:`SiteRecord`; ``low=None`` cannot die.
        feeds: names of the sites that this one reads.
        num_inputs: inputs that reached this site; ``None`` for all of the table's.
        **units: number of units per kind.
    """
    assert "saturated" not in units or high is not None or rectifier == "ReLU6", "saturated needs an upper edge"
    kinds = tuple(kind for kind, number in units.items() for _ in range(number))
    record = SiteRecord(
        name=name,
        site_id=f"id-{name}",
        rectifier=rectifier,
        producer=f"{name}.producer" if producer is None else producer,
        low=low,
        high=6.0 if high is None and rectifier == "ReLU6" else high,
        num_units=len(kinds),
        feeds=tuple(f"id-{each}" for each in feeds),
        norm=norm,
        decomposable=True,
        selects="not_selected" in units,
        note=note,
    )
    return Site(record, kinds, num_inputs)


def make_table(*sites: Site, num_inputs: int = 1797, **coverage: Any) -> UnitTable:
    """A table of some sites.

    Args:
        *sites: in forward order.
        num_inputs: inputs read; by default all of a set, each distinct.
        **coverage: further fields of :class:`Coverage`.
    """
    rows: list[dict[str, Any]] = []
    for each in sites:
        inputs = num_inputs if each.num_inputs is None else each.num_inputs
        for index, kind in enumerate(each.kinds):
            labels = {"site": each.record.name, "site_id": each.record.site_id, "rectifier": each.record.rectifier}
            seen = {"unit": index, "inputs": inputs, "positions": inputs}
            rows.append({**labels, **_USUAL, **seen, **KINDS[kind](index, inputs)})
    units = pd.DataFrame(rows, columns=["site", "site_id", "rectifier", *EVIDENCE])
    for name in ("unit", *INTEGERS):
        units[name] = units[name].astype(np.int64)
    for name in set(EVIDENCE) - {"unit", *INTEGERS}:
        units[name] = units[name].astype(np.float64)
    read: dict[str, Any] = {"available_inputs": num_inputs, "read_to_end": True, "passed": "1 tensor float32[Nx1x8x8]"}
    told = {"num_inputs": num_inputs, "distinct_inputs": num_inputs, **read, **coverage}
    return UnitTable(tuple(each.record for each in sites), units, Coverage(**told))


def make_diagnosis(*sites: Site, config: Any = None, history: Any = None, **coverage: Any) -> Diagnosis:
    """The diagnosis of :func:`make_table`, always with the same metadata."""
    return diagnose(make_table(*sites, **coverage), config, history=history, made={"created": "2025-01-01T00:00:00"})
