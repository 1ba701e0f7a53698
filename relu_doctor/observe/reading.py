"""Which inputs of a source are read: all, a number spread evenly over it, or as many as a bound needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset

from relu_doctor.errors import DataError
from relu_doctor.observe.feeding import ArrayBatches, head_of, map_tensors, num_inputs_of


@dataclass(frozen=True, slots=True)
class Source:
    """Batches as they will be read.

    Attributes:
        batches: to iterate once.
        sampling: ``all``, ``spread`` or ``head``.
        available: inputs that the whole source holds, where it tells.
        limit: stop after this many inputs.
    """

    batches: Iterable[Any]
    sampling: str
    available: int | None
    limit: int | None


def open_batches(batches: Any) -> Iterable[Any]:
    """Check that something can be iterated for batches; a single tensor is one batch.

    Raises:
        DataError: it is no iterable of batches.
    """
    if isinstance(batches, Tensor | np.ndarray):
        return [batches]
    if isinstance(batches, Mapping):
        raise DataError("expected an iterable of batches, found one mapping; wrap it in a list: [batch].")
    if isinstance(batches, str | bytes) or not isinstance(batches, Iterable):
        raise DataError(f"expected a tensor or an iterable of batches, found {type(batches).__name__}.")
    return batches


def plan(batches: Iterable[Any], limit: int | None) -> Source:
    """Decide how a source is read.

    A limited read of a source with a length is spread evenly over it, since validation sets come sorted by class; of
    a stream it is the head.

    Args:
        batches: as :func:`open_batches` returns them.
        limit: inputs to read at most; ``None`` reads all.
    """
    available = _available(batches)
    if limit is None or (available is not None and available <= limit):
        return Source(batches, "all", available, None)
    if isinstance(batches, ArrayBatches):
        return Source(batches.spread(limit), "spread", available, limit)
    if isinstance(batches, DataLoader) and _can_subset(batches):
        last = len(batches.dataset) - 1  # type: ignore[arg-type]  # _can_subset knows that it has a length
        picked = torch.linspace(0, last, limit, dtype=torch.float64).round().long().tolist()
        loader: DataLoader[Any] = DataLoader(
            Subset(batches.dataset, picked),
            batch_size=batches.batch_size,
            collate_fn=batches.collate_fn,
            num_workers=batches.num_workers,
            pin_memory=batches.pin_memory,
        )
        return Source(loader, "spread", available, limit)
    if isinstance(batches, Sequence) and len(batches):
        return Source(_spread_sequence(batches, limit), "spread", available, limit)
    return Source(batches, "head", available, limit)


def take(source: Source, *, stop: Callable[[], bool] | None = None) -> Iterator[Any]:
    """The batches of a source, cut at its limit.

    Args:
        source: as planned.
        stop: asked before each batch; true ends the reading.
    """
    taken = 0
    for batch in source.batches:
        if stop is not None and stop():
            return
        rows = num_inputs_of(batch) or 0
        if source.limit is not None and taken + rows > source.limit:
            batch = head_of(batch, source.limit - taken)
        taken += rows
        yield batch
        if source.limit is not None and taken >= source.limit:
            return


def _available(batches: Iterable[Any]) -> int | None:
    if isinstance(batches, ArrayBatches):
        return batches.num_inputs
    if isinstance(batches, DataLoader):
        dataset = batches.dataset
        return len(dataset) if not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__") else None
    if isinstance(batches, list | tuple):
        rows = [num_inputs_of(batch) for batch in batches]
        return sum(row for row in rows if row is not None) if None not in rows else None
    return None


def _can_subset(loader: DataLoader[Any]) -> bool:
    return (
        loader.batch_size is not None
        and not isinstance(loader.dataset, IterableDataset)
        and isinstance(loader.sampler, SequentialSampler | RandomSampler)
    )


def _spread_sequence(batches: Sequence[Any], limit: int) -> Iterator[Any]:
    """Rows spread evenly over a sequence of batches: each gives its share, itself spread over the batch."""
    rows = [num_inputs_of(batch) or 0 for batch in batches]
    total, passed = sum(rows), 0
    picked = np.linspace(0, total - 1, limit).round().astype(int)
    for batch, size in zip(batches, rows, strict=True):
        own = picked[(picked >= passed) & (picked < passed + size)] - passed
        passed += size
        if len(own):
            yield _rows_of(batch, torch.from_numpy(own), size)


def _rows_of(batch: Any, rows: Tensor, size: int) -> Any:
    if isinstance(batch, np.ndarray):
        return batch[rows.numpy()]
    return map_tensors(batch, lambda tensor: tensor[rows] if tensor.dim() and len(tensor) == size else tensor)
