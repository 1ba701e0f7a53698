"""The command, run in this process or judged by what it printed."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest

from relu_doctor import cli


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def call(monkeypatch, capsys, *arguments: object) -> Result:
    """Runs the command in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["relu-doctor", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "80")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    code = stop.value.code
    return Result(code if isinstance(code, int) else int(code is not None), captured.out, captured.err)


def one_sentence(result: Result) -> str:
    """Bad input: exit code 2, nothing on stdout, one line on stderr and no traceback."""
    assert result.code == 2, result
    assert result.out == ""
    lines = [line for line in result.err.splitlines() if line.strip()]
    assert len(lines) == 1, result.err
    assert lines[0].startswith("relu-doctor: ")
    return lines[0]
