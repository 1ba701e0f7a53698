"""Lives: since when each unit has been silent, and whether it was ever otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NEVER = -1


class Onset(StrEnum):
    """How a unit came to where it is."""

    NONE = ""
    BORN_DEAD = "born_dead"  # never fired, and was watched from before the first update
    FOUND_DEAD = "found_dead"  # never fired, and the watching began later, or anew when it was treated
    DIED = "died"
    REVIVED = "revived"


@dataclass(slots=True, eq=False)
class SiteLives:
    """Of the units of one site, each a tensor (units,).

    Attributes:
        fired: int64, the last step at which each fired; -1 for never.
        silent_from: int64, the first step after it at which it was seen to be silent; -1 where it was not.
        dead: bool, whether it was called dead at the last window.
        revived: int64, the step at which it fired again after it had been called dead; -1 for never.
        treated: int64, the step after which it was treated last, since when all of this is told; -1 for never.
        lost: bool, whether it was dead when it was treated, and was called neither dead nor revived since.
        again: int64, the first step at which one that is dead or lost was seen to fire since; -1 for none.
    """

    fired: Tensor
    silent_from: Tensor
    dead: Tensor
    revived: Tensor
    treated: Tensor
    lost: Tensor
    again: Tensor

    @classmethod
    def of(cls, num_units: int) -> SiteLives:
        """Units of which nothing is known yet."""
        never = torch.full((num_units,), NEVER, dtype=torch.int64)
        no = torch.zeros(num_units, dtype=torch.bool)
        return cls(never, never.clone(), no, never.clone(), never.clone(), no.clone(), never.clone())

    def treat(self, units: Tensor, step: int) -> None:
        """Begin anew for units that were treated; that one was dead is remembered until it fires.

        Args:
            units: bool (units,).
            step: after which it was done.
        """
        self.lost, self.dead = self.lost | (units & self.dead), self.dead & ~units
        self.treated = torch.where(units, step, self.treated)
        self.fired, self.silent_from, self.revived, self.again = (
            torch.where(units, NEVER, each) for each in (self.fired, self.silent_from, self.revived, self.again)
        )

    def update(self, first: Tensor, fired: Tensor, observed: Tensor) -> None:
        """Take in what a window showed.

        Args:
            first: int64 (units,), the first step of the window at which each unit was seen to fire; any other where it
                was not.
            fired: int64 (units,), the last step at which each unit was seen to fire, in the activations or by its
                gradient; -1 for never.
            observed: int64 (steps,), the steps that were observed in full, ascending.
        """
        later = fired > self.fired
        comes_back = later & (self.dead | self.lost) & (self.again == NEVER)
        self.again = torch.where(comes_back, first, self.again)
        self.fired = torch.maximum(self.fired, fired)
        self.silent_from = torch.where(later, torch.full_like(self.silent_from, NEVER), self.silent_from)
        place = torch.searchsorted(observed, torch.maximum(self.fired, self.treated), right=True)
        following = torch.cat([observed, observed.new_tensor([NEVER])])[place]
        self.silent_from = torch.where(self.silent_from == NEVER, following, self.silent_from)

    def judged(self, dead: Tensor) -> tuple[Tensor, Tensor]:
        """A window was judged.

        Args:
            dead: bool (units,).

        Returns:
            Which units died in it, and which that were dead fired again: bool (units,) each.
        """
        died = dead & ~self.dead & ~self.lost
        back = (self.dead | self.lost) & ~dead & (self.again != NEVER)
        self.revived = torch.where(back, self.again, self.revived)
        self.again = torch.where(back | dead, NEVER, self.again)
        self.dead = (self.dead & ~back) | dead
        self.lost = self.lost & ~back & ~dead
        return died, back

    def onsets(self, *, from_start: bool) -> tuple[NDArray[np.object_], NDArray[np.int64]]:
        """How each unit came to where it is, an :class:`Onset`'s value, and with which update, -1 for none: (units,).

        A unit died with the update after which it fired no more; one that was born dead did so with update 0. One that
        has not fired since it was treated was found dead after that update.

        Args:
            from_start: the watching began before the first update.
        """
        dead, fired, revived, treated = (each.numpy() for each in (self.dead, self.fired, self.revived, self.treated))
        never = (Onset.BORN_DEAD if from_start else Onset.FOUND_DEAD).value
        unseen = np.where(treated == NEVER, never, Onset.FOUND_DEAD.value)
        alive = np.where(revived == NEVER, Onset.NONE.value, Onset.REVIVED.value)
        kinds = np.where(dead, np.where(fired == NEVER, unseen, Onset.DIED.value), alive).astype(object)
        return kinds, np.where(dead, np.maximum(np.maximum(fired, treated), 0), revived)


class Lives:
    """Of all sites, per ``site_id``."""

    def __init__(self) -> None:
        self.sites: dict[str, SiteLives] = {}

    def of(self, site_id: str, num_units: int) -> SiteLives:
        """Of one site; from now on where it was not known."""
        known = self.sites.get(site_id)
        if known is None or len(known.fired) != num_units:
            known = self.sites[site_id] = SiteLives.of(num_units)
        return known
