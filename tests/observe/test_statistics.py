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
from relu_doctor.observe.forwards.recorder import Staged
from relu_doctor.observe.rectifiers.kinds import Rectifier
from relu_doctor.observe.statistics.kernels import CallSummary, count_inputs, joined, summarize
from relu_doctor.observe.statistics.stats import UnitStats
from relu_doctor.observe.statistics.tally import Ledger
from tests.planting import normal
from tests.reference import EXACT, Seen, assert_columns_equal
from tests.zoo import CASES

RELU = Rectifier("relu", clips=True)
RELU6 = Rectifier("relu6", 0.0, 6.0, clips=True)


def stream(
    pre: Tensor, sizes, rectifier: Rectifier = RELU, mask: Tensor | None = None, *, compiled: bool = False
) -> UnitStats:
    """What the streaming side makes of recorded pre-activations (inputs, units, positions), dealt in batches."""
    total, first = UnitStats.empty(pre.shape[1]), 0
    for size in sizes:
        part = pre[first : first + size]
        summary = summarize(part, rectifier, None if mask is None else mask[first : first + size], compiled=compiled)
        if compiled:
            ledger = Ledger.of(total, summary.tally)
            ledger.add(summary.tally, first)
            total = ledger.stats
        else:
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


@given(
    recorded(),
    st.sampled_from([RELU, RELU6]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.booleans(),
)
@settings(max_examples=100)
def test_statistics_do_not_depend_on_how_inputs_are_batched(case, rectifier, dtype, compiled):
    """For any split, batches of one included, every statistic is the reference's."""
    pre, sizes = case
    pre = pre.to(dtype)
    assert_columns_equal(
        columns(stream(pre, sizes, rectifier, compiled=compiled)),
        expected(pre.float() if dtype == torch.bfloat16 else pre, rectifier),
        relative=5e-6,
    )


@given(recorded(), st.data(), st.booleans())
@settings(max_examples=60)
def test_padding_and_non_finite_values_leave_no_trace(case, data, compiled):
    """NaN and infinities are counted as such and enter no other statistic; padding enters none at all."""
    pre, sizes = case
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    chance = torch.rand(pre.shape, generator=generator)
    pre = torch.where(chance < 0.1, torch.nan, pre)
    pre = torch.where((chance > 0.1) & (chance < 0.15), torch.inf, pre)
    pre = torch.where((chance > 0.15) & (chance < 0.2), -torch.inf, pre)
    mask = torch.rand(pre.shape[0], pre.shape[2], generator=generator) < 0.7 if data.draw(st.booleans()) else None
    found = columns(stream(pre, sizes, RELU, mask, compiled=compiled))
    right = expected(pre, RELU, mask)
    for name, values in right.items():
        np.testing.assert_allclose(
            found[name],
            values,
            rtol=5e-6,
            atol=2.0**-22 * float(np.nanmax(np.abs(right["pre_mean"]), initial=0)) + 1e-12,
            err_msg=name,
        )


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("inputs", [254, 255, 256, 600])
def test_inputs_are_counted_whatever_their_number(inputs, compiled):
    """Units that fire on one input, the first, the last, none or some, in a batch larger than a byte counts."""
    fires = torch.zeros(inputs, 6, dtype=torch.bool)
    fires[0, 0] = fires[-1, 1] = fires[inputs // 2, 2] = True
    fires[:, 3] = True
    fires[3::7, 4] = True
    pre = fires.float()[:, :, None] - 0.5
    found, right = columns(stream(pre, [inputs], compiled=compiled)), expected(pre)
    for name in ("inputs", "inputs_fired", "first_fired", "last_fired"):
        np.testing.assert_array_equal(found[name], right[name])


@pytest.mark.parametrize("compiled", [True, False])
def test_several_calls_on_the_same_inputs_count_each_input_once(compiled):
    """A recurrent cell's steps, and calls of which some are on other inputs, in any order."""
    first, second, other = (torch.randn(size, 4, 3) - 1 for size in (5, 5, 3))
    for calls in ((first, second), (first, other, second), (other, first, second)):
        staged = Staged()
        for pre in calls:
            staged.add(summarize(pre, RELU, compiled=compiled), others=False)
        stats = staged.added_to(None, 0)
        assert stats.inputs.tolist() == [5 + 3 * (len(calls) == 3)] * 4
        fired = (first > 0).any(2) | (second > 0).any(2)
        assert torch.equal(stats.inputs_fired, fired.sum(0) + ((other > 0).any(2).sum(0) if len(calls) == 3 else 0))
        assert torch.equal(stats.positions_fired, sum((pre > 0).sum((0, 2)) for pre in calls))
        values = torch.cat([pre.transpose(1, 2).reshape(-1, 4) for pre in calls])
        torch.testing.assert_close(stats.pre_mean, values.double().mean(0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("compiled", [True, False])
def test_calls_on_one_input_each_count_every_input(compiled):
    """A model that takes its inputs one by one, padded or not: the order of the calls is that of the inputs."""
    pre, mask = torch.randn(7, 4, 3) - 0.5, torch.rand(7, 3) < 0.5
    mask[2] = False
    staged = Staged()
    for index in range(7):
        valid = mask[index : index + 1] if index > 1 else None
        staged.add(summarize(pre[index : index + 1], RELU, valid, compiled=compiled), others=True)
    mask[:2] = True
    found, right = columns(staged.added_to(None, 0)), expected(pre, RELU, mask)
    for name, values in right.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_summary_made_of_blocks_is_that_of_the_whole(compiled):
    """Inputs dealt in blocks leave what they leave together."""
    pre = torch.randn(20, 4, 6)
    parts = joined([summarize(part, RELU, compiled=compiled) for part in pre.split(7)])
    whole = summarize(pre, RELU, compiled=compiled)
    assert isinstance(parts, CallSummary)
    assert torch.equal(parts.fired, whole.fired)
    assert torch.equal(parts.valid, whole.valid)
    assert_same(parts.stats, whole.stats, rounding=1e-6, of_sums=2e-7)  # values are summed in float32


def test_what_is_changed_in_a_summary_is_what_counts():
    """Statistics and firings that are replaced before a call is staged are those that are kept."""
    summary = summarize(torch.randn(6, 4, 3), RELU, compiled=True)
    summary.fired = torch.eye(6, 4, dtype=torch.bool)
    summary.stats.positions_fired = torch.arange(4)
    staged = Staged()
    staged.add(summary, others=False)
    stats = staged.added_to(None, 10)
    assert stats.inputs_fired.tolist() == [1, 1, 1, 1]
    assert stats.first_fired.tolist() == [10, 11, 12, 13]
    assert stats.positions_fired.tolist() == [0, 1, 2, 3]


@st.composite
def three_statistics(draw):
    pre, _ = draw(recorded())
    others = [torch.randn(draw(st.integers(0, 4)), *pre.shape[1:]) for _ in range(2)]
    return [stream(part, [len(part)] if len(part) else []) for part in (pre, *others)]


DECLARED = [declared for declared in fields(UnitStats) if "law" in declared.metadata]


def assert_same(a: UnitStats, b: UnitStats, *, rounding: float = 1e-10, of_sums: float = 1e-13) -> None:
    for declared in DECLARED:
        left, right, law = getattr(a, declared.name), getattr(b, declared.name), declared.metadata["law"]
        assert {left.dtype, right.dtype} <= {declared.metadata["dtype"], declared.metadata["narrow"]}, declared.name
        if law in {"mean", "squares"}:
            torch.testing.assert_close(left, right, rtol=rounding, atol=rounding)
        elif law == "sum" and left.dtype == torch.float64:
            torch.testing.assert_close(left, right, rtol=of_sums, atol=0)
        else:
            assert torch.equal(left, right.to(left.dtype)), declared.name


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


@pytest.mark.parametrize("compiled", [True, False])
def test_merging_changes_neither_operand(compiled):
    """Both operands are as they were, and the result goes on by itself."""
    a, b = (stream(torch.randn(size, 3, 2), [size], compiled=compiled) for size in (4, 5))
    before = [getattr(stats, declared.name).clone() for stats in (a, b) for declared in DECLARED]
    merged = a.merge(b)
    assert merged.ledger is None
    after = [getattr(stats, declared.name) for stats in (a, b) for declared in DECLARED]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_merging_the_minimal_statistics_is_as_lawful():
    """Narrow maxima and counts merge with each other and with nothing, and stay narrow."""
    parts = [summarize(torch.randn(5, 3, 4), RELU, least=True).stats for _ in range(3)]
    a, b, c = (count_inputs(stats, torch.rand(5, 3) > 0.5, torch.ones(5, dtype=torch.bool), 0) for stats in parts)
    assert_same(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert_same(a.merge(b), b.merge(a))
    assert_same(a.merge(UnitStats.empty(3)), a)
    assert (a.merge(b).pre_max.dtype, a.merge(b).non_finite_values.dtype) == (torch.float32, torch.int32)


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
        for least in (False, True):
            summary = summarize(torch.zeros(shape), RELU, least=least, compiled=True)
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
