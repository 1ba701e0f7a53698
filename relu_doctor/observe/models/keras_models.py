"""Keras 3 models on the torch backend: layers that are no submodules, and parameters under paths of Keras's own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn


def keras_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The Keras layers inside a model that are no submodules of it, with the paths that Keras gives them."""
    base = _layer_class()
    if base is None:
        return
    registered = {id(module) for module in model.modules()}
    for module in list(model.modules()):
        if isinstance(module, base):
            for layer in module._flatten_layers(include_self=False, recursive=True):
                if id(layer) not in registered:
                    registered.add(id(layer))
                    yield (layer.path or layer.name).replace("/", "."), layer  # an input layer has no path


def unbuilt(model: nn.Module) -> str:
    """The name of a Keras model that has no parameters before its first call; empty where there is none."""
    base = _layer_class()
    found = () if base is None else (module for module in model.modules() if isinstance(module, base))
    return next((f"{type(layer).__name__} {layer.name}" for layer in found if not layer.built), "")


def _layer_class() -> Any:
    """The class of Keras's layers, where Keras is in use."""
    keras = sys.modules.get("keras")
    layer = getattr(keras, "Layer", None)
    return layer if isinstance(layer, type) and issubclass(layer, nn.Module) else None
