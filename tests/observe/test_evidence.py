"""What counts as evidence: tokens where they are asked for, and of a batch only what makes a difference to a site."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import relu_doctor
from tests.zoo import CASES


def sentences(count: int = 6, length: int = 50, width: int = 6):
    """A model whose unit 1 fires on no token and unit 0 on one, and sequences that reach it."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(width, 4), nn.ReLU()), torch.randn(count, length, width)
    with torch.no_grad():
        highest = model[0](x).flatten(0, 1).sort(0).values
        model[0].bias[1] -= highest[-1, 1] + 1
        model[0].bias[0] -= (highest[-1, 0] + highest[-2, 0]) / 2
    return model, x


@pytest.mark.parametrize("flat", [False, True])
def test_every_position_is_evidence_where_tokens_are_counted(flat):
    """300 tokens of 6 sequences are 300 units of evidence, in whatever layout they reach the rectifier."""
    model, x = sentences()
    if flat:
        model = nn.Sequential(nn.Flatten(0, 1), *model)
    units = relu_doctor.scan(model, x.split(4), evidence="token").units
    assert units["inputs"].tolist() == [300] * 4
    assert units.loc[:1, "inputs_fired"].tolist() == [1, 0]
    token = int(model(x).flatten(0, -2)[:, 0].argmax())
    assert units.loc[0, ["first_fired", "last_fired"]].tolist() == [token, token]
    assert (units["inputs_fired"] == units["positions_fired"]).all()


def test_the_report_says_that_tokens_were_counted():
    """Coverage and the first lines of the report name tokens, and how many sequences were read."""
    model, x = sentences()
    diagnosis = relu_doctor.scan(model, x, evidence="token")
    coverage = diagnosis.table.coverage
    assert (coverage.evidence, coverage.num_inputs, coverage.distinct_inputs, coverage.sequences) == (
        "token",
        300,
        300,
        6,
    )
    first = str(diagnosis).splitlines()[0]
    assert "300 tokens" in first
    assert "all 6 sequences read" in str(diagnosis).replace("\n", " ")
    again = relu_doctor.Diagnosis.from_dict(diagnosis.to_dict())
    assert again.table.coverage == coverage


def test_padding_and_repeated_sequences_are_no_tokens():
    """Of masked sequences only their own positions count, and a sequence that comes again adds none."""
    model, batches = CASES["padded_mappings"].build()
    own = sum(int(batch["attention_mask"].sum()) for batch in batches)
    once = relu_doctor.scan(model, batches, evidence="token")
    twice = relu_doctor.scan(model, [*batches, *batches], evidence="token")
    assert once.units["inputs"].tolist() == [own] * 8
    assert twice.table.coverage.num_inputs == 2 * own
    assert once.table.coverage.num_inputs == own
    assert twice.table.coverage.distinct_inputs <= own
    assert (twice.units["firing_rate_upper"] >= once.units["firing_rate_upper"] - 1e-12).all()


def test_a_site_that_is_called_again_sees_more_tokens():
    """The tokens of two calls in one forward are all of them evidence."""
    model, batches = CASES["siamese"].build()
    units = relu_doctor.scan(model, batches, evidence="token", forward=lambda model, batch: model(*batch)).units
    assert units.groupby("site")["inputs"].first().to_dict() == {"body.1": 40, "relu()": 20}


def test_as_many_tokens_are_read_as_the_bound_needs():
    """max_inputs="auto" counts tokens where they are the evidence."""
    model, _ = sentences()
    x = torch.randn(400, 50, 6, generator=torch.Generator().manual_seed(1))
    diagnosis = relu_doctor.scan(model, list(x.split(1)), evidence="token", max_inputs="auto")
    needed = diagnosis.summary["inputs_needed"]
    assert needed <= diagnosis.table.coverage.num_inputs <= max(needed, 64 * 50) + 50


class Counting(Dataset):
    """A data set that notes which of its items were asked for."""

    def __init__(self, rows) -> None:
        self.rows, self.asked = rows, []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        self.asked.append(index)
        return self.rows[index]


def test_no_item_is_read_twice():
    """Reading as many inputs as the bound needs asks a data set for each item at most once."""
    model, _ = sentences()
    data = Counting(torch.randn(5000, 6))
    relu_doctor.scan(model, DataLoader(data, batch_size=32), max_inputs="auto")
    assert len(data.asked) == len(set(data.asked)) > 64


def test_a_number_per_input_does_not_hide_repetitions():
    """What forward= leaves aside, or what makes no difference to any site, tells no two inputs apart."""
    model, x = sentences(count=30)
    batches = [{"x": part, "id": torch.arange(10) + 10 * k} for k, part in enumerate([x[:10], x[:10], x[10:20]])]
    coverage = relu_doctor.scan(model, batches, forward=lambda model, batch: model(batch["x"])).table.coverage
    assert (coverage.num_inputs, coverage.distinct_inputs) == (30, 20)
    batches = [(part, torch.arange(10) + 10 * k) for k, part in enumerate([x[:10], x[:10], x[10:20]])]
    coverage = relu_doctor.scan(model, batches, forward=lambda model, batch: model(batch[0])).table.coverage
    assert (coverage.num_inputs, coverage.distinct_inputs) == (30, 20)


def test_what_is_called_in_train_mode_only_is_seen_in_both_modes():
    """With mode="both" an auxiliary head that only training calls has its own numbers, and a remark."""

    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.aux, self.act = nn.Linear(6, 5), nn.Linear(5, 4), nn.ReLU()

        def forward(self, x):
            x = torch.relu(self.body(x))
            return (x, self.act(self.aux(x))) if self.training else x

    diagnosis = relu_doctor.scan(Auxiliary(), torch.randn(20, 6), mode="both")
    assert diagnosis.summary["unobserved_sites"] == []
    assert diagnosis.units.groupby("site")["inputs"].first().to_dict() == {"relu()": 20, "act": 20}
    assert any("train mode only" in note for note in diagnosis.table.coverage.notes)
