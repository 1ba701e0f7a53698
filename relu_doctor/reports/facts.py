"""The numbers of a diagnosis that sentences are made of, over the units that can die."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import pandas as pd

from relu_doctor.numerals import percent, plural, upper_percent
from relu_doctor.terms import Status

if TYPE_CHECKING:
    from relu_doctor.diagnose.diagnosis import Diagnosis


class Facts:
    """Counts, rates and phrases; see the module."""

    def __init__(self, diagnosis: Diagnosis) -> None:
        self.diagnosis = diagnosis
        self.summary = diagnosis.summary
        self.coverage = diagnosis.table.coverage
        mortal = {site.site_id for site in diagnosis.table.sites if site.can_die}
        self.sites = diagnosis.sites[diagnosis.sites["site_id"].isin(mortal)]
        self.units = diagnosis.units[diagnosis.units["site_id"].isin(mortal)]
        self.num_units = int(self.summary["num_units"])
        self.all_units = self.num_units + int(self.summary["num_other_units"])
        self.num_inputs = self.coverage.num_inputs
        self.random = self.coverage.random_inputs
        counts = {status: int(self.sites[status.value].sum()) for status in Status}
        self.dead, self.unproven = counts[Status.DEAD], counts[Status.UNPROVEN]
        self.saturated, self.rare, self.dormant = (
            counts[status] for status in (Status.SATURATED, Status.RARE, Status.DORMANT)
        )
        self.unobserved, self.broken = counts[Status.UNOBSERVED], counts[Status.NON_FINITE]
        self.silent = self.dead + self.unproven
        self.silent_fraction = self.silent / self.num_units if self.num_units else 0.0

    def of_status(self, *statuses: Status) -> pd.DataFrame:
        """The units of some statuses."""
        return self.units[self.units["status"].isin([status.value for status in statuses])]

    @property
    def confidence(self) -> str:
        """``95 % sure``."""
        return f"{percent(self.diagnosis.config.confidence)} sure"

    @property
    def together(self) -> str:
        """Over how many units a bound holds."""
        return (
            f"{self.confidence}, over all {self.num_units:,} units together" if self.num_units > 1 else self.confidence
        )

    @property
    def each(self) -> str:
        """``each`` where a rate is that of several units."""
        return "" if self.coverage.exhaustive or self.dead == 1 else "each "

    @cached_property
    def dead_rate(self) -> str:
        """What ``dead`` means here; empty where no unit is dead."""
        rows = self.of_status(Status.DEAD)
        if not len(rows):
            return ""
        if self.coverage.exhaustive:
            return f"silent on {self.silent_on(rows)} there are"
        return f"fires on < {upper_percent(float(rows['firing_rate_upper'].max()))} of {self.coverage.units}"

    def silent_on(self, rows: pd.DataFrame) -> str:
        """``all 150 of 150 inputs`` where a set was read to its end, else ``all 1,500 inputs``."""
        seen = rows["inputs"]
        if not len(rows) or int(seen.min()) != int(seen.max()) or int(seen.max()) != self.num_inputs:
            return f"every {self.coverage.evidence} that reached them"
        if self.coverage.read_to_end:
            return f"all {self.num_inputs:,} of {plural(self.num_inputs, self.coverage.evidence)}"
        return f"all {plural(self.num_inputs, self.coverage.evidence)} read"
