"""How sure: the numbers of science.md section 2, and bounds that hold as often as they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from relu_doctor.diagnose.evidence import firing_rate_upper, inputs_needed


def test_inputs_needed_are_those_of_the_rule():
    """n >= ln(alpha/m) / ln(1 - p0): 299 inputs at 1 %, 2,995 at 0.1 %, 9,899 with a thousand units."""
    assert inputs_needed(0.01) == 299
    assert inputs_needed(0.001) == 2995
    assert inputs_needed(0.001, num_units=1000) == 9899
    assert inputs_needed(0.01, num_units=1000) == 986


@given(st.floats(1e-4, 0.5), st.integers(1, 10**6), st.floats(0.5, 0.999))
def test_the_needed_inputs_are_the_fewest_that_settle_a_silent_unit(rate, units, confidence):
    """At n the bound is at most p0, at n - 1 it is above."""
    needed = inputs_needed(rate, confidence=confidence, num_units=units)
    at, below = firing_rate_upper(0, [needed, needed - 1], confidence=confidence, num_units=units)
    assert at <= rate * (1 + 1e-6)
    assert below > rate * (1 - 1e-6)


@pytest.mark.parametrize("inputs", [1, 2, 10, 299, 5000])
@pytest.mark.parametrize("units", [1, 100, 10**5])
def test_the_bound_is_that_of_clopper_and_pearson(inputs, units):
    """The Beta(k + 1, n - k) quantile at 1 - alpha/m; 1 - (alpha/m)^(1/n) for no firing; 1 for all."""
    fired = np.unique(np.linspace(0, inputs, 12).round())
    found = firing_rate_upper(fired, inputs, num_units=units)
    right = [1.0 if k == inputs else stats.beta.ppf(1 - 0.05 / units, k + 1, inputs - k) for k in fired]
    np.testing.assert_allclose(found, right, rtol=1e-9)
    assert found[0] == pytest.approx(1 - (0.05 / units) ** (1 / inputs))


def test_nothing_seen_bounds_nothing():
    """Without inputs the rate may be anything."""
    assert firing_rate_upper([0, 0], [0, 10]).tolist() == [1.0, pytest.approx(1 - 0.05**0.1)]


@given(st.integers(0, 200), st.integers(1, 200), st.integers(1, 1000))
def test_the_bound_lies_above_the_rate_and_falls_with_evidence(fired, inputs, units):
    """It is a rate, at least the observed one; more units raise it, more inputs of the same rate lower it."""
    fired = min(fired, inputs)
    bound = float(firing_rate_upper(fired, inputs, num_units=units))
    assert fired / inputs <= bound <= 1
    assert bound <= float(firing_rate_upper(fired, inputs, num_units=units + 1)) + 1e-12
    assert float(firing_rate_upper(2 * fired, 2 * inputs, num_units=units)) <= bound + 1e-12


def test_the_bounds_hold_together_as_often_as_they_say():
    """In 2,000 simulated scans of 50 units, all true rates lie below their bounds in at least 95 %."""
    generator = np.random.default_rng(0)
    units, inputs, scans = 50, 300, 2000
    rates = 10 ** generator.uniform(-4, -0.5, (scans, units))
    bounds = firing_rate_upper(generator.binomial(inputs, rates), inputs, num_units=units)
    assert (rates <= bounds).all(1).mean() >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / scans)


def test_units_that_fire_rarely_are_seldom_called_dead():
    """Of 40 units that fire on 1.1 % of inputs, one is called dead at 1 % in at most 5 % of scans."""
    generator = np.random.default_rng(1)
    units = 40
    inputs = inputs_needed(0.01, num_units=units)
    silent = generator.binomial(inputs, 0.011, (4000, units)) == 0
    assert silent.any(1).mean() <= 0.05
