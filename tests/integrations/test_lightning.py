"""The callback for Lightning, in real fits."""

from __future__ import annotations

import copy
import pickle

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from relu_doctor.integrations.lightning import ReLUDoctorCallback
from tests.integrations.toys import QUIET, SIZE, STEPS, Lit, batches, lightning_trainer, same

pytestmark = [pytest.mark.filterwarnings(each) for each in QUIET]


def test_the_run_is_the_same_run(tmp_path):
    """Losses, weights, random numbers and all of a checkpoint but the callbacks' own are those of a run without it."""
    left = []
    for number, callbacks in enumerate(([], [ReLUDoctorCallback(every=3, window=20)])):
        torch.manual_seed(4)
        model = Lit(drop=0.2, decay=0.5)
        trainer = lightning_trainer(*callbacks, max_epochs=4, num_sanity_val_steps=1)
        trainer.fit(model, batches(), batches(64))
        trainer.save_checkpoint(tmp_path / f"{number}.ckpt")
        kept = torch.load(tmp_path / f"{number}.ckpt", weights_only=True)
        states = [kept[name] for name in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "loops")]
        left.append([model.losses, torch.rand(3), *states])
    assert len(left[0][0]) == 4 * STEPS
    assert same(*left)


def test_scalars_go_to_the_loggers_and_to_other_callbacks(tmp_path):
    """Each window is in the trainer's log at its step, and stops a run that asks for that."""
    callback = ReLUDoctorCallback(every=5, window=20)
    stop = EarlyStopping("relu_doctor/silent_fraction", stopping_threshold=0.5, check_on_train_epoch_end=True)
    trainer = lightning_trainer(callback, stop, logger=CSVLogger(tmp_path), max_epochs=5)
    trainer.fit(Lit(), batches(), batches(64))
    assert trainer.current_epoch == 1  # 3 of 48 units are silent
    logged = pd.read_csv(next(tmp_path.rglob("metrics.csv")))
    found = logged["relu_doctor/silent_fraction"].dropna()
    assert found.tolist() == [3 / 48] * 3
    assert logged.loc[found.index, "step"].tolist() == [19, 39, 59]


def test_the_sanity_check_and_validation_do_not_count():
    """Only batches of training are evidence, also where validation asks for gradients."""
    callback = ReLUDoctorCallback(every=1, window=STEPS)
    lightning_trainer(callback, num_sanity_val_steps=5, val_check_interval=10, inference_mode=False).fit(
        Lit(), batches(), batches(64)
    )
    assert callback.monitor.units["inputs"].max() == STEPS * SIZE


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    """With a checkpoint of the middle of a window, the resumed run's tables are those of one that never stopped."""

    def keep():
        return ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=STEPS, save_top_k=-1)

    whole = ReLUDoctorCallback(every=4, window=40)
    trainer = lightning_trainer(whole, keep(), max_epochs=2, enable_checkpointing=True)
    trainer.fit(Lit(), batches())
    resumed = ReLUDoctorCallback(every=4, window=40)
    trainer = lightning_trainer(resumed, keep(), max_epochs=2, enable_checkpointing=True)
    trainer.fit(Lit(), batches(), ckpt_path=tmp_path / f"step={STEPS}.ckpt", weights_only=True)
    pd.testing.assert_frame_equal(resumed.monitor.units, whole.monitor.units)
    later = whole.monitor.timeline.query("window > 0").reset_index(drop=True)
    pd.testing.assert_frame_equal(resumed.monitor.timeline, later)


def test_a_second_fit_goes_on_and_a_new_run_begins_anew():
    """The same trainer continues the step and the evidence; another trainer with the same callback does not."""
    callback, model = ReLUDoctorCallback(every=2, window=1000), Lit()
    trainer = lightning_trainer(callback)
    trainer.fit(model, batches())
    assert callback.monitor.units["inputs"].max() == STEPS // 2 * SIZE + 2 * SIZE - SIZE
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, batches())
    assert callback.monitor.timeline["last_step"].tolist() == [2 * STEPS] * 2
    assert callback.monitor.timeline["first_step"].tolist() == [STEPS + 1] * 2
    lightning_trainer(callback).fit(Lit(), batches())
    assert callback.monitor.timeline["last_step"].tolist() == [STEPS] * 2


class Pair(pl.LightningModule):
    """Never called as a whole: two parts, a loss and a rectifier between them, and two optimizers by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.encoder = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        self.decoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 16))
        self.relu, self.loss = nn.ReLU(), nn.MSELoss()

    def training_step(self, batch, index):
        loss = self.loss(self.decoder(self.relu(self.encoder(batch["x"]))), batch["x"])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.encoder, self.decoder)]


def test_parts_that_are_called_by_themselves_are_watched():
    """Encoder and decoder are seen, a batch is one step, and a rectifier between them is named as not observed."""
    callback = ReLUDoctorCallback(every=1, window=STEPS)
    lightning_trainer(callback).fit(Pair(), batches())
    assert callback.monitor.sites["site"].tolist() == ["encoder.1", "decoder.1"]
    assert callback.monitor.windows == 1
    assert callback.monitor.units["inputs"].tolist() == [STEPS * SIZE] * 16
    assert callback.monitor.diagnosis.table.coverage.distinct_inputs == STEPS * SIZE
    assert any("relu is called between modules" in note for note in callback.monitor.diagnosis.table.coverage.notes)


def test_a_part_that_is_compiled_is_watched():
    """It is observed in forwards of its original, and the run is the same run."""
    left = []
    for callbacks in ([], [ReLUDoctorCallback(every=5, window=30)]):
        model = Lit()
        model.net = torch.compile(model.net, backend="eager")
        lightning_trainer(*callbacks).fit(model, batches())
        left.append([model.losses, dict(model.state_dict())])
    assert same(*left)
    assert callbacks[0].monitor.diagnosis.sites["num_units"].tolist() == [32, 16]
    assert callbacks[0].monitor.units["inputs"].max() > 0


def test_a_fit_that_fails_is_let_go_of():
    """The error is the fit's own; no hook is left, and the evidence until then can be read."""

    class Fails(Lit):
        def training_step(self, batch, index):
            if index == 30:
                raise RuntimeError("on purpose")
            return super().training_step(batch, index)

    callback, model = ReLUDoctorCallback(every=1, window=20), Fails()
    with pytest.raises(RuntimeError, match="on purpose"):
        lightning_trainer(callback).fit(model, batches())
    assert callback.monitor.windows == 2
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_callback_copies_and_pickles():
    """Before, during and after a fit; a copy is attached to nothing and has the same options."""
    copies = []

    class Copies(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            copies.append(copy.deepcopy(callback))

    callback = ReLUDoctorCallback(every=2, window=20)
    pickle.loads(pickle.dumps(callback))
    lightning_trainer(callback, Copies(), max_steps=3).fit(Lit(), batches())
    copied = pickle.loads(pickle.dumps(copies[-1]))
    assert copied.monitor is None
    lightning_trainer(copied).fit(Lit(), batches())
    assert copied.monitor.windows == 3


def test_an_unknown_option_is_told_at_once():
    """Not when training begins."""
    with pytest.raises(TypeError, match="found widnow"):
        ReLUDoctorCallback(widnow=3)
