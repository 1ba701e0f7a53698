"""How large an update is beside the weights that it changes: measured on one step of a window, row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relu_doctor.observe.graph.names import strip_wrappers
from relu_doctor.observe.graph.sharding import is_spread
from relu_doctor.observe.graph.units import Term
from relu_doctor.observe.parameters import row_sums
from relu_doctor.observe.sites import ActivationSite

_TRIES = 20  # steps of a window in which it is looked for an update of each weight


class UpdateMeter:
    """Measures the update-to-weight ratio of each unit's incoming weights.

    Each weight is measured in the first step of a window in which an optimizer updates it; one that is computed of
    several parameters (weight normalisation), or used in part, is not measured. Between :meth:`before` and
    :meth:`after` a copy of it is held: the only memory of their size that a monitor takes. A device is not waited for
    but in :meth:`take`.

    Args:
        model: whose weights.
        sites: whose units.
    """

    def __init__(self, model: nn.Module, sites: Sequence[ActivationSite]) -> None:
        named = {strip_wrappers(name): p for name, p in model.named_parameters(remove_duplicate=False)}
        self._terms: dict[str, list[Term]] = {}  # of each site
        self._names: dict[nn.Parameter, str] = {}
        for site in sites:
            for term in site.terms:
                parameter = named.get(term.weight[0]) if len(term.weight) == 1 else None
                if parameter is not None and _is_measured(parameter, term):
                    self._terms.setdefault(site.site_id, []).append(term)
                    self._names[parameter] = term.weight[0]
        self._layouts: dict[str, dict[str, Term]] = {}  # of each weight, the ways in which sites count its rows
        for term in (term for terms in self._terms.values() for term in terms):
            self._layouts.setdefault(term.weight[0], {})[_layout(term)] = term
        self._copies: dict[nn.Parameter, Tensor] = {}
        self._ratios: dict[str, dict[str, Tensor]] = {}  # per weight and way, of each row
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
            name = self._names[parameter]
            self._ratios[name] = {
                layout: _ratios(parameter.detach() - before, before, term)
                for layout, term in self._layouts[name].items()
            }
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
        ratios, self._ratios, self._tries = self.state(), {}, 0
        found: dict[str, Tensor] = {}
        for site_id, terms in self._terms.items():
            own = [(ratios.get(term.weight[0], {}).get(_layout(term)), term.rows) for term in terms]
            of_terms = [_of_rows(values, rows) for values, rows in own if values is not None]
            if of_terms:
                largest = torch.stack(of_terms).nan_to_num(nan=-1, posinf=torch.inf).amax(0)
                found[site_id] = torch.where(largest < 0, torch.nan, largest)
        return found

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What was measured in the open window: per weight and way to count its rows, float32 (rows,), on the CPU."""
        return {
            name: {layout: values.to("cpu", copy=True) for layout, values in each.items()}
            for name, each in self._ratios.items()
        }

    def remember(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over what another meter's :meth:`state` told of the same weights."""
        parameters = {name: parameter for parameter, name in self._names.items()}
        for name, each in state.items():
            layouts = self._layouts.get(name, {})
            if layouts.keys() == each.keys() and all(
                len(values) == _num_rows(parameters[name], layouts[layout]) for layout, values in each.items()
            ):
                self._ratios[name] = dict(each)


def _is_measured(parameter: nn.Parameter, term: Term) -> bool:
    """Whether the units of a term are rows of a weight that is held as it is used."""
    whole = term.kind == "weight" and term.weight_part is None and not term.computed and parameter.dim() > 1
    if (
        not whole
        or not parameter.numel()
        or is_spread(parameter)
        or parameter.is_complex()
        or (term.weight_axis or 0) >= parameter.dim()
    ):
        return False
    if term.weight_axis is None and not term.transposed_groups:
        return False
    return bool((term.rows < _num_rows(parameter, term)).all())


def _num_rows(parameter: nn.Parameter, term: Term) -> int:
    if term.transposed_groups:
        return parameter.shape[1] * term.transposed_groups
    return parameter.shape[term.weight_axis or 0]


def _layout(term: Term) -> str:
    """How a term counts the rows of its weight."""
    return f"groups {term.transposed_groups}" if term.transposed_groups else f"axis {term.weight_axis}"


def _ratios(change: Tensor, before: Tensor, term: Term) -> Tensor:
    """Norm of each row's change beside its norm before, float32 (rows,); NaN where there is none."""
    wide = torch.promote_types(before.dtype, torch.float32)
    moved, norms = (_norms(values.to(wide), term) for values in (change, before))
    told = (norms > 0) & moved.any()  # a fused optimizer may have skipped the step
    return torch.where(told, moved / norms, torch.nan).float()


def _norms(values: Tensor, term: Term) -> Tensor:
    largest = values.abs().max().clamp_min(torch.finfo(values.dtype).tiny)  # the squares of small ones would be 0
    sums = row_sums((values / largest) ** 2, term)
    assert sums is not None  # such terms are not measured
    return sums.sqrt() * largest


def _of_rows(values: Tensor, rows: Tensor) -> Tensor:
    return torch.where(rows >= 0, values[rows.clamp_min(0)], torch.nan)
