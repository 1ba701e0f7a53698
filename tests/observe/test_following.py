"""Producers behind code that hides them from autograd: computed again, without gradients, written elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import relu_doctor
from relu_doctor.errors import ForwardError
from relu_doctor.observe.graph.names import ParameterNames
from tests.left_as_it_was.fingerprint import assert_same, fingerprint
from tests.planting import Case, Site, normal
from tests.processes import PERCEPTRON
from tests.wrapped import assert_found, found_in, planted_in, scan
from tests.zoo.registry import Chain

# What is computed again, without gradients, or by a function of its own


class Checkpointed(nn.Module):
    """Rectifiers before, inside and behind checkpointed parts, one within the other, with a norm and a gate inside."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 6), nn.Linear(6, 5), nn.LayerNorm(5)
        self.c, self.gate, self.d = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.reentrant = reentrant

    def part(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.b(x)))
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)

    def inner(self, x: Tensor) -> Tensor:
        return self.d(F.relu(self.c(x) * torch.sigmoid(self.gate(x))))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(checkpoint(self.part, F.relu(self.a(x)), use_reentrant=self.reentrant))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_parts_are_seen_once(reentrant, mode):
    """A part that is computed again for the backward counts once, and hides no producer from what follows it."""
    case = Case(
        "checkpointed",
        lambda: Checkpointed(reentrant=reentrant).eval(),
        normal(6, sizes=(40, 39, 1)),
        (
            Site("relu()#1", 6, {1}, {2}, "a.bias"),
            Site("relu()#2", 5, {0}, {3}, "norm.bias"),
            Site("relu()#3", 5),
            Site("relu()#4", 5, {4}, {1}, "d.bias"),
        ),
        seed=1,
    )
    model, batches = case.build()
    diagnosis = scan(model, batches, mode=mode)
    assert {name: told for name, told in found_in(diagnosis).items() if name != "relu()#3"} == {
        name: told for name, told in planted_in(case).items() if name != "relu()#3"
    }
    assert [site.producer for site in diagnosis.table.sites] == ["a", "b, norm", "c, gate", "d"]
    assert set(diagnosis.units["positions"]) == {80}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_forward_that_asks_for_gradients_through_a_checkpoint_counts_once(reentrant):
    """The forward's own backward computes the part again; that is no second position of any unit."""

    def forces(model: nn.Module, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            energy = checkpoint(model.body, x, use_reentrant=reentrant).sum()
            if reentrant:
                energy.backward()
                return x.grad
            return torch.autograd.grad(energy, x)[0]

    body, batches = PERCEPTRON.build()
    body.requires_grad_(False)  # a reentrant checkpoint fills in gradients, which a scan is not to leave behind
    diagnosis = scan(Chain(forces, body=body).eval(), batches)
    assert found_in(diagnosis) == {f"body.{name}": told for name, told in planted_in(PERCEPTRON).items()}
    assert set(diagnosis.units["positions"]) == {20}


MODES: dict[str, Callable[[], Any]] = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


class Shaded(nn.Module):
    """A convolution, a norm and a layer of which some parts run without gradients."""

    def __init__(self, mode: str, *, decorated: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(5, 4)
        self.mode = mode
        self.body = [MODES[mode]()(self._body) if decorated else self._body]

    def _body(self, x: Tensor) -> Tensor:
        with MODES[self.mode]():
            return F.relu(self.norm(self.conv(x))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.head(self.body[0](x).clone()))


@pytest.mark.parametrize("decorated", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_parts_without_gradients_have_producers(mode, decorated):
    """The body of a transfer model under no_grad or inference_mode is known by its layers, the head by its own."""
    case = Case(
        "shaded",
        lambda: Shaded(mode, decorated=decorated).eval(),
        normal(3, 5, 5),
        (
            Site("relu()#1", 5, {1}, {2}, "norm.bias", arrange=lambda z, n: z.flatten(2)),
            Site("relu()#2", 4, {0}, {3}, "head.bias"),
        ),
    )
    model, batches = case.build()
    diagnosis = scan(model, batches)
    assert_found(case, diagnosis)
    assert [site.producer for site in diagnosis.table.sites] == ["conv, norm", "head"]
    assert diagnosis.units[["bias", "weight_l2"]].notna().all(axis=None)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_model_that_was_made_in_inference_mode(mode):
    """Parameters and buffers that autograd refuses are known, read, and left, also where a norm writes to them."""
    with torch.inference_mode():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU()).eval()
        batches = normal(6, sizes=(100, 90))()
        model[1].bias[1] = model[3].bias[4] = -100.0
        model[3].bias[[0, 1, 2, 3, 5, 6]] = 1.0
    diagnosis = scan(model, batches, mode=mode)
    assert {name: told[:2] for name, told in found_in(diagnosis).items()} == {"2": (8, {1}), "4": (7, {4})}
    assert [site.producer for site in diagnosis.table.sites] == ["0, 1", "3"]
    assert diagnosis.units[["bias", "weight_l2"]].notna().all(axis=None)


class Multiplied(torch.autograd.Function):
    """A linear layer with a backward of its own."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return x @ weight.T + bias

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.T @ x, gradient.sum(0)


class Turned(torch.autograd.Function):
    """Turns gradients round, and returns its input itself."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


FORWARDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "functions of its own": lambda m, x: F.relu(
        Multiplied.apply(Turned.apply(F.relu(Multiplied.apply(x, m.a.weight, m.a.bias))), m.b.weight, m.b.bias)
    ),
    "results written elsewhere": lambda m, x: F.relu(
        torch.addmm(m.b.bias, F.relu(m.a(x)), m.b.weight.T, out=torch.empty(0))
    ),
    "values of parameters": lambda m, x: F.relu(
        F.relu(x @ m.a.weight.data.T + m.a.bias.detach()) @ m.b.weight.T + m.b.bias
    ),
    "cut and gone on with": lambda m, x: F.relu(m.b(F.relu(m.a(x)).detach())),
    "written in place": lambda m, x: F.relu(F.relu(m.a(x)).mm(m.b.weight.T).add_(m.b.bias)),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
def test_what_hides_a_layer_from_autograd_hides_it_not(forward, frozen):
    """Functions with their own backward, ``out=``, ``.data``, ``detach`` and in-place calls keep their producers."""
    case = Case(
        "hidden",
        lambda: Chain(forward, a=nn.Linear(6, 5), b=nn.Linear(5, 4)).eval(),
        normal(6),
        (Site("relu()#1", 5, {1, 4}, {0}, "a.bias"), Site("relu()#2", 4, {2}, {3}, "b.bias")),
    )
    model, batches = case.build()
    model.requires_grad_(not frozen)
    diagnosis = scan(model, batches)
    assert_found(case, diagnosis)
    assert [site.producer for site in diagnosis.table.sites] == ["a", "b"]


class Adapting(nn.Module):
    """Writes to a buffer and to a plain tensor in its forward, without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)
        self.register_buffer("mean", torch.zeros(5))
        self.last = torch.zeros(5)

    def forward(self, x: Tensor) -> Tensor:
        pre = self.fc(x)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(pre.mean(0), alpha=0.1)
            self.last[:] = pre[0]
        return F.relu(pre)


def test_what_a_forward_writes_to_gets_no_history():
    """Buffers and tensors that a forward writes to have their values back, and are not drawn into a graph."""
    model = Adapting()
    scan(model, normal(6)())
    assert not model.mean.any()
    assert not model.last.any()
    assert not model.mean.requires_grad
    assert not model.last.requires_grad
    copy.deepcopy(model)


class Averaging(nn.Module):
    """Writes to parameters in its forward: a moving average, clamped weights, rows of a table that are rescaled."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.average = nn.Linear(6, 5), nn.Linear(6, 5).requires_grad_(False)
        self.table = nn.Embedding(20, 6, max_norm=0.5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            torch._foreach_mul_([self.average.weight, self.average.bias], 0.9)
            self.average.weight.add_(self.fc.weight, alpha=0.1)
        self.fc.weight.data.clamp_(-0.3, 0.3)
        self.fc.bias.view(5, 1)[0] = 0.1
        return F.relu(self.fc(x + self.table(torch.arange(len(x)) % 20)) + self.average(x))


@pytest.mark.parametrize("mode", ["eval", "both"])
def test_parameters_that_a_forward_writes_to_have_their_values_back(mode):
    """Whatever way they are written to, and also when the forward raises afterwards."""
    model = Averaging()
    scan(model, normal(6)(), mode=mode)
    handle = model.average.register_forward_hook(lambda module, args, output: output.view(3))
    before = fingerprint(model)
    with pytest.raises(ForwardError):
        relu_doctor.scan(model, normal(6)())
    assert_same(before, fingerprint(model))
    handle.remove()


def test_a_parameters_name_is_not_inherited_with_its_place_in_memory():
    """The identity of a freed tensor comes back with the next one, which is another tensor."""
    model = nn.Linear(3, 2)
    names = ParameterNames(model)
    known = {id(model.weight): "weight"}
    model.weight = nn.Parameter(torch.zeros(2, 3))
    assert names.of(model.weight) == "weight"
    for _ in range(100):
        stranger = nn.Parameter(torch.zeros(2, 3))
        assert names.of(stranger) is None
        known[id(stranger)] = ""
        model.bias = stranger
        assert names.of(stranger) == "bias"
        model.bias = nn.Parameter(torch.zeros(2))
        del stranger
    assert list(names) == ["weight", "bias"]


# Weights that are computed


class LowRank(nn.Module):
    """A parametrization that computes a product of parameters."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(rows, 2)), nn.Parameter(torch.randn(2, columns))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.left @ self.right


def low_rank(layer: nn.Linear) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", LowRank(*layer.weight.shape))


PARAMETRIZED: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm by columns": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal by exponential": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="matrix_exp"),
    "orthogonal by Cayley": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="cayley"),
    "orthogonal by Householder": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="householder"),
    "low rank": low_rank,
    "two on one": lambda layer: low_rank(parametrizations.weight_norm(layer)),
    "pruned rows": lambda layer: prune.ln_structured(layer, "weight", 0.2, n=2, dim=0),
    "pruned weights and biases": lambda layer: (
        prune.l1_unstructured(layer, "weight", 0.4),
        prune.identity(layer, "bias"),
    ),
}


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("change", PARAMETRIZED.values(), ids=PARAMETRIZED)
def test_layers_whose_weights_are_computed(change, cached):
    """Parametrizations and pruning masks: the layer's units are found, with the norms of the weights that it uses."""

    def make() -> nn.Module:
        model = PERCEPTRON.make()
        change(model[0])
        change(model[2])
        return model

    bias = "bias_orig" if change is PARAMETRIZED["pruned weights and biases"] else "bias"
    sites = (Site("1", 8, {1}, {3}, f"0.{bias}"), Site("3", 7, {0, 5}, {2}, f"2.{bias}"))
    case = Case("computed", make, PERCEPTRON.batches, sites)
    model, batches = case.build()

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        with parametrize.cached():
            return model(batch)

    diagnosis = scan(model, batches, forward=forward if cached else None)
    assert_found(case, diagnosis)
    assert [site.producer for site in diagnosis.table.sites] == ["0", "2"]
    rows = diagnosis.units[diagnosis.units["site"] == "1"]
    torch.testing.assert_close(torch.tensor(rows["weight_l2"].tolist()), model[0].weight.detach().norm(dim=1))


def test_weights_that_the_models_own_code_computes():
    """A low-rank update written into the forward: the layer's units are found; no norm of its weights is claimed."""
    parts = {
        "left": torch.randn(5, 2),
        "right": torch.randn(2, 6),
        "base": torch.randn(4, 5),
        "down": torch.randn(4, 1),
    }
    generator = torch.Generator().manual_seed(0)
    parts = {name: nn.Parameter(torch.randn(part.shape, generator=generator)) for name, part in parts.items()}
    parts["up"], parts["b"] = nn.Parameter(torch.randn(1, 5, generator=generator)), nn.Parameter(torch.zeros(5))
    parts["c"] = nn.Parameter(torch.zeros(4))

    def forward(m: Any, x: Tensor) -> Tensor:
        first = F.relu(F.linear(x, m.left @ m.right, m.b))
        return F.relu(F.linear(first, m.base + m.down @ m.up, m.c))

    sites = (Site("relu()#1", 5, {1, 4}, {0}, "b"), Site("relu()#2", 4, {2}, {3}, "c"))
    case = Case("computed", lambda: Chain(forward, **parts).eval(), normal(6), sites)
    model, batches = case.build()
    diagnosis = scan(model, batches)
    assert_found(case, diagnosis)
    assert diagnosis.units["weight_l2"].isna().all()
    assert diagnosis.units["bias"].notna().all()


@pytest.mark.parametrize("fresh", [False, True], ids=["the same each time", "new each time"])
def test_parameters_that_are_put_in_for_a_call(fresh):
    """torch.func.functional_call: tensors in the place of parameters go by the parameters' names."""
    model, batches = PERCEPTRON.build()
    plain = scan(model, batches)
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        given = {name: value.clone() for name, value in values.items()} if fresh else values
        return torch.func.functional_call(model, given, batch)

    diagnosis = scan(model, batches, forward=forward)
    assert_found(PERCEPTRON, diagnosis)
    assert diagnosis.units["site_id"].equals(plain.units["site_id"])
