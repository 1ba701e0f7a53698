"""nn.RNN with ReLU, of which only the outputs are seen: every way to call it, against the equations."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import relu_doctor
from tests.planted_layers import dead_units, inputs


class Recurrent(nn.Module):
    def __init__(self, **arguments):
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.RNN(8, 5, nonlinearity="relu", batch_first=True, **arguments)
        for name, parameter in self.rnn.named_parameters():
            if "bias_ih" in name:
                with torch.no_grad():
                    parameter[1] = -100.0

    def forward(self, x):
        return self.rnn(x)[0]


@pytest.mark.parametrize("arguments", [{}, {"bias": False}, {"num_layers": 2, "bidirectional": True}])
def test_a_recurrent_layer_fires_where_its_output_is_positive(arguments):
    """nn.RNN with ReLU: a site per layer and direction; columns that need pre-activations are empty."""
    model, x = Recurrent(**arguments), inputs(6, 8)
    with torch.no_grad():
        last = (model(x) > 0).any(1).sum(0)
    diagnosis = relu_doctor.scan(model, x, exhaustive=True)
    directions = 2 if arguments.get("bidirectional") else 1
    assert len(diagnosis.sites) == directions * arguments.get("num_layers", 1)
    assert diagnosis.units["inputs_fired"].tolist()[-5 * directions :] == last.tolist()
    assert diagnosis.units[["pre_max", "pre_min", "pre_mean", "pre_std"]].isna().all(axis=None)
    assert all("only its outputs are seen" in site.note for site in diagnosis.table.sites)
    if arguments.get("bias", True):
        assert all(1 in dead for dead in dead_units(diagnosis))
        assert diagnosis.units["bias"].notna().all()


def test_the_inner_layers_of_a_recurrent_stack_are_those_of_the_layer_alone():
    """What only the next layer reads is computed as the layer by itself computes it."""
    model, x = Recurrent(num_layers=3), inputs(6, 8)
    first = nn.RNN(8, 5, nonlinearity="relu", batch_first=True)
    first.load_state_dict({k: v for k, v in model.rnn.state_dict().items() if k.endswith("l0")})
    with torch.no_grad():
        expected = (first(x)[0] > 0).any(1).sum(0).tolist()
    diagnosis = relu_doctor.scan(model, x, exhaustive=True)
    assert diagnosis.units["inputs_fired"].tolist()[:5] == expected


def test_packed_sequences_count_no_padding():
    """Of packed sequences each counts its own steps."""

    class Packed(Recurrent):
        def forward(self, x):
            lengths = torch.tensor([6] * 30 + [2] * (len(x) - 30)) if len(x) > 30 else torch.tensor([6] * len(x))
            return self.rnn(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))[1]

    diagnosis = relu_doctor.scan(Packed(), inputs(6, 8), exhaustive=True)
    assert set(diagnosis.units["positions"]) == {30 * 6 + 30 * 2}
    assert dead_units(diagnosis)[0] >= {1}


def test_a_recurrent_cell_is_one_site_over_its_steps():
    """nn.RNNCell with ReLU, over numbers of steps that vary from batch to batch."""

    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.cell = nn.RNNCell(8, 5, nonlinearity="relu")
            with torch.no_grad():
                self.cell.bias_ih[1] = -100.0

        def forward(self, x):
            state, states = None, []
            for step in x.unbind(1):
                state = self.cell(step, state)
                states.append(state)
            return torch.stack(states, 1)

    model, batches = Cell(), [inputs(6, 8), inputs(3, 8), inputs(6, 8)]
    with torch.no_grad():
        fired = sum((model(batch) > 0).any(1).sum(0) for batch in batches)
    diagnosis = relu_doctor.scan(model, batches, exhaustive=True)
    assert diagnosis.units["inputs_fired"].tolist() == fired.tolist()
    assert diagnosis.units["site"].unique().tolist() == ["cell"]


LENGTHS = torch.tensor([6, 3, 1, 5, 2] * 12)


@torch.no_grad()
def by_hand(rnn: nn.RNN, x: torch.Tensor, lengths: torch.Tensor, start: float) -> list[torch.Tensor]:
    """Bool (inputs, units) of each layer and direction: where an output is positive at a step that counts."""
    fired, reads = [], x
    for layer in range(rnn.num_layers):
        outputs = []
        for suffix in ("", "_reverse")[: 2 if rnn.bidirectional else 1]:
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            w, u, b, c = (getattr(rnn, f"{name}_l{layer}{suffix}") for name in names)
            output = torch.zeros(*x.shape[:2], rnn.hidden_size)
            for row, length in enumerate(lengths):
                state = torch.full((rnn.hidden_size,), start)
                steps = range(int(length))
                for step in reversed(steps) if suffix else steps:
                    state = output[row, step] = F.relu(w @ reads[row, step] + b + u @ state + c)
            outputs.append(output)
            fired.append((output > 0).any(1))
        reads = torch.cat(outputs, -1)
    return fired


@pytest.mark.parametrize("arguments", [{}, {"num_layers": 2, "bidirectional": True}], ids=["plain", "deep"])
@pytest.mark.parametrize("how", ["whole", "packed", "state", "time_first"])
def test_every_layer_and_direction_is_as_the_equations_say(how, arguments):
    """Initial states, packed sequences in any order, time first: which inputs each unit fires on, and the first one."""

    class Calling(Recurrent):
        def forward(self, x):
            if how == "time_first":
                self.rnn.batch_first = False
                return self.rnn(x.transpose(0, 1))[0].transpose(0, 1)
            if how == "state":
                layers = self.rnn.num_layers * (2 if self.rnn.bidirectional else 1)
                return self.rnn(x, torch.full((layers, len(x), 5), 0.5))[0]
            if how == "packed":
                x = nn.utils.rnn.pack_padded_sequence(x, LENGTHS[: len(x)], batch_first=True, enforce_sorted=False)
                return nn.utils.rnn.pad_packed_sequence(self.rnn(x)[0], batch_first=True)[0]
            return self.rnn(x)[0]

    model, x = Calling(**arguments), inputs(6, 8)
    lengths = LENGTHS if how == "packed" else torch.full((60,), 6)
    fired = by_hand(model.rnn, x, lengths, 0.5 if how == "state" else 0.0)
    diagnosis = relu_doctor.scan(model, list(x.split(20)), exhaustive=True)
    assert diagnosis.units["inputs_fired"].tolist() == torch.cat([layer.sum(0) for layer in fired]).tolist()
    first = [int(unit.nonzero()[0]) if unit.any() else -1 for layer in fired for unit in layer.T]
    assert diagnosis.units["first_fired"].fillna(-1).astype(int).tolist() == first


def test_dropout_between_inner_layers_is_said():
    """What only the next layer reads was computed once more, without the dropout that lay between."""
    model = Recurrent(num_layers=3, dropout=0.5)
    note = "a recurrent layer with dropout: its inner layers were computed once more, without it"
    assert note in relu_doctor.scan(model, inputs(6, 8), mode="train").table.coverage.notes
    assert note not in relu_doctor.scan(model, inputs(6, 8)).table.coverage.notes
