"""On a GPU nothing waits for it, and the numbers are those of a CPU; without one, meta tensors stand in for its own."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from relu_doctor.observe.forwards.registry import Reading
from relu_doctor.observe.graph.names import ParameterNames
from relu_doctor.observe.probe import Probe
from relu_doctor.observe.rectifiers.kinds import Rectifier
from relu_doctor.observe.statistics import on_gpu
from relu_doctor.observe.statistics.kernels import count_inputs, output_magnitude, pool_rows, summarize
from relu_doctor.terms import Statistics
from tests.zoo import CASES

RELU = Rectifier("relu", clips=True)
GELU = Rectifier("gelu", -math.inf)
MODELS = ["mlp", "resnet", "densenet", "sequences", "pixel_shuffle", "crelu_of_many_units", "relu6", "gelu"]
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def known_by(probe, model, inputs):
    """Let a probe see two forwards, of which the first is a discovery."""
    for index in range(2):
        probe.observe(lambda: model(*inputs), Reading(len(inputs[0]), None, index * len(inputs[0])))


def first_batch(name):
    model, batches = CASES[name].build()
    batch = next(iter(batches))
    return model.eval(), batch if isinstance(batch, tuple) else (batch,)


@pytest.mark.parametrize("statistics", list(Statistics))
@pytest.mark.parametrize("name", MODELS)
def test_no_value_on_a_device_is_looked_at(name, statistics, monkeypatch):
    """A forward that is recognised is measured and counted without reading one number: meta tensors have none."""
    model, inputs = first_batch(name)
    with Probe(model, statistics=statistics) as probe, torch.no_grad():
        known_by(probe, model, inputs)
        for site_id, stats in probe.stats["eval"].items():
            probe.stats["eval"][site_id] = stats.to("meta")
        elsewhere, given = copy.deepcopy(model).to("meta"), [tensor.to("meta") for tensor in inputs]
        probe.known.names = ParameterNames(elsewhere)
        monkeypatch.setattr(probe, "_discover", None)  # which may look
        probe.observe(lambda: elsewhere(*given), Reading(len(given[0]), None, 2 * len(given[0])))
        assert all(stats.inputs.is_meta for stats in probe.stats["eval"].values())


@pytest.mark.parametrize("least", [False, True])
@pytest.mark.parametrize("rectifier", [RELU, GELU], ids=lambda rectifier: rectifier.name)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", [(8, 16, 64), (300, 16, 1), (8, 16, 0)])
def test_no_statistic_needs_a_look(shape, padded, rectifier, least):
    """Padding, rows of a selection and the merging of forwards are no reason to wait for a device either."""
    pre = torch.empty(shape, device="meta")
    valid = torch.empty(shape[0], shape[2], dtype=torch.bool, device="meta") if padded else None
    summary = pool_rows(summarize(pre, rectifier, valid, least=least), shape[0] // 2)
    stats = count_inputs(summary.stats, summary.fired & summary.valid[:, None], summary.valid, 0, least=least)
    assert stats.merge(stats).pre_max.is_meta
    assert output_magnitude(pre, valid).is_meta


def test_the_kernel_for_gpus_leaves_other_tensors_alone():
    """Values in this machine's memory, of other dtypes or of no memory at all are for others to reduce."""
    for pre in (torch.randn(3, 4, 5), torch.randn(3, 4, 5).double(), torch.empty(3, 4, 5, device="meta")):
        assert on_gpu.reduce(pre, RELU, None, least=False) is None


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["maps", "channels last", "features", "small maps", "one large map"])
def test_a_gpu_counts_as_a_cpu_does(layout, dtype):
    """Counts and extremes to the last, moments to rounding: with NaN, with padding, and with a large mean."""
    sizes = {
        "maps": (16, 64, 1024),
        "features": (4096, 200, 1),
        "small maps": (64, 300, 49),
        "one large map": (1, 3, 1 << 20),
    }
    generator = torch.Generator().manual_seed(0)
    shape = sizes.get(layout, (8, 1024, 64))
    for mean, spoiled, padded in ((0, False, False), (0, True, False), (0, True, True), (100, False, True)):
        pre = (mean + torch.randn(shape, generator=generator)).to(dtype)
        pre = pre.transpose(1, 2) if layout == "channels last" else pre
        if spoiled:
            pre[torch.rand(pre.shape, generator=generator) < 0.01] = math.nan
            pre[torch.rand(pre.shape, generator=generator) < 0.01] = -math.inf
        valid = torch.rand(pre.shape[0], pre.shape[2], generator=generator) < 0.7 if padded else None
        there = None if valid is None else valid.cuda()
        for least in (False, True):
            here = summarize(pre, RELU, valid, least=least, compiled=False)
            found = summarize(pre.cuda(), RELU, there, least=least, compiled=True)
            assert torch.equal(found.fired.cpu(), here.fired)
            exact = ("positions", "positions_fired", "non_finite_values", "pre_max", "pre_min")
            for name in exact:
                assert torch.equal(getattr(found.stats, name).cpu(), getattr(here.stats, name)), name
            np.testing.assert_allclose(found.stats.pre_mean.cpu(), here.stats.pre_mean, atol=1e-5, rtol=1e-6)
            np.testing.assert_allclose(found.stats.pre_squares.cpu(), here.stats.pre_squares, rtol=1e-4)
            np.testing.assert_allclose(found.stats.post_abs_sum.cpu(), here.stats.post_abs_sum, rtol=1e-5)


@on_a_gpu
def test_the_kernel_works_where_triton_is():
    """A GPU with triton is measured by the kernel, not by what stands in for it."""
    pytest.importorskip("triton")
    assert on_gpu.reduce(torch.randn(8, 16, 64, device="cuda"), RELU, None, least=False) is not None


@on_a_gpu
@pytest.mark.parametrize("statistics", list(Statistics))
@pytest.mark.parametrize("name", MODELS)
def test_a_forward_on_a_gpu_is_not_waited_for(name, statistics):
    """Once its calls are known, observing a forward makes the host wait at no place."""
    model, inputs = first_batch(name)
    model, inputs = model.cuda(), [tensor.cuda() for tensor in inputs]
    with Probe(model, statistics=statistics) as probe, torch.no_grad():
        probe.known.compiles = True  # large calls, as far as the kernels are concerned
        known_by(probe, model, inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            probe.observe(lambda: model(*inputs), Reading(len(inputs[0]), None, 2 * len(inputs[0])))
        finally:
            torch.cuda.set_sync_debug_mode("default")
