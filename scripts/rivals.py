"""The tools that the benchmarks compare: this project and its rivals, each used as its own documentation recommends.

Every tool is one function that reads batches and reports what it says of dead units; where a tool says less than which
units are dead, what it does say is reported: how many of a layer, or only that a layer has some. Used are

* torchlens: ``tl.trace(save=…)`` of the activation functions and ``tl.debug.dead_neurons_rows`` (the core of
  ``dead_neurons``), told where the units lie; ``find_nan`` where the output is not finite;
* neural-observatory: its quick start, with ``obs.step`` before each forward, and the dead-neuron rows of the report;
* torchdiag: ``check_dead_neurons``; dead-relu-viz: ``visualization(…, with_activation=True)``, whose printed lines
  hold the counts;
* torchmortem: its quick start, and the findings on dead units; torch-audit: wrapper mode, with the findings on dead
  neurons (TA105), dead filters (TA405) and NaN (TA100).
"""

from __future__ import annotations

import contextlib
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from importlib import import_module, metadata, util
from itertools import chain
from operator import or_
from typing import Any

import torch
from torch import Tensor, nn

import relu_doctor

Batches = Iterable[Tensor]
_FUNCTIONS = ("relu", "clamp", "where", "leaky_relu", "elu", "gelu")  # that torchlens is asked for


@dataclass(frozen=True)
class Told:
    """What a tool said of one place.

    Attributes:
        place: path of a module, name of a site, or ``call 3``: the third call of a rectifier.
        dead: which units, how many of them, or whether there are any.
        total: units that it counted there, where it says so.
    """

    place: str
    dead: frozenset[int] | int | bool
    total: int | None = None


@dataclass(frozen=True)
class Report:
    """What a tool said of a model.

    Attributes:
        told: of each place.
        non_finite: places where it said that there is NaN.
        causes: what it said to hold units dead: (place, cause) to the number of units.
    """

    told: list[Told]
    non_finite: frozenset[str] = frozenset()
    causes: dict[tuple[str, str], int] = field(default_factory=dict)


@dataclass(frozen=True)
class Tool:
    """A tool to compare.

    Attributes:
        name: of its distribution.
        module: that is imported.
        run: reads batches through a model in its recommended way; ``dim`` is where the units lie.
        runs_model: it performs the forward itself; else it watches one of the user's.
        one_batch: it judges a single batch.
        layers: it tells which layers have dead units, not which units or how many.
        batches: how many batches it can be timed on, since it keeps the activations of all.
    """

    name: str
    module: str
    run: Callable[[nn.Module, Batches, int], Report]
    runs_model: bool = True
    one_batch: bool = False
    layers: bool = False
    batches: int = 100

    @property
    def version(self) -> str | None:
        """Of what is installed; ``None`` where nothing is."""
        return metadata.version(self.name) if util.find_spec(self.module) else None


def quietly(run: Callable[[], Report]) -> Report:
    """What a tool reports, without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return run()


def from_diagnosis(diagnosis: relu_doctor.Diagnosis) -> Report:
    """What this project says."""
    units = diagnosis.units
    causes = Counter(zip(units["site"], units["mechanism"], strict=True))
    return Report(
        [Told(name, _indices(mask), len(mask)) for name, mask in diagnosis.mask("dead").items()],
        frozenset(name for name, mask in diagnosis.mask("non_finite").items() if bool(mask.any())),
        {pair: count for pair, count in causes.items() if pair[1]},
    )


def _indices(mask: Tensor) -> frozenset[int]:
    return frozenset(mask.nonzero().flatten().tolist())


def _relu_doctor(model: nn.Module, batches: Batches, dim: int) -> Report:
    return from_diagnosis(relu_doctor.scan(model, batches))


def _torchlens(model: nn.Module, batches: Batches, dim: int) -> Report:
    lens = import_module("torchlens")
    told: list[Told] = []
    non_finite = frozenset[str]()
    for batch in batches:
        with torch.no_grad():
            trace = lens.trace(model, batch, save=reduce(or_, map(lens.func, _FUNCTIONS)))
        rows = [row for row in lens.debug.dead_neurons_rows(trace, dim=dim)[0] if not row["reason"]]
        applied = [row for row in rows if trace[row["op"]].func_name.rstrip("_") in _FUNCTIONS]
        here = [Told(f"call {index}", _shown(row), row["total_units"]) for index, row in enumerate(applied)]
        told = [min(pair, key=_number) for pair in zip(told, here, strict=True)] if told else here
        if any(bool(trace[row["op"]].out.isnan().any()) for row in applied):
            non_finite |= {lens.debug.find_nan(model, batch).label}
        trace.cleanup()
    return Report(told, non_finite)


def _shown(row: dict[str, Any]) -> frozenset[int] | int:
    """The units that a row names; how many, where it names only the first ten."""
    shown, count = frozenset(row["sample_dead_idx"]), int(row["dead_count"])
    return shown if len(shown) == count else count


def _number(told: Told) -> int:
    return len(told.dead) if isinstance(told.dead, frozenset) else int(told.dead)


def _neural_observatory(model: nn.Module, batches: Batches, dim: int) -> Report:
    observatory = import_module("neural_observatory").Observatory(model)
    with observatory:
        for step, batch in enumerate(batches):
            observatory.step(step=step, epoch=0)
            with torch.no_grad():
                model(batch)
    results = observatory.report().results
    return Report(
        [
            Told(result.layer_name, result.metrics["dead_neurons"], result.metrics["total_neurons"])
            for result in results
            if result.analyzer_name == "dead_neurons" and "dead_neurons" in result.metrics
        ],
        frozenset(each.layer_name for each in results if re.search(r"\bnan\b", " ".join(each.warnings).lower())),
    )


def _torchdiag(model: nn.Module, batches: Batches, dim: int) -> Report:
    dead: dict[str, dict[str, int]] = {}
    for batch in batches:
        for name, row in import_module("torchdiag").check_dead_neurons(model, batch).items():
            dead[name] = min(row, dead.get(name, row), key=lambda each: each["dead"])
    return Report([Told(name, row["dead"], row["total"]) for name, row in dead.items()])


class _Labelled:
    """Batches as a loader gives them, with labels; the first is looked at before all are read."""

    def __init__(self, batches: Batches) -> None:
        self.batches = iter(batches)
        self.first: list[Tensor] = []

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.first:
            self.first = [next(self.batches)]
            yield self.first[0], torch.zeros(len(self.first[0]))
        for batch in chain(self.first, self.batches):
            yield batch, torch.zeros(len(batch))


def _dead_relu_viz(model: nn.Module, batches: Batches, dim: int) -> Report:
    device = next(model.parameters()).device
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        import_module("dead_relu_viz").visualization(model, _Labelled(batches), with_activation=True, device=device)
    found = re.findall(r"^  (\S+) -> +(?:(\d+) dead \(([\d.]+)%\)|none dead)", printed.getvalue(), re.MULTILINE)
    return Report(
        [
            Told(name, int(count or 0), round(int(count) * 100 / float(percent)) if float(percent or 0) else None)
            for name, count, percent in found
        ]
    )


def _torchmortem(model: nn.Module, batches: Batches, dim: int) -> Report:
    with import_module("torchmortem").Autopsy(model) as autopsy:
        for batch in batches:
            with torch.no_grad():
                model(batch)
            autopsy.step(loss=0.0)
    findings = [finding for finding in autopsy.get_report().findings if finding.category == "dead_units"]
    return Report([Told(layer, True) for finding in findings for layer in finding.affected_layers])


def _torch_audit(model: nn.Module, batches: Batches, dim: int) -> Report:
    with import_module("torch_audit").audit_dynamic(model, every_n_steps=1) as auditor:
        for batch in batches:
            with torch.no_grad():
                auditor.forward(batch)
    findings = auditor.finish().findings
    return Report(
        [Told(layer, True) for layer in sorted({each.module_path for each in findings if each.rule_id == "TA105"})],
        frozenset(each.module_path for each in findings if each.rule_id == "TA100"),
        {
            (each.module_path, "zero_weights"): each.metadata["dead_count"]
            for each in findings
            if each.rule_id == "TA405"
        },
    )


TOOLS = {
    tool.name: tool
    for tool in (
        Tool("relu-doctor", "relu_doctor", _relu_doctor),
        Tool("torchlens", "torchlens", _torchlens, one_batch=True),
        Tool("neural-observatory", "neural_observatory", _neural_observatory, runs_model=False, batches=3),
        Tool("torchdiag", "torchdiag", _torchdiag, one_batch=True),
        Tool("dead-relu-viz", "dead_relu_viz", _dead_relu_viz, batches=3),
        Tool("torchmortem", "torchmortem", _torchmortem, runs_model=False, layers=True),
        Tool("torch-audit", "torch_audit", _torch_audit, runs_model=False, layers=True),
    )
}
