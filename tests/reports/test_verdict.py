"""What the verdict says, case by case."""

from __future__ import annotations

import pytest

from relu_doctor.diagnose.evidence import firing_rate_upper
from relu_doctor.reports.coverage import coverage_line, coverage_remarks
from relu_doctor.reports.verdict import dead_bound, severity_label, verdict
from tests.builders import make_diagnosis, site


def said(*sites, **about):
    return str(verdict(make_diagnosis(*sites, **about)))


@pytest.mark.parametrize(
    ("dead", "label"),
    [(0, "healthy"), (4, "healthy"), (5, "mild"), (20, "serious"), (50, "critical"), (100, "critical")],
)
def test_the_dead_fraction_stands_beside_what_is_often_cited(dead, label):
    """From healthy to critical the first sentence has the number, the share and 20–50 %, called often cited."""
    result = verdict(make_diagnosis(site("relu", active=100 - dead, negative_bias=dead)))
    assert result.label == label
    assert ("all 100 units (100 %)" if dead == 100 else f"{dead} of 100 units") in result.headline
    assert "often cited: 20–50 %" in result.headline
    assert ("fires on <" in result.headline) == (dead > 0)


def test_a_sound_model_is_told_what_was_ruled_out_and_to_look_elsewhere():
    """The bound given is the lower 95 % bound on the firing rate of every unit together."""
    diagnosis = make_diagnosis(site("relu", active=1), num_inputs=1000)
    text = str(verdict(diagnosis))
    bound = 100 * (1 - float(firing_rate_upper(700, 1000)))
    assert "the least active fired on 300 of 1,000 inputs" in text
    stated = float(text.split("every unit fires on > ")[1].split(" %", maxsplit=1)[0])
    assert stated <= bound < stated + 0.1
    assert "the trouble lies elsewhere" in text


def test_repeated_inputs_give_no_lower_bound():
    """Of repetitions it is not known which fired."""
    text = said(site("relu", active=10), num_inputs=1000, distinct_inputs=500)
    assert "Ruled out" in text
    assert "every unit fires on >" not in text


def test_unproven_units_are_counted_apart_with_the_inputs_that_would_settle_them():
    """41 silent: 0 proved dead, 41 unproven, so many inputs needed."""
    text = said(site("relu", active=781, negative_bias=41), num_inputs=360)
    assert "41 of 822 units (4.99 %) are silent: 0 proved dead, 41 unproven, 966 inputs needed" in text
    assert "often cited: 20–50 % dead" in text
    assert "silent on all 360 of 360 inputs, a fact about this set" in text


def test_dead_and_unproven_units_at_once():
    """Proved deaths keep their rate beside units that too few inputs reached."""
    sites = (site("relu", active=50, negative_bias=30), site("branch", num_inputs=40, active=18, negative_bias=2))
    text = said(*sites)
    assert "32 of 100 units (32 %) are silent: 30 proved dead (fires on < " in text
    assert "2 unproven" in text
    assert "Not every input reached them" in text


def test_a_whole_finite_set_is_a_fact_and_an_exhaustive_one_all_there_is():
    """Silent on all 150 of 150."""
    assert "silent on all 1,797 of 1,797 inputs, a fact about this set" in said(site("relu", active=9, negative_bias=9))
    text = said(site("relu", active=9, negative_bias=9), num_inputs=150, exhaustive=True)
    assert "silent on all 150 of 150 inputs there are" in text
    assert dead_bound(make_diagnosis(site("r", negative_bias=1), num_inputs=9, exhaustive=True)) is None


def test_nan_is_never_nought_percent_dead():
    """A diverged model is not finite, whatever else holds."""
    text = said(site("relu1", non_finite=64), site("relu2", non_finite=64))
    assert text.startswith("Not finite: NaN or Inf reached all 128 units")
    part = said(site("relu1", active=60, negative_bias=4), site("relu2", non_finite=64))
    assert "NaN or Inf reached 64 of 128 units" in part
    assert "Of the other 64 units: 4 dead (fires on <" in part
    rest = said(site("relu1", negative_bias=64), site("relu2", non_finite=64))
    assert "The other 64 units are all dead (each fires on <" in rest


def test_random_inputs_are_named_in_every_verdict():
    """No verdict on random inputs is a clean bill."""
    for sites in (site("r", active=64), site("r", active=60, negative_bias=4), site("r", negative_bias=64)):
        diagnosis = make_diagnosis(sites, random_inputs=True)
        assert severity_label(diagnosis) == "inconclusive"
        assert "Random inputs prove nothing about real ones" in str(verdict(diagnosis))
        assert "random inputs" in coverage_line(diagnosis)


def test_what_cannot_die_is_not_searched_for_deaths():
    """A GELU model: cannot die, nothing to find."""
    text = said(site("gelu", rectifier="GELU", low=None, active=64))
    assert text.startswith("Nothing to find: none of the 64 units can die, since GELU has")


def test_nought_dead_means_it():
    """Sites that were not observed are named beside the 0, and where none was observed nothing is said."""
    text = said(site("relu", active=64), site("branch", unobserved=32), unused=("head",))
    assert text.startswith("Healthy where seen: 0 of 64 observed units are dead")
    assert "2 sites were not observed and may be anything: branch and head." in text
    for sites in ((site("branch", unobserved=32),), (site("odd"),), ()):
        assert said(*sites).startswith("Inconclusive: no unit that can die was observed")


def test_saturated_units_are_no_clean_bill():
    """Stuck on the high side is not dead, and not sound either."""
    result = verdict(make_diagnosis(site("relu6", rectifier="ReLU6", active=50, saturated=50)))
    assert result.label == "saturated"
    assert "elsewhere" not in str(result)


def test_one_unit_reads_as_one():
    """Singular forms."""
    assert "the only unit is dead (fires on <" in said(site("relu", negative_bias=1))
    assert "1 of 4 units (25 %) is dead (fires on <" in said(site("relu", active=3, negative_bias=1))
    assert "the only unit is not dead" in said(site("relu", active=1))


def test_wholly_silent_sites_are_named():
    """A layer that passes nothing is the news."""
    text = said(site("relu1", active=64), site("relu2", bias_and_offset=32), site("relu3", constant=8))
    assert "All units of relu2 and relu3 are silent" in text


@pytest.mark.parametrize(
    ("about", "part"),
    [
        ({}, "(eval mode; all 1,797 read; passed: 1 tensor"),
        ({"sampling": "spread", "read_to_end": False, "available_inputs": 60000}, "1,797 of 60,000, spread evenly"),
        ({"sampling": "head", "read_to_end": False, "available_inputs": None}, "the first 1,797 of a stream"),
        ({"read_to_end": False, "available_inputs": 5000}, "the first 1,797 of 5,000"),
        ({"distinct_inputs": 1700}, "97 repeated, 1,700 distinct"),
        ({"masked": True}, "padding masked"),
        ({"excluded": 1}, "1 site left out"),
        ({"mode": "both"}, "(eval and train mode;"),
        ({"statistics": "minimal"}, "minimal statistics"),
        ({"random_inputs": True}, "observed on 1,797 random inputs (eval mode; passed"),
        ({"exhaustive": True}, "said to be the whole population"),
    ],
)
def test_the_coverage_line_tells_what_was_read(about, part):
    """Whatever bears on what the numbers are worth is in the first line."""
    line = coverage_line(make_diagnosis(site("relu", active=3), **about))
    assert line.startswith("1 of 1 site observed on 1,797 ")
    assert part in line


def test_the_remarks_tell_where_the_model_came_from():
    """File, step, placeholders and notes, each on its line."""
    source = {"path": "a.pt", "format": "safetensors", "step": 1200, "placeholders": ["x: A.B"] * 6, "notes": ["so."]}
    remarks = coverage_remarks(make_diagnosis(site("relu", active=3), source=source, notes=("seen.",)))
    assert remarks[0] == "Checkpoint: a.pt (safetensors), step 1,200"
    assert remarks[1].startswith("6 objects in the file read as inert placeholders: x: A.B, ")
    assert remarks[2:] == ("so.", "seen.")
