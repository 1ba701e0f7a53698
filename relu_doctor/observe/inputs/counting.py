"""Along which axis of the tensors that are passed to a model its inputs are counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from relu_doctor.observe.inputs.feeding import map_tensors, tensors_in


@dataclass(frozen=True, slots=True)
class Counting:
    """How the inputs of a batch are counted.

    Attributes:
        axis: 0; 1 where a model takes (time, inputs, …); ``None`` where what is passed has no axis of inputs, and is
            one input.
    """

    axis: int | None = 0

    @property
    def words(self) -> str:
        """What a report must say; empty where inputs are counted as they mostly are."""
        if self.axis is None:
            return "what is passed has no axis of inputs: each call is counted as one input"
        if self.axis:
            return "inputs are counted along axis 1 of what is passed: it is along it that they do not touch each other"
        return ""

    def num_inputs(self, value: object) -> int | None:
        """Inputs in a batch, read off the first tensor that has the axis, or off an array; ``None`` where none has."""
        if self.axis is None:
            return None if next(tensors_in(value), None) is None and not isinstance(value, np.ndarray) else 1
        tensors = [value] if isinstance(value, np.ndarray) else tensors_in(value)
        return next((tensor.shape[self.axis] for tensor in tensors if tensor.ndim > self.axis), None)

    def has_inputs(self, tensor: Tensor, num_inputs: int) -> bool:
        """Whether a tensor of a batch has a value for each input."""
        return self.axis is not None and tensor.dim() > self.axis and tensor.shape[self.axis] == num_inputs

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
        if isinstance(batch, np.ndarray):
            return batch[(slice(None),) * self.axis + (inputs if isinstance(inputs, slice) else inputs.numpy(),)]

        def few(tensor: Tensor) -> Tensor:
            if not self.has_inputs(tensor, num_inputs):
                return tensor
            index = inputs if isinstance(inputs, slice) else inputs.to(tensor.device)
            return tensor[(slice(None),) * (self.axis or 0) + (index,)]

        return map_tensors(batch, few)


BY_ROWS = Counting()
