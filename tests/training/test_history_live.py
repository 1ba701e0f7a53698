"""Histories of real processes: killed at random moments, read while they are written, followed live."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from relu_doctor.training.history import History
from relu_doctor.training.windows import Alert
from tests.training.made import scanned, window_of

pty = pytest.importorskip("pty", reason="needs POSIX: processes are forked and killed")

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"
DEAD = scanned()


@contextmanager
def writing(path: Path, *, pause: float = 0.0, count: int = 10**6) -> Iterator[int]:
    """A process that appends windows; at the end of the block it is killed, if it still runs."""
    child = os.fork()
    if child == 0:
        try:
            with History.open(path) as history:
                history.begin()
                history.append_alert(Alert("RD701", 3, "1", "update 3 at lr 0.5: [bold]41 of 64 units\x1b[31m"))
                for index in range(count):
                    history.append(window_of(DEAD, index))
                    time.sleep(pause)
        finally:
            os._exit(0)
    try:
        _until(lambda: _kept(path) > 1)
        yield child
    finally:
        if os.waitpid(child, os.WNOHANG)[0] == 0:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _kept(path: Path) -> int:
    try:
        return len(History.read(path).windows)
    except OSError:
        return 0


def _until(holds, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def _hears_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "relu_doctor", *map(str, arguments)]


def test_killed_at_random_moments(tmp_path, monkeypatch):
    """Each time the store opens, is sound, and has every window that was said to be kept."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from kill_history import kill_once

    chance = random.Random(0)
    for place in range(8):
        kill_once(tmp_path / str(place // 4), DEAD, chance.uniform(0, 0.25))


def test_readers_see_whole_windows_while_they_are_written(tmp_path):
    """Whatever the moment: as many rows as windows and sites, a diagnosis, and steps without a gap."""
    with writing(tmp_path):
        counts = []
        for _ in range(40):
            with History.read(tmp_path) as reader:
                windows = reader.windows
                counts.append(len(windows))
                assert windows["last_step"].tolist() == [10 * index + 9 for index in range(len(windows))]
                assert len(reader.timeline) == 2 * len(windows)
                assert len(reader.units()) == 13
                assert reader.latest is not None
                assert reader.state.state == "running"
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]
    assert History.read(tmp_path).state.state == "stopped"


def test_watching_ends_with_the_run(tmp_path):
    """Piped: a line per window and alert, once each, nothing of a name that a terminal would obey."""
    with writing(tmp_path, pause=0.08, count=40):
        told = subprocess.run(
            command("watch", tmp_path, "--every", "0.1"), capture_output=True, text=True, check=False, timeout=120
        )
    assert (told.returncode, told.stderr) == (0, "")
    lines = told.stdout.splitlines()
    assert lines[0].startswith("RD701  step 3: 1: update 3 at lr 0.5: [bold]41 of 64 units\\x1b[31m")
    steps = [line.split(";")[0] for line in lines if line.startswith("step ")]
    assert steps == [f"step {10 * index + 9}" for index in range(40)]
    assert lines[-1] == "Ended: finished."


def test_watching_a_killed_run_ends(tmp_path):
    """It does not wait for ever for a process that is gone."""
    with writing(tmp_path):
        pass
    told = subprocess.run(command("watch", tmp_path), capture_output=True, text=True, check=False, timeout=120)
    assert told.returncode == 0
    assert "Stopped without saying so" in told.stdout


@pytest.mark.parametrize("size", [(80, 24), (40, 10)])
def test_ctrl_c_leaves_a_terminal_quietly(tmp_path, size):
    """On a terminal the page is renewed in place; Ctrl-C ends it without a word, and the run goes on."""
    with writing(tmp_path, pause=0.02) as child:
        ours, theirs = pty.openpty()
        columns, lines = size
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), "LINES": str(lines)}
        watcher = subprocess.Popen(
            command("watch", tmp_path, "--every", "0.1"),
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
            preexec_fn=_hears_interrupts,  # noqa: PLW1509  tests that run in the background do not
        )
        os.close(theirs)
        shown = b""
        end = time.monotonic() + 60
        while shown.count(b"Running") < 3 and time.monotonic() < end:
            if select.select([ours], [], [], 0.2)[0]:
                shown += os.read(ours, 65536)
        watcher.send_signal(signal.SIGINT)
        while watcher.poll() is None and time.monotonic() < end:
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    shown += os.read(ours, 65536)
                except OSError:  # the terminal's other end is closed
                    break
        _, error = watcher.communicate(timeout=30)
        os.close(ours)
        assert (watcher.returncode, error) == (0, b"")
        assert shown.count(b"Running") >= 3
        assert b"Traceback" not in shown
        assert os.waitpid(child, os.WNOHANG) == (0, 0)


def test_watching_twice_and_reporting_disturb_nobody(tmp_path):
    """Two that look and one that writes: all windows are kept, and the writer leaves one file."""
    with writing(tmp_path, pause=0.02, count=100):
        looks = [subprocess.Popen(command("report", tmp_path), stdout=subprocess.DEVNULL) for _ in range(2)]
        assert [look.wait(60) for look in looks] == [0, 0]
        _until(lambda: History.read(tmp_path).state.state == "ended")
    assert len(History.read(tmp_path).windows) == 100
