"""Scoring for the benchmark of correctness: what a tool said beside the truth, and what it left behind on the model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rivals import Report, Told, Tool, quietly
from torch import nn

from tests.planting import Site, clone


@dataclass(frozen=True)
class Cell:
    """What one tool made of one row.

    Attributes:
        text: as the table shows it.
        right: nothing was missed, nothing falsely flagged, nothing changed.
        found, planted, false: dead units found, dead units that there are, live units called dead (or layers).
        changed: what the tool left changed on the model.
        error: what it raised.
    """

    text: str
    right: bool
    found: int = 0
    planted: int = 0
    false: int = 0
    changed: tuple[str, ...] = ()
    error: str = ""

    @property
    def missed(self) -> int:
        """Dead units that were not found."""
        return self.planted - self.found


@dataclass(frozen=True)
class Outcome:
    """A run of a tool: its report, or what it raised; and what it left changed."""

    report: Report
    changed: tuple[str, ...]
    error: str = ""

    def cell(self, text: str, *, right: bool, found: int = 0, planted: int = 0, false: int = 0) -> Cell:
        """A cell; whatever its text, an error or a changed model is no right answer."""
        if self.error:
            return Cell(f"error: {self.error}", False, changed=self.changed, error=self.error)
        changed = tuple(each for each in self.changed if each != "random state")  # told in a row of its own
        text += f"{'; ' if text else ''}changed {', '.join(changed)}" if changed else ""
        return Cell(text, right and not changed, found, planted, false, self.changed)


def attempt(tool: Tool, model: nn.Module, batches: Sequence[Any], dim: int = 1) -> Outcome:
    """Run a tool on a model."""
    given = [torch.cat(list(batches))] if tool.one_batch else clone(list(batches))
    twin = copy.deepcopy(model)
    for copied, parameter in zip(twin.parameters(), model.parameters(), strict=True):
        copied.grad = parameter.grad  # which deepcopy leaves behind
    before, random = _facts(model), torch.get_rng_state()
    if not tool.runs_model:  # what the user's own forward changes is no fault of the tool
        for batch in given:
            with torch.no_grad():
                twin(batch)
        before, random_after = _facts(twin), torch.get_rng_state()
        torch.set_rng_state(random)
        random = random_after
    report, error = Report([]), ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            report = quietly(lambda: tool.run(model, given, dim))
        except Exception as raised:  # noqa: BLE001 a tool may raise anything: that is what is told
            error = type(raised).__name__
    changed = _differences(before, _facts(model))
    if not torch.equal(random, torch.get_rng_state()):
        changed.append("random state")
    return Outcome(report, tuple(changed), error)


def _facts(model: nn.Module) -> dict[str, dict[str, Any]]:
    """All that must be as it was, by kind."""
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    return {
        "parameters": {name: parameter.detach().clone() for name, parameter in parameters.items()},
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in parameters.items()},
        "training flags": {name: module.training for name, module in modules.items()},
        "hooks": {
            name: tuple(len(hooks) for key, hooks in vars(module).items() if "_hooks" in key and hooks)
            for name, module in modules.items()
        },
        "attributes": {
            name: tuple(sorted(key for key in vars(module) if key != "training")) for name, module in modules.items()
        },
    }


def _differences(before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [kind for kind in before if not _same(before[kind], after[kind])]


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
        return bool(a == b)

    return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)


@dataclass(frozen=True)
class Score:
    """Dead units, or layers with dead units: found, planted, and live ones called dead."""

    found: int
    planted: int
    false: int
    layers: bool
    other_units: bool

    @property
    def text(self) -> str:
        """As the table shows it."""
        text = f"{self.found}/{self.planted}{' layers' if self.layers else ''}" if self.planted else ""
        false = f"{self.false} false" if self.false else "" if self.planted else "none"
        return ", ".join(each for each in (text, false, "other units" if self.other_units else "") if each)

    @property
    def right(self) -> bool:
        """All of them, and no others."""
        return self.found == self.planted and not self.false and not self.other_units and not self.layers


def score(
    tool: Tool,
    report: Report,
    model: nn.Module,
    sites: Iterable[Site],
    truth: Mapping[str, frozenset[int]],
    order: Sequence[str] = (),
) -> Score:
    """Match what was said to the sites it may be about.

    Args:
        tool: who said it.
        report: what.
        model: of which.
        sites: its sites.
        truth: the dead units of each site.
        order: names of the sites in the order of the calls of a forward.
    """
    by_name = {site.name: site for site in sites}
    said: dict[str, list[Told]] = {name: [] for name in by_name}
    modules = dict(model.named_modules())
    found, false, other_units = 0, 0, False
    for told in report.told:
        about = [site for site in by_name.values() if told.place in _places(site, order)]
        layer = modules.get(told.place)
        width = getattr(layer, "out_features", None) or getattr(layer, "out_channels", None)
        if told.place in said:
            said[told.place].append(told)
        elif about:
            said[max(about, key=lambda site: _match(told, site, truth[site.name])).name].append(told)
        elif width is not None and _counts_something_else(told, width):
            other_units = True
        else:
            false += _number(told)
    for name, statements in said.items():
        site, dead = by_name[name], truth[name]
        if calls := [each for each in statements if each.place.startswith("call ")]:
            statements = [_in_every_call(calls)]
        if statements:
            best = max(statements, key=lambda told: _match(told, site, dead))
            other_units |= _counts_something_else(best, site.num_units)
            hits, minus = _match(best, site, dead)
            found, false = found + hits, false - minus
    planted = sum(map(bool, truth.values())) if tool.layers else sum(map(len, truth.values()))
    return Score(found, planted, false, tool.layers, other_units)


def _places(site: Site, order: Sequence[str]) -> set[str]:
    """Where a tool may rightly speak of a site: its module, the layer before it, its calls."""
    calls = {f"call {index}" for index, name in enumerate(order) if name == site.name}
    return {site.name, site.name.split("#", maxsplit=1)[0], site.by.rpartition(".")[0], *calls}


def _in_every_call(calls: Sequence[Told]) -> Told:
    """A unit is dead if it is in every call of its site."""
    sets = [told.dead for told in calls if isinstance(told.dead, frozenset)]
    if len(sets) == len(calls):
        return Told(calls[0].place, frozenset.intersection(*sets), calls[0].total)
    return min(calls, key=_number)


def _number(told: Told) -> int:
    return len(told.dead) if isinstance(told.dead, frozenset) else int(told.dead)


def _counts_something_else(told: Told, units: int) -> bool:
    return bool(told.dead) and told.total is not None and abs(told.total - units) > 0.02 * units


def _match(told: Told, site: Site, dead: frozenset[int]) -> tuple[int, int]:
    """Dead units found, and minus the live ones called dead."""
    if isinstance(told.dead, bool):
        return (int(told.dead and bool(dead)), -int(told.dead and not dead))
    if _counts_something_else(told, site.num_units):
        return (0, 0)
    if isinstance(told.dead, frozenset):
        return (len(told.dead & dead), -len(told.dead - dead))
    return (min(told.dead, len(dead)), -max(0, told.dead - len(dead)))
