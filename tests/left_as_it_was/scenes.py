"""What the tests of this folder share: models in no settled state, failures on purpose, copies, and what is alive."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.planting import Case
from tests.zoo import CASES

Forward = Callable[[nn.Module, Any], object]
TRAIN_ON_ONE = {"linear_bn_twice", "bn_without_parameters", "conv_of_one_pixel"}  # which BatchNorm refuses


def unsettle(model: nn.Module) -> None:
    """Mixed training flags, some gradients, some frozen parameters: nothing that a reset could get right by chance."""
    for index, module in enumerate(model.modules()):
        module.training = index % 3 == 0
    for index, parameter in enumerate(model.parameters()):
        if parameter.requires_grad and index % 2:
            parameter.grad = torch.full_like(parameter, float(index))
        if index % 3 == 2 and parameter.is_leaf:
            parameter.requires_grad_(False)


def mlp() -> nn.Sequential:
    """A small perceptron, always the same."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU())


def inputs(count: int = 40) -> Tensor:
    """Standard-normal inputs of six features, always the same."""
    return torch.randn(count, 6, generator=torch.Generator("cpu").manual_seed(1), device="cpu")


def call_of(case: Case) -> Forward:
    """How a batch of a case is handed to its model."""
    call: Forward = case.scan.get("forward") or case.call
    return call


def arguments_of(case: Case, *without: str) -> Mapping[str, Any]:
    """Arguments of a case's scan, but for those that a test chooses."""
    return {name: value for name, value in case.scan.items() if name not in {"mode", *without}}


def batches_for(case: Case, batches: list[Any], mode: str) -> list[Any]:
    """The batches on which a case can be run in a mode."""
    return batches if mode == "eval" or case.name not in TRAIN_ON_ONE else batches[:2]


def copied(model: nn.Module) -> nn.Module | None:
    """A copy with its gradients, where a model can be copied."""
    try:
        twin = copy.deepcopy(model)
    except RuntimeError:  # torch copies leaves only
        return None
    for own, others in zip(model.parameters(), twin.parameters(), strict=True):
        others.grad = None if own.grad is None else own.grad.clone()
    return twin


def pickled(model: nn.Module) -> bytes | None:
    """The bytes of a model, where it can be pickled."""
    try:
        return pickle.dumps(model)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError):
        return None


class Failing(TorchFunctionMode):
    """Raises at the n-th torch call that is made under it, before or after the call is performed.

    Args:
        error: to raise.
        at: counted over all times that the mode is entered.
        again: at all later calls as well.
        late: after the call.
    """

    def __init__(self, error: type[BaseException], at: int, *, again: bool, late: bool) -> None:
        super().__init__()
        self.error, self.at, self.again, self.late = error, at, again, late
        self.calls = self.raised = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        result = func(*args, **(kwargs or {})) if self.late else None
        self.strike()
        return result if self.late else func(*args, **(kwargs or {}))

    def strike(self) -> None:
        """Raise, if it is time to."""
        if self.calls == self.at or (self.again and self.calls > self.at):
            self.raised += 1
            raise self.error("on purpose")

    def hook(self, *_: object) -> None:
        """The same as a hook, counted call by call."""
        self.calls += 1
        self.strike()


class Lives(TorchFunctionMode):
    """Writes down at each torch call of a forward which results of the calls before it are alive."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.owned = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
        self.results: list[weakref.ref[Tensor]] = []
        self.log: list[tuple[str, tuple[int, ...]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.log.append((getattr(func, "__name__", ""), self.alive()))
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor) and id(value) not in self.owned:
                self.results.append(weakref.ref(value))
        return result

    def alive(self) -> tuple[int, ...]:
        """Which results are alive."""
        return tuple(index for index, reference in enumerate(self.results) if reference() is not None)


def names_every(step: int) -> list[Any]:
    """All cases of the zoo by name; only every so many-th in the default run."""
    import pytest

    return [
        name if index % step == 0 else pytest.param(name, marks=pytest.mark.slow) for index, name in enumerate(CASES)
    ]
