"""Progress on stderr."""

from __future__ import annotations

import io
import subprocess
import sys
import time

import pytest

from relu_doctor.reports.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(monkeypatch, stream, *, patience, wait=0.0):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar("scanning [red]net.pt[/red]\x1b[2J", patience=patience) as progress:
        progress(1, None)
        time.sleep(wait)
        progress(3, 7)
        time.sleep(wait)
    return stream.getvalue()


def test_quick_work_shows_nothing(monkeypatch, capsys):
    assert run(monkeypatch, Terminal(), patience=30) == ""
    assert capsys.readouterr().out == ""


def test_piped_nothing_is_written(monkeypatch):
    assert run(monkeypatch, io.StringIO(), patience=0) == ""


def test_slow_work_shows_a_bar_that_is_gone_afterwards(monkeypatch, capsys):
    """The label is text, the count is there, and stdout is left alone."""
    out = sys.stdout
    shown = run(monkeypatch, Terminal(), patience=0.01, wait=0.5)
    assert "scanning [red]net.pt[/red]" in shown
    assert "\\x1b[2J" in shown
    assert "3/7" in shown
    assert shown.endswith("\x1b[2K")
    assert sys.stdout is out
    assert capsys.readouterr().out == ""


def test_an_error_takes_the_bar_away_and_passes(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(KeyError), progress_bar("x", patience=0):
        raise KeyError("x")


@pytest.mark.parametrize(
    ("module", "unneeded"),
    [
        ("progress", ("torch", "rich", "pandas")),
        ("scans", ("torch", "tensorboard")),
        ("notebook", ("torch", "tensorboard")),
        ("tables", ("torch",)),
        ("tensorboard", ("torch", "tensorboard")),
    ],
)
def test_reports_import_nothing_heavy_before_they_need_it(module, unneeded):
    """The command pays for torch and TensorBoard only where it uses them."""
    code = f"import sys, relu_doctor.reports.{module}; sys.exit(any(name in sys.modules for name in {unneeded}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
