"""What becomes of what a forward selects: a layer reads it, or it decides how much of other parts of a model counts.

The latents of a sparse autoencoder are read by a decoder's weights; the gates of a mixture of experts are multiplied
with what the experts put out. Both come out of a top-k or a threshold. Gates are no units, and no gate is dead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch.autograd.graph import Node

from relu_doctor.observe.graph.edges import VIEWS, Edge, children_of, edge_shape, is_leaf
from relu_doctor.observe.graph.operations import Operations

_MOVES = VIEWS | {"SplitBackward0", "SplitWithSizesBackward0", "IndexBackward0", "IndexSelectBackward0"}
_MOVES |= {"ScatterBackward0", "GatherBackward0", "IndexPutBackward0", "CopySlices", "ReluBackward0", "NegBackward0"}
_LOOKUPS = {"IndexBackward0", "IndexSelectBackward0", "EmbeddingBackward0", "GatherBackward0"}
_PRODUCTS = {"MulBackward0", "BmmBackward0", "MmBackward0", "DivBackward0"}


@dataclass(slots=True)
class Use:
    """What selections are used for.

    Attributes:
        gates: calls whose output is multiplied with other parts of the model, each value with many.
        codes: calls whose values are multiplied with the rows of a weight that were looked up for them.
    """

    gates: set[int] = field(default_factory=set)
    codes: set[int] = field(default_factory=set)


def uses(last: Iterable[Node], selected: Mapping[Node, int], operations: Operations) -> Use:
    """Follow selections through a graph.

    Args:
        last: nodes of the graph, the last ones of the forward among them.
        selected: the nodes of what was selected, to the calls that did.
        operations: tells parameters from data.
    """
    use = Use()
    carried: dict[Node, frozenset[int]] = {}  # the selections that a node only moves
    for end in last:
        stack = [(end, False)]
        while stack:
            node, left = stack.pop()
            if node in carried:
                continue
            children = [] if is_leaf(node) else [child for child in children_of(node) if child is not None]
            if not left:
                stack.append((node, True))
                stack += [(child, False) for child, _ in children if child not in carried]
                continue
            carried[node] = _carried(node, children, carried, selected, operations, use)
    return use


def _carried(
    node: Node,
    children: list[Edge],
    carried: Mapping[Node, frozenset[int]],
    selected: Mapping[Node, int],
    operations: Operations,
    use: Use,
) -> frozenset[int]:
    """The selections that a node only moves; what else it does with some is noted."""
    own = frozenset([selected[node]]) if node in selected else frozenset()
    reached = [(child, carried.get(child[0], frozenset())) for child in children]
    if own or not any(calls for _, calls in reached):
        return own
    name = node.name()
    if name in _MOVES or (len(children) == 1 and name in _PRODUCTS):
        return frozenset().union(*(calls for _, calls in reached))
    if name == "EmbeddingBagBackward0":
        use.codes.update(*(calls for _, calls in reached))
    if name not in _PRODUCTS or len(children) != 2:
        return frozenset()
    for (child, calls), (other, _) in zip(reached, reversed(reached), strict=True):
        if not calls:
            continue
        each, size = name in {"MulBackward0", "DivBackward0"}, edge_shape((node, 0)).numel()
        if operations.is_parameter(other):
            if _is_looked_up(other):
                use.codes |= calls
            elif each:
                return calls
        elif name == "BmmBackward0" or (each and edge_shape(child).numel() < size):
            use.gates |= calls
        elif each and edge_shape(other).numel() < size:  # normalised
            return calls
    return frozenset()


def _is_looked_up(edge: Edge) -> bool:
    """Whether rows of a parameter were picked."""
    node = edge[0]
    while not is_leaf(node):
        if node.name() in _LOOKUPS:
            return True
        children = [child for child in children_of(node) if child is not None]
        if len(children) != 1:
            return False
        node = children[0][0]
    return False
