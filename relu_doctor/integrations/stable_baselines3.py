"""The monitor as a callback of Stable-Baselines3; needs the extra ``sb3``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from relu_doctor.diagnose.diagnosis import Diagnosis
from relu_doctor.integrations.attached import Attachment, Options, needed
from relu_doctor.observe.gradients import after_steps
from relu_doctor.reports.tensorboard import TensorBoardSink
from relu_doctor.training.monitor import Monitor

try:
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import TensorBoardOutputFormat
except ModuleNotFoundError as error:
    raise needed("stable_baselines3", "sb3") from error

_ONLY_FILES = ("stdout", "log")  # whose columns are too narrow for the names of sites


class ReLUDoctorCallback(BaseCallback):  # type: ignore[misc]  # Stable-Baselines3 is not read by the type checker
    """Watches the rectifiers of a policy and its critics while an algorithm learns.

    All networks of ``model.policy`` are watched together, under the names that they have there. Rollouts, evaluation
    and target networks do not count, since they run without gradients. A step is an update of the actor, or of the
    policy where actor and critic share an optimizer. Each window's :meth:`~relu_doctor.Diagnosis.scalars` are recorded
    by the algorithm's logger; those of single sites only in files. Where it writes for TensorBoard, it also gets the
    histograms, pictures, texts and records of :class:`~relu_doctor.reports.tensorboard.TensorBoardSink`, whose steps
    are updates.

    Args:
        verbose: as of every callback.
        options: of the :class:`~relu_doctor.Monitor`: ``every``, ``window``, ``history``, ``sinks``, ...

    Attributes:
        monitor: of the latest ``learn``, with its tables; ``None`` before the first.

    Raises:
        TypeError: a monitor has no such option.
    """

    def __init__(self, verbose: int = 0, **options: Unpack[Options]) -> None:
        super().__init__(verbose)
        self._attachment = Attachment(options)
        self._handles: list[RemovableHandle] = []
        self._saved: Mapping[str, Any] | None = None
        self._policy: nn.Module | None = None

    @property
    def monitor(self) -> Monitor | None:
        """Of the latest ``learn``."""
        return self._attachment.monitor

    def state_dict(self) -> Mapping[str, Any]:
        """What :meth:`load_state_dict` goes on from, to be saved beside the algorithm."""
        return self._attachment.state() or self._saved or {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict` with the next ``learn``."""
        self._saved, self._policy = state or None, None

    def _on_training_start(self) -> None:
        policy = self.model.policy
        optimizers = _optimizers(policy)
        self.close()  # a run before was cut short
        if self._policy not in (None, policy):
            self._saved = None  # of other networks
        outputs = [each for each in self.logger.output_formats if isinstance(each, TensorBoardOutputFormat)]
        boards = [TensorBoardSink(each.writer, scalars=False) for each in outputs]
        self._attachment.begin(policy, optimizers, step=0, saved=self._saved, parts=True, boards=boards)
        self._policy = policy
        leading = getattr(getattr(policy, "actor", None), "optimizer", None) or optimizers[0]
        self._handles = after_steps([leading], self._after_update)  # after the monitor's own

    def _after_update(self, optimizer: Optimizer, had_gradients: bool) -> None:
        diagnosis = None if self.monitor is None else self.monitor.step()
        if diagnosis is not None:
            self._log(diagnosis)

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        if self._attachment.end("finished") and self.monitor is not None and self.monitor.diagnosis is not None:
            self._log(self.monitor.diagnosis)
        self.close()

    def close(self) -> None:
        """Detach now: after a ``learn`` that was interrupted, of whose end no callback is told."""
        while self._handles:
            self._handles.pop().remove()
        self._attachment.abandon("closed")
        self._saved = self._attachment.state() or self._saved

    def _log(self, diagnosis: Diagnosis) -> None:
        for name, value in diagnosis.scalars().items():
            self.logger.record(name, value, exclude=None if name.startswith("relu_doctor/") else _ONLY_FILES)


def _optimizers(policy: nn.Module) -> list[Optimizer]:
    """Of all networks, each once."""
    found = [vars(module).get("optimizer") for module in policy.modules()]
    return list(dict.fromkeys(each for each in found if isinstance(each, Optimizer)))
