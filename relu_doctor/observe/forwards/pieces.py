"""How the values of a call are taken apart to be measured: as one view where one exists, else some inputs at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from relu_doctor.observe.forwards.layout import Layout, arrange
from relu_doctor.observe.sites import ActivationSite
from relu_doctor.observe.statistics import fused
from relu_doctor.observe.statistics.plain import BLOCK

_DEVICE_BLOCK = 1 << 24  # values that are copied at a time on a device, where each call costs more


@dataclass(frozen=True, slots=True)
class Arrangement:
    """One way in which values of a site lie in memory, and how they become (inputs, units, positions).

    Attributes:
        layout: how their axes are read.
        shape: inputs, units and positions; of tokens, inputs are what is counted.
        geometry: for the compiled loops; ``None`` where no view exists, or where they do not apply.
        together: inputs that are arranged at a time; 0 for all, which is a view.
        tokens: every position is evidence by itself.
    """

    layout: Layout
    shape: tuple[int, int, int]
    geometry: fused.Geometry | None
    together: int
    tokens: bool

    @classmethod
    def of(cls, values: Tensor, layout: Layout, site: ActivationSite, *, tokens: bool, compiled: bool) -> Arrangement:
        """Try it out on the shape alone; nothing is copied.

        Args:
            values: of a call of the site.
            layout: how their axes are read.
            site: tells the unit axes.
            tokens: every position is evidence by itself.
            compiled: the compiled loops are wanted.
        """
        if type(values) is not Tensor or values.layout is not torch.strided:
            inputs, units, positions = _arranged(values, layout, site, tokens=tokens).shape
            return cls(layout, (inputs, units, positions), None, 0, tokens)
        trial = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device="meta")
        arranged = _arranged(trial, layout, site, tokens=tokens)
        inputs, units, positions = arranged.shape
        if arranged.untyped_storage()._cdata == trial.untyped_storage()._cdata:
            geometry = fused.geometry_of(arranged) if compiled and values.device.type == "cpu" else None
            return cls(layout, (inputs, units, positions), geometry, 0, tokens)
        of_one = values.numel() // max(layout.num_inputs, 1)
        block = BLOCK if values.device.type == "cpu" else _DEVICE_BLOCK
        return cls(layout, (inputs, units, positions), None, max(1, block // max(of_one, 1)), tokens)

    def pieces(self, values: Tensor, site: ActivationSite) -> Iterator[Tensor]:
        """The values as (inputs, units, positions), all at once or some inputs at a time."""
        layout = self.layout
        if not self.together or self.together >= layout.num_inputs:
            yield _arranged(values, layout, site, tokens=self.tokens)
            return
        axis, rows = layout.order[0], max(layout.split, 1)
        grid = values.unflatten(axis, (layout.split, layout.num_inputs)) if layout.interleaved else values
        for first in range(0, layout.num_inputs, self.together):
            number = min(self.together, layout.num_inputs - first)
            if layout.interleaved:
                part = grid.narrow(axis + 1, first, number).flatten(axis, axis + 1)
            else:
                part = grid.narrow(axis, first * rows, number * rows)
            yield _arranged(part, replace(layout, num_inputs=number, owners=None), site, tokens=self.tokens)


def _arranged(values: Tensor, layout: Layout, site: ActivationSite, *, tokens: bool) -> Tensor:
    arranged = arrange(values, layout, site)
    # Of tokens, every position is an input by itself.
    return arranged.transpose(1, 2).reshape(-1, arranged.shape[1], 1) if tokens else arranged
