"""Layers that take one input as well as a batch of them, and which of the two they were given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_BATCHED: dict[Callable[..., Any], int] = {
    torch.conv1d: 3,
    torch.conv2d: 4,
    torch.conv3d: 5,
    torch.conv_transpose1d: 3,
    torch.conv_transpose2d: 4,
    torch.conv_transpose3d: 5,
    F.multi_head_attention_forward: 3,
    F.linear: 2,
}


_PRODUCTS = {torch.mv, Tensor.mv, torch.addmv, Tensor.addmv, torch.matmul, Tensor.matmul, Tensor.__matmul__}


@dataclass(slots=True)
class Ranks:
    """What a model's layers were given.

    Attributes:
        layers: of convolutions, attention and recurrent layers, whether each call was given a batch.
        products: the same of linear layers, which also take a summary of a whole batch, or a batch of positions.
    """

    layers: list[bool] = field(default_factory=list)
    products: list[bool] = field(default_factory=list)

    @property
    def single(self) -> bool:
        """Whether they were given single inputs, and never a batch."""
        told = self.layers or self.products
        return bool(told) and not any(told)

    def note_call(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Note what a torch call was given; what ``vmap`` hides of a tensor's axes does not show."""
        if function not in _PRODUCTS and function not in _BATCHED:
            return
        if any(isinstance(arg, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(arg) for arg in args):
            return
        if function in _PRODUCTS:
            operands = [arg.dim() for arg in args if isinstance(arg, Tensor)]
            if len(operands) > 1:
                self.products.append(min(operands[-2:]) > 1)
            return
        axes = _BATCHED[function]
        if args and isinstance(args[0], Tensor):
            (self.products if function is F.linear else self.layers).append(args[0].dim() >= axes)

    def note_module(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Note what a module was given that makes a batch of one input by itself."""
        if isinstance(module, nn.RNNBase) and args and isinstance(args[0], Tensor):
            self.layers.append(args[0].dim() >= 3)
