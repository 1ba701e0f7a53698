"""What a diagnosis says in plain sentences: pure functions that console, notebook, TensorBoard and command share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from relu_doctor.diagnose.evidence import firing_rate_upper
from relu_doctor.numerals import lower_percent, percent, plural, upper_percent
from relu_doctor.reports.facts import Facts
from relu_doctor.reports.words import listed, plain_name, shorten
from relu_doctor.terms import Severity, Status

if TYPE_CHECKING:
    from relu_doctor.diagnose.diagnosis import Diagnosis

OFTEN_CITED = "often cited: 20–50 %"
_ELSEWHERE = "If training goes badly all the same, the trouble lies elsewhere."
_LEAST_TELLING = 1e-4  # a lower bound on firing rates below this says nothing to a reader


@dataclass(frozen=True, slots=True)
class Verdict:
    """A verdict in words.

    Attributes:
        label: one or a few words, as ``serious`` or ``healthy where seen``.
        severity: what the label stands for.
        headline: one sentence.
        details: what a reader needs to weigh it, a sentence or two each.
    """

    label: str
    severity: Severity
    headline: str
    details: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """The label and the headline."""
        return f"{self.label.capitalize()}: {self.headline}"

    def __str__(self) -> str:
        return " ".join([self.sentence, *self.details])


def verdict(diagnosis: Diagnosis) -> Verdict:
    """The verdict on a whole model in words."""
    facts = Facts(diagnosis)
    label, severity = _label(facts)
    if severity is Severity.NON_FINITE:
        headline, details = _non_finite(facts)
    elif not facts.num_units and facts.all_units:
        headline, details = _nothing_can_die(facts)
    elif facts.unobserved == facts.num_units:
        headline, details = "no unit that can die was observed, so nothing can be said.", []
    elif facts.random:
        headline, details = _random(facts)
    elif facts.unproven:
        headline, details = _unproven(facts)
    elif facts.dead:
        headline, details = _dead(facts)
    else:
        headline, details = _sound(facts)
    if label != "nothing to find":
        details += _not_seen(facts)
    return Verdict(label, severity, headline, tuple(details))


def severity_label(diagnosis: Diagnosis) -> str:
    """The verdict's label alone, for a column."""
    return _label(Facts(diagnosis))[0]


def dead_rate(diagnosis: Diagnosis) -> str:
    """What ``dead`` means in a diagnosis: ``fires on < 0.584 % of inputs``. Empty where no unit is dead."""
    return Facts(diagnosis).dead_rate


def dead_bound(diagnosis: Diagnosis) -> float | None:
    """The largest upper bound on the firing rate of a dead unit; ``None`` where none is dead or no bound is meant."""
    rows = Facts(diagnosis).of_status(Status.DEAD)
    if not len(rows) or diagnosis.table.coverage.exhaustive:
        return None
    return float(rows["firing_rate_upper"].max())


def _label(facts: Facts) -> tuple[str, Severity]:
    severity = Severity(facts.summary["severity"])
    if severity is Severity.NON_FINITE:
        return "not finite", severity
    if not facts.num_units and facts.all_units:
        return "nothing to find", Severity.HEALTHY
    if facts.random or facts.unobserved == facts.num_units:
        return "inconclusive", Severity.INCONCLUSIVE
    mild = facts.diagnosis.config.mild_fraction
    if facts.silent_fraction < mild <= facts.saturated / facts.num_units:
        return "saturated", severity
    if severity is Severity.HEALTHY and facts.summary["unobserved_sites"]:
        return "healthy where seen", severity
    return severity.value, severity


def _non_finite(facts: Facts) -> tuple[str, list[str]]:
    hit = int(facts.summary["non_finite"])
    if hit == facts.all_units:
        reached = "the only unit" if hit == 1 else f"all {hit:,} units"
        headline = f"NaN or Inf reached {reached}; whether any would be dead cannot be said."
    else:
        headline = (
            f"NaN or Inf reached {hit:,} of {facts.all_units:,} units; whether those would be dead cannot be said."
        )
    warning = (
        "Training diverged, or the data overflow. NaN is neither firing nor silence: a count that takes no notice "
        "calls such a network 0 % or 100 % dead, and both are wrong."
    )
    details = [warning]
    rest = facts.num_units - facts.broken - facts.unobserved
    if rest > 1 and facts.dead == rest:
        details.append(f"The other {rest:,} units are all dead ({facts.each}{facts.dead_rate}).")
    elif rest > 0:
        parts = [f"{facts.dead:,} dead" + (f" ({facts.dead_rate})" if facts.dead else "")]
        parts += [f"{facts.unproven:,} silent but unproven"] if facts.unproven else []
        details.append(f"Of the other {plural(rest, 'unit')}: {', '.join(parts)}.")
    return headline, details


def _nothing_can_die(facts: Facts) -> tuple[str, list[str]]:
    names = list(dict.fromkeys(plain_name(site.rectifier) for site in facts.diagnosis.table.sites))
    have = "has" if len(names) == 1 else "have"
    units = "the only unit" if facts.all_units == 1 else f"none of the {facts.all_units:,} units"
    can = "cannot" if facts.all_units == 1 else "can"
    return f"{units} {can} die, since {listed(names)} {have} no flat side on which one could get stuck.", [_ELSEWHERE]


def _random(facts: Facts) -> tuple[str, list[str]]:
    details = ["Random inputs prove nothing about real ones, however many there are: scan with real data."]
    inputs = plural(facts.num_inputs, f"random {facts.coverage.evidence}")
    if not facts.silent:
        return f"no unit was silent on {inputs}, which says little about real ones; {OFTEN_CITED} dead.", details
    counts = f"0 proved dead, {facts.unproven:,} unproven"
    return f"{_share(facts.silent, facts)} silent on {inputs}: {counts}; {OFTEN_CITED} dead.", details + _worst(facts)


def _unproven(facts: Facts) -> tuple[str, list[str]]:
    needed = int(facts.summary["inputs_needed"])
    proved = f"{facts.dead:,} proved dead" + (f" ({facts.dead_rate})" if facts.dead else "")
    headline = (
        f"{_share(facts.silent, facts)} silent: {proved}, {facts.unproven:,} unproven, "
        f"{needed:,} {facts.coverage.units} needed; {OFTEN_CITED} dead."
    )
    rows = facts.of_status(Status.UNPROVEN)
    still = upper_percent(float(rows["firing_rate_upper"].max()))
    fact = ", a fact about this set" if facts.coverage.read_to_end else ""
    owner = "The unproven one was" if len(rows) == 1 else f"The {len(rows):,} unproven ones were"
    silent = f"{owner} silent on {facts.silent_on(rows)}{fact}"
    details = [f"{silent}, yet may still fire on up to {still} of {facts.coverage.units} to come ({facts.together})."]
    if facts.coverage.distinct_inputs >= needed:
        details.append(
            f"Not every {facts.coverage.evidence} reached them, or a stricter limit is set for them: {needed:,} must "
            "reach each."
        )
    return headline, details + _worst(facts)


def _dead(facts: Facts) -> tuple[str, list[str]]:
    headline = f"{_share(facts.dead, facts)} dead ({facts.each}{facts.dead_rate}); {OFTEN_CITED}."
    rows = facts.of_status(Status.DEAD)
    it = "It was" if facts.dead == 1 else "They were"
    details = []
    if facts.coverage.exhaustive:
        details.append("That is a fact about this set, which is said to be all there will ever be.")
    elif facts.coverage.read_to_end:
        details.append(
            f"{it} silent on {facts.silent_on(rows)}, a fact about this set; the rate is a bound for "
            f"{facts.coverage.units} to come ({facts.together})."
        )
    else:
        details.append(f"{it} silent on {facts.silent_on(rows)}; the rate is a bound ({facts.together}).")
    details.append("No gradient passes a dead unit, so training seldom brings one back.")
    details += _worst(facts)
    mild = facts.diagnosis.config.mild_fraction
    if facts.silent_fraction < mild and not facts.saturated:
        details.append(
            f"Under {percent(mild)} and not growing, nothing needs to be done (a rule of thumb). {_ELSEWHERE}"
        )
    return headline, details


def _sound(facts: Facts) -> tuple[str, list[str]]:
    fired = facts.of_status(Status.ACTIVE, Status.RARE, Status.DORMANT)
    seen = facts.num_units - facts.unobserved
    observed = "observed " if facts.unobserved else ""
    inputs = plural(facts.num_inputs, facts.coverage.evidence)
    if facts.saturated:
        stuck = f"{facts.saturated:,} {'is' if facts.saturated == 1 else 'are'} stuck at the rectifier's upper edge"
        headline = f"0 of {seen:,} {observed}units are dead, but {stuck}; {OFTEN_CITED} dead."
        return headline, ["A saturated unit gives one value and passes no gradient either."]
    if seen == 1:
        headline = f"the only {observed}unit is not dead, it fired on some of {inputs}; {OFTEN_CITED}."
    else:
        headline = f"0 of {seen:,} {observed}units are dead, each fired on some of {inputs}; {OFTEN_CITED}."
    details = [_ruled_out(fired, facts)]
    if facts.rare:
        limit = percent(facts.diagnosis.config.rare_firing_rate)
        few = "is" if facts.rare == 1 else "are"
        share = f"firing on < {limit} of {facts.coverage.units}"
        details.append(f"{plural(facts.rare, 'unit')} {few} rare, {share}: rare is not dead.")
    if facts.dormant:
        few = "unit is dormant: it fires" if facts.dormant == 1 else "units are dormant: they fire"
        return headline, [*details, f"{facts.dormant:,} {few}, but so weakly as to count for little."]
    return headline, [*details, _ELSEWHERE]


def _ruled_out(fired: pd.DataFrame, facts: Facts) -> str:
    """What a sound scan excludes, with its bound."""
    least = fired.sort_values("firing_rate").iloc[0]
    seen = plural(int(least["inputs"]), facts.coverage.evidence)
    rarest = f"the least active fired on {int(least['inputs_fired']):,} of {seen}"
    # The same Clopper–Pearson bound, read from the other side: silences instead of firings. Repeated inputs have no
    # known share among the firings, so with any no bound is given.
    inputs, silences = fired["inputs"].to_numpy(float), (fired["inputs"] - fired["inputs_fired"]).to_numpy(float)
    config = facts.diagnosis.config
    bound = 1 - float(
        np.max(firing_rate_upper(silences, inputs, confidence=config.confidence, num_units=facts.num_units))
    )
    repeated = facts.coverage.distinct_inputs < facts.coverage.num_inputs
    if repeated or bound < _LEAST_TELLING:
        return f"Ruled out: dead units, NaN and Inf; {rarest}."
    every = f"every unit fires on > {lower_percent(bound)} of {facts.coverage.units} ({facts.together})"
    return f"Ruled out: dead units, NaN and Inf; {rarest}, and {every}."


def _share(part: int, facts: Facts) -> str:
    """``60 of 320 units (18.8 %) are``."""
    if part == facts.num_units:
        return "the only unit is" if part == 1 else f"all {part:,} units (100 %) are"
    return f"{part:,} of {facts.num_units:,} units ({percent(part / facts.num_units)}) {'is' if part == 1 else 'are'}"


def _worst(facts: Facts) -> list[str]:
    """Which sites are wholly silent, or else which one has the largest part of its units silent."""
    sites = facts.sites[facts.sites["silent"] > 0]
    if len(facts.sites) < 2 or not len(sites):
        return []
    names = [_quotable(name) for name in sites.loc[sites["silent"] == sites["num_units"], "site"]]
    if names:
        which = "Every unit of" if len(names) == 1 else "All units of"
        return [f"{which} {listed(names)} {'is' if len(names) == 1 else 'are'} silent: nothing passes there."]
    worst = sites.sort_values("silent_fraction", ascending=False, kind="stable").iloc[0]
    part, whole = int(worst["silent"]), int(worst["num_units"])
    if len(sites) == 1:
        return (
            [f"All of them are in {_quotable(worst['site'])}, which has {plural(whole, 'unit')}."] if part > 1 else []
        )
    return [f"Most in {_quotable(worst['site'])}: {part:,} of {whole:,} silent ({percent(part / whole)})."]


def _not_seen(facts: Facts) -> list[str]:
    names = [_quotable(name) for name in facts.summary["unobserved_sites"]]
    if not names:
        return []
    were = "was" if len(names) == 1 else "were"
    return [f"{plural(len(names), 'site')} {were} not observed and may be anything: {listed(names)}."]


def _quotable(name: object) -> str:
    return shorten(plain_name(name), 40)
