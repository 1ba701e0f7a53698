"""No activation lives longer because it was watched; what a forward writes to its model is undone."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import relu_doctor
from tests.left_as_it_was.fingerprint import assert_same, fingerprint
from tests.left_as_it_was.scenes import Failing, Lives, arguments_of, call_of, inputs, mlp, names_every
from tests.planting import clone
from tests.zoo import CASES


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the garbage collector: what is in no cycle goes at once."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("name", names_every(8))
def test_a_watched_forward_keeps_no_result_longer_than_the_plain_one(name):
    """At every torch call of a recognised forward the same results are alive as without us; after the scan, none."""
    case = CASES[name]
    model, batches = case.build()
    call, runs = call_of(case), list[Lives]()

    def forward(model: nn.Module, batch: Any) -> object:
        lives = Lives(model)
        runs.append(lives)
        with lives:
            return call(model, batch)

    plain = [clone(batch) for batch in batches]
    with torch.no_grad():
        for batch in plain:
            forward(model, batch)
    expected, runs = [run.log for run in runs], []
    with uncollected():
        relu_doctor.scan(model, batches, forward=forward, **arguments_of(case, "forward"))
        assert [run.alive() for run in runs if run.alive()] == []
    logs = [run.log for run in runs]
    assert all(log in logs for log in expected)


def test_parts_of_parameters_are_let_go():
    """Weights that are picked for each input are as large as activations, and are not held."""

    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(3, 6, 4)), nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            picked = self.weight[torch.arange(len(x)) % 3]
            seen.append(weakref.ref(picked))
            hidden = torch.einsum("bi,bio->bo", x, picked) + self.bias
            del picked
            alive.append(seen[-1]() is not None)
            return torch.relu(hidden)

    seen, alive = list[weakref.ref[Tensor]](), list[bool]()
    with uncollected():
        relu_doctor.scan(Picks(), inputs().split(10))
        assert not any(reference() is not None for reference in seen)
    assert not alive[-1]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [2, 7, 40])
def test_a_failed_scan_holds_nothing(error, at):
    """Once its exception is gone, so are all activations, and the model is free."""
    model = mlp()
    failing, runs = Failing(error, at, again=True, late=False), list[Lives]()

    def forward(model: nn.Module, batch: Tensor) -> object:
        runs.append(Lives(model))
        with failing, runs[-1]:
            return model(batch)

    with uncollected():
        try:
            relu_doctor.scan(model, inputs().split(4), forward=forward, mode="both")
        except (relu_doctor.errors.ForwardError, KeyboardInterrupt) as told:
            del told
        assert [run.alive() for run in runs if run.alive()] == []
        gone = weakref.ref(model)
        del model
        runs.clear()
        assert gone() is None


def test_a_scanned_model_is_free():
    """Nothing of ours holds on to a model, nor to its batches, when its scan is over."""
    model, batches = mlp(), list(inputs().split(10))
    with uncollected():
        diagnosis = relu_doctor.scan(model, batches, mode="both")
        gone = [weakref.ref(model), *map(weakref.ref, batches)]
        del model, batches
        assert [reference() for reference in gone] == [None] * len(gone)
    assert len(diagnosis.units) == 9


class Writes(nn.Module):
    """Writes to everything that it has while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.table = mlp(), nn.Embedding(7, 6, max_norm=0.1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("cache", None)
        self.register_buffer("average", torch.zeros(6))
        self.plain, self.losses, self.nested, self.number = torch.zeros(3), [1], {"a": [1], "b": (2, [3])}, 0
        self.generator, self.numbers = torch.Generator(), np.random.default_rng(0)
        self.random = random.Random(0)
        self.layers[0].weight.grad = torch.ones(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        self.number += 1
        self.calls = self.calls + 1
        self.cache = x.detach()
        self.average.mul_(0.9).add_(x.detach().mean(0))
        self.plain += 1
        self.losses.append(x)
        self.nested["a"].append(self.random.random())
        self.nested["b"][1].append(self.numbers.random())
        self.nested["c"] = x
        if not hasattr(self, "late"):
            self.register_buffer("late", x[0].detach())
            self.extra = nn.Linear(1, 1)
        self.layers[0].weight.data.clamp_(-0.1, 0.1)
        with torch.no_grad():
            self.layers[2].weight.mul_(0.9)
            torch._foreach_add_([self.layers[2].bias], 0.1)
        self.layers[0].bias.data = self.layers[0].bias.data * 2
        self.layers[2].requires_grad_(False)
        self.layers[1].train(not self.layers[1].training)
        noise = torch.rand(1, generator=self.generator) + random.random() + np.random.rand()  # noqa: NPY002
        x = x + self.table(torch.arange(len(x)) % 7) + noise
        with torch.enable_grad():
            self.layers[0](x.detach()).sum().backward()
        return self.layers(F.dropout(x, training=True))

    def train(self, mode: bool = True) -> Writes:
        super().train(mode)
        self.table.requires_grad_(not mode)
        return self


@pytest.mark.parametrize("mode", ["eval", "train", "both"])
def test_what_a_forward_writes_is_undone(mode):
    """Parameters, gradients, buffers, attributes, what is in containers, generators, and what ``train()`` freezes."""
    model, x = Writes(), inputs().split(10)
    before = fingerprint(model)
    held = repr((model.losses, model.nested, model.random.getstate(), model.numbers.bit_generator.state))
    state = model.generator.get_state()
    relu_doctor.scan(model, x, mode=mode)
    assert_same(before, fingerprint(model))
    assert repr((model.losses, model.nested, model.random.getstate(), model.numbers.bit_generator.state)) == held
    assert torch.equal(model.generator.get_state(), state)
