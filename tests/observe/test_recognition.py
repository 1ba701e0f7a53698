"""Every way to apply a rectifier: written out, in autograd functions, through a top-k, by modules of one's own."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

import relu_doctor
from relu_doctor import Rectifier
from relu_doctor.errors import NoActivationSitesError, UnsupportedModelError

DEAD, ONCE = {1, 4}, {2}
SPECIAL = 17  # the one input on which the once-unit fires


def inputs(*shape: int, num_inputs: int = 60):
    """Normal inputs whose last feature is zero but in one of them."""
    x = torch.randn(num_inputs, *shape, generator=torch.Generator().manual_seed(0))
    x[..., -1] = 0
    x[SPECIAL, ..., -1] = 1
    return x


def planted(in_features: int, units: int = 7) -> nn.Linear:
    """Units 1 and 4 never fire; unit 2 only on the special input; the others on about half."""
    torch.manual_seed(1)
    layer = nn.Linear(in_features, units)
    with torch.no_grad():
        layer.weight[:, -1] = 0
        layer.bias[sorted(DEAD)] = -100.0
        layer.weight[2] = 0
        layer.weight[2, -1] = 50.0
        layer.bias[2] = -10.0
    return layer


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = planted(8), nn.Linear(7, 3), function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


class Jump(torch.autograd.Function):
    """A JumpReLU with a straight-through gradient for its threshold, as sparse autoencoders train it."""

    @staticmethod
    def forward(ctx, x, threshold):
        ctx.save_for_backward(x, threshold)
        return x * (x > threshold).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        x, threshold = ctx.saved_tensors
        return gradient * (x > threshold), None


def by_index(z):
    z = z.clone()
    z[z < 0] = 0
    return z


def in_place_times_mask(z):
    z = z.clone()
    return z.mul_(z > 0)


def relu_above_its_own_threshold(z):
    acts = F.relu(z)
    return acts * (acts > 0.3)


def read_twice(z):
    acts = F.relu(z)
    return acts * 0.5 + acts.topk(1).values


def top_k_of_relu(z):
    acts = F.relu(z)
    top = acts.topk(2, sorted=False, dim=-1)
    return torch.zeros_like(acts).scatter_(dim=-1, index=top.indices, src=top.values)


def relu_of_top_k(z):
    values, indices = torch.topk(z, k=3, dim=-1)
    result = torch.zeros_like(z)
    result.scatter_(-1, indices, F.relu(values))
    return result


def relu_of_scattered(z):
    values, indices = z.topk(3)
    return torch.zeros_like(z).scatter(-1, indices, values).relu()


def plain_top_k(z):
    values, indices = z.topk(2)
    return z.new_zeros(z.shape).scatter(-1, indices, values)


def batch_top_k(z):
    acts = F.relu(z).flatten()
    top = acts.topk(2 * len(z), dim=-1)
    return torch.zeros_like(acts).scatter(-1, top.indices, top.values).reshape(z.shape)


def masked_top_k(z):
    indices = z.topk(2).indices
    return z * torch.zeros_like(z).scatter_(-1, indices, 1.0)


def by_kth_value(z):
    return z * (z >= z.topk(2).values[..., -1:])


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
}
SELECTING = {
    "jump": lambda z: Jump.apply(z, torch.tensor(0.3)),
    "above_a_threshold": lambda z: z * (z > 0.3),
    "relu_above_a_threshold": lambda z: F.relu(z) * (z > 0.3),
    "relu_above_its_own_threshold": relu_above_its_own_threshold,
    "threshold_from_the_left": lambda z: torch.where(torch.full((7,), 0.3) < z, z, 0),
    "top_k_of_relu": top_k_of_relu,
    "relu_of_top_k": relu_of_top_k,
    "relu_of_scattered": relu_of_scattered,
    "plain_top_k": plain_top_k,
    "batch_top_k": batch_top_k,
    "masked_top_k": masked_top_k,
    "by_kth_value": by_kth_value,
}


def dead_units(diagnosis) -> list[set[int]]:
    return [set(mask.nonzero().flatten().tolist()) for mask in diagnosis.mask("dead").values()]


def fires_by_output(function, z) -> torch.Tensor:
    """Bool (inputs, units): where a function's output is not zero at any position."""
    fired = function(z.clone()) != 0
    return fired.reshape(len(z), -1, z.shape[-1]).any(1)


@pytest.mark.parametrize("shape", [(8,), (5, 8)], ids=["features", "sequences"])
@pytest.mark.parametrize("name", [*RECTIFYING, *SELECTING])
def test_a_unit_fires_where_its_output_is_not_zero(name, shape):
    """Each way of writing a rectifier is one site, whose firings are those of the stored outputs."""
    function = {**RECTIFYING, **SELECTING}[name]
    model, x = Net(function), inputs(*shape)
    batches = list(x.split(20))
    with torch.no_grad():
        fired = torch.cat([fires_by_output(function, model.first(batch)) for batch in batches])
    diagnosis = relu_doctor.scan(model, batches, exhaustive=True)
    assert len(diagnosis.sites) == 1
    assert diagnosis.units["inputs_fired"].tolist() == fired.sum(0).tolist()
    assert fired[:, 2].nonzero().flatten().tolist() == [SPECIAL]
    assert set((fired.sum(0) == 0).nonzero().flatten().tolist()) == set(*dead_units(diagnosis)) >= DEAD
    first = diagnosis.units["first_fired"].fillna(-1).astype(int).tolist()
    assert first == [int(column.nonzero()[0]) if column.any() else -1 for column in fired.T]


@pytest.mark.parametrize("name", sorted(SELECTING))
def test_minimal_statistics_count_what_is_selected(name):
    """statistics="minimal" sees the same firings."""
    model, x = Net(SELECTING[name]), inputs(8)
    full, minimal = (relu_doctor.scan(model, x, statistics=kind, exhaustive=True) for kind in ("full", "minimal"))
    assert full.units["inputs_fired"].tolist() == minimal.units["inputs_fired"].tolist()
    assert dead_units(full) == dead_units(minimal)


def test_a_unit_that_is_positive_but_never_selected_is_dead():
    """What a ReLU lets pass and the top-k behind it never selects gets no gradient, and the report says so."""
    model = Net(top_k_of_relu)
    with torch.no_grad():
        model.first.weight[6] = 0
        model.first.bias[6] = 1e-3  # always positive, always outdone
    x = inputs(8)
    with torch.no_grad():
        fired = fires_by_output(top_k_of_relu, model.first(x))
        x = x[fired[:, [0, 3, 5]].sum(1) >= 2]  # two others fire, so that the constant is not among the top two
    diagnosis = relu_doctor.scan(model, x, exhaustive=True)
    unit = diagnosis.units.iloc[6]
    assert (unit["status"], unit["mechanism"], unit["pre_max"] > 0) == ("dead", "not_selected", True)


def test_a_relu_that_is_also_read_past_its_top_k_fires_where_it_is_positive():
    """A gradient reaches it on the other way."""
    model = Net(lambda z: top_k_of_relu(z) + F.relu(z) * 0.5)
    both = Net(read_twice)
    x = inputs(8)
    with torch.no_grad():
        positive = (model.first(x) > 0).sum(0).tolist()
    assert relu_doctor.scan(both, x, exhaustive=True).units["inputs_fired"].tolist() == positive
    assert len(relu_doctor.scan(model, x, exhaustive=True).sites) == 1  # one set of producers, one site


def test_a_learned_threshold_per_unit_decides():
    """JumpReLU fires above its own threshold, unit by unit."""

    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = planted(8), nn.Linear(7, 8)
            self.log_threshold = nn.Parameter(torch.linspace(-3, 1, 7))

        def forward(self, x):
            z = self.first(x)
            return self.last(Jump.apply(z, self.log_threshold.exp()))

    model, x = Sparse(), inputs(8)
    with torch.no_grad():
        expected = (model.first(x) > model.log_threshold.exp()).sum(0).tolist()
    diagnosis = relu_doctor.scan(model, x, exhaustive=True)
    assert diagnosis.units["inputs_fired"].tolist() == expected
    assert dead_units(diagnosis) == [{unit for unit, count in enumerate(expected) if count == 0}] != [DEAD]


def test_top_k_over_channels_of_a_convolution():
    """Which unit a chosen value belongs to is told on any axis."""

    class Channels(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 6, 3)
            with torch.no_grad():
                self.conv.bias[[1, 4]] = -100.0

        def forward(self, x):
            acts = self.conv(x).relu()
            values, indices = acts.topk(1, dim=1)
            return torch.zeros_like(acts).scatter(1, indices, values)

    model, x = Channels(), torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        fired = (model(x) != 0).flatten(2).any(2)
    diagnosis = relu_doctor.scan(model, x, exhaustive=True)
    assert diagnosis.units["inputs_fired"].tolist() == fired.sum(0).tolist()
    assert fired.any(0).sum() < 6


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
    ],
    ids=["routing", "one_hot", "leaky", "maxout", "foreign_mask", "clamp_elsewhere", "fixed_mask"],
)
def test_what_does_not_rectify_is_no_site(function):
    """Routing, maxout and masks that ask something else are not taken for rectifiers."""
    with pytest.raises(NoActivationSitesError):
        relu_doctor.scan(nn.Sequential(planted(8), Module(function)), inputs(8))


class Module(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


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


class Halves(nn.Module):
    """A rectifier that no call betrays."""

    def forward(self, z):
        return z * (torch.tanh(z * 1e4) + 1) / 2


class GatedHalf(nn.Module):
    """Half of its input, where the other half is positive."""

    def forward(self, z):
        value, gate = z.chunk(2, -1)
        return value * gate.sign().clamp(0, 1)


@pytest.mark.parametrize(
    "given",
    [
        [Halves],
        {Halves: (0, math.inf)},
        [Rectifier(Halves)],
        [Rectifier(Halves, fires=lambda pre, post: post != 0)],
        [Rectifier(Halves, fires=lambda pre: pre > 0)],
        [Rectifier(Halves, fires=lambda pre, post, module: (post > 0) & isinstance(module, Halves))],
    ],
    ids=["class", "interval", "rectifier", "fires", "fires_by_pre", "fires_by_module"],
)
def test_modules_of_ones_own(given):
    """A module is named by its class, its interval or a function that tells where it fires."""
    diagnosis = relu_doctor.scan(nn.Sequential(planted(8), Halves()), inputs(8), rectifiers=given, exhaustive=True)
    assert dead_units(diagnosis) == [DEAD]
    assert diagnosis.units["inputs_fired"].tolist()[2] == 1


def test_a_probed_interval_is_told():
    """The zero-slope region that autograd shows is printed."""

    class Shifted(nn.Module):
        def forward(self, z):
            return F.relu(z + 1.5)

    diagnosis = relu_doctor.scan(nn.Sequential(planted(8), Shifted()), inputs(8), rectifiers=[Shifted])
    assert "Shifted: its slope was probed on [-10, 10]: fires where z > -1.5" in diagnosis.table.coverage.notes


def test_units_of_the_output_where_a_module_halves_its_input():
    """A function that tells firing in the output's shape makes the output's units the site's."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 14), GatedHalf()), inputs(8)
    with torch.no_grad():
        model[0].bias[[8, 11]] = -100.0
        fired = (model(x) != 0).sum(0).tolist()
    gate = Rectifier(GatedHalf, fires=lambda pre, post: post != 0)
    diagnosis = relu_doctor.scan(model, x, rectifiers=[gate], exhaustive=True)
    assert diagnosis.units["inputs_fired"].tolist() == fired
    assert dead_units(diagnosis) == [{1, 4}]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([3], "expects nn.Module classes"),
        ({Halves: 3}, "(low, high) with low < high"),
        ({Halves: (1, 0)}, "(low, high) with low < high"),
        ([Rectifier(Halves, fires=lambda pre: 3)], "must return a boolean tensor of the shape of its input (60, 7)"),
        ([Rectifier(Halves, fires=lambda pre: 1 / 0)], "raised ZeroDivisionError"),
        ([Rectifier("relu")], "expects nn.Module classes"),
    ],
    ids=["number", "no_pair", "empty_interval", "no_mask", "raises", "name"],
)
def test_a_wrong_rectifier_is_told_in_a_sentence(given, said):
    """What was expected and what was found."""
    with pytest.raises(UnsupportedModelError) as error:
        relu_doctor.scan(nn.Sequential(planted(8), Halves()), inputs(8), rectifiers=given)
    assert said in str(error.value)


def test_a_look_alike_is_pointed_out():
    """A class of one's own that behaves like a rectifier is named, beside the sites and where there are none."""
    with pytest.raises(NoActivationSitesError, match=r"1 \(Halves\) looks like a rectifier.*rectifiers=\[Halves\]"):
        relu_doctor.scan(nn.Sequential(planted(8), Halves()), inputs(8))
    both = nn.Sequential(planted(8), nn.ReLU(), planted(7), Halves(), nn.Dropout(), nn.Identity())
    notes = relu_doctor.scan(both, inputs(8)).table.coverage.notes
    assert [note for note in notes if "looks like" in note] == [
        "3 (Halves) looks like a rectifier and was not measured: name it with rectifiers=[Halves] or --rectifier"
    ]


class Tapped(nn.Module):
    def __init__(self, fires=None):
        super().__init__()
        self.first, self.fires = planted(8), fires

    def forward(self, x):
        z = self.first(x)
        return relu_doctor.tap("gate", z, (z + z.abs()) / 2, fires=self.fires)


def test_a_tap_is_a_site_in_a_scan_and_nothing_outside():
    """A tap names a place in any forward; outside a scan it hands its output back."""
    model, x = Tapped(), inputs(8)
    with torch.no_grad():
        z = model.first(x)
        assert torch.equal(model(x), (z + z.abs()) / 2)
    diagnosis = relu_doctor.scan(model, x, exhaustive=True)
    assert diagnosis.sites["site"].tolist() == ["gate"]
    assert dead_units(diagnosis) == [DEAD]
    assert diagnosis.units["inputs_fired"].tolist() == (z > 0).sum(0).tolist()
    above = relu_doctor.scan(Tapped(lambda pre, post: post > 1), x, exhaustive=True)
    assert above.units["inputs_fired"].tolist() == (z > 1).sum(0).tolist()


def test_a_tap_of_two_shapes_is_refused():
    """pre and post must be of one shape."""

    class Bad(nn.Module):
        def forward(self, x):
            return relu_doctor.tap("bad", x, x[:, :1])

    with pytest.raises(UnsupportedModelError, match="two tensors of one shape"):
        relu_doctor.scan(Bad(), inputs(8))


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


class Recurrent(nn.Module):
    def __init__(self, **arguments):
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.RNN(8, 5, nonlinearity="relu", batch_first=True, **arguments)
        for name, parameter in self.rnn.named_parameters():
            if "bias_ih" in name:
                with torch.no_grad():
                    parameter[1] = -100.0

    def forward(self, x):
        return self.rnn(x)[0]


@pytest.mark.parametrize("arguments", [{}, {"bias": False}, {"num_layers": 2, "bidirectional": True}])
def test_a_recurrent_layer_fires_where_its_output_is_positive(arguments):
    """nn.RNN with ReLU: a site per layer and direction; columns that need pre-activations are empty."""
    model, x = Recurrent(**arguments), inputs(6, 8)
    with torch.no_grad():
        last = (model(x) > 0).any(1).sum(0)
    diagnosis = relu_doctor.scan(model, x, exhaustive=True)
    directions = 2 if arguments.get("bidirectional") else 1
    assert len(diagnosis.sites) == directions * arguments.get("num_layers", 1)
    assert diagnosis.units["inputs_fired"].tolist()[-5 * directions :] == last.tolist()
    assert diagnosis.units[["pre_max", "pre_min", "pre_mean", "pre_std"]].isna().all(axis=None)
    assert all("only its outputs are seen" in site.note for site in diagnosis.table.sites)
    if arguments.get("bias", True):
        assert all(1 in dead for dead in dead_units(diagnosis))
        assert diagnosis.units["bias"].notna().all()


def test_the_inner_layers_of_a_recurrent_stack_are_those_of_the_layer_alone():
    """What only the next layer reads is computed as the layer by itself computes it."""
    model, x = Recurrent(num_layers=3), inputs(6, 8)
    first = nn.RNN(8, 5, nonlinearity="relu", batch_first=True)
    first.load_state_dict({k: v for k, v in model.rnn.state_dict().items() if k.endswith("l0")})
    with torch.no_grad():
        expected = (first(x)[0] > 0).any(1).sum(0).tolist()
    diagnosis = relu_doctor.scan(model, x, exhaustive=True)
    assert diagnosis.units["inputs_fired"].tolist()[:5] == expected


def test_packed_sequences_count_no_padding():
    """Of packed sequences each counts its own steps."""

    class Packed(Recurrent):
        def forward(self, x):
            lengths = torch.tensor([6] * 30 + [2] * (len(x) - 30)) if len(x) > 30 else torch.tensor([6] * len(x))
            return self.rnn(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))[1]

    diagnosis = relu_doctor.scan(Packed(), inputs(6, 8), exhaustive=True)
    assert set(diagnosis.units["positions"]) == {30 * 6 + 30 * 2}
    assert dead_units(diagnosis)[0] >= {1}


def test_a_recurrent_cell_is_one_site_over_its_steps():
    """nn.RNNCell with ReLU, over numbers of steps that vary from batch to batch."""

    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.cell = nn.RNNCell(8, 5, nonlinearity="relu")
            with torch.no_grad():
                self.cell.bias_ih[1] = -100.0

        def forward(self, x):
            state, states = None, []
            for step in x.unbind(1):
                state = self.cell(step, state)
                states.append(state)
            return torch.stack(states, 1)

    model, batches = Cell(), [inputs(6, 8), inputs(3, 8), inputs(6, 8)]
    with torch.no_grad():
        fired = sum((model(batch) > 0).any(1).sum(0) for batch in batches)
    diagnosis = relu_doctor.scan(model, batches, exhaustive=True)
    assert diagnosis.units["inputs_fired"].tolist() == fired.tolist()
    assert diagnosis.units["site"].unique().tolist() == ["cell"]


def test_no_activation_outlives_a_scan():
    """Ledgers and modes hold activations weakly: with the scan over, none is alive."""
    import gc
    import weakref

    kept: list[weakref.ref] = []

    def keep(z):
        kept.append(weakref.ref(z))
        return top_k_of_relu(z)

    relu_doctor.scan(Net(keep), inputs(8))
    gc.collect()
    assert kept
    assert all(reference() is None for reference in kept)
