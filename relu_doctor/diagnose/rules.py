"""The rules, in a reader's order: what holds units silent, how they got there, what was not seen."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from relu_doctor.diagnose.findings import Case, Finding, indices, rule, share_of, typical
from relu_doctor.diagnose.origins import Fit, compare_updates
from relu_doctor.diagnose.table import SiteRecord
from relu_doctor.numerals import percent, plural, upper_percent
from relu_doctor.terms import Mechanism, Status

_SILENT = (Status.DEAD.value, Status.UNPROVEN.value)


@rule("RD101")
def non_finite(case: Case) -> Iterator[Finding]:
    """NaN or Inf reached a rectifier.

    `nan > 0` is false, so naive counting calls a diverged network "0 % dead" or "100 % dead", depending on the
    formula. Neither is so: nothing can be said of these units. Training diverged (a learning rate far too high, a
    division by zero, an overflow in half precision) or the data hold values that overflow.

    Helps: lower the learning rate or clip gradients, restart from the last finite checkpoint, look for NaN in the data.
    """
    for site, rows in case.sites():
        hit = rows[rows["status"] == Status.NON_FINITE.value]
        if len(hit):
            yield Finding(
                "RD101",
                f"{share_of(hit, rows)} received NaN or Inf",
                site.name,
                indices(hit),
                Mechanism.NON_FINITE.value,
                f"{plural(int(hit['non_finite_values'].sum()), 'non-finite value')}; the first such site of the "
                "forward pass is where to look",
                "Training diverged or the data overflow. Go back to the last checkpoint without NaN, lower the "
                "learning rate or clip gradients (torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)).",
            )


def _held(case: Case, mechanism: Mechanism) -> Iterator[tuple[SiteRecord, pd.DataFrame, pd.DataFrame]]:
    for site, rows in case.sites():
        hit = rows[rows["status"].isin(_SILENT) & (rows["mechanism"] == mechanism.value)]
        if len(hit):
            yield site, rows, hit


def _silent_phrase(hit: pd.DataFrame, case: Case) -> str:
    """``dead (fires on < 0.51 % of inputs)``, never dead without its rate."""
    dead = hit[hit["status"] == Status.DEAD.value]
    if not len(dead):
        return "silent, not proved dead"
    if case.table.coverage.exhaustive:
        return f"dead (silent on all {int(dead['inputs'].max()):,} inputs there are)"
    return f"dead (fires on < {upper_percent(float(dead['firing_rate_upper'].max()))} of inputs)"


def _mechanism_finding(
    code: str, case: Case, mechanism: Mechanism, evidence: dict[str, str], advice: str, extra: str = ""
) -> Iterator[Finding]:
    diverged = bool((case.judgement.units["status"] == Status.NON_FINITE.value).any())
    for site, rows, hit in _held(case, mechanism):
        numbers = ", ".join(f"{label} {typical(hit[column])}" for label, column in evidence.items())
        text = "; ".join(part for part in (f"medians: {numbers}" if numbers else "", extra) if part)
        advice = _AFTER_NAN if diverged else advice
        yield Finding(
            code,
            f"{share_of(hit, rows)} {_silent_phrase(hit, case)}: {_WORDS[mechanism]}",
            site.name,
            indices(hit),
            mechanism.value,
            text,
            advice,
        )


_AFTER_NAN = "First mend what made values infinite (RD101), then scan again."
_WORDS = {
    Mechanism.ZERO_WEIGHTS: "their incoming weights are zero",
    Mechanism.DEAD_UPSTREAM: "the layer before them is silent",
    Mechanism.CONSTANT_INPUTS: "their inputs do not vary",
    Mechanism.NORMALIZATION: "BatchNorm's shift is below its reach",
    Mechanism.NEGATIVE_BIAS: "held down by a negative bias",
    Mechanism.INPUT_OFFSET: "held down by the inputs' mean",
    Mechanism.BIAS_OR_OFFSET: "bias and inputs' mean both weigh on them, either alone would free them",
    Mechanism.BIAS_AND_OFFSET: "bias and inputs' mean together hold them down",
    Mechanism.UNKNOWN: "what holds them could not be told apart",
}


@rule("RD201")
def zero_weights(case: Case) -> Iterator[Finding]:
    """Silent units whose incoming weights are all zero (also by a pruning mask, or gamma = 0 behind a norm), bias <= 0.

    Decision: ||w|| = 0 or gamma = 0, and b <= 0; not where another branch is added in without a weight.
    Confused with: dead upstream, where the weights are not zero but what they read is.

    Helps: if the units were pruned on purpose, nothing; else re-initialise them, or remove them for a smaller network
    of the same function.
    """
    return _mechanism_finding(
        "RD201",
        case,
        Mechanism.ZERO_WEIGHTS,
        {"bias": "bias"},
        "If this is pruning, all is well: the units can be cut out. Otherwise weight decay or an update zeroed them: "
        "re-initialise these rows (torch.nn.init.kaiming_normal_) and reset their optimizer state.",
    )


@rule("RD202")
def dead_upstream(case: Case) -> Iterator[Finding]:
    """Silent units that only pass on the silence of an earlier layer.

    Decision: the pre-activation does not vary (max - min <= 1e-5 of its size) though the weights are not zero, and a
    site that feeds this one has gone silent. The earliest such site in forward order is blamed.

    Helps: mend the site that is blamed; these units may come back by themselves.
    """
    for site, rows, hit in _held(case, Mechanism.DEAD_UPSTREAM):
        blamed = case.judgement.blamed[site.site_id]
        yield Finding(
            "RD202",
            f"{share_of(hit, rows)} {_silent_phrase(hit, case)}: a consequence of {blamed}, silent before them",
            site.name,
            indices(hit),
            Mechanism.DEAD_UPSTREAM.value,
            f"medians: pre-activation {typical(hit['pre_max'])}, its spread {typical(hit['pre_max'] - hit['pre_min'])}",
            f"Mend {blamed} first; these units are a consequence, not a cause.",
        )


@rule("RD203")
def constant_inputs(case: Case) -> Iterator[Finding]:
    """Silent units whose inputs do not vary, though no silent layer feeds them.

    Decision: max - min of the pre-activation <= 1e-5 of its size, weights not zero, nothing silent upstream. The data
    are constant where these units look (an unused feature, a padded border), or an earlier layer saturated.
    """
    return _mechanism_finding(
        "RD203",
        case,
        Mechanism.CONSTANT_INPUTS,
        {"pre-activation": "pre_max"},
        "Look at what feeds these units: a feature that is constant in the data, or a layer that gives one value. "
        "Scan with more varied data before changing the model.",
    )


@rule("RD204")
def normalization(case: Case) -> Iterator[Finding]:
    """Silent units behind BatchNorm whose shift beta lies below what the normalised input reaches.

    Behind BatchNorm z is about N(beta, gamma^2). Decision: beta / |gamma| < -3.2 (`normalization_z`), the shift at
    which a Gaussian unit is silent on 1,000 inputs half of the time: Phi(3.2)^1000 = 1/2.
    Known cause: Adam with L2 regularisation, or a large step in beta (Mehta et al. 2019).

    Helps: exclude normalisation parameters from weight decay, use AdamW, lower the learning rate; to bring units back,
    set beta to 0 and gamma to 1 for these channels.
    """
    return _mechanism_finding(
        "RD204",
        case,
        Mechanism.NORMALIZATION,
        {"beta": "beta", "gamma": "gamma", "margin (std)": "margin"},
        "Set beta to 0 (and gamma to 1) for these channels and go on with a lower learning rate; keep normalisation "
        "parameters out of weight decay, or use AdamW instead of Adam with L2.",
    )


@rule("RD205")
def negative_bias(case: Case) -> Iterator[Finding]:
    """Silent units that would fire if their bias were zero.

    Decision: b < 0 and max z - b > 0 (the decomposition max z = offset + b + reach).
    Confused with: input offset, where the weights point away from the inputs' mean.

    Helps: a lower learning rate or warm-up (one large update pushes biases down together); to bring units back, set
    these biases to 0 and reset their optimizer state.
    """
    return _mechanism_finding(
        "RD205",
        case,
        Mechanism.NEGATIVE_BIAS,
        {"bias": "bias", "offset": "offset", "reach": "reach", "margin (std)": "margin"},
        "Setting these biases to 0 makes every one of them fire on these data. In training: a lower learning rate, "
        "warm-up or gradient clipping keeps biases from being thrown down.",
    )


@rule("RD206")
def input_offset(case: Case) -> Iterator[Finding]:
    """Silent units that would fire if their inputs were centred.

    Decision: offset w . h-bar < 0 and b + reach > 0. Either the data are not centred, or the weights drifted against
    the inputs' mean (after a ReLU all inputs are positive, so one step can do it). Behind BatchNorm in eval mode the
    offset is the gap between the running statistics and these data: stale statistics.

    Helps: standardise the inputs; a normalisation layer before the rectifier; recalibrate BatchNorm.
    """
    for finding in _mechanism_finding(
        "RD206",
        case,
        Mechanism.INPUT_OFFSET,
        {"offset": "offset", "bias": "bias", "reach": "reach", "margin (std)": "margin"},
        "Centre what these units read: standardise the data, or put BatchNorm or LayerNorm before the rectifier.",
    ):
        site = next(site for site in case.table.sites if site.name == finding.site)
        if site.norm != "batch_norm":
            yield finding
            continue
        yield Finding(
            finding.code,
            finding.title,
            finding.site,
            finding.unit_indices,
            finding.mechanism,
            finding.evidence + "; behind BatchNorm in eval mode the offset is the gap to its running statistics",
            "BatchNorm's running statistics do not fit these data: recalibrate them (run some training batches in "
            "train mode without an optimizer step), or scan with data like the training data.",
        )


@rule("RD207")
def bias_or_offset(case: Case) -> Iterator[Finding]:
    """Silent units held down by bias and offset, where removing either alone would free them.

    Decision: b < 0 and max z - b > 0, and offset < 0 and b + reach > 0. The two are not separable from one snapshot.

    Helps: zero biases or centred inputs; the lower learning rate that helps negative biases.
    """
    return _mechanism_finding(
        "RD207",
        case,
        Mechanism.BIAS_OR_OFFSET,
        {"bias": "bias", "offset": "offset", "reach": "reach", "margin (std)": "margin"},
        "Set these biases to 0, or centre what the units read; either is enough on these data.",
    )


@rule("RD208")
def bias_and_offset(case: Case) -> Iterator[Finding]:
    """Silent units that neither a zero bias nor centred inputs alone would free, but both together would.

    Decision: max z - b <= 0 and b + reach <= 0, reach > 0. Typical of networks thrown far off by a huge update.

    Helps: re-initialise the units, and train with a lower learning rate.
    """
    return _mechanism_finding(
        "RD208",
        case,
        Mechanism.BIAS_AND_OFFSET,
        {"bias": "bias", "offset": "offset", "reach": "reach", "margin (std)": "margin"},
        "Re-initialise these units (weights and bias) and reset their optimizer state; a bias of 0 is not enough. "
        "In training, lower the learning rate or clip gradients.",
    )


@rule("RD209")
def unknown_mechanism(case: Case) -> Iterator[Finding]:
    """Silent units of which one snapshot does not tell what holds them.

    The decomposition max z = offset + bias + reach needs the bias next to the rectifier unscaled, several values, and
    full statistics. Where that does not apply no mechanism is claimed.
    """
    return _mechanism_finding(
        "RD209",
        case,
        Mechanism.UNKNOWN,
        {"largest pre-activation": "pre_max", "margin (std)": "margin"},
        "Compare with an earlier checkpoint to see when they fell silent; a lower learning rate is the usual remedy.",
        "the bias does not reach these pre-activations unscaled, or too little was measured to separate it",
    )


@rule("RD210")
def saturated(case: Case) -> Iterator[Finding]:
    """Units stuck on the flat high side of a bounded rectifier (ReLU6, hardtanh): constant output, no gradient.

    Decision: the smallest pre-activation is at or above the upper edge.

    Helps: a lower learning rate, normalisation before the rectifier, or an unbounded rectifier.
    """
    for site, rows in case.sites():
        hit = rows[rows["status"] == Status.SATURATED.value]
        if len(hit):
            yield Finding(
                "RD210",
                f"{share_of(hit, rows)} stuck at the upper edge {site.high:g}",
                site.name,
                indices(hit),
                Mechanism.SATURATED.value,
                f"medians: smallest pre-activation {typical(hit['pre_min'])}, bias {typical(hit['bias'])}",
                "Normalise before the rectifier or lower the learning rate; nn.ReLU has no upper edge.",
            )


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
    silent = {site.site_id: rows["status"].isin(_SILENT).to_numpy() for site, rows in case.sites() if site.can_die}
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
    reached = f"{most:,}" if least == most else f"{least:,} to {most:,}"
    whole = coverage.read_to_end and least == coverage.num_inputs
    advice = f"Scan on at least {case.judgement.needed:,} distinct inputs that reach them."
    if coverage.read_to_end:
        advice += " If these inputs are all there will ever be, say so: exhaustive=True or --exhaustive."
    silent_on = f"all {reached} of {reached} inputs, a fact about this set" if whole else f"{reached} inputs"
    yield Finding(
        "RD401",
        f"{plural(len(open_units), 'unit')} silent but not proved dead: too few inputs",
        evidence=f"silent on {silent_on}; they may still fire on up to "
        f"{upper_percent(float(open_units['firing_rate_upper'].max()))} of inputs to come",
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
            evidence=f"{len(late):,} of {len(fired):,} units that fired, after input "
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
            f"{plural(repeated, 'input')} repeated an earlier one and count for nothing in the bounds",
            evidence=f"{coverage.distinct_inputs:,} distinct of {coverage.num_inputs:,}",
            advice="Scan distinct inputs; passing over a set twice proves nothing more.",
        )


@rule("RD501")
def rare(case: Case) -> Iterator[Finding]:
    """Units that fired, but on few inputs. Rare is not dead: specialised units of sound networks are rare too."""
    for site, rows in case.sites():
        hit = rows[rows["status"] == Status.RARE.value]
        if len(hit) and len(hit) > 0.1 * len(rows):
            limit = case.config.for_site(site.name).rare_firing_rate
            yield Finding(
                "RD501",
                f"{share_of(hit, rows)} fire on fewer than {percent(limit)} of inputs",
                site.name,
                indices(hit),
                evidence=f"median firing rate {percent(float(hit['firing_rate'].median()))}",
                advice="Rare is not dead. Watch whether their number grows from checkpoint to checkpoint.",
            )


@rule("RD502")
def dormant(case: Case) -> Iterator[Finding]:
    """Units whose mean output is at most tau of their site's average (Sokar et al. 2023).

    They fire: they are not dead.
    """
    for site, rows in case.sites():
        hit = rows[rows["status"] == Status.DORMANT.value]
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
        hit = rows[rows["status"].isin(_SILENT) & (rows["train_inputs_fired"] > 0)]
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
