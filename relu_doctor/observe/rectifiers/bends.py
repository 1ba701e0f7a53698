"""Bends: tensors that are functions of another, element by element, with one slope below 0 and one above.

``x - torch.minimum(x, 0)`` and ``(x + x.abs()) / 2`` are ReLUs that no single call betrays, ``relu(x) - a * relu(-x)``
is a leaky one made of two that are none. What a sum, a maximum or a minimum of such functions is follows from the
slopes of its parts on either side of 0.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

Function = Callable[[float], float]
UNKNOWN = math.nan  # a slope that is not known, but not zero
_NO_MORE = 1e-6  # than this counts as zero


@dataclass(eq=False, slots=True)
class Bend:
    """What a tensor is of another, element by element.

    Attributes:
        root: the other tensor.
        below, above: its slope where the root is below, and above, zero; NaN for any that is not zero.
        version: of the root, when this was noted.
        exact: it is its slope times the root; nothing was added, no other function applied.
        own: nothing that varies from input to input goes into it but the root.
        calls: of the rectifiers that it is made of.
        made_of: what the ledger knows of the output that it is a function of, where that is a single one.
        way: 1 where it is known to grow with its root, or to stay where it is flat; -1 where it falls; 0 where neither.
        at: gives its value for one of the root; ``None`` where that is not known.
        inner: what the root is of another tensor, where that is known and the root may not last.
    """

    root: weakref.ref[Tensor]
    below: float
    above: float
    version: int
    exact: bool = True
    own: bool = True
    calls: tuple[int, ...] = ()
    made_of: Any = None
    way: int = 1
    at: Function | None = None
    inner: Bend | None = None

    @classmethod
    def itself(cls, tensor: Tensor) -> Bend:
        """A tensor as a function of itself."""
        return cls(weakref.ref(tensor), 1.0, 1.0, version_of(tensor), at=lambda value: value)

    @property
    def straight(self) -> bool:
        """It is a multiple of its root."""
        return self.exact and self.own and self.below == self.above

    @property
    def one_sided(self) -> bool:
        """Its slope is zero on one side only."""
        return (self.below == 0) != (self.above == 0)

    @property
    def is_zero(self) -> bool:
        """It is zero everywhere."""
        return self.exact and self.below == self.above == 0

    def source(self) -> Tensor | None:
        """The root, unless it is gone or was written to."""
        root = self.root()
        return root if root is not None and version_of(root) == self.version else None

    def times(self, factor: float) -> Bend:
        """This, multiplied by a number."""
        return self._with(
            self.below * factor,
            self.above * factor,
            exact=self.exact,
            way=self.way * ((factor > 0) - (factor < 0)),
            at=self._then(lambda value: value * factor),
        )

    def absolute(self) -> Bend:
        """The magnitude of this; where nothing more is known, some function of it."""
        if not self.exact or math.isnan(self.below + self.above):
            return self.passed()
        return self._with(-abs(self.below), abs(self.above), way=0)

    def passed(self, *, own: bool = True, rising: bool = False, by: Function | None = None) -> Bend:
        """This, after some other function: flat where it is flat.

        Args:
            own: nothing else that varies from input to input went in.
            rising: the function grows with what it is given.
            by: the function, where it is known.
        """
        below, above = (0.0 if slope == 0 else UNKNOWN for slope in (self.below, self.above))
        return self._with(
            below, above, exact=False, own=self.own and own, way=self.way if rising else 0, at=self._then(by)
        )

    def of_inner(self, inner: Bend) -> Bend | None:
        """This, as a function of the root of what its own root is; ``None`` where its bend would be elsewhere."""
        bent = self.below != self.above and not math.isnan(self.below + self.above)
        bent = bent or 0 in (self.below, self.above)
        if bent and (not inner.way or inner.at is None or not abs(inner.at(0.0)) < _NO_MORE):
            return None
        below, above = (0.0 if slope == 0 else UNKNOWN for slope in (self.below, self.above))
        return replace(
            self,
            root=inner.root,
            version=inner.version,
            below=below if inner.way >= 0 else above,
            above=above if inner.way >= 0 else below,
            exact=False,
            own=self.own and inner.own,
            way=self.way * inner.way,
            at=inner._then(self.at),
            inner=inner.inner,
        )

    def views(self) -> Iterator[Bend]:
        """This, and the same as a function of what its root is a function of, and so on."""
        yield self
        inner = self.inner
        while inner is not None:
            seen = self.of_inner(inner)
            if seen is not None:
                yield seen
            inner = None if inner.inner is None else inner.of_inner(inner.inner)

    def _then(self, function: Function | None) -> Function | None:
        own = self.at
        return None if own is None or function is None else lambda value: function(own(value))

    def rectified(self) -> Bend:
        """The larger of this and zero."""
        return self._with(min(self.below, 0.0), max(self.above, 0.0))

    def cut(self, *, above: bool) -> Bend:
        """This where the root is above zero, or below it, and zero elsewhere."""
        return self._with(*((0.0, self.above) if above else (self.below, 0.0)))

    def plus(self, other: Bend, factor: float = 1.0) -> Bend:
        """The sum of this and another of the same root."""
        below, above = self.below + factor * other.below, self.above + factor * other.above
        return self._with(below, above, exact=self.exact and other.exact, calls=self._calls(other))

    def larger(self, other: Bend) -> Bend:
        """The larger of this and another of the same root."""
        return self._with(
            min(self.below, other.below), max(self.above, other.above), exact=True, calls=self._calls(other)
        )

    def smaller(self, other: Bend) -> Bend:
        """The smaller of this and another of the same root."""
        return self.times(-1).larger(other.times(-1)).times(-1)

    def by_call(self, call: int) -> Bend:
        """This, as the output of a rectifier's call."""
        return self._with(self.below, self.above, calls=(call,), way=self.way, at=self.at)

    def of(self, output: object) -> Bend:
        """This, as a function of a rectifier's output."""
        return replace(self, made_of=output)

    def comparable(self) -> bool:
        """Whether it is known which of this and another is larger."""
        return self.exact and self.own and not math.isnan(self.below + self.above)

    def _calls(self, other: Bend) -> tuple[int, ...]:
        return tuple(dict.fromkeys((*self.calls, *other.calls)))

    def _with(
        self,
        below: float,
        above: float,
        *,
        exact: bool | None = None,
        own: bool | None = None,
        calls: tuple[int, ...] | None = None,
        way: int | None = None,
        at: Function | None = None,
    ) -> Bend:
        return Bend(
            self.root,
            below,
            above,
            self.version,
            self.exact if exact is None else exact,
            self.own if own is None else own,
            self.calls if calls is None else calls,
            self.made_of if calls is None else None,
            (self.way if calls is None else 0) if way is None else way,
            at,
            self.inner,
        )


def version_of(tensor: Tensor) -> int:
    """Goes up whenever the tensor is written to; tensors of inference mode do not tell."""
    try:
        return tensor._version
    except RuntimeError:
        return -1


def is_constant(value: object, like: Tensor) -> bool:
    """Whether an operand is the same for all inputs, as far as it shows: a number, a parameter, of fewer axes."""
    if isinstance(value, int | float):
        return True
    if not isinstance(value, Tensor):
        return False
    if value.numel() == 1 or value.dim() < like.dim():
        return True
    return isinstance(value if value._base is None else value._base, nn.Parameter)
