"""Scans within scans, probes beside probes, threads beside threads: right, or refused in one sentence."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _python_dispatch

import relu_doctor
from relu_doctor.errors import NoActivationSitesError, UnsupportedModelError
from relu_doctor.observe.forwards.registry import Reading
from relu_doctor.observe.probe import Probe
from tests.left_as_it_was.fingerprint import assert_same, fingerprint, of_model, of_process
from tests.left_as_it_was.scenes import arguments_of, inputs, mlp
from tests.planting import clone
from tests.zoo import CASES


def table(model: nn.Module, batches: Any = None) -> pd.DataFrame:
    """Every column of a scan of a model."""
    return relu_doctor.scan(model, inputs().split(20) if batches is None else batches).units


class Once:
    """Scans a model in the middle of whatever calls it, but not in the middle of that scan."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.found: list[pd.DataFrame] = []
        self.busy = False

    def __call__(self, *_: object) -> None:
        if not self.busy:
            self.busy = True
            try:
                self.found.append(table(self.model))
            finally:
                self.busy = False


@pytest.mark.parametrize("which", ["the same model", "another model", "a part of it"])
def test_a_scan_within_a_forward_hook_and_the_one_around_it_are_both_right(which):
    """In the first forward, which is discovered, and in those that are recognised."""
    model = mlp()
    alone, part = table(model), table(nn.Sequential(*mlp()[:2]))
    inner = Once({"the same model": model, "another model": mlp(), "a part of it": nn.Sequential(*model[:2])}[which])
    model[1].register_forward_hook(inner)
    before = fingerprint(model)
    found = table(model)
    assert_same(before, fingerprint(model))
    assert found.equals(alone)
    assert len(inner.found) > 3
    assert all(each.equals(part if which == "a part of it" else alone) for each in inner.found)


@pytest.mark.parametrize("where", ["tap", "rectifier", "forward", "data", "mask", "progress"])
def test_a_scan_within_any_function_of_the_users_is_right(where):
    """Within the function of a tap, of a rectifier, in forward=, the data, mask= and progress=."""

    class Gate(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z.abs()

    class Taps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.gate = mlp()[0], Gate()

        def forward(self, x: Tensor) -> Tensor:
            z = self.layer(x)
            return relu_doctor.tap("tap", z, z.abs(), fires=fires) if where == "tap" else F.relu(self.gate(z) - 1)

    inner, alone, model = Once(mlp()), table(mlp()), Taps()

    def fires(pre: Tensor, post: Tensor) -> Tensor:
        inner()
        return pre > 0

    def forward(model: nn.Module, batch: Tensor) -> object:
        inner()
        return model(batch)

    arguments: dict[str, dict[str, Any]] = {
        "rectifier": {"rectifiers": [relu_doctor.Rectifier(Gate, fires=fires)]},
        "forward": {"forward": forward},
        "mask": {"mask": inner},
        "progress": {"progress": inner},
    }
    batches = (batch for batch in inputs().split(20) if where != "data" or inner() is None)
    expected = relu_doctor.scan(model, inputs().split(20), **{"rectifier": arguments["rectifier"]}.get(where, {})).units
    before = fingerprint(model)
    found = relu_doctor.scan(model, batches, **arguments.get(where, {})).units
    assert_same(before, fingerprint(model))
    assert found.equals(expected)
    assert inner.found
    assert all(each.equals(alone) for each in inner.found)


def test_two_probes_on_one_model_each_count_what_they_watch():
    """Open at the same time, by turns, one closed before the other, and one forward watched by both."""
    model, x = mlp(), inputs()
    expected = [(torch.relu(model[0](x)) > 0).sum(0).tolist(), (model(x) > 0).sum(0).tolist()]
    before = fingerprint(model)

    def fired(probe: Probe, times: int) -> list[list[float]]:
        return [(stats.inputs_fired / times).tolist() for stats in probe.stats["eval"].values()]

    with Probe(model) as one:
        with Probe(model) as other:
            for _ in range(3):
                one.observe(lambda: model(x), Reading(40, None, 0))
                other.observe(lambda: model(x), Reading(40, None, 0))
        one.observe(lambda: model(x), Reading(40, None, 0))
    assert fired(one, 4) == fired(other, 3) == expected
    with Probe(model) as one, Probe(model) as other:
        for _ in range(3):
            one.observe(lambda: other.observe(lambda: model(x), Reading(40, None, 0)), Reading(40, None, 0))
    assert fired(one, 3) == expected
    assert fired(other, int(next(iter(other.stats["eval"].values())).inputs[0]) // 40) == expected
    assert_same(before, fingerprint(model))


THREADED = [
    "resnet",
    "mlp",
    "densenet",
    "siamese",
    "transformer_encoder",
    "functions",
    "recurrent_over_steps",
    "autocast",
]


def test_scans_of_several_models_in_threads_give_what_they_give_one_after_the_other():
    """Also the process is as it was: random states, and what torch notes for all threads together."""
    built = [CASES[name].build() for name in THREADED]

    def run(index: int) -> pd.DataFrame:
        model, batches = built[index]
        return relu_doctor.scan(model, clone(batches), **arguments_of(CASES[THREADED[index]])).units

    alone = [run(index) for index in range(len(built))]
    models, process = [of_model(model) for model, _ in built], of_process()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, range(len(built))))
    assert all(one.equals(other) for one, other in zip(found, alone, strict=True))
    for (model, _), before in zip(built, models, strict=True):
        assert_same(before, of_model(model))
    assert_same({name: value for name, value in process.items() if name != "own threads"}, of_process())
    assert not _python_dispatch._is_in_torch_dispatch_mode


def test_scans_of_one_model_in_threads_wait_for_each_other():
    """A model, and parts of it, are scanned by one thread at a time, and all tables are right."""
    model = CASES["resnet"].build()[0]
    batches = CASES["resnet"].build()[1]
    alone = table(model, clone(batches))
    before = of_model(model)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: table(model, clone(batches)), range(5)))
    assert all(each.equals(alone) for each in found)
    assert_same(before, of_model(model))


def test_a_scan_within_a_scan_that_would_wait_for_ever_is_refused():
    """Two threads, each in a scan of its own, do not wait for each other's model."""
    one, other = mlp(), mlp()
    meeting, errors = threading.Barrier(2, timeout=60), []

    def scan_both(own: nn.Module, others: nn.Module) -> None:
        first = [True]

        def hook(*_: object) -> None:
            if first.pop() if first else False:
                meeting.wait()
                try:
                    relu_doctor.scan(others, inputs())
                except UnsupportedModelError as error:
                    errors.append(str(error))
                meeting.wait()

        handle = own[0].register_forward_hook(hook)
        relu_doctor.scan(own, inputs())
        handle.remove()

    with ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(scan_both, one, other), pool.submit(scan_both, other, one)]:
            each.result()
    assert len(errors) == 2
    assert "is being scanned by another thread" in errors[0]


class Threads(nn.Module):
    """Runs a part of itself in a thread of its own."""

    def __init__(self, *, all_of_it: bool) -> None:
        super().__init__()
        self.part, self.layer, self.all_of_it = mlp(), nn.Linear(6, 3), all_of_it

    def forward(self, x: Tensor) -> Tensor:
        results: list[Tensor] = []
        thread = threading.Thread(target=lambda: results.append(self.part(x)))
        thread.start()
        thread.join()
        return results[0] if self.all_of_it else torch.relu(self.layer(x)).sum(1) + results[0].sum(1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of batches that do not fit
def test_what_a_model_does_in_threads_of_its_own_is_named():
    """It cannot be seen: it is said where, and nothing of it passes for dead."""
    model = Threads(all_of_it=False)
    before = fingerprint(model)
    diagnosis = relu_doctor.scan(model, inputs())
    assert_same(before, fingerprint(model))
    assert diagnosis.sites["site"].tolist() == ["relu()"]
    assert "part ran in another thread, where nothing is observed" in diagnosis.table.coverage.notes
    with pytest.raises(NoActivationSitesError):
        relu_doctor.scan(Threads(all_of_it=True), inputs())


def test_a_forward_that_is_a_generator_is_run_to_its_end():
    """Its calls are made while it is iterated, which a scan does."""

    class Yields(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp()

        def forward(self, x: Tensor) -> Any:
            for layer in self.layers:
                x = layer(x)
                yield x

    columns = ["unit", "inputs_fired", "pre_max", "bias"]
    model = Yields()
    before = fingerprint(model)
    assert relu_doctor.scan(model, inputs()).units[columns].equals(relu_doctor.scan(mlp(), inputs()).units[columns])
    assert_same(before, fingerprint(model))
