"""OutputRows: a few rows of what a site puts out in one forward, evenly spread over all that it puts out."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from relu_doctor.observe.inputs.feeding import sent

MOST = 1024  # rows that are kept
_TURN = 2654435769  # 2**32 divided by the golden ratio


class OutputRows:
    """At most ``MOST`` rows of one site's outputs, over all of its calls of one forward; a row is an input's position.

    The n-th row has the mark n * _TURN modulo 2**32, and those with the lowest marks are kept, however many there are
    to come. Their distances are of three sizes at most (the three-gap theorem), which alternate without a period, so
    that they do not fall in step with the width of an image. Nothing is left to chance.
    """

    def __init__(self) -> None:
        self._shown = 0  # rows, those that were not kept included
        self._marks: NDArray[np.uint32] = np.empty(0, np.uint32)
        self._rows: list[Tensor] = []
        self._valid: list[Tensor] = []

    def take(self, pieces: Iterable[Tensor], shape: tuple[int, int, int], valid: Tensor | None) -> None:
        """Take in a call; what is kept is copied.

        Args:
            pieces: real (inputs, units, positions), some inputs at a time.
            shape: of all of them together.
            valid: bool (inputs, positions), False for padding; ``None`` for none.
        """
        inputs, _, positions = shape
        marks = _marks(self._shown, inputs * positions)
        self._shown += len(marks)
        chosen = _lowest(marks, MOST)
        if len(self._marks) >= MOST:
            chosen = chosen[marks[chosen] < self._marks.max()]
        first = 0
        for piece in pieces:
            until = first + len(piece) * positions
            own = torch.from_numpy(chosen[(chosen >= first) & (chosen < until)] - first)
            if len(own):
                input_, position = (sent(index, piece.device) for index in (own // positions, own % positions))
                self._rows.append(piece[input_, :, position])
                own_valid = None if valid is None else valid[input_ + first // positions, position]
                self._valid.append(piece.new_ones(len(own), dtype=torch.bool) if own_valid is None else own_valid)
            first = until
        self._marks = np.concatenate((self._marks, marks[chosen]))
        if len(self._marks) > 2 * MOST:
            self.thin()

    def thin(self) -> None:
        """Let go of all rows but the ``MOST`` that are kept."""
        if len(self._marks) <= MOST:
            return
        kept = _lowest(self._marks, MOST)
        self._marks, index = self._marks[kept], torch.from_numpy(kept)
        self._rows, self._valid = [_picked(self._rows, index)], [_picked(self._valid, index)]

    def values(self) -> Tensor:
        """The rows that are no padding: (rows, units), on the CPU."""
        return torch.cat(self._rows).cpu()[torch.cat(self._valid).cpu()] if self._rows else torch.empty(0, 0)


def _marks(first: int, number: int) -> NDArray[np.uint32]:
    return (np.arange(first, first + number, dtype=np.uint64) * np.uint64(_TURN)).astype(np.uint32)


def _lowest(marks: NDArray[np.uint32], number: int) -> NDArray[np.int64]:
    """The places of the lowest marks, ascending."""
    if len(marks) <= number:
        return np.arange(len(marks))
    return np.sort(np.argpartition(marks, number)[:number])


def _picked(parts: list[Tensor], index: Tensor) -> Tensor:
    whole = torch.cat(parts)
    return whole[sent(index, whole.device)]
