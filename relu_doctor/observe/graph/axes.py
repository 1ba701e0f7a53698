"""On which axes of a pre-activation its units lie, and which row of a parameter each unit is: asked of autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from relu_doctor.observe.graph.edges import Edge, children_of, is_leaf
from relu_doctor.observe.graph.operations import Source
from relu_doctor.observe.graph.pulling import CHOICES, backward_of
from relu_doctor.observe.graph.repeats import joined

_SAMPLED = 128  # values per row that are decoded first, which is enough where each row has one code
_PARTS = 512  # pieces that an axis is cut into at most, to tell codes apart that share a row


@dataclass(frozen=True, slots=True)
class UnitMap:
    """How the units of a pre-activation map to the rows of a source.

    Attributes:
        axes: the axes of the pre-activation on which its units lie.
        rows: int64 (codes,): the row that each index along those axes comes from; -1 where unknown.
        additive: the source's additive parameter reaches every value with slope 1.
        one_to_one: no value mixes several indices, so that indices of one row may be pooled as one unit.
        gathered: several rows come together in one unit, as the pieces of a maxout do.
    """

    axes: tuple[int, ...]
    rows: Tensor
    additive: bool
    one_to_one: bool
    gathered: bool = False


class Stretch:
    """The stretch of graph between a pre-activation and the sources that feed it directly.

    Each value of the pre-activation is given a random gradient, multiplied by a code that depends on its index along
    candidate axes only. Where the codes arrive at a source's output, each in a single row, the axes are right.
    All sources are asked at once. What reaches one of them through another (a layer that reads it, beside a skip
    connection that adds it) is left out.

    Args:
        edge: the pre-activation.
        sources: the parametrised operations to ask.
        slopes: whether it matters with what slope additive parameters arrive.
    """

    def __init__(self, edge: Edge, sources: Sequence[Source], *, slopes: bool = True) -> None:
        self.edge = edge
        self.slopes = slopes
        self.targets = {source.edge for source in sources}
        self.between = _nodes_between(edge[0], {target[0] for target in self.targets})
        self.leading = set(self.between)
        self.chooses = any(node.name() in CHOICES for node in self.between)
        metadata = edge[0]._input_metadata[edge[1]]
        self.shape, self.dtype, self.device = torch.Size(metadata.shape), metadata.dtype, metadata.device
        generator = torch.Generator(self.device).manual_seed(1)
        self.noise = torch.empty(self.shape, dtype=self.dtype, device=self.device).uniform_(
            0.5, 1.5, generator=generator
        )
        self.direct = False  # leave out what every unit has a part in: means and norms that are multiplied in
        self._pulled: dict[tuple[bool, tuple[int, ...], int], dict[Edge, Tensor]] = {}
        self._firsts: dict[tuple[bool, Edge], tuple[Tensor, int]] = {}
        self._sums: dict[tuple[int, ...], Tensor] = {}
        self._samples: dict[int, Tensor] = {}

    def locate(self, source: Source, axes: tuple[int, ...] | None = None) -> UnitMap | None:
        """Find the axes whose index decides the row of a source that a value comes from.

        Args:
            source: one of the stretch's sources.
            axes: candidate to test; by default every axis, then every two, then every three.

        Returns:
            The smallest set of axes that decides the row, or ``None`` where no set does.
        """
        if not source.row_axes or source.by_data:
            return None
        candidates = [axes] if axes is not None else self._candidates(source)
        for self.direct in (False, True):
            for ask in (self._ask, self._ask_in_parts, self._ask_gathered):
                for candidate in candidates:
                    found = ask(source, candidate)
                    if found is not None:
                        return found
        return None

    def turns(self, sources: Sequence[Source], axes: tuple[int, ...]) -> int | None:
        """The axis along which sources take turns: stacked or joined along it, not summed; ``None`` where they do not.

        Args:
            sources: operations that all map to the same units.
            axes: the axes of those units.
        """
        for axis in (axis for axis, size in enumerate(self.shape) if size > 1 and axis not in axes):
            alone: set[int] = set()
            for index in (0, self.shape[axis] - 1):
                values = torch.zeros_like(self.noise)
                values.select(axis, index).copy_(self.noise.select(axis, index))
                pulled = self._pull(values)
                reached = [
                    place
                    for place, source in enumerate(sources)
                    if source.edge in pulled and bool((pulled[source.edge] != 0).any())
                ]
                if len(reached) == 1:
                    alone.add(reached[0])
            if len(alone) > 1:
                return axis
        return None

    def _candidates(self, source: Source) -> list[tuple[int, ...]]:
        wide = [axis for axis, size in enumerate(self.shape) if size > 1]
        rows = source.num_rows
        if rows == 1:
            narrow = [axis for axis, size in enumerate(self.shape) if size == 1]
            return [(axis,) for axis in narrow if axis == source.row_axes[0]] or [tuple(narrow[-1:])]
        candidates: list[tuple[int, ...]] = [(axis,) for axis in wide]
        candidates.sort(key=lambda chosen: self.shape[chosen[0]] != rows)  # most likely first
        if self.chooses:  # the data decide where a value comes from: two axes together would only tell which input
            return candidates
        return candidates + list(combinations(wide, 2)) + list(combinations(wide, 3))

    def _pull(self, values: Tensor) -> dict[Edge, Tensor]:
        """The gradient of sum(values * z) at the output of each source that it reaches."""
        if self.edge in self.targets:
            return {self.edge: values}
        try:
            return self._walk(values)
        except (TypeError, RuntimeError, NotImplementedError):  # a node that only the engine can run
            targets = list(self.targets)
            gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
                [GradientEdge(*self.edge)],
                [GradientEdge(*target) for target in targets],
                grad_outputs=[values],
                retain_graph=True,
                allow_unused=True,
            )
            pairs = zip(targets, gradients, strict=True)
            return {target: gradient for target, gradient in pairs if gradient is not None}

    @torch.no_grad()
    def _walk(self, values: Tensor) -> dict[Edge, Tensor]:
        """Backpropagate by hand, since the engine would also run the layers beside the way, the whole net of them."""
        arrived: dict[Edge, Tensor] = {self.edge: values}
        for node in self.between:
            incoming = [
                None if (node, number) in self.targets else arrived.pop((node, number), None)
                for number in range(len(node._input_metadata))
            ]
            if all(gradient is None for gradient in incoming):
                continue
            for child, gradient in backward_of(node, incoming, direct=self.direct):
                if child[0] in self.leading:
                    metadata = child[0]._input_metadata[child[1]]
                    if self.direct and torch.Size(metadata.shape).numel() < gradient.numel():
                        continue  # it is broadcast: every unit has a part in it
                    gradient = gradient.sum_to_size(tuple(metadata.shape)).to(metadata.dtype)
                    known = arrived.get(child)
                    arrived[child] = gradient if known is None else known + gradient
        return {target: arrived[target] for target in self.targets if target in arrived}

    def _coded(self, axes: tuple[int, ...], scale: int, base: int) -> dict[Edge, Tensor]:
        """What arrives of values times a digit of their code; remembered, since every source is asked the same."""
        key = (self.direct, axes, scale)
        if key not in self._pulled:
            if len(self._pulled) > 4:
                self._pulled = {kept: pulled for kept, pulled in self._pulled.items() if not kept[1]}
            values = self.noise
            if scale:
                values = values * ((self._index(axes) // scale) % base + 1).to(self.dtype)
            self._pulled[key] = self._pull(values)
        return self._pulled[key]

    def _rows_first(self, source: Source, pulled: dict[Edge, Tensor]) -> Tensor:
        """What arrived at a source as (rows, values)."""
        gradient, count = pulled.get(source.edge), source.num_rows
        if gradient is None:
            return torch.zeros(count, 0, device=self.device)
        gradient = gradient.float() if gradient.dtype in {torch.float16, torch.bfloat16} else gradient
        gradient = _magnitudes(gradient) if gradient.is_complex() else gradient
        by_row = gradient.movedim(source.row_axes, tuple(range(len(source.row_axes))))
        if source.members is not None:
            by_row = joined(by_row, source.members).movedim(1, -1)
        return by_row.reshape(count, -1)

    def _sample(self, columns: int) -> Tensor:
        """Some of the columns, the same each time."""
        if columns not in self._samples:
            generator = torch.Generator(self.device).manual_seed(2)
            self._samples[columns] = torch.randint(columns, (_SAMPLED,), device=self.device, generator=generator)
        return self._samples[columns]

    def _first(self, source: Source) -> tuple[Tensor, int]:
        """What arrives at a source without codes, as (rows, values), and how many rows anything arrives at."""
        key = (self.direct, source.edge)
        if key not in self._firsts:
            first = self._rows_first(source, self._coded((), 0, 1))
            self._firsts[key] = first, int((first != 0).any(1).sum())
        return self._firsts[key]

    def _ask(self, source: Source, axes: tuple[int, ...]) -> UnitMap | None:
        """The rows that each index along some axes comes from; ``None`` where the axes do not decide it."""
        first, num_reached = self._first(source)
        if not num_reached:
            return None
        codes = math.prod(self.shape[axis] for axis in axes)
        if first.shape[1] > 2 * _SAMPLED:  # where each row has one code, a part of its values tells it
            sample = self._sample(first.shape[1])
            decoded = self._decode(source, axes, codes, sample)
            table = None if decoded is None else _rows_of_codes(decoded, codes)
            if table is None or int((table >= 0).sum()) == num_reached:
                return None if table is None else UnitMap(axes, table, self._slope_is_one(source, axes, table), True)
        decoded = self._decode(source, axes, codes, slice(None))
        table = None if decoded is None else _rows_of_codes(decoded, codes)
        return None if table is None else UnitMap(axes, table, self._slope_is_one(source, axes, table), True)

    def _decode(self, source: Source, axes: tuple[int, ...], codes: int, columns: Tensor | slice) -> Tensor | None:
        """The code of each value that arrived in some columns of the rows, -1 for none; ``None`` where codes mixed."""
        base = 16 if self.dtype in {torch.float16, torch.bfloat16} else 1024
        first = self._first(source)[0][:, columns]
        reached = first != 0
        decoded = torch.zeros(first.shape, dtype=torch.int64, device=self.device)
        scale = 1
        while True:
            coded = self._rows_first(source, self._coded(axes, scale, base))[:, columns]
            ratio = coded / torch.where(reached, first, 1)
            value = ratio.round()
            if bool((((ratio - value).abs() > 0.2) | (value < 1) | (value > base))[reached].any()):
                return None
            decoded += (value.long() - 1).clamp_(min=0) * scale
            scale *= base
            if scale >= codes:
                return torch.where(reached, decoded, -1)

    def _ask_in_parts(self, source: Source, axes: tuple[int, ...]) -> UnitMap | None:
        """For maps that send several indices to one row (``cat([z, -z])``): pieces of the axis are asked by themselves.

        Each index alone must light exactly one row.
        """
        if len(axes) != 1:
            return None
        count = self.shape[axes[0]]
        table = torch.full((count,), -1, dtype=torch.int64, device=self.device)
        index = self._index(axes)
        pieces, asked = [(0, count)], 0
        while pieces:
            start, stop = pieces.pop()
            asked += 1
            if asked > 2 * _PARTS:
                return None
            inside = self.noise * ((index >= start) & (index < stop)).to(self.dtype)
            found = self._rows_of_piece(source, inside, index, start, stop)
            if found is not None:
                table[start:stop] = found
            elif stop - start == 1:
                return None
            else:
                middle = (start + stop) // 2
                pieces += [(start, middle), (middle, stop)]
        return UnitMap(axes, table, False, False) if bool((table >= 0).all()) else None

    def _rows_of_piece(self, source: Source, inside: Tensor, index: Tensor, start: int, stop: int) -> Tensor | None:
        """The row of each index of a piece of an axis; ``None`` where they are not told apart."""
        base = 16 if self.dtype in {torch.float16, torch.bfloat16} else 1024
        first = self._rows_first(source, self._pull(inside))
        reached = first != 0
        decoded, scale = torch.zeros(first.shape, dtype=torch.int64, device=self.device), 1
        while True:
            digit = ((index - start).clamp(0) // scale) % base
            coded = self._rows_first(source, self._pull(inside * (digit + 1).to(self.dtype)))
            ratio = coded / torch.where(reached, first, 1)
            value = ratio.round()
            if bool((((ratio - value).abs() > 0.2) | (value < 1) | (value > base))[reached].any()):
                return None
            decoded += (value.long() - 1).clamp_(min=0) * scale
            scale *= base
            if scale >= stop - start:
                break
        table = _rows_of_codes(torch.where(reached, decoded, -1), stop - start)
        return table if table is not None and bool((table >= 0).all()) else None

    def _ask_gathered(self, source: Source, axes: tuple[int, ...]) -> UnitMap | None:
        """For maps that send several rows to one index (maxout): every row must have one code."""
        if len(axes) != 1:
            return None
        codes = self.shape[axes[0]]
        decoded = self._decode(source, axes, codes, slice(None))
        if decoded is None or not decoded.numel():
            return None
        highest = decoded.amax(1)
        if bool(((decoded != highest[:, None]) & (decoded >= 0)).any()) or len(highest.unique()) != codes:
            return None
        return UnitMap(axes, torch.full((codes,), -1, dtype=torch.int64, device=self.device), False, True, True)

    def _index(self, axes: tuple[int, ...]) -> Tensor:
        index = torch.zeros((1,) * len(self.shape), dtype=torch.int64, device=self.device)
        for axis in axes:
            view = [1] * len(self.shape)
            view[axis] = self.shape[axis]
            index = index * self.shape[axis] + torch.arange(self.shape[axis], device=self.device).view(view)
        return index

    def _slope_is_one(self, source: Source, axes: tuple[int, ...], table: Tensor) -> bool:
        """Whether a constant added to a row is added, unscaled, to every value of its units."""
        if self.direct or not self.slopes:
            return False
        if axes not in self._sums:
            others = tuple(axis for axis in range(len(self.shape)) if axis not in axes)
            noise = self.noise.double()
            self._sums[axes] = (noise.sum(others) if others else noise).reshape(-1)
        sums = self._sums[axes]
        known = table >= 0  # a branch of a concatenation feeds some units only
        expected = torch.zeros(source.num_rows, dtype=torch.float64, device=self.device)
        expected.index_add_(0, table[known], sums[known])
        found = self._first(source)[0].sum(1, dtype=torch.float64)
        tolerance = 0.02 if self.dtype in {torch.float16, torch.bfloat16} else 1e-3
        return bool(((found - expected).abs() <= tolerance * expected.abs().clamp_min(1e-12)).all())


def _magnitudes(gradient: Tensor) -> Tensor:
    """What arrived at a complex output: one code multiplies it, whatever its angle; what rounding left counts as 0."""
    sizes = gradient.abs()
    return torch.where(sizes > 1e-5 * sizes.amax(), sizes, 0) if sizes.numel() else sizes


def _rows_of_codes(decoded: Tensor, codes: int) -> Tensor | None:
    """The one row that each code arrived in, -1 for none; ``None`` where a code arrived in several."""
    table = torch.full((codes,), -1, dtype=torch.int64, device=decoded.device)
    rows = torch.arange(len(decoded), device=decoded.device)[:, None].expand_as(decoded)
    arrived = decoded >= 0
    found, their_rows = decoded[arrived], rows[arrived]
    if not len(found):
        return table
    if int(found.max()) >= codes:
        return None
    table[found] = their_rows
    return None if bool((table[found] != their_rows).any()) else table


def _nodes_between(start: Node, ends: set[Node]) -> list[Node]:
    """The nodes on the ways from one to others that lead through none of them, readers before what they read."""
    leads: dict[Node, bool] = {}
    order: list[Node] = []
    stack: list[tuple[Node, bool]] = [(start, False)]
    while stack:
        node, left = stack.pop()
        children = [] if is_leaf(node) else [child[0] for child in children_of(node) if child is not None]
        if left:
            leads[node] = any(leads[child] for child in children)
            if leads[node]:
                order.append(node)
        elif node not in leads:
            leads[node] = node in ends
            if node in ends:
                order.append(node)
            else:
                stack.append((node, True))
                stack += [(child, False) for child in children if child not in leads]
    return order[::-1]
