"""What is in event files, read with TensorBoard's own readers, and what its tabs make of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tensorboard.backend.application import TensorBoardWSGI
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from tensorboard.plugins.hparams.hparams_plugin import HParamsPlugin
from tensorboard.plugins.image.images_plugin import ImagesPlugin
from tensorboard.plugins.scalar.scalars_plugin import ScalarsPlugin
from tensorboard.plugins.text.text_plugin import TextPlugin
from werkzeug.test import Client

_ALL = {"scalars": 0, "histograms": 0, "tensors": 0, "images": 0}


def events_of(path: Path) -> EventAccumulator:
    """Everything in a directory."""
    accumulator = EventAccumulator(str(path), size_guidance=_ALL)
    accumulator.Reload()
    return accumulator


def points(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    """Steps and values of a scalar."""
    return [(point.step, point.value) for point in events.Scalars(tag)]


def texts(events: EventAccumulator, name: str) -> dict[int, str]:
    """Step to Markdown."""
    found = events.Tensors(f"relu_doctor/{name}/text_summary")
    return {event.step: event.tensor_proto.string_val[0].decode() for event in found}


class Dashboard:
    """TensorBoard's application over a directory of runs, asked as a browser asks it."""

    def __init__(self, log_dir: Path) -> None:
        multiplexer = EventMultiplexer(tensor_size_guidance={"scalars": 0, "images": 0, "text": 0})
        multiplexer.AddRunsFromDirectory(str(log_dir))
        multiplexer.Reload()
        provider = MultiplexerDataProvider(multiplexer, str(log_dir))
        instances: dict[str, Any] = {}
        context = TBContext(data_provider=provider, plugin_name_to_instance=instances)
        for kind in (ScalarsPlugin, CustomScalarsPlugin, HParamsPlugin, ImagesPlugin, TextPlugin):
            instances[kind.plugin_name] = kind(context)
        self._client = Client(TensorBoardWSGI(list(instances.values()), data_provider=provider))

    def get(self, route: str, **asked: str) -> Any:
        """What a route answers, as JSON."""
        return self._answer(self._client.get(f"/data/plugin/{route}", query_string=asked))

    def post(self, route: str, body: Any) -> Any:
        """What a route answers to JSON."""
        return self._answer(self._client.post(f"/data/plugin/{route}", json=body))

    @staticmethod
    def _answer(answer: Any) -> Any:
        assert answer.status_code == 200, answer.data
        return json.loads(answer.data)
