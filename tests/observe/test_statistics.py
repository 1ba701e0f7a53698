"""Streaming statistics against the slow reference: for any split, any order of merging, any padding, any NaN."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import relu_doctor
from relu_doctor.observe.kernels import count_inputs, output_magnitude, summarize, summarize_minimal
from relu_doctor.observe.rectifiers import Rectifier
from relu_doctor.observe.stats import UnitStats
from tests.planting import normal
from tests.reference import EXACT, Seen, assert_columns_equal
from tests.zoo import CASES

RELU = Rectifier("relu")
RELU6 = Rectifier("relu6", 0.0, 6.0)


def stream(pre: Tensor, sizes, rectifier: Rectifier = RELU, mask: Tensor | None = None) -> UnitStats:
    """What the streaming side makes of recorded pre-activations (inputs, units, positions), dealt in batches."""
    total, first = UnitStats.empty(pre.shape[1]), 0
    for size in sizes:
        part = pre[first : first + size]
        valid = None if mask is None else mask[first : first + size]
        summary = summarize(part, rectifier, valid)
        summary.stats.post_abs_sum = output_magnitude(part.clamp(rectifier.low, rectifier.high), valid)
        total = total.merge(count_inputs(summary.stats, summary.fired, summary.valid, first))
        first += size
    return total


def columns(stats: UnitStats) -> dict[str, np.ndarray]:
    """The statistics under the names of the evidence."""
    seen = (stats.positions > 0).numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            **{name: getattr(stats, name).numpy() for name in EXACT[:5]},
            "pre_max": np.where(seen, stats.pre_max.numpy(), np.nan),
            "pre_min": np.where(seen, stats.pre_min.numpy(), np.nan),
            "pre_mean": np.where(seen, stats.pre_mean.numpy(), np.nan),
            "pre_std": stats.pre_std().numpy(),
            "post_mean": (stats.post_abs_sum / stats.positions).numpy(),
            "first_fired": np.where(stats.last_fired.numpy() < 0, -1, stats.first_fired.numpy()),
            "last_fired": stats.last_fired.numpy(),
        }


def expected(pre: Tensor, rectifier: Rectifier = RELU, mask: Tensor | None = None) -> dict[str, np.ndarray]:
    seen = Seen()
    seen.add(0, [pre])
    return seen.columns(
        lambda z: (z > rectifier.low) & (z < rectifier.high),
        lambda z: np.clip(z, rectifier.low, rectifier.high),
        None if mask is None else [mask.numpy()],
    )


@st.composite
def recorded(draw):
    """Pre-activations (inputs, units, positions) and a split of the inputs into batches."""
    inputs, units, positions = (
        draw(st.integers(1, 24)),
        draw(st.integers(1, 5)),
        draw(st.sampled_from([1, 2, 3, 17, 64])),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    pre = torch.randn(inputs, units, positions, generator=generator)
    pre *= 10.0 ** torch.randint(-3, 3, (units, 1), generator=generator)
    pre += draw(st.sampled_from([0.0, -1.0, 5.0, 1e3])) * torch.randn(units, 1, generator=generator)
    sizes = []
    while sum(sizes) < inputs:
        sizes.append(draw(st.integers(1, inputs - sum(sizes))))
    return pre, sizes


@given(recorded(), st.sampled_from([RELU, RELU6]), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
@settings(max_examples=60)
def test_statistics_do_not_depend_on_how_inputs_are_batched(case, rectifier, dtype):
    """For any split, batches of one included, every statistic is the reference's."""
    pre, sizes = case
    pre = pre.to(dtype)
    assert_columns_equal(
        columns(stream(pre, sizes, rectifier)),
        expected(pre.float() if dtype == torch.bfloat16 else pre, rectifier),
        relative=5e-6,
    )


@given(recorded(), st.data())
@settings(max_examples=40)
def test_padding_and_non_finite_values_leave_no_trace(case, data):
    """NaN and infinities are counted as such and enter no other statistic; padding enters none at all."""
    pre, sizes = case
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    chance = torch.rand(pre.shape, generator=generator)
    pre = torch.where(chance < 0.1, torch.nan, pre)
    pre = torch.where((chance > 0.1) & (chance < 0.15), torch.inf, pre)
    pre = torch.where((chance > 0.15) & (chance < 0.2), -torch.inf, pre)
    mask = torch.rand(pre.shape[0], pre.shape[2], generator=generator) < 0.7 if data.draw(st.booleans()) else None
    found, right = columns(stream(pre, sizes, RELU, mask)), expected(pre, RELU, mask)
    right["post_mean"] = found["post_mean"]  # checked where all is finite
    for name, values in right.items():
        np.testing.assert_allclose(
            found[name],
            values,
            rtol=5e-6,
            atol=2.0**-22 * float(np.nanmax(np.abs(right["pre_mean"]), initial=0)) + 1e-12,
            err_msg=name,
        )


@given(recorded())
@settings(max_examples=30)
def test_the_minimal_kernel_agrees_on_what_it_measures(case):
    """Firing counts, maxima and ordinals are those of the full kernel."""
    pre, _ = case
    for rectifier in (RELU, RELU6):
        full, least = summarize(pre, rectifier), summarize_minimal(pre, rectifier)
        assert torch.equal(full.fired, least.fired)
        assert torch.equal(full.stats.pre_max, least.stats.pre_max)
        assert torch.equal(full.stats.non_finite_values, least.stats.non_finite_values)


@st.composite
def three_statistics(draw):
    pre, _ = draw(recorded())
    others = [torch.randn(draw(st.integers(0, 4)), *pre.shape[1:]) for _ in range(2)]
    return [stream(part, [len(part)] if len(part) else []) for part in (pre, *others)]


def assert_same(a: UnitStats, b: UnitStats) -> None:
    for declared in fields(UnitStats):
        left, right = getattr(a, declared.name), getattr(b, declared.name)
        assert left.dtype == right.dtype == declared.metadata["dtype"], declared.name
        if declared.metadata["law"] in {"mean", "squares"}:
            torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)
        elif left.dtype == torch.float64:
            torch.testing.assert_close(left, right, rtol=1e-13, atol=0)
        else:
            assert torch.equal(left, right), declared.name


@given(three_statistics())
@settings(max_examples=40)
def test_merging_is_associative_and_commutative_and_empty_is_neutral(statistics):
    """Batches, windows, ranks and resumed runs may be merged in any order."""
    a, b, c = statistics
    assert_same(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert_same(a.merge(b), b.merge(a))
    empty = UnitStats.empty(a.num_units)
    assert_same(a.merge(empty), a)
    assert_same(empty.merge(a), a)
    assert_same(empty.merge(empty), empty)


def test_merging_changes_neither_operand():
    """Both operands are as they were."""
    a, b = stream(torch.randn(4, 3, 2), [4]), stream(torch.randn(5, 3, 2), [5])
    before = [getattr(a, declared.name).clone() for declared in fields(a)]
    merged = a.merge(b)
    merged.inputs += 1
    assert all(torch.equal(getattr(a, d.name), kept) for d, kept in zip(fields(a), before, strict=True))


@pytest.mark.parametrize("positions", [1, 4, 256, 4096])
@pytest.mark.parametrize("mean", [1e4, -1e4, 1e5])
def test_a_large_mean_does_not_swallow_the_spread(mean, positions):
    """std 1 beside a mean of 10,000 comes out as 1, in one batch and in many."""
    pre = mean + torch.randn(max(4096 // positions, 8), 3, positions, generator=torch.Generator().manual_seed(0))
    right = expected(pre)
    for sizes in ([len(pre)], [1] * len(pre)):
        found = columns(stream(pre, sizes))
        np.testing.assert_allclose(found["pre_std"], right["pre_std"], rtol=1e-3)
        np.testing.assert_allclose(found["pre_mean"], right["pre_mean"], rtol=1e-6)


def test_a_constant_has_no_spread():
    """Equal values have std 0, or what rounding leaves, however large they are."""
    for value in (0.1, -3.3, 12345.678):
        stats = stream(torch.full((64, 2, 100), value), [10, 54])
        assert float(stats.pre_std().max()) <= 1e-4 * abs(value)
        assert torch.equal(stats.pre_max, stats.pre_min)


def test_an_empty_call_leaves_nothing():
    """A call on no inputs or no positions counts nothing."""
    for shape in ((0, 3, 4), (2, 3, 0)):
        for kernel in (summarize, summarize_minimal):
            summary = kernel(torch.zeros(shape), RELU)
            stats = count_inputs(summary.stats, summary.fired & summary.valid[:, None], summary.valid, 0)
            assert_same(stats, UnitStats.empty(3))


@pytest.mark.parametrize("name", ["mlp", "resnet", "sequences"])
@given(data=st.data())
@settings(max_examples=8)
def test_a_scan_does_not_depend_on_the_batches(name, data):
    """The same inputs in other batches give the same counts, and the same numbers up to rounding."""
    model, _ = CASES[name].build()
    shape = {"mlp": (6,), "resnet": (3, 6, 6), "sequences": (5, 6)}[name]
    inputs = normal(*shape, sizes=(20,))()[0]
    sizes: list[int] = []
    while sum(sizes) < 20:
        sizes.append(data.draw(st.integers(1, 20 - sum(sizes))))
    whole, split = (relu_doctor.scan(model, batches).units for batches in ([inputs], inputs.split(sizes)))
    for column in ("status", "inputs", "inputs_fired", "positions", "first_fired", "last_fired"):
        assert whole[column].equals(split[column])
    for column in ("pre_max", "pre_min", "pre_mean", "pre_std", "dormancy"):
        np.testing.assert_allclose(split[column], whole[column], rtol=1e-4, atol=1e-5)


def test_nan_comes_out_as_non_finite_never_as_dead():
    """nan > 0 is false: a unit whose every value is NaN is not silent but non-finite."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU())
    with torch.no_grad():
        model[0].weight[1] = torch.nan
        model[0].weight[2] = torch.inf
        model[0].bias[3] = -100
        model[0].bias[4] = torch.nan
    for statistics in ("full", "minimal"):
        units = relu_doctor.scan(model, torch.randn(50, 3), exhaustive=True, statistics=statistics).units
        assert units["status"].tolist() == ["active", "non_finite", "non_finite", "dead", "non_finite"]
        assert units["mechanism"].tolist()[1] == "non_finite"
        assert units["pre_max"].isna().tolist() == [False, True, True, False, True] or statistics == "minimal"
