"""Batches in: sequences of inputs whose length is known, and how a batch becomes the arguments of a forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class ArrayBatches(Sequence[Tensor]):
    """Rows of one array, dealt in batches, in memory or memory-mapped.

    Args:
        rows: the inputs along the first axis, a tensor or anything that numpy can index by rows.
        batch_size: rows in a batch; the last batch may be shorter.
        indices: which rows, in which order; all of them when ``None``.
    """

    def __init__(self, rows: Tensor, batch_size: int, *, indices: Tensor | None = None) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.indices = indices

    @property
    def num_inputs(self) -> int:
        """How many inputs there are to read."""
        return len(self.rows) if self.indices is None else len(self.indices)

    def spread(self, num_inputs: int) -> ArrayBatches:
        """The same source, read only at ``num_inputs`` rows spread evenly over it (validation sets come sorted)."""
        if num_inputs >= self.num_inputs:
            return self
        picked = torch.linspace(0, self.num_inputs - 1, num_inputs, dtype=torch.float64).round().long()
        return ArrayBatches(
            self.rows, self.batch_size, indices=picked if self.indices is None else self.indices[picked]
        )

    def __len__(self) -> int:
        return -(-self.num_inputs // self.batch_size)

    def __getitem__(self, index):  # type: ignore[no-untyped-def, override]
        start = index * self.batch_size
        if not 0 <= start < self.num_inputs:
            raise IndexError(index)
        if self.indices is None:
            return self.rows[start : start + self.batch_size]
        return self.rows[self.indices[start : start + self.batch_size]]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))
