"""What is kept is a few bytes per unit however much is read; what is set aside meanwhile is no activation's copy."""

from __future__ import annotations

import gc
import tracemalloc
from dataclasses import fields

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from relu_doctor.observe.forwards.recorder import Recorder
from relu_doctor.observe.forwards.registry import Reading
from relu_doctor.observe.probe import Probe
from relu_doctor.observe.rectifiers.kinds import Rectifier
from relu_doctor.observe.statistics import fused, plain
from relu_doctor.observe.statistics.kernels import summarize
from relu_doctor.observe.statistics.stats import UnitStats
from relu_doctor.terms import Statistics

RELU = Rectifier("relu", clips=True)
MOST = {Statistics.FULL: 128, Statistics.MINIMAL: 16}


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 256, 3), nn.BatchNorm2d(256), nn.ReLU(), nn.Conv2d(256, 64, 3), nn.ReLU6(), nn.Flatten(),
        nn.Linear(64 * 16, 512), nn.ReLU(inplace=True),
    ).eval()  # fmt: skip


@pytest.fixture(params=[True, False], ids=["compiled", "plain"])
def loops(request, monkeypatch):
    """With the compiled loops for every call, or without."""
    if request.param:
        monkeypatch.setattr(fused, "LARGE", 1)
    else:
        monkeypatch.setattr(fused, "_compiled", lambda: None)


def observed(probe, model, batches, *, first=0):
    with torch.no_grad():
        for index, batch in enumerate(batches):
            probe.observe(lambda batch=batch: model(batch), Reading(len(batch), None, first + index * len(batch)))


def held(stats: UnitStats) -> int:
    """Bytes of all storages, each counted once."""
    tensors = [value for declared in fields(stats) if isinstance(value := getattr(stats, declared.name), torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("statistics", MOST)
def test_a_unit_takes_few_bytes(statistics, dtype, loops):
    """At most 128 bytes of the full statistics and 16 of the minimal, plus some for the site; also after merging."""
    model = net().to(dtype)
    batches = torch.randn(3, 16, 3, 8, 8).to(dtype)
    batches[2, 4:6] = torch.nan
    with Probe(model, statistics=statistics) as probe:
        observed(probe, model, batches)
        for stats in probe.stats["eval"].values():
            for kept in (stats, stats.merge(stats), stats.merge(UnitStats.empty(stats.num_units)), stats.to("cpu")):
                assert held(kept) <= MOST[statistics] * kept.num_units + 128
            assert stats.inputs.tolist() == [48] * stats.num_units
            assert (stats.non_finite_values > 0).all()


def test_what_is_the_same_for_all_units_is_held_once():
    """Statistics that were not measured, or count the same for each unit, are one element, and stay so in merging."""
    empty = UnitStats.empty(1000)
    assert held(empty) < 128
    assert held(empty.merge(empty)) < 128
    some = UnitStats.of(1000, {"pre_max": torch.randn(1000)})
    assert held(some.merge(empty)) == held(empty.merge(some)) < 4000 + 128
    assert some.merge(empty).num_units == 1000


def test_nothing_grows_over_ten_thousand_batches(monkeypatch):
    """What is kept and remembered is as large after 10,000 forwards as after 100, whatever their lengths."""
    monkeypatch.setattr(fused, "LARGE", 1)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU())
    with Probe(model) as probe:
        observed(probe, model, [torch.randn(4, 5)] * 3)
        (site,), kept, sizes = probe.sites(), {}, []

        def forwards(number):
            for index in range(number):
                pre = torch.randn(2 + index % 7, 3, 8)
                recorder = Recorder(probe.known, Reading(len(pre), None, index), Statistics.FULL)
                pending = recorder.begin(site, pre, None)
                recorder.end(pending, pre.relu())
                recorder.stage(pending)
                recorder.commit(kept)
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])

        tracemalloc.start()
        try:
            forwards(100)
            before = held(kept[site.site_id])
            forwards(10_000)
        finally:
            tracemalloc.stop()
        assert held(kept[site.site_id]) == before
        assert sizes[1] - sizes[0] < 20_000
        assert int(kept[site.site_id].inputs[0]) == sum(
            2 + index % 7 for number in (100, 10_000) for index in range(number)
        )


def test_ways_to_arrange_a_call_are_not_remembered_without_end(monkeypatch):
    """Sequences of ever new lengths do not fill the memory."""
    monkeypatch.setattr("relu_doctor.observe.forwards.recorder._MOST_ARRANGEMENTS", 10)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU())
    with Probe(model) as probe:
        observed(probe, model, [torch.randn(2, length, 5) for length in range(1, 40)])
        assert len(probe.known.arrangements) <= 10


def set_aside(work) -> int:
    """The most bytes that were held at once while something ran, of torch's and of numpy's memory."""
    work()
    tracemalloc.start()
    try:
        work()
        python = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        work()
    now = most = 0
    for event in watched.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return python + most


LAYOUTS = {
    "feature maps": lambda: torch.randn(32, 16, 8192),
    "channels last": lambda: torch.randn(32, 8192, 16).transpose(1, 2),
    "one position": lambda: torch.randn(4096, 1024)[:, :, None],
    "one input": lambda: torch.randn(1, 64, 65536),
}


@pytest.mark.parametrize("case", ["finite", "padded", "not finite", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("least", [False, True], ids=["full", "minimal"])
def test_no_call_sets_aside_a_copy_of_its_values(layout, case, least, loops):
    """A small multiple of (inputs, units), or of a block of fixed size, of activations of 16 MiB."""
    pre, valid = LAYOUTS[layout](), None
    inputs, units, positions = pre.shape
    if case == "padded":
        valid = torch.rand(inputs, positions) < 0.8
    elif case == "not finite":
        pre[::2, ::3, ::5] = torch.nan
    elif case.endswith("16"):
        pre = pre.to(getattr(torch, case))
    most = set_aside(lambda: summarize(pre, RELU, valid, least=least, compiled=fused._compiled() is not None))
    blocks = 0 if fused._compiled() else 8 * 4 * plain.BLOCK
    assert most <= 8 * inputs * units + blocks + 200 * units + 100_000 * (1 + torch.get_num_threads())
    assert pre.numel() * 4 >= plain.BLOCK * 4 * 8


@pytest.mark.parametrize("tokens", [False, True])
def test_odd_layouts_are_copied_in_blocks(tokens, loops):
    """Where no view exists, some inputs are arranged at a time, for inputs and for tokens alike."""
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU())
    with Probe(model) as probe:
        observed(probe, model, [torch.randn(64, 3, 4, 4)] * 2)
        (site,) = probe.sites()
        pre = torch.randn(64, 64, 16, 80).permute(0, 2, 1, 3)[..., 3:67]  # no view has its positions in one axis
        recorder = Recorder(probe.known, Reading(64, None, 0), Statistics.FULL, tokens=tokens)
        most = set_aside(lambda: recorder.begin(site, pre, None))
        evidence = 64 * 16 * (64 * 64 if tokens else 1)  # whether it fired: (inputs or tokens, units)
        assert most < pre.numel() * 4 / 2 + 3 * evidence
        pending = recorder.begin(site, pre, None)
        recorder.end(pending, pre.relu())
        stats, right = pending.summary.stats, pre.double()
        torch.testing.assert_close(stats.pre_mean, right.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
        assert torch.equal(stats.positions_fired, (pre > 0).sum((0, 2, 3)))
        assert pending.summary.fired.numel() == evidence
