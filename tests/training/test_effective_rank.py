"""The effective rank of a site's outputs: what numpy finds on outputs that were taken by other means."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relu_doctor.observe.forwards.outputs import MOST, OutputRows
from relu_doctor.training.effective_rank import effective_rank
from relu_doctor.training.history import History
from relu_doctor.training.monitor import Monitor

pytestmark = pytest.mark.filterwarnings("ignore::relu_doctor.errors.DyingUnitsWarning")


def by_numpy(rows: Tensor) -> float:
    """Roy and Vetterli's formula, written out."""
    values = np.linalg.svd(rows.detach().double().numpy(), compute_uv=False)
    shares = values[values > 0] / values.sum()
    return math.exp(-(shares * np.log(shares)).sum())


def last_of(calls: list[Any], count: int = 1) -> Tensor:
    """The rows of the last calls, units last."""
    return torch.cat([each.reshape(-1, each.shape[-1]) for each in calls[-count:]])


def trained(
    model: nn.Module, inputs: Callable[[int], Any], steps: int = 12, rectifier: str = "relu", **options: Any
) -> tuple[Monitor, list[Tensor]]:
    """A run of which every step is observed, and what a rectifier module of it put out, call by call, units last.

    Args:
        model: trained to put out little.
        inputs: arguments of a step's forward, a tuple.
        steps: to make.
        rectifier: path of the module.
        options: of the monitor.
    """
    outputs: list[Tensor] = []
    module = model.get_submodule(rectifier)
    module.register_forward_hook(lambda module, args, output: outputs.append(output.detach().clone()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    options = {"every": 1, "window": steps, "effective_rank": True} | options
    with Monitor(model, optimizer=optimizer, **options) as monitor:
        for step in range(steps):
            optimizer.zero_grad()
            model(*inputs(step)).square().mean().backward()
            optimizer.step()
            monitor.step()
    return monitor, outputs


def noise(step: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(step))


class Layers(nn.Module):
    """A layer, a rectifier module and a head, with what lies between."""

    def __init__(self, layer: nn.Module, head: nn.Module, relu: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.relu, self.head = layer, relu or nn.ReLU(), head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.layer(x)))


def found(monitor: Monitor, site: str = "relu") -> float:
    return float(monitor.sites.set_index("site").loc[site, "effective_rank"])


@pytest.mark.parametrize("relu", [nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.1), nn.Hardswish(), nn.GELU()])
def test_of_a_perceptron(relu):
    """A row is an input; rectifiers that write in place, or do not clip, as well."""
    torch.manual_seed(0)
    monitor, outputs = trained(Layers(nn.Linear(9, 20), nn.Linear(20, 2), relu), lambda step: (noise(step, 50, 9),))
    assert found(monitor) == pytest.approx(by_numpy(outputs[-1]))
    assert 1 < found(monitor) <= 20


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_of_images(memory_format):
    """A row is a place in an image, in whatever order it lies in memory."""
    torch.manual_seed(0)
    model = Layers(nn.Conv2d(3, 7, 3, padding=1), nn.Sequential(nn.Flatten(), nn.Linear(7 * 25, 2)))
    model = model.to(memory_format=memory_format)
    inputs = [noise(step, 8, 3, 5, 5).contiguous(memory_format=memory_format) for step in range(12)]
    monitor, outputs = trained(model, lambda step: (inputs[step],))
    assert found(monitor) == pytest.approx(by_numpy(last_of([outputs[-1].movedim(1, -1)])))


def test_of_sequences():
    """(B, T, C): a row is a step of a sequence."""
    torch.manual_seed(0)
    monitor, outputs = trained(Layers(nn.Linear(6, 12), nn.Linear(12, 2)), lambda step: (noise(step, 4, 10, 6),))
    assert found(monitor) == pytest.approx(by_numpy(last_of(outputs)))


class Masked(Layers):
    """Sequences with padding, which a mask tells."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return super().forward(x) * attention_mask[..., None]


def test_padding_is_left_out():
    """Rows that a mask takes for padding have no part in it."""
    torch.manual_seed(0)
    mask = torch.arange(10) < torch.tensor([10, 3, 6, 1])[:, None]
    outputs: list[Tensor] = []
    model = Masked(nn.Linear(6, 12), nn.Linear(12, 2))
    model.relu.register_forward_hook(lambda module, args, output: outputs.append(output.detach().clone()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, optimizer=optimizer, every=1, window=10, effective_rank=True) as monitor:
        for step in range(10):
            model(noise(step, 4, 10, 6), attention_mask=mask).square().mean().backward()
            optimizer.step()
            monitor.step()
    expected = by_numpy(outputs[-1][mask])
    assert expected != pytest.approx(by_numpy(last_of(outputs)), rel=1e-3)
    assert found(monitor) == pytest.approx(expected)


class Shared(nn.Module):
    """One cell that is called at each step of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.relu, self.head = nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(sum(self.relu(self.cell(each)) for each in x.unbind(1)))


def test_all_calls_of_a_forward_have_a_part():
    """A module that is called several times on one set of weights is one site."""
    torch.manual_seed(0)
    monitor, outputs = trained(Shared(), lambda step: (noise(step, 7, 5, 6),))
    assert found(monitor) == pytest.approx(by_numpy(last_of(outputs, 5)))


class Recurrent(nn.Module):
    """A layer of torch's own that rectifies in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.RNN(6, 12, nonlinearity="relu", batch_first=True), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.states = self.rnn(x)[0]
        return self.head(self.states)


def test_of_a_recurrent_layer_in_one_call():
    """Its outputs are seen, if not its pre-activations."""
    torch.manual_seed(0)
    model = Recurrent()
    monitor, _ = trained(model, lambda step: (noise(step, 4, 10, 6),), rectifier="head")
    assert found(monitor, "rnn") == pytest.approx(by_numpy(last_of([model.states])))


def test_one_direction_is_one_and_no_output_is_none():
    """Planted: all rows are multiples of one; a site of dead units has 0."""
    torch.manual_seed(0)
    one, none = Layers(nn.Linear(1, 8), nn.Linear(8, 2)), Layers(nn.Linear(1, 8), nn.Linear(8, 2))
    with torch.no_grad():
        one.layer.weight.copy_(torch.rand(8, 1) + 0.5)
        one.layer.bias.zero_()
        none.layer.bias.fill_(-100)
    one.layer.requires_grad_(False)
    assert found(trained(one, lambda step: (noise(step, 50, 1).abs(),))[0]) == pytest.approx(1, abs=1e-5)
    assert found(trained(none, lambda step: (noise(step, 50, 1),))[0]) == 0
    assert effective_rank(torch.outer(torch.arange(1.0, 30), torch.arange(1.0, 9))) == pytest.approx(1.0, abs=1e-12)
    assert effective_rank(torch.eye(7)) == pytest.approx(7)


def test_what_cannot_be_told_is_nan():
    """No rows, values that are not finite, a site whose outputs a top-k goes on to choose from, and without asking."""

    class Chooses(Layers):
        def forward(self, x: Tensor) -> Tensor:
            z = self.relu(self.layer(x))
            top = z.topk(3)
            return self.head(torch.zeros_like(z).scatter(-1, top.indices, top.values))

    torch.manual_seed(0)
    assert math.isnan(effective_rank(torch.empty(0, 3)))
    assert math.isnan(effective_rank(torch.tensor([[1.0, torch.nan]])))
    monitor, _ = trained(Chooses(nn.Linear(9, 20), nn.Linear(20, 2)), lambda step: (noise(step, 50, 9),))
    assert math.isnan(found(monitor))
    monitor, _ = trained(
        Layers(nn.Linear(9, 20), nn.Linear(20, 2)), lambda step: (noise(step, 50, 9),), effective_rank=False
    )
    assert math.isnan(found(monitor))
    assert monitor._live.probe.outputs == {}


def test_it_is_of_the_last_forward_that_was_observed(tmp_path):
    """Each window has its own, and those between two observed steps have no part; the history keeps it."""
    torch.manual_seed(0)
    options = {"every": 5, "window": 12, "history": tmp_path / "run"}
    monitor, outputs = trained(
        Layers(nn.Linear(9, 20), nn.Linear(20, 2)), lambda step: (noise(step, 50, 9),), steps=24, **options
    )
    told = monitor.timeline["effective_rank"].tolist()
    assert told == [pytest.approx(by_numpy(outputs[step - 24])) for step in (10, 20)]  # learning comes first
    assert History.read(tmp_path / "run").timeline["effective_rank"].tolist() == told


def test_a_compiled_model_is_observed_apart():
    """The forward that is made beside the compiled one has the same outputs."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Layers(nn.Linear(9, 20), nn.Linear(20, 2))
    weights: list[Tensor] = []
    inputs = [noise(step, 50, 9) for step in range(6)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    compiled = torch.compile(model, backend="eager")
    with Monitor(compiled, optimizer=optimizer, every=1, window=6, effective_rank=True) as monitor:
        for x in inputs:
            weights = [model.layer.weight.detach().clone(), model.layer.bias.detach().clone()]
            compiled(x).square().mean().backward()
            optimizer.step()
            monitor.step()
    assert found(monitor) == pytest.approx(by_numpy(F.linear(inputs[-1], *weights).relu()))


def test_the_run_is_the_same_run():
    """Weights and random numbers are bit-identical with and without, also with dropout and shared rectifiers."""
    left = []
    for wanted in (False, True):
        torch.manual_seed(3)
        model = Layers(
            nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)),
            nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(6 * 16, 2)),
            nn.ReLU(inplace=True),
        )
        trained(model, lambda step: (noise(step, 16, 1, 4, 4),), steps=30, window=10, effective_rank=wanted)
        left.append([*model.state_dict().values(), torch.rand(3)])
    assert all(torch.equal(one, other) for one, other in zip(*left, strict=True))


# Which rows are taken


@pytest.mark.parametrize(("inputs", "positions"), [(32, 1024), (32, 50176), (1, 3000), (5000, 1)])
def test_rows_are_taken_evenly(inputs, positions):
    """Exactly as many as may be, no two distances far apart, and from all columns of an image 32 wide."""
    rows = OutputRows()
    place = torch.arange(inputs * positions).reshape(inputs, 1, positions)
    rows.take([place[:3], place[3:]], (inputs, 1, positions), None)
    taken = rows.values().flatten()
    gaps = taken.diff()
    assert len(taken) == MOST
    assert len(gaps.unique()) <= 3
    assert int(gaps.max()) <= 4 * inputs * positions / MOST
    assert len((taken % 32).unique()) == 32


def test_many_calls_are_taken_like_one():
    """What is kept does not depend on how the rows came, and is never much more than what is kept in the end."""
    values = torch.randn(40_000, 3)
    whole, parts = OutputRows(), OutputRows()
    whole.take([values[:, :, None]], (40_000, 3, 1), None)
    for part in values.split(64):
        parts.take([part[:, :, None]], (len(part), 3, 1), None)
        assert sum(len(each) for each in parts._rows) <= 2 * MOST
    parts.thin()
    one, other = (sorted(each.values().tolist()) for each in (whole, parts))
    assert one == other
