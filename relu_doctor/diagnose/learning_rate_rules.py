"""How units got there, so far as files tell: whether the learning rate fits the picture."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from relu_doctor.diagnose.findings import Case, Finding, rule
from relu_doctor.diagnose.origins import Fit, compare_updates
from relu_doctor.numerals import plural
from relu_doctor.terms import Status


@rule("RD301")
def learning_rate(case: Case) -> Iterator[Finding]:
    """Whether the learning rate fits the picture, from optimizer state or an earlier checkpoint.

    The size of an update over the size of the weights is about 1e-3 in healthy training (CS231n, a rule of thumb); far
    over 1e-2 a single step can carry a unit across its whole margin. A dead unit no longer moves, so its live
    neighbours show the regime of the run; how far it moved before it fell silent shows in an earlier checkpoint; and
    while gradients agree, Adam moves every weight by the learning rate itself. "Consistent with" is said over 1e-2
    (over 0.15 for such full steps). It is no proof: a replay on the same batches with only the rate changed is.

    Helps: a tenth of the learning rate, warm-up, gradient clipping.
    """
    history = case.history
    silent = {
        site.site_id: np.isin(rows.places, rows.of(Status.DEAD, Status.UNPROVEN).places)
        for site, rows in case.sites()
        if site.can_die
    }
    total = int(sum(flags.sum() for flags in silent.values()))
    if history is None or not total:
        return
    found = compare_updates(history, silent)
    fit = found.fit(history, case.config.update_ratio_high, case.config.update_ratio_healthy)
    rates = ", ".join(f"{rate:g}" for rate in sorted(set(history.learning_rates))) or "not recorded"
    parts = [f"learning rate {rates}" + (f" ({history.optimizer})" if history.optimizer else "")]
    parts += _ratio("last update over weights", live=found.last_live, silent=found.last_silent)
    parts += _ratio("an update of full size over weights", live=np.nan, silent=found.full_silent)
    if history.earlier:
        parts += _ratio(f"moved since {history.earlier}", live=found.moved_live, silent=found.moved_silent)
        parts += _ratio("per update", live=found.rate_live, silent=found.rate_silent)
        parts.append(f"{found.newly_silent:,} fell silent since then, {found.born_silent:,} were silent before")
    total = found.newly_silent if history.earlier and found.newly_silent and fit is Fit.CONSISTENT else total
    advice = (
        _BORN_SILENT
        if fit is Fit.NOT_CONSISTENT and not found.newly_silent and (history.at_start or history.from_start)
        else _LEARNING_RATE_ADVICE[fit]
    )
    yield Finding(
        "RD301",
        f"{plural(total, 'silent unit')}: {fit}",
        evidence="; ".join(parts),
        advice=advice,
    )


_BORN_SILENT = (
    "These units were silent before the first update: look at the initialisation and at the data, not at the rate."
)
_LEARNING_RATE_ADVICE = {
    Fit.CONSISTENT: "Train again at a tenth of the rate, or with warm-up or gradient clipping, and compare. This "
    "stands beside the deaths; that the rate caused them only such a rerun can prove.",
    Fit.NOT_CONSISTENT: "Look at the mechanism first. The units may also have died earlier, when updates were larger: "
    "scan earlier checkpoints of the run beside this one.",
    Fit.UNDECIDED: "Scan more checkpoints of the run together, from before and around the time at which units fell "
    "silent: how far they moved then tells more than the last update of a run that has come to rest.",
}


def _ratio(label: str, *, live: float, silent: float) -> list[str]:
    known = [f"{who} {value:.2g}" for who, value in (("live units", live), ("silent", silent)) if np.isfinite(value)]
    return [f"{label}: {', '.join(known)}"] if known else []
