"""Whether operations that feed one pre-activation are the steps of a loop: one layer, called again and again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch.autograd.graph import Node

from relu_doctor.observe.graph.edges import VIEWS, Edge, children_of, is_leaf
from relu_doctor.observe.graph.operations import Source, reads_data

_MOST_NODES = 64  # that are looked at beside an operation
_PICKS = ("Select", "Slice", "Unbind", "Index", "Split", "Chunk")
Part = tuple[object, ...]


def are_steps(sources: Sequence[Source], between: Iterable[Node]) -> bool:
    """Whether all use the same weights in the same way.

    The members of an ensemble do not: each has its own part of some parameter, in its weight or beside it.

    Args:
        sources: the operations.
        between: the nodes between the pre-activation and them.
    """
    above: dict[Node, list[Node]] = {}
    for node in between:
        for child in _children(node):
            above.setdefault(child[0], []).append(node)
    return len({(source.kind, _uses(source, above)) for source in sources}) == 1


def _uses(source: Source, above: dict[Node, list[Node]]) -> tuple[object, ...]:
    """The parameters of an operation, how its weight is computed, and the parts of parameters beside it."""
    weight = [] if source.operand is None else [source.operand[0]]
    bias = [] if source.bias is None else [source.bias]
    parts = frozenset(_parts(source.inputs))
    beside: set[Part] = set()
    seen: set[Node] = set()
    stack = [source.edge[0]]
    while stack:
        for node in above.get(stack.pop(), []):
            if node not in seen:
                seen.add(node)
                stack.append(node)
                beside.update(part for child in _children(node) for part in _part_of(child))
    return source.weight, source.additive, tuple(_made_by(weight)), tuple(_made_by(bias)), parts, frozenset(beside)


def _made_by(edges: Iterable[Edge]) -> Iterator[Part]:
    """The nodes between a parameter and an operand, and which part of it each takes."""
    stack = list(edges)
    for _ in range(_MOST_NODES):
        if not stack:
            return
        node, number = stack.pop()
        if not is_leaf(node):
            yield _picked(node, number)
            stack.extend(_children(node))


def _parts(edges: Iterable[Edge]) -> Iterator[Part]:
    """The parts of parameters that go into what an operation reads, up to the layers before it."""
    stack, seen = list(edges), set[Edge]()
    while stack and len(seen) < _MOST_NODES:
        edge = stack.pop()
        if edge in seen or is_leaf(edge[0]):
            continue
        seen.add(edge)
        yield from _part_of(edge)
        if not reads_data(edge[0]):
            stack.extend(_children(edge[0]))


def _part_of(edge: Edge) -> tuple[Part, ...]:
    """Which part of a parameter an edge is; nothing where it is a whole one, or none."""
    picks: list[Part] = []
    node, number = edge
    while not is_leaf(node):
        if node.name() not in VIEWS and not node.name().startswith(_PICKS):
            return ()
        if node.name().startswith(_PICKS):
            picks.append(_picked(node, number))
        children = _children(node)
        if not children:
            return ()
        node, number = children[0]
    name = getattr(node, "stands_for", None) or id(getattr(node, "variable", None))
    return ((name, *picks),) if picks else ()


def _picked(node: Node, number: int) -> Part:
    """What a node takes of what it is given, as far as it is told by numbers."""
    told = (getattr(node, f"_saved_{name}", None) for name in ("dim", "index", "start", "end"))
    return node.name(), number, *(value for value in told if isinstance(value, int))


def _children(node: Node) -> list[Edge]:
    return [child for child in children_of(node) if child is not None]
