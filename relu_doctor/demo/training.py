"""Trains one story of the demo and leaves its checkpoints behind."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from relu_doctor.demo.data import Digits, split_digits
from relu_doctor.demo.models import make_cnn, make_mlp
from relu_doctor.demo.stories import Story
from relu_doctor.errors import DyingUnitsWarning, OutputError
from relu_doctor.training.monitor import Monitor
from relu_doctor.training.windows import Alert

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """One checkpoint that a story left.

    Attributes:
        path: the file.
        epoch: full passes over the training images so far.
        step: updates so far.
        accuracy: share of the 360 validation images named rightly, from 0 to 1.
    """

    path: Path
    epoch: int
    step: int
    accuracy: float


@dataclass(frozen=True, slots=True)
class StoryRun:
    """What a story's training left.

    Attributes:
        story: the settings.
        seed: of the initial weights and of the order of the images.
        checkpoints: in the order of training; the first is from before the first step.
        alerts: of the monitor, where there was one.
    """

    story: Story
    seed: int
    checkpoints: tuple[SavedCheckpoint, ...]
    alerts: tuple[Alert, ...] = ()

    @property
    def final(self) -> SavedCheckpoint:
        """The last checkpoint."""
        return self.checkpoints[-1]

    @property
    def accuracy(self) -> float:
        """The validation accuracy at the end."""
        return self.final.accuracy

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files, in the order of training."""
        return tuple(checkpoint.path for checkpoint in self.checkpoints)


def train_story(
    story: Story,
    directory: Path,
    *,
    seed: int = 0,
    watched_in: Path | None = None,
    on_progress: Progress | None = None,
) -> StoryRun:
    """Trains `story` and writes its checkpoints as the training goes.

    A checkpoint is a dict of ``model_state_dict``, ``optimizer_state_dict``, ``epoch``, ``step``, ``accuracy`` and
    ``config`` (the settings, plain values): it loads with ``weights_only=True``. Each file appears whole or not at all.
    On one machine the result depends on `story` and `seed` alone; torch's random state and number of threads are after
    the call what they were before.

    Args:
        story: the settings.
        directory: where the files go, as ``<story>-<net>-epoch<NN>.pt``; made where it is missing.
        seed: of the initial weights and of the order of the images.
        watched_in: a :class:`~relu_doctor.Monitor` watches, and leaves its history and TensorBoard's events in folders
            of this directory; the weights come out the same, bit for bit.
        on_progress: called after each epoch with the epochs done and the epochs in all.

    Raises:
        ReLUDoctorError: scikit-learn is not installed.
        OutputError: the directory or a file cannot be written.
    """
    training, validation = split_digits()
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the directory {str(directory)!r} cannot be made ({error.strerror}).") from error

    saved: list[SavedCheckpoint] = []
    with ExitStack() as stack:
        stack.enter_context(_quiet_torch(seed))
        model = make_mlp() if story.net == "mlp" else make_cnn()
        optimizer = _make_optimizer(story, model)
        steps = -(-len(training.images) // story.batch_size)
        monitor = None
        if watched_in is not None:
            monitor = stack.enter_context(_watching(model, optimizer, story, watched_in, steps))
        order = torch.Generator().manual_seed(seed)
        step = 0
        for epoch in range(story.epochs + 1):
            if epoch > 0:
                step += _train_epoch(model, optimizer, training, story.batch_size, order, monitor)
            if epoch in story.checkpoint_epochs or epoch == story.epochs:
                accuracy = _accuracy(model, validation)
                path = directory / f"{story.key}-epoch{epoch:02d}.pt"
                content = {
                    "model_state_dict": model.state_dict(),
                    "optimizer_state_dict": optimizer.state_dict(),
                    "epoch": epoch,
                    "step": step,
                    "accuracy": accuracy,
                    "config": _plain_settings(story, seed),
                }
                _write(content, path)
                saved.append(SavedCheckpoint(path=path, epoch=epoch, step=step, accuracy=accuracy))
            if epoch > 0 and on_progress is not None:
                on_progress(epoch, story.epochs)
    alerts = () if monitor is None else monitor.alerts
    return StoryRun(story=story, seed=seed, checkpoints=tuple(saved), alerts=alerts)


@contextmanager
def _quiet_torch(seed: int) -> Iterator[None]:
    """Seeds torch, on one thread (these nets are too small for more), and puts everything back afterwards."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=()), torch.device("cpu"), torch.inference_mode(False), torch.enable_grad():
        torch.default_generator.manual_seed(seed)  # of the CPU alone: an accelerator's state is not ours to touch
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def history_of(story: Story, directory: Path) -> Path:
    """Where the monitor of a story leaves its history."""
    return directory / "histories" / story.key


def events_of(directory: Path) -> Path:
    """Where all stories leave TensorBoard's events, each in a folder of its own."""
    return directory / "tensorboard"


@contextmanager
def _watching(
    model: nn.Module, optimizer: torch.optim.Optimizer, story: Story, directory: Path, window: int
) -> Iterator[Monitor]:
    """A monitor, whose alerts are kept and not warned of; what an earlier demo left of this story is replaced."""
    history, events = history_of(story, directory), events_of(directory) / story.key
    for old in (history, events):
        shutil.rmtree(old, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DyingUnitsWarning)
        sink = f"tensorboard:{events}"
        with Monitor(model, optimizer=optimizer, every=5, window=window, history=history, sinks=sink) as monitor:
            yield monitor


def _make_optimizer(story: Story, model: nn.Module) -> torch.optim.Optimizer:
    """The story's optimizer; what it does not set stays at torch's defaults."""
    if story.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=story.learning_rate)
    return torch.optim.SGD(model.parameters(), lr=story.learning_rate, momentum=story.momentum)


def _train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Digits,
    batch_size: int,
    order: torch.Generator,
    monitor: Monitor | None,
) -> int:
    """One pass over `data` in an order drawn from `order`; returns the number of steps."""
    batches = torch.randperm(len(data), generator=order).split(batch_size)
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        loss = cross_entropy(model(data.images[batch]), data.labels[batch])
        loss.backward()
        optimizer.step()
        if monitor is not None:
            monitor.step(loss=loss)
    return len(batches)


def _accuracy(model: nn.Module, data: Digits) -> float:
    """The share of `data` that the model names rightly, from 0 to 1."""
    model.eval()
    with torch.no_grad():
        guesses = model(data.images).argmax(dim=1)
    return float((guesses == data.labels).double().mean())


def _plain_settings(story: Story, seed: int) -> dict[str, Any]:
    """The settings of a run as plain values."""
    return {
        "story": story.name,
        "model": story.model,
        "optimizer": story.optimizer,
        "learning_rate": story.learning_rate,
        "momentum": story.momentum,
        "batch_size": story.batch_size,
        "epochs": story.epochs,
        "seed": seed,
    }


def _write(content: dict[str, Any], path: Path) -> None:
    """Saves `content` to `path` in one step: an interrupted run leaves no half of a checkpoint."""
    draft: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.stem}-", suffix=".part", delete=False
        ) as file:
            draft = Path(file.name)
            torch.save(content, file)
        draft.chmod(0o666 & ~_umask())
        draft.replace(path)
    except OSError as error:
        raise OutputError(f"the checkpoint {str(path)!r} cannot be written ({error.strerror}).") from error
    finally:
        if draft is not None:
            draft.unlink(missing_ok=True)


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
