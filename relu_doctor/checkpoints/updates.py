"""How far the weights of each unit moved, from optimizer state and from an earlier checkpoint of the same run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from relu_doctor.checkpoints.formats import Checkpoint
from relu_doctor.checkpoints.optimizer import OptimizerState
from relu_doctor.diagnose.origins import LearningRateEvidence
from relu_doctor.diagnose.table import UnitTable
from relu_doctor.observe.parameters import weight_norms
from relu_doctor.observe.sites import ActivationSite, strip_wrappers
from relu_doctor.scanning import Observation

_FAMILIES = {"adam-like": "Adam-like", "sgd": "SGD"}


def learning_rate_evidence(
    checkpoint: Checkpoint,
    observation: Observation,
    earlier: tuple[Checkpoint, Observation] | None = None,
) -> LearningRateEvidence | None:
    """What a checkpoint's file, and an earlier one of its run, record about the size of updates.

    Args:
        checkpoint: with its optimizer tied to the model's parameters.
        observation: what its scan saw.
        earlier: a checkpoint of the same run with its evidence.

    Returns:
        ``None`` where the files record nothing.
    """
    sites = observation.sites
    optimizer = checkpoint.optimizer
    if optimizer is None and earlier is None:
        return None
    weights = checkpoint.state_dict
    last: dict[str, NDArray[np.float64]] = {}
    if optimizer is not None and optimizer.mapped:
        updates = {name: update for name in weights if (update := optimizer.last_update(name)) is not None}
        last = _ratios(sites, updates, weights)
    full = _full_steps(sites, optimizer, weights)
    between: dict[str, NDArray[np.float64]] = {}
    newly: dict[str, NDArray[np.bool_]] = {}
    steps: int | None = None
    if earlier is not None:
        before = earlier[0].state_dict
        moved = {
            name: weights[name].float() - before[name].float()
            for name in weights
            if name in before and weights[name].shape == before[name].shape and weights[name].is_floating_point()
        }
        between = _ratios(sites, moved, before)
        newly = _newly_silent(earlier[1].table, observation.table)
        if checkpoint.step is not None and earlier[0].step is not None:
            steps = checkpoint.step - earlier[0].step
    return LearningRateEvidence(
        learning_rates=() if optimizer is None else optimizer.learning_rates,
        optimizer="" if optimizer is None else _FAMILIES.get(optimizer.kind, ""),
        last_update=last,
        full_step=full,
        between=between,
        earlier="" if earlier is None else earlier[0].path.name,
        steps_between=steps,
        newly_silent=newly,
    )


def earlier_of_run(checkpoint: Checkpoint, seen: Iterable[Checkpoint]) -> Checkpoint | None:
    """The latest of the checkpoints seen that is an earlier one of the same run.

    Taken for the same run: the same folder, names that differ in their numbers only, the same tensors, and a smaller
    step (or epoch, where no step is recorded).
    """
    candidates = [other for other in seen if _same_run(checkpoint, other) and _progress(other) < _progress(checkpoint)]
    return max(candidates, key=_progress, default=None)


def tie_optimizer(checkpoint: Checkpoint, model: nn.Module) -> Checkpoint:
    """The checkpoint with its optimizer's state under the names of a model's parameters."""
    pairs = [(strip_wrappers(name), tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    return checkpoint.with_parameters(pairs)


def _progress(checkpoint: Checkpoint) -> tuple[float, float]:
    step = checkpoint.step if checkpoint.step is not None else -1
    epoch = checkpoint.epoch if checkpoint.epoch is not None else -1
    return (step, epoch)


def run_name(checkpoint: Checkpoint) -> str:
    """What the names of one run's checkpoints have in common: the file's name less its numbers."""
    words = re.split(r"[^A-Za-z]*\d+[^A-Za-z]*", checkpoint.path.stem)
    return "-".join(word for word in words if word) or "run"


def _same_run(one: Checkpoint, other: Checkpoint) -> bool:
    shapes = [{name: tensor.shape for name, tensor in each.state_dict.items()} for each in (one, other)]
    return one.path.parent == other.path.parent and run_name(one) == run_name(other) and shapes[0] == shapes[1]


def _ratios(
    sites: Iterable[ActivationSite], changes: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> dict[str, NDArray[np.float64]]:
    found: dict[str, NDArray[np.float64]] = {}
    for site in sites:
        if not site.num_units:
            continue
        ratio = weight_norms(site, changes) / weight_norms(site, weights)
        if not bool(ratio.isnan().all()):
            found[site.site_id] = ratio.numpy()
    return found


def _full_steps(
    sites: Iterable[ActivationSite], optimizer: OptimizerState | None, weights: Mapping[str, Tensor]
) -> dict[str, NDArray[np.float64]]:
    if optimizer is None or not optimizer.mapped or optimizer.kind != "adam-like":
        return {}
    steps = {
        name: torch.tensor(group.lr).expand(tensor.shape)
        for name, tensor in weights.items()
        if (group := optimizer.group_of(name)) is not None and group.lr is not None
    }
    return _ratios(sites, steps, weights)


def _newly_silent(before: UnitTable, now: UnitTable) -> dict[str, NDArray[np.bool_]]:
    earlier = {str(key): rows for key, rows in before.units.groupby("site_id", sort=False)}
    newly: dict[str, NDArray[np.bool_]] = {}
    for key, rows in now.units.groupby("site_id", sort=False):
        other = earlier.get(str(key))
        if other is not None and len(other) == len(rows):
            fired, fires = other["inputs_fired"].to_numpy(), rows["inputs_fired"].to_numpy()
            newly[str(key)] = (fired > 0) & (fires == 0)
    return newly
