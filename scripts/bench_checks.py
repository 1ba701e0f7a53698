"""The rows of the benchmark of correctness that are about more than a count of dead units."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from bench_planted import SPARSE, dead_units, zoo
from bench_scoring import Cell, attempt, score
from rivals import Tool, from_diagnosis
from torch import Tensor, nn

import relu_doctor


def nan_is_named(tool: Tool) -> Cell:
    """One unit's weights are NaN, and so is everything behind it."""
    case = zoo("mlp", 6)
    model, batches = case.build()
    truth = {**dead_units(case, model, batches), "3": frozenset[int]()}
    with torch.no_grad():
        model.get_parameter("0.weight")[3] = torch.nan
    outcome = attempt(tool, model, batches)
    found = score(tool, outcome.report, model, case.sites, truth, ["1", "3"])
    named = bool(outcome.report.non_finite)
    text = f"{found.text}, NaN {'named' if named else 'not named'}"
    return outcome.cell(text, right=found.right and named, found=found.found, planted=found.planted, false=found.false)


def few_inputs_prove_nothing(tool: Tool) -> Cell:
    """On 16 inputs many units are silent that fire on others of the 1,024."""
    model, batches = SPARSE.build()
    truth = dead_units(SPARSE, model, batches)
    outcome = attempt(tool, model, [batches[0][:16]])
    found = score(tool, outcome.report, model, SPARSE.sites, truth, ["1"])
    text = f"{found.false} live units called dead" if not tool.layers else "no unit is told"
    return outcome.cell(text, right=not found.false and not tool.layers, false=found.false)


def batch_norm_in_train_mode(tool: Tool) -> Cell:
    """A model that is being trained is looked at between two steps."""
    model, batches = zoo("conv_bn_relu", 3, 5, 5).build()
    outcome = attempt(tool, model.train(), batches)
    return outcome.cell("" if outcome.changed else "kept", right=True)


def left_as_it_was(tool: Tool) -> Cell:
    """Gradients, flags of each module, hooks of the user's own, and the random state."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    model[1].eval()
    model[4].requires_grad_(False)
    model[0].register_forward_hook(lambda module, args, output: None)
    x = torch.randn(1024, 6)
    model(x[:8]).sum().backward()
    outcome = attempt(tool, model, list(x.split(256)))
    text = f"changed {', '.join(outcome.changed)}" if outcome.changed else "kept"
    return Cell(text, not outcome.changed, changed=outcome.changed, error=outcome.error)


class Raises(nn.Module):
    """Raises on inputs that hold a value above 99."""

    def forward(self, x: Tensor) -> Tensor:
        """The input.

        Raises:
            RuntimeError: always on such inputs.
        """
        if bool((x > 99).any()):
            raise RuntimeError("such an input cannot be read")
        return x


def nothing_left_when_the_forward_raises(tool: Tool) -> Cell:
    """The second batch makes the model raise."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Raises(), nn.Linear(8, 3)).train()
    batches = list(torch.randn(1024, 6).split(256))
    batches[1][0] = 1e6
    outcome = attempt(Tool(**{**vars(tool), "runs_model": True}), model, batches)
    changed = [each for each in outcome.changed if each != "random state"]
    return Cell(f"left {', '.join(changed)}" if changed else "nothing left", not changed, changed=outcome.changed)


_NET = """
from torch import nn

def net():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 2))
"""


def saved_checkpoint(tool: Tool) -> Cell:
    """A file of `torch.save`, scanned from the command line."""
    if tool.name != "relu-doctor":
        return Cell("not offered", False)
    case = zoo("mlp", 6)
    model, batches = case.build()
    truth = dead_units(case, model, batches)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        (here / "net.py").write_text(_NET, encoding="utf-8")
        torch.save(model.state_dict(), here / "step100.pt")
        np.save(here / "data.npy", torch.cat(batches).numpy())
        command = [sys.executable, "-m", "relu_doctor", "scan", "step100.pt", "--model", "net.py:net"]
        printed = subprocess.run(
            [*command, "--data", "data.npy", "--format", "json"], cwd=here, capture_output=True, check=True
        )
    diagnosis = relu_doctor.Diagnosis.from_dict(json.loads(printed.stdout)["diagnoses"][0])
    found = score(tool, from_diagnosis(diagnosis), model, case.sites, truth, ["1", "3"])
    return Cell(found.text, found.right, found.found, found.planted, found.false)


def causes(tool: Tool) -> Cell:
    """Five units, each held dead by something else."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.ReLU()).eval()
    with torch.no_grad():
        first, second, norm = (model.get_submodule(name) for name in ("0", "2", "3"))
        assert isinstance(first, nn.Conv2d)
        assert isinstance(second, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        first.bias.zero_()  # type: ignore[union-attr]
        first.weight.abs_()  # the inputs are all large and positive
        second.weight.abs_()
        first.weight[0] = 0
        first.bias[0] = -0.1  # type: ignore[index]
        first.bias[1] = -200  # type: ignore[index]
        first.weight[2].neg_()
        second.weight[3] = 0
        second.weight[3, :3] = 1  # reads the three dead ones only
        second.bias[3] = -0.1  # type: ignore[index]
        norm.bias[4] = -1e4
    planted = {
        ("1", "zero_weights"): 1, ("1", "negative_bias"): 1, ("1", "input_offset"): 1,
        ("4", "dead_upstream"): 1, ("4", "normalization"): 1,
    }  # fmt: skip
    batches = list((10 + torch.rand(1024, 3, 5, 5)).split(256))
    outcome = attempt(tool, model, batches)
    # A tool may name the layer in place of the rectifier behind it.
    told = {(place, cause) for place, cause in outcome.report.causes}
    told |= {({"0": "1", "2": "4"}.get(place, place), cause) for place, cause in told}
    found = len(told & planted.keys())
    if not outcome.report.causes:
        return outcome.cell("not offered", right=False, planted=len(planted))
    return outcome.cell(f"{found}/{len(planted)}", right=found == len(planted), found=found, planted=len(planted))


CHECKS: dict[str, Callable[[Tool], Cell]] = {
    "NaN in a layer is named, not called dead": nan_is_named,
    "16 inputs prove nobody dead": few_inputs_prove_nothing,
    "what holds each of five units dead": causes,
    "a saved checkpoint file": saved_checkpoint,
    "BatchNorm's statistics, in train mode": batch_norm_in_train_mode,
    "gradients, flags, hooks and random state": left_as_it_was,
    "the forward raises": nothing_left_when_the_forward_raises,
}
