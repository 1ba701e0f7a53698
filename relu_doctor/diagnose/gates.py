"""Gates: whether a diagnosis passes a limit on its dead units, and when that cannot be said."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from relu_doctor.diagnose.diagnosis import Diagnosis


class Outcome(StrEnum):
    """What a gate says."""

    PASSED = "passed"
    FAILED = "failed"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True, slots=True)
class Gate:
    """Limits on dead fractions.

    Attributes:
        per_site: no site of at least ``min_units`` may have a larger dead fraction; ``None`` for no such limit.
        total: nor may the whole model.
        min_units: smaller sites are left to the total.
    """

    per_site: float | None = None
    total: float | None = None
    min_units: int = 16

    @property
    def asked(self) -> bool:
        """Whether there is any limit."""
        return self.per_site is not None or self.total is not None


@dataclass(frozen=True, slots=True)
class GateResult:
    """An outcome and the sentence that explains it."""

    outcome: Outcome
    reason: str


def decide(diagnosis: Diagnosis, gate: Gate) -> GateResult:
    """Hold a diagnosis against a gate.

    A gate fails on proved deaths alone. Where it did not fail but unproven or non-finite units, unobserved sites or
    random data could change that, it is inconclusive, never green.
    """
    summary, sites = diagnosis.summary, diagnosis.sites
    mortal = {site.site_id for site in diagnosis.table.sites if site.can_die}
    limits: list[tuple[str, Any, float]] = []
    for _, row in sites[sites["site_id"].isin(mortal)].iterrows():
        if gate.per_site is not None and row["num_units"] >= gate.min_units:
            limits.append((str(row["site"]), row, gate.per_site))
    if gate.total is not None:
        limits.append(("the whole model", summary, gate.total))
    for name, counts, limit in limits:
        if counts["dead_fraction"] > limit:
            return GateResult(
                Outcome.FAILED,
                f"{name}: {counts['dead']:,} of {counts['num_units']:,} units dead, "
                f"{100 * counts['dead_fraction']:.3g} % is over the limit of "
                f"{100 * limit:.3g} %",
            )
    if not limits and gate.asked:
        return GateResult(
            Outcome.INCONCLUSIVE,
            f"no site has {gate.min_units} units or more, so nothing was compared; lower --min-units",
        )
    if summary["random_inputs"]:
        return GateResult(Outcome.INCONCLUSIVE, "random inputs say nothing about real ones; scan with data")
    if summary["unobserved_sites"]:
        names = ", ".join(summary["unobserved_sites"][:4])
        return GateResult(Outcome.INCONCLUSIVE, f"{len(summary['unobserved_sites'])} sites were not observed: {names}")
    for name, counts, limit in limits:
        open_units = counts["unproven"] + counts["non_finite"] + counts["unobserved"]
        if counts["num_units"] and (counts["dead"] + open_units) / counts["num_units"] > limit:
            what = "not finite" if counts["non_finite"] else "unproven"
            needed = "" if counts["non_finite"] else f"; {summary['inputs_needed']:,} inputs are needed"
            return GateResult(
                Outcome.INCONCLUSIVE,
                f"{name}: {open_units:,} of {counts['num_units']:,} units {what} could exceed the limit{needed}",
            )
    return GateResult(Outcome.PASSED, "no limit exceeded")
