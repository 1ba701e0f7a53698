"""A site is the same whichever way a forward takes, and two layers never pass for one."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import relu_doctor


class StochasticDepth(nn.Module):
    """Blocks that training leaves out at random: for a whole batch, or input by input."""

    def __init__(self, *, per_input: bool) -> None:
        super().__init__()
        self.per_input = per_input
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6)) for _ in range(4))
        with torch.no_grad():
            for index, block in enumerate(self.blocks):
                block[0].bias[index] = -100

    def forward(self, x):
        for block in self.blocks:
            kept = torch.rand(len(x), 1) < 0.5 if self.per_input else torch.rand(1) < 0.5
            if not self.training:
                x = x + block(x)
            elif self.per_input:
                x = x + block(x) * kept / 0.5
            elif kept:
                x = x + block(x) / 0.5
        return x


def test_blocks_left_out_at_random_keep_their_sites():
    """In train mode each block is one site, on the batches that it was kept for, with its own dead unit."""
    torch.manual_seed(0)
    model, batches = StochasticDepth(per_input=False), [torch.randn(8, 6) for _ in range(24)]
    diagnosis = relu_doctor.scan(model, batches, mode="train", exhaustive=True)
    inputs = diagnosis.units.groupby("site")["inputs"].first()
    assert inputs.index.tolist() == [f"blocks.{index}.1" for index in range(4)]
    assert ((inputs % 8 == 0) & (inputs > 0) & (inputs < 192)).all()
    dead = {site: mask.nonzero().flatten().tolist() for site, mask in diagnosis.mask("dead").items()}
    assert dead == {f"blocks.{index}.1": [index] for index in range(4)}


def test_blocks_dropped_input_by_input_see_every_input():
    """A factor of zero after a block takes no input away from it."""
    torch.manual_seed(0)
    diagnosis = relu_doctor.scan(StochasticDepth(per_input=True), torch.randn(40, 6), mode="train")
    assert set(diagnosis.units["inputs"]) == {40}
    assert diagnosis.sites["silent"].tolist() == [1] * 4


class Routed(nn.Module):
    """Experts of equal shape under one rectifier; the first feature of a batch says which of them are called."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.act = nn.ModuleList(nn.Linear(6, 5) for _ in range(3)), nn.ReLU()

    def forward(self, x):
        calls = [int(digit) for digit in str(int(x[0, 0]))]
        return sum(self.act(self.experts[call - 1](x)) for call in calls)


def batches_of(*calls: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, 6, generator=generator) for _ in calls]
    for batch, call in zip(batches, calls, strict=True):
        batch[:, 0] = call
    return batches


def test_layers_met_late_or_in_another_order_are_their_own():
    """Whatever is called when, each layer counts the batches that it was called on, however often."""
    torch.manual_seed(0)
    expected = {"act#1": 32, "act#2": 32, "act#3": 24}
    calls = (1, 12, 21, 3, 321, 233)
    for order in (calls, calls[::-1], (321, *calls[:4], 233)):
        diagnosis = relu_doctor.scan(Routed(), batches_of(*order))
        assert diagnosis.units.groupby("site")["inputs"].first().to_dict() == expected
        positions = diagnosis.units.groupby("site")["positions"].first().to_dict()
        assert positions == {**expected, "act#3": 32}  # twice on the last batch


def test_branches_of_equal_shape_do_not_share_their_dead_units():
    """relu((a if c else b)(x)): what is dead in one branch may be alive in the other."""

    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 5)
            with torch.no_grad():
                self.a.bias[1] = self.b.bias[3] = -100

        def forward(self, x):
            return F.relu((self.a if x[0, 0] > 1 else self.b)(x))

    torch.manual_seed(0)
    diagnosis = relu_doctor.scan(Either(), batches_of(1, 2, 2, 1, 1), exhaustive=True)
    dead = {site: mask.nonzero().flatten().tolist() for site, mask in diagnosis.mask("dead").items()}
    assert dead == {"relu()#1": [1], "relu()#2": [3]}
    assert diagnosis.units.groupby("site")["inputs"].first().to_dict() == {"relu()#1": 16, "relu()#2": 24}
