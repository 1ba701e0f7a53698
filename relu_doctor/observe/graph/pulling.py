"""One node of a graph, run backwards by hand on gradients that carry codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from relu_doctor.observe.graph.edges import Edge, children_of, edge_shape
from relu_doctor.observe.graph.sharding import passed_on

# Operations whose saved indices say where a value came from, which may be another place for each input.
CHOICES = frozenset(
    {
        "IndexBackward0",
        "IndexSelectBackward0",
        "GatherBackward0",
        "TakeBackward0",
        "SortBackward0",
        "SortBackward1",
        "TopkBackward0",
        "KthvalueBackward0",
        "MedianBackward1",
    }
)
_EXTREMES = {"AmaxBackward0", "AminBackward0", "MaxBackward0", "MinBackward0", "MaxBackward1", "MinBackward1"}
_SOFTMAXES = {"SoftmaxBackward0", "LogSoftmaxBackward0"}


def backward_of(node: Node, incoming: Sequence[Tensor | None], *, direct: bool) -> Iterator[tuple[Edge, Tensor]]:
    """The gradients that a node hands on, with the edges that they go to.

    Args:
        node: of the graph.
        incoming: the gradient of each of its outputs.
        direct: leave out what every value has a part in: what is expanded, the sum that a softmax divides by.
    """
    passed = passed_on(node, incoming)
    if passed is not None:
        yield from passed
        return
    name = node.name()
    first = incoming[0]
    if name in _EXTREMES and first is not None:
        for child in children_of(node):
            if child is not None and (spread := _spread(node, first, edge_shape(child))) is not None:
                yield child, spread
                return
    if direct and name in _SOFTMAXES and first is not None:
        child = children_of(node)[0]
        if child is not None:
            yield child, first
        return
    if direct and name == "ExpandBackward0":
        return
    outgoing = node(*incoming)  # type: ignore[operator]  # nodes are callable, which the stubs do not say
    outgoing = outgoing if isinstance(outgoing, tuple) else (outgoing,)
    for child, gradient in zip(children_of(node), outgoing, strict=True):
        if child is not None and gradient is not None:
            yield child, gradient


def _spread(node: Node, gradient: Tensor, shape: torch.Size) -> Tensor | None:
    """A gradient given to all that an extreme was taken of: each of them might have been it."""
    dims = getattr(node, "_saved_dim", None)
    if dims is None:
        return None
    signed = [dim - 2**64 if dim >= 2**63 else dim for dim in ([dims] if isinstance(dims, int) else dims)]
    axes = sorted(dim % len(shape) for dim in signed) or list(range(len(shape)))
    if not getattr(node, "_saved_keepdim", False):
        for axis in axes:
            gradient = gradient.unsqueeze(axis)
    return gradient.expand(shape)
