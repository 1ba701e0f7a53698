"""Kills processes that write a history, at random moments, and looks each time at what is left.

    python scripts/kill_history.py [--times 100] [--seed 0]

A process opens the history, begins a run and appends windows as fast as it can; after each it says so through a pipe.
It gets SIGKILL at a random moment, which may lie in the opening, in a window or in the closing. Then the store must
open, SQLite's own check of the whole file must pass, every window that was said to be kept must be there and readable
unit by unit, and of the one that was open all or nothing. The next process goes on in the same directory. Needs POSIX.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sqlite3
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from relu_doctor.diagnose.diagnosis import Diagnosis
from relu_doctor.training.history import History
from relu_doctor.training.history_schema import FILE

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.training.made import PERIOD, scanned, window_of

_REOPENED_AFTER = 12  # windows: then the writer closes and opens again, so that these moments are hit too

_LIVES = 4  # kills of one history; then a new one begins
_EARLY = 0.4  # share of kills within the opening


@dataclass(frozen=True)
class Outcome:
    """What one kill left.

    Attributes:
        said: windows that the process had said to be kept, with those of the processes before.
        kept: windows in the store.
        log: bytes of SQLite's log that were left, which the next to open must read.
    """

    said: int
    kept: int
    log: int


def kill_once(directory: Path, diagnosis: Diagnosis, delay: float) -> Outcome:
    """Let a process write, kill it, and check the store.

    Args:
        directory: of the history; may hold one already.
        diagnosis: of every window.
        delay: seconds from the process's start to its death.

    Raises:
        AssertionError: something was lost or is damaged.
    """
    before = _kept(directory)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            _write(directory, diagnosis, writing, before)
        finally:
            os._exit(1)  # it writes until it is killed
    os.close(writing)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the writing process failed by itself"
    with os.fdopen(reading, "rb") as said:
        told = before + len(said.read())
    log = directory / f"{FILE}-wal"
    left = log.stat().st_size if log.exists() else 0
    kept = _kept(directory)
    assert told <= kept <= told + 1, f"{told} windows were said to be kept, {kept} are there"
    _check(directory, kept)
    return Outcome(told, kept, left)


def _write(directory: Path, diagnosis: Diagnosis, told: int, start: int) -> None:
    while True:
        with History.open(directory) as history:
            history.begin(start_step=start * PERIOD)
            for _ in range(_REOPENED_AFTER):
                history.append(window_of(diagnosis, start))
                os.write(told, b".")
                start += 1


def _kept(directory: Path) -> int:
    """Windows in the store, 0 where the process died before there was one."""
    if not (directory / FILE).exists():
        return 0
    with closing(sqlite3.connect(directory / FILE)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        assert not tables or "windows" in tables, "the tables are half made"
        return int(connection.execute("SELECT count(*) FROM windows").fetchone()[0]) if tables else 0


def _check(directory: Path, kept: int) -> None:
    if not kept:
        return
    with closing(sqlite3.connect(directory / FILE)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    with History.read(directory) as history:
        windows = history.windows
        assert len(windows) == kept
        assert windows["last_step"].tolist() == [(index + 1) * PERIOD - 1 for index in range(kept)]
        latest = history.latest
        assert latest is not None
        for window in windows["window_id"].tail(20):
            units = history.units(int(window))
            assert units["status"].tolist() == latest.units["status"].tolist()
        assert len(history.timeline) == kept * len(latest.sites)
        assert history.state.state != "running"


def main() -> None:
    """Kill, check, print the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    diagnosis = scanned()
    outcomes: list[Outcome] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for time_ in range(arguments.times):
            delay = chance.uniform(0, 0.02) if chance.random() < _EARLY else chance.uniform(0, 0.6)
            outcomes.append(kill_once(Path(folder) / str(time_ // _LIVES), diagnosis, delay))
    finished = time.monotonic() - started
    lives = {place // _LIVES: outcome for place, outcome in enumerate(outcomes)}  # of each history, the last
    windows = sum(outcome.kept for outcome in lives.values())
    unsaid = sum(outcome.kept - outcome.said for outcome in outcomes)
    print(
        f"{len(outcomes)} kills in {finished:.0f} s. Each time the store opened and was sound. {windows:,} windows "
        f"were kept, and none was lost that was said to be kept; {unsaid} were whole though that was not yet said. "
        f"{sum(outcome.kept == 0 for outcome in outcomes)} kills came before the first window, "
        f"{sum(outcome.log > 0 for outcome in outcomes)} left a log to read."
    )


if __name__ == "__main__":
    main()
