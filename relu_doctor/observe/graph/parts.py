"""Which part of a parameter an operand is: an expert's weights in a stack, a half of a fused projection."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from relu_doctor.observe.graph.edges import VIEWS, Edge, children_of, edge_shape, is_leaf, turns

_KEEP_SHAPE = {"AliasBackward0", "CloneBackward0", "ToCopyBackward0"}
_SPLITS = {"SplitBackward0", "SplitWithSizesBackward0", "UnbindBackward0", "UnsafeSplitBackward0"}
_LARGEST = 2**24  # values; where the rows of a larger stack lie is not asked


@dataclass(frozen=True, slots=True)
class Part:
    """Where the rows of an operand lie in the parameter that it is a view of.

    Attributes:
        selected: (axis, index) of what is selected of the parameter first, outermost first.
        axes: axes of the rest that tell rows; ``None`` where that was not asked.
        rows: int64 (indices along those axes,): the row of each, -1 where it is not used.
        name: the same for the same part in every run.
    """

    selected: tuple[tuple[int, int], ...]
    axes: tuple[int, ...] | None
    rows: Tensor
    name: str

    def values(self, parameter: Tensor) -> Tensor:
        """The value of each row of an additive parameter or scale: (rows,); NaN where it is not one value."""
        summed, counts = self._per_row(parameter, squared=False)
        return torch.where(counts == 1, summed, torch.nan)

    def squares(self, parameter: Tensor) -> Tensor:
        """Sum of squares of each row: float64 (rows,)."""
        return self._per_row(parameter, squared=True)[0]

    def _per_row(self, parameter: Tensor, *, squared: bool) -> tuple[Tensor, Tensor]:
        if self.axes is None:
            nothing = torch.full((0,), torch.nan, dtype=torch.float64)
            return nothing, nothing
        for axis, index in self.selected:
            parameter = parameter.select(axis, index)
        values = parameter.detach().double().cpu()
        values = values**2 if squared else values
        flat = values.movedim(self.axes, tuple(range(len(self.axes)))).reshape(len(self.rows), -1)
        used = self.rows >= 0
        count = int(self.rows.max()) + 1 if len(self.rows) else 0
        sums, counts = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        sums.index_add_(0, self.rows[used], flat[used].sum(1))
        counts.index_add_(0, self.rows[used], torch.full((int(used.sum()),), flat.shape[1], dtype=torch.float64))
        return sums, counts


def is_computed(operand: Edge) -> bool:
    """Whether an operand is no view of a parameter."""
    edge: Edge | None = operand
    while edge is not None and not is_leaf(edge[0]):
        if edge[0].name() not in VIEWS and edge[0].name() not in _SPLITS:
            return True
        edge = children_of(edge[0])[0]
    return edge is None


@torch.no_grad()
def part_of(operand: Edge, row_axes: tuple[int, ...]) -> Part | None:
    """The part of a parameter that an operand is.

    Args:
        operand: an edge of the graph.
        row_axes: its axes that count rows.

    Returns:
        ``None`` where it is the whole parameter, transposed at most, or is computed from parameters.
    """
    if is_computed(operand):
        return None
    chain: list[Edge] = []
    edge: Edge | None = operand
    while edge is not None and not is_leaf(edge[0]):
        chain.append(edge)
        edge = children_of(edge[0])[0]
    if edge is None or (len(row_axes) == 1 and all(_is_whole(link) for link in chain)):
        return None
    shape = edge_shape(operand)
    selected: list[tuple[int, int]] = []
    while chain and chain[-1][0].name() in {"SelectBackward0", "UnbindBackward0"}:
        node, number = edge = chain.pop()
        axis = int(node._saved_dim)  # type: ignore[attr-defined]
        index = number if node.name() == "UnbindBackward0" else int(node._saved_index)  # type: ignore[attr-defined]
        whole = edge_shape(children_of(node)[0])  # type: ignore[arg-type]  # a view has an operand
        selected.append((_signed(axis) % len(whole), _signed(index) % whole[_signed(axis)]))
    if not chain:
        return Part(
            tuple(selected), row_axes, torch.arange(math.prod(shape[axis] for axis in row_axes)), _name(selected)
        )
    if len(row_axes) == 1 and all(_is_whole(link) for link in chain):
        turned = sum(link[0].name() not in _KEEP_SHAPE for link in chain) % 2
        axis = 1 - row_axes[0] if turned else row_axes[0]
        return Part(tuple(selected), (axis,), torch.arange(shape[row_axes[0]]), _name(selected))
    if max(shape.numel(), edge_shape(edge).numel()) > _LARGEST:
        return Part(
            tuple(selected),
            None,
            torch.empty(0, dtype=torch.int64),
            _name(selected, [(node.name(), number) for node, number in chain]),
        )
    codes = _coded(shape, row_axes)
    for node, number in chain:
        if node.name() not in _KEEP_SHAPE:
            incoming: list[Tensor | None] = [None] * len(node._input_metadata)
            incoming[number] = codes
            outgoing = node(*incoming)  # type: ignore[operator]
            codes = outgoing[0] if isinstance(outgoing, tuple) else outgoing
    axes = tuple(axis for axis in range(codes.dim()) if bool((codes != codes.narrow(axis, 0, 1)).any()))
    others = tuple(axis for axis in range(codes.dim()) if axis not in axes)
    rows = ((codes.amax(others) if others else codes).reshape(-1) - 1).long()
    used = (rows >= 0).nonzero().flatten()
    extent: list[object] = [(int(used[0]), int(used[-1]), len(used), int(rows[used[0]]))] if len(used) else []
    return Part(tuple(selected), axes, rows, _name(selected, extent))


def _coded(shape: torch.Size, row_axes: tuple[int, ...]) -> Tensor:
    """One more than the row of each value."""
    codes = torch.zeros((1,) * len(shape))
    for axis in row_axes:
        view = [1] * len(shape)
        view[axis] = shape[axis]
        codes = codes * shape[axis] + torch.arange(shape[axis], dtype=torch.float32).view(view)
    return (codes + 1).expand(shape)


def _is_whole(link: Edge) -> bool:
    return link[0].name() in _KEEP_SHAPE or (turns(link) and len(edge_shape(link)) == 2)


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def _name(selected: list[tuple[int, int]], rest: list[object] | None = None) -> str:
    return f"{selected}{rest or []}" if selected or rest else ""
