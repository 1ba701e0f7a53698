"""Experts: layers that see a selection of the rows of a batch, which the data route to them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.planting import Site, normal
from tests.zoo.registry import case


def _routed(batch: Tensor, num_experts: int = 3) -> Tensor:
    """The expert of each row, which its first feature decides."""
    return (batch[..., 0] * 10).long().abs() % num_experts


class Experts(nn.Module):
    """Rows of (inputs, features) or (inputs, positions, features), each seen by one of three experts."""

    def __init__(self, dispatch) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 5) for _ in range(3))
        self.head = nn.Linear(5, 4)
        self.dispatch = [dispatch]

    def forward(self, x):
        return F.relu(self.head(self.dispatch[0](self.experts, x)))


SITES = (
    Site("relu()#1", 5, {1}, {2}, "experts.0.bias"),
    Site("relu()#2", 5, {0, 4}, {3}, "experts.1.bias"),
    Site("relu()#3", 5, {3}, {1}, "experts.2.bias"),
)
HEAD = Site("relu()#4", 4, {2}, {0}, "head.bias")


def _owners(batch):
    route = _routed(batch)
    return {site.name: [(route == index).nonzero()[:, 0]] for index, site in enumerate(SITES)}


def _calls(batch):
    route = _routed(batch)
    return [site.name for index, site in enumerate(SITES) if bool((route == index).any())] + [HEAD.name]


def _by_mask(experts, x):
    route, out = _routed(x), x.new_zeros(*x.shape[:-1], 5)
    for index, expert in enumerate(experts):
        mask = route == index
        if bool(mask.any()):
            out[mask] = F.relu(expert(x[mask]))
    return out


@case(normal(6), *SITES, HEAD, owners=_owners, order=_calls)
def experts_by_mask():
    return Experts(_by_mask)


@case(normal(4, 6), *SITES, HEAD, owners=_owners, order=_calls)
def experts_by_mask_over_positions():
    return Experts(_by_mask)


def _by_index(experts, x):
    flat = x.reshape(-1, x.shape[-1])
    route, out = _routed(flat), flat.new_zeros(len(flat), 5)
    for index, expert in enumerate(experts):
        (rows,) = torch.where(route == index)
        if len(rows):
            out = out.index_add(0, rows, F.relu(expert(flat.index_select(0, rows))))
    return out.view(*x.shape[:-1], 5)


@case(normal(4, 6), *SITES, HEAD, owners=_owners, order=_calls)
def experts_by_index_of_tokens():
    return Experts(_by_index)


def _sorted(experts, x):
    flat = x.flatten(0, -2)
    route = _routed(flat)
    order = torch.argsort(route, stable=True)
    parts = flat[order].split(torch.bincount(route, minlength=len(experts)).tolist())
    out = torch.cat([F.relu(expert(part)) for expert, part in zip(experts, parts, strict=True)])
    return out[torch.argsort(order)].unflatten(0, x.shape[:-1])


@case(normal(4, 6), *SITES, HEAD, owners=_owners, order=lambda batch: [*(site.name for site in SITES), HEAD.name])
def experts_of_sorted_tokens():
    return Experts(_sorted)


class StackedExperts(nn.Module):
    """Experts whose weights are rows of one parameter, read in a loop over those that are hit."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 5, 6)), nn.Parameter(torch.zeros(3, 5))

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        hit = F.one_hot(_routed(flat), 3).T
        out = flat.new_zeros(len(flat), 5)
        for index in hit.sum(-1).nonzero():
            (rows,) = torch.where(hit[index[0]])
            out.index_add_(0, rows, F.relu(F.linear(flat[rows], self.weight[index[0]], self.bias[index[0]])))
        return out.view(*x.shape[:-1], 5)


@case(
    normal(4, 6),
    Site("relu()#1", 5, {1}, {2}, "bias", (0, 1)),
    Site("relu()#2", 5, {0, 4}, {3}, "bias", (1, 2)),
    Site("relu()#3", 5, {3}, {1}, "bias", (2, 3)),
    owners=_owners,
    order=lambda batch: _calls(batch)[:-1],
)
def experts_in_one_parameter():
    return StackedExperts()


def _top_two(experts, x):
    flat = x.reshape(-1, x.shape[-1])
    first, out = _routed(flat), flat.new_zeros(len(flat), 5)
    for index, expert in enumerate(experts):
        (rows,) = torch.where((first == index) | ((first + 1) % 3 == index))
        out = out.index_add(0, rows, 0.5 * F.relu(expert(flat[rows])))
    return out.view(*x.shape[:-1], 5)


def _two_owners(batch):
    route = _routed(batch)
    return {
        site.name: [((route == index) | ((route + 1) % 3 == index)).nonzero()[:, 0]] for index, site in enumerate(SITES)
    }


@case(normal(4, 6), *SITES, HEAD, owners=_two_owners)
def experts_of_two_each():
    return Experts(_top_two)


class DeepExperts(nn.Module):
    """Experts of two layers, of which the second sees what the first made of a selection."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.LayerNorm(5), nn.Linear(5, 4), nn.ReLU()) for _ in range(2)
        )

    def forward(self, x):
        route, out = _routed(x, 2), x.new_zeros(*x.shape[:-1], 4)
        for index, expert in enumerate(self.experts):
            out[route == index] = expert(x[route == index])
        return out


def _owners_of_two(batch):
    route = _routed(batch, 2)
    owners = {index: [(route == index).nonzero()[:, 0]] for index in (0, 1)}
    return {f"experts.{index}.{place}": owners[index] for index in (0, 1) for place in (1, 4)}


@case(
    normal(4, 6),
    Site("experts.0.1", 5, {1}, {2}, "experts.0.0.bias"),
    Site("experts.0.4", 4, {3}, {0}, "experts.0.3.bias"),
    Site("experts.1.1", 5, {0, 4}, {3}, "experts.1.0.bias"),
    Site("experts.1.4", 4, {1}, {2}, "experts.1.3.bias"),
    owners=_owners_of_two,
)
def experts_of_two_layers():
    return DeepExperts()


def _halves(experts, x):
    """Each half of a batch goes its own way."""
    middle = (len(x) + 1) // 2
    return torch.cat([F.relu(experts[0](x[:middle])), F.relu(experts[1](x[middle:]))])


@case(
    normal(6),
    Site("relu()#1", 5, {1}, {2}, "experts.0.bias"),
    Site("relu()#2", 5, {0, 4}, {3}, "experts.1.bias"),
    Site("relu()#3", 4, {2}, {0}, "head.bias"),
    owners=lambda batch: {
        "relu()#1": [torch.arange((len(batch) + 1) // 2)],
        "relu()#2": [torch.arange((len(batch) + 1) // 2, len(batch))],
    },
)
def halves_of_a_batch():
    return Experts(_halves)


def _late_routes() -> list[Tensor]:
    """Batches of which the first has nothing for the last expert."""
    first, *rest = normal(6, sizes=(10, 20, 20))()
    first[_routed(first) == 2, 0] = 0
    return [first, *rest]


def _all_of_them(experts, x):
    route, out = _routed(x), x.new_zeros(len(x), 5)
    for index, expert in enumerate(experts):
        out[route == index] = F.relu(expert(x[route == index]))
    return out


@case(_late_routes, *SITES, HEAD, owners=_owners, order=lambda batch: [*(site.name for site in SITES), HEAD.name])
def experts_that_see_nothing_at_first():
    return Experts(_all_of_them)
