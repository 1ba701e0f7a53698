"""Gradients that do not come from units alone: what is told of units is true all the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from relu_doctor.training.monitor import Monitor
from tests.training.loops import batches, perceptron

pytestmark = pytest.mark.filterwarnings("ignore::relu_doctor.errors.DyingUnitsWarning")


def l2(model):
    return 1e-4 * sum(parameter.square().sum() for parameter in model.parameters())


def l1(model):
    return 1e-4 * sum(parameter.abs().sum() for parameter in model.parameters())


def noise(model):
    for parameter in model.parameters():
        parameter.grad.add_(1e-4 * torch.randn_like(parameter.grad))


def trained(model, monitor, optimizers, *, penalty=None, disturb=None, steps=600, plant=lambda step: None, zero=None):
    with monitor:
        for step, (x, y) in enumerate(batches(steps), start=1):
            plant(step)
            for each in [model] if zero is None else zero:
                each.zero_grad()
            loss = F.cross_entropy(model(x), y)
            (loss if penalty is None else loss + penalty(model)).backward()
            if disturb is not None:
                disturb(model)
            for optimizer in optimizers(step):
                optimizer.step()
            monitor.step()
    return monitor.units[monitor.units["site"] == "1"].set_index("unit")


@pytest.mark.parametrize("every", [7, 20])
@pytest.mark.parametrize(
    "what", [{}, {"penalty": l2}, {"penalty": l1}, {"disturb": noise}], ids=["none", "l2", "l1", "noise"]
)
def test_a_penalty_hides_no_death(what, every):
    """Units that are dead from birth, and others that die, are dead; and no unit that fires is."""
    torch.manual_seed(0)
    model = perceptron()
    with torch.no_grad():
        model[0].bias[:3] = -100
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def plant(step: int) -> None:
        if step == 61:
            with torch.no_grad():
                model[0].bias[10:14] = -100

    monitor = Monitor(model, optimizer=optimizer, every=every, window=300)
    units = trained(model, monitor, lambda step: [optimizer], plant=plant, steps=1200, **what)
    silent = [0, 1, 2, 10, 11, 12, 13]
    assert units.loc[silent, "status"].tolist() == ["dead"] * 7
    assert units.loc[[0, 1, 2], "onset"].tolist() == ["born_dead"] * 3
    assert units.loc[[10, 11, 12, 13], "onset"].tolist() == ["died"] * 4
    assert (units.loc[[10, 11, 12, 13], "onset_step"] >= 60 - every).all()
    assert (units.loc[[10, 11, 12, 13], "onset_step"] <= 60).all()
    assert not units.drop(silent)["status"].isin(["dead", "unproven"]).any()
    told = any("only observed forwards tell" in note for note in monitor.diagnosis.table.coverage.notes)
    assert told == bool(what)


@pytest.mark.parametrize("how", ["frozen", "not in the optimizer"])
def test_gradients_that_were_left_behind_count_for_nothing(how):
    """A layer that is frozen, or that no optimizer updates, keeps the last gradient that it had."""
    model = perceptron()
    whole = torch.optim.SGD(model.parameters(), lr=0.01)
    head = torch.optim.SGD(model[4].parameters(), lr=0.01)
    frozen = how == "frozen"

    def plant(step: int) -> None:
        if step == 121 and frozen:
            model[0].requires_grad_(requires_grad=False)
        if step == 131:
            with torch.no_grad():
                model[0].bias[10:14] = -100

    monitor = Monitor(model, optimizer=[whole, head] if frozen else head, every=10, window=200)
    own = trained(
        model,
        monitor,
        lambda step: [whole] if frozen and step <= 120 else [head],
        plant=plant,
        steps=800,
        zero=[model[4]],
    )
    assert own.loc[[10, 11, 12, 13], "status"].tolist() == ["dead"] * 4
    assert own.loc[[10, 11, 12, 13], "onset_step"].between(120, 130).all()


def test_two_optimizers_read_their_own_gradients():
    """Each is asked about what it updates: the other's may be of the step before, and nobody is mistrusted for that."""
    model = perceptron()
    parts = [torch.optim.SGD(model[place].parameters(), lr=0.01) for place in (0, 2)]
    with Monitor(model, optimizer=parts, every=10, window=100) as monitor:
        for step, (x, y) in enumerate(batches(300)):
            part = parts[step % 2]
            part.zero_grad()  # the other's stay, and grow
            F.cross_entropy(model(x), y).backward()
            part.step()
            monitor.step()
    assert not any("only observed forwards tell" in note for note in monitor.diagnosis.table.coverage.notes)


def test_parametrizations_are_not_run_once_more():
    """A weight of code with a state, and of random numbers: the run is the same with a monitor and without."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return F.dropout(weight, 0.1, self.training)

    def run(*, monitored: bool):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(16, 32)), nn.ReLU(), nn.Linear(32, 16), nn.ReLU()
        )
        nn.utils.parametrize.register_parametrization(model[2], "weight", Counting())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        monitor = Monitor(model, optimizer=optimizer, every=5, window=20) if monitored else None
        losses = []
        for x, y in batches(100):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if monitor is not None:
                monitor.step()
        if monitor is not None:
            monitor.close()
            assert monitor.windows == 5
        return losses, [value.clone() for value in model.state_dict().values()], torch.get_rng_state()

    plain, watched = run(monitored=False), run(monitored=True)
    assert plain[0] == watched[0]
    assert all(torch.equal(one, other) for one, other in zip(plain[1], watched[1], strict=True))
    assert torch.equal(plain[2], watched[2])


@pytest.mark.parametrize("penalty", [None, l2], ids=["none", "l2"])
def test_a_compiled_model_is_trusted_where_dropout_drops_others(penalty):
    """Its forwards are observed apart; a rare unit that fired in one of the two only is no reason, a penalty is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.5), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        model[0].bias[:3] = -100
        model[0].bias[8:] = -1
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with Monitor(compiled, optimizer=optimizer, every=5, window=100) as monitor:
        for x, y in batches(400, size=4):
            optimizer.zero_grad()
            loss = F.cross_entropy(compiled(x), y)
            (loss if penalty is None else loss + penalty(model)).backward()
            optimizer.step()
            monitor.step()
    told = any("only observed forwards tell" in note for note in monitor.diagnosis.table.coverage.notes)
    assert told == (penalty is not None)
