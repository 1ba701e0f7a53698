"""What a monitor keeps in a checkpoint, so that a resumed run goes on as if it had never stopped.

Plain values and tensors on the CPU, so that ``torch.load(..., weights_only=True)`` reads them. Diagnoses, tables and
the alerts' words are not in it: those are for a history.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from relu_doctor.errors import MonitorError
from relu_doctor.observe.live import PHASE
from relu_doctor.observe.statistics.stats import UnitStats
from relu_doctor.training.evidence import Carrier, Sightings
from relu_doctor.training.lives import Lives, SiteLives
from relu_doctor.training.numbers import Mean, RunNumbers

if TYPE_CHECKING:
    from relu_doctor.training.monitor import Monitor

VERSION = 5
_STATISTICS = tuple(each.name for each in fields(UnitStats) if "law" in each.metadata)
_LIVES = tuple(each.name for each in fields(SiteLives))


def state_of(monitor: Monitor) -> dict[str, Any]:
    """What there is to keep of a monitor, as it is between two steps."""
    schedule, closer, live, look = monitor._schedule, monitor._closer, monitor._live, monitor._look
    open_stats = live.probe.stats.get(PHASE, {})
    return {
        "version": VERSION,
        "step": schedule.step,
        "start": schedule.start,
        "closely": schedule._closely,
        "from_start": closer._from_start,
        "mistrusted": sorted(closer.mistrusted),
        "windows": monitor.windows,
        "first_step": monitor._first_step,
        "alerts": monitor._alerts.state(),
        "lives": {site_id: _tensors(lives, _LIVES) for site_id, lives in closer.lives.sites.items()},
        "treated": _clones(monitor._maturity.treated),
        "treatments": [[step, site_id, units.clone()] for step, site_id, units in closer.treatments],
        "carried": _carried_of(closer.carrier),
        "sightings": _sightings_of(closer.sightings),
        "dormant": {site_id: units.clone() for site_id, units in closer._dormant.items()},
        "heard": {} if monitor._watch is None else monitor._watch.heard(),
        "usual": None if look._usual is None else torch.from_numpy(look._usual.copy()),
        "open": {
            "stats": {site_id: _stats_of(stats) for site_id, stats in open_stats.items()},
            "observed": [list(each) for each in monitor._observed],
            "num_inputs": live.num_inputs,
            "told": [[_digits(told), count] for told, count in live._told],
            "ratios": {} if monitor._meter is None else monitor._meter.state(),
            "close_since": look.since,
            "close_ordinal": look._first_ordinal,
            "close_inputs": dict(look._inputs),
            "looked": look._looked,
            "numbers": _numbers_of(monitor._numbers),
        },
    }


def restore(monitor: Monitor, state: Mapping[str, Any]) -> None:
    """Bring a monitor that has seen nothing to where another was.

    The open window is that of the process which kept the state: of several ranks, the first takes it.

    Raises:
        MonitorError: the monitor has made a step, or the state is none of a monitor.
    """
    given: object = state
    if not isinstance(given, Mapping):
        raise MonitorError(f"expected the state of a monitor, as state_dict() gives it, found {type(given).__name__}.")
    if state.get("version") != VERSION:
        raise MonitorError(
            f"expected the state of a monitor (version {VERSION}), found version {state.get('version')!r}; "
            "begin anew, with start_step= of the run."
        )
    missing = sorted(set(state_of(monitor)) - set(state))
    if missing:
        raise MonitorError(
            f"expected the state of a monitor, as state_dict() gives it, found one without {missing[0]!r}."
        )
    if monitor._seen_forwards or monitor._schedule.step != monitor._schedule.start:
        raise MonitorError("load_state_dict() was called after step(); call it right after the monitor was made.")
    schedule, closer = monitor._schedule, monitor._closer
    schedule.step, schedule.start = state["step"], state["start"]
    schedule._closely = max(state["closely"], 1)  # the next forward shows the sites, without which nothing is watched
    closer._from_start, closer.mistrusted = state["from_start"], set(state["mistrusted"])
    monitor.windows, monitor._first_step = state["windows"], state["first_step"]
    monitor._alerts.remember(state["alerts"])
    closer.lives = Lives()
    closer.lives.sites = {site_id: SiteLives(**_clones(kept)) for site_id, kept in state["lives"].items()}
    monitor._maturity.treated = _clones(state["treated"])
    closer.treatments = [(step, site_id, units.clone()) for step, site_id, units in state["treatments"]]
    closer.carrier = _carrier_from(state["carried"])
    closer.sightings = _sightings_from(state["sightings"])
    closer._dormant = _clones(state["dormant"])
    monitor._heard = _clones(state["heard"])
    monitor._remembered = {*state["lives"], *state["heard"], *state["open"]["stats"]}
    if _is_first():
        _restore_open(monitor, state["open"], state["usual"])


def _restore_open(monitor: Monitor, kept: Mapping[str, Any], usual: Tensor | None) -> None:
    live, look = monitor._live, monitor._look
    device = next((parameter.device for parameter in monitor.model.parameters()), torch.device("cpu"))
    stats = {site_id: _stats_from(each).to(device) for site_id, each in kept["stats"].items()}
    if stats:
        live.probe.stats[PHASE] = stats
    monitor._observed = [(ordinal, step) for ordinal, step in kept["observed"]]
    live.num_inputs = kept["num_inputs"]
    live._told = [(_numbers(told), count) for told, count in kept["told"]]
    monitor._measured = {name: _clones(each) for name, each in kept["ratios"].items()}
    look.since, look._first_ordinal = kept["close_since"], kept["close_ordinal"]
    look._inputs, look._looked = dict(kept["close_inputs"]), kept["looked"]
    look._usual = None if usual is None else usual.numpy().copy()
    _restore_numbers(monitor._numbers, kept["numbers"])


def _is_first() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _tensors(holder: object, names: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: getattr(holder, name).to("cpu", copy=True) for name in names}


def _clones(kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in kept.items()}


def _stats_of(stats: UnitStats) -> dict[str, Any]:
    """One element where a statistic is the same for all units, as it is held."""
    held = {name: getattr(stats, name) for name in _STATISTICS}
    brief = {name: value if value.stride(0) else value[:1] for name, value in held.items()}
    return {"num_units": stats.num_units, **{name: value.to("cpu", copy=True) for name, value in brief.items()}}


def _stats_from(kept: Mapping[str, Any]) -> UnitStats:
    return UnitStats.of(kept["num_units"], {name: kept[name].clone() for name in _STATISTICS if name in kept})


def _carried_of(carrier: Carrier) -> dict[str, Any]:
    return {
        site_id: {"since": carried.since.clone(), "stats": _stats_of(carried.stats)}
        for site_id, carried in carrier._carried.items()
    }


def _carrier_from(kept: Mapping[str, Any]) -> Carrier:
    carrier = Carrier()
    for site_id, each in kept.items():
        carrier.carry(site_id, _stats_from(each["stats"]), each["since"].clone())
    return carrier


def _digits(digests: list[int] | None) -> Tensor | None:
    """Unsigned 64-bit numbers as int64, the same bits."""
    return None if digests is None else torch.from_numpy(np.array(digests, dtype=np.uint64).view(np.int64))


def _numbers(digits: Tensor | None) -> list[int] | None:
    return None if digits is None else [int(each) for each in digits.numpy().view(np.uint64)]


def _sightings_of(sightings: Sightings) -> dict[str, Any]:
    return {
        "digests": _digits(list(sightings._last)),
        "windows": torch.tensor(list(sightings._last.values()), dtype=torch.int32),
        "counts": list(sightings._counts),
    }


def _sightings_from(kept: Mapping[str, Any]) -> Sightings:
    sightings = Sightings()
    sightings._last = dict(zip(_numbers(kept["digests"]) or (), kept["windows"].tolist(), strict=True))
    sightings._counts = list(kept["counts"])
    return sightings


def _numbers_of(numbers: RunNumbers) -> dict[str, list[float]]:
    return {name: [float(mean._sum), mean._count] for name, mean in numbers._means.items()}


def _restore_numbers(numbers: RunNumbers, kept: Mapping[str, list[float]]) -> None:
    for name, (total, count) in kept.items():
        mean = numbers._means.setdefault(name, Mean())
        mean._sum, mean._count = total, int(count)
