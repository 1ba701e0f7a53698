"""Each site names its readers: the weights and scales that consume its units."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import relu_doctor
from tests.zoo import CASES

EXPECTED = {
    "mlp": {"1": "2.weight", "3": "4.weight"},
    "one_relu_twice_in_a_sequential": {"1#1": "2.weight", "1#2": ""},
    "resnet": {
        "relu": "layer1.0.conv1.weight",
        "layer1.0.relu#1": "layer1.0.conv2.weight",
        "layer1.0.relu#2": "layer2.0.conv1.weight, layer2.0.downsample.0.weight",
        "layer2.0.relu#1": "layer2.0.conv2.weight",
        "layer2.0.relu#2": "fc.weight",
    },
    "relu_before_bn": {"1": "2.weight, 3.weight", "4": ""},
    "u_net": {"relu#1": "middle.weight, out.weight", "relu#2": "up.weight", "relu#3": "out.weight", "relu#4": ""},
    "weight_tied_layers": {"relu()": "inner.weight"},
    "recurrent_over_steps": {"relu": "outer.weight"},
    "skipped_layers": {"relu#1": "b.weight, c.weight", "relu#2": "c.weight", "relu#3": ""},
    "detach": {"relu()#1": "b.weight, c.weight", "relu()#2": ""},
    "bare_parameters": {"relu()#1": "w2", "relu()#2": "w3", "relu()#3": ""},
    "spectral_norm": {"1": "2.parametrizations.weight.original", "3": ""},
    "transformer_encoder": {
        "layers.0.relu()": "layers.0.linear2.weight",
        "layers.1.relu()": "layers.1.linear2.weight",
    },
    "activation_checkpointing": {"first.2": "second.0.weight", "second.1": ""},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_readers_are_the_first_weights_on_every_path(name):
    """Weights up to the first on each path, with the scales of norms before it; no biases; also of the last layer."""
    case = CASES[name]
    model, batches = case.build()
    diagnosis = relu_doctor.scan(model, batches, **case.scan)
    assert dict(zip(diagnosis.sites["site"], diagnosis.sites["readers"], strict=True)) == EXPECTED[name]
    again = relu_doctor.Diagnosis.from_dict(diagnosis.to_dict())
    assert [site.readers for site in again.table.sites] == [site.readers for site in diagnosis.table.sites]


def test_a_recurrent_layer_and_a_scale_read():
    """A layer of many nodes is one reader; an elementwise scale passes on what it reads."""

    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.scale = nn.Linear(6, 5), nn.Parameter(torch.ones(5))
            self.rnn, self.head = nn.LSTM(5, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.rnn(F.relu(self.first(x)) * self.scale)[0])

    sites = relu_doctor.scan(Reading(), torch.randn(8, 3, 6)).sites
    assert set(sites.loc[0, "readers"].split(", ")) == {"scale", "rnn.weight_ih_l0", "rnn.weight_hh_l0"}


def test_files_without_readers_are_still_read(tmp_path):
    """A diagnosis that was saved before sites named their readers loads with none."""
    model, batches = CASES["mlp"].build()
    data = relu_doctor.scan(model, batches).to_dict()
    for site in data["sites"]:
        del site["readers"]
    assert [site.readers for site in relu_doctor.Diagnosis.from_dict(data).table.sites] == [(), ()]
