"""What a monitor is given, checked: each wrong argument is one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from relu_doctor.errors import ConfigError
from relu_doctor.observe.gradients import own_optimizer
from relu_doctor.training.history import History


def count(name: str, value: object, least: int = 1) -> int:
    """A whole number that is not too small.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, found {value!r}.")
    return value


def switch(name: str, value: object) -> bool:
    """True or false.

    Raises:
        ConfigError: it is neither.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, found {value!r}.")
    return value


def listener(name: str, value: Any) -> Any:
    """A function that is called, or ``None``.

    Raises:
        ConfigError: it is neither.
    """
    if value is not None and not callable(value):
        raise ConfigError(f"{name}= expects a function, found {type(value).__name__}.")
    return value


def held_batches(name: str, value: object) -> list[Any]:
    """Batches that are run again and again; a tensor is one.

    Raises:
        ConfigError: they are no batches.
    """
    if value is None:
        return []
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        raise ConfigError(f"{name}= expects batches, as scan() takes them, found {type(value).__name__}.")
    return list(value)


def keeper(value: object) -> Path | History | None:
    """A directory for the history, or one that is open.

    Raises:
        ConfigError: it is neither.
    """
    if value is None or isinstance(value, History):
        return value
    if not isinstance(value, str | PathLike) or not str(value).strip():
        raise ConfigError(f"history= expects a directory, or an open History, found {value!r}.")
    return Path(value)


def optimizers(value: object) -> tuple[Optimizer, ...]:
    """The optimizers that make the steps, behind those of Accelerate and Lightning.

    Raises:
        ConfigError: one of them is none.
    """
    one = own_optimizer(value)
    given: Sequence[object]
    if one is not None or value is None:
        given = () if one is None else (one,)
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
        given = tuple(value)
    else:
        given = (value,)
    found = []
    for each in given:
        behind = own_optimizer(each)
        if behind is None:
            raise ConfigError(f"optimizer= expects a torch.optim.Optimizer or several, found {type(each).__name__}.")
        found.append(behind)
    return tuple(found)
