"""Along which axis of what is passed the inputs lie is tried out, and said where it is not the first."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import relu_doctor
from tests.zoo import CASES


def counted(model: nn.Module, batches, **arguments):
    """Inputs of the coverage and of each site, and the remarks."""
    diagnosis = relu_doctor.scan(model.eval(), batches, **arguments)
    sites = diagnosis.units.groupby("site", sort=False)["inputs"].first().tolist()
    return diagnosis.table.coverage.num_inputs, sites, diagnosis.table.coverage.notes


def encoder(layers: int = 1) -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), layers, enable_nested_tensor=False)


class WithMask(nn.Module):
    """A transformer that is given the mask of its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder()

    def forward(self, source, mask):
        return self.encoder(source, mask)


class Language(nn.Module):
    """Embedded numbers, a recurrent layer, and a head; time first unless told otherwise."""

    def __init__(self, batch_first: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 6)
        self.rnn = nn.LSTM(8, 8, batch_first=batch_first)

    def forward(self, ids):
        return F.relu(self.head(self.rnn(self.embed(ids))[0]))


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(len(shape)))


def transformer() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that no nested tensors are used, time first
        return nn.Transformer(8, 2, 1, 1, 16)


@pytest.mark.parametrize(
    ("make", "batches", "inputs"),
    [
        (transformer, [(torch.randn(7, 5, 8), torch.randn(4, 5, 8))] * 2, 10),
        (transformer, [(torch.randn(5, 5, 8), torch.randn(5, 5, 8))], 5),
        (WithMask, [(torch.randn(7, 5, 8), nn.Transformer.generate_square_subsequent_mask(7))], 5),
        (Language, [ids(7, 5), ids(7, 3)], 8),
        (lambda: encoder(2), [torch.randn(7, 5, 8)], 5),
    ],
    ids=["encoder and decoder", "all of one length", "with a mask", "numbers", "two layers"],
)
def test_time_first_models_are_counted_by_their_inputs(make, batches, inputs):
    """Where inputs lie on the second axis they are counted there, at every site, and a remark says so."""
    total, sites, notes = counted(make(), batches)
    assert total == inputs
    assert set(sites) == {inputs}
    assert any("along axis 1" in note for note in notes)


@pytest.mark.parametrize(
    ("make", "batch", "inputs", "mode"),
    [
        (lambda: nn.Sequential(nn.Linear(8, 4), nn.ReLU()), torch.randn(7, 5, 8), 7, "eval"),
        (lambda: nn.Sequential(nn.Linear(8, 4), nn.ReLU()), torch.randn(1, 5, 8), 1, "eval"),
        (lambda: nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU()), torch.randn(7, 8), 7, "train"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), torch.randn(7, 3, 8, 8), 7, "train"),
        (lambda: Language(batch_first=True), ids(7, 5), 7, "eval"),
    ],
    ids=["positions apart", "a batch of one", "batch statistics", "batch statistics of maps", "batch first"],
)
def test_other_models_are_counted_along_the_first_axis(make, batch, inputs, mode):
    """Positions that do not touch each other are no inputs, nor are features, nor what a norm over the batch mixes."""
    assert counted(make(), [batch], mode=mode) == (inputs, [inputs], ())


@pytest.mark.parametrize(
    ("make", "batch"),
    [
        (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), torch.randn(1, 8, 8)),
        (lambda: nn.Sequential(nn.Conv2d(16, 4, 1), nn.ReLU()), torch.randn(16, 16, 16)),
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU()), torch.randn(6)),
        (lambda: Language(batch_first=True), ids(7)),
    ],
    ids=["grey image", "as many channels as rows", "vector", "numbers"],
)
def test_single_inputs_count_one_each(make, batch):
    """What has no axis of inputs is one input, also for a limit and for the bound."""
    batches = [batch + k if batch.is_floating_point() else (batch + k) % 20 for k in range(9)]
    total, sites, notes = counted(make(), batches)
    assert (total, sites) == (9, [9])
    assert any("no axis of inputs" in note for note in notes)
    assert counted(make(), batches, max_inputs=4)[:2] == (4, [4])


def test_a_limit_cuts_inputs_and_not_time():
    """Of time-first batches a limited read takes inputs, spread evenly, each with all of its steps."""
    lengths = set()

    class Lengths(Language):
        def forward(self, numbers):
            lengths.add(len(numbers))
            return super().forward(numbers)

    model, batches = Lengths(), [ids(7, 5) for _ in range(6)]
    model(batches[0])
    lengths.clear()
    diagnosis = relu_doctor.scan(model, batches, max_inputs=12)
    coverage = diagnosis.table.coverage
    assert (coverage.num_inputs, coverage.available_inputs, coverage.sampling) == (12, 30, "spread")
    assert diagnosis.units["positions"].tolist() == [84] * 6
    assert relu_doctor.scan(model, (batch for batch in batches), max_inputs=12).units["positions"].tolist() == [84] * 6


@pytest.mark.parametrize("name", ["transformer_time_first", "one_image_at_a_time"])
def test_repetitions_are_found_however_inputs_are_counted(name):
    """The same inputs again are no evidence, time first or one by one."""
    model, batches = CASES[name].build()
    coverage = relu_doctor.scan(model, [*batches, *batches]).table.coverage
    assert (coverage.num_inputs, coverage.distinct_inputs) == (40, 20)


class Reader(nn.Module):
    """Reads sequences of any length one by one, or all of them joined."""

    def __init__(self, joined=False):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.joined = nn.Linear(6, 5), joined

    def forward(self, sequences):
        if self.joined:
            return F.relu(self.layer(torch.cat(list(sequences)))).sum()
        return torch.stack([F.relu(self.layer(sequence)[None]).mean((0, 1)) for sequence in sequences])


def sequences(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, 6, generator=generator) for length in lengths]


def scan_lists(model, batches, **arguments):
    return relu_doctor.scan(model, batches, forward=lambda model, batch: model(batch), **arguments)


def test_each_tensor_of_a_list_is_an_input():
    """Sequences of different lengths count one each, also where one is as long as the list."""
    batches = [sequences(4, 2, 5, 3), sequences(6, 1), sequences(3)]
    diagnosis = scan_lists(Reader(), batches)
    fired = torch.stack([(Reader().layer(each) > 0).any(0) for batch in batches for each in batch]).sum(0)
    assert diagnosis.units["inputs"].tolist() == [7] * 5
    assert diagnosis.units["inputs_fired"].tolist() == fired.tolist()
    assert diagnosis.table.coverage.num_inputs == 7


def test_a_list_that_is_joined_is_no_more_inputs_than_it_has_tensors():
    """Rows of joined sequences are not taken for inputs."""
    diagnosis = scan_lists(Reader(joined=True), [sequences(4, 2, 5, 3), sequences(6, 1), sequences(3)])
    assert diagnosis.table.coverage.num_inputs == 7
    assert 0 < diagnosis.units["inputs"].max() <= 7


def test_lists_are_cut_and_repetitions_found_in_them():
    """A limit counts tensors, and the same tensor again is no evidence."""
    batch = sequences(4, 2, 5, 3)
    assert scan_lists(Reader(), [batch, batch], max_inputs=3).table.coverage.num_inputs == 3
    coverage = scan_lists(Reader(), [batch, batch]).table.coverage
    assert (coverage.num_inputs, coverage.distinct_inputs) == (8, 4)


def test_levels_of_a_pyramid_are_no_inputs():
    """A list of feature maps of one batch is counted by its batch."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 5, 3)

        def forward(self, levels):
            return sum(F.relu(self.conv(level)).mean((2, 3)) for level in levels)

    levels = [[torch.randn(size, 4, side, side) for side in (8, 6, 4)] for size in (7, 2)]
    assert scan_lists(Head(), levels).units["inputs"].tolist() == [9] * 5


def test_sequences_read_one_by_one_are_counted_along_the_first_axis():
    """A loop over inputs, whose steps do not touch each other either."""
    diagnosis = relu_doctor.scan(Reader(), [torch.randn(6, 6, 6), torch.randn(3, 6, 6)])
    assert diagnosis.units["inputs"].tolist() == [9] * 5
