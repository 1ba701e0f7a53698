"""Numbers and names."""

from __future__ import annotations

import pytest
from rich.cells import cell_len

from relu_doctor.numerals import lower_percent, percent, upper_percent
from relu_doctor.reports.words import listed, ranges, shorten, wrap


@pytest.mark.parametrize(
    ("fraction", "text"),
    [(0, "0 %"), (1, "100 %"), (0.5, "50 %"), (1 / 3, "33.3 %"), (0.9999, "> 99.9 %"), (1e-9, "< 0.001 %")],
)
def test_only_nothing_is_nought_and_only_all_is_a_hundred(fraction, text):
    assert percent(fraction) == text


@pytest.mark.parametrize("rate", [1e-6, 0.000999, 0.0058312, 0.01, 0.0100001, 0.2999999, 0.99999, 1.0])
def test_printed_bounds_hold(rate):
    """A bound is never rounded to where it is false."""
    assert float(upper_percent(rate).removesuffix(" %")) >= 100 * rate * (1 - 1e-8)
    assert float(lower_percent(rate).removesuffix(" %")) <= 100 * rate * (1 + 1e-8)


def test_ranges_close_up_runs_and_count_the_rest():
    assert ranges([5, 1, 2, 3, 9]) == "1–3, 5, 9"
    assert ranges(range(0, 100, 2), most=3) == "0, 2, 4 and 47 more"


def test_lists_read_as_lists():
    assert [listed(list("abcd")[:n]) for n in range(5)] == ["", "a", "a and b", "a, b and c", "a, b, c and 1 more"]


@pytest.mark.parametrize("text", ["model.encoder.layers.11.mlp.act", "層" * 40, "a" * 300])
def test_a_shortened_name_fits_and_keeps_both_ends(text):
    for width in range(1, 32):
        short = shorten(text, width)
        assert cell_len(short) <= width
        assert len(short) < 4 or (short[0], short[-1]) == (text[0], text[-1])


def test_numbers_stay_with_their_signs():
    """No line ends between a number and its percent sign, or between < and its number."""
    lines = wrap("It fires on < 0.5 % of inputs " * 20, 40)
    assert not any(line.endswith("<") or line.startswith("%") for line in lines)
    assert all(len(line) <= 40 for line in lines)
