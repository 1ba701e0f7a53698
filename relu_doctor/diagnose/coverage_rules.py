"""How far the evidence reaches: what is unproven, unobserved or repeated, and units that are rare or dormant."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from relu_doctor.diagnose.findings import Case, Finding, indices, rule, share_of, typical
from relu_doctor.numerals import percent, plural, upper_percent
from relu_doctor.terms import Status


@rule("RD401")
def unproven(case: Case) -> Iterator[Finding]:
    """Units that never fired, on too few inputs to call them dead.

    A unit silent on n inputs may still fire on up to 1 - (alpha/m)^(1/n) of the inputs to come (alpha = 5 %, m units
    examined together). At the default 1 % and one unit that takes 299 inputs, more with more units.
    Random inputs prove nothing about real ones, however many.

    Helps: scan more inputs; say `--exhaustive` where the data are all there will ever be.
    """
    units = case.judgement.units
    open_units = units[units["status"] == Status.UNPROVEN.value]
    coverage = case.table.coverage
    if not len(open_units):
        return
    if coverage.random_inputs:
        yield Finding(
            "RD401",
            f"{plural(len(open_units), 'silent unit')} unproven: random inputs are no evidence about real ones",
            evidence=f"silent on {coverage.num_inputs:,} standard-normal inputs",
            advice="Scan with real data: --data.",
        )
        return
    least, most = int(open_units["inputs"].min()), int(open_units["inputs"].max())
    words = coverage.units
    reached = f"{most:,}" if least == most else f"{least:,} to {most:,}"
    whole = coverage.read_to_end and least == coverage.num_inputs
    advice = f"Scan on at least {case.judgement.needed:,} distinct {words} that reach them."
    if coverage.read_to_end:
        advice += f" If these {words} are all there will ever be, say so: exhaustive=True or --exhaustive."
    silent_on = f"all {reached} of {reached} {words}, a fact about this set" if whole else f"{reached} {words}"
    yield Finding(
        "RD401",
        f"{plural(len(open_units), 'unit')} silent but not proved dead: too few {words}",
        evidence=f"silent on {silent_on}; they may still fire on up to "
        f"{upper_percent(float(open_units['firing_rate_upper'].max()))} of {words} to come",
        advice=advice,
    )


@rule("RD402")
def not_settled(case: Case) -> Iterator[Finding]:
    """Many units fired for the first time near the end of the scan: more inputs would wake more of them.

    Decision: of the units that fired, more than a set share did so first in the last tenth of the inputs.
    """
    units, coverage = case.judgement.units, case.table.coverage
    fired = units[units["first_fired"].notna()]
    if coverage.num_inputs < 10 or not len(fired):
        return
    late = fired[fired["first_fired"] >= (1 - case.config.settle_fraction) * coverage.num_inputs]
    if len(late) > max(1, case.config.settle_share * len(fired)):
        yield Finding(
            "RD402",
            f"the sample had not settled: {plural(len(late), 'unit')} fired first in its last tenth",
            evidence=f"{len(late):,} of {len(fired):,} units that fired, after {coverage.evidence} "
            f"{int((1 - case.config.settle_fraction) * coverage.num_inputs):,}",
            advice="Scan more inputs: units that look silent now may still fire.",
        )


@rule("RD403")
def unobserved(case: Case) -> Iterator[Finding]:
    """Rectifiers that were not observed: never called on these inputs, or of units that could not be told apart.

    An unobserved site is not dead; nothing is known of it.
    """
    unseen = [
        f"{site.name} ({site.note or 'its units could not be told'})" for site in case.table.sites if not site.num_units
    ]
    unseen += [
        f"{site.name} (not called on any input)" for site, rows in case.sites() if bool((rows["inputs"] == 0).all())
    ]
    unseen += [f"{name} (never called)" for name in case.table.coverage.unused]
    if unseen:
        yield Finding(
            "RD403",
            f"{plural(len(unseen), 'site')} not observed",
            evidence=", ".join(unseen[:8]) + (" …" if len(unseen) > 8 else ""),
            advice="Nothing is known of these. Give inputs or a forward= that reaches them, or name the unit axis in "
            'the profile: [sites."NAME"] unit_axis = 1.',
        )


@rule("RD404")
def repeated_inputs(case: Case) -> Iterator[Finding]:
    """Some inputs were exact repetitions of others; repetitions are no evidence and are not counted in the bounds."""
    coverage = case.table.coverage
    repeated = coverage.num_inputs - coverage.distinct_inputs
    if repeated > 0:
        yield Finding(
            "RD404",
            f"{plural(repeated, coverage.evidence)} repeated an earlier one and count for nothing in the bounds",
            evidence=f"{coverage.distinct_inputs:,} distinct of {coverage.num_inputs:,}",
            advice="Scan distinct inputs; passing over a set twice proves nothing more.",
        )


@rule("RD501")
def rare(case: Case) -> Iterator[Finding]:
    """Units that fired, but on few inputs. Rare is not dead: specialised units of sound networks are rare too."""
    for site, rows in case.sites():
        hit = rows.of(Status.RARE)
        if len(hit) and len(hit) > 0.1 * len(rows):
            limit = case.config.for_site(site.name).rare_firing_rate
            yield Finding(
                "RD501",
                f"{share_of(hit, rows)} fire on fewer than {percent(limit)} of {case.table.coverage.units}",
                site.name,
                indices(hit),
                evidence=f"median firing rate {percent(float(np.median(hit['firing_rate'])))}",
                advice="Rare is not dead. Watch whether their number grows from checkpoint to checkpoint.",
            )


@rule("RD502")
def dormant(case: Case) -> Iterator[Finding]:
    """Units whose mean output is at most tau of their site's average (Sokar et al. 2023).

    They fire: they are not dead.
    """
    for site, rows in case.sites():
        hit = rows.of(Status.DORMANT)
        if len(hit):
            tau = case.config.for_site(site.name).dormancy_tau
            yield Finding(
                "RD502",
                f"{share_of(hit, rows)} are {tau:g}-dormant",
                site.name,
                indices(hit),
                evidence=f"median score {typical(hit['dormancy'])}, where the site's average is 1",
                advice="Dormant units carry little; in reinforcement learning recycling them (ReDo) helps.",
            )


@rule("RD601")
def silent_in_eval_only(case: Case) -> Iterator[Finding]:
    """Units silent in eval mode that fire in train mode: BatchNorm's running statistics do not fit.

    Seen only with `mode="both"`. In train mode BatchNorm centres on the batch, in eval mode on its running mean and
    variance; a unit that differs between the two is silenced by stale statistics, not by its weights.

    Helps: recalibrate the statistics: `model.train()`, some hundred batches without an optimizer step, `model.eval()`.
    """
    if "train_inputs_fired" not in case.judgement.units.columns:
        return
    for site, rows in case.sites():
        hit = rows.where(rows["train_inputs_fired"] > 0).of(Status.DEAD, Status.UNPROVEN)
        if len(hit):
            yield Finding(
                "RD601",
                f"{share_of(hit, rows)} silent in eval mode fire in train mode",
                site.name,
                indices(hit),
                evidence=f"median largest pre-activation {typical(hit['pre_max'])} in eval, "
                f"{typical(hit['train_pre_max'])} in train",
                advice="Stale running statistics: run some hundred batches in train mode without an optimizer step, "
                "then save again. It is the statistics that silence these units, not their weights.",
            )
