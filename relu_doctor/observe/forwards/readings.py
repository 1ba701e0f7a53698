"""What a forward makes of its rectifiers' outputs: a choice from them, thresholds for a choice, or anything else.

A ReLU whose output goes into nothing but a top-k fires where it is selected. One that something else reads as well
gets a gradient on that way too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from relu_doctor.observe.graph.edges import Edge, children_of, is_leaf
from relu_doctor.observe.inputs.feeding import tensors_in
from relu_doctor.observe.rectifiers.gates import COMPARISONS, Ledger


class Readings:
    """Remembers which rectifiers' outputs are read by what.

    Args:
        ledger: what is known of tensors.
        edge: where a tensor stands in the graph.
    """

    def __init__(self, ledger: Ledger, edge: Callable[[Tensor], Edge | None]) -> None:
        self._ledger = ledger
        self._edge = edge
        self._running: set[int] = set()
        self._kept: list[tuple[set[int], list[Node]]] = []  # calls that were read, and what was made of them
        self._compared: set[Node] = set()

    def expect(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A call is about to be performed."""
        self._running = self._ledger.read(func, args, kwargs)
        if func in COMPARISONS:
            self._compared.update(self._nodes(tensors_in((args, kwargs))))

    def take_in(self, result: Any, *, everywhere: bool) -> None:
        """It was performed, and the ledger has taken in its result.

        Args:
            result: what it returned, or wrote to.
            everywhere: gradients do not show here whether it is differentiated.
        """
        read, self._running = self._running, set()
        made = list(tensors_in(result))
        if any(tensor.requires_grad or (everywhere and tensor.is_floating_point()) for tensor in made):
            self.consume(read - self._ledger.indices(made), made)

    def consume(self, calls: set[int], made: Iterable[Tensor] = ()) -> None:
        """Something else than a choice is made of the outputs of calls."""
        if calls:
            self._kept.append((calls, list(self._nodes(made))))

    def others(self, last: Iterable[Node]) -> set[int]:
        """The calls whose output goes to something else than a choice, or a threshold for one.

        Args:
            last: nodes of the graph, the last ones of the forward among them.
        """
        read = _read_nodes(last) if self._compared else set()
        thresholds = self._compared - read
        return {call for calls, nodes in self._kept for call in calls if not nodes or not thresholds.issuperset(nodes)}

    def _nodes(self, tensors: Iterable[Tensor]) -> Iterable[Node]:
        edges = (self._edge(tensor) for tensor in tensors)
        return [edge[0] for edge in edges if edge is not None]


def _read_nodes(last: Iterable[Node]) -> set[Node]:
    """The nodes that others read."""
    seen: set[Node] = set()
    read: set[Node] = set()
    stack = list(last)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            children = [] if is_leaf(node) else [child[0] for child in children_of(node) if child is not None]
            read.update(children)
            stack += children
    return read
