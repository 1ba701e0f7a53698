"""The callback for the Hugging Face Trainer, in real trainings, and a plain loop under Accelerate."""

from __future__ import annotations

import copy
import gc
import json

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import TrainerCallback

from relu_doctor.integrations.transformers import ReLUDoctorCallback
from relu_doctor.training.monitor import Monitor
from tests.integrations.toys import QUIET, SIZE, STEPS, batches, hugging_face_trainer, net, plain, same, sgd

pytestmark = [pytest.mark.filterwarnings(each) for each in QUIET]


def test_the_run_is_the_same_run(tmp_path):
    """The weights, optimizer, scheduler and random states of its checkpoints are those of a run without it."""
    left = []
    for number, callbacks in enumerate(([], [ReLUDoctorCallback(every=3, window=20)])):
        folder, model = tmp_path / str(number), net(drop=0.2)
        options = {"num_train_epochs": 4, "eval_strategy": "steps", "eval_steps": 50, "save_strategy": "steps"}
        trainer = hugging_face_trainer(model, folder, *callbacks, **options, save_steps=100)
        trainer.train()
        kept = [load_file(folder / "checkpoint-200" / "model.safetensors")]
        kept += [torch.load(folder / "checkpoint-200" / f"{name}.pt") for name in ("optimizer", "scheduler")]
        random = torch.load(folder / "checkpoint-200" / "rng_state.pth", weights_only=False)
        losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
        left.append([losses, kept, random["cpu"], random["python"], dict(model.state_dict()), torch.rand(3)])
    assert len(left[0][0]) == 4 * STEPS // 10
    assert same(*left)


def test_scalars_are_in_the_trainers_log(tmp_path):
    """Each window is in ``log_history`` at its step, also in the file of a checkpoint; sinks get each window."""
    windows = []
    callback = ReLUDoctorCallback(every=5, window=20, sinks=[windows.append])
    trainer = hugging_face_trainer(net(), tmp_path, callback, save_strategy="epoch")
    trainer.train()
    told = [each for each in trainer.state.log_history if "relu_doctor/silent_fraction" in each]
    assert [each["step"] for each in told] == [20, 40, 60] == [window.last_step for window in windows]
    kept = json.loads((tmp_path / "checkpoint-60" / "trainer_state.json").read_text())["log_history"]
    assert [each["relu_doctor/silent_fraction"] for each in kept if "relu_doctor/dead" in each] == [3 / 48] * 3


def test_evaluation_does_not_count(tmp_path):
    """Only batches of training are evidence."""
    callback = ReLUDoctorCallback(every=1, window=STEPS)
    hugging_face_trainer(net(), tmp_path, callback, eval_strategy="steps", eval_steps=7).train()
    assert callback.monitor.units["inputs"].max() == STEPS * SIZE


def test_what_the_trainer_logs_is_in_the_windows(tmp_path):
    """The loss and the gradients' norm that the Trainer logged stand in the window after."""
    callback = ReLUDoctorCallback(every=5, window=20)
    trainer = hugging_face_trainer(net(), tmp_path, callback, max_grad_norm=1.0)
    trainer.train()
    losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    told = callback.monitor.timeline.drop_duplicates("window")["loss"].tolist()
    assert told == pytest.approx([losses[0], sum(losses[1:3]) / 2, sum(losses[3:5]) / 2])


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    """With a checkpoint of the middle of a window, the resumed run's tables are those of one that never stopped."""
    whole, resumed = (ReLUDoctorCallback(every=4, window=40) for _ in range(2))
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 48}
    hugging_face_trainer(net(), tmp_path, whole, **options).train()
    hugging_face_trainer(net(), tmp_path, resumed, **options).train(resume_from_checkpoint=tmp_path / "checkpoint-48")
    pd.testing.assert_frame_equal(resumed.monitor.units, whole.monitor.units)
    later = whole.monitor.timeline.query("window > 0").reset_index(drop=True)
    pd.testing.assert_frame_equal(resumed.monitor.timeline.drop(columns="loss"), later.drop(columns="loss"))


class Stops(TrainerCallback):
    """Ends a training at step 30: politely, or not."""

    def __init__(self, error: type[BaseException] | None = None) -> None:
        self.error = error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 30:
            control.should_training_stop = True
            if self.error is not None:
                raise self.error("on purpose")


def test_a_training_that_stops_early_is_ended(tmp_path):
    """What was seen since the last window becomes one, and no hook is left."""
    model, callback = net(), ReLUDoctorCallback(every=1, window=20)
    hugging_face_trainer(model, tmp_path, callback, Stops()).train()
    assert callback.monitor.timeline["last_step"].unique().tolist() == [20, 30]
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_training_that_fails_is_let_go_of(tmp_path):
    """By the next training, by close(), or when the callback is gone; without a warning."""
    model, callback = net(), ReLUDoctorCallback(every=1, window=20)
    trainer = hugging_face_trainer(model, tmp_path, callback, Stops(KeyboardInterrupt))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert len(model._forward_hooks) == 1
    callback.close()
    assert not model._forward_hooks
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    del callback, trainer
    gc.collect()
    assert not model._forward_hooks


def test_the_callback_copies(tmp_path):
    """In the midst of a training as well; a copy is attached to nothing and has the same options."""
    copies = []

    class Copies(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            copies.append(copy.deepcopy((callback, model)))

    callback = ReLUDoctorCallback(every=2, window=20)
    hugging_face_trainer(net(), tmp_path, callback, Copies(), max_steps=2).train()
    copied, model = copies[-1]
    assert copied.monitor is None
    model(**next(iter(batches())))["loss"].backward()
    hugging_face_trainer(model, tmp_path, copied).train()
    assert copied.monitor.windows == 3


def test_a_plain_loop_under_accelerate_gives_the_table_of_the_plain_loop():
    """What ``prepare`` returns is watched, wrapped optimizer and all; steps that accumulate are not steps."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = net()
    model, optimizer, loader = accelerator.prepare(model, sgd(model), batches(SIZE // 2))
    with Monitor(model, optimizer=optimizer, every=4, window=25) as monitor:
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch)["loss"])
                optimizer.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients:
                    monitor.step()
    _, expected = plain(2, every=4, window=25)
    pd.testing.assert_frame_equal(monitor.units, expected.units)
    pd.testing.assert_frame_equal(monitor.timeline, expected.timeline.drop(columns="loss"))
