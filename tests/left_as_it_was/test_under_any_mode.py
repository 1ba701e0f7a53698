"""Hooks and modes of the user's own are kept, are seen by the model alone, and change nothing of what is found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import relu_doctor
from relu_doctor.errors import ForwardError
from tests.left_as_it_was.fingerprint import assert_same, fingerprint
from tests.left_as_it_was.scenes import inputs, mlp
from tests.planting import clone
from tests.zoo import CASES


class Functions(TorchFunctionMode):
    """A function mode of the user's own, which writes down what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """A mode of the dispatcher of the user's own."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "autocast, off": lambda: torch.autocast("cpu", torch.bfloat16, enabled=False),
    "a device": lambda: torch.device("cpu"),
    "another device": lambda: torch.device("meta"),
    "a default device": lambda: default_device("meta"),
    "a function mode": Functions,
    "a mode of the dispatcher": Operators,
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "deterministic": deterministic,
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
    "saved tensors elsewhere": torch.autograd.graph.save_on_cpu,
    "no saved tensor hooks": lambda: torch.autograd.graph.disable_saved_tensors_hooks("no"),
    "one thread of autograd": lambda: torch.autograd.set_multithreading_enabled(False),
    "forward-mode autograd": torch.autograd.forward_ad.dual_level,
}
MODELS = ["resnet", "transformer_encoder", "recurrent_over_steps", "functions"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [pytest.param(each, marks=[pytest.mark.slow] * (each != "resnet")) for each in MODELS])
def test_a_scan_under_any_mode_finds_the_same_and_leaves_the_mode(name, mode):
    """Every column of the table is the same, and so are the model and the process within the mode."""
    model, batches = CASES[name].build()
    plain = relu_doctor.scan(model, clone(batches)).units
    with MODES[mode]():
        before = fingerprint(model)
        found = relu_doctor.scan(model, clone(batches)).units
        assert_same(before, fingerprint(model))
    assert found.equals(plain)


def test_a_scan_under_autocast_leaves_it():
    """Within autocast the model runs as it does there; the state of autocast is left."""
    model = mlp()
    with torch.autocast("cpu", torch.bfloat16):
        before = fingerprint(model)
        units = relu_doctor.scan(model, inputs()).units
        assert_same(before, fingerprint(model))
        seen = model[0](inputs())
    assert seen.dtype == torch.bfloat16
    assert units["pre_max"][0] == seen[:, 0].max().item()


def test_a_mode_of_the_users_sees_the_models_calls_and_no_other():
    """A recognised forward shows a function mode what the plain forward shows it."""
    model, batches = mlp(), inputs().split(10)
    with torch.no_grad(), Functions() as plain:
        model(batches[0])
    with Functions() as watched:
        relu_doctor.scan(model, batches)
    assert watched.seen[-len(plain.seen) :] == plain.seen
    assert set(watched.seen) <= {*plain.seen, "__get__", "_set_grad_enabled"}


def test_the_users_modes_reach_what_the_model_makes():
    """A default device is the model's and the data's, not the scan's own: nothing of the scan's lands on it."""

    class Makes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.devices = mlp(), set[str]()

        def forward(self, x: Tensor) -> Tensor:
            made.add(torch.zeros(1).device.type)
            return self.layer(x)

    def data() -> Iterator[Tensor]:
        for batch in inputs().split(10):
            made.add(torch.zeros(1).device.type)
            yield batch

    made: set[str] = set()
    model = Makes()
    with torch.device("meta"):
        relu_doctor.scan(model, data())
    assert made == {"meta"}


def test_data_that_leave_a_mode_open_change_nothing():
    """A generator that yields within no_grad and is not read to its end leaves gradients as they were."""

    def data() -> Iterator[Tensor]:
        with torch.no_grad():
            yield from inputs().split(10)

    model, source = mlp(), data()
    before = fingerprint(model)
    relu_doctor.scan(model, source, max_inputs=15)
    assert_same(before, fingerprint(model))


def test_hooks_of_the_users_stay_and_are_called():
    """They are left in their place and order, and are called for every forward."""
    model, called = mlp(), []
    model[0].register_forward_pre_hook(lambda *_: called.append("pre"))
    model[1].register_forward_hook(lambda *_: called.append("post"))
    model[1].register_full_backward_hook(lambda *_: called.append("backward"))
    handle = register_module_forward_hook(lambda module, *_: called.append("global") if module is model else None)
    before = fingerprint(model)
    relu_doctor.scan(model, inputs().split(10))
    assert_same(before, fingerprint(model))
    handle.remove()
    assert called.count("pre") == called.count("post") == called.count("global") >= 4


def test_hooks_that_come_and_go_in_the_forward_are_put_back():
    """A hook that removes itself is there again; one that the forward registers is gone."""
    model = mlp()
    once = model[0].register_forward_hook(lambda *_: once.remove())
    model[2].register_forward_pre_hook(lambda module, _: None if len(module._forward_hooks) > 3 else more(module))

    def more(module: nn.Module) -> None:
        module.register_forward_hook(lambda *_: None)

    before = fingerprint(model)
    relu_doctor.scan(model, inputs().split(10), mode="both")
    assert_same(before, fingerprint(model))


def test_a_hook_that_replaces_the_output_is_part_of_the_model():
    """What the next layer is given is what the hook returns."""
    model = mlp()
    model[1].register_forward_hook(lambda module, args, output: output * 0 - 1)
    with torch.no_grad():
        model[2].weight.copy_(model[2].weight.abs())
        model[2].bias.zero_()
    before = fingerprint(model)
    units = relu_doctor.scan(model, inputs(), exhaustive=True).units
    assert_same(before, fingerprint(model))
    assert set(units["status"][units["site"] == "3"]) == {"dead"}
    assert units["inputs_fired"][units["site"] == "1"].sum() > 0


def test_a_hook_that_raises_is_a_forward_that_raises():
    """It is told with the hook's words, and warns of nothing."""
    model = mlp()

    def refuse(module: nn.Module, args: object) -> None:
        raise ValueError("hook says no")

    handle = register_module_forward_hook(lambda *_: None, always_call=True)
    model[2].register_forward_pre_hook(refuse)
    before = fingerprint(model)
    with pytest.raises(ForwardError, match="hook says no"):
        relu_doctor.scan(model, inputs())
    assert_same(before, fingerprint(model))
    handle.remove()


class Marked(Tensor):
    """A class of tensors of the user's own."""


def test_tensors_of_a_class_of_the_users_stay_what_they_are():
    """The model is given its own kind of tensor, also in copies and in parts of a batch."""

    class Wants(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = mlp()

        def forward(self, x: Tensor) -> Tensor:
            assert isinstance(x, Marked)
            return self.layer(x)

    batches = [batch.as_subclass(Marked) for batch in inputs().split(10)]
    found = relu_doctor.scan(Wants(), batches, mode="both", max_inputs=25)
    assert set(found.units["inputs"]) == {25}
