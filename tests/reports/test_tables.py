"""The units as CSV."""

from __future__ import annotations

import csv
import io

import pandas as pd
import pytest

from relu_doctor.reports.tables import units_csv
from tests.builders import make_diagnosis, site


def test_it_reads_back_as_the_table_of_units():
    """Same columns, same numbers to the last digit, missing values missing."""
    diagnosis = make_diagnosis(site("relu1", active=3, negative_bias=2), site("relu2", unobserved=2))
    again = pd.read_csv(io.StringIO(units_csv(diagnosis)), keep_default_na=False, na_values=[""])
    assert list(again.columns) == list(diagnosis.units.columns)
    again["mechanism"] = again["mechanism"].fillna("")
    pd.testing.assert_frame_equal(again, diagnosis.units, check_dtype=False)


@pytest.mark.parametrize("name", ["=1+1", "+x", "-x", "@sum", "\tx", "\rx"])
def test_no_cell_is_a_formula(name):
    """A name that a spreadsheet would run gets an apostrophe; numbers stay numbers."""
    text = units_csv({name: make_diagnosis(site(name, active=1, negative_bias=1, rectifier=name))})
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 2
    for row in rows:
        for column in ("checkpoint", "site", "rectifier"):
            assert row[column].startswith("'")
        assert float(row["pre_min"]) < 0
        assert row["status"] in {"active", "dead"}


def test_names_keep_their_cell_and_bring_no_control_characters():
    """Quotes, commas and line breaks in a name break nothing."""
    name = 'a,"b"\nc\x1b[2J\u202e'
    text = units_csv(make_diagnosis(site(name, active=2)))
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["site"] for row in rows] == ['a,"b"\\nc\\x1b[2J\\u202e'] * 2
    assert "\x1b" not in text


def test_several_checkpoints_are_told_apart_by_a_first_column():
    """One header, the checkpoints one after the other."""
    text = units_csv({"a.pt": make_diagnosis(site("r", active=1)), "b.pt": make_diagnosis(site("r", active=2))})
    assert [line.split(",")[0] for line in text.splitlines()] == ["checkpoint", "a.pt", "b.pt", "b.pt"]
    assert units_csv({}).startswith("checkpoint")
