"""What the modes that watch a forward share: the model that is watched, and calls of the forward that is running."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

from torch import Tensor, nn

from relu_doctor.observe.forwards.layout import Layout
from relu_doctor.observe.forwards.recorder import Pending
from relu_doctor.observe.forwards.registry import CallRegistry
from relu_doctor.observe.forwards.selection import Selection
from relu_doctor.observe.inputs.owners import Rows
from relu_doctor.observe.models.places import ScriptedCode
from relu_doctor.observe.models.writes import Writes
from relu_doctor.observe.rectifiers.facts import Output
from relu_doctor.observe.sites import ActivationSite
from relu_doctor.terms import Statistics


@dataclass(slots=True)
class Watch:
    """What the modes of one probe share.

    Attributes:
        model: the model that is watched.
        known: what is known of its calls.
        statistics: how much to measure.
        inside_custom: the user's own rectifier modules whose forward is running; calls inside are theirs.
        code: what is known of its scripted code.
        below: rectifiers are called where only the dispatcher sees them.
        in_company: it is spread over processes, which run each forward together.
        writes: what its forward writes to its own parameters.
        tokens: every position that is no padding is evidence by itself.
        gradients: its forward asks autograd, and counts on gradients being enabled around it.
        sampled: the phase of which some rows of the sites' outputs are kept; empty for none.
    """

    model: nn.Module
    known: CallRegistry
    statistics: Statistics
    code: ScriptedCode
    below: bool
    in_company: bool
    writes: Writes
    inside_custom: list[int] = field(default_factory=list)
    tokens: bool = False
    gradients: bool = False
    sampled: str = ""


class UnknownCallError(Exception):
    """A call that the recogniser has not met: the forward must be discovered."""


@dataclass(eq=False, slots=True)
class Open:
    """A recognised call of the forward that is running.

    Attributes:
        index: which call it is.
        pre: what the rectifier is applied to.
        pending: its numbers; ``None`` where nothing is measured.
        choice: the top-k whose values it is applied to, which it only refines.
        selected: a selection from its output was counted.
    """

    index: int
    pre: weakref.ref[Tensor]
    pending: Pending | None
    choice: Output | None = None
    selected: bool = False

    def select(self, selection: Selection, *, further: bool) -> None:
        """Count what is selected of the output; of several selections, what any of them lets pass.

        Args:
            selection: what goes on.
            further: of what was selected before.
        """
        if self.pending is not None:
            selection.apply(self.pending, also=self.selected and not further)
            self.selected = True


@dataclass(frozen=True, slots=True)
class Traced:
    """A call of a rehearsal.

    Attributes:
        site: that it belongs to.
        pre: what the rectifier was applied to.
        layout: how its axes are read.
        rows: whose its rows are, where they are a selection.
    """

    site: ActivationSite
    pre: Tensor
    layout: Layout
    rows: Rows | None
