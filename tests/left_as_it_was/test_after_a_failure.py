"""However a scan fails, the model and the process are what they were, and the failure is told as what it is."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import relu_doctor
from relu_doctor.errors import DataError, FilterWarning, ForwardError, ReLUDoctorError
from tests.left_as_it_was.fingerprint import assert_same, fingerprint
from tests.left_as_it_was.scenes import (
    Failing,
    arguments_of,
    batches_for,
    call_of,
    copied,
    inputs,
    mlp,
    pickled,
    unsettle,
)
from tests.planting import clone
from tests.zoo import CASES, Functional

PLACES: dict[str, Callable[[nn.Module, Failing], Any]] = {
    "a torch call": lambda module, failing: None,
    "the data": lambda module, failing: None,
    "a forward pre-hook": lambda module, failing: module.register_forward_pre_hook(failing.hook),
    "a forward pre-hook in front": lambda module, failing: module.register_forward_pre_hook(failing.hook, prepend=True),
    "a forward hook": lambda module, failing: module.register_forward_hook(failing.hook),
    "a forward hook in front": lambda module, failing: module.register_forward_hook(failing.hook, prepend=True),
    "a global forward pre-hook": lambda module, failing: register_module_forward_pre_hook(failing.hook),
    "a global forward hook": lambda module, failing: register_module_forward_hook(failing.hook),
}
ERRORS = (RuntimeError, KeyboardInterrupt, SystemExit, StopIteration, MemoryError, GeneratorExit, AssertionError)
FAILURES = {
    "name": st.sampled_from(list(CASES)),
    "place": st.sampled_from(list(PLACES)),
    "error": st.sampled_from(ERRORS),
    "at": st.one_of(st.integers(1, 8), st.integers(1, 60)),
    "again": st.booleans(),
    "late": st.booleans(),
    "mode": st.sampled_from(["eval", "train", "both"]),
    "which": st.integers(0, 10_000),
}


def fail(
    name: str, place: str, error: type[BaseException], at: int, again: bool, late: bool, mode: str, which: int
) -> None:
    """Scan a model of the zoo that fails, and look whether everything is as it was."""
    case = CASES[name]
    model, batches = case.build()
    unsettle(model)
    copies, pickle = copied(model) is not None, pickled(model)
    failing, call = Failing(error, at, again=again, late=late), call_of(case)
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    handle = PLACES[place](modules[which % len(modules)], failing)
    batches = batches_for(case, clone(batches), mode)
    arguments = dict(arguments_of(case))
    if place == "a torch call":

        def forward(model: nn.Module, batch: Any) -> object:
            with failing:
                return call(model, batch)

        arguments["forward"] = forward

    def drawn() -> Iterator[Any]:
        for batch in batches:
            failing.hook()
            yield batch

    before = fingerprint(model)
    told: BaseException | None = None
    try:
        relu_doctor.scan(model, drawn() if place == "the data" else batches, mode=mode, **arguments)
    except BaseException as raised:  # noqa: BLE001 all that a scan may let through
        told = raised
    assert_same(before, fingerprint(model))
    assert (copied(model) is not None) == copies
    if handle is not None:
        handle.remove()
    assert pickled(model) == pickle
    if failing.raised and not issubclass(error, Exception):
        assert type(told) is error
    elif failing.raised and again and told is not None:
        assert isinstance(told, DataError if place == "the data" else ForwardError)
        assert "on purpose" in str(told) or "StopIteration" in str(told)
    elif not failing.raised:
        assert told is None, "it failed by itself"


@settings(max_examples=45)
@given(**FAILURES)
def test_a_scan_that_fails_leaves_everything_as_it_was(**failure):
    """Whatever raises, where, when, once or for ever: a torch call, a hook of the user's on any module, the data."""
    fail(**failure)


@pytest.mark.slow
@settings(max_examples=1500)
@given(**FAILURES)
def test_many_scans_that_fail_leave_everything_as_it_was(**failure):
    """The same, many times."""
    fail(**failure)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_on_the_second_batch_only_leaves_everything_as_it_was(error):
    """Also where the first batch was recognised and counted."""
    model, batches = CASES["resnet"].build()
    unsettle(model)
    second = batches[1]

    def forward(model: nn.Module, batch: torch.Tensor) -> object:
        result = model(batch)
        if torch.equal(batch, second):
            raise error("on purpose")
        return result

    before = fingerprint(model)
    with pytest.raises(ForwardError if error is RuntimeError else error, match="on purpose"):
        relu_doctor.scan(model, batches, forward=forward, mode="both")
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"batches": []}, DataError),
        ({"batches": [torch.full((2, 6), torch.nan)]}, DataError),
        ({"batches": [torch.zeros(2, 7)]}, ForwardError),
        ({"batches": torch.zeros(9, 6), "mask": lambda batch: 1 / 0}, DataError),
        ({"batches": torch.zeros(9, 6), "mask": lambda batch: torch.ones(1)}, DataError),
        ({"batches": torch.zeros(9, 6), "rectifiers": {nn.Linear: (1, 0)}}, ReLUDoctorError),
        ({"batches": torch.zeros(9, 6), "mode": "nonsense"}, ValueError),
        ({"batches": torch.zeros(9, 6), "config": {"nonsense": 1}}, ReLUDoctorError),
        ({"batches": torch.zeros(9, 6), "forward": lambda model, batch: model}, ReLUDoctorError),
    ],
    ids=lambda value: next((key for key in value if key != "batches"), "batches") if isinstance(value, dict) else "",
)
def test_a_refused_scan_leaves_everything_as_it_was(arguments, error):
    """Also when the data, the configuration or the arguments are refused."""
    model = Functional()
    unsettle(model)
    before = fingerprint(model)
    with pytest.raises(error):
        relu_doctor.scan(model, **arguments)
    assert_same(before, fingerprint(model))


def test_patterns_that_match_nothing_leave_everything_as_it_was():
    """A warning that is an error comes after everything is in its place."""
    model, x = Functional(), inputs()
    unsettle(model)
    before = fingerprint(model)
    with pytest.raises(FilterWarning):
        relu_doctor.scan(model, x, sites=["nonsense"])
    assert_same(before, fingerprint(model))


def interrupted(count: int, name: str) -> None:
    """Press Ctrl-C at random moments of a scan."""
    case, chance = CASES[name], random.Random(0)
    for _ in range(count):
        model, batches = case.build()
        before = fingerprint(model)
        timer = threading.Timer(chance.random() * 0.15, lambda: signal.raise_signal(signal.SIGINT))
        timer.start()
        with contextlib.suppress(KeyboardInterrupt):
            with contextlib.suppress(KeyboardInterrupt):
                relu_doctor.scan(model, batches, mode="both")
            timer.cancel()
            timer.join()
        timer.join()
        assert_same(before, fingerprint(model))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one that comes within a weak reference
def test_ctrl_c_at_any_moment_leaves_everything_as_it_was():
    """A real interrupt, which comes in the midst of the scan's own work as well, is let through and leaves no trace."""
    interrupted(8, "mlp")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["resnet", "an_inference_mode_block", "recurrent_over_steps", "autocast"])
def test_ctrl_c_at_many_moments_leaves_everything_as_it_was(name):
    """The same, many times."""
    interrupted(150, name)


class Falls(nn.Module):
    """Takes another layer when something raises, as code does that wants to go on at any price."""

    def __init__(self, caught: type[BaseException]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 3)
        self.caught = caught

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            hidden = torch.relu(self.first(x) if x.mean() > 0 else self.second(x))
        except self.caught:
            hidden = self.second(x).tanh()
        return torch.relu(self.last(hidden))


@pytest.mark.parametrize("caught", [ZeroDivisionError, Exception, BaseException])
def test_a_model_that_catches_everything_is_seen_like_any_other(caught):
    """What breaks a forward off that is not recognised cannot be talked away: it is discovered, and counted right."""
    model, batches = Falls(caught), [inputs()[:20] + 3, inputs()[20:] - 3, inputs()[:20] + 4]
    before = fingerprint(model)
    units = relu_doctor.scan(model, batches, exhaustive=True).units
    assert_same(before, fingerprint(model))
    assert units.groupby("site", sort=False)["inputs"].first().to_dict() == {
        "relu()#1": 40,
        "relu()#2": 20,
        "relu()#3": 60,
    }


def test_a_model_that_makes_other_errors_of_errors_is_seen_like_any_other():
    """An unknown call that comes out of the model as an error of its own is no failure of the model."""

    class Renames(Falls):
        def forward(self, x):
            try:
                hidden = torch.relu(self.first(x) if x.mean() > 0 else self.second(x))
            except BaseException as error:
                raise ValueError("mine") from error
            return torch.relu(self.last(hidden))

    units = relu_doctor.scan(Renames(Exception), [inputs() + 3, inputs() - 3]).units
    assert sorted(units.groupby("site")["inputs"].first()) == [40, 40, 80]


def test_a_tap_of_the_wrong_shape_is_told_though_the_model_catches_it():
    """An error of ours is told, and not the path that the model takes instead."""

    class Taps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 5)

        def forward(self, x):
            z = self.layer(x)
            try:
                return relu_doctor.tap("gate", z, z[:, :2].abs())
            except Exception:  # noqa: BLE001 what a model may do
                return torch.relu(z)

    model = Taps()
    before = fingerprint(model)
    with pytest.raises(ReLUDoctorError, match="expects two tensors of one shape"):
        relu_doctor.scan(model, inputs())
    assert_same(before, fingerprint(model))


def test_a_second_scan_after_a_failure_gives_what_it_gives_alone():
    """A failed scan leaves nothing behind that the next one could stumble over."""
    model, x = mlp(), inputs()
    alone = relu_doctor.scan(model, x).units
    for at in (1, 3, 9, 20):
        failing = Failing(KeyboardInterrupt, at, again=False, late=True)

        def forward(model: nn.Module, batch: torch.Tensor, failing: Failing = failing) -> object:
            with failing:
                return model(batch)

        with pytest.raises(KeyboardInterrupt):
            relu_doctor.scan(model, x, forward=forward)
        assert relu_doctor.scan(model, x).units.equals(alone)
