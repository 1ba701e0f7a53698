"""One status per unit, in the order of precedence, from tables made by hand; and what the verdicts add up to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relu_doctor.diagnose.diagnosis import diagnose
from relu_doctor.diagnose.evidence import firing_rate_upper
from relu_doctor.diagnose.findings import RULES, explanation
from relu_doctor.diagnose.judgement import COLUMNS
from relu_doctor.terms import Mechanism, Severity, Status
from tests.builders import KINDS, make_diagnosis, make_table, site

PRECEDENCE = ["unobserved", "non_finite", "dead", "unproven", "saturated", "rare", "dormant", "active"]
REQUIRED = [
    "site",
    "site_id",
    "unit",
    "rectifier",
    "status",
    "mechanism",
    "inputs",
    "inputs_fired",
    "firing_rate",
    "firing_rate_upper",
    "position_firing_rate",
    "pre_max",
    "pre_min",
    "pre_mean",
    "pre_std",
    "margin",
    "dormancy",
    "first_fired",
    "last_fired",
    "bias",
    "weight_l2",
    "non_finite_values",
]
SITE_COLUMNS = [
    "site",
    "site_id",
    "rectifier",
    "producer",
    "readers",
    "num_units",
    "dead",
    "unproven",
    "silent",
    "rare",
    "dormant",
    "saturated",
    "non_finite",
    "unobserved",
    "active",
    "dead_fraction",
    "silent_fraction",
]


def every_status(**coverage):
    units = {"unobserved": 1, "non_finite": 1, "negative_bias": 1, "saturated": 1, "rare": 1, "dormant": 1, "active": 3}
    return make_diagnosis(site("act", rectifier="ReLU6", **units), config={"dormancy_tau": 0.025}, **coverage)


def test_every_status_is_reachable_and_each_unit_has_exactly_one():
    """Hand-made evidence of each kind gets its own status."""
    assert every_status().units["status"].tolist() == [
        "unobserved", "non_finite", "dead", "saturated", "rare", "dormant", "active", "active", "active",
    ]  # fmt: skip
    assert every_status(num_inputs=300).units["status"].tolist()[2] == "unproven"
    assert [status.value for status in Status] == PRECEDENCE


EVIDENCE_OF = {
    "unobserved": {"inputs": 0, "positions": 0},
    "non_finite": {"non_finite_values": 3},
    "silent": {"inputs_fired": 0, "positions_fired": 0, "first_fired": -1, "last_fired": -1, "pre_max": -1.0},
    "saturated": {"inputs_fired": 0, "positions_fired": 0, "pre_max": 9.0, "pre_min": 7.0},
    "rare": {"inputs_fired": 1, "positions_fired": 1},
    "dormant": {"post_mean": 1e-9},
}


@given(st.lists(st.sampled_from(sorted(EVIDENCE_OF)), unique=True))
@settings(max_examples=60)
def test_the_first_status_that_holds_wins(kinds):
    """Whatever evidence comes together, the status is the first in the order of precedence."""
    if {"silent", "rare"} <= set(kinds) or {"silent", "saturated"} <= set(kinds) or {"rare", "saturated"} <= set(kinds):
        return  # these cannot be true of one unit
    table = make_table(site("act", rectifier="ReLU6", active=5))
    for kind in kinds:
        for column, value in EVIDENCE_OF[kind].items():
            table.units.loc[2, column] = value
    names = {"silent": "dead"}
    expected = min((PRECEDENCE.index(names.get(kind, kind)) for kind in kinds), default=PRECEDENCE.index("active"))
    assert diagnose(table, {"dormancy_tau": 0.025}).units.loc[2, "status"] == PRECEDENCE[expected]


@given(st.integers(0, 400), st.integers(0, 400), st.integers(1, 60))
@settings(max_examples=60)
def test_a_unit_that_fired_is_never_dead_nor_unproven(fired, inputs, units):
    """And a silent one is dead exactly where the simultaneous bound is at most the threshold."""
    fired = min(fired, inputs)
    table = make_table(site("act", active=units), num_inputs=inputs)
    table.units.loc[0, ["inputs", "inputs_fired"]] = inputs, fired
    status = diagnose(table).units.loc[0, "status"]
    if inputs == 0:
        assert status == "unobserved"
    elif fired:
        assert status in {"rare", "active"}
    else:
        proved = float(firing_rate_upper(0, inputs, num_units=units)) <= 0.01
        assert status == ("dead" if proved else "unproven")


def test_the_bound_is_simultaneous_over_all_units_that_can_die():
    """Units of every rectifying site share the error; those of a rectifier that cannot die do not."""
    one = make_diagnosis(site("a", negative_bias=1), num_inputs=299)
    assert one.units["status"].tolist() == ["dead"]
    two = make_diagnosis(site("a", negative_bias=1), site("b", active=1), num_inputs=299)
    assert two.units["status"].tolist()[0] == "unproven"
    leaky = make_diagnosis(
        site("a", negative_bias=1), site("b", low=None, rectifier="LeakyReLU", active=50), num_inputs=299
    )
    assert leaky.units["status"].tolist()[0] == "dead"
    assert (two.summary["inputs_needed"], leaky.summary["inputs_needed"]) == (368, 299)


def test_a_rectifier_that_cannot_die_is_never_called_dead():
    """Its silent-looking units are active, whatever their numbers."""
    diagnosis = make_diagnosis(site("a", low=None, rectifier="GELU", negative_bias=2, rare=2))
    assert set(diagnosis.units["status"]) == {"active"}
    assert set(diagnosis.units["mechanism"]) == {""}
    assert diagnosis.summary["num_units"] == 0
    assert diagnosis.summary["num_other_units"] == 4


def test_random_inputs_prove_nothing():
    """With random inputs a silent unit is unproven, however many there were."""
    diagnosis = make_diagnosis(site("a", negative_bias=2, active=6), num_inputs=10**7, random_inputs=True)
    assert diagnosis.summary["dead"] == 0
    assert diagnosis.summary["unproven"] == 2
    assert any("random inputs" in finding.title for finding in diagnosis.findings if finding.code == "RD401")


def test_exhaustive_data_need_no_bound():
    """Where the data are all there will ever be, silent is dead."""
    diagnosis = make_diagnosis(site("a", negative_bias=2, active=6), num_inputs=4, exhaustive=True)
    assert (diagnosis.summary["dead"], diagnosis.summary["unproven"]) == (2, 0)
    both = make_diagnosis(site("a", negative_bias=2), num_inputs=4, exhaustive=True, random_inputs=True)
    assert both.summary["dead"] == 0


def test_duplicates_count_for_nothing():
    """The bound is that of the distinct inputs."""
    once = make_diagnosis(site("a", negative_bias=1, active=3), num_inputs=250)
    twice = make_diagnosis(site("a", negative_bias=1, active=3), num_inputs=500, distinct_inputs=250)
    assert twice.units["firing_rate_upper"].iloc[0] == once.units["firing_rate_upper"].iloc[0]
    assert twice.units["status"].iloc[0] == "unproven"


def test_the_whole_set_read_is_said_to_be_a_fact_about_it():
    """Silent on all 150 of 150: a fact about this set, and exhaustive=True is suggested."""
    (finding,) = (
        f for f in make_diagnosis(site("a", negative_bias=1, active=9), num_inputs=150).findings if f.code == "RD401"
    )
    assert "silent on all 150 of 150 inputs, a fact about this set" in finding.evidence
    assert "exhaustive=True" in finding.advice
    (finding,) = (
        f
        for f in make_diagnosis(site("a", negative_bias=1, active=9), num_inputs=150, read_to_end=False).findings
        if f.code == "RD401"
    )
    assert "a fact about" not in finding.evidence


def test_the_frames_have_the_promised_columns():
    """Units and sites have the columns that the interface names, counts add up, order is that of the forward."""
    diagnosis = make_diagnosis(
        site("b", active=3, negative_bias=1), site("a", rectifier="ReLU6", saturated=1, active=2)
    )
    assert list(diagnosis.units.columns) == list(COLUMNS)
    assert list(diagnosis.units.columns[: len(REQUIRED)]) == REQUIRED
    assert list(diagnosis.sites.columns) == SITE_COLUMNS
    assert diagnosis.sites["site"].tolist() == ["b", "a"]
    assert (diagnosis.sites[PRECEDENCE].sum(axis=1) == diagnosis.sites["num_units"]).all()
    assert (diagnosis.sites["silent"] == diagnosis.sites["dead"] + diagnosis.sites["unproven"]).all()
    assert diagnosis.units["first_fired"].isna().tolist() == [False] * 3 + [True, True] + [False] * 2
    assert {"num_units", "dead", "unproven", "silent", "dead_fraction", "silent_fraction", "severity", "num_inputs",
            "inputs_needed", "num_sites", "unobserved_sites"} <= set(diagnosis.summary)  # fmt: skip


def test_a_mask_names_units_by_site():
    """mask(status) is a boolean per unit and site; silent is dead and unproven together."""
    diagnosis = make_diagnosis(site("a", negative_bias=1, active=2), site("b", active=1))
    assert {name: mask.tolist() for name, mask in diagnosis.mask("dead").items()} == {
        "a": [True, False, False],
        "b": [False],
    }
    assert diagnosis.mask("silent")["a"].tolist() == [True, False, False]
    assert diagnosis.mask(Status.ACTIVE)["a"].tolist() == [False, True, True]
    with pytest.raises(ValueError, match=r"expected one of unobserved, .* found 'dying'"):
        diagnosis.mask("dying")


@pytest.mark.parametrize(
    ("units", "severity"),
    [
        ({"active": 99, "negative_bias": 1}, Severity.HEALTHY),
        ({"active": 95, "negative_bias": 5}, Severity.MILD),
        ({"active": 80, "negative_bias": 20}, Severity.SERIOUS),
        ({"active": 50, "negative_bias": 50}, Severity.CRITICAL),
        ({"active": 99, "non_finite": 1}, Severity.NON_FINITE),
    ],
)
def test_severity_goes_by_the_silent_fraction(units, severity):
    """Thresholds are those of the configuration; NaN comes before all."""
    assert make_diagnosis(site("a", **units)).summary["severity"] == severity


def test_open_units_leave_the_verdict_open():
    """Where silent units are unproven and few are dead, the verdict is inconclusive."""
    assert (
        make_diagnosis(site("a", active=50, negative_bias=50), num_inputs=20).summary["severity"]
        == Severity.INCONCLUSIVE
    )


def test_thresholds_judge_saved_evidence_again():
    """rediagnose under other thresholds is the diagnosis of the same table; back again gives the first."""
    diagnosis = make_diagnosis(site("a", active=5, negative_bias=2, rare=2), num_inputs=1000)
    strict = diagnosis.rediagnose({"max_firing_rate": 0.001, "rare_firing_rate": 0})
    assert strict.units["status"].tolist() == ["active"] * 5 + ["unproven"] * 2 + ["active"] * 2
    assert strict.rediagnose(None).units.equals(diagnosis.units)
    assert strict.metadata == diagnosis.metadata


# The evidence that makes each rule speak, and what it then says of which units.
SPEAKS = {
    "RD101": ({"non_finite": 2}, "non_finite"),
    "RD201": ({"zero_weights": 2}, "zero_weights"),
    "RD203": ({"constant": 2}, "constant_inputs"),
    "RD205": ({"negative_bias": 2}, "negative_bias"),
    "RD206": ({"input_offset": 2}, "input_offset"),
    "RD207": ({"bias_or_offset": 2}, "bias_or_offset"),
    "RD208": ({"bias_and_offset": 2}, "bias_and_offset"),
    "RD209": ({"unknown": 2}, "unknown"),
    "RD211": ({"not_selected": 2}, "not_selected"),
}


@pytest.mark.parametrize("code", SPEAKS)
def test_a_mechanism_is_a_finding_with_its_units(code):
    """Each mechanism has a finding of its code, with the units, the evidence and the advice, and no other speaks."""
    units, mechanism = SPEAKS[code]
    found = [f for f in make_diagnosis(site("a", active=10, **units)).findings if f.site]
    assert [(f.code, f.unit_indices, f.mechanism) for f in found] == [(code, (10, 11), mechanism)]
    assert found[0].advice
    assert found[0].title.startswith("2 of 12 units")


def test_the_word_dead_never_stands_without_its_rate():
    """Titles that say dead say below which rate."""
    for kind in set(KINDS) - {"active", "rare", "dormant", "saturated", "non_finite", "unobserved", "normalization"}:
        for finding in make_diagnosis(site("a", active=5, **{kind: 3})).findings:
            if " dead" in f" {finding.title}":
                assert "fires on <" in finding.title, finding.title


def test_unproven_units_are_not_called_dead():
    """A finding about unproven units says so."""
    for finding in make_diagnosis(site("a", active=5, negative_bias=3), num_inputs=50).findings:
        assert " dead (" not in finding.title


def test_other_findings_speak_when_they_should():
    """Saturated, rare, dormant, unobserved, repeated and unsettled: each from its own evidence."""

    def codes(diagnosis):
        return {finding.code for finding in diagnosis.findings}

    assert codes(make_diagnosis(site("a", active=9))) == set()
    assert codes(make_diagnosis(site("a", rectifier="ReLU6", active=9, saturated=1))) == {"RD210"}
    assert codes(make_diagnosis(site("a", active=9, rare=9))) >= {"RD501"}
    assert codes(make_diagnosis(site("a", active=9, dormant=1), config={"dormancy_tau": 0.1})) == {"RD502"}
    assert codes(make_diagnosis(site("a", active=9), site("b", unobserved=2))) == {"RD403"}
    assert codes(make_diagnosis(site("a", active=9), unused=("spare",))) == {"RD403"}
    assert codes(make_diagnosis(site("a", active=9), num_inputs=100, distinct_inputs=90)) == {"RD404"}


def test_a_sample_that_had_not_settled_is_said_to():
    """Many units that fired first in the last tenth of the inputs; one late unit is no news."""
    table = make_table(site("a", active=40), num_inputs=1000)
    table.units.loc[:9, "first_fired"] = 950
    (finding,) = (f for f in diagnose(table).findings if f.code == "RD402")
    assert "10 units fired first" in finding.title
    table.units.loc[1:9, "first_fired"] = 3
    assert not [f for f in diagnose(table).findings if f.code == "RD402"]


def test_every_rule_explains_itself():
    """Each code has a text, and codes are RD and three digits."""
    for code in RULES:
        assert len(explanation(code)) > 60
        assert code.startswith("RD")
        assert len(code) == 5
    with pytest.raises(KeyError):
        explanation("RD999")


def test_findings_come_in_the_order_of_their_codes_and_sites():
    """First what holds units, by code; within a code in forward order."""
    found = make_diagnosis(
        site("a", active=5, negative_bias=1, input_offset=1), site("b", active=5, negative_bias=1, zero_weights=1)
    ).findings
    assert [(f.code, f.site) for f in found if f.site] == [
        ("RD201", "b"),
        ("RD205", "a"),
        ("RD205", "b"),
        ("RD206", "a"),
    ]


def test_every_mechanism_word_is_in_the_glossary():
    """What a diagnosis writes is a word of the closed set."""
    units = dict.fromkeys(set(KINDS) - {"saturated", "normalization"}, 1)
    written = set(make_diagnosis(site("a", **units)).units["mechanism"])
    assert written <= {mechanism.value for mechanism in Mechanism}


def test_rates_and_margins_are_what_they_say():
    """firing_rate = inputs_fired / inputs; position_firing_rate of positions; NaN where nothing was seen."""
    units = every_status().units
    np.testing.assert_allclose(units["firing_rate"][1:], (units["inputs_fired"] / units["inputs"])[1:])
    assert np.isnan(units.loc[0, ["firing_rate", "firing_rate_upper", "position_firing_rate"]].astype(float)).all()
    assert units["margin"].notna().tolist() == [False, False, True] + [units["margin"].notna()[3]] + [False] * 5
