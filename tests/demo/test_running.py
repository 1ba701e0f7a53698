"""The demo's stories, trained and scanned: they come out as they are told."""

from __future__ import annotations

import pytest

from relu_doctor.demo.running import run_stories, scan_line, watch_line


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Every story by its key."""
    found = run_stories(tmp_path_factory.mktemp("demo"))
    return {result.run.story.key: result for result in found}


def test_nothing_is_sick_before_training(results):
    """Before the first step hardly a unit is dead."""
    for result in results.values():
        assert result.before.diagnosis.summary["dead_fraction"] < 0.05


def test_the_quietly_sick_lose_a_fifth_to_a_half_and_nobody_notices(results):
    """Accuracy as good as the sound runs', a fifth and more of the units dead."""
    for net in ("mlp", "cnn"):
        sick, sound = results[f"quietly_sick-{net}"], results[f"sound-{net}"]
        assert sick.run.accuracy > 0.95
        assert 0.2 <= sick.after.diagnosis.summary["dead_fraction"] <= 0.6
        assert sound.after.diagnosis.summary["dead_fraction"] < 0.05
        assert sick.after.diagnosis.summary["unproven"] == 0


def test_the_collapsed_guess_with_a_dead_layer(results):
    """Accuracy of a guess, a whole layer dead."""
    for net in ("mlp", "cnn"):
        collapsed = results[f"collapsed-{net}"]
        assert collapsed.run.accuracy < 0.15
        assert collapsed.after.diagnosis.sites["dead_fraction"].max() == 1.0


def test_the_diverged_is_not_finite(results):
    """NaN is told as NaN."""
    assert results["diverged-mlp"].after.diagnosis.summary["severity"] == "non_finite"


def test_the_killing_rate_is_named_within_the_first_updates_and_the_sound_runs_stay_quiet(results):
    """The monitor's alert says which update, at which learning rate, and which units; where all is well, nothing."""
    for net in ("mlp", "cnn"):
        assert results[f"sound-{net}"].run.alerts == ()
        assert watch_line(results[f"sound-{net}"]) == "quiet for all 900 updates."
        collapsed = results[f"collapsed-{net}"]
        alert = collapsed.run.alerts[0]
        assert alert.code == "RD701"
        assert alert.step <= 20
        assert 1 <= alert.evidence["update"] < alert.step
        assert alert.evidence["lr"] == collapsed.run.story.learning_rate == 1
        assert alert.message.startswith(f"update {alert.evidence['update']} at lr 1: {alert.evidence['silent']} of ")
        assert watch_line(collapsed) == f"after update {alert.step} of 225: {alert.message} [RD701]."


def test_the_scan_lines_name_files_that_are_there(results, monkeypatch):
    """Each line can be pasted."""
    monkeypatch.setattr("sys.argv", ["relu-doctor"])
    for result in results.values():
        words = scan_line(result).split()
        assert words[:2] == ["relu-doctor", "scan"]
        assert words[words.index("--model") + 1] == result.run.story.model
