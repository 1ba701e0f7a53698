"""Parameters whose gradient speaks for a site: every path from them to an output leads through its rectifier."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import Node

from relu_doctor.observe.graph.edges import children_of, is_leaf, leaf_name
from relu_doctor.observe.graph.names import ParameterNames
from relu_doctor.observe.graph.units import Term


@dataclass(frozen=True, slots=True)
class Speaker:
    """A parameter of which a row has no gradient where a unit was silent.

    Attributes:
        name: of the parameter, qualified.
        rows: int64 (units,): the row of each unit.
        additive: a bias or shift, one number a row; else a weight, of which a whole row has no gradient.
    """

    name: str
    rows: Tensor
    additive: bool


def candidates(terms: Sequence[Term]) -> Iterator[Speaker]:
    """The parameters of a site that may speak for it: those next to the rectifier, additive ones first."""
    near = [term for term in terms if term.nearest and bool((term.rows >= 0).all())]
    for term in near:
        if len(term.additive) == 1 and term.additive_part is None:
            yield Speaker(term.additive[0], term.rows, True)
    for term in near:
        whole = len(term.weight) == 1 and term.weight_part is None and not term.computed
        if term.kind == "weight" and whole and term.weight_axis == 0 and not term.transposed_groups:
            yield Speaker(term.weight[0], term.rows, False)


def passing(
    results: Iterable[Node], rectified: Mapping[Node, int], owned: Mapping[int, Iterable[str]], names: ParameterNames
) -> set[str]:
    """Which of some parameters reach the outputs of a forward only through rectifiers of their own.

    Args:
        results: nodes of the graph that the forward left; those that nothing reads are its outputs.
        rectified: nodes of the rectifier calls' outputs, to the index of the call.
        owned: per call, the parameters that it may hold back.
        names: of the parameters.
    """
    bits = {name: 1 << place for place, name in enumerate(dict.fromkeys(n for own in owned.values() for n in own))}
    masks = {call: sum({bits[name] for name in own}) for call, own in owned.items()}
    reaching: dict[Node, int] = {}  # which of the parameters reach a node freely
    read: set[Node] = set()
    for result in results:
        stack: list[tuple[Node, bool]] = [(result, False)]
        while stack:
            node, left = stack.pop()
            if node in reaching:
                continue
            children = [] if is_leaf(node) else [child[0] for child in children_of(node) if child is not None]
            if not left:
                stack.append((node, True))
                stack += [(child, False) for child in children if child not in reaching]
                continue
            name = leaf_name(node, names) if is_leaf(node) else None
            mask = 0 if name is None else bits.get(name, 0)
            for child in children:
                mask |= reaching[child]
            read.update(children)
            reaching[node] = mask & ~masks.get(rectified.get(node, -1), 0)
    free = 0
    for node in reaching.keys() - read:
        free |= reaching[node]
    return {name for name, bit in bits.items() if not free & bit}
