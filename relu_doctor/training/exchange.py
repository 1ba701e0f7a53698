"""Exchange: the buffers of all ranks, gathered in every one of them while training goes on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from relu_doctor.training.flat import Header, header_of
from relu_doctor.training.seen import Seen


class Exchange:
    """One window's exchange.

    Args:
        group: of the ranks, for tensors on the CPU.
        seen: of the window by this rank.

    Attributes:
        received: the buffers, by rank.
        headers: of them.
        beside: what had no place in them, by rank.
        is_over: all of it has come.
    """

    def __init__(self, group: Any, seen: Seen) -> None:
        self.seen = seen
        self.received: list[Tensor] = []
        self.headers: list[Header] = []
        self.beside: list[bytes] = []
        self.is_over = False
        self._group = group
        self._words = torch.zeros(0, dtype=torch.int64)
        self._own = b""
        self._gathering: list[Tensor] = []
        self._work: Any = None

    def launch(self, words: Tensor, beside: bytes) -> None:
        """Begin; every rank must.

        Args:
            words: this rank's buffer, int64, as long as that of every other rank.
            beside: what had no place in it, in whole words of 8 bytes.
        """
        self._own = beside
        self._gather(words)

    def advance(self, *, wait: bool) -> bool:
        """Take in what has come.

        Args:
            wait: until something has; not longer than the group's time-out.

        Returns:
            Whether something had.

        Raises:
            RuntimeError: a rank has died, or has not answered.
        """
        if not wait and not self._work.is_completed():
            return False
        self._work.wait()
        if not self.received:
            self.received = self._gathering
            self.headers = [header_of(words.numpy()) for words in self.received]
            longest = max(header.extra for header in self.headers)
            if longest:
                padded = bytearray(self._own.ljust(8 * longest, b"\0"))
                self._gather(torch.frombuffer(padded, dtype=torch.int64))
                return True
            self._gathering = [torch.zeros(0, dtype=torch.int64)] * len(self.received)
        self.beside = [
            words.numpy().tobytes()[: 8 * header.extra]
            for words, header in zip(self._gathering, self.headers, strict=True)
        ]
        self.is_over = True
        return True

    def _gather(self, words: Tensor) -> None:
        self._words = words  # held until it has been sent
        size = torch.distributed.get_world_size(self._group)
        self._gathering = [torch.empty_like(words) for _ in range(size)]
        self._work = torch.distributed.all_gather(self._gathering, words, group=self._group, async_op=True)
