"""The run's own numbers: the norm of all gradients is that which clipping would find."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from relu_doctor.training.monitor import Monitor
from relu_doctor.training.numbers import gradient_norm
from tests.training.loops import batches, perceptron
from tests.training.test_monitor import sgd

pytestmark = pytest.mark.filterwarnings("ignore::relu_doctor.errors.DyingUnitsWarning")


def norm_of(parameters):
    """By definition, in float64."""
    gradients = [parameter.grad.to_dense().double().flatten() for parameter in parameters if parameter.grad is not None]
    return float(torch.cat(gradients).norm())


def steps(model, optimizers, monitor, number, told=None):
    """Make some steps; the norms as they are before each update."""
    norms = []
    for x, y in batches(number):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        norms.append(norm_of(model.parameters()))
        for optimizer in optimizers:
            optimizer.step()
        monitor.step(grad_norm=told and told(len(norms)))
    return norms


def test_the_norm_of_all_gradients_is_read_where_a_step_is_observed():
    """Its mean over the steps that were observed in full, of all optimizers together."""
    model = perceptron()
    optimizers = [torch.optim.SGD(model[:2].parameters(), lr=0.05), torch.optim.Adam(model[2:].parameters())]
    with Monitor(model, optimizer=optimizers, every=4, window=12) as monitor:
        norms = steps(model, optimizers, monitor, 24)
    seen = [[norms[at] for at in (0, 1, 2, 4, 8)], [norms[at] for at in (12, 16, 20)]]
    read = monitor.timeline.groupby("window")["grad_norm"].first().tolist()
    assert read == pytest.approx([sum(each) / len(each) for each in seen], rel=1e-5)


@pytest.mark.parametrize(("every", "taken"), [(1, [100, 110]), (3, [102, 111]), (20, [100])])
def test_where_most_steps_are_observed_the_norm_is_taken_at_one_in_ten(every, taken):
    """After the first hundred steps; where few are, at each of them."""
    model = perceptron()
    optimizer = sgd(model)
    with Monitor(model, optimizer=optimizer, every=every, window=20) as monitor:
        norms = steps(model, [optimizer], monitor, 120)
    read = monitor.timeline.groupby("window")["grad_norm"].first().tolist()
    assert read[5] == pytest.approx(sum(norms[at] for at in taken) / len(taken), rel=1e-5)


def test_a_norm_that_the_loop_tells_counts_alone():
    """In a window in which it told any; in others that which was read."""
    model = perceptron()
    optimizer = sgd(model)
    with Monitor(model, optimizer=optimizer, every=1, window=4) as monitor:
        norms = steps(model, [optimizer], monitor, 8, lambda number: 7.5 if number == 2 else None)
    read = monitor.timeline.groupby("window")["grad_norm"].first().tolist()
    assert read == pytest.approx([7.5, sum(norms[4:]) / 4], rel=1e-5)


def test_an_optimizer_with_a_closure_shows_the_gradients_that_it_used():
    """They are made within its step, and read after it."""
    model = perceptron()
    optimizer, norms = sgd(model), []

    def closure(x, y):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        norms.append(norm_of(model.parameters()))
        return loss

    with Monitor(model, optimizer=optimizer, every=1, window=5) as monitor:
        for x, y in batches(5):
            optimizer.step(lambda x=x, y=y: closure(x, y))
            monitor.step()
    assert monitor.timeline["grad_norm"].iloc[0] == pytest.approx(sum(norms) / 5, rel=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_leaves_no_trace_in_the_norm(fused):
    """Whether it unscales the gradients itself or leaves that to a fused optimizer."""
    told = []
    for scale in (1.0, 1024.0):
        model = perceptron()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with Monitor(model, optimizer=optimizer, every=1, window=6) as monitor:
            for x, y in batches(6):
                optimizer.zero_grad()
                scaler.scale(F.cross_entropy(model(x), y)).backward()
                scaler.step(optimizer)
                scaler.update()
                monitor.step()
        told.append(monitor.timeline["grad_norm"].iloc[0])
    assert told[1] == pytest.approx(told[0], rel=1e-4)


def test_sparse_gradients_of_several_types_count_as_what_they_are():
    """Rows that an embedding met twice are summed first; types are mixed."""
    torch.manual_seed(0)
    embedding, linear = nn.Embedding(10, 4, sparse=True), nn.Linear(4, 3).double()
    linear(embedding(torch.tensor([1, 1, 2, 7])).double()).square().sum().backward()
    parameters = [*embedding.parameters(), *linear.parameters()]
    assert not embedding.weight.grad.is_coalesced()
    norm = gradient_norm(torch.optim.SGD(parameters, lr=0.1))
    assert float(norm) == pytest.approx(norm_of(parameters), rel=1e-6)
    assert gradient_norm(torch.optim.SGD(perceptron().parameters(), lr=0.1)) is None


def test_between_observed_steps_the_norm_of_the_watched_gradients_is_told():
    """It is that of the biases behind which a rectifier follows, at the steps at which they are read."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer, norms = torch.optim.SGD(model.parameters(), lr=0.01), []
    windows = []
    with Monitor(model, optimizer=optimizer, every=50, window=60, sinks=[windows.append]) as monitor:
        for _ in range(60):
            optimizer.zero_grad()
            loss = model(torch.randn(32, 8)).square().mean()
            loss.backward()
            norms.append(torch.cat([model[0].bias.grad, model[2].bias.grad]).norm())
            optimizer.step()
            monitor.step(loss=loss)
    assert windows[0].numbers["watched_grad_norm"] == pytest.approx(float(torch.stack(norms).mean()), rel=1e-5)
