"""From a pre-activation of any layout to (inputs, units, positions)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from relu_doctor.observe.inputs.feeding import sent
from relu_doctor.observe.inputs.owners import Rows
from relu_doctor.observe.inputs.rehearsal import differs
from relu_doctor.observe.sites import ActivationSite


@dataclass(frozen=True, slots=True)
class Layout:
    """How one call's axes are read.

    Attributes:
        order: permutation that puts inputs first, then units, then positions.
        num_inputs: inputs in this call.
        split: rows of the first axis that belong to one input (tokens flattened to (inputs x tokens, features)).
        by_rows: the batch size does not show which axis counts inputs; it is the rows that are counted.
        interleaved: flattened rows stand position by position, not input by input.
        owners: int64 (rows,): the input of each row of a selection, where that was seen.
    """

    order: tuple[int, ...]
    num_inputs: int
    split: int
    by_rows: bool
    interleaved: bool = False
    owners: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """The shape of a pre-activation in a forward of another number of inputs."""

    shape: torch.Size
    num_inputs: int | None


@dataclass(frozen=True, slots=True)
class Seen:
    """What a rehearsal showed of a site.

    Attributes:
        batch: the axis on which one input changed one index; ``None`` where it did not show.
        interleaved: one input changed every n-th flattened row.
        padded: the mask's positions are this site's; ``None`` while no padding was rehearsed.
        tried: there were several inputs to tell apart.
        apart: one input changed its own share of some axis only.
        alone: it is called once for each input.
    """

    batch: int | None = None
    interleaved: bool = False
    padded: bool | None = None
    tried: bool = True
    apart: bool = False
    alone: bool = False


def read_layout(
    shape: torch.Size,
    site: ActivationSite,
    num_inputs: int | None,
    sample: Sample | None = None,
    seen: Seen | None = None,
) -> Layout:
    """Decide which axis counts inputs.

    Args:
        shape: of the pre-activation.
        site: tells the unit axes.
        num_inputs: inputs in the batch; ``None`` where no tensor shows it.
        sample: the same call with fewer inputs: the axis that grew with them is the one. Without it, an axis of that
            size is taken, the first if there are several.
        seen: what a rehearsal showed; it goes before all else.
    """
    others = [axis for axis in range(len(shape)) if axis not in site.unit_axes]
    if not others:
        return Layout(tuple(site.unit_axes), 1, 0, by_rows=False)
    if seen is not None and seen.alone:
        return Layout((others[0], *site.unit_axes, *others[1:]), 1, shape[others[0]], by_rows=False)
    matching = [axis for axis in others if shape[axis] == num_inputs]
    batch, split, by_rows = others[0], 0, False
    by_size = others[0] == 0 or seen is None or seen.apart or not seen.tried  # else it may be slots that are no inputs
    grown = _grown_axis(shape, others, num_inputs, sample) if by_size else None
    if seen is not None and seen.batch in matching:
        batch = seen.batch
    elif grown is not None and num_inputs:
        batch, split = grown, shape[grown] // num_inputs
        split = split if split > 1 else 0
    elif matching and by_size:
        batch = matching[0]
    elif num_inputs and others[0] == 0 and shape[0] % num_inputs == 0:
        split = shape[0] // num_inputs
    elif others[0] != 0:  # units first and no batch to be seen, or slots that are no inputs: one input
        return Layout((*site.unit_axes, *others), 1, 0, by_rows=False)
    else:
        by_rows = num_inputs is not None
    rest = [axis for axis in others if axis != batch]
    own_inputs = shape[batch] // split if split else shape[batch]
    interleaved = bool(split) and seen is not None and seen.interleaved
    return Layout((batch, *site.unit_axes, *rest), own_inputs, split, by_rows, interleaved)


def _grown_axis(shape: torch.Size, others: list[int], num_inputs: int | None, sample: Sample | None) -> int | None:
    """The one axis whose size is in proportion to the number of inputs, here and in the sample."""
    if sample is None or not num_inputs or not sample.num_inputs or sample.num_inputs == num_inputs:
        return None
    if len(sample.shape) != len(shape):
        return None
    changed = [axis for axis in others if shape[axis] != sample.shape[axis]]
    if len(changed) != 1 or shape[changed[0]] * sample.num_inputs != sample.shape[changed[0]] * num_inputs:
        return None
    return changed[0] if shape[changed[0]] % num_inputs == 0 else None


def layout_of_rows(shape: torch.Size, site: ActivationSite, rows: Rows, *, told: bool) -> Layout | None:
    """How the axes of a selection of rows are read; ``None`` where its first axis counts no rows.

    Args:
        shape: of the pre-activation.
        site: tells the unit axes.
        rows: the places of its rows.
        told: whether a rehearsal has shown that the places are right.
    """
    if 0 in site.unit_axes or not shape or shape[0] != len(rows.places):
        return None
    rest = [axis for axis in range(1, len(shape)) if axis not in site.unit_axes]
    return Layout((0, *site.unit_axes, *rest), shape[0], 0, by_rows=not told, owners=rows.owners if told else None)


def arrange(values: Tensor, layout: Layout, site: ActivationSite) -> Tensor:
    """View values as (inputs, units, positions); copies only where no view exists."""
    codes = 1
    for axis in site.unit_axes:
        codes *= values.shape[axis]
    moved = values.permute(layout.order)
    if layout.split:
        positions = moved.shape[1 + len(site.unit_axes) :].numel()
        if layout.interleaved:
            split = moved.reshape(layout.split, layout.num_inputs, codes, positions).transpose(0, 1)
        else:
            split = moved.reshape(layout.num_inputs, layout.split, codes, positions)
        arranged = split.transpose(1, 2).reshape(layout.num_inputs, codes, layout.split * positions)
    else:
        positions = values.numel() // max(codes * layout.num_inputs, 1)
        arranged = moved.reshape(layout.num_inputs, codes, positions)
    if site.grouping is None:
        return arranged
    order = torch.argsort(site.grouping, stable=True)
    if not bool((order[1:] > order[:-1]).all()):
        arranged = arranged[:, sent(order, values.device)]
    return arranged.reshape(layout.num_inputs, site.num_units, -1)


def changed_rows(before: Tensor, after: Tensor, axis: int) -> list[int]:
    """The indices of one axis at which two pre-activations differ."""
    return [int(row) for row in differs(before, after).movedim(axis, 0)[..., None].flatten(1).any(1).nonzero()]


def changed_positions(before: Tensor, after: Tensor, layout: Layout, site: ActivationSite) -> Tensor:
    """Where two pre-activations differ in any unit: bool (inputs, positions)."""
    changed = differs(before, after)
    for axis in site.unit_axes:
        changed = changed.any(axis, keepdim=True)
    return arrange(changed, layout, replace(site, grouping=None))[:, 0]
