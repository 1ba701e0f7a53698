"""nn.RNN with ReLU: one fused call, whose outputs are seen but not its pre-activations."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from relu_doctor.observe.graph.units import Term
from relu_doctor.observe.rectifiers.kinds import Rectifier, argument
from relu_doctor.observe.sites import ActivationSite

RECURRENT = {torch.rnn_relu, torch.rnn_relu_cell}
LAYERS = RECURRENT | {torch.lstm, torch.gru, torch.rnn_tanh, torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell}
_NOTE = "one fused call applies it: only its outputs are seen, and columns that need pre-activations are empty"


@dataclass(frozen=True, slots=True)
class RecurrentLayer:
    """One direction of one layer.

    Attributes:
        suffix: ``.l0``, ``.l1_reverse``, …; empty where there is only one.
        weights: of the input, of the state, and their biases where there are some.
        output: (inputs, steps, units), (steps, inputs, units) or (inputs, units).
        entry: what the first layer reads; ``None`` for the others.
        num_padding: steps of ``output`` behind the ends of sequences, where it is 0.
        feeds_from: how many calls back the layers are that this one reads; ``None`` for the first layer.
    """

    suffix: str
    weights: tuple[Tensor, ...]
    output: Tensor
    entry: Tensor | None
    feeds_from: tuple[int, ...] | None
    num_padding: int = 0


def recurrent_layers(
    function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
) -> Iterator[RecurrentLayer]:
    """The layers of one recurrent call, inputs first.

    What a layer below the last put out is not among the results: it is computed once more, without dropout.

    Args:
        function: ``torch.rnn_relu`` or ``torch.rnn_relu_cell``.
        args: as it was called.
        kwargs: as it was called.
        result: what it returned.
    """
    entry: Tensor = argument(args, kwargs, 0, "input")
    if function is torch.rnn_relu_cell:
        weights = tuple(weight for weight in args[2:6] if isinstance(weight, Tensor))
        yield RecurrentLayer("", weights, result, entry, None)
        return
    packed = isinstance(args[3], list | tuple)
    state, flat = (args[2], args[3]) if packed else (args[1], args[2])
    has_biases, num_layers, _, _, bidirectional = args[4:9] if packed else args[3:8]
    batch_first = False if packed else args[8]
    sizes: Tensor | None = args[1] if packed else None
    directions = 2 if bidirectional else 1
    each = len(flat) // (num_layers * directions)
    reads = entry
    for layer in range(num_layers):
        own = tuple(flat[layer * directions * each : (layer + 1) * directions * each])
        if layer == num_layers - 1:
            output = result[0]
        else:
            states = state[layer * directions : (layer + 1) * directions]
            tail = (own, has_biases, 1, 0.0, False, bidirectional)
            with torch.no_grad():
                if sizes is not None:
                    output = torch.rnn_relu(reads.detach(), sizes, states, *tail)[0]
                else:
                    output = torch.rnn_relu(reads.detach(), states, *tail, batch_first)[0]
        units = output.shape[-1] // directions
        whole, num_padding = output, 0
        if sizes is not None:
            num_padding = len(sizes) * int(sizes[0]) - len(output)
            whole = pad_packed_sequence(PackedSequence(output, sizes), batch_first=True)[0]
        for direction in range(directions):
            suffix = f".l{layer}{'_reverse' if direction else ''}" if num_layers * directions > 1 else ""
            below = None if layer == 0 else tuple(range(1 + direction, 1 + direction + directions))
            yield RecurrentLayer(
                suffix,
                own[direction * each : (direction + 1) * each],
                whole[..., direction * units : (direction + 1) * units],
                entry if layer == 0 else None,
                below,
                num_padding,
            )
        reads = output


def drops_between_inner_layers(function: Any, args: tuple[Any, ...]) -> bool:
    """Whether dropout lies between layers that have to be computed once more."""
    if function is torch.rnn_relu_cell:
        return False
    num_layers, dropout, train = args[5:8] if isinstance(args[3], list | tuple) else args[4:7]
    return bool(train and dropout > 0 and num_layers > 2)


def recurrent_site(
    base_name: str, kind: str, names: tuple[str, ...], layer: RecurrentLayer, *, feeds: tuple[str, ...], order: int
) -> ActivationSite:
    """The site of one direction of one layer, known by its weights.

    Args:
        base_name: path of the module, with the layer.
        kind: the module's class.
        names: of the layer's weights.
        layer: as it was called.
        feeds: ids of the sites that it reads.
        order: how many sites were found before.
    """
    units = layer.output.shape[-1]
    rows = torch.arange(units)
    half = len(names) // 2 if len(names) > 2 else 0  # biases follow the weights
    terms = tuple(
        Term(
            "weight",
            (name,),
            names[2 + place : 3 + place] if half else (),
            0,
            0,
            rows,
            nearest=True,
            direct=True,
            unit_slope=True,
        )
        for place, name in enumerate(names[:2])
    )
    identity = [kind, *sorted(names), *(() if names else (base_name,))]
    return ActivationSite(
        site_id=hashlib.sha256("\n".join(identity).encode()).hexdigest()[:12],
        base_name=base_name,
        name=base_name,
        rectifier=Rectifier(kind, on_output=True),
        producers=names,
        producer=", ".join(dict.fromkeys(name.rpartition(".")[0] or name for name in names)),
        num_units=units,
        codes=units,
        unit_axes=(layer.output.dim() - 1,),
        grouping=None,
        terms=terms,
        complete=False,
        unweighted_summand=False,
        mixed=False,
        feeds=feeds,
        order=order,
        note=_NOTE,
    )
