"""What the parameters say about each unit: its bias, the norm of its incoming weights, its normalisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from relu_doctor.observe.sites import ActivationSite, Term, strip_wrappers

_COMPUTED = {"weight_orig": "weight", "bias_orig": "bias", "weight_g": "weight", "weight_v": "weight"}


@dataclass(frozen=True, slots=True)
class UnitParameters:
    """Parameters of a site's units, float64 (units,), NaN where there is none.

    Attributes:
        bias: the additive parameter next to the rectifier: beta behind a norm, summed over the producers of a sum.
        weight_l2: Euclidean norm of the incoming weights, over all producers of a sum.
        gamma, beta: scale and shift of the normalisation next to the rectifier.
        norm: ``batch_norm``, ``norm``, ``mixed`` (beside something that is not normalised) or empty.
        decomposable: the pre-activation is w.h plus ``bias``, unscaled, on every path.
    """

    bias: Tensor
    weight_l2: Tensor
    gamma: Tensor
    beta: Tensor
    norm: str
    decomposable: bool


@torch.no_grad()
def read_parameters(model: nn.Module, site: ActivationSite) -> UnitParameters:
    """Read a site's parameters as the forward uses them (after pruning masks and parametrizations)."""
    lookup = {strip_wrappers(name): name for name, _ in model.named_parameters(remove_duplicate=False)}
    nothing = torch.full((site.num_units,), torch.nan, dtype=torch.float64)
    bias, squares, gamma, beta = nothing.clone(), nothing.clone(), nothing.clone(), nothing.clone()
    norms: set[str] = set()
    accounted = True
    for term in site.terms:
        added = _rows(_effective(model, lookup, term.additive), term, axis=0)
        if added is not None and term.direct and term.unit_slope:
            bias = _plus(bias, added)
        accounted &= not (term.direct and term.additive) or (added is not None and term.unit_slope)
        if term.kind == "weight":
            squares = _plus(squares, _row_squares(_effective(model, lookup, term.weight), term))
            continue
        if term.kind == "other":
            continue
        scale = _rows(_effective(model, lookup, term.weight), term, axis=0)
        if scale is not None and term.direct:
            gamma = _plus(gamma, scale**2)
        if term.kind in {"batch_norm", "norm"} and term.direct:
            norms.add(term.kind)
            if added is not None:
                beta = _plus(beta, added)
    beside = any(term.nearest and term.kind in {"weight", "elementwise", "other"} for term in site.terms)
    return UnitParameters(
        bias=bias,
        weight_l2=squares.sqrt(),
        gamma=gamma.sqrt(),
        beta=beta,
        norm="" if not norms else "mixed" if beside or len(norms) > 1 else norms.pop(),
        decomposable=bool(site.terms) and site.complete and accounted,
    )


def weight_norms(site: ActivationSite, tensors: Mapping[str, Tensor]) -> Tensor:
    """Norm of each unit's incoming weights and bias, or of anything of their shapes: updates, differences.

    Args:
        site: whose units.
        tensors: by qualified parameter name.

    Returns:
        float64 (units,), over all producers of a sum; NaN where no tensor was given.
    """
    squares = torch.full((site.num_units,), torch.nan, dtype=torch.float64)
    for term in site.terms:
        if term.kind == "weight":
            given = next((tensors[name] for name in term.weight if name in tensors), None)
            squares = _plus(squares, _row_squares(given, term))
        added = next((tensors[name] for name in term.additive if name in tensors), None)
        rows = _rows(added, term, axis=0)
        if rows is not None:
            squares = _plus(squares, rows**2)
    return squares.sqrt()


def _plus(total: Tensor, values: Tensor | None) -> Tensor:
    """The sum where either is known."""
    if values is None:
        return total
    both = torch.nan_to_num(total) + torch.nan_to_num(values)
    return torch.where(torch.isnan(total) & torch.isnan(values), torch.nan, both)


def _effective(model: nn.Module, lookup: dict[str, str], names: tuple[str, ...]) -> Tensor | None:
    """The tensor that the forward uses: the parameter, or what a mask or parametrization makes of it."""
    for name in names:
        path, _, leaf = lookup.get(name, name).rpartition(".")
        if ".parametrizations." in f".{path}.":
            path, _, leaf = f".{path}".rpartition(".parametrizations.")
            path = path.removeprefix(".")
        try:
            value = getattr(model.get_submodule(path), _COMPUTED.get(leaf, leaf))
        except AttributeError:
            continue
        if isinstance(value, Tensor):
            return value.detach()
    return None


def _rows(values: Tensor | None, term: Term, *, axis: int) -> Tensor | None:
    if values is None:
        return None
    flat = values.double().cpu().movedim(axis, 0).squeeze() if values.dim() > 1 else values.double().cpu()
    if flat.dim() == 0:
        flat = flat[None]
    if flat.dim() != 1 or int(term.rows.max()) >= len(flat):
        return None
    return torch.where(term.rows >= 0, flat[term.rows.clamp_min(0)], torch.nan)


def _row_squares(weight: Tensor | None, term: Term) -> Tensor | None:
    if weight is None or weight.dim() < 2:
        return None
    squared = weight.double().cpu() ** 2
    if term.transposed_groups:
        groups = term.transposed_groups
        inputs, per_group = squared.shape[:2]
        sums = squared.reshape(groups, inputs // groups, per_group, -1).sum((1, 3)).reshape(-1)
    elif term.weight_axis is not None:
        sums = squared.movedim(term.weight_axis, 0).flatten(1).sum(1)
    else:
        return None
    return _rows(sums, term, axis=0)
