"""What autograd keeps on a model's tensors beside their values: memory, gradients, ``requires_grad``, versions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter


@contextmanager
def preserved_leaves(model: nn.Module) -> Iterator[None]:
    """Restore parameters, buffers and tensor attributes as autograd sees them, also when the body raises.

    A model may freeze parameters in its ``train()``, give them other memory, or run a backward in its forward. To be
    left last, when values are back in their place: a tensor of the same values is of the same version, so that a
    backward of a forward before the scan finds what it saved.
    """
    attributes = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    tensors = dict.fromkeys([*model.parameters(), *model.buffers(), *attributes])
    ordinary = [tensor for tensor in tensors if type(tensor) in {Tensor, nn.Parameter} and not tensor.is_meta]
    kept = [(tensor, _memory(tensor), tensor.requires_grad, tensor.grad) for tensor in ordinary if tensor.is_leaf]
    with ExitStack() as versions:
        for tensor in ordinary:
            if not tensor.is_inference():
                versions.enter_context(_unsafe_preserve_version_counter(tensor))
        try:
            yield
        finally:
            for tensor, memory, requires_grad, gradient in kept:
                if memory is not None and tensor.data_ptr() != memory.data_ptr():
                    tensor.data = memory
                if tensor.requires_grad is not requires_grad:
                    tensor.requires_grad_(requires_grad)
                if tensor.grad is not gradient:
                    tensor.grad = gradient


def _memory(tensor: Tensor) -> Tensor | None:
    return tensor.detach() if tensor.layout is torch.strided and not tensor.is_inference() else None


def in_same_memory(tensor: Tensor) -> Tensor:
    """An ordinary tensor without history in the memory of another, which may be of inference mode."""
    plain = type(tensor) in {Tensor, torch.nn.Parameter} and tensor.layout is torch.strided
    if not plain or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return tensor.detach()
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
