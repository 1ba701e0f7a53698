"""Operations with parameters, as nodes of the autograd graph: their weights, their data, and the axes of their rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import Node

from relu_doctor.observe.graph.edges import VIEWS, WALK_LIMIT, Edge, children_of, edge_shape, is_leaf, leaf_name, turns
from relu_doctor.observe.graph.repeats import members_of

if TYPE_CHECKING:
    from relu_doctor.observe.graph.names import ParameterNames

_MATRIX_PRODUCTS = {
    "AddmmBackward0": (1, 2),
    "MmBackward0": (0, 1),
    "BmmBackward0": (0, 1),
    "BaddbmmBackward0": (1, 2),
    "SparseAddmmBackward0": (1, 2),
}
_MATRIX_VECTOR = {"MvBackward0": (0, 1), "AddmvBackward0": (1, 2)}
_CONVOLUTIONS = {
    "ConvolutionBackward0",
    "ConvolutionBackward1",
    "ConvolutionOverrideableBackward0",
    "MkldnnConvolutionBackward0",
}
_LINEAR = {"LinearBackward0", "MkldnnLinearBackward0"}
_CHANNEL_NORMS = {
    "NativeBatchNormBackward0",
    "CudnnBatchNormBackward0",
    "MiopenBatchNormBackward0",
    "BatchNormBackward0",
    "NativeBatchNormLegitBackward0",
    "NativeBatchNormLegitNoTrainingBackward0",
}
_GROUP_NORMS = {"NativeGroupNormBackward0"}
_LAYER_NORMS = {"NativeLayerNormBackward0", "FusedRmsNormBackward0"}
_LOOKUPS = {"EmbeddingBackward0", "EmbeddingBagBackward0"}
_ELEMENTWISE = {"AddBackward0", "MulBackward0", "SubBackward0", "DivBackward0"}
_CHOICES = {"IndexBackward0", "IndexSelectBackward0", "GatherBackward0", "TakeBackward0"}
_OTHERS = {"TrilinearBackward0", "GroupedMmBackward0"}
_BEFORE = 64  # nodes that it may take to compute a weight
_WEIGHTED = _CONVOLUTIONS | _LINEAR | _CHANNEL_NORMS | _LOOKUPS | _MATRIX_PRODUCTS.keys() | _OTHERS


@dataclass(eq=False, slots=True)
class Source:
    """An operation with parameters on the way from a pre-activation back to its inputs.

    Attributes:
        kind: ``weight`` (matrix product, convolution, embedding), ``batch_norm``, ``norm``, ``elementwise`` (added or
            multiplied) or ``other`` (subtracted, divided by).
        edge: its output in the graph.
        row_axes: axes of that output along which its parameters' rows lie.
        weight, additive: qualified names of the scaling and of the additive parameters.
        weight_axis: axis of the weight parameter that counts rows; ``None`` where it is not a plain axis.
        operand: the edge of the weight, or of the elementwise parameter, and its axes that count rows.
        bias: the edge of what is added to a product.
        transposed_groups: groups of a transposed convolution, whose rows lie on axis 1; else 0.
        inputs: edges of the data that it reads.
        behind: the sources that feed it, where it only rescales (norms, elementwise).
        mixed: what it scales holds something unweighted beside them: another site's output, an input.
        opaque: its output is no weighted sum of its inputs: a recurrent layer, a bilinear one.
        by_data: the data choose which part of its weight is used for which input.
        members: int64: which member's matrix each index of the first row axis multiplies with, where they repeat.
    """

    kind: str
    edge: Edge
    row_axes: tuple[int, ...]
    weight: tuple[str, ...] = ()
    additive: tuple[str, ...] = ()
    weight_axis: int | None = 0
    operand: tuple[Edge, tuple[int, ...]] | None = None
    bias: Edge | None = None
    transposed_groups: int = 0
    inputs: tuple[Edge, ...] = ()
    behind: list[Source] = field(default_factory=list)
    mixed: bool = False
    opaque: bool = False
    by_data: bool = False
    members: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the output."""
        return edge_shape(self.edge)

    @property
    def num_rows(self) -> int:
        """Rows of its parameters, over all axes that count them."""
        first, *rest = (self.shape[axis] for axis in self.row_axes)
        return math.prod(rest) * (first if self.members is None else int(self.members.max()) + 1)


def all_sources(sources: list[Source]) -> Iterator[Source]:
    """The sources and everything behind them, nearest first."""
    for source in sources:
        yield source
        yield from all_sources(source.behind)


class Operations:
    """Tells the operations with parameters from the other nodes of a graph.

    Args:
        names: of the parameters.
        rectified: graph nodes of the rectifier calls' outputs so far, to the index of the call.

    Attributes:
        marked: outputs of calls that make many nodes, and are one operation (a recurrent layer).
        computed: weights that parametrizations compute, in whatever way.
    """

    def __init__(self, names: ParameterNames, rectified: Mapping[Node, int]) -> None:
        self.names = names
        self.rectified = rectified
        self.marked: dict[Edge, Source] = {}
        self.computed: set[Edge] = set()

    def mark(
        self, outputs: list[Edge], inputs: tuple[Edge, ...], weights: tuple[str, ...], biases: tuple[str, ...]
    ) -> None:
        """Let the outputs of a recurrent layer stand for its weights; its units lie on their last axis."""
        for edge in outputs:
            last = len(edge_shape(edge)) - 1
            source = Source("weight", edge, (last,), weights, biases, weight_axis=None, inputs=inputs)
            source.opaque = True
            self.marked[edge] = source

    def source(self, edge: Edge) -> Source | None:
        """The operation whose output an edge is, where it has parameters."""
        if edge in self.marked:
            return self.marked[edge]
        node, name = edge[0], edge[0].name()
        children = children_of(node)
        last = len(edge_shape(edge)) - 1
        if name in VIEWS:
            return self._instance_norm(edge, children[0]) if self._is_instance_norm(edge, children[0]) else None
        if name in _CONVOLUTIONS:
            return self._convolution(edge, children)
        if name in _LINEAR:
            bias = children[2] if len(children) > 2 else None
            return self._weighted(edge, (last,), children[1], (0,), bias, children[0])
        if name in _MATRIX_PRODUCTS:
            return self._matrix_product(edge, children, *_MATRIX_PRODUCTS[name])
        if name in _MATRIX_VECTOR and self.is_parameter(children[_MATRIX_VECTOR[name][0]]):
            matrix, vector = (children[position] for position in _MATRIX_VECTOR[name])
            return self._weighted(edge, (0,), matrix, (0,), children[0] if name == "AddmvBackward0" else None, vector)
        if name in _LOOKUPS:
            return self._weighted(edge, (last,), children[0], (1,), None, None)
        if name == "TrilinearBackward0" and self.is_parameter(children[1]):
            source = self._weighted(edge, (last,), children[1], (0,), None, children[0], children[2])
            source.opaque = True
            return source
        if name == "GroupedMmBackward0" and self.is_parameter(children[1]):
            source = self._weighted(edge, (last,), children[1], (2,), None, children[0])
            source.by_data = True  # which rows are which expert's
            return source
        if name in _CHANNEL_NORMS or name in _GROUP_NORMS:
            kind = "batch_norm" if name in _CHANNEL_NORMS else "norm"
            return self._norm(kind, edge, (1,), children)
        if name in _LAYER_NORMS:
            normalized = len(getattr(node, "_saved_normalized_shape", (0,)))
            return self._norm("norm", edge, tuple(range(last + 1 - normalized, last + 1)), children)
        if name in _ELEMENTWISE:
            return self._elementwise(edge, children)
        return None

    def _weighted(
        self,
        edge: Edge,
        row_axes: tuple[int, ...],
        weight: Edge | None,
        weight_axes: tuple[int, ...],
        bias: Edge | None,
        *data: Edge | None,
    ) -> Source:
        axis = self._plain_axis(weight, weight_axes)
        operand = None if weight is None else (weight, weight_axes)
        inputs = tuple(entry for entry in data if entry is not None)
        return Source(
            "weight", edge, row_axes, self.leaves(weight), self.leaves(bias), axis, operand, bias, inputs=inputs
        )

    def _plain_axis(self, weight: Edge | None, axes: tuple[int, ...]) -> int | None:
        """The axis of the parameter itself on which an operand's rows lie, where only transpositions lie between."""
        if len(axes) != 1:
            return None
        axis = axes[0]
        while weight is not None and (turns(weight) or weight[0].name() == "ToCopyBackward0"):
            if len(edge_shape(weight)) == 2 and turns(weight):
                axis = 1 - axis
            weight = children_of(weight[0])[0]
        return axis

    def _convolution(self, edge: Edge, children: list[Edge | None]) -> Source:
        transposed = bool(getattr(edge[0], "_saved_transposed", False))
        source = self._weighted(edge, (1,), children[1], (0,), children[2], children[0])
        source.by_data = self._is_made_of_data(children[1])
        if transposed:
            source.weight_axis, source.operand = None, None
            source.transposed_groups = int(getattr(edge[0], "_saved_groups", 1))
        return source

    def _norm(self, kind: str, edge: Edge, row_axes: tuple[int, ...], children: list[Edge | None]) -> Source:
        bias = children[2] if len(children) > 2 else None
        return Source(kind, edge, row_axes, self.leaves(children[1]), self.leaves(bias), inputs=_present(children[0]))

    def _is_instance_norm(self, edge: Edge, inner: Edge | None) -> bool:
        """Whether a view undoes the (1, inputs x channels, …) on which an instance norm runs a batch norm."""
        if inner is None or inner[0].name() not in _CHANNEL_NORMS:
            return False
        outer, folded = edge_shape(edge), edge_shape(inner)
        if len(outer) < 3 or folded != (1, outer[0] * outer[1], *outer[2:]):
            return False
        weight = children_of(inner[0])[1]
        return outer[0] > 1 or (weight is not None and weight[0].name() == "RepeatBackward0")

    def _instance_norm(self, edge: Edge, inner: Edge | None) -> Source:
        assert inner is not None
        entry, weight, bias = children_of(inner[0])[:3]
        while entry is not None and entry[0].name() in VIEWS and len(edge_shape(entry)) == len(edge_shape(edge)):
            if edge_shape(entry) == edge_shape(edge):
                break
            entry = children_of(entry[0])[0]
        return Source("norm", edge, (1,), self.leaves(weight), self.leaves(bias), inputs=_present(entry))

    def _matrix_product(self, edge: Edge, children: list[Edge | None], first: int, second: int) -> Source | None:
        left, right = children[first], children[second]
        dims = len(edge_shape(edge))
        if right is not None and self.is_parameter(right) and self.plain_leaf(left) is None:
            weight, data, rows = right, left, dims - 1
        elif left is not None and self.is_parameter(left):
            weight, data, rows = left, right, dims - 2
        else:
            return None
        axes = (0, rows) if dims == 3 and edge_shape(edge)[0] > 1 else (rows,)
        source = self._weighted(edge, axes, weight, axes, children[0] if first == 1 else None, data)
        if dims == 3:
            source.weight_axis = None
            repeated = members_of(weight) if len(axes) > 1 else None
            if repeated is not None:
                source.members, inner = repeated
                last = len(edge_shape(inner)) - (dims - rows)
                source.operand = inner, (*range(len(edge_shape(inner)) - 2), last)
            source.by_data = any(behind[0].name() in _CHOICES for behind in self._before(weight) or ())
        return source

    def _elementwise(self, edge: Edge, children: list[Edge | None]) -> Source | None:
        shape, name = edge_shape(edge), edge[0].name()
        for position, child in enumerate(children):
            leaf = self.plain_leaf(child)
            named = None if leaf is None else leaf_name(leaf[0], self.names)
            if child is None or leaf is None or named is None:
                continue
            own = edge_shape(child)
            wide = tuple(axis for axis, size in enumerate(own) if size > 1)
            axes = tuple(len(shape) - len(own) + axis for axis in wide)
            if not axes or own.numel() != edge_shape(leaf).numel():
                continue
            names = (named,)
            others = tuple(other for index, other in enumerate(children) if index != position and other is not None)
            operand = (child, wide)
            if name == "AddBackward0" and getattr(edge[0], "_saved_alpha", 1) == 1:
                return Source("elementwise", edge, axes, (), names, operand=operand, inputs=others)
            if name == "MulBackward0":
                return Source("elementwise", edge, axes, names, (), operand=operand, inputs=others)
            return Source("other", edge, axes, names, (), inputs=others) if len(axes) == 1 else None
        return None

    def leaves(self, edge: Edge | None) -> tuple[str, ...]:
        """Names of the parameters that a weight edge comes from, in order of discovery."""
        names: dict[str, None] = {}
        seen: set[Edge] = set()
        stack = [] if edge is None else [edge]
        while stack and len(seen) < WALK_LIMIT:
            current = stack.pop()
            if current in seen:
                continue
            seen.add(current)
            if is_leaf(current[0]):
                name = leaf_name(current[0], self.names)
                if name is not None:
                    names[name] = None
                continue
            stack.extend(child for child in reversed(children_of(current[0])) if child is not None)
        return tuple(names)

    def plain_leaf(self, edge: Edge | None) -> Edge | None:
        """The parameter that an edge is, but for views; ``None`` where it is anything else."""
        for _ in range(8):
            if edge is None:
                return None
            if is_leaf(edge[0]):
                return edge if leaf_name(edge[0], self.names) is not None else None
            if edge[0].name() not in VIEWS:
                return None
            edge = children_of(edge[0])[0]
        return None

    def is_parameter(self, edge: Edge | None) -> bool:
        """Whether an operand is computed from parameters alone: no input, no layer that reads any, no rectifier."""
        behind = self._before(edge)
        if behind is None:
            return False
        given = [each for each in behind if is_leaf(each[0]) or each in self.computed]
        if any(node in self.rectified or reads_data(node) for node, _ in behind if (node, _) not in self.computed):
            return False
        return bool(given) and all(
            each in self.computed or leaf_name(each[0], self.names) is not None for each in given
        )

    def _is_made_of_data(self, edge: Edge | None) -> bool:
        """Whether a weight is computed from what the model reads, so that each input has weights of its own."""
        behind = self._before(edge) or ()
        return any(node in self.rectified or reads_data(node) for node, _ in behind)

    def _before(self, edge: Edge | None) -> list[Edge] | None:
        """The edges behind one, itself included; ``None`` where they are more than it takes to compute a weight."""
        found: dict[Edge, None] = {}
        stack = [] if edge is None else [edge]
        while stack:
            current = stack.pop()
            if current not in found:
                found[current] = None
                if len(found) > _BEFORE:
                    return None
                if not is_leaf(current[0]) and current not in self.computed:
                    stack.extend(child for child in children_of(current[0]) if child is not None)
        return list(found)


def reads_data(node: Node) -> bool:
    """Whether a node is a weighted operation, other than the product of two operands that have parameters both."""
    name = node.name()
    return name in _WEIGHTED and not (name in _MATRIX_PRODUCTS and None not in children_of(node))


def _present(edge: Edge | None) -> tuple[Edge, ...]:
    return () if edge is None else (edge,)
