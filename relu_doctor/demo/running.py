"""Trains the stories, watched by a monitor, and scans what they left; says nothing itself."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from relu_doctor.checkpoints.data import open_data
from relu_doctor.checkpoints.models import build_model
from relu_doctor.checkpoints.scanning import ScannedCheckpoint, compare_within_runs, scan_checkpoint
from relu_doctor.demo.stories import STORIES, Story
from relu_doctor.demo.training import StoryRun, events_of, history_of, train_story
from relu_doctor.diagnose.storage import write_atomically
from relu_doctor.reports.history_frames import frames_of
from relu_doctor.reports.page import build_page
from relu_doctor.scanner import ScanRequest
from relu_doctor.training.history import History

DATA = "relu_doctor.demo.data:digits"
Progress = Callable[[int, int | None], None]


@dataclass(frozen=True, slots=True, eq=False)
class StoryResult:
    """One story, trained and scanned.

    Attributes:
        run: what the training left.
        before: the checkpoint from before the first step.
        after: the last one, judged beside it.
    """

    run: StoryRun
    before: ScannedCheckpoint
    after: ScannedCheckpoint


def run_stories(
    directory: Path, *, seed: int = 0, stories: tuple[Story, ...] = STORIES, on_progress: Progress | None = None
) -> Iterator[StoryResult]:
    """Train and scan story by story.

    Args:
        directory: where the checkpoints are left.
        seed: of the initial weights and of the order of the images.
        stories: which.
        on_progress: called with the epochs trained and the epochs in all, over all stories.

    Raises:
        ReLUDoctorError: scikit-learn is not installed, or the directory cannot be written to.
    """
    total, done = sum(story.epochs for story in stories), 0
    for story in stories:

        def report(epoch: int, _: int, offset: int = done) -> None:
            if on_progress is not None:
                on_progress(offset + epoch, total)

        run = train_story(story, directory, seed=seed, watched_in=directory, on_progress=report)
        done += story.epochs
        yield StoryResult(run, *_scan(story, (run.paths[0], run.paths[-1])))


def scan_line(result: StoryResult) -> str:
    """The command that scans a story's first and last checkpoint, as it can be pasted."""
    files = [shlex.quote(os.path.relpath(path)) for path in (result.run.paths[0], result.run.paths[-1])]
    return f"{_own_command()} scan {' '.join(files)} --model {result.run.story.model} --data {DATA}"


def watch_line(result: StoryResult) -> str:
    """What the monitor said of a story while it was trained: its first alert, if there was any."""
    steps, alerts = result.run.final.step, result.run.alerts
    if not alerts:
        return f"quiet for all {steps:,} updates."
    return f"after update {alerts[0].step:,} of {steps:,}: {alerts[0].message} [{alerts[0].code}]."


def write_page(result: StoryResult, directory: Path) -> Path:
    """Write the page of a story's history.

    Raises:
        OutputError: it cannot be written.
    """
    history = history_of(result.run.story, directory)
    path = directory / f"{result.run.story.key}.html"
    command = f"relu-doctor report {history} --format html --output {path}"
    page = build_page(frames_of(History.read(history)), title=result.run.story.key, command=command)
    write_atomically(path, page.encode())
    return path


def dashboard_line(directory: Path) -> str:
    """The command that opens the dashboard of all stories, as it can be pasted."""
    found = shutil.which("tensorboard")
    beside = Path(sys.executable).with_name("tensorboard")
    command = "tensorboard" if found or not beside.is_file() else shlex.quote(os.path.relpath(beside))
    return f"{command} --logdir {shlex.quote(os.path.relpath(events_of(directory)))}"


def _scan(story: Story, paths: tuple[Path, Path]) -> tuple[ScannedCheckpoint, ScannedCheckpoint]:
    scanned = [
        scan_checkpoint(path, lambda: build_model(story.model), lambda: open_data(DATA, batch_size=256), ScanRequest())
        for path in paths
    ]
    first, last = compare_within_runs(scanned)
    return first, last


def _own_command() -> str:
    """How the command is called from here: by name where the shell would find it, else by its path."""
    own = Path(sys.argv[0])
    found = shutil.which("relu-doctor")
    if own.name.startswith("relu-doctor") and (found is None or Path(found).resolve() != own.resolve()):
        return shlex.quote(os.path.relpath(own))
    return "relu-doctor"
