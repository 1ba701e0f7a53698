"""What the parameters say about each unit: its bias, the norm of its incoming weights, its normalisation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from relu_doctor.observe.forwards.surroundings import undisturbed
from relu_doctor.observe.graph.names import strip_wrappers
from relu_doctor.observe.graph.parts import Part
from relu_doctor.observe.graph.sharding import in_all_processes, whole
from relu_doctor.observe.graph.units import Term
from relu_doctor.observe.models.guard import preserved
from relu_doctor.observe.models.scripted import frozen_weights, module_at
from relu_doctor.observe.models.wrappers import fetched
from relu_doctor.observe.sites import ActivationSite

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


class ParameterReader:
    """Reads parameters as the forward uses them: after pruning masks and parametrizations, gathered and fetched.

    Each tensor is read once, in an order that all processes share where parameters are spread over several, and only
    what it says about units is kept.

    Args:
        model: whose parameters.
        sites: whose units.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, sites: Iterable[ActivationSite]) -> None:
        self._model = model
        self._lookup = {strip_wrappers(name): name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._frozen = frozen_weights(model)
        self._scales: dict[int, Tensor | None] = {}  # per term: the squared norm of its weight's rows, or its scale
        self._added: dict[int, Tensor | None] = {}
        wanted: dict[tuple[str, ...], list[Term]] = {}
        for term in (term for site in sites for term in site.terms):
            for names in {term.weight, term.additive} - {()}:
                wanted.setdefault(names, []).append(term)
        with self._untouched():
            for names in in_all_processes(model, sorted(wanted)):
                value = self._effective(names)
                for term in wanted.get(names, ()):
                    self._take(names, value, term)

    def _take(self, names: tuple[str, ...], value: Tensor | None, term: Term) -> None:
        """Keep what a tensor says about the units of one term."""
        if names == term.weight and not (term.computed and self._in_the_forward(names)):
            rows = _row_squares(value, term) if term.kind == "weight" else _rows(value, term, term.weight_part)
            self._scales[id(term)] = rows
        if names == term.additive:
            self._added[id(term)] = _rows(value, term, term.additive_part)

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        """The code of a parametrization may draw random numbers, or count how often it was called."""
        if not any(".parametrizations." in f".{name}" for name in self._lookup.values()):
            yield
            return
        with undisturbed(self._model), preserved(self._model), torch._C._EnableTorchFunction():
            for module in self._model.modules():
                module.training = False
            yield

    def _in_the_forward(self, names: tuple[str, ...]) -> bool:
        """Whether it is the model's own code that computes a weight, and no mask or parametrization."""
        full_names = [self._lookup.get(name, name) for name in names]
        leaves = [(f".{name}.", name.rpartition(".")[2]) for name in full_names]
        return not any(leaf in _COMPUTED or ".parametrizations." in path for path, leaf in leaves)

    def read(self, site: ActivationSite) -> UnitParameters:
        """What the parameters say about the units of one of the sites."""
        return _summary(site, self._scales, self._added)

    def _effective(self, names: tuple[str, ...]) -> Tensor | None:
        """The tensor that the forward uses: the parameter, or what a mask or parametrization makes of several."""
        for name in names:
            if name in self._frozen:
                return self._frozen[name].detach()
            full_name = self._lookup.get(name, name)
            path, _, leaf = full_name.rpartition(".")
            computed = leaf in _COMPUTED or ".parametrizations." in f".{path}."
            if len(names) > 1 and not computed:
                continue  # the model's own code computes a weight of them
            if ".parametrizations." in f".{path}.":
                path, _, leaf = f".{path}".partition(".parametrizations.")
                path, leaf = path.removeprefix("."), leaf.partition(".")[0]
            with fetched(self._model, full_name, gathered=computed):
                try:
                    value = getattr(module_at(self._model, path), _COMPUTED.get(leaf, leaf))
                except (AttributeError, KeyError):
                    continue
                if isinstance(value, Tensor):
                    return whole(value.detach())
        return None


def _summary(
    site: ActivationSite, scales: Mapping[int, Tensor | None], additions: Mapping[int, Tensor | None]
) -> UnitParameters:
    nothing = torch.full((site.num_units,), torch.nan, dtype=torch.float64)
    bias, squares, gamma, beta = nothing.clone(), nothing.clone(), nothing.clone(), nothing.clone()
    norms: set[str] = set()
    accounted = True
    for term in site.terms:
        added, scale = additions.get(id(term)), scales.get(id(term))
        if added is not None and term.direct and term.unit_slope:
            bias = _plus(bias, added)
        accounted &= not (term.direct and term.additive) or (added is not None and term.unit_slope)
        if term.kind == "weight":
            accounted &= term.unit_slope or not term.direct  # a gate or a norm of the model's own scales it
            squares = _plus(squares, scale)
            continue
        if term.kind == "other":
            continue
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
        rows = _rows(added, term, term.additive_part)
        if rows is not None:
            squares = _plus(squares, rows**2)
    return squares.sqrt()


def _plus(total: Tensor, values: Tensor | None) -> Tensor:
    """The sum where either is known."""
    if values is None:
        return total
    both = torch.nan_to_num(total) + torch.nan_to_num(values)
    return torch.where(torch.isnan(total) & torch.isnan(values), torch.nan, both)


def _rows(values: Tensor | None, term: Term, part: Part | None) -> Tensor | None:
    """The value of each unit's row of a vector of parameters, or of the part of it that is used."""
    if values is None or values.is_complex():
        return None
    if part is not None:
        return _picked(part.values(values), term)
    flat = values.double().cpu()
    flat = flat.squeeze() if flat.dim() > 1 else flat
    return _picked(flat[None] if flat.dim() == 0 else flat, term)


def _picked(per_row: Tensor, term: Term) -> Tensor | None:
    if per_row.dim() != 1 or int(term.rows.max()) >= len(per_row):
        return None
    return torch.where(term.rows >= 0, per_row[term.rows.clamp_min(0)], torch.nan)


def _row_squares(weight: Tensor | None, term: Term) -> Tensor | None:
    if weight is None or weight.dim() < 2:
        return None
    weight = weight.abs() if weight.is_complex() else weight
    if term.weight_part is not None:
        return _picked(term.weight_part.squares(weight), term)
    sums = row_sums(weight.double().cpu() ** 2, term)
    return None if sums is None else _picked(sums, term)


def row_sums(values: Tensor, term: Term) -> Tensor | None:
    """Sums of a tensor of a weight's shape over each of its rows: (rows,); ``None`` where it has none.

    Args:
        values: on any device.
        term: says which axis counts rows.
    """
    if term.transposed_groups:
        groups = term.transposed_groups
        inputs, per_group = values.shape[:2]
        return values.reshape(groups, inputs // groups, per_group, -1).sum((1, 3)).reshape(-1)
    if term.weight_axis is None:
        return None
    return values.movedim(term.weight_axis, 0).flatten(1).sum(1)
