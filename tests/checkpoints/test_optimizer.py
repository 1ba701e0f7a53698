"""What an optimizer's state says about its last update agrees with the update that was made."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relu_doctor.checkpoints.formats import load_checkpoint
from relu_doctor.checkpoints.optimizer import OptimizerState, plain_name, read_optimizer, read_settings, strip_prefix


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 3))


def shapes(net: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, parameter.shape) for name, parameter in net.named_parameters()]


def run(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> dict[str, Tensor]:
    """Train, and return what the last step subtracted from every parameter."""
    before: dict[str, Tensor] = {}
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(8, 5)).square().sum().backward()
        before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
        optimizer.step()
    return {name: before[name] - parameter.detach() for name, parameter in net.named_parameters()}


def read(net: nn.Module, optimizer: torch.optim.Optimizer) -> OptimizerState:
    state = read_optimizer(optimizer.state_dict(), shapes(net))
    assert state is not None
    return state


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), "sgd"),
        (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1, dampening=0.2), "sgd"),
        (lambda p: torch.optim.Adam(p, lr=0.01), "adam-like"),
        (lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, eps=1e-3, betas=(0.5, 0.8)), "adam-like"),
        (lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), capturable=False, foreach=False), "adam-like"),
        (lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0), "adam-like"),
    ],
)
def test_the_last_update_is_the_one_that_was_made(make, kind):
    net = make_net()
    optimizer = make(net.parameters())
    made = run(net, optimizer)
    state = read(net, optimizer)
    assert state.kind == kind
    for name, update in made.items():
        implied = state.last_update(name)
        assert implied is not None
        torch.testing.assert_close(implied, update, rtol=1e-3, atol=1e-6)


def test_nesterov_gives_the_momentum_step_which_is_near_the_true_one():
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9, nesterov=True)
    made = run(net, optimizer, steps=60)
    implied = read(net, optimizer).last_update("0.weight")
    assert implied is not None
    assert torch.nn.functional.cosine_similarity(implied.flatten(), made["0.weight"].flatten(), dim=0) > 0.7


def test_an_optimizer_without_memory_implies_no_update():
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    run(net, optimizer)
    state = read(net, optimizer)
    assert (state.kind, state.step, state.learning_rates) == ("sgd", None, (0.1,))
    assert state.last_update("0.weight") is None


@pytest.mark.parametrize("make", [torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adamax])
def test_other_optimizers_are_unknown_and_imply_nothing(make):
    net = make_net()
    optimizer = make(net.parameters(), lr=0.01)
    run(net, optimizer)
    state = read(net, optimizer)
    assert state.kind == "unknown"
    assert state.last_update("0.weight") is None
    assert state.step == 4


def test_an_unknown_step_gives_nan_and_not_a_guess():
    net = make_net()
    optimizer = torch.optim.Adam(net.parameters())
    run(net, optimizer)
    raw = copy.deepcopy(optimizer.state_dict())
    del raw["state"][0]["step"]
    state = read_optimizer(raw, shapes(net))
    assert state is not None
    update = state.last_update("0.weight")
    assert update is not None
    assert update.isnan().all()
    assert update.shape == (4, 5)


def test_a_parameter_without_state_and_an_unknown_name_give_none():
    net = make_net()
    optimizer = torch.optim.Adam(net.parameters())
    state = read(net, optimizer)
    assert state.last_update("0.weight") is None
    assert state.last_update("no.such") is None
    assert state.group_of("no.such") is None


def test_settings_are_kept_per_group():
    net = make_net()
    groups = [
        {"params": list(net[0].parameters()), "lr": 0.1},
        {"params": list(net[2:].parameters()), "lr": 0.2, "weight_decay": 0.5},
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    run(net, optimizer)
    state = read(net, optimizer)
    assert state.learning_rates == (0.1, 0.2)
    group = state.group_of("3.bias")
    assert group is not None
    assert (group.momentum, group.nesterov, group.weight_decay, group.betas) == (0.9, True, 0.5, None)


def test_names_saved_with_the_groups_win_over_any_order():
    net = make_net()
    decay = [(name, p) for name, p in net.named_parameters() if p.dim() > 1]
    rest = [(name, p) for name, p in net.named_parameters() if p.dim() == 1]
    groups: list[dict[str, Any]] = [{"params": decay}, {"params": rest, "lr": 0.5}]
    optimizer = torch.optim.Adam(groups)
    made = run(net, optimizer)
    state = read(net, optimizer)
    for name, update in made.items():
        implied = state.last_update(name)
        assert implied is not None
        torch.testing.assert_close(implied, update, rtol=1e-3, atol=1e-6)


def test_an_order_that_the_shapes_contradict_is_not_accepted():
    net = make_net()
    optimizer = torch.optim.Adam(list(net.parameters())[::-1])
    run(net, optimizer)
    assert read_optimizer(optimizer.state_dict(), shapes(net)) is None
    settings = read_settings(optimizer.state_dict())
    assert settings is not None
    assert (settings.mapped, settings.learning_rates, settings.step) == (False, (0.001,), 4)
    assert settings.last_update("0.weight") is None


def test_another_number_of_parameters_is_not_accepted():
    net = make_net()
    optimizer = torch.optim.Adam(net[0].parameters())
    assert read_optimizer(optimizer.state_dict(), shapes(net)) is None


@pytest.mark.parametrize(
    "raw",
    [
        None, {}, [], {"state": {}}, {"param_groups": []}, {"state": {}, "param_groups": []},
        {"state": 1, "param_groups": [1]},
        {"state": {}, "param_groups": [{}]}, {"state": {}, "param_groups": [{"params": [[]]}]},
        {"state": {}, "param_groups": [{"params": [0, 0]}]}, {"state": {}, "param_groups": [{"params": 3}]},
    ],
)  # fmt: skip
def test_a_malformed_state_is_none(raw):
    assert read_optimizer(raw, {"w": (1,)}) is None


@pytest.mark.parametrize("lr", [None, "0.1", float("nan"), 10**400, True, torch.ones(2), 1j])
def test_a_malformed_learning_rate_does_not_raise(lr):
    raw: dict[str, Any] = {
        "state": {0: {"momentum_buffer": torch.ones(2)}},
        "param_groups": [{"params": [0], "lr": lr, "momentum": 0.9, "dampening": 0, "betas": (1,)}],
    }
    state = read_optimizer(raw, {"w": (2,)})
    assert state is not None
    update = state.last_update("w")
    assert update is not None
    assert update.isnan().all()


def test_a_tiny_file_cannot_make_a_huge_update(tmp_path):
    huge = torch.ones(1).expand(2**20, 2**10)
    raw = {
        "state": {0: {"momentum_buffer": huge}},
        "param_groups": [{"params": [0], "lr": 0.1, "momentum": 0.9, "dampening": 0}],
    }
    torch.save({"model": {"w": huge}, "optimizer": raw}, tmp_path / "a.pt")
    state = load_checkpoint(tmp_path / "a.pt").optimizer
    assert state is not None
    assert state.mapped
    assert state.last_update("w") is None


def test_a_checkpoint_can_be_tied_to_the_model_later(tmp_path):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("position", torch.zeros(7))
            self.second = nn.Linear(3, 3)
            self.first = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Any:
            return self.second(self.first(x))

    net = Net()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    alone = load_checkpoint(tmp_path / "a.pt")
    assert alone.optimizer is not None
    assert not alone.optimizer.mapped
    assert any(note.startswith("Optimizer state: ") for note in alone.notes)
    tied = alone.with_parameters(shapes(net))
    assert tied.optimizer is not None
    assert tied.optimizer.mapped
    assert tied.optimizer.last_update("first.weight") is not None
    assert not any(note.startswith("Optimizer state: ") for note in tied.notes)


def test_of_several_optimizers_the_one_that_fits_is_taken(tmp_path):
    net, other = make_net(), nn.Linear(9, 9)
    first, second = torch.optim.SGD(other.parameters(), lr=0.3), torch.optim.Adam(net.parameters(), lr=0.2)
    run(net, second)
    torch.save({"model": net.state_dict(), "optimizers": [first.state_dict(), second.state_dict()]}, tmp_path / "a.pt")
    state = load_checkpoint(tmp_path / "a.pt").optimizer
    assert state is not None
    assert (state.key, state.learning_rates, state.mapped) == ("optimizers.[1]", (0.2,), True)


def test_when_several_optimizers_fit_none_the_file_says_so(tmp_path):
    state = torch.optim.SGD(nn.Linear(9, 9).parameters(), lr=0.3).state_dict()
    other = torch.optim.SGD(nn.Linear(8, 9).parameters(), lr=0.3).state_dict()
    torch.save({"model": make_net().state_dict(), "a": state, "b": other}, tmp_path / "a.pt")
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    assert checkpoint.optimizer is None
    assert any("none of 'a', 'b' fits" in note for note in checkpoint.notes)


def test_the_optimizer_of_a_wrapped_model_is_tied_to_the_plain_names(tmp_path):
    net = nn.DataParallel(make_net())
    optimizer = torch.optim.SGD(list(net.named_parameters()), lr=0.1, momentum=0.9)
    run(net, optimizer)
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    state = load_checkpoint(tmp_path / "a.pt").optimizer
    assert state is not None
    assert state.last_update("0.weight") is not None


def test_names_lose_what_wrappers_add_and_only_that():
    assert strip_prefix(["module.a", "module.b"]) == ({"module.a": "a", "module.b": "b"}, "module.")
    assert strip_prefix(["module.a", "b"])[1] == ""
    assert strip_prefix(["a", "_orig_mod.a"]) == ({"a": "a", "_orig_mod.a": "_orig_mod.a"}, "")
    assert strip_prefix([]) == ({}, "")
    assert plain_name("enc._orig_mod.w") == "enc.w"
    assert plain_name("enc.w") == "enc.w"
