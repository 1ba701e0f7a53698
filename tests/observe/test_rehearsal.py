"""Which values belong to which input, and which positions are padding, is tried out, not guessed from shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import relu_doctor

FIRED = ["inputs", "inputs_fired", "first_fired", "last_fired"]


class Detector(nn.Module):
    """Unit 0 fires where the first feature is positive; ``shape`` decides the layout before the rectifier."""

    def __init__(self, shape) -> None:
        super().__init__()
        self.linear, self.shape = nn.Linear(3, 4), shape
        with torch.no_grad():
            self.linear.weight[0], self.linear.bias[0] = torch.tensor([1.0, 0, 0]), 0.0

    def forward(self, x, other=None):
        return F.relu(self.linear(self.shape(x) if other is None else self.shape(x, other)))


def sequences(inputs: int, positions: int, at: list[tuple[int, int]]) -> Tensor:
    """Sequences on which unit 0 fires at the named places only."""
    x = torch.randn(inputs, positions, 3, generator=torch.Generator().manual_seed(0))
    x[:, :, 0] = -1
    for row, position in at:
        x[row, position, 0] = 1
    return x


@pytest.mark.parametrize(
    ("shape", "positions"),
    [
        (lambda x: x, 7),
        (lambda x: x.reshape(-1, 3), 7),
        (lambda x: x.transpose(0, 1), 7),
        (lambda x: x.transpose(0, 1), 16),
        (lambda x: x.transpose(0, 1).reshape(-1, 3), 7),
    ],
    ids=["rows first", "flattened", "time first", "square", "flattened time first"],
)
def test_inputs_are_counted_in_every_layout(shape, positions):
    """One input that fires at two positions is one input, with its own ordinal."""
    diagnosis = relu_doctor.scan(Detector(shape), sequences(16, positions, [(5, 3), (5, 6)]))
    assert diagnosis.units.loc[0, FIRED].tolist() == [16, 1, 5, 5]


def test_a_second_tensor_that_broadcasts_does_not_hide_the_inputs():
    """A positional tensor of one row is no second kind of input."""
    model = Detector(lambda x, other: (x + other).transpose(0, 1))
    diagnosis = relu_doctor.scan(
        model, [(sequences(16, 16, [(5, 3)]), torch.zeros(1, 16, 3))], forward=lambda m, b: m(*b)
    )
    assert diagnosis.units.loc[0, FIRED].tolist() == [16, 1, 5, 5]


def test_two_views_of_one_input_are_one_input():
    """Views that are stacked behind each other interleave."""
    views = sequences(50, 1, [(12, 0)])[:, 0]
    model = Detector(lambda a, b: torch.cat([a, b]))
    diagnosis = relu_doctor.scan(model, [(views, views.clone())], forward=lambda m, b: m(*b))
    assert diagnosis.units.loc[0, FIRED].tolist() == [50, 1, 12, 12]


def test_rows_that_cannot_be_attributed_are_no_more_inputs_than_there_are():
    """3,000 selected tokens of ten sequences prove nothing dead."""
    model = Detector(lambda x: x[x[..., 1] > -2])
    with torch.no_grad():
        model.linear.bias[1] = -100.0
    diagnosis = relu_doctor.scan(model, torch.randn(10, 300, 3))
    assert diagnosis.units.loc[1, ["status", "inputs"]].tolist() == ["unproven", 10]


class Tokens(nn.Module):
    """Unit 0 fires on token 7; a second branch has as many positions as there are tokens."""

    def __init__(self, *, time_first: bool = False) -> None:
        super().__init__()
        self.embed, self.up, self.conv = nn.Embedding(20, 4), nn.Linear(4, 6), nn.Conv2d(1, 2, 1)
        self.time_first = time_first
        with torch.no_grad():
            self.embed.weight[:, 0], self.embed.weight[7, 0] = -1.0, 1.0
            self.up.weight[0], self.up.bias[0] = torch.tensor([1.0, 0, 0, 0]), 0.0
            self.conv.weight[0], self.conv.bias[0] = 1.0, 0.0

    def forward(self, ids, pixels, attention_mask=None):
        hidden = self.embed(ids)
        if self.time_first:
            hidden = hidden.transpose(0, 1).reshape(-1, 4)
        return F.relu(self.up(hidden)), F.relu(self.conv(pixels))


@pytest.mark.parametrize("time_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_padding_is_masked_where_it_lies_and_nowhere_else(time_first, dtype):
    """Firing on padding alone is silence; a feature map of as many positions keeps all of its own."""
    ids = torch.randint(8, 20, (100, 9), generator=torch.Generator().manual_seed(0))
    ids[:, 7] = 7  # padding
    ids[40:44, 2] = 7
    mask = torch.ones(100, 9, dtype=dtype)
    mask[:, 5:] = 0
    pixels = -torch.ones(100, 1, 3, 3)
    pixels[:, :, 2, 2] = 1  # the last of nine positions
    batches = [
        {"ids": ids[part : part + 25], "pixels": pixels[part : part + 25], "attention_mask": mask[part : part + 25]}
        for part in range(0, 100, 25)
    ]
    units = relu_doctor.scan(Tokens(time_first=time_first), batches).units.set_index(["site", "unit"])
    text, image = units.index.levels[0]
    assert units.loc[(text, 0), [*FIRED, "positions"]].tolist() == [100, 4, 40, 43, 500]
    assert units.loc[(image, 0), ["inputs_fired", "positions"]].tolist() == [100, 900]


def test_sites_stand_in_forward_order_also_when_a_branch_is_met_late():
    """A branch that a later batch takes first stands behind the site that was called before it."""

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            h = F.relu(self.a(x))
            if x.mean() > 0:
                h = F.relu(self.b(h))
            return F.relu(self.c(h))

    diagnosis = relu_doctor.scan(Branching(), [-torch.ones(4, 3), torch.ones(4, 3)])
    assert diagnosis.sites["producer"].tolist() == ["a", "b", "c"]


def test_a_layer_and_its_negative_are_two_sites():
    """relu(z) and relu(-z) die apart."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 4)
            with torch.no_grad():
                self.a.bias[1] = -100.0

        def forward(self, x):
            z = self.a(x)
            return torch.cat([F.relu(z), F.relu(-z)], dim=1)

    diagnosis = relu_doctor.scan(Both(), torch.randn(900, 3))
    assert diagnosis.sites["dead"].tolist() == [1, 0]


def test_what_a_first_batch_of_one_cannot_show_is_tried_again():
    """Layouts that one input does not tell are told by the first batch of several."""
    model = Detector(lambda x: x.transpose(0, 1).reshape(-1, 3))
    batches = [sequences(1, 7, []), sequences(16, 7, [(5, 3), (5, 6)])]
    assert relu_doctor.scan(model, batches).units.loc[0, FIRED].tolist() == [17, 1, 6, 6]


def test_slots_of_experts_are_no_inputs():
    """Dispatch by a product puts rows into slots: as many slots as inputs are no inputs all the same."""

    class Slots(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.randn(2, 6, 4))

        def forward(self, x):
            route = (x[:, 0] > 0).long()
            places = F.one_hot(route, 2).cumsum(0)[torch.arange(len(x)), route] - 1
            dispatch = F.one_hot(route, 2)[:, :, None] * F.one_hot(places, len(x))[:, None]
            return F.relu(torch.bmm(torch.einsum("bes,bi->esi", dispatch.float(), x), self.weights))

    diagnosis = relu_doctor.scan(Slots(), [torch.randn(9, 6), torch.randn(9, 6)])
    assert diagnosis.units["inputs"].tolist() == [2] * 8
