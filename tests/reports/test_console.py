"""The console report, held against golden files.

After a change that is meant, write them anew with ``UPDATE_GOLDEN=1 python -m pytest tests/reports/test_console.py``
and read the difference before it is kept.
"""

from __future__ import annotations

import io
import os
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from torch import nn

from relu_doctor import scan
from relu_doctor.diagnose.origins import LearningRateEvidence
from relu_doctor.reports.console import render, render_text
from relu_doctor.reports.lines import STAND_INS
from relu_doctor.reports.scans import render_scans, render_scans_text
from relu_doctor.reports.site_table import LOOKS, bar
from relu_doctor.terms import Status
from tests.builders import make_diagnosis, site

GOLDEN = Path(__file__).parent / "golden"
HOSTILE = ("[red]x[/red]", "a\x1b[31mb\u202ec\r\n\x9b2J", "z" * 300, "ünï.層.relu", ":smile: [link=http://a]b[/]", "")
SOURCE = {
    "checkpoint": "runs/net-epoch20.pt",
    "format": "PyTorch zip",
    "key": "model_state_dict",
    "step": 4480,
    "epoch": 20,
    "data": "1,797 inputs of digits.npz",
    "placeholders": ["args: argparse.Namespace"],
    "notes": ["The file also holds tensors under 'ema'; not used."],
}


def _mechanisms():
    history = LearningRateEvidence(
        learning_rates=(0.03,),
        optimizer="Adam-like",
        last_update={"id-relu2": torch.full((64,), 0.05).double().numpy()},
    )
    return make_diagnosis(
        site("relu1", active=190, rare=3, negative_bias=40, input_offset=17, bias_or_offset=6),
        site("norm.relu", norm="batch_norm", active=60, normalization=4, feeds=("relu1",)),
        site("relu2", active=50, zero_weights=2, constant=5, unknown=1, bias_and_offset=6, feeds=("norm.relu",)),
        site("relu6", rectifier="ReLU6", active=30, saturated=2, feeds=("relu2",)),
        history=history,
        source=SOURCE,
    )


def _sixty():
    return make_diagnosis(
        *(site(f"layer{i // 10}.{i % 10}.relu", active=64 - i % 3, negative_bias=i % 3) for i in range(60))
    )


CASES = {
    "healthy": lambda: make_diagnosis(site("relu1", active=256), site("relu2", active=64), source=SOURCE),
    "rare": lambda: make_diagnosis(site("relu1", active=256), site("relu2", active=54, rare=10)),
    "few_dead": lambda: make_diagnosis(site("relu1", active=255, negative_bias=1), site("relu2", active=64)),
    "mechanisms": _mechanisms,
    "unproven": lambda: make_diagnosis(
        site("relu1", active=215, negative_bias=41), site("relu2", active=64), num_inputs=360
    ),
    "collapsed": lambda: make_diagnosis(
        site("relu1", active=12, negative_bias=4), site("relu2", bias_and_offset=32), site("relu3", constant=64)
    ),
    "diverged": lambda: make_diagnosis(site("relu1", non_finite=256), site("relu2", non_finite=64)),
    "partly_nan": lambda: make_diagnosis(site("relu1", active=250, negative_bias=6), site("relu2", non_finite=64)),
    "random": lambda: make_diagnosis(site("relu1", active=250, negative_bias=6), random_inputs=True),
    "cannot_die": lambda: make_diagnosis(
        site("gelu", rectifier="GELU", low=None, active=250), site("silu", rectifier="SiLU", low=None, active=8)
    ),
    "gelu_and_relu": lambda: make_diagnosis(
        site("gelu", rectifier="GELU", low=None, active=250), site("relu", active=60, negative_bias=4)
    ),
    "unobserved": lambda: make_diagnosis(
        site("relu1", active=256),
        site("branch.relu", unobserved=64),
        site("odd.relu", note="the axis of its units could not be told"),
        unused=("head.relu",),
    ),
    "exhaustive": lambda: make_diagnosis(
        site("relu1", active=100, negative_bias=10), num_inputs=150, exhaustive=True, masked=True, excluded=2
    ),
    "limited": lambda: make_diagnosis(
        site("relu1", active=100, negative_bias=10),
        num_inputs=1500,
        distinct_inputs=1400,
        available_inputs=60000,
        sampling="spread",
        read_to_end=False,
        mode="both",
    ),
    "hostile": lambda: make_diagnosis(
        *(site(name, active=20, negative_bias=3, producer=name) for name in HOSTILE),
        passed="[bold]\x1b[2J",
        notes=("a note with [red]markup[/red] and \x07",),
        unused=("[blink]unused\u2066",),
    ),
    "sixty": _sixty,
}


@cache
def made(name):
    return CASES[name]()


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    """The report is, to the letter, what was read and approved."""
    path = GOLDEN / f"{name}.txt"
    text = render_text(made(name), width=80) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [60, 80, 100, 110])
@pytest.mark.parametrize("name", CASES)
def test_no_line_is_wider_than_asked(name, width):
    """Nothing is wrapped by the terminal."""
    assert max(cell_len(line) for line in render_text(made(name), width=width).split("\n")) <= width


@pytest.mark.parametrize("name", CASES)
def test_names_bring_no_control_characters_or_markup(name):
    """What is data stays data: no control or bidi character gets through, and no markup is obeyed."""
    text = render_text(made(name))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    if name == "hostile":
        assert "[red]x[/red]" in text
        assert ":smile:" in text


@pytest.mark.parametrize("name", CASES)
def test_colour_adds_nothing_but_colour(name):
    """Piped, without colour and in colour it is one text."""
    plain = io.StringIO()
    render(made(name), Console(file=plain, width=80))
    assert plain.getvalue() == render_text(made(name), width=80) + "\n"
    coloured = io.StringIO()
    render(made(name), Console(file=coloured, width=80, force_terminal=True, color_system="truecolor"))
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured.getvalue()) == plain.getvalue()
    assert "\x1b[" in coloured.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
@pytest.mark.parametrize("name", CASES)
def test_other_encodings_get_stand_ins_of_the_same_width(name, encoding):
    """A terminal or pipe that is not Unicode gets a report, aligned as ever."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    render(made(name), Console(file=stream, width=80))
    stream.seek(0)
    expected = render_text(made(name), width=80) + "\n"
    assert [len(line) for line in stream.read().split("\n")] == [len(line) for line in expected.split("\n")]


def test_dead_is_never_printed_without_its_rate():
    """Every report that names a dead unit says how often such a unit may fire, or that its data are all there are."""
    for name in CASES:
        diagnosis = made(name)
        if diagnosis.summary["dead"]:
            legend = re.search(r"█ dead: (fires on < [\d.]+ %|silent on all [\d,]+ of [\d,]+) ", render_text(diagnosis))
            assert legend, name


def test_status_marks_differ_without_colour():
    """Two statuses never share a mark, in Unicode or in ASCII."""
    marks = [look.mark for look in LOOKS.values()]
    assert len(set(marks)) == len(marks) == len(Status)
    stand_ins = "".join(marks).translate(STAND_INS)
    assert stand_ins.isascii()
    assert len(set(stand_ins)) == len(marks)


def test_a_bar_is_as_long_as_asked_and_shows_all_that_occurs():
    """One dead unit among a million has its cell, and bars of a table line up."""
    for counts in ({Status.DEAD: 1, Status.ACTIVE: 10**6}, dict.fromkeys(Status, 1), {Status.RARE: 3}):
        for cells in (8, 12, 16, 20):
            drawn = dict(bar(counts, cells))
            assert sum(drawn.values()) == cells
            assert set(drawn) == set(counts)


def test_more_findings_than_shown_are_counted():
    """The weightiest findings are kept: what is about the scan, then what is about most units."""
    diagnosis = made("mechanisms")
    text = render_text(diagnosis, max_findings=2)
    assert f"and {len(diagnosis.findings) - 2} more findings (--format json has all)" in text
    assert "RD301" in text
    assert "RD205" in text


def test_more_sites_than_shown_are_told_of():
    """A table of 60 sites shows the 40 worst and says what the others are."""
    text = render_text(_sixty())
    assert text.count(".relu  ReLU") == 40
    assert "and 20 more sites, all of them sound" in text
    assert "layer0.0.relu" not in text.split("Findings")[0]


def test_the_worst_of_many_sites_are_shown_and_the_rest_summed():
    """Where sick sites are left out too, their dead units are counted."""
    text = render_text(make_diagnosis(*(site(f"relu{i}", active=50, negative_bias=1 + (i > 9)) for i in range(50))))
    assert "and 10 more sites, 10 dead units among them" in text


def test_a_real_scan_reads_as_it_should():
    """print(diagnosis) of a scan shows coverage first, then the verdict, then the site."""
    linear = nn.Linear(8, 32)
    with torch.no_grad():
        linear.bias[:16] = -100
    text = str(scan(nn.Sequential(linear, nn.ReLU()), torch.randn(1000, 8)))
    first, verdict = text.split("\n\n")[:2]
    assert first.startswith("1 of 1 site observed on 1,000 inputs (eval mode; all 1,000 read;")
    assert verdict.startswith("Critical: 16 of 32 units (50 %) are dead (each fires on < 0.645 % of inputs);")
    assert "RD205" in text
    assert "units 0–15" in text


def test_a_real_scan_of_nan_is_not_called_dead_or_sound():
    """NaN weights give a verdict of their own."""
    linear = nn.Linear(8, 32)
    torch.nn.init.constant_(linear.weight, float("nan"))
    text = str(scan(nn.Sequential(linear, nn.ReLU()), torch.randn(100, 8)))
    assert "Not finite: NaN or Inf reached all 32 units" in text
    assert "Healthy" not in text


def test_several_scans_end_side_by_side():
    """Each checkpoint has its report, and the table at the end has a row for each."""
    scans = [("one[bold].pt", made("healthy")), ("two.pt", made("mechanisms"))]
    stream = io.StringIO()
    render_scans(scans, Console(file=stream, width=80))
    text = stream.getvalue()
    assert text == render_scans_text(scans)
    assert text.index("── one[bold].pt ─") < text.index("── two.pt ─") < text.index("── side by side ─")
    assert len(re.findall(r"^(?:one\[bold\]|two)\.pt ", text, re.MULTILINE)) == 2
    assert max(map(cell_len, text.split("\n"))) <= 80


def test_one_scan_alone_has_no_heading():
    """The coverage line comes first."""
    assert render_scans_text([("one.pt", made("healthy"))]) == render_text(made("healthy")) + "\n"
