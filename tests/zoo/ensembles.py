"""Members side by side: one parameter holds several layers, and a unit is one feature of one member."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.planting import Site, channels, normal, plant_rows, positive
from tests.zoo.registry import Chain, case


def members_first(pre, num_inputs):
    """(members, inputs, features)."""
    return pre.movedim(0, 1).flatten(1)[:, :, None]


def members_second(pre, num_inputs):
    """(inputs, members, features)."""
    return pre.flatten(1)[:, :, None]


def _parts(**more):
    return {"w": nn.Parameter(torch.randn(3, 6, 4)), "b": nn.Parameter(torch.zeros(3, 4)), **more}


SITE = Site("relu()", 12, {1, 10}, {6}, "b", arrange=members_first)


@case(normal(6), SITE)
def ensemble_bmm():
    return Chain(lambda m, x: F.relu(torch.bmm(x.expand(3, *x.shape), m.w) + m.b[:, None]), **_parts())


@case(normal(6), SITE)
def ensemble_baddbmm():
    return Chain(lambda m, x: F.relu(torch.baddbmm(m.b[:, None], x.expand(3, *x.shape), m.w)), **_parts())


@case(normal(6), SITE)
def ensemble_matmul():
    return Chain(lambda m, x: F.relu(x @ m.w + m.b.unsqueeze(1)), **_parts())


@case(normal(6), Site("relu()", 12, {1, 10}, {6}, "b", arrange=members_second))
def ensemble_einsum():
    return Chain(lambda m, x: F.relu(torch.einsum("bi,eio->beo", x, m.w) + m.b), **_parts())


@case(normal(6), Site("relu()", 12, {1, 10}, {6}, "b", arrange=members_first))
def ensemble_einsum_members_first():
    return Chain(lambda m, x: F.relu(torch.einsum("bi,eio->ebo", x, m.w) + m.b[:, None]), **_parts())


def _deep(m, x):
    x = F.relu(torch.einsum("bi,eio->ebo", x, m.w) + m.b[:, None])
    x = F.relu(torch.einsum("ebi,eio->ebo", x, m.v) + m.c[:, None])
    return torch.einsum("ebi,eio->ebo", x, m.u).mean(0)


@case(
    normal(6),
    Site("relu()#1", 12, {1, 10}, {6}, "b", arrange=members_first),
    Site("relu()#2", 6, {0, 5}, {3}, "c", arrange=members_first),
)
def ensemble_of_two_layers():
    more = {"v": nn.Parameter(torch.randn(3, 4, 2)), "c": nn.Parameter(torch.zeros(3, 2))}
    return Chain(_deep, **_parts(**more, u=nn.Parameter(torch.randn(3, 2, 1))))


@case(normal(6, sizes=(3, 3, 3, 3)), Site("relu()", 9, {1, 7}, {4}, "b", arrange=members_first))
def ensemble_as_many_members_as_inputs():
    return Chain(
        lambda m, x: F.relu(torch.bmm(x.expand(3, *x.shape), m.w) + m.b[:, None]),
        w=nn.Parameter(torch.randn(3, 6, 3)), b=nn.Parameter(torch.zeros(3, 3)),
    )  # fmt: skip


@case(normal(6), Site("relu()", 12, {1, 10}, {6}, "conv.bias", arrange=channels))
def ensemble_by_grouped_convolution():
    return Chain(lambda m, x: F.relu(m.conv(x.repeat(1, 3)[:, :, None])), conv=nn.Conv1d(18, 12, 1, groups=3))


@case(positive(6), Site("relu()", 12, {0, 1, 10}, {4, 6}, arrange=members_first))
def ensemble_without_bias():
    torch.manual_seed(1)
    rows = torch.randn(12, 6)
    plant_rows(rows, {0, 1, 10}, {4, 6})
    return Chain(lambda m, x: F.relu(x @ m.w), w=nn.Parameter(rows.view(3, 4, 6).transpose(1, 2).contiguous()))


def _einsums(m, x):
    x = F.relu(torch.einsum("oi,bi->bo", m.a, x) + m.p)
    x = F.relu(torch.einsum("bi,hio->bho", x, m.b) + m.q)
    x = F.relu(torch.einsum("...hi,oi->...ho", x, m.c) + m.r)
    x = F.relu(torch.einsum("bhi,hio->bo", x, m.d) + m.s)
    x = F.relu(torch.tensordot(x, m.e, dims=1) + m.t)
    return F.relu(torch.einsum("b i, i -> b i", x, m.f) + m.u)


@case(
    normal(6),
    Site("relu()#1", 5, {1, 4}, {0}, "p"),
    Site("relu()#2", 8, {2}, {5}, "q", arrange=members_second),
    Site("relu()#3", 3, {0}, {1}, "r"),
    Site("relu()#4", 6, {5}, {1}, "s"),
    Site("relu()#5", 4, {3}, {2}, "t"),
    Site("relu()#6", 4, {0, 3}, {1}, "u"),
    seed=3,
)
def einsum_of_every_form():
    def some(*shape):
        return nn.Parameter(torch.randn(*shape))

    return Chain(
        _einsums, a=some(5, 6), p=some(5), b=some(2, 5, 4), q=some(2, 4), c=some(3, 4), r=some(3),
        d=some(2, 3, 6), s=some(6), e=some(6, 4), t=some(4), f=some(4), u=some(4),
    )  # fmt: skip


@case(normal(6), Site("relu()", 5, {1, 4}, {0}, "layer.bias"))
def bilinear():
    return Chain(lambda m, x: F.relu(m.layer(x, x)), layer=nn.Bilinear(6, 6, 5))


def _of_tokens(m, x):
    flat = x.reshape(1, -1, 6)
    return F.relu(flat @ m.w + m.b[:, None])


def members_of_tokens(pre, num_inputs):
    """(members, inputs x positions, features)."""
    return pre.unflatten(1, (num_inputs, -1)).permute(1, 0, 3, 2).flatten(1, 2)


@case(normal(5, 6), Site("relu()", 12, {1, 10}, {6}, "b", arrange=members_of_tokens))
def ensemble_on_flattened_tokens():
    return Chain(_of_tokens, **_parts())
