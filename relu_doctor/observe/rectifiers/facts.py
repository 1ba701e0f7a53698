"""What the ledger of a forward knows of tensors: masks, zeros, choices, and the outputs of rectifiers."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from relu_doctor.observe.rectifiers.bends import Bend

Ref = weakref.ref[Tensor]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a mask says: where ``left`` lies above ``right``.

    Attributes:
        left: the tensor that was compared, or the one that it is a function of.
        right: a number, or another tensor; ``None`` where ``left`` was chosen from in another way.
        above: the mask is true where left is above right, else where it is below.
        exact: left itself was compared, value by value, and nothing else goes into the mask.
        index: of the rectifier's call whose output was compared or chosen from.
    """

    left: Ref
    right: float | Ref | None
    above: bool
    exact: bool = True
    index: int | None = None

    def inverted(self) -> Comparison:
        """What the opposite mask says."""
        return replace(self, above=not self.above)

    def narrowed(self) -> Comparison:
        """What is left to say where other things go into the mask as well."""
        return replace(self, right=None, exact=False)


@dataclass(eq=False, slots=True)
class Output:
    """What was made of a rectifier's output, or of a choice from it, with nothing but a change of shape in between.

    Attributes:
        index: which call of the forward it was.
        pre: what the rectifier was applied to, or what the top-k chose from.
        record: whatever the mode keeps about the call.
        chosen: it has been through a top-k or a mask.
        bend: what it is of the tensor behind it.
    """

    index: int
    pre: Ref
    record: Any = None
    chosen: bool = False
    bend: Bend | None = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """The indices that a top-k returned.

    Attributes:
        source: what it chose from, or the tensor of which that is a function.
        index: of the call that made what it chose from, or of the top-k itself.
        output: what the values at these places are.
    """

    source: Ref
    index: int | None
    output: Output | None = None


@dataclass(frozen=True, slots=True)
class Zeros:
    """A tensor of zeros."""


Fact = Comparison | Output | Chosen | Zeros | Bend


@dataclass(slots=True)
class Refined:
    """A rectifier's output goes on through a mask: it fires where the result is not zero.

    Attributes:
        output: of which call.
        gate: what the mask was made from, where that is another tensor.
    """

    output: Output
    gate: Tensor | None = None
