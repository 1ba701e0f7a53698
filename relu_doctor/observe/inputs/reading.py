"""Which inputs of a source are read: all, a number spread evenly over it, or as many as a bound needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset

from relu_doctor.errors import DataError
from relu_doctor.observe.inputs.counting import BY_ROWS, Counting
from relu_doctor.observe.inputs.feeding import ArrayBatches


@dataclass(frozen=True, slots=True)
class Source:
    """Batches as they will be read.

    Attributes:
        batches: to iterate once.
        sampling: ``all``, ``spread`` or ``head``.
        available: inputs that the whole source holds, where it tells.
        limit: stop after this many inputs.
        picked: int64 (inputs,): places in the whole source of what is read, where it is a part of it.
    """

    batches: Iterable[Any]
    sampling: str
    available: int | None
    limit: int | None
    picked: NDArray[np.int64] | None = None


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


def plan(
    batches: Iterable[Any], limit: int | None, counting: Counting = BY_ROWS, *, after: Source | None = None
) -> Source:
    """Decide how a source is read.

    A limited read of a source with a length is spread evenly over it, since validation sets come sorted by class; of
    a stream it is the head.

    Args:
        batches: as :func:`open_batches` returns them.
        limit: inputs to read at most; ``None`` reads all.
        counting: how the inputs of a batch are counted.
        after: inputs that were read already, spread over the same batches; they are not read again, and count.
    """
    available = _available(batches, counting)
    read = np.empty(0, dtype=np.int64) if after is None or after.picked is None else after.picked
    sampling = "all" if limit is None or (available is not None and available <= limit) else "spread"
    if sampling == "all" and not len(read):
        return Source(batches, "all", available, None)
    if limit is not None and isinstance(batches, Sequence) and available is None and len(batches):
        return Source(_spread_batches(batches, limit, counting), "spread", None, limit)
    subset = isinstance(batches, DataLoader) and _can_subset(batches)
    if available is None or not (subset or isinstance(batches, Sequence)):
        return Source(batches, "head", available, limit)
    rest = np.setdiff1d(np.arange(available), read)
    more = len(rest) if limit is None else min(limit - len(read), len(rest))
    picked = rest[np.linspace(0, len(rest) - 1, max(more, 0)).round().astype(np.int64)]
    chosen: Iterable[Any]
    if isinstance(batches, ArrayBatches):
        chosen = batches.picking(torch.from_numpy(picked))
    elif isinstance(batches, DataLoader):
        chosen = DataLoader(
            Subset(batches.dataset, picked.tolist()),
            batch_size=batches.batch_size,
            collate_fn=batches.collate_fn,
            num_workers=batches.num_workers,
            pin_memory=batches.pin_memory,
        )
    else:
        chosen = _picked_of(batches, picked, counting)  # type: ignore[arg-type]  # it is a sequence
    return Source(chosen, sampling, available, len(picked), picked)


def take(
    source: Source,
    *,
    counting: Callable[[Any], Counting] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Iterator[Any]:
    """The batches of a source, cut at its limit.

    Args:
        source: as planned.
        counting: tells how the inputs of a batch are counted.
        stop: asked before each batch; true ends the reading.
    """
    taken = 0
    for batch in _drawn(source.batches):
        if stop is not None and stop():
            return
        counted = BY_ROWS if counting is None else counting(batch)
        rows = counted.num_inputs(batch) or 0
        if source.limit is not None and taken + rows > source.limit:
            batch = counted.pick(batch, slice(source.limit - taken), rows)
        taken += rows
        yield batch
        if source.limit is not None and taken >= source.limit:
            return


def _drawn(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, drawn by the user's code, whose torch calls the user's own function modes are to see."""
    with torch._C._EnableTorchFunction():
        iterator = iter(batches)
    while True:
        with torch._C._EnableTorchFunction():
            try:
                batch = next(iterator)
            except StopIteration:
                return
        yield batch


def _available(batches: Iterable[Any], counting: Counting) -> int | None:
    if isinstance(batches, ArrayBatches):
        return batches.num_inputs
    if isinstance(batches, DataLoader):
        dataset = batches.dataset
        return len(dataset) if not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__") else None
    if isinstance(batches, list | tuple):
        rows = [counting.num_inputs(batch) for batch in batches]
        return sum(row for row in rows if row is not None) if None not in rows else None
    return None


def _can_subset(loader: DataLoader[Any]) -> bool:
    return (
        loader.batch_size is not None
        and not isinstance(loader.dataset, IterableDataset)
        and isinstance(loader.sampler, SequentialSampler | RandomSampler)
    )


def _spread_batches(batches: Sequence[Any], limit: int, counting: Counting) -> Iterator[Any]:
    """Whole batches of a sequence that are only had by reading them, spread evenly over it."""
    first = batches[0]
    wanted = min(len(batches), -(-limit // max(counting.num_inputs(first) or 1, 1)))
    for index in np.unique(np.linspace(0, len(batches) - 1, wanted).round().astype(np.int64)).tolist():
        yield batches[index] if index else first


def _picked_of(batches: Sequence[Any], picked: NDArray[np.int64], counting: Counting) -> Iterator[Any]:
    """Some rows of a sequence of batches, in their order; a batch of which none is wanted is not looked at."""
    first = 0
    for batch in batches:
        size = counting.num_inputs(batch) or 0
        own = picked[(picked >= first) & (picked < first + size)] - first
        first += size
        if len(own):
            yield counting.pick(batch, torch.from_numpy(own), size)
