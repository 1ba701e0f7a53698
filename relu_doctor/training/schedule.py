"""Which steps are observed in full, after which the gradients are read, and when a window closes."""

from __future__ import annotations

FIRST = 3  # steps at the beginning of a run: whether units are born dead, and whether the first updates kill
EACH = 100  # steps at the beginning of a run whose gradients are all read
LISTEN = 10  # steps from one whose gradients are read to the next, after these
CLOSELY = 3  # steps after gradients have shown that many units fell silent


class Schedule:
    """Counts steps from where the run stands.

    Args:
        every: steps from one that is observed in full to the next; at most a window.
        window: steps in a window.
        start: updates that were made before.

    Attributes:
        step: updates made so far, those before included.
    """

    def __init__(self, every: int, window: int, start: int) -> None:
        self.every = min(every, window)  # no window is judged without a forward that was observed in it
        self.window = window
        self.start = self.step = start
        self._closely = 0

    @property
    def made(self) -> int:
        """Steps made since the beginning."""
        return self.step - self.start

    @property
    def current(self) -> int:
        """The step that is being made, from 1: its forward comes before its update."""
        return self.step + 1

    @property
    def next_close(self) -> int:
        """The step with which the open window closes."""
        return self.start + (self.made // self.window + 1) * self.window

    @property
    def is_close(self) -> bool:
        """Whether steps are observed one by one for what gradients have shown."""
        return self._closely > 0

    def wants(self) -> bool:
        """Whether the step that is being made is to be observed in full."""
        return self._closely > 0 or self._observes(self.current)

    def listens(self) -> bool:
        """Whether the gradients of the step that is being made are to be read."""
        made = self.made
        return self._closely > 0 or made < EACH or made % LISTEN == 0 or made % self.every == 0

    @property
    def next_due(self) -> int:
        """The first step, from that which is being made, with which there is anything to be done."""
        made = self.made
        if self._closely or made < EACH:
            return self.current
        to_listen, to_observe = -made % LISTEN, -made % self.every
        return self.current + min(to_listen, to_observe, self.window - 1 - made % self.window)

    def measures(self) -> bool:
        """Whether the norm of all gradients is to be taken, if the step that is being made is observed in full.

        It costs a look at every gradient; where steps are observed more often, one in so many is enough.
        """
        made = self.made
        return made < EACH or made // LISTEN > (made - self.every) // LISTEN

    def next_look(self, step: int) -> int:
        """The first step after one at which it shows whether units fire, by the forward or by gradients."""
        step += 1
        while not (step - 1 - self.start < EACH or (step - 1 - self.start) % LISTEN == 0 or self._observes(step)):
            step += 1
        return step

    def _observes(self, step: int) -> bool:
        made = step - 1 - self.start
        return made < FIRST or made % self.every == 0

    def look_closely(self) -> None:
        """Observe the next steps in full."""
        self._closely = CLOSELY

    def advance(self) -> bool:
        """A step was made.

        Returns:
            Whether a window closes with it.
        """
        self.step += 1
        self._closely = max(0, self._closely - 1)
        return self.made % self.window == 0
