"""The fast kernel gives the plain path's numbers, in every layout, and steps aside where it does not apply."""

from __future__ import annotations

import math

import pytest
import torch

from relu_doctor.observe import fused, kernels
from relu_doctor.observe.rectifiers import Rectifier

LAYOUTS = {
    "feature map": (8, 16, 64),
    "one position": (512, 33, 1),
    "one unit": (64, 1, 200),
    "one input": (1, 50, 300),
}


def summarized(pre, rectifier, monkeypatch, *, fast: bool):
    """A summary by one path or the other."""
    monkeypatch.setattr(fused, "MIN_ELEMENTS", 1 if fast else 1 << 62)
    return kernels.summarize(pre, rectifier)


@pytest.mark.parametrize("shape", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("inner", ["positions", "units"])
@pytest.mark.parametrize("high", [6.0, math.inf])
def test_both_paths_agree(shape, dtype, inner, high, monkeypatch):
    """Counts and extremes exactly, moments to rounding."""
    generator = torch.Generator().manual_seed(0)
    pre = (4 * torch.randn(shape, generator=generator) + 3).to(dtype)
    if inner == "units":
        pre = pre.transpose(1, 2).contiguous().transpose(1, 2)
    rectifier = Rectifier("any", 0.0, high)
    fast, plain = (summarized(pre, rectifier, monkeypatch, fast=choice) for choice in (True, False))
    for name in ("positions", "positions_fired", "pre_max", "pre_min", "non_finite_values"):
        assert torch.equal(getattr(fast.stats, name), getattr(plain.stats, name)), name
    assert torch.equal(fast.fired, plain.fired)
    torch.testing.assert_close(fast.stats.pre_mean, plain.stats.pre_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fast.stats.pre_squares, plain.stats.pre_squares, rtol=1e-5, atol=1e-6)


def test_the_kernel_is_there_and_used():
    """numba is a dependency: where it loads, large tensors take the fast path."""
    reduced = fused.reduce(torch.ones(64, 64, 64), 0.0, math.inf)
    assert reduced is not None
    assert reduced.total.tolist() == [64.0 * 64] * 64


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_it_steps_aside_for_values_that_are_not_finite(bad):
    """The plain path counts those exactly."""
    pre = torch.ones(64, 64, 64)
    pre[5, 6, 7] = bad
    assert fused.reduce(pre, 0.0, math.inf) is None
    summary = kernels.summarize(pre, Rectifier("ReLU"))
    assert summary.stats.non_finite_values.nonzero().flatten().tolist() == [6]


def test_without_numba_the_plain_path_serves(monkeypatch):
    """A kernel that cannot be had is no error."""
    monkeypatch.setattr(fused, "_compiled", lambda: None)
    assert fused.reduce(torch.ones(64, 64, 64), 0.0, math.inf) is None
    assert int(kernels.summarize(torch.ones(64, 64, 64), Rectifier("ReLU")).fired.sum()) == 64 * 64


def test_a_small_spread_on_a_large_mean_survives():
    """Mean 1e4, deviation 1: the deviation comes out to 1e-4."""
    pre = (torch.randn(64, 16, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e4).float()
    stats = kernels.summarize(pre, Rectifier("ReLU")).stats
    expected = pre.double().std((0, 2), correction=0)
    torch.testing.assert_close((stats.pre_squares / stats.positions).sqrt(), expected, rtol=1e-4, atol=0)
