"""What feeds a pre-activation and what reads a rectifier's output, read off the graph of one forward.

Nothing here runs a kernel of the model: the graph that a forward left behind is walked, each node once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.autograd.graph import Node

from relu_doctor.observe.graph.edges import WALK_LIMIT, Edge, children_of, is_leaf, leaf_name
from relu_doctor.observe.graph.operations import Operations, Source, all_sources

if TYPE_CHECKING:
    from relu_doctor.observe.graph.names import ParameterNames

_SUMS = {"AddBackward0", "SubBackward0", "RsubBackward1"}
_CROSSINGS = 8  # rectifiers that may lie directly behind one another


@dataclass(slots=True)
class Provenance:
    """What feeds one pre-activation, nearest first.

    Attributes:
        sources: parametrised operations; those behind a normalisation hang below it.
        summands: indices of earlier rectifier calls whose outputs are added in without a weight between.
        raw_summand: an input of the model is added in without a weight between.
        crossed: how many rectifiers lie between, where only another rectifier's output is read.
        shifts: operations on the way that negate, take a part of a complex number or add something that no source
            accounts for; two pre-activations of one source that differ in them (``z`` and ``-z``) are two sites.
        constants: something is added or subtracted that is no unit's own parameter, or a source is opaque.
    """

    sources: list[Source]
    summands: tuple[int, ...]
    raw_summand: bool
    crossed: int
    shifts: tuple[str, ...] = ()
    constants: bool = False


class GraphReader:
    """Reads provenance off the graph of one forward pass.

    Args:
        names: of the parameters.
        rectified: graph nodes of the rectifier calls' outputs so far, to the index of the call.
    """

    def __init__(self, names: ParameterNames, rectified: Mapping[Node, int]) -> None:
        self.names = names
        self.rectified = rectified
        self.operations = Operations(names, rectified)
        self._shifts: list[str] = []
        self._constants = False
        self._reaching: dict[Node, int] = {}  # which calls reach a node, as a bit mask

    def provenance(self, edge: Edge) -> Provenance:
        """Walk back from a pre-activation to the first parametrised operations on every path."""
        for crossed in range(_CROSSINGS):
            self._shifts, self._constants = [], False
            sources, summands, raw, blocked = self._walk(edge, crossed)
            if sources or not blocked:
                lookups = sum(source.edge[0].name() == "EmbeddingBackward0" for source in all_sources(sources))
                constants = self._constants or 0 < lookups < len(sources)
                return Provenance(sources, tuple(sorted(summands)), raw, crossed, _distinct(self._shifts), constants)
        return Provenance([], (), False, 0)

    def feeding(self, edges: Iterable[Edge]) -> list[int]:
        """The rectifier calls whose outputs reach these edges without another rectifier in between, in order."""
        mask = 0
        for node, _ in edges:
            for behind in _children_first(node, self._reaching):
                self._reaching[behind] = self._bits(behind, self._reaching)
            mask |= self._reaching[node]
        return _calls_in(mask)

    def readers(self, nodes: Iterable[Node]) -> dict[int, tuple[str, ...]]:
        """The parameters that consume each rectifier call's output.

        Weights and scales of the operations that read it, up to and including the first weighted one on each path; a
        normalisation or a scale passes it on.

        Args:
            nodes: of the graph, the last ones of the forward among them.
        """
        found: dict[int, dict[str, None]] = {}
        open_calls: dict[Node, int] = {}  # which outputs reach a node that nothing weighted has consumed yet
        for last in nodes:
            for node in _children_first(last, open_calls):
                mask = self._bits(node, open_calls)
                own = [self.operations.marked.get((node, number)) for number in range(len(node._input_metadata))]
                for source in [*own, None if is_leaf(node) else self.operations.source((node, 0))]:
                    if source is not None and mask and node not in self.rectified:
                        for call in _calls_in(mask):
                            found.setdefault(call, {}).update(dict.fromkeys(source.weight))
                        mask = 0 if source.kind == "weight" else mask
                open_calls[node] = mask
        return {call: tuple(names) for call, names in found.items()}

    def _bits(self, node: Node, known: Mapping[Node, int]) -> int:
        if node in self.rectified:
            return 1 << self.rectified[node]
        mask = 0
        for child, _ in _children(node):
            mask |= known[child]
        return mask

    def _walk(self, start: Edge, cross: int) -> tuple[list[Source], set[int], bool, bool]:
        sources: list[Source] = []
        summands: set[int] = set()
        raw = blocked = False
        seen: set[Edge] = set()
        stack: list[tuple[Edge, int]] = [(start, cross)]
        while stack and len(seen) < WALK_LIMIT:
            edge, crossings = stack.pop()
            if edge in seen:
                continue
            seen.add(edge)
            node = edge[0]
            if node in self.rectified:
                if crossings == 0:
                    summands.add(self.rectified[node])
                    blocked = True
                    continue
                crossings -= 1
            if is_leaf(node):
                raw |= leaf_name(node, self.names) is None
                continue
            source = self.operations.source(edge)
            if source is not None and source.kind != "weight":
                kept = list(self._shifts), self._constants
                source.behind, more, more_raw = self._behind(source)
                if _is_a_table(source):
                    source, (self._shifts, self._constants) = None, kept
                elif source.kind in {"batch_norm", "norm"}:  # a normalisation takes up whatever is added before it
                    self._shifts, self._constants = kept
                if source is not None and source.kind == "elementwise" and not source.weight:
                    summands |= more
                    raw |= more_raw
                elif source is not None:
                    source.mixed = bool(more) or more_raw
            if source is not None:
                self._constants |= source.opaque or source.kind == "other"  # no column holds what these do
                sources.append(source)
                continue
            children = children_of(node)
            raw |= node.name() in {"AddBackward0", "SubBackward0"} and None in children
            self._note_shift(node, children)
            stack.extend((child, crossings) for child in reversed(children) if child is not None)
        return sources, summands, raw, blocked

    def _note_shift(self, node: Node, children: list[Edge | None]) -> None:
        name = node.name()
        if name == "NegBackward0":
            self._shifts.append(name)
        if name == "SelectBackward0" and children[0] is not None and children[0][0].name() == "ViewAsRealBackward0":
            self._shifts.append(f"part {node._saved_index}")  # type: ignore[attr-defined]
        if name in _SUMS and None in children:
            self._shifts.append(name)
            self._constants = True
        self._constants |= name in _SUMS and any(self.operations.plain_leaf(child) is not None for child in children)

    def _behind(self, source: Source) -> tuple[list[Source], set[int], bool]:
        sources: list[Source] = []
        summands: set[int] = set()
        raw = False
        for edge in source.inputs:
            more, more_summands, more_raw, _ = self._walk(edge, 0)
            sources += more
            summands |= more_summands
            raw |= more_raw
        return sources, summands, raw


def _distinct(shifts: list[str]) -> tuple[str, ...]:
    """Each kind of shift once, so that steps of an iteration that adds to what it starts from are one site."""
    odd = {name for name in shifts if name != "NegBackward0" or shifts.count(name) % 2}
    return tuple(sorted(odd))


def _is_a_table(source: Source) -> bool:
    """Whether an elementwise parameter is a table over more than units (an embedding of positions), or an ensemble's.

    Its axes are those of units where they are the rows of the weighted operation before it.
    """
    if source.kind != "elementwise" or len(source.row_axes) < 2:
        return False
    return not any(behind.row_axes == source.row_axes and behind.shape == source.shape for behind in source.behind)


def _children_first(node: Node, known: Mapping[Node, object]) -> Iterable[Node]:
    """The nodes behind one that are not known yet, itself included, each after what it reads."""
    stack: list[tuple[Node, bool]] = [(node, False)]
    entered: set[Node] = set()
    while stack:
        current, left = stack.pop()
        if left:
            yield current
        elif current not in known and current not in entered:
            entered.add(current)
            stack.append((current, True))
            stack += [(child, False) for child, _ in _children(current)]


def _children(node: Node) -> list[Edge]:
    return [] if is_leaf(node) else [child for child in children_of(node) if child is not None]


def _calls_in(mask: int) -> list[int]:
    calls = []
    while mask:
        lowest = mask & -mask
        calls.append(lowest.bit_length() - 1)
        mask ^= lowest
    return calls
