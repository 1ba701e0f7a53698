"""The README says what the software does: its findings table is the rules' own text, its options exist."""

from __future__ import annotations

import re
from pathlib import Path

import relu_doctor.diagnose.rules  # noqa: F401 registers the rules
from relu_doctor.diagnose.findings import RULES, explanation
from relu_doctor.terms import Status

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_findings_table_is_the_rules_own_text():
    """One row per code, with the first line of its explanation."""
    rows = [f"| `{code}` | {explanation(code).splitlines()[0]} |" for code in sorted(RULES)]
    assert "\n".join(rows) in README


def test_every_status_is_explained_once():
    """The statuses of the table are those of the code, in their order of precedence."""
    section = README.split("Every unit has exactly one status")[1].split("How sure:")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE) == [status.value for status in Status]


def test_the_options_that_the_readme_names_exist():
    """An option of the README that the command does not know would mislead."""
    source = (Path(__file__).parent.parent / "relu_doctor" / "commands" / "scan.py").read_text(encoding="utf-8")
    known = {f"--{name.replace('_', '-')}" for name in re.findall(r"^    (\w+): Annotated\[", source, re.MULTILINE)}
    known |= {"--format"}
    scan_section = README.split("## Scan a checkpoint")[1].split("## In Python")[0]
    assert set(re.findall(r"--[a-z][a-z-]+", scan_section)) <= known
