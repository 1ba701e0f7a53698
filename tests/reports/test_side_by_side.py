"""The table of several checkpoints."""

from __future__ import annotations

import io

from rich.cells import cell_len
from rich.console import Console

from relu_doctor.reports.side_by_side import render_comparison
from tests.builders import make_diagnosis, site


def rows():
    return [
        ("sound-mlp-epoch20.pt", make_diagnosis(site("r", active=64), source={"epoch": 20, "step": 900}), "97.8 %"),
        (
            "quietly_sick-mlp-epoch40.pt",
            make_diagnosis(site("r", active=44, negative_bias=20), source={"epoch": 40, "step": 480}),
            "97.5 %",
        ),
        ("diverged-mlp-epoch03.pt", make_diagnosis(site("r", non_finite=64), source={"epoch": 3}), "9.72 %"),
        ("few.pt", make_diagnosis(site("r", active=60, negative_bias=4), num_inputs=100), ""),
        ("gelu.pt", make_diagnosis(site("r", rectifier="GELU", low=None, active=6)), ""),
        ("[red]\x1b[2J", make_diagnosis(site("r", active=6), random_inputs=True), "[b]1[/b]"),
    ]


def printed(width, number=6):
    stream = io.StringIO()
    some = [(label, diagnosis, {"accuracy": accuracy}) for label, diagnosis, accuracy in rows()[:number]]
    render_comparison(some, Console(file=stream, width=width))
    return stream.getvalue()


def test_one_row_per_checkpoint_with_its_verdict():
    """Counts, share, verdict and what the caller adds."""
    lines = {line.split()[0]: line.split() for line in printed(110).splitlines()}
    assert lines["checkpoint"] == (
        ["checkpoint", "epoch", "step", "units", "dead", "unproven", "NaN/Inf", "silent", "verdict", "accuracy"]
    )
    sick = ["40", "480", "64", "20", "0", "0", "31.2", "%", "serious", "97.5", "%"]
    assert lines["quietly_sick-mlp-epoch40.pt"][1:] == sick
    assert lines["diverged-mlp-epoch03.pt"][1:] == ["3", "–", "64", "?", "?", "64", "?", "not", "finite", "9.72", "%"]
    assert lines["few.pt"][3:7] == ["64", "0", "4", "0"]
    assert lines["gelu.pt"][3:8] == ["–", "–", "–", "0", "–"]


def test_it_fits_and_says_what_its_words_mean():
    """At any width no line is too wide; dead has its rate, unproven the inputs needed."""
    for width in (80, 100):
        text = printed(width)
        assert max(map(cell_len, text.splitlines())) <= width
        assert "\x1b" not in text
        assert "Often cited for dead units: 20–50 %." in text
        assert "dead: fires on < 0.398 % of inputs (95 % sure)" in text
        assert "random inputs: nothing here speaks of real ones" in text
    assert "unproven: silent, but on too few inputs; 712 are needed" in printed(80, 4)


def test_columns_without_news_are_left_out():
    """A column of zeros for NaN or unproven is no help."""
    heading = printed(80, 2).splitlines()[0]
    assert "NaN/Inf" not in heading
    assert "unproven" not in heading
