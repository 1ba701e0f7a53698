"""The kernel for GPUs gives the slow reference's numbers, run in Triton's interpreter on a CPU.

Run with ``TRITON_INTERPRET=1 pytest -m triton`` where triton is installed (from 3.7 on, as far as its interpreter is
concerned); the variable is read when it is imported.
"""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch

from relu_doctor.observe.rectifiers.kinds import Rectifier
from relu_doctor.observe.statistics import plain
from tests.reference import Seen

pytestmark = pytest.mark.triton

RELU = Rectifier("relu", clips=True)
RECTIFIERS = [
    RELU,
    Rectifier("relu6", 0.0, 6.0, clips=True),
    Rectifier("hardswish", -3.0, clips=True),
    Rectifier("any", -math.inf, clips=True),
]
EXACT = ("positions", "positions_fired", "non_finite_values", "pre_max", "pre_min")
NOISE = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=NOISE)


LAYOUTS = {
    "feature maps": normal(5, 7, 64),
    "maps of an odd size": normal(3, 20, 49),
    "maps longer than a tile": normal(2, 3, 2600),
    "maps of several runs": normal(1, 2, 9000),
    "many small maps": normal(33, 40, 4),
    "channels last": normal(4, 30, 37).transpose(1, 2),
    "channels last, many units": normal(2, 5, 150).transpose(1, 2),
    "time before inputs": normal(30, 4, 20).permute(1, 2, 0),
    "one position": normal(100, 33, 1),
    "one position, many units": normal(9, 250, 1),
    "one position, inputs inside": normal(20, 150).t()[:, :, None],
    "one unit": normal(17, 1, 50),
    "one unit, one position": normal(2100, 1, 1),
    "one input": normal(1, 50, 30),
    "one value": normal(1, 1, 1),
    "every other position": normal(4, 5, 60)[:, :, ::2],
    "every other unit": normal(4, 9, 60).transpose(1, 2)[:, ::2],
    "a slice of the units": normal(4, 30, 12)[:, 5:17],
    "the same for all inputs": normal(1, 6, 20).expand(3, 6, 20),
    "the same for all positions": normal(6, 20, 1).expand(6, 20, 4),
}
MASKS = {
    "no padding": lambda shape: None,
    "padding": lambda shape: torch.rand(shape, generator=NOISE) < 0.6,
    "padding, turned": lambda shape: (torch.rand(shape[::-1], generator=NOISE) < 0.6).t(),
    "an empty input": lambda shape: (torch.arange(shape[0]) > 0)[:, None].expand(shape),
    "nothing but padding": lambda shape: torch.zeros(shape, dtype=torch.bool),
}


@pytest.fixture(scope="module")
def loops():
    """The kernel; skipped where there is no interpreter for it."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1, set before triton is imported")
    from relu_doctor.observe.statistics import triton_loops

    return triton_loops


@pytest.fixture(params=["few runs", "many runs"])
def dealt(request, loops, monkeypatch):
    """A large tensor's many runs, and their merging in several steps, on a small one."""
    if request.param == "many runs":
        monkeypatch.setattr(loops, "_LEAST_RUN", 1)
        monkeypatch.setattr(loops, "_BLOCKS", 4)
    return loops


def spoiled(pre):
    """Some values made NaN of either sign and infinite, one unit wholly so, and the first inputs of another."""
    pre, chance = pre.clone(), torch.rand(pre.shape, generator=NOISE)
    for index, value in enumerate((math.nan, -math.nan, math.inf, -math.inf)):
        pre[(chance > index / 20) & (chance < (index + 0.5) / 20)] = value
    pre[: len(pre) // 2, -1] = math.nan
    pre[:, 0] = math.nan
    return pre


def reduced(loops, pre, rectifier=RELU, valid=None, *, least=False):
    plan = loops.plan(tuple(pre.shape), pre.stride(), least=least)
    return loops.reduce(pre, rectifier.low, rectifier.high, valid, plan, least=least)


def check(loops, pre, rectifier=RELU, valid=None, *, rounding=1e-6):
    """Counts and extremes exactly, moments to ``rounding`` of the values' own size; and the minimal statistics."""
    seen = Seen()
    seen.add(0, [pre])
    right = seen.columns(
        lambda z: (z > rectifier.low) & (z < rectifier.high),
        lambda z: np.clip(z, rectifier.low, rectifier.high),
        None if valid is None else [valid.numpy()],
    )
    stats, fired = reduced(loops, pre, rectifier, valid)
    measured = right["positions"] > 0
    for name in EXACT:
        found = getattr(stats, name).numpy()
        np.testing.assert_array_equal(found[measured], right[name][measured], err_msg=name)
    assert (stats.positions.numpy()[~measured] == 0).all()
    assert torch.equal(stats.non_finite_values, torch.from_numpy(right["non_finite_values"]))
    assert (stats.pre_max.numpy()[~measured] == -np.inf).all()
    size = (np.abs(right["pre_mean"]) + right["pre_std"])[measured]
    assert (np.abs(stats.pre_mean.numpy()[measured] - right["pre_mean"][measured]) <= rounding * size).all()
    np.testing.assert_allclose(
        stats.pre_std().numpy()[measured],
        right["pre_std"][measured],
        rtol=rounding,
        atol=2.0**-46 * np.abs(right["pre_mean"][measured]).max(initial=0),  # the reference's own rounding
    )
    outputs = (stats.post_abs_sum / stats.positions).numpy()[measured]
    np.testing.assert_allclose(outputs, right["post_mean"][measured], rtol=2 * rounding)
    for name in ("pre_mean", "pre_squares", "post_abs_sum"):
        assert (getattr(stats, name).numpy()[~measured] == 0).all(), name

    same, also_fired = plain.reduce(pre, rectifier.low, rectifier.high, valid)
    assert torch.equal(fired, also_fired)
    for name in (*EXACT, "pre_mean", "pre_squares", "post_abs_sum"):
        assert getattr(stats, name).dtype == getattr(same, name).dtype, name
        assert getattr(stats, name).shape == getattr(same, name).shape, name
    stats, fired = reduced(loops, pre, rectifier, valid, least=True)
    same, also_fired = plain.reduce(pre, rectifier.low, rectifier.high, valid, least=True)
    assert torch.equal(fired, also_fired)
    for name in ("pre_max", "non_finite_values"):
        assert getattr(stats, name).dtype == getattr(same, name).dtype, name
        assert torch.equal(getattr(stats, name), getattr(same, name)), name


@pytest.mark.parametrize("values", ["finite", "spoiled"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("pre", LAYOUTS.values(), ids=LAYOUTS)
def test_every_statistic_in_every_layout(loops, pre, mask, values):
    """However the values lie, with padding, NaN and infinities or without, each number is the reference's."""
    pre = spoiled(pre) if values == "spoiled" else pre
    check(loops, pre, valid=mask((pre.shape[0], pre.shape[2])))


@pytest.mark.parametrize("layout", ["feature maps", "maps of several runs", "channels last", "one position"])
def test_every_statistic_however_it_is_dealt(dealt, layout):
    """A program of its own for every tile, merged in several steps, gives the same."""
    check(dealt, LAYOUTS[layout])
    check(dealt, spoiled(LAYOUTS[layout]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rectifier", RECTIFIERS, ids=lambda rectifier: rectifier.name)
def test_every_dtype_and_interval(loops, rectifier, dtype):
    """Values of each dtype are taken for what they are, and fire inside the open interval."""
    for layout in ("feature maps", "channels last", "one position"):
        pre = (4 * LAYOUTS[layout]).to(dtype)
        pre[:, :, 0] = torch.tensor([0.0, -0.0, 6.0, -3.0])[torch.arange(pre.shape[1]) % 4].to(dtype)  # the edges
        check(loops, pre, rectifier)


@pytest.mark.parametrize("mean", [1e4, -1e5, 1e6])
@pytest.mark.parametrize("layout", ["maps of several runs", "channels last", "one position", "one unit"])
def test_a_large_mean_does_not_swallow_the_spread(dealt, layout, mean):
    """The spread is that of the values as they are in float32, however far from zero they lie."""
    check(dealt, mean + LAYOUTS[layout])
    check(dealt, spoiled(mean + LAYOUTS[layout]))


def test_a_first_value_far_from_all_others_spoils_nothing(dealt):
    """Neither one outlier where lanes begin, nor a first tile that is all of another size."""
    for layout in ("maps of several runs", "one position", "one unit"):
        pre = LAYOUTS[layout].clone()
        pre[0, :, 0] = 1e6
        check(dealt, pre)
        pre = LAYOUTS[layout].clone()
        pre[:, :, : pre.shape[2] // 7 + 1] += 3e3
        check(dealt, pre)


def test_a_constant_has_no_spread(dealt):
    """Equal values have no spread at all, however large they are, and however many lanes hold them."""
    for value in (0.1, -3.3, 12345.678):
        stats, _ = reduced(dealt, torch.full((64, 2, 100), value))
        assert float(stats.pre_std().max()) <= 1e-6 * abs(value)
        assert torch.equal(stats.pre_max, stats.pre_min)


def test_a_tensor_without_a_plan_is_left_alone(loops):
    """Values too far apart to be reached from one corner of a tile, or too many inputs for a grid."""
    assert loops.plan((8, 4, 3), (1 << 33, 1, 4), least=False) is None
    assert loops.plan((1 << 20, 1, 1 << 20), (1 << 20, 1, 1), least=False) is None
    assert loops.plan((64, 64, 3136), (64 * 3136, 3136, 1), least=False) is not None
