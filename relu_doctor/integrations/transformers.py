"""The monitor as a callback of the Hugging Face Trainer; needs the extra ``transformers``."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn
from torch.optim import Optimizer

from relu_doctor.diagnose.diagnosis import Diagnosis
from relu_doctor.integrations.attached import Attachment, Options, needed
from relu_doctor.reports.tensorboard import TensorBoardSink
from relu_doctor.training.monitor import Monitor

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    raise needed("transformers", "transformers") from error

STATE_FILE = "relu_doctor.pt"  # in a checkpoint's folder


class ReLUDoctorCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not read by the type checker
    """Watches the rectifiers of a model while the Trainer trains it.

    Each window's :meth:`~relu_doctor.Diagnosis.scalars` are added to ``trainer.state.log_history``; ``sinks`` take
    them elsewhere. Where the Trainer reports to TensorBoard, a
    :class:`~relu_doctor.reports.tensorboard.TensorBoardSink` writes a run of its own beside the Trainer's,
    ``relu_doctor`` in ``runs`` of ``output_dir``. The evidence is kept in each checkpoint's folder
    (``relu_doctor.pt``), and a run that is resumed
    from one in ``output_dir`` goes on from there. A step is an update, so that ``gradient_accumulation_steps`` count
    once; evaluation does not count. The loss and the gradients' norm are those that the Trainer logs, told in the
    window after it logged them.

    Args:
        options: of the :class:`~relu_doctor.Monitor`: ``every``, ``window``, ``history``, ``sinks``, ...

    Attributes:
        monitor: of the latest training, with its tables; ``None`` before the first.

    Raises:
        TypeError: a monitor has no such option.
    """

    def __init__(self, **options: Unpack[Options]) -> None:
        self._attachment = Attachment(options)
        self._logged: dict[str, float] = {}

    @property
    def monitor(self) -> Monitor | None:
        """Of the latest training."""
        return self._attachment.monitor

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Optimizer,
        **kwargs: Any,
    ) -> None:
        """Attach."""
        saved = _saved(args, state.global_step) if state.global_step else None
        self._logged = {}
        shown = "tensorboard" in args.report_to and state.is_world_process_zero
        boards = [TensorBoardSink(_board(args))] if shown else []
        self._attachment.begin(model, [optimizer], step=state.global_step, saved=saved, boards=boards)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Remember what only the Trainer's log tells."""
        self._logged = {name: float(logs[name]) for name in ("loss", "grad_norm") if name in (logs or {})}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One step."""
        if self.monitor is not None:
            logged, self._logged = self._logged, {}
            diagnosis = self.monitor.step(loss=logged.get("loss"), grad_norm=logged.get("grad_norm"))
            if diagnosis is not None:
                _log(state, diagnosis)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the evidence beside the checkpoint that was written."""
        folder, kept = _folder(args, state.global_step), self._attachment.state()
        if kept is not None and state.is_world_process_zero and folder.is_dir():
            torch.save(kept, folder / STATE_FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach, whether the end was reached or the training was stopped."""
        if self._attachment.end("finished") and self.monitor is not None and self.monitor.diagnosis is not None:
            _log(state, self.monitor.diagnosis)

    def close(self) -> None:
        """Detach now: after a training that was interrupted, of whose end the Trainer tells nobody."""
        self._attachment.abandon("closed")


def _board(args: TrainingArguments) -> Path:
    """Beside the runs that the Trainer writes, each in a folder named after its time."""
    return (
        Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or Path(args.output_dir) / "runs").expanduser() / "relu_doctor"
    )


def _folder(args: TrainingArguments, step: int) -> Path:
    return Path(args.output_dir) / f"checkpoint-{step}"


def _saved(args: TrainingArguments, step: int) -> dict[str, Any] | None:
    """What was kept beside the checkpoint that is resumed."""
    given = args.resume_from_checkpoint
    folders = [_folder(args, step), *([Path(given)] if isinstance(given, str) else [])]
    files = [folder / STATE_FILE for folder in folders if (folder / STATE_FILE).is_file()]
    kept: dict[str, Any] | None = torch.load(files[-1], weights_only=True) if files else None
    return kept if kept is not None and kept.get("step") == step else None


def _log(state: TrainerState, diagnosis: Diagnosis) -> None:
    scalars = {name: value for name, value in diagnosis.scalars().items() if math.isfinite(value)}
    state.log_history.append({**scalars, "epoch": state.epoch, "step": state.global_step})
