"""The autograd graph behind a pre-activation: which parameters compute it, and on which axis its units lie.

Nothing here runs a kernel of the model: the graph that a forward left behind is read, and small questions are put to
it with :func:`torch.autograd.grad`, at most through the few shape, elementwise and normalisation operations that lie
between a rectifier and the weighted operation before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks

Edge = tuple[Node, int]

_ACCUMULATE = "torch::autograd::AccumulateGrad"
_MATRIX_PRODUCTS = {"AddmmBackward0": (1, 2), "MmBackward0": (0, 1), "BmmBackward0": (0, 1), "BaddbmmBackward0": (1, 2)}
_MATRIX_VECTOR = {"MvBackward0": (0, 1), "AddmvBackward0": (1, 2)}
_CONVOLUTIONS = {"ConvolutionBackward0", "ConvolutionOverrideableBackward0", "MkldnnConvolutionBackward0"}
_LINEAR = {"LinearBackward0", "MkldnnLinearBackward0"}
_CHANNEL_NORMS = {
    "NativeBatchNormBackward0",
    "CudnnBatchNormBackward0",
    "MiopenBatchNormBackward0",
    "BatchNormBackward0",
}
_GROUP_NORMS = {"NativeGroupNormBackward0"}
_LAYER_NORMS = {"NativeLayerNormBackward0", "FusedRmsNormBackward0"}
_VIEWS = {
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
_ELEMENTWISE_WITH_PARAMETER = {"AddBackward0", "MulBackward0", "SubBackward0", "DivBackward0"}
_SUMS = {"AddBackward0", "SubBackward0", "RsubBackward1"}
_WALK_LIMIT = 200_000  # nodes; a graph this large behind one rectifier is a loop over time


@contextmanager
def graph_without_tensors() -> Iterator[None]:
    """Build autograd graphs that keep no activation alive: only shapes are saved, random values are handed out.

    Indices are kept as they are.

    Gradients read from such a graph tell where values flow (zero or not) and which way, not how much, wherever an
    operation scales by a saved tensor. Shape operations, sums and additive parameters need none and stay exact.
    """
    count = 0

    def pack(tensor: Tensor) -> Tensor | tuple[int, torch.Size, torch.dtype, torch.device]:
        nonlocal count
        count += 1
        if not tensor.dtype.is_floating_point and tensor.dtype != torch.bool and not tensor.is_complex():
            return tensor  # indices say which unit goes where
        return count, tensor.shape, tensor.dtype, tensor.device

    def unpack(saved: Tensor | tuple[int, torch.Size, torch.dtype, torch.device]) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        seed, shape, dtype, device = saved
        generator = torch.Generator(device).manual_seed(seed)  # the same values each time: questions are compared
        if dtype == torch.bool:
            return torch.rand(shape, device=device, generator=generator) < 0.5  # a mask lets both sides through
        parts = dtype.to_real() if dtype.is_complex else dtype
        values = torch.empty(shape, dtype=parts, device=device).uniform_(0.5, 1.5, generator=generator)
        return values.to(dtype)

    with saved_tensors_hooks(pack, unpack):
        yield


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
        inputs: edges of the data that it reads.
        behind: the sources that feed it, where it only rescales (norms, elementwise).
        mixed: what it scales holds something unweighted beside them: another site's output, an input.
    """

    kind: str
    edge: Edge
    row_axes: tuple[int, ...]
    weight: tuple[str, ...] = ()
    additive: tuple[str, ...] = ()
    weight_axis: int | None = 0
    transposed_groups: int = 0
    inputs: tuple[Edge, ...] = ()
    behind: list[Source] = field(default_factory=list)
    mixed: bool = False

    @property
    def shape(self) -> torch.Size:
        """Shape of the output."""
        return edge_shape(self.edge)


@dataclass(slots=True)
class Provenance:
    """What feeds one pre-activation, nearest first.

    Attributes:
        sources: parametrised operations; those behind a normalisation hang below it.
        summands: indices of earlier rectifier calls whose outputs are added in without a weight between.
        raw_summand: an input of the model is added in without a weight between.
        crossed: how many rectifiers lie between, where only another rectifier's output is read.
        shifts: operations on the way that negate or add something that no source accounts for; two pre-activations of
            one source that differ in them (``z`` and ``-z``) are two sites.
        constants: something is added or subtracted that is no unit's own parameter.
    """

    sources: list[Source]
    summands: tuple[int, ...]
    raw_summand: bool
    crossed: int
    shifts: tuple[str, ...] = ()
    constants: bool = False


def edge_shape(edge: Edge) -> torch.Size:
    """Shape of the tensor that an edge of the graph stands for."""
    return torch.Size(edge[0]._input_metadata[edge[1]].shape)


def all_sources(sources: list[Source]) -> Iterator[Source]:
    """The sources and everything behind them, nearest first."""
    for source in sources:
        yield source
        yield from all_sources(source.behind)


def _next(node: Node) -> list[Edge | None]:
    return [None if child is None else (child, nr) for child, nr in node.next_functions]


class GraphReader:
    """Reads provenance off the graph of one forward pass.

    Args:
        names: parameter identity to qualified name.
        rectified: graph nodes of the rectifier calls' outputs so far, to the index of the call.
    """

    def __init__(self, names: Mapping[int, str], rectified: Mapping[Node, int]) -> None:
        self.names = names
        self.rectified = rectified
        self._shifts: list[str] = []
        self._constants = False

    def provenance(self, edge: Edge) -> Provenance:
        """Walk back from a pre-activation to the first parametrised operations on every path."""
        for crossed in range(8):
            self._shifts, self._constants = [], False
            sources, summands, raw, blocked = self._walk(edge, crossed)
            if sources or not blocked:
                lookups = sum(source.edge[0].name() == "EmbeddingBackward0" for source in all_sources(sources))
                constants = self._constants or 0 < lookups < len(sources)
                return Provenance(
                    sources, tuple(sorted(summands)), raw, crossed, tuple(sorted(self._shifts)), constants
                )
        return Provenance([], (), False, 0)

    def feeding(self, edges: tuple[Edge, ...]) -> set[int]:
        """The rectifier calls whose outputs reach these edges without another rectifier in between."""
        found: set[int] = set()
        seen: set[Edge] = set()
        stack = list(edges)
        while stack and len(seen) < _WALK_LIMIT:
            edge = stack.pop()
            if edge in seen:
                continue
            seen.add(edge)
            if edge[0] in self.rectified:
                found.add(self.rectified[edge[0]])
                continue
            stack.extend(child for child in _next(edge[0]) if child is not None)
        return found

    def _walk(self, start: Edge, cross: int) -> tuple[list[Source], set[int], bool, bool]:
        sources: list[Source] = []
        summands: set[int] = set()
        raw = blocked = False
        seen: set[Edge] = set()
        stack: list[tuple[Edge, int]] = [(start, cross)]
        while stack and len(seen) < _WALK_LIMIT:
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
            if node.name() == _ACCUMULATE:
                raw |= id(node.variable) not in self.names  # type: ignore[attr-defined]
                continue
            source = self._source(edge)
            if source is not None:
                if source.kind != "weight":
                    kept = list(self._shifts), self._constants
                    source.behind, more, more_raw = self._behind(source)
                    if source.kind != "elementwise":  # a normalisation takes up whatever is added before it
                        self._shifts, self._constants = kept
                    if source.kind == "elementwise" and not source.weight:
                        summands |= more
                        raw |= more_raw
                    else:
                        source.mixed = bool(more) or more_raw
                sources.append(source)
                continue
            children = _next(node)
            raw |= node.name() in {"AddBackward0", "SubBackward0"} and None in children
            self._note_shift(node.name(), children)
            stack.extend((child, crossings) for child in reversed(children) if child is not None)
        return sources, summands, raw, blocked

    def _note_shift(self, name: str, children: list[Edge | None]) -> None:
        if name == "NegBackward0":
            self._shifts.append(name)
        if name in _SUMS and None in children:
            self._shifts.append(name)
            self._constants = True
        self._constants |= name in _SUMS and any(self._plain_leaf(child) is not None for child in children)

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

    def _source(self, edge: Edge) -> Source | None:
        node, name = edge[0], edge[0].name()
        children = _next(node)
        if name in _VIEWS and self._is_instance_norm(edge, children[0]):
            return self._instance_norm(edge, children[0])
        if name in _CONVOLUTIONS:
            transposed = bool(getattr(node, "_saved_transposed", False))
            return Source(
                "weight",
                edge,
                (1,),
                self._leaves(children[1]),
                self._leaves(children[2]),
                weight_axis=None if transposed else 0,
                inputs=_present(children[0]),
                transposed_groups=int(getattr(node, "_saved_groups", 1)) if transposed else 0,
            )
        if name in _LINEAR:
            last = len(edge_shape(edge)) - 1
            bias = children[2] if len(children) > 2 else None
            return Source(
                "weight", edge, (last,), self._leaves(children[1]), self._leaves(bias), inputs=_present(children[0])
            )
        if name in _MATRIX_PRODUCTS:
            return self._matrix_product(edge, children, *_MATRIX_PRODUCTS[name])
        if name in _MATRIX_VECTOR and self._is_parameter(children[_MATRIX_VECTOR[name][0]]):
            matrix, vector = (children[position] for position in _MATRIX_VECTOR[name])
            additive = self._leaves(children[0]) if name == "AddmvBackward0" else ()
            return Source("weight", edge, (0,), self._leaves(matrix), additive, inputs=_present(vector))
        if name == "EmbeddingBackward0":
            last = len(edge_shape(edge)) - 1
            return Source("weight", edge, (last,), self._leaves(children[0]), weight_axis=1)
        if name in _CHANNEL_NORMS or name in _GROUP_NORMS:
            kind = "batch_norm" if name in _CHANNEL_NORMS else "norm"
            return Source(
                kind, edge, (1,), self._leaves(children[1]), self._leaves(children[2]), inputs=_present(children[0])
            )
        if name in _LAYER_NORMS:
            dims = len(edge_shape(edge))
            normalized = len(getattr(node, "_saved_normalized_shape", (0,)))
            bias = children[2] if len(children) > 2 else None
            axes = tuple(range(dims - normalized, dims))
            return Source(
                "norm", edge, axes, self._leaves(children[1]), self._leaves(bias), inputs=_present(children[0])
            )
        if name in _ELEMENTWISE_WITH_PARAMETER:
            return self._elementwise(edge, children)
        return None

    def _is_instance_norm(self, edge: Edge, inner: Edge | None) -> bool:
        """Whether a view undoes the (1, inputs x channels, …) on which an instance norm runs a batch norm."""
        if inner is None or inner[0].name() not in _CHANNEL_NORMS:
            return False
        outer, folded = edge_shape(edge), edge_shape(inner)
        if len(outer) < 3 or folded != (1, outer[0] * outer[1], *outer[2:]):
            return False
        weight = _next(inner[0])[1]
        return outer[0] > 1 or (weight is not None and weight[0].name() == "RepeatBackward0")

    def _instance_norm(self, edge: Edge, inner: Edge | None) -> Source:
        assert inner is not None
        entry, weight, bias = _next(inner[0])[:3]
        while entry is not None and entry[0].name() in _VIEWS and len(edge_shape(entry)) == len(edge_shape(edge)):
            if edge_shape(entry) == edge_shape(edge):
                break
            entry = _next(entry[0])[0]
        return Source("norm", edge, (1,), self._leaves(weight), self._leaves(bias), inputs=_present(entry))

    def _matrix_product(self, edge: Edge, children: list[Edge | None], first: int, second: int) -> Source | None:
        left, right = children[first], children[second]
        batched = len(edge_shape(edge)) == 3
        additive = self._leaves(children[0]) if first == 1 else ()
        if right is not None and self._is_parameter(right) and not (left is not None and self._is_plain_leaf(left)):
            weight, data, rows = right, left, len(edge_shape(edge)) - 1
        elif left is not None and self._is_parameter(left):
            weight, data, rows = left, right, len(edge_shape(edge)) - 2
        else:
            return None
        axes = (0, rows) if batched and edge_shape(edge)[0] > 1 else (rows,)
        axis: int | None = None
        if not batched:
            axis = int(weight is right)
            hops = 0
            while weight[0].name() in {"TBackward0", "TransposeBackward0"} and hops < 4:
                following = _next(weight[0])[0]
                if following is None:
                    break
                weight, axis, hops = following, 1 - axis, hops + 1
        return Source("weight", edge, axes, self._leaves(weight), additive, weight_axis=axis, inputs=_present(data))

    def _elementwise(self, edge: Edge, children: list[Edge | None]) -> Source | None:
        shape = edge_shape(edge)
        for position, child in enumerate(children):
            parameter = self._plain_leaf(child)
            if parameter is None:
                continue
            own = edge_shape(child) if child is not None else torch.Size()
            axes = tuple(
                len(shape) - len(own) + axis
                for axis, size in enumerate(own)
                if size > 1 or size == shape[axis - len(own)] > 1
            )
            if len(axes) != 1 or own.numel() != parameter.numel():
                continue
            name = self.names[id(parameter)]
            others = tuple(other for index, other in enumerate(children) if index != position and other is not None)
            if edge[0].name() == "AddBackward0" and getattr(edge[0], "_saved_alpha", 1) == 1:
                return Source("elementwise", edge, axes, (), (name,), inputs=others)
            if edge[0].name() == "MulBackward0":
                return Source("elementwise", edge, axes, (name,), (), inputs=others)
            self._constants = True  # subtracted or divided by: the columns of a table hold neither
            return Source("other", edge, axes, (name,), (), inputs=others)
        return None

    def _leaves(self, edge: Edge | None) -> tuple[str, ...]:
        """Names of the parameters that a weight edge comes from, in order of discovery."""
        names: dict[str, None] = {}
        seen: set[Edge] = set()
        stack = [] if edge is None else [edge]
        while stack and len(seen) < _WALK_LIMIT:
            current = stack.pop()
            if current in seen:
                continue
            seen.add(current)
            if current[0].name() == _ACCUMULATE:
                name = self.names.get(id(current[0].variable))  # type: ignore[attr-defined]
                if name is not None:
                    names[name] = None
                continue
            stack.extend(child for child in reversed(_next(current[0])) if child is not None)
        return tuple(names)

    def _plain_leaf(self, edge: Edge | None) -> Tensor | None:
        """The parameter that an edge is, but for views; ``None`` where it is anything else."""
        for _ in range(8):
            if edge is None:
                return None
            if edge[0].name() == _ACCUMULATE:
                variable: Tensor = edge[0].variable  # type: ignore[attr-defined]
                return variable if id(variable) in self.names else None
            if edge[0].name() not in _VIEWS:
                return None
            edge = _next(edge[0])[0]
        return None

    def _is_plain_leaf(self, edge: Edge) -> bool:
        return self._plain_leaf(edge) is not None

    def _is_parameter(self, edge: Edge | None) -> bool:
        """Whether an operand is computed from parameters alone: no input, no weighted operation, no rectifier."""
        seen: set[Edge] = set()
        stack = [] if edge is None else [edge]
        found = False
        while stack:
            current = stack.pop()
            if current in seen:
                continue
            seen.add(current)
            node, name = current[0], current[0].name()
            if len(seen) > 64 or node in self.rectified or name == "EmbeddingBackward0":
                return False
            if name in _CONVOLUTIONS or name in _MATRIX_PRODUCTS or name in _LINEAR or name in _CHANNEL_NORMS:
                return False
            if name == _ACCUMULATE:
                if id(node.variable) not in self.names:  # type: ignore[attr-defined]
                    return False
                found = True
            stack.extend(child for child in _next(node) if child is not None)
        return found


def _present(edge: Edge | None) -> tuple[Edge, ...]:
    return () if edge is None else (edge,)
