"""UnitTable: the evidence, one row per unit, nothing but numbers. It can be judged again without the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from relu_doctor.observe.parameters import ParameterReader
from relu_doctor.observe.sites import ActivationSite
from relu_doctor.observe.statistics.stats import NEVER, UnitStats

INTEGERS = ("inputs", "inputs_fired", "positions", "positions_fired", "non_finite_values", "first_fired", "last_fired")
FLOATS = ("pre_max", "pre_min", "pre_mean", "pre_std", "post_mean", "bias", "weight_l2", "gamma", "beta")
OF_PRE = ("pre_max", "pre_min", "pre_mean", "pre_std")  # empty where only outputs are seen
TRAIN_COLUMNS = ("train_inputs", "train_inputs_fired", "train_pre_max")
EVIDENCE = ("unit", *INTEGERS, *FLOATS)


@dataclass(frozen=True, slots=True)
class SiteRecord:
    """What a table knows of a site beside its units.

    Attributes:
        name, site_id, rectifier, producer: as in :class:`~relu_doctor.observe.sites.ActivationSite`.
        low, high: the open firing interval; ``None`` for an unbounded side.
        num_units: units; 0 where they could not be told.
        feeds: ``site_id`` of the sites it reads.
        readers: qualified names of the weights and scales that consume its units.
        norm: ``batch_norm``, ``norm`` or empty.
        decomposable: whether max z = offset + bias + reach holds with the bias of the table.
        unweighted_summand: something is added in without a weight.
        mixed: the same behind a normalisation: its gamma weighs all of it, the weights do not.
        selects: more than the interval decides what fires: a top-k, a learned threshold.
        note: what the report must say.
    """

    name: str
    site_id: str
    rectifier: str
    producer: str
    low: float | None
    high: float | None
    num_units: int
    feeds: tuple[str, ...] = ()
    readers: tuple[str, ...] = ()
    norm: str = ""
    decomposable: bool = False
    unweighted_summand: bool = False
    mixed: bool = False
    selects: bool = False
    note: str = ""

    @property
    def can_die(self) -> bool:
        """Whether a unit can be held where its slope is zero."""
        return self.low is not None or self.selects


@dataclass(frozen=True, slots=True)
class Coverage:
    """What was read and what was not: the first line of every report.

    Attributes:
        num_inputs: units of evidence read: inputs, or tokens where these are counted.
        distinct_inputs: of those, how many were no part of an exact repetition; repetitions are no evidence.
        available_inputs: inputs that the source holds, where it has a length.
        sampling: ``all``, ``spread`` (evenly over the source), ``head`` or ``auto``.
        read_to_end: the source was finite and was read to its end.
        passed: what was handed to the model of each batch.
        mode: eval, train or both.
        statistics: full or minimal.
        evidence: what counts as one unit of evidence, ``input`` or ``token``.
        sequences: inputs read, where tokens are counted; else ``None``.
        random_inputs: the inputs were drawn at random and are no evidence about real ones.
        exhaustive: the user says that the data are the whole population.
        masked: padding positions were excluded.
        unused: rectifier modules that no forward called.
        excluded: sites left out by the user's patterns.
        notes: other remarks, in order.
        source: where the model came from (checkpoint, step, epoch, ...), plain values.
    """

    num_inputs: int = 0
    distinct_inputs: int = 0
    available_inputs: int | None = None
    sampling: str = "all"
    read_to_end: bool = False
    passed: str = ""
    mode: str = "eval"
    statistics: str = "full"
    evidence: str = "input"
    sequences: int | None = None
    random_inputs: bool = False
    exhaustive: bool = False
    masked: bool = False
    unused: tuple[str, ...] = ()
    excluded: int = 0
    notes: tuple[str, ...] = ()
    source: Mapping[str, Any] = field(default_factory=dict)

    @property
    def units(self) -> str:
        """What is counted, as a report calls it: ``inputs`` or ``tokens``."""
        return f"{self.evidence}s"


@dataclass(frozen=True, slots=True, eq=False)
class UnitTable:
    """The evidence about every unit of a scan.

    Attributes:
        sites: in forward order.
        units: one row per unit, sites in the same order; columns ``site, site_id, rectifier`` and ``EVIDENCE``, and
            ``TRAIN_COLUMNS`` where both modes were run. Means and extremes are NaN where nothing was measured;
            ``first_fired`` and ``last_fired`` are -1 for a unit that never fired.
        coverage: what was read.
    """

    sites: tuple[SiteRecord, ...]
    units: pd.DataFrame
    coverage: Coverage


def tabulate(
    model: nn.Module,
    sites: list[ActivationSite],
    stats: Mapping[str, UnitStats],
    coverage: Coverage,
    *,
    train_stats: Mapping[str, UnitStats] | None = None,
) -> UnitTable:
    """Join statistics and parameters to one row per unit.

    Args:
        model: read for its parameters only.
        sites: in forward order, under their final names.
        stats: per ``site_id``; a site without any is unobserved.
        coverage: carried along.
        train_stats: the same from the train phase, where both modes were run.
    """
    records: list[SiteRecord] = []
    tables: list[dict[str, np.ndarray[Any, Any]]] = []
    reader = ParameterReader(model, sites)
    for site in sites:
        parameters = reader.read(site)
        observed = stats.get(site.site_id)
        low, high = site.rectifier.low, site.rectifier.high
        records.append(
            SiteRecord(
                name=site.name,
                site_id=site.site_id,
                rectifier=site.rectifier.name,
                producer=site.producer,
                low=None if np.isinf(low) else low,
                high=None if np.isinf(high) else high,
                num_units=site.num_units,
                feeds=site.feeds,
                readers=site.readers,
                norm=parameters.norm,
                decomposable=parameters.decomposable,
                unweighted_summand=site.unweighted_summand,
                mixed=site.mixed,
                selects=site.rectifier.selects or site.selected,
                note=site.note,
            )
        )
        if not site.num_units:
            continue
        columns = _columns(observed or UnitStats.empty(site.num_units), full=coverage.statistics == "full")
        if site.rectifier.on_output:
            columns.update(dict.fromkeys(OF_PRE, np.full(site.num_units, np.nan)))
        for name in ("bias", "weight_l2", "gamma", "beta"):
            columns[name] = getattr(parameters, name).numpy()
        if train_stats is not None:
            trained = train_stats.get(site.site_id) or UnitStats.empty(site.num_units)
            columns["train_inputs"] = trained.inputs.cpu().numpy()
            columns["train_inputs_fired"] = trained.inputs_fired.cpu().numpy()
            columns["train_pre_max"] = _finite(trained.pre_max.cpu().numpy())
        labels = {"site": site.name, "site_id": site.site_id, "rectifier": site.rectifier.name}
        columns |= {name: np.full(site.num_units, label, dtype=object) for name, label in labels.items()}
        tables.append(columns | {"unit": np.arange(site.num_units)})
    names = ["site", "site_id", "rectifier", *EVIDENCE, *(TRAIN_COLUMNS if train_stats is not None else ())]
    whole = {name: np.concatenate([columns[name] for columns in tables]) for name in names} if tables else None
    units = pd.DataFrame(whole, columns=names)
    return UnitTable(tuple(records), units, coverage)


def _finite(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.where(np.isfinite(values), values, np.nan).astype(np.float64, copy=False)


def _columns(stats: UnitStats, *, full: bool) -> dict[str, np.ndarray[Any, Any]]:
    stats = stats.to("cpu")
    columns: dict[str, np.ndarray[Any, Any]] = {
        name: getattr(stats, name).numpy().astype(np.int64) for name in INTEGERS
    }
    columns["first_fired"] = np.where(columns["first_fired"] == NEVER, -1, columns["first_fired"])
    columns["pre_max"] = _finite(stats.pre_max.numpy())
    seen = columns["positions"] > 0
    positions = np.maximum(columns["positions"], 1)
    measured = {
        "pre_min": stats.pre_min.numpy(),
        "pre_mean": stats.pre_mean.numpy(),
        "pre_std": stats.pre_std().numpy(),
        "post_mean": stats.post_abs_sum.numpy() / positions,
    }
    for name, values in measured.items():
        columns[name] = _finite(np.where(seen & full, values, np.nan))
    return columns
