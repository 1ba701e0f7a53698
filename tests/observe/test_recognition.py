"""Every way to apply a rectifier: modules, functions, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import relu_doctor
from relu_doctor.errors import NoActivationSitesError
from tests.planted_layers import DEAD, SPECIAL, Module, Net, dead_units, fires_by_output, inputs, planted


def by_index(z):
    z = z.clone()
    z[z < 0] = 0
    return z


def in_place_times_mask(z):
    z = z.clone()
    return z.mul_(z > 0)


def by_a_mask_of_what_was_copied(z):
    copied = z.clone()
    copied[z < 0] = 0
    return copied


SHIFT = nn.Parameter(torch.full((7,), 0.1))
RECTIFYING = {
    "relu": F.relu,
    "torch_relu": torch.relu,
    "method": lambda z: z.relu(),
    "method_in_place": lambda z: z.clone().relu_(),
    "functional_in_place": lambda z: F.relu(z.clone(), inplace=True),
    "torch_in_place": lambda z: torch.relu_(z.clone()),
    "clamp": lambda z: torch.clamp(z, min=0),
    "clamp_method": lambda z: z.clamp(0),
    "clamp_in_place": lambda z: z.clone().clamp_(min=0.0),
    "clamp_min": lambda z: z.clamp_min(0),
    "clamp_min_function": lambda z: torch.clamp_min(z, 0.0),
    "clip": lambda z: z.clip(min=0),
    "threshold": lambda z: F.threshold(z, 0.0, 0.0),
    "sign_bit": lambda z: z * ~torch.signbit(z),
    "sign": lambda z: z * (z.sign() > 0),
    "clamp_between_tensors": lambda z: torch.clamp(z / 10, torch.zeros(()), torch.full((), 5.0)),
    "relu6": lambda z: F.relu6(z / 10),
    "hardtanh": lambda z: F.hardtanh(z / 10, 0.0, 5.0),
    "leaky_with_no_slope": lambda z: F.leaky_relu(z, negative_slope=0.0),
    "elu_with_no_slope": lambda z: F.elu(z, alpha=0.0),
    "maximum": lambda z: torch.maximum(z, torch.zeros_like(z)),
    "maximum_with_a_number": lambda z: torch.maximum(torch.tensor(0.0), z),
    "max": lambda z: torch.max(z, z.new_zeros(1)),
    "fmax": lambda z: torch.fmax(z, torch.zeros(())),
    "where": lambda z: torch.where(z > 0, z, 0),
    "where_zeros": lambda z: torch.where(z > 0, z, torch.zeros_like(z)),
    "where_not_below": lambda z: torch.where(z < 0, torch.tensor(0.0), z),
    "where_at_least": lambda z: torch.where(torch.ge(z, 0), z, torch.full_like(z, 0.0)),
    "where_method": lambda z: z.where(z > 0, torch.tensor(0.0)),
    "where_from_the_left": lambda z: torch.where(torch.zeros(()) < z, z, 0.0),
    "times_its_mask": lambda z: z * (z > 0),
    "mask_times_it": lambda z: (z > 0).float() * z,
    "mask_of_its_type": lambda z: z.mul((z > 0).to(z.dtype).detach()),
    "in_place_times_mask": in_place_times_mask,
    "step": lambda z: z * torch.heaviside(z, torch.tensor(0.0)),
    "masked_fill": lambda z: z.masked_fill(z <= 0, 0),
    "masked_fill_of_the_opposite": lambda z: z.masked_fill(~(z > 0), 0.0),
    "by_index": by_index,
    "squared": lambda z: F.relu(z) ** 2,
    "square": lambda z: F.relu(z).square(),
    "where_by_name": lambda z: torch.where(condition=z > 0, input=z, other=0.0),
    "where_not_below_zeros": lambda z: torch.where(z >= 0, z, torch.zeros_like(z)),
    "detached_mask": lambda z: z * (z.detach() > 0),
    "mask_of_data": lambda z: z * (z.data > 0).float(),
    "by_a_mask_of_what_was_copied": by_a_mask_of_what_was_copied,
    "masked_fill_of_a_copy": lambda z: z.clone().masked_fill_(z < 0, 0),
    "clamp_by_a_tensor": lambda z: torch.clamp(z, min=torch.tensor(0.0)),
    "clamp_min_by_zeros": lambda z: z.clamp_min(torch.zeros_like(z)),
    "times_both_masks": lambda z: z * ((z > 0) & (z < 60)),
    "power_times_mask": lambda z: (z > 0) * z**2,
    "negative_of_the_smaller": lambda z: -torch.minimum(-z, torch.zeros_like(z)),
    "negative_of_a_clamp": lambda z: torch.clamp_max(-z, 0).neg(),
    "clamp_from_above": lambda z: z.clamp(max=0),
    "hardtanh_from_above": lambda z: F.hardtanh(z / 100, -5.0, 0.0),
    "less_the_smaller": lambda z: z - torch.minimum(z, torch.tensor(0.0)),
    "less_a_clamp": lambda z: z - z.clamp(max=0),
    "half_with_its_magnitude": lambda z: 0.5 * (z + z.abs()),
    "magnitude_with_it": lambda z: (torch.abs(z) + z) / 2,
    "product_of_two": lambda z: F.relu(z) * F.relu(z),
    "of_the_negative": lambda z: F.relu(-z),
    "softshrink": lambda z: F.softshrink(z, 0.3),
    "hardshrink": lambda z: F.hardshrink(z),
    "rrelu_with_no_slope": lambda z: F.rrelu(z, 0.0, 0.0),
    "an_operator": lambda z: torch.ops.aten.relu(z),
}


@pytest.mark.parametrize("shape", [(8,), (5, 8)], ids=["features", "sequences"])
@pytest.mark.parametrize("name", [*RECTIFYING])
def test_a_unit_fires_where_its_output_is_not_zero(name, shape):
    """Each way of writing a rectifier is one site, whose firings are those of the stored outputs."""
    function = RECTIFYING[name]
    model, x = Net(function), inputs(*shape)
    batches = list(x.split(20))
    with torch.no_grad():
        fired = torch.cat([fires_by_output(function, model.first(batch)) for batch in batches])
    diagnosis = relu_doctor.scan(model, batches, exhaustive=True)
    assert len(diagnosis.sites) == 1
    assert diagnosis.units["inputs_fired"].tolist() == fired.sum(0).tolist()
    if "negative" not in name and "above" not in name and "shrink" not in name:
        assert fired[:, 2].nonzero().flatten().tolist() == [SPECIAL]
        assert set(*dead_units(diagnosis)) >= DEAD
    silent = (fired.sum(0) == 0).nonzero().flatten().tolist()
    assert set(silent) == set(*dead_units(diagnosis)) | saturated(diagnosis)
    first = diagnosis.units["first_fired"].fillna(-1).astype(int).tolist()
    assert first == [int(column.nonzero()[0]) if column.any() else -1 for column in fired.T]


def saturated(diagnosis) -> set[int]:
    return set(diagnosis.units.index[diagnosis.units["status"] == "saturated"])


@pytest.mark.parametrize(
    "function",
    [
        lambda z: F.relu(z) - 0.1 * F.relu(-z),
        lambda z: z.clamp(min=0) + 0.25 * z.clamp(max=0),
        lambda z: F.relu(z) + torch.exp(torch.minimum(z, torch.tensor(0.0))) - 1,
        lambda z: torch.maximum(z, torch.zeros(())) + torch.minimum(torch.exp(z) - 1, torch.zeros(())),
        lambda z: z.clamp(min=0) + torch.log1p(torch.exp(-z.abs())),
        lambda z: F.relu(x := 1.5 * z + 0.1) - 0.1 * F.relu(-x),
        lambda z: F.relu(x := z + SHIFT) + 0.125 * (x - x.abs()),
    ],
    ids=["leaky", "prelu", "elu", "elu_by_minimum", "softplus", "leaky_of_a_sum", "prelu_of_a_sum"],
)
def test_rectifiers_that_make_up_one_without_a_flat_side_are_not_dead_in_it(function):
    """A leaky ReLU written as a sum of two ReLUs is one site, which cannot die."""
    diagnosis = relu_doctor.scan(Net(function), inputs(8), exhaustive=True)
    assert len(diagnosis.sites) == 1
    assert dead_units(diagnosis) == [set()]
    assert diagnosis.units["inputs_fired"].tolist() == [60] * 7


class Shrink(nn.Module):
    """Soft thresholds, one per unit, as the sum of its two sides."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.edge = planted(8), nn.Linear(7, 3), nn.Parameter(torch.full((7,), 0.5))

    def forward(self, x):
        z = self.first(x)
        return self.last(F.relu(z - self.edge) - F.relu(-z - self.edge))


def test_both_sides_of_a_soft_threshold_are_sites():
    """Edges that are learned do not make one site of a value and its negative."""
    upper, lower = dead_units(relu_doctor.scan(Shrink(), inputs(8), exhaustive=True))
    assert upper >= DEAD
    assert not DEAD & lower


class Learned(Shrink):
    def forward(self, x):
        return self.last(torch.maximum(self.first(x), self.edge))


def test_the_larger_of_a_value_and_a_parameter_fires_above_it():
    """A thresholded linear unit with a learned threshold, as after filter response normalisation."""
    diagnosis = relu_doctor.scan(Learned(), inputs(8), exhaustive=True)
    assert dead_units(diagnosis) == [DEAD]
    fires = (planted(8)(inputs(8)) > 0.5).sum(0)
    assert diagnosis.units["inputs_fired"].tolist() == fires.tolist()


def test_a_prelu_written_out_with_its_parameter():
    """As Keras writes it, with a learned slope per unit."""

    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.alpha = planted(8), nn.Linear(7, 2), nn.Parameter(torch.full((7,), 0.25))

        def forward(self, x):
            z = self.first(x)
            return self.last(F.relu(z) + -self.alpha * F.relu(-z))

    diagnosis = relu_doctor.scan(Written(), list(inputs(8).split(20)), exhaustive=True)
    assert dead_units(diagnosis) == [set()]


def test_both_halves_of_a_crelu_are_sites():
    """What is joined, not added, makes up no other function."""
    model = Net(lambda z: torch.cat([F.relu(z), F.relu(-z)], -1)[..., :7])
    diagnosis = relu_doctor.scan(model, inputs(8), exhaustive=True)
    assert sorted(map(len, dead_units(diagnosis))) == [0, 2]


def test_a_rectifier_whose_output_is_read_by_itself_stays_a_site():
    """relu(x) - x is a rectifier of its own beside relu(x), where a layer reads relu(x)."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = planted(8), nn.Linear(7, 2)

        def forward(self, x):
            z = self.first(x)
            acts = F.relu(z)
            return self.last(acts) + self.last(acts - z)

    diagnosis = relu_doctor.scan(Both(), list(inputs(8).split(20)), exhaustive=True)
    assert diagnosis.sites["rectifier"].tolist() == ["relu", "sub"]
    assert dead_units(diagnosis) == [DEAD, set()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "function", [lambda z: z * (z > 0.3), lambda z: F.threshold(z, 0.3, 0.0)], ids=["gate", "threshold"]
)
def test_a_threshold_is_compared_in_the_numbers_of_its_type(function, dtype):
    """0.3 in bfloat16 is 0.30078."""
    model, x = Net(function).to(dtype), inputs(8, num_inputs=400).to(dtype)
    with torch.no_grad():
        expected = (model.first(x) > 0.3).sum(0).tolist()
    assert relu_doctor.scan(model, x, exhaustive=True).units["inputs_fired"].tolist() == expected


@pytest.mark.parametrize(
    "function",
    [
        lambda z: z * (z > torch.quantile(z, 0.7).item()),
        lambda z: z.clamp(0, torch.quantile(z, 0.9).item()),
        lambda z: F.threshold(z, z.abs().mean().item(), 0.0),
    ],
    ids=["gate", "clamp", "threshold"],
)
def test_edges_that_are_data_make_one_site(function):
    """Each batch is counted by the edges that it has, and all of them are of one site."""
    model, batches = Net(function), list(inputs(8).split(20))
    with torch.no_grad():
        pre = [model.first(batch) for batch in batches]
    highest = [torch.quantile(z, 0.9) if "clamp" in function.__code__.co_names else math.inf for z in pre]
    lowest = [(function(z) != 0) & (z < high) for z, high in zip(pre, highest, strict=True)]
    diagnosis = relu_doctor.scan(model, batches, exhaustive=True)
    assert diagnosis.units["inputs_fired"].tolist() == sum(fired.sum(0) for fired in lowest).tolist()


@pytest.mark.parametrize(
    "function",
    [
        lambda z: torch.where(z > 0, z, torch.zeros_like(z)),
        lambda z: torch.maximum(z, torch.zeros_like(z)),
        lambda z: z - z.clamp(max=0),
        lambda z: torch.zeros_like(z).scatter_(-1, z.topk(2).indices, z.topk(2).values.relu()),
    ],
    ids=["where", "maximum", "less", "top_k"],
)
def test_inside_inference_mode(function):
    """Tensors of inference mode, which do not tell when they are written to, are followed as well."""

    class Inferring(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = planted(8), nn.Linear(7, 2)

        def forward(self, x):
            with torch.inference_mode():
                return self.last(function(self.first(x)))

    model, x = Inferring(), inputs(8)
    with torch.no_grad():
        fired = fires_by_output(function, model.first(x))
    diagnosis = relu_doctor.scan(model, list(x.split(20)), exhaustive=True)
    assert diagnosis.units["inputs_fired"].tolist() == fired.sum(0).tolist()


def test_what_is_known_of_a_tensor_is_forgotten_when_it_is_written_to():
    """A mask of a tensor that changed since, and a relu's output that something was added to, tell nothing."""

    def stale(z):
        copied = z.clone()
        mask = copied > 0
        copied.sub_(5)
        added = F.relu(z)
        added += z.flip(-1)
        return copied * mask + added.topk(7).values

    diagnosis = relu_doctor.scan(Net(stale), inputs(8), exhaustive=True)
    with torch.no_grad():
        positive = (Net(stale).first(inputs(8)) > 0).sum(0).tolist()
    assert diagnosis.units["inputs_fired"].tolist() == positive


def test_an_iteration_that_rectifies_what_it_started_from_is_one_site():
    """As entmax does, which looks for its threshold step by step."""

    def entmax(z):
        threshold = z.amax(-1, keepdim=True) - 1
        for _ in range(5):
            p = torch.clamp(z - threshold, min=0) ** 2
            threshold = threshold + (p.sum(-1, keepdim=True) - 1) * 0.1
        return p

    diagnosis = relu_doctor.scan(Net(entmax), list(inputs(8).split(20)), exhaustive=True)
    assert diagnosis.sites["num_units"].tolist() == [7]
    assert dead_units(diagnosis) == [DEAD]


def test_a_forward_that_asks_autograd_where_gradients_are_enabled():
    """A model of energies and forces cannot run without gradients, and is observed with them."""

    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.last = nn.Sequential(planted(8), nn.ReLU(), nn.Linear(7, 1)), planted(8)

        def forward(self, x):
            x = x.detach().clone().requires_grad_()
            (force,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
            return self.last(force).relu()

    model, x = Energy(), inputs(8)
    fired = [(model.net[0](x) > 0).sum(0).tolist(), (model(x) > 0).sum(0).tolist()]
    diagnosis = relu_doctor.scan(model, list(x.split(20)), exhaustive=True)
    assert diagnosis.units["inputs_fired"].tolist() == fired[0] + fired[1]


@pytest.mark.parametrize(
    "function",
    [
        lambda z: z.topk(2).values.sum(-1, keepdim=True),
        lambda z: z * torch.zeros_like(z).scatter(-1, torch.zeros(len(z), 1, dtype=torch.long), 1.0),
        lambda z: torch.where(z > 0, z, 0.1 * z),
        lambda z: torch.maximum(z, z.flip(-1)),
        lambda z: z * (z.abs() > 0.5).roll(1, -1),
        lambda z: torch.clamp(z, min=-1),
        lambda z: z.masked_fill(torch.arange(7) > 3, 0),
        lambda z: z * (torch.rand_like(z) > 0.5) * 2,
        lambda z: z * (z.sum(-1, keepdim=True) > 0),
        lambda z: F.hardtanh(z),
        lambda z: z - z.mean(-1, keepdim=True),
        lambda z: z + z.abs() * 0.5,
        lambda z: z.clamp(-torch.quantile(z, 0.9).item(), torch.quantile(z, 0.9).item()),
        lambda z: z / z.norm(dim=-1, keepdim=True).clamp(min=0),
        lambda z: z.topk(3).values.mean(-1, keepdim=True),
    ],
    ids=[
        "routing",
        "one_hot",
        "leaky",
        "maxout",
        "foreign_mask",
        "clamp_elsewhere",
        "fixed_mask",
        "dropout",
        "padding",
        "hardtanh",
        "centred",
        "leaky_magnitude",
        "quantiles",
        "norm",
        "pooling",
    ],
)
def test_what_does_not_rectify_is_no_site(function):
    """Routing, maxout and masks that ask something else are not taken for rectifiers."""
    with pytest.raises(NoActivationSitesError):
        relu_doctor.scan(nn.Sequential(planted(8), Module(function)), inputs(8))


IMMORTAL = [
    nn.LeakyReLU(),
    nn.PReLU(),
    nn.RReLU(),
    nn.ELU(),
    nn.SELU(),
    nn.CELU(),
    nn.GELU(),
    nn.SiLU(),
    nn.Softplus(),
    nn.Mish(),
]


MORTAL = [
    (nn.ReLU(), 0.0, math.inf),
    (nn.ReLU6(), 0.0, 6.0),
    (nn.Hardtanh(0, 2), 0.0, 2.0),
    (nn.Threshold(0.2, 0.0), 0.2, math.inf),
    (nn.Hardswish(), -3.0, math.inf),
    (nn.LeakyReLU(0.0), 0.0, math.inf),
    (nn.RReLU(0.0, 0.0), 0.0, math.inf),
    (nn.Threshold(1, -7.0), 1.0, math.inf),
    (nn.Hardtanh(-2.0, 0.0), -2.0, 0.0),
    (nn.ReLU6(inplace=True), 0.0, 6.0),
]


@pytest.mark.parametrize("module", IMMORTAL, ids=lambda module: type(module).__name__)
def test_what_cannot_die_is_listed_and_measured_and_never_dead(module):
    """A unit with a bias of -100 behind a function without a flat side is listed, and not dead."""
    diagnosis = relu_doctor.scan(nn.Sequential(planted(8), module, nn.Linear(7, 2)), inputs(8), exhaustive=True)
    assert diagnosis.sites["num_units"].tolist() == [7]
    assert dead_units(diagnosis) == [set()]
    assert np.isfinite(diagnosis.units["pre_max"]).all()


@pytest.mark.parametrize(("module", "low", "high"), MORTAL, ids=lambda value: type(value).__name__)
def test_a_module_fires_where_its_slope_is_not_zero(module, low, high):
    """Each module's firing interval is its own."""
    model, x = nn.Sequential(planted(8), module, nn.Linear(7, 2)), inputs(8)
    with torch.no_grad():
        z = model[0](x)
    diagnosis = relu_doctor.scan(model, x, exhaustive=True)
    assert diagnosis.units["inputs_fired"].tolist() == ((z > low) & (z < high)).sum(0).tolist()


@pytest.mark.parametrize("gate", [F.relu, F.silu], ids=["reglu", "swiglu"])
def test_gated_units(gate):
    """The gate of a gated unit is the site; ReGLU's can die, SwiGLU's cannot."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down = planted(8), nn.Linear(8, 7), nn.Linear(7, 8)

        def forward(self, x):
            return self.down(gate(self.gate(x)) * self.up(x))

    diagnosis = relu_doctor.scan(Gated(), inputs(8), exhaustive=True)
    assert dead_units(diagnosis) == [DEAD if gate is F.relu else set()]
