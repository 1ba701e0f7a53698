"""Along which axis of the tensors that are passed to a model its inputs are counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from relu_doctor.observe.inputs.feeding import map_tensors, tensors_in


@dataclass(frozen=True, slots=True)
class Counting:
    """How the inputs of a batch are counted.

    Attributes:
        axis: 0; 1 where a model takes (time, inputs, …); ``None`` where what is passed has no axis of inputs, and is
            one input.
        items: what is passed holds a list of tensors, each of which is one input.
    """

    axis: int | None = 0
    items: bool = False

    @property
    def words(self) -> str:
        """What a report must say; empty where inputs are counted as they mostly are."""
        if self.items:
            return "each tensor of the list that is passed is counted as one input"
        if self.axis is None:
            return "what is passed has no axis of inputs: each call is counted as one input"
        if self.axis:
            return "inputs are counted along axis 1 of what is passed: it is along it that they do not touch each other"
        return ""

    def num_inputs(self, value: object) -> int | None:
        """Inputs in a batch, read off the first tensor that has the axis, or off an array; ``None`` where none has."""
        if self.items:
            return len(first_list(value) or ()) or None
        if self.axis is None:
            return None if next(tensors_in(value), None) is None and not isinstance(value, np.ndarray) else 1
        tensors = [value] if isinstance(value, np.ndarray) else tensors_in(value)
        return next((tensor.shape[self.axis] for tensor in tensors if tensor.ndim > self.axis), None)

    def has_inputs(self, tensor: Tensor, num_inputs: int) -> bool:
        """Whether a tensor of a batch has a value for each input."""
        if self.axis is None or self.items or tensor.layout is not torch.strided:  # of sparse ones no rows are taken
            return False
        return tensor.dim() > self.axis and tensor.shape[self.axis] == num_inputs

    def inputs_first(self, tensor: Tensor) -> Tensor:
        """A view of a tensor of a batch, with its inputs along the first axis."""
        return tensor.transpose(0, self.axis) if self.axis else tensor

    def pick(self, batch: Any, inputs: Any, num_inputs: int) -> Any:
        """Some inputs of a batch of so many.

        Args:
            batch: an array, or a nest of tensors.
            inputs: what to index with: a slice, or int64 (picked,) on the CPU.
            num_inputs: in the batch.
        """
        if self.axis is None:
            return batch
        if self.items:
            listed = first_list(batch) or ()
            picked = listed[inputs] if isinstance(inputs, slice) else [listed[index] for index in inputs.tolist()]
            return with_list(batch, listed, picked)
        if isinstance(batch, np.ndarray):
            return batch[(slice(None),) * self.axis + (inputs if isinstance(inputs, slice) else inputs.numpy(),)]

        def few(tensor: Tensor) -> Tensor:
            if not self.has_inputs(tensor, num_inputs):
                return tensor
            index = inputs if isinstance(inputs, slice) else inputs.to(tensor.device)
            return tensor[(slice(None),) * (self.axis or 0) + (index,)]

        return map_tensors(batch, few)

    def positions(self, value: object) -> int:
        """How many positions an input may have; 1 where it has features only."""
        if self.items:
            return max((_positions(item, item.shape) for item in first_list(value) or ()), default=1)
        tensor = next((tensor for tensor in tensors_in(value) if tensor.dim() > (self.axis or 0)), None)
        if tensor is None or self.axis is None:
            return 1
        return _positions(tensor, self.inputs_first(tensor).shape[1:])


def _positions(tensor: Tensor, sizes: torch.Size) -> int:
    """How many positions an input of some sizes may have."""
    if len(sizes) > 2:
        return sizes[1:].numel()
    return max(sizes) if len(sizes) == 2 else int(sizes[0]) if sizes and not tensor.is_floating_point() else 1


def first_list(value: object) -> Sequence[Tensor] | None:
    """The list of tensors, of one rank and type, that a batch or one of a forward's arguments is or holds."""
    if isinstance(value, Tensor):
        return None
    if _is_of_a_forward(value):
        parts = [*value[0], *value[1].values()]
    elif isinstance(value, tuple | list) and _is_list(value):
        return value
    else:
        parts = list(value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ())
    return next((found for part in parts if (found := first_list(part)) is not None), None)


def with_list(value: Any, listed: Sequence[Tensor], other: Sequence[Tensor]) -> Any:
    """The same nest with another list in the place of one that it holds."""
    if value is listed:
        return type(listed)(other)
    if type(value) in {tuple, list}:
        return type(value)(with_list(item, listed, other) for item in value)
    if isinstance(value, Mapping):
        return {key: with_list(item, listed, other) for key, item in value.items()}
    return value


def _is_list(value: Sequence[object]) -> bool:
    tensors = [item for item in value if isinstance(item, Tensor) and item.dim()]
    return 0 < len(tensors) == len(value) and len({(item.dim(), item.dtype) for item in tensors}) == 1


def _is_of_a_forward(value: object) -> TypeGuard[tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """Whether a value is the arguments of a forward: positional ones, and those by name."""
    return (
        isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], tuple) and isinstance(value[1], Mapping)
    )


BY_ROWS = Counting()
