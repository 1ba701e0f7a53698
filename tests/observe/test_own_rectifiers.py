"""The user's own rectifiers: classes that are probed, intervals, functions that tell where they fire, and taps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import relu_doctor
from relu_doctor import Rectifier
from relu_doctor.errors import NoActivationSitesError, UnsupportedModelError
from tests.planted_layers import DEAD, Module, dead_units, inputs, planted


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


def positive(model, x, threshold=0.0) -> list[int]:
    with torch.no_grad():
        return (model[0](x) > threshold).sum(0).tolist()


class Nested(nn.Module):
    """A rectifier that is made of another."""

    def __init__(self):
        super().__init__()
        self.inner, self.act = Halves(), nn.ReLU()

    def forward(self, z):
        return self.act(self.inner(z)) * 2


@pytest.mark.parametrize("given", [[Nested], [Nested, Halves], {Nested: (0, math.inf), Halves: (0, math.inf)}], ids=str)
def test_what_is_inside_of_a_named_module_is_a_part_of_it(given):
    """A rectifier of one's own is counted once, whatever rectifiers it is made of."""
    model, x = nn.Sequential(planted(8), Nested(), nn.Linear(7, 2)), inputs(8)
    diagnosis = relu_doctor.scan(model, x, rectifiers=given, exhaustive=True)
    assert diagnosis.sites["site"].tolist() == ["1"]
    assert diagnosis.units["inputs_fired"].tolist() == positive(model, x)


class Thresholds(nn.Module):
    """A threshold of its own for each unit."""

    def __init__(self, *shape):
        super().__init__()
        self.threshold = nn.Parameter(torch.linspace(-0.5, 30, math.prod(shape)).reshape(shape))

    def forward(self, z):
        return z * (z > self.threshold)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_units_with_thresholds_of_their_own_are_probed_one_by_one(dtype):
    """Each unit of a layer fires above its own threshold, also one beyond the grid."""
    model, x = nn.Sequential(planted(8), Thresholds(7), nn.Linear(7, 2)).to(dtype), inputs(8).to(dtype)
    with torch.no_grad():
        fired = (model[:2](x) != 0).sum(0).tolist()
    diagnosis = relu_doctor.scan(model, list(x.split(20)), rectifiers=[Thresholds], exhaustive=True)
    assert diagnosis.units["inputs_fired"].tolist() == fired
    assert dead_units(diagnosis) == [{unit for unit, count in enumerate(fired) if not count}]
    assert "Thresholds: its slope was probed on [-10, 10], unit by unit" in diagnosis.table.coverage.notes[0]


def test_channels_with_thresholds_of_their_own():
    """Channels lie on the second axis, and the module is made for four."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), Thresholds(4, 1, 1)), torch.randn(9, 3, 6, 6)
    with torch.no_grad():
        fired = (model(x) != 0).flatten(2).any(2).sum(0).tolist()
    diagnosis = relu_doctor.scan(model, x, rectifiers=[Thresholds], exhaustive=True)
    assert diagnosis.units["inputs_fired"].tolist() == fired
    assert min(fired) == 0 < max(fired)


def test_each_instance_is_probed_by_itself():
    """Two modules of one class may differ in their parameters."""

    class Shifted(nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.register_buffer("shift", torch.tensor(shift))

        def forward(self, z):
            return F.relu(z - self.shift)

    model, x = nn.Sequential(planted(8), Shifted(0.2), planted(7), Shifted(-0.5)), inputs(8)
    with torch.no_grad():
        first = model[0](x)
        second = model[2](model[1](first))
    diagnosis = relu_doctor.scan(model, x, rectifiers=[Shifted], exhaustive=True)
    expected = (first > 0.2).sum(0).tolist() + (second > -0.5).sum(0).tolist()
    assert diagnosis.units["inputs_fired"].tolist() == expected


class Counting(nn.Module):
    """Remembers its calls."""

    def __init__(self):
        super().__init__()
        self.calls, self.sizes = 0, []
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, z):
        self.calls += 1
        self.sizes.append(len(z))
        self.seen += 1
        return (z + z.abs()) / 2


def test_probing_leaves_a_module_as_it_was():
    """What a module remembers of its calls is not changed by those of the probing."""
    model = nn.Sequential(planted(8), Counting())
    relu_doctor.scan(model, inputs(8), rectifiers=[Counting], exhaustive=True)
    assert (model[1].calls, model[1].sizes, model[1].seen.item()) == (0, [], 0)


class ByName(nn.Module):
    def forward(self, *, z):
        return (z + z.abs()) / 2


class Several(nn.Module):
    def forward(self, z):
        return {"mask": z > 0, "acts": ((z + z.abs()) / 2,)}


class InPlace(nn.Module):
    def forward(self, z):
        return torch.relu_(z.sub_(0.3))


@pytest.mark.parametrize("how", ["probed", "interval", "fires"])
@pytest.mark.parametrize(
    ("module", "call", "threshold"),
    [
        (ByName(), lambda module, z: module(z=z), 0.0),
        (Several(), lambda module, z: module(z)["acts"][0], 0.0),
        (InPlace(), lambda module, z: module(z), 0.3),
    ],
    ids=["keyword", "dictionary", "in_place"],
)
def test_a_module_may_take_and_return_what_it_likes(module, call, threshold, how):
    """Keyword arguments, tensors inside of what is returned, writing to the input: what it is given is measured."""
    cls = type(module)
    given = {
        "probed": [cls],
        "interval": {cls: (threshold, math.inf)},
        "fires": [Rectifier(cls, fires=lambda pre: pre > threshold)],
    }[how]

    class Calling(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.act, self.last = planted(8), module, nn.Linear(7, 2)

        def forward(self, x):
            return self.last(call(self.act, self.first(x)))

    model, batches = Calling(), list(inputs(8).split(20))
    with torch.no_grad():
        z = torch.cat([model.first(batch) for batch in batches])
    diagnosis = relu_doctor.scan(model, batches, rectifiers=given, exhaustive=True)
    assert diagnosis.units["inputs_fired"].tolist() == (z > threshold).sum(0).tolist()
    assert diagnosis.units["pre_max"].tolist() == pytest.approx(z.amax(0).tolist(), rel=1e-5)


def test_a_class_that_inherits_the_forward_of_a_named_one_is_named_with_it():
    """One that has a forward of its own is remarked on."""

    class Same(Halves):
        pass

    class Other(Halves):
        def forward(self, z):
            return super().forward(z - 1)

    model = nn.Sequential(planted(8), Same(), planted(7), Other())
    diagnosis = relu_doctor.scan(model, inputs(8), rectifiers=[Halves], exhaustive=True)
    assert diagnosis.sites["rectifier"].tolist()[0] == "Same"
    assert any("Other is a Halves with a forward of its own" in note for note in diagnosis.table.coverage.notes)


def test_a_class_that_is_nowhere_in_the_model_is_remarked_on():
    """A name that names nothing is most likely a mistake."""
    diagnosis = relu_doctor.scan(nn.Sequential(planted(8), nn.ReLU()), inputs(8), rectifiers=[Halves])
    assert "rectifiers= names Halves, which is no module of the model" in diagnosis.table.coverage.notes


@pytest.mark.parametrize(
    ("fires", "fired"),
    [
        (lambda pre, post: torch.tensor([True, False] + [True] * 5), [60, 0] + [60] * 5),
        (lambda pre, post: (post > 0).any(-1, keepdim=True), [59] * 7),
        (lambda pre, post: (post > 0).float(), None),
    ],
    ids=["by_unit", "by_input", "numbers"],
)
def test_a_mask_may_be_broadcast(fires, fired):
    """A function that tells where a module fires may say so for whole units, or whole inputs."""
    model, x = nn.Sequential(planted(8), Halves()), inputs(8)
    diagnosis = relu_doctor.scan(model, x, rectifiers=[Rectifier(Halves, fires=fires)], exhaustive=True)
    expected = positive(model, x) if fired is None else fired
    if fired is not None and fired[0] == 59:
        with torch.no_grad():
            expected = [int((model(x) > 0).any(-1).sum())] * 7
    assert diagnosis.units["inputs_fired"].tolist() == expected


def test_an_error_that_the_model_catches_does_not_blind_the_scan():
    """A rectifier of one's own that raises, in a forward that goes on without it, hides nothing that comes after."""

    class Raising(nn.Module):
        def forward(self, z):
            raise ValueError("not today")

    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.act = planted(8), Raising()

        def forward(self, x):
            z = self.first(x)
            try:
                return self.act(z)
            except ValueError:
                return F.relu(z)

    model, batches = Careful(), list(inputs(8).split(20))
    diagnosis = relu_doctor.scan(model, batches, rectifiers={Raising: (0, math.inf)}, exhaustive=True)
    assert dead_units(diagnosis)[-1] == DEAD
    assert diagnosis.sites["rectifier"].tolist()[-1] == "relu"


class Unlike(nn.Module):
    """A rectifier that no call betrays."""

    def forward(self, z):
        return torch.stack([z, torch.zeros_like(z)]).amax(0)


def test_a_look_alike_is_pointed_out():
    """A class of one's own that behaves like a rectifier is named, beside the sites and where there are none."""
    with pytest.raises(NoActivationSitesError, match=r"1 \(Unlike\) looks like a rectifier.*rectifiers=\[Unlike\]"):
        relu_doctor.scan(nn.Sequential(planted(8), Unlike()), inputs(8))
    both = nn.Sequential(planted(8), nn.ReLU(), planted(7), Unlike(), nn.Dropout(), nn.Identity())
    notes = relu_doctor.scan(both, inputs(8)).table.coverage.notes
    assert [note for note in notes if "looks like" in note] == [
        "3 (Unlike) looks like a rectifier and was not measured: name it with rectifiers=[Unlike] or --rectifier"
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


@pytest.mark.parametrize(
    ("tapped", "said"),
    [
        (lambda z: relu_doctor.tap("bad", z, z[:, :1]), "two tensors of one shape, found (60, 7) and (60, 1)"),
        (lambda z: relu_doctor.tap("bad", [z], z), "two tensors of one shape, found list and (60, 7)"),
        (lambda z: relu_doctor.tap("bad", z, z.tanh(), fires=lambda pre, post: 3), "fires= of tap 'bad' must return"),
        (lambda z: relu_doctor.tap("bad", z, z.tanh(), fires=lambda pre, post: 1 / 0), "raised ZeroDivisionError"),
    ],
    ids=["shapes", "list", "no_mask", "raises"],
)
def test_a_wrong_tap_is_told_in_a_sentence(tapped, said):
    """What was expected and what was found."""
    with pytest.raises(UnsupportedModelError) as error:
        relu_doctor.scan(nn.Sequential(planted(8), Module(tapped)), inputs(8))
    assert said in str(error.value)


@pytest.mark.parametrize(
    "function",
    [
        lambda z: relu_doctor.tap("gate", z, F.relu(z)),
        lambda z: relu_doctor.tap("gate", z, z * (z > 0)),
        lambda z: relu_doctor.tap("gate", z, 0.5 * (z + z.abs())),
        lambda z: relu_doctor.tap("gate", z, F.relu(z), fires=lambda pre, post: post > 0),
        lambda z: relu_doctor.tap(name="gate", pre=z, post=F.relu(z).square()),
    ],
    ids=["relu", "gate", "halves", "fires", "keywords"],
)
def test_a_tap_names_what_is_seen_there_and_counts_it_once(function):
    """A rectifier that is recognised and tapped is one site, of the tap's name."""
    model, x = nn.Sequential(planted(8), Module(function), nn.Linear(7, 2)), inputs(8)
    diagnosis = relu_doctor.scan(model, list(x.split(20)), exhaustive=True)
    assert diagnosis.sites["site"].tolist() == ["gate"]
    assert diagnosis.units["inputs_fired"].tolist() == positive(model, x)


def test_a_tap_in_a_loop_a_branch_and_under_one_name_twice():
    """A site is known by what feeds it: one in a loop, two of one name."""

    class Looping(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.step = planted(8), planted(7)

        def forward(self, x):
            z = self.first(x)
            h = relu_doctor.tap("gate", z, torch.sinh(z).clamp(0))
            for _ in range(2 + int(x[0, 0] > 0)):
                z = self.step(h)
                h = relu_doctor.tap("gate", z, torch.sinh(z).clamp(0))
                h.mul_(0.5)  # what is tapped may be written to
            return h

    model, batches = Looping(), list(inputs(8).split(20))
    with torch.no_grad():
        fired = sum((model.first(batch) > 0).sum(0) for batch in batches).tolist()
    diagnosis = relu_doctor.scan(model, batches, exhaustive=True)
    taps = diagnosis.units[diagnosis.units["site"].str.startswith("gate")]
    assert sorted(taps["site"].unique()) == ["gate#1", "gate#2"]
    assert taps["inputs_fired"].tolist()[:7] == fired


def test_a_tap_inside_of_a_named_module_is_a_part_of_it():
    """The module is the rectifier."""

    class Tapping(nn.Module):
        def forward(self, z):
            return relu_doctor.tap("inner", z, (z + z.abs()) / 2)

    model = nn.Sequential(planted(8), Tapping())
    diagnosis = relu_doctor.scan(model, inputs(8), rectifiers=[Tapping], exhaustive=True)
    assert diagnosis.sites["site"].tolist() == ["1"]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_tap_compiles_to_nothing(backend):
    """A compiled forward holds no break for it, and hands its output on, with the gradient."""
    model, x = Tapped(), inputs(8)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    compiled(x).sum().backward()
    assert model.first.weight.grad is not None
    assert dead_units(relu_doctor.scan(compiled, x, exhaustive=True)) == [DEAD]
