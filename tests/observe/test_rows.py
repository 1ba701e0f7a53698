"""Rows of a selection are counted as the inputs that they belong to, or are said not to be told."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

import relu_doctor


class PaddedExperts(nn.Module):
    """Tokens of padded sentences, routed by their number; padding is routed like any token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.experts = nn.Embedding(30, 6), nn.ModuleList(nn.Linear(6, 5) for _ in range(2))

    def forward(self, input_ids, attention_mask=None):
        flat, ids = self.embed(input_ids).flatten(0, 1), input_ids.flatten()
        out = flat.new_zeros(len(flat), 5)
        for index, expert in enumerate(self.experts):
            rows = (ids % 2 == index).nonzero()[:, 0]
            out[rows] = F.relu(expert(flat[rows]))
        return out


def test_padding_that_is_routed_counts_for_nothing():
    """An expert's inputs are those that sent it a token that is no padding."""
    torch.manual_seed(0)
    ids = torch.randint(0, 30, (12, 6))
    mask = torch.arange(6) < torch.randint(1, 7, (12, 1))
    units = relu_doctor.scan(PaddedExperts(), [{"input_ids": ids, "attention_mask": mask.long()}]).units
    for index in (0, 1):
        mine = (ids % 2 == index) & mask
        own = units[units["site"] == f"relu()#{index + 1}"]
        assert own["inputs"].tolist() == [int(mine.any(1).sum())] * 5
        assert own["positions"].tolist() == [int(mine.sum())] * 5


class Scattered(nn.Module):
    """A layer on rows that are put in an order which nothing that selects rows has made."""

    def __init__(self, order) -> None:
        super().__init__()
        self.linear, self.order = nn.Linear(6, 4), order

    def forward(self, x):
        return F.relu(self.linear(self.order(x)))


def test_rows_that_are_mixed_up_beyond_recognition_are_said_to_be():
    """Rows that nothing shows the inputs of count as no more inputs than they must be of, with a remark."""

    def order(x):  # half of the tokens, by a product with a matrix of zeros and ones
        flat = x.reshape(-1, 6)
        places = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))
        return (places == torch.arange(len(flat) // 2 + 1).unsqueeze(1)).float() @ flat

    diagnosis = relu_doctor.scan(Scattered(order), torch.randn(10, 7, 6))
    assert diagnosis.units["inputs"].tolist() == [6] * 4  # 36 rows, of which 7 at most are one input's
    assert any("which rows belong to which input does not show" in note for note in diagnosis.table.coverage.notes)


def test_a_selection_of_what_is_flattened_position_by_position_is_not_taken_for_inputs():
    """Where a rehearsal shows that rows are not those that they seem to be, none is ascribed to an input."""

    def order(x):
        flat = x.transpose(0, 1).reshape(-1, 6)
        return flat[flat[:, 0] > 0]

    x = torch.randn(10, 7, 6)
    diagnosis = relu_doctor.scan(Scattered(order), x)
    rows = int((x[..., 0] > 0).sum())
    assert diagnosis.units["inputs"].tolist() == [-(-rows // 7)] * 4
    assert any("does not show" in note for note in diagnosis.table.coverage.notes)


def test_a_slice_and_a_permutation_keep_their_inputs():
    """Rows taken out of order are counted under the ordinals of their inputs."""
    x = torch.zeros(9, 6)
    x[5, 0] = 1
    for order in (
        lambda x: x[torch.arange(len(x) - 1, -1, -1)],
        lambda x: x[1:],
        lambda x: x.flip(0)[:-1],
        lambda x: x.roll(1, 0)[torch.arange(len(x)) != 1],
        lambda x: x.index_select(0, torch.tensor([len(x) * 2 // 3 - 1, 0])),
        lambda x: x.split([1, len(x) - 1])[1],
        lambda x: torch.cat([x[2:], x[:2]]),
    ):
        model = Scattered(order)
        with torch.no_grad():
            model.linear.weight.copy_(torch.eye(4, 6))
            model.linear.bias.fill_(-0.5)
        units = relu_doctor.scan(model, [-x, x], exhaustive=True).units
        assert units.loc[0, ["inputs_fired", "first_fired"]].tolist() == [1, 14]


def test_weights_that_the_data_choose_have_no_units_of_their_own():
    """Where each input picks its own weights, the site is said not to be observed."""

    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights, self.head = nn.Parameter(torch.randn(3, 6, 4)), nn.Linear(4, 5)

        def forward(self, x):
            route = (x[:, 0] * 10).long().abs() % 3
            return F.relu(self.head(F.relu(torch.einsum("bi,bio->bo", x, self.weights[route]))))

    diagnosis = relu_doctor.scan(Chosen(), torch.randn(20, 6))
    assert diagnosis.summary["unobserved_sites"] == ["relu()#1"]
    assert diagnosis.table.sites[0].note.startswith("the data choose the weights")


class LastOne(nn.Module):
    """Rectifies one position of each sequence, by the length that it is given."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 5)

    def forward(self, x, lengths):
        return F.relu(self.layer(x)[torch.arange(len(x)), lengths - 1])


class Packed(LastOne):
    """Packs sequences of the lengths that it is given, for a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.RNN(6, 5, nonlinearity="relu", batch_first=True)

    def forward(self, x, lengths):
        return self.layer(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[1]


@pytest.mark.parametrize("model", [LastOne(), Packed()], ids=["last", "packed"])
def test_rows_that_lengths_pick_keep_their_inputs(model):
    """Lengths are data: of one position, and of packed steps, each input counts once, in batches of any size."""
    generator = torch.Generator().manual_seed(1)
    sizes = (9, 7, 5)
    batches = [
        (torch.randn(size, 6, 6, generator=generator), torch.randint(1, 7, (size,), generator=generator))
        for size in sizes
    ]
    diagnosis = relu_doctor.scan(model, batches)
    assert diagnosis.units["inputs"].tolist() == [sum(sizes)] * 5
    assert not any("does not show" in note for note in diagnosis.table.coverage.notes)


class ManyExperts(nn.Module):
    """Tokens routed to more experts than a few inputs have tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.router, self.experts = nn.Linear(6, 12), nn.ModuleList(nn.Linear(6, 5) for _ in range(12))

    def forward(self, x):
        flat = x.flatten(0, 1)
        route, out = self.router(flat).argmax(-1), flat.new_zeros(len(flat), 5)
        for index, expert in enumerate(self.experts):
            out[route == index] = F.relu(expert(flat[route == index]))
        return out.view(*x.shape[:2], 5)


def test_tokens_of_many_experts_are_counted_under_their_inputs():
    """Each expert sees as many inputs as have a token for it, along the first axis."""
    model, x = ManyExperts(), torch.randn(96, 2, 6, generator=torch.Generator().manual_seed(1))
    diagnosis = relu_doctor.scan(model, x.split(12))
    seen = [int((model.router(x).argmax(-1) == index).any(1).sum()) for index in range(12)]
    observed = diagnosis.units.groupby("site", sort=False)["inputs"].first()
    assert sorted(observed) == sorted(count for count in seen if count)
