"""Misuse: what does not fit between a monitor and the loop that it watches; each is told once, and training goes on."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from relu_doctor.errors import MonitorWarning
from relu_doctor.observe.live import LiveProbe

UNSTEPPED = 500  # forwards before the first step, after which it is told
_PATIENCE = 20  # steps without an update or a gradient, after which it is told
_LOOKS = {2, 20, 200, 2000}  # steps without a forward, after which it is looked for what calls the model now


class Misuse:
    """Tells what looks wrong from where the monitor stands.

    Args:
        model: that is watched.
        optimizers: that train it.
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        self._model = model
        self._optimizers = tuple(optimizers)
        self._told: set[str] = set()
        self._unseen = 0  # steps in a row without a forward
        self._looked = self._updates = 0  # steps at the beginning that were looked at, and updates in them
        self._without = 0  # steps in a row without an update, or a gradient

    def tell(self, message: str, *, key: str = "") -> None:
        """Warn.

        Args:
            message: a sentence.
            key: what it is about, where the message may come in several forms; it is told once.
        """
        if (key or message) not in self._told:
            self._told.add(key or message)
            warnings.warn(message, MonitorWarning, stacklevel=4)

    def check_optimizers(self) -> None:
        """Whether they train the model at all."""
        own = {id(parameter) for parameter in self._model.parameters()}
        trained = [p for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]]
        if trained and own and not any(id(parameter) in own for parameter in trained):
            self.tell("optimizer= trains no parameter of the model: give the one that does.")

    def check_sites(self, remembered: set[str], found: set[str]) -> None:
        """Whether the state that a run is resumed from is one of this model.

        Args:
            remembered: ``site_id`` of the sites in it.
            found: those of the model.
        """
        if remembered and found and not remembered & found:
            self.tell(
                "load_state_dict() was given the state of another architecture: none of its sites is in this model, "
                "and what is known of units begins anew."
            )

    def forwards_without_step(self, number: int) -> None:
        """So many forwards were seen, and no step was made."""
        self.tell(
            f"{number:,} forwards with gradients were made and step() was not called: call it after each update.",
            key="step",
        )

    def check_forwards(self, live: LiveProbe, forwards: int, made: int) -> None:
        """Whether forwards are seen, and rectifiers in them.

        Args:
            live: sees them.
            forwards: seen in the step that was made.
            made: steps before it.
        """
        self._unseen = 0 if forwards else self._unseen + 1
        if self._unseen in _LOOKS and live.num_forwards:
            live.find_compiled()  # it may be called through that by now
        if self._unseen == _PATIENCE and live.num_forwards:
            self.tell(
                f"no forward of the model was seen in the last {_PATIENCE} steps that were looked at: if another model "
                "is trained now, or this one is called by another name, make a monitor of what is called."
            )
        if not forwards and made <= 1:
            return
        if not live.num_forwards and not live.find_compiled():
            self.tell(
                "no forward of the model was seen: its module is called by another name, under no_grad, or inside "
                "a function that is compiled as a whole; give the monitor the module that is called."
            )
        if live.num_inputs and not live.probe.known.num_sites:
            self.tell(
                f"no rectifier was applied in {type(self._model).__name__}: there is nothing to watch; name your "
                "own activation class with rectifiers=[MyReLU]."
            )
        for kind, message in live.failures.items():
            self.tell(
                f"{kind}: {message.rstrip('.')}; these forwards were not observed, the training is as it was.", key=kind
            )

    def check_updates(self, *, updates: int, has_news: bool | None) -> None:
        """Whether the optimizers make updates, and leave gradients to be read.

        Args:
            updates: made by the optimizers in this step.
            has_news: gradients were read; ``None`` where this was no time to read any.
        """
        if self._optimizers:
            self._looked, self._updates = self._looked + 1, self._updates + updates
            if self._looked == 2 * _PATIENCE and 0 < self._updates <= _PATIENCE:
                self.tell(
                    f"step() was called {self._looked} times for {self._updates} updates of the optimizer: call it "
                    "once after each update, not after each batch."
                )
            self._without = 0 if updates else self._without + 1
        elif has_news is not None:
            self._without = 0 if has_news else self._without + 1
        if self._without < _PATIENCE:
            return
        if self._optimizers:
            self.tell(
                f"no optimizer that the monitor was given has made an update in {_PATIENCE} steps: gradients and "
                "updates are not followed; give optimizer= the one that trains the model.",
            )
        else:
            self.tell(
                f"no gradient was left to be read in {_PATIENCE} steps: give the monitor optimizer=, or call step() "
                "before zero_grad().",
            )
