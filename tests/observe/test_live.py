"""LiveProbe: forwards of a run are observed, each once, whichever way they take."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relu_doctor.observe.live import PHASE, LiveProbe


class TwoWays(nn.Module):
    """One of two branches, which may write to its input first."""

    def __init__(self, *, writes: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.drop, self.writes = nn.Linear(6, 8), nn.Linear(6, 5), nn.Dropout(0.5), writes

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """(inputs, 6) to (inputs, 8) or (inputs, 5)."""
        if self.writes:
            x.mul_(2)
        return F.relu(self.drop((self.b if other[0] else self.a)(x)))


def inputs_seen(model: nn.Module, forwards: int) -> list[int]:
    """Of each site, in a run that alternates between its ways."""
    with LiveProbe(model, lambda: True) as live:
        for step in range(forwards):
            model(torch.randn(4, 6), torch.full((4,), step % 2 == 1)).sum().backward()
        assert live.failures == {}
        assert len(live.probe.known.notes) == model.writes
        told = sum(count for _, count in live.take_digests())
        stats = live.probe.stats[PHASE]
        found = [int(stats[site.site_id].inputs.max()) for site in live.probe.sites() if site.site_id in stats]
        assert told == sum(found) == live.num_inputs
    return found


def test_ways_that_alternate_are_all_counted():
    """A forward that takes a way for the first time counts as well, and the next one need not take it again."""
    assert inputs_seen(TwoWays(), 10) == [20, 20]


def test_a_forward_that_wrote_to_its_inputs_is_not_made_again_on_them():
    """Where its inputs are no more what they were, the forward of an unknown way does not count; that is noted."""
    assert inputs_seen(TwoWays(writes=True), 3) == [8]


def test_the_random_numbers_and_gradients_of_the_run_are_its_own():
    """What a new way costs leaves no trace."""
    left = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = TwoWays()
        live = LiveProbe(model, lambda: True)
        if watched:
            live.__enter__()
        for step in range(6):
            model(torch.randn(4, 6), torch.full((4,), step % 2 == 1)).sum().backward()
        live.close()
        left.append([torch.rand(3), *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*left, strict=True))
