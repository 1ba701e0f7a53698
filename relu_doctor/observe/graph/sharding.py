"""Models that are spread over processes: their tensors (DTensors), the shards of a site's units, forwards in step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from relu_doctor.errors import ReLUDoctorError
from relu_doctor.observe.graph.edges import Edge, children_of, edge_shape

_Item = TypeVar("_Item")

# FSDP's marks on the way of a gradient, and changes of placement: the values are the same on both sides. Their own
# backward would start to communicate.
_SAME_VALUES = {
    "RegisterPostBackwardFunctionBackward",
    "RegisterPreBackwardFunctionBackward",
    "RedistributeBackward",
    "NestedRedistributeBackward",
}
_FAILED = "the scan has failed in another of the model's processes; see what that one says."
_TO_LOCAL, _FROM_LOCAL = "_ToTorchTensorBackward", "_FromTorchTensorBackward"


def is_spread(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    if type(tensor) is Tensor:
        return False
    kind: Any = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    return isinstance(tensor, kind)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process that holds a part of it must ask."""
    spread: Any = tensor
    full: Tensor = spread.full_tensor() if is_spread(tensor) else tensor
    return full


def arrived(tensor: Tensor) -> Tensor:
    """A tensor whose values have come from the other processes."""
    if type(tensor) is Tensor or not hasattr(tensor, "trigger_wait"):
        return tensor
    awaited: Any = tensor
    values: Tensor = awaited.wait()
    return values


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """One process's share of an axis that is spread over several.

    Attributes:
        group: the processes.
        windows: first index and last index + 1 of each process's share, by its rank in the group.
        rank: this process's.
    """

    group: Any
    windows: tuple[tuple[int, int], ...]
    rank: int

    def rows_elsewhere(self, rows: Tensor) -> list[Tensor] | None:
        """The rows that each process's units are made of, if they stand alike in every share.

        Args:
            rows: int64 (units,) of this process, -1 for none.

        Returns:
            ``None`` where the rows are not of this process's share, or the shares differ in size.
        """
        start, stop = self.windows[self.rank]
        known = rows[rows >= 0]
        if len(known) and not bool(((known >= start) & (known < stop)).all()):
            return None
        if torch.equal(rows, torch.arange(start, stop)):
            return [torch.arange(first, last) for first, last in self.windows]
        if any(last - first != stop - start for first, last in self.windows):
            return None
        return [torch.where(rows >= 0, rows - start + first, -1) for first, _ in self.windows]


def shard_of(nodes: Iterable[Node]) -> tuple[Shard | None, bool]:
    """Which shares of a stretch of graph the processes compute.

    Args:
        nodes: between a pre-activation and what feeds it.

    Returns:
        The shares, ``None`` where every process computes all; and whether anything is spread at all.
    """
    shards: dict[Any, Shard] = {}
    for node in nodes:
        if node.name() == _TO_LOCAL:
            spec: Any = node.dtensor_spec  # type: ignore[attr-defined]
            for dim, placement in enumerate(spec.placements):
                if placement.is_shard() and spec.mesh.size(dim) > 1:
                    size, count = spec.shape[placement.dim], spec.mesh.size(dim)
                    windows = tuple(_window(size, count, index) for index in range(count))
                    group = spec.mesh.get_group(dim)
                    shards[group.group_name, windows] = Shard(group, windows, spec.mesh.get_local_rank(dim))
    return (next(iter(shards.values())) if len(shards) == 1 else None), bool(shards)


def passed_on(node: Node, incoming: Sequence[Tensor | None]) -> list[tuple[Edge, Tensor]] | None:
    """The gradients that a node hands on which moves values between processes, without moving any.

    A tensor that is spread is seen as a whole, of which this process's share is filled in.

    Returns:
        ``None`` for any other node.
    """
    name, children = node.name(), children_of(node)
    if name in _SAME_VALUES:
        pairs = zip(children, incoming, strict=False)
        return [(child, gradient) for child, gradient in pairs if child is not None and gradient is not None]
    if name not in {_TO_LOCAL, _FROM_LOCAL}:
        return None
    child, gradient = children[0], incoming[0]
    if child is None or gradient is None:
        return []
    if name == _TO_LOCAL:
        spec: Any = node.dtensor_spec  # type: ignore[attr-defined]
        filled = gradient.new_zeros(spec.shape)
        _own_share(filled, spec.mesh, spec.placements).copy_(gradient)
        return [(child, filled)]
    mesh, placements = node.forward_input_device_mesh, node.forward_input_placements  # type: ignore[attr-defined]
    share = _own_share(gradient, mesh, placements)
    return [(child, share)] if share.shape == edge_shape(child) else []


def _own_share(values: Tensor, mesh: Any, placements: Sequence[Any]) -> Tensor:
    for dim, placement in enumerate(placements):
        if placement.is_shard():
            axis = placement.dim
            start, stop = _window(values.shape[axis], mesh.size(dim), mesh.get_local_rank(dim))
            values = values.narrow(axis, start, stop - start)
    return values


def _window(size: int, count: int, index: int) -> tuple[int, int]:
    """How torch deals an axis to several: equal shares, the last ones shorter or empty."""
    share = -(-size // count)
    return min(index * share, size), min((index + 1) * share, size)


def groups_of(model: nn.Module) -> list[Any]:
    """The process groups over which parameters of a model are spread, in the same order in each process."""
    groups: dict[str, Any] = {}
    for parameter in model.parameters():
        if is_spread(parameter):
            mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
            for dim in range(mesh.ndim):
                group = mesh.get_group(dim)
                groups[group.group_name] = group
    return list(groups.values())


def in_all_processes(model: nn.Module, items: list[_Item]) -> list[_Item]:
    """Items, and those of the other processes over which a model is spread, in the same order in each of them."""
    for group in groups_of(model):
        items = sorted({item for each in gathered(items, group) for item in each})
    return items


def gathered(value: Any, group: Any) -> list[Any]:
    """What each process of a group has for a value, in the order of their ranks."""
    found: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(found, value, group=group)
    return found


class Company:
    """The processes over which a model is spread: none of them may run a forward without the others.

    Each forward is announced. A process that has read all its data goes on to take part in the forwards of those that
    have not, and one that fails tells the others.

    Args:
        model: before it is watched.
        groups: of the processes, for tensors on the CPU; by default those over which its parameters are spread.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Any] | None = None) -> None:
        self._groups = groups_of(model) if groups is None else list(groups)
        self._failed = False
        parameter = next((each for each in model.parameters() if groups is None and is_spread(each)), None)
        self._device = "cpu" if parameter is None else parameter.device_mesh.device_type  # type: ignore[attr-defined]

    def __bool__(self) -> bool:
        return bool(self._groups)

    def announce(self) -> None:
        """Wait until every process runs a forward.

        Raises:
            ReLUDoctorError: another process has failed.
        """
        self._highest(1)

    def accompany(self, forward: Callable[[], object]) -> None:
        """Run forwards as long as any other process does."""
        while self._highest(0):
            forward()

    def fail(self) -> None:
        """Tell the others, who may be waiting, that this process stops."""
        if not self._failed:
            with suppress(ReLUDoctorError):
                self._highest(2)

    def _highest(self, state: int) -> int:
        if not self._groups:
            return 0
        if self._failed:
            raise ReLUDoctorError(_FAILED)
        flag = torch.tensor(state, device=self._device)
        for group in self._groups:
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=group)
        self._failed = int(flag) > 1
        if self._failed:
            raise ReLUDoctorError(_FAILED)
        return int(flag)
