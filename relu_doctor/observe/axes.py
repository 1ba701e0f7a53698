"""On which axes of a pre-activation its units lie, and which row of a parameter each unit is: asked of autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from relu_doctor.observe.graph import Edge, Source, edge_shape

_SAMPLED = 512  # values per row that are decoded first, which is enough where each row has one code


@dataclass(frozen=True, slots=True)
class UnitMap:
    """How the units of a pre-activation map to the rows of a source.

    Attributes:
        axes: the axes of the pre-activation on which its units lie.
        rows: int64 (codes,): the row that each index along those axes comes from; -1 where unknown.
        additive: the source's additive parameter reaches every value with slope 1.
        one_to_one: no value mixes several indices, so that indices of one row may be pooled as one unit.
    """

    axes: tuple[int, ...]
    rows: Tensor
    additive: bool
    one_to_one: bool


def locate(
    edge: Edge, source: Source, axes: tuple[int, ...] | None = None, *, among: Sequence[Source] = ()
) -> UnitMap | None:
    """Find the axes of ``edge``'s tensor whose index decides the row of ``source`` that a value comes from.

    Each value of the pre-activation is given a random gradient, multiplied by a code that depends on its index along
    the candidate axes only. Where the codes arrive at the source's output, each in a single row, the axes are right.

    Args:
        edge: the pre-activation.
        source: the parametrised operation to ask.
        axes: candidate to test; by default every axis, then every pair.
        among: all sources that feed ``edge`` directly. What reaches ``source`` through another of them (a layer that
            reads it, beside a skip connection that adds it) is left out.

    Returns:
        The smallest set of axes that decides the row, or ``None`` where no set does.
    """
    shape = edge_shape(edge)
    if axes is not None:
        candidates = [axes]
    else:
        wide = [axis for axis, size in enumerate(shape) if size > 1]
        rows = 1
        for axis in source.row_axes:
            rows *= source.shape[axis]
        candidates = [(axis,) for axis in wide]
        candidates.sort(key=lambda chosen: shape[chosen[0]] != rows)  # most likely first
        candidates += list(combinations(wide, 2)) + list(combinations(wide, 3))
        if rows == 1:
            narrow = [axis for axis, size in enumerate(shape) if size == 1]
            candidates = [(axis,) for axis in narrow if axis == source.row_axes[0]] or [(axis,) for axis in narrow[-1:]]
    probe = _Interrogation(edge, source, among)
    for candidate in candidates:
        unit_map = probe.ask(candidate)
        if unit_map is not None and (len(candidate) < 3 or len(unit_map.rows.unique()) == len(unit_map.rows)):
            return unit_map  # three axes that share rows are a shuffle of positions, which are no units
    for candidate in candidates:
        if len(candidate) == 1:
            unit_map = probe.ask_one_by_one(candidate[0])
            if unit_map is not None:
                return unit_map
    return None


def takes_turns(edge: Edge, sources: Sequence[Source], axes: tuple[int, ...]) -> bool:
    """Whether sources feed different places of a pre-activation: stacked or joined along another axis, not summed.

    Args:
        edge: the pre-activation.
        sources: operations that all map to the same units.
        axes: the axes of those units.
    """
    questions = [_Interrogation(edge, source, sources) for source in sources]
    shape = edge_shape(edge)
    for axis in (axis for axis, size in enumerate(shape) if size > 1 and axis not in axes):
        alone: set[int] = set()
        for index in (0, shape[axis] - 1):
            reached = [place for place, question in enumerate(questions) if question.is_reached_from(axis, index)]
            if len(reached) == 1:
                alone.add(reached[0])
        if len(alone) > 1:
            return True
    return False


def _nodes_between(start: Node, end: Node, stops: set[Node]) -> list[Node]:
    """The nodes on the ways from one to the other that lead through no stop, readers before what they read."""
    leads: dict[Node, bool] = {end: True}
    order: list[Node] = [end]
    stack: list[tuple[Node, bool]] = [(start, False)]
    while stack:
        node, left = stack.pop()
        children = [child for child, _ in node.next_functions if child is not None]
        if left:
            leads[node] = any(leads[child] for child in children)
            if leads[node]:
                order.append(node)
        elif node not in leads:
            leads[node] = False
            if node not in stops:
                stack.append((node, True))
                stack += [(child, False) for child in children if child not in leads]
    return order[::-1]


class _Interrogation:
    """Questions to the stretch of graph between a pre-activation and one source."""

    def __init__(self, edge: Edge, source: Source, among: Sequence[Source]) -> None:
        self.between = _nodes_between(edge[0], source.edge[0], {other.edge[0] for other in among})
        self.leading = set(self.between)
        metadata = edge[0]._input_metadata[edge[1]]
        self.shape, self.dtype, self.device = torch.Size(metadata.shape), metadata.dtype, metadata.device
        self.edge, self.source = GradientEdge(*edge), source
        self.target = GradientEdge(*source.edge)
        generator = torch.Generator(self.device).manual_seed(1)
        self.noise = torch.empty(self.shape, dtype=self.dtype, device=self.device).uniform_(
            0.5, 1.5, generator=generator
        )
        self.row_count = 1
        for axis in source.row_axes:
            self.row_count *= source.shape[axis]
        self.same = self.edge == self.target
        self.base = self._pull(self.noise)

    def is_reached_from(self, axis: int, index: int) -> bool:
        """Whether any value at one index of an axis comes from the source."""
        values = torch.zeros_like(self.noise)
        values.select(axis, index).copy_(self.noise.select(axis, index))
        return bool((self._pull(values) != 0).any())

    def _pull(self, values: Tensor) -> Tensor:
        """The gradient of sum(values * z) at the source's output, rows first: (rows, values)."""
        gradient: Tensor | None
        if self.same:
            gradient = values
        else:
            try:
                gradient = self._walk(values)
            except (TypeError, RuntimeError, NotImplementedError):  # a node that only the engine can run
                (gradient,) = torch.autograd.grad(
                    [self.edge], [self.target], grad_outputs=[values], retain_graph=True, allow_unused=True
                )
        if gradient is None:
            return torch.zeros(self.row_count, 0, device=self.device)
        gradient = gradient.float() if gradient.dtype in {torch.float16, torch.bfloat16} else gradient
        axes = self.source.row_axes
        return gradient.movedim(axes, tuple(range(len(axes)))).reshape(self.row_count, -1)

    @torch.no_grad()
    def _walk(self, values: Tensor) -> Tensor | None:
        """Backpropagate by hand, since the engine would also run the layers beside the way, the whole net of them."""
        arrived: dict[Edge, Tensor] = {(self.edge.node, self.edge.output_nr): values}
        for node in self.between:
            if node is self.source.edge[0]:
                continue
            incoming = [arrived.pop((node, number), None) for number in range(len(node._input_metadata))]
            if all(gradient is None for gradient in incoming):
                continue
            outgoing = node(*incoming)  # type: ignore[operator]  # nodes are callable, which the stubs do not say
            outgoing = outgoing if isinstance(outgoing, tuple) else (outgoing,)
            for (child, number), gradient in zip(node.next_functions, outgoing, strict=True):
                if child is not None and gradient is not None and child in self.leading:
                    metadata = child._input_metadata[number]
                    gradient = gradient.sum_to_size(tuple(metadata.shape)).to(metadata.dtype)
                    known = arrived.get((child, number))
                    arrived[child, number] = gradient if known is None else known + gradient
        return arrived.get(self.source.edge)

    def ask(self, axes: tuple[int, ...]) -> UnitMap | None:
        """The rows that each index along some axes comes from; ``None`` where the axes do not decide it."""
        if self.base.numel() == 0 or not bool((self.base != 0).any()):
            return None
        codes = math.prod(self.shape[axis] for axis in axes)
        columns = self.base.shape[1]
        if columns > 2 * _SAMPLED:  # where each row has one code, a part of its values tells it
            generator = torch.Generator(self.device).manual_seed(2)
            sample = torch.randint(columns, (_SAMPLED,), device=self.device, generator=generator)
            table = self._decode(axes, codes, sample)
            if table is None or int((table >= 0).sum()) == int((self.base != 0).any(1).sum()):
                return None if table is None else UnitMap(axes, table, self._slope_is_one(axes, table), True)
        table = self._decode(axes, codes, slice(None))
        return None if table is None else UnitMap(axes, table, self._slope_is_one(axes, table), True)

    def _decode(self, axes: tuple[int, ...], codes: int, columns: Tensor | slice) -> Tensor | None:
        """Read the codes that arrive in some columns of the rows; ``None`` where codes of one row or value mix."""
        index = self._index(axes)
        base = 16 if self.dtype in {torch.float16, torch.bfloat16} else 1024
        first = self.base[:, columns]
        reached = first != 0
        decoded = torch.zeros(first.shape, dtype=torch.int64, device=self.device)
        scale = 1
        while True:
            digit = (index // scale) % base
            coded = self._pull(self.noise * (digit + 1).to(self.dtype))[:, columns]
            ratio = coded / torch.where(reached, first, 1)
            value = ratio.round()
            if bool((((ratio - value).abs() > 0.2) | (value < 1) | (value > base))[reached].any()):
                return None
            decoded += (value.long() - 1).clamp_(min=0) * scale
            scale *= base
            if scale >= codes:
                break
        rows = torch.arange(self.row_count, device=self.device)[:, None].expand_as(decoded)
        found, their_rows = decoded[reached], rows[reached]
        if not len(found):
            return torch.full((codes,), -1, dtype=torch.int64, device=self.device)
        if int(found.max()) >= codes:
            return None
        table = torch.full((codes,), -1, dtype=torch.int64, device=self.device)
        table[found] = their_rows
        return None if bool((table[found] != their_rows).any()) else table

    def ask_one_by_one(self, axis: int) -> UnitMap | None:
        """For maps that mix (``cat([z, -z])``): each index alone must light exactly one row."""
        count = self.shape[axis]
        if count > 512:
            return None
        rows = []
        for position in range(count):
            values = torch.zeros_like(self.noise)
            values.select(axis, position).copy_(self.noise.select(axis, position))
            lit = (self._pull(values) != 0).any(1).nonzero()
            if len(lit) != 1:
                return None
            rows.append(int(lit))
        return UnitMap((axis,), torch.tensor(rows, device=self.device), False, False)

    def _index(self, axes: tuple[int, ...]) -> Tensor:
        index = torch.zeros((1,) * len(self.shape), dtype=torch.int64, device=self.device)
        for axis in axes:
            view = [1] * len(self.shape)
            view[axis] = self.shape[axis]
            index = index * self.shape[axis] + torch.arange(self.shape[axis], device=self.device).view(view)
        return index

    def _slope_is_one(self, axes: tuple[int, ...], table: Tensor) -> bool:
        """Whether a constant added to a row is added, unscaled, to every value of its units."""
        others = tuple(axis for axis in range(len(self.shape)) if axis not in axes)
        sums = (self.noise.double().sum(others) if others else self.noise.double()).reshape(-1)
        known = table >= 0  # a branch of a concatenation feeds some units only
        expected = torch.zeros(self.row_count, dtype=torch.float64, device=self.device)
        expected.index_add_(0, table[known], sums[known])
        found = self.base.double().sum(1)
        tolerance = 0.02 if self.dtype in {torch.float16, torch.bfloat16} else 1e-3
        return bool(((found - expected).abs() <= tolerance * expected.abs().clamp_min(1e-12)).all())
