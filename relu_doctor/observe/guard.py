"""Leave a model as it was: attributes, training flags, buffers, requires_grad, random state and gradient modes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore, bit for bit and also when the body raises, what observing a model may touch.

    Attributes module by module (training flags, and what a forward keeps on its module: a pruned weight, a cache),
    buffers (their values and the objects that hold them), and the random state of torch on every device, of numpy and
    of Python.
    """
    with ExitStack() as stack:
        stack.enter_context(_attributes(model))
        stack.enter_context(preserved_buffers(model))
        stack.enter_context(_random_states())
        yield


@contextmanager
def _attributes(model: nn.Module) -> Iterator[None]:
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for module in model.modules():
        places: list[dict[str, Any]] = [vars(module)]
        if not isinstance(module, torch.jit.ScriptModule):  # whose parameters and buffers are views of its own
            places += [module._parameters, module._buffers, module._modules]
        kept += [(names, dict(names)) for names in places]
    try:
        yield
    finally:
        for names, before in kept:
            if list(names) != list(before):
                names.clear()
            names.update(before)


@contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """Restore every buffer: the tensor object in its place, and its values if they were written to.

    Values are compared, since batch_norm writes to its running statistics without a new version of the tensor.
    """
    kept: list[tuple[nn.Module, str, Tensor | None, Tensor | None]] = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, values in kept:
                module._buffers[name] = buffer
                if buffer is not None and values is not None and not torch.equal(buffer, values):
                    buffer.copy_(values)


@contextmanager
def _random_states() -> Iterator[None]:
    cpu = torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002 the user's global state
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        for index, state in enumerate(devices):
            torch.cuda.set_rng_state(state, index)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)


@contextmanager
def gradients_required(model: nn.Module) -> Iterator[None]:
    """Let every floating parameter require gradients for the length of a discovery pass."""
    frozen = [
        p for p in model.parameters() if not p.requires_grad and p.dtype.is_floating_point and not p.is_inference()
    ]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
