"""After a scan of any model of the zoo everything is what it was, and the model goes on as if never scanned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import relu_doctor
from tests.left_as_it_was.fingerprint import assert_same, fingerprint
from tests.left_as_it_was.scenes import arguments_of, batches_for, call_of, copied, pickled, unsettle
from tests.planting import clone
from tests.zoo import CASES

ALL = [
    pytest.param(name, mode, marks=[] if index % 4 == 2 * (mode == "eval") else pytest.mark.slow)
    for index, name in enumerate(CASES)
    for mode in ("eval", "both")
]


def tensors(value: object) -> list[Tensor]:
    """Every tensor in what a model returns."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return tensors(list(value.values()))
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in tensors(item)]
    return tensors(list(vars(value).values())) if hasattr(value, "__dict__") else []


def step(model: nn.Module, case: object, batch: object) -> list[Tensor]:
    """A forward and a step of training, always with the same random numbers: outputs and parameters."""
    torch.manual_seed(3)
    found = [output for output in tensors(call_of(case)(model, clone(batch))) if output.is_floating_point()]
    loss = sum((output.float() ** 2).sum() for output in found)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if isinstance(loss, Tensor) and loss.requires_grad and parameters:
        optimizer = torch.optim.Adam(parameters, lr=0.01)
        loss.backward()
        optimizer.step()
    return [tensor.detach().clone() for tensor in (*found, *model.parameters(), *model.buffers())]


@pytest.mark.parametrize(("name", "mode"), ALL)
def test_a_scan_leaves_any_model_as_it_was(name, mode):
    """Nothing has changed, it pickles to the same bytes, and its next step of training is bit for bit the same."""
    case = CASES[name]
    model, batches = case.build()
    unsettle(model)
    batches, pickle, twin = batches_for(case, batches, mode), pickled(model), copied(model)
    given = clone(batches)
    before = fingerprint(model)
    relu_doctor.scan(model, given, mode=mode, **arguments_of(case))
    assert_same(before, fingerprint(model))
    assert pickled(model) == pickle
    assert (copied(model) is None) == (twin is None)
    if twin is not None:
        for own, others in zip(step(model, case, batches[0]), step(twin, case, batches[0]), strict=True):
            torch.testing.assert_close(own, others, rtol=0, atol=0, equal_nan=True)


def test_a_model_that_scripts_still_scripts():
    """torch.jit.script takes a scanned model as it takes one that was not."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.randn(20, 3, 6, 6)
    relu_doctor.scan(model, x, mode="both")
    with pytest.warns(DeprecationWarning, match=r"torch\.jit"):
        scripted = torch.jit.script(model)
    assert torch.equal(scripted(x), model(x))


def test_an_optimizer_and_a_pending_backward_are_left_alone():
    """A scan between forward and backward changes no gradient, and no state of an optimizer."""

    def train(*, scans: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 5),
            nn.BatchNorm1d(5),
            nn.ReLU(),
            nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4)),
            nn.Dropout(0.5),
            nn.ReLU(),
        )
        model[1].eval()  # so that the backward needs its running statistics
        optimizer, x = torch.optim.Adam(model.parameters()), torch.randn(12, 6)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(x).sum()
            if scans:
                relu_doctor.scan(model, x.split(4), mode="both")
            loss.backward()
            optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values()]
        return [*model.parameters(), *model.buffers(), *states]

    assert all(torch.equal(one, other) for one, other in zip(train(scans=True), train(scans=False), strict=True))


def test_weights_that_autocast_casts_in_a_scan_are_not_kept():
    """A scan inside of an autocast region leaves no cast weight that would cut the region's later gradients off."""
    model, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU()), torch.randn(12, 6)
    with torch.autocast("cpu", torch.bfloat16):
        relu_doctor.scan(model, x)
        loss = model(x).float().sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


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
