"""Batches in: sequences of inputs whose length is known, and how a batch becomes the arguments of a forward."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from relu_doctor.errors import DataError


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
        return self.picking(torch.linspace(0, self.num_inputs - 1, num_inputs, dtype=torch.float64).round().long())

    def picking(self, picked: Tensor) -> ArrayBatches:
        """The same source, read only at some rows: int64 (rows,)."""
        return ArrayBatches(
            self.rows, self.batch_size, indices=picked if self.indices is None else self.indices[picked]
        )

    def __len__(self) -> int:
        return math.ceil(self.num_inputs / self.batch_size)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        start = index * self.batch_size
        if not 0 <= start < self.num_inputs:
            raise IndexError(index)
        if self.indices is None:
            return self.rows[start : start + self.batch_size]
        return self.rows[self.indices[start : start + self.batch_size]]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True, slots=True)
class Arguments:
    """How one batch is handed to a model.

    Attributes:
        args, kwargs: of the forward.
        passed: in words, for the coverage line.
        mask: bool (inputs, positions) of an ``attention_mask`` or a padding mask, else ``None``.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    passed: str
    mask: Tensor | None


class Feeder:
    """Turns batches into forward arguments by the signature of the model's forward.

    Of a tensor the tensor itself; of a tuple or list as many leading elements as the forward requires; of a mapping
    the keys that it takes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.required = 1
        self.accepted: frozenset[str] | None = None  # None: any keyword
        if isinstance(model, torch.jit.ScriptModule):
            arguments = model._c._get_method("forward").schema.arguments[1:]
            self.required = max(sum(not argument.has_default_value() for argument in arguments), 1)
            self.accepted = frozenset(argument.name for argument in arguments)
            return
        try:
            parameters = list(inspect.signature(model.forward).parameters.values())
        except (TypeError, ValueError):
            return
        positional = [p for p in parameters if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}]
        required = [p for p in positional if p.default is p.empty]
        self.required = max(len(required), 1)
        named = frozenset(p.name for p in parameters if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY})
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.accepted = None if open_ended and not named else named

    def arguments(self, batch: object) -> Arguments:
        """Read one batch.

        Raises:
            DataError: the batch cannot be passed to this forward.
        """
        if isinstance(batch, np.ndarray):
            batch = torch.from_numpy(batch)
        if isinstance(batch, Tensor):
            return Arguments((batch,), {}, f"1 tensor {describe(batch)}", None)
        if isinstance(batch, Mapping):
            return self._mapping(batch)
        if isinstance(batch, tuple | list):
            if len(batch) < self.required:
                raise DataError(
                    f"expected batches of at least {self.required} elements, as the model's forward requires, found "
                    f"{len(batch)}; give forward=lambda model, batch: … to pass them yourself."
                )
            args = tuple(batch[: self.required])
            shown = ", ".join(describe(item) for item in args)
            first = "the first" if len(args) == 1 else f"the first {len(args)}"
            what = f"{first} of {len(batch)} elements: " if len(args) < len(batch) else ""
            return Arguments(args, {}, what + shown, None)
        raise DataError(
            f"expected batches of tensors, tuples, lists or mappings, found {type(batch).__name__}; "
            "give forward=lambda model, batch: … to pass it yourself."
        )

    def _mapping(self, batch: Mapping[Any, Any]) -> Arguments:
        kwargs = {str(key): value for key, value in batch.items() if self.accepted is None or key in self.accepted}
        if not kwargs:
            taken = ", ".join(sorted(self.accepted or ())) or "none"
            raise DataError(
                f"expected a mapping with keys that the model's forward takes ({taken}), found "
                f"{', '.join(map(str, batch)) or 'an empty one'}; rename the keys, or give "
                "forward=lambda model, batch: …."
            )
        mask = mask_in(kwargs)
        shown = ", ".join(f"{key} {describe(value)}" for key, value in kwargs.items())
        return Arguments((), kwargs, shown, mask)


def mask_in(kwargs: Mapping[str, Any]) -> Tensor | None:
    """The positions that are no padding, by the names under which Hugging Face and torch know them."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and _is_binary(mask):
        return mask.bool()
    padding = kwargs.get("src_key_padding_mask", kwargs.get("key_padding_mask"))
    return ~padding if isinstance(padding, Tensor) and padding.dim() == 2 and padding.dtype == torch.bool else None


def _is_binary(mask: Tensor) -> bool:
    """Ones and zeros; a floating mask may also be one to add to scores."""
    return not mask.is_floating_point() or bool(((mask == 0) | (mask == 1)).all())


def describe(value: object) -> str:
    """Dtype and shape of a tensor less its batch axis, or the type of anything else."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    shape = "x".join(str(size) for size in value.shape[1:])
    return f"{str(value.dtype).removeprefix('torch.')}[{'N' + ('x' + shape if shape else '') if value.dim() else ''}]"


def refuse_nested(value: object) -> None:
    """Refuse nested tensors, whose sequences differ in length.

    Raises:
        DataError: there is one.
    """
    if any(tensor.is_nested for tensor in tensors_in(value)):
        raise DataError(
            "expected tensors of one shape for all inputs, found a nested tensor; pad it with "
            "torch.nested.to_padded_tensor(x, 0), and give mask= or the model's own padding mask."
        )


def tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for item in fields(value):
            yield from tensors_in(getattr(value, item.name))


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest with every tensor changed; objects with a ``to`` method of their own are left to :func:`moved`."""
    if type(value) is Tensor:
        return change(value)
    if isinstance(value, Tensor):  # of a class of the user's own, which decides what becomes of it
        with torch._C._EnableTorchFunction():
            return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, change) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(item, change) for item in value)
    if type(value) is dict:
        return {key: map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, Mapping):
        return {key: map_tensors(item, change) for key, item in value.items()}
    return value


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor on the device of others; a GPU is not waited for."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def moved(batch: Any, device: torch.device | None) -> Any:
    """A batch on a device, as ordinary tensors (no inference tensors); untouched where it already is there."""

    def move(tensor: Tensor) -> Tensor:
        placed = tensor if device is None else tensor.to(device)
        return placed.clone() if placed.is_inference() else placed

    if (
        not isinstance(batch, Tensor | tuple | list | Mapping)
        and device is not None
        and callable(getattr(batch, "to", None))
    ):
        return batch.to(device)
    return map_tensors(batch, move)
