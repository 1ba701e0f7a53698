"""The learning-rate finding: what it says follows from the ratios, and it says nothing where files are silent."""

from __future__ import annotations

import numpy as np
import pytest

from relu_doctor.diagnose.origins import Fit, LearningRateEvidence, compare_updates

SILENT = {"a": np.array([True, True, False, False])}


def evidence(**about) -> LearningRateEvidence:
    return LearningRateEvidence(learning_rates=(0.1,), **about)


def fit(found: LearningRateEvidence) -> Fit:
    return compare_updates(found, SILENT).fit(found, high=1e-2, healthy=1e-3)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (evidence(), Fit.UNDECIDED),
        (evidence(last_update={"a": np.array([0.0, 0.0, 0.05, 0.05])}), Fit.CONSISTENT),
        (evidence(last_update={"a": np.array([0.0, 0.0, 1e-3, 1e-3])}), Fit.NOT_CONSISTENT),
        (evidence(last_update={"a": np.array([0.0, 0.0, 6e-3, 6e-3])}), Fit.UNDECIDED),
        (evidence(last_update={"a": np.array([0.0, 0.0, 1e-12, 1e-12])}), Fit.UNDECIDED),
        (evidence(last_update={"a": np.array([0.0, 0.0, 0.0, 0.0])}), Fit.UNDECIDED),
        (evidence(full_step={"a": np.array([0.2, 0.2, 0.01, 0.01])}), Fit.CONSISTENT),
    ],
)
def test_one_file_speaks_through_its_live_units(found, expected):
    """A large last update of live units fits; a small one does not, unless the run has come to rest."""
    assert fit(found) is expected


def between(silent: float, live: float, newly: list[bool], **about) -> LearningRateEvidence:
    moved = np.array([silent, silent, live, live])
    return evidence(
        last_update={"a": np.array([0.0, 0.0, 1e-3, 1e-3])},
        between={"a": moved},
        per_update={"a": moved / 100},
        earlier="before.pt",
        newly_silent={"a": np.array(newly)},
        **about,
    )


FELL, SAME = [True, True, False, False], [False, False, False, False]


def test_two_files_speak_through_the_units_that_fell_silent_in_between():
    """Far movement before the death fits a too high rate, little movement does not."""
    assert fit(between(5.0, 0.1, FELL)) is Fit.CONSISTENT
    assert fit(between(0.1, 0.1, FELL)) is Fit.NOT_CONSISTENT


def test_silent_in_both_acquits_only_where_the_earlier_file_is_from_before_training():
    """What was silent before the first update no rate has silenced; of a later file that is not known."""
    assert fit(between(5.0, 0.1, SAME, from_start=True)) is Fit.NOT_CONSISTENT
    assert fit(between(0.1, 0.1, SAME)) is Fit.UNDECIDED
    assert fit(evidence(at_start=True, full_step={"a": np.full(4, 0.5)})) is Fit.NOT_CONSISTENT


def test_born_and_newly_silent_units_are_counted():
    """Of two silent units one fired before."""
    found = compare_updates(between(0.1, 0.1, [True, False, False, False]), SILENT)
    assert (found.newly_silent, found.born_silent) == (1, 1)


def test_a_site_of_another_size_is_left_out():
    """Ratios that do not match the units are not compared."""
    assert fit(evidence(last_update={"a": np.array([9.0]), "b": np.array([9.0])})) is Fit.UNDECIDED
