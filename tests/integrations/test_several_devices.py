"""Lightning on two devices: each process watches its own batches, and the first one reports."""

from __future__ import annotations

import pytest

import relu_doctor
from relu_doctor.integrations.lightning import ReLUDoctorCallback
from tests.integrations.toys import QUIET, SIZE, STEPS, Lit, batches, lightning_trainer

pytestmark = [pytest.mark.filterwarnings(each) for each in QUIET]


class Whole(Lit):
    """Called as a whole, so that Lightning's wrapper and the module's own call are one inside the other."""

    def forward(self, batch):
        return self.net(**batch)["loss"]

    def training_step(self, batch, index):
        return self(batch)


@pytest.mark.parametrize("kind", [pytest.param(Lit, marks=pytest.mark.slow), Whole])
def test_two_processes_watch_their_own_batches_and_the_first_reports(kind, tmp_path, monkeypatch):
    """One history, in which each unit was observed on the batches of both."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    callback = ReLUDoctorCallback(every=1, window=10, history=tmp_path / "history")
    trainer = lightning_trainer(callback, strategy="ddp_spawn", devices=2)
    trainer.fit(kind(), batches())
    history = relu_doctor.History.read(tmp_path / "history")
    assert history.windows["last_step"].tolist() == [10, 20, 30]
    assert history.units()["inputs"].max() == STEPS * SIZE
    assert history.runs["reason"].tolist() == ["finished"]
