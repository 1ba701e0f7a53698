"""How large an update is beside the weights that it changes: measured on one step of a window, row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relu_doctor.observe.graph.names import strip_wrappers
from relu_doctor.observe.graph.sharding import is_spread
from relu_doctor.observe.sites import ActivationSite

_TRIES = 20  # steps of a window in which it is looked for an update of each weight


class UpdateMeter:
    """Measures the update-to-weight ratio of each unit's incoming weights.

    Each weight is measured in the first step of a window in which an optimizer updates it. Between :meth:`before` and
    :meth:`after` a copy of it is held: the only memory of their size that a monitor takes. A device is not waited for
    but in :meth:`take`.

    Args:
        model: whose weights.
        sites: whose units.
    """

    def __init__(self, model: nn.Module, sites: Sequence[ActivationSite]) -> None:
        named = {strip_wrappers(name): p for name, p in model.named_parameters(remove_duplicate=False)}
        self._rows: dict[str, list[tuple[str, Tensor]]] = {}
        self._names: dict[nn.Parameter, str] = {}
        for site in sites:
            for term in site.terms:
                name = term.weight[0] if len(term.weight) == 1 else ""
                parameter = named.get(name)
                usual = term.kind == "weight" and term.weight_axis == 0 and term.weight_part is None
                if parameter is None or is_spread(parameter):
                    continue
                if usual and bool((term.rows < len(parameter)).all()):
                    self._rows.setdefault(site.site_id, []).append((name, term.rows))
                    self._names[parameter] = name
        self._copies: dict[nn.Parameter, Tensor] = {}
        self._ratios: dict[str, Tensor] = {}  # per weight, of each row
        self._tries = 0

    @property
    def is_done(self) -> bool:
        """Whether all was measured in this window that is going to be."""
        return len(self._ratios) == len(self._names) or self._tries == _TRIES

    @property
    def is_open(self) -> bool:
        """Whether a step is being measured."""
        return bool(self._copies)

    def fits(self, named: Mapping[str, nn.Parameter]) -> bool:
        """Whether the model still holds the weights that are measured."""
        return all(named.get(name) is parameter for parameter, name in self._names.items())

    @torch.no_grad()
    def before(self, optimizer: Optimizer, *, has_gradients: bool) -> None:
        """An optimizer is about to make its step.

        Args:
            optimizer: which one.
            has_gradients: they are there, and what has none is not updated; else a closure is going to make them.
        """
        if self.is_done:
            return
        for group in optimizer.param_groups:
            rate = group.get("lr")
            if isinstance(rate, int | float) and not rate:  # a warm-up that begins at nothing
                continue
            for parameter in group["params"]:
                name = self._names.get(parameter)
                if name is None or name in self._ratios or parameter in self._copies:
                    continue
                if parameter.grad is not None or not has_gradients:
                    self._copies[parameter] = parameter.detach().clone()

    @torch.no_grad()
    def after(self) -> None:
        """All optimizers have made their steps."""
        for parameter, before in self._copies.items():
            change, norms = _norms(parameter.detach() - before), _norms(before)
            told = (norms > 0) & change.any()  # a fused optimizer may have skipped the step
            self._ratios[self._names[parameter]] = torch.where(told, change / norms, torch.nan).float()
        self._copies = {}

    def step(self) -> None:
        """A step was made; whoever has not been updated in many of them is not waited for any more."""
        self._tries = min(self._tries + 1, _TRIES)

    def take(self) -> Mapping[str, Tensor]:
        """A window closes: what was measured in it.

        Returns:
            Per ``site_id``, float32 (units,) on the CPU: the norm of each unit's update beside that of its weights
            before; NaN where these are zero, nothing was changed, or no row is the unit's. Sites whose weights were not
            updated are not in it.
        """
        ratios = {name: values.cpu() for name, values in self._ratios.items()}
        self._ratios, self._tries = {}, 0
        found: dict[str, Tensor] = {}
        for site_id, rows in self._rows.items():
            of_terms = [_of_rows(ratios[name], own) for name, own in rows if name in ratios]
            if of_terms:
                largest = torch.stack(of_terms).nan_to_num(nan=-1, posinf=torch.inf).amax(0)
                found[site_id] = torch.where(largest < 0, torch.nan, largest)
        return found

    def state(self) -> dict[str, Tensor]:
        """What was measured in the open window: per weight, float32 (rows,), on the CPU."""
        return {name: values.to("cpu", copy=True) for name, values in self._ratios.items()}

    def remember(self, state: Mapping[str, Tensor]) -> None:
        """Take over what another meter's :meth:`state` told."""
        known = set(self._names.values())
        self._ratios |= {name: values for name, values in state.items() if name in known}


def _norms(values: Tensor) -> Tensor:
    """Of each row, in float32 or better."""
    wide = torch.promote_types(values.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(values.flatten(1), dim=1, dtype=wide)
    return norms


def _of_rows(values: Tensor, rows: Tensor) -> Tensor:
    return torch.where(rows >= 0, values[rows.clamp_min(0)], torch.nan)
