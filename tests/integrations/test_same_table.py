"""One contract for the supervised adapters: the same data, model and seed give the same table as a plain loop."""

from __future__ import annotations

import pandas as pd
import pytest

from relu_doctor.integrations.lightning import ReLUDoctorCallback as LightningCallback
from relu_doctor.integrations.transformers import ReLUDoctorCallback as TransformersCallback
from relu_doctor.training.monitor import Monitor
from tests.integrations.toys import QUIET, SIZE, Lit, batches, hugging_face_trainer, lightning_trainer, net, plain, same

pytestmark = [pytest.mark.filterwarnings(each) for each in QUIET]
OPTIONS = {"every": 4, "window": 25}
LOGGED = ["loss", "grad_norm"]  # what the Trainer tells only when it logs


def by_lightning(accumulate, folder):
    callback, model = LightningCallback(module="net", **OPTIONS), Lit()
    trainer = lightning_trainer(callback, accumulate_grad_batches=accumulate)
    trainer.fit(model, batches(SIZE // accumulate))
    return model.net, callback.monitor


def by_hugging_face(accumulate, folder):
    callback, model = TransformersCallback(**OPTIONS), net()
    trainer = hugging_face_trainer(
        model,
        folder,
        callback,
        gradient_accumulation_steps=accumulate,
        per_device_train_batch_size=SIZE // accumulate,
    )
    trainer.train()
    return model, callback.monitor


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("train", [by_lightning, by_hugging_face])
def test_every_framework_gives_the_table_of_the_plain_loop(train, accumulate, tmp_path):
    """The weights are those of the plain loop, and so are the units, the sites and the whole timeline."""
    model, expected = plain(accumulate, **OPTIONS)
    trained, monitor = train(accumulate, tmp_path)
    assert isinstance(monitor, Monitor)
    assert same(dict(trained.state_dict()), dict(model.state_dict()))
    assert monitor.windows == expected.windows == 3
    pd.testing.assert_frame_equal(monitor.units, expected.units)
    pd.testing.assert_frame_equal(monitor.sites, expected.sites)
    apart = LOGGED if train is by_hugging_face else []
    timelines = [each.timeline.drop(columns=apart, errors="ignore") for each in (monitor, expected)]
    pd.testing.assert_frame_equal(*timelines)
    assert monitor.units.query("onset == 'born_dead' or status == 'unproven'")["unit"].tolist()[:3] == [0, 1, 2]
