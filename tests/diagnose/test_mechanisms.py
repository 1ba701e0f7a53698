"""Mechanisms: each planted cause is named, and no other; where nothing can be told, nothing is claimed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import relu_doctor
from tests.planting import normal
from tests.zoo import CASES, BasicBlock, Dense, settled

N = 1000


def linear(inputs: int, outputs: int, **rows: Tensor | float) -> nn.Linear:
    """A linear layer; ``bias_2=-4.0`` and ``weight_2=…`` set single rows."""
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        for name, value in rows.items():
            kind, row = name.rsplit("_", 1)
            getattr(layer, kind)[int(row)] = value
    return layer


def data(*shape: int, mean: float = 0.0) -> Tensor:
    return torch.randn(N, *shape, generator=torch.Generator().manual_seed(3)) + mean


def mechanisms(model: nn.Module, x: Tensor, site: str, **arguments) -> dict[int, str]:
    """Mechanism of each silent unit of one site."""
    diagnosis = relu_doctor.scan(model.eval(), x, exhaustive=True, **arguments)
    rows = diagnosis.units[(diagnosis.units["site"] == site) & diagnosis.units["status"].isin(["dead", "unproven"])]
    return dict(zip(rows["unit"], rows["mechanism"], strict=True))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def test_zero_weights():
    """A row of zeros with a bias of at most zero; with a positive bias it fires."""
    model = nn.Sequential(
        linear(6, 4, weight_1=0.0, bias_1=-0.5, weight_2=0.0, bias_2=0.5, weight_3=0.0, bias_3=0.0), nn.ReLU()
    )
    assert mechanisms(model, data(6), "1") == {1: "zero_weights", 3: "zero_weights"}


def test_zero_weights_by_a_pruning_mask():
    """The mask counts, not the weights that lie beneath it."""
    model = nn.Sequential(linear(6, 4, bias_1=-0.5), nn.ReLU())
    mask = torch.ones(4, 6)
    mask[1] = 0
    prune.custom_from_mask(model[0], "weight", mask)
    assert mechanisms(model, data(6), "1") == {1: "zero_weights"}


@pytest.mark.parametrize("reads", ["input", "conv", "relu"])
def test_gamma_of_zero_behind_a_batch_norm(reads):
    """A channel scaled by zero has zero weights, whatever the norm reads: a layer, raw inputs, another site."""
    layers = {"input": [], "conv": [nn.Linear(4, 4)], "relu": [nn.Linear(4, 4), nn.ReLU()]}[reads]
    model = settled(nn.Sequential(*layers, nn.BatchNorm1d(4), nn.ReLU()), data(4))
    with torch.no_grad():
        model[-2].weight[2], model[-2].bias[2] = 0, -0.1
    assert mechanisms(model, data(4), str(len(model) - 1)) == {2: "zero_weights"}


def test_a_zero_row_beside_a_residual_is_no_zero_weights():
    """Where a branch is added in without a weight, zero weights do not explain a silent unit."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = linear(4, 4), linear(4, 4, weight_1=0.0, bias_1=-50.0)

        def forward(self, x):
            x = F.relu(self.first(x))
            return F.relu(self.second(x) + x)

    assert mechanisms(Residual(), data(4), "relu()#2") == {1: "negative_bias"}


def test_a_batch_norm_over_a_sum_with_a_residual_is_no_zero_weights():
    """Behind a norm the residual counts as well: only gamma weighs all of it."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.bn = (
                linear(4, 4, bias_2=1.0),
                linear(4, 4, weight_2=0.0, bias_2=0.0),
                nn.BatchNorm1d(4),
            )

        def forward(self, x):
            x = F.relu(self.first(x))
            return F.relu(self.bn(self.second(x) + x))

    model = settled(Residual(), data(4))
    with torch.no_grad():
        model.bn.bias[2] = -20
    assert mechanisms(model, data(4), "relu()#2") == {2: "normalization"}


def test_dead_upstream_blames_the_earliest_silent_site():
    """A layer behind two layers that went silent points at the first."""
    model = nn.Sequential(linear(6, 5), nn.ReLU(), linear(5, 4), nn.ReLU(), linear(4, 3), nn.ReLU())
    with torch.no_grad():
        model[0].bias[:] = -100
        for layer in (model[2], model[4]):
            layer.bias[:] = -0.1
    diagnosis = relu_doctor.scan(model, data(6), exhaustive=True)
    assert diagnosis.units.groupby("site")["mechanism"].unique().map(list).to_dict() == {
        "1": ["negative_bias"], "3": ["dead_upstream"], "5": ["dead_upstream"],
    }  # fmt: skip
    findings = [finding for finding in diagnosis.findings if finding.code == "RD202"]
    assert [finding.site for finding in findings] == ["3", "5"]
    assert all("of 1," in finding.title for finding in findings)


def test_a_unit_that_reads_dead_units_alone_is_dead_upstream():
    """Also where the site that feeds it is silent only in part."""
    model = nn.Sequential(linear(6, 5, bias_0=-100.0, bias_1=-100.0), nn.ReLU(), linear(5, 4, bias_3=-1.0), nn.ReLU())
    with torch.no_grad():
        model[2].weight[3, 2:] = 0
    assert mechanisms(model, data(6), "3")[3] == "dead_upstream"


def test_dead_upstream_behind_another_rectifier_and_behind_a_norm():
    """The silence of a unit is passed on by a rectifier or a norm that follows it directly."""
    model = nn.Sequential(linear(6, 4, bias_1=-100.0), nn.ReLU(), nn.ReLU(), nn.BatchNorm1d(4), nn.ReLU())
    with torch.no_grad():
        model[3].bias[1] = -1
    assert mechanisms(model, data(6), "2") == {1: "dead_upstream"}
    assert mechanisms(model, data(6), "4")[1] == "dead_upstream"


def test_constant_inputs():
    """Inputs that do not vary, with no silent layer before them."""
    x = data(6)
    x[:, 3] = 2.0
    weight = torch.zeros(6)
    weight[3] = -1
    model = nn.Sequential(linear(6, 4, weight_2=weight, bias_2=-0.1), nn.ReLU())
    assert mechanisms(model, x, "1") == {2: "constant_inputs"}


def test_normalization():
    """beta over |gamma| far below what a normalised input reaches; gamma may be negative."""
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), data(3, 5, 5))
    with torch.no_grad():
        model[1].weight[0], model[1].bias[0] = 0.5, -4.0
        model[1].weight[3], model[1].bias[3] = -0.5, -4.0
    assert mechanisms(model, data(3, 5, 5), "2") == {0: "normalization", 3: "normalization"}


def test_stale_running_statistics_are_an_input_offset():
    """Behind BatchNorm in eval mode the offset is the gap to the running mean; the finding says so."""
    model = settled(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU()), data(6))
    model[1].running_mean[2] += 100
    assert mechanisms(model, data(6), "2") == {2: "input_offset"}
    findings = relu_doctor.scan(model, data(6), exhaustive=True).findings
    assert any("running statistics" in finding.advice for finding in findings if finding.code == "RD206")


def plane(offset: float, bias: float) -> nn.Module:
    """One unit with std 1 that reads inputs of mean 1: its pre-activation is N(offset + bias, 1)."""
    weight = torch.tensor([1.0, *[0.0] * 5])
    layer = linear(6, 2, weight_0=weight, bias_0=bias)
    model = nn.Sequential(layer, nn.ReLU())
    model.offset = offset
    return model


@pytest.mark.parametrize(
    ("offset", "bias", "mechanism"),
    [
        (0.5, -6.0, "negative_bias"),  # max z is about offset + bias + 3.2
        (-6.0, 0.5, "input_offset"),
        (-2.0, -2.0, "bias_or_offset"),
        (-5.0, -5.0, "bias_and_offset"),
        (-0.5, -6.0, "negative_bias"),
        (-6.0, -0.5, "input_offset"),
    ],
)
def test_bias_and_offset(offset, bias, mechanism):
    """max z = O + b + R: what is set to zero to revive the unit names what holds it down."""
    x = data(6)
    x[:, 0] += offset
    assert mechanisms(plane(offset, bias), x, "1")[0] == mechanism
    units = relu_doctor.scan(plane(offset, bias), x).units.iloc[0]
    assert units["offset"] == pytest.approx(offset, abs=0.1)
    assert units["bias"] == bias
    assert units["pre_max"] == pytest.approx(units["offset"] + units["bias"] + units["reach"], abs=1e-5)


def test_the_bias_of_a_residual_sum_is_the_sum_of_its_producers():
    """Both biases count, and so do both betas of a downsampling block."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = linear(6, 4, bias_1=-30.0), linear(6, 4, bias_1=-20.0)

        def forward(self, x):
            return F.relu(self.a(x) + self.b(x))

    diagnosis = relu_doctor.scan(Sum(), data(6))
    assert diagnosis.units.loc[1, ["bias", "mechanism"]].tolist() == [-50.0, "negative_bias"]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = BasicBlock(3, 4, True)

        def forward(self, x):
            return self.block(x)

    model = settled(Net(), data(3, 6, 6))
    with torch.no_grad():
        model.block.bn2.bias[1], model.block.downsample[1].bias[1] = -30, -20
    units = relu_doctor.scan(model, data(3, 6, 6)).units.set_index(["site", "unit"])
    assert units.loc[("block.relu#2", 1), "bias"] == -50
    assert units.loc[("block.relu#2", 1), "mechanism"] in {"negative_bias", "normalization"}


def test_centred_inputs_revive_exactly_the_offset_cases():
    """What the mechanism promises comes true: with the mean taken from the inputs, units held by it fire."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(N, 20, generator=generator) + 2.0
    layer = nn.Linear(20, 200)
    with torch.no_grad():
        layer.bias.uniform_(-2, 2)
    model = nn.Sequential(layer, nn.ReLU())
    held = mechanisms(model, x, "1")
    centred = relu_doctor.scan(model, x - x.mean(0), exhaustive=True).units["inputs_fired"]
    with torch.no_grad():
        kept = layer.bias.clone()
        layer.bias.zero_()
        without = relu_doctor.scan(model, x, exhaustive=True).units["inputs_fired"]
        layer.bias.copy_(kept)
    assert {"input_offset", "bias_or_offset"} <= set(held.values())
    for unit, mechanism in held.items():
        assert (centred[unit] > 0) == (mechanism in {"input_offset", "bias_or_offset"}), (unit, mechanism)
        assert (without[unit] > 0) == (mechanism in {"negative_bias", "bias_or_offset"}), (unit, mechanism)


def test_gaussian_units_die_as_often_as_the_formula_says():
    """std 1 and a bias of -3.5 or -3: silent on 1,000 inputs with chance .792 and .259; a zero bias revives all."""
    generator = torch.Generator().manual_seed(0)
    weight = F.normalize(torch.randn(400, 600, generator=generator), dim=1)
    x = torch.randn(1000, 600, generator=generator)
    for bias, share in ((-3.5, 0.792), (-3.0, 0.259)):
        model = nn.Sequential(nn.Linear(600, 400), nn.ReLU())
        with torch.no_grad():
            model[0].weight.copy_(weight)
            model[0].bias.fill_(bias)
        diagnosis = relu_doctor.scan(model, x)
        assert diagnosis.summary["silent_fraction"] == pytest.approx(share, abs=0.06)
        assert set(diagnosis.units.loc[diagnosis.units["inputs_fired"] == 0, "mechanism"]) <= {
            "negative_bias",
            "bias_or_offset",  # the mean of a sample is not exactly zero
        }
        with torch.no_grad():
            model[0].bias.zero_()
        assert relu_doctor.scan(model, x).summary["silent"] == 0


@pytest.mark.parametrize(("ratio", "share"), [(5, 0.259), (10, 0.373)])
def test_inputs_far_from_zero_kill_as_often_as_the_formula_says(ratio, share):
    """Normal weights, zero bias, ||mean||/||std|| of 5 and 10: dead .259 and .373, all by the offset; centred, none."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 100, generator=generator)
    model = nn.Sequential(nn.Linear(100, 2000, bias=False), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(2000, 100, generator=generator))
    direction = F.normalize(torch.randn(100, generator=generator), dim=0)
    shifted = x + ratio * 100**0.5 * direction  # ||std|| of the inputs is the root of their 100 features
    diagnosis = relu_doctor.scan(model, shifted)
    assert diagnosis.summary["silent_fraction"] == pytest.approx(share, abs=0.03)
    assert set(diagnosis.units.loc[diagnosis.units["inputs_fired"] == 0, "mechanism"]) == {"input_offset"}
    assert relu_doctor.scan(model, x).summary["silent"] == 0


def test_units_that_fire_on_three_percent_are_never_dead():
    """Of units that each fire on 3 % of 5,000 inputs, none is dead, unproven or rare."""
    x = torch.rand(5000, 60, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(60, 60), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(60))
        model[0].bias.fill_(-0.97)
    assert set(relu_doctor.scan(model, x).units["status"]) == {"active"}


def test_a_batch_norm_far_enough_below_zero_is_silent_in_train_mode_on_any_batch():
    """beta = -|gamma| sqrt(B - 1) cannot be passed by any batch of B values (Samuelson)."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    batch = 8
    with torch.no_grad():
        model[0].bias.fill_(-((batch - 1) ** 0.5) * (1 + 1e-4))
    wild = torch.zeros(50, batch, 3)
    wild[:, 0] = 1e3
    wild[25:] = torch.randn(25, batch, 3) ** 5
    diagnosis = relu_doctor.scan(model, list(wild), mode="train", exhaustive=True)
    assert diagnosis.summary["dead"] == 3


def test_saturated():
    """Stuck above the upper edge, with slope zero: neither dead nor active."""
    model = nn.Sequential(linear(6, 4, bias_2=100.0, bias_1=-100.0), nn.ReLU6())
    units = relu_doctor.scan(model, data(6), exhaustive=True).units
    assert units["status"].tolist() == ["active", "dead", "saturated", "active"]
    assert units["mechanism"].tolist() == ["", "negative_bias", "saturated", ""]


def test_between_both_flat_sides_without_ever_firing():
    """A hardtanh unit that jumps over its slope is silent, and no mechanism of the low side is claimed for it."""
    model = nn.Sequential(linear(1, 1, weight_0=100.0, bias_0=0.0), nn.Hardtanh(0, 1))
    x = torch.tensor([[-1.0], [1.0]]).repeat(50, 1) + torch.arange(100)[:, None] * 1e-4
    units = relu_doctor.scan(model, x, exhaustive=True).units
    assert units["status"].tolist() == ["dead"]
    assert units["mechanism"].tolist() == ["unknown"]


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: F.relu(0.1 * m.a(x) - 50),
        lambda m, x: F.relu(torch.tanh(m.a(x)) - 50),
        lambda m, x: F.relu(m.a(x) * torch.sigmoid(m.b(x)) - 50),
    ],
    ids=["scaled", "squashed", "gated"],
)
def test_where_the_decomposition_does_not_apply_no_mechanism_is_claimed(forward):
    """A bias that does not reach the pre-activation unscaled says nothing."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x):
            return forward(self, x)

    found = mechanisms(Own(), data(6), "relu()")
    assert set(found.values()) == {"unknown"}
    assert len(found) == 4


def test_one_input_or_the_minimal_statistics_tell_no_mechanism_of_the_decomposition():
    """One value has no spread, and without a mean there is no offset."""
    model = nn.Sequential(linear(6, 3, bias_0=-100.0, bias_1=-100.0, bias_2=-100.0), nn.ReLU())
    assert set(mechanisms(model, data(6)[:1], "1").values()) == {"unknown"}
    assert set(mechanisms(model, data(6), "1", statistics="minimal").values()) == {"unknown"}


def test_the_margin_is_how_far_the_nearest_input_stayed_away():
    """margin = -max z / std z of a silent unit, from the firing edge where that is not zero; empty for others."""
    model = nn.Sequential(linear(6, 3, bias_0=-9.0), nn.ReLU())
    units = relu_doctor.scan(model, data(6)).units
    assert units.loc[0, "margin"] == pytest.approx(-units.loc[0, "pre_max"] / units.loc[0, "pre_std"])
    assert units.loc[0, "margin"] > 0
    assert units["margin"].isna().tolist() == [False, True, True]
    swish = relu_doctor.scan(nn.Sequential(model[0], nn.Hardswish()), data(6)).units
    assert swish.loc[0, "margin"] == pytest.approx((-3 - units.loc[0, "pre_max"]) / units.loc[0, "pre_std"])


def test_dormancy_averages_one_and_is_no_death():
    """Scores average exactly 1 per site; a unit at 0.02 of the mean is 0.025-dormant and not dead."""
    x = torch.rand(500, 4, generator=torch.Generator().manual_seed(0)) + 0.5
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.015])))
    diagnosis = relu_doctor.scan(model, x, config={"dormancy_tau": 0.025})
    np.testing.assert_allclose(diagnosis.units.groupby("site")["dormancy"].mean(), 1)
    assert diagnosis.units["status"].tolist() == ["active"] * 3 + ["dormant"]
    assert set(relu_doctor.scan(model, x).units["status"]) == {"active"}


def test_columns_of_a_densenet_read_the_norm_next_to_the_rectifier():
    """gamma and beta are those of the norm; bias is beta; weight_l2 is that of the layers that write each channel."""
    model = settled(Dense(), normal(3, 5, 5)()[0])
    with torch.no_grad():
        model.norm3.weight.uniform_(0.5, 2)
        model.norm3.bias.uniform_(-1, 1)
    units = relu_doctor.scan(model, normal(3, 5, 5)()).units
    rows = units[units["site"] == "relu()#3"]
    np.testing.assert_allclose(rows["gamma"], model.norm3.weight.detach(), rtol=1e-6)
    np.testing.assert_allclose(rows["beta"], model.norm3.bias.detach(), rtol=1e-6)
    np.testing.assert_allclose(rows["bias"], model.norm3.bias.detach(), rtol=1e-6)
    norms = torch.cat([layer.weight.flatten(1).norm(dim=1) for layer in (model.stem, model.conv1, model.conv2)])
    np.testing.assert_allclose(rows["weight_l2"], norms.detach(), rtol=1e-5)


def test_a_residual_stream_counts_every_layer_that_adds_to_it():
    """Behind the norm, weight_l2 is that of all layers before, each by its own way and not by another's."""
    model, batches = CASES["residual_stream"].build()
    diagnosis = relu_doctor.scan(model, batches)
    assert [site.decomposable for site in diagnosis.table.sites] == [True] * 3
    rows = diagnosis.units[diagnosis.units["site"] == "blocks.2.1"]
    layers = [model.stem, model.blocks[0][2], model.blocks[1][2]]
    squares = sum(layer.weight.detach().flatten(1).norm(dim=1) ** 2 for layer in layers)
    np.testing.assert_allclose(rows["weight_l2"] ** 2, squares, rtol=1e-5)
