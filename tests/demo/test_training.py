"""The demo's training: it leaves what it says, touches nothing else, and comes out the same twice."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from relu_doctor.demo.data import digits, split_digits, validation
from relu_doctor.demo.models import make_cnn, make_mlp
from relu_doctor.demo.stories import STORIES, collapsed, diverged, sound
from relu_doctor.demo.training import train_story
from relu_doctor.errors import OutputError, ReLUDoctorError
from tests.training.test_monitor import same

BRIEF = replace(sound("cnn"), epochs=2, checkpoint_epochs=(0, 1), batch_size=128)


def read(path):
    return torch.load(path, weights_only=True)


def test_the_data_are_all_digits_as_images_between_zero_and_one():
    images = torch.cat(digits())
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert (images.min().item(), images.max().item()) == (0, 1)


def test_no_story_trains_on_a_validation_image():
    training, held_out = split_digits()
    assert (len(training), len(held_out)) == (1437, 360)
    assert torch.equal(torch.cat(validation()), held_out.images)
    everything = torch.cat([training.images, held_out.images]).flatten(1)
    assert everything.sum(dim=1).sort().values.equal(torch.cat(digits()).flatten(1).sum(dim=1).sort().values)


@pytest.mark.parametrize(("make", "units"), [(make_mlp, [256, 64]), (make_cnn, [16, 32])])
def test_both_nets_take_the_same_images(make, units):
    model = make()
    shapes = []
    for module in model:
        if isinstance(module, torch.nn.ReLU):
            module.register_forward_hook(lambda _module, _inputs, output: shapes.append(output.shape[1]))
    assert model(digits()[0]).shape == (256, 10)
    assert shapes == units


def test_a_run_leaves_one_checkpoint_per_asked_epoch_and_one_at_the_end(tmp_path):
    seen = []
    run = train_story(BRIEF, tmp_path / "new", seed=1, on_progress=lambda done, of: seen.append((done, of)))
    assert [path.name for path in run.paths] == [f"sound-cnn-epoch{epoch:02d}.pt" for epoch in (0, 1, 2)]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [path.name for path in run.paths]
    assert [checkpoint.step for checkpoint in run.checkpoints] == [0, 12, 24]
    assert seen == [(1, 2), (2, 2)]
    assert run.accuracy == run.final.accuracy > run.checkpoints[0].accuracy


def test_a_checkpoint_loads_weights_only_and_holds_the_optimizer_and_the_settings(tmp_path):
    run = train_story(BRIEF, tmp_path, seed=1)
    content = read(run.final.path)
    model = make_cnn()
    model.load_state_dict(content["model_state_dict"])
    torch.optim.SGD(model.parameters()).load_state_dict(content["optimizer_state_dict"])
    assert content["optimizer_state_dict"]["param_groups"][0]["lr"] == 0.05
    assert content["optimizer_state_dict"]["state"][0]["momentum_buffer"].shape == (16, 1, 3, 3)
    assert (content["epoch"], content["step"], content["accuracy"]) == (2, 24, run.accuracy)
    assert content["config"]["learning_rate"] == 0.05
    assert content["config"]["model"] == "relu_doctor.demo.models:make_cnn"


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path):
    runs = [train_story(BRIEF, tmp_path / str(number), seed=seed) for number, seed in enumerate((3, 3, 4))]
    first, again, other = (read(run.final.path)["model_state_dict"] for run in runs)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("story", [BRIEF, replace(collapsed("mlp"), epochs=2, checkpoint_epochs=(0, 1))])
def test_a_run_that_is_watched_is_the_same_run(story, tmp_path):
    """Weights, momenta and accuracies come out the same, bit for bit, with a monitor and without."""
    plain, watched = (
        train_story(story, tmp_path / str(on), seed=1, watched_in=tmp_path / "watched" if on else None)
        for on in (False, True)
    )
    assert plain.alerts == ()
    assert [alert.code for alert in watched.alerts[:1]] == ["RD701"] * (story is not BRIEF)
    for one, other in zip(plain.checkpoints, watched.checkpoints, strict=True):
        assert same(read(one.path), read(other.path))


def test_training_leaves_random_state_threads_and_modes_as_they_were(tmp_path):
    torch.manual_seed(7)
    threads = torch.get_num_threads()
    expected = torch.get_rng_state()
    with torch.no_grad():
        train_story(replace(BRIEF, epochs=1), tmp_path)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), expected)
    assert torch.get_num_threads() == threads


def test_training_restores_the_threads_when_it_is_interrupted(tmp_path):
    def interrupt(_done: int, _of: int) -> None:
        raise KeyboardInterrupt

    before = torch.get_num_threads(), torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        train_story(BRIEF, tmp_path, on_progress=interrupt)
    assert torch.get_num_threads() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(_content: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]  # an open file
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OutputError, match=r"epoch00\.pt' cannot be written \(No space left on device\)"):
        train_story(BRIEF, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be made"):
        train_story(BRIEF, tmp_path / "file" / "below")


def test_without_scikit_learn_the_pip_line_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ReLUDoctorError, match="pip install scikit-learn"):
        digits()


def test_there_are_four_stories_and_both_nets_have_a_part():
    assert list(dict.fromkeys(story.name for story in STORIES)) == ["sound", "quietly_sick", "collapsed", "diverged"]
    assert {story.net for story in STORIES} == {"mlp", "cnn"}
    assert len({story.key for story in STORIES}) == len(STORIES)
    assert all(0 in story.checkpoint_epochs and story.epochs in story.checkpoint_epochs for story in STORIES)


def test_the_settings_are_told_in_words():
    assert sound("mlp").settings == "SGD, lr 0.05, momentum 0.9"
    assert STORIES[2].settings == "Adam, lr 0.03"


def test_the_rate_of_the_last_story_ends_in_not_a_number(tmp_path):
    run = train_story(replace(diverged("mlp"), epochs=1), tmp_path)
    assert all(value.isnan().any() for value in read(run.final.path)["model_state_dict"].values())
