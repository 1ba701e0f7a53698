"""The demo's four stories, as settings and nothing else.

*Sound*, *collapsed* and *diverged* are one recipe (SGD with momentum, batches of 32) at three learning rates;
*quietly sick* is Adam at thirty times its usual rate. What becomes of the units is left to the training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """One training run of the demo.

    Attributes:
        name: the story: ``sound``, ``quietly_sick``, ``collapsed`` or ``diverged``.
        net: which network it happens to.
        optimizer: ``sgd`` or ``adam``, all else at torch's defaults.
        learning_rate: constant throughout.
        momentum: SGD's; 0 for Adam.
        batch_size: inputs per step.
        epochs: passes over the 1,437 training images.
        checkpoint_epochs: after which epochs a checkpoint is written; 0 is before the first step.
    """

    name: str
    net: Literal["mlp", "cnn"]
    optimizer: Literal["sgd", "adam"]
    learning_rate: float
    momentum: float = 0.0
    batch_size: int
    epochs: int
    checkpoint_epochs: tuple[int, ...]

    @property
    def key(self) -> str:
        """Story and net: what the checkpoints' names begin with."""
        return f"{self.name}-{self.net}"

    @property
    def model(self) -> str:
        """The net's factory, as ``--model`` takes it."""
        return f"relu_doctor.demo.models:make_{self.net}"

    @property
    def settings(self) -> str:
        """The settings in words, such as ``SGD, lr 0.05, momentum 0.9``."""
        momentum = f", momentum {self.momentum:g}" if self.momentum else ""
        return f"{'SGD' if self.optimizer == 'sgd' else 'Adam'}, lr {self.learning_rate:g}{momentum}"


def sound(net: Literal["mlp", "cnn"]) -> Story:
    """A rate that suits the recipe: the units stay alive."""
    return Story(
        name="sound",
        net=net,
        optimizer="sgd",
        learning_rate=0.05,
        momentum=0.9,
        batch_size=32,
        epochs=20,
        checkpoint_epochs=(0, 1, 5, 20),
    )


def quietly_sick(net: Literal["mlp", "cnn"]) -> Story:
    """Adam at 3e-2: the accuracy looks fine, and a fifth to a half of the units die."""
    return Story(
        name="quietly_sick",
        net=net,
        optimizer="adam",
        learning_rate=3e-2,
        batch_size=128,
        epochs=40,
        checkpoint_epochs=(0, 1, 2, 3, 5, 10, 40),
    )


def collapsed(net: Literal["mlp", "cnn"]) -> Story:
    """Twenty times the sound rate: whole layers die in the first epoch, and the net guesses."""
    return Story(
        name="collapsed",
        net=net,
        optimizer="sgd",
        learning_rate=1.0,
        momentum=0.9,
        batch_size=32,
        epochs=5,
        checkpoint_epochs=(0, 1, 5),
    )


def diverged(net: Literal["mlp", "cnn"]) -> Story:
    """A rate at which the numbers overflow before the units can die: the weights end as NaN."""
    return Story(
        name="diverged",
        net=net,
        optimizer="sgd",
        learning_rate=1e4,
        momentum=0.9,
        batch_size=32,
        epochs=3,
        checkpoint_epochs=(0, 1, 3),
    )


# The convolutional net has no part in the last: at such rates its units die before the numbers overflow. Of ten seeds,
# none became NaN at 1e4 and four at 1e6; of the perceptron all ten did at either.
STORIES = (
    sound("mlp"),
    sound("cnn"),
    quietly_sick("mlp"),
    quietly_sick("cnn"),
    collapsed("mlp"),
    collapsed("cnn"),
    diverged("mlp"),
)
