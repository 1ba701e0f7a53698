"""Rectifiers inside torch.func transforms: vmap over members and over inputs, derivatives, batched products."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.nn import functional as F

import relu_doctor
from tests.planted_layers import DEAD, Module, dead_units, inputs, planted


def stacked(names: tuple[set[int], ...]) -> nn.Module:
    """An ensemble whose members are mapped over, each with dead units of its own."""
    torch.manual_seed(0)
    members = [nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2)) for _ in names]
    for member, dead in zip(members, names, strict=True):
        with torch.no_grad():
            member[0].bias[sorted(dead)] = -100.0
    parameters, _ = stack_module_state(members)
    skeleton = copy.deepcopy(members[0]).to("meta")

    class Ensemble(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = nn.ParameterDict({k.replace(".", "_"): nn.Parameter(v) for k, v in parameters.items()})

        def forward(self, x):
            own = {name.replace("_", "."): value for name, value in self.stack.items()}
            return vmap(lambda p, x: functional_call(skeleton, p, (x,)), in_dims=(0, None))(own, x)

    return Ensemble()


def test_vmap_over_stacked_parameters_has_a_unit_per_member_and_feature():
    """Unit = member x feature, and each input is counted once."""
    model, x = stacked(({0}, {3}, set())), inputs(8)
    with torch.no_grad():
        z = torch.einsum("bi,moi->bmo", x, model.stack["0_weight"]) + model.stack["0_bias"]
    diagnosis = relu_doctor.scan(model, x, exhaustive=True)
    assert diagnosis.sites["num_units"].tolist() == [15]
    assert dead_units(diagnosis) == [{0, 8}]
    assert diagnosis.units["inputs_fired"].tolist() == (z > 0).sum(0).flatten().tolist()
    assert set(diagnosis.units["inputs"]) == {60}


def test_vmap_over_the_inputs():
    """A forward that maps over its batch is counted input by input."""
    net = nn.Sequential(planted(8), nn.ReLU(), nn.Linear(7, 2))
    diagnosis = relu_doctor.scan(Wrapped(net), inputs(8), exhaustive=True)
    assert dead_units(diagnosis) == [DEAD]
    assert diagnosis.units["inputs_fired"].tolist()[2] == 1
    assert set(diagnosis.units["inputs"]) == {60}


class Wrapped(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return vmap(self.net)(x)


def test_a_rectifier_under_another_transform():
    """Inside torch.func.grad each input is counted as outside."""

    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.last = nn.Sequential(planted(8), nn.ReLU(), nn.Linear(7, 1)), planted(8)

        def forward(self, x):
            force = torch.func.grad(lambda x: self.net(x).sum())(x)
            return self.last(force).relu()

    model, x = Energy(), inputs(8)
    with torch.no_grad():
        fired = (model.net[0](x) > 0).sum(0).tolist()
    diagnosis = relu_doctor.scan(model, x, exhaustive=True)
    assert diagnosis.sites["num_units"].tolist() == [7, 7]
    assert diagnosis.units["inputs_fired"].tolist()[:7] == fired
    assert dead_units(diagnosis)[0] == DEAD


class Ensemble(nn.Module):
    """Members that are mapped over in one way or another; unit k of member k never fires."""

    def __init__(self, run, activation=None):
        super().__init__()
        torch.manual_seed(0)
        members = [nn.Sequential(nn.Linear(8, 5), activation or nn.ReLU(), nn.Linear(5, 2)) for _ in range(3)]
        for index, member in enumerate(members):
            with torch.no_grad():
                member[0].bias[index] = -100.0
        parameters, _ = stack_module_state(members)
        self.stack = nn.ParameterDict({key.replace(".", "_"): nn.Parameter(p) for key, p in parameters.items()})
        self.skeleton = [copy.deepcopy(members[0]).to("meta")]
        self.run = run

    def member(self, parameters, x):
        return functional_call(self.skeleton[0], parameters, (x,))

    def forward(self, x):
        return self.run(self.member, {name.replace("_", "."): value for name, value in self.stack.items()}, x)

    @torch.no_grad()
    def pre(self, x):
        """(inputs, members, units)."""
        return torch.einsum("bi,moi->bmo", x, self.stack["0_weight"]) + self.stack["0_bias"]


@pytest.mark.parametrize(
    "run",
    [
        lambda member, own, x: vmap(member, (0, None), out_dims=1)(own, x),
        lambda member, own, x: vmap(lambda p: vmap(lambda one: member(p, one))(x))(own),
        lambda member, own, x: vmap(lambda one: vmap(lambda p: member(p, one))(own))(x),
        lambda member, own, x: vmap(lambda p: F.dropout(member(p, x), 0.5, True), randomness="different")(own),
    ],
    ids=["members", "inputs_in_members", "members_in_inputs", "random"],
)
def test_members_and_inputs_may_be_mapped_in_any_order(run):
    """A unit is a feature of a member, however many maps lie around it."""
    model, x = Ensemble(run), inputs(8)
    diagnosis = relu_doctor.scan(model, list(x.split(20)), exhaustive=True)
    assert diagnosis.sites["num_units"].tolist() == [15]
    assert diagnosis.units["inputs_fired"].tolist() == (model.pre(x) > 0).sum(0).flatten().tolist()
    assert dead_units(diagnosis) == [{0, 6, 12}]
    assert set(diagnosis.units["inputs"]) == {60}


def top_k(z):
    values, indices = z.topk(2)
    return torch.zeros_like(z).scatter(-1, indices, values.relu())


@pytest.mark.parametrize(
    "function",
    [
        lambda z: z * (z > 0),
        lambda z: torch.where(z > 0, z, torch.zeros_like(z)),
        lambda z: torch.maximum(z, torch.zeros_like(z)),
        lambda z: z - z.clamp(max=0),
        lambda z: relu_doctor.tap("gate", z, torch.stack([z, torch.zeros_like(z)]).amax(0)),
        top_k,
    ],
    ids=["gate", "where", "maximum", "less", "tap", "top_k"],
)
def test_what_is_written_out_is_seen_inside_of_vmap(function):
    """Gates, sums, taps and top-ks of mapped tensors are those of the tensors behind."""
    model, x = Ensemble(lambda member, own, x: vmap(member, (0, None))(own, x), Module(function)), inputs(8)
    batches = list(x.split(20))
    with torch.no_grad():
        fired = sum((function(model.pre(batch)) != 0).sum(0) for batch in batches).flatten().tolist()
    diagnosis = relu_doctor.scan(model, batches, exhaustive=True)
    assert len(diagnosis.sites) == 1
    assert diagnosis.units["inputs_fired"].tolist() == fired


def test_a_module_of_ones_own_inside_of_vmap():
    """It is probed outside of the map, and measured on the tensors behind."""

    class Shifted(nn.Module):
        def forward(self, z):
            return F.relu(z - 0.5)

    model, x = Ensemble(lambda member, own, x: vmap(member, (0, None))(own, x), Shifted()), inputs(8)
    fired = (model.pre(x) > 0.5).sum(0).flatten().tolist()
    model.hidden = model.skeleton[0][1]
    for given in ([Shifted], {Shifted: (0.5, float("inf"))}):
        diagnosis = relu_doctor.scan(model, x, rectifiers=given, exhaustive=True)
        assert diagnosis.units["inputs_fired"].tolist() == fired


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, in jvp
@pytest.mark.parametrize(
    "run",
    [
        lambda net, x: vmap(jacrev(net))(x),
        lambda net, x: vmap(grad(lambda one: net(one).sum()))(x),
        lambda net, x: jvp(net, (x,), (torch.ones_like(x),))[1],
    ],
    ids=["jacrev", "grad", "jvp"],
)
def test_inside_of_derivatives(run):
    """A forward that is differentiated is counted as one that is not."""

    class Derivative(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(planted(8), nn.ReLU(), nn.Linear(7, 2))

        def forward(self, x):
            return run(self.net, x)

    model, x = Derivative(), inputs(8)
    with torch.no_grad():
        fired = (model.net[0](x) > 0).sum(0).tolist()
    diagnosis = relu_doctor.scan(model, list(x.split(20)), exhaustive=True)
    assert diagnosis.units["inputs_fired"].tolist() == fired
    assert dead_units(diagnosis) == [DEAD]


@pytest.mark.parametrize(
    ("product", "members"),
    [
        (lambda w, b, x: (x[:, None, None, :] @ w).squeeze(2) + b, 3),
        (lambda w, b, x: torch.matmul(x[:, None, None], w.expand(len(x), -1, -1, -1))[:, :, 0] + b, 3),
        (lambda w, b, x: torch.bmm(x[:, None], w[0].expand(len(x), -1, -1))[:, 0] + b[0], 1),
        (lambda w, b, x: torch.bmm(x[:, None], w[0].repeat(len(x), 1, 1))[:, 0] + b[0], 1),
        (lambda w, b, x: (w.transpose(1, 2) @ x[:, None, :, None]).squeeze(-1) + b, 3),
    ],
    ids=["broadcast", "expanded", "one_expanded", "one_repeated", "from_the_left"],
)
def test_a_weight_that_is_repeated_for_each_input_is_one_weight(product, members):
    """A batched product may multiply each input with matrices of its own, which are all the same."""

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.weight, self.bias = nn.Parameter(torch.randn(3, 8, 5)), nn.Parameter(torch.zeros(3, 5))
            with torch.no_grad():
                self.bias[0, 2] = -100.0

        def forward(self, x):
            return F.relu(product(self.weight, self.bias, x))

    model, x = Product(), inputs(8)
    with torch.no_grad():
        fired = (model(x) > 0).flatten(1).sum(0).tolist()
        squares = model.weight[:members].pow(2).sum(1).sqrt().flatten()
    diagnosis = relu_doctor.scan(model, list(x.split(20)), exhaustive=True)
    assert diagnosis.units["inputs_fired"].tolist() == fired
    assert dead_units(diagnosis) == [{2}]
    assert diagnosis.units["weight_l2"].tolist() == pytest.approx(squares.tolist(), rel=1e-5)
