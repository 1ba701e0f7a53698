"""Maturity: units that a warm-up or a reset has just touched are given time before they are judged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from relu_doctor.errors import ConfigError
from relu_doctor.observe.sites import ActivationSite
from relu_doctor.training.lives import NEVER


class Maturity:
    """Knows which units are exempt.

    Args:
        steps: for so many after the beginning of the run, and after its treatment, no unit is judged.

    Attributes:
        treated: per ``site_id`` of which units were, int64 (units,): the step after which each was, the last time; -1
            for never.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self.treated: dict[str, Tensor] = {}

    def treat(self, site: ActivationSite, units: Any, step: int) -> Tensor:
        """Some units were treated.

        Args:
            site: whose.
            units: their indices, or bool (units,).
            step: after which.

        Returns:
            Which ones: bool (units,).

        Raises:
            ConfigError: there are no such units.
        """
        mask = _mask(site, units)
        self.treated[site.site_id] = torch.where(mask, step, self._of(site))
        return mask

    def exempt(self, site: ActivationSite, step: int) -> Tensor:
        """Which units of a site are not judged after a step: bool (units,)."""
        return self.are_young(self._of(site), step)

    def are_young(self, treated: Tensor, step: int) -> Tensor:
        """Which units are not judged after a step: bool (units,).

        Args:
            treated: int64 (units,), the step after which each was treated; -1 for never.
            step: after which.
        """
        return step - treated.clamp_min(0) <= self._steps

    def _of(self, site: ActivationSite) -> Tensor:
        return self.treated.get(site.site_id, torch.full((site.num_units,), NEVER, dtype=torch.int64))


def find_site(sites: Iterable[ActivationSite], name: str) -> ActivationSite:
    """The site of a name or ``site_id``.

    Raises:
        ConfigError: there is none.
    """
    known = {site.name: site for site in sites}
    for site in known.values():
        if name in (site.name, site.site_id):
            return site
    have = ", ".join(known) if known else "none, since no forward was observed yet"
    raise ConfigError(f"treated() expects a site by its name or site_id, found {name!r}; the monitor knows {have}.")


def _mask(site: ActivationSite, units: Any) -> Tensor:
    number = site.num_units
    try:
        given = torch.as_tensor(units, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        given = None
    if given is not None and given.dtype == torch.bool and given.shape == (number,):
        return given.clone()
    whole = given is not None and not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
    if given is None or not (whole or not given.numel()):
        found = type(units).__name__ if given is None else f"{given.dtype} of shape {tuple(given.shape)}"
        raise ConfigError(f"treated() expects indices of units of {site.name} or bool ({number},), found {found}.")
    indices = given.reshape(-1).long()
    wrong = indices[(indices < 0) | (indices >= number)]
    if len(wrong):
        raise ConfigError(
            f"treated() expects units of {site.name} from 0 to {number - 1}, found {int(wrong[0])}; it has {number}."
        )
    mask = torch.zeros(number, dtype=torch.bool)
    mask[indices] = True
    return mask
