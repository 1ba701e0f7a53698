"""What the data are worth as evidence: repetitions count for nothing, NaN is refused."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

from relu_doctor.errors import DataError
from relu_doctor.observe.inputs.counting import BY_ROWS, Counting
from relu_doctor.observe.inputs.feeding import tensors_in


class Census:
    """Counts inputs that are no exact repetition, in bounded memory.

    Remembers a 64-bit digest of each of the first million inputs; later inputs are taken for distinct.

    Attributes:
        repeated: inputs that repeated an earlier one.
        tokens: of all inputs, where they are told.
        repeated_tokens: of those that repeated an earlier one.
    """

    LIMIT = 1_000_000

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self.repeated = 0
        self.tokens = self.repeated_tokens = 0

    def add(
        self, value: object, num_inputs: int | None, counting: Counting = BY_ROWS, *, tokens: Tensor | None = None
    ) -> None:
        """Count one batch: the rows of all its tensors together are an input. Tensors on a device are not looked at.

        Args:
            value: a nest of tensors.
            num_inputs: inputs in the batch; ``None`` where no tensor shows it.
            counting: on which axis they lie.
            tokens: int64 (inputs,): the tokens of each; by default it is one.
        """
        self.tokens += int(tokens.sum()) if tokens is not None else num_inputs or 1
        for index, digest in enumerate(digests(value, num_inputs, counting) or ()):
            if self._is_known(digest):
                self.repeated += 1
                self.repeated_tokens += int(tokens[index]) if tokens is not None else 1

    def _is_known(self, key: int) -> bool:
        if key in self._seen:
            return True
        if len(self._seen) < self.LIMIT:
            self._seen.add(key)
        return False


def digests(value: object, num_inputs: int | None, counting: Counting = BY_ROWS) -> list[int] | None:
    """A 64-bit digest of each input of a batch; ``None`` where its tensors lie on a device, or hold no inputs.

    Args:
        value: a nest of tensors; the rows of all of them together are an input.
        num_inputs: inputs in the batch; ``None`` where no tensor shows it.
        counting: on which axis they lie.
    """
    tensors = [tensor for tensor in tensors_in(value) if tensor.dim()]
    if counting.axis is None:
        tensors = [tensor[None] for tensor in tensors]
    else:
        held = [tensor for tensor in tensors if counting.has_inputs(tensor, num_inputs or 0)]
        tensors = [counting.inputs_first(tensor) for tensor in held]
    if not num_inputs or not tensors or any(tensor.device.type != "cpu" for tensor in tensors):
        return None
    found = [0] * num_inputs
    for tensor in tensors:
        flat = tensor.detach().reshape(num_inputs, -1).contiguous()
        rows = flat.view(torch.uint8).numpy() if flat.shape[1] else np.zeros((num_inputs, 0), dtype=np.uint8)
        found = [xxh3_64_intdigest(row.data, seed) for row, seed in zip(rows, found, strict=True)]
    return found


def check_no_nan(value: object, batch_index: int) -> None:
    """Refuse NaN in the data, which would pass for dead units.

    Raises:
        DataError: a floating tensor holds NaN. Tensors on a device are not looked at.
    """
    for tensor in tensors_in(value):
        if _may_hold_nan(tensor) and bool(torch.isnan(tensor).any()):
            rows = torch.isnan(tensor.reshape(len(tensor), -1)).any(1) if tensor.dim() > 1 else torch.isnan(tensor)
            raise DataError(
                f"expected data without NaN, found {int(torch.isnan(tensor).sum()):,} in batch {batch_index} "
                f"(first in input {int(rows.int().argmax())} of it); clean the data and scan again."
            )


def _may_hold_nan(tensor: Tensor) -> bool:
    """Whether NaN is to be looked for: a sum is NaN wherever a value is, and is had at the speed of memory."""
    if not tensor.is_floating_point() or tensor.device.type != "cpu":
        return False
    return tensor.dtype.itemsize == 1 or bool(tensor.sum().isnan())  # float8 has no sum
