"""Each bad input of a scan gets one sentence: what was expected, what was found, what to do."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest
import torch
from torch import nn

import relu_doctor
from relu_doctor import errors
from relu_doctor.errors import (
    ConfigError,
    DataError,
    ForwardError,
    NoActivationSitesError,
    NothingObservedError,
    ReLUDoctorError,
    ReLUDoctorWarning,
    UnsupportedModelError,
)
from tests.zoo import CASES, TwoInputs

X = torch.randn(9, 3)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU())


class Inner(nn.Module):
    def forward(self, x):
        raise KeyError("no such table")


class Mixed(nn.Module):
    """A rectifier whose units cannot be told apart: each has a part of every row of the layer before it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.register_buffer("mixture", torch.ones(4, 5))

    def forward(self, x):
        return torch.relu(self.linear(x) @ self.mixture)


# What is scanned, and the words that its sentence must hold.
REFUSED = {
    "no rectifier": (
        lambda: relu_doctor.scan(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), X),
        NoActivationSitesError,
        ["no rectifier", "Sequential", "3 modules", "rectifiers=[MyReLU]"],
    ),
    "rectifiers that no forward calls": (
        lambda: relu_doctor.scan(
            nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.ReLU()}), X, forward=lambda m, x: m["a"](x)
        ),
        NoActivationSitesError,
        ["1 rectifier module", "never called", "(b)"],
    ),
    "a forward that raises": (
        lambda: relu_doctor.scan(nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), Inner())), X),
        ForwardError,
        ["raised in 1.1 (Inner)", "batch 0", "KeyError", "no such table", "float32[Nx3]"],
    ),
    "a forward that raises later": (
        lambda: relu_doctor.scan(mlp(), [X, X[:, :2]]),
        ForwardError,
        ["raised in 0 (Linear)", "batch 1", "float32[Nx2]"],
    ),
    "data of another shape": (
        lambda: relu_doctor.scan(mlp(), torch.randn(9, 5)),
        ForwardError,
        ["0 (Linear)", "float32[Nx5]", "shape and dtype that the model takes"],
    ),
    "data of another dtype": (
        lambda: relu_doctor.scan(mlp(), X.double()),
        ForwardError,
        ["0 (Linear)", "float64[Nx3]", "shape and dtype that the model takes"],
    ),
    "whole numbers": (
        lambda: relu_doctor.scan(mlp(), torch.ones(9, 3, dtype=torch.long)),
        ForwardError,
        ["int64[Nx3]"],
    ),
    "an empty list": (lambda: relu_doctor.scan(mlp(), []), DataError, ["at least one input", "empty data set"]),
    "an empty tensor": (lambda: relu_doctor.scan(mlp(), X[:0]), DataError, ["at least one input", "empty data set"]),
    "an empty generator": (lambda: relu_doctor.scan(mlp(), iter(())), DataError, ["at least one input"]),
    "an empty list, auto": (lambda: relu_doctor.scan(mlp(), [], max_inputs="auto"), DataError, ["at least one input"]),
    "empty batches, auto": (
        lambda: relu_doctor.scan(mlp(), [X[:0], X[:0]], max_inputs="auto"), DataError, ["at least one input"]
    ),
    "NaN in the data": (
        lambda: relu_doctor.scan(mlp(), [X, torch.full((4, 3), 1.0).index_fill(0, torch.tensor([2]), torch.nan)]),
        DataError,
        ["data without NaN", "found 3 in batch 1", "first in input 2", "clean the data"],
    ),
    "NaN in a mapping": (
        lambda: relu_doctor.scan(mlp(), [{"input": torch.full((4, 3), torch.nan)}]), DataError, ["without NaN"]
    ),
    "a number for batches": (lambda: relu_doctor.scan(mlp(), 3), DataError, ["an iterable of batches", "found int"]),
    "text for batches": (
        lambda: relu_doctor.scan(mlp(), "data.npy"), DataError, ["an iterable of batches", "found str"]
    ),
    "nothing for batches": (lambda: relu_doctor.scan(mlp(), None), DataError, ["an iterable of batches", "NoneType"]),
    "one mapping for batches": (
        lambda: relu_doctor.scan(mlp(), {"input": X}), DataError, ["found one mapping", "wrap it in a list: [batch]"]
    ),
    "batches of text": (
        lambda: relu_doctor.scan(mlp(), ["a", "b"]), DataError, ["batches of tensors", "found str", "forward="]
    ),
    "too short a tuple": (
        lambda: relu_doctor.scan(TwoInputs(), [(torch.randn(4, 6),)]),
        DataError,
        ["at least 2 elements", "found 1", "forward="],
    ),
    "keys that the forward does not take": (
        lambda: relu_doctor.scan(CASES["padded_mappings"].build()[0], [{"pixels": X}]),
        DataError,
        ["attention_mask, input_ids, labels", "found pixels", "rename the keys"],
    ),
    "an unknown mode": (
        lambda: relu_doctor.scan(mlp(), X, mode="test"), ValueError, ["one of eval, train, both", "found 'test'"]
    ),
    "unknown statistics": (
        lambda: relu_doctor.scan(mlp(), X, statistics="some"), ValueError, ["one of full, minimal", "found 'some'"]
    ),
    "a limit of zero": (lambda: relu_doctor.scan(mlp(), X, max_inputs=0), DataError, ["max_inputs", "found 0"]),
    "a negative limit": (lambda: relu_doctor.scan(mlp(), X, max_inputs=-3), DataError, ["max_inputs", "found -3"]),
    "a limit of true": (lambda: relu_doctor.scan(mlp(), X, max_inputs=True), DataError, ["max_inputs", "found True"]),
    "a limit in words": (lambda: relu_doctor.scan(mlp(), X, max_inputs="all"), DataError, ["'auto'", "found 'all'"]),
    "half an input": (lambda: relu_doctor.scan(mlp(), X, max_inputs=2.5), DataError, ["max_inputs", "found 2.5"]),
    "a mask of another shape": (
        lambda: relu_doctor.scan(mlp(), X, mask=lambda batch: torch.ones(4, 2, dtype=torch.bool)),
        DataError,
        ["mask=", "(inputs, positions) = (9, …)", "found shape (4, 2)"],
    ),
    "a mask of one axis": (
        lambda: relu_doctor.scan(mlp(), X, mask=lambda batch: torch.ones(9)), DataError, ["mask=", "found shape (9,)"]
    ),
    "a mask that is none": (
        lambda: relu_doctor.scan(mlp(), X, mask=lambda batch: [True] * 9), DataError, ["mask=", "found list"]
    ),
    "units that cannot be told apart": (
        lambda: relu_doctor.scan(Mixed(), torch.randn(4, 3)),
        NothingObservedError,
        ["none of 1 site", "relu()", "the axis of its units could not be told", "unit_axis = 1"],
    ),
    "no module": (
        lambda: relu_doctor.scan(lambda x: x, X), UnsupportedModelError, ["torch.nn.Module", "found function"]
    ),
    "a state dict": (
        lambda: relu_doctor.scan(mlp().state_dict(), X), UnsupportedModelError, ["torch.nn.Module", "found OrderedDict"]
    ),
    "a class": (lambda: relu_doctor.scan(nn.ReLU, X), UnsupportedModelError, ["torch.nn.Module", "found type"]),
    "lazy parameters": (
        lambda: relu_doctor.scan(nn.Sequential(nn.LazyLinear(4), nn.ReLU()), X),
        UnsupportedModelError,
        ["0.weight is a lazy parameter", "run one batch through the model"],
    ),
    "meta parameters": (
        lambda: relu_doctor.scan(nn.Sequential(nn.Linear(3, 4, device="meta"), nn.ReLU()), X),
        UnsupportedModelError,
        ["0.weight is on the meta device", "load the weights first"],
    ),
    "rectifiers that are no classes": (
        lambda: relu_doctor.scan(mlp(), X, rectifiers=[nn.ReLU()]),
        UnsupportedModelError,
        ["nn.Module classes", "found ReLU()"],
    ),
    "a rectifier that is flat": (
        lambda: relu_doctor.scan(nn.Sequential(nn.Linear(3, 4), Flat()), X, rectifiers=[Flat]),
        UnsupportedModelError,
        ["Flat has slope zero on all of [-10, 10]"],
    ),
    "a rectifier of two parts": (
        lambda: relu_doctor.scan(nn.Sequential(nn.Linear(3, 4), TwoParts()), X, rectifiers=[TwoParts]),
        UnsupportedModelError,
        ["TwoParts fires on more than one interval", "rectifiers={TwoParts: (low, high)}"],
    ),
    "an unknown threshold": (
        lambda: relu_doctor.scan(mlp(), X, config={"max_fireing_rate": 0.1}),
        ConfigError,
        ["unknown key 'max_fireing_rate'", "nearest is 'max_firing_rate'"],
    ),
    "an unknown profile": (
        lambda: relu_doctor.scan(mlp(), X, config="strickt"), ConfigError, ["strickt", "'strict'"]
    ),
    "patterns that leave nothing": (
        lambda: relu_doctor.scan(mlp(), X, sites=["!1"]),
        NothingObservedError,
        ["the patterns left none of 1 site", "(1)", "change sites= or ignore_sites"],
    ),
}  # fmt: skip


class Flat(nn.Module):
    def forward(self, x):
        return x * 0


class TwoParts(nn.Module):
    def forward(self, x):
        return torch.where(x.abs() > 1, x, torch.zeros_like(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch.nn.modules.lazy")
@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_gets_one_sentence(case):
    """The type is ours and a built-in; the message says what was expected, what was found and what to do."""
    call, kind, words = REFUSED[case]
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message
    assert len(message) < 700
    if kind is not ValueError:
        assert isinstance(caught.value, ReLUDoctorError)


def test_the_cause_of_a_forward_error_is_the_models_own():
    """The original exception is chained, so that its traceback is not lost."""
    with pytest.raises(ForwardError) as caught:
        relu_doctor.scan(nn.Sequential(nn.Linear(3, 4), Inner()), X)
    assert isinstance(caught.value.__cause__, KeyError)


def test_inf_in_the_data_is_scanned_and_told():
    """Infinite inputs are legal; what they make non-finite is called so."""
    x = X.clone()
    x[2, 1] = torch.inf
    assert set(relu_doctor.scan(mlp(), x).units["status"]) == {"non_finite"}


def test_a_nan_in_numpy_data_is_found_too():
    """Arrays are checked as tensors are."""
    with pytest.raises(DataError, match="without NaN"):
        relu_doctor.scan(mlp(), np.full((4, 3), np.nan, dtype=np.float32))


def test_nothing_is_read_before_the_arguments_are_checked():
    """A wrong argument is told before the first batch is taken from a stream."""

    def stream():
        raise AssertionError("read")
        yield

    for arguments in ({"mode": "x"}, {"max_inputs": 0}, {"statistics": "x"}, {"config": {"x": 1}}):
        with pytest.raises((ValueError, TypeError)):
            relu_doctor.scan(mlp(), stream(), **arguments)


@pytest.mark.parametrize("error", [e for e in vars(errors).values() if inspect.isclass(e) and issubclass(e, Exception)])
def test_every_error_inherits_from_ours_and_from_a_built_in(error):
    """`except ValueError` works for people who do not know this library."""
    if issubclass(error, Warning):
        assert issubclass(error, ReLUDoctorWarning)
    elif error is not ReLUDoctorError:
        assert issubclass(error, ReLUDoctorError)
        assert issubclass(error, ValueError | TypeError | RuntimeError | OSError)


def test_messages_of_a_model_cannot_inject_control_codes():
    """What a model's exception says is quoted on one line, without terminal control codes."""

    class Colours(nn.Module):
        def forward(self, x):
            raise RuntimeError("\x1b[31mred\x1b[0m\x07 [bold]not markup[/bold]\nsecond line")

    with pytest.raises(ForwardError) as caught:
        relu_doctor.scan(Colours(), X)
    assert not re.search(r"[\x00-\x1f\x7f]", str(caught.value))
