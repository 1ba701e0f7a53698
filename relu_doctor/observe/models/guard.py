"""Leave a model as it was: attributes, training flags, hooks, buffers, gradients, ``requires_grad``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from relu_doctor.observe.models.leaves import in_same_memory, preserved_leaves
from relu_doctor.observe.models.scripted import scripted_attributes
from relu_doctor.observe.models.state import keep_attributes, keep_scripted, keep_tensors
from relu_doctor.observe.models.wrappers import unwrapped


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore, bit for bit and also when the body raises, what observing a model may touch.

    Attributes module by module (training flags, hooks, and what a forward keeps on its module: a pruned weight, a
    cache), buffers and tensor attributes (their values and the objects that hold them), and what autograd keeps on
    tensors. Within it, wrappers inside the model call what they wrap.
    """
    with ExitStack() as stack:
        stack.enter_context(preserved_leaves(model))
        stack.callback(keep_attributes(model))
        stack.enter_context(unwrapped(model))
        stack.enter_context(_ordinary_buffers(model))
        stack.callback(keep_tensors(model))
        stack.callback(keep_scripted(scripted_attributes(model)))
        yield


@contextmanager
def _ordinary_buffers(model: nn.Module) -> Iterator[None]:
    """Put ordinary tensors in the place and memory of buffers of inference mode, which nothing else may write to."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_inference():
                module._buffers[name] = in_same_memory(buffer)
    yield


@contextmanager
def gradients_required(model: nn.Module) -> Iterator[None]:
    """Let the floating parameters of scripted code, which is given no stand-ins, require gradients."""
    scripts = [module for module in model.modules() if isinstance(module, torch.jit.ScriptModule)]
    parameters = [parameter for module in scripts for parameter in module.parameters(recurse=False)]
    frozen = [p for p in parameters if not p.requires_grad and p.dtype.is_floating_point and not p.is_inference()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
