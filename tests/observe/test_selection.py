"""What a top-k, a threshold or another layer's mask selects fires; what weighs other parts of a model is no unit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import relu_doctor
from relu_doctor.errors import NoActivationSitesError
from tests.planted_layers import DEAD, SPECIAL, Module, Net, dead_units, fires_by_output, inputs, planted


class Jump(torch.autograd.Function):
    """A JumpReLU with a straight-through gradient for its threshold, as sparse autoencoders train it."""

    @staticmethod
    def forward(ctx, x, threshold):
        ctx.save_for_backward(x, threshold)
        return x * (x > threshold).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        x, threshold = ctx.saved_tensors
        return gradient * (x > threshold), None


def relu_above_its_own_threshold(z):
    acts = F.relu(z)
    return acts * (acts > 0.3)


def read_twice(z):
    acts = F.relu(z)
    return acts * 0.5 + acts.topk(1).values


def top_k_of_relu(z):
    acts = F.relu(z)
    top = acts.topk(2, sorted=False, dim=-1)
    return torch.zeros_like(acts).scatter_(dim=-1, index=top.indices, src=top.values)


def relu_of_top_k(z):
    values, indices = torch.topk(z, k=3, dim=-1)
    result = torch.zeros_like(z)
    result.scatter_(-1, indices, F.relu(values))
    return result


def relu_of_scattered(z):
    values, indices = z.topk(3)
    return torch.zeros_like(z).scatter(-1, indices, values).relu()


def plain_top_k(z):
    values, indices = z.topk(2)
    return z.new_zeros(z.shape).scatter(-1, indices, values)


def batch_top_k(z):
    acts = F.relu(z).flatten()
    top = acts.topk(2 * len(z), dim=-1)
    return torch.zeros_like(acts).scatter(-1, top.indices, top.values).reshape(z.shape)


def masked_top_k(z):
    indices = z.topk(2).indices
    return z * torch.zeros_like(z).scatter_(-1, indices, 1.0)


def by_kth_value(z):
    return z * (z >= z.topk(2).values[..., -1:])


def top_k_by_a_flat_mask(z):
    acts = F.relu(z)
    mask = torch.zeros_like(acts.flatten())
    mask[acts.flatten().topk(2 * len(z)).indices] = 1
    return acts * mask.view_as(acts)


def top_k_of_what_is_boosted(z):
    chosen = (z * torch.linspace(0.5, 1.5, 7)).topk(2).indices
    return torch.zeros_like(z).scatter_(-1, chosen, z.gather(-1, chosen))


def below_the_kth_value_of_what_is_boosted(z):
    boosted = z * torch.linspace(0.5, 1.5, 7)
    return z.masked_fill(boosted < boosted.kthvalue(5, dim=-1, keepdim=True).values, 0)


def top_k_of_a_scaled_relu(z):
    acts = F.relu(z)
    chosen = (acts * torch.linspace(0.5, 1.5, 7)).topk(2).indices
    return torch.zeros_like(acts).scatter(-1, chosen, acts.gather(-1, chosen))


def top_k_by_magnitude(z):
    chosen = z.abs().topk(2).indices
    return torch.zeros_like(z).scatter(-1, chosen, z.gather(-1, chosen))


def above_the_kth_of_relu(z):
    acts = F.relu(z)
    return torch.where(acts >= acts.kthvalue(6, dim=-1, keepdim=True).values, acts, torch.zeros_like(acts))


def above_the_mean_of_relu(z):
    acts = F.relu(z)
    return acts * (acts > acts.mean(-1, keepdim=True))


def by_rank(z):
    return torch.where(z.argsort(-1, descending=True).argsort(-1) < 2, F.relu(z), 0.0)


def by_sorting(z):
    order = z.sort(-1, descending=True).indices
    return F.relu(z) * torch.zeros_like(z).scatter(-1, order[..., :2], 1.0)


def one_hot(z):
    return F.relu(z) * F.one_hot(z.topk(2).indices, 7).sum(-2)


def two_top_ks(z):
    acts = F.relu(z)
    many, few = acts.topk(3), acts.topk(1)
    return torch.zeros_like(acts).scatter(-1, *reversed(many)) + torch.zeros_like(acts).scatter(-1, *reversed(few))


def top_k_and_threshold(z):
    values, indices = F.relu(z).topk(3)
    kept = torch.zeros_like(z).scatter(-1, indices, values)
    return kept * (kept > 0.3)


def relu_beyond_its_threshold(z):
    return F.relu(z - 0.3) + 0.3 * (z > 0.3)


SELECTING = {
    "jump": lambda z: Jump.apply(z, torch.tensor(0.3)),
    "above_a_threshold": lambda z: z * (z > 0.3),
    "relu_above_a_threshold": lambda z: F.relu(z) * (z > 0.3),
    "relu_above_its_own_threshold": relu_above_its_own_threshold,
    "threshold_from_the_left": lambda z: torch.where(torch.full((7,), 0.3) < z, z, 0),
    "top_k_of_relu": top_k_of_relu,
    "relu_of_top_k": relu_of_top_k,
    "relu_of_scattered": relu_of_scattered,
    "plain_top_k": plain_top_k,
    "batch_top_k": batch_top_k,
    "masked_top_k": masked_top_k,
    "by_kth_value": by_kth_value,
    "top_k_by_a_flat_mask": top_k_by_a_flat_mask,
    "top_k_of_what_is_boosted": top_k_of_what_is_boosted,
    "below_the_kth_value_of_what_is_boosted": below_the_kth_value_of_what_is_boosted,
    "top_k_of_a_scaled_relu": top_k_of_a_scaled_relu,
    "top_k_by_magnitude": top_k_by_magnitude,
    "above_the_kth_of_relu": above_the_kth_of_relu,
    "above_the_mean_of_relu": above_the_mean_of_relu,
    "by_rank": by_rank,
    "by_sorting": by_sorting,
    "one_hot": one_hot,
    "two_top_ks": two_top_ks,
    "top_k_and_threshold": top_k_and_threshold,
    "relu_beyond_its_threshold": relu_beyond_its_threshold,
}


@pytest.mark.parametrize("shape", [(8,), (5, 8)], ids=["features", "sequences"])
@pytest.mark.parametrize("name", SELECTING)
def test_a_unit_fires_where_it_is_selected(name, shape):
    """Each way of selecting is one site, whose firings are those of the stored outputs."""
    function = SELECTING[name]
    model, batches = Net(function), list(inputs(*shape).split(20))
    with torch.no_grad():
        fired = torch.cat([fires_by_output(function, model.first(batch)) for batch in batches])
    diagnosis = relu_doctor.scan(model, batches, exhaustive=True)
    assert len(diagnosis.sites) == 1
    assert diagnosis.units["inputs_fired"].tolist() == fired.sum(0).tolist()
    assert set((fired.sum(0) == 0).nonzero().flatten().tolist()) == set(*dead_units(diagnosis))
    if "magnitude" not in name:
        assert fired[:, 2].nonzero().flatten().tolist() == [SPECIAL]
        assert set(*dead_units(diagnosis)) >= DEAD


@pytest.mark.parametrize("name", sorted(SELECTING))
def test_minimal_statistics_count_what_is_selected(name):
    """statistics="minimal" sees the same firings."""
    model, x = Net(SELECTING[name]), inputs(8)
    full, minimal = (relu_doctor.scan(model, x, statistics=kind, exhaustive=True) for kind in ("full", "minimal"))
    assert full.units["inputs_fired"].tolist() == minimal.units["inputs_fired"].tolist()
    assert dead_units(full) == dead_units(minimal)


def test_a_unit_that_is_positive_but_never_selected_is_dead():
    """What a ReLU lets pass and the top-k behind it never selects gets no gradient, and the report says so."""
    model = Net(top_k_of_relu)
    with torch.no_grad():
        model.first.weight[6] = 0
        model.first.bias[6] = 1e-3  # always positive, always outdone
    x = inputs(8)
    with torch.no_grad():
        fired = fires_by_output(top_k_of_relu, model.first(x))
        x = x[fired[:, [0, 3, 5]].sum(1) >= 2]  # two others fire, so that the constant is not among the top two
    diagnosis = relu_doctor.scan(model, x, exhaustive=True)
    unit = diagnosis.units.iloc[6]
    assert (unit["status"], unit["mechanism"], unit["pre_max"] > 0) == ("dead", "not_selected", True)


def test_a_relu_that_is_also_read_past_its_top_k_fires_where_it_is_positive():
    """A gradient reaches it on the other way."""
    model = Net(lambda z: top_k_of_relu(z) + F.relu(z) * 0.5)
    both = Net(read_twice)
    x = inputs(8)
    with torch.no_grad():
        positive = (model.first(x) > 0).sum(0).tolist()
    assert relu_doctor.scan(both, x, exhaustive=True).units["inputs_fired"].tolist() == positive
    assert len(relu_doctor.scan(model, x, exhaustive=True).sites) == 1  # one set of producers, one site


def test_a_learned_threshold_per_unit_decides():
    """JumpReLU fires above its own threshold, unit by unit."""

    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = planted(8), nn.Linear(7, 8)
            self.log_threshold = nn.Parameter(torch.linspace(-3, 1, 7))

        def forward(self, x):
            z = self.first(x)
            return self.last(Jump.apply(z, self.log_threshold.exp()))

    model, x = Sparse(), inputs(8)
    with torch.no_grad():
        expected = (model.first(x) > model.log_threshold.exp()).sum(0).tolist()
    diagnosis = relu_doctor.scan(model, x, exhaustive=True)
    assert diagnosis.units["inputs_fired"].tolist() == expected
    assert dead_units(diagnosis) == [{unit for unit, count in enumerate(expected) if count == 0}] != [DEAD]


def test_top_k_over_channels_of_a_convolution():
    """Which unit a chosen value belongs to is told on any axis."""

    class Channels(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 6, 3)
            with torch.no_grad():
                self.conv.bias[[1, 4]] = -100.0

        def forward(self, x):
            acts = self.conv(x).relu()
            values, indices = acts.topk(1, dim=1)
            return torch.zeros_like(acts).scatter(1, indices, values)

    model, x = Channels(), torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        fired = (model(x) != 0).flatten(2).any(2)
    diagnosis = relu_doctor.scan(model, x, exhaustive=True)
    assert diagnosis.units["inputs_fired"].tolist() == fired.sum(0).tolist()
    assert fired.any(0).sum() < 6


class Gated(nn.Module):
    """A gated sparse autoencoder: one half of the encoder tells which latents, the other how much."""

    def __init__(self, multiply):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder, self.multiply = nn.Linear(8, 7, bias=False), nn.Linear(7, 8), multiply
        self.scale, self.gate, self.magnitude = (nn.Parameter(torch.zeros(7)) for _ in range(3))
        with torch.no_grad():
            self.gate[[1, 4]] = -100.0
            self.magnitude[5] = -100.0

    def parts(self, x):
        z = self.encoder(x)
        return z + self.gate, z * self.scale.exp() + self.magnitude

    def forward(self, x):
        gate, magnitude = self.parts(x)
        return self.decoder(self.multiply(gate, F.relu(magnitude)))


@pytest.mark.parametrize(
    "multiply",
    [
        lambda gate, acts: (gate > 0).float() * acts,
        lambda gate, acts: acts * (gate > 0),
        lambda gate, acts: torch.where(gate > 0, acts, torch.zeros_like(acts)),
        lambda gate, acts: acts.masked_fill(gate <= 0, 0.0),
    ],
    ids=["mask_first", "mask_last", "where", "masked_fill"],
)
def test_a_relu_that_another_layer_gates_fires_where_both_let_it(multiply):
    """A latent whose gate never opens is dead, however large its magnitude."""
    model, batches = Gated(multiply), list(inputs(8).split(20))
    with torch.no_grad():
        fired = sum(((gate > 0) & (magnitude > 0)).sum(0) for gate, magnitude in map(model.parts, batches))
    diagnosis = relu_doctor.scan(model, batches, exhaustive=True)
    assert diagnosis.units["inputs_fired"].tolist() == fired.tolist()
    assert dead_units(diagnosis) == [{1, 4, 5}]


def test_dropout_and_padding_do_not_gate_a_relu():
    """A mask that no layer makes holds no unit back."""
    model, x = Net(lambda z: F.relu(z) * (torch.rand_like(z) > 0.9) * (torch.ones_like(z) > 0)), inputs(8)
    with torch.no_grad():
        positive = (model.first(x) > 0).sum(0).tolist()
    assert relu_doctor.scan(model, list(x.split(20)), exhaustive=True).units["inputs_fired"].tolist() == positive


@pytest.mark.parametrize(
    "decode",
    [
        lambda values, indices, rows: torch.einsum("bk,bkd->bd", values, rows[indices]),
        lambda values, indices, rows: (values.unsqueeze(-1) * rows[indices]).sum(1),
        lambda values, indices, rows: F.embedding_bag(indices, rows, per_sample_weights=values, mode="sum"),
    ],
    ids=["einsum", "product", "embedding_bag"],
)
@pytest.mark.parametrize("activation", [F.relu, lambda z: z], ids=["relu", "bare"])
def test_codes_that_are_decoded_without_being_put_back(activation, decode):
    """A top-k whose values are multiplied with the rows of a weight that its indices look up is a site."""

    class Looked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.rows = planted(8), nn.Parameter(torch.randn(7, 8))

        def forward(self, x):
            return decode(*activation(self.first(x)).topk(2), self.rows)

    model, batches = Looked(), list(inputs(8).split(20))
    with torch.no_grad():
        acts = [activation(model.first(batch)) for batch in batches]
    fired = sum((torch.zeros_like(a).scatter(-1, *reversed(a.topk(2))) != 0).sum(0) for a in acts)
    diagnosis = relu_doctor.scan(model, batches, exhaustive=True)
    assert diagnosis.units["inputs_fired"].tolist() == fired.tolist()
    assert dead_units(diagnosis) == [{unit for unit, count in enumerate(fired.tolist()) if not count}] != [set()]


def test_an_auxiliary_top_k_of_what_is_dead_is_no_site():
    """A second top-k that chooses among masked latents only, for an auxiliary loss, is remarked on and not counted."""

    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = planted(8), nn.Linear(7, 8)

        def forward(self, x):
            z = self.first(x)
            masked = torch.where(torch.arange(7) == 4, z, -torch.inf)
            self.loss = self.last(relu_of_top_k(z)) - self.last(relu_of_top_k(masked))
            return self.last(relu_of_top_k(z))

    diagnosis = relu_doctor.scan(Auxiliary(), list(inputs(8).split(20)), exhaustive=True)
    assert diagnosis.sites["num_units"].tolist() == [7]
    assert dead_units(diagnosis)[0] >= DEAD
    assert "topk() chooses from what a mask leaves: no site" in diagnosis.table.coverage.notes


class Experts(nn.Module):
    """Experts whose outputs a router's gates weigh; two of them are never chosen."""

    def __init__(self, route, mix):
        super().__init__()
        torch.manual_seed(0)
        self.router, self.route, self.mix = planted(8), route, mix
        self.up, self.down = nn.Parameter(torch.randn(7, 8, 5)), nn.Parameter(torch.randn(7, 5, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        outputs = torch.einsum("beh,eho->beo", F.gelu(torch.einsum("bi,eih->beh", x, self.up)), self.down)
        return self.head(self.mix(self.route(self.router(x)), outputs))


def sparse(values, indices):
    return torch.zeros(len(values), 7).scatter(1, indices, values)


def noisy_top_k(logits):
    values, indices = (logits + 0.01 * torch.randn_like(logits)).topk(2)
    return torch.full_like(logits, -torch.inf).scatter(-1, indices, values).softmax(-1)


def normalised_by_kth(logits):
    p = logits.softmax(-1)
    p = torch.where(p >= p.topk(2).values[:, -1:], p, torch.zeros_like(p))
    return p / p.sum(-1, keepdim=True)


ROUTES = {
    "softmax_first": lambda logits: sparse(*logits.softmax(-1).topk(2)),
    "softmax_last": lambda logits: sparse((top := logits.topk(2)).values.softmax(-1), top.indices),
    "sigmoid": lambda logits: sparse(*logits.sigmoid().topk(2)),
    "raw": lambda logits: sparse(*logits.topk(2)),
    "positive": lambda logits: sparse((top := logits.topk(2)).values.relu(), top.indices),
    "noisy": noisy_top_k,
    "threshold": lambda logits: logits.sigmoid() * (logits.sigmoid() > 0.5),
    "threshold_of_softmax": lambda logits: (p := logits.softmax(-1)) * (p > 0.1),
    "normalised_by_kth": normalised_by_kth,
    "mask_of_top_k": lambda logits: logits.sigmoid() * torch.zeros_like(logits).scatter(1, logits.topk(2).indices, 1.0),
}
MIXES = {
    "einsum": lambda gates, outputs: torch.einsum("be,beo->bo", gates, outputs),
    "product": lambda gates, outputs: (gates.unsqueeze(-1) * outputs).sum(1),
    "one_by_one": lambda gates, outputs: sum(gates[:, k : k + 1] * outputs[:, k] for k in range(7)),
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("route", ROUTES)
def test_a_router_is_no_site(route, mix):
    """What weighs the outputs of experts is no unit, and no expert is dead, however it is chosen."""
    diagnosis = relu_doctor.scan(Experts(ROUTES[route], MIXES[mix]), list(inputs(8).split(20)), exhaustive=True)
    assert diagnosis.sites["rectifier"].tolist() == ["gelu"]


@pytest.mark.parametrize(
    "function",
    [
        lambda z: z.topk(3).values.mean(-1, keepdim=True),
        lambda z: z.gather(-1, z.topk(3).indices.sort(-1).values),
        lambda z: (z @ z.T).topk(2).values.softmax(-1),
    ],
    ids=["pooling", "k_max", "attention"],
)
def test_a_top_k_that_pools_is_no_site(function):
    """Values that are taken out of their places are read by nothing that knows units."""
    with pytest.raises(NoActivationSitesError):
        relu_doctor.scan(nn.Sequential(planted(8), Module(function)), inputs(8))


def test_no_activation_outlives_a_scan():
    """Ledgers and modes hold activations weakly: with the scan over, none is alive."""
    import gc
    import weakref

    kept: list[weakref.ref] = []

    def keep(z):
        kept.append(weakref.ref(z))
        return top_k_of_relu(z)

    relu_doctor.scan(Net(keep), inputs(8))
    gc.collect()
    assert kept
    assert all(reference() is None for reference in kept)
