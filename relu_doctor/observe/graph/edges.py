"""The autograd graph of a forward: its edges, what they stand for, and a graph that keeps no activation alive."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

if TYPE_CHECKING:
    from relu_doctor.observe.graph.names import ParameterNames

Edge = tuple[Node, int]
Saved = Tensor | tuple[int, torch.Size, torch.dtype, torch.device]

_ACCUMULATE = "torch::autograd::AccumulateGrad"
VIEWS = frozenset(
    {
        "ViewBackward0",
        "UnsafeViewBackward0",
        "ReshapeAliasBackward0",
        "ExpandBackward0",
        "UnsqueezeBackward0",
        "SqueezeBackward0",
        "SqueezeBackward1",
        "TBackward0",
        "TransposeBackward0",
        "PermuteBackward0",
        "AliasBackward0",
        "CloneBackward0",
        "ToCopyBackward0",
        "SelectBackward0",
        "SliceBackward0",
        "UnbindBackward0",
        "MovedimBackward0",
    }
)
WALK_LIMIT = 200_000  # nodes; a graph this large behind one rectifier is a loop over time


def hollow_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """Hooks for saved tensors with which a graph keeps no activation alive.

    Only shapes are saved, and random values are handed out. Indices are kept as they are.

    Gradients read from such a graph tell where values flow (zero or not) and which way, not how much, wherever an
    operation scales by a saved tensor. Shape operations, sums and additive parameters need none and stay exact.
    """
    count = 0

    def pack(tensor: Tensor) -> Saved:
        nonlocal count
        count += 1
        if not tensor.dtype.is_floating_point and tensor.dtype != torch.bool and not tensor.is_complex():
            return tensor  # indices say which unit goes where
        return count, tensor.shape, tensor.dtype, tensor.device

    def unpack(saved: Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        seed, shape, dtype, device = saved
        generator = torch.Generator(device).manual_seed(seed)  # the same values each time: questions are compared
        if dtype == torch.bool:
            return torch.rand(shape, device=device, generator=generator) < 0.5  # a mask lets both sides through
        parts = dtype.to_real() if dtype.is_complex else dtype
        values = torch.empty(shape, dtype=parts, device=device).uniform_(0.5, 1.5, generator=generator)
        return values.to(dtype)

    return pack, unpack


def turns(edge: Edge) -> bool:
    """Whether an edge is the transpose of the matrix that it is a view of."""
    name = edge[0].name()
    if name == "PermuteBackward0":
        first = int(edge[0]._saved_dims[0])  # type: ignore[attr-defined]
        return len(edge_shape(edge)) == 2 and first % 2 == 1  # also where it is counted from behind
    return name in {"TBackward0", "TransposeBackward0"}


def edge_shape(edge: Edge) -> torch.Size:
    """Shape of the tensor that an edge of the graph stands for."""
    return torch.Size(edge[0]._input_metadata[edge[1]].shape)


def children_of(node: Node) -> list[Edge | None]:
    """What a node reads; where something stands in for a tensor that was cut off, the edge of that tensor."""
    edges: list[Edge | None] = []
    for child, number in node.next_functions:
        edge: Edge | None = None if child is None else (child, number)
        while edge is not None and isinstance(stands_for := getattr(edge[0], "stands_for", None), tuple):
            edge = stands_for
        edges.append(edge)
    return edges


def is_leaf(node: Node) -> bool:
    """Whether a node is a tensor that was not computed, or stands in for a parameter."""
    return node.name() == _ACCUMULATE or isinstance(getattr(node, "stands_for", None), str)


def leaf_name(leaf: Node, names: ParameterNames) -> str | None:
    """The name of the parameter that a leaf of the graph is; ``None`` for any other tensor."""
    stands_for = getattr(leaf, "stands_for", None)
    name: str | None = stands_for if leaf.name() != _ACCUMULATE else names.of(leaf.variable)  # type: ignore[attr-defined]
    return name
