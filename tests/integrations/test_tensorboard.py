"""Where a framework's logger writes for TensorBoard, its run gets the pictures and records of the tab as well."""

from __future__ import annotations

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from stable_baselines3.common.logger import configure

from relu_doctor.integrations import lightning, stable_baselines3, transformers
from relu_doctor.reports.plugin.names import UNITS_TAG, WINDOWS_TAG
from tests.integrations.test_stable_baselines3 import made
from tests.integrations.toys import QUIET, Lit, batches, hugging_face_trainer, lightning_trainer, net
from tests.reports.events import events_of, points

pytestmark = [pytest.mark.filterwarnings(each) for each in QUIET]
PICTURES = {"relu_doctor/map_of_units", "relu_doctor/worst_sites_over_time"}


def test_lightnings_logger(tmp_path):
    """All scalars once, at most 40 tags, beside the module's own; another logger gets the flat scalars."""
    loggers = [TensorBoardLogger(tmp_path / "board", name="", version=""), CSVLogger(tmp_path / "csv")]
    callback = lightning.ReLUDoctorCallback(every=5, window=20)
    trainer = lightning_trainer(callback, logger=loggers)
    trainer.fit(Lit(), batches())
    events = events_of(tmp_path / "board")
    tags = events.Tags()
    told = callback.monitor.timeline.groupby("last_step")["dead"].sum() / 48
    assert points(events, "relu_doctor/dead_fraction") == [(step, pytest.approx(dead)) for step, dead in told.items()]
    assert {WINDOWS_TAG, UNITS_TAG} < set(tags["tensors"])
    assert "_hparams_/session_start_info" not in tags["tensors"], "the logger has its own"
    assert PICTURES - {"relu_doctor/worst_sites_over_time"} <= set(tags["images"])
    assert len([tag for tag in tags["scalars"] if tag.startswith("relu_doctor")]) <= 40
    assert len(list((tmp_path / "board").rglob("*tfevents*"))) == 1
    assert "relu_doctor/dead_fraction" in next((tmp_path / "csv").rglob("metrics.csv")).read_text()


def test_the_trainers_report(tmp_path):
    """A run of its own beside the Trainer's; none where it does not report to TensorBoard."""
    for report, found in (("tensorboard", 1), ("none", 0)):
        folder = tmp_path / report
        callback = transformers.ReLUDoctorCallback(every=5, window=20)
        hugging_face_trainer(net(), folder, callback, report_to=report).train()
        files = list((folder / "runs" / "relu_doctor").glob("*tfevents*"))
        assert len(files) == found
    events = events_of(tmp_path / "tensorboard" / "runs" / "relu_doctor")
    assert [step for step, _ in points(events, "relu_doctor/dead_fraction")] == [20, 40, 60]
    assert PICTURES & set(events.Tags()["images"])


def test_stable_baselines_logger(tmp_path):
    """The scalars are the logger's, at its time steps; records and pictures come beside them."""
    model = made("DQN")
    model.set_logger(configure(str(tmp_path), ["tensorboard"]))
    callback = stable_baselines3.ReLUDoctorCallback(every=5, window=20)
    model.learn(400, callback=callback, log_interval=1)
    model.logger.close()
    events = events_of(tmp_path)
    assert [event.step for event in events.Tensors(WINDOWS_TAG)] == callback.monitor.timeline[
        "last_step"
    ].unique().tolist()
    assert "relu_doctor/map_of_units" in events.Tags()["images"]
    assert "relu_doctor/dead_fraction" in events.Tags()["scalars"]
    assert "relu_doctor/often_cited_low" not in events.Tags()["scalars"]
