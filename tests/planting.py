"""Cases of the zoo: a model, its inputs, and the truth about its units, planted without the package under test.

Each additive parameter is shifted, in the order of the forward pass, so that planted units are silent on every input,
or fire on exactly one, and all others fire on about half of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.reference import Seen, pre_activations

Arrange = Callable[[Tensor, int], Tensor]
SIZES = (10, 9, 1)  # inputs per batch; the last batch of one is on purpose


def channels(pre: Tensor, num_inputs: int) -> Tensor:
    """(inputs, units, positions…)."""
    return pre[..., None].flatten(2)


def features(pre: Tensor, num_inputs: int) -> Tensor:
    """(inputs, positions…, units)."""
    return pre.movedim(-1, 1)[..., None].flatten(2)


def time_first(pre: Tensor, num_inputs: int) -> Tensor:
    """(positions, inputs, units)."""
    return pre.permute(1, 2, 0)


def tokens(pre: Tensor, num_inputs: int) -> Tensor:
    """(inputs x positions, units)."""
    return pre.reshape(num_inputs, -1, pre.shape[-1]).transpose(1, 2)


def flattened(num_units: int) -> Arrange:
    """(inputs, units x positions): a feature map that was flattened."""
    return lambda pre, num_inputs: pre.reshape(len(pre), num_units, -1)


@dataclass(frozen=True)
class Site:
    """What is true of one site.

    Attributes:
        name: its readable name.
        num_units: its units.
        dead: units silent on every input.
        once: units that fire on exactly one input.
        by: dotted path of the parameter that is added to its pre-activations; empty: the factory planted by itself.
        rows: first and last + 1 of the parameter's rows that belong to its units; all of them by default.
        arrange: the pre-activation as (inputs, units, positions).
        low, high: the firing interval.
        post: the rectifier, on float64 numpy arrays.
        immortal: its slope is zero nowhere.
        calls: how often one forward applies it.
    """

    name: str
    num_units: int
    dead: frozenset[int] | set[int] = frozenset()
    once: frozenset[int] | set[int] = frozenset()
    by: str = ""
    rows: tuple[int, int] | None = None
    arrange: Arrange = features
    low: float = 0.0
    high: float = np.inf
    post: Callable[[Any], Any] = lambda z: np.maximum(z, 0)
    immortal: bool = False
    calls: int = 1

    def fires(self, values: Any) -> Any:
        """Where values lie in the firing interval."""
        return (values > self.low) & (values < self.high)


@dataclass(frozen=True)
class Case:
    """A model of the zoo.

    Attributes:
        name: of the case.
        make: builds the model, in eval mode, nothing planted yet.
        batches: makes the inputs.
        sites: what is true of them, in forward order.
        order: names of the sites in the order of the calls of one batch's forward, empty for a call that is of no site;
            by default each in turn.
        call: hands a batch to the model, for the oracle.
        count: inputs in a batch.
        mask: bool (inputs, positions) of a batch.
        owners: of a batch, per site that sees a selection of rows, which input each row of each of its calls is of.
        scan: arguments of the scan.
        seed: of the model's initialisation, one with which the plan can be carried out.
    """

    name: str
    make: Callable[[], nn.Module]
    batches: Callable[[], list[Any]]
    sites: tuple[Site, ...]
    order: Callable[[Any], Sequence[str]] | None = None
    call: Callable[[nn.Module, Any], object] = lambda model, batch: model(batch)
    count: Callable[[Any], int] = len
    mask: Callable[[Any], Tensor] | None = None
    owners: Callable[[Any], Mapping[str, Sequence[Tensor]]] | None = None
    scan: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def build(self) -> tuple[nn.Module, list[Any]]:
        """The model with its units planted, and fresh batches."""
        torch.manual_seed(self.seed)
        model, batches = self.make(), self.batches()
        for site in self.sites:
            for _ in range(8 if site.by else 0):  # a recurrent unit shifts its own inputs: repeat until it stands
                if not self._shift(model, batches, site):
                    break
        return model, batches

    def seen(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, Seen]:
        """Every value that each site receives."""
        seen: dict[str, Seen] = {}
        first = 0
        for batch in batches:
            num_inputs = self.count(batch)
            if not num_inputs:
                continue
            calls = pre_activations(lambda batch=batch: self.call(model, clone(batch)))  # type: ignore[misc]
            names = self.order(batch) if self.order else [s.name for s in self.sites for _ in range(s.calls)]
            assert len(calls) == len(names), f"{self.name}: the oracle saw {len(calls)} calls, expected {len(names)}"
            grouped: dict[str, list[Tensor]] = {}
            for name, pre in ((name, pre) for name, pre in zip(names, calls, strict=True) if name):
                grouped.setdefault(name, []).append(
                    self[name].arrange(pre.float() if pre.dtype == torch.bfloat16 else pre, num_inputs)
                )
            owners = self.owners(batch) if self.owners else {}
            for name, pres in grouped.items():
                own = seen.setdefault(name, Seen())
                if name not in owners:
                    own.add(first, pres)
                    continue
                rows, whose = torch.cat(pres), torch.cat(list(owners[name]))
                for owner in whose.unique().tolist():
                    own.add(first + owner, [rows[whose == owner].movedim(0, -1).flatten(1)[None]])
            first += num_inputs
        return seen

    def __getitem__(self, name: str) -> Site:
        return next(site for site in self.sites if site.name == name)

    def highest(self, model: nn.Module, batches: list[Any], site: Site) -> Any:
        """The largest pre-activation of each input and unit: (inputs, units)."""
        seen = self.seen(model, batches)[site.name]
        if self.mask is None:
            return np.concatenate([values.max(2) for values in seen.values])
        masks = [self.mask(batch).numpy() for batch in batches]
        hidden = [np.where(m[:, None, :], v, -np.inf) for m, v in zip(masks, seen.values, strict=True)]
        return np.concatenate([values.max(2) for values in hidden])

    def _shift(self, model: nn.Module, batches: list[Any], site: Site) -> bool:
        """Move one site's additive parameter to where its units are as planned; whether it had to move."""
        highest = np.sort(self.highest(model, batches, site), axis=0) - site.low
        fired = (highest > 0).sum(0)
        wanted = dict.fromkeys(site.dead, 0) | dict.fromkeys(site.once, 1)
        if all(fired[unit] == wanted.get(unit, max(fired[unit], 2)) for unit in range(site.num_units)):
            return False
        with torch.no_grad():
            tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}  # frozen norms keep buffers
            parameter = tensors[site.by][slice(*site.rows or (None,))].view(-1)
            for unit in range(site.num_units):
                column = highest[:, unit]
                if unit in site.dead:
                    parameter[unit] -= column[-1] + 0.25
                elif unit in site.once:
                    parameter[unit] -= (column[-1] + column[-2]) / 2
                elif fired[unit] < 2:
                    parameter[unit] -= column[len(column) // 2] - 1e-3
        return True


def clone(batch: Any) -> Any:
    """A batch with its own tensors."""
    if isinstance(batch, Tensor):
        return batch.clone()
    if isinstance(batch, Mapping):
        return {key: clone(value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(clone(value) for value in batch)
    return batch


def normal(
    *shape: int, sizes: Sequence[int] = SIZES, seed: int = 1, dtype: torch.dtype = torch.float32
) -> Callable[[], list[Any]]:
    """Batches of standard-normal inputs."""

    def make() -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(size, *shape, generator=generator).to(dtype) for size in sizes]

    return make


def positive(*shape: int, marked: int = 3, sizes: Sequence[int] = SIZES, seed: int = 1) -> Callable[[], list[Any]]:
    """Batches of inputs in [0.1, 1.1] whose first feature is 0, but for one input, where it is 50."""

    def make() -> list[Any]:
        batches = [batch.abs().clamp(max=1) + 0.1 for batch in normal(*shape, sizes=sizes, seed=seed)()]
        for batch in batches:
            batch[:, 0] = 0
        batches[0][marked, 0] = 50
        return batches

    return make


def plant_rows(weight: Tensor, dead: Iterable[int], once: Iterable[int]) -> None:
    """Rows of a weight without a bias, for :func:`positive` inputs: negative but for the marked feature."""
    with torch.no_grad():
        for unit in dead:
            weight[unit] = -weight[unit].abs() - 0.01
        for unit in once:
            weight[unit] = -weight[unit].abs() - 0.01
            weight[unit, 0] = weight[unit].abs().sum() + 1
