"""The same toy data, model and seed, trained in a plain loop, by Lightning and by the Hugging Face Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

from relu_doctor.training.monitor import Monitor

STEPS, SIZE = 60, 16

# What the frameworks say by themselves, of what they are made of and of runs as small as these.
QUIET = (
    "ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning",
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore:.*pin_memory.* argument is set as true but no accelerator is found:UserWarning",
    "ignore::relu_doctor.errors.DyingUnitsWarning",
)


class Net(nn.Module):
    """Two rectified layers, some of whose units are born dead; returns its loss, as models of transformers do."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)
        self.drop = nn.Dropout(drop)
        with torch.no_grad():
            self.first.bias[:3] = -100

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """(inputs, 16) to the loss and logits (inputs, 4)."""
        logits = self.out(F.relu(self.second(self.drop(F.relu(self.first(x))))))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Rows(Dataset[dict[str, Tensor]]):
    """Rows that are always the same."""

    def __init__(self, number: int = STEPS * SIZE) -> None:
        self.x = torch.randn(number, 16, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.x[index, :4].argmax()}


class Lit(pl.LightningModule):
    """The net in Lightning."""

    def __init__(self, drop: float = 0.0, decay: float = 1.0) -> None:
        super().__init__()
        self.net, self.losses, self.decay = net(drop), [], decay

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = self.net(**batch)["loss"]
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        with torch.enable_grad():  # as for adversarial examples
            self.log("validation", self.net(**batch)["loss"])

    def configure_optimizers(self) -> Any:
        optimizer = sgd(self)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, self.decay)]


def net(drop: float = 0.0) -> Net:
    """The net, as it is at the start."""
    torch.manual_seed(0)
    return Net(drop)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def batches(size: int = SIZE) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Rows(), batch_size=size)


def plain(accumulate: int = 1, **options: Any) -> tuple[Net, Monitor]:
    """Train in a plain loop."""
    model, told = net(), torch.zeros(())
    optimizer = sgd(model)
    with Monitor(model, optimizer=optimizer, **options) as monitor:
        for number, batch in enumerate(batches(SIZE // accumulate), start=1):
            loss = model(**batch)["loss"] / accumulate
            loss.backward()
            told += loss.detach()
            if number % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                monitor.step(loss=told)
                told = torch.zeros(())
    return model, monitor


def lightning_trainer(*callbacks: Any, **options: Any) -> pl.Trainer:
    """A trainer that writes nothing, unless it is told to."""
    chosen = {
        "max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    return pl.Trainer(callbacks=list(callbacks), **(chosen | options))


def hugging_face_trainer(model: nn.Module, folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    """A trainer that takes the rows in order, with the plain loop's optimizer."""
    chosen = {
        "num_train_epochs": 1, "per_device_train_batch_size": SIZE, "max_grad_norm": 0.0, "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 10, "seed": 3,
        "train_sampling_strategy": "sequential", "dataloader_pin_memory": False,
    }  # fmt: skip
    optimizer = sgd(model)
    steady = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return Trainer(
        model,
        TrainingArguments(str(folder), **(chosen | options)),
        train_dataset=Rows(),
        eval_dataset=Rows(64),
        callbacks=list(callbacks),
        optimizers=(optimizer, steady),
    )


def same(one: Any, other: Any) -> bool:
    """Whether two nests of values and tensors are alike, bit by bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)
