"""How large an update is beside the weights that it changes: measured on one step of a window, row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from relu_doctor.observe.graph.names import strip_wrappers
from relu_doctor.observe.graph.sharding import is_spread
from relu_doctor.observe.sites import ActivationSite


class UpdateMeter:
    """Measures the update-to-weight ratio of each unit's incoming weights.

    Between :meth:`before` and :meth:`after` it holds one copy of the weights that feed the sites: the only memory of
    their size that a monitor takes.

    Args:
        model: whose weights.
        sites: whose units.
    """

    def __init__(self, model: nn.Module, sites: Sequence[ActivationSite]) -> None:
        named = {strip_wrappers(name): p for name, p in model.named_parameters(remove_duplicate=False)}
        self._rows: dict[str, list[tuple[nn.Parameter, Tensor]]] = {}
        for site in sites:
            for term in site.terms:
                parameter = named.get(term.weight[0]) if len(term.weight) == 1 else None
                usual = term.kind == "weight" and term.weight_axis == 0 and term.weight_part is None
                if parameter is None or is_spread(parameter):
                    continue
                if usual and term.direct and bool((term.rows < len(parameter)).all()):
                    self._rows.setdefault(site.site_id, []).append((parameter, term.rows))
        self._copies: dict[nn.Parameter, Tensor] = {}

    @property
    def is_open(self) -> bool:
        """Whether a step is being measured."""
        return bool(self._copies)

    @torch.no_grad()
    def before(self) -> None:
        """The optimizer is about to make its step."""
        self._copies = {parameter: parameter.detach().clone() for rows in self._rows.values() for parameter, _ in rows}

    @torch.no_grad()
    def after(self) -> Mapping[str, Tensor]:
        """It has made it.

        Returns:
            Per ``site_id``, float32 (units,): the norm of each unit's update beside that of its weights before; NaN
            where these are zero, or no row is the unit's.
        """
        ratios: dict[nn.Parameter, Tensor] = {}
        for parameter, before in self._copies.items():
            change = _norms(parameter.detach() - before)
            if bool(change.any()):  # else it was not updated in this step
                ratios[parameter] = (change / _norms(before)).float()
        found: dict[str, Tensor] = {}
        for site_id, rows in self._rows.items():
            of_terms = [_of_rows(ratios[parameter].cpu(), own) for parameter, own in rows if parameter in ratios]
            if of_terms:
                found[site_id] = torch.stack(of_terms).nan_to_num(nan=-1).amax(0)
                found[site_id] = torch.where(found[site_id] < 0, torch.nan, found[site_id])
        self.discard()
        return found

    def discard(self) -> None:
        """Let the copies go."""
        self._copies = {}


def _norms(values: Tensor) -> Tensor:
    """Of each row, in float32 or better."""
    wide = torch.promote_types(values.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(values.flatten(1), dim=1, dtype=wide)
    return norms


def _of_rows(values: Tensor, rows: Tensor) -> Tensor:
    return torch.where(rows >= 0, values[rows.clamp_min(0)], torch.nan)
