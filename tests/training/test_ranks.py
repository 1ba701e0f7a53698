"""Several processes that train one model: what they see becomes one, and none of them waits for another for good."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any

import pytest
import torch

from relu_doctor.observe.statistics.stats import UnitStats
from relu_doctor.training.effective_rank import effective_rank
from relu_doctor.training.flat import Extra, Layout, header_of, merged, pack, unpack
from relu_doctor.training.seen import Seen, nothing
from tests.training import at_ranks

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
COUNTS = ("site", "inputs", "inputs_fired", "positions", "positions_fired", "non_finite_values", "status")
EXTREMES = ("pre_max", "pre_min")
MOMENTS = ("pre_mean", "pre_std", "post_mean")
LIVES = ("onset", "onset_step", "onset_confidence", "silent_since", "silent_inputs")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes finds."""
    return at_ranks.run(at_ranks.several, 2, tmp_path_factory.mktemp("pair"))


def by_unit(window: dict[str, Any], part: str, names: tuple[str, ...]) -> dict[tuple[str, int], tuple[Any, ...]]:
    """Sites may come in another order where no process has seen all of them."""
    columns = window[part]
    rows = zip(columns["site_id"], columns["unit"], *(columns[name] for name in names), strict=True)
    return {row[:2]: tuple(str(value) if value != value else value for value in row[2:]) for row in rows}


def assert_same_windows(
    found: list[dict[str, Any]], expected: list[dict[str, Any]], lives: tuple[str, ...] = LIVES
) -> None:
    """The same counts and extremes, bit for bit, the same lives, and moments up to rounding."""
    assert [each["steps"] for each in found] == [each["steps"] for each in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["coverage"] == other["coverage"]
        assert by_unit(one, "units", COUNTS + EXTREMES) == by_unit(other, "units", COUNTS + EXTREMES)
        assert by_unit(one, "lives", lives) == by_unit(other, "lives", lives)
        told, meant = by_unit(one, "units", MOMENTS), by_unit(other, "units", MOMENTS)
        for unit, values in meant.items():
            numbers = [float(value) for value in values]
            assert [float(value) for value in told[unit]] == pytest.approx(numbers, rel=1e-9, abs=1e-12, nan_ok=True)
        for name in ("observed_steps", "observed_inputs"):
            assert one["numbers"][name] == other["numbers"][name]


def assert_merged(ranks: list[dict[str, Any]]) -> None:
    first, *others = ranks
    assert_same_windows(first["windows"], first["replayed"])
    assert len(first["windows"]) == 4
    assert len(set(first["windows"][0]["units"]["site_id"])) == 2  # rank 0 itself runs one
    assert len(set(first["windows"][-1]["units"]["site_id"])) == 3
    assert sum(first["returned"]) == 3
    for other in others:
        assert not other["windows"]
        assert not any(other["returned"])
        assert not other["diagnosed"]
    means = [sum(losses[:10]) / 10 for losses in first["losses"]]
    assert first["windows"][0]["numbers"]["loss"] == pytest.approx(sum(means) / len(means))


def test_two_ranks_count_what_one_process_counts_that_replays_both(pair):
    """Uneven last batches, repetitions across ranks, a site that a rank never runs, and one that is met late."""
    assert_merged([rank["merging"] for rank in pair])


def test_four_ranks_count_what_one_process_counts_that_replays_all(tmp_path):
    """The same with four."""
    assert_merged(at_ranks.run(at_ranks.merging, 4, tmp_path))


def test_the_gradient_watch_needs_no_communication(pair):
    """Steps with a monitor make the collectives of DistributedDataParallel and no other; all ranks hear the same."""
    for found in (rank["quiet"] for rank in pair):
        assert found["bare"] == found["monitor"] == found["watch"]
        assert found["own"] == 0
    first, second = (rank["quiet"] for rank in pair)
    assert first["heard"] == second["heard"]
    elsewhere = [not here and there for here, there in zip(first["fires here"], second["fires here"], strict=True)]
    assert any(elsewhere)
    assert all(first["heard"][unit] == 20 for unit, fires in enumerate(elsewhere) if fires)


def test_a_fully_sharded_run_is_the_same_run_and_its_counts_are_whole(pair):
    """FSDP2: losses and weights bit by bit, the counts of a plain model, and a note on what is not followed."""
    for found in (rank["fully sharded"] for rank in pair):
        assert found["bare"] == found["monitored"]
        assert all(torch.equal(found["bare weights"][name], each) for name, each in found["monitored weights"].items())
        assert found["failures"] == {}
    first = pair[0]["fully sharded"]
    assert_same_windows(first["windows"], first["replayed"])
    assert any("gradients and updates are not followed" in note for note in first["windows"][0]["notes"])
    assert all(each["effective_rank"][site] > 1 for each in first["windows"] for site in each["units"]["site_id"])
    assert not pair[1]["fully sharded"]["windows"]


def test_a_new_way_through_sharded_layers_is_learnt_by_all_together(pair):
    """The rank that meets it says so with the window, all find out at one step, and a note says what is missed."""
    first, second = (rank["new ways"] for rank in pair)
    assert first["failures"] == second["failures"] == {}
    sites = [len(set(each["units"]["site_id"])) for each in first["windows"]]
    assert sites[0] == 1
    assert sites[-1] == 2
    assert any("a forward took a way that was not known" in note for note in first["windows"][-1]["notes"])


def test_ranks_that_make_different_numbers_of_steps_wait_for_each_other_at_the_end(pair):
    """Rank 0 reports the windows that only rank 1 still makes."""
    first = pair[0]["uneven"]
    assert [each["steps"] for each in first["windows"]] == [(1, 10), (11, 20), (21, 30), (31, 36)]
    assert [each["numbers"]["observed_inputs"] for each in first["windows"]] == [480, 312, 240, 144]
    assert first["counted"] == 4
    assert first["history"] == [10, 20, 30, 36]


def test_one_monitor_for_several_ranks_is_told_to_be_alone(pair):
    """It waits for a while, says so, and reports its own evidence."""
    found = pair[0]["one monitor"]
    assert len(found["windows"]) == 2
    assert ["monitors were not made by all of the 2 ranks" in told for told in found["warned"]] == [True]


def test_a_rank_that_leaves_in_an_error_waits_for_nobody(pair):
    """The others hear of it at once, say so once, and go on with their own evidence."""
    first, second = (rank["in error"] for rank in pair)
    assert second["took"] < 10
    assert first["took"] < 10
    assert len([told for told in first["warned"] if "could not exchange" in told]) == 1
    assert first["windows"][-1]["steps"] == (21, 22)
    assert first["windows"][-1]["numbers"]["observed_inputs"] == 48
    assert first["windows"][0]["numbers"]["observed_inputs"] == 240


def test_processes_that_train_models_of_their_own_report_each_for_itself(pair):
    """Other weights at the start are another run; a note says so."""
    for found in (rank["apart"] for rank in pair):
        assert [each["numbers"]["observed_inputs"] for each in found["windows"]] == [120]
        assert any("different weights" in note for note in found["windows"][0]["notes"])


def test_a_group_that_is_destroyed_before_the_monitor_is_closed_loses_no_window(pair):
    """The monitors' own group is theirs until they are closed."""
    found = pair[0]["destroyed"]
    assert [each["numbers"]["observed_inputs"] for each in found["windows"]] == [240, 144]
    assert found["warned"] == []


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_lost_rank_holds_nobody_up_beyond_the_time_out(how, tmp_path):
    """Windows before it are whole; then there is one warning, and what rank 0 sees goes on being reported."""
    found = at_ranks.run(partial(at_ranks.lost, how=how), 2, tmp_path, seconds=3, ends=1)[0]
    assert found["took"] < 10
    assert len([told for told in found["warned"] if "could not exchange" in told]) == 1
    inputs = [each["numbers"]["observed_inputs"] for each in found["windows"]]
    assert inputs[:1] + inputs[2:] == [240, 120, 120, 120, 120, 48]
    assert inputs[1] in {240, 120}  # on its way when the rank was lost
    assert any("rank 0 of 2 alone" in note for note in found["windows"][-1]["notes"])


def test_a_unit_that_all_ranks_say_was_treated_begins_anew(pair):
    """As in one process that replays them; the effective rank is of rank 0's own outputs."""
    first = pair[0]["treatment"]
    assert_same_windows(first["windows"], first["replayed"])
    told = [by_unit(window, "units", ("status", "inputs"))[(first["site"], 0)] for window in first["windows"]]
    assert [status for status, _ in told] == ["unproven", "dead", "unproven", "dead", "dead"]
    assert told[-1][1] == 22 * 48 - 5
    ranks = [window["effective_rank"][first["site"]] for window in first["windows"]]
    assert ranks[-1] == pytest.approx(effective_rank(first["outputs"]))
    assert len(set(ranks)) == 5
    assert not pair[1]["treatment"]["windows"]


# What travels


def seen_by(seed: int, **changes: Any) -> Seen:
    """Numbers of two sites, the second of which is unobserved."""
    generator = torch.Generator().manual_seed(seed)

    def whole(units: int, most: int = 1000) -> torch.Tensor:
        return torch.randint(0, most, (units,), generator=generator)

    def real(units: int) -> torch.Tensor:
        return torch.randn(units, generator=generator, dtype=torch.float64)

    stats = UnitStats(
        inputs=whole(5),
        inputs_fired=whole(5),
        positions=whole(5),
        positions_fired=whole(5),
        non_finite_values=whole(1).int().expand(5),
        pre_max=torch.tensor([-torch.inf, 1.5, 2, 3, 4]).float(),
        pre_min=real(5),
        pre_mean=real(5),
        pre_squares=real(5).abs(),
        post_abs_sum=real(5).abs(),
        first_fired=UnitStats.empty(5).first_fired,
        last_fired=torch.tensor([-1, 3, 5, 7, 7]),
    )
    given: dict[str, Any] = {
        "index": 0,
        "first_step": 3,
        "last_step": 80,
        "stats": {"one": stats},
        "steps": torch.tensor([3, 5, 66, 80]),
        "num_inputs": 40,
        "notes": (f"note of {seed}",),
        "ratios": {"one": torch.tensor([torch.nan, 1e-3, 2e-3, 0, 1e-9])},
        "heard": {"one": torch.tensor([-1, 3, 80, 7, 7]), "two": torch.tensor([4, -1, 9])},
        "told": [([2**64 - seed, 7, 8], 3), (None, 30), ([9] * 7, 7)],
        "numbers": {"loss": float("nan"), "lr": 0.1},
    }
    return Seen(**(given | changes))


def column(stats: UnitStats, name: str) -> list[float]:
    return getattr(stats, name).tolist()


@pytest.mark.parametrize("layout", [Layout(steps=2), Layout((("one", 5), ("two", 3)), digests=4, steps=2)])
def test_all_that_was_seen_arrives_with_and_without_a_place_in_the_buffer(layout):
    """Bit for bit: counts, extremes, steps, digests, and a loss that is NaN; other numbers stay at home."""
    seen = seen_by(1)
    words, beside = pack(layout, seen, Extra(notes=list(seen.notes)), wishes=True, leaves=False)
    assert len(words) == layout.words
    told = unpack(layout, words, beside)
    assert header_of(words).wishes == 1
    assert (told.first_step, told.last_step, told.num_inputs, told.notes) == (3, 80, 40, ("note of 1",))
    assert told.steps.tolist() == seen.steps.tolist()
    assert set(told.stats) == {"one"}
    for name in (each.name for each in fields(UnitStats) if "law" in each.metadata):
        assert column(told.stats["one"], name) == column(seen.stats["one"], name), name
    assert {name: steps.tolist() for name, steps in told.heard.items()} == {"one": [-1, 3, 80, 7, 7], "two": [4, -1, 9]}
    torch.testing.assert_close(told.ratios["one"].float(), seen.ratios["one"], equal_nan=True)
    assert sorted(d for digests, _ in told.told for d in digests or ()) == sorted([2**64 - 1, 7, 8, *[9] * 7])
    assert sum(count for digests, count in told.told if digests is None) == 30
    assert list(told.numbers) == ["loss"]
    assert told.numbers["loss"] != told.numbers["loss"]


def test_ranks_merge_by_each_statistics_law_and_one_without_data_changes_nothing():
    """As UnitStats.merge has it, whatever the order; of notes, steps and rates the rank that reports has the word."""
    parts = [seen_by(1), nothing(3), seen_by(2, steps=torch.tensor([4, 5]), numbers={"loss": 2.0})]
    whole = merged(parts, parts[0])
    expected = parts[0].stats["one"].merge(parts[2].stats["one"])
    for name in (each.name for each in fields(UnitStats) if "law" in each.metadata):
        assert column(whole.stats["one"], name) == column(expected, name), name
    assert whole.steps.tolist() == [3, 4, 5, 66, 80]
    assert (whole.num_inputs, whole.first_step, whole.last_step, len(whole.told)) == (80, 3, 80, 6)
    assert whole.numbers["lr"] == 0.1
    assert whole.numbers["loss"] != whole.numbers["loss"]
