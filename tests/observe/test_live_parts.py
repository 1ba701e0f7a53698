"""Models that are never called as a whole: the outermost call of any of their modules is a forward."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from relu_doctor.training.monitor import Monitor


class Pieces(nn.Module):
    """Two networks, one of which has the other's forward inside, a loss, and a rectifier of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
        self.head = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 1))
        self.norm, self.relu = nn.BatchNorm1d(8), nn.ReLU()
        self.loss = nn.MSELoss()


def run(model, monitor=None, steps=20):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    generator, losses = torch.Generator().manual_seed(0), []
    with monitor(optimizer) if monitor else torch.enable_grad() as watching:
        for _ in range(steps):
            x = torch.randn(8, 6, generator=generator)
            loss = model.loss(model.head(model.norm(model.body(x))), x[:, :1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            with torch.no_grad():
                model.body(x)
            if monitor:
                watching.step()
    return losses, watching


def test_each_outermost_call_is_observed_once_and_nothing_changes():
    """Names are those of the whole model, inputs are counted once, and the run with its statistics is the same run."""
    plain, watched = Pieces(), Pieces()
    losses, _ = run(plain)
    found, monitor = run(
        watched, lambda optimizer: Monitor(watched, optimizer=optimizer, every=1, window=20, parts=True)
    )
    assert found == losses
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True)
    )
    assert monitor.sites["site"].tolist() == ["body.1", "body.2.1", "head.1"]
    assert monitor.units["inputs"].unique().tolist() == [160]
    assert monitor.diagnosis.table.coverage.distinct_inputs == 160
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in watched.modules())


def test_a_rectifier_between_the_calls_is_named():
    """What feeds it is not seen, and the report says so."""
    model = Pieces()
    with Monitor(model, every=1, window=3, parts=True) as monitor:
        for _ in range(3):
            model.head(model.relu(model.body(torch.randn(8, 6)))).sum().backward()
            monitor.step()
    assert any(note.startswith("relu is called between modules") for note in monitor.diagnosis.table.coverage.notes)


def test_an_interrupted_call_does_not_swallow_the_next():
    """After a KeyboardInterrupt inside a part, the next step is observed as usual."""
    model, fail = Pieces(), [False]

    class Fails(nn.Module):
        def forward(self, x):
            if fail[0]:
                raise KeyboardInterrupt
            return x

    model.body.append(Fails())
    with Monitor(model, every=1, window=10, parts=True) as monitor:
        for step in range(10):
            fail[0] = step == 4
            if fail[0]:
                with pytest.raises(KeyboardInterrupt):
                    model.body(torch.randn(8, 6))
            else:
                model.head(model.body(torch.randn(8, 6))).sum().backward()
            monitor.step()
    assert monitor.units["inputs"].unique().tolist() == [72]


@pytest.mark.parametrize("parts", [False, True])
def test_a_copy_of_a_watched_model_is_not_watched(parts):
    """Copied or pickled in the midst of a run, as averages of weights and checkpoints do: nothing of it is counted."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
    with Monitor(model, every=1, window=5, parts=parts) as monitor:
        for _ in range(5):
            model(torch.randn(8, 6)).sum().backward()
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
                copied(torch.randn(100, 6)).sum().backward()
            monitor.step()
    assert monitor.units["inputs"].unique().tolist() == [40]
