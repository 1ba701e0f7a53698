"""A scan leaves no trace: the model, its hooks, the random states and the modes are what they were, bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn

import relu_doctor
from relu_doctor.errors import DataError, ForwardError, ReLUDoctorError
from tests.planting import clone, normal
from tests.zoo import CASES, Functional, ResNet, settled

HOOKS = [name for name in vars(nn.Module()) if "hook" in name]


def listed(hooks: object) -> object:
    return list(hooks.items()) if isinstance(hooks, dict) else hooks


def fingerprint(model: nn.Module) -> dict[str, object]:
    """Everything that a scan could leave behind, bytes for values and identities for objects."""

    def raw(tensor):
        if tensor is None:
            return None
        plain = tensor.detach().clone(memory_format=torch.contiguous_format)
        return (
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
            plain.view(torch.uint8).numpy().tobytes() if plain.dim() else plain.item(),
        )

    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        "modules": {
            name: (module.training, {key: id(value) for key, value in vars(module).items()})
            for name, module in modules.items()
        },
        "hooks": {(name, hook): listed(getattr(module, hook)) for name, module in modules.items() for hook in HOOKS},
        "parameters": {name: (id(p), raw(p), p.requires_grad, p.is_leaf) for name, p in parameters.items()},
        "gradients": {name: (id(p.grad), raw(p.grad)) for name, p in parameters.items()},
        "buffers": {
            (name, key): (id(buffer), raw(buffer))
            for name, module in modules.items()
            for key, buffer in module._buffers.items()
        },
        "global hooks": [listed(getattr(torch.nn.modules.module, name)) for name in GLOBAL_HOOKS],
        "torch random": torch.get_rng_state().numpy().tobytes(),
        "numpy random": pickle.dumps(np.random.get_state()),  # noqa: NPY002 the user's global state
        "random": random.getstate(),
        "gradients enabled": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "default dtype": torch.get_default_dtype(),
    }


GLOBAL_HOOKS = [
    name for name in vars(torch.nn.modules.module) if name.startswith("_global_") and name.endswith("hooks")
]


def unsettle(model: nn.Module) -> None:
    """Mixed training flags, some gradients, some frozen parameters: nothing that a reset could get right by chance."""
    for index, module in enumerate(model.modules()):
        module.training = index % 3 == 0
    for index, parameter in enumerate(model.parameters()):
        if parameter.requires_grad and index % 2:
            parameter.grad = torch.full_like(parameter, float(index))
        if index % 3 == 2:
            parameter.requires_grad_(False)


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    for name, value in before.items():
        assert after[name] == value, f"{name} changed"


@pytest.mark.parametrize("mode", ["eval", "both"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_scan_leaves_the_model_as_it_was(case, mode):
    """After a scan everything is identical, and the model still copies."""
    model, batches = case.build()
    unsettle(model)
    if mode == "both" and (case.name in CANNOT_TRAIN_ON_ONE or not any(m.training for m in model.modules())):
        batches = batches[:2]
    before, given = fingerprint(model), clone(batches)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    before["torch random"] = state.numpy().tobytes()
    relu_doctor.scan(model, given, mode=mode, **case.scan)
    assert_same(before, fingerprint(model))
    copy.deepcopy(model)


CANNOT_TRAIN_ON_ONE = {"linear_bn_twice", "bn_without_parameters", "conv_of_one_pixel"}


@pytest.mark.parametrize("name", ["mlp", "resnet", "functions", "recurrent_over_steps", "pruned", "frozen"])
def test_the_model_still_pickles(name):
    """Pickling gives the same bytes before and after."""
    model, batches = CASES[name].build()
    before = pickle.dumps(model)
    relu_doctor.scan(model, batches)
    assert pickle.dumps(model) == before
    stream = io.BytesIO()
    torch.save(model, stream)


class Fails(nn.Module):
    """Raises in a nested module, at the n-th call of its forward that a scan makes."""

    def __init__(self, error: type[BaseException], at: int) -> None:
        super().__init__()
        self.body = settled(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU()), torch.randn(32, 6))
        self.drop = nn.Dropout(0.5)
        self.body.add_module("inner", Raises(error, at))

    def forward(self, x):
        return torch.relu(self.body(self.drop(x)))


class Raises(nn.Module):
    def __init__(self, error: type[BaseException], at: int) -> None:
        super().__init__()
        self.error, self.at = error, at
        self.count = [0]

    def forward(self, x):
        self.count[0] += 1
        if self.count[0] >= self.at:
            raise self.error("on purpose")
        return x


@pytest.mark.parametrize("mode", ["eval", "train", "both"])
@pytest.mark.parametrize("at", [1, 2, 3, 5])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, StopIteration, SystemExit])
def test_a_forward_that_raises_leaves_the_model_as_it_was(error, at, mode):
    """Also when the forward raises at discovery or at a later batch, or is interrupted."""
    model = Fails(error, at)
    unsettle(model)
    before = fingerprint(model)
    before["torch random"] = torch.get_rng_state().numpy().tobytes()
    with pytest.raises(ForwardError if issubclass(error, Exception) else error, match="on purpose"):
        relu_doctor.scan(model, normal(6, sizes=(4,) * 6)(), mode=mode)
    assert_same(before, fingerprint(model))
    copy.deepcopy(model)


def test_data_that_raise_leave_the_model_as_it_was():
    """Also when the iterable raises between two batches; its error is told as the data's."""

    def broken():
        yield torch.randn(4, 3, 6, 6)
        raise OSError("disk gone")

    model = ResNet()
    unsettle(model)
    before = fingerprint(model)
    with pytest.raises(DataError, match="disk gone"):
        relu_doctor.scan(model, broken(), mode="both")
    assert_same(before, fingerprint(model))


def test_a_refused_scan_leaves_the_model_as_it_was():
    """Also when the data or the patterns are refused."""
    model = Functional()
    unsettle(model)
    before = fingerprint(model)
    for arguments in ({"batches": []}, {"batches": [torch.full((2, 6), torch.nan)]}, {"batches": [torch.zeros(2, 7)]}):
        with pytest.raises(ReLUDoctorError):
            relu_doctor.scan(model, **arguments)
    assert_same(before, fingerprint(model))


def test_a_users_hooks_stay_and_are_called():
    """Hooks of the user's own are left in their place and order; one that raises is a forward that raises."""
    model, batches = CASES["mlp"].build()
    called: list[str] = []
    model[0].register_forward_pre_hook(lambda module, args: called.append("pre"))
    model[1].register_forward_hook(lambda module, args, output: called.append("post"))
    before = fingerprint(model)
    relu_doctor.scan(model, batches)
    assert_same(before, fingerprint(model))
    assert called.count("pre") == called.count("post") >= len(batches)

    def refuse(module, args):
        raise ValueError("hook says no")

    handle = model[2].register_forward_pre_hook(refuse)
    before = fingerprint(model)
    with pytest.raises(ForwardError, match="hook says no"):
        relu_doctor.scan(model, batches)
    assert_same(before, fingerprint(model))
    handle.remove()


def test_a_users_modes_are_kept():
    """A scan inside no_grad, inference_mode or autocast sees the same units and leaves the mode on."""
    model, batches = CASES["resnet"].build()
    plain = relu_doctor.scan(model, batches, exhaustive=True)
    for mode in (torch.no_grad(), torch.enable_grad(), torch.inference_mode()):
        with mode:
            before = fingerprint(model)
            found = relu_doctor.scan(model, clone(batches), exhaustive=True)
            assert_same(before, fingerprint(model))
        assert found.units[["site", "unit", "status"]].equals(plain.units[["site", "unit", "status"]])


def test_a_model_that_draws_random_numbers_draws_the_same_after_a_scan():
    """Dropout in train mode, numpy and Python: the sequence goes on as if nothing had been."""

    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x):
            noise = random.random() + np.random.rand()  # noqa: NPY002 what a user's model may do
            return torch.relu(nn.functional.dropout(self.fc(x), training=True)) + noise + torch.randn(())

    model = Draws()
    before = fingerprint(model)
    relu_doctor.scan(model, [torch.zeros(8, 3) + torch.rand(8, 1), torch.rand(9, 3)], mode="both")
    after = fingerprint(model)
    before["torch random"] = after["torch random"]  # the data above were drawn in between
    assert_same(before, after)


def test_buffers_that_a_forward_replaces_are_put_back():
    """A forward that rebinds a buffer, or makes one, is undone."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))
            self.register_buffer("cache", None)

        def forward(self, x):
            self.calls = self.calls + 1
            self.cache = x.detach()
            if not hasattr(self, "late"):
                self.register_buffer("late", x[0].detach())
                self.ready = True
            assert self.ready
            return torch.relu(self.fc(x))

    model, batches = Counts(), torch.randn(20, 3).split(5)
    before = fingerprint(model)
    relu_doctor.scan(model, batches, mode="both")
    assert_same(before, fingerprint(model))
    assert model.calls == 0
    assert model.cache is None
    assert not hasattr(model, "late")
    assert not hasattr(model, "ready")


def test_nothing_holds_an_activation_after_a_scan():
    """No tensor made by the model outlives the scan."""
    import gc
    import weakref

    made: list[weakref.ref[torch.Tensor]] = []

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            pre = self.fc(x)
            made.append(weakref.ref(pre))
            return torch.relu(pre)

    diagnosis = relu_doctor.scan(Keeps(), torch.randn(20, 3).split(5))
    gc.collect()
    assert made
    assert all(reference() is None for reference in made)
    assert diagnosis.table.coverage.num_inputs == 20


def test_two_scans_in_two_threads_do_not_meet():
    """Scans of two models in two threads give what they give alone."""
    from concurrent.futures import ThreadPoolExecutor

    def run(name: str):
        model, batches = CASES[name].build()
        return relu_doctor.scan(model, batches, exhaustive=True).units

    names = ["resnet", "mlp", "densenet", "siamese"] * 2
    alone = {name: run(name) for name in set(names)}
    with ThreadPoolExecutor(4) as pool:
        for name, units in zip(names, pool.map(run, names), strict=True):
            assert set(units["site"]) == set(alone[name]["site"])


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_part_is_left_as_it_was():
    """A ScriptModule takes no hooks: it is seen at the dispatcher, and its values and modes are kept."""
    part = torch.jit.trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval(), torch.randn(2, 3))
    model = nn.Sequential(part, nn.Linear(3, 4), nn.ReLU())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    diagnosis = relu_doctor.scan(model, torch.randn(20, 3), mode="both")
    assert diagnosis.sites["site"].tolist() == ["0.1", "2"]
    assert diagnosis.summary["unobserved_sites"] == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(
        module.training is False for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)
    )
