"""The compiled loops and plain torch give the slow reference's numbers, in every layout, dtype, padding and value."""

from __future__ import annotations

import math
import os
import threading
import warnings
from functools import partial

import numpy as np
import pytest
import torch

from relu_doctor.observe.rectifiers.kinds import Rectifier
from relu_doctor.observe.statistics import crew, fused, plain
from relu_doctor.observe.statistics.kernels import output_magnitude, summarize
from tests.reference import Seen

RELU = Rectifier("relu", clips=True)
RELU6 = Rectifier("relu6", 0.0, 6.0, clips=True)
HARDSWISH = Rectifier("hardswish", -3.0, clips=True)  # as far as what fires is concerned
ANY = Rectifier("any", -math.inf, clips=True)
EXACT = ("positions", "positions_fired", "non_finite_values", "pre_max", "pre_min")
NOISE = torch.Generator().manual_seed(0)


def rows(inputs, units, positions):
    return torch.randn(inputs, units, positions, generator=NOISE)


def lines(inputs, units, positions):
    return torch.randn(inputs, positions, units, generator=NOISE).transpose(1, 2)


LAYOUTS = {
    "feature maps": rows(5, 7, 64),
    "maps longer than a run": rows(2, 3, 2600),
    "many small maps": rows(33, 40, 4),
    "channels last": lines(4, 37, 30),
    "time before inputs": torch.randn(30, 4, 20, generator=NOISE).permute(1, 2, 0),
    "more units than a tile": lines(2, 1100, 5),
    "few channels last": lines(5, 3, 30),
    "few channels and positions last": lines(9, 5, 2),
    "few units, one position": rows(40, 5, 1),
    "rows shorter than any vector": rows(3, 2, 5),
    "one position": rows(300, 33, 1),
    "one position, more units than a tile": rows(9, 2500, 1),
    "one position, inputs inside": torch.randn(20, 50, generator=NOISE).t()[:, :, None],
    "one unit": rows(17, 1, 50),
    "one input": rows(1, 50, 30),
    "one value": rows(1, 1, 1),
    "every other position": rows(4, 5, 60)[:, :, ::2],
    "every other unit": lines(4, 60, 9)[:, ::2],
    "a slice of the units": rows(4, 30, 12)[:, 5:17],
    "the same for all inputs": rows(1, 6, 20).expand(3, 6, 20),
    "the same for all positions": rows(6, 20, 1).expand(6, 20, 4),
}
MASKS = {
    "no padding": lambda shape: None,
    "padding": lambda shape: torch.rand(shape, generator=NOISE) < 0.6,
    "an empty input": lambda shape: torch.arange(shape[0])[:, None].expand(shape) > 0,
    "nothing but padding": lambda shape: torch.zeros(shape, dtype=torch.bool),
    "a mask without padding": lambda shape: torch.ones(shape, dtype=torch.bool),
}


def spoiled(pre):
    """Some values made NaN of either sign and infinite, some units wholly so."""
    pre, chance = pre.clone(), torch.rand(pre.shape, generator=NOISE)
    for index, value in enumerate((math.nan, -math.nan, math.inf, -math.inf)):
        pre[(chance > index / 20) & (chance < (index + 0.5) / 20)] = value
    pre[:, 0] = math.nan
    return pre


def check(pre, rectifier, valid=None, *, compiled, spread=1e-6):
    """Counts and extremes exactly, moments to ``spread`` of the values' own size; and the minimal statistics."""
    seen = Seen()
    seen.add(0, [pre])
    right = seen.columns(
        lambda z: (z > rectifier.low) & (z < rectifier.high),
        lambda z: np.clip(z, rectifier.low, rectifier.high),
        None if valid is None else [valid.numpy()],
    )
    summary = summarize(pre, rectifier, valid, compiled=compiled)
    assert (summary.tally is not None) == compiled
    stats = summary.stats
    measured = right["positions"] > 0
    for name in EXACT:
        found = getattr(stats, name).numpy()
        np.testing.assert_array_equal(found[measured], right[name][measured], err_msg=name)
    assert (stats.positions.numpy()[~measured] == 0).all()
    size = (np.abs(right["pre_mean"]) + right["pre_std"])[measured]
    assert (np.abs(stats.pre_mean.numpy()[measured] - right["pre_mean"][measured]) <= spread * size).all()
    np.testing.assert_allclose(
        stats.pre_std().numpy()[measured],
        right["pre_std"][measured],
        rtol=spread,
        atol=2.0**-46 * np.abs(right["pre_mean"][measured]).max(initial=0),  # the reference's own rounding
    )
    outputs = (stats.post_abs_sum / stats.positions).numpy()[measured]
    np.testing.assert_allclose(outputs, right["post_mean"][measured], rtol=2 * spread)
    fires = (pre.double() > rectifier.low) & (pre.double() < rectifier.high) & torch.isfinite(pre)
    fired = (fires if valid is None else fires & valid[:, None]).any(2)
    assert torch.equal(summary.fired, fired)
    assert torch.equal(summary.valid, torch.ones(len(pre), dtype=torch.bool) if valid is None else valid.any(1))
    least = summarize(pre, rectifier, valid, least=True, compiled=compiled)
    assert torch.equal(least.fired, fired)
    np.testing.assert_array_equal(least.stats.pre_max.numpy()[measured], right["pre_max"][measured])
    assert ((least.stats.non_finite_values.numpy() > 0) == (right["non_finite_values"] > 0)).all()
    assert least.stats.pre_max.dtype == (torch.float64 if pre.dtype == torch.float64 else torch.float32)


@pytest.fixture(params=[True, False], ids=["compiled", "plain"])
def compiled(request, monkeypatch):
    """One way or the other; the plain one in blocks as small as they come, too."""
    if not request.param:
        monkeypatch.setattr(plain, "BLOCK", 500)
    return request.param


@pytest.mark.parametrize("values", ["finite", "spoiled"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("pre", LAYOUTS.values(), ids=LAYOUTS)
def test_the_numbers_are_the_references_in_every_layout_and_padding(pre, mask, values, compiled):
    """Whatever lies side by side, whatever is padding, and where values are NaN or infinite."""
    pre = 4 * pre + 1 if values == "finite" else spoiled(4 * pre + 1)
    check(pre, RELU6, mask((pre.shape[0], pre.shape[2])), compiled=compiled)


@pytest.mark.parametrize("rectifier", [RELU, RELU6, HARDSWISH, ANY], ids=lambda rectifier: rectifier.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["feature maps", "maps longer than a run", "channels last", "one position"])
def test_the_numbers_are_the_references_in_every_dtype(layout, dtype, rectifier, compiled):
    """Half precision is summed in float32, double precision in double."""
    for pre in (LAYOUTS[layout], spoiled(LAYOUTS[layout])):
        check((3 * pre).to(dtype), rectifier, compiled=compiled, spread=1e-12 if dtype == torch.float64 else 1e-6)


EXTREMES = {
    "huge": lambda pre: pre * 1e30,
    "tiny": lambda pre: pre * 1e-25,
    "below the normal range": lambda pre: pre * 1e-41,
    "zeros of both signs": lambda pre: torch.where(pre > 0, 0.0, -0.0),
    "constant": lambda pre: torch.full_like(pre, -3.3),
    "far from zero": lambda pre: pre + 1e5,
    "one far outlier in front": lambda pre: torch.cat((torch.full((1, *pre.shape[1:]), 1e6), pre)),
    "the first input far from the others": lambda pre: pre + 1e4 * (torch.arange(len(pre)) == 0)[:, None, None],
    "two values": lambda pre: torch.where(pre > 0, 1.0, -1e3),
}


@pytest.mark.parametrize("values", EXTREMES.values(), ids=EXTREMES)
@pytest.mark.parametrize("layout", ["feature maps", "maps longer than a run", "channels last", "one position"])
def test_no_value_is_too_large_too_small_or_too_far_off(layout, values, compiled):
    """Sums in the values' own precision neither overflow, nor vanish, nor cancel."""
    check(values(LAYOUTS[layout]).float(), RELU, compiled=compiled, spread=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("positions", [1, 2])
def test_every_number_of_half_precision_is_read_right(dtype, positions):
    """All 65,536 bit patterns, each a unit of its own: zeros, subnormals, infinities and every NaN."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    stats = summarize(values[None, :, None].repeat(1, 1, positions), ANY, compiled=True).stats
    finite = torch.isfinite(values)
    assert torch.equal(stats.pre_max[finite], values[finite].double())
    assert torch.equal(stats.non_finite_values > 0, ~finite)


def test_a_large_call_is_compiled_for_and_a_small_one_is_not():
    """numba is a dependency: where it loads, large tensors take the fast path; small models never wait for it."""
    assert summarize(torch.ones(64, 64, 64), RELU).tally is not None
    assert summarize(torch.ones(8, 8, 8), RELU).tally is None


def test_without_numba_the_plain_path_serves(monkeypatch):
    """Loops that cannot be had are no error."""
    monkeypatch.setattr(fused, "_compiled", lambda: None)
    summary = summarize(torch.ones(64, 64, 64), RELU)
    assert summary.tally is None
    assert int(summary.fired.sum()) == 64 * 64


def test_a_broken_numba_is_one_that_is_absent(monkeypatch):
    """Importing it may raise anything."""

    def broken(name, *args, **kwargs):
        if name == "numba":
            raise SystemError("initialization failed")
        return real(name, *args, **kwargs)

    real = __import__
    fused._compiled.cache_clear()
    monkeypatch.setattr("builtins.__import__", broken)
    try:
        assert fused._compiled() is None
    finally:
        fused._compiled.cache_clear()


@pytest.fixture
def threads():
    """torch's number of threads is put back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def same(a, b, *, rounding=0.0):
    close = partial(torch.allclose, rtol=rounding, atol=rounding)
    return torch.equal(a.fired, b.fired) and all(
        (torch.equal if name in EXACT else close)(getattr(a.stats, name), getattr(b.stats, name))
        for name in (*EXACT, "pre_mean", "pre_squares")
    )


@pytest.mark.parametrize("team", ["torch's", "ours"])
@pytest.mark.parametrize(
    "pre",
    [
        rows(16, 200, 100),
        rows(5, 200, 400),
        rows(1, 200, 1000),
        lines(16, 200, 100),
        rows(900, 200, 1),
        rows(90000, 5, 1),
    ],
    ids=["rows", "uneven", "one input", "lines", "inputs", "few units"],
)
def test_the_number_of_threads_changes_no_count(pre, team, threads, monkeypatch):
    """Each thread sums over inputs of its own: counts and extremes are the same, means and squares but for rounding."""
    if team == "ours":
        own = crew._own_team()
        monkeypatch.setattr(crew, "_team", lambda: own)
    threads(1)
    alone = summarize(pre, RELU, compiled=True)
    for number in (2, 3, 7):
        threads(number)
        assert same(summarize(pre, RELU, compiled=True), alone, rounding=1e-6)


def test_models_that_run_in_several_python_threads_are_counted_right():
    """Calls at the same time do not meet."""
    many = [rows(16, 200 + index, 100) for index in range(6)]
    alone, found = [summarize(pre, RELU, compiled=True) for pre in many], [None] * len(many)

    def work(index):
        for _ in range(5):
            found[index] = summarize(many[index], RELU, compiled=True)

    running = [threading.Thread(target=work, args=(index,)) for index in range(len(many))]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert all(same(one, other) for one, other in zip(found, alone, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_counts_without_its_parents_threads():
    """The threads of a team do not outlive a fork; the child counts by itself."""
    pre = rows(16, 200, 100)
    right = summarize(pre, RELU, compiled=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fork beside running threads is what is tried here
        child = os.fork()
    if not child:
        os._exit(0 if same(summarize(pre, RELU, compiled=True), right) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_outputs_that_do_not_follow_are_read_by_themselves(compiled):
    """The magnitude of any output: finite values that are no padding."""
    post = spoiled(LAYOUTS["feature maps"])
    valid = torch.rand(post.shape[0], post.shape[2], generator=NOISE) < 0.6
    for mask in (None, valid):
        kept = torch.isfinite(post) if mask is None else torch.isfinite(post) & mask[:, None]
        right = torch.where(kept, post, 0).double().abs().sum((0, 2))
        torch.testing.assert_close(output_magnitude(post, mask, compiled=compiled), right, rtol=1e-6, atol=0)
    for pre in (LAYOUTS["feature maps"], LAYOUTS["channels last"]):
        assert not summarize(pre, Rectifier("GELU", -math.inf), compiled=compiled).stats.post_abs_sum.any()
