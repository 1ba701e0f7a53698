"""HParams: by which settings and results the runs of a directory are compared with each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from relu_doctor.errors import ConfigError
from relu_doctor.reports.scalars import ALL
from relu_doctor.text import clean_text

if TYPE_CHECKING:
    from relu_doctor.diagnose.diagnosis import Diagnosis

Value = str | float | bool

METRICS = tuple(f"{ALL}/{name}" for name in ("dead_fraction", "unproven_fraction", "update_ratio", "loss"))
RATE = "learning rate"
_ABOUT = ("model", "optimizer")


class Settings:
    """The settings of a run, as far as they are known when it ends.

    Args:
        given: by the user; they count before those that were found.

    Raises:
        ConfigError: one of them is neither text, nor a number, nor a truth value.
    """

    def __init__(self, given: Mapping[str, Value]) -> None:
        for name, value in given.items():
            if not isinstance(value, str | int | float):
                raise ConfigError(
                    f"hparams= expects text, numbers and truth values, found {type(value).__name__} for "
                    f"{clean_text(name)!r}; say what it is in text."
                )
        self._given = {clean_text(name): _plain(value) for name, value in given.items()}
        self._rate: float | None = None
        self._about: dict[str, str] = {}

    def saw_rate(self, rate: float | None) -> None:
        """The learning rate of a window; the largest counts, which is that of a schedule at its height."""
        if rate is not None:
            self._rate = rate if self._rate is None else max(rate, self._rate)

    def saw(self, about: Mapping[str, str]) -> None:
        """The names of model and optimizer, as far as they are known."""
        self._about |= {name: clean_text(about[name]) for name in _ABOUT if about.get(name)}

    def saw_scan(self, diagnosis: Diagnosis) -> None:
        """What a checkpoint's file tells of its optimizer."""
        if diagnosis.history is not None:
            self.saw({"optimizer": diagnosis.history.optimizer})
            self.saw_rate(max(diagnosis.history.learning_rates, default=None))

    def known(self) -> dict[str, Value]:
        """Name to value; empty where nothing is known."""
        rate: dict[str, Value] = {} if self._rate is None else {RATE: self._rate}
        return rate | self._about | self._given


def _plain(value: Value) -> Value:
    return clean_text(value) if isinstance(value, str) else value
