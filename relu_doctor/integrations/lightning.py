"""The monitor as a callback of Lightning; needs the extra ``lightning``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Unpack

import torch
from torch import Tensor

from relu_doctor.diagnose.diagnosis import Diagnosis
from relu_doctor.integrations.attached import Attachment, Options, needed
from relu_doctor.reports.tensorboard import TensorBoardSink
from relu_doctor.training.monitor import Monitor

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers import TensorBoardLogger
except ModuleNotFoundError as error:
    raise needed("lightning", "lightning") from error

_KEPT = ("_attachment", "_module", "_saved", "_made", "_loss")


class ReLUDoctorCallback(Callback):  # type: ignore[misc]  # Lightning is not read by the type checker
    """Watches the rectifiers of a module while Lightning fits it.

    Each window's :meth:`~relu_doctor.Diagnosis.scalars` go to the trainer's loggers and into
    ``trainer.callback_metrics``, where ``EarlyStopping`` and ``ModelCheckpoint`` find them; a ``TensorBoardLogger``
    gets all that :class:`~relu_doctor.reports.tensorboard.TensorBoardSink` writes. The evidence is kept in
    checkpoints, and a run that is resumed goes on from there. A step is an update, so that
    ``accumulate_grad_batches`` counts once. The sanity check and validation do not count.

    Args:
        module: which part of the LightningModule to watch, by its path (``"net"``, ``"backbone.encoder"``); by default
            all of it. Sites are named within that part.
        options: of the :class:`~relu_doctor.Monitor`: ``every``, ``window``, ``history``, ``sinks``, ...

    Attributes:
        monitor: of the latest fit, with its tables; ``None`` before the first.

    Raises:
        TypeError: a monitor has no such option.
    """

    def __init__(self, module: str = "", **options: Unpack[Options]) -> None:
        super().__init__()
        self._attachment = Attachment(options)
        self._module = module
        self._saved: dict[str, Any] = {}
        self._made = 0  # updates by any optimizer, as Lightning counts them
        self._loss: Tensor | None = None

    @property
    def monitor(self) -> Monitor | None:
        """Of the latest fit."""
        return self._attachment.monitor

    @property
    def state_key(self) -> str:
        """Under which a checkpoint has the state: another one for each part that is watched."""
        key: str = self._generate_state_key(module=self._module)
        return key

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach; optimizers are there, and the sanity check is over."""
        goes_on = trainer.global_step > 0 and self._saved.get("global_step") == trainer.global_step
        self._attachment.begin(
            pl_module.get_submodule(self._module),
            trainer.optimizers,
            step=trainer.global_step,
            saved=self._saved["monitor"] if goes_on else None,
            parts=True,
            boards=[TensorBoardSink(logger.experiment, hparams=False) for logger in _boards(trainer)],
        )
        self._made, self._loss, self._paused = trainer.global_step, None, ExitStack()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One step, if an optimizer has made one."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:  # of accumulated batches each has its share
            self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        if self.monitor is None or trainer.global_step == self._made:
            return
        self._made, loss, self._loss = trainer.global_step, self._loss, None
        diagnosis = self.monitor.step(loss=loss)
        if diagnosis is not None:
            _log(trainer, diagnosis)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """No forward counts, with gradients or without."""
        if self.monitor is not None and not trainer.sanity_checking:
            self._paused.enter_context(self.monitor.pause())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """They count again."""
        if self.monitor is not None and not trainer.sanity_checking:
            self._paused.close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach, whether the end was reached or the fit was stopped."""
        if self._attachment.end("finished") and self.monitor is not None and self.monitor.diagnosis is not None:
            _log(trainer, self.monitor.diagnosis)
        self._saved = self.state_dict()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach; other processes are not waited for."""
        self._attachment.abandon(type(exception).__name__)
        self._saved = self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        state = self._attachment.state()
        return self._saved if state is None else {"monitor": state, "global_step": self._made}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint, at the next fit."""
        self._saved = state_dict

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or what another process is sent, is attached to nothing; Lightning lends callbacks its methods."""
        return {name: value for name, value in vars(self).items() if name in _KEPT}


def _boards(trainer: Trainer) -> list[TensorBoardLogger]:
    """The loggers that a sink writes to, in the process that reports."""
    found = [each for each in trainer.loggers if isinstance(each, TensorBoardLogger)]
    return found if trainer.is_global_zero else []


def _log(trainer: Trainer, diagnosis: Diagnosis) -> None:
    scalars, boards = diagnosis.scalars(), _boards(trainer)
    for logger in trainer.loggers:
        if logger not in boards:
            logger.log_metrics(scalars, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scalars.items()})
