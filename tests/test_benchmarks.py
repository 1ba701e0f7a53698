"""The benchmarks under `scripts/` run, and every planted truth of theirs holds for this project."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture
def correctness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark of correctness, which imports its neighbours by bare name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_correctness

    return bench_correctness


def test_this_project_is_right_in_every_cell(correctness: ModuleType):
    """Every planted unit is found, no live one is called dead, and the model is left as it was."""
    cells = correctness.cells(correctness.TOOLS["relu-doctor"])
    assert len(cells) > 25
    assert not {title: cell.text for title, cell in cells.items() if not cell.right}


def test_the_table_shows_a_column_per_tool_and_a_line_per_row(correctness: ModuleType):
    """What is printed is Markdown that a reader can check cell by cell."""
    table = correctness.table({"relu-doctor": correctness.cells(correctness.TOOLS["relu-doctor"], ["F.relu", "clamp"])})
    assert [line.count("|") for line in table.splitlines()] == [3] * 5
    assert "| `F.relu` | ✓ 2/2 |" in table
    assert "**2 of 2**" in table


def test_a_tool_that_says_too_much_is_charged_with_it(correctness: ModuleType):
    """A live unit called dead counts as false wherever it is told, and a missed one as missed."""
    from bench_scoring import score
    from rivals import Report, Told

    row = correctness.ROWS[0]
    model, _ = row.case.build()
    truth = {"1": frozenset({1, 5}), "3": frozenset({0})}
    tool = correctness.TOOLS["relu-doctor"]
    for told, text in (
        ([Told("1", frozenset({1, 5})), Told("3", frozenset({0}))], "3/3"),
        ([Told("1", frozenset({1, 2}))], "1/3, 1 false"),
        ([Told("0", 3), Told("2", 1), Told("4", 2)], "3/3, 3 false"),
        ([Told("1", 9, 72)], "0/3, other units"),
        ([Told("call 0", frozenset({1, 5})), Told("call 1", frozenset({0, 6}))], "3/3, 1 false"),
    ):
        assert score(tool, Report(told), model, row.case.sites, truth, ["1", "3"]).text == text


def test_the_benchmark_of_overhead_prints_its_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A contestant in its own process is timed beside the plain forward."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_overhead

    arguments = ["--quick", "--workloads", "tiny", "--contestants", "full", "--no-memory"]
    monkeypatch.setattr(sys, "argv", ["bench_overhead.py", *arguments])
    bench_overhead.main()
    titles, _, plain, full, discovery, verdict, _ = capsys.readouterr().out.splitlines()[1:]
    assert titles.startswith("| | 2 x 64 MLP")
    assert plain.startswith("| plain forward | 0.")
    assert full.startswith("| **relu-doctor, full** | ")
    assert "forwards" in discovery
    assert "forwards" in verdict
