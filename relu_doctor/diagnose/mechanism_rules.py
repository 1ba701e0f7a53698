"""What holds units down: a rule for each mechanism, and for values that are not finite."""

from __future__ import annotations

from collections.abc import Iterator

from relu_doctor.diagnose.findings import Case, Finding, Rows, indices, rule, share_of, typical
from relu_doctor.diagnose.table import SiteRecord
from relu_doctor.numerals import plural, upper_percent
from relu_doctor.terms import Mechanism, Status


@rule("RD101")
def non_finite(case: Case) -> Iterator[Finding]:
    """NaN or Inf reached a rectifier.

    `nan > 0` is false, so naive counting calls a diverged network "0 % dead" or "100 % dead", depending on the
    formula. Neither is so: nothing can be said of these units. Training diverged (a learning rate far too high, a
    division by zero, an overflow in half precision) or the data hold values that overflow.

    Helps: lower the learning rate or clip gradients, restart from the last finite checkpoint, look for NaN in the data.
    """
    for site, rows in case.sites():
        hit = rows.of(Status.NON_FINITE)
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


def _held(case: Case, mechanism: Mechanism) -> Iterator[tuple[SiteRecord, Rows, Rows]]:
    for site, rows in case.sites():
        hit = rows.where(rows["mechanism"] == mechanism.value).of(Status.DEAD, Status.UNPROVEN)
        if len(hit):
            yield site, rows, hit


def _silent_phrase(hit: Rows, case: Case) -> str:
    """``dead (fires on < 0.51 % of inputs)``, never dead without its rate."""
    dead = hit.of(Status.DEAD)
    if not len(dead):
        return "silent, not proved dead"
    if case.table.coverage.exhaustive:
        return f"dead (silent on all {int(dead['inputs'].max()):,} {case.table.coverage.units} there are)"
    return f"dead (fires on < {upper_percent(float(dead['firing_rate_upper'].max()))} of {case.table.coverage.units})"


def _mechanism_finding(
    code: str, case: Case, mechanism: Mechanism, evidence: dict[str, str], advice: str, extra: str = ""
) -> Iterator[Finding]:
    diverged = any(len(rows.of(Status.NON_FINITE)) for _, rows in case.sites())
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
    Mechanism.NOT_SELECTED: "a top-k or threshold always passes them over",
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
        hit = rows.of(Status.SATURATED)
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


@rule("RD211")
def not_selected(case: Case) -> Iterator[Finding]:
    """Silent units that a top-k or a learned threshold passes over on every input: a sparse autoencoder's dead latents.

    Decision: more than the sign decides what fires at this site (top-k, BatchTopK, JumpReLU, a gate), and the unit was
    never selected; behind a ReLU, although its pre-activation was positive.

    Helps: a loss on what the dead units reconstruct (AuxK, Gao et al. 2024), resampling them (Bricken et al. 2023), a
    larger k or lower threshold at the start of training.
    """
    return _mechanism_finding(
        "RD211",
        case,
        Mechanism.NOT_SELECTED,
        {"largest pre-activation": "pre_max", "mean": "pre_mean", "bias": "bias"},
        "Train on with an auxiliary loss on the units that are never selected, or re-initialise them; as long as "
        "others outdo them they get no gradient.",
    )
