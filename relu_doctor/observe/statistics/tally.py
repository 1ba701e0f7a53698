"""What the compiled loops leave, and a site's totals of it: arrays that compiled code adds to in place."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relu_doctor.observe.statistics.stats import UnitStats

Array = np.ndarray[Any, Any]


@lru_cache(maxsize=1)
def _loops() -> ModuleType:
    from relu_doctor.observe.statistics import compiled  # where there is a tally, there is numba

    return compiled


def _tensors(results: Array) -> dict[str, Tensor]:
    """Results under their names, in the same memory."""
    loops = _loops()
    counts = {"non_finite_values": loops.NOT_FINITE, "positions": loops.SEEN, "positions_fired": loops.FIRED}
    reals = {
        "pre_max": loops.MAX,
        "pre_min": loops.MIN,
        "pre_mean": loops.MEAN,
        "pre_squares": loops.SPREAD,
        "post_abs_sum": loops.OUTPUT,
    }
    return {
        **{name: torch.from_numpy(results[row]) for name, row in counts.items() if row < len(results)},
        **{name: torch.from_numpy(results[row].view(np.float64)) for name, row in reals.items() if row < len(results)},
    }


@dataclass(slots=True)
class Tally:
    """One call, or several calls of one forward on the same inputs.

    Attributes:
        results: (rows, units).
        fired: uint8 (inputs, units): whether any position of the input fired.
        valid: bool (inputs,), False for inputs that are all padding; ``None`` where there are none.
        double: the values are float64, and so their maxima are kept.
    """

    results: Array
    fired: Array
    valid: Array | None
    double: bool

    @property
    def least(self) -> bool:
        """Whether these are the minimal statistics."""
        return len(self.results) == int(_loops().LEAST_ROWS)

    def stats(self) -> UnitStats:
        """All but what counts inputs, as tensors."""
        measured = _tensors(self.results)
        if self.least:
            measured["non_finite_values"] = measured["non_finite_values"].int()
            measured["pre_max"] = measured["pre_max"] if self.double else measured["pre_max"].float()
        return UnitStats.of(self.num_units, measured)

    def put_output(self, magnitude: Tensor) -> None:
        """Set the summed absolute post-activation per unit, float64 (units,)."""
        self.results[_loops().OUTPUT] = magnitude.numpy().view(np.int64)

    @property
    def num_units(self) -> int:
        """How many units were counted."""
        return int(self.results.shape[1])

    def accepts(self, other: Tally, *, others: bool) -> bool:
        """Whether another call may be on the same inputs, or is on others."""
        return (others or self.fired.shape == other.fired.shape) and self.least == other.least

    def add(self, other: Tally, *, others: bool) -> None:
        """Take in another call that was accepted."""
        _loops().add(self.results.view(np.float64), self.results, other.results.view(np.float64), other.results)
        if others:
            self.valid = None if self.valid is other.valid is None else np.append(self._valid(), other._valid())
            self.fired = np.concatenate((self.fired, other.fired))
            return
        np.bitwise_or(self.fired, other.fired, out=self.fired)
        if self.valid is not None:
            self.valid = None if other.valid is None else self.valid | other.valid

    def _valid(self) -> Array:
        return np.ones(len(self.fired), np.bool_) if self.valid is None else self.valid


class Ledger:
    """The totals of one site, of which its :class:`UnitStats` are a view.

    Args:
        before: what was counted before.
        least: only the minimal statistics are kept, in 16 bytes per unit.
        double: maxima are kept in float64.

    Attributes:
        stats: the totals as tensors, which go on as they do.
    """

    def __init__(self, before: UnitStats, *, least: bool, double: bool) -> None:
        units = before.num_units
        self.inputs = before.inputs[:1].numpy().copy()
        self.fired = np.empty((1 if least else 3, units), np.int64)  # inputs that fired, the first and the last of them
        self.fired[0] = before.inputs_fired.numpy()
        if least:
            self.highest = before.pre_max.numpy().astype(np.float64 if double else np.float32)
            self.not_finite = before.non_finite_values.numpy().astype(np.int32)
        else:
            self.fired[1], self.fired[2] = before.first_fired.numpy(), before.last_fired.numpy()
            self.results = np.empty((_loops().ROWS, units), np.int64)
            for name, values in _tensors(self.results).items():
                values.copy_(getattr(before, name))
        self.stats = self._view()

    @classmethod
    def of(cls, before: UnitStats, tally: Tally) -> Ledger | None:
        """The ledger to which a forward is added; ``None`` where what was counted before is held in another way.

        Args:
            before: what was counted before; its own ledger is gone on with.
            tally: of the forward.
        """
        if before.ledger is not None:
            ledger: Ledger = before.ledger
            return ledger if ledger.fits(tally) else None
        uniform = before.inputs.device.type == "cpu" and bool((before.inputs == before.inputs[0]).all())
        return cls(before, least=tally.least, double=tally.double) if uniform else None

    @property
    def least(self) -> bool:
        """Whether only the minimal statistics are kept."""
        return len(self.fired) == 1

    def fits(self, tally: Tally) -> bool:
        """Whether a forward's tally can be added."""
        return tally.least == self.least and (not tally.double or not self.least or self.highest.dtype == np.float64)

    def add(self, tally: Tally, first_ordinal: int) -> None:
        """Take in one forward's calls.

        Args:
            tally: that fits.
            first_ordinal: ordinal of the first of its inputs.
        """
        self.inputs += len(tally.fired) if tally.valid is None else tally.valid.sum()
        loops, reals = _loops(), tally.results.view(np.float64)
        loops.count_inputs(self.fired, tally.fired, first_ordinal)
        if self.least:
            np.maximum(self.highest, reals[loops.MAX], out=self.highest, casting="same_kind")
            np.add(self.not_finite, tally.results[loops.NOT_FINITE], out=self.not_finite, casting="same_kind")
        else:
            loops.add(self.results.view(np.float64), self.results, reals, tally.results)

    def _view(self) -> UnitStats:
        counted = {"inputs": torch.from_numpy(self.inputs), "inputs_fired": torch.from_numpy(self.fired[0])}
        if self.least:
            measured = {
                "pre_max": torch.from_numpy(self.highest),
                "non_finite_values": torch.from_numpy(self.not_finite),
            }
        else:
            counted["first_fired"], counted["last_fired"] = torch.from_numpy(self.fired[1:])
            measured = _tensors(self.results)
        stats = UnitStats.of(self.fired.shape[1], counted | measured)
        stats.ledger = self
        return stats
