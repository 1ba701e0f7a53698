"""What is passed to a model in another shape than (inputs, …): time first, or one input by itself."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.planting import Site, normal, time_first
from tests.zoo.registry import Chain, case


def steps(length, width):
    """Batches of (positions, inputs, features)."""
    return lambda: [batch.transpose(0, 1).contiguous() for batch in normal(length, width)()]


def inputs_second(batch):
    return batch.shape[1]


@case(
    steps(7, 8),
    Site("layers.0.relu()", 6, {2, 3}, {1}, "layers.0.linear1.bias", arrange=time_first),
    Site("layers.1.relu()", 6, {0}, {5}, "layers.1.linear1.bias", arrange=time_first),
    count=inputs_second,
)
def transformer_time_first():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 6), 2, enable_nested_tensor=False)


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.head = nn.Linear(6, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, 4)
        with torch.no_grad():
            self.outer.weight.mul_(0.2)

    def forward(self, x):
        state, states = x.new_zeros(x.shape[1], 5), []
        for step in x:
            state = F.relu(self.inner(step) + self.outer(state))
            states.append(state)
        return F.relu(self.head(torch.stack(states)))


@case(
    steps(7, 6),
    Site("relu()#1", 5, {2, 3}, {1}, "inner.bias", calls=7),
    Site("relu()#2", 4, {1}, {0}, "head.bias", arrange=time_first),
    count=inputs_second,
)
def cell_time_first():
    return Cell()


@case(steps(7, 8), Site("relu()", 4, {2}, {1}, "head.bias", arrange=time_first), count=inputs_second)
def lstm_time_first():
    return Chain(lambda m, x: F.relu(m.head(m.rnn(x)[0])), rnn=nn.LSTM(8, 5), head=nn.Linear(5, 4))


@case(
    lambda: [torch.randint(0, 20, (7, size), generator=torch.Generator().manual_seed(size)) for size in (9, 5, 6)],
    Site("relu()", 4, {2}, {1}, "head.bias", arrange=time_first),
    count=inputs_second,
)
def indices_time_first():
    return Chain(_language, embed=nn.Embedding(20, 8), rnn=nn.GRU(8, 5), head=nn.Linear(5, 4))


def _language(m, ids):
    return F.relu(m.head(m.rnn(m.embed(ids))[0]))


def singles(*shape):
    """Inputs one by one, without an axis for them."""
    return lambda: [one for batch in normal(*shape)() for one in batch]


@case(
    singles(3, 8, 8),
    Site("1", 5, {1, 4}, {0}, "0.bias", arrange=lambda z, n: z.flatten(1)[None]),
    Site("4", 4, {2}, {1}, "3.bias", arrange=lambda z, n: z[None, :, None]),
    count=lambda batch: 1,
)
def one_image_at_a_time():
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(0), nn.Linear(180, 4), nn.ReLU())


@case(
    singles(6),
    Site("1", 5, {1, 4}, {0}, "0.bias", arrange=lambda z, n: z[None, :, None]),
    count=lambda batch: 1,
)
def one_vector_at_a_time():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU())


@case(
    singles(7, 6),
    Site("relu()", 4, {2}, {1}, "head.bias", arrange=lambda z, n: z.T[None]),
    count=lambda batch: 1,
)
def one_sequence_at_a_time():
    return Chain(lambda m, x: F.relu(m.head(m.rnn(x)[0])), rnn=nn.GRU(6, 5, batch_first=True), head=nn.Linear(5, 4))
