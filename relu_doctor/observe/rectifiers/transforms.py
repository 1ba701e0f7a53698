"""Tensors inside torch.func transforms, seen as they lie in memory."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

_functorch = torch._C._functorch


def without_vmap(tensor: Tensor) -> Tensor | None:
    """The tensor behind transforms: every axis that ``vmap`` maps is there again, outermost first, before the others.

    Returns:
        ``None`` where a transform holds the tensor that is neither ``vmap`` nor a derivative.
    """
    levels: list[int] = []  # where the mapped axis lies, innermost vmap first
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            levels.append(_functorch.maybe_get_bdim(tensor))
        elif not _functorch.is_gradtrackingtensor(tensor):
            return None
        tensor = _functorch.get_unwrapped(tensor)
    with outside_of_transforms():
        for passed, axis in enumerate(reversed(levels)):
            tensor = tensor.movedim(axis + passed, passed)
    return tensor


def outside_of_transforms() -> AbstractContextManager[object]:
    """Run what follows as if no transform were active."""
    context: AbstractContextManager[object] = temporarily_clear_interpreter_stack()
    return context
