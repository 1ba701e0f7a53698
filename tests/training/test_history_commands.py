"""`report`, `watch --once` and `export`: what they print of a history, and what they refuse."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from rich.cells import cell_len

from relu_doctor.errors import ReLUDoctorWarning
from relu_doctor.reports.exports import frames
from relu_doctor.reports.history import look, render_history_text
from relu_doctor.reports.standing import curve
from relu_doctor.training.history import History
from relu_doctor.training.history_schema import UNIT_DATA
from relu_doctor.training.windows import Alert
from tests.builders import make_diagnosis, site
from tests.commands import call, one_sentence
from tests.training.made import scanned, window_of

TABLES = ("timeline", "windows", "sites", "units", "findings", "alerts", "runs")
EVIL = "=HYPERLINK(1)[red]\x1b[31m"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process: exit code, stdout, stderr."""

    def use(*arguments):
        return call(monkeypatch, capsys, *arguments)

    return use


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A history of two runs, the second of which went back: windows 0, 10, 20 live, two abandoned."""
    path = tmp_path_factory.mktemp("run")
    healthy = make_diagnosis(site(EVIL, active=8), site("3", active=5))
    sick = make_diagnosis(site(EVIL, active=2, negative_bias=6), site("3", active=4, negative_bias=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReLUDoctorWarning)
        for start, diagnoses in ((0, [healthy, healthy, healthy]), (10, [healthy, sick])):
            with History.open(path) as history:
                history.begin(start_step=start)
                for index, diagnosis in enumerate(diagnoses):
                    alerts = [Alert("RD701", start + 10 * index, EVIL, "units fell silent")]
                    history.append(window_of(diagnosis, index, start=start, alerts=alerts))
    return path


def test_the_report_tells_the_story(run, kept):
    """State, numbers, each site over time, alerts, and the whole latest verdict; names are made harmless."""
    result = run("report", kept)
    assert (result.code, result.err) == (0, "")
    told = " ".join(result.out.split())
    assert result.out.startswith("Ended: finished.\n")
    numbers = "step 29; loss 0.04762, lr 0.1, largest update 0.2 % of its weights"
    assert f"{numbers}; 53.8 % of 13 units silent (7 dead)" in told
    assert "3 windows of 2 runs" in told
    assert "2 windows of abandoned branches kept beside" in told
    assert "··▆" in result.out
    assert "RD701 step 20: =HYPERLINK(1)[red]\\x1b[31m: units fell silent" in told
    assert "site max update weight norm" in told
    assert "Critical: 7 of 13 units" in told
    assert "RD205" in told
    assert "\x1b" not in result.out
    assert all(len(line) <= 80 for line in result.out.splitlines())


def test_the_report_as_json(run, kept, tmp_path):
    """Everything in plain values, and the same in a file."""
    document = json.loads(run("report", kept, "--format", "json").out)
    assert document["schema_version"] == 1
    assert document["state"] == "ended"
    assert [row["first_step"] for row in document["windows"]] == [0, 10, 20]
    assert len(document["timeline"]) == 6
    assert document["superseded_windows"] == 2
    assert document["diagnosis"]["summary"]["dead"] == 7
    assert run("report", kept, "--format", "json", "--output", tmp_path / "r.json").out == ""
    assert json.loads((tmp_path / "r.json").read_text()) == document
    run("report", kept, "--output", tmp_path / "r.txt")
    assert (tmp_path / "r.txt").read_text().startswith("Ended: finished.\n")


def test_a_running_history_and_one_without_windows(run, tmp_path):
    """Both are shown as they stand."""
    with History.open(tmp_path) as history:
        assert "No window has closed yet." in run("report", tmp_path).out
        history.begin()
        history.append(window_of(scanned()))
        shown = run("report", tmp_path).out
        assert shown.startswith("Running: this process ")
        assert "7.69 % of 13 units silent" in " ".join(shown.split())
        assert json.loads(run("report", tmp_path, "--format", "json").out)["state"] == "running"
        once = run("watch", tmp_path, "--once")
        assert (once.code, once.err) == (0, "")
        assert once.out.startswith("Running: this process ")
        assert "Findings" not in once.out


@pytest.mark.parametrize("width", [60, 72, 80, 110])
def test_no_line_is_wider_than_the_terminal(kept, width):
    """Long names and large numbers give way."""
    view = look(History.read(kept))
    assert all(cell_len(line) <= width for line in render_history_text(view, width=width).splitlines())


@pytest.mark.parametrize("table", TABLES)
def test_every_table_is_exported_alike(run, kept, tmp_path, table):
    """CSV and JSON have the same rows and columns, on stdout and in a file."""
    printed = run("export", kept, "--format", "csv", "--table", table).out
    rows = list(csv.DictReader(io.StringIO(printed, newline="")))
    document = json.loads(run("export", kept, "--format", "json", "--table", table).out)
    assert document["table"] == table
    assert len(rows) == len(document["rows"]) > 0
    assert list(rows[0]) == list(document["rows"][0])
    path = tmp_path / "table.csv"
    run("export", kept, "--format", "csv", "--table", table, "--output", path)
    assert path.read_bytes().decode() == printed


def test_exported_units_are_those_of_every_live_window(run, kept):
    """A row per window and unit; ``--window`` keeps to one, ``--superseded`` shows the abandoned ones too."""
    units = pd.read_csv(io.StringIO(run("export", kept, "--format", "csv", "--table", "units").out))
    assert units.groupby("window_id").size().to_dict() == {1: 13, 4: 13, 5: 13}
    assert [name for name in units.columns if name in {column.name for column in UNIT_DATA}] == [
        column.name for column in UNIT_DATA
    ]
    assert set(units.loc[units["window_id"] == 5, "onset"].dropna()) == {"died"}
    one = run("export", kept, "--format", "json", "--table", "units", "--window", "2")
    assert {row["window_id"] for row in json.loads(one.out)["rows"]} == {2}
    everything = json.loads(run("export", kept, "--format", "json", "--superseded", "--table", "windows").out)
    assert sorted(row["superseded_by"] or 0 for row in everything["rows"]) == [0, 0, 0, 4, 4]
    timeline = json.loads(run("export", kept, "--format", "json", "--window", "5").out)["rows"]
    assert [row["dead"] for row in timeline] == [6, 1]


def test_csv_is_safe_to_open(run, kept):
    """A name that a spreadsheet would take for a formula is made inert; missing values are empty."""
    rows = list(csv.DictReader(io.StringIO(run("export", kept, "--format", "csv").out)))
    assert rows[0]["site"] == "'=HYPERLINK(1)[red]\\x1b[31m"
    assert rows[0]["effective_rank"] == ""


def test_parquet_needs_its_package(run, kept, tmp_path, monkeypatch):
    """Without pyarrow: one sentence, and no file."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run("export", kept, "--format", "parquet", "--output", tmp_path / "t.parquet")
    assert "pip install pyarrow" in one_sentence(result)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("table", TABLES)
def test_parquet_holds_the_same(run, kept, tmp_path, table):
    """Every table comes back from Parquet as it is in the reader."""
    pytest.importorskip("pyarrow")
    path = tmp_path / "t.parquet"
    assert run("export", kept, "--format", "parquet", "--table", table, "--output", path).code == 0
    expected = pd.concat(list(frames(History.read(kept), table)), ignore_index=True)
    found = pd.read_parquet(path)
    assert list(found.columns) == list(expected.columns)
    for name in found.columns:
        assert [_plain(value) for value in found[name]] == [_plain(value) for value in expected[name]], name


def _plain(value):
    if isinstance(value, list | np.ndarray):
        return [int(item) for item in value]
    return None if pd.isna(value) else value


@pytest.mark.parametrize("arguments", [["report"], ["watch"], ["watch", "--once"], ["export", "--format", "csv"]])
def test_what_is_no_history_is_refused(run, tmp_path, arguments):
    """Nothing there, a file, a directory of something else: one sentence each, and nothing is made."""
    command, *options = arguments
    assert "found nothing at" in one_sentence(run(command, tmp_path / "no", *options))
    assert "relu_doctor.sqlite" in one_sentence(run(command, tmp_path, *options))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    told = "found no JSON in" if command == "report" else "found a file at"
    assert told in one_sentence(run(command, tmp_path / "file", *options))


def test_bad_arguments_are_refused(run, kept, tmp_path):
    """A window that is not there, a table that has no windows, an output that cannot be written."""
    export = ("export", kept, "--format", "csv")
    assert "found 99" in one_sentence(run(*export, "--table", "units", "--window", "99"))
    assert "runs is not told by windows" in one_sentence(run(*export, "--table", "runs", "--window", "1"))
    assert "--output" in one_sentence(run(*export, "--output", tmp_path))
    assert "--format" in one_sentence(run("export", kept))
    assert one_sentence(run(*export, "--table", "nonsense"))


def test_a_reader_that_has_seen_enough(kept):
    """A closed pipe ends in silence."""
    line = f"{sys.executable} -m relu_doctor export {kept} --format csv --table units | head -1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.startswith("window_id,site,")


def test_a_curve_has_a_cell_for_each_window_until_there_are_too_many():
    """Of more windows than cells the largest are shown, and none is not some."""
    assert curve([]) == ""
    assert curve([0.0, 0.001, 0.125, 0.126, 1.0]) == "·▁▁▂█"
    assert curve([0.0] * 999 + [1.0]) == "·" * 15 + "█"
