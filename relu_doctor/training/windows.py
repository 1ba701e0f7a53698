"""Window: what a monitor says when one closes. It is made once, and every sink and the history read the same one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from relu_doctor.diagnose.diagnosis import Diagnosis

# Columns beside those of `Diagnosis.sites` and `Diagnosis.units`.
SITE_COLUMNS = (
    "deaths", "revivals", "update_ratio", "weight_norm", "dormant_overlap", "effective_rank",
)  # fmt: skip
UNIT_COLUMNS = (
    "onset", "onset_step", "onset_confidence", "silent_since", "silent_inputs", "reference_inputs", "reference_fired",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Alert:
    """Something that a training run must be told now.

    Attributes:
        code: stable, ``RD7xx``.
        step: global step at which it was seen.
        site: name of the site; empty where it is about the run.
        message: one sentence with its evidence.
        evidence: the numbers in it.
    """

    code: str
    step: int
    site: str
    message: str
    evidence: Mapping[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """One window of a run.

    Attributes:
        index: its place in the run, from 0.
        first_step, last_step: global optimizer steps that it covers, inclusive.
        closed: seconds since the epoch.
        diagnosis: of what was observed in it, and of the evidence carried on to it.
        sites: one row per site, in forward order: ``site_id`` and ``SITE_COLUMNS``; NaN where a number was not had.
        units: one row per unit, in the order of ``diagnosis.units``: ``site_id``, ``unit`` and ``UNIT_COLUMNS``.
            ``onset`` is ``born_dead``, ``found_dead`` (the watching began later, or anew with a treatment), ``died``,
            ``revived`` or empty; steps are global, -1 for none. ``reference_inputs`` and ``reference_fired`` count the
            reference batches' inputs, and those that fired the unit: a unit that is silent in training and fires there
            did not die by its parameters, the data have changed.
        numbers: of the run: ``loss``, ``grad_norm``, ``watched_grad_norm`` (of the biases alone that the gradient watch
            reads), ``lr`` (``lr/1`` … of further groups), ``observed_steps``, ``observed_inputs``; those that were had.
        alerts: raised since the window before.
        about: of the run: ``model`` and ``optimizer``, the names of their classes.
    """

    index: int
    first_step: int
    last_step: int
    closed: float
    diagnosis: Diagnosis
    sites: pd.DataFrame
    units: pd.DataFrame
    numbers: Mapping[str, float]
    alerts: tuple[Alert, ...] = ()
    about: Mapping[str, str] = field(default_factory=dict)

    def scalars(self) -> dict[str, float]:
        """Flat numbers for any experiment tracker, under names that stay the same.

        Those of :meth:`Diagnosis.scalars() <relu_doctor.Diagnosis.scalars>`, and under ``relu_doctor/`` what was had of
        ``deaths``, ``revivals``, ``update_ratio`` (the largest of all units) and ``numbers``.
        """
        from relu_doctor.reports.scalars import window_scalars

        return window_scalars(self)
