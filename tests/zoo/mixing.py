"""Between a layer and its rectifier: where a unit has several rows of a layer, or all units have a part in it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.planting import Site, normal, positive
from tests.zoo.registry import Chain, case


def plant(additive: Tensor, highest: Tensor, dead, once) -> None:
    """Shift additive parameters (rows, units) by the largest pre-activations (inputs, units)."""
    ordered = highest.sort(0).values
    with torch.no_grad():
        for unit in dead:
            additive[:, unit] -= ordered[-1, unit] + 1
        for unit in once:
            additive[:, unit] -= (ordered[-1, unit] + ordered[-2, unit]) / 2


class Recurrent(nn.Module):
    """A recurrent layer, the rectifier behind it, and what the two feed."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(layer.hidden_size * (2 if layer.bidirectional else 1), 3)

    def forward(self, x):
        return F.relu(self.head(F.relu(self.layer(x)[0])))


@case(positive(5, 6), Site("relu()#1", 4, {1}, {2}), Site("relu()#2", 3, {0}, {1}, "head.bias"), seed=1)
def lstm_then_relu():
    layer = nn.LSTM(6, 4, batch_first=True)
    with torch.no_grad():  # what the cell takes up is negative, but for one input of unit 2
        layer.bias_ih_l0[8], layer.bias_ih_l0[11] = 1, 1
        for unit in (1, 2):
            layer.weight_ih_l0[8 + unit] = layer.weight_hh_l0[8 + unit] = 0
            layer.bias_ih_l0[8 + unit], layer.bias_hh_l0[8 + unit] = -5, 0
        layer.weight_ih_l0[10, 0] = 1
    return Recurrent(layer)


@case(positive(5, 6), Site("relu()#1", 8, {1}, {6}), Site("relu()#2", 3, {0}, {1}, "head.bias"), seed=4)
def gru_of_two_directions_then_relu():
    layer = nn.GRU(6, 4, batch_first=True, bidirectional=True)
    with torch.no_grad():
        for suffix, unit in (("", 1), ("_reverse", 2)):
            weight, bias = getattr(layer, f"weight_ih_l0{suffix}"), getattr(layer, f"bias_ih_l0{suffix}")
            weight[8 + unit] = getattr(layer, f"weight_hh_l0{suffix}")[8 + unit] = 0
            bias[8 + unit], getattr(layer, f"bias_hh_l0{suffix}")[8 + unit] = -5, 0
        layer.weight_ih_l0_reverse[10, 0] = 1
    return Recurrent(layer)


def _cells(m, x):
    h = c = x.new_zeros(len(x), 4)
    for step in range(x.shape[1]):
        h, c = m.cell(x[:, step], (h, c))
    return F.relu(h)


@case(positive(1, 6), Site("relu()", 4, {1}, {2}), seed=1)
def lstm_cell_then_relu():
    cell = nn.LSTMCell(6, 4)
    with torch.no_grad():
        cell.bias_ih[8], cell.bias_ih[11] = 1, 1
        for unit in (1, 2):
            cell.weight_ih[8 + unit] = cell.weight_hh[8 + unit] = 0
            cell.bias_ih[8 + unit], cell.bias_hh[8 + unit] = -5, 0
        cell.weight_ih[10, 0] = 1
    return Chain(_cells, cell=cell)


@case(normal(6), Site("relu()", 4, {1}, {2}), seed=1)
def maxout_by_amax():
    model = Chain(lambda m, x: F.relu(m.a(x).view(-1, 3, 4).amax(1)), a=nn.Linear(6, 12))
    x = torch.cat(normal(6)())
    plant(model.a.bias.view(3, 4), model.a(x).view(-1, 3, 4).amax(1), {1}, {2})
    return model


@case(normal(6), Site("relu()", 4, {1}, {2}), seed=1)
def maxout_by_max():
    model = Chain(lambda m, x: F.relu(m.a(x).view(-1, 4, 3).max(-1).values), a=nn.Linear(6, 12))
    x = torch.cat(normal(6)())
    plant(model.a.bias.view(4, 3).T, model.a(x).view(-1, 4, 3).amax(-1), {1}, {2})
    return model


@case(normal(6), Site("relu()", 4, {1}, {2}), seed=1)
def maxout_of_two_layers():
    model = Chain(lambda m, x: F.relu(torch.maximum(m.a(x), m.b(x))), a=nn.Linear(6, 4), b=nn.Linear(6, 4))
    x = torch.cat(normal(6)())
    highest = torch.maximum(model.a(x), model.b(x))
    for layer in (model.a, model.b):
        plant(layer.bias[None], highest, {1}, {2})
    return model


@case(normal(7, 6), Site("relu()", 5, {1, 4}, {0}, "a.bias", arrange=lambda z, n: z[:, :, None]))
def max_over_time():
    return Chain(lambda m, x: F.relu(m.a(x).amax(1)), a=nn.Linear(6, 5))


@case(normal(7, 6), Site("relu()", 5, {1, 4}, {0}, "a.bias", arrange=lambda z, n: z[:, :, None]))
def attention_pooling():
    return Chain(_pooled_by_attention, score=nn.Linear(6, 1), a=nn.Linear(6, 5))


def _pooled_by_attention(m, x):
    return F.relu(torch.einsum("bt,bto->bo", torch.softmax(m.score(x)[..., 0], 1), m.a(x)))


@case(normal(6), Site("relu()", 5, {1, 4}, {0}, "a.bias"))
def normalized_length():
    return Chain(lambda m, x: F.relu(F.normalize(m.a(x), dim=-1)), a=nn.Linear(6, 5))


@case(normal(6), Site("relu()", 5, {1, 4}, {0}, "b"))
def softmax_between():
    return Chain(
        lambda m, x: F.relu(torch.softmax(m.a(x), -1) - 0.2 + m.b), a=nn.Linear(6, 5), b=nn.Parameter(torch.zeros(5))
    )


def _root_mean_square(m, x):
    y = m.a(x)
    return F.relu(y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5) * m.scale)


@case(normal(6), Site("relu()", 5, {1, 4}, {0}, "a.bias"))
def rms_norm_by_hand():
    return Chain(_root_mean_square, a=nn.Linear(6, 5), scale=nn.Parameter(torch.ones(5)))


def _layer_norm(m, x):
    y = m.a(x) - m.a(x).mean(-1, keepdim=True)
    return F.relu(y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * m.scale + m.shift)


@case(normal(6), Site("relu()", 5, {1, 4}, {0}, "shift"))
def layer_norm_by_hand():
    parameters = {"scale": nn.Parameter(torch.ones(5)), "shift": nn.Parameter(torch.zeros(5))}
    return Chain(_layer_norm, a=nn.Linear(6, 5), **parameters)


def _stack(pre, num_inputs):
    return pre.flatten(1)[:, :, None]


@case(normal(6), Site("relu()", 10, {1, 8}, {0, 6}, arrange=_stack), seed=1)
def stacked_layers():
    model = Chain(lambda m, x: F.relu(torch.stack([m.a(x), m.b(x)], 1)), a=nn.Linear(6, 5), b=nn.Linear(6, 5))
    x = torch.cat(normal(6)())
    plant(model.a.bias[None], model.a(x), {1}, {0})
    plant(model.b.bias[None], model.b(x), {3}, {1})
    return model


@case(
    normal(3, 5, 5),
    Site("relu()", 8, {1, 6}, {0}, arrange=lambda z, n: z.flatten(3).movedim(1, 0).flatten(1, 2)),
    seed=2,
)
def stacked_convolutions():
    model = Chain(_stacked_first, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 4, 3))
    x = torch.cat(normal(3, 5, 5)())
    plant(model.a.bias[None], model.a(x).amax((2, 3)), {1}, {0})
    plant(model.b.bias[None], model.b(x).amax((2, 3)), {2}, ())
    return model


def _stacked_first(m, x):
    return F.relu(torch.stack([m.a(x), m.b(x)]))


def _both_signs(m, x):
    z = m.a(x)
    return F.relu(torch.cat([z, -z], 1))


@case(normal(6), Site("relu()", 1600, {1, 802}, {0}), seed=3)
def crelu_of_many_units():
    model, x = Chain(_both_signs, a=nn.Linear(6, 800)), torch.cat(normal(6)())
    with torch.no_grad():
        model.a.bias -= model.a(x).median(0).values
        z = model.a(x)
        model.a.bias[1] -= z[:, 1].max() + 1
        model.a.bias[2] -= z[:, 2].min() - 1
    plant(model.a.bias[None], model.a(x), (), {0})
    return model


@case(
    normal(3, 4, 4),
    Site("2", 8, {1, 6}, {3}, "0.bias", arrange=lambda z, n: F.pixel_unshuffle(z, 2).flatten(2)),
)
def pixel_shuffle():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.PixelShuffle(2), nn.ReLU())


@case(normal(6), Site("relu()", 1, set(), {0}, "a.bias", arrange=lambda z, n: z[:, None, None]))
def a_single_unit_without_an_axis():
    return Chain(lambda m, x: F.relu(m.a(x).squeeze(-1)), a=nn.Linear(6, 1))


def _bags():
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, 30, (size, 6), generator=generator) for size in (10, 9, 1)]
    batches[0][3, 2] = 30  # a word that no other bag has
    return batches


@case(_bags, Site("1", 5, {1, 4}, {2}))
def embedding_bag():
    model = nn.Sequential(nn.EmbeddingBag(31, 5), nn.ReLU())
    with torch.no_grad():
        model[0].weight[:, [1, 2, 4]] = -1
        model[0].weight[30] = 0
        model[0].weight[30, 2] = 100
    return model


@case(_bags, Site("relu()", 5, {1, 4}, {0}, "b"))
def embedding_bag_and_bias():
    return Chain(lambda m, x: F.relu(m.a(x) + m.b), a=nn.EmbeddingBag(31, 5), b=nn.Parameter(torch.zeros(5)))


@case(normal(6), Site("relu()", 5, {1, 4}, {0}), seed=2)
def gated_by_one_unit():
    model = Chain(lambda m, x: F.relu(torch.sigmoid(m.gate(x)) * m.a(x)), gate=nn.Linear(6, 1), a=nn.Linear(6, 5))
    plant(model.a.bias[None], model.a(torch.cat(normal(6)())), {1, 4}, {0})
    return model
